"""What credit each weight gets, and why: the compiler's decisions, in sentences.

Three questions are answered here, from the flow of derivatives through the step:

- does a path bypass the new state, so that the single-step gradient would miss it?
- which weights have no trace, and is their current-step gradient then the whole one?
- which credit between units or groups is cut?
"""

import dataclasses
from collections.abc import Sequence

from ._decision import Decision, Kind
from ._group import HiddenGroup
from ._hidden import Hidden, weighted
from ._jaxpr import Equation, Program, describe_equation
from ._locality import (
    Locality,
    bypass_of_state,
    bypass_of_use,
    flow,
    several_hops,
)
from ._op_rules import ByAD, Merged
from ._reads import Mixing, Reads
from ._relation import Relation, Use


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything the compiler found, in one place, for the decisions."""

    program: Program
    hidden: Hidden
    reads: Reads
    locality: Locality
    groups: tuple[HiddenGroup, ...]
    relations: tuple[Relation, ...]
    unrelated: tuple[tuple[Use, tuple[str, ...]], ...]
    """The uses without relation, with the params that their weight is made of."""
    param_paths: tuple[str, ...]
    state_paths: tuple[str, ...]
    out_paths: tuple[str, ...]

    @property
    def doors(self) -> frozenset[int]:
        return frozenset(self.hidden.doors)

    def name(self, ref: int) -> str:
        """The user's key path of a new state leaf or an output."""
        paths = [f"the new {path}" for path in self.state_paths]
        paths += [f"the output {path}" for path in self.out_paths]
        return dict(zip(self.program.outputs[::-1], paths[::-1], strict=True))[ref]


def find_bypasses(a: Analysis) -> list[Decision]:
    """The paths that single-step credit would miss; empty if the new state is the only
    way out."""
    found = []
    for relation in a.relations:
        group = a.groups[relation.group]
        own = frozenset(group.doors)
        past = bypass_of_use(a.program, a.locality, relation.y, own, a.doors)
        if past is None:
            continue
        how = (
            f"moves other units, too, through {describe_equation(past)}"
            if isinstance(past, Equation)
            else f"reaches {a.name(past)} without passing the new state of its unit"
        )
        found.append(
            Decision(
                Kind.MULTI_STEP,
                f"what this weight adds to the step {how}",
                weight=relation.weight,
                state=group.leaves,
                source=relation.source,
            )
        )
    for group in a.groups:
        past = bypass_of_state(a.program, group.old, frozenset(group.doors), a.doors)
        if past is not None:
            reason = f"the old state reaches {a.name(past)} without passing the new one"
            found.append(Decision(Kind.MULTI_STEP, reason, state=group.leaves))
    return list(dict.fromkeys(found))


def decide(a: Analysis) -> list[Decision]:
    """All decisions but those about bypasses."""
    found = (_traces, _without_trace, _not_hidden, _cuts, _dense, _layers)
    return [decision for find in found for decision in find(a)]


def _traces(a: Analysis) -> list[Decision]:
    found = []
    for relation in a.relations:
        leaves = a.groups[relation.group].leaves
        slots = ", ".join(leaves[slot] for slot in relation.slots)
        reason = f"{relation.op.name} trace on {slots}"
        about = {"weight": relation.weight, "state": leaves, "source": relation.source}
        found.append(Decision(Kind.RELATION, reason, **about))
        rule = relation.op.rule if isinstance(relation.op, Merged) else relation.op
        if isinstance(rule, ByAD):
            shape = " x ".join(str(size) for size in relation.op.trace_shape)
            primitive = relation.equation.primitive
            reason = f"`{primitive}` has no op rule, its trace has {shape} entries"
            found.append(Decision(Kind.BY_AD, reason, **about))
    return found


def _without_trace(a: Analysis) -> list[Decision]:
    found, seen = [], {path for r in a.relations for path in r.weight}
    for use, names in a.unrelated:
        reached, _ = flow(a.program, [use.y])
        doors = [ref for ref in a.hidden.doors if ref in reached]
        if doors:
            what = ", ".join(a.name(ref) for ref in doors)
            reason = (
                f"it reaches {what} only through a mixing equation, past which credit "
                "of single units is not kept; earlier steps are not credited"
            )
        elif reached.intersection(a.program.outputs):
            reason = "it acts after the state, so the current step is all of its credit"
        else:
            continue
        seen.update(names)
        source = use.equation.source
        decision = Decision(Kind.CURRENT_STEP, reason, weight=names, source=source)
        found.append(decision)
    for path in a.param_paths:
        if path not in seen:
            reason = "no derivative of the step's outputs or state reaches it"
            found.append(Decision(Kind.UNUSED, reason, weight=(path,)))
    return list(dict.fromkeys(found))


def _not_hidden(a: Analysis) -> list[Decision]:
    reason = "no trainable weight influences it"
    rest = (path for i, path in enumerate(a.state_paths) if i not in a.hidden.leaves)
    return [Decision(Kind.NOT_HIDDEN, reason, state=(path,)) for path in rest]


def _cuts(a: Analysis) -> list[Decision]:
    """One decision per cut edge that carries credit of a group's own units."""
    found = []
    for group in a.groups:
        start = [*group.old, *group.uses]
        doors = frozenset(group.doors)
        _, met = flow(a.program, start, blocked=doors, cuts=a.locality.cuts)
        for index, _ in met:
            equation = a.program.equations[index]
            reached, _ = flow(a.program, equation.outputs, blocked=doors)
            if not doors & reached:
                continue
            product = weighted(a.program, equation)
            mixing = a.reads.kind(equation) is Mixing.MIXING
            what = "the recurrent product" if product and mixing else "the coupling"
            reason = (
                f"through {what} {describe_equation(equation)} a unit is credited for "
                "its own past, not for the past of the others"
            )
            found.append(Decision(Kind.CUT, reason, state=group.leaves))
    return list(dict.fromkeys(found))


def _dense(a: Analysis) -> list[Decision]:
    """The groups whose true diagonal block takes the whole Jacobian of the step."""
    found = []
    for group in a.groups:
        if group.whole is not None:
            size = group.units * group.slots
            doors = frozenset(group.doors)
            past = several_hops(a.program, a.locality, group.old, doors)
            reason = (
                f"scope='unit' forms the {size} x {size} Jacobian: more than "
                "one product lies between the old state and the new one"
            )
            source = past.source if past is not None else ""
            about = Decision(Kind.DENSE, reason, state=group.leaves, source=source)
            found.append(about)
    return found


def _layers(a: Analysis) -> list[Decision]:
    found = []
    for group in a.groups:
        reached, _ = flow(a.program, group.doors)
        others = [g for g in a.groups if g is not group and reached & set(g.doors)]
        for other in others:
            reason = (
                f"credit through the memory of {', '.join(other.leaves)} is not "
                "carried back here in a single step; a multi-step window recovers it"
            )
            weights = dict.fromkeys(
                path
                for relation in a.relations
                if a.groups[relation.group] is group
                for path in relation.weight
            )
            found.append(
                Decision(
                    Kind.ACROSS_GROUPS,
                    reason,
                    weight=tuple(weights),
                    state=tuple(dict.fromkeys(group.leaves + other.leaves)),
                )
            )
    return found


def of_whole_state(
    decisions: Sequence[Decision], credited: frozenset[str]
) -> tuple[Decision, ...]:
    """Those that hold where a rule follows the whole state: nothing is cut, and a
    weight needs no unit of its own for its credit."""
    of_units = {Kind.RELATION, Kind.CUT, Kind.ACROSS_GROUPS, Kind.DENSE, Kind.BY_AD}
    return tuple(
        decision
        for decision in decisions
        if decision.kind not in of_units
        and not (
            decision.kind is Kind.CURRENT_STEP and credited.issuperset(decision.weight)
        )
    )


def unrelated_uses(
    uses: Sequence[Use],
    relations: Sequence[Relation],
    names: dict[int, tuple[str, ...]],
) -> tuple[tuple[Use, tuple[str, ...]], ...]:
    """The uses without a relation, with the key paths of their params."""
    related = {(*relation.edge, relation.y) for relation in relations}
    return tuple(
        (use, names[use.ref])
        for use in uses
        if (use.equation.index, use.operand, use.y) not in related
    )
