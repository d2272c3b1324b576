"""Online learning of recurrent and spiking networks with eligibility traces."""

from ._callbacks import (
    CSVLogger as CSVLogger,
    JSONLLogger as JSONLLogger,
    TensorBoardLogger as TensorBoardLogger,
    progress as progress,
)
from ._checkpoint import (
    Checkpoint as Checkpoint,
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from ._compare import (
    Alignment as Alignment,
    GradientReport as GradientReport,
    compare_gradients as compare_gradients,
)
from ._compile import compile as compile
from ._decision import Decision as Decision, Kind as Kind
from ._drive import grad as grad, value_and_grad as value_and_grad
from ._errors import CompileError as CompileError
from ._fit import fit as fit
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
from ._monitor import Monitor as Monitor, monitor as monitor
from ._nir import from_nir as from_nir, to_nir as to_nir
from ._op_rules import OpRule as OpRule, OpUse as OpUse
from ._plan import MemoryPlan as MemoryPlan, TraceBytes as TraceBytes, plan as plan
from ._relation import Relation as Relation
from ._rules import (
    DNI as DNI,
    DRTRL as DRTRL,
    ESDRTRL as ESDRTRL,
    KFRTRL as KFRTRL,
    OSTL as OSTL,
    OSTTP as OSTTP,
    OTPE as OTPE,
    OTTT as OTTT,
    RFLO as RFLO,
    RTRL as RTRL,
    SKRTRL as SKRTRL,
    UORO as UORO,
    Budget as Budget,
    ByWeight as ByWeight,
    EProp as EProp,
    Immediate as Immediate,
    Kappa as Kappa,
    LocalRule as LocalRule,
    PPProp as PPProp,
    SnAp as SnAp,
    ThreeFactor as ThreeFactor,
)
from ._shardings import Shardings as Shardings, shardings as shardings
from ._signals import (
    AdaptiveFeedback as AdaptiveFeedback,
    Bootstrapped as Bootstrapped,
    Modulatory as Modulatory,
    RandomFeedback as RandomFeedback,
    Signal as Signal,
    Symmetric as Symmetric,
    TargetProjection as TargetProjection,
)
from ._step import init_trace as init_trace, step as step
from ._steps import evolve as evolve, steps as steps


__version__ = "0.1.0"
