"""`compile`: from a model to a frozen `ETraceGraph`.

stage           trace one step, keep the key paths
canonicalise    flatten it, splice in what only wraps
find_hidden     which state leaves a weight can influence
find_units      which hidden elements are one neuron
find_locality   what must be cut so that neurons stay apart, and who feeds whom
relations       which use of a weight feeds which units
find_bypasses   whether the new state is the only way out
find_exits      where the units act beyond themselves (signals other than the exact)
with_facts      which traces are the same for all units (local rules)
_with_rule      which rule each weight has, and what their traces share (local rules)
structure       which numbers act on which (global rules that ask for it)
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ._at_exits import count_errors
from ._bind import structure, weight_uses
from ._canonicalise import canonicalise, nested
from ._credit import (
    Analysis,
    decide,
    find_bypasses,
    of_whole_state,
    unrelated_uses,
)
from ._decision import Decision, Kind
from ._errors import CompileError
from ._exits import (
    check_exits,
    check_feedback,
    find_exits,
    passing,
    with_learned,
)
from ._graph import ETraceGraph, Options
from ._group import HiddenGroup
from ._hidden import Hidden, find_hidden, params_of
from ._invariant import with_facts
from ._jaxpr import Equation, Origin, Program, live
from ._locality import Locality, find_locality
from ._make_group import detached, make_group
from ._op_rules import OpRules, check_op_rules, own_elementwise
from ._reads import Reads
from ._relation import (
    Relation,
    Use,
    find_uses,
    make_relation,
    related_groups,
)
from ._rules import DNI, DRTRL, GlobalRule, Kappa, LocalRule, Weights
from ._shared import share_names, shared_runs
from ._signals import AdaptiveFeedback, Bootstrapped, Symmetric
from ._space import credited
from ._stage import Staged, stage
from ._synthetic import check_synthesiser
from ._units import Units, find_units


Vjp = Literal["auto", "single-step", "multi-step"]


def _find_hidden(program: Program, staged: Staged) -> Hidden:
    first = staged.params.count
    old = program.inputs[first : first + staged.state.parts.count]
    new = program.outputs[: staged.state.parts.count]
    leaves = find_hidden(program, old, new)
    leaves = tuple(i for i in leaves if program.avals[old[i]].size)
    if not leaves:
        raise CompileError(_nothing_hidden(staged))
    return Hidden(
        leaves,
        tuple(old[i] for i in leaves),
        tuple(new[i] for i in leaves),
        tuple(program.avals[old[i]].shape for i in leaves),
    )


def _nothing_hidden(staged: Staged) -> str:
    params = ", ".join(staged.params.paths) or "none"
    state = ", ".join(staged.state.parts.paths) or "none"
    return (
        "No trainable weight reaches the state: got the params "
        f"{params} and the state leaves {state}, expected at least one floating-point "
        "state leaf that a param influences. Check that the step returns the new "
        "state, that `trainable` selects the recurrent weights, and that no "
        "stop_gradient or comparison without surrogate gradient lies between."
    )


def _body(program: Program) -> tuple[Equation, ...]:
    return tuple(
        equation
        for equation in program.equations
        if equation.effectful
        or any(program.origins[ref] is Origin.DATA for ref in equation.outputs)
    )


def _relate(
    program: Program,
    hidden: Hidden,
    units: Units,
    locality: Locality,
    staged: Staged,
    uses: Sequence[Use],
    names: dict[int, tuple[str, ...]],
    op_rules: OpRules,
    rule: LocalRule | GlobalRule,
    reads: Reads,
) -> tuple[tuple[HiddenGroup, ...], tuple[Relation, ...]]:
    pairs = [(use, n) for use in uses for n in related_groups(use, units, locality)]
    groups = []
    for number in range(len(units.elements)):
        ys = dict.fromkeys(use.y for use, n in pairs if n == number)
        groups.append(
            make_group(
                program,
                hidden,
                units,
                locality,
                number,
                tuple(ys),
                staged.state.parts.paths,
                rule.leak,
            )
        )
    groups = detached(groups, rule.detach)
    relations = [
        make_relation(
            program, use, n, units, locality, groups[n], names[use.ref], op_rules, reads
        )
        for use, n in pairs
    ]
    if not relations and isinstance(rule, LocalRule):
        raise CompileError(_no_relation(staged, groups))
    return tuple(groups), tuple(relations)


def _no_relation(staged: Staged, groups: Sequence[HiddenGroup]) -> str:
    leaves = ", ".join(leaf for group in groups for leaf in group.leaves)
    params = ", ".join(staged.params.paths)
    return (
        f"No weight feeds single units: got the params {params}, which reach the "
        f"hidden state {leaves} only through equations that mix units, expected at "
        "least one weight with a path to the new state of one unit. Check for a mean, "
        "sort or product without weights between the last weight and the state."
    )


def _decide_vjp(vjp: str, bypasses: list[Decision]) -> tuple[str, list[Decision]]:
    if vjp == "auto":
        return ("multi-step" if bypasses else "single-step"), bypasses
    if vjp == "single-step" and bypasses:
        warnings = [
            Decision(
                Kind.WARNING,
                f"{d.reason}, and single-step credit, which was asked for, misses it",
                d.weight,
                d.state,
                d.source,
            )
            for d in bypasses
        ]
        return vjp, warnings
    return vjp, bypasses


def _bootstrapped_vjp(vjp: Vjp) -> Vjp:
    if vjp == "single-step":
        raise ValueError(
            "vjp: got 'single-step' with DNI, expected 'multi-step': the guess comes "
            "in at the end of a window with an exact gradient. Leave it out."
        )
    return "multi-step"


def _check_arguments(rule: Any, vjp: Any, max_unroll: Any, max_slots: Any) -> None:
    if not isinstance(rule, LocalRule | GlobalRule):
        raise TypeError(
            f"rule: got {rule!r}, expected a learning rule such as DRTRL(). Pass an "
            "instance, not the class."
        )
    if vjp not in ("auto", "single-step", "multi-step"):
        raise ValueError(
            f"vjp: got {vjp!r}, expected 'auto', 'single-step' or 'multi-step'. Leave "
            "it out to let the compiler decide."
        )
    if not isinstance(max_unroll, int) or max_unroll < 0:
        raise ValueError(
            f"max_unroll: got {max_unroll!r}, expected an integer of at least 0. "
            "Compile time grows with it; 64 is enough for most loops inside a step."
        )
    if not isinstance(max_slots, int) or not 1 <= max_slots <= 62:
        raise ValueError(
            f"max_slots: got {max_slots!r}, expected an integer from 1 to 62. Traces "
            "grow with it; 16 is enough for most neurons."
        )


def compile(
    model: Any,
    state: PyTree,
    x: PyTree,
    rule: LocalRule | GlobalRule = DRTRL(),  # noqa: B008 a frozen module without arrays
    *,
    call: Callable[[Any, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
    trainable: PyTree = eqx.is_inexact_array,
    batched: bool = False,
    vjp: Vjp = "auto",
    max_unroll: int = 64,
    max_slots: int = 16,
    op_rules: OpRules = MappingProxyType({}),
) -> ETraceGraph:
    """Compile one time step of a model for online learning with eligibility traces.

    The model needs no marks and no special layers: its step is traced once, on the
    shapes of `state` and `x`, and read from the jaxpr. Do it once, outside of jit.

    **Arguments:**

    - `model`: any Equinox module (or pytree with arrays) with one time step
      `model(x, state) -> (out, state)`.
    - `state`, `x`: a state and an input, any pytrees of arrays or of
      `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.
    - `rule`: the learning rule.
    - `call`: adapts a model with another convention:
      `call(model, x, state) -> (out, state)`.
    - `trainable`: which leaves are params: a predicate or a filter spec, as for
      `equinox.partition`.
    - `batched`: the leading axis of every leaf of `state` and `x` is the batch, and the
      model is unbatched, as under `jax.vmap`.
    - `vjp`: `"single-step"` (learning signal times trace), `"multi-step"` (ordinary
      gradient of the step plus the trace at its start), or `"auto"`: single-step where
      the new state is the only way out of the step, multi-step otherwise.
    - `max_unroll`: the longest `jax.lax.scan` inside the step that is unrolled where a
      weight or the hidden state passes through.
    - `max_slots`: how many state variables a unit may have.
    - `op_rules`: what to do with own primitives, or with JAX's before the built-in op
      rules see them. To each primitive it gives a function from an
      `eqx_etrace.OpUse` to an `eqx_etrace.OpRule`, or to None for the built-in ones;
      or `"elementwise"`: the primitive reads each operand where it writes, after
      broadcasting, and nowhere else. An unknown primitive mixes, and the trace of its
      weights is found by automatic differentiation.

    **Returns:** a frozen `ETraceGraph`.

    **Raises:** `CompileError` with the key path, the line of code and the remedy;
    `TypeError` or `ValueError` for an argument that is none of the above.

    !!! example

        ```python
        cell = eqx.nn.GRUCell(3, 8, key=jax.random.key(0))
        graph = eqx_etrace.compile(
            cell, jnp.zeros(8), jnp.zeros(3), call=lambda m, x, h: (m(x, h),) * 2
        )
        print(graph.report())
        ```
    """
    _check_arguments(rule, vjp, max_unroll, max_slots)
    check_op_rules(op_rules)
    staged = stage(model, state, x, call=call, trainable=trainable, batched=batched)
    program, values, rewritten = canonicalise(staged, max_unroll)
    hidden = _find_hidden(program, staged)
    constants = dict(zip(program.constants, values, strict=True))
    own = own_elementwise(program, op_rules)
    reads = Reads(program, constants, own, nested(max_unroll))
    units = find_units(program, hidden, reads, max_slots)
    locality = find_locality(program, hidden, units, reads, rule.scope)
    sources = params_of(program, staged.params.count)
    uses = find_uses(program)
    names = {
        use.ref: tuple(staged.params.paths[i] for i in sorted(sources[use.ref]))
        for use in uses
    }
    groups, relations = _relate(
        program, hidden, units, locality, staged, uses, names, op_rules, rule, reads
    )
    analysis = Analysis(
        program=program,
        hidden=hidden,
        reads=reads,
        locality=locality,
        groups=groups,
        relations=relations,
        unrelated=unrelated_uses(uses, relations, names),
        param_paths=staged.params.paths,
        state_paths=staged.state.parts.paths,
        out_paths=staged.out.paths,
    )
    if isinstance(rule, DNI):
        vjp = _bootstrapped_vjp(vjp)
    chosen, bypasses = _decide_vjp(vjp, find_bypasses(analysis))
    graph = _assemble(
        staged,
        program,
        values,
        hidden,
        groups,
        relations,
        rule,
        chosen,
        (*decide(analysis), *rewritten, *bypasses),
        Options(call, max_unroll, max_slots, tuple(op_rules.items())),
    )
    if isinstance(rule, GlobalRule):
        bound = rule.bound(
            lambda: structure(graph, reads), lambda: weight_uses(graph, op_rules)
        )
        kept = of_whole_state(graph.decisions, credited(graph))
        return dataclasses.replace(graph, rule=bound, decisions=kept)
    return _with_rule(with_facts(_with_exits(graph, reads, bypasses)))


def _with_exits(
    graph: ETraceGraph, reads: Reads, bypasses: Sequence[Decision]
) -> ETraceGraph:
    """The graph that knows where its rule's signals come in, if they need that."""
    rule = graph.rule
    assert isinstance(rule, LocalRule)
    if isinstance(rule.signal, Symmetric) and not rule.filters:
        return graph
    if isinstance(rule.signal, AdaptiveFeedback | Bootstrapped):
        graph = with_learned(graph, rule.signal.path)
    if isinstance(rule.signal, Bootstrapped):
        if not isinstance(rule, DNI):
            raise CompileError(
                f"{type(rule).__name__} with Bootstrapped: got a trace of the past and "
                "a guess of the future, expected one of them: some credit would count "
                "twice. Compile with DNI."
            )
        check_synthesiser(graph)
        return graph
    if graph.vjp == "multi-step":
        why = "; ".join(f"{d.about}: {d.because}" for d in bypasses)
        raise CompileError(
            f"{type(rule).__name__} with {type(rule.signal).__name__}: got a step with "
            f"the multi-step VJP ({why or 'as asked for'}), expected single-step "
            "credit: a signal that is no derivative of the loss has no exact window. "
            "Compile with vjp='single-step', or with the signal Symmetric()."
        )
    exits = find_exits(graph, reads)
    check_exits(graph, exits)
    errors = count_errors(graph, exits)
    if isinstance(rule.signal, AdaptiveFeedback):
        check_feedback(graph, exits, rule.signal.path, errors)
    signal = rule.signal.bound(exits.exits, errors)
    average = isinstance(rule, Kappa) and rule.average
    passes = passing(graph) if average else [False] * len(graph.relations)
    relations = tuple(
        dataclasses.replace(
            r, exits=sum(bool(at.places[r.group]) for at in exits.exits), passes=each
        )
        for r, each in zip(graph.relations, passes, strict=True)
    )
    saved = tuple(sorted({*graph.saved, *exits.context}))
    return dataclasses.replace(
        graph,
        exits=exits,
        relations=relations,
        saved=saved,
        rule=rule.with_signal(signal),
    )


def _with_rule(graph: ETraceGraph) -> ETraceGraph:
    """The graph with the rule for its weights, and relations that know what they
    share."""
    leaves = zip(graph.param_leaves.paths, graph.param_leaves.specs, strict=True)
    shapes = {path: spec.shape for path, spec in leaves}
    weights = Weights(
        shapes, graph.relations, share_names(graph), shared_runs(graph), graph.batch
    )
    assert isinstance(graph.rule, LocalRule)
    bound, decisions = graph.rule.bound(weights)
    shared = weights.shared([id(bound.of(relation)) for relation in graph.relations])
    relations = tuple(
        relation if bound.of(relation).factorised else relation.whole()
        for relation in shared
    )
    decisions = (*graph.decisions, *decisions)
    return dataclasses.replace(
        graph, rule=bound, relations=relations, decisions=decisions
    )


def _assemble(
    staged: Staged,
    program: Program,
    values: Sequence[Any],
    hidden: Hidden,
    groups: tuple[HiddenGroup, ...],
    relations: tuple[Relation, ...],
    rule: LocalRule | GlobalRule,
    vjp: str,
    decisions: tuple[Decision, ...],
    options: Options,
) -> ETraceGraph:
    body = _body(program)
    read = {ref for equation in body for ref in equation.values}
    weights, prepared = (
        tuple(ref for ref in sorted(read) if program.origins[ref] is origin)
        for origin in (Origin.WEIGHT, Origin.PREPARED)
    )
    rest = [equation for equation in program.equations if equation not in body]
    preparation = tuple(live(rest, weights + prepared))
    context = {ref for group in groups for ref in group.context}
    operands = {ref for relation in relations for ref in relation.values}
    saved = {ref for ref in context | operands if program.origins[ref] is Origin.DATA}
    return ETraceGraph(
        groups=groups,
        relations=relations,
        rule=rule,
        vjp=vjp,
        batch=staged.batch,
        decisions=decisions,
        program=program,
        constants=tuple(jnp.asarray(value) for value in values),
        fixed=staged.fixed,
        static=staged.static,
        trainable=staged.trainable,
        param_leaves=staged.params,
        state_leaves=staged.state,
        x_leaves=staged.x,
        out_leaves=staged.out,
        hidden=hidden,
        preparation=preparation,
        body=body,
        weights=weights,
        prepared=prepared,
        saved=tuple(sorted(saved)),
        options=options,
    )
