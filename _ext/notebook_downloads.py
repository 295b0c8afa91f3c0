"""Offer each executed page for download as a plain Jupyter notebook.

The text comes from the page as Sphinx resolved it: numbers, references, citations and
values of the run stand in it as the reader saw them, in plain Markdown.
The code and its outputs come from the run. A first cell installs the package where it
is missing, so that the notebook runs on Colab too.

sphinx-tojupyter makes such notebooks as well, but without outputs, tags and captions,
and by a second build.
"""

import re
from pathlib import Path
from urllib.parse import urljoin

import nbformat
from docutils import nodes
from executed import Run
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import v4
from sphinx_exercise.nodes import exercise_enumerable_node, solution_node

INSTALL = """\
# Where the book's package is missing (on Colab, say), install it, and keep the JAX
# that fits the machine's GPU driver
import importlib.util
from importlib.metadata import version

if importlib.util.find_spec("gauss_flows") is None:
    there = [p for p in ("jax", "jaxlib") if importlib.util.find_spec(p)]
    held = [f"{{p}}=={{version(p)}}" for p in there]
    %pip install -q "gauss-flows @ git+{repository}" {{" ".join(held)}}

import jax

print("JAX computes on:", *jax.devices())"""


class Writer:
    """Turns a resolved page into Markdown cells and the places of its code cells."""

    def __init__(self, env, docname: str, page_url: str):
        self.numbers = env.toc_fignumbers.get(docname, {})
        self.secnumbers = env.toc_secnumbers.get(docname, {})
        self.page_url = page_url
        self.cells: list[str | int] = []  # Markdown, or the index of a code cell

    def number(self, node: nodes.Element, kind: str) -> str:
        """The number that Sphinx gave a figure, theorem or equation, or nothing."""
        found = self.numbers.get(kind, {})
        parts = next((found[i] for i in node.get("ids", []) if i in found), ())
        return ".".join(map(str, parts))

    # blocks

    def text(self, markdown: str) -> None:
        """Add a block of Markdown to the cell at hand."""
        if not (markdown := markdown.strip("\n")):
            return
        if self.cells and isinstance(self.cells[-1], str):
            self.cells[-1] += "\n\n" + markdown
        else:
            self.cells.append(markdown)

    def children(self, node: nodes.Element, level: int) -> None:
        for child in node.children:
            self.block(child, level)

    def inner(self, node: nodes.Element, level: int) -> str:
        """A node's blocks as one piece of Markdown; there is no code among them."""
        outer, self.cells = self.cells, []
        self.children(node, level)
        pieces, self.cells = self.cells, outer
        return "\n\n".join(piece for piece in pieces if isinstance(piece, str))

    def block(self, node: nodes.Node, level: int = 0) -> None:
        name = type(node).__name__
        if isinstance(node, nodes.Text):
            return self.text(str(node))
        if not isinstance(node, nodes.Element):
            return None
        if isinstance(node, nodes.Invisible | nodes.Inline) and not isinstance(
            node, nodes.reference | nodes.raw | nodes.image
        ):
            return None
        if method := getattr(self, f"block_{name}", None):
            return method(node, level)
        if isinstance(node, nodes.Admonition):
            return self.admonition(node, level)
        if isinstance(node, nodes.TextElement):
            return self.text(self.inline(node))
        return self.children(node, level)

    def block_section(self, node, level: int) -> None:
        self.children(node, level + 1)

    def block_title(self, node, level: int) -> None:
        number = ".".join(self.secnumbers.get("", ())) if level == 1 else ""
        dot = ". " if number else ""
        self.text(f"{'#' * max(level, 1)} {number}{dot}{self.inline(node)}")

    def block_container(self, node, level: int) -> None:
        if node.get("nb_element") != "cell_code":
            return self.children(node, level)
        self.cells.append(node["cell_index"])
        for figure in node.findall(nodes.figure):
            self.block_figure(figure, level)
        return None

    def block_figure(self, node, level: int) -> None:
        for image in node.findall(nodes.image):
            if not image["uri"].startswith(("_build", "/")) and not re.search(
                r"jupyter_execute|_images", image["uri"]
            ):
                self.text(self.inline(image))
        for caption in node.findall(nodes.caption):
            number = self.number(node, "figure")
            label = f"**Fig. {number}.** " if number else ""
            self.text(f"{label}{self.inline(caption)}")

    def block_math_block(self, node, level: int) -> None:
        source = node.astext().strip()
        number = self.number(node, "displaymath")
        if number and r"\begin{align" not in source and r"\begin{eq" not in source:
            source += rf" \tag{{{number}}}"
        if source.startswith((r"\begin{align", r"\begin{eq", r"\begin{gather")):
            return self.text(source)
        return self.text(f"$$\n{source}\n$$")

    def block_literal_block(self, node, level: int) -> None:
        language = node.get("language", "")
        language = "" if language in ("default", "none", "text") else language
        self.text(f"```{language}\n{node.astext()}\n```")

    def block_bullet_list(self, node, level: int) -> None:
        self.items(node, level, lambda i: "- ")

    def block_enumerated_list(self, node, level: int) -> None:
        start = node.get("start", 1)
        self.items(node, level, lambda i: f"{start + i}. ")

    def items(self, node, level: int, mark) -> None:
        lines = []
        for i, item in enumerate(node.children):
            body = self.inner(item, level).replace("\n", "\n" + " " * len(mark(i)))
            lines.append(mark(i) + body)
        self.text("\n".join(lines))

    def block_definition_list(self, node, level: int) -> None:
        for item in node.children:
            for part in item.children:
                if isinstance(part, nodes.term):
                    self.text(f"**{self.inline(part)}**")
                else:
                    self.text(self.inner(part, level))

    def block_block_quote(self, node, level: int) -> None:
        self.quote(self.inner(node, level))

    def quote(self, markdown: str) -> None:
        lines = [f"> {line}".rstrip() for line in markdown.split("\n")]
        self.text("\n".join(lines))

    def block_table(self, node, level: int) -> None:
        rows = [
            [self.inner(entry, level).replace("\n\n", "<br>") for entry in row.children]
            for row in node.findall(nodes.row)
        ]
        if not rows:
            return
        rows.insert(1, ["---"] * len(rows[0]))
        self.text("\n".join(f"| {' | '.join(row)} |" for row in rows))

    def block_transition(self, node, level: int) -> None:
        self.text("---")

    def block_raw(self, node, level: int) -> None:
        if "html" in node.get("format", ""):
            self.text(node.astext())

    def block_image(self, node, level: int) -> None:
        self.text(self.inline(node))

    def block_reference(self, node, level: int) -> None:
        self.text(self.inline_reference(node))

    def block_footnote(self, node, level: int) -> None:
        label, *body = node.children
        text = " ".join(self.inline(part) for part in body)
        self.text(f"[{label.astext()}] {text}")

    def admonition(self, node: nodes.Element, level: int) -> None:
        """A note, theorem, exercise or the like; in a quotation if it has no code."""
        kind = type(node).__name__.removesuffix("_node").replace("_", " ")
        title, body = "", list(node.children)
        if body and isinstance(body[0], nodes.title | nodes.subtitle):
            title = self.inline(body.pop(0))
        real, counter = node.get("realtype", ""), node.get("countertype", "")
        if counter:  # a numbered theorem: its kind and number are Sphinx's to add
            title = re.sub(rf"^{counter}\s*(%s)?\s*", "", title, flags=re.I)
            title = f"{real.title()} {self.number(node, counter)} {title}"
        elif real:
            title = f"{real.title()} {title}"
        elif isinstance(node, exercise_enumerable_node):
            title = f"Exercise {self.number(node, 'exercise')}{title}"
        elif isinstance(node, solution_node):
            title = f"Solution to {self.exercise(node)}".strip()
        title = re.sub(r"\s+", " ", title).strip() or kind.title()
        inside = nodes.container("", *body)
        has_code = any(
            part.get("nb_element") == "cell_code"
            for part in inside.findall(nodes.container)
        )
        if has_code:
            self.text(f"**{title}**")
            return self.children(inside, level)
        return self.quote(f"**{title}**\n\n{self.inner(inside, level)}".rstrip())

    def exercise(self, solution: nodes.Element) -> str:
        """What a solution solves, by number."""
        target = nodes.Element(ids=[solution.get("target_label", "")])
        return f"Exercise {self.number(target, 'exercise')}"

    def block_proof_node(self, node, level: int) -> None:
        box = node.next_node(nodes.admonition)
        parts = [part for part in box.children if not isinstance(part, nodes.title)]
        text = self.inner(nodes.container("", *parts), level)
        self.quote(f"*Proof.* {text.removeprefix('Proof. ')}")

    # text

    def inline(self, node: nodes.Node) -> str:
        if isinstance(node, nodes.Text):
            return re.sub(r"([*$`])", r"\\\1", str(node))
        if not isinstance(node, nodes.Element):
            return ""
        if method := getattr(self, f"inline_{type(node).__name__}", None):
            return method(node)
        return "".join(self.inline(child) for child in node.children)

    def wrapped(self, node: nodes.Element, mark: str) -> str:
        inside = "".join(self.inline(child) for child in node.children)
        return f"{mark}{inside}{mark}" if inside.strip() else inside

    def inline_emphasis(self, node) -> str:
        return self.wrapped(node, "*")

    def inline_strong(self, node) -> str:
        return self.wrapped(node, "**")

    def inline_literal(self, node) -> str:
        return f"`{node.astext()}`"

    def inline_math(self, node) -> str:
        return f"${node.astext()}$"

    def inline_raw(self, node) -> str:
        return node.astext() if "html" in node.get("format", "") else ""

    def inline_image(self, node) -> str:
        return f"![{node.get('alt', '')}]({urljoin(self.page_url, node['uri'])})"

    def inline_reference(self, node) -> str:
        inside = "".join(self.inline(child) for child in node.children)
        target = node.get("refuri") or f"#{node.get('refid', '')}"
        return f"[{inside}]({urljoin(self.page_url, target)})"

    def inline_footnote_reference(self, node) -> str:
        return f"[{node.astext()}]"


def make_notebook(app, docname: str, doctree: nodes.document) -> nbformat.NotebookNode:
    """The page as a notebook: its text in Markdown, its code with the run's outputs."""
    env = app.env
    writer = Writer(env, docname, f"{app.config.html_baseurl}{docname}.html")
    writer.block(doctree)
    ran = nbformat.reads(Run(app.srcdir, docname).bytes.decode(), as_version=4)
    source = Path(env.doc2path(docname)).read_text(encoding="utf-8")
    book = read_myst_markdown_notebook(source, path=str(env.doc2path(docname)))
    places = [i for i, c in enumerate(book.cells) if c.cell_type == "code"]
    code = dict(
        zip(places, (c for c in ran.cells if c.cell_type == "code"), strict=True)
    )
    cells, waiting = [], dict(code)
    for piece in writer.cells:
        if isinstance(piece, str):
            cells.append(v4.new_markdown_cell(piece))
            continue
        # cells hidden from the page come along, before the next one that is shown
        for place in [p for p in waiting if p <= piece]:
            cells.append(code_cell(waiting.pop(place)))
    cells.extend(map(code_cell, waiting.values()))
    first = next((i for i, c in enumerate(cells) if c.cell_type == "code"), len(cells))
    repository = app.config.html_theme_options["repository_url"]
    cells.insert(first, v4.new_code_cell(INSTALL.format(repository=repository)))
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    metadata = {
        "kernelspec": ran.metadata.kernelspec,
        "language_info": ran.metadata.get("language_info", {"name": "python"}),
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "gauss_flows": dict(Run(app.srcdir, docname).about),
    }
    notebook = v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    return notebook


def code_cell(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A code cell as it ran, without the stamps of the machinery."""
    tags = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    outputs = [o for o in cell.outputs if not is_note(o)]
    return v4.new_code_cell(
        cell.source,
        outputs=outputs,
        execution_count=cell.execution_count,
        metadata=tags,
    )


def is_note(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a value kept for the prose, which shows nothing itself."""
    return "scrapbook" in output.get("metadata", {})


def write_notebook(app, doctree: nodes.document, docname: str) -> None:
    if app.builder.format != "html" or not Run(app.srcdir, docname).bytes:
        return
    path = Path(app.outdir, "notebooks", f"{docname}.ipynb")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(make_notebook(app, docname, doctree), path)


def point_buttons(app, pagename, templatename, context, doctree) -> None:
    """Let the download and Colab buttons give these notebooks."""
    buttons = [
        b for g in context.get("header_buttons", []) for b in g.get("buttons", [])
    ]
    has_notebook = Path(app.outdir, "notebooks", f"{pagename}.ipynb").exists()
    for button in buttons if has_notebook else []:
        if button.get("text") == ".ipynb":
            button["url"] = context["pathto"](f"notebooks/{pagename}.ipynb", 1)
        elif button.get("text") == "Colab":
            # the published site stands on this branch, and Colab reads it from there
            project = app.config.html_theme_options["repository_url"].removeprefix(
                "https://github.com/"
            )
            button["url"] = (
                "https://colab.research.google.com/github/"
                f"{project}/blob/gh-pages/notebooks/{pagename}.ipynb"
            )


def drop_copies(app, exception) -> None:
    """Remove the copies that the theme made for its own download button."""
    for path in Path(app.outdir, "_sources").rglob("*.ipynb"):
        path.unlink()


def setup(app) -> dict:
    app.connect("doctree-resolved", write_notebook, priority=900)
    app.connect("html-page-context", point_buttons, priority=900)
    app.connect("build-finished", drop_copies)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
