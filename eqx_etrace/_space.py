"""The hidden state and the weights as vectors, as a `GlobalRule` works with them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._locality import flow
from ._rules import GlobalRule, Sizes, Space


if TYPE_CHECKING:
    from ._graph import ETraceGraph


@dataclasses.dataclass(frozen=True)
class Spaces:
    """Those of the hidden state and of the weights that reach it."""

    states: Space
    weights: Space
    reaching: tuple[int, ...]
    """Their positions in `graph.weights`."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.states.size, self.weights.size, self.states.dtype)


def spaces(graph: "ETraceGraph") -> Spaces:
    avals, doors = graph.program.avals, set(graph.hidden.doors)
    reaching = tuple(
        k
        for k, ref in enumerate(graph.weights)
        if avals[ref].inexact and doors & flow(graph.program, [ref])[0]
    )
    specs = [
        tuple(jax.ShapeDtypeStruct(avals[ref].shape, avals[ref].dtype) for ref in refs)
        for refs in (graph.hidden.old, [graph.weights[k] for k in reaching])
    ]
    dtype = _real((*specs[0], *specs[1]))
    return Spaces(Space(specs[0], dtype), Space(specs[1], dtype), reaching)


def of_states(graph: "ETraceGraph") -> Space:
    """That of the hidden state alone."""
    avals = [graph.program.avals[ref] for ref in graph.hidden.old]
    specs = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    return Space(specs, _real(specs))


def _real(specs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """The real dtype that holds parts of all of them."""
    with jax.numpy_dtype_promotion("standard"):
        found = jnp.result_type(*(spec.dtype for spec in specs))
    return jnp.finfo(found).dtype


def credited(graph: "ETraceGraph") -> frozenset[str]:
    """The key paths of the params that reach the hidden state."""
    doors, program = set(graph.hidden.doors), graph.program
    pairs = zip(graph.param_leaves.paths, program.inputs, strict=False)
    return frozenset(path for path, ref in pairs if doors & flow(program, [ref])[0])


def trace_bytes(graph: "ETraceGraph") -> int:
    """Bytes of the trace of one sample, of a local or a global rule."""
    rule = graph.rule
    if not isinstance(rule, GlobalRule):
        return sum(rule.trace_bytes(relation) for relation in graph.relations)
    made = jax.eval_shape(lambda: rule.init(spaces(graph).sizes, jnp.asarray(0)))
    sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    return int(sum(sizes))
