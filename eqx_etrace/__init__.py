"""Online learning of recurrent and spiking networks with eligibility traces."""

from ._compile import compile as compile
from ._decision import Decision as Decision, Kind as Kind
from ._drive import grad as grad, value_and_grad as value_and_grad
from ._errors import CompileError as CompileError
from ._graph import ETraceGraph as ETraceGraph
from ._group import HiddenGroup as HiddenGroup
from ._inputs import (
    MultiStepData as MultiStepData,
    SingleStepData as SingleStepData,
)
from ._inspect import (
    StepJacobians as StepJacobians,
    WeightJacobian as WeightJacobian,
    jacobians as jacobians,
    learning_signal as learning_signal,
)
from ._learn import learn as learn
from ._op_rules import OpRule as OpRule, OpUse as OpUse
from ._relation import Relation as Relation
from ._rules import (
    DRTRL as DRTRL,
    ESDRTRL as ESDRTRL,
    KFRTRL as KFRTRL,
    OSTL as OSTL,
    OTTT as OTTT,
    RTRL as RTRL,
    SKRTRL as SKRTRL,
    UORO as UORO,
    Immediate as Immediate,
    PPProp as PPProp,
    SnAp as SnAp,
)
from ._step import init_trace as init_trace, step as step
from ._steps import evolve as evolve, steps as steps


__version__ = "0.1.0"
