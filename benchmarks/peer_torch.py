"""Measure zuko, nflows or normflows; started by peers.py in their environment.

Steps are eager, as in the examples of all three. What differs from our architecture is
what the libraries fix: the slopes at both ends of a spline are 1, and a fixed
permutation stands where we have a trained rotation.
"""
# pyright: reportMissingImports=false
# torch and the peers are in an environment of their own, and lint has none of them

import functools
import warnings

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
import zuko
from cells import (
    CLIP,
    INTERVAL,
    KNOTS,
    LEARNING_RATE,
    WIDTH,
    Cell,
    Model,
    Run,
    read_command,
    serve,
    timed,
)
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from zuko.transforms import MonotonicRQSTransform, PermutationTransform

BINS = KNOTS + 1


class Conditioner(torch.nn.Sequential):
    """The network of nflows and normflows, which pass a context to it."""

    hidden_features = WIDTH  # both divide widths and heights by its root

    def __init__(self, n_in: int, n_out: int):
        super().__init__(
            torch.nn.Linear(n_in, WIDTH),
            torch.nn.ReLU(),
            torch.nn.Linear(WIDTH, WIDTH),
            torch.nn.ReLU(),
            torch.nn.Linear(WIDTH, n_out),
        )

    def forward(self, x, context=None):
        """Parameters of the splines from the passive part."""
        return super().forward(x)


def masks(dim: int):
    """The second half of the coordinates, then the first."""
    second = torch.arange(dim) >= dim // 2
    return second, ~second


def zuko_flow(cell: Cell):
    """Flow, log-density and sampler of zuko."""
    reverse = functools.partial(PermutationTransform, torch.arange(cell.dim).flip(0))
    layers = []
    for _ in range(cell.depth):
        layers.append(zuko.lazy.UnconditionalTransform(reverse))
        layers += [
            zuko.flows.GeneralCouplingTransform(
                cell.dim,
                mask=~active,  # zuko's mask is that of the passive part
                univariate=functools.partial(MonotonicRQSTransform, bound=INTERVAL),
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
                hidden_features=(WIDTH, WIDTH),
            )
            for active in masks(cell.dim)
        ]
    zeros, ones = torch.zeros(cell.dim), torch.ones(cell.dim)
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, zeros, ones, buffer=True
    )
    flow = zuko.lazy.Flow(layers, base)
    return flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,))


def nflows_flow(cell: Cell):
    """Flow, log-density and sampler of nflows."""
    layers = []
    for _ in range(cell.depth):
        layers.append(nflows.transforms.ReversePermutation(cell.dim))
        layers += [
            nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
                active, Conditioner, num_bins=BINS, tails="linear", tail_bound=INTERVAL
            )
            for active in masks(cell.dim)
        ]
    flow = nflows.flows.Flow(
        nflows.transforms.CompositeTransform(layers),
        nflows.distributions.StandardNormal([cell.dim]),
    )
    return flow, flow.log_prob, flow.sample


def normflows_coupling(dim: int, active):
    """Its coupling layer, with our conditioner and mask in place of its own."""
    layer = normflows.flows.CoupledRationalQuadraticSpline(dim, 1, WIDTH)
    layer.prqct = PiecewiseRationalQuadraticCoupling(
        active, Conditioner, num_bins=BINS, tails="linear", tail_bound=INTERVAL
    )
    return layer


def normflows_flow(cell: Cell):
    """Flow, log-density and sampler of normflows."""
    layers = []  # from latent to data, so a block ends with its permutation
    for _ in range(cell.depth):
        layers += [normflows_coupling(cell.dim, active) for active in masks(cell.dim)]
        layers.append(normflows.flows.Permute(cell.dim, mode="swap"))
    base = normflows.distributions.DiagGaussian(cell.dim, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return flow, flow.log_prob, lambda n: flow.sample(n)[0]


FLOWS = {"zuko": zuko_flow, "nflows": nflows_flow, "normflows": normflows_flow}


def build(cell: Cell, data) -> Model:
    """The flow, and how it trains, evaluates and samples."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, cell.dtype))
    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    x = torch.as_tensor(data)
    flow, log_prob, sample = FLOWS[cell.library](cell)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def step():
        adam.zero_grad()
        loss = -log_prob(x[torch.randint(0, len(x), (cell.batch,))]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()

    @torch.no_grad()
    def density():
        log_prob(x[: cell.batch])

    @torch.no_grad()
    def draw():
        sample(cell.batch)

    def repeat(call, n):
        for _ in range(n):
            call()
        if on_gpu:
            torch.cuda.synchronize()

    def facts():
        peak = {"device_peak_bytes": torch.cuda.max_memory_allocated()}
        return {"threads": torch.get_num_threads(), **(peak if on_gpu else {})}

    calls = {"step": step, "density": density, "sample": draw}
    ways = {way: timed(functools.partial(repeat, calls[way])) for way in calls}
    use_faster_threads(ways["step"])
    return Model(sum(p.numel() for p in parameters), ways, facts)


def use_faster_threads(step: Run) -> None:
    """One thread or one a core, whichever makes the faster step.

    Steps of small tensors can be many times slower on several, because threads wait for
    each other at every operation.
    """
    seconds = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        seconds[threads] = min(step(1) for _ in range(2))
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of their own deprecations
    serve(functools.partial(build, *read_command()))
