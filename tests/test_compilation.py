"""What one process compiled, the next one reads."""

import subprocess
import sys

import pytest

import gauss_flows as gf

RUN = """
import sys
import jax, jax.numpy as jnp
import gauss_flows as gf

read = []
jax.monitoring.register_event_listener(lambda event, **_: read.append(event))
gf.compilation.SHORTEST = 0.0  # however fast this machine is
gf.cache_compilation(sys.argv[1])
jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x) @ x.T)[1])(jnp.ones((3, 4)))
print(read.count("/jax/compilation_cache/cache_hits"))
"""


def hits(folder):
    command = [sys.executable, "-W", "error", "-c", RUN, str(folder)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    folder = tmp_path / "made" / "on demand"
    assert hits(folder) == 0
    assert any(folder.iterdir())
    assert hits(folder) > 0


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        gf.cache_compilation(tmp_path / "taken")
