"""One build at a time in this folder, and no part of one that outlives it.

Plain Python, because tools/bootstrap.py needs it before anything is installed.
"""

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / ".build.lock"
HELD: set[int] = set()
"""The lock's descriptor, for children that write into the build: ``pass_fds=HELD``."""


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold this folder's lock; while another build has it, say so and wait.

    The system frees the lock when its holders have ended, however they end. A child
    that was given ``HELD`` is a holder too, and so the next build waits for it.
    """
    file = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace")
            print(f"{what}: waiting, because a build is at work here: {holder}")
            sys.stdout.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # on a full disk the name stays out
            os.ftruncate(file, 0)
            os.pwrite(file, f"{what}, process {os.getpid()}".encode(), 0)
        HELD.add(file)
        yield
    finally:
        HELD.discard(file)
        os.close(file)


def end_with_parent() -> None:
    """End this process as soon as its standard input is closed.

    A parent that keeps the other end of the pipe need not do anything: when it ends,
    even by SIGKILL, the system closes the pipe.
    """

    def wait() -> None:
        # not sys.stdin, whose lock Python would ask for as it shuts down
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
