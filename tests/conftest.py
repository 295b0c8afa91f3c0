"""What every test shares: no display, 64-bit numbers on request, a quiet Hypothesis."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jax.experimental
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# compilation makes the first example slow, which says nothing about the code
settings.register_profile(
    "project",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# `make fuzz`: other cases each time, and many more of them
settings.register_profile(
    "long",
    deadline=None,
    max_examples=200,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


def enable_x64(value: bool):
    """A context in which new arrays are 64-bit (or not), whichever JAX is there."""
    there = hasattr(jax, "enable_x64")  # before jax 0.8 it was experimental
    return getattr(jax if there else jax.experimental, "enable_x64")(value)  # noqa: B009


def build_wheel(folder: Path) -> Path:
    """Build the package's wheel into a folder."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def x64():
    """Run the test with 64-bit floats; the setting is undone afterwards."""
    with enable_x64(True):
        yield


def memory_maps() -> int:
    """How many this process has; 0 where the system doesn't say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.fixture(autouse=True)
def few_programs():
    """Forget compiled programs when there are many.

    Each holds memory maps, of which Linux grants a process some 65,000: a worker that
    keeps the programs of the whole suite ends in a segmentation fault.
    """
    yield
    if memory_maps() > 25_000:
        jax.clear_caches()
