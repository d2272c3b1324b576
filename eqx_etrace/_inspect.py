"""`jacobians` and `learning_signal`: the derivatives that a learning rule works with.

The step computes them and keeps none. Here they are for a person: to check a rule, to
write one's own, to look at a network. Both are pure, and work under jit and vmap.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Shaped

from ._errors import describe, sentence
from ._graph import ETraceGraph
from ._jacobian import (
    GroupJacobian,
    jacobians as group_jacobians,
    prepare,
    relation_jacobian,
    run,
    shared_env,
)
from ._relation import Relation
from ._same_step import partial_signal, same_step_total
from ._stage import named_leaves
from ._step import read_step
from ._step_credit import per_sample


class WeightJacobian(eqx.Module):
    """How one use y = op(..., w, ...) of a weight acts on its hidden group.

    With a batch, every array has it in front.

    **Attributes:**

    - `df`: per slot s' of the group an array of the shape of y: the derivative of the
      new slot s' of the unit that an element of y feeds (`relation.units`) by that
      element. It is the total derivative of the local step, paths from one new slot
      to another included; zero where y does not reach the slot.
    - `operands`: what the weight meets in the equation, in the order of the equation:
      for a product `W @ x` the vector `x`.

    !!! example

        ```python
        found = eqx_etrace.jacobians(graph, params, state, x)
        use = found.hidden_to_weight[0]
        print(graph.relations[0].name, use.df[0].shape, use.operands[0].shape)
        ```
    """

    df: tuple[Shaped[Array, "..."], ...]
    operands: tuple[Shaped[Array, "..."], ...]


class StepJacobians(eqx.Module):
    """One step and the derivatives of its local program; what `jacobians` returns.

    With a batch, every array has it in front.

    **Attributes:**

    - `out`, `state`: what the model returns.
    - `hidden_to_hidden`: per hidden group an array (units, slots, slots); entry
      [u, s', s] is the derivative of the new slot s' of unit u by its old slot s.
    - `hidden_to_weight`: per relation, a `WeightJacobian`.
    - `inputs`: per hidden group, the values that `group.transition` and
      `group.diagonal_jacobian` take; `graph.input_names(number)` says what they are.

    !!! example

        ```python
        found = eqx_etrace.jacobians(graph, params, state, x)
        memory = jnp.abs(found.hidden_to_hidden[0]).max()
        ```
    """

    out: PyTree
    state: PyTree
    hidden_to_hidden: tuple[Shaped[Array, "*batch _ _ _"], ...]
    hidden_to_weight: tuple[WeightJacobian, ...]
    inputs: tuple[tuple[Shaped[Array, "..."], ...], ...]


def jacobians(
    graph: ETraceGraph, params: PyTree, state: PyTree, x: PyTree
) -> StepJacobians:
    r"""One step, and the derivatives that its eligibility traces are made of.

    They belong to the local program, the step in which nothing passes from one unit to
    another, and are total derivatives: with the direct derivatives $D$ by the old and
    $L$ by the other new slots of a unit they are $(1 - L)^{-1} D$, and likewise for
    the weights. So a trace is $\epsilon \leftarrow J\,\epsilon + df\,\partial y /
    \partial w$ with $J$ of `hidden_to_hidden` and $df$ of `hidden_to_weight`.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `params`: `graph.params(model)`, or what an optimiser made of it.
    - `state`, `x`: as given to `compile`, the batch in front for a batched graph.

    **Returns:** a `StepJacobians`. Cost: the step and one reverse pass per slot.

    **Raises:** `ValueError` that names the first leaf whose structure, shape or dtype
    does not fit the graph.

    !!! example

        ```python
        found = jax.jit(eqx_etrace.jacobians)(graph, params, state, x)
        for group, J in zip(graph.groups, found.hidden_to_hidden):
            print(group.leaves, J.shape)  # ("state",) (8, 1, 1)
        ```
    """
    param_leaves, state_leaves, x_leaves = read_step(graph, params, state, x)
    weights, prepared = prepare(graph, param_leaves)
    reads = sorted({ref for group in graph.groups for ref in group.reads})
    known = (*graph.weights, *graph.prepared, *graph.program.constants)
    computed = [ref for ref in reads if ref not in known]

    def one(weights: Any, prepared: Any, state: Any, x: Any) -> Any:
        shared = shared_env(graph, weights, prepared)
        keep = (*graph.saved, *computed)
        new_state, out, kept = run(graph, shared, state, x, keep=keep)
        env = shared | dict(zip(keep, kept, strict=True))
        saved = kept[: len(graph.saved)]
        found = group_jacobians(graph, shared, state, saved)
        inputs = tuple(
            tuple(jnp.asarray(env[ref]) for ref in group.reads)
            for group in graph.groups
        )
        uses = tuple(
            _weight_jacobian(graph, relation, found[relation.group], env)
            for relation in graph.relations
        )
        return out, new_state, _hidden_to_hidden(graph, found), uses, inputs

    results = per_sample(graph, one, (None, None, 0, 0))(
        weights, prepared, state_leaves, x_leaves
    )
    out, new_state, *rest = results
    return StepJacobians(
        jtu.tree_unflatten(graph.out_leaves.treedef, out),
        jtu.tree_unflatten(
            graph.state_leaves.treedef, graph.state_leaves.join(new_state)
        ),
        *rest,
    )


def _hidden_to_hidden(
    graph: ETraceGraph, found: Sequence[GroupJacobian]
) -> tuple[Any, ...]:
    stacked = []
    for group, jacobian in zip(graph.groups, found, strict=True):
        rows = same_step_total(jacobian.transition, jacobian.within, group.order)
        stacked.append(jnp.stack([group.stack(row) for row in rows], axis=1))
    return tuple(stacked)


def _weight_jacobian(
    graph: ETraceGraph,
    relation: Relation,
    jacobian: GroupJacobian,
    env: Mapping[int, Any],
) -> WeightJacobian:
    group = graph.groups[relation.group]
    alike = (False,) * len(relation.slots)
    every = dataclasses.replace(relation.whole(), alike=alike)
    local = relation_jacobian(graph, every, jacobian, env)
    spread = [
        [None if factor is None else relation.map.spread(factor) for factor in row]
        for row in local.within
    ]
    rows = same_step_total([[df] for df in local.direct], spread, group.order)
    df = tuple(
        jnp.zeros(relation.y_shape, dtype) if row[0] is None else row[0].astype(dtype)
        for row, dtype in zip(rows, group.dtypes, strict=True)
    )
    operands = enumerate(local.operands)
    others = (value for k, value in operands if k != relation.operand)
    return WeightJacobian(df, tuple(jnp.asarray(value) for value in others))


def learning_signal(
    graph: ETraceGraph, params: PyTree, state: PyTree, x: PyTree, cotangent: PyTree
) -> tuple[Shaped[Array, "*batch _ _"], ...]:
    r"""dL/dh per hidden group: what single-step credit multiplies the traces with.

    Derivatives of the loss by the *new* state of this step, everything that the step
    does with it included (readouts, later layers), but not the paths from one new slot
    of a unit to another slot of the same unit: those are in the traces, and would count
    twice. From the total derivative $T$ it is $l = T - L^T T$, with $L$ the
    derivatives of the new slots of a unit by each other.

    For a graph with `vjp="single-step"` the gradient of a related weight is the sum of
    `l` times its trace. For a multi-step graph `l` means the same, the derivative by
    the new state, but is not all: what passes the new state by (a spike emitted before
    a reset, a skip connection) is in the ordinary gradient of the step, and `step` adds
    dL/dh by the *old* state times the old trace.

    **Arguments:**

    - `graph`, `params`, `state`, `x`: as for `eqx_etrace.step`.
    - `cotangent`: the derivative of the loss by `out`, a pytree like `out`, with the
      batch in front for a batched graph. None stands for zeros; leaves for outputs that
      are not floating-point are not read.

    **Returns:** per hidden group an array (units, slots), with the batch in front for
    a batched graph.

    **Raises:** `ValueError` that names the first leaf that does not fit.

    !!! example

        ```python
        out, *_ = eqx_etrace.step(graph, params, state, trace, x)
        cotangent = jax.grad(lambda out: jnp.sum((out - target) ** 2))(out)
        (signal,) = eqx_etrace.learning_signal(graph, params, state, x, cotangent)
        ```
    """
    param_leaves, state_leaves, x_leaves = read_step(graph, params, state, x)
    given = _cotangent_leaves(graph, cotangent)
    weights, prepared = prepare(graph, param_leaves)

    def one(weights: Any, prepared: Any, state: Any, x: Any, given: Any) -> Any:
        shared = shared_env(graph, weights, prepared)

        def outputs(at_door: Any) -> Any:
            _, out, saved = run(graph, shared, state, x, at_door=at_door)
            return _differentiable(graph, out), saved

        avals = [graph.program.avals[ref] for ref in graph.hidden.doors]
        zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
        _, pull, saved = jax.vjp(outputs, zeros, has_aux=True)
        total = dict(enumerate(pull(_differentiable(graph, given))[0]))
        found = group_jacobians(graph, shared, state, saved)
        return tuple(
            group.stack(partial_signal(group.read(total), jacobian.within))
            for group, jacobian in zip(graph.groups, found, strict=True)
        )

    return per_sample(graph, one, (None, None, 0, 0, 0))(
        weights, prepared, state_leaves, x_leaves, given
    )


def _inexact(spec: Any) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.inexact)


def _differentiable(graph: ETraceGraph, out: Sequence[Any]) -> list[Any]:
    pairs = zip(out, graph.out_leaves.specs, strict=True)
    return [value for value, spec in pairs if _inexact(spec)]


def _cotangent_leaves(graph: ETraceGraph, cotangent: PyTree) -> list[Any]:
    table, lead = graph.out_leaves, () if graph.batch is None else (graph.batch,)

    def fill(spec: Any, given: Any) -> Any:
        if spec is None:
            return given
        zero = given is None or not _inexact(spec)
        return jnp.zeros((*lead, *spec.shape), spec.dtype) if zero else given

    template = jtu.tree_unflatten(table.treedef, table.specs)
    remedy = "Pass the derivative of the loss by `out`, None where it is zero."
    try:
        filled = jtu.tree_map(fill, template, cotangent, is_leaf=lambda s: s is None)
    except ValueError:
        raise ValueError(_other_structure(graph, cotangent, remedy)) from None
    try:
        leaves = table.flatten(filled, graph.batch, remedy)
    except ValueError as error:
        raise ValueError(f"cotangent: {error}") from None
    return [jnp.asarray(leaf) for leaf in leaves]


def _other_structure(graph: ETraceGraph, cotangent: PyTree, remedy: str) -> str:
    got = dict(named_leaves("out", cotangent, keep_none=True))
    table = graph.out_leaves
    for path, spec in zip(table.paths, table.specs, strict=True):
        if path not in got:
            expected = describe(spec)
            return sentence(f"cotangent: {path}", "nothing", expected, remedy)
    for path, leaf in got.items():
        if path not in table.paths:
            where = f"cotangent: {path}"
            return sentence(where, describe(leaf), "nothing there", remedy)
    structure = str(jtu.tree_structure(cotangent))
    return sentence("cotangent", structure, str(table.treedef), remedy)
