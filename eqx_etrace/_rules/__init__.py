"""Learning rules, one a file."""

from ._base import LocalRule as LocalRule, RelationJacobian as RelationJacobian
from ._drtrl import DRTRL as DRTRL
from ._esdrtrl import ESDRTRL as ESDRTRL, FactorisedTrace as FactorisedTrace
from ._global import (
    Dynamics as Dynamics,
    GlobalRule as GlobalRule,
    Sizes as Sizes,
    Structure as Structure,
)
from ._kfrtrl import KFRTRL as KFRTRL, Factors as Factors
from ._named import (
    OSTL as OSTL,
    OTTT as OTTT,
    Immediate as Immediate,
    PPProp as PPProp,
)
from ._rtrl import RTRL as RTRL
from ._skrtrl import SKRTRL as SKRTRL, Sketch as Sketch
from ._snap import SnAp as SnAp
from ._uoro import UORO as UORO, RankOne as RankOne
from ._uses import (
    Space as Space,
    UseJacobian as UseJacobian,
    Uses as Uses,
    WeightUse as WeightUse,
)
from ._window import GroupWindow as GroupWindow, Window as Window
