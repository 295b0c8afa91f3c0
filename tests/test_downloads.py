"""What a reader takes away: notebooks, scripts, the release that they install."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import colab
import nbformat
import notebook_downloads
import notebooks
import pinned_release
import pytest
import teaching
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import v4
from packaging.requirements import Requirement
from slices import read, slice_of
from test_project import PYPROJECT, REPOSITORY
from test_slices import BOUND_LATE

ROOT = notebooks.ROOT
SITE = ROOT / "_build" / "html"
OFFERED = sorted((SITE / "notebooks" / "book").glob("*.ipynb"))
RELEASE = re.compile(
    rf"gauss-flows(\[pictures\])? @ git\+{REPOSITORY}@([0-9a-f]{{40}})"
)

site = pytest.mark.skipif(not OFFERED, reason="the site has not been built: make book")
offered = pytest.mark.parametrize("path", OFFERED, ids=lambda path: path.stem)


def install_cell(pictures: bool = False) -> str:
    wanted = pinned_release.requirement(REPOSITORY, "0" * 40, pictures=pictures)
    return pinned_release.INSTALL.format(requirement=wanted)


def plain(source: str) -> str:
    """Code as IPython hands it to Python."""
    return TransformerManager().transform_cell(source)


class Magics:
    """Stands for IPython, and keeps the lines that were asked of it."""

    def __init__(self):
        self.lines = []

    def run_line_magic(self, name, line):
        self.lines.append(f"{name} {line}")


# the release


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_the_release_is_the_commit():
    assert re.fullmatch("[0-9a-f]{40}", release := pinned_release.commit(ROOT))
    log = (ROOT / ".git" / "logs" / "HEAD").read_text(encoding="utf-8")
    assert log.splitlines()[-1].split()[1] == release


def test_without_git_the_release_is_the_tag(tmp_path):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    assert pinned_release.commit(tmp_path) == f"v{PYPROJECT['project']['version']}"


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("from gauss_flows import image, pictures", True),
        ("gf.pictures.faces()", True),
        ("pictures = {}\npictures.items()", False),
        ("import gauss_flows as gf", False),
    ],
)
def test_the_extra_comes_where_it_is_needed(code, needed):
    assert pinned_release.uses_pictures(code) is needed


def test_the_first_cell_installs_around_the_jax_that_is_there(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "gauss_flows" else find(name),
    )
    install, _ = plain(install_cell()).split("\nimport jax\n")
    magics = Magics()
    exec(install, {"get_ipython": lambda: magics})
    (line,) = magics.lines
    assert f"git+{REPOSITORY}@{'0' * 40}" in line
    # IPython puts in what stands in braces
    assert line.endswith("{held}")
    scope = {"get_ipython": Magics}
    exec(install, scope)
    assert scope["held"] == f"jax=={version('jax')} jaxlib=={version('jaxlib')}"


def test_the_first_cell_does_nothing_where_the_package_is(capsys):
    magics = Magics()
    exec(plain(install_cell()), {"get_ipython": lambda: magics})
    assert magics.lines == []
    told = capsys.readouterr().out
    assert "the lane is quick" in told
    assert "That is no GPU" in told


# what the site offers


@site
@offered
def test_the_notebook_installs_the_release_of_its_site(path):
    install, *cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    pictures, release = RELEASE.search(install.source).groups()
    code = "\n".join(cell.source for cell in cells)
    assert bool(pictures) is pinned_release.uses_pictures(code)
    environment = (SITE / "environment.yml").read_text(encoding="utf-8")
    assert f"@{release}" in environment


@site
@offered
def test_the_script_is_the_notebook(path):
    script = path.with_suffix(".py").read_text(encoding="utf-8")
    code = compile(script, path.name, "exec", flags=ast.PyCF_ONLY_AST)
    cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    wanted = [
        ast.unparse(line) for cell in cells[1:] for line in ast.parse(cell.source).body
    ]
    assert [ast.unparse(line) for line in code.body][1:-1] == wanted
    assert RELEASE.search(script)
    assert "\n# # " in script, "the text is not there"


@site
@pytest.mark.slow
def test_a_script_runs(tmp_path):
    # the introduction is cheap, and asserts nothing of times
    done = subprocess.run(
        [sys.executable, SITE / "notebooks" / "book" / "intro.py"],
        cwd=tmp_path,
        env={"MPLBACKEND": "agg", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@site
@offered
def test_the_page_offers_both_and_two_places_to_run(path):
    page = (SITE / "book" / f"{path.stem}.html").read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"]*)"', page))
    project = REPOSITORY.removeprefix("https://github.com/")
    name = f"notebooks/book/{path.stem}"
    assert {f"../{name}.ipynb", f"../{name}.py"} <= links
    colab_host, binder = "https://colab.research.google.com", "https://mybinder.org"
    assert f"{colab_host}/github/{project}/blob/gh-pages/{name}.ipynb" in links
    there = f"{binder}/v2/gh/{project}/gh-pages?urlpath=lab/tree/{name}.ipynb"
    about = nbformat.read(path, as_version=4).metadata["gauss_flows"]
    assert (there in links) is (about["memory"] <= notebook_downloads.BINDER_MEMORY)
    assert about["memory"] > 1e8


@site
def test_binder_finds_its_environment():
    environment = yaml.safe_load((SITE / "environment.yml").read_text(encoding="utf-8"))
    *_, pip = environment["dependencies"]
    constraints, package = pip["pip"]
    assert constraints == "-c constraints.txt"
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert (SITE / "constraints.txt").read_text(encoding="utf-8") == lock
    assert Requirement(package).extras == {"pictures"}


# for teachers


@site
def test_teachers_get_the_exercises_without_the_solutions(tmp_path):
    assert teaching.write_all(SITE / "notebooks" / "book", tmp_path) == len(OFFERED)
    for path in OFFERED:
        text = [
            "\n".join(cell.source for cell in nbformat.read(p, as_version=4).cells)
            for p in (path, tmp_path / path.name)
        ]
        asked = [re.findall(r"\*\*Exercise [\d.]+", given) for given in text]
        solved = [re.findall(r"\*\*Solution to Exercise", given) for given in text]
        assert asked[0] == asked[1]
        assert len(solved[0]) == len(set(asked[0])), path.stem
        assert not solved[1]


@site
@offered
def test_without_the_solutions_every_cell_still_has_what_it_needs(path):
    notebook = teaching.without_solutions(nbformat.read(path, as_version=4))
    _, *codes = notebooks.code_cells(notebook)
    cells = [read(code.source) for code in codes]
    for place in range(len(cells)):
        assert slice_of(cells, place).missing <= BOUND_LATE.get(path.stem, set())


# the imitation of Colab


def test_colab_is_imitated_with_its_jax():
    held = colab.pins()
    assert held["jax"] == held["jaxlib"] == "0.7.2"
    for text in PYPROJECT["project"]["dependencies"]:
        asked = Requirement(text)
        if asked.name in held:
            assert asked.specifier.contains(held[asked.name]), "pip would move it"


def test_the_imitation_puts_the_wheel_in_the_place_of_the_address():
    notebook = v4.new_notebook(cells=[v4.new_code_cell(install_cell(pictures=True))])
    source = colab.install_from(notebook, Path("/a/b.whl")).source
    assert '"gauss-flows[pictures] @ file:///a/b.whl" {held}' in source
    assert "git+" not in source


def test_the_imitation_sees_what_has_moved(monkeypatch):
    there = {"jax": version("jax"), "numpy": version("numpy")}
    monkeypatch.setattr(colab, "pins", lambda: there)
    assert colab.moved(Path(sys.executable)) == {}
    monkeypatch.setattr(colab, "pins", lambda: {**there, "jax": "0.7.2"})
    assert colab.moved(Path(sys.executable)) == {"jax": there["jax"]}


def test_the_kernel_is_the_one_that_was_asked_for(tmp_path):
    colab.make_kernel(Path("/a/python"), tmp_path)
    spec = json.loads((tmp_path / "kernels" / "colab" / "kernel.json").read_text())
    assert spec["argv"][0] == "/a/python"
