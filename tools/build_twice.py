"""Build the site twice from the same executed notebooks, and name what differs.

Neither Python's random order of sets nor the time of the build may show in a page.
"""

import filecmp
import shutil
import sys
from pathlib import Path

import build_site
from alone import alone


def build_anew() -> None:
    """Build with nothing left of an earlier build."""
    build_site.STAMP.unlink(missing_ok=True)
    if build_site.main():
        sys.exit(1)


def files(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def differing(one: Path, other: Path) -> list[Path]:
    """The files that are not the same in both folders, or not in both."""
    both = files(one) & files(other)
    changed = {f for f in both if not filecmp.cmp(one / f, other / f, shallow=False)}
    return sorted(changed | (files(one) ^ files(other)))


def main() -> int:
    site, once = build_site.BUILD / "html", build_site.BUILD / "once"
    shutil.rmtree(once, ignore_errors=True)
    build_anew()
    site.rename(once)
    build_anew()
    different = differing(once, site)
    for path in different:
        print(f"built twice, not the same: {path}")
    print(f"built twice: {len(files(site))} files, {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    with alone("build-twice"):
        sys.exit(main())
