"""Units, slots and hidden groups, by label propagation.

A unit is one neuron: a connected component of hidden elements. Every hidden element
starts with its own number as label; the labels are sent through the equations of the
step, and two elements are joined where

1. an elementwise equation combines them,
2. a mixing equation without weights contracts them (a fixed coupling of compartments),
3. they are the same element of the old and of the new state,
4. the same element of what a weight adds to the step drives them, elementwise.

A mixing equation with a weight never joins: that is the recurrence that local rules
cut. Nor does a sum of a weight's products with elements that were broadcast or gathered
to meet it, as over the edges of a sparse network: that is the same in two equations.
Where a component grows beyond `max_slots`, the joins of kinds 2 and 4 in it are
undone one equation at a time, the widest first; if it is still too large, only elements
at the same index stay joined. What is not joined is cut later, and reported.

The s-th element of a unit is its slot s; the units with the same slots are a group.
"""

import dataclasses

import numpy as np

from ._custom_types import Labels
from ._errors import CompileError
from ._hidden import Hidden, multiplies, weighted
from ._jaxpr import SCATTER_ADD, Equation, Origin, Program
from ._reads import ALL, NONE, SEVERAL, Mixing, Reads, pull


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


def _leading_to_doors(
    program: Program, hidden: Hidden, reads: Reads
) -> tuple[Equation, ...]:
    """The equations whose results reach the new state unmixed with a weight.

    What only leads to outputs, or into the product of a later layer, joins no units.
    """
    needed, found = set(hidden.doors), []
    for equation in reversed(program.equations):
        wanted = (r for r in equation.outputs if r in needed)
        data = any(program.origins[ref] is Origin.DATA for ref in wanted)
        if data and equation.differentiable:
            found.append(equation)
            mixing = reads.kind(equation) is Mixing.MIXING
            if not (mixing and multiplies(program, equation)):
                read = (r for r in equation.values if program.avals[r].inexact)
                needed.update(read)
    return tuple(found[::-1])


class _Walk:
    """Sends labels forward through a program; subclasses say what happens to them."""

    def __init__(self, program: Program, hidden: Hidden, reads: Reads):
        self.program, self.hidden, self.reads = program, hidden, reads
        self.equations = _leading_to_doors(program, hidden, reads)
        offsets = hidden.offsets
        self.spans = {
            ref: slice(offsets[i], offsets[i + 1])
            for refs in (hidden.old, hidden.doors)
            for i, ref in enumerate(refs)
        }

    def combine(self, equation: Equation, rows: Labels, mixing: bool) -> Labels:
        """One label for all that an output element reads, down each column."""
        raise NotImplementedError

    def begin(self, equation: Equation, ref: int) -> Labels | None:
        """Labels of an output that reads no label."""
        del equation, ref

    def at_door(self, ref: int, labels: Labels | None, own: slice) -> Labels | None:
        """Labels of a new state leaf."""
        del ref, own
        return labels

    def run(self, seeds: dict[int, Labels]) -> dict[int, Labels]:
        labels = dict(seeds)
        for equation in self.equations:
            found = self.through(equation, labels)
            for ref, mine in zip(equation.outputs, found, strict=True):
                if ref in self.hidden.doors:
                    mine = self.at_door(ref, mine, self.spans[ref])
                if mine is not None:
                    labels[ref] = mine
        return labels

    def through(
        self, equation: Equation, labels: dict[int, Labels]
    ) -> list[Labels | None]:
        labelled = [k for k, ref in equation.operands if ref in labels]
        product = weighted(self.program, equation)
        mixing = self.reads.kind(equation) is Mixing.MIXING
        found: list[Labels | None] = []
        for position, ref in enumerate(equation.outputs):
            mine = None
            if self.program.avals[ref].inexact:
                if labelled and not (mixing and multiplies(self.program, equation)):
                    mine = self.gather(equation, position, labelled, labels, mixing)
                if mine is None and product:
                    mine = self.begin(equation, ref)
            found.append(mine)
        return found

    def gather(
        self,
        equation: Equation,
        position: int,
        labelled: list[int],
        labels: dict[int, Labels],
        mixing: bool,
    ) -> Labels | None:
        arrays = [self.reads(equation, k)[position] for k in labelled]
        if any(array is ALL for array in arrays):
            return None
        rows = [
            pull(labels[equation.inputs[k]], array)
            for k, array in zip(labelled, arrays, strict=True)
        ]
        combined = self.combine(equation, np.concatenate(rows), mixing)
        return combined if (combined != NONE).any() else None


def _first(rows: Labels) -> Labels:
    """Down each column, the first label that is one."""
    pick = np.argmax(rows != NONE, axis=0)
    return np.take_along_axis(rows, pick[None], axis=0)[0]


class _Joins(_Walk):
    """One attempt: the pairs of hidden elements that are one unit's.

    What a weight adds to the step has labels of its own, beyond those of the hidden
    elements: two state variables that one such value drives are one unit's, too.
    """

    def __init__(
        self,
        program: Program,
        hidden: Hidden,
        reads: Reads,
        max_slots: int,
        undone: frozenset[int],
        by_index: bool,
    ):
        super().__init__(program, hidden, reads)
        self.max_slots, self.undone, self.by_index = max_slots, undone, by_index
        sizes = np.diff(hidden.offsets)
        self.count = int(hidden.offsets[-1])
        self.size = self.count
        self.place = np.concatenate([np.arange(n) for n in sizes])
        """Per hidden element, its index in its leaf."""
        shapes = list(dict.fromkeys(hidden.shapes))
        alike = [shapes.index(shape) for shape in hidden.shapes]
        self.key = self.place + self.count * np.repeat(alike, sizes)
        """The same for elements at the same index of leaves of the same shape."""
        self.pairs: list[Labels] = [np.zeros((2, 0), int)]
        self.joined: dict[int, tuple[int, Labels]] = {}
        """Per equation whose joins can be undone: how wide it joins, some labels."""
        self.repeated: set[int] = set()
        """The values where a weight has met elements that were repeated for it."""

    def through(
        self, equation: Equation, labels: dict[int, Labels]
    ) -> list[Labels | None]:
        """As above; but where a weight meets elements that were repeated for it and the
        results are summed, the two equations are one product that mixes, and no joins
        are made."""
        mine = {ref: labels[ref] for ref in equation.values if ref in labels}
        if self.reads.kind(equation) is Mixing.MIXING:
            mine = {r: found for r, found in mine.items() if r not in self.repeated}
        elif self.repeated.intersection(mine) or (
            weighted(self.program, equation)
            and self.reads.kind(equation) is Mixing.ELEMENTWISE
            and any(self.is_repeated(found, equation) for found in mine.values())
        ):
            self.repeated.update(equation.outputs)
        return super().through(equation, mine)

    def is_repeated(self, labels: Labels, equation: Equation) -> bool:
        """Whether an elementwise equation reads some hidden element more than once."""
        hidden = labels[(labels != NONE) & (labels < self.count)]
        if not hidden.size:
            return False
        sizes = {self.program.avals[ref].size for ref in equation.outputs}
        return sizes != {labels.size} or np.unique(hidden).size < hidden.size

    def begin(self, equation: Equation, ref: int) -> Labels | None:
        if self.by_index or equation.index in self.undone:
            return None
        first, self.size = self.size, self.size + self.program.avals[ref].size
        labels = np.arange(first, self.size)
        self.joined[equation.index] = (1, labels)
        return labels

    def at_door(self, ref: int, labels: Labels | None, own: slice) -> Labels:
        mine = np.arange(own.start, own.stop)
        self.repeated.discard(ref)
        if labels is not None:
            self.join(mine, labels)
        return mine

    def combine(self, equation: Equation, rows: Labels, mixing: bool) -> Labels:
        if mixing:
            hidden = np.where(rows < self.count, rows, NONE)
            width = int((hidden != NONE).sum(axis=0).max())
            if width > self.max_slots or equation.index in self.undone:
                return np.full(rows.shape[1], NONE)
            self.joined[equation.index] = (width, _first(hidden))
            if equation.primitive is not SCATTER_ADD:  # which only sends them on
                alone = (rows != NONE).sum(axis=0) == 1
                rows = np.where(alone, rows, hidden)
        chosen = self.choose(rows)
        for row in rows:
            self.join(chosen, row)
        return chosen

    def choose(self, rows: Labels) -> Labels:
        """The label that goes on: a hidden element's, for a sum joins only these; that
        of the same index, where only this one joins."""
        hidden = _first(np.where(rows < self.count, rows, NONE))
        chosen = np.where(hidden == NONE, _first(rows), hidden)
        if not self.by_index:
            return chosen
        same = (rows != NONE) & (self.place[rows] == np.arange(rows.shape[1]))
        own = np.take_along_axis(rows, np.argmax(same, axis=0)[None], axis=0)[0]
        return np.where(same.any(axis=0), own, chosen)

    def join(self, one: Labels, other: Labels) -> None:
        differ = (one != NONE) & (other != NONE) & (one != other)
        if self.by_index:
            differ &= self.key[one] == self.key[other]
        if differ.any():
            self.pairs.append(np.stack([one[differ], other[differ]]))

    def components(self) -> Labels:
        """Per hidden element, its component."""
        # Here, because it takes as long to import as a third of JAX.
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        offsets = self.hidden.offsets
        old = self.hidden.old
        self.run({r: np.arange(offsets[i], offsets[i + 1]) for i, r in enumerate(old)})
        one, other = np.concatenate(self.pairs, axis=1)
        shape = (self.size, self.size)
        matrix = coo_matrix((np.ones(one.size, bool), (one, other)), shape=shape)
        self.labels = connected_components(matrix, directed=False)[1]
        return self.labels[: self.count]

    def widest(self, large: Labels) -> int | None:
        """The equation that joins most within components that are too large."""
        drives = np.bincount(np.concatenate(self.pairs, axis=1).reshape(-1))
        drives = np.pad(drives, (0, self.size - drives.size))
        widths = {}
        for index, (width, labels) in self.joined.items():
            labels = labels[labels != NONE]
            if large[self.labels[labels]].any():
                own = labels.min() >= self.count
                widths[index] = int(drives[labels].max()) if own else width
        return max(widths, key=lambda index: widths[index], default=None)


def _components(
    program: Program, hidden: Hidden, reads: Reads, max_slots: int
) -> Labels:
    undone, by_index = frozenset(), False
    while True:
        joins = _Joins(program, hidden, reads, max_slots, undone, by_index)
        component = joins.components()
        sizes = np.bincount(component, minlength=int(joins.labels.max()) + 1)
        if sizes.max() <= max_slots:
            return component
        widest = joins.widest(sizes > max_slots)
        if widest is not None:
            undone |= {widest}
        elif not by_index:
            by_index = True
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
    offsets = hidden.offsets
    seeds = {ref: unit[offsets[i] : offsets[i + 1]] for i, ref in enumerate(hidden.old)}
    carried = _Carried(program, hidden, reads).run(seeds)
    return Units(unit, slot, group, position, tuple(elements), carried)


class _Carried(_Walk):
    """Labels are units here: whose old state a value carries, NONE or SEVERAL."""

    def combine(self, equation: Equation, rows: Labels, mixing: bool) -> Labels:
        del equation, mixing
        chosen = _first(rows)
        several = ((rows != NONE) & (rows != chosen)).any(axis=0)
        return np.where(several, SEVERAL, chosen)
