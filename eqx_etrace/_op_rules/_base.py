"""What an op rule is: how one use of a weight lays out its trace.

A use is an equation y = op(..., w, ...) with a weight w among its operands. Its trace
holds, per slot, the influence of w on the unit that y feeds. In the layout of an op
rule each trace entry belongs to one element of y and one element of w, so that three
moves are enough for every learning rule:

- `influence(df, operands)`: df . dy/dw, laid out as the trace;
- `expand(v)`: a vector over y, shaped so that it multiplies a trace;
- `contract(vectors, traces)`: the sum over slots, y and batch of v . trace.

Where dy/dw is known as an array of its own, `derivative(operands)`, the influence is a
product, and so three more things are possible: a trace that does not depend on the unit
is kept without the axes of y, the influences of many steps are added by one product of
matrices, and a rule may filter dy/dw alone.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from ._products import cast, sum_of_product


SMALL = 1 << 14
"""Traces of so few elements need no care."""


@dataclasses.dataclass(frozen=True)
class OpRule(abc.ABC):
    """How the trace of one use of a weight is laid out, for y = op(..., w, ...).

    The trace holds the influence of w on the units that y feeds. Each of its entries
    belongs to one element of y and one element of w, so that a vector over y can
    multiply it. Derive from this class, as a frozen dataclass without arrays, to give
    an own primitive a closed form; see `op_rules` of `eqx_etrace.compile`. Methods work
    on one sample; a batch is mapped over them.

    **Arguments:**

    - `trace_shape`: the shape of the trace, for one slot and one sample.
    - `weight_shape`: the shape of w.
    - `summed`: the trace axes to sum over to come from a trace to the weight. What is
      left is reshaped to `weight_shape`.

    A derived class has a `name` for the report, and the methods `expand` and
    `influence`.

    !!! example

        A weight w of shape (n,) in y = w * x, laid out as y is:

        ```python
        @dataclasses.dataclass(frozen=True)
        class Scaled(eqx_etrace.OpRule):
            name = "scaled"

            def expand(self, v):
                return v

            def influence(self, df, operands):
                w, x = operands
                return df * x

        rule = Scaled(trace_shape=(3,), weight_shape=(3,), summed=())
        ```
    """

    trace_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    summed: tuple[int, ...]

    name: ClassVar[str]

    @abc.abstractmethod
    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """An array of y's shape, with its axes where they broadcast against the trace.

        The result has as many axes as the trace; its dtype is that of `v`.
        """

    @abc.abstractmethod
    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        """df . dy/dw, of shape `trace_shape` and of the dtype of `df`.

        `df` has the shape of y; `operands` are the values that the primitive was
        applied to, the weight among them.
        """

    def derivative(self, operands: tuple[Any, ...]) -> Shaped[Array, "..."] | None:
        """dy/dw, shaped to broadcast against the trace, where that is smaller.

        It has as many axes as the trace, with size one where it does not vary, so that
        `influence(df, operands)` is `expand(df)` times it. None, the default, where it
        would be as large as the trace or where there is no such product.
        """
        del operands
        return None

    def accumulate(
        self,
        dfs: Shaped[Array, "steps ..."],
        operands: tuple[Any, ...],
        stacked: Sequence[bool],
    ) -> Shaped[Array, "..."]:
        """The sum over the leading axis of `influence(df, operands)`.

        `stacked` says which operands have that axis too.
        """
        derivative = self._derivatives(operands, stacked)
        if derivative is not None:
            dfs = jax.vmap(self.expand)(dfs)
            return sum_of_product(dfs, cast(derivative, dfs.dtype), (0,))
        moving = [a for a, moves in zip(operands, stacked, strict=True) if moves]

        def add(total: Any, step: Any) -> tuple[Any, None]:
            df, values = step
            rest = iter(values)
            args = (next(rest) if m else a for a, m in zip(operands, stacked))  # noqa: B905
            return total + self.influence(df, tuple(args)), None

        zero = jnp.zeros(self.trace_shape, dfs.dtype)
        return jax.lax.scan(add, zero, (dfs, moving))[0]

    def _derivatives(self, operands: tuple[Any, ...], stacked: Sequence[bool]) -> Any:
        """The derivative with the leading axis in front, one where nothing has it."""
        if not any(stacked):
            found = self.derivative(operands)
            return None if found is None else found[None]
        axes = tuple(0 if moves else None for moves in stacked)
        return jax.vmap(lambda *args: self.derivative(args), axes)(*operands)

    def contract(
        self,
        vectors: Sequence[Shaped[Array, "..."]],
        traces: Sequence[Shaped[Array, "..."]],
    ) -> Shaped[Array, "..."]:
        """Sum over slots and over y of vector . trace, in the shape of the weight.

        Traces with one more axis in front carry a batch, and so do the vectors: the
        sum then runs over the batch as well. A trace may have size one along axes of y.
        """
        dtype = _sum_dtype([*vectors, *traces])
        batched = traces[0].ndim > len(self.trace_shape)
        pairs = list(zip(vectors, traces, strict=True))
        full = [pair for pair in pairs if pair[1].shape[batched:] == self.trace_shape]
        total = jnp.zeros((), dtype)
        if full:
            heard, entries = zip(*full, strict=True)
            total = self._contract_full(heard, entries, dtype)
        for v, trace in pairs:
            if trace.shape[batched:] != self.trace_shape:
                total = total + self.contract_derivative(v, trace)
        return total

    def contract_derivative(
        self, v: Shaped[Array, "..."], derivative: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The same for a single trace that is as large as `derivative` gives it, or is
        made on the way: it need not be held in memory."""
        dtype = _sum_dtype([v, derivative])
        batched = derivative.ndim > len(self.trace_shape)
        expand = jax.vmap(self.expand) if batched else self.expand
        axes = tuple(axis + batched for axis in self.summed)
        v, derivative = expand(v.astype(dtype)), derivative.astype(dtype)
        found = sum_of_product(v, derivative, (0, *axes) if batched else axes)
        return found.reshape(self.weight_shape)

    def _contract_full(self, vectors: Any, traces: Any, dtype: Any) -> Any:
        samples = tuple(vectors), tuple(traces)
        if traces[0].ndim == len(self.trace_shape):
            return self._sum(vectors, traces, dtype)
        if math.prod(self.trace_shape) <= SMALL:
            return self._all(vectors, traces, dtype)

        def one_by_one(*samples: Any) -> Any:
            def add(total: Any, sample: Any) -> tuple[Any, None]:
                vectors, traces = sample
                return total + self._sum(vectors, traces, dtype), None

            zero = jnp.zeros(self.weight_shape, dtype)
            return jax.lax.scan(add, zero, samples)[0]

        def at_once(vectors: Any, traces: Any) -> Any:
            return self._all(vectors, traces, dtype)

        # XLA's CPU backend takes 2 to 5 times as long for any reduction or product
        # over the leading axis; a GPU would run the loop as one small kernel a sample.
        return jax.lax.platform_dependent(*samples, cpu=one_by_one, default=at_once)

    def _all(self, vectors: Any, traces: Any, dtype: Any) -> Any:
        each = jax.vmap(lambda vs, es: self._sum(vs, es, dtype))(vectors, traces)
        return jnp.sum(each, axis=0)

    def _sum(self, vectors: Sequence[Any], traces: Sequence[Any], dtype: Any) -> Any:
        total = jnp.zeros((), dtype)
        for v, trace in zip(vectors, traces, strict=True):
            total = total + self.expand(v.astype(dtype)) * trace.astype(dtype)
        return jnp.sum(total, axis=self.summed).reshape(self.weight_shape)


def place(v: Any, axes: Sequence[int], rank: int) -> Any:
    """`v` with its axes at `axes` of a trace of that rank, and ones elsewhere."""
    v = jnp.transpose(v, tuple(int(axis) for axis in np.argsort(axes)))
    return jnp.expand_dims(v, [axis for axis in range(rank) if axis not in axes])


def _sum_dtype(arrays: Sequence[Any]) -> Any:
    """Sums of 16-bit floats run in float32, as in XLA's own reductions."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(array.dtype for array in arrays))
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
