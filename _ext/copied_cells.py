"""A second copy button on a code cell: the cell together with those that it needs.

The page gets the list of what each cell needs (`slices.py`); the button is made by
`copied_cells.js`, and only there where scripts run. The setup cell needs none.
"""

import json
from pathlib import Path

from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook
from slices import read, slice_of


def needs(source: str, path: str) -> dict[str, list[str]]:
    """For each code cell of a page, by name, the cells that it needs, in order."""
    notebook = read_myst_markdown_notebook(source, path=path)
    places = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code"]
    cells = [read(notebook.cells[i].source) for i in places]
    return {
        name(places[i]): [name(places[k]) for k in slice_of(cells, i).cells[:-1]]
        for i in range(1, len(cells))
    }


def name(place: int) -> str:
    """The anchor of a cell, from its place in the page."""
    return f"cell-{place}"


def name_cells(app, doctree: nodes.document) -> None:
    """Give each code cell its anchor."""
    for node in doctree.findall(nodes.container):
        if node.get("nb_element") == "cell_code":
            node["ids"].append(name(node["cell_index"]))


def list_needs(app, pagename, templatename, context, doctree) -> None:
    if doctree is None or "kernelspec" not in app.env.metadata[pagename]:
        return
    path = app.env.doc2path(pagename)
    found = needs(Path(path).read_text(encoding="utf-8"), str(path))
    context["body"] += (
        f'<script type="application/json" id="cell-needs">{json.dumps(found)}</script>'
    )


def setup(app) -> dict:
    app.add_js_file("copied_cells.js", loading_method="defer")
    app.add_css_file("copied_cells.css")
    app.connect("doctree-read", name_cells)
    app.connect("html-page-context", list_needs)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
