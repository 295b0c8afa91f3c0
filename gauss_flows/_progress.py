"""How far training is: a bar where one can be drawn, else a line now and then."""

import sys
from time import monotonic

import jax
from tqdm import tqdm

SECONDS = 30.0
"""Time between two lines, where there is no bar."""


class Progress:
    """Shows steps on standard error, from the first process only.

    A terminal and a notebook get tqdm's bar as text: the one made of widgets warns
    where ipywidgets is missing. A file gets lines, not a bar redrawn a thousand times.
    """

    def __init__(self, steps: int, done: int, show: bool):
        show = show and jax.process_index() == 0
        notebook = type(sys.stderr).__module__.startswith("ipykernel")
        drawn = show and (notebook or sys.stderr.isatty())
        self.lines = show and not drawn
        self.steps, self.done, self.due = steps, min(done, steps), 0.0
        self.bar = tqdm(total=steps, initial=self.done, unit="step", disable=not drawn)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def report(self, done: int, text: str, *, last: bool) -> None:
        """Tell that ``done`` steps are made, and whether there will be more."""
        self.bar.update(done - self.done)
        self.bar.set_postfix_str(text)
        self.done = done
        if self.lines and (last or monotonic() >= self.due):
            print(f"step {done}/{self.steps}, {text}", file=sys.stderr, flush=True)
            self.due = monotonic() + SECONDS
