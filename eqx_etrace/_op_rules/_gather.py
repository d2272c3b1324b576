"""Rows of a weight picked by data: embeddings, `W[i]`, `W[:, i]`, `W[indices]`.

That is `gather` and `dynamic_slice` where each axis of the weight is either taken whole
or at one index. (With constant indices both only move elements: a part of the
preparation.)
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.extend.core import primitives as prims
from jax.lax import GatherScatterMode
from jaxtyping import Array, Bool, Shaped

from ._base import OpRule, place
from ._use import OpUse


@dataclasses.dataclass(frozen=True)
class Gather(OpRule):
    """Trace axes: the axes of the indices, then the axes of the weight as stored.

    dy[b, j] / dw[i, j] = 1 where i is index b: the one-hot rows are a comparison inside
    the influence, never an array of their own. An index out of bounds is clipped where
    the equation clips it and has no influence otherwise, as in `jax.grad`.
    """

    y_axes: tuple[int, ...]
    """Per axis of y, its axis in the trace."""
    index_axes: tuple[int, ...]
    """Per axis of the indices, its axis in the trace."""
    columns: tuple[int | None, ...]
    """Per axis of the weight, the position of its index, None for index zero."""
    sizes: tuple[int, ...]
    """Per axis of the weight, how much is taken: one element, or all."""
    paired: tuple[int, ...]
    """The axes of the weight that run along with an axis of the indices."""
    clip: bool
    separate: bool
    """Whether each index is an operand, rather than all of them one array."""

    name: ClassVar[str] = "gather"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return place(v, self.y_axes, len(self.trace_shape))

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        zero = jnp.zeros((), df.dtype)
        return jnp.where(self._picked(operands[1:]), self.expand(df), zero)

    def derivative(self, operands: tuple[Any, ...]) -> Shaped[Array, "..."]:
        return self._picked(operands[1:]).astype(operands[0].dtype)

    def _picked(self, indices: tuple[Any, ...]) -> Bool[Array, "..."]:
        """Which elements of the weight are read, to broadcast against the trace."""
        rank = len(self.trace_shape)
        lead = rank - len(self.weight_shape)
        picked = jnp.ones((1,) * rank, bool)
        for axis, column in enumerate(self.columns):
            if axis in self.paired:
                continue
            size, taken = self.weight_shape[axis], self.sizes[axis]
            start = self._start(indices, column, size - taken)
            start = place(start, self.index_axes, rank) if start.ndim else start
            # What is taken whole is taken from index zero, or is out of bounds.
            own = jnp.arange(1 if taken == size else size, dtype=start.dtype)
            picked &= start == place(own, (lead + axis,), rank)
        return picked

    def _start(self, indices: tuple[Any, ...], column: int | None, last: int) -> Any:
        if column is None:
            return jnp.zeros((), jnp.int32)
        start = jnp.asarray(indices[column] if self.separate else indices[0])
        start = start if self.separate else start[..., column]
        if self.clip:
            last = min(last, int(jnp.iinfo(start.dtype).max))
            start = jnp.clip(start, 0, last)
        # Eight bits may hold the indices and not the size of the axis.
        return start.astype(jnp.int32) if start.dtype.itemsize < 4 else start


def gather(use: OpUse) -> Gather | None:
    """The rule of a lookup in a weight, None for any other use."""
    if use.operand != 0:
        return None
    if use.primitive is prims.dynamic_slice_p:
        return _from_slice(use)
    if use.primitive is prims.gather_p:
        return _from_gather(use)
    return None


def _one_or_all(sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(k in (1, n) for k, n in zip(sizes, shape, strict=True))


def _from_slice(use: OpUse) -> Gather | None:
    shape, sizes = use.weight.shape, tuple(use.params["slice_sizes"])
    if not _one_or_all(sizes, shape):
        return None
    axes = tuple(range(len(shape)))
    return Gather(
        trace_shape=shape,
        weight_shape=shape,
        summed=(),
        y_axes=axes,
        index_axes=(),
        columns=axes,
        sizes=sizes,
        paired=(),
        clip=True,
        separate=True,
    )


def _from_gather(use: OpUse) -> Gather | None:
    shape, sizes = use.weight.shape, tuple(use.params["slice_sizes"])
    if not _one_or_all(sizes, shape):
        return None
    numbers = use.params["dimension_numbers"]
    paired = tuple(int(axis) for axis in numbers.operand_batching_dims)
    partner = dict(zip(numbers.start_indices_batching_dims, paired, strict=True))
    of_indices = use.inputs[1].shape[:-1]
    free = [axis for axis in range(len(of_indices)) if axis not in partner]
    lead = len(free)
    index_axes = tuple(
        lead + partner[axis] if axis in partner else free.index(axis)
        for axis in range(len(of_indices))
    )
    dropped = (*numbers.collapsed_slice_dims, *paired)
    kept = iter(lead + a for a in range(len(shape)) if a not in dropped)
    along = iter(index_axes)
    y_axes = tuple(
        next(kept if axis in numbers.offset_dims else along)
        for axis in range(len(use.y.shape))
    )
    column = {int(axis): c for c, axis in enumerate(numbers.start_index_map)}
    return Gather(
        trace_shape=(*(of_indices[axis] for axis in free), *shape),
        weight_shape=shape,
        summed=tuple(range(lead)),
        y_axes=y_axes,
        index_axes=index_axes,
        columns=tuple(column.get(axis) for axis in range(len(shape))),
        sizes=sizes,
        paired=paired,
        clip=use.params["mode"] is GatherScatterMode.CLIP,
        separate=False,
    )
