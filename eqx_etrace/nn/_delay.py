"""Delays: what is sent now arrives steps later.

A delay line is a buffer that is shifted at every step, newest first. The cells of one
unit are state variables of that unit, and a trace passes along them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._shapes import Units, check_count, check_input, check_state, shape_of


class DelayState(NamedTuple):
    """What was sent in the last steps, newest first."""

    buffer: Float[Array, "steps *units"]  # noqa: F821 ruff reads two names as code


def _pushed(state: DelayState, x: Array) -> Array:
    """Now, one step ago, two steps ago, ..."""
    return jnp.concatenate([x[None], state.buffer])


def _checked(owner: str, delays: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(delays)
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(
            f"{owner}: got delays {delays}, expected integers of at least 0. They "
            "count time steps."
        )
    if array.shape not in ((), shape):
        raise ValueError(
            f"{owner}: got delays of shape {array.shape}, expected {shape} or one "
            "number. There is one delay for each unit or connection."
        )
    return array


class Delay(eqx.Module):
    """Axons: what a unit sends arrives some steps later.

    **Arguments:**

    - `units`: how many units, or their shape.
    - `steps`: the delay in time steps, one for all or one per unit; 0 passes on at
      once.

    **Returns:** (when called with an input of the shape of the units and a state) what
    was sent `steps` ago, zero before the first, and a `DelayState` with a buffer of as
    many steps as the longest delay. A compiled unit has at most `max_slots` state
    variables: raise it for long delays.

    **Raises:** `ValueError` for wrong sizes or delays.

    !!! example

        ```python
        delay = nn.Delay(3, steps=[0, 1, 2])
        arrived, state = delay(jnp.ones(3), delay.init_state())
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    steps: int | tuple[int, ...] = eqx.field(static=True)

    def __init__(self, units: Units, steps: int | Sequence[int] | np.ndarray):
        self.shape = shape_of(units)
        array = _checked("Delay", steps, self.shape)
        flat = tuple(int(n) for n in array.reshape(-1))
        self.steps = flat if array.ndim else flat[0]

    def init_state(self) -> DelayState:
        return DelayState(jnp.zeros((int(np.max(self.steps)), *self.shape)))

    def __call__(
        self, x: Float[Array, "*units"], state: DelayState
    ) -> tuple[Float[Array, "*units"], DelayState]:
        check_input(self, x, self.shape)
        check_state(self, state)
        history = _pushed(state, x)
        new = DelayState(history[:-1])
        if isinstance(self.steps, int):
            return history[-1], new
        flat = history.reshape(len(history), -1)
        arrived = flat[np.array(self.steps), np.arange(flat.shape[1])]
        return arrived.reshape(self.shape), new


class DelayedDense(eqx.Module):
    r"""All to all, each connection with a delay of its own.

    $y_i = \sum_j w_{ij}\, x_j(t - d_{ij}) + b_i$.

    **Arguments:**

    - `pre`, `post`: how many units send and receive.
    - `delays`: in time steps, integers (post, pre).
    - `use_bias`: whether there is a bias.
    - `key`: for the weights, uniform within 1 / sqrt(pre), and the biases.

    **Returns:** (when called with x, (pre,), and a state) an array (post,) and a
    `DelayState` with a buffer of as many steps as the longest delay.

    **Raises:** `ValueError` for wrong sizes or delays.

    !!! example

        ```python
        connection = nn.DelayedDense(2, 3, [[0, 1], [1, 0], [2, 2]], key=key)
        current, state = connection(jnp.ones(2), connection.init_state())
        ```
    """

    weight: Float[Array, "post pre"]
    bias: Float[Array, " post"] | None
    delays: Int[Array, "post pre"]
    longest: int = eqx.field(static=True)

    def __init__(
        self,
        pre: int,
        post: int,
        delays: Any,
        *,
        use_bias: bool = True,
        key: PRNGKeyArray,
    ):
        check_count("pre", pre)
        check_count("post", post)
        array = _checked("DelayedDense", delays, (post, pre))
        self.longest = int(array.max())
        self.delays = jnp.asarray(np.broadcast_to(array, (post, pre)))
        w_key, b_key = jax.random.split(key)
        limit = 1 / pre**0.5
        self.weight = jax.random.uniform(w_key, (post, pre), None, -limit, limit)
        drawn = jax.random.uniform(b_key, (post,), None, -limit, limit)
        self.bias = drawn if use_bias else None

    def init_state(self) -> DelayState:
        return DelayState(jnp.zeros((self.longest, self.weight.shape[1])))

    def __call__(
        self, x: Float[Array, " pre"], state: DelayState
    ) -> tuple[Float[Array, " post"], DelayState]:
        check_input(self, x, self.weight.shape[1:])
        check_state(self, state)
        history = _pushed(state, x)
        senders = np.arange(self.weight.shape[1])[None]
        arrived = history[self.delays, senders]
        y = jnp.sum(self.weight * arrived, axis=1)
        new = DelayState(history[:-1])
        return (y if self.bias is None else y + self.bias), new
