"""The modules of `nn` are small: most of the time of their tests is compilation."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _compile_quickly():
    """As `quick_jit` of the oracles, for what is not under jit."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
