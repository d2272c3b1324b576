"""Which state leaves are hidden, and which equations carry credit.

A hidden leaf is an inexact state leaf that a weight influences, now or at a later step:
a fixpoint over the step. The rest (counters, keys, filters of the input) is carried
along.
"""

import dataclasses

import numpy as np

from ._custom_types import Labels
from ._jaxpr import SCATTER_ADD, Equation, Origin, Program


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The hidden leaves: where each enters and leaves the program."""

    leaves: tuple[int, ...]
    """Positions among the state leaves."""
    old: tuple[int, ...]
    doors: tuple[int, ...]
    """The values of the new state: the doors that single-step credit goes through."""
    shapes: tuple[tuple[int, ...], ...]

    @property
    def offsets(self) -> Labels:
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]
        return np.cumsum([0, *sizes])


def find_hidden(
    program: Program, old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...]:
    """Positions of the inexact state leaves that a weight influences, now or later."""
    weights = {r for r, o in enumerate(program.origins) if o is Origin.WEIGHT}
    hidden: tuple[int, ...] = ()
    while True:
        influenced = influence(program, weights | {old[i] for i in hidden})
        found = tuple(i for i, ref in enumerate(new) if ref in influenced)
        if found == hidden:
            return hidden
        hidden = found


def influence(program: Program, sources: set[int]) -> set[int]:
    """The inexact values that a derivative can reach from the sources."""
    reached = set(sources)
    for equation in program.equations:
        if equation.differentiable and reached.intersection(equation.values):
            reached.update(
                ref for ref in equation.outputs if program.avals[ref].inexact
            )
    return reached


def weighted(program: Program, equation: Equation) -> bool:
    """Whether a trainable weight is among what the equation reads."""
    return any(program.origins[ref] is Origin.WEIGHT for ref in equation.values)


def multiplies(program: Program, equation: Equation) -> bool:
    """Whether, if it mixes, it mixes with a weight; `state.at[...].add(weight)` leaves
    every element of the state where it is."""
    return weighted(program, equation) and equation.primitive is not SCATTER_ADD


def credit_equations(program: Program, hidden: tuple[int, ...]) -> list[Equation]:
    """The equations with data that a derivative by a weight, or by one of the old
    hidden values, passes through."""
    weights = {r for r, o in enumerate(program.origins) if o is Origin.WEIGHT}
    reached = influence(program, weights | set(hidden))
    return [
        equation
        for equation in program.equations
        if equation.differentiable
        and reached.intersection(equation.values)
        and any(program.origins[ref] is Origin.DATA for ref in equation.outputs)
    ]


def params_of(program: Program, count: int) -> dict[int, frozenset[int]]:
    """Per weight, the params that a derivative of it can reach."""
    found = {ref: frozenset([i]) for i, ref in enumerate(program.inputs[:count])}
    for equation in program.equations:
        sources = frozenset().union(*(found.get(r, ()) for r in equation.values))
        for ref in equation.outputs:
            if program.origins[ref] is Origin.WEIGHT:
                found[ref] = sources
    return found
