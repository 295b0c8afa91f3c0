"""The book on paper: what LaTeX is given, and what is asked of what it gives back.

LaTeX itself runs in `make pdf` only. A small book stands for ours here.
"""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import build_pdf
import matplotlib.pyplot as plt
import notebooks
import pdf_download
import pytest
import yaml
from nbformat import v4

from _style import film

CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["sphinx_external_toc", "myst_nb", "sphinx_proof", "sphinx_exercise",
    "chapter_numbers", "folded_proofs", "run_pages", "films", "on_paper"]
project = "A small book"
external_toc_path = "_toc.yml"
exclude_patterns = ["_notebooks", "_build"]
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
numfig = True
numfig_format = {{"figure": "Fig. %s"}}
latex_engine = "xelatex"
latex_toplevel_sectioning = "chapter"
"""
TOC = {
    "format": "jb-book",
    "root": "book/intro.md",
    "options": {"numbered": False},
    "parts": [
        {"caption": "Part I: First", "chapters": [{"file": "book/07_depth.ipynb"}]},
        {"caption": "Reference", "chapters": [{"file": "book/after.md"}]},
    ],
}
INTRO = "# Start\n\n## A section of it\n\nSee {numref}`fig-one` and {eq}`eq-one`.\n"
AFTER = """# After

And {prf:ref}`thm-one`, and {ref}`an exercise <ex-one>`.

```{execution-table}
```
"""
TEXT = """# Does depth help?

:::{prf:theorem} It helps
:label: thm-one
More is more.
:::

:::{prf:proof}
:class: dropdown
By counting.
:::

$$
a = b
$$ (eq-one)

```{exercise}
:label: ex-one
Try it.
```

```{solution} ex-one
:class: dropdown
It works.
```
"""
ROW = {
    "id": "07.1",
    "claim": "Depth helps & how",
    "source": "a source",
    "measured": "1.5 nats",
    "verdict": "confirmed",
    "correction": "",
    "lane": "quick",
}


ABOUT = {
    **{"lane": "quick", "device": "CPU, 2 cores", "python": "3", "jax": "1"},
    **{"seconds": 1.0, "memory": 1.64e9, "date": "2026-01-01"},
}


def picture() -> str:
    buffer, figure = io.BytesIO(), plt.figure(figsize=(1, 1))
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def cell(code: str, data: dict, **metadata):
    about = metadata.pop("output", {})
    output = v4.new_output("display_data", data, metadata=about)
    return v4.new_code_cell(code, outputs=[output], metadata=metadata)


def chapter():
    frames = []
    for i in range(4):
        figure, ax = plt.subplots(figsize=(2, 2))
        ax.plot([0, i])
        frames.append(figure)
    moving = film(frames, range(4), alt="It moves:", name="blocks")
    html = {
        "text/html": moving.data,
        "text/plain": "<IPython.core.display.HTML object>",
    }
    table = {"text/html": '<div class="verdicts">no</div>', "text/plain": "07.1 plain"}
    caption = {"figure": {"name": "fig-one", "caption": "What to see."}}
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell(TEXT),
            cell("shown = 1", {"image/png": picture()}, mystnb=caption),
            cell("folded = 2", html, tags=["hide-input"]),
            cell("gf.verdicts()", table, output={"verdicts": [ROW]}),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python", "pygments_lexer": "python"},
            "gauss_flows": ABOUT,
        },
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Path:
    """The folder with the LaTeX of the small book."""
    book = tmp_path_factory.mktemp("book")
    (book / "book").mkdir()
    (book / "_notebooks" / "book").mkdir(parents=True)
    (book / "conf.py").write_text(CONF.format(ext=str(notebooks.ROOT / "_ext")))
    (book / "_toc.yml").write_text(yaml.safe_dump(TOC))
    (book / "book" / "intro.md").write_text(INTRO)
    (book / "book" / "after.md").write_text(AFTER)
    for folder in ("book", "_notebooks/book"):
        notebooks.write(chapter(), book / folder / "07_depth.ipynb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "latex"]
    done = subprocess.run(
        [*command, ".", "out"], cwd=book, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return book / "out"


@pytest.fixture(scope="module")
def tex(printed) -> str:
    (path,) = printed.glob("*.tex")
    return path.read_text(encoding="utf-8")


def test_parts_hold_chapters_and_the_root_is_one(tex):
    found = re.findall(r"\\(?:part\*|startpage|chapter|section)\{[^}]*\}", tex)
    assert found == [
        r"\startpage{}",
        r"\chapter{Start}",
        r"\section{A section of it}",
        r"\part*{Part I: First}",
        r"\startpage{07}",
        r"\chapter{Does depth help?}",
        r"\part*{Reference}",
        r"\startpage{}",
        r"\chapter{After}",
    ]


def test_numbers_are_those_of_the_pages(tex, printed):
    numbers = json.loads((printed / "numbers.json").read_text())
    assert numbers == {
        "book/07_depth:fig-one": "07.1",
        "equation:book/07_depth:eq-one": "07.1",
    }
    assert "{Theorem 07.1 (It helps)}" in tex
    assert re.search(r"hyperref\[[^]]*thm-one.*Theorem 07\.1", tex)
    assert re.search(r"\\setcounter\{figure\}\{0\}.*?\\begin\{figure\}", tex, re.S)
    assert re.search(r"\\hyperref\[[^]]*fig-one[^]]*\]\{Fig.{0,4} \\ref", tex)


def test_links_into_exercises_of_other_pages_have_an_end(tex):
    place = "book/07_depth:ex-one"
    assert rf"\hyperref[\detokenize{{{place}}}]" in tex
    assert rf"\phantomsection\label{{{place}}}" in tex


def test_links_into_solutions_have_an_end(tex):
    place = r"\\phantomsection\\label\{book/07_depth:solution-content(-1)?\}"
    assert re.search(place, tex)


def test_what_pages_fold_is_open_but_for_code(tex):
    assert "By counting." in tex
    assert "It works." in tex
    assert r"\PYG{n}{shown}" in tex
    assert "folded" not in tex


def test_films_are_frames_and_verdicts_a_table(tex):
    assert tex.count(r"\includegraphics[width=\linewidth]") == 3
    assert "blocks 3" in tex
    assert r"Depth helps \& how" in tex
    assert "1.5 nats" in tex
    assert r"\begin{longtable}" in tex
    assert "IPython.core" not in tex
    assert "07.1 plain" not in tex


def test_our_tables_have_a_width_for_each_column(tex):
    tables = re.findall(
        r"\\begin\{longtable\}\{([^\n]*)\}\n\\sphinxtoprule(.*?)\\\\", tex, re.S
    )
    assert len(tables) == 2
    for columns, head in tables:
        assert columns.count(r"\X{") == head.count("&") + 1
        assert sum(map(int, re.findall(r"\\X\{(\d+)\}", columns))) == 100
    assert "1.6 GB" in tex


def test_a_wrong_number_is_named():
    aux = (
        r"\newlabel{book/07_depth:fig-one}{{07.2}{3}{What}{figure.2.2}{}}"
        "\n"
        r"\newlabel{equation:book/07_depth:eq-one}{{07.1}{3}{}{equation.2.1}{}}"
    )
    numbers = {
        "book/07_depth:fig-one": "07.1",
        "equation:book/07_depth:eq-one": "07.1",
        "book/07_depth:fig-two": "07.2",
    }
    assert build_pdf.misnumbered(aux, numbers) == [
        "book/07_depth:fig-one: 07.2 in the PDF, 07.1 on the page",
        "book/07_depth:fig-two: nothing in the PDF, 07.2 on the page",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "LaTeX Warning: Reference `book/07:fig' on page 3 undefined on input line 9.",
        "LaTeX Warning: Hyper reference `thm' on page 3 undefined on input line 9.",
        "LaTeX Warning: Label `fig' multiply defined.",
        "Missing character: There is no ✗ (U+2717) in font FreeSerif!",
        r"Overfull \hbox (84.3pt too wide) in paragraph at lines 7--9",
    ],
)
def test_complaints_of_latex_are_heard(line):
    half = line[:20] + "x" * (79 - len(line[:20].encode()))
    broken = f"{half}\n{line[20:]}\nnext"  # as LaTeX breaks its lines
    assert build_pdf.complaints(f"before\n{line}\nafter")
    assert build_pdf.joined(broken) == f"{half}{line[20:]}\nnext\n"


def test_a_quiet_log_has_no_complaints():
    log = r"""Overfull \hbox (3.2pt too wide) in paragraph at lines 7--9
LaTeX Font Warning: Font shape `TU/FreeSerif(0)/m/sc' undefined
Package hyperref Info: Link nesting OFF"""
    assert build_pdf.complaints(log) == []


def test_a_failed_run_leaves_the_pdf_there_was(tmp_path, monkeypatch, capsys):
    old = tmp_path / "gauss-flows.pdf"
    old.write_bytes(b"old")
    work = tmp_path / "pdf"
    (work / "_build" / "latex").mkdir(parents=True)
    (work / "_build" / "latex" / "half.aux").touch()
    monkeypatch.setattr(build_pdf, "PDF", old)
    monkeypatch.setattr(build_pdf, "WORK", work)
    monkeypatch.setattr(build_pdf, "has_latex", lambda: True)
    monkeypatch.setattr(sys, "argv", ["build_pdf.py"])
    monkeypatch.setattr(build_pdf.build_site, "fill_cache", lambda folder: 0)
    monkeypatch.setattr(build_pdf.build_site, "build", lambda *a, **k: 1)
    assert build_pdf.main() == 1
    assert old.read_bytes() == b"old"
    assert not (work / "_build" / "latex" / "half.aux").exists()
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_the_site_offers_the_pdf_where_there_is_one(tmp_path, there):
    out = tmp_path / "_build" / "html"
    out.mkdir(parents=True)
    if there:
        pdf_download.made(tmp_path).write_bytes(b"%PDF")
    config = SimpleNamespace()
    builder = SimpleNamespace(format="html")
    app = SimpleNamespace(srcdir=tmp_path, outdir=out, config=config, builder=builder)
    menu = {"label": "download-buttons", "buttons": []}
    pdf_download.look(app, config)
    context = {"header_buttons": [menu], "pathto": lambda name, _: f"../{name}"}
    pdf_download.add_button(app, "book/intro", "page.html", context, None)
    pdf_download.copy(app, None)
    urls = [button["url"] for button in menu["buttons"]]
    assert urls == (["../gauss-flows.pdf"] if there else [])
    assert (out / "gauss-flows.pdf").exists() == there


def test_the_pdf_of_the_tools_is_the_one_that_is_offered():
    assert build_pdf.PDF == pdf_download.made(notebooks.ROOT)
