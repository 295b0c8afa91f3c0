"""What each layer promises of rounding, in each dtype: the one place where it stands.

Layers are drawn as in ``contract.py``; a point is told by its largest entry.
"""

from typing import NamedTuple

RADII = (1.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e6)
"""Sizes of the points at which promises are tried."""


class Promise(NamedTuple):
    """Bounds on relative errors.

    Attributes:
        reach: The largest entry of a point up to which the next two hold.
        inverse: On the error of the inverse.
        log_det: On the error of the log-determinant.
        factor: On the error of the inverse in units of epsilon times condition, of any
            point up to a million at which a digit is left.
    """

    reach: float
    inverse: float
    log_det: float
    factor: float


PROMISE: dict[str, dict[str, Promise]] = {}
