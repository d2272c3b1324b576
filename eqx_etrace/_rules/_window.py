"""What a learning rule is told about a window of steps.

Axes: time in front, then the batch if there is one, then units or elements of y.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from .._group import HiddenGroup
from .._relation import Relation
from .._same_step import partial_signal
from ._base import RelationJacobian


Rows = Sequence[Sequence[Any | None]]


class GroupWindow:
    """D and L of one hidden group over a window, and dL/dh; lives for one trace.

    With the direct derivatives D and L of every step and the total derivative T of the
    loss of every step by its new state, the derivative of the whole window's loss by
    the new state of step t, within units, is

        mu_t = T_t + (1 - L_t)^-T D_{t+1}^T mu_{t+1},

    and what a trace of step t has become at the end is multiplied by

        Psi_t (1 - L_t)^-1,   Psi_{t-1} = Psi_t (1 - L_t)^-1 D_t,   Psi_K = 1.
    """

    def __init__(
        self,
        group: HiddenGroup,
        transition: Rows,
        within: Rows,
        total: Sequence[Shaped[Array, "..."]] | None,
        alive: Bool[Array, "..."] | None,
        batch: int | None,
        steps: int,
        rows: Sequence[int],
    ):
        self.group, self.within, self.total = group, within, total
        self.batch, self.steps, self.rows = batch, steps, rows
        if alive is not None:  # What a lane forgets at a reset, it forgets altogether.
            transition = [
                [None if d is None else jnp.where(alive[..., None], d, 0) for d in row]
                for row in transition
            ]
        self.transition = transition

    @ft.cached_property
    def signal(self) -> list[Any]:
        """The learning signal of every step, per slot."""
        assert self.total is not None
        return partial_signal(self.total, self.within)

    @ft.cached_property
    def adjoint(self) -> tuple[list[Any], list[Any | None]]:
        """mu of every step, and D_1^T mu_1, the derivative by the old state; None in
        the latter where no later slot reads one."""
        assert self.total is not None
        slots = range(self.group.slots)
        read = [s for s in slots if any(row[s] is not None for row in self.transition)]
        if not read:
            return list(self.total), [None for _ in slots]

        def back(later: dict[int, Any], step: Any) -> tuple[dict[int, Any], list[Any]]:
            total, transition, within = step
            start = [later.get(s) for s in slots]
            passed = self._through(start, within)
            mu = [t if m is None else t + m for t, m in zip(total, passed, strict=True)]
            found = _row_times(mu, transition)
            return {s: found[s].astype(later[s].dtype) for s in read}, mu

        zero = {s: jnp.zeros_like(self.total[s][0]) for s in read}
        steps = list(self.total), self.transition, self.within
        first, mu = jax.lax.scan(back, zero, steps, reverse=True)
        return mu, [first.get(s) for s in slots]

    @ft.cached_property
    def suffix(self) -> tuple[list[list[Any | None]], list[list[Any | None]]]:
        """Psi_t (1 - L_t)^-1 of every step, and Psi_0; rows and columns are slots.

        None where structurally zero, and in rows that nobody reads."""
        slots, pattern, like = range(self.group.slots), self._pattern(), self._like()
        one = [
            [jnp.full_like(like[s], s == t) if pattern[s][t] else None for t in slots]
            for s in slots
        ]

        def back(later: list[list[Any]], step: Any) -> tuple[Any, Any]:
            transition, within = step
            factors = [self._through(row, within) for row in later]
            rows = [_row_times(row, transition) for row in factors]
            kept = [
                [
                    None if old is None else _or_zero(new, old)
                    for new, old in zip(*pair, strict=True)
                ]
                for pair in zip(rows, later, strict=True)
            ]
            return kept, factors

        steps = self.transition, self.within
        first, factors = jax.lax.scan(back, one, steps, length=self.steps, reverse=True)
        return factors, first

    def _like(self) -> list[Any]:
        """Per slot an array of the shape of its vectors at one step."""
        group, lead = self.group, () if self.batch is None else (self.batch,)
        return [jnp.zeros((*lead, group.units), dtype) for dtype in group.dtypes]

    def _pattern(self) -> list[list[bool]]:
        """Where Psi is not structurally zero, however long the window."""
        slots = range(self.group.slots)
        moves = [[d is not None for d in row] for row in self.transition]
        passes = [[d is not None for d in row] for row in self.within]
        pattern = [[s == t and s in self.rows for t in slots] for s in slots]
        while True:
            new = [list(row) for row in pattern]
            for row in new:
                reached = list(row)
                for t in reversed(self.group.order):
                    for s in slots:
                        reached[s] |= reached[t] and passes[t][s]
                for t in slots:
                    for s in slots:
                        row[s] |= reached[t] and moves[t][s]
            if new == pattern:
                return pattern
            pattern = new

    def _through(self, row: Sequence[Any], within: Rows) -> list[Any]:
        """A row times (1 - L)^-1."""
        row = list(row)
        for target in reversed(self.group.order):
            for source, factor in enumerate(within[target]):
                if factor is not None and row[target] is not None:
                    row[source] = _add(row[source], row[target] * factor)
        return row


def _row_times(row: Sequence[Any], matrix: Rows) -> list[Any]:
    found: list[Any] = [None] * len(row)
    for value, factors in zip(row, matrix, strict=True):
        for s, factor in enumerate(factors):
            if factor is not None and value is not None:
                found[s] = _add(found[s], value * factor)
    return found


def _or_zero(new: Any, old: Any) -> Any:
    return jnp.zeros_like(old) if new is None else new.astype(old.dtype)


def _add(total: Any, more: Any) -> Any:
    return more if total is None else total + more.astype(total.dtype)


@dataclasses.dataclass(frozen=True)
class Window:
    """One relation over a window; what `LocalRule.window` works with.

    **Attributes:**

    - `relation`: the relation.
    - `group`: its hidden group over the window.
    - `jacobian`: the relation's Jacobian of every step, time and batch in front.
    - `stacked`: per operand in `jacobian.operands`, whether it has these axes.
    - `batch`: the batch size, or None.
    - `reset`: where a step starts from a new state, time and batch in front, or None.
    """

    relation: Relation
    group: GroupWindow
    jacobian: RelationJacobian
    stacked: tuple[bool, ...]
    batch: int | None
    reset: Bool[Array, "..."] | None

    @property
    def lead(self) -> int:
        """How many axes are in front."""
        return 1 if self.batch is None else 2

    def merged(self, array: Any) -> Any:
        """Time and batch as one axis."""
        return array if self.batch is None else array.reshape(-1, *array.shape[2:])

    def moving(self, operands: Sequence[Any]) -> list[Any]:
        """The operands that have the axes in front."""
        pairs = zip(operands, self.stacked, strict=True)
        return [operand for operand, stacked in pairs if stacked]

    def operands(self, moving: Sequence[Any]) -> tuple[Any, ...]:
        """All operands, those with axes in front from `moving`."""
        rest = iter(moving)
        pairs = zip(self.jacobian.operands, self.stacked, strict=True)
        return tuple(next(rest) if stacked else operand for operand, stacked in pairs)

    def derivative(self, operands: Sequence[Any]) -> Any:
        """dy/dw of one step, the batch in front."""
        rule = self.relation.op
        moving = self.moving(operands)
        return self.per_sample(
            lambda moving: rule.derivative(self.operands(moving)), 0
        )(moving)

    def last(self) -> RelationJacobian:
        """The Jacobian of the last step, the batch in front."""
        found = self.jacobian
        entries: Any = (found.transition, found.within, found.direct)
        transition, within, direct = jax.tree.map(lambda a: a[-1], entries)
        pairs = zip(found.operands, self.stacked, strict=True)
        operands = tuple(a[-1] if stacked else a for a, stacked in pairs)
        return RelationJacobian(transition, within, direct, operands)

    def per_sample(self, fun: Callable[..., Any], axis: int) -> Callable[..., Any]:
        """`fun` of one sample, mapped over the batch at this axis of all arguments."""
        return fun if self.batch is None else jax.vmap(fun, in_axes=axis)

    def per_sample_of(self, tree: Any) -> Any:
        """What is the same for all samples, for each of them."""
        if self.batch is None:
            return tree
        lead = (self.batch,)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, lead + a.shape), tree)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The arrays of the Jacobian that have axes in front, a pytree."""
        found = self.jacobian
        moving = self.moving(found.operands)
        return found.transition, found.within, found.direct, moving

    def step(self, parts: tuple[Any, ...]) -> RelationJacobian:
        """The Jacobian of one step and sample from these."""
        transition, within, direct, moving = parts
        return RelationJacobian(transition, within, direct, self.operands(moving))

    def pullback(self, q: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The sum over time, batch and y of q . dy/dw."""
        relation = self.relation
        moving = [
            self.merged(operand) for operand in self.moving(self.jacobian.operands)
        ]

        def y(w: Any) -> Any:
            return jax.vmap(lambda *args: relation.y_of(w, self.operands(args)))(
                *moving
            )

        value, pull = jax.vjp(y, self.jacobian.operands[relation.operand])
        return pull(self.merged(q).astype(value.dtype))[0]
