"""What we take over from others: known flaws, licences, and what the workflows may do.

Three reports: pip-audit over the lock, which asks an advisory service; the licences of
the installed packages, all of which must be on our list; and zizmor over the workflows.
The two programs live in an environment of their own, `.venv-audit`. Any finding, and
any package that the service did not answer for, ends it with 1.
"""

import json
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-audit"
REPORT = ROOT / "_build" / "licences.txt"
LOCKS = ("requirements.lock", "requirements-gpu.lock")
# none of them asks anything of those who only use the package; the MPL asks it for
# changes to its own files
ALLOWED = {
    *("MIT", "MIT License", "MIT-CMU", "0BSD", "BSD", "BSD License", "BSD-2-Clause"),
    *("BSD-3-Clause", "Apache 2.0", "Apache-2.0", "Apache Software License", "Zlib"),
    *("ISC License (ISCL)", "ISC", "PSF-2.0", "Python Software Foundation License"),
    *("MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)", "Public Domain", "CC0-1.0"),
}
# packages whose metadata say nothing, or too much, with what their files say
KNOWN = {
    "axe-playwright-python": "MIT AND MPL-2.0",  # the second for axe.min.js
    "docutils": "Public Domain AND BSD-2-Clause AND PSF-2.0",  # the GPL is for Emacs
}


def licence(package: Distribution) -> str:
    """What a package says of its licence, in the newest of three ways."""
    about = package.metadata
    if known := KNOWN.get(about["Name"].lower()):
        return known
    classifiers = [c.split(" :: ") for c in about.get_all("Classifier") or []]
    named = [parts[-1] for parts in classifiers if parts[0] == "License"]
    (expression,) = about.get_all("License-Expression") or [""]
    (old,) = about.get_all("License") or [""]
    return expression or " AND ".join(named) or old.strip().split("\n")[0] or "unknown"


def allowed(text: str) -> bool:
    """Whether one of the alternatives asks for nothing that is not on the list."""
    return text in ALLOWED or any(
        all(part in ALLOWED for part in choice.split(" AND "))
        for choice in text.split(" OR ")
    )


def licences() -> tuple[list[str], list[str]]:
    """A line for each installed package; those whose licence is not on the list."""
    lines, others = [], []
    for package in sorted(distributions(), key=lambda p: p.metadata["Name"].lower()):
        text = licence(package)
        lines.append(f"{package.metadata['Name']} {package.version}: {text}")
        if not allowed(text):
            others.append(lines[-1])
    return lines, others


def flaws(report: str) -> list[str]:
    """The findings in a report of pip-audit, and what it could not look up."""
    packages = json.loads(report)["dependencies"]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    if skipped:
        found.append(
            f"{len(skipped)} of {len(packages)} packages were not audited, because the "
            f"advisory service did not answer for them: {', '.join(skipped[:5])}, ..."
        )
    return found


def make_venv() -> None:
    """Install pip-audit and zizmor, always the newest: they know the newest flaws."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    pip = (VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    command = (*pip, "install", "--quiet", "pip-audit>=2.9", "zizmor>=1.9")
    subprocess.run(command, check=True)


def audited() -> list[str]:
    """Ask the advisory service about every pin of the lock."""
    command = [VENV / "bin" / "pip-audit", "--require-hashes", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    for lock in LOCKS:
        command += ["-r", ROOT / lock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return flaws(done.stdout)
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [f"nothing was audited, because pip-audit ended with: {last}"]


def main() -> int:
    make_venv()
    lines, others = licences()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"licences: {len(lines)} packages, in {REPORT.relative_to(ROOT)}", flush=True)
    faults = [f"licence not on the list: {line}" for line in others]
    faults += [f"pip-audit: {fault}" for fault in audited()]
    zizmor = [VENV / "bin" / "zizmor", "--offline", "--no-progress"]
    if subprocess.run([*zizmor, ROOT / ".github" / "workflows"]).returncode:
        faults.append("zizmor: see above")
    print(*faults, f"audit: {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
