"""Learning rules, one a file."""

from ._base import LocalRule as LocalRule, RelationJacobian as RelationJacobian
from ._drtrl import DRTRL as DRTRL
from ._esdrtrl import ESDRTRL as ESDRTRL, FactorisedTrace as FactorisedTrace
from ._window import GroupWindow as GroupWindow, Window as Window
