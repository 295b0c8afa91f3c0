import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from conftest import enable_x64
from flowjax.bijections import Chain, Invert
from flowjax.distributions import StandardNormal, Transformed
from paramax import NonTrainable

import gauss_flows as gf

warm_start = eqx.filter_jit(gf.rbig.warm_start)
coupling_flow = eqx.filter_jit(gf.coupling_flow)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def moons(n=2000, dtype=float):
    return gf.data.standardize(gf.data.two_moons(jr.key(0), n).astype(dtype))


@eqx.filter_jit
def states(flow, x):
    """Where the rows of ``x`` are before and after each block, (blocks + 1, n, dim)."""
    return jax.vmap(lambda row: gf.intermediates(flow, row), out_axes=1)(x)


def off_normal(x):
    """Largest distance from the normal's distribution function, over coordinates."""
    return max(scipy.stats.kstest(np.asarray(c), "norm").statistic for c in x.T)


@pytest.mark.parametrize(
    ("dim", "n_reflections"), [(2, 2), (3, 2), (4, 4), (5, 8), (7, 6)]
)
def test_the_rotation_turns_to_the_principal_axes(dim, n_reflections, dtype):
    mix = jr.normal(jr.key(1), (dim, dim), dtype)
    x = 3 + jr.normal(jr.key(0), (400, dim), dtype) @ mix
    layer = gf.rbig.principal_rotation(
        gf.HouseholderRotation(n_reflections, (dim,), dtype=dtype), x
    )
    assert layer.params.shape == (n_reflections, dim)
    assert layer.params.dtype == dtype
    matrix = jax.vmap(layer.transform)(jnp.eye(dim, dtype=dtype)).T
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-11
    np.testing.assert_allclose(jnp.linalg.det(matrix), 1.0, rtol=tolerance)
    covariance = jnp.cov(jax.vmap(layer.transform)(x).T)
    variances = jnp.diag(covariance)
    np.testing.assert_allclose(
        covariance, jnp.diag(variances), atol=tolerance * variances.max()
    )
    assert (jnp.diff(variances) < 0).all()


def test_data_already_on_their_axes_are_no_special_case(x64):
    """Where a textbook Householder vector is zero, the layer must not be NaN."""
    x = jnp.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    layer = gf.rbig.principal_rotation(gf.HouseholderRotation(2, (2,)), x)
    np.testing.assert_allclose(abs(jax.vmap(layer.transform)(x)), abs(x), atol=1e-15)


def test_every_block_makes_the_marginals_normal(dtype):
    x = moons(dtype=dtype)
    flow = coupling_flow(jr.key(1), dim=2, depth=4, n_bins=24, dtype=dtype)
    data, *done = states(warm_start(flow, x), x)
    assert off_normal(data) > 0.06
    for state in done:
        assert state.dtype == dtype
        assert off_normal(state) < 0.03
    # what the later blocks make smaller is dependence, which no marginal shows
    first, *_, last = [abs(np.corrcoef((y**2).T)[0, 1]) for y in done]
    assert last < first


def test_the_last_kernels_are_zero_and_the_rest_of_the_conditioner_is_kept():
    cold = coupling_flow(jr.key(1), dim=4, depth=2)
    warm = warm_start(cold, jr.normal(jr.key(0), (500, 4)) ** 3 / 5)
    for old, new in zip(gf.blocks(cold), gf.blocks(warm), strict=True):
        for a, b in zip(old.bijections[1:], new.bijections[1:], strict=True):
            assert not b.conditioner.layers[-1].weight.any()
            assert b.conditioner.layers[-1].bias.any()
            assert eqx.tree_equal(a.conditioner.layers[:-1], b.conditioner.layers[:-1])


@pytest.mark.parametrize("rotations", ["principal", "kept"])
def test_it_starts_far_ahead_and_depth_helps(rotations):
    x = moons(6000)
    scores = []
    for depth in (1, 8):
        cold = coupling_flow(jr.key(1), dim=2, depth=depth)
        warm = warm_start(cold, x[:3000], rotations=rotations)
        scores.append(float(gf.mean_log_prob(warm, x[3000:])))
        assert scores[-1] > gf.mean_log_prob(cold, x[3000:]) + 1
    assert scores[0] < scores[1] - 0.2


def test_kept_rotations_stay_and_go_on_where_principal_axes_stop():
    """On a point-symmetric spiral, coordinates are uncorrelated, though dependent."""
    x = gf.data.spiral(jr.key(0), 6000)
    flow = coupling_flow(jr.key(1), dim=2, depth=12)
    kept = warm_start(flow, x[:3000], rotations="kept")
    for old, new in zip(gf.blocks(flow), gf.blocks(kept), strict=True):
        assert eqx.tree_equal(old.bijections[0], new.bijections[0])
    principal = warm_start(flow, x[:3000])
    scores = [gf.mean_log_prob(f, x[3000:]) for f in (flow, principal, kept)]
    normal = StandardNormal((2,)).log_prob(x[3000:]).mean()
    assert scores[0] < normal < scores[1] < scores[2] - 0.1


def test_round_trip_and_log_det(dtype):
    x = moons(dtype=dtype)
    flow = warm_start(
        coupling_flow(jr.key(1), dim=2, depth=4, actnorm=True, dtype=dtype), x
    )
    forward = gf.normalizing_map(flow)
    tolerance = 2e-3 if dtype == jnp.float32 else 1e-10

    def both(x):
        z, log_det = forward.transform_and_log_det(x)
        back, inverse_log_det = forward.inverse_and_log_det(z)
        return back, log_det, inverse_log_det

    back, log_det, inverse_log_det = jax.jit(jax.vmap(both))(x)
    assert back.dtype == log_det.dtype == dtype
    np.testing.assert_allclose(back, x, atol=tolerance)
    np.testing.assert_allclose(-inverse_log_det, log_det, atol=10 * tolerance)


def test_a_chain_is_set_like_a_scan(x64):
    x = moons(400)
    flow = coupling_flow(jr.key(1), dim=2, depth=2, actnorm=True)
    chain = Transformed(flow.base_dist, Invert(Chain(gf.blocks(flow))))
    expected = warm_start(flow, x).log_prob(x)
    np.testing.assert_allclose(
        warm_start(chain, x).log_prob(x), expected, rtol=1e-9, atol=1e-9
    )


def test_many_seeds_at_once(x64):
    x = moons(400)

    def build(key):
        return gf.rbig.warm_start(gf.coupling_flow(key, dim=2, depth=2), x)

    flows = eqx.filter_jit(eqx.filter_vmap(build))(jr.split(jr.key(0), 2))
    one = eqx.filter_jit(build)(jr.split(jr.key(0), 2)[1])
    np.testing.assert_allclose(
        gf.member(flows, 1).log_prob(x), one.log_prob(x), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("options", [{}, {"log_scale_bound": 2.0}])
def test_an_affine_coupling_standardises(options, x64):
    x = jnp.array([0.0, 5.0, -3.0]) + jnp.array([1.0, 4.0, 0.3]) * jr.normal(
        jr.key(0), (300, 3)
    )
    layer = gf.AffineCoupling(jr.key(1), shape=(3,), **options).from_data(x)
    y = jax.vmap(layer.transform)(x)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(y[:, 1:].mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(y[:, 1:].std(0), 1.0, atol=1e-12)


def test_a_bounded_scale_goes_to_its_bound_and_the_mean_is_still_0(x64):
    x = 7 + 100 * jr.normal(jr.key(0), (300, 2))
    layer = gf.AffineCoupling(jr.key(1), shape=(2,), log_scale_bound=1.0).from_data(x)
    y = jax.vmap(layer.transform)(x)[:, 1]
    np.testing.assert_allclose(y.mean(), 0.0, atol=1e-10)
    np.testing.assert_allclose(y.std() / x[:, 1].std(), np.exp(-1), rtol=0.02)


def test_an_additive_coupling_centres(x64):
    x = 7 + 3 * jr.normal(jr.key(0), (300, 2))
    layer = gf.AdditiveCoupling(jr.key(1), shape=(2,)).from_data(x)
    y = jax.vmap(layer.transform)(x)
    np.testing.assert_allclose(y[:, 1], x[:, 1] - x[:, 1].mean(), atol=1e-12)


@pytest.mark.parametrize(
    ("n_bins", "atol"), [(1, 0.2), (2, 0.08), (8, 0.02), (15, 0.02)]
)
def test_a_spline_coupling_of_any_number_of_bins(n_bins, atol):
    x = jr.uniform(jr.key(0), (3000, 2), minval=-1.0, maxval=3.0)
    layer = gf.RQSplineCoupling(jr.key(1), shape=(2,), n_bins=n_bins).from_data(x)
    y = jax.vmap(layer.transform)(x)
    assert off_normal(x[:, 1:]) > 0.3
    assert off_normal(y[:, 1:]) < atol
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


@eqx.filter_jit
def through_spline(theta, x, interval):
    """Values and slopes of the spline with parameters ``theta``."""
    n_knots = len(theta) // 3 - 1
    layer = gf.RQSplineCoupling(
        jr.key(0),
        shape=(2,),
        n_bins=n_knots,
        interval=interval,
        identity_init=True,
        dtype=theta.dtype,
    )
    layer = eqx.tree_at(lambda a: a.conditioner.layers[-1].bias, layer, theta)
    events = jnp.stack([jnp.zeros_like(x), x], axis=1)
    y, log_slope = jax.vmap(layer.transform_and_log_det)(events)
    return y[:, 1], jnp.exp(log_slope)


def test_a_spline_goes_through_its_knots(x64):
    knots, heights = jnp.array([-1.0, 0.2, 0.9]), jnp.array([-2.0, 0.5, 1.0])
    slopes = jnp.array([1.0, 0.5, 2.0, 0.1, 1.0])
    theta = gf.spline.from_knots(knots, heights, slopes, 3.0)
    assert theta.shape == (gf.spline.n_parameters(3),)
    y, found = through_spline(theta, jnp.array([-3.0, *knots, 3.0]), 3.0)
    np.testing.assert_allclose(y, [-3.0, *heights, 3.0], atol=1e-12)
    np.testing.assert_allclose(found, slopes, rtol=1e-9)


def test_knots_on_the_diagonal_are_the_identity_and_give_zeros(x64):
    knots = jnp.array([-1.0, 0.0, 1.0])
    theta = gf.spline.from_knots(knots, knots, jnp.ones(5), 2.0)
    np.testing.assert_allclose(theta, 0.0, atol=1e-12)


def test_knots_that_coincide_or_lie_outside_give_a_finite_monotone_spline(dtype):
    knots = jnp.array([-9.0, 0.5, 0.5, 9.0], dtype)
    heights = jnp.array([-2.0, -1.0, 1.0, 2.0], dtype)
    slopes = jnp.array([1.0, 0.0, 1e4, 1.0, 1.0, 1.0], dtype)
    theta = gf.spline.from_knots(knots, heights, slopes, 4.0)
    y, found = through_spline(theta, jnp.linspace(-4, 4, 200, dtype=dtype), 4.0)
    assert theta.dtype == dtype
    assert jnp.isfinite(found).all()
    assert (jnp.diff(y) >= 0).all()


def bin_sizes(raw, interval):
    """Widths or heights of bins, as the spline makes them of raw ones."""
    least = gf.spline.MIN_WIDTH
    return least + (2 * interval - len(raw) * least) * jax.nn.softmax(raw)


@pytest.mark.parametrize("n_knots", [2, 5])
def test_the_outermost_knots_take_the_slope_of_their_inner_chord(n_knots, x64):
    x = jr.normal(jr.key(0), (1000, 1)) ** 3 / 8
    theta = gf.transformers.RQSpline(n_knots, 4.0).from_marginals(x)[:, 0]
    widths, heights, slopes = gf.spline.split(theta)
    chords = (bin_sizes(heights, 4.0) / bin_sizes(widths, 4.0))[1:-1]
    unit = np.log(np.expm1(1 - gf.spline.MIN_SLOPE))
    found = gf.spline.MIN_SLOPE + jax.nn.softplus(slopes + unit)[1:-1]
    np.testing.assert_allclose(
        found[np.array([0, -1])], chords[np.array([0, -1])], rtol=1e-6
    )
    inner = np.sqrt(chords[1:] * chords[:-1])
    np.testing.assert_allclose(found[1:-1], inner, rtol=1e-6)


def test_a_bin_too_narrow_gets_hardly_more_than_the_least_width(x64):
    knots = jnp.array([-1.0, 0.5, 0.5, 1.0])
    theta = gf.spline.from_knots(knots, jnp.arange(4.0) - 2, jnp.ones(6), 4.0)
    sizes, least = bin_sizes(gf.spline.split(theta)[0], 4.0), gf.spline.MIN_WIDTH
    assert least < sizes[2] < 1.02 * least
    wanted = jnp.diff(jnp.array([-4.0, *knots, 4.0]))
    np.testing.assert_allclose(sizes, wanted, atol=2 * least)


def test_frozen_layers_stay():
    flow = coupling_flow(jr.key(1), dim=2, depth=1)
    rotation, first, second = gf.blocks(flow)[0].bijections
    chain = Chain([NonTrainable(rotation), first, NonTrainable(second)])
    warm = gf.rbig.warm_start(Transformed(flow.base_dist, Invert(chain)), moons(100))
    kept, changed, kept_too = warm.bijection.bijection.bijections
    assert eqx.tree_equal(kept, NonTrainable(rotation))
    assert eqx.tree_equal(kept_too, NonTrainable(second))
    assert not changed.conditioner.layers[-1].weight.any()


def test_wrong_arguments_are_named():
    flow = coupling_flow(jr.key(1), dim=4, depth=2, n_reflections=2)
    x = jr.normal(jr.key(0), (50, 4))
    with pytest.raises(ValueError, match=r"at least 4 reflections.* got 2"):
        gf.rbig.warm_start(flow, x)
    gf.rbig.warm_start(flow, x, rotations="kept")
    with pytest.raises(ValueError, match="principal or kept, got 'random'"):
        gf.rbig.warm_start(flow, x, rotations="random")
    with pytest.raises(ValueError, match=r"shape \(4,\), got .* \(50, 3\)"):
        gf.rbig.warm_start(flow, x[:, :3])
    with pytest.raises(ValueError, match=r"at least 2 events.*\(1, 4\)"):
        gf.rbig.warm_start(flow, x[:1])
    with pytest.raises(ValueError, match=r"shape \(2,\), got .* \(50, 4\)"):
        gf.rbig.principal_rotation(gf.HouseholderRotation(2, (2,)), x)
    with pytest.raises(ValueError, match=r"shape \(4,\), got .* \(50, 3\)"):
        gf.AffineCoupling(jr.key(0), shape=(4,)).from_data(x[:, :3])
    without = Transformed(StandardNormal((2,)), Invert(gf.ActNorm((2,))))
    with pytest.raises(ValueError, match="couplings or diagonal layers on"):
        gf.rbig.warm_start(without, x[:, :2])


def test_a_constant_coordinate_is_refused():
    x = jr.normal(jr.key(0), (50, 2)).at[:, 1].set(0.3)
    with pytest.raises(RuntimeError, match="every active coordinate to vary"):
        gf.AffineCoupling(jr.key(0), shape=(2,)).from_data(x)


@pytest.mark.parametrize(
    "data", ["two_moons", "spiral", "swiss_roll", "four_gaussians"]
)
def test_rbig_diagonal_flow_and_coupling_flow_are_one_map(data, x64):
    """With the same parameters; from data to latent, and in log-density."""
    x = gf.data.standardize(gf.data.make(data, jr.key(0), 600))
    fitted = gf.rbig.fit(x, depth=3)
    cold = coupling_flow(jr.key(1), dim=x.shape[1], depth=3, coupling="mixture")
    warm = warm_start(cold, x)
    far = jnp.concatenate([x, 4 * x, jnp.full((1, x.shape[1]), 40.0)])

    @eqx.filter_jit
    def latent(flow):
        return jax.vmap(gf.normalizing_map(flow).transform_and_log_det)(far)

    for a, b in zip(latent(fitted), latent(warm), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_rbig_is_a_flow(dtype):
    """Its log-density, transform, inverse and samples agree with each other."""
    x = moons(1000, dtype)
    flow = eqx.filter_jit(gf.rbig.fit)(x, depth=4)
    z = jax.vmap(gf.normalizing_map(flow).transform)(x)
    assert off_normal(z) < 0.04
    drawn, log_prob = eqx.filter_jit(flow.sample_and_log_prob)(jr.key(1), (50,))
    tolerance = 1e-2 if dtype == jnp.float32 else 1e-8
    np.testing.assert_allclose(
        eqx.filter_jit(flow.log_prob)(drawn), log_prob, rtol=tolerance, atol=tolerance
    )
    assert drawn.dtype == dtype


def test_rbig_of_one_number_and_of_random_rotations():
    x = moons(1000)
    one = gf.rbig.fit(x[:, :1], depth=1)
    z = jax.vmap(gf.normalizing_map(one).transform)(x[:, :1])
    assert off_normal(z) < 0.02
    turned = gf.rbig.fit(x, depth=6, key=jr.key(3))
    principal = gf.rbig.fit(x, depth=6)
    assert turned.log_prob(x).mean() > -2.3
    assert jnp.abs(turned.log_prob(x) - principal.log_prob(x)).max() > 0.1


def test_rbig_refuses_what_it_cannot_fit():
    x = jr.normal(jr.key(0), (50, 2))
    with pytest.raises(ValueError, match=r"shape \(n, dim\), got \(50,\)"):
        gf.rbig.fit(x[:, 0])
    with pytest.raises(ValueError, match="got 8 for 5 samples"):
        gf.rbig.fit(x[:5])
    with pytest.raises(RuntimeError, match="every coordinate to vary"):
        gf.rbig.fit(x.at[:, 1].set(0.0), depth=1)
    with pytest.raises(RuntimeError, match="standardise the data"):
        gf.rbig.fit(1e5 * x, depth=1)
