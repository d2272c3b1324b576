"""Strict JAX, and every annotation of the library checked while the tests run."""

import jax
from jaxtyping import install_import_hook


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("eqx_etrace", "beartype.beartype"):
    import eqx_etrace.nn
    import eqx_etrace.tasks  # noqa: F401 imported for the hook to take effect


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz",
        type=int,
        default=0,
        metavar="N",
        help="test N random cells with new seeds, in place of the same few",
    )
