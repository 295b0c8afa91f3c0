import jax.random as jr
import numpy as np
import pytest

from gauss_flows import masks


def test_half_puts_the_smaller_part_first():
    assert masks.half(2).tolist() == [False, True]
    assert masks.half(5).tolist() == [False, False, True, True, True]


def test_checkerboard_alternates_in_both_directions_and_not_over_channels():
    mask = masks.checkerboard((3, 4, 2))
    assert mask.shape == (3, 4, 2)
    assert (mask[1:] != mask[:-1]).all()
    assert (mask[:, 1:] != mask[:, :-1]).all()
    assert (mask[..., 0] == mask[..., 1]).all()


def test_channelwise_is_constant_over_pixels():
    mask = masks.channelwise((3, 4, 3))
    assert (mask == mask[0, 0]).all()
    assert mask[0, 0].tolist() == [False, True, True]


def test_random_has_the_count_asked_for_and_depends_on_the_key():
    drawn = [masks.random(jr.key(i), (4, 4), 5) for i in range(8)]
    assert all(mask.sum() == 5 and mask.shape == (4, 4) for mask in drawn)
    assert len({mask.tobytes() for mask in drawn}) > 1
    assert masks.random(jr.key(0), 7).sum() == 4
    assert masks.random(jr.key(0), (1, 4)).shape == (1, 4)


def test_complement_exchanges_the_parts():
    mask = masks.alternating(5)
    assert (masks.complement(mask) == ~mask).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.half(1), "at least 2 coordinates to split, got 1"),
        (lambda: masks.alternating(0), "at least 2 coordinates"),
        (lambda: masks.checkerboard((1, 1, 3)), "at least 2 pixels"),
        (lambda: masks.checkerboard((0, 4, 1)), r"picture shape \(height"),
        (lambda: masks.channelwise((4, 4, 1)), "at least 2 channels"),
        (lambda: masks.random(jr.key(0), 4, 0), r"n_active in 1..3, got 0"),
        (lambda: masks.random(jr.key(0), 4, 4), r"n_active in 1..3, got 4"),
        (lambda: masks.validate(np.array([0, 1]), (2,)), "got dtype int"),
        (
            lambda: masks.validate(masks.half(3), (2,)),
            r"shape \(2,\), got shape \(3,\)",
        ),
        (lambda: masks.validate(np.ones(3, bool), (3,)), "got all active"),
        (lambda: masks.complement(np.zeros(3, bool)), "got all passive"),
    ],
)
def test_bad_masks_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
