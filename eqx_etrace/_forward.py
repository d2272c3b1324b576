"""The plain steps of a window, and the values that its derivatives read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import run, shared_env
from ._jaxpr import Equation, evaluate, live
from ._saving import Plan, is_light


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


def renew_trace(zero: PyTree, trace: PyTree, where: Any) -> PyTree:
    """The trace, zero `where` a new sequence begins; random keys go on as they were."""

    def keep(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    renewed = renew(zero, trace, where)
    return jax.tree.map(lambda a, b: a if keep(a) else b, trace, renewed)


def forward(
    setting: Setting,
    state: Sequence[Any],
    xs: Sequence[Any],
    reset: Any | None,
    save: Sequence[int],
    outputs: bool = False,
    derivatives: bool = False,
) -> Forward:
    """Run the plain steps; `xs` has time in front where it moves.

    `derivatives` says that it is to be differentiated. Otherwise the products of x are
    taken for all steps at once, and each is handed from step to step: XLA computes what
    reads a slice of an array in the body of a loop element by element.
    """
    graph, env = setting.graph, setting.env
    inputs = _inputs(setting, xs)
    ahead = _ahead(graph, () if derivatives else setting.moving, save)
    made = _made_ahead(setting, ahead, inputs)
    rest = [ref for ref in save if ref not in made]

    def one(state: Any, x: Any, made: Any) -> Any:
        return run(graph, env | made, state, x, keep=rest, body=ahead.rest)

    per_sample = one if graph.batch is None else jax.vmap(one)

    def made_for(step: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, step, keepdims=False), made
        )

    def body(carry: Any, step: Any) -> Any:
        (state, now), (slices, after, fresh) = carry, step
        if fresh is not None:
            state = renew(setting.initial, state, fresh)
        new, out, saved = per_sample(state, at_step(setting, xs, slices), now)
        return (new, made_for(after)), (out if outputs else None, saved)

    after = jnp.minimum(jnp.arange(1, setting.steps + 1), setting.steps - 1)
    steps = moving_leaves(setting, xs), after, reset
    start = list(state), made_for(0)
    (new, _), (outs, saved) = jax.lax.scan(body, start, steps, length=setting.steps)
    found = dict(zip(rest, saved, strict=True))
    found |= {ref: array for ref, array in made.items() if ref in save}
    return Forward(new, outs, found | inputs)


class _Ahead(NamedTuple):
    """What of a step needs no state, and so is run for all steps at once."""

    equations: tuple[Equation, ...]
    made: tuple[int, ...]
    """The values that are read by the rest of the step, given back or saved."""
    rest: tuple[Equation, ...]


def _ahead(graph: ETraceGraph, moving: Sequence[bool], save: Sequence[int]) -> _Ahead:
    """The products of x with weights and the like, and what these are made of.

    Values much larger than the state stay where they are: a window would hold many.
    """
    program, avals = graph.program, graph.program.avals
    if not any(moving):
        return _Ahead((), (), graph.body)
    limit = 4 * sum(avals[ref].size for ref in graph.hidden.old)
    inputs = program.inputs[len(program.inputs) - len(moving) :]
    known = {*program.constants, *graph.weights, *graph.prepared}
    moved = {ref for ref, moves in zip(inputs, moving, strict=True) if moves}
    found, large = [], set()
    for equation in graph.body:
        values = set(equation.values)
        if equation.effectful or not values & moved or values - moved - known:
            continue
        if any(avals[ref].size > limit for ref in equation.outputs):
            continue
        found.append(equation)
        moved.update(equation.outputs)
        if not is_light(equation, avals):
            large.update(equation.outputs)
    kept = live(found, large)
    written = {ref for equation in kept for ref in equation.outputs}
    ahead = set(kept)
    rest = tuple(equation for equation in graph.body if equation not in ahead)
    read = {ref for equation in rest for ref in equation.values}
    made = written & {*read, *program.outputs, *save}
    return _Ahead(tuple(kept), tuple(sorted(made)), rest)


def _made_ahead(
    setting: Setting, ahead: _Ahead, inputs: dict[int, Any]
) -> dict[int, Any]:
    if not ahead.equations:
        return {}
    graph, env = setting.graph, setting.env

    def one(inputs: dict[int, Any]) -> dict[int, Any]:
        found = evaluate(ahead.equations, env | inputs)
        return {ref: found[ref] for ref in ahead.made}

    return unmerge(graph, jax.vmap(one)(merge(graph, inputs)))


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
