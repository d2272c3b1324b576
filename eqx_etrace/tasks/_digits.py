"""Handwritten digits as sequences. The images come with scikit-learn."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ._common import Dataset, default_dtype


def _images(where: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 64) in [0, 1], and the digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"{where}: got no scikit-learn, expected it for its images of digits. "
            "Install the extra `examples`: pip install 'eqx-etrace[examples]'."
        ) from error
    data: Any = load_digits()
    return data.data / 16, data.target


def sequential_digits(
    *, by: Literal["pixel", "row"] = "pixel", dtype: Any = None
) -> Dataset:
    """Handwritten digits of 8 x 8 pixels, read pixel by pixel or row by row.

    The smaller sibling of sequential MNIST.

    **Arguments:**

    - `by`: "pixel" for 64 steps of one pixel, "row" for 8 steps of eight.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Dataset` of 1797 samples with inputs (1797, 64, 1) or (1797, 8, 8)
    within [0, 1], and the digits as targets.

    **Raises:** `ImportError` without scikit-learn, `ValueError` for another order.

    **Source:** Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI
    Machine Learning Repository, 1998, as in scikit-learn; as a sequence in Le, Jaitly
    and Hinton, *A simple way to initialize recurrent networks of rectified linear
    units*, 2015 (arXiv:1504.00941).

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.sequential_digits(by="row")
        assert inputs.shape == (1797, 8, 8)
        ```
    """
    if by not in ("pixel", "row"):
        raise ValueError(
            f"tasks.sequential_digits: got by={by!r}, expected 'pixel' or 'row'. It is "
            "what a step shows."
        )
    pixels, digits = _images("tasks.sequential_digits")
    steps = 64 if by == "pixel" else 8
    inputs = pixels.reshape(len(pixels), steps, 64 // steps)
    return _dataset(inputs, digits, dtype)


def permuted_digits(key: PRNGKeyArray, *, dtype: Any = None) -> Dataset:
    """Handwritten digits, pixel by pixel in one random order, the same for all.

    What is near in the image is far in time.

    **Arguments:**

    - `key`: a key for the order.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** as `eqx_etrace.tasks.sequential_digits`: inputs (1797, 64, 1).

    **Raises:** `ImportError` without scikit-learn.

    **Source:** Le, Jaitly and Hinton, 2015, as for
    `eqx_etrace.tasks.sequential_digits`.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.permuted_digits(jax.random.key(0))
        ```
    """
    pixels, digits = _images("tasks.permuted_digits")
    order = np.asarray(jax.random.permutation(key, 64))
    return _dataset(pixels[:, order, None], digits, dtype)


def _dataset(inputs: np.ndarray, digits: np.ndarray, dtype: Any) -> Dataset:
    return Dataset(
        jnp.asarray(inputs, default_dtype(dtype)),
        jnp.asarray(digits, jnp.result_type(int)),
        jnp.ones(inputs.shape[:2], bool),
    )
