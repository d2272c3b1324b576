"""`HiddenGroup`: units with the same slots, and their own part of the local program."""

import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from ._hidden import Hidden
from ._jaxpr import Equation, Program, evaluate
from ._locality import Edge, Locality, flow, several_hops, slot_matrix
from ._own import own_product
from ._units import Units


class HiddenGroup(eqx.Module):
    """All units that have the same state variables: P units with S slots each.

    Slot s of all units is one vector of length P. It is often a whole state leaf; if
    it is a part of one, `index` says which elements.

    **Attributes:**

    - `units`: P.
    - `slots`: S.
    - `leaves`: per slot, the key path of its state leaf.
    - `transition_matrix`: S x S booleans; entry [s'][s] says whether the old slot s of
      a unit acts on its new slot s' directly (the structure of D).
    - `within_matrix`: S x S booleans; entry [s'][s] says whether the *new* slot s acts
      on the new slot s' in the same step (the structure of L).
    - `order`: the slots in an order in which L is strictly triangular.
    - `silent`: per slot, whether nothing but its own unit's new state reads it, so
      that its learning signal is zero unless the loss reads the state itself.
    """

    units: int = eqx.field(static=True)
    slots: int = eqx.field(static=True)
    leaves: tuple[str, ...] = eqx.field(static=True)
    transition_matrix: tuple[tuple[bool, ...], ...] = eqx.field(static=True)
    within_matrix: tuple[tuple[bool, ...], ...] = eqx.field(static=True)
    order: tuple[int, ...] = eqx.field(static=True)
    silent: tuple[bool, ...] = eqx.field(static=True)
    slot_leaf: tuple[int, ...] = eqx.field(static=True)
    """Per slot, the position of its leaf among the hidden leaves."""
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    """Per slot, the shape of its leaf."""
    dtypes: tuple[Any, ...] = eqx.field(static=True)
    index: tuple[Int[Array, " units"] | None, ...]
    old: tuple[int, ...] = eqx.field(static=True)
    doors: tuple[int, ...] = eqx.field(static=True)
    own: tuple[int, ...] = eqx.field(static=True)
    """The hidden leaves the group lives in, in the order of `old` and `doors`."""
    uses: tuple[int, ...] = eqx.field(static=True)
    """The values y of the group's relations."""
    equations: tuple[Equation, ...] = eqx.field(static=True)
    context: tuple[int, ...] = eqx.field(static=True)
    """The values that the local program reads and does not compute."""
    at_doors: tuple[tuple[Edge, int], ...] = eqx.field(static=True)
    """The edges that read a door, and which of `doors` it is."""
    cut: tuple[Edge, ...] = eqx.field(static=True)
    masked: tuple[Edge, ...] = eqx.field(static=True)
    masks: tuple[Bool[Array, "..."], ...]
    own_products: tuple[tuple[Equation, int], ...] = eqx.field(static=True)
    """The cut products of which the part within units is kept: `scope="unit"`."""
    own_pairs: tuple[tuple[Int[Array, " pairs"], ...], ...]
    whole: tuple[Equation, ...] | None = eqx.field(static=True)
    """The equations from the old state to the new, nothing cut, where the true diagonal
    block has to be taken from the dense Jacobian."""

    def read(
        self, leaves: Mapping[int, Shaped[Array, "..."]]
    ) -> list[Shaped[Array, " units"]]:
        """The slots, each a vector over units, from hidden leaves by position."""
        slots = []
        for leaf, index in zip(self.slot_leaf, self.index, strict=True):
            flat = leaves[leaf].reshape(-1)
            slots.append(flat if index is None else flat[index])
        return slots

    def place(
        self, slot: int, values: Shaped[Array, " units"], empty: Any = 0
    ) -> list[Shaped[Array, "..."]]:
        """A vector over units at the places of one slot, in the shapes of the own
        leaves, and `empty` elsewhere."""
        leaf, index = self.slot_leaf[slot], self.index[slot]
        placed = []
        for position in self.own:
            shape = self.shapes[self.slot_leaf.index(position)]
            if position == leaf and index is None:
                placed.append(values.reshape(shape))
                continue
            flat = jnp.full(int(np.prod(shape, dtype=np.int64)), empty, values.dtype)
            if position == leaf:
                flat = flat.at[index].set(values)
            placed.append(flat.reshape(shape))
        return placed

    def seed(self, slot: int) -> list[Shaped[Array, "..."]]:
        """Ones on one slot and zeros elsewhere, in the shapes of the own leaves."""
        ones = self.place(slot, jnp.ones(self.units, self.dtypes[slot]))
        dtypes = [self.dtypes[self.slot_leaf.index(position)] for position in self.own]
        return [a.astype(dtype) for a, dtype in zip(ones, dtypes, strict=True)]

    def local_step(
        self,
        env: Mapping[int, Any],
        old: Sequence[Any],
        at_use: Sequence[Any],
        at_door: Sequence[Any],
    ) -> list[Any]:
        """The own leaves' new state in the local program.

        `at_use` is added to the values of the uses. What reads the new state of the
        own leaves within the step reads it plus `at_door`, and through that alone:
        the derivatives are the direct ones. `env` holds weights, constants, context.
        """
        tap = {ref: _add(change) for ref, change in zip(self.uses, at_use, strict=True)}
        start = dict(env) | dict(zip(self.old, old, strict=True))
        for ref in self.context:
            if ref in tap:
                start[ref] = tap[ref](start[ref])
        edge: dict[Edge, Callable[[Any], Any]]
        edge = dict.fromkeys(self.cut, jax.lax.stop_gradient)
        for key, mask in zip(self.masked, self.masks, strict=True):
            edge[key] = _masked_stop(mask)
        for key, door in self.at_doors:
            edge[key] = _read_door(at_door[door], edge.get(key))
        through = {
            equation.index: ft.partial(own_product, equation, k, pairs)
            for (equation, k), pairs in zip(
                self.own_products, self.own_pairs, strict=True
            )
        }
        env = evaluate(self.equations, start, edge=edge, tap=tap, through=through)
        return [env[ref] for ref in self.doors]

    def whole_step(
        self, env: Mapping[int, Any], old: Sequence[Any], at_use: Sequence[Any]
    ) -> list[Any]:
        """The own leaves' new state, nothing cut; where `whole` is not None."""
        tap = {ref: _add(change) for ref, change in zip(self.uses, at_use, strict=True)}
        start = dict(env) | dict(zip(self.old, old, strict=True))
        for ref in self.context:
            if ref in tap:
                start[ref] = tap[ref](start[ref])
        env = evaluate(self.whole or (), start, tap=tap)
        return [env[ref] for ref in self.doors]


def _add(change: Any) -> Callable[[Any], Any]:
    return lambda value: value + change


def _read_door(change: Any, then: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        value = jax.lax.stop_gradient(value) + change
        return value if then is None else then(value)

    return read


def _masked_stop(mask: Any):
    def stop(value: Any) -> Any:
        return jnp.where(mask, jax.lax.stop_gradient(value), value)

    return stop


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
) -> HiddenGroup:
    """Build group `number` with the uses related to it."""
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
    far = locality.scope == "unit" and several_hops(
        program, locality, old, frozenset(doors)
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
    return HiddenGroup(
        units=table.shape[0],
        slots=table.shape[1],
        leaves=tuple(str(paths[hidden.leaves[leaf]]) for leaf in leaf_of),
        transition_matrix=_all_true(table.shape[1])
        if far
        else slot_matrix(matrices["old"], table.shape[1]),
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
        context=tuple(
            sorted(_read(equations, doors, old) | _read(whole or (), doors, old))
        ),
        at_doors=tuple(
            ((equation.index, k), doors.index(ref))
            for equation in equations
            for k, ref in equation.operands
            if ref in doors
        ),
        cut=tuple(edge for edge, cut in edges if _whole(cut)),
        masked=tuple(edge for edge, _ in partial),
        masks=tuple(_mask(program, edge, cut) for edge, cut in partial),
        own_products=tuple(product for product, _ in kept),
        own_pairs=tuple(pairs.arrays() for _, pairs in kept),
        whole=whole,
    )


def _read(
    equations: Sequence[Equation], doors: Sequence[int], old: Sequence[int]
) -> set[int]:
    """What some equations, and the doors, read from elsewhere."""
    made = {ref for equation in equations for ref in equation.outputs}
    read = {ref for equation in equations for ref in equation.values}
    return (read | set(doors)) - made - set(old)


def _all_true(slots: int) -> tuple[tuple[bool, ...], ...]:
    return ((True,) * slots,) * slots


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
