"""Large traces, sample after sample, each written where it was read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


Arrays = dict[int, Any]
"""By slot."""


def over_samples(
    batch: int,
    traces: Arrays,
    total: Any | None,
    fun: Callable[[Any, Arrays], tuple[Any | None, Arrays]],
) -> tuple[Arrays, Any | None]:
    """For each sample b `fun(b, its traces)`, which gives something to add to the total
    and the new traces.

    What is new for a sample is written one turn later, before that turn reads: XLA
    copies arrays whole that are read and written in no order that it can see.
    """

    def write(traces: Arrays, new: Arrays, b: Any) -> Arrays:
        return {slot: _put(entries, new[slot], b) for slot, entries in traces.items()}

    def body(b: Any, carry: tuple[Arrays, Arrays, Any]) -> Any:
        traces, new, total = carry
        traces = write(traces, new, jnp.maximum(b - 1, 0))
        more, found = fun(b, {slot: at(entries, b) for slot, entries in traces.items()})
        new = {slot: found[slot].astype(traces[slot].dtype) for slot in traces}
        return traces, new, total if more is None else total + more

    first = {slot: entries[0] for slot, entries in traces.items()}
    traces, new, total = jax.lax.fori_loop(0, batch, body, (traces, first, total))
    return write(traces, new, batch - 1), total


def at(array: Any, b: Any) -> Any:
    """The part of one sample."""
    return jax.lax.dynamic_index_in_dim(array, b, keepdims=False)


def _put(array: Any, value: Any, b: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(array, value, b, 0)
