"""Cells, containers, readouts and encoders for `eqx_etrace`, as plain Equinox modules.

A convenience: the library trains any Equinox module as it is.
"""

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
from ._containers import (
    Residual as Residual,
    Sequential as Sequential,
    Stack as Stack,
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
from ._linear_recurrent import LRU as LRU, RTU as RTU, NonlinearRTU as NonlinearRTU
from ._readout import (
    LeakyReadout as LeakyReadout,
    LinearReadout as LinearReadout,
    MaxOverTime as MaxOverTime,
    SpikeCount as SpikeCount,
)
from ._wrappers import GRU as GRU, LSTM as LSTM
