"""What each module is in NIR: one function for each type, in a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import nir
import numpy as np

from .. import nn
from ._modules import Flatten, Scale, Shape, Threshold
from ._time import SECOND, Steps


@dataclasses.dataclass(frozen=True)
class Context:
    steps: Steps
    any_reset: bool


def _full(value: Any, shape: Shape) -> np.ndarray:
    dtype = jnp.result_type(float)
    return np.array(np.broadcast_to(np.asarray(value), shape), dtype)


def _cuba_lif(synapse: Any, neuron: Any) -> Any:
    return nir.CubaLIF(
        tau_syn=synapse.tau,
        tau_mem=neuron.tau,
        r=neuron.r,
        v_leak=neuron.v_leak,
        v_threshold=neuron.v_threshold,
        v_reset=neuron.v_reset,
        w_in=synapse.r,
        metadata=neuron.metadata,
    )


def _cuba_li(synapse: Any, neuron: Any) -> Any:
    return nir.CubaLI(
        tau_syn=synapse.tau,
        tau_mem=neuron.tau,
        r=neuron.r,
        v_leak=neuron.v_leak,
        w_in=synapse.r,
    )


CUBA = {nir.LIF: _cuba_lif, nir.LI: _cuba_li}


def _reset(module: Any, context: Context) -> dict[str, Any]:
    reset = module.firing.reset
    if reset != "value" and not context.any_reset:
        raise ValueError(
            f"got reset={reset!r}, expected reset='value': a spike puts the membrane "
            "of NIR at v_reset. With `any_reset=True` it is written to the metadata of "
            "the node; `from_nir` reads it there, other simulators have to be told."
        )
    return {} if reset == "value" else {"reset": reset}


def _lif(module: nn.LIF, shape: Shape, context: Context) -> list[Any]:
    node = nir.LIF(
        tau=_full(context.steps.tau_to(module.tau()), shape),
        r=_full(module.resistance(), shape),
        v_leak=_full(module.v_rest(), shape),
        v_threshold=_full(module.threshold(), shape),
        v_reset=_full(module.v_reset(), shape),
        metadata=_reset(module, context),
    )
    return [node]


def _li_node(tau: Any, r: Any, v_leak: Any, shape: Shape, context: Context) -> Any:
    tau = context.steps.tau_to(tau)
    return nir.LI(tau=_full(tau, shape), r=_full(r, shape), v_leak=_full(v_leak, shape))


def _li(module: nn.LI, shape: Shape, context: Context) -> list[Any]:
    tau, r, v_rest = module.tau(), module.resistance(), module.v_rest()
    return [_li_node(tau, r, v_rest, shape, context)]


def _exponential(module: nn.Exponential, shape: Shape, context: Context) -> list[Any]:
    """Its current jumps by what arrives, that of NIR by a share of it."""
    tau = np.asarray(module.tau(), float)
    return [_li_node(tau, 1 / context.steps.share(tau), 0.0, shape, context)]


def _if(module: nn.IF, shape: Shape, context: Context) -> list[Any]:
    node = nir.IF(
        r=_full(SECOND / np.asarray(module.capacitance(), float), shape),
        v_threshold=_full(module.threshold(), shape),
        v_reset=_full(module.v_reset(), shape),
        metadata=_reset(module, context),
    )
    return [node]


def _spike_count(module: Any, shape: Shape, context: Context) -> list[Any]:
    del module
    return [nir.I(r=_full(1 / context.steps.seconds, shape))]


def _affine(weight: Any, bias: Any) -> Any:
    weight = np.asarray(weight)
    return nir.Linear(weight) if bias is None else nir.Affine(weight, np.asarray(bias))


def _linear(module: Any, shape: Shape, context: Context) -> list[Any]:
    del context
    if len(shape) != 1:
        raise ValueError(f"got an input of shape {shape}, expected a vector.")
    return [_affine(module.weight, module.bias)]


def _sparse(module: nn.Sparse, shape: Shape, context: Context) -> list[Any]:
    del shape, context
    full = np.zeros((module.post, module.pre), module.weight.dtype)
    rows = np.arange(module.post)[:, None]
    # A unit may be listed twice: its weights add up.
    np.add.at(full, (rows, np.asarray(module.indices)), np.asarray(module.weight))
    return [_affine(full, module.bias)]


def _dale(module: nn.Dale, shape: Shape, context: Context) -> list[Any]:
    del shape, context
    return [_affine(module.matrix(), None)]


def _leaky_readout(
    module: nn.LeakyReadout, shape: Shape, context: Context
) -> list[Any]:
    del shape
    first = _affine(module.weight, module.bias)
    units = (module.output_size,)
    return [first, _li_node(module.tau, 1.0, 0.0, units, context)]


def _conv(module: Any, shape: Shape, context: Context) -> list[Any]:
    del context
    conv = module.conv if isinstance(module, nn.Conv) else module
    axes = conv.num_spatial_dims
    if axes not in (1, 2) or conv.padding_mode != "ZEROS":
        raise ValueError(
            f"got {axes} axes and padding_mode={conv.padding_mode!r}, expected 1 or 2 "
            "and 'ZEROS', which is all that NIR has."
        )
    weight = np.asarray(conv.weight)
    zeros = np.zeros(conv.out_channels, weight.dtype)
    bias = zeros if conv.bias is None else np.asarray(conv.bias).reshape(-1)
    kind: Any = nir.Conv1d if axes == 1 else nir.Conv2d
    padding = _conv_padding(conv)
    options = (conv.stride, padding, conv.dilation)
    if axes == 1:
        options = tuple(o if isinstance(o, str) else o[0] for o in options)
    space = shape[1] if axes == 1 else shape[1:]
    return [kind(space, weight, *options, conv.groups, bias)]


def _conv_padding(conv: Any) -> Any:
    if conv.padding == "VALID":
        return (0,) * conv.num_spatial_dims
    if conv.padding == "SAME" and set(conv.stride) == {1}:
        return "same"
    if isinstance(conv.padding, str):
        raise ValueError(
            f"got padding {conv.padding!r} with a stride of {conv.stride}, expected "
            "numbers, 'VALID', or 'SAME' with a stride of 1. Give the padding as "
            "numbers."
        )
    return _symmetric(conv.padding)


def _symmetric(padding: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    if any(low != high for low, high in padding):
        raise ValueError(
            f"got a padding of {padding}, expected the same on both sides. Pad the "
            "input in front of the network."
        )
    return tuple(low for low, _ in padding)


def _pool(module: Any, shape: Shape, context: Context) -> list[Any]:
    del shape, context
    average = isinstance(module, eqx.nn.AvgPool2d)
    is_sum = module.operation is lax.add and module.num_spatial_dims == 2
    if module.use_ceil or not is_sum or np.any(np.asarray(module.init) != 0):
        raise ValueError(
            "got a pool of another kind, expected an `AvgPool2d`, or a `Pool` with "
            "init 0 and `lax.add` over two axes, without `use_ceil`."
        )
    sizes = module.kernel_size, module.stride, _symmetric(module.padding)
    kind: Any = nir.AvgPool2d if average else nir.SumPool2d
    return [kind(*(np.array(size) for size in sizes))]


def _delay(module: nn.Delay, shape: Shape, context: Context) -> list[Any]:
    steps = np.asarray(module.steps)
    steps = steps.reshape(shape) if steps.ndim else steps
    return [nir.Delay(_full(steps * context.steps.seconds, shape))]


def _ravel(module: Any, shape: Shape, context: Context) -> list[Any]:
    del module, context
    return [nir.Flatten({"input": np.array(shape, int)}, 0, -1)]


def _flatten(module: Flatten, shape: Shape, context: Context) -> list[Any]:
    del context
    return [nir.Flatten({"input": np.array(shape, int)}, module.start, module.end)]


def _scale(module: Scale, shape: Shape, context: Context) -> list[Any]:
    del context
    return [nir.Scale(_full(module.factor(), shape))]


def _threshold(module: Threshold, shape: Shape, context: Context) -> list[Any]:
    del context
    return [nir.Threshold(_full(module.threshold(), shape))]


MODULES: dict[type, Callable[[Any, Shape, Context], list[Any]]] = {
    Flatten: _flatten,
    Scale: _scale,
    Threshold: _threshold,
    eqx.nn.AvgPool2d: _pool,
    eqx.nn.Conv: _conv,
    eqx.nn.Conv1d: _conv,
    eqx.nn.Conv2d: _conv,
    eqx.nn.Linear: _linear,
    eqx.nn.Pool: _pool,
    nn.Conv: _conv,
    nn.Dale: _dale,
    nn.Delay: _delay,
    nn.Dense: _linear,
    nn.Exponential: _exponential,
    nn.IF: _if,
    nn.LI: _li,
    nn.LIF: _lif,
    nn.LeakyReadout: _leaky_readout,
    nn.LinearReadout: _linear,
    nn.Sparse: _sparse,
    nn.SpikeCount: _spike_count,
}

FUNCTIONS: dict[Any, Callable[[Any, Shape, Context], list[Any]]] = {jnp.ravel: _ravel}
