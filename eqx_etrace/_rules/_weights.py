"""What the compiler tells a rule of the weights that it is for."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from .._relation import Relation


class Weights(NamedTuple):
    """The weights of a step.

    - `params`: the shape of every param, by its key path.
    - `relations`: the relations, without what they share.
    - `names`: per relation a name of its dy/dw and one of its df, the same for what is
      the same; None for what has no name.
    - `batch`: the batch size, or None.
    """

    params: Mapping[str, tuple[int, ...]]
    relations: tuple[Relation, ...]
    names: tuple[tuple[Hashable, Hashable], ...]
    batch: int | None

    def shares(self, rules: Sequence[Hashable]) -> list[tuple[int | None, int | None]]:
        """Per relation the numbers of the first with the same dy/dw and of the first
        with the same df, None where that is itself. `rules` has a name for the rule of
        each relation: those of different rules share nothing."""
        firsts: dict[Hashable, int] = {}
        found = []
        for number, (rule, names) in enumerate(zip(rules, self.names, strict=True)):
            keys = [(rule, factor, name) for factor, name in enumerate(names)]
            same = [firsts.get(key) for key in keys]
            firsts.update((key, number) for key in keys if key not in firsts)
            x, df = (
                None if name is None else first
                for name, first in zip(names, same, strict=True)
            )
            found.append((x, df))
        return found
