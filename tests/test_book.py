"""The chapters: their form, and what their one run left behind."""

import ast
import re
import statistics

import executed
import nbformat
import notebooks
import pytest
import run_pages

ROOT = notebooks.ROOT
CHAPTERS = notebooks.sources()
SITE = ROOT / "_build" / "html"
FIGURE_TYPES = {"image/png", "image/svg+xml", "image/jpeg"}

chapters = pytest.mark.parametrize("source", CHAPTERS, ids=lambda source: source.stem)
numbered = pytest.mark.parametrize(
    "source",
    [source for source in CHAPTERS if re.match(r"\d\d_", source.stem)],
    ids=lambda source: source.stem,
)


def code(source) -> list[nbformat.NotebookNode]:
    return notebooks.code_cells(notebooks.export(source))


def ran(source) -> nbformat.NotebookNode:
    notebook = notebooks.read_executed(source)
    assert notebook is not None, f"{source.name} has not been executed: make notebooks"
    return notebook


def parsed(cell) -> ast.Module:
    """A cell's code; lines for IPython are left out."""
    lines = ["" if re.match(r"\s*[%!]", n) else n for n in cell.source.split("\n")]
    return ast.parse("\n".join(lines))


# the sources


@chapters
def test_cells_are_short(source):
    cells = [cell.source.rstrip().split("\n") for cell in code(source)]
    sizes = [len(lines) for lines in cells]
    assert statistics.median(sizes) <= 20
    assert max(sizes) <= 48, f"cell {sizes.index(max(sizes)) + 1} has {max(sizes)}"
    # 76 fits the page's column; a few more scroll
    long = [line for lines in cells for line in lines if len(line) > 84]
    assert not long, f"too wide: {long}"


@chapters
def test_only_public_names(source):
    for cell in code(source):
        for node in ast.walk(parsed(cell)):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(a.name for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for a in node.names for part in a.name.split(".")]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            private = [n for n in names if re.match(r"_(?!_)", n) and n != "_style"]
            assert not private, f"{private} in: {cell.source}"


@chapters
def test_nothing_reaches_for_a_path(source):
    for cell in code(source):
        assert "sys.path" not in cell.source
        assert "/home/" not in cell.source


@numbered
def test_a_chapter_has_its_parts(source):
    text = source.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert len(re.findall(r"^# ", prose, re.M)) == 1
    assert re.search(r"admonition\} Before you start", text)
    assert re.search(r"^## .*[Ww]here next", text, re.M)
    assert len(re.findall(r"redict first|redict, then|redict before", text)) >= 1
    labels = set(re.findall(r"\{exercise\}[^\n]*\n:label: (\S+)", text))
    solved = set(re.findall(r"\{solution(?:-start)?\} (\S+)", text))
    assert 3 <= len(labels) <= 5
    assert labels == solved


@numbered
def test_the_settings_name_both_lanes(source):
    text = "\n".join(cell.source for cell in code(source))
    assert "lane()" in text
    assert "quick" in text
    assert "full" in text


# the run


@chapters
def test_the_run_is_of_this_code(source):
    notebook = ran(source)
    fresh, done = code(source), notebooks.code_cells(notebook)
    assert [cell.source for cell in fresh] == [cell.source for cell in done]
    about = notebook.metadata["gauss_flows"]
    assert about["lane"] in notebooks.LANES
    assert about["seconds"] > 0
    assert 1e8 < about["memory"] < 1e10
    assert notebooks.fingerprint(source, about) == about["fingerprint"]


@chapters
def test_every_cell_ran_in_order_and_without_a_complaint(source):
    counts = []
    for cell in notebooks.code_cells(ran(source)):
        counts.append(cell.execution_count)
        for output in cell.outputs:
            assert output.output_type != "error"
            text = output.get("text", "")
            assert output.get("name") != "stderr" or "Warning" not in text, text
            assert str(ROOT) not in str(output), "a path of this machine in the page"
    assert counts == list(range(1, len(counts) + 1))


@chapters
def test_every_picture_has_words(source):
    for cell in notebooks.code_cells(ran(source)):
        pictures = [o for o in cell.outputs if FIGURE_TYPES & set(o.get("data", {}))]
        if pictures and "remove-output" not in cell.metadata.get("tags", []):
            about = cell.metadata.get("mystnb", {})
            assert about.get("figure", {}).get("caption"), cell.source
            assert about.get("figure", {}).get("name"), cell.source
            assert len(about.get("image", {}).get("alt", "")) > 20, cell.source
        for output in cell.outputs:
            page = "".join(output.get("data", {}).get("text/html", ""))
            for image in re.findall(r"<img[^>]*>", page):
                assert re.search(r'alt="[^"]{10,}', image)


@chapters
def test_nothing_is_loaded_from_elsewhere(source):
    for cell in notebooks.code_cells(ran(source)):
        for output in cell.outputs:
            page = "".join(output.get("data", {}).get("text/html", ""))
            assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


@numbered
def test_the_chapter_gives_its_verdicts(source):
    rows = executed.Run(ROOT, f"book/{source.stem}").verdicts
    assert rows
    for row in rows:
        assert row["id"].startswith(source.stem[:2] + ".")
        assert row["verdict"] in run_pages.VERDICTS
        assert all(row[key].strip() for key in ("claim", "source", "measured"))


def test_each_claim_has_one_verdict():
    ids = [row["id"] for run in executed.runs(ROOT) for row in run.verdicts]
    assert len(ids) == len(set(ids))


# the download


@chapters
def test_the_download_is_plain_and_executed(source):
    path = SITE / "notebooks" / source.relative_to(ROOT).with_suffix(".ipynb")
    if not path.exists():
        pytest.skip("the site has not been built: make book")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    done = [cell.source for cell in notebooks.code_cells(ran(source))]
    install, *cells = notebooks.code_cells(notebook)
    assert "find_spec" in install.source
    assert [cell.source for cell in cells] == done
    assert any(cell.outputs for cell in cells)
    assert notebook.metadata["accelerator"] == "GPU"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
            assert not re.search(r"^(:{3,}|`{3,}\{)|\{[a-z:]+\}`", text, re.M), text
            assert "system_message" not in text
