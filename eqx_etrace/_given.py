"""The argument `signal` of a step or a sequence: a modulator, or a target."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._errors import describe, is_array_like, sentence
from ._graph import ETraceGraph
from ._rules import GlobalRule


def read_given(
    graph: ETraceGraph, signal: PyTree, targets: PyTree = None, steps: int | None = None
) -> Any:
    """What the rule's learning signal is given, checked, time (with `steps`) and batch
    in front; None where it takes nothing."""
    rule = graph.rule
    wants = "nothing" if isinstance(rule, GlobalRule) else rule.signal.given
    if wants == "nothing":
        if signal is not None:
            expected = "nothing, since the learning signal of this rule takes none"
            remedy = "Leave it out, or compile with `Modulatory()`."
            raise ValueError(sentence("signal", describe(signal), expected, remedy))
        return None
    lead = () if steps is None else (steps,)
    if graph.batch is not None:
        lead = (*lead, graph.batch)
    if wants == "target":
        return _target(graph, targets if signal is None else signal, lead)
    return _modulators(graph, signal, lead, 0 if steps is None else 1)


def _target(graph: ETraceGraph, target: PyTree, lead: tuple[int, ...]) -> Any:
    """All numbers of a target side by side."""
    size = graph.rule.signal.size  # pyright: ignore[reportAttributeAccessIssue]
    parts, remedy = [], "Pass the target of the step as numbers, classes as one-hot."
    for leaf in jtu.tree_leaves(target):
        fits = is_array_like(leaf) and jnp.issubdtype(
            jnp.asarray(leaf).dtype, jnp.floating
        )
        if not fits or jnp.shape(leaf)[: len(lead)] != lead:
            expected = f"a floating-point array with {lead} in front"
            raise ValueError(sentence("signal", describe(leaf), expected, remedy))
        parts.append(jnp.reshape(leaf, (*lead, -1)))
    width = sum(part.shape[-1] for part in parts)
    if width != size:
        got, expected = f"{width} numbers", f"{size}, the `size` of TargetProjection"
        raise ValueError(sentence("signal", got, expected, remedy))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate(parts, axis=-1)


def _modulators(
    graph: ETraceGraph, signal: PyTree, lead: tuple[int, ...], time: int
) -> tuple[Any, ...]:
    """One array per hidden group: a scalar or a vector over units, `lead` in front."""
    groups = graph.groups
    each = signal if isinstance(signal, tuple) else (signal,) * len(groups)
    if len(each) != len(groups):
        got, expected = f"{len(each)} entries", f"{len(groups)}, one per hidden group"
        remedy = "Pass one array for all groups, or a tuple as `graph.groups` has them."
        raise ValueError(sentence("signal", got, expected, remedy))
    found = []
    for number, leaf in enumerate(each):
        units = groups[number].units
        front = [lead[:time], lead] if len(lead) > time else [lead]
        shapes = [*front, (*lead, units)]
        if len(lead) > time:
            shapes.append((*lead[:time], 1, units))
        fits = is_array_like(leaf) and jnp.shape(leaf) in shapes
        if not fits or not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            remedy = "Modulators are real numbers: for all, per sample or per unit."
            where = f"signal (hidden group {number})"
            raise ValueError(
                sentence(where, describe(leaf), f"an array {expected}", remedy)
            )
        leaf = jnp.asarray(leaf)
        per_unit = leaf.ndim == len(lead) + 1
        if per_unit and not _one_per_unit(graph, number):
            raise ValueError(
                f"signal: got one number per unit for hidden group {number}, expected "
                "one for all: a unit of it acts through several elements of a value. "
                "Pass a scalar, or one per sample."
            )
        if leaf.ndim < len(lead):
            leaf = leaf[..., None]
        shape = (*lead, units) if per_unit else lead
        found.append(jnp.broadcast_to(leaf, shape))
    return tuple(found)


def _one_per_unit(graph: ETraceGraph, group: int) -> bool:
    assert graph.exits is not None  # Modulators only come to exits.
    return all(at.places[group] is not None for at in graph.exits.exits)
