"""Learning rules, one a file."""

from ._base import LocalRule as LocalRule, RelationJacobian as RelationJacobian
from ._drtrl import DRTRL as DRTRL
from ._window import GroupWindow as GroupWindow, Window as Window
