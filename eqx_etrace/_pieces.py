"""A df that consists of parts which earlier relations have.

The gates of a GRU hear the sum of a product of x and one of h: two of the three thirds
of df are the same for both weights. A rule that filters df filters each part once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ._custom_types import Labels
from ._unit_map import UnitMap, unit_map


Run = tuple[int, int, int, int]
"""(start, stop, which, at): the elements from start to stop are those of another from
`at` on."""
_MOST_ELEMENTS = 1 << 14
_MOST_RUNS = 4


class Pieces(eqx.Module):
    """How df is put together from those of earlier relations and elements of its own.

    **Attributes:**

    - `runs`: what earlier relations have, by their numbers.
    - `own`: (start, stop) of the rest, or None.
    - `map`: the units that the rest feeds.
    """

    runs: tuple[Run, ...] = eqx.field(static=True)
    own: tuple[int, int] | None = eqx.field(static=True)
    map: UnitMap | None

    def of_own(self, v: Any) -> Any:
        """Of a vector over y the elements that no other relation has."""
        start, stop = self.own or (0, 0)
        return v[..., start:stop]

    def joined(self, own: Any | None, earlier: Callable[[int], Any]) -> Any:
        """A vector over y, from its own elements and whole vectors of others."""
        parts = [
            (start, earlier(which)[..., at : at + stop - start])
            for start, stop, which, at in self.runs
        ]
        if self.own is not None:
            parts.append((self.own[0], own))
        parts.sort(key=lambda part: part[0])
        return jnp.concatenate([part for _, part in parts], axis=-1)

    def joined_slots(
        self, own: Sequence[Any | None], earlier: Callable[[int], Sequence[Any]]
    ) -> tuple[Any, ...]:
        """The same slot by slot."""
        return tuple(
            self.joined(one, lambda which, slot=slot: earlier(which)[slot])
            for slot, one in enumerate(own)
        )


def make_pieces(runs: Sequence[Run], units: UnitMap) -> Pieces:
    own = _rest(runs, units.shape[0])
    if own is None:
        return Pieces(tuple(runs), None, None)
    start, stop = own
    positions = np.asarray(units.positions())[start:stop]
    return Pieces(tuple(runs), own, unit_map(positions, units.units, positions.shape))


def find_runs(rows: Sequence[Labels]) -> list[tuple[Run, ...]]:
    """Per array the runs of rows that earlier ones have; none where that takes many, or
    where the rest is not in one piece."""
    firsts: dict[bytes, tuple[int, int]] = {}
    found = []
    for number, array in enumerate(rows):
        found.append(())
        if len(array) > _MOST_ELEMENTS:
            continue
        keys = [row.tobytes() for row in array]
        runs = _runs([firsts.get(key) for key in keys])
        for at, key in enumerate(keys):
            firsts.setdefault(key, (number, at))
        if len(runs) <= _MOST_RUNS and _rest(runs, len(array)) != (-1, -1):
            found[-1] = tuple(runs)
    return found


def _runs(sources: Sequence[tuple[int, int] | None]) -> list[Run]:
    runs: list[Run] = []
    for place, source in enumerate(sources):
        if source is None:
            continue
        which, at = source
        if runs:
            start, stop, last, first = runs[-1]
            if stop == place and last == which and first + stop - start == at:
                runs[-1] = start, place + 1, which, first
                continue
        runs.append((place, place + 1, which, at))
    return runs


def _rest(runs: Sequence[Run], size: int) -> tuple[int, int] | None:
    """The one piece that no run has; (-1, -1) if there are several."""
    edges = [0, *(edge for start, stop, *_ in runs for edge in (start, stop)), size]
    gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    if len(gaps) > 1:
        return -1, -1
    return gaps[0] if gaps else None
