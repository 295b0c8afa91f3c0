"""Where a result comes from: commit, machine, versions, date and time taken.

    start = Start()
    rows = measure()
    result = {"rows": rows, **start.told(versions("jax", "numpy"))}

The commit is asked for at the start: by the end of a long run another may be checked
out.
"""

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Start:
    """The commit that runs, and when it began to."""

    def __init__(self) -> None:
        self.commit = commit()
        self.clock = time.perf_counter()

    def told(self, versions: dict[str, str]) -> dict[str, Any]:
        """What each result says of its origin; `seconds` since the start."""
        return {
            "machine": machine(),
            "versions": versions,
            "date": today(),
            "commit": self.commit,
            "seconds": round(time.perf_counter() - self.clock),
        }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {n: version(n) for n in packages}


@cache
def machine() -> dict[str, Any]:
    """What the numbers were measured on; JAX is asked in a process of its own."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep=',')"
    kind, device = printed(sys.executable, "-c", ask).strip().split(",", 1)
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kind": kind,
        "device": device,
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """Commit of the code that runs; "+changes" where some of it is not committed."""
    ran = ("gauss_flows", "benchmarks/*.py", "trials/*.py")
    changed = printed("git", "-C", str(ROOT), "status", "--porcelain", "--", *ran)
    head = printed("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    return head + "+changes" * bool(changed)


def today() -> str:
    """The date in Greenwich."""
    return datetime.now(UTC).date().isoformat()


def printed(program: str | Path, *arguments: str | Path) -> str:
    """What a program prints."""
    return subprocess.run(
        [program, *arguments], check=True, text=True, stdout=subprocess.PIPE
    ).stdout
