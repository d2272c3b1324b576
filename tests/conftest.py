"""Strict JAX, and every annotation of the library checked while the tests run."""

import jax
import matplotlib
import pytest
from jaxtyping import install_import_hook


matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("eqx_etrace", "beartype.beartype"):
    import eqx_etrace.nn
    import eqx_etrace.plot
    import eqx_etrace.tasks  # noqa: F401 imported for the hook to take effect


def pytest_collection_modifyitems(items):
    """Tests of one model go to one worker, which compiles it once for all of them."""
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz",
        type=int,
        default=0,
        metavar="N",
        help="test N random cells with new seeds, in place of the same few",
    )
