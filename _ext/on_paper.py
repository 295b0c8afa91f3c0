"""The book as LaTeX: the parts, numbers, boxes and tables that the pages have.

Sphinx makes one tree of all pages for LaTeX, with the first page as the book's root.
Here that page becomes a chapter like the others, the parts of the table of contents
come in, and each chapter takes the number of its file. Code that the pages fold away
is left out; proofs and solutions, which they fold too, are open.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from executed import Run
from run_pages import claim_row, table
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.transforms.post_transforms.images import ImageConverter
from sphinx_exercise.nodes import exercise_enumerable_node

# `\startpage{07}` comes before chapter 07, `\startpage{}` before one without a number
PREAMBLE = r"""
\addto\captionsenglish{\renewcommand{\contentsname}{Contents}}
\newcounter{page of the book}
\newcommand{\pagenumber}{}
\newcommand{\pageprefix}{}
\newcommand{\startpage}[1]{%
  \stepcounter{page of the book}%
  \renewcommand{\pagenumber}{#1}%
  \if\relax\detokenize{#1}\relax
    \setcounter{secnumdepth}{-1}\renewcommand{\pageprefix}{}%
  \else
    \setcounter{secnumdepth}{0}\renewcommand{\pageprefix}{#1.}%
  \fi}
\AtBeginDocument{%
  \renewcommand{\thechapter}{\pagenumber}%
  \renewcommand{\thefigure}{\pageprefix\arabic{figure}}%
  \renewcommand{\thetable}{\pageprefix\arabic{table}}%
  \renewcommand{\theequation}{\pageprefix\arabic{equation}}%
  \renewcommand{\theHchapter}{\arabic{page of the book}}%
  \renewcommand{\theHfigure}{\theHchapter.\arabic{figure}}%
  \renewcommand{\theHtable}{\theHchapter.\arabic{table}}%
  \renewcommand{\theHequation}{\theHchapter.\arabic{equation}}}
\usepackage{newunicodechar} % two signs of verdicts that the bold font lacks
\newunicodechar{✗}{{\mdseries\symbol{"2717}}}
\newunicodechar{◐}{{\mdseries\symbol{"25D0}}}
\renewcommand{\sphinxtablecontinued}[1]{\textsf{continued}}
\newenvironment{sphinxclasscell_output}
  {\sphinxsetup{verbatimwithframe=false,VerbatimColor={rgb}{1,1,1}}}{}
"""
WIDTHS = {  # of the columns of tables, by class or name
    "claims-ledger": (7, 34, 37, 22),
    "execution-table": (24, 8, 13, 8, 14, 19, 14),
    "tab-trust-bugs": (50, 50),
}


def latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


def files(document: nodes.document) -> list[addnodes.start_of_file]:
    """The pages that were put into the root page."""
    return list(document.findall(addnodes.start_of_file))


class PaperTransform(SphinxPostTransform):
    """A step on the way to LaTeX, before those of the other extensions."""

    formats = ("latex",)
    default_priority = 1

    def containers(self, *, kind: str) -> list[nodes.container]:
        found = self.document.findall(nodes.container)
        return [node for node in found if kind in node["classes"]]


class Parts(PaperTransform):
    """Make the root page a chapter, and put the chapters into their parts."""

    def run(self, **kwargs) -> None:
        root = next(iter(self.document.findall(nodes.section)))
        wrappers = [
            node
            for node in self.document.findall(nodes.compound)
            if "toctree-wrapper" in node["classes"]
        ]
        for node in wrappers:
            node.parent.remove(node)
        book = nodes.section("", nodes.title(text=self.config.project))
        root.replace_self(book)
        book += [latex(r"\startpage{}"), root]
        parts = self.env.external_site_map.root.subtrees  # type: ignore[attr-defined]
        for part, wrapper in zip(parts, wrappers, strict=True):
            book += latex(
                r"\clearpage\phantomsection\addcontentsline{toc}{part}"
                rf"{{{part.caption}}}\part*{{{part.caption}}}"
            )
            book += wrapper
        for page in files(self.document):
            number = re.match(r"book/(\d\d)_", page["docname"])
            page.insert(0, latex(rf"\startpage{{{number[1] if number else ''}}}"))


class Numbers(PaperTransform):
    """Let LaTeX count figures, tables and equations as the pages do."""

    counters: ClassVar = {
        "figure": (nodes.figure, "figure"),
        "table": (nodes.table, "table"),
        "displaymath": (nodes.math_block, "equation"),
    }

    def run(self, **kwargs) -> None:
        numbers = self.env.toc_fignumbers
        pages = {node["docname"]: node for node in files(self.document)}
        for docname, page in {self.env.docname: self.document, **pages}.items():
            for kind, (node_class, counter) in self.counters.items():
                found = numbers.get(docname, {}).get(kind, {})
                for node in list(page.findall(node_class)):
                    for label in set(node["ids"]) & set(found):
                        before = found[label][-1] - 1
                        start = latex(rf"\setcounter{{{counter}}}{{{before}}}")
                        node.replace_self([start, node])


class Anchors(PaperTransform):
    """Keep what links lead to: exercises, and sections without a title as solutions."""

    def run(self, **kwargs) -> None:
        for page in files(self.document):
            for box in page.findall(exercise_enumerable_node):
                box.insert(1, self.place(page, box["label"]))
            for section in page.findall(nodes.section):
                if isinstance(section.children[0], nodes.title):
                    continue
                for label in section["ids"]:
                    section.insert(0, self.place(page, label))

    def place(self, page: nodes.Element, label: str) -> nodes.raw:
        """The end of a link that comes from another page."""
        return latex(rf"\phantomsection\label{{{page['docname']}:{label}}}")


class OpenBoxes(PaperTransform):
    """Leave out folded code, and give our tables their columns."""

    def run(self, **kwargs) -> None:
        for cell in self.containers(kind="tag_hide-input"):
            for code in list(cell.findall(nodes.container)):
                if "cell_input" in code["classes"]:
                    code.parent.remove(code)
        for found in list(self.document.findall(nodes.table)):
            for kind in {*found["classes"], *found["ids"]} & set(WIDTHS):
                print_wide(found, WIDTHS[kind])
            if len(list(found.findall(nodes.colspec))) > 7:
                print_small(found)


class Verdicts(PaperTransform):
    """Set a chapter's verdicts as a table; in the notebook they are HTML."""

    default_priority = 2

    def run(self, **kwargs) -> None:
        for page in files(self.document):
            for raw in list(page.findall(nodes.raw)):
                if 'class="verdicts"' in raw.astext():
                    bundle = raw.parent.parent  # of all forms in the notebook
                    bundle.replace_self(self.ledger(page["docname"]))

    def ledger(self, docname: str) -> nodes.Node:
        verdicts = Run(self.env.srcdir, docname).verdicts
        rows = [claim_row(row, row["id"]) for row in verdicts]
        box = table(["No.", "Claim", "Measured", "Verdict"], rows, "claims-ledger")
        for found in list(box.findall(nodes.table)):
            print_wide(found, WIDTHS["claims-ledger"])
        return box


def print_wide(found: nodes.table, widths: tuple[int, ...]) -> None:
    """Give a table its columns, ragged, and let it run on over pages."""
    found["classes"].append("longtable")
    columns = [rf">{{\raggedright\arraybackslash}}\X{{{w}}}{{100}}" for w in widths]
    found.replace_self([addnodes.tabular_col_spec(spec="".join(columns)), found])


def print_small(found: nodes.table) -> None:
    """Make room for a table of many columns."""
    small = latex(r"\begingroup\scriptsize\setlength{\tabcolsep}{2pt}")
    found.replace_self([small, found, latex(r"\endgroup")])


class Drawings(ImageConverter):
    """SVG as PDF, by librsvg."""

    conversion_rules: ClassVar = [("image/svg+xml", "application/pdf")]

    def is_available(self) -> bool:
        return self.app.builder.format == "latex"

    def convert(self, _from: str, _to: str) -> bool:
        command = ["rsvg-convert", "--format=pdf", f"--output={_to}", _from]
        subprocess.run(command, check=True)
        return True


def add_preamble(app, config) -> None:
    config.latex_elements["preamble"] = PREAMBLE


def write_numbers(app, exception) -> None:
    """Leave the numbers that the pages show, to hold those of LaTeX against them."""
    if app.builder.format != "latex" or exception:
        return
    kinds = {"figure": "", "table": "", "displaymath": "equation:"}
    numbers = {
        kind_prefix + f"{page}:{label.removeprefix('equation-')}": ".".join(
            map(str, number)
        )
        for page, found in app.env.toc_fignumbers.items()
        for kind, kind_prefix in kinds.items()
        for label, number in found.get(kind, {}).items()
    }
    Path(app.outdir, "numbers.json").write_text(json.dumps(numbers, indent=1))


def setup(app) -> dict:
    for transform in (Parts, Numbers, Anchors, OpenBoxes, Verdicts, Drawings):
        app.add_post_transform(transform)
    app.connect("config-inited", add_preamble)
    app.connect("build-finished", write_numbers)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
