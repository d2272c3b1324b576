"""What the x of a product is copied from, where that is smaller.

A sparse connection multiplies its weights with a copy of the sending unit's value for
each synapse; a convolution that is written as a product, with a copy for each place. A
filter of the copies is a copy of the filter, so that a rule that filters x alone keeps
one value for each unit that sends.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from ._jaxpr import Origin, Program, Ref
from ._reads import Mixing, Reads


class Presynaptic(eqx.Module):
    """A value of the step of which the elements of x are copies.

    **Attributes:**

    - `ref`: the number of the value in the program.
    - `shape`: its shape.
    - `positions`: for each element of x, the number of its element there.
    """

    ref: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    positions: Int[Array, "..."]

    def copied(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """An array like the value as one of the shape of x; axes in front stay."""
        flat = v.reshape(*v.shape[: v.ndim - len(self.shape)], -1)
        return flat.at[..., self.positions].get(mode="promise_in_bounds")


def find_presynaptic(program: Program, reads: Reads, x: Ref) -> Presynaptic | None:
    """The smallest value that x is copied from, None if it is not half as large."""
    if not isinstance(x, int) or program.origins[x] is not Origin.DATA:
        return None
    makers = {ref: e for e in program.equations for ref in e.outputs}
    avals, found = program.avals, None
    most, ref = avals[x].size // 2, x
    places = np.arange(avals[x].size).reshape(avals[x].shape)
    while ref in makers and reads.kind(makers[ref]) is Mixing.STRUCTURAL:
        equation = makers[ref]
        (moved,) = reads(equation, 0)[equation.outputs.index(ref)]
        places, ref = moved.reshape(-1)[places], equation.inputs[0]
        if not isinstance(ref, int) or (places < 0).any():  # Not of this operand alone.
            break
        if 0 < avals[ref].size <= most:
            most = avals[ref].size - 1
            positions = jnp.asarray(places, jnp.int32)
            found = Presynaptic(ref, avals[ref].shape, positions)
    return found
