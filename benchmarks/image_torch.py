"""Train normflows' RealNVP or Glow on the digits; started by images.py.

Steps are eager, on one thread. The width of the conditioners is the one that brings the
number of parameters closest to ours.
"""
# pyright: reportMissingImports=false
# torch and normflows are in an environment of their own, and lint has none of them

import copy
import warnings

import normflows
import torch
from image_task import (
    CLIP,
    DEPTH,
    FIRST,
    LEVELS_OF_GREY,
    MARGIN,
    SIDE,
    Data,
    Job,
    Model,
    bits,
    read_command,
    serve,
)
from normflows.distributions import DiagGaussian
from normflows.flows import ActNorm, GlowBlock, MaskedAffineFlow, Merge, Squeeze
from normflows.nets import ConvNet2d

HALF = SIDE // 2
KERNELS = (3, 1, 3)  # of its Glow's conditioners, which serve for RealNVP too


def multiscale(first: list, second: list, inner_shape: tuple):
    """Two levels, each from latent to data, behind the logit."""
    base = [DiagGaussian(inner_shape), DiagGaussian((2, HALF, HALF))]
    return normflows.MultiscaleFlow(
        base, [second, first], [Merge()],
        transform=normflows.transforms.Logit(MARGIN), class_cond=False,
    )  # fmt: skip


def glow(width: int):
    """The library's own blocks, as in its example of Glow."""
    depth = DEPTH["glow"]
    first = [GlowBlock(4, width) for _ in range(depth)]
    second = [GlowBlock(8, width) for _ in range(depth)]
    inner_shape = (8, HALF // 2, HALF // 2)
    return multiscale([*first, Squeeze()], [*second, Squeeze()], inner_shape)


def couplings(mask: torch.Tensor, width: int) -> list:
    """Blocks of two masked couplings and an ActNorm, as ours."""
    channels = len(mask)

    def network():
        return ConvNet2d((channels, width, width, channels), KERNELS)

    blocks = []
    for _ in range(DEPTH["realnvp"]):
        for passive in (mask, 1 - mask):
            blocks.append(MaskedAffineFlow(passive, network(), network()))
        blocks.append(ActNorm((channels, 1, 1)))
    return blocks


def checkerboard(channels: int, side: int) -> torch.Tensor:
    """Ones where row and column have an even sum."""
    places = torch.arange(side)
    return ((places[:, None] + places) % 2 == 0).float().repeat(channels, 1, 1)


def realnvp(width: int):
    """The library's masked couplings with convolutional networks, as we order them."""
    halves = torch.zeros(4, HALF, HALF)
    halves[:2] = 1
    first = [
        *couplings(halves, width),
        Squeeze(),
        *couplings(checkerboard(1, SIDE), width),
    ]
    second = couplings(checkerboard(2, HALF), width)
    return multiscale(first, second, (2, HALF, HALF))


MODELS = {"glow": glow, "realnvp": realnvp}


def count(flow) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in flow.parameters() if p.requires_grad)


def matching_width(job: Job) -> int:
    """The width whose number of parameters is closest to the wanted one."""
    make = MODELS[job.model]
    width = 1
    while count(make(width + 1)) <= job.parameters:
        width += 1
    sizes = {w: abs(count(make(w)) - job.parameters) for w in (width, width + 1)}
    return min(sizes, key=lambda w: sizes[w])


def build(job: Job, data: Data) -> Model:
    """The flow, and how it trains."""
    torch.set_num_threads(1)
    channels_first = [torch.as_tensor(x).permute(0, 3, 1, 2) for x in data[:3]]
    train, validation, held_out = (x.float().contiguous() for x in channels_first)
    width = matching_width(job)

    def noisy(grey):
        return (grey + torch.rand(grey.shape)) / LEVELS_OF_GREY

    def untrained(seed: int):
        torch.manual_seed(seed)
        flow = MODELS[job.model](width)
        with torch.no_grad():
            flow.log_prob(noisy(train[:FIRST]), None)  # sets the ActNorms
        return flow, torch.optim.Adam(flow.parameters())

    def one_step(flow, adam, rate: float):
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        batch = train[torch.randint(0, len(train), (job.batch,))]
        flow.forward_kld(noisy(batch)).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        adam.step()

    @torch.no_grad()
    def mean_bits(flow, x) -> float:
        return bits(float(flow.log_prob(x, None).mean()))

    def trained(seed: int) -> dict:
        flow, adam = untrained(seed)
        validating = noisy(validation)
        best, best_step, found = copy.deepcopy(flow.state_dict()), 0, []
        for step in range(job.steps + 1):
            if step % job.eval_every == 0 or step == job.steps:
                found.append(mean_bits(flow, validating))
                if found[-1] == min(found):
                    best, best_step = copy.deepcopy(flow.state_dict()), step
            if step < job.steps:
                one_step(flow, adam, float(data.rates[step]))
        last = mean_bits(flow, held_out)
        flow.load_state_dict(best)
        return {
            "bits": mean_bits(flow, held_out),
            "last_bits": last,
            "best_step": best_step,
            "validation": found,
            "compile_seconds": 0.0,
        }

    start, start_adam = untrained(0)

    def repeat(n: int) -> None:
        for _ in range(n):
            one_step(start, start_adam, float(data.rates[0]))

    return Model(count(start), trained, repeat, {"width": width})


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of their own deprecations
    serve(build(*read_command()))
