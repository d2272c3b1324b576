"""A graph over devices: the batch by hand, the units by the compiler.

Each device takes its own samples through all steps, and nothing is sent on the way. A
gradient is the sum of what the devices have found, and they add that up once, at the
end of a sequence or, where weights change on the way, before each update. Axes of units
are left to the compiler, which is told where the traces are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


if TYPE_CHECKING:
    from ._graph import ETraceGraph


class Place(NamedTuple):
    """Where a graph is."""

    mesh: Mesh
    axes: tuple[str, ...]
    """Of the mesh, those that the batch is spread over."""
    trace: tuple[PartitionSpec, ...]
    """Of each leaf of the trace of a sample; empty where units are not spread."""

    @property
    def devices(self) -> int:
        """How many parts the batch has."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def batch(self) -> PartitionSpec:
        """Of arrays with the batch in front."""
        return PartitionSpec(self.axes)

    @property
    def sequence(self) -> PartitionSpec:
        """Of arrays with time in front, then the batch."""
        return PartitionSpec(None, self.axes)

    def added(self, tree: PyTree) -> PyTree:
        """The sum over all parts of the batch, as each of them sees it."""
        return jax.lax.psum(tree, self.axes)


WHOLE = PartitionSpec()
"""Of arrays that every device has."""


def spreads(graph: "ETraceGraph") -> Place | None:
    """The place of a graph that has its batch on several devices."""
    place = graph.place
    return place if place is not None and place.axes else None


def local(graph: "ETraceGraph") -> "ETraceGraph":
    """The graph as it is for one part of the batch."""
    place = spreads(graph)
    if place is None or graph.batch is None:
        return graph
    inner = place._replace(axes=()) if place.trace else None
    batch = graph.batch // place.devices
    return dataclasses.replace(graph, batch=batch, place=inner)


def placed(graph: "ETraceGraph", trace: PyTree) -> PyTree:
    """A trace where it belongs; without this the compiler may move it once it is
    there."""
    place = graph.place
    if place is None:
        return trace
    leaves, treedef = jtu.tree_flatten(trace)
    front = () if graph.batch is None else (place.axes or None,)
    inner = jax.sharding.get_abstract_mesh()
    mesh = place.mesh if inner.empty else inner
    units = place.trace or (WHOLE,) * len(leaves)
    where = [NamedSharding(mesh, PartitionSpec(*front, *spec)) for spec in units]
    return _put(place.mesh, trace, jtu.tree_unflatten(treedef, where))


def over_devices(
    graph: "ETraceGraph", fun: Callable[..., Any], specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`fun(local graph, *args)` for every part of the batch, as a function of whole
    arrays that are cut by `specs`."""
    place = spreads(graph)
    assert place is not None
    arrays, static = eqx.partition(local(graph), eqx.is_array)

    def one(arrays: Any, *args: Any) -> Any:
        return fun(eqx.combine(arrays, static), *args)

    specs = (WHOLE, *specs)
    mapped = jax.shard_map(
        one,
        mesh=place.mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(place.axes),
        check_vma=False,
    )

    def run(*args: Any) -> Any:
        given = arrays, *args
        if AxisType.Explicit in place.mesh.axis_types:  # Then JAX moves nothing itself.
            where = jtu.tree_map(lambda spec: NamedSharding(place.mesh, spec), specs)
            given = _put(place.mesh, given, jtu.tree_broadcast(where, given))
        return mapped(*given)

    # Outside of jit, axes that are left to the compiler would need one of their own.
    return jax.jit(run)


def _put(mesh: Mesh, tree: PyTree, where: PyTree) -> PyTree:
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(tree, where)
    return jax.lax.with_sharding_constraint(tree, where)
