"""The project's own papers: dependencies, lock, table of contents, workflows."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import make_environment
import notebooks
import pytest
import yaml
from conftest import build_wheel
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import _style
import gauss_flows

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def required() -> list[Requirement]:
    """Everything that pyproject.toml asks for, groups and extras included."""
    project, groups = PYPROJECT["project"], PYPROJECT["dependency-groups"]
    texts = [*project["dependencies"]]
    for listed in [*groups.values(), *project["optional-dependencies"].values()]:
        texts += [entry for entry in listed if isinstance(entry, str)]
    return [Requirement(text) for text in texts]


def pins() -> list[Requirement]:
    lines = read("constraints.txt").splitlines()
    return [Requirement(line) for line in lines if line and line.strip()[0] != "#"]


def test_the_extra_of_pictures_is_tested():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras["pictures"]) <= set(PYPROJECT["dependency-groups"]["test"])


def environments() -> list[dict[str, str]]:
    pythons = [("3.11", "3.11.9"), ("3.12", "3.12.4"), ("3.13", "3.13.1")]
    return [
        {
            "python_version": short,
            "python_full_version": full,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
        }
        for short, full in pythons
    ]


def holds(marker: Marker | None, environment: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(environment)


@pytest.mark.parametrize(
    "environment", environments(), ids=lambda e: e["python_version"]
)
def test_the_lock_satisfies_pyproject(environment):
    locked = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins()
        if holds(pin.marker, environment)
    }
    for requirement in required():
        if not holds(requirement.marker, environment):
            continue
        found = locked.get(canonicalize_name(requirement.name))
        assert found, f"{requirement.name} is not in constraints.txt: make lock"
        assert requirement.specifier.contains(found, prereleases=True), requirement


def test_the_lock_pins_each_package_once_and_names_no_place():
    for environment in environments():
        names = [p.name for p in pins() if holds(p.marker, environment)]
        assert len(names) == len(set(names))
    for pin in pins():
        assert pin.url is None
        assert [clause.operator for clause in pin.specifier] == ["=="]
    assert "://" not in read("constraints.txt")
    assert "--" not in re.sub(r"#.*", "", read("constraints.txt"))


def test_what_is_installed_is_the_lock():
    for pin in pins():
        if (pin.marker and not pin.marker.evaluate()) or pin.name.startswith("nvidia"):
            continue
        if canonicalize_name(pin.name).startswith("jax-cuda"):
            continue
        assert pin.specifier.contains(version(pin.name), prereleases=True), pin


def test_environment_yml_is_made_from_pyproject():
    assert read("environment.yml") == make_environment.environment(), "make lock"
    environment = yaml.safe_load(read("environment.yml"))
    python, _, pip = environment["dependencies"]
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert python == f"python={oldest}"
    assert pip["pip"][:2] == ["-c constraints.txt", "-e ."]
    wanted = {str(requirement) for requirement in required()}
    assert {str(Requirement(text)) for text in pip["pip"][2:]} <= wanted


def test_colabs_jax_and_the_locked_one_are_admitted():
    (jax,) = [r for r in required() if r.name == "jax" and not r.extras]
    assert jax.specifier.contains("0.7.2")
    assert jax.specifier.contains(version("jax"))
    assert not jax.specifier.contains("0.11.1")


def test_jupyter_book_is_the_first_wherever_it_is_named():
    names = ["README.md", "pyproject.toml", "environment.yml", "CONTRIBUTING.md"]
    found = 0
    for name in [*names, *(str(path.relative_to(ROOT)) for path in WORKFLOWS)]:
        for asked in re.findall(r"jupyter-book[<>=~!][^\s\"'`]*", read(name)):
            assert Requirement(asked).specifier == Requirement("x>=1.0.4,<2").specifier
            found += 1
        assert "install jupyter-book\n" not in read(name)
    assert found >= 3


def test_style_and_package_come_from_this_tree_and_not_from_a_copy():
    assert Path(_style.__file__).resolve() == ROOT / "_style.py"
    assert Path(gauss_flows.__file__).resolve().parent == ROOT / "gauss_flows"


def test_the_wheel_holds_package_types_and_style(tmp_path):
    names = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    modules = {f"gauss_flows/{p.name}" for p in (ROOT / "gauss_flows").glob("*.py")}
    assert {"_style.py", "gauss_flows/py.typed", *modules} <= names
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if "dist-info" not in t} == {"_style.py", "gauss_flows"}


def test_the_table_of_contents_is_the_folder():
    listed = notebooks.pages(yaml.safe_load(read("_toc.yml")))
    assert all(page.endswith(".md") for page in listed)
    assert len(listed) == len(set(listed))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "book").glob("*.md")}
    assert set(listed) == there
    numbers = [p for p in listed if re.match(r"book/\d\d_", p)]
    assert numbers == sorted(numbers)


def test_one_address():
    config = yaml.safe_load(read("_config.yml"))
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    assert config["repository"]["url"] == REPOSITORY
    assert config["html"]["baseurl"] == f"https://{owner}.github.io/{name}/"
    assert yaml.safe_load(read("CITATION.cff"))["repository-code"] == REPOSITORY
    # the one place, what is held to it above, and what readers see as plain text
    literal = {"pyproject.toml", "_config.yml", "CITATION.cff", "README.md"}
    for path in tracked():
        if owners := linked(path):
            assert str(path.relative_to(ROOT)) in {*literal, "book/intro.md"}, path
            assert owners == {owner}, path


def test_the_site_links_to_one_address():
    owner = REPOSITORY.split("/")[3]
    site = ROOT / "_build" / "html"
    pages = [*site.glob("book/*.html"), *site.glob("notebooks/book/*.*")]
    if not pages:
        pytest.skip("the site has not been built: make book")
    for page in pages:
        assert linked(page) == {owner}, page


def linked(path: Path) -> set[str]:
    """The owners of repositories and sites of this project's name in a text file."""
    name = REPOSITORY.rsplit("/", maxsplit=1)[1]
    text = path.read_text(encoding="utf-8", errors="replace")
    source = rf"(?:github\.com|/gh|/github)/([\w-]+)/{name}\b"
    return {
        *re.findall(source, text),
        *re.findall(rf"//([\w-]+)\.github\.io/{name}", text),
    }


def tracked() -> list[Path]:
    """The files that the project consists of."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("this is no checkout")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return [ROOT / name for name in listed.split("\0") if name]


def test_versions_agree():
    wanted = PYPROJECT["project"]["version"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert str(citation["version"]) == wanted
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert wanted in read("CHANGELOG.md")
    assert version("gauss-flows") == wanted


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_schemas(schema, files):
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_do_little(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name
        assert name == "publish" or job["permissions"] in ({}, {"contents": "read"})
        for step in job["steps"]:
            if "uses" in step:
                assert re.search(r"@[0-9a-f]{40}$", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_accelerator_job_proves_that_it_ran_on_one():
    jobs = yaml.safe_load(read(".github/workflows/accelerator.yml"))["jobs"]
    job = jobs["full-lane"]
    assert job["runs-on"] == "${{ vars.GPU_RUNNER }}"
    assert job["env"]["GAUSS_FLOWS_LANE"] == "full"
    assert any("default_backend() == " in step.get("run", "") for step in job["steps"])
    assert jobs["publish"]["needs"] == "full-lane"


def test_ci_runs_the_two_commands():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert "make book" in lines
    assert lines[-1] == "make test"
