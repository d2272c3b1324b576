"""The local program at compile time: what is cut, and who feeds whom.

Unit labels are sent backward from the new state. An element of an operand is *cut*
(read through a stop_gradient in the local program) where

- the elements that read it feed several units (the mean of a layer, a recurrent
  product), or
- it carries the old state of another unit than the one it feeds (if what a weight adds
  in this step has been added to that state: at the addition), or
- it carries any old state and the equation mixes with a weight.

What is left sends every value to one unit only, so one reverse pass with ones on a slot
gives that slot's row of all units at once. Along with the labels go bits: which slots
of its unit an element feeds. They tell which derivatives are structurally zero.

With `scope="unit"` what a product keeps within units is not lost with the cut (`_own`).

`bypass_of_use` and `bypass_of_state` then check whether the new state is the only way
out (single-step) or some path bypasses it (multi-step).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from ._custom_types import Labels, Scope
from ._hidden import Hidden, multiplies, weighted
from ._jaxpr import SCAN, Equation, Origin, Program, is_elementwise
from ._loop import Loop
from ._own import OwnPairs, own_pairs
from ._reads import (
    NONE,
    SEVERAL,
    Mixing,
    Reads,
    any_read,
    merge,
    push,
    push_bits,
)
from ._units import Units


Edge = tuple[int, int]
"""An equation's index and the position of one of its operands."""


@dataclasses.dataclass(frozen=True)
class Locality:
    """What the backward pass over one program finds."""

    feeds: dict[int, Labels]
    """Per value, the unit that each element feeds locally, NONE or SEVERAL."""
    bits: dict[int, Labels]
    """Per value, the slots that each element feeds by those who read it, as bits; no
    further than to the next door."""
    seeds: dict[int, Labels]
    """Per door, the slot that each element is, as a bit."""
    cuts: dict[Edge, Labels]
    """Per edge, the elements of the operand that are cut."""
    own: dict[Edge, OwnPairs]
    """Per cut edge, what of the product stays within units; for `scope="unit"`."""
    loops: dict[int, Loop]
    """Per equation that is a loop with cuts inside of it, its local form."""
    scope: Scope

    @property
    def closed(self) -> dict[Edge, Labels]:
        """The cuts of the edges that nothing passes in the local program."""
        return {edge: cut for edge, cut in self.cuts.items() if edge not in self.own}


def find_fresh(program: Program, reads: Reads) -> dict[int, Labels]:
    """Per value, which elements hold what a weight adds in this very step."""
    fresh: dict[int, Labels] = {}
    for equation in program.equations:
        outputs = [r for r in equation.outputs if program.origins[r] is Origin.DATA]
        if not (equation.differentiable and outputs):
            continue
        if weighted(program, equation):
            for ref in outputs:
                fresh[ref] = np.ones(program.avals[ref].size, bool)
            continue
        for k, ref in equation.operands:
            if ref not in fresh:
                continue
            arrays = zip(equation.outputs, reads(equation, k), strict=True)
            for out, array in arrays:
                found = any_read(fresh[ref], array, program.avals[out].size)
                fresh[out] = fresh.get(out, False) | found
    return fresh


Arrival = tuple[Edge, Labels, Labels]
"""At an operand: the edge, the units its elements feed there, the slots as bits."""


class _Backward:
    def __init__(
        self, program: Program, hidden: Hidden, units: Units, reads: Reads, scope: Scope
    ):
        self.program, self.units, self.reads = program, units, reads
        self.scope: Scope = scope
        self.avals = program.avals
        self.fresh = find_fresh(program, reads)
        self.own: dict[Edge, OwnPairs] = {}
        self.loops: dict[int, Loop] = {}
        self.feeds: dict[int, Labels] = {}
        self.bits: dict[int, Labels] = {}
        self.cuts: dict[Edge, Labels] = {}
        self.seeds: dict[int, Labels] = {}
        self.arrivals: dict[int, list[Arrival]] = {}
        offsets = hidden.offsets
        for i, ref in enumerate(hidden.doors):
            own = slice(offsets[i], offsets[i + 1])
            self.feeds[ref] = units.unit[own].astype(np.int32)
            self.seeds[ref] = np.left_shift(np.int64(1), units.slot[own])

    def run(self) -> Locality:
        for equation in reversed(self.program.equations):
            if equation.differentiable:
                outputs = [self.resolve(ref) for ref in equation.outputs]
                if any(found is not None for found in outputs):
                    self.through(equation, outputs)
        for ref in list(self.arrivals):
            self.resolve(ref)
        found = (self.feeds, self.bits, self.seeds, self.cuts, self.own, self.loops)
        return Locality(*found, self.scope)

    def resolve(self, ref: int) -> tuple[Labels, Labels] | None:
        """Labels and bits of a value whose readers are all known.

        A door passes on its own slot only: what reads the new state is accounted for
        by the derivatives with respect to the door itself."""
        arrivals = self.arrivals.pop(ref, [])
        for edge, target, bits in self.settle(ref, arrivals):
            del edge
            self.feeds[ref] = merge(self.feeds.get(ref), target)
            self.bits[ref] = self.bits.get(ref, 0) | bits
        labels = self.feeds.get(ref)
        if labels is None or not self.program.avals[ref].inexact:
            return None
        bits = self.bits.setdefault(ref, np.zeros(labels.size, np.int64))
        return labels, self.seeds.get(ref, bits)

    def settle(self, ref: int, arrivals: list[Arrival]) -> list[Arrival]:
        """Cut the edges by which a unit's state would reach another unit.

        Where the value also holds what a weight adds in this step, and its own unit
        does not read it, nothing is cut here: the label goes on, to be cut where the
        state comes in, so that the weight keeps its path."""
        carried = self.feeds[ref] if ref in self.seeds else self.units.carried.get(ref)
        if carried is None:
            return arrivals
        fresh = self.fresh.get(ref, np.zeros(carried.size, bool))
        passes = fresh if ref not in self.seeds else np.zeros(carried.size, bool)
        for _, target, _ in arrivals:
            passes = passes & (target != carried)
        settled = []
        for edge, target, bits in arrivals:
            cut = (carried >= 0) & (target >= 0) & (carried != target) & ~passes
            settled.append(self.cut(edge, cut, target, bits))
        return settled

    def cut(self, edge: Edge, cut: Labels, target: Labels, bits: Labels) -> Arrival:
        if cut.any():
            self.cuts[edge] = self.cuts.get(edge, False) | cut
            target, bits = np.where(cut, NONE, target), np.where(cut, 0, bits)
        return edge, target, bits

    def through(self, equation: Equation, outputs: list) -> None:
        mixing = self.reads.kind(equation) is Mixing.MIXING
        product = mixing and multiplies(self.program, equation)
        for k, ref in equation.operands:
            # No unit's state passes through a weight, and weights are large.
            data = self.program.origins[ref] is Origin.DATA
            if not (data and self.program.avals[ref].inexact):
                continue
            size = self.program.avals[ref].size
            target: Labels | None = None
            bits = np.zeros(size, np.int64)
            arrays = self.reads(equation, k)
            for found, array in zip(outputs, arrays, strict=True):
                if found is None:
                    continue
                target = merge(target, push(found[0], array, size))
                bits |= push_bits(found[1], array, size)
            if target is not None:
                self.note_loop(equation, k, size)
                self.arrive((equation.index, k), ref, target, bits, product)
            if target is not None and product and self.scope == "unit":
                self.keep_own(equation, k, ref, outputs[0])

    def note_loop(self, equation: Equation, k: int, size: int) -> None:
        """A loop with cuts inside is cut at its edges in no element, but met."""
        if equation.primitive is SCAN and not is_elementwise(equation, self.avals):
            loop = self.reads.loop(equation)
            if loop.cuts:
                self.loops[equation.index] = loop
                self.cuts.setdefault((equation.index, k), np.zeros(size, bool))

    def arrive(
        self, edge: Edge, ref: int, target: Labels, bits: Labels, product: bool
    ) -> None:
        carried = self.units.carried.get(ref)
        cut = target == SEVERAL
        if carried is not None and product:
            cut |= (carried != NONE) & (target != NONE)
        arrival = self.cut(edge, cut, target, bits)
        self.arrivals.setdefault(ref, []).append(arrival)

    def keep_own(self, equation: Equation, k: int, ref: int, found: Any) -> None:
        """The part of a product with a weight that stays within units."""
        carried = self.units.carried.get(ref)
        if carried is None or found is None or (equation.index, k) not in self.cuts:
            return
        pairs = own_pairs(self.program, equation, k, found[0], carried)
        if pairs is None or not pairs.y.size:
            return
        self.own[equation.index, k] = pairs
        target, bits = np.full(carried.size, NONE), np.zeros(carried.size, np.int64)
        target[pairs.z] = carried[pairs.z]
        np.bitwise_or.at(bits, pairs.z, found[1][pairs.y])
        self.arrivals[ref].append(((equation.index, k), target, bits))


def find_locality(
    program: Program, hidden: Hidden, units: Units, reads: Reads, scope: Scope
) -> Locality:
    """Send unit labels backward from the new state; see the head of this file."""
    return _Backward(program, hidden, units, reads, scope).run()


def slot_matrix(
    sources: Iterable[tuple[Labels | None, Labels]], slots: int
) -> tuple[tuple[bool, ...], ...]:
    """`matrix[s'][s]`: whether slot s of some unit feeds slot s', from pairs of (bits,
    slot numbers) of a group's elements."""
    matrix = np.zeros((slots, slots), bool)
    for bits, slot in sources:
        if bits is None:
            continue
        for s in range(slots):
            union = np.bitwise_or.reduce(bits[slot == s], initial=0)
            matrix[:, s] |= [(int(union) >> t) & 1 == 1 for t in range(slots)]
    return tuple(tuple(bool(entry) for entry in row) for row in matrix)


def flow(
    program: Program,
    start: Iterable[int],
    *,
    blocked: frozenset[int] = frozenset(),
    cuts: dict[Edge, Labels] | None = None,
) -> tuple[set[int], list[Edge]]:
    """Values that a derivative reaches from `start`, and the cut edges it met.

    A blocked value is reached but not left. With `cuts`, an edge whose operand is cut
    in whole is not passed; without, every edge is.
    """
    reached, met = set(start), []
    for equation in program.equations:
        if not equation.differentiable:
            continue
        arrives = False
        for k, ref in equation.operands:
            if ref not in reached or ref in blocked:
                continue
            cut = cuts.get((equation.index, k)) if cuts is not None else None
            if cut is not None:
                met.append((equation.index, k))
            arrives |= cut is None or not cut.all()
        if arrives:
            reached.update(
                ref for ref in equation.outputs if program.avals[ref].inexact
            )
    return reached, met


def bypass_of_use(
    program: Program,
    locality: Locality,
    use: int,
    own_doors: frozenset[int],
    doors: frozenset[int],
) -> Equation | int | None:
    """How a related value gets past its unit's new state: by an output's number, by
    the equation that moves other units with it, or (None) not at all."""
    outputs = set(program.outputs) - doors
    local, met = flow(program, [use], blocked=own_doors, cuts=locality.cuts)
    for ref in program.outputs:
        if ref in outputs and ref in local:
            return ref
    if any(ref in local for ref in doors - own_doors):
        return next(ref for ref in doors - own_doors if ref in local)
    for index, _ in met:
        equation = program.equations[index]
        foreign, _ = flow(program, equation.outputs)
        if foreign & (outputs | doors):
            return equation
    return None


def bypass_of_state(
    program: Program,
    old: Iterable[int],
    own_doors: frozenset[int],
    doors: frozenset[int],
) -> int | None:
    """The output, or other group's new state, that the old state reaches directly."""
    reached, _ = flow(program, old, blocked=own_doors)
    wanted = (set(program.outputs) | doors) - own_doors
    return next((ref for ref in program.outputs if ref in reached & wanted), None)


def several_hops(
    program: Program, locality: Locality, old: Iterable[int], doors: frozenset[int]
) -> Equation | None:
    """An equation past which the true diagonal block of a group is not the sum of what
    the local program and its own products keep: None if one product is all there is
    between the old state and the new."""
    for index, k in flow(program, old, cuts=locality.cuts)[1]:
        equation = program.equations[index]
        beyond, met = flow(program, equation.outputs, cuts=locality.cuts)
        full, _ = flow(program, equation.outputs)
        if not full & doors:
            continue
        if (index, k) not in locality.own:
            return equation
        for other, _ in met:
            leads, _ = flow(program, program.equations[other].outputs)
            if leads & doors:
                return program.equations[other]
    return None
