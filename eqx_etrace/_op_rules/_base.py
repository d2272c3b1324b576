"""What an op rule is: how one use of a weight lays out its trace.

A use is an equation y = op(..., w, ...) with a weight w among its operands. Its trace
holds, per slot, the influence of w on the unit that y feeds. In the layout of an op
rule each trace entry belongs to one element of y and one element of w, so that three
moves are enough for every learning rule:

- `influence(df, operands)`: df . dy/dw, laid out as the trace;
- `expand(v)`: a vector over y, shaped so that it multiplies a trace;
- `contract(vectors, traces)`: the sum over slots, y and batch of v . trace.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


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

    def contract(
        self,
        vectors: Sequence[Shaped[Array, "..."]],
        traces: Sequence[Shaped[Array, "..."]],
    ) -> Shaped[Array, "..."]:
        """Sum over slots and over y of vector . trace, in the shape of the weight.

        Traces with one more axis in front carry a batch, and so do the vectors: the
        sum then runs over the batch as well.
        """
        dtype = _sum_dtype(traces[0].dtype)
        samples = tuple(vectors), tuple(traces)
        if traces[0].ndim == len(self.trace_shape):
            return self._sum(vectors, traces, dtype)

        def one_by_one(*samples: Any) -> Any:
            def add(total: Any, sample: Any) -> tuple[Any, None]:
                vectors, traces = sample
                return total + self._sum(vectors, traces, dtype), None

            zero = jnp.zeros(self.weight_shape, dtype)
            return jax.lax.scan(add, zero, samples)[0]

        def at_once(*samples: Any) -> Any:
            each = jax.vmap(lambda vs, es: self._sum(vs, es, dtype))(*samples)
            return jnp.sum(each, axis=0)

        # XLA's CPU backend takes 2 to 5 times as long for any reduction or product
        # over the leading axis; a GPU would run the loop as one small kernel a sample.
        return jax.lax.platform_dependent(*samples, cpu=one_by_one, default=at_once)

    def _sum(self, vectors: Sequence[Any], traces: Sequence[Any], dtype: Any) -> Any:
        total = jnp.zeros((), dtype)
        for v, trace in zip(vectors, traces, strict=True):
            total = total + self.expand(v.astype(dtype)) * trace.astype(dtype)
        return jnp.sum(total, axis=self.summed).reshape(self.weight_shape)


def place(v: Any, axes: Sequence[int], rank: int) -> Any:
    """`v` with its axes at `axes` of a trace of that rank, and ones elsewhere."""
    v = jnp.transpose(v, tuple(int(axis) for axis in np.argsort(axes)))
    return jnp.expand_dims(v, [axis for axis in range(rank) if axis not in axes])


def _sum_dtype(dtype: Any) -> Any:
    """Sums of 16-bit floats run in float32, as in XLA's own reductions."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def cast(array: Any, dtype: Any) -> Any:
    """An array in the precision of a dtype; it stays real, or complex, as it is."""
    array, real = jnp.asarray(array), jnp.finfo(dtype).dtype
    if not jnp.iscomplexobj(array):
        return array.astype(real)
    return array.astype(jnp.complex128 if real == jnp.float64 else jnp.complex64)


def product(one: Any, other: Any) -> Any:
    """A product of arrays of one precision, of which one may be complex."""
    if jnp.iscomplexobj(one) != jnp.iscomplexobj(other):
        one, other = (
            a if jnp.iscomplexobj(a) else jax.lax.complex(a, jnp.zeros_like(a))
            for a in (one, other)
        )
    return one * other
