"""What a network does while it learns, in a few numbers per step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ._at_exits import gains, slopes
from ._canonicalise import nested
from ._exits import find_exits
from ._graph import ETraceGraph
from ._jacobian import jacobians, prepare, run, shared_env
from ._jaxpr import evaluate
from ._op_rules import own_elementwise
from ._reads import Reads
from ._rules import GlobalRule
from ._same_step import same_step_total
from ._step import check_trace, read_step
from ._step_credit import per_sample


class Monitor(NamedTuple):
    """What `monitor` returns; means are over units and batch.

    **Attributes:**

    - `trace_norm`: per relation, in the order of `graph.relations`, the norm of the
      trace of a sample; of a rule that follows the whole state one number.
    - `rate`: per hidden group, for each value by which its units act beyond themselves
      the mean of its size: where that is a spike, the firing rate per step.
    - `radius`: per hidden group the largest spectral radius of D, the Jacobian of a
      unit's new state by its old state, over units and batch: above 1 a trace grows.
    - `dead`: per hidden group the share of units that do nothing and do not learn:
      what they send out is zero, and so is its derivative by what they receive.
    - `saturated`: the share of those that send something out all the same.

    NaN where a group does not act beyond its units, or not by one value for each.

    !!! example

        ```python
        found = eqx_etrace.monitor(graph, params, state, trace, x)
        assert isinstance(found, eqx_etrace.Monitor) and found.radius[0] < 2
        ```
    """

    trace_norm: tuple[Float[Array, ""], ...]
    rate: tuple[tuple[Float[Array, ""], ...], ...]
    radius: tuple[Float[Array, ""], ...]
    dead: tuple[Float[Array, ""], ...]
    saturated: tuple[Float[Array, ""], ...]


def monitor(
    graph: ETraceGraph,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    x: PyTree,
    *,
    threshold: float = 1e-3,
) -> Monitor:
    """A few numbers about one step: traces, firing, memory, dead and saturated units.

    A pure function of what `eqx_etrace.step` takes. Next to that, in one jit or scan,
    XLA computes the step and its Jacobians once.

    **Arguments:**

    - `graph`, `params`, `state`, `trace`, `x`: as for `eqx_etrace.step`.
    - `threshold`: a derivative below it counts as zero: that of a value by which a unit
      acts, by what its weights give to it.

    **Returns:** a `Monitor`, a pytree of scalars.

    **Raises:** `ValueError` that names the first leaf that does not fit.

    !!! example

        ```python
        @jax.jit
        def watched(state, trace, x):
            found = eqx_etrace.monitor(graph, params, state, trace, x)
            return eqx_etrace.step(graph, params, state, trace, x), found
        ```
    """
    param_leaves, state_leaves, x_leaves = read_step(graph, params, state, x)
    check_trace(graph, trace)
    weights, prepared = prepare(graph, param_leaves)
    graph = _listening(graph)
    shared = shared_env(graph, weights, prepared)

    def one(state: Any, x: Any) -> Any:
        _, _, saved = run(graph, shared, state, x)
        found = jacobians(graph, shared, state, saved)
        gain = gains(graph, shared, saved, found)
        slope = slopes(graph, shared, state, saved, gain)
        env = shared | dict(zip(graph.saved, saved, strict=True))
        return [
            _of_group(graph, env, number, found[number], slope[number], threshold)
            for number in range(len(graph.groups))
        ]

    groups = per_sample(graph, one, (0, 0))(state_leaves, x_leaves)
    rate, radius, dead, saturated = zip(*groups, strict=True)
    mean = jax.tree.map(jnp.mean, (rate, dead, saturated))
    norms = _norms(graph, trace)
    return Monitor(norms, mean[0], tuple(map(jnp.max, radius)), *mean[1:])


def _listening(graph: ETraceGraph) -> ETraceGraph:
    """The graph that knows where its units act beyond themselves."""
    if graph.exits is not None:
        return graph
    options = graph.options
    assert options is not None  # Every compiled graph has them.
    if any(isinstance(constant, Tracer) for constant in graph.constants):
        raise ValueError(
            "graph: got it as an argument of a function under jit, expected one that "
            "the function closes over: its constants say where units act. Use "
            "`functools.partial(eqx_etrace.monitor, graph)`."
        )
    constants = dict(zip(graph.program.constants, graph.constants, strict=True))
    own = own_elementwise(graph.program, dict(options.op_rules))
    reads = Reads(graph.program, constants, own, nested(options.max_unroll))
    with jax.ensure_compile_time_eval():
        exits = find_exits(graph, reads)
    saved = tuple(sorted({*graph.saved, *exits.context}))
    return dataclasses.replace(graph, exits=exits, saved=saved)


def _of_group(
    graph: ETraceGraph,
    env: Any,
    number: int,
    jacobian: Any,
    slope: Sequence[Sequence[Any]],
    threshold: float,
) -> tuple[Any, ...]:
    """Of one sample: rates, the radius of each unit, and whether it is dead or
    saturated."""
    group, exits = graph.groups[number], graph.exits
    assert exits is not None  # `_listening` has found them.
    values = evaluate(exits.equations, env)
    sent = []
    for ref, at in zip(exits.refs, exits.exits, strict=True):
        if at.places[number]:
            flat = jnp.abs(values[ref]).reshape(-1)
            sent.append(flat[jnp.asarray(at.places[number])])
    rates = tuple(map(jnp.mean, sent))
    rows = same_step_total(jacobian.transition, jacobian.within, group.order)
    matrix = jnp.stack([group.stack(row) for row in rows], axis=1)
    radius = spectral_radius(matrix)
    if not sent:
        nan = jnp.full((), jnp.nan, radius.dtype)
        return rates, radius, nan, nan
    maps = {relation.y: relation.map for relation in graph.relations}
    learns = jnp.zeros(group.units, bool)
    for row in slope:
        for ref, derivative in zip(group.uses, row, strict=True):
            size = maps[ref].gather(jnp.abs(derivative))
            learns = learns | (size >= threshold)
    acts = jnp.any(jnp.stack(sent) > 0, axis=0)
    dtype = radius.dtype
    dead, saturated = ~learns & ~acts, ~learns & acts
    return rates, radius, dead.astype(dtype), saturated.astype(dtype)


def spectral_radius(matrix: Float[Array, "*lead _ _"]) -> Float[Array, "*lead"]:
    """The largest size of an eigenvalue; for three rows and more to within a hundredth,
    by the norm of a high power, which every device computes."""
    size = matrix.shape[-1]
    if size == 1:
        return jnp.abs(matrix[..., 0, 0])
    if size == 2:
        (a, b), (c, d) = ([matrix[..., i, j] for j in (0, 1)] for i in (0, 1))
        half, det = (a + d) / 2, a * d - b * c
        gap = half**2 - det
        real = jnp.abs(half) + jnp.sqrt(jnp.maximum(gap, 0))
        return jnp.where(gap < 0, jnp.sqrt(jnp.maximum(det, 0)), real)
    log, tiny = jnp.zeros(matrix.shape[:-2], matrix.dtype), jnp.finfo(matrix.dtype).tiny
    power, doublings = matrix, 10
    for n in range(doublings + 1):
        norm = jnp.maximum(jnp.sqrt(jnp.sum(power**2, axis=(-2, -1))), tiny)
        log = log + jnp.log(norm) / 2**n
        power = power / norm[..., None, None]
        power = power @ power
    return jnp.exp(log)


def _norms(graph: ETraceGraph, trace: PyTree) -> tuple[Any, ...]:
    """The norm of the trace of a sample, mean over the batch."""
    each = [trace] if isinstance(graph.rule, GlobalRule) else list(trace)
    lead = 0 if graph.batch is None else 1
    found = []
    for entries in each:
        total: Any = jnp.zeros(() if graph.batch is None else (graph.batch,))
        for leaf in jax.tree.leaves(entries):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                axes = tuple(range(lead, leaf.ndim))
                total = total + jnp.sum(jnp.abs(leaf) ** 2, axis=axes).astype(
                    total.dtype
                )
        found.append(jnp.mean(jnp.sqrt(total)))
    return tuple(found)
