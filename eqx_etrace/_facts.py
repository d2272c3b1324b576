"""What the compiler knows of the Jacobian of a hidden group beyond its zeros."""

import dataclasses
from typing import Any


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
    - `per_unit`: per use, whether df is the same for all elements that feed one unit.
    """

    alike: Flags
    fixed: Flags
    reads: tuple[int, ...]
    drives: tuple[int, ...]
    per_unit: tuple[bool, ...]
