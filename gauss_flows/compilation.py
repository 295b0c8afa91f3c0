"""Compiled programs that outlive the process that compiled them."""

import os
from pathlib import Path

import jax

SHORTEST = 0.1
"""Programs that compile faster than this many seconds are not worth a file."""


def cache_compilation(folder: str | os.PathLike | None = None) -> Path:
    """Keep compiled programs on disk, where the next process finds them.

    Building and training a stack spends its first seconds in the compiler. After this
    call each program is looked up first: by its text, the versions of JAX and XLA, the
    device and the compiler's options, so that a stale one is never used. The setting is
    JAX's own and holds for the whole process; nothing in this package makes it unasked.
    Do not use it where compilation is what you measure.

    Args:
        folder: Where to keep them, made if need be; by default ``gauss_flows`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``. Delete it to empty the cache.

    Returns:
        The folder.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    if folder is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches) / "gauss_flows"
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"expected a folder to write compiled programs, {folder}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
