"""What the cells share: linear maps of input and state, and the checks of sizes."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def check_size(where: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{where}: got {name}={size!r}, expected an integer of at least 1. "
                "Sizes are numbers of features."
            )


def check_shape(where: str, what: str, value: Any, shape: tuple[int, ...]) -> None:
    """A wrong size may broadcast, and a wrong number come out.

    The arguments of a step are annotated as arrays of any shape, so that this message
    is the one that is seen where annotations are checked too.
    """
    if jnp.shape(value) != shape:
        raise ValueError(
            f"{where}: got {what} of shape {jnp.shape(value)}, expected {shape}. "
            "One call is one time step of one sample: use `jax.vmap` for a batch, and "
            "`init_state()` for a state."
        )


def default_dtype(dtype: Any) -> Any:
    return jnp.result_type(float) if dtype is None else jnp.dtype(dtype)


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], fan: int, dtype: Any) -> Array:
    """Within 1 / sqrt(fan), as the cells of Equinox start."""
    limit = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, default_dtype(dtype), -limit, limit)


class Gate(eqx.Module):
    """`weight_ih @ x + weight_hh @ h + bias`: a gate before its nonlinearity."""

    weight_ih: Float[Array, "units inputs"]
    weight_hh: Float[Array, "units units"]
    bias: Float[Array, " units"] | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        shape = (hidden_size, input_size), (hidden_size, hidden_size), (hidden_size,)
        self.weight_ih = uniform(keys[0], shape[0], hidden_size, dtype)
        self.weight_hh = uniform(keys[1], shape[1], hidden_size, dtype)
        self.bias = uniform(keys[2], shape[2], hidden_size, dtype) if use_bias else None

    def __call__(self, x: Array, h: Array) -> Array:
        y = self.weight_ih @ x + self.weight_hh @ h
        return y if self.bias is None else y + self.bias


class ElementwiseGate(eqx.Module):
    """The same with a vector `weight_hh`: `weight_ih @ x + weight_hh * h + bias`."""

    weight_ih: Float[Array, "units inputs"]
    weight_hh: Float[Array, " units"]
    bias: Float[Array, " units"] | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        shape = (hidden_size, input_size), (hidden_size,), (hidden_size,)
        self.weight_ih = uniform(keys[0], shape[0], hidden_size, dtype)
        self.weight_hh = uniform(keys[1], shape[1], hidden_size, dtype)
        self.bias = uniform(keys[2], shape[2], hidden_size, dtype) if use_bias else None

    def __call__(self, x: Array, h: Array) -> Array:
        y = self.weight_ih @ x + self.weight_hh * h
        return y if self.bias is None else y + self.bias
