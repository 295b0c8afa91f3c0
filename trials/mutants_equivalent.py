"""Mutants that compute the same as the module does, and why."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "coupling",
        "return x.at[np.array(index)].get(unique_indices=True)",
        "True -> False",
    ): "a hint to the compiler",
    ("coupling", "dtype = last(coupling)[0].dtype", "0 -> 1"): (
        "weights and biases have the same"
    ),
    (
        "coupling",
        "return index == tuple(range(index[0], index[0] + len(index)))",
        "Add -> Sub",
    ): "chooses between two ways to compute the same",
    ("linear", "if x.size <= x.shape[0] ** 2:", "2 -> 3"): (
        "chooses between two ways to compute the same"
    ),
    ("linear", "if x.size <= x.shape[0] ** 2:", "condition negated"): (
        "chooses between two ways to compute the same"
    ),
    (
        "linear",
        "apart = jnp.where(hard > 0, 0.0, apart)  # of itself; rounding may leave an "
        "ulp",
        "0 -> 1",
    ): "keeps an ulp away, if there is one",
    ("_loop", "down = (count - top) / jnp.maximum(steps - top, 1)", "1 -> 2"): (
        "differs for a single step only, and there the numerator is 0"
    ),
    ("spline", "rises = tilt >= 0", "GtE -> Gt"): (
        "at the limit both formulas give the same"
    ),
    ("transformers", "return x + shift[0], jnp.zeros_like(x)", "0 -> 1"): (
        "the array has one row, and JAX takes the last one for an index beyond it"
    ),
    ("transformers", "return y - shift[0], jnp.zeros_like(y)", "0 -> 1"): (
        "the array has one row, and JAX takes the last one for an index beyond it"
    ),
    ("spline", "return jnp.sum(x > knots, axis=0)", "Gt -> GtE"): (
        "in a knot both bins have the same value and slope"
    ),
    ("transformers", "scale, log_scale = self.scale(r[0])", "0 -> 1"): (
        "the array has one row, and JAX takes the last one for an index beyond it"
    ),
    ("transformers", "tiny = raw < -20.0", "Lt -> LtE"): (
        "at the limit both formulas give the same"
    ),
    (
        "transformers",
        "return jnp.where(tiny, series, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, "
        "raw))))",
        "0.0 -> 1.0",
    ): "any number does here: it is what the series replaces",
}
