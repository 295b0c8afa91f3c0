"""What each layer promises of rounding, in each dtype: the one place where it stands.

Layers are drawn as in ``contract.py``; a point is told by its largest entry.
"""

from typing import NamedTuple

RADII = (1.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e6)
"""Sizes of the points at which promises are tried."""


FAR = 100.0
"""How far out the inverse adds little to what rounding has lost already."""


class Promise(NamedTuple):
    """Bounds on relative errors.

    Attributes:
        reach: The largest entry of a point up to which the next two hold.
        inverse: On the error of the inverse.
        log_det: On the error of the log-determinant.
        factor: On the error of the inverse in units of epsilon times condition, up to
            ``FAR`` and wherever a digit is left.
    """

    reach: float
    inverse: float
    log_det: float
    factor: float


PROMISE: dict[str, dict[str, Promise]] = {
    "AdditiveCoupling": {
        "float64": Promise(1e6, 1e-14, 0.0, 5.0),
        "float32": Promise(1e6, 5e-6, 0.0, 5.0),
        "bfloat16": Promise(1e6, 5e-2, 0.0, 2.0),
    },
    "AffineCoupling": {
        "float64": Promise(10.0, 5e-13, 5e-15, 200.0),
        "float32": Promise(10.0, 1e-3, 2e-5, 500.0),
        "bfloat16": Promise(10.0, 1.0, 0.1, 2.0),
    },
    "AffineCoupling, bounded": {
        "float64": Promise(1e6, 5e-11, 5e-15, 100.0),
        "float32": Promise(1e6, 5e-4, 5e-3, 100.0),
        "bfloat16": Promise(100.0, 0.2, 1.0, 5.0),
    },
    "RQSplineCoupling": {
        "float64": Promise(3.0, 2e-11, 5e-14, 200.0),
        "float32": Promise(3.0, 1e-2, 5e-4, 200.0),
        "bfloat16": Promise(1.0, 0.1, 0.5, 20.0),
    },
    "MixtureCDFCoupling": {
        "float64": Promise(10.0, 1e-10, 1e-13, 100.0),
        "float32": Promise(10.0, 5e-2, 1e-3, 200.0),
    },
    "DeepSigmoidCoupling": {
        "float64": Promise(10.0, 2e-10, 1e-13, 200.0),
        "float32": Promise(10.0, 5e-2, 2e-4, 200.0),
        "bfloat16": Promise(3.0, 0.5, 0.5, 10.0),
    },
    "Diagonal, spline": {
        "float64": Promise(1e6, 5e-14, 5e-14, 5.0),
        "float32": Promise(1e6, 2e-5, 2e-4, 5.0),
        "bfloat16": Promise(1e6, 0.5, 2.0, 5.0),
    },
    "Diagonal, mixture CDF": {
        "float64": Promise(1e6, 2e-14, 5e-14, 10.0),
        "float32": Promise(1e6, 2e-5, 2e-4, 20.0),
    },
    "Diagonal, deep sigmoid": {
        "float64": Promise(1e6, 2e-14, 2e-13, 10.0),
        "float32": Promise(1e6, 1e-5, 1e-5, 10.0),
        "bfloat16": Promise(1e6, 0.2, 0.1, 10.0),
    },
    "ActNorm": {
        "float64": Promise(1e6, 1e-14, 5e-15, 5.0),
        "float32": Promise(1e6, 5e-6, 1e-6, 5.0),
        "bfloat16": Promise(1e6, 0.1, 1e-2, 5.0),
    },
    "HouseholderRotation": {
        "float64": Promise(1e6, 5e-14, 1e-14, 20.0),
        "float32": Promise(1e6, 2e-5, 1e-14, 20.0),
        "bfloat16": Promise(1e6, 0.2, 2e-15, 20.0),
    },
    "PLULinear": {
        "float64": Promise(1e6, 1e-14, 5e-15, 5.0),
        "float32": Promise(1e6, 5e-6, 1e-6, 10.0),
        "bfloat16": Promise(1e6, 0.1, 1e-2, 10.0),
    },
    "LearnedPermutation": {
        "float64": Promise(1e6, 0.0, 0.0, 0.0),
        "float32": Promise(1e6, 0.0, 0.0, 0.0),
        "bfloat16": Promise(1e6, 0.0, 0.0, 0.0),
    },
    "ResidualMap, Banach": {
        "float64": Promise(1e6, 2e-14, 5e-15, 10.0),
        "float32": Promise(1e6, 1e-5, 2e-5, 10.0),
        "bfloat16": Promise(1e6, 0.1, 0.1, 10.0),
    },
    "ResidualMap, Newton": {
        "float64": Promise(1e6, 5e-14, 5e-15, 50.0),
        "float32": Promise(1e6, 5e-5, 2e-5, 50.0),
    },
}
