"""Other packages' models: optional, with JAX's usual promotion rules.

Each test file is skipped where its package is not installed; the extra `thirdparty`
installs them. Their code was not written for the strict promotion of our own tests.
"""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
