"""The kappa filter: eligibility traces smoothed over time, as a leaky readout is.

And, with it, the running average by which OTPE passes a signal from layer to layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import Scope
from .._op_rules import cast, product
from .._relation import Relation
from .._signals import Signal, Symmetric
from ._base import LocalRule, RelationJacobian, with_operands
from ._drtrl import DRTRL


class FilteredTrace(NamedTuple):
    """The trace of `Kappa`.

    - `inner`: that of the rule.
    - `filtered`: per exit of the group the filtered eligibility.
    - `average`: per exit the running average of its derivative by y, and the weight of
      all steps in it; () where the signal takes the derivative of the step.
    """

    inner: PyTree
    filtered: tuple[Shaped[Array, "..."], ...]
    average: tuple[tuple[Shaped[Array, "..."], ...], Shaped[Array, "..."]] | tuple[()]


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
    - `average`: how the exact signal gets from a hidden layer to the one below, where a
      step computes both: through the derivative of an exit by what arrives at its unit,
      $g^t = \partial z^t / \partial y^t$, or, if true, through its running average
      $\bar g^t = \sum_k \kappa^k g^{t-k} / \sum_k \kappa^k$: a spike that the unit
      below sends now acts on those that come later, too. What the loss reads of a unit
      directly comes by the derivative of the step in any case.

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
    average: bool = eqx.field(static=True)

    def __init__(
        self,
        rule: LocalRule,
        decay: float,
        normalised: bool = False,
        average: bool = False,
    ):
        if not isinstance(rule, DRTRL):
            raise TypeError(
                f"rule: got {rule!r}, expected a DRTRL: the filter needs a trace per "
                "weight. For vectors alone, ESDRTRL((a_x, a_f)) filters the input."
            )
        self.rule, self.decay, self.normalised = rule, decay, normalised
        self.average = average

    def __check_init__(self) -> None:
        number = isinstance(self.decay, float | int) and not isinstance(
            self.decay, bool
        )
        if not (number and 0 <= self.decay < 1):
            raise ValueError(
                f"decay: got {self.decay!r}, expected a number of at least 0 and below "
                "1. Take the decay of the readout."
            )
        if self.average and not isinstance(self.signal, Symmetric):
            raise ValueError(
                f"average: got True with the signal {type(self.signal).__name__}, "
                "expected Symmetric(): any other comes to each unit directly, and "
                "passes through none. Leave it out."
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
        """The same with another signal; one that is not exact has no average."""
        rule = dataclasses.replace(self.rule, signal=signal)
        average = self.average and isinstance(signal, Symmetric)
        return Kappa(rule, self.decay, self.normalised, average)

    def init(self, relation: Relation) -> FilteredTrace:
        """Zeros; one filtered array, and one average, per exit of the group."""
        dtype = self.rule.stored(relation.trace_dtypes[0])
        zero = jnp.zeros(relation.trace_shape, dtype)
        filtered = tuple(zero for _ in range(relation.exits))
        average = ()
        if relation.passes:
            real = jnp.finfo(dtype).dtype
            is_complex = jnp.issubdtype(relation.y_dtype, jnp.complexfloating)
            kind = relation.y_dtype if is_complex else real
            slope = jnp.zeros(relation.y_shape, kind)
            average = (slope,) * relation.exits, jnp.zeros((), real)
        return FilteredTrace(self.rule.init(relation), filtered, average)

    def update(
        self, relation: Relation, trace: FilteredTrace, jacobian: RelationJacobian
    ) -> FilteredTrace:
        """One step of the rule and of the filter, for one sample."""
        inner = self.rule.update(relation, trace.inner, jacobian)
        filtered = self._filtered(relation, inner, trace, jacobian)
        return FilteredTrace(inner, filtered, self._averaged(trace, jacobian.slope))

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
        filtered = one(inner, trace, jacobian.gain, jacobian.operands)
        average = self._averaged
        if batch is not None:
            average = jax.vmap(average)
        return FilteredTrace(inner, filtered, average(trace, jacobian.slope))

    def _averaged(self, trace: FilteredTrace, slope: Sequence[Any]) -> Any:
        if not trace.average:
            return ()
        averages, weight = trace.average
        weight = self.decay * weight
        old = weight / (weight + 1)
        return tuple(
            product(old, average) + product(1 - old, cast(now, average.dtype))
            for average, now in zip(averages, slope, strict=True)
        ), weight + 1

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
