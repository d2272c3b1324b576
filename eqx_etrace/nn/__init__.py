"""Neurons, synapses, cells and readouts, each a plain Equinox module of one time step.

Everything is called as `(x, state) -> (out, state)`, unbatched, and has `init_state()`.
It is a convenience: the library trains any Equinox module, and nothing in here is known
to it. Times are in ms.
"""

from ._adaptive import (
    ALIF as ALIF,
    GIF as GIF,
    ALIFState as ALIFState,
    GIFState as GIFState,
)
from ._adex import AdEx as AdEx, AdExState as AdExState
from ._cells import (
    CFN as CFN,
    MGU as MGU,
    RNN as RNN,
    URLSTM as URLSTM,
    MinimalRNN as MinimalRNN,
)
from ._cells_elementwise import (
    IndRNN as IndRNN,
    MinGRU as MinGRU,
    MinLSTM as MinLSTM,
    QuasiLSTM as QuasiLSTM,
)
from ._connections import (
    Conv as Conv,
    Dale as Dale,
    Dense as Dense,
    ExcInh as ExcInh,
    Sparse as Sparse,
)
from ._containers import (
    Residual as Residual,
    Sequential as Sequential,
    Stack as Stack,
)
from ._delay import (
    Delay as Delay,
    DelayedDense as DelayedDense,
    DelayState as DelayState,
)
from ._encoders import (
    delta_encode as delta_encode,
    latency_encode as latency_encode,
    linear_latency_encode as linear_latency_encode,
    poisson_encode as poisson_encode,
    population_encode as population_encode,
    rate_encode as rate_encode,
    step_forward_encode as step_forward_encode,
)
from ._hodgkin_huxley import (
    HodgkinHuxley as HodgkinHuxley,
    HodgkinHuxleyState as HodgkinHuxleyState,
)
from ._izhikevich import (
    Izhikevich as Izhikevich,
    IzhikevichState as IzhikevichState,
)
from ._lif import (
    IF as IF,
    LI as LI,
    LIF as LIF,
    IFState as IFState,
    LIFState as LIFState,
    LIState as LIState,
)
from ._linear_recurrent import LRU as LRU, RTU as RTU, NonlinearRTU as NonlinearRTU
from ._neurons import AbstractNeuron as AbstractNeuron
from ._neurons_wrapped import (
    Recurrent as Recurrent,
    RecurrentState as RecurrentState,
    Refractory as Refractory,
    RefractoryState as RefractoryState,
)
from ._parameters import (
    Bounded as Bounded,
    Constant as Constant,
    Free as Free,
    Parameter as Parameter,
    Positive as Positive,
)
from ._plasticity import (
    STD as STD,
    STP as STP,
    STDState as STDState,
    STPState as STPState,
)
from ._readout import (
    LeakyReadout as LeakyReadout,
    LinearReadout as LinearReadout,
    MaxOverTime as MaxOverTime,
    SpikeCount as SpikeCount,
)
from ._surrogate import (
    Surrogate as Surrogate,
    arctan as arctan,
    boxcar as boxcar,
    gaussian as gaussian,
    multi_gaussian as multi_gaussian,
    relu_grad as relu_grad,
    sigmoid as sigmoid,
    superspike as superspike,
    surrogate as surrogate,
    triangle as triangle,
)
from ._synapses import (
    AbstractSynapse as AbstractSynapse,
    Alpha as Alpha,
    AlphaState as AlphaState,
    Delta as Delta,
    DualExponential as DualExponential,
    DualExponentialState as DualExponentialState,
    Exponential as Exponential,
    ExponentialState as ExponentialState,
)
from ._synapses_conductance import (
    COBA as COBA,
    COBAState as COBAState,
    Drive as Drive,
)
from ._wrappers import GRU as GRU, LSTM as LSTM
