"""From what the compiler found to a `HiddenGroup`: the local program of its units."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._errors import CompileError
from ._group import HiddenGroup
from ._hidden import Hidden
from ._jaxpr import Equation, Program
from ._locality import Edge, Locality, flow, several_hops, slot_matrix
from ._units import Units


def local_equations(
    program: Program,
    start: Sequence[int],
    doors: Sequence[int],
    cuts: Mapping[Edge, Any],
) -> tuple[Equation, ...]:
    """The equations through which `start` acts on `doors`, uncut edges only."""
    local, _ = flow(program, start, cuts=dict(cuts))
    needed, kept = set(doors), []
    for equation in reversed(program.equations):
        if not needed.intersection(equation.outputs):
            continue
        through = {
            ref
            for k, ref in equation.operands
            if ref in local and not _whole(cuts.get((equation.index, k)))
        }
        if through and equation.differentiable:
            kept.append(equation)
            needed |= through
    return tuple(kept[::-1])


def _whole(cut: Any) -> bool:
    return cut is not None and bool(cut.all())


def make_group(
    program: Program,
    hidden: Hidden,
    units: Units,
    locality: Locality,
    number: int,
    uses: Sequence[int],
    paths: Sequence[str],
    leak: float | None,
) -> HiddenGroup:
    """Build group `number` with the uses related to it; see `LocalRule.leak`."""
    table = units.elements[number]
    offsets = hidden.offsets
    leaf_of = np.searchsorted(offsets, table[0], side="right") - 1
    index, matrices = [], {"old": [], "doors": []}
    for slot, leaf in enumerate(leaf_of):
        places = table[:, slot] - offsets[leaf]
        whole = np.array_equal(places, np.arange(offsets[leaf + 1] - offsets[leaf]))
        index.append(None if whole else jnp.asarray(places, jnp.int32))
        for name, refs in (("old", hidden.old), ("doors", hidden.doors)):
            bits = locality.bits.get(refs[leaf])
            mine = None if bits is None else bits[places]
            matrices[name].append((mine, np.full(places.size, slot)))
    own = tuple(sorted({int(leaf) for leaf in leaf_of}))
    old = tuple(hidden.old[leaf] for leaf in own)
    doors = tuple(hidden.doors[leaf] for leaf in own)
    start = [*old, *doors, *uses]
    equations = local_equations(program, start, doors, locality.closed)
    loops = [
        (e, locality.loops[e.index]) for e in equations if e.index in locality.loops
    ]
    far = (
        leak is None
        and locality.scope == "unit"
        and (
            bool(loops)
            or several_hops(program, locality, old, frozenset(doors)) is not None
        )
    )
    whole = local_equations(program, [*old, *uses], doors, {}) if far else None
    edges = [
        (edge, cut)
        for equation in equations
        for k in range(len(equation.inputs))
        if (cut := locality.closed.get(edge := (equation.index, k))) is not None
    ]
    kept = [
        ((equation, k), locality.own[edge])
        for equation in equations
        for k in range(len(equation.inputs))
        if (edge := (equation.index, k)) in locality.own
    ]
    slot_door = [hidden.doors[leaf] for leaf in leaf_of]
    written = {r: e.index for e in program.equations for r in e.outputs}
    partial = [(edge, cut) for edge, cut in edges if not _whole(cut)]
    context = _read(equations, doors, old) | _read(whole or (), doors, old)
    held = {program.equations[index].inputs[k] for (index, k), _ in edges}
    held |= {equation.inputs[k] for (equation, k), _ in kept}
    reads = tuple(sorted(context | held | _shared(hidden, leaf_of, table.shape[0])))
    return HiddenGroup(
        units=table.shape[0],
        slots=table.shape[1],
        leaves=tuple(str(paths[hidden.leaves[leaf]]) for leaf in leaf_of),
        transition_matrix=_transitions(matrices["old"], table.shape[1], far, leak),
        within_matrix=slot_matrix(matrices["doors"], table.shape[1]),
        order=tuple(sorted(range(len(leaf_of)), key=lambda s: written[slot_door[s]])),
        silent=tuple(_is_silent(program, locality, ref, doors) for ref in slot_door),
        slot_leaf=tuple(int(leaf) for leaf in leaf_of),
        shapes=tuple(hidden.shapes[leaf] for leaf in leaf_of),
        dtypes=tuple(program.avals[hidden.doors[leaf]].dtype for leaf in leaf_of),
        index=tuple(index),
        old=old,
        doors=doors,
        own=own,
        uses=tuple(uses),
        equations=equations,
        context=tuple(sorted(context)),
        at_doors=tuple(
            ((equation.index, k), doors.index(ref))
            for equation in equations
            for k, ref in equation.operands
            if ref in doors
        ),
        reads=reads,
        input_specs=tuple(program.avals[ref] for ref in reads),
        cut=tuple(edge for edge, cut in edges if _whole(cut)),
        masked=tuple(edge for edge, _ in partial),
        masks=tuple(_mask(program, edge, cut) for edge, cut in partial),
        own_products=tuple(product for product, _ in kept),
        own_pairs=tuple(pairs.arrays() for _, pairs in kept),
        loops=tuple(loops),
        whole=whole,
        leak=leak,
    )


def _read(
    equations: Sequence[Equation], doors: Sequence[int], old: Sequence[int]
) -> set[int]:
    """What some equations, and the doors, read from elsewhere."""
    made = {ref for equation in equations for ref in equation.outputs}
    read = {ref for equation in equations for ref in equation.values}
    return (read | set(doors)) - made - set(old)


def _transitions(
    bits: Any, slots: int, far: bool, leak: float | None
) -> tuple[tuple[bool, ...], ...]:
    if leak is not None:
        return tuple(
            tuple(bool(leak) and s == t for t in range(slots)) for s in range(slots)
        )
    return ((True,) * slots,) * slots if far else slot_matrix(bits, slots)


def _shared(hidden: Hidden, leaf_of: Any, units: int) -> set[int]:
    """The old leaves of which some elements belong to another group."""
    sizes = np.diff(hidden.offsets)
    found = {int(i) for i in leaf_of if (leaf_of == i).sum() * units < sizes[i]}
    return {hidden.old[leaf] for leaf in found}


def _is_silent(
    program: Program, locality: Locality, door: int, doors: Sequence[int]
) -> bool:
    others = frozenset(doors) - {door}
    reached, met = flow(program, [door], blocked=others, cuts=dict(locality.cuts))
    seen = [ref for ref in program.outputs if ref in reached - others]
    return seen == [door] and not met


def _mask(program: Program, edge: Edge, cut: Any) -> Any:
    ref = program.equations[edge[0]].inputs[edge[1]]
    return jnp.asarray(np.reshape(cut, program.avals[ref].shape))


def detached(
    groups: Sequence[HiddenGroup], pairs: Sequence[tuple[str, str]]
) -> list[HiddenGroup]:
    """The groups without these entries of D, by the key paths (from, to) of slots.

    **Raises:** `CompileError` for a pair that no group has an entry for."""
    found, met = [], set()
    for group in groups:
        matrix = [list(row) for row in group.transition_matrix]
        for to, row in enumerate(matrix):
            for source, entry in enumerate(row):
                pair = group.leaves[source], group.leaves[to]
                if entry and pair in pairs:
                    row[source] = False
                    met.add(pair)
        rows = tuple(map(tuple, matrix))
        found.append(dataclasses.replace(group, transition_matrix=rows))
    for pair in pairs:
        if pair not in met:
            legal = [
                (group.leaves[s], group.leaves[t])
                for group in groups
                for t, row in enumerate(group.transition_matrix)
                for s, entry in enumerate(row)
                if entry
            ]
            raise CompileError(
                f"detach: got {pair!r}, expected a pair of state leaves of which the "
                f"first acts on the second within a unit: {sorted(set(legal))}. Where "
                "a path is only part of such an entry, use jax.lax.stop_gradient in "
                "the model."
            )
    return found
