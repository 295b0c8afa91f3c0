"""How a reader gets the package that a page was made with: that very commit.

The address is Jupyter Book's `repository`, and so stands in one place; the commit is
the one that the site is built from, so that what is published together stays together.
"""

import re
import subprocess
import tomllib
from pathlib import Path

INSTALL = """\
# Where the book's package is missing (on Colab, say), install the release that made
# this page, and keep the JAX that fits the machine's GPU driver
import importlib.util
from importlib.metadata import version

if importlib.util.find_spec("gauss_flows") is None:
    there = [p for p in ("jax", "jaxlib") if importlib.util.find_spec(p)]
    held = " ".join(f"{{p}}=={{version(p)}}" for p in there)
    %pip install -q "{requirement}" {{held}}

import jax

import gauss_flows as gf

device = jax.devices()[0]
print(f"JAX computes on {{device.device_kind}}; the lane is {{gf.records.lane()}}.")
if device.platform == "cpu":
    print("That is no GPU. On Colab: Runtime, Change runtime type, T4 GPU.")"""

SCRIPT_INSTALL = """\
# The book's package is needed:
# python -m pip install "{requirement}"
import matplotlib.pyplot as plt"""

ENVIRONMENT = """\
# For Binder: it opens the notebooks beside this file, with the release that made them
name: gauss-flows
channels:
  - conda-forge
dependencies:
  - python={python}
  - git
  - pip>=25.1
  - pip:
      - -c constraints.txt
      - "{requirement}"
"""


def commit(srcdir: str | Path) -> str:
    """The commit that is checked out; the version's tag where git cannot tell."""
    command = ["git", "-C", str(srcdir), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"v{project(srcdir)['version']}"
    return done.stdout.strip()


def project(srcdir: str | Path) -> dict:
    text = Path(srcdir, "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]


def requirement(repository: str, release: str, *, pictures: bool) -> str:
    """What pip is asked for; `pictures` come with the extra of that name."""
    extra = "[pictures]" if pictures else ""
    return f"gauss-flows{extra} @ git+{repository}@{release}"


def uses_pictures(code: str) -> bool:
    """Whether code imports the package's pictures, which need packages of their own."""
    return re.search(r"\bimport\b.*\bpictures\b|\bgf\.pictures\b", code) is not None


def environment(srcdir: str | Path, repository: str, release: str) -> str:
    """An environment.yml that installs the release, for notebooks alone."""
    return ENVIRONMENT.format(
        python=project(srcdir)["requires-python"].removeprefix(">="),
        requirement=requirement(repository, release, pictures=True),
    )
