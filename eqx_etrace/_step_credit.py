"""What a step's cotangents become: signals, and the gradients of traces."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._at_exits import at_units, feedback_gradients, heard_at_exits, to_state
from ._dynamics import credit_global
from ._graph import ETraceGraph
from ._group import HiddenGroup
from ._jacobian import GroupJacobian, shared_env
from ._rules import GlobalRule, LocalRule
from ._same_step import partial_signal


def per_sample(graph: ETraceGraph, fun: Any, axes: tuple[int | None, ...]) -> Any:
    """`fun` of one sample, or mapped over the batch along these axes."""
    return fun if graph.batch is None else jax.vmap(fun, in_axes=axes)


def credit(
    graph: ETraceGraph,
    trace: Any,
    derivatives: list[Any],
    found: tuple[GroupJacobian, ...] | None,
    silent: tuple[tuple[bool, ...], ...],
    gradients: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Add to the gradients what the traces give for derivatives by the hidden leaves.

    With the Jacobians, the derivatives are by the new state and become the learning
    signal; without, they are by the old state and are the signal. A silent slot has a
    signal of zero, which costs nothing.
    """
    if isinstance(graph.rule, GlobalRule):
        more = credit_global(graph, graph.rule, trace, derivatives)
        pairs = zip(gradients, more, strict=True)
        return tuple(g if new is None else g + new for g, new in pairs)

    def signals(derivatives: Any, found: Any) -> Any:
        leaves = dict(enumerate(derivatives))
        per_group = []
        for number, group in enumerate(graph.groups):
            signal = group.read(leaves)
            if found is not None:
                signal = partial_signal(signal, found[number].within)
            quiet = zip(signal, silent[number], strict=True)
            per_group.append([None if none else v for v, none in quiet])
        return per_group

    heard = per_sample(graph, signals, (0, 0))(derivatives, found)
    total = dict(zip(graph.weights, gradients, strict=True))
    whole = graph.rule.whole(graph.relations, trace)
    for relation, entries in zip(graph.relations, whole, strict=True):
        gradient = graph.rule.gradient(relation, entries, heard[relation.group])
        total[relation.ref] = total[relation.ref] + gradient
    return tuple(total[ref] for ref in graph.weights)


def heard_of(
    graph: ETraceGraph, local: Any, at_exits: Any, of_out: Any, of_state: Any
) -> tuple[list[Any] | None, list[list[Any]] | None, list[Any]]:
    """The derivatives by the new hidden leaves that the rule's signal makes, or None
    for zeros; per group the signals at its exits, for a rule that filters them; and the
    gradients of learned feedback."""
    exits, (weights, prepared, saved, given) = graph.exits, local
    assert exits is not None
    filters = graph.rule.filters
    of_doors = [of_state[i] for i in graph.hidden.leaves]
    quiet = all(isinstance(cotangent, SymbolicZero) for cotangent in of_doors)
    shared = shared_env(graph, weights, prepared)

    def one(saved: Any, given: Any, at_exits: Any, of_out: Any, of_doors: Any) -> Any:
        env = shared | dict(zip(graph.saved, saved, strict=True))
        heard = heard_at_exits(graph, env, of_out, at_exits, given)
        found = to_state(graph, env, None if filters else heard, of_out, of_doors)
        learned = feedback_gradients(graph, env, of_out)
        return found, at_units(graph, heard), learned

    inexact = [
        instantiate(cotangent)
        for cotangent, spec in zip(of_out, graph.out_leaves.specs, strict=True)
        if is_inexact(spec)
    ]
    args = saved, given, at_exits, inexact, list(map(instantiate, of_doors))
    found, heard, learned = per_sample(graph, one, (0, 0, 0, 0, 0))(*args)
    if graph.batch is not None:
        learned = [leaf.sum(0) for leaf in learned]
    if not filters:
        return found, None, learned
    return (None if quiet and not exits.direct else found), heard, learned


def credit_at_exits(
    graph: ETraceGraph, trace: Any, heard: Any, learned: Any, gradients: Sequence[Any]
) -> tuple[Any, ...]:
    """Add to the gradients what the traces give for signals at the exits, and those of
    learned feedback."""
    rule = graph.rule
    assert isinstance(rule, LocalRule)  # No other has exits.
    total = dict(zip(graph.weights, gradients, strict=True))
    total |= {r: total[r] + g for r, g in zip(graph.learned, learned, strict=True)}
    if heard is None:
        return tuple(total[ref] for ref in graph.weights)
    whole = rule.whole(graph.relations, trace)
    for relation, entries in zip(graph.relations, whole, strict=True):
        more = rule.gradient_at_exits(relation, entries, heard[relation.group])
        total[relation.ref] = total[relation.ref] + more
    return tuple(total[ref] for ref in graph.weights)


def silent_slots(
    graph: ETraceGraph, group: HiddenGroup, of_state: Any, *, single: bool
) -> tuple[bool, ...]:
    """The slots that nothing but their own unit reads, the loss included."""
    slots = []
    for leaf, silent in zip(group.slot_leaf, group.silent, strict=True):
        cotangent = of_state[graph.hidden.leaves[leaf]]
        slots.append(single and silent and isinstance(cotangent, SymbolicZero))
    return tuple(slots)


def is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def instantiate(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)
