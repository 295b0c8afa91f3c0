"""Make environment.yml, conda's and Binder's way in, from pyproject.toml."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TEMPLATE = """\
# Made from pyproject.toml by `make lock`; do not edit.
# conda env create -f environment.yml && conda activate {name}
name: {name}
channels:
  - conda-forge
dependencies:
  - python={python}
  - pip>=25.1
  - pip:
      - -c constraints.txt
      - -e .
{packages}"""


def environment() -> str:
    """The text of environment.yml, as pyproject.toml asks for it."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    # conda's pip section knows no --group, so the groups are written out
    packages = [*groups["book"], *groups["test"]]
    return TEMPLATE.format(
        name=project["name"],
        python=project["requires-python"].removeprefix(">="),
        packages="".join(f"      - {package}\n" for package in packages),
    )


def main() -> None:
    (ROOT / "environment.yml").write_text(environment(), encoding="utf-8")
    print("environment.yml written", file=sys.stderr)


if __name__ == "__main__":
    main()
