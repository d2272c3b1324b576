"""`compile`: from a model to a frozen `ETraceGraph`.

stage           trace one step, keep the key paths
canonicalise    flatten it, splice in what only wraps
find_hidden     which state leaves a weight can influence
find_units      which hidden elements are one neuron
find_locality   what must be cut so that neurons stay apart, and who feeds whom
relations       which use of a weight feeds which units
find_bypasses   whether the new state is the only way out
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Shaped

from ._canonicalise import canonicalise, nested
from ._credit import Analysis, decide, find_bypasses, unrelated_uses
from ._decision import Decision, Kind
from ._diagram import input_names, to_mermaid, to_text
from ._errors import CompileError
from ._group import HiddenGroup
from ._hidden import Hidden, find_hidden, params_of
from ._jaxpr import Equation, Origin, Program, live
from ._locality import Locality, find_locality
from ._make_group import make_group
from ._op_rules import OpRules, check_op_rules, own_elementwise
from ._reads import Reads
from ._relation import (
    Relation,
    Use,
    find_uses,
    make_relation,
    related_groups,
)
from ._report import Report, explain, report
from ._rules import DRTRL, LocalRule
from ._stage import Frozen, Leaves, Staged, stage
from ._structure import same_structure
from ._units import Units, find_units


Vjp = Literal["auto", "single-step", "multi-step"]


class ETraceGraph(eqx.Module):
    """What the compiler knows about one time step of a model; frozen, a pytree.

    Its arrays (constants of the step, untrained arrays of the model) are leaves, all
    the rest is static: a graph may be closed over, or passed through `eqx.filter_jit`,
    `jax.jit` and scan carries. Made by `eqx_etrace.compile`; for jit two graphs are
    never equal, so compile once, outside jit. `same_structure` compares two graphs.

    **Attributes:**

    - `groups`: the `HiddenGroup`s.
    - `relations`: the `Relation`s, one trace each.
    - `rule`: the learning rule.
    - `vjp`: `"single-step"` or `"multi-step"`, as it was decided.
    - `batch`: the batch size, None for an unbatched graph.
    - `decisions`: every `Decision` of the compiler.

    !!! example

        ```python
        print(graph)             # one line
        print(graph.report())    # a table, with every reason
        print(graph.to_text())   # a drawing for the terminal
        ```
    """

    groups: tuple[HiddenGroup, ...]
    relations: tuple[Relation, ...]
    rule: LocalRule
    vjp: str = eqx.field(static=True)
    batch: int | None = eqx.field(static=True)
    decisions: tuple[Decision, ...] = eqx.field(static=True)
    program: Program = eqx.field(static=True)
    constants: tuple[Shaped[Array, "..."], ...]
    fixed: PyTree
    static: Frozen = eqx.field(static=True)
    trainable: Frozen = eqx.field(static=True)
    """Which leaves of the model are params."""
    param_leaves: Leaves = eqx.field(static=True)
    state_leaves: Leaves = eqx.field(static=True)
    x_leaves: Leaves = eqx.field(static=True)
    out_leaves: Leaves = eqx.field(static=True)
    hidden: Hidden = eqx.field(static=True)
    preparation: tuple[Equation, ...] = eqx.field(static=True)
    body: tuple[Equation, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)
    """The weights that the body reads from the preparation."""
    prepared: tuple[int, ...] = eqx.field(static=True)
    """What else it reads from there: made of params, without a derivative."""
    saved: tuple[int, ...] = eqx.field(static=True)
    """The values of the body that traces and local programs read."""

    def params(self, model: Any) -> PyTree:
        """The trainable part of `model`, which must have the structure compiled.

        **Raises:** `ValueError` if the model does not fit.
        """
        structure = jtu.tree_structure(model)
        if structure != self.trainable.treedef:
            raise ValueError(
                f"model: got the structure {structure}, expected "
                f"{self.trainable.treedef}. Compile again after changing the model."
            )
        params = eqx.filter(model, self.trainable.thaw())
        self.param_leaves.flatten(params, None, "Pass the model that was compiled.")
        return params

    def model(self, params: PyTree) -> Any:
        """The whole model with these params: the inverse of `params`."""
        remedy = "Pass params as `graph.params(model)` gives them."
        self.param_leaves.flatten(params, None, remedy)
        return eqx.combine(params, self.fixed, self.static.thaw())

    def report(self) -> Report:
        """A table for a person: weights, hidden groups, and every reason.

        Every weight that gets no temporal credit is named, with the reason.

        !!! example

            ```python
            print(graph.report())
            ```
        """
        return report(self)

    def explain(self, *, weight: str | None = None, state: str | None = None) -> Report:
        """The decisions about one param or state leaf, by its key path.

        **Arguments:**

        - `weight`: a key path such as `"cell.weight_hh"`.
        - `state`: a key path such as `"state[0]"`.

        **Raises:** `ValueError` if there is no such leaf; the message lists them.
        """
        return explain(self, weight, state)

    def to_text(self) -> Report:
        """The graph as plain text: what feeds each hidden group and each output.

        !!! example

            ```python
            print(graph.to_text())
            ```
        """
        return to_text(self)

    def to_mermaid(self) -> Report:
        """The graph as the text of a Mermaid flowchart.

        Weights, hidden groups (units x slots) and outputs are nodes. Solid arrows carry
        credit; dashed arrows are what is cut between units or groups, and weights
        that are credited for the current step alone. GitHub, GitLab, notebooks and
        documentation tools draw it from a code block of the language `mermaid`.

        !!! example

            ```python
            text = f"```mermaid\\n{graph.to_mermaid()}\\n```"
            ```
        """
        return to_mermaid(self)

    def input_names(self, number: int) -> tuple[str, ...]:
        """What the `inputs` of hidden group `number` are, in their order.

        A key path for a param, an old state leaf or an input of the step, else the
        equation and the line of code that the value comes from.

        **Raises:** `ValueError` if there is no such group.

        !!! example

            ```python
            found = eqx_etrace.jacobians(graph, params, state, x)
            for name, value in zip(graph.input_names(0), found.inputs[0]):
                print(name, value.shape)
            ```
        """
        return input_names(self, number)

    def same_structure(self, other: "ETraceGraph") -> bool:
        """Whether two graphs run the same step and keep the same traces.

        Two compiles of one model have the same structure: params, state and trace of
        the one fit the other. The equations of the step, key paths, shapes, dtypes,
        units, traces, the learning rule's structure, form of the step and batch size
        count; the values of arrays and the lines of code do not. Call it outside jit.

        **Raises:** `TypeError` if `other` is no graph.

        !!! example

            ```python
            again = eqx_etrace.compile(net, state, x)
            assert graph.same_structure(again)
            ```
        """
        return same_structure(self, other)

    def __repr__(self) -> str:
        batch = "" if self.batch is None else f", batch={self.batch}"
        sizes = ", ".join(f"{g.units} x {g.slots}" for g in self.groups)
        return (
            f"ETraceGraph({self.param_leaves.count} params, {len(self.relations)} "
            f"relations, groups [{sizes}], {self.vjp}{batch})"
        )


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
            )
        )
    relations = [
        make_relation(
            program, use, n, units, locality, groups[n], names[use.ref], op_rules
        )
        for use, n in pairs
    ]
    if not relations:
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


def _check_arguments(rule: Any, vjp: Any, max_unroll: Any, max_slots: Any) -> None:
    if not isinstance(rule, LocalRule):
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
    rule: LocalRule = DRTRL(),  # noqa: B008 a frozen module without arrays
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
        program, hidden, units, locality, staged, uses, names, op_rules
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
    chosen, bypasses = _decide_vjp(vjp, find_bypasses(analysis))
    return _assemble(
        staged,
        program,
        values,
        hidden,
        groups,
        relations,
        rule,
        chosen,
        (*decide(analysis), *rewritten, *bypasses),
    )


def _assemble(
    staged: Staged,
    program: Program,
    values: Sequence[Any],
    hidden: Hidden,
    groups: tuple[HiddenGroup, ...],
    relations: tuple[Relation, ...],
    rule: LocalRule,
    vjp: str,
    decisions: tuple[Decision, ...],
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
    operands = {ref for relation in relations for ref in relation.equation.values}
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
    )
