"""Training that is killed, resumed, copied and damaged in any order: the same bits."""

import functools
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from fuzzing import LONG, OUTCOMES
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_checkpoint import Stop, assert_same_result, stop_at, train

from gauss_flows import checkpoint

STEPS, EVERY = 70, 10  # of `train` there, which reports at each tenth
SETTINGS = [{}, {"patience": 2}] if LONG else [{}]


@functools.cache
def uninterrupted(index):
    return train(**SETTINGS[index])


class Training(RuleBasedStateMachine):
    """A run and its file, of which there may be an older copy."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "run.npz"
        self.copy, self.position, self.whole = None, None, True

    @initialize(index=st.integers(0, len(SETTINGS) - 1))
    def choose(self, index):
        self.index = index

    def options(self, **more):
        return SETTINGS[self.index] | {"checkpoint": self.file} | more

    @precondition(lambda self: self.whole)
    @rule(step=st.integers(0, STEPS // EVERY), every=st.sampled_from([1, 15, 30, 99]))
    def is_killed_at_a_report(self, step, every):
        options = self.options(checkpoint_every=every, callback=stop_at(step * EVERY))
        try:
            assert_same_result(train(**options), uninterrupted(self.index))
        except Stop:
            pass
        self.look_at_the_file()

    @precondition(lambda self: self.whole)
    @rule(write=st.integers(1, 4))
    def is_killed_in_a_write(self, write):
        real, left = os.fsync, [write]

        def dying(descriptor):
            left[0] -= 1
            if not left[0]:
                raise Stop
            real(descriptor)

        with mock.patch("os.fsync", dying):
            try:
                done = train(**self.options(checkpoint_every=EVERY))
                assert_same_result(done, uninterrupted(self.index))
            except Stop:
                pass
        self.look_at_the_file()

    @precondition(lambda self: self.whole)
    @rule()
    def comes_to_its_end(self):
        assert_same_result(train(**self.options()), uninterrupted(self.index))
        self.look_at_the_file()
        assert self.position == STEPS + 1 or SETTINGS[self.index]

    @precondition(lambda self: self.whole and self.position is not None)
    @rule()
    def is_copied(self):
        self.copy = self.file.read_bytes(), self.position

    @precondition(lambda self: self.copy)
    @rule()
    def goes_back_to_the_copy(self):
        raw, self.position = self.copy
        self.file.write_bytes(raw)
        self.whole = True

    @precondition(lambda self: self.position is not None)
    @rule()
    def is_removed(self):
        self.file.unlink()
        self.position, self.whole = None, True

    @precondition(lambda self: self.whole and self.position is not None)
    @rule(part=st.floats(0, 0.999))
    def is_damaged(self, part):
        raw = self.file.read_bytes()
        self.file.write_bytes(raw[: int(part * len(raw))])
        self.whole = False

    @precondition(lambda self: not self.whole)
    @rule()
    def is_refused_when_damaged(self):
        raw = self.file.read_bytes()
        with pytest.raises(ValueError, match="truncated or damaged"):
            train(**self.options())
        assert self.file.read_bytes() == raw
        OUTCOMES["training"]["documented"] += 1

    @precondition(lambda self: self.whole and self.position is not None)
    @rule()
    def is_refused_with_other_settings(self):
        raw = self.file.read_bytes()
        with pytest.raises(ValueError, match=r"expected learning_rate = 0\.1"):
            train(**self.options(learning_rate=0.2))
        assert self.file.read_bytes() == raw
        OUTCOMES["training"]["documented"] += 1

    def look_at_the_file(self):
        """It is whole, no other is beside it, and it never goes back."""
        OUTCOMES["training"]["right"] += 1
        if not self.file.exists():  # killed in its very first write
            assert self.position is None
            return
        position = checkpoint.read_meta(self.file)["position"]
        assert position >= (self.position or 0)
        assert position % EVERY == 0 or position == STEPS + 1
        assert os.listdir(self.folder.name) == [self.file.name]
        self.position = position

    def teardown(self):
        """Whatever happened: from here on to the end it is the uninterrupted run."""
        if self.whole and hasattr(self, "index"):
            assert_same_result(train(**self.options()), uninterrupted(self.index))
            OUTCOMES["training"]["right"] += 1
        self.folder.cleanup()


def test_training_ends_in_the_same_bits_whatever_happens_on_the_way():
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=60 if LONG else 3,
            stateful_step_count=12 if LONG else 8,
            suppress_health_check=list(HealthCheck),
        ),
    )
