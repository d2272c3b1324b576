"""What the compiler tells a rule of the weights that it is for."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from .._pieces import Run, make_pieces
from .._relation import Relation


class Weights(NamedTuple):
    """The weights of a step.

    - `params`: the shape of every param, by its key path.
    - `relations`: the relations, without what they share.
    - `names`: per relation a name of its dy/dw and one of its df, the same for what is
      the same; None for what has no name.
    - `runs`: per relation which elements of its df earlier relations have.
    - `batch`: the batch size, or None.
    """

    params: Mapping[str, tuple[int, ...]]
    relations: tuple[Relation, ...]
    names: tuple[tuple[Hashable, Hashable], ...]
    runs: tuple[tuple[Run, ...], ...]
    batch: int | None

    def shared(self, rules: Sequence[Hashable]) -> list[Relation]:
        """The relations, which know what of dy/dw and of df an earlier one has. `rules`
        has a name for the rule of each: those of different rules share nothing."""
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
            relation, runs = self.relations[number], self.runs[number]
            mine = runs and df is None and all(rules[n] == rule for _, _, n, _ in runs)
            pieces = make_pieces(runs, relation.map) if mine else None
            shares = {"same_x": x, "same_df": df, "pieces": pieces}
            found.append(dataclasses.replace(relation, **shares))
        return found
