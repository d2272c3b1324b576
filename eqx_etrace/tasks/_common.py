"""What the tasks return, and the checks of their arguments."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped


class Sample(NamedTuple):
    """One sequence of a task, time in front.

    - `inputs`: (T, channels), floating-point.
    - `targets`: (T, outputs), floating-point, or (T,), the number of a class.
    - `mask`: (T,), true in the steps whose target counts.

    Tasks make one sample from one key. `jax.vmap` over keys makes a batch; with
    `out_axes=1` time stays in front: (T, B, ...), as `eqx_etrace.value_and_grad` takes
    it for a batched graph.

    !!! example

        ```python
        from functools import partial

        from eqx_etrace import tasks

        keys = jax.random.split(jax.random.key(0), 32)
        make = jax.jit(jax.vmap(partial(tasks.adding, steps=20), out_axes=1))
        inputs, targets, mask = make(keys)
        assert inputs.shape == (20, 32, 2) and mask.shape == (20, 32)
        ```
    """

    inputs: Float[Array, "time channels"]
    targets: Shaped[Array, "time ..."]
    mask: Bool[Array, " time"]


class Dataset(NamedTuple):
    """All sequences of a data set with a class each, samples in front.

    - `inputs`: (N, T, channels), floating-point; zeros behind the end of a short one.
    - `targets`: (N,), the number of the class.
    - `mask`: (N, T), true up to the end of each sequence.

    `jnp.swapaxes(inputs[batch], 0, 1)` is a batch with time in front.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.sequential_digits()
        assert inputs.shape == (1797, 64, 1) and targets.shape == (1797,)
        ```
    """

    inputs: Float[Array, "samples time channels"]
    targets: Shaped[Array, " samples"]
    mask: Bool[Array, "samples time"]


def check_count(where: str, least: int = 1, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(
                f"{where}: got {name}={count!r}, expected an integer of at least "
                f"{least}. It sets a shape: make it static under `jax.jit`."
            )


def check_share(where: str, **shares: Any) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(
                f"{where}: got {name}={share!r}, expected a number from 0 to 1. It is "
                "a probability."
            )


def check_above(where: str, **numbers: Any) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(
                f"{where}: got {name}={number!r}, expected a number above 0. A smaller "
                "one has no meaning here."
            )


def check_least(where: str, **numbers: Any) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(
                f"{where}: got {name}={number!r}, expected a number of at least 0. It "
                "is a standard deviation."
            )


def default_dtype(dtype: Any) -> Any:
    return jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
