"""Coupling normalizing flows, deep ones: build, train and probe them.

Built on flowjax: every layer is an ``AbstractBijection`` of a single event, every flow
a ``Transformed`` distribution; batches go through ``jax.vmap``.
"""

from . import (
    actnorm as actnorm,
    coupling as coupling,
    linear as linear,
    masks as masks,
    spline as spline,
    stack as stack,
)
from .actnorm import ActNorm as ActNorm, ActNorm1D as ActNorm1D
from .coupling import (
    AbstractCoupling as AbstractCoupling,
    AdditiveCoupling as AdditiveCoupling,
    AffineCoupling as AffineCoupling,
    RQSplineCoupling as RQSplineCoupling,
)
from .linear import HouseholderRotation as HouseholderRotation
from .stack import (
    blocks as blocks,
    coupling_flow as coupling_flow,
    initialize_actnorm as initialize_actnorm,
    intermediates as intermediates,
    normalizing_map as normalizing_map,
)
