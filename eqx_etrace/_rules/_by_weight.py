"""A rule for each weight: other rules behind one interface."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import Scope
from .._decision import Decision
from .._errors import CompileError
from .._relation import Relation
from .._signals import Bootstrapped, Signal, Symmetric
from .._stage import is_below
from ._base import LocalRule, RelationJacobian
from ._weights import Weights
from ._window import Window


Key: TypeAlias = str | Callable[[str, tuple[int, ...]], Any]
"""A key path, the start of some, or a predicate of a key path and a shape."""


class Composite(LocalRule):
    """A rule made of others, one for each relation."""

    rules: eqx.AbstractVar[tuple[LocalRule, ...]]
    """All of them; `scope` and `leak`, facts of the whole network, are theirs."""

    @abstractmethod
    def of(self, relation: Relation) -> LocalRule:
        """The rule of one relation."""

    @property
    def scope(self) -> Scope:
        return self.rules[0].scope

    @property
    def leak(self) -> float | None:
        return self.rules[0].leak

    @property
    def signal(self) -> Signal:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rules[0].signal

    @property
    def detach(self) -> tuple[tuple[str, str], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rules[0].detach

    @property
    def windowed(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(rule.windowed for rule in self.rules)

    @property
    def by_adjoint(self) -> bool:
        return all(rule.by_adjoint for rule in self.rules)

    def init(self, relation: Relation) -> PyTree:
        return self.of(relation).init(relation)

    def update(
        self, relation: Relation, trace: PyTree, jacobian: RelationJacobian
    ) -> PyTree:
        return self.of(relation).update(relation, trace, jacobian)

    def update_all(
        self,
        relation: Relation,
        trace: PyTree,
        jacobian: RelationJacobian,
        stacked: Sequence[bool],
        batch: int | None,
    ) -> PyTree:
        rule = self.of(relation)
        return rule.update_all(relation, trace, jacobian, stacked, batch)

    def gradient(
        self,
        relation: Relation,
        trace: PyTree,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        return self.of(relation).gradient(relation, trace, signal)

    def window(
        self, window: Window, trace: PyTree
    ) -> tuple[Shaped[Array, "..."] | None, PyTree]:
        return self.of(window.relation).window(window, trace)

    def from_adjoint(self, window: Window) -> Shaped[Array, "..."] | None:
        return self.of(window.relation).from_adjoint(window)

    def kept(self, relation: Relation, trace: PyTree) -> PyTree:
        return self.of(relation).kept(relation, trace)

    def joined(
        self, relation: Relation, trace: PyTree, earlier: Sequence[PyTree]
    ) -> PyTree:
        return self.of(relation).joined(relation, trace, earlier)

    def trace_bytes(self, relation: Relation) -> int:
        return self.of(relation).trace_bytes(relation)


def name_of(rule: Any) -> str:
    """A rule as one writes it, without what is left at its default."""
    if isinstance(rule, Composite):
        return f"{type(rule).__name__}({', '.join(map(name_of, rule.rules))})"
    if not isinstance(rule, LocalRule):
        return rule.__name__ if isinstance(rule, type) else type(rule).__name__
    written = []
    for name, parameter in inspect.signature(type(rule).__init__).parameters.items():
        if name != "self":
            value = getattr(rule, name, parameter.default)
            if isinstance(value, Symmetric):
                continue
            value = _text(value)
            written += [f"{name}={value}"] if value != _text(parameter.default) else []
    return type(rule).__name__ + (f"({', '.join(written)})" if written else "")


def _text(value: Any) -> str:
    if isinstance(value, LocalRule):
        return name_of(value)
    if isinstance(value, Signal):
        return type(value).__name__
    return value.__name__ if isinstance(value, type) else repr(value)


def check_rules(owner: str, rules: Sequence[Any]) -> None:
    """Raise `ValueError` unless they may stand side by side."""
    for rule in rules:
        if not isinstance(rule, LocalRule) or isinstance(rule, Composite):
            raise ValueError(
                f"{owner}: got {name_of(rule)}, expected local rules such as DRTRL(), "
                "OSTL(), ESDRTRL(0.9) or OTTT(0.5). A global rule follows all weights "
                "at once, and cannot be one of several."
            )
        if rule.filters or isinstance(rule.signal, Bootstrapped):
            raise ValueError(
                f"{owner}: got {name_of(rule)}, expected rules that hear the same "
                "signal at the same time: DRTRL(), OSTL(), ESDRTRL(0.9), OTTT(0.5). A "
                "filter, or a guess of the future, is for all weights or none."
            )
    for rule in rules[1:]:
        names = f"{owner}: got {name_of(rule)} beside {name_of(rules[0])}"
        if rule.scope != rules[0].scope:
            raise ValueError(
                f"{names}, expected rules with the same `scope`: it says what of a "
                "recurrent product counts, for the whole network. DRTRL and ESDRTRL "
                f"take scope={rules[0].scope!r}."
            )
        if not eqx.tree_equal(rule.signal, rules[0].signal):
            raise ValueError(
                f"{names}, expected rules with the same `signal`: a unit hears one, "
                "whatever its weights keep. Give the same to both."
            )
        if rule.detach != rules[0].detach:
            raise ValueError(
                f"{names}, expected rules with the same `detach`: it is about the "
                "Jacobian of the whole network. Give the same to both."
            )
        if rule.leak != rules[0].leak:
            raise ValueError(
                f"{names}, expected rules with the same `recursion`: it stands in for "
                "the Jacobian of the whole network. DRTRL(), OSTL(), ESDRTRL(decay) "
                "and OTTT(decay) go together, and ESDRTRL(0.0) gives what Immediate() "
                "gives."
            )


class ByWeight(Composite):
    r"""Another rule for some of the weights, by their key paths.

    What papers call hybrid: exact traces for small weights and factorised ones for
    large, or a cheap rule for the layers where an exact one gains nothing. The gradient
    of each weight is the one that its rule gives when it has all weights.

    **Arguments:**

    - `default`: the rule of all other weights.
    - `rules`: a dict, or pairs `(key, rule)`. A key is

        - the key path of a param as `graph.report()` has it: `"cell.weight_hh"`;
        - the start of some: `"cell"` is every param below it;
        - a predicate `(path, shape) -> bool` of a param.

        A whole key path goes before the others; of these the first that fits counts.
        A predicate may fit none.

    All must be local rules with the same `scope` and the same `recursion`, which are
    facts of the whole network. Weights that share what they keep, see
    `eqx_etrace.ESDRTRL`, share it with those of the same rule.

    Memory: the sum of that of its rules; `graph.report()` shows the rule and the bytes
    of each weight.

    **Raises:** `ValueError` for rules that cannot stand side by side;
    `eqx_etrace.compile` raises `CompileError` for a key that fits no param, or whose
    params earlier keys have taken, and for a weight made of several params (`A @ B`)
    that fall to different rules.

    !!! example

        ```python
        import math

        def large(path, shape):
            return math.prod(shape) > 10_000

        rule = eqx_etrace.ByWeight(
            eqx_etrace.DRTRL(),
            {"cell.weight_ih": eqx_etrace.ESDRTRL(0.9), large: eqx_etrace.ESDRTRL(0.9)},
        )
        graph = eqx_etrace.compile(net, state, x, rule=rule)
        ```
    """

    rules: tuple[LocalRule, ...]
    """The different ones, the default first."""
    keys: tuple[tuple[Key, int], ...] = eqx.field(static=True)
    """Keys and the positions of their rules; once compiled, whole key paths alone."""

    def __init__(
        self,
        default: LocalRule,
        rules: Mapping[Any, LocalRule] | Sequence[tuple[Any, LocalRule]] = (),
    ):
        pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
        check_rules("ByWeight", [default, *(rule for _, rule in pairs)])
        found, keys = [default], []
        for key, rule in pairs:
            if not (isinstance(key, str) and key) and not callable(key):
                raise ValueError(
                    f"ByWeight: got the key {key!r}, expected a key path, the start of "
                    "one, or a predicate. Copy a key path from `graph.report()`."
                )
            alike = [n for n, other in enumerate(found) if bool(other == rule)]
            keys.append((key, alike[0] if alike else len(found)))
            found += [] if alike else [rule]
        self.rules, self.keys = tuple(found), tuple(keys)

    def with_signal(self, signal: Signal) -> "ByWeight":
        """The same with another signal for all."""
        default, *_ = rules = [rule.with_signal(signal) for rule in self.rules]
        return ByWeight(default, [(key, rules[n]) for key, n in self.keys])

    def of(self, relation: Relation) -> LocalRule:
        """The rule of one relation, by its first param; `bound` has checked them."""
        return self.rules[dict(self.keys).get(relation.weight[0], 0)]

    def bound(self, weights: Weights) -> tuple["ByWeight", tuple[Decision, ...]]:
        """With whole key paths, and without the rules that no weight has."""
        taken = {path: self._key(path, weights.params[path]) for path in weights.params}
        self._check_keys(weights, set(taken.values()))
        numbers = {
            path: 0 if key is None else self.keys[key][1] for path, key in taken.items()
        }
        for relation in weights.relations:
            self._check_agree(relation, numbers)
        used = {numbers[path] for r in weights.relations for path in r.weight}
        default, *others = sorted(used)
        pairs = {path: self.rules[n] for path, n in numbers.items() if n in others}
        return ByWeight(self.rules[default], pairs), ()

    def _key(self, path: str, shape: tuple[int, ...]) -> int | None:
        """The position of the key that a param falls to."""
        whole = [n for n, (key, _) in enumerate(self.keys) if key == path]
        fits = (n for n, (key, _) in enumerate(self.keys) if _fits(key, path, shape))
        return next(iter((*whole, *fits)), None)

    def _check_keys(self, weights: Weights, taken: set[int | None]) -> None:
        for number, (key, _) in enumerate(self.keys):
            if callable(key) or number in taken:
                continue
            remedy = "Copy one from `graph.report()`."
            if any(_fits(key, path, shape) for path, shape in weights.params.items()):
                what, remedy = "whose params all fall to other keys", "Put it first."
            else:
                what = "which fits no param"
            raise CompileError(
                f"ByWeight: got the key {key!r}, {what}, expected a key path, or the "
                f"start of one, of {', '.join(weights.params)}. {remedy}"
            )

    def _check_agree(self, relation: Relation, numbers: Mapping[str, int]) -> None:
        first, *others = relation.weight
        for path in others:
            if numbers[path] != numbers[first]:
                rules = (name_of(self.rules[numbers[p]]) for p in (first, path))
                raise CompileError(
                    f"ByWeight: got {next(rules)} for {first} and {next(rules)} for "
                    f"{path}, expected one rule for both: they make one weight, with "
                    f"one trace, at {relation.source}. Give both the same."
                )


def _fits(key: Key, path: str, shape: tuple[int, ...]) -> bool:
    if not isinstance(key, str):
        return bool(key(path, shape))
    return is_below(path, key)
