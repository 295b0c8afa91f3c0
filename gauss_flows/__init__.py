"""Coupling normalizing flows, deep ones: build, train and probe them.

Built on flowjax: every layer is an ``AbstractBijection`` of a single event, every flow
a ``Transformed`` distribution; batches go through ``jax.vmap``.

A check of values that fails in compiled code raises ``EquinoxRuntimeError``, a
``RuntimeError``, under ``equinox.filter_jit``. Plain ``jax.jit`` makes an error of
JAX's own of it, a ``ValueError`` or a ``RuntimeError`` that holds the same message.
"""

from importlib.metadata import version as _version

from . import (
    actnorm as actnorm,
    checkpoint as checkpoint,
    compilation as compilation,
    conditioner as conditioner,
    continuous as continuous,
    coupling as coupling,
    data as data,
    diagonal as diagonal,
    image as image,
    linear as linear,
    log_det as log_det,
    masks as masks,
    memory as memory,
    mixture as mixture,
    newton as newton,
    padding as padding,
    picture_files as picture_files,
    pictures as pictures,
    probe as probe,
    rbig as rbig,
    records as records,
    residual as residual,
    residual_stack as residual_stack,
    spectral as spectral,
    spline as spline,
    stack as stack,
    theory as theory,
    train as train,
    transformers as transformers,
)
from .actnorm import ActNorm as ActNorm, ActNorm1D as ActNorm1D
from .compilation import cache_compilation as cache_compilation
from .conditioner import Conditioner as Conditioner
from .continuous import (
    ContinuousMap as ContinuousMap,
    continuous_flow as continuous_flow,
)
from .coupling import (
    AbstractCoupling as AbstractCoupling,
    AdditiveCoupling as AdditiveCoupling,
    AffineCoupling as AffineCoupling,
    DeepSigmoidCoupling as DeepSigmoidCoupling,
    MixtureCDFCoupling as MixtureCDFCoupling,
    RQSplineCoupling as RQSplineCoupling,
)
from .diagonal import Diagonal as Diagonal
from .linear import (
    HouseholderRotation as HouseholderRotation,
    LearnedPermutation as LearnedPermutation,
    PLULinear as PLULinear,
)
from .memory import Stack as Stack
from .newton import newton_inverse as newton_inverse
from .residual import (
    BanachResult as BanachResult,
    ResidualMap as ResidualMap,
    banach_inverse as banach_inverse,
    contraction_mlp as contraction_mlp,
)
from .residual_stack import (
    EstimatedLikelihood as EstimatedLikelihood,
    certify as certify,
    residual_flow as residual_flow,
)
from .spectral import LipschitzMLP as LipschitzMLP
from .stack import (
    blocks as blocks,
    coupling_flow as coupling_flow,
    diagonal_flow as diagonal_flow,
    initialize_actnorm as initialize_actnorm,
    intermediates as intermediates,
    normalizing_map as normalizing_map,
    with_memory as with_memory,
)
from .train import (
    FitResult as FitResult,
    NonFiniteError as NonFiniteError,
    Snapshot as Snapshot,
    fit as fit,
    fit_many as fit_many,
    mean_log_prob as mean_log_prob,
    member as member,
)

__version__ = _version("gauss-flows")
