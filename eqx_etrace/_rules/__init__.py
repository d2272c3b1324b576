"""Learning rules, one a file."""

from ._base import LocalRule as LocalRule, RelationJacobian as RelationJacobian
from ._budget import Budget as Budget
from ._by_weight import ByWeight as ByWeight, Composite as Composite, name_of as name_of
from ._dni import DNI as DNI
from ._drtrl import DRTRL as DRTRL
from ._esdrtrl import ESDRTRL as ESDRTRL, FactorisedTrace as FactorisedTrace
from ._global import (
    Dynamics as Dynamics,
    GlobalRule as GlobalRule,
    Sizes as Sizes,
    Structure as Structure,
)
from ._kappa import Kappa as Kappa
from ._kfrtrl import KFRTRL as KFRTRL, Factors as Factors
from ._named import (
    OSTL as OSTL,
    OSTTP as OSTTP,
    OTPE as OTPE,
    OTTT as OTTT,
    RFLO as RFLO,
    EProp as EProp,
    Immediate as Immediate,
    PPProp as PPProp,
    ThreeFactor as ThreeFactor,
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
from ._weights import Weights as Weights
from ._window import GroupWindow as GroupWindow, Window as Window
