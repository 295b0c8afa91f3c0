"""Noise between grey values: its law, the bound it gives, and its errors.

Uniform dequantisation itself is tested with the picture flows.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
import pytest
from jax.scipy.stats import norm
from scipy.stats import kstest

import gauss_flows as gf
from gauss_flows.image import DequantizedFlow, VariationalNoise, dequantized_loss

SHAPE, GREYS = (2, 4, 1), 5


def noise(shape=SHAPE, **options):
    return VariationalNoise(
        jr.key(0), shape=shape, levels_of_grey=GREYS, nn_width=4, **options
    )


def moved(tree, size=0.3):
    """The same module with every trained number moved."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jr.split(jr.key(7), len(leaves))
    return treedef.unflatten([
        leaf + size * jr.normal(key, leaf.shape, leaf.dtype)
        if eqx.is_inexact_array(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ])  # fmt: skip


def model(shape=SHAPE, learned=True, **options):
    flow = gf.image.realnvp(
        jr.key(1), shape=shape, levels=1, depth=1, nn_width=4, **options
    )
    return DequantizedFlow(moved(flow), GREYS, moved(noise(shape)) if learned else None)


def pictures(n, shape=SHAPE, dtype=float):
    return jr.randint(jr.key(2), (n, *shape), 0, GREYS).astype(dtype)


def test_new_noise_is_uniform():
    layer, x = noise(), pictures(2000)
    u, log_q = jax.vmap(layer)(jr.split(jr.key(3), 2000), x)
    np.testing.assert_allclose(log_q, 0, atol=1e-5)
    assert kstest(np.asarray(u).ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("shape", [SHAPE, (2, 2, 3)])
def test_density_of_learned_noise_against_a_dense_jacobian(shape, x64):
    layer, x = moved(noise(shape)), pictures(1, shape)[0]

    def by_start(start):
        state = jnp.concatenate([(x + 0.5) / GREYS - 0.5, start], axis=2)
        for coupling in layer.couplings:
            state = coupling.transform(state)
        return norm.cdf(state[..., shape[2] :])

    start = jr.normal(jr.key(4), shape)
    jacobian = jax.jacfwd(by_start)(start).reshape(start.size, start.size)
    expected = norm.logpdf(start).sum() - jnp.linalg.slogdet(jacobian)[1]
    u, log_q = layer(jr.key(4), x)
    np.testing.assert_allclose(u, by_start(start), rtol=1e-12)
    np.testing.assert_allclose(log_q, expected, rtol=1e-10)


def test_noise_sees_the_picture_and_leaves_it():
    layer, x = moved(noise()), pictures(2)
    one, two = (layer(jr.key(5), picture)[0] for picture in x)
    assert (one != two).any()


@pytest.mark.parametrize("learned", [False, True])
def test_bound_reaches_the_mean_density_of_a_cell(learned, x64):
    """With many samples: against quadrature on a picture of two pixels."""
    shape = (1, 2, 1)
    made, x = model(shape, learned), pictures(1, shape)
    # midpoints of 200 × 200 cells within the cell
    points = (jnp.arange(200) + 0.5) / 200
    u = jnp.stack(jnp.meshgrid(points, points), axis=-1).reshape(-1, *shape)
    mean = jnp.exp(made.flow.log_prob((x[0] + u) / GREYS)).mean()

    @eqx.filter_jit
    def bound(n, samples):
        rows = jnp.repeat(x, n, axis=0)
        return made.log_prob_bound(jr.key(0), rows, samples=samples)

    logs = bound(100, 100)
    ratios = np.exp(np.array(logs))  # each the mean of k draws, without bias
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    assert abs(ratios.mean() - mean) < 4 * error
    assert bound(5000, 1).mean() < jnp.log(mean)


def test_uniform_bound_is_the_log_density_of_dequantised_pictures(x64):
    made, x = model(learned=False), pictures(3)
    keys = jr.split(jr.key(6), (1, 3))[0]
    y = jax.vmap(lambda key, one: gf.image.dequantize(key, GREYS, one))(keys, x)
    np.testing.assert_allclose(
        made.log_prob_bound(jr.key(6), x), made.flow.log_prob(y), rtol=1e-12
    )


def test_training_learns_noise():
    """A density that is zero at the ends of its cells: learned noise keeps away."""
    flow = gf.image.realnvp(
        jr.key(1), shape=(1, 2, 1), levels=1, depth=1, nn_width=4, margin=0.0
    )
    learned = VariationalNoise(jr.key(2), shape=(1, 2, 1), levels_of_grey=2, nn_width=4)
    x = jr.bernoulli(jr.key(3), shape=(256, 1, 2, 1)).astype(jnp.float32)
    start = DequantizedFlow(paramax.non_trainable(flow), 2, learned)
    result = gf.fit(
        jr.key(4), start, x, steps=200, batch_size=128, learning_rate=0.03,
        loss=dequantized_loss, x_val=x, eval_every=200, progress=False,
    )  # fmt: skip
    uniform, trained = result.val_loss
    assert trained < uniform - 0.1


def test_float32_stays_float32(x64):
    made = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf,
        model(),
    )
    x = pictures(2, dtype=jnp.float32)
    assert made.log_prob_bound(jr.key(0), x).dtype == jnp.float32
    assert dequantized_loss(made, x, jr.key(0)).dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    flow = model().flow
    with pytest.raises(ValueError, match=r"shape \(2, 4, 1\) and 256"):
        DequantizedFlow(flow, 256, noise())
    with pytest.raises(ValueError, match=r"got noise for \(2, 2, 3\)"):
        DequantizedFlow(flow, GREYS, noise((2, 2, 3)))
    with pytest.raises(ValueError, match="at least 2 levels of grey"):
        DequantizedFlow(flow, 1)
    with pytest.raises(ValueError, match="depth to be an integer >= 1"):
        noise(depth=0)
    made, x = model(), pictures(2)
    with pytest.raises(ValueError, match=r"whole grey values in 0\.\.4, got fractions"):
        made.log_prob_bound(jr.key(0), jnp.minimum(x, 3) + 0.25)
    with pytest.raises(ValueError, match=r"whole grey values in 0\.\.4, got others"):
        made.log_prob_bound(jr.key(0), x + 5)
    with pytest.raises(ValueError, match="samples to be an integer >= 1"):
        made.log_prob_bound(jr.key(0), x, samples=0)
    with pytest.raises(Exception, match="whole grey values"):
        eqx.filter_jit(dequantized_loss)(made, x + 0.5, jr.key(0))
