"""What the compiler knows of the Jacobian of a hidden group beyond its zeros."""

import dataclasses
from typing import Any

from ._pieces import Run


Rows = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Flags:
    """A boolean per entry of a `GroupJacobian`, None where that is zero."""

    transition: Rows
    within: Rows
    direct: Rows


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """Which entries are alike or fixed, and what the others are made of.

    - `alike`: all elements of the entry are equal.
    - `fixed`: the entry does not depend on the data of the step.
    - `reads`: the values of the step, old hidden leaves among them, that the entries
      that are not fixed depend on.
    - `drives`: per use of the group, the first use with the very same df.
    - `runs`: per use, which elements of df are those of an earlier use.
    - `per_unit`: per use, whether df is the same for all elements that feed one unit.
    """

    alike: Flags
    fixed: Flags
    reads: tuple[int, ...]
    drives: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    per_unit: tuple[bool, ...]
