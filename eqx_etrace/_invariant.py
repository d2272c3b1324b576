"""Traces that are the same for all units, found in the jaxpr of the Jacobian.

Where D, L and df of a slot are equal for all units of a sample, as in a linear synapse
or a membrane whose reset is detached, the trace does not depend on the postsynaptic
unit: it is a filtered dy/dw, a vector in place of a matrix. Whether they are equal is
decided here, at compile time: elements get numbers, equal numbers for what is provably
equal, and the equations that make the Jacobian are run on these numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from ._canonicalise import wrapped
from ._custom_types import Labels
from ._errors import CompileError
from ._facts import Flags, GroupFacts
from ._flatten import flatten_unfolded
from ._graph import ETraceGraph
from ._group import HiddenGroup
from ._jacobian import group_jacobian, shared_env
from ._jaxpr import REDUCTIONS, Equation, Origin, Program, literal, live
from ._known import values_made
from ._pieces import find_runs
from ._reads import ALL, NONE, Mixing, Reads
from ._relation import Relation


def with_facts(graph: ETraceGraph) -> ETraceGraph:
    """The graph that knows what its Jacobians are made of, and its relations which of
    their traces are alike for all units. It saves what these need of a step."""
    made = _made(graph)
    wide = dataclasses.replace(graph, saved=tuple(sorted({*graph.saved, *made})))
    facts = tuple(_facts(graph, wide, group) for group in graph.groups)
    relations = []
    for relation in graph.relations:
        use = graph.groups[relation.group].uses.index(relation.y)
        if _gains(relation):
            found = _alike(relation, facts[relation.group].alike, use)
            relation = dataclasses.replace(relation, alike=found)
        if facts[relation.group].per_unit[use]:
            relation = dataclasses.replace(relation, first=_first(relation))
        relations.append(relation)
    saved = {ref for found in facts for ref in found.reads} - set(graph.hidden.old)
    operands = {ref for r in relations for ref in r.values}
    saved |= operands.intersection(graph.saved)
    if graph.exits is not None:
        saved.update(graph.exits.context)
    return dataclasses.replace(
        graph, relations=tuple(relations), facts=facts, saved=tuple(sorted(saved))
    )


def _made(graph: ETraceGraph) -> set[int]:
    """All values of the step that the local programs make."""
    equations = (e for group in graph.groups for e in group.equations)
    made = values_made(equations, graph.program.avals)
    return {ref for ref in made if graph.program.origins[ref] is Origin.DATA}


def _gains(relation: Relation) -> bool:
    smaller = relation.derivative_shape
    return (
        smaller is not None
        and bool(relation.array_slots)
        and math.prod(smaller) < math.prod(relation.op.trace_shape)
        and relation.map.total
    )


def _first(relation: Relation) -> Array | None:
    """For each unit an element of y, where that is less than half of them."""
    positions = np.asarray(relation.units).reshape(-1)
    if positions.size < 2 * relation.map.units:
        return None
    units, elements = np.unique(positions, return_index=True)
    found = np.zeros(relation.map.units, np.int32)
    found[units[units >= 0]] = elements[units >= 0]
    return jnp.asarray(found)


def _alike(relation: Relation, equal: Flags, use: int) -> tuple[bool, ...]:
    """The slots all of whose entries are equal, and those of the slots they read."""
    found = set(relation.array_slots)

    def holds(slot: int) -> bool:
        if slot in relation.reached and not equal.direct[use][slot]:
            return False
        rows = equal.transition[slot], equal.within[slot]
        read = [(s, row[s]) for row in rows for s in relation.slots]
        return all(same and s in found for s, same in read if same is not None)

    while True:
        kept = {slot for slot in found if holds(slot)}
        if kept == found:
            return tuple(slot in kept for slot in relation.slots)
        found = kept


def _facts(graph: ETraceGraph, wide: ETraceGraph, group: HiddenGroup) -> GroupFacts:
    """Read the equations that make the Jacobian of one group; `wide` saves all that
    they make, so that few of these are read."""
    closed, treedef = _entries(graph, group)

    def flags(values: Sequence[bool]) -> Flags:
        found = jtu.tree_unflatten(treedef, values)
        return Flags(found.transition, found.within, found.direct)

    data = (*graph.saved, *graph.hidden.old)
    try:
        program, values = flatten_unfolded(closed, wrapped)
    except CompileError:  # A call that the compiler cannot read: nothing is known.
        no = flags([False] * treedef.num_leaves)
        uses = range(len(group.uses))
        return GroupFacts(
            no, no, data, tuple(uses), ((),) * len(uses), (False,) * len(uses)
        )
    inputs = program.inputs[len(program.inputs) - len(data) :]
    numbers = _Numbers(program, values).run()
    labels = [numbers.operand(ref) for ref in program.outputs]
    same = [bool((found == found[:1]).all()) for found in labels]
    moved = _moved(program, set(inputs))
    fixed = [ref not in moved for ref in program.outputs]
    names = _names(program, values)
    outputs = [names[ref] for ref in program.outputs]
    made = jtu.tree_unflatten(treedef, outputs).direct
    drives = tuple(made.index(row) for row in made)
    drive = jtu.tree_unflatten(treedef, labels).direct
    mine = (r for r in graph.relations if graph.groups[r.group] is group)
    maps = {relation.y: relation.map for relation in mine}
    rows = [
        np.stack([np.asarray(maps[ref].positions()).reshape(-1), *row], axis=1)
        for ref, row in zip(group.uses, drive, strict=True)
    ]
    per_unit = tuple(map(_same_per_unit, rows))
    runs = tuple(find_runs(rows))
    facts = flags(same), flags(fixed), _reads(wide, group), drives
    return GroupFacts(*facts, runs, per_unit)


def _same_per_unit(rows: Labels) -> bool:
    """Of rows (unit, labels), whether the labels are the same where the units are."""
    rows = rows[rows[:, 0] >= 0]
    places = rows[:, 0]
    one = np.zeros((int(places.max(initial=-1)) + 1, rows.shape[1]), rows.dtype)
    one[places] = rows
    return bool((one[places] == rows).all())


def _reads(graph: ETraceGraph, group: HiddenGroup) -> tuple[int, ...]:
    """What of a step the Jacobian of a group reads, where all of it is known."""
    program, _ = flatten_unfolded(_entries(graph, group)[0], wrapped)
    data = (*graph.saved, *graph.hidden.old)
    inputs = program.inputs[len(program.inputs) - len(data) :]
    moved = _moved(program, set(inputs))
    needed = {ref for ref in program.outputs if ref in moved}
    read = {ref for e in live(program.equations, needed) for ref in e.values} | needed
    return tuple(ref for ref, own in zip(data, inputs, strict=True) if own in read)


def _entries(graph: ETraceGraph, group: HiddenGroup) -> tuple[Any, Any]:
    """The equations that make the entries of the Jacobian of one group, and the
    structure of these."""
    avals, hidden = graph.program.avals, graph.hidden
    refs = (graph.weights, graph.prepared, graph.saved)
    specs = [[_spec(avals[ref]) for ref in some] for some in refs]
    old = [_spec(avals[ref]) for ref in hidden.old]
    shapes: list[Any] = []

    def entries(weights: Any, prepared: Any, saved: Any, old: Any) -> list[Any]:
        env = shared_env(graph, weights, prepared)
        env |= dict(zip(graph.saved, saved, strict=True))
        state: list[Any] = [None] * graph.state_leaves.parts.count
        for i, leaf in zip(hidden.leaves, old, strict=True):
            state[i] = leaf
        leaves, treedef = jtu.tree_flatten(group_jacobian(graph, group, env, state))
        shapes.append(treedef)
        return leaves

    closed = jax.make_jaxpr(entries)(*specs, old)
    return closed, shapes[0]


def _moved(program: Program, data: set[int]) -> set[int]:
    """What depends on these values."""
    found = set(data)
    for equation in program.equations:
        if found.intersection(equation.values):
            found.update(equation.outputs)
    return found


def _names(program: Program, values: Sequence[Any]) -> dict[int, int]:
    """A number per value; where they are equal, values are made alike from the same."""
    found: dict[Any, int] = {}

    def name(key: Any) -> int:
        return found.setdefault(key, len(found))

    names = {ref: name(("input", ref)) for ref in program.inputs}
    for ref, value in zip(program.constants, values, strict=True):
        plain = np.asarray(value)
        names[ref] = name((plain.shape, str(plain.dtype), plain.tobytes()))
    for equation in program.equations:
        read = tuple(
            names[ref] if isinstance(ref, int) else repr(literal(ref))
            for ref in equation.inputs
        )
        made = equation.index if equation.effectful else str(dict(equation.params))
        for position, ref in enumerate(equation.outputs):
            names[ref] = name((equation.primitive, made, read, position))
    return names


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


class _Numbers:
    """Numbers the elements of all values of a program: equal numbers, equal elements.

    Only within one value do numbers mean anything; between values they never agree
    unless elements are moved.
    """

    def __init__(self, program: Program, values: Sequence[Any]):
        self.program = program
        self.constants = dict(zip(program.constants, values, strict=True))
        self.reads = Reads(program, self.constants)
        self.fresh: Iterator[int] = itertools.count()
        self.numbers: dict[int, Labels] = {}
        read = {ref for equation in program.equations for ref in equation.values}
        for ref in read.union(program.outputs).intersection(program.inputs):
            self.numbers[ref] = self.distinct(program.avals[ref].size)

    def run(self) -> "_Numbers":
        for equation in self.program.equations:
            for position, ref in enumerate(equation.outputs):
                self.numbers[ref] = self.through(equation, position)
        return self

    def distinct(self, size: int) -> Labels:
        """Numbers that differ, from each other and from all others."""
        first = next(self.fresh)
        self.fresh = itertools.count(first + size)
        return np.arange(first, first + size)

    def of_array(self, value: Any) -> Labels:
        flat = np.asarray(value).reshape(-1)
        if flat.dtype.kind not in "biufc":
            return self.distinct(flat.size)
        return self.renumber(np.unique(flat, return_inverse=True)[1].reshape(-1))

    def renumber(self, labels: Labels) -> Labels:
        count = int(labels.max(initial=-1)) + 1
        return self.distinct(max(count, 1))[labels]

    def operand(self, ref: Any) -> Labels:
        if isinstance(ref, int):
            if ref not in self.numbers:  # Most constants are indices, never read here.
                self.numbers[ref] = self.of_array(self.constants[ref])
            return self.numbers[ref]
        return self.of_array(jnp.asarray(literal(ref)))

    def through(self, equation: Equation, position: int) -> Labels:
        size = self.program.avals[equation.outputs[position]].size
        kind = self.reads.kind(equation)
        # Of a single element, a reduction is that element; see below.
        mixes = kind is Mixing.MIXING and equation.primitive not in REDUCTIONS
        if mixes or not equation.inputs:
            return self.distinct(size)
        read = []
        for k, ref in enumerate(equation.inputs):
            places = self.reads(equation, k)[position]
            if places is ALL or places.shape[0] != 1:
                return self.distinct(size)
            places = places.reshape(-1)
            labels = self.operand(ref)
            if not labels.size:  # Of what is empty nothing is read.
                labels = np.full(1, NONE)
            found = np.where(places == NONE, NONE, labels[places])
            read.append(found)
        if kind is Mixing.STRUCTURAL:  # Each element comes from one operand.
            return np.max(read, axis=0)
        return self.combined(read)

    def combined(self, read: Sequence[Labels]) -> Labels:
        """One number for each combination of numbers at the same place."""
        total = np.zeros(read[0].size, np.int64)
        for labels in read:
            if (labels == labels[:1]).all():
                continue
            _, dense = np.unique(labels, return_inverse=True)
            total = total * (int(dense.max()) + 1) + dense.reshape(-1)
            total = np.unique(total, return_inverse=True)[1].reshape(-1)
        return self.renumber(total)
