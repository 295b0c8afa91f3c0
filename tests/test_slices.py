"""Copying a cell: what it needs is found, and every cell of the book can be copied."""

import json
import re

import copied_cells
import copy_test
import notebooks
import pytest
from bs4 import BeautifulSoup
from nbformat import v4
from slices import bound_late, changed, read, slice_of

# Every place where a cell can only be copied with care. By chapter, the names of which
# one cell changes what an earlier one made, so that a copy has all of them in its slice
CHANGED = {
    "03_masks": {"result"},
    "04_diagonal_vs_coupling": {"left"},
    "09_stabilizers": {"guards"},
    "11_depth_lower_bound": {"gap", "seen"},
    "13_three_couplings": {"found"},
    "15_images": {"along"},
}
# and those that a function looks up before any cell has bound them
BOUND_LATE = {"02_conditioners": {"seeds"}}

chapters = pytest.mark.parametrize(
    "source", notebooks.sources(), ids=lambda source: source.stem
)


def cells(source):
    codes = notebooks.code_cells(notebooks.export(source))
    return [read(code.source) for code in codes]


def page(*sources: str):
    return [read(source) for source in sources]


@chapters
def test_every_cell_has_what_it_needs(source):
    page, late = cells(source), BOUND_LATE.get(source.stem, set())
    for place in range(len(page)):
        assert slice_of(page, place).missing <= late, f"code cell {place + 1}"


@chapters
def test_exceptions_are_listed(source):
    page = cells(source)
    assert changed(page) == CHANGED.get(source.stem, set())
    assert bound_late(page) == BOUND_LATE.get(source.stem, set())


def test_exceptions_are_few():
    names = {source.stem: cells(source) for source in notebooks.sources()}
    careful = [
        cell
        for name, page in names.items()
        for cell in page
        if cell.changes or cell.later & BOUND_LATE.get(name, set())
    ]
    assert len(careful) < 0.05 * sum(map(len, names.values()))


@pytest.mark.parametrize(
    ("source", "binds", "needs", "later", "changes"),
    [
        ("import a.b as c, d.e", "c d", "", "", ""),
        ("from a import b", "b", "", "", ""),
        ("x = x + 1", "x", "x", "", ""),
        ("x += y", "x", "x y", "", ""),
        ("a, *b = c; a", "a b", "c", "", ""),
        ("for i, j in pairs: total = i + k", "i j total", "pairs k", "", ""),
        ("[i + k for i in rows if i > low]", "", "rows k low", "", ""),
        ("{i: j for i, j in rows}; i", "", "rows i", "", ""),
        ("def f(x, y=a, *, z: b = 1): return x + g + y", "f", "a b", "g", ""),
        ("def f():\n    u = v\n    return u", "f", "", "v", ""),
        ("def f(): return g()\ndef g(): return 1", "f g", "", "g", ""),
        ("def f():\n    def g(): return h\n    return g", "f", "", "h", ""),
        ("f = lambda x: x + y", "f", "y", "", ""),
        ("class A(B):\n    c = d\n    def e(self): return A, h", "A", "B d", "A h", ""),
        ("with open(p) as f: f.read()", "f", "p", "", ""),
        ("try: a\nexcept E as e: e", "e", "a E", "", ""),
        ("if (n := m): n", "n", "m", "", ""),
        ("d[k] = v", "", "d k v", "", "d"),
        ("d = {}; d[k] = v", "d", "k v", "", ""),
        ("a.b.c = 1", "", "a", "", "a"),
        ("del d[0]", "", "d", "", "d"),
        ("rows.append(x)", "", "rows x", "", "rows"),
        ("d.setdefault(k, []).append(x)", "", "d k x", "", "d"),
        ("y = np.append(x, 1)", "y", "np x", "", ""),
        ('print(f"{x:{w}}")', "", "x w", "", ""),
        ("x: int = y", "x", "y", "", ""),
    ],
)
def test_names(source, binds, needs, later, changes):
    wanted = [set(names.split()) for names in (binds, needs, later, changes)]
    assert [set(names - {"int"}) for names in read(source)] == wanted


def test_a_slice_is_what_is_needed_and_no_more():
    it = page("import np", "a = np.one()", "b = 2", "c = a + 1", "print(c)")
    assert slice_of(it, 4).cells == (0, 1, 3, 4)
    assert slice_of(it, 2).cells == (0, 2)


def test_the_last_to_bind_a_name_is_the_one_that_counts():
    it = page("", "a = 1", "a = 2", "print(a)", "a = 3")
    assert slice_of(it, 3).cells == (0, 2, 3)


def test_changes_come_along():
    it = page("", "d = {}", "d['x'] = 1", "e = 1", "print(d)")
    assert slice_of(it, 4).cells == (0, 1, 2, 4)
    assert slice_of(it, 3).cells == (0, 3)
    assert changed(it) == {"d"}


def test_a_function_sees_names_as_they_are_when_it_runs():
    it = page("", "def f(): return k", "k = 1", "k = 2", "f()")
    assert slice_of(it, 4).cells == (0, 1, 2, 3, 4)
    assert slice_of(it, 1).missing == {"k"}
    assert bound_late(it) == {"k"}
    beside = page("", "d = {}\ndef f(): return d", "d['x'] = 1", "f()")
    assert slice_of(beside, 3).cells == (0, 1, 2, 3)
    assert not bound_late(beside)


def test_what_no_cell_binds_is_missing():
    it = page("", "print(a)", "a = 1")
    assert slice_of(it, 1).missing == {"a"}
    only_changed = page("", "d['x'] = 1", "print(d)")
    assert slice_of(only_changed, 2).missing == {"d"}


def test_a_copied_slice_runs_on_its_own(tmp_path, monkeypatch):
    assert (
        copy_test.run("import matplotlib\nassert matplotlib.get_backend() == 'agg'")
        == ""
    )
    assert "NameError: name 'a'" in copy_test.run("print(a)")
    # what is compiled by one process is there for the next, however fast it was
    monkeypatch.setattr(copy_test, "SHORTEST", 0)
    jitted = "import jax\njax.jit(jax.scipy.linalg.expm)(jax.numpy.eye(3))"
    assert copy_test.run(jitted, str(tmp_path)) == ""
    assert copy_test.run(f"import os\nassert os.listdir({str(tmp_path)!r})") == ""


def test_a_slice_with_which_another_begins_runs_once(monkeypatch, capsys, tmp_path):
    sources = ["import sys", "a = 1; print(a)", "print(a + 1)", "b = 2", "print(b / 0)"]
    shown = [v4.new_output("stream", text="1")]
    cells = [v4.new_code_cell(source, outputs=shown) for source in sources]
    cells[3].outputs = []
    notebook, ran = v4.new_notebook(cells=cells), []
    monkeypatch.setattr(copy_test.nbs, "read_executed", lambda source: notebook)
    run = copy_test.run
    monkeypatch.setattr(
        copy_test, "run", lambda *given: ran.append(given) or run(*given)
    )
    assert copy_test.try_chapter(tmp_path / "00_a.md") == (3, 1)
    assert len(ran) == 2
    said = capsys.readouterr().out
    assert "00_a, cell 2: runs after 1, seen with cell 3\n" in said
    assert re.search(r"cell 3: runs after 1, 2; .* s\n", said)
    assert re.search(
        r"cell 5: FAILED after 1, 4; .* s\n.*ZeroDivisionError", said, re.S
    )


def test_a_slice_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(copy_test, "SECONDS_A_SLICE", 0.5)
    assert "had not ended" in copy_test.run("import time\ntime.sleep(60)")


def test_values_for_the_prose_show_nothing():
    note = v4.new_output("display_data", metadata={"scrapbook": {"name": "n"}})
    table = v4.new_output("stream", text="1")
    assert not copy_test.shows(v4.new_code_cell(outputs=[note]))
    assert copy_test.shows(v4.new_code_cell(outputs=[note, table]))


# the page


def test_the_page_knows_what_a_cell_needs():
    codes = ["import a", "b = a", "c = 1", "print(b)"]
    cells = [f"```{{code-cell}} ipython3\n{code}\n```" for code in codes]
    head = "---\nkernelspec:\n  name: python3\n---\n"
    found = copied_cells.needs("\n\ntext\n\n".join([head, *cells]), "page.md")
    names = [copied_cells.name(place) for place in (1, 3, 5, 7)]
    assert found == {
        names[1]: [names[0]],
        names[2]: [names[0]],
        names[3]: [names[0], names[1]],
    }


@chapters
def test_what_is_copied_is_the_code(source):
    path = notebooks.ROOT / "_build" / "html" / "book" / f"{source.stem}.html"
    if not path.exists():
        pytest.skip("the site has not been built: make book")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    needs = json.loads(page.select_one("#cell-needs").get_text())
    codes = [
        pre.get_text().strip("\n") for pre in page.select("[id^=cell-] .cell_input pre")
    ]
    wanted = notebooks.code_cells(notebooks.export(source))
    assert codes == [cell.source.strip("\n") for cell in wanted]
    names = [cell["id"] for cell in page.select("div.cell[id^=cell-]")]
    assert [*needs] == names[1:]
    for name, needed in needs.items():
        assert needed == sorted(needed, key=names.index)
        assert needed[0] == names[0]
        assert name not in needed
