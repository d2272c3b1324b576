"""Annotations of the optional part are checked, too, while the tests run."""

import jax
import pytest
from jaxtyping import install_import_hook


with install_import_hook("eqx_etrace.nn", "beartype.beartype"):
    import eqx_etrace.nn  # noqa: F401 imported for the hook to take effect


@pytest.fixture(autouse=True)
def _compile_quickly():
    """As `quick_jit` of the oracles, for what is not under jit."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
