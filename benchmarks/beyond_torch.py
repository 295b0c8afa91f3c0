"""Train normflows' residual flow; started by beyond.py.

Steps are eager, on one thread, and by the library's own loss: roulette with the Neumann
gradient, whose value is a surrogate and no likelihood. So it is judged by the Jacobian
of the whole map.
"""
# pyright: reportMissingImports=false
# torch and normflows are in an environment of their own, and lint has none of them

import time
import warnings

import normflows
import numpy as np
import torch
from beyond_task import (
    BATCH,
    CLIP,
    DRAWS,
    LAYERS,
    LIPSCHITZ,
    TARGETS,
    WIDTH,
    Data,
    Job,
    judged,
    read_command,
    round_trip,
    seconds,
    serve,
)
from normflows.distributions import DiagGaussian
from normflows.flows import ActNorm, Residual
from normflows.nets import LipschitzMLP

POWER_STEPS = 50  # of the norms after each update, as in the library's example


def untrained(dim: int, seed: int):
    """The residual flow of the library's example, in our size."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # numbers of terms are drawn from NumPy's global state
    width, layers = WIDTH["residual"][dim], []
    for _ in range(LAYERS):
        net = LipschitzMLP(
            [dim, width, width, dim], lipschitz_const=LIPSCHITZ ** (1 / 3)
        )
        layers += [Residual(net, reduce_memory=True), ActNorm(dim)]
    return normflows.NormalizingFlow(DiagGaussian(dim, trainable=False), layers)


def latent(flow, x):
    """Latent points of rows, without a log-determinant and its estimates."""
    for layer in reversed(flow.flows):
        if isinstance(layer, Residual):
            x = x + layer.iresblock.nnet(x)
        else:
            x = layer.inverse(x)[0]
    return x


def latent_and_jacobians(flow, x):
    """Latent points, and the Jacobian of the whole map at each row."""
    x = x.requires_grad_(True)
    z = latent(flow, x)
    rows = [
        torch.autograd.grad(column.sum(), x, retain_graph=True)[0]
        for column in z.unbind(dim=1)
    ]
    return z.detach().numpy(), torch.stack(rows, dim=1).numpy()


@torch.no_grad()
def drawn(flow, z):
    """Samples from latent points; a log-determinant comes with each layer, unasked."""
    for layer in flow.flows:
        z = layer(z)[0]
    return z


def trainer(job: Job, data: Data):
    """A function that trains on a target from a seed."""
    torch.set_num_threads(1)

    def one_step(flow, adam, x, rate: float) -> bool:
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        loss = flow.forward_kld(x[torch.randint(0, len(x), (BATCH,))])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            adam.step()
            normflows.utils.update_lipschitz(flow, POWER_STEPS)
        return finite

    def train(target: str, seed: int) -> dict:
        dim = TARGETS[target]
        flow = untrained(dim, seed)
        adam = torch.optim.Adam(flow.parameters())
        x = torch.as_tensor(data.train[target])
        begin, failed = time.process_time(), None
        for step, rate in enumerate(data.rates):
            if not one_step(flow, adam, x, float(rate)):
                failed = step
                break
        spent = time.process_time() - begin
        used = [p for p in flow.parameters() if p.grad is not None]
        flow.eval()
        z = torch.randn(DRAWS, dim)
        sampling = seconds(lambda: drawn(flow, z))
        samples = drawn(flow, z).double()
        flow.double()
        with torch.no_grad():
            back = latent(flow, samples).numpy()
        rows = torch.as_tensor(data.held_out[target]).double()
        return judged(*latent_and_jacobians(flow, rows)) | {
            "parameters": sum(p.numel() for p in used),
            "step": spent / (job.steps if failed is None else failed + 1),
            "sample": sampling / DRAWS,
            "error": round_trip(z.double().numpy(), back),
            "failed_step": failed,
        }

    return train


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of their own deprecations
    serve(trainer(*read_command()))
