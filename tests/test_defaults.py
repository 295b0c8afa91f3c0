"""What readers get who name no options: the numbers that the docstrings promise."""

import inspect

import jax
import numpy as np
import optax
import pytest

import gauss_flows as gf

NETWORK = {
    "mask": None,
    "nn_width": 24,
    "nn_depth": 2,
    "nn_activation": jax.nn.relu,
    "nn_residual": False,
    "identity_init": False,
    "dtype": None,
}
FIT = {
    "steps": 1200,
    "batch_size": 512,
    "learning_rate": 3e-3,
    "schedule": None,
    "clip": 1.0,
    "optimizer": optax.adam,
    "x_val": None,
    "eval_every": 100,
    "patience": None,
    "ema": None,
    "loss": None,
    "callback": None,
    "checkpoint": None,
    "checkpoint_every": 1000,
    "devices": None,
    "record": None,
    "progress": True,
    "throw": True,
}
DEFAULTS = {
    gf.AdditiveCoupling: NETWORK,
    gf.AffineCoupling: NETWORK | {"log_scale_bound": None},
    gf.RQSplineCoupling: NETWORK | {"n_bins": 8, "interval": 4.0},
    gf.MixtureCDFCoupling: NETWORK | {"n_components": 8},
    gf.DeepSigmoidCoupling: NETWORK | {"n_components": 8},
    gf.HouseholderRotation: {
        "n_reflections": 2,
        "shape": (2,),
        "key": None,
        "dtype": None,
    },
    gf.LearnedPermutation: {"key": None, "temperature": 1.0, "dtype": None},
    gf.PLULinear: {"dtype": None},
    gf.transformers.Affine: {"log_scale_bound": None},
    gf.transformers.RQSpline: {"n_knots": 8, "interval": 4.0},
    gf.transformers.MixtureCDF: {"n_components": 8},
    gf.transformers.DeepSigmoid: {"n_components": 8},
    gf.fit: FIT,
    gf.fit_many: FIT,
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__name__)
def test_options_left_out_are_the_documented_ones(function):
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert options == DEFAULTS[function]


def test_the_smallest_masks_that_there_are():
    assert gf.masks.half(2).tolist() == [False, True]
    assert gf.masks.alternating(2).tolist() == [False, True]
    assert gf.masks.checkerboard((1, 2, 1)).ravel().tolist() == [False, True]
    assert gf.masks.checkerboard((2, 1, 1)).ravel().tolist() == [False, True]
    assert gf.masks.channelwise((1, 1, 2)).ravel().tolist() == [False, True]
    for count in (1, 3):
        assert gf.masks.random(jax.random.key(0), 4, count).sum() == count
    for shape in ((2,), (2, 1), (1, 2)):
        mask = np.array([True, False]).reshape(shape)
        np.testing.assert_array_equal(gf.masks.complement(mask), ~mask)


def test_a_spline_may_have_one_knot_and_little_room():
    spline = gf.transformers.RQSpline(1, 0.0011)
    assert spline.sizes == (2, 2, 3)
    with pytest.raises(ValueError, match=r"above 0.001, got 0.001"):
        gf.transformers.RQSpline(1, 0.001)
