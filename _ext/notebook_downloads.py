"""Offer each executed page for download, as a plain Jupyter notebook and as a script.

The text comes from the page as Sphinx resolved it: numbers, references, citations and
values of the run stand in it as the reader saw them, in plain Markdown.
The code and its outputs come from the run. A first cell installs the package where it
is missing, so that the notebook runs on Colab too. Cells that solve an exercise carry
the tag `solution`.

sphinx-tojupyter makes such notebooks as well, but without outputs, tags and captions,
and by a second build.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

import jupytext
import nbformat
import pinned_release
from docutils import nodes
from executed import Run
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import v4
from sphinx_exercise.nodes import exercise_enumerable_node, solution_node

SOLUTION = "solution"  # the tag of the cells that solve an exercise
# bytes for a kernel: mybinder.org grants 2 GiB, and JupyterLab takes 0.13 GB of them
BINDER_MEMORY = 2e9


class Piece(NamedTuple):
    """A cell to be: Markdown, or the index of a code cell of the page."""

    content: str | int
    solves: bool


class Writer:
    """Turns a resolved page into Markdown cells and the places of its code cells."""

    def __init__(self, env, docname: str, page_url: str):
        self.numbers = env.toc_fignumbers.get(docname, {})
        self.secnumbers = env.toc_secnumbers.get(docname, {})
        self.page_url = page_url
        self.solves = False  # whether the writer is inside a solution
        self.cells: list[Piece] = []

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
        if self.cells and isinstance(before := self.cells[-1].content, str):
            if self.cells[-1].solves == self.solves:
                markdown = f"{before}\n\n{markdown}"
                self.cells.pop()
        self.cells.append(Piece(markdown, self.solves))

    def children(self, node: nodes.Element, level: int) -> None:
        for child in node.children:
            self.block(child, level)

    def inner(self, node: nodes.Element, level: int) -> str:
        """A node's blocks as one piece of Markdown; there is no code among them."""
        outer, self.cells = self.cells, []
        self.children(node, level)
        pieces, self.cells = self.cells, outer
        return "\n\n".join(p.content for p in pieces if isinstance(p.content, str))

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
        self.cells.append(Piece(node["cell_index"], self.solves))
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
        outer, self.solves = self.solves, self.solves or isinstance(node, solution_node)
        if has_code:
            self.text(f"**{title}**")
            self.children(inside, level)
        else:
            self.quote(f"**{title}**\n\n{self.inner(inside, level)}".rstrip())
        self.solves = outer

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
    for piece, solves in writer.cells:
        if isinstance(piece, str):
            cells.append(markdown_cell(piece, solves))
            continue
        # cells hidden from the page come along, before the next one that is shown
        for place in [p for p in waiting if p <= piece]:
            cells.append(code_cell(waiting.pop(place), solves))
    cells.extend(code_cell(cell, False) for cell in waiting.values())
    first = next((i for i, c in enumerate(cells) if c.cell_type == "code"), len(cells))
    wanted = wanted_release(app, "\n".join(c.source for c in code.values()))
    install = pinned_release.INSTALL.format(requirement=wanted)
    cells.insert(first, v4.new_code_cell(install))
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


def wanted_release(app, code: str) -> str:
    """What pip is asked for, so that `code` runs as it did for this page."""
    return pinned_release.requirement(
        app.config.html_theme_options["repository_url"],
        app.config.release_commit,
        pictures=pinned_release.uses_pictures(code),
    )


def markdown_cell(text: str, solves: bool) -> nbformat.NotebookNode:
    metadata = {"tags": [SOLUTION]} if solves else {}
    return v4.new_markdown_cell(text, metadata=metadata)


def code_cell(cell: nbformat.NotebookNode, solves: bool) -> nbformat.NotebookNode:
    """A code cell as it ran, without the stamps of the machinery."""
    tags = [*cell.metadata.get("tags", []), *([SOLUTION] if solves else [])]
    outputs = [o for o in cell.outputs if not is_note(o)]
    return v4.new_code_cell(
        cell.source,
        outputs=outputs,
        execution_count=cell.execution_count,
        metadata={"tags": tags} if tags else {},
    )


def as_script(notebook: nbformat.NotebookNode, wanted: str) -> str:
    """The notebook as plain Python, its text as comments, its figures shown at the end.

    Editors that know the `# %%` marks run it cell by cell.
    """
    new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}
    cells = [new[cell.cell_type](cell.source) for cell in notebook.cells]
    install = next(cell for cell in cells if cell.cell_type == "code")
    install.source = pinned_release.SCRIPT_INSTALL.format(requirement=wanted)
    cells.append(v4.new_code_cell("plt.show()"))
    form = {"notebook_metadata_filter": "-all", "cell_metadata_filter": "-all"}
    plain = v4.new_notebook(cells=cells, metadata={"jupytext": form})
    return jupytext.writes(plain, fmt="py:percent")


def is_note(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a value kept for the prose, which shows nothing itself."""
    return "scrapbook" in output.get("metadata", {})


def write_notebook(app, doctree: nodes.document, docname: str) -> None:
    if app.builder.format != "html" or not Run(app.srcdir, docname).bytes:
        return
    path = Path(app.outdir, "notebooks", f"{docname}.ipynb")
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = make_notebook(app, docname, doctree)
    nbformat.write(notebook, path)
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    script = as_script(notebook, wanted_release(app, code))
    path.with_suffix(".py").write_text(script, encoding="utf-8")


def point_buttons(app, pagename, templatename, context, doctree) -> None:
    """Let the buttons for downloads, Colab and Binder give these notebooks.

    None for Binder stays where the run took more memory than there is.
    """
    path = f"notebooks/{pagename}.ipynb"
    if not Path(app.outdir, path).exists():
        return
    # the published site stands on this branch, and both read the notebooks from there
    repository = app.config.html_theme_options["repository_url"]
    project = repository.removeprefix("https://github.com/")
    launch = app.config.html_theme_options["launch_buttons"]
    urls = {
        ".ipynb": context["pathto"](path, 1),
        "Colab": f"{launch['colab_url']}/github/{project}/blob/gh-pages/{path}",
        "Binder": f"{launch['binderhub_url']}/v2/gh/{project}/gh-pages"
        f"?urlpath=lab/tree/{path}",
    }
    memory = Run(app.srcdir, pagename).about["memory"]
    unfit = {"Binder"} if float(memory) > BINDER_MEMORY else set()
    for group in context["header_buttons"]:
        buttons = group.get("buttons", [])
        buttons[:] = [b for b in buttons if b.get("text") not in unfit]
        for button in buttons:
            if button.get("text") in urls:
                button["url"] = urls[button["text"]]
        if group.get("label") == "download-buttons":
            buttons.insert(1, script_button(urls[".ipynb"]))


def script_button(notebook: str) -> dict[str, str]:
    return {
        "type": "link",
        "url": f"{notebook.removesuffix('.ipynb')}.py",
        "text": ".py",
        "tooltip": "Download as a script",
        "icon": "fab fa-python",
        "label": "download-script-button",
    }


def finish(app, exception) -> None:
    """Add what Binder needs, and remove the theme's own copies of the notebooks."""
    for path in Path(app.outdir, "_sources").rglob("*.ipynb"):
        path.unlink()
    if exception or app.builder.format != "html":
        return
    repository = app.config.html_theme_options["repository_url"]
    environment = pinned_release.environment(
        app.srcdir, repository, app.config.release_commit
    )
    Path(app.outdir, "environment.yml").write_text(environment, encoding="utf-8")
    shutil.copy(Path(app.srcdir, "constraints.txt"), app.outdir)


def setup(app) -> dict:
    # "html": the pages are written anew, and the notebooks with them, when it changes
    commit = pinned_release.commit(app.srcdir)
    app.add_config_value("release_commit", commit, "html", str)
    app.connect("doctree-resolved", write_notebook, priority=900)
    app.connect("html-page-context", point_buttons, priority=900)
    app.connect("build-finished", finish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
