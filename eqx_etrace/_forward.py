"""The plain steps of a window, and the values that its derivatives read."""

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import run, shared_env
from ._jaxpr import DOT_GENERAL, Equation, evaluate, live
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
    """Of all steps, by `Plan.save`, and what of x moves; of old leaves by `Plan.after`
    those after the last step too."""


class Values(NamedTuple):
    """What the derivatives of a window read."""

    merged: dict[int, Any]
    """Of all steps, time and batch as one axis."""
    at: Callable[[Any], dict[int, Any]]
    """Of one step by its number, with the batch in front: what was saved."""
    again: Callable[[dict[int, Any]], dict[int, Any]]
    """Of one sample all, from what was saved."""


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
    plan: Plan,
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
    ahead = _ahead(graph, () if derivatives else setting.moving, plan.save)
    made = _made_ahead(setting, ahead, inputs)
    own = _old_leaves(graph, plan)
    rest = [ref for ref in plan.save if ref not in made and ref not in own]
    through = {} if derivatives else _turned(graph, ahead.rest, env)

    def one(state: Any, x: Any, made: Any) -> Any:
        step = {"keep": rest, "body": ahead.rest, "through": through}
        return run(graph, env | made, state, x, **step)

    per_sample = one if graph.batch is None else jax.vmap(one)

    def made_for(step: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, step, keepdims=False), made
        )

    def written(rows: dict[int, Any], state: Any, number: Any) -> dict[int, Any]:
        put = jax.lax.dynamic_update_index_in_dim
        return {ref: put(rows[ref], state[own[ref]], number, 0) for ref in own}

    def body(carry: Any, step: Any) -> Any:
        (state, now, rows), (slices, number, after, fresh) = carry, step
        if fresh is not None:
            state = renew(setting.initial, state, fresh)
        rows = written(rows, state, number)
        new, out, saved = per_sample(state, at_step(setting, xs, slices), now)
        return (new, made_for(after), rows), (out if outputs else None, saved)

    count = setting.steps
    number = jnp.arange(count)
    after = jnp.minimum(number + 1, count - 1)
    zeros = {ref: jnp.zeros_like(state[place]) for ref, place in own.items()}
    # Not zeros of this shape: over explicit axes an array lies where its like does.
    rows = {r: jnp.broadcast_to(a, (count + 1, *a.shape)) for r, a in zeros.items()}
    steps = moving_leaves(setting, xs), number, after, reset
    start = list(state), made_for(0), rows
    (new, _, rows), (outs, saved) = jax.lax.scan(body, start, steps, length=count)
    found = dict(zip(rest, saved, strict=True)) | written(rows, new, count)
    found |= {ref: array for ref, array in made.items() if ref in plan.save}
    return Forward(new, outs, found | inputs)


def _old_leaves(graph: ETraceGraph, plan: Plan) -> dict[int, int]:
    """Where in the state the old leaves are that stand for new ones too."""
    saved = {old for _, old in plan.after}
    pairs = zip(graph.hidden.old, graph.hidden.leaves, strict=True)
    return {old: place for old, place in pairs if old in saved}


def _turned(
    graph: ETraceGraph, body: Sequence[Equation], env: Mapping[int, Any]
) -> dict[int, Callable[[list[Any]], list[Any]]]:
    """The products `W @ x` of a step, from copies of the weights that are transposed
    once. For a batch each step would read W against its order in memory: XLA's CPU
    backend then takes a tenth to a quarter longer."""
    avals = graph.program.avals
    found = {}
    for equation in body:
        if equation.primitive is not DOT_GENERAL:
            continue
        w, x = equation.inputs
        params = equation.params
        contracted, batch = params["dimension_numbers"]
        plain = w in env and isinstance(x, int) and x not in env
        plain = plain and params["out_sharding"] is None and not batch[0]
        if plain and contracted[0] == (1,) and len(avals[w].shape) == 2:
            turned = jax.lax.optimization_barrier(jnp.transpose(env[w]))
            found[equation.index] = ft.partial(_product, params, turned)
    return found


def _product(
    params: Mapping[str, Any], turned: Any, operands: Sequence[Any]
) -> list[Any]:
    """`W @ x`, from the transposed W."""
    (_, axes), _ = params["dimension_numbers"]
    precision = params["precision"]
    y = jax.lax.dot_general(
        operands[1],
        turned,
        ((axes, (0,)), ((), ())),
        precision=precision[::-1] if isinstance(precision, tuple) else precision,
        preferred_element_type=params["preferred_element_type"],
    )
    return [jnp.moveaxis(y, -1, 0)]


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
    limit = 2 * sum(avals[ref].size for ref in graph.hidden.old)
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


def values(setting: Setting, ran: Forward, plan: Plan) -> Values:
    """The values read, of all steps and of each."""
    graph, env, saved = setting.graph, setting.env, dict(ran.saved)
    first = {ref: 0 for ref in saved}
    for door, old in plan.after:
        saved[door], first[door] = saved[old], 1
    stacked = {
        ref: merge(graph, array[first[ref] : first[ref] + setting.steps])
        for ref, array in saved.items()
    }
    wanted = [ref for ref in plan.read if ref not in stacked and ref not in env]

    def again(saved: dict[int, Any]) -> dict[int, Any]:
        return evaluate(plan.equations, env | saved)

    def at(step: Any) -> dict[int, Any]:
        take = ft.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        return {ref: take(array, step + first[ref]) for ref, array in saved.items()}

    if wanted:
        found = jax.vmap(lambda saved: [again(saved)[ref] for ref in wanted])(stacked)
        stacked |= zip(wanted, found, strict=True)
    return Values(stacked, at, again)


def part_of(
    saved: dict[int, Any], plan: Plan, number: Any, length: int
) -> dict[int, Any]:
    """What a part of this many steps has saved, by the number of the part."""
    longer = {old for _, old in plan.after}
    cut = jax.lax.dynamic_slice_in_dim
    return {
        ref: cut(array, number * length, length + (ref in longer))
        for ref, array in saved.items()
    }


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
