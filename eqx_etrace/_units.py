"""Units, slots and hidden groups, by label propagation.

A unit is one neuron: a connected component of hidden elements. Every hidden element
starts with its own number as label; the labels are sent through the equations of the
step, and two elements are joined where

1. an elementwise equation combines them,
2. a mixing equation without weights contracts them (a fixed coupling of compartments),
3. they are the same element of the old and of the new state.

A mixing equation with a weight never joins: that is the recurrence that local rules
cut. Where a component grows beyond `max_slots`, the joins of kind 2 in it are undone
one equation at a time, the widest first; if it is still too large, only elements at the
same index stay joined. What is not joined is cut later, and reported.

The s-th element of a unit is its slot s; the units with the same slots are a group.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ._custom_types import Labels
from ._errors import CompileError
from ._jaxpr import Equation, Origin, Program
from ._reads import ALL, NONE, SEVERAL, Mixing, Reads, pull


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


@dataclasses.dataclass(frozen=True)
class Units:
    """The unit, group and slot of every hidden element, and where each value's comes
    from."""

    unit: Labels
    """Per hidden element, the number of its unit."""
    slot: Labels
    """Per hidden element, its slot in the unit."""
    group: Labels
    """Per unit, its group."""
    position: Labels
    """Per unit, its position in the group."""
    elements: tuple[Labels, ...]
    """Per group, the hidden elements as (units, slots)."""
    carried: dict[int, Labels]
    """Per value, the unit whose old state each element carries, NONE or SEVERAL."""


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


Combine = Callable[[Equation, int, Labels], Labels]


def _propagate(
    program: Program, seeds: dict[int, Labels], reads: Reads, combine: Combine
) -> dict[int, Labels]:
    """Send labels forward; `combine` makes one label of all that an element reads."""
    labels = dict(seeds)
    for equation in program.equations:
        labelled = [k for k, ref in equation.operands if ref in labels]
        mixing = reads.kind(equation) is Mixing.MIXING if labelled else False
        if not labelled or not equation.differentiable:
            continue
        if mixing and weighted(program, equation):
            continue
        for position, ref in enumerate(equation.outputs):
            if not program.avals[ref].inexact:
                continue
            arrays = [reads(equation, k)[position] for k in labelled]
            if any(array is ALL for array in arrays):
                continue
            rows = [
                pull(labels[equation.inputs[k]], array)
                for k, array in zip(labelled, arrays, strict=True)
            ]
            stacked = np.concatenate(rows)
            if (stacked != NONE).any():
                labels[ref] = combine(equation, ref, stacked)
    return labels


def _first(rows: Labels) -> Labels:
    """Down each column, the first label that is one."""
    pick = np.argmax(rows != NONE, axis=0)
    return np.take_along_axis(rows, pick[None], axis=0)[0]


class _Joins:
    """One attempt: the pairs of hidden elements that are one unit's."""

    def __init__(self, hidden: Hidden, max_slots: int):
        self.max_slots = max_slots
        self.undone: set[int] = set()
        self.by_index = False
        offsets = hidden.offsets
        self.count = int(offsets[-1])
        sizes = np.diff(offsets)
        self.index = np.concatenate([np.arange(n) for n in sizes] or [np.zeros(0, int)])
        self.pairs: list[Labels] = []
        self.widths: dict[int, int] = {}
        self.touched: dict[int, Labels] = {}

    def combine(self, equation: Equation, ref: int, rows: Labels, mixing: bool):
        if mixing:
            width = int((rows != NONE).sum(axis=0).max())
            if width > self.max_slots or equation.index in self.undone:
                return np.full(rows.shape[1], NONE, np.int32)
            self.widths[equation.index] = width
        chosen = _first(rows)
        if self.by_index:
            here = np.arange(rows.shape[1])
            same = (rows != NONE) & (self.index[rows] == here)
            own = np.take_along_axis(rows, np.argmax(same, axis=0)[None], axis=0)[0]
            chosen = np.where(same.any(axis=0), own, chosen)
        for row in rows:
            differ = (row != NONE) & (row != chosen)
            if differ.any():
                pairs = np.stack([chosen[differ], row[differ]])
                self.pairs.append(pairs)
                if mixing:
                    self.touched[equation.index] = pairs[0]
        return chosen

    def components(self, extra: list[Labels]) -> Labels:
        # Here, because it takes as long to import as a third of JAX.
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = [*self.pairs]
        if self.by_index:
            pairs = [p[:, self.index[p[0]] == self.index[p[1]]] for p in pairs]
        pairs = np.concatenate([np.zeros((2, 0), int), *pairs, *extra], axis=1)
        matrix = coo_matrix(
            (np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])),
            shape=(self.count, self.count),
        )
        return connected_components(matrix, directed=False)[1]


def _attempt(program: Program, hidden: Hidden, reads: Reads, joins: _Joins) -> Labels:
    """Component of each hidden element under the joins that are still allowed."""
    joins.pairs, joins.widths, joins.touched = [], {}, {}
    offsets = hidden.offsets
    seeds = {
        ref: np.arange(offsets[i], offsets[i + 1], dtype=np.int32)
        for i, ref in enumerate(hidden.old)
    }

    def combine(equation: Equation, ref: int, rows: Labels) -> Labels:
        mixing = reads.kind(equation) is Mixing.MIXING
        return joins.combine(equation, ref, rows, mixing)

    labels = _propagate(program, seeds, reads, combine)
    extra = []
    for i, ref in enumerate(hidden.doors):
        own = np.arange(offsets[i], offsets[i + 1])
        found = labels.get(ref, np.full(own.size, NONE))
        pair = np.stack([found, own])[:, found != NONE]
        if joins.by_index:
            pair = pair[:, joins.index[pair[0]] == joins.index[pair[1]]]
        extra.append(pair)
    return joins.components(extra)


def _components(
    program: Program, hidden: Hidden, reads: Reads, max_slots: int
) -> Labels:
    joins = _Joins(hidden, max_slots)
    while True:
        component = _attempt(program, hidden, reads, joins)
        sizes = np.bincount(component, minlength=1)
        if sizes.max() <= max_slots:
            return component
        large = {
            index: joins.widths[index]
            for index, elements in joins.touched.items()
            if (sizes[component[elements]] > max_slots).any()
        }
        if large:
            joins.undone.add(max(large, key=lambda index: large[index]))
        elif not joins.by_index:
            joins.by_index = True
        else:
            raise CompileError(
                f"A unit has {sizes.max()} state variables: got max_slots={max_slots}, "
                f"expected at least {sizes.max()}. Pass `max_slots={sizes.max()}` to "
                "compile, or split the state."
            )


def find_units(program: Program, hidden: Hidden, reads: Reads, max_slots: int) -> Units:
    """Units, slots and groups of the hidden elements of a program."""
    component = _components(program, hidden, reads, max_slots)
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    unit = np.argsort(np.argsort(first))[component]
    order = np.lexsort((np.arange(unit.size), unit))
    counts = np.bincount(unit)
    starts = np.cumsum(counts) - counts
    slot = np.empty_like(unit)
    slot[order] = np.arange(unit.size) - np.repeat(starts, counts)
    leaf = np.repeat(np.arange(len(hidden.shapes)), np.diff(hidden.offsets))
    signature = np.full((counts.size, int(counts.max())), NONE)
    signature[unit, slot] = leaf
    _, first, group = np.unique(
        signature, axis=0, return_index=True, return_inverse=True
    )
    group = np.argsort(np.argsort(first))[group.reshape(-1)]
    position = np.empty_like(group)
    elements = []
    for number in range(int(group.max()) + 1):
        members = np.flatnonzero(group == number)
        position[members] = np.arange(members.size)
        table = np.empty((members.size, counts[members[0]]), np.int64)
        mine = group[unit] == number
        table[position[unit[mine]], slot[mine]] = np.flatnonzero(mine)
        elements.append(table)
    carried = _carried(program, hidden, reads, unit)
    return Units(unit, slot, group, position, tuple(elements), carried)


def _carried(
    program: Program, hidden: Hidden, reads: Reads, unit: Labels
) -> dict[int, Labels]:
    def combine(equation: Equation, ref: int, rows: Labels) -> Labels:
        del equation, ref
        chosen = _first(rows)
        several = ((rows != NONE) & (rows != chosen)).any(axis=0)
        return np.where(several, SEVERAL, chosen)

    offsets = hidden.offsets
    seeds = {
        ref: unit[offsets[i] : offsets[i + 1]].astype(np.int32)
        for i, ref in enumerate(hidden.old)
    }
    return _propagate(program, seeds, reads, combine)
