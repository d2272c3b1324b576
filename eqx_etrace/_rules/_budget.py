"""The rules of weights, chosen by the bytes of their traces."""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx

from .._decision import Decision, Kind
from .._errors import CompileError, size
from .._relation import Relation
from .._signals import Signal
from ._base import LocalRule
from ._by_weight import ByWeight, Composite, check_rules, name_of
from ._drtrl import DRTRL
from ._esdrtrl import ESDRTRL
from ._weights import Weights


RULES = (DRTRL(), ESDRTRL(0.9))


class Budget(Composite):
    """For each weight the most exact rule, so that all traces fit into so many bytes.

    `eqx_etrace.compile` turns it into an `eqx_etrace.ByWeight`. It starts with the
    smallest traces; then, as long as all still fit, the weight for which that takes the
    fewest bytes goes on to a more exact rule. So small weights get exact traces first;
    no weight could have a more exact rule with the others as they are; and more bytes
    never make one less exact. `graph.report()` says what was chosen and why,
    `graph.rule` is the `ByWeight`.

    **Arguments:**

    - `bytes`: how large all traces may be together, with the batch; what
      `graph.report()` says at the top, and what `eqx_etrace.init_trace` allocates.
    - `rules`: the rules to choose from, from the most to the least exact, as
      `eqx_etrace.ByWeight` takes them. The default is `DRTRL()` and `ESDRTRL(0.9)`.
      `DRTRL(trace_dtype=jnp.bfloat16)` is a step between. `Immediate()` would save
      nothing: what it keeps is as large as what ES-D-RTRL does.

    Bytes are those of the traces between two steps; while a window is computed its
    vectors come on top.

    **Raises:** `ValueError` for bytes or rules that are none; `eqx_etrace.compile`
    raises `CompileError` where the smallest choice is too large.

    !!! example

        ```python
        rule = eqx_etrace.Budget(1_000)
        graph = eqx_etrace.compile(net, state, x, rule=rule)
        print(graph.report())
        ```
    """

    bytes: int | float = eqx.field(static=True)
    rules: tuple[LocalRule, ...]

    def __init__(self, bytes: int | float, rules: Sequence[LocalRule] = RULES):
        self.bytes, self.rules = bytes, tuple(rules)

    def __check_init__(self) -> None:
        number = isinstance(self.bytes, int | float) and self.bytes >= 0
        if not number or isinstance(self.bytes, bool):
            raise ValueError(
                f"bytes: got {self.bytes!r}, expected a number of at least 0. It is "
                "the size of all traces, 64e6 for 64 MB."
            )
        if not self.rules:
            raise ValueError(
                "rules: got none, expected at least one, from the most to the least "
                "exact. Leave it out for DRTRL() and ESDRTRL(0.9)."
            )
        check_rules("Budget", self.rules)

    def with_signal(self, signal: Signal) -> "Budget":
        """The same with another signal for all."""
        return Budget(self.bytes, [rule.with_signal(signal) for rule in self.rules])

    def of(self, relation: Relation) -> LocalRule:
        """The most exact; it is for the compiler to choose."""
        del relation
        return self.rules[0]

    def bound(self, weights: Weights) -> tuple[LocalRule, tuple[Decision, ...]]:
        """What it chooses for these weights, and why."""
        costs = _Costs(weights, self.rules)
        choice = self._chosen(costs)
        if costs.total(choice) > self.bytes:
            raise CompileError(self._too_small(costs.total(choice), weights.batch))
        pairs = {
            path: self.rules[number]
            for paths, number in zip(costs.parts, choice, strict=True)
            for path in paths
        }
        rule, _ = ByWeight(self.rules[0], pairs).bound(weights)
        return rule, self._reasons(costs, choice)

    def _chosen(self, costs: "_Costs") -> "Choice":
        """The smallest choice, if none fits."""
        best = (0,) * len(costs.parts)
        if costs.total(best) <= self.bytes:
            return best
        choice = (len(self.rules) - 1,) * len(costs.parts)
        while choice != best:
            more = min(_more_exact(choice), key=costs.total)
            # What nobody shares may be larger than the trace of a more exact rule.
            if costs.total(more) > max(self.bytes, costs.total(choice)):
                break
            choice = more
        return choice

    def _reasons(self, costs: "_Costs", choice: "Choice") -> tuple[Decision, ...]:
        names, budget = [name_of(rule) for rule in self.rules], size(self.bytes)
        if not any(choice):
            every = tuple(path for paths in costs.parts for path in paths)
            reason = f"{names[0]}, {size(costs.total(choice))} of a budget of {budget}"
            return (Decision(Kind.CHOSEN, reason, every),)
        found = []
        for part, number in enumerate(choice):
            if number:
                more = costs.total(_with(choice, part, number - 1))
                reason = (
                    f"{names[number]}, since with {names[number - 1]} all traces would "
                    f"take {size(more)}, above the budget of {budget}"
                )
                found.append(Decision(Kind.CHOSEN, reason, costs.parts[part]))
        return tuple(found)

    def _too_small(self, least: int, batch: int | None) -> str:
        names = ", ".join(map(name_of, self.rules))
        samples = "" if batch is None else f" for the batch of {batch}"
        fewer = "" if batch is None else ", a smaller batch"
        return (
            f"Budget: got {self.bytes} bytes, expected at least {least}, which the "
            f"smallest traces by {names} take{samples}. Give it more{fewer}, a rule "
            "with smaller traces, or fewer weights to train (`trainable=`)."
        )


Choice = tuple[int, ...]
"""Per part the position of its rule."""


class _Costs:
    """The bytes of a choice. A part is what must have one rule: the params of one
    weight, of those they are in weights with, and so on."""

    def __init__(self, weights: Weights, rules: Sequence[LocalRule]):
        self.weights, self.rules = weights, rules
        self._bytes: dict[Any, int] = {}
        self.parts = _parts(weights.relations)
        self.part_of = [
            next(n for n, paths in enumerate(self.parts) if relation.weight[0] in paths)
            for relation in weights.relations
        ]

    def total(self, choice: Choice) -> int:
        rules = [choice[part] for part in self.part_of]
        found = 0
        for number, relation in enumerate(self.weights.shared(rules)):
            shares = relation.same_x, relation.same_df, relation.pieces
            key = number, rules[number], *(one is None for one in shares)
            if key not in self._bytes:
                self._bytes[key] = self.rules[rules[number]].trace_bytes(relation)
            found += self._bytes[key]
        return found * (self.weights.batch or 1)


def _parts(relations: Sequence[Relation]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for relation in relations:
        apart = [paths for paths in found if set(paths).isdisjoint(relation.weight)]
        mine = [path for paths in found if paths not in apart for path in paths]
        found = [*apart, tuple(dict.fromkeys((*mine, *relation.weight)))]
    return found


def _with(choice: Choice, part: int, rule: int) -> Choice:
    return (*choice[:part], rule, *choice[part + 1 :])


def _more_exact(choice: Choice) -> Iterator[Choice]:
    """All that give one part a more exact rule."""
    for part, number in enumerate(choice):
        for rule in range(number):
            yield _with(choice, part, rule)
