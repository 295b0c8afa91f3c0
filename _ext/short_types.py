"""Show the types in the API reference under the names that a reader knows them by.

The annotations that Sphinx finds are spelled out, with private modules of JAX and
unions of everything that may stand for an array.
"""

ARRAY = "~jax.jaxlib._jax.Array"
KEY = "~jaxtyping.Key[jaxlib._jax.Array, ''] | ~jaxtyping.UInt32[jaxlib._jax.Array, "
ARRAY_LIKE = (
    f"{ARRAY} | ~numpy.ndarray | ~numpy.bool | ~numpy.number"
    " | bool | int | float | complex"
)
SHORT = {  # in this order
    f"{KEY}'2'] | ~jaxtyping.UInt32[jaxlib._jax.Array, '4']": "PRNGKeyArray",
    ARRAY_LIKE: "ArrayLike",
    "~collections.abc.Callable[[ArrayLike], ArrayLike]": "optax.Schedule",
    "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType": (
        "DTypeLike"
    ),
    ARRAY: "Array",
    "jaxlib._jax.Array": "Array",
    "~optax._src.base.GradientTransformation": "optax.GradientTransformation",
    "~jaxtyping.Shaped[Array, '...'] | ~jaxtyping.Shaped[ndarray, '...']": "Array",
}


def shorten(app, objtype, name, *_) -> None:
    """Rewrite what autodoc has just noted down for one object."""
    noted = app.env.temp_data.get("annotations", {}).get(name, {})
    for parameter, text in noted.items():
        for long, short in SHORT.items():
            text = text.replace(long, short)
        noted[parameter] = text


def setup(app) -> dict:
    app.connect("autodoc-process-signature", shorten, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
