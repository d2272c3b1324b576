"""Total derivatives of the local step from the direct ones.

With D the direct derivatives of the new slots of a unit by its old slots, and L those
by its other new slots, new = D old + L new, so that the total derivative is
(1 - L)^-1 D. In an order in which L is strictly triangular this is one substitution.
"""

from collections.abc import Sequence
from typing import Any


def same_step_total(
    direct: Sequence[Sequence[Any]],
    within: Sequence[Sequence[Any]],
    order: Sequence[int],
) -> list[list[Any]]:
    """(1 - L)^-1 D by substitution: total derivatives from the direct ones.

    `direct[s']` is a row of arrays, `within[s'][s]` one that multiplies them; None is
    zero. In `order`, L is strictly triangular.
    """
    total: dict[int, list[Any]] = {}
    for slot in order:
        row = list(direct[slot])
        for source, found in total.items():
            factor = within[slot][source]
            if factor is not None:
                row = [_plus(a, factor, b) for a, b in zip(row, found, strict=True)]
        total[slot] = row
    return [total[slot] for slot in range(len(direct))]


def _plus(entry: Any, factor: Any, other: Any) -> Any:
    if other is None:
        return entry
    dtype = (other if entry is None else entry).dtype
    more = factor.astype(dtype) * other.astype(dtype)
    return more if entry is None else entry + more


def partial_signal(total: Sequence[Any], within: Sequence[Sequence[Any]]) -> list[Any]:
    """The learning signal l = T - L^T T of one group from the total derivative T.

    T counts the paths from one new slot of a unit to another within the step, and the
    trace holds these paths too: as a factor of the trace, T would count them twice.
    """
    signal = []
    for s, partial in enumerate(total):
        for t, row in enumerate(within):
            factor = row[s]
            if factor is not None:
                partial = partial - (factor * total[t]).astype(partial.dtype)
        signal.append(partial)
    return signal
