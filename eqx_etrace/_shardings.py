"""`shardings`: where params, state, trace and data of a graph are on many devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._custom_types import Labels
from ._errors import sentence
from ._graph import ETraceGraph
from ._place import Place, local
from ._relation import Relation
from ._rules import LocalRule
from ._step import init_trace


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where everything of a graph is on the devices of a mesh; see `shardings`.

    **Attributes:**

    - `params`, `state`, `trace`, `x`: like the params, the state, the trace and the
      input of a step, a `jax.sharding.NamedSharding` in place of each array.
    - `sequence`: of every array that has time in front and then the batch: inputs,
      targets, masks, losses.
    - `graph`: the graph, which now spreads the batch over the devices.
    - `local`: the graph as it is for one part of the batch, for a `jax.shard_map` of
      your own.

    !!! example

        ```python
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((1,), ("model",), axis_types=auto)
        found = eqx_etrace.shardings(graph, mesh)
        params = jax.device_put(params, found.params)
        ```
    """

    params: PyTree
    state: PyTree
    trace: PyTree
    x: PyTree
    sequence: NamedSharding
    graph: ETraceGraph
    local: ETraceGraph


def shardings(
    graph: ETraceGraph,
    mesh: Mesh,
    *,
    batch: str | Sequence[str] | None = "data",
    units: str | Sequence[str] | None = "model",
) -> Shardings:
    """How a graph is spread over devices: by samples, by postsynaptic units, or both.

    Traces are what takes the memory, and each of their rows belongs to one sample and
    one unit. Spread by samples, the devices compute alone and add up their gradients
    once, at the end of a call of `eqx_etrace.value_and_grad` or before each update of
    `eqx_etrace.learn`; params are on all of them. Spread by units, each device has the
    weights, traces and states of its own units, and only their activity is sent to the
    others.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned; with a batch where that is spread.
    - `mesh`: such as `jax.make_mesh((4,), ("data",))`. The axes of `units` are of the
      type `AxisType.Auto`.
    - `batch`, `units`: names of axes of the mesh; those that it does not have are left
      out.

    **Returns:** a `Shardings`. Put params, state, trace and data there with
    `jax.device_put`, and give its `graph` to `step`, `steps`, `evolve`,
    `value_and_grad`, `grad`, `learn` and `fit`, inside of `jax.jit`. An array that does
    not divide among the devices of `units` is on all of them, as are weights that no
    unit of a hidden group has for itself.

    A graph that spreads its batch takes a `loss_fn` with one loss per sample, and
    targets with time and batch in front. Its `step` is for data that is put there: in
    a loop of your own each step adds up gradients.

    **Raises:** `ValueError` that names the axis and the remedy.

    !!! example

        ```python
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        state, x = jnp.zeros((8, 8)), jnp.ones((8, 3))
        graph = eqx_etrace.compile(net, state, x, batched=True)
        found = eqx_etrace.shardings(graph, mesh)

        def of_samples(out, target):
            return jnp.sum((out - target) ** 2, axis=-1)

        fun = jax.jit(eqx_etrace.value_and_grad(found.graph, of_samples))
        data = jnp.ones((12, 8, 3)), jnp.ones((12, 8, 2))
        xs, targets = jax.device_put(data, found.sequence)
        state = jax.device_put(state, found.state)
        losses, grads, state, trace = fun(params, state, None, xs, targets)
        ```
    """
    names = tuple(_names(mesh, axes) for axes in (batch, units))
    _check_mesh(mesh, *names)
    of_batch, of_units = names
    if graph.place is not None:
        raise ValueError(
            "graph: got one that is spread over devices already, expected what "
            "`compile` returned. Pass that one."
        )
    _check_batch(graph, mesh, of_batch)
    layout = _Layout(graph, mesh, of_batch, of_units)
    rows = tuple(jtu.tree_leaves(layout.trace(lead=False))) if of_units else ()
    specs = tuple(sharding.spec for sharding in rows)
    spread = dataclasses.replace(graph, place=Place(mesh, of_batch, specs))
    along = PartitionSpec(None, of_batch) if of_batch else PartitionSpec()
    return Shardings(
        params=layout.params(),
        state=layout.state(),
        trace=layout.trace(lead=True),
        x=layout.x(),
        sequence=NamedSharding(mesh, along),
        graph=spread,
        local=local(spread),
    )


def _names(mesh: Mesh, axes: str | Sequence[str] | None) -> tuple[str, ...]:
    given = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return tuple(name for name in given if name in mesh.axis_names)


def _check_mesh(mesh: Mesh, batch: tuple[str, ...], units: tuple[str, ...]) -> None:
    rest = [name for name in mesh.axis_names if name not in (*batch, *units)]
    twice = sorted({*batch} & {*units})
    if rest or twice:
        got = f"a mesh with the axes {', '.join(mesh.axis_names)}"
        expected = "each of them to be named by `batch` or by `units`"
        remedy = f"Say what {', '.join(map(repr, rest or twice))} is for."
        raise ValueError(sentence("mesh", got, expected, remedy))
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for name in units:
        if types[name] is not AxisType.Auto:
            raise ValueError(
                f"mesh: got the axis {name!r} of type {types[name].name} for units, "
                "expected AxisType.Auto: the compiler finds where the activity of "
                "units is sent. Give the mesh `axis_types=(jax.sharding.AxisType.Auto,)"
                f" * {len(types)}`."
            )


def _check_batch(graph: ETraceGraph, mesh: Mesh, axes: tuple[str, ...]) -> None:
    parts = math.prod(mesh.shape[name] for name in axes)
    if not axes:
        return
    if graph.batch is None or graph.batch % parts:
        got = f"a batch of {graph.batch}" if graph.batch else "an unbatched graph"
        remedy = "Compile with such a batch and `batched=True`, or leave out `batch`."
        expected = f"a multiple of {parts}, the devices along {', '.join(axes)}"
        raise ValueError(sentence("graph", got, expected, remedy))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Finds the axis of each array that runs along units."""

    graph: ETraceGraph
    mesh: Mesh
    batch: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def parts(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.units)

    def _at(self, axis: int | None, lead: bool) -> NamedSharding:
        """That of an array with units along `axis`, behind the batch if it leads."""
        front = [self.batch or None] * (lead and self.graph.batch is not None)
        rest = [] if axis is None else [*[None] * axis, self.units]
        return NamedSharding(self.mesh, PartitionSpec(*front, *rest))

    def _along(self, shape: Sequence[int], places: Labels) -> int | None:
        """The first axis along which the units `places` change and that divides among
        the devices; `places` broadcasts against the shape."""
        if not self.units or places.ndim != len(shape):
            return None
        if any(n not in (1, m) for n, m in zip(places.shape, shape, strict=True)):
            return None
        for axis, size in enumerate(places.shape):
            changes = size > 1 and (places != places.take([0], axis)).any()
            if changes and size % self.parts == 0:
                return axis
        return None

    def params(self) -> PyTree:
        graph, table, found = self.graph, self.graph.param_leaves, {}
        refs = graph.program.inputs[: table.count]
        for relation in graph.relations:
            if relation.ref in refs:
                axis = self._of_weight(relation)
                found.setdefault(refs.index(relation.ref), axis)
        each = [self._at(found.get(i), lead=False) for i in range(table.count)]
        return jtu.tree_unflatten(table.treedef, each)

    def _of_weight(self, relation: Relation) -> int | None:
        """The axis of a weight that is laid out as its trace."""
        op = relation.op
        kept = [a for a in range(len(op.trace_shape)) if a not in op.summed]
        if tuple(op.trace_shape[axis] for axis in kept) != op.weight_shape:
            return None
        axis = self._along(op.trace_shape, self._places(relation, expanded=True))
        return kept.index(axis) if axis in kept else None

    def _places(self, relation: Relation, expanded: bool) -> Labels:
        numbers = jnp.arange(relation.map.units, dtype=jnp.int32)
        made = relation.expand if expanded else relation.map.spread
        return np.asarray(made(numbers))

    def state(self) -> PyTree:
        graph, table, found = self.graph, self.graph.state_leaves, {}
        hidden = graph.hidden
        for position, leaf in enumerate(hidden.leaves):
            shape = hidden.shapes[position]
            places = np.full(math.prod(shape), -1)
            for group in graph.groups:
                for slot, at in enumerate(group.slot_leaf):
                    if at == position:
                        index = group.index[slot]
                        where = slice(None) if index is None else np.asarray(index)
                        places[where] = np.arange(group.units)
            found[leaf] = self._along(shape, places.reshape(shape))
        # A complex leaf is two there.
        widths = [
            1 + jnp.issubdtype(spec.dtype, jnp.complexfloating) for spec in table.specs
        ]
        firsts = np.cumsum([0, *widths[:-1]]).tolist() if widths else []
        each = [self._at(found.get(first), lead=True) for first in firsts]
        return jtu.tree_unflatten(table.treedef, each)

    def trace(self, lead: bool) -> PyTree:
        graph = self.graph
        whole = jax.eval_shape(lambda: init_trace(graph))
        if not isinstance(graph.rule, LocalRule):
            return jtu.tree_map(lambda leaf: self._at(None, lead), whole)
        batched = graph.batch is not None

        def of(relation: Relation, trace: PyTree) -> PyTree:
            shapes = [
                (relation.trace_shape, self._places(relation, expanded=True)),
                (relation.y_shape, self._places(relation, expanded=False)),
                ((relation.map.units,), np.arange(relation.map.units)),
            ]

            def one(leaf: Any) -> NamedSharding:
                shape = leaf.shape[batched:]
                axes = (self._along(shape, places) for _, places in shapes)
                axis = next((axis for axis in axes if axis is not None), None)
                return self._at(axis, lead)

            found = jtu.tree_map(one, trace)
            if relation.presynaptic is not None:  # Along units that send.
                found = found._replace(presynaptic=self._at(None, lead))
            return found

        pairs = zip(graph.relations, whole, strict=True)
        return tuple(of(relation, trace) for relation, trace in pairs)

    def x(self) -> PyTree:
        table = self.graph.x_leaves
        each = [self._at(None, lead=True)] * table.count
        return jtu.tree_unflatten(table.treedef, each)
