"""The kappa filter: eligibility traces smoothed over time, as a leaky readout is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import Scope
from .._op_rules import cast
from .._relation import Relation
from .._signals import Signal
from ._base import LocalRule, RelationJacobian, with_operands
from ._drtrl import DRTRL


class FilteredTrace(NamedTuple):
    """The trace of `Kappa`: that of the rule, and per exit the filtered eligibility."""

    inner: PyTree
    filtered: tuple[Shaped[Array, "..."], ...]


class Kappa(LocalRule):
    r"""D-RTRL with a low-pass filter between eligibility and learning signal.

    A readout with a memory, $y^t = \kappa y^{t-1} + W z^t$, lets a spike z of long ago
    act on the error of today. That path leads through another hidden group, and D-RTRL
    leaves it out. With the eligibility of an exit $z$ of a unit,

    $$e^t = \frac{\partial z^t}{\partial h^t}\,\epsilon^t, \qquad
      \bar e^t = \kappa\,\bar e^{t-1} + e^t,$$

    and the gradient $L^t \bar e^t$ it is in again: exactly, where $\kappa$ is the decay
    of the readout. What the loss reads of a unit directly is not filtered.

    **Arguments:**

    - `rule`: a `eqx_etrace.DRTRL`, with any scope, recursion and signal.
    - `decay`: $\kappa$, at least 0 and below 1.
    - `normalised`: whether to take $\kappa \bar e + (1 - \kappa) e$, for a readout
      that averages.

    The filter is part of the trace: `eqx_etrace.evolve` moves it, too. It needs
    single-step credit, takes steps one by one, and twice the memory of a trace.

    **Source:** Bellec et al., *A solution to the learning dilemma for recurrent
    networks of spiking neurons*, Nature Communications 11, 2020 (e-prop).

    !!! example

        ```python
        rule = eqx_etrace.Kappa(eqx_etrace.DRTRL(), decay=0.9)
        graph = eqx_etrace.compile(net, state, x, rule)
        ```
    """

    windowed: ClassVar[bool] = False
    filters: ClassVar[bool] = True

    rule: DRTRL
    decay: float = eqx.field(static=True)
    normalised: bool = eqx.field(static=True)

    def __init__(self, rule: LocalRule, decay: float, normalised: bool = False):
        if not isinstance(rule, DRTRL):
            raise TypeError(
                f"rule: got {rule!r}, expected a DRTRL: the filter needs a trace per "
                "weight. For vectors alone, ESDRTRL((a_x, a_f)) filters the input."
            )
        self.rule, self.decay, self.normalised = rule, decay, normalised

    def __check_init__(self) -> None:
        number = isinstance(self.decay, float | int) and not isinstance(
            self.decay, bool
        )
        if not (number and 0 <= self.decay < 1):
            raise ValueError(
                f"decay: got {self.decay!r}, expected a number of at least 0 and below "
                "1. Take the decay of the readout."
            )

    @property
    def scope(self) -> Scope:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the rule."""
        return self.rule.scope

    @property
    def leak(self) -> float | None:
        """That of the rule."""
        return self.rule.leak

    @property
    def detach(self) -> tuple[tuple[str, str], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the rule."""
        return self.rule.detach

    @property
    def signal(self) -> Signal:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the rule."""
        return self.rule.signal

    def with_signal(self, signal: Signal) -> "Kappa":
        """The same with another signal."""
        rule = dataclasses.replace(self.rule, signal=signal)
        return Kappa(rule, self.decay, self.normalised)

    def init(self, relation: Relation) -> FilteredTrace:
        """Zeros; one filtered array per exit of the relation's group."""
        dtype = self.rule.stored(relation.trace_dtypes[0])
        zero = jnp.zeros(relation.trace_shape, dtype)
        filtered = tuple(zero for _ in range(relation.exits))
        return FilteredTrace(self.rule.init(relation), filtered)

    def update(
        self, relation: Relation, trace: FilteredTrace, jacobian: RelationJacobian
    ) -> FilteredTrace:
        """One step of the rule and of the filter, for one sample."""
        inner = self.rule.update(relation, trace.inner, jacobian)
        return FilteredTrace(inner, self._filtered(relation, inner, trace, jacobian))

    def update_all(
        self,
        relation: Relation,
        trace: FilteredTrace,
        jacobian: RelationJacobian,
        stacked: Sequence[bool],
        batch: int | None,
    ) -> FilteredTrace:
        """As above, of all samples."""
        inner = self.rule.update_all(relation, trace.inner, jacobian, stacked, batch)

        def one(inner: Any, trace: Any, gain: Any, operands: Any) -> Any:
            given = with_operands(((), (), ()), operands, gain)
            return self._filtered(relation, inner, trace, given)

        if batch is not None:
            axes = tuple(0 if moves else None for moves in stacked)
            one = jax.vmap(one, in_axes=(0, 0, 0, axes))
        found = one(inner, trace, jacobian.gain, jacobian.operands)
        return FilteredTrace(inner, found)

    def _filtered(
        self,
        relation: Relation,
        inner: Any,
        trace: FilteredTrace,
        jacobian: RelationJacobian,
    ) -> tuple[Any, ...]:
        fresh = 1 - self.decay if self.normalised else 1.0
        new = []
        rows = [row for row in jacobian.gain if row is not None]
        for row, old in zip(rows, trace.filtered, strict=True):
            found = self.rule.heard(relation, inner, row, jacobian.operands)
            new.append(self.decay * old + fresh * cast(found, old.dtype))
        return tuple(new)

    def gradient(
        self,
        relation: Relation,
        trace: FilteredTrace,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """For derivatives of the loss by the state itself: that of the rule."""
        return self.rule.gradient(relation, trace.inner, signal)

    def gradient_at_exits(
        self,
        relation: Relation,
        trace: FilteredTrace,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The sum over exits, units and batch of signal . filtered eligibility; the
        signal is per exit a vector over units, None where the group has none."""
        heard = [v for v in signal if v is not None]
        spread = relation.map.spread
        vectors = [
            spread(cast(v, old.dtype))
            for v, old in zip(heard, trace.filtered, strict=True)
        ]
        if not vectors:
            return jnp.zeros(relation.op.weight_shape, relation.weight_dtype)
        found = relation.op.contract(vectors, list(trace.filtered))
        return found.astype(relation.weight_dtype)
