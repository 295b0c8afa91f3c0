"""Set the whole book as a PDF, from the executed notebooks; nothing is executed here.

The work is done in a folder of its own, which the next run drops. `_build` gets the
finished PDF, or keeps the one it had. LaTeX must find every reference and every
character, fit the lines, and give figures and equations the numbers of the pages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import build_site
from alone import alone

PDF = build_site.BUILD / "gauss-flows.pdf"
WORK = build_site.BUILD / "pdf"
TOO_WIDE = 36  # points: what sticks out so far is seen to be wrong
PACKAGES = (
    "texlive-xetex texlive-latex-recommended texlive-latex-extra "
    "texlive-fonts-recommended texlive-fonts-extra fonts-freefont-otf "
    "latexmk librsvg2-bin"
).split()
FAULTS = (
    r"LaTeX Warning: (?:Hyper r|R)eference .* undefined.*",
    r"LaTeX Warning: Citation .* undefined.*",
    r"LaTeX Warning: Label .* multiply defined.*",
    r"Package hyperref Warning: Suppressing link .*",
    r"Missing character: .*",
    r"LaTeX Warning: Float too large.*",
)


def has_latex() -> bool:
    return all(map(shutil.which, ("xelatex", "latexmk", "rsvg-convert")))


def install_latex() -> None:
    """Install LaTeX from Debian's packages, or say how."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit(f"make pdf needs LaTeX. On Debian, as root: {' '.join(command)}")
    print("pdf: installing LaTeX", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for each in (["apt-get", "update"], command):
        subprocess.run(each, check=True, env=environment, stdout=subprocess.DEVNULL)


def joined(log: str) -> str:
    """LaTeX's log with the lines that it broke at 79 bytes put together again."""
    lines = [""]
    for line in log.splitlines():
        lines[-1] += line
        if len(line.encode()) != 79:
            lines.append("")
    return "\n".join(lines)


def complaints(log: str) -> list[str]:
    """What LaTeX says that a reader would notice."""
    log = joined(log)
    found = [line for fault in FAULTS for line in re.findall(fault, log)]
    for points, where in re.findall(
        r"Overfull \\hbox \(([\d.]+)pt too wide\) (.*)", log
    ):
        if float(points) > TOO_WIDE:
            found.append(f"{points} points too wide {where}")
    return list(dict.fromkeys(found))


def misnumbered(aux: str, numbers: dict[str, str]) -> list[str]:
    """Figures, tables and equations whose number is not that of the page."""
    there = dict(re.findall(r"\\newlabel\{([^{}]+)\}\{\{([^{}]*)\}", aux))
    return [
        f"{label}: {there.get(label, 'nothing')} in the PDF, {number} on the page"
        for label, number in numbers.items()
        if there.get(label) != number
    ]


def typeset(folder: Path) -> list[str]:
    """Run LaTeX as often as it needs; what is wrong with the outcome."""
    command = "latexmk -pdfxe -interaction=nonstopmode -halt-on-error gauss-flows"
    with (folder / "latexmk.log").open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command.split(), cwd=folder, stdout=out, stderr=out, check=False
        )
    log = read_log(folder)
    if done.returncode:
        errors = re.findall(r"^! .*\n(?:.*\n){0,3}?l\.\d+.*", log, re.M)
        return errors or [f"latexmk: exit {done.returncode}, see latexmk.log"]
    aux = (folder / "gauss-flows.aux").read_text(encoding="utf-8")
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    return complaints(log) + misnumbered(aux, numbers)


def read_log(folder: Path) -> str:
    path = folder / "gauss-flows.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def main() -> int:
    started = time.monotonic()
    if not has_latex() or "--install" in sys.argv:
        install_latex()
    if "--install" in sys.argv:
        return 0
    shutil.rmtree(WORK, ignore_errors=True)
    folder, log_path = WORK / "_build" / "latex", WORK / "latex.log"
    build_site.fill_cache(WORK / "_build" / ".jupyter_cache")
    print("pdf: writing LaTeX", flush=True)
    options = ("--builder", "latex", "--path-output", str(WORK))
    if build_site.build(*options, log_path=log_path):
        print(f"pdf: FAILED; the whole log is {log_path}")
        return 1
    print("pdf: running LaTeX", flush=True)
    if faults := typeset(folder):
        print(*faults, sep="\n")
        print(f"pdf: FAILED, {len(faults)} faults; LaTeX's logs are in {folder}")
        return 1
    os.replace(folder / "gauss-flows.pdf", PDF)
    pages = re.findall(r"Output written on \S+ \((\d+) pages", read_log(folder))[-1]
    print(
        f"pdf: _build/{PDF.name}, {pages} pages, {PDF.stat().st_size / 1e6:.1f} MB, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    with alone("pdf"):
        sys.exit(main())
