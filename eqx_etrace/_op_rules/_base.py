"""What an op rule is: how one use of a weight lays out its trace.

A use is an equation y = op(..., w, ...) with a weight w among its operands. Its trace
holds, per slot, the influence of w on the unit that y feeds. In the layout of an op rule
each trace entry belongs to one element of y and one element of w, so that three moves
are enough for every learning rule:

- `influence(df, operands)`: df . dy/dw, laid out as the trace;
- `expand(v)`: a vector over y, shaped so that it multiplies a trace;
- `contract(vectors, traces)`: the sum over slots, y and batch of v . trace.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


class OpRule(eqx.Module):
    """The layout of the trace of one use; hashable, no arrays inside."""

    trace_shape: eqx.AbstractVar[tuple[int, ...]]
    weight_shape: eqx.AbstractVar[tuple[int, ...]]
    summed: eqx.AbstractVar[tuple[int, ...]]
    """The trace axes that are no axes of the weight."""
    name: eqx.AbstractClassVar[str]

    @abstractmethod
    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """A vector of y's shape, with the axes that broadcast against the trace."""

    @abstractmethod
    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        """df . dy/dw in the layout of the trace; `operands` are the equation's own."""

    def contract(
        self,
        vectors: Sequence[Shaped[Array, "..."]],
        traces: Sequence[Shaped[Array, "..."]],
    ) -> Shaped[Array, "..."]:
        """Sum over slots and over y of vector . trace, in the shape of the weight.

        Traces with one more axis in front carry a batch, and so do the vectors: the
        sum then runs over the batch as well.
        """
        batched = traces[0].ndim > len(self.trace_shape)
        expand = jax.vmap(self.expand) if batched else self.expand
        axes = tuple(axis + batched for axis in self.summed) + (0,) * batched
        total = sum(
            jnp.sum(expand(v) * trace, axis=axes)
            for v, trace in zip(vectors, traces, strict=True)
        )
        return jnp.reshape(total, self.weight_shape)
