"""`HiddenGroup`: units with the same slots, and their own part of the local program."""

import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ._errors import describe, dtype_of, is_array_like, sentence
from ._jaxpr import Aval, Equation, evaluate
from ._known import tap_known
from ._locality import Edge
from ._loop import Loop
from ._own import own_product
from ._same_step import same_step_total
from ._stage import leaf_table, named_parts


class HiddenGroup(eqx.Module):
    """All units that have the same state variables: P units with S slots each.

    A unit is one neuron, a slot one of its state variables (membrane, current, ...).
    Slot s of all units is one vector of length P: often a whole state leaf, else a
    part of one. The group carries its own part of the *local program*, the step in
    which nothing passes from one unit to another, and can run it alone: `transition`
    and `diagonal_jacobian`. All methods take one sample; map a batch with `jax.vmap`,
    and compile them with `eqx.filter_jit`.

    **Attributes:**

    - `units`: P.
    - `slots`: S.
    - `leaves`: per slot, the key path of its state leaf, e.g. `"state[0]"`.
    - `shapes`, `dtypes`: per slot, those of its state leaf.
    - `dtype`: what all slots promote to, the dtype of `concat`.
    - `input_specs`: shapes and dtypes of the `inputs` that `transition` takes;
      `graph.input_names(number)` says what they are.
    - `transition_matrix`: S x S booleans; entry `[s'][s]` says whether the old slot s
      of a unit acts on its new slot s' directly (the structure of D).
    - `within_matrix`: S x S booleans; entry `[s'][s]` says whether the *new* slot s
      acts on the new slot s' in the same step (the structure of L).
    - `order`: the slots in an order in which L is strictly triangular.
    - `silent`: per slot, whether nothing but its own unit's new state reads it, so
      that its learning signal is zero unless the loss reads the state itself.

    !!! example

        ```python
        group = graph.groups[0]
        h = group.concat(state)                        # (units, slots)
        found = eqx_etrace.jacobians(graph, params, state, x)
        new_h = group.transition(h, found.inputs[0])   # (units, slots)
        state = group.split(new_h, state)
        ```
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
    reads: tuple[int, ...] = eqx.field(static=True)
    """The values that `transition` takes as its inputs, in this order: the context,
    what is read through a cut edge, and old leaves that are not the group's alone."""
    input_specs: tuple[Aval, ...] = eqx.field(static=True)
    cut: tuple[Edge, ...] = eqx.field(static=True)
    masked: tuple[Edge, ...] = eqx.field(static=True)
    masks: tuple[Bool[Array, "..."], ...]
    own_products: tuple[tuple[Equation, int], ...] = eqx.field(static=True)
    """The cut products of which the part within units is kept: `scope="unit"`."""
    own_pairs: tuple[tuple[Int[Array, " pairs"], ...], ...]
    loops: tuple[tuple[Equation, Loop], ...] = eqx.field(static=True)
    """The loops with cuts inside."""
    whole: tuple[Equation, ...] | None = eqx.field(static=True)
    """The equations from the old state to the new, nothing cut, where the true diagonal
    block has to be taken from the dense Jacobian."""
    leak: float | None = eqx.field(static=True)
    """What stands in for D, if anything, see `LocalRule.leak`."""

    @property
    def dtype(self) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.result_type(*self.dtypes)

    def concat(self, state: PyTree) -> Shaped[Array, "units slots"]:
        """The slots of the group, side by side, from the user's own state.

        **Arguments:**

        - `state`: a state of one sample, as given to `compile`.

        **Returns:** `h`, an array (units, slots) of `group.dtype`; column s is the
        slot that `group.leaves[s]` names.

        **Raises:** `ValueError` that names the state leaf that does not fit.

        !!! example

            ```python
            h = graph.groups[0].concat(state)
            h_of_batch = jax.vmap(graph.groups[0].concat)(jax.tree.map(
                lambda leaf: jnp.stack([leaf, leaf]), state
            ))
            ```
        """
        found = dict(named_parts("state", state))
        for slot in range(self.slots):
            self._check_leaf(slot, found)
        leaves = zip(self.slot_leaf, self.leaves, strict=True)
        return self.stack(self.read({leaf: found[path] for leaf, path in leaves}))

    def split(self, h: Shaped[Array, "units slots"], state: PyTree = None) -> Any:
        """The inverse of `concat`.

        **Arguments:**

        - `h`: an array (units, slots).
        - `state`: a state of one sample, or None.

        **Returns:** without `state` a list of vectors (units,), one per slot, each of
        the dtype of its state leaf; with `state` a copy of it in which the slots of
        this group are those of `h`.

        **Raises:** `ValueError` that names what does not fit.

        !!! example

            ```python
            group = graph.groups[0]
            h = group.concat(state)
            vectors = group.split(h)
            halved = group.split(0.5 * h, state)
            ```
        """
        self._check_h(h)
        if state is None:
            columns = enumerate(self.dtypes)
            return [h[:, slot].astype(dtype) for slot, dtype in columns]
        found = dict(named_parts("state", state))
        for slot, path in enumerate(self.leaves):
            self._check_leaf(slot, found)
            found[path] = self._write(slot, h, jnp.asarray(found[path]))
        new = leaf_table("state", state).join(list(found.values()))
        return jtu.tree_unflatten(jtu.tree_structure(state), new)

    def transition(
        self, h: Shaped[Array, "units slots"], inputs: Sequence[Any]
    ) -> Shaped[Array, "units slots"]:
        """The new state of the units by their local program, from the old one.

        It is a function of each unit's own old state alone: what comes from elsewhere,
        such as inputs, weights and the products of a recurrent weight with the *whole*
        old state, is held at `inputs`. At the state where `inputs` were taken it is
        the new state of the step; elsewhere it is what the step would give with the
        same drive, and the step itself where no weight mixes units.

        **Arguments:**

        - `h`: the old state, (units, slots), as `concat` gives it.
        - `inputs`: the values that the local program reads, `inputs[number]` of
          `eqx_etrace.jacobians(...)` for group `number`. Their order is that of
          `graph.input_names(number)`.

        **Returns:** the new `h`, an array (units, slots).

        **Raises:** `ValueError` if `h` or an input has another shape.

        !!! example

            ```python
            group = graph.groups[0]
            found = eqx_etrace.jacobians(graph, params, state, x)
            new_h = group.transition(group.concat(state), found.inputs[0])
            ```
        """
        env = self._given(inputs)
        new = self.local_step(env, self._place(h, env), held=env)
        return self.stack(self.read(dict(zip(self.own, new, strict=True))))

    def diagonal_jacobian(
        self, h: Shaped[Array, "units slots"], inputs: Sequence[Any]
    ) -> Shaped[Array, "units slots slots"]:
        r"""The derivative of `transition` by each unit's own old state.

        All of it is in there: the units do not act on each other in the local program.
        It is the total derivative, paths from one new slot of a unit to another within
        the step included: $(1 - L)^{-1} D$ with the direct derivatives $D$ by the old
        and $L$ by the new slots. It costs one reverse pass per slot.

        **Arguments:** as for `transition`.

        **Returns:** an array (units, slots, slots) with entry [u, s', s] the
        derivative of the new slot s' of unit u by its old slot s.

        !!! example

            ```python
            group = graph.groups[0]
            found = eqx_etrace.jacobians(graph, params, state, x)
            D = group.diagonal_jacobian(group.concat(state), found.inputs[0])
            ```
        """
        env = self._given(inputs)
        old = self._place(h, env)

        def local(old: list[Any], at_door: list[Any]) -> list[Any]:
            return self.local_step(env, old, at_door=at_door, held=env)

        _, pull = jax.vjp(local, old, [jnp.zeros_like(leaf) for leaf in old])
        direct, within = [], []
        for slot in range(self.slots):
            of_old, of_door = pull(self.seed(slot))
            direct.append(self.read(dict(zip(self.own, of_old, strict=True))))
            within.append(self.read(dict(zip(self.own, of_door, strict=True))))
        rows = same_step_total(direct, within, self.order)
        return jnp.stack([self.stack(row) for row in rows], axis=1)

    def stack(self, slots: Sequence[Any]) -> Shaped[Array, "units slots"]:
        """Vectors over units side by side; None is zero."""
        zero = jnp.zeros(self.units, self.dtype)
        columns = [zero if v is None else v.astype(self.dtype) for v in slots]
        return jnp.stack(columns, axis=1)

    def _check_leaf(self, slot: int, found: Mapping[str, Any]) -> None:
        path = self.leaves[slot]
        leaf: Any = found.get(path)
        spec = Aval(self.shapes[slot], self.dtypes[slot])
        fits = is_array_like(leaf) and jnp.shape(leaf) == spec.shape
        if not fits or dtype_of(leaf) != spec.dtype:
            got = "nothing" if path not in found else describe(leaf)
            remedy = (
                "Pass a state of one sample like the one the graph was compiled for; "
                "map a batch with `jax.vmap`."
            )
            raise ValueError(sentence(path, got, str(spec), remedy))

    def _check_h(self, h: Any) -> None:
        if jnp.shape(h) != (self.units, self.slots):
            expected = f"an array of shape ({self.units}, {self.slots})"
            remedy = "Make it with `group.concat(state)`; map a batch with `jax.vmap`."
            raise ValueError(sentence("h", describe(h), expected, remedy))

    def _given(self, inputs: Sequence[Any]) -> dict[int, Any]:
        """The inputs by the numbers of their values."""
        remedy = "Pass `jacobians(...).inputs[number]` of this group."
        expected = f"{len(self.reads)} arrays"
        if not isinstance(inputs, tuple | list):
            raise ValueError(sentence("inputs", describe(inputs), expected, remedy))
        if len(inputs) != len(self.reads):
            raise ValueError(sentence("inputs", str(len(inputs)), expected, remedy))
        for i, (value, spec) in enumerate(zip(inputs, self.input_specs, strict=True)):
            if not is_array_like(value) or jnp.shape(value) != spec.shape:
                where = f"inputs[{i}]"
                raise ValueError(sentence(where, describe(value), str(spec), remedy))
        return dict(zip(self.reads, inputs, strict=True))

    def _place(self, h: Any, env: Mapping[int, Any]) -> list[Any]:
        """The own old leaves with the slots from `h`, the rest of them from `env`."""
        self._check_h(h)
        leaves = {}
        for position, ref in zip(self.own, self.old, strict=True):
            first = self.slot_leaf.index(position)
            zero = jnp.zeros(self.shapes[first], self.dtypes[first])
            leaves[position] = env.get(ref, zero)
        for slot, position in enumerate(self.slot_leaf):
            leaves[position] = self._write(slot, h, leaves[position])
        return list(leaves.values())

    def _write(self, slot: int, h: Any, leaf: Any) -> Any:
        values, index = h[:, slot].astype(leaf.dtype), self.index[slot]
        if index is None:
            return values.reshape(leaf.shape)
        return leaf.reshape(-1).at[index].set(values).reshape(leaf.shape)

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
        at_use: Sequence[Any] = (),
        at_door: Sequence[Any] = (),
        held: Mapping[int, Any] | None = None,
    ) -> list[Any]:
        """The own leaves' new state in the local program.

        `at_use` is added to the values of the uses. What reads the new state of the
        own leaves within the step reads it plus `at_door`, and through that alone:
        the derivatives are the direct ones. `env` holds weights, constants, context.
        What is read through a cut edge does not move, or is `held` at another value.
        """
        made, through = tap_known(self.equations, env) if held is None else ({}, {})
        tap = self._added(at_use, made)
        start = dict(env) | dict(zip(self.old, old, strict=True))
        for ref in self.context:
            if ref in tap:
                start[ref] = tap[ref](start[ref])
        edge = self._cut_edges(held)
        for key, door in self.at_doors if at_door else ():
            edge[key] = _read_door(at_door[door], edge.get(key))
        through |= self._replaced(held)
        env = evaluate(self.equations, start, edge=edge, tap=tap, through=through)
        return [env[ref] for ref in self.doors]

    def whole_step(
        self, env: Mapping[int, Any], old: Sequence[Any], at_use: Sequence[Any]
    ) -> list[Any]:
        """The own leaves' new state, nothing cut; where `whole` is not None."""
        whole = self.whole or ()
        made, through = tap_known(whole, env)
        tap = self._added(at_use, made)
        start = dict(env) | dict(zip(self.old, old, strict=True))
        for ref in self.context:
            if ref in tap:
                start[ref] = tap[ref](start[ref])
        env = evaluate(whole, start, tap=tap, through=through)
        return [env[ref] for ref in self.doors]

    def _added(self, at_use: Sequence[Any], made: Mapping[int, Any]) -> dict[int, Any]:
        """Taps that add the changes to the values of the uses, known or not."""
        pairs = zip(self.uses, at_use, strict=True) if at_use else ()
        return dict(made) | {r: _add(change, made.get(r)) for r, change in pairs}

    def _cut_edges(
        self, held: Mapping[int, Any] | None
    ) -> dict[Edge, Callable[[Any], Any]]:
        masks: dict[Edge, Any] = dict.fromkeys(self.cut)
        masks |= zip(self.masked, self.masks, strict=True)
        inputs = {equation.index: equation.inputs for equation in self.equations}
        return {
            (index, k): _stop(mask, None if held is None else held[inputs[index][k]])
            for (index, k), mask in masks.items()
        }

    def _replaced(
        self, held: Mapping[int, Any] | None
    ) -> dict[int, Callable[[list[Any]], list[Any]]]:
        """The local forms of loops and of products, by their equations."""
        found: dict[int, Callable[[list[Any]], list[Any]]] = {}
        found.update((equation.index, loop.local) for equation, loop in self.loops)
        products = zip(self.own_products, self.own_pairs, strict=True)
        for (equation, k), pairs in products:
            cut = None if held is None else held[equation.inputs[k]]
            found[equation.index] = ft.partial(own_product, equation, k, pairs, cut)
        return found

    def __repr__(self) -> str:
        leaves = ", ".join(self.leaves)
        return f"HiddenGroup({self.units} units x {self.slots} slots: {leaves})"


def _add(change: Any, first: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return lambda value: (value if first is None else first(value)) + change


def _read_door(change: Any, then: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        value = jax.lax.stop_gradient(value) + change
        return value if then is None else then(value)

    return read


def _stop(mask: Any | None, held: Any | None) -> Callable[[Any], Any]:
    """Cut an edge, in whole or where the mask says so."""

    def stop(value: Any) -> Any:
        fixed = jax.lax.stop_gradient(value if held is None else held)
        return fixed if mask is None else jnp.where(mask, fixed, value)

    return stop
