"""Mutants that compute the same as the module does, and why."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("linear", "if x.size <= x.shape[0] ** 2:", "2 -> 3"): (
        "chooses between two ways to compute the same"
    ),
    ("spline", "return jnp.sum(x > knots, axis=0)", "Gt -> GtE"): (
        "in a knot both bins have the same value and slope"
    ),
    ("transformers", "scale, log_scale = self.scale(r[0])", "0 -> 1"): (
        "the array has one row, and JAX takes the last one for an index beyond it"
    ),
    (
        "transformers",
        "return jnp.where(tiny, series, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, "
        "raw))))",
        "0.0 -> 1.0",
    ): "any number does here: it is what the series replaces",
}
