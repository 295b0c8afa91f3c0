r"""Continuous flows: the map that an ordinary differential equation makes.

Follow :math:`\dot x = f(t, x)` from time 0 to time 1. Where ``f`` is smooth and
Lipschitz in ``x``, the map from start to end is a bijection, its inverse the same
equation run backwards, and its log-determinant an integral,

.. math:: \log\det \frac{\partial x(1)}{\partial x(0)}
          = \int_0^1 \operatorname{tr} \frac{\partial f}{\partial x}(t, x(t))\,dt .

It is what a stack of ``depth`` residual blocks :math:`x + f(k / depth, x) / depth`
tends to as depth grows; :func:`residual_stack` makes that stack. The solver is
diffrax's. It chooses its steps by their estimated error, and depth becomes a number of
evaluations of ``f`` that :func:`integrate` reports.

A log-density is never random here: it has the exact trace, O(d) derivatives of ``f`` an
evaluation. Only the training loss, :class:`Likelihood`, may estimate the trace.

Source: Chen et al. (2018), "Neural ordinary differential equations", theorem 1;
Grathwohl et al. (2019) for the estimated trace; Kidger (2022) for the solvers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import paramax
from flowjax.bijections import AbstractBijection, Invert
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from . import _check
from .conditioner import Conditioner
from .memory import Stack
from .residual import ResidualMap
from .stack import normalizing_map

SOLVERS = {
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
"""Explicit Runge–Kutta pairs by name, of order 3, 5, 5 and 8."""

ADJOINTS = ("checkpoint", "direct", "backsolve", "forward")
NOISES = ("rademacher", "gaussian")

Field = Callable[[Array, Array], Array]
"""``f(t, x)``: a scalar time and an event to an event of the same shape."""


class TimeField(eqx.Module):
    r"""A network :math:`f(t, x)` that is bounded, smooth and Lipschitz in ``x``.

    A perceptron of ``x`` and ``t`` with tanh between its layers. Bounded, so that no
    solution leaves in finite time; smooth, so that a solver of high order pays.

    Args:
        key: Random key of the weights.
        dim: Size of ``x``.
        width: Size of each hidden layer.
        depth: Number of hidden layers, at least 1.
        identity_init: Start with a last layer of zeros: the map is the identity then.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If a size is below 1.
    """

    net: Conditioner

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        dim: int,
        width: int = 64,
        depth: int = 2,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        _check.at_least_one(dim=dim, width=width, depth=depth)
        self.net = Conditioner(
            key, dim + 1, dim, width=width, depth=depth, activation=jnp.tanh,
            identity_init=identity_init, dtype=dtype,
        )  # fmt: skip

    def __call__(self, t: Float[Array, ""], x: Float[Array, " dim"]) -> Array:
        """The velocity at ``x`` at time ``t``, shape (dim,)."""
        return self.net(jnp.append(x, t))

    def lipschitz_bound(self) -> Float[Array, ""]:
        """Product of the layers' spectral norms, those of the first for ``x`` alone.

        It bounds the Lipschitz constant in ``x`` at every time, most often by far.
        """
        first, *rest = (layer.weight for layer in self.net.layers)
        norms = [jnp.linalg.norm(w, 2) for w in (first[:, :-1], *rest)]
        return jnp.prod(jnp.stack(norms))


class Integral(eqx.Module):
    """What :func:`integrate` found, and what it took.

    Attributes:
        x: The event at the end.
        log_det: Log-determinant of the map from start to end.
        kinetic: Integral of ``|f|^2`` over the time of the flow, at least 0.
        steps: Steps of the solver, the rejected ones too.
        rejected: Steps whose estimated error was too large.
        evaluations: Evaluations of the field, and as many of its trace; one more each
            time that the very first step was rejected.
    """

    x: Float[Array, "..."]
    log_det: Float[Array, ""]
    kinetic: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    evaluations: Int[Array, ""]


class ContinuousMap(AbstractBijection):
    """The map from ``x(0)`` to ``x(1)`` along ``dx/dt = field(t, x)``.

    Each event has its own steps: ``transform`` and ``inverse`` solve for the event
    alone, the other methods for event and log-determinant. An inverse undoes the map up
    to the solver's tolerance, not to rounding.

    ``adjoint`` says how the solution is differentiated:

    - ``"checkpoint"``: reverse mode through the solver's steps, of which about
      ``sqrt(2 max_steps)`` are kept and the rest computed again. No forward mode.
    - ``"direct"``: forward and reverse mode, at the time of ``max_steps`` steps, taken
      or not.
    - ``"backsolve"``: a second equation backwards in time. Its memory does not depend
      on the number of steps, but holds a gradient of all parameters for each event that
      is solved alone. Its gradient is not that of the computed solution, and where the
      flow contracts it may be far off. No forward mode.
    - ``"forward"``: forward mode only, as for Jacobians.

    Cost: an evaluation of the field and ``d`` derivatives of it a stage of the solver,
    for an event of d entries. The number of stages grows with the Lipschitz constant of
    the field and with the tolerance to the power ``-1 / order``. Not for stiff fields.

    Args:
        field: Function of time and event, of the event's shape; Lipschitz in the event.
        shape: Event shape.
        rtol: Relative tolerance of a step, in the root mean square over the event.
        atol: Absolute tolerance of a step, in the units of the event. Both should stay
            some ten times above the rounding of the dtype: 1e-6 in float32.
        max_steps: Most steps that may be taken.
        solver: One of ``SOLVERS``.
        adjoint: One of ``ADJOINTS``.

    Raises:
        ValueError: If an argument is out of range or unknown, or the field changes the
            shape.
        EquinoxRuntimeError: On use, if the solver did not reach the end within
            ``max_steps`` steps, as where the field is not finite or stiff. Names the
            tolerances and the steps.

    Source:
        Chen et al. (2018), theorem 1.
    """

    field: Field
    shape: tuple[int, ...]
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    adjoint: str = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        field: Field,
        *,
        shape: tuple[int, ...],
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_steps: int = 1024,
        solver: str = "tsit5",
        adjoint: str = "checkpoint",
    ):
        _check.positive(rtol=rtol, atol=atol)
        _check.at_least_one(max_steps=max_steps)
        if solver not in SOLVERS:
            raise ValueError(f"expected solver in {sorted(SOLVERS)}, got {solver!r}")
        if adjoint not in ADJOINTS:
            raise ValueError(f"expected adjoint in {list(ADJOINTS)}, got {adjoint!r}")
        self.field, self.shape = field, tuple(shape)
        self.rtol, self.atol, self.max_steps = float(rtol), float(atol), max_steps
        self.solver, self.adjoint = solver, adjoint
        out = jax.eval_shape(paramax.unwrap(field), jnp.zeros(()), jnp.zeros(shape))
        if out.shape != self.shape:
            raise ValueError(
                f"expected a field that keeps the shape {self.shape}, got {out.shape}"
            )

    def transform(self, x, condition=None):
        """``x(1)`` from ``x(0) = x``, without the log-determinant and its cost."""
        return self._alone(x, backwards=False)

    def inverse(self, y, condition=None):
        """``x(0)`` from ``x(1) = y``, without the log-determinant and its cost."""
        return self._alone(y, backwards=True)

    def transform_and_log_det(self, x, condition=None):
        """``x(1)`` from ``x(0) = x``, and the integral of the trace."""
        found = _with_trace(self, x, backwards=False)
        return found.x, found.log_det

    def inverse_and_log_det(self, y, condition=None):
        """``x(0)`` from ``x(1) = y``, and minus the integral of the trace."""
        found = _with_trace(self, y, backwards=True)
        return found.x, found.log_det

    def _alone(self, x, *, backwards):
        flow = paramax.unwrap(self)
        return _solve(flow, _velocity, _event(flow, x), flow.field, backwards)[0]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    r"""The loss for training a continuous flow: ``gf.fit(..., loss=Likelihood())``.

    Minus the mean log-density in nats, plus the regularisation asked for. With
    ``probes`` the trace of the Jacobian :math:`J` is estimated by
    :math:`v^\top J v`, one set of probes :math:`v` for each event and all times, fresh
    at each step: without bias, and an evaluation costs ``probes`` derivatives instead
    of d. **The value is an estimate too**, the one of held-out data included: it ranks
    steps of one run. To say how good a flow is, use its exact ``log_prob``.

    The batch is solved as one equation, with steps that suit its hardest event.

    Args:
        probes: Number of probes for each event; None for the exact trace.
        noise: ``"rademacher"``, entries of 1 and -1, or ``"gaussian"``. In the variance
            of the trace, Rademacher probes leave the diagonal out.
        kinetic: Weight of the mean of :math:`\int |f|^2 dt`: straight paths, walked at
            an even speed, cost the least.
        frobenius: Weight of the mean of :math:`\int \|J\|_F^2 dt`, by the same probes:
            fields that vary little are solved in fewer steps.

    Raises:
        ValueError: If an argument is out of range or unknown; on use, if the flow is
            not a base distribution and one :class:`ContinuousMap`.

    Source:
        Grathwohl et al. (2019), section 3.1; Finlay et al. (2020), equations 8 and 9
        (without their division by d).

    Example:
        >>> import jax.random as jr
        >>> flow = continuous_flow(jr.key(0), dim=2, nn_width=8)
        >>> x = jr.normal(jr.key(1), (5, 2))
        >>> Likelihood(kinetic=0.01)(flow, x, jr.key(2)).shape
        ()
    """

    probes: int | None = 1
    noise: str = "rademacher"
    kinetic: float = 0.0
    frobenius: float = 0.0

    def __post_init__(self):
        """Refuse what is out of range."""
        if self.probes is not None:
            _check.at_least_one(probes=self.probes)
        if self.noise not in NOISES:
            raise ValueError(f"expected noise in {list(NOISES)}, got {self.noise!r}")
        for name in ("kinetic", "frobenius"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"expected {name} finite and >= 0, got {weight!r}")

    def __call__(
        self, flow: Transformed, batch: Float[Array, "n ..."], key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """Mean loss of the rows of ``batch``, in nats."""
        flow = paramax.unwrap(flow)
        inner, inverted = _continuous(flow)
        x = _event(inner, batch, many=True)
        zeros = jnp.zeros(len(x), x.dtype)
        start = (x, _Rates(zeros, zeros, zeros))
        args = (inner.field, self._probes(key, x))
        (z, totals), _ = _solve(
            inner, _probed_rows, start, args, inverted, norm=_hardest
        )
        sign = -1 if inverted else 1
        log_prob = flow.base_dist.log_prob(z).astype(x.dtype) + totals.trace
        paths = self.kinetic * totals.kinetic + self.frobenius * totals.frobenius
        return (sign * paths - log_prob).mean()

    def _probes(self, key: PRNGKeyArray, x: Array) -> Array:
        """Probes, shape (n, probes, *shape); for the exact trace the unit events."""
        if self.probes is None:
            basis = _basis(x.shape[1:], x.dtype)
            return jnp.broadcast_to(basis, (len(x), *basis.shape))
        draw = jr.rademacher if self.noise == "rademacher" else jr.normal
        probes = draw(key, (len(x), self.probes, *x.shape[1:]), x.dtype)
        # so that sums over probes are means of unbiased estimates
        return probes / math.sqrt(self.probes)


def continuous_flow(
    key: PRNGKeyArray,
    *,
    dim: int,
    nn_width: int = 64,
    nn_depth: int = 2,
    identity_init: bool = False,
    base: AbstractDistribution | None = None,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Transformed:
    r"""A base distribution and one :class:`ContinuousMap` with a :class:`TimeField`.

    The map takes data at time 0 to the latent space at time 1, as the blocks of
    :func:`~gauss_flows.coupling_flow` do; sampling runs time backwards.

    Train it with ``gf.fit(key, flow, x, loss=Likelihood())``; without ``loss`` each
    event is solved by itself with the exact trace, which is slower. When training
    drives the field to where the solver needs more than ``max_steps``, it raises.

    Cost: that of a stack whose depth the solver chooses; see :class:`ContinuousMap`.

    Args:
        key: Random key of the weights.
        dim: Number of coordinates, at least 1.
        nn_width: Width of the field's hidden layers.
        nn_depth: Number of its hidden layers, at least 1.
        identity_init: Start at the identity.
        base: Base distribution of shape ``(dim,)``; the standard normal by default,
            with nothing to train in it.
        dtype: Floating dtype of the parameters; JAX's default by default.
        **options: Of :class:`ContinuousMap`: ``rtol``, ``atol``, ``max_steps``,
            ``solver`` and ``adjoint``.

    Returns:
        The flow, a distribution over events of shape ``(dim,)``.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> import jax.random as jr
        >>> flow = continuous_flow(jr.key(0), dim=2)
        >>> flow.log_prob(jnp.zeros((5, 2))).shape
        (5,)
    """
    field = TimeField(
        key, dim=dim, width=nn_width, depth=nn_depth, identity_init=identity_init,
        dtype=dtype,
    )  # fmt: skip
    base = StandardNormal((dim,)) if base is None else base
    if base.shape != (dim,):
        raise ValueError(
            f"expected a base distribution of shape {(dim,)}, got shape {base.shape}"
        )
    return Transformed(base, Invert(ContinuousMap(field, shape=(dim,), **options)))


def with_options(flow: PyTree, **options: Any) -> PyTree:
    """The same flow, solved or differentiated in another way.

    Args:
        flow: A flow or bijection that holds a :class:`ContinuousMap`.
        **options: ``rtol``, ``atol``, ``max_steps``, ``solver`` or ``adjoint``, as for
            :class:`ContinuousMap`.

    Returns:
        The flow with the same parameters.

    Raises:
        ValueError: If an argument is out of range, or the flow holds no such map.
        TypeError: If an option is unknown.

    Example:
        >>> import jax.random as jr
        >>> flow = continuous_flow(jr.key(0), dim=2, nn_width=8)
        >>> frugal = with_options(flow, adjoint="backsolve", rtol=1e-7)
    """

    def is_continuous(node: PyTree) -> bool:
        return isinstance(node, ContinuousMap)

    def changed(node: PyTree) -> PyTree:
        if not is_continuous(node):
            return node
        kept = {name: getattr(node, name) for name in _OPTIONS}
        # of another field, so that one with an axis of seeds is not tried on an event
        plain = ContinuousMap(_still, shape=node.shape, **{**kept, **options})
        return eqx.tree_at(lambda m: m.field, plain, node.field)

    if not any(map(is_continuous, jax.tree.leaves(flow, is_leaf=is_continuous))):
        raise ValueError("expected a flow with a ContinuousMap, got one without")
    return jax.tree.map(changed, flow, is_leaf=is_continuous)


def integrate(
    flow: AbstractDistribution | AbstractBijection,
    x: Float[Array, "..."],
    *,
    backwards: bool = False,
) -> Integral:
    """Solve for one event, and report what it took; batch by :func:`jax.vmap`.

    Args:
        flow: A flow with one :class:`ContinuousMap`, or the map itself.
        x: Event at time 0, or at time 1 if ``backwards``.
        backwards: Whether to run time from 1 to 0.

    Returns:
        The event at the other end, the log-determinant from start to end, the kinetic
        energy of the path, and numbers of steps and evaluations.

    Raises:
        ValueError: If the flow is of another kind, or ``x`` has another shape.
        EquinoxRuntimeError: As :class:`ContinuousMap`.
    """
    inner, _ = _continuous(paramax.unwrap(flow))
    return _with_trace(inner, x, backwards=backwards)


def path(
    flow: AbstractDistribution | AbstractBijection,
    x: Float[Array, "..."],
    times: Float[Array, " k"],
) -> Float[Array, "k ..."]:
    """Where an event is at each of the times, on its way from time 0 to time 1.

    Between its steps the solver interpolates, at about its own accuracy.

    Args:
        flow: A flow with one :class:`ContinuousMap`, or the map itself.
        x: Event at time 0.
        times: Increasing times in [0, 1].

    Raises:
        ValueError: If the flow is of another kind, or ``x`` has another shape.
        EquinoxRuntimeError: As :class:`ContinuousMap`.
    """
    inner, _ = _continuous(paramax.unwrap(flow))
    x = _event(inner, x)
    times = times.astype(x.dtype)
    return _solve(inner, _velocity, x, inner.field, False, times=times)[0]


def residual_stack(
    flow: AbstractDistribution | AbstractBijection, *, depth: int, lipschitz: float
) -> AbstractDistribution | AbstractBijection:
    r"""The flow with ``depth`` residual blocks in place of the differential equation.

    Block k, from 0, is :math:`x + f(k/N, x)/N` for :math:`N` = ``depth``: one step of
    Euler's method. It is invertible where the field's Lipschitz constant is below
    ``depth``, so every Lipschitz field is the limit of stacks of invertible blocks. The
    blocks' parameters are copies: trained, they go their own ways.

    Cost: ``depth`` copies of the parameters. Compilation is that of one block.

    Args:
        flow: A flow with one :class:`ContinuousMap`, or the map itself.
        depth: Number of blocks, above ``lipschitz``.
        lipschitz: A bound on the Lipschitz constant of the field in ``x`` at all times,
            such as :meth:`TimeField.lipschitz_bound`. It is declared, not enforced; see
            :class:`~gauss_flows.ResidualMap`.

    Returns:
        A flow if ``flow`` is one, else a bijection; a :class:`~gauss_flows.Stack` of
        :class:`~gauss_flows.ResidualMap`.

    Raises:
        ValueError: If ``depth`` is not above ``lipschitz``, or the flow is of another
            kind.
    """
    _check.at_least_one(depth=depth)
    if not 0 <= lipschitz < depth:
        raise ValueError(
            f"expected depth above the field's Lipschitz bound {lipschitz:.4g}, so "
            f"that each block is a contraction added to the identity, got {depth}"
        )
    inner, inverted = _continuous(paramax.unwrap(flow))
    dtype = _check.dtype_of(inner.field)
    times = jnp.arange(depth, dtype=dtype or float) / depth

    def block(t: Array) -> ResidualMap:
        step = _EulerStep(inner.field, paramax.NonTrainable(t), 1 / depth)
        return ResidualMap(step, shape=inner.shape, lipschitz=lipschitz / depth)

    stack = Stack(eqx.filter_vmap(block)(times))
    bijection = Invert(stack) if inverted else stack
    if isinstance(flow, Transformed):
        return Transformed(flow.base_dist, Invert(bijection))
    return bijection


# Of the time of a flow. Where it is too long it is rejected; given, because a choice by
# the solver would cost evaluations that its counts do not have.
_FIRST_STEP = 0.1
_OPTIONS = ("rtol", "atol", "max_steps", "solver", "adjoint")


class _EulerStep(eqx.Module):
    field: Field
    t: Any
    size: float = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.size * self.field(paramax.unwrap(self.t).astype(x.dtype), x)


class _Rates(NamedTuple):
    """Of an event: trace of the Jacobian, its squared norm, and squared speed."""

    trace: Array
    frobenius: Array
    kinetic: Array


# What is integrated, as functions of the module: a function made anew at each call
# would be compiled anew where nobody else compiles.
def _velocity(t: Array, x: Array, field: Field) -> Array:
    return field(t, x)


def _still(t: Array, x: Array) -> Array:
    return x


def _probed_rows(t: Array, state: tuple[Array, _Rates], args: tuple[Field, Array]):
    field, probes = args
    return jax.vmap(lambda x, v: _probed(t, x, field, v))(state[0], probes)


def _probed_event(t: Array, state: tuple[Array, _Rates], args: tuple[Field, Array]):
    field, probes = args
    return _probed(t, state[0], field, probes)


def _probed(t: Array, x: Array, field: Field, probes: Array):
    velocity, push = jax.linearize(lambda x: field(t, x), x)
    products = jax.vmap(push)(probes)
    squares = (jnp.sum(products**2), jnp.sum(velocity**2))
    return velocity, _Rates(jnp.sum(probes * products), *squares)


def _with_trace(flow: ContinuousMap, x: Any, *, backwards: bool) -> Integral:
    x = _event(flow, x)
    zero = jnp.zeros((), x.dtype)
    start = (x, _Rates(zero, zero, zero))
    # an argument: as a constant in the program it doubles the time of a gradient
    args = (flow.field, _basis(x.shape, x.dtype))
    (x, totals), stats = _solve(
        flow, _probed_event, start, args, backwards, norm=_of_event
    )
    return Integral(
        x=x,
        log_det=totals.trace,
        kinetic=-totals.kinetic if backwards else totals.kinetic,
        steps=stats["num_steps"],
        rejected=stats["num_rejected_steps"],
        evaluations=_evaluations(flow, stats["num_steps"]),
    )


def _evaluations(flow: ContinuousMap, steps: Array) -> Array:
    """Those of all steps, where the last stage of one may serve the next."""
    tableau = SOLVERS[flow.solver].tableau
    shared = int(tableau.fsal)
    return shared + (tableau.num_stages - shared) * steps


def _solve(
    flow: ContinuousMap,
    rates: Callable,
    start: PyTree,
    args: PyTree,
    backwards: bool,
    *,
    norm: Callable[[PyTree], Any] = optx.rms_norm,
    times: Array | None = None,
) -> tuple[PyTree, dict[str, Array]]:
    """The state at the other end, or at ``times``; and the solver's counts."""
    zero = jnp.zeros((), jax.tree.leaves(start)[0].dtype)
    ends = (zero + 1, zero) if backwards else (zero, zero + 1)
    adjoints = {
        "checkpoint": diffrax.RecursiveCheckpointAdjoint,
        "direct": diffrax.DirectAdjoint,
        "forward": diffrax.ForwardMode,
        # its own control: a norm over events does not know the adjoint's state
        "backsolve": lambda: diffrax.BacksolveAdjoint(
            stepsize_controller=diffrax.PIDController(rtol=flow.rtol, atol=flow.atol),
            throw=True,
        ),
    }
    # a GPU may round float32 products to 10 bits, which no tolerance survives
    with jax.default_matmul_precision("highest"):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            SOLVERS[flow.solver](),
            *ends,
            -_FIRST_STEP if backwards else _FIRST_STEP,
            start,
            args,
            saveat=diffrax.SaveAt(t1=True)
            if times is None
            else diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(
                rtol=flow.rtol, atol=flow.atol, norm=norm
            ),
            adjoint=adjoints[flow.adjoint](),
            max_steps=flow.max_steps,
            throw=False,
        )
    failed = solution.result != diffrax.RESULTS.successful
    ys = eqx.error_if(
        solution.ys,
        failed,
        f"expected {flow.solver} to reach the end within max_steps={flow.max_steps} "
        f"steps at rtol={flow.rtol:.3g} and atol={flow.atol:.3g}, got no solution: the "
        "field or the event is not finite, or the field is too stiff, or the "
        "tolerances are too tight for the dtype or for that many steps",
    )
    if times is None:
        ys = jax.tree.map(lambda y: y[0], ys)
    counts = ("num_steps", "num_rejected_steps")
    return ys, {n: jnp.asarray(solution.stats[n], jnp.int32) for n in counts}


def _basis(shape: tuple[int, ...], dtype: Any) -> Array:
    """The unit events of that shape: probes that make the trace exact."""
    size = math.prod(shape)
    return jnp.eye(size, dtype=dtype).reshape(size, *shape)


def _of_event(error: tuple[Array, _Rates]) -> Array:
    """Root mean square over the event and its log-determinant, no other integral."""
    x, rates = error
    return jnp.sqrt(jnp.mean(jnp.append(x.ravel(), rates.trace) ** 2))


def _hardest(error: tuple[Array, _Rates]) -> Array:
    """The largest of a batch."""
    return jnp.max(jax.vmap(_of_event)(error))


def _event(flow: ContinuousMap, x: Any, *, many: bool = False) -> Array:
    """``x``, one event or a batch of them, in the dtype that the field gives back."""
    x = jnp.asarray(x)
    if x.ndim != len(flow.shape) + many or x.shape[int(many) :] != flow.shape:
        kind = "a batch of events" if many else "an event"
        raise ValueError(f"expected {kind} of shape {flow.shape}, got {x.shape}")
    parameters = _check.dtype_of(flow.field)
    return x.astype(jnp.result_type(x, *([] if parameters is None else [parameters])))


def _continuous(
    flow: AbstractDistribution | AbstractBijection,
) -> tuple[ContinuousMap, bool]:
    """The only map of a flow from data to latent, and whether it is inverted there."""
    inner = normalizing_map(flow)
    inverted = isinstance(inner, Invert)
    inner = inner.bijection if isinstance(inner, Invert) else inner
    if not isinstance(inner, ContinuousMap):
        raise ValueError(
            "expected a flow of one ContinuousMap, as continuous_flow makes it, got "
            f"{type(inner).__name__}"
        )
    return inner, inverted
