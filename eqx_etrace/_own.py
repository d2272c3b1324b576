"""What of a recurrent product stays within a unit: the diagonal of the recurrence.

Local rules cut the hidden state where it enters a product with a weight. Of y = W z
the part y_f <- W_fc z_c, where z_c carries the very unit that y_f feeds, is that unit's
own: the W_ii of a recurrent layer. With `scope="unit"` it is kept in the local program,
as a sparse product beside the cut one, so that no dense Jacobian is needed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ._custom_types import Labels
from ._jaxpr import DOT_GENERAL, Equation, Program, aval_of, bind


@dataclasses.dataclass(frozen=True)
class OwnPairs:
    """Pairs of an element of y and one of z that belong to the same unit, and the
    element of the weight between them; flat indices."""

    y: Labels
    z: Labels
    weight: Labels

    def arrays(self) -> tuple[Int[Array, " pairs"], ...]:
        """The three of them as arrays for the run time."""
        pairs = (self.y, self.z, self.weight)
        return tuple(jnp.asarray(places, jnp.int32) for places in pairs)


def own_pairs(
    program: Program, equation: Equation, k: int, feeds: Labels, carried: Labels
) -> OwnPairs | None:
    """The own pairs of operand k of a product, None for any other equation."""
    if equation.primitive is not DOT_GENERAL:
        return None
    shapes = [aval_of(program.avals, ref).shape for ref in equation.inputs]
    contract, batch = equation.params["dimension_numbers"]
    y, z = _same_unit(feeds, carried)
    free = [
        [a for a in range(len(shapes[i])) if a not in (*contract[i], *batch[i])]
        for i in (0, 1)
    ]
    of_z = np.unravel_index(z, shapes[k])
    of_y = list(np.unravel_index(y, program.avals[equation.outputs[0]].shape))
    lead = len(batch[0])
    left, right = of_y[lead:][: len(free[0])], of_y[lead:][len(free[0]) :]
    of_batch, of_free = of_y[:lead], (left, right)
    fits = np.ones(y.size, bool)
    for axes, places in ((batch[k], of_batch), (free[k], of_free[k])):
        for axis, place in zip(axes, places, strict=True):
            fits &= of_z[axis] == place
    of_weight: list[Any] = [None] * len(shapes[1 - k])
    for axes, places in (
        (batch[1 - k], of_batch),
        (free[1 - k], of_free[1 - k]),
        (contract[1 - k], [of_z[axis] for axis in contract[k]]),
    ):
        for axis, place in zip(axes, places, strict=True):
            of_weight[axis] = place
    weight: Any = 0 * y
    if of_weight:
        weight = np.ravel_multi_index(of_weight, shapes[1 - k])
    return OwnPairs(y[fits], z[fits], weight[fits])


def _same_unit(feeds: Labels, carried: Labels) -> tuple[Labels, Labels]:
    """All pairs of places with the same unit in both arrays."""
    order = np.argsort(carried, kind="stable")
    first = np.searchsorted(carried[order], feeds, side="left")
    count = np.searchsorted(carried[order], feeds, side="right") - first
    count = np.where(feeds >= 0, count, 0)
    y = np.repeat(np.arange(feeds.size), count)
    rank = np.arange(y.size) - np.repeat(np.cumsum(count) - count, count)
    return y, order[np.repeat(first, count) + rank]


def own_product(
    equation: Equation,
    k: int,
    pairs: tuple[Int[Array, " pairs"], ...],
    held: Any | None,
    args: list[Any],
) -> list[Any]:
    """The equation, of which operand k does not move, or is `held` at another value,
    but for its own pairs."""
    y, z, w = pairs
    cut = jax.lax.stop_gradient(args[k] if held is None else held)
    weight = jnp.asarray(args[1 - k]).reshape(-1)[w]
    change = weight * (args[k] - cut).reshape(-1)[z]
    (value,) = bind(equation, [cut if i == k else arg for i, arg in enumerate(args)])
    flat = value.reshape(-1).at[y].add(change.astype(value.dtype))
    return [flat.reshape(value.shape)]
