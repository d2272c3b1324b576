"""The plain steps of a window, and the values that its derivatives read.

Of these a scan saves as few as it can: what is moved or computed cheaply from others is
done again for all steps at once, when it is read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import run, shared_env
from ._jaxpr import Equation, evaluate, is_elementwise, is_structural, literal


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays as it is over a sequence."""

    graph: ETraceGraph
    weights: Sequence[Any]
    prepared: Sequence[Any]
    moving: tuple[bool, ...]
    """Per leaf of x, whether it has a slice per step."""
    steps: int
    """Of one window."""
    initial: Sequence[Any] | None = None
    """Leaves of the state that a lane starts anew with."""

    @property
    def env(self) -> dict[int, Any]:
        return shared_env(self.graph, self.weights, self.prepared)


class Plan(NamedTuple):
    """How the values that are read come about."""

    save: tuple[int, ...]
    """Those that the scan over the steps saves."""
    equations: tuple[Equation, ...]
    """What is run again."""
    read: tuple[int, ...]


# What costs more to compute than to save.
_COSTLY = frozenset(
    getattr(prims, f"{name}_p")
    for name in (
        "tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "erf", "erfc",
        "erf_inv", "sin", "cos", "tan", "pow", "lgamma", "digamma", "cbrt",
    )
    if hasattr(prims, f"{name}_p")
)  # fmt: skip


def plan(graph: ETraceGraph, read: Sequence[int]) -> Plan:
    """Decide which of the values to save."""
    program, first = graph.program, graph.param_leaves.count
    states = program.inputs[first : first + graph.state_leaves.parts.count]
    free = set(program.inputs) - set(states) | set(program.constants)
    free |= {*graph.weights, *graph.prepared}
    makers = {ref: e for e in graph.body for ref in e.outputs}
    save = {ref for ref in read if ref not in free}
    for ref in sorted(save, reverse=True):
        if _found(program.avals, makers, ref, free | save - {ref}) is not None:
            save.remove(ref)
    again: dict[int, Equation] = {}
    for ref in read:
        if ref not in free | save:
            found = _found(program.avals, makers, ref, free | save) or {}
            again |= found
    equations = tuple(again[index] for index in sorted(again))
    return Plan(tuple(sorted(save)), equations, tuple(read))


def _found(
    avals: Any, makers: dict[int, Equation], ref: int, known: set[int]
) -> dict[int, Equation] | None:
    """The cheap equations that make a value from known ones, None if there are none."""
    equation = makers.get(ref)
    if equation is None or not _is_cheap(equation, avals):
        return None
    found = {equation.index: equation}
    for other in equation.values:
        if other not in known:
            more = _found(avals, makers, other, known)
            if more is None:
                return None
            found |= more
    return found


def _is_cheap(equation: Equation, avals: Any) -> bool:
    if equation.effectful or equation.primitive in _COSTLY:
        return False

    def known(ref: Any) -> Any:
        return None if isinstance(ref, int) else literal(ref)

    return is_elementwise(equation, avals) or is_structural(equation, known)


class Forward(NamedTuple):
    """A window that has run."""

    state: list[Any]
    """After the last step."""
    outs: list[Any] | None
    """Of all steps, if asked for."""
    saved: dict[int, Any]
    """Of all steps, by `Plan.save`, and what of x moves."""


def renew(new: PyTree, old: PyTree, where: Any) -> PyTree:
    """The old leaves, and the new ones where `where`, of their first axes, says so."""

    def choose(new: Any, old: Any) -> Any:
        mask = where.reshape(where.shape + (1,) * (old.ndim - where.ndim))
        return jnp.where(mask, new, old)

    return jax.tree.map(choose, new, old)


def forward(
    setting: Setting,
    state: Sequence[Any],
    xs: Sequence[Any],
    reset: Any | None,
    save: Sequence[int],
    outputs: bool = False,
) -> Forward:
    """Run the plain steps; `xs` has time in front where it moves."""
    graph, env = setting.graph, setting.env

    def one(state: Any, x: Any) -> Any:
        return run(graph, env, state, x, keep=save)

    per_sample = one if graph.batch is None else jax.vmap(one)

    def body(state: list[Any], step: Any) -> Any:
        slices, fresh = step
        if fresh is not None:
            state = renew(setting.initial, state, fresh)
        new, out, saved = per_sample(state, at_step(setting, xs, slices))
        return new, (out if outputs else None, saved)

    steps = moving_leaves(setting, xs), reset
    new, (outs, saved) = jax.lax.scan(body, list(state), steps, length=setting.steps)
    found = dict(zip(save, saved, strict=True))
    return Forward(new, outs, found | _inputs(setting, xs))


def _inputs(setting: Setting, xs: Sequence[Any]) -> dict[int, Any]:
    """The leaves of x of all steps."""
    graph = setting.graph
    refs = graph.program.inputs[-len(xs) :] if xs else ()
    steps, found = setting.steps, {}
    for ref, leaf, moves in zip(refs, xs, setting.moving, strict=True):
        found[ref] = leaf if moves else jnp.broadcast_to(leaf, (steps, *leaf.shape))
    return found


def values(setting: Setting, ran: Forward, made: Plan) -> dict[int, Any]:
    """The values read, of all steps, time and batch as one axis."""
    graph, env = setting.graph, setting.env
    stacked = {ref: merge(graph, array) for ref, array in ran.saved.items()}
    wanted = [ref for ref in made.read if ref not in stacked and ref not in env]

    def again(stacked: dict[int, Any]) -> list[Any]:
        found = evaluate(made.equations, env | stacked)
        return [found[ref] for ref in wanted]

    if wanted:
        stacked |= zip(wanted, jax.vmap(again)(stacked), strict=True)
    return stacked


def moving_leaves(setting: Setting, xs: Sequence[Any]) -> list[Any]:
    return [leaf for leaf, moves in zip(xs, setting.moving, strict=True) if moves]


def at_step(setting: Setting, xs: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
    """The leaves of x of one step."""
    rest = iter(slices)
    pairs = zip(xs, setting.moving, strict=True)
    return [next(rest) if moves else leaf for leaf, moves in pairs]


def merge(graph: ETraceGraph, tree: PyTree) -> PyTree:
    """Time and batch as one axis."""
    if graph.batch is None:
        return tree
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def unmerge(graph: ETraceGraph, tree: PyTree) -> PyTree:
    """The inverse of `merge`."""
    batch = graph.batch
    if batch is None:
        return tree
    return jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), tree)
