"""Where weights meet the data of a step, for global rules that take them one by one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._op_rules import OpRule


@dataclasses.dataclass(frozen=True)
class Space:
    """Leaves in one real vector, a complex one as its real, then its imaginary part."""

    specs: tuple[jax.ShapeDtypeStruct, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return sum(map(numbers, self.specs))

    def pack(self, leaves: Sequence[Any]) -> Any:
        parts = []
        for leaf in leaves:
            pair = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
            parts += [part.ravel().astype(self.dtype) for part in pair]
        return jnp.concatenate(parts)

    def unpack(self, vector: Any) -> list[Any]:
        found, start = [], 0
        for spec in self.specs:
            part = vector[start : start + numbers(spec)]
            start += numbers(spec)
            if jnp.issubdtype(spec.dtype, jnp.complexfloating):
                part = jax.lax.complex(*jnp.split(part, 2))
            found.append(part.reshape(spec.shape).astype(spec.dtype))
        return found


def numbers(spec: Any) -> int:
    """How many real numbers an array holds."""
    size = math.prod(spec.shape)
    return 2 * size if jnp.issubdtype(spec.dtype, jnp.complexfloating) else size


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """One use y = op(..., w, ...) of a weight w on its way to the hidden state."""

    weight: int
    """The number of w among the weights that reach the state."""
    edge: tuple[int, int]
    """The equation, and the position of w among its operands."""
    drive: int
    """The number of a value of the shape of y, a change of which acts on the new state
    as one of y does. Uses whose y are only added up have the same."""
    y: jax.ShapeDtypeStruct
    derivative: jax.ShapeDtypeStruct | None
    """dy/dw as `op.derivative` gives it, None where that is no array of its own."""
    # An own op rule may be compared by identity; that of two compiles says the same.
    op: OpRule = dataclasses.field(compare=False)


class Uses(NamedTuple):
    """All uses of the weights that reach the hidden state of `states` numbers."""

    states: int
    weights: Space
    uses: tuple[WeightUse, ...]


class UseJacobian(NamedTuple):
    """Derivatives of the new hidden state of one sample, the rest held fixed.

    - `states`: D, by the old one.
    - `weights`: by some weights, wherever they are used.
    - `drives`: by some drives, each (states, numbers of y).
    - `operands`: what the uses were applied to.
    """

    states: Shaped[Array, "states states"]
    weights: Shaped[Array, "states numbers"]
    drives: tuple[Shaped[Array, "states numbers"], ...]
    operands: tuple[tuple[Any, ...], ...]
