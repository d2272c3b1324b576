"""What each node of NIR becomes: one function for each type, in a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import nir
import numpy as np

from .. import nn
from ..nn._neurons import Reset, Spike
from ._modules import Flatten, Scale, Shape, Threshold
from ._time import SECOND, Steps


Modules = list[tuple[str, Any]]
"""What a node becomes, one after the other, with what is added to its key."""


@dataclasses.dataclass(frozen=True)
class Options:
    steps: Steps
    reset: Reset | None
    spike: Spike
    trainable: Sequence[str]


TRAINABLE = {
    nn.LIF: ("tau", "threshold", "v_rest", "v_reset", "resistance"),
    nn.LI: ("tau", "v_rest", "resistance"),
    nn.IF: ("threshold", "v_reset", "capacitance"),
    nn.Exponential: ("tau",),
}


def _array(value: Any) -> jax.Array:
    return jnp.asarray(np.asarray(value), jnp.result_type(float))


def _numbers(name: str, value: Any, shape: Shape) -> float | np.ndarray:
    """One number where all are equal, so that large layers hold no copies of it."""
    array = np.asarray(value, float)
    if array.size == 1:
        return float(array.reshape(()))
    if array.shape != shape:
        raise ValueError(
            f"got {name} of shape {array.shape}, expected {shape}, the shape of its "
            "input, or one number."
        )
    return float(array.flat[0]) if np.all(array == array.flat[0]) else array


def _scaled(factor: Any, shape: Shape) -> tuple[Modules, Any]:
    """A resistance that is not above zero is put in front: neurons have no such one."""
    if np.all(np.asarray(factor) > 0):
        return [], factor
    constant = nn.Constant(np.broadcast_to(factor, shape))
    return [(".scale", Scale(constant, shape))], 1.0


def _trains(kind: type, options: Options) -> list[str]:
    return [name for name in TRAINABLE[kind] if name in options.trainable]


def _fires(kind: type, node: Any, options: Options) -> dict[str, Any]:
    return {
        "dt": options.steps.dt,
        "reset": options.reset or node.metadata.get("reset", "value"),
        "spike": options.spike,
        "trainable": _trains(kind, options),
    }


def _if(node: Any, shape: Shape, options: Options) -> Modules:
    before, r = _scaled(_numbers("r", node.r, shape), shape)
    neuron = nn.IF(
        shape,
        threshold=_numbers("v_threshold", node.v_threshold, shape),
        v_reset=_numbers("v_reset", node.v_reset, shape),
        capacitance=SECOND / r,
        **_fires(nn.IF, node, options),
    )
    return [*before, ("", neuron)]


def _lif_of(node: Any, tau: Any, r: Any, shape: Shape, options: Options) -> Any:
    return nn.LIF(
        shape,
        tau=options.steps.tau_of(_numbers("the time constant", tau, shape)),
        threshold=_numbers("v_threshold", node.v_threshold, shape),
        v_rest=_numbers("v_leak", node.v_leak, shape),
        v_reset=_numbers("v_reset", node.v_reset, shape),
        resistance=r,
        **_fires(nn.LIF, node, options),
    )


def _li_of(node: Any, tau: Any, r: Any, shape: Shape, options: Options) -> Any:
    return nn.LI(
        shape,
        tau=options.steps.tau_of(_numbers("the time constant", tau, shape)),
        v_rest=_numbers("v_leak", node.v_leak, shape),
        resistance=r,
        dt=options.steps.dt,
        trainable=_trains(nn.LI, options),
    )


def _leaky(make: Callable[..., Any]) -> Callable[..., Modules]:
    def made(node: Any, shape: Shape, options: Options) -> Modules:
        before, r = _scaled(_numbers("r", node.r, shape), shape)
        return [*before, ("", make(node, node.tau, r, shape, options))]

    return made


def _current_based(make: Callable[..., Any]) -> Callable[..., Modules]:
    """The current of NIR is that of `nn.Exponential` times the share of a step: both
    that and `w_in` are part of the resistance."""

    def made(node: Any, shape: Shape, options: Options) -> Modules:
        steps = options.steps
        tau = steps.tau_of(_numbers("tau_syn", node.tau_syn, shape))
        jump = _numbers("w_in", node.w_in, shape) * steps.share(tau)
        before, r = _scaled(_numbers("r", node.r, shape) * jump, shape)
        synapse = nn.Exponential(
            shape, tau=tau, dt=steps.dt, trainable=_trains(nn.Exponential, options)
        )
        neuron = make(node, node.tau_mem, r, shape, options)
        return [*before, (".synapse", synapse), ("", neuron)]

    return made


def _integrator(node: Any, shape: Shape, options: Options) -> Modules:
    if len(shape) != 1:
        raise ValueError(
            f"got an input of shape {shape}, expected a vector. Flatten it before."
        )
    r = _numbers("r", node.r, shape) * options.steps.seconds
    factor = nn.Constant(np.broadcast_to(r, shape))
    # Counting spikes is r = 1 / dt, in single precision too.
    before = [] if np.allclose(r, 1, rtol=1e-6) else [(".scale", Scale(factor, shape))]
    return [*before, ("", nn.SpikeCount(shape[0]))]


def _linear(node: Any, shape: Shape, options: Options) -> Modules:
    del shape, options
    weight, bias = _array(node.weight), getattr(node, "bias", None)
    of_bias = weight.shape[:1] if bias is None else np.shape(bias)
    if weight.ndim != 2 or of_bias != weight.shape[:1]:
        raise ValueError(
            f"got weights of shape {weight.shape} and biases of shape "
            f"{of_bias}, expected (outputs, inputs) and (outputs,). Weights "
            "with more axes have no counterpart."
        )
    post, pre = weight.shape
    blank = eqx.filter_eval_shape(
        nn.Dense, pre, post, use_bias=bias is not None, key=jax.random.key(0)
    )
    return [("", _filled(blank, lambda m: m, weight, bias))]


def _filled(blank: Any, of: Callable[[Any], Any], weight: Any, bias: Any) -> Any:
    """The shapes of a module, with numbers for its weights."""
    blank = eqx.tree_at(lambda m: of(m).weight, blank, weight)
    if bias is None:
        return blank
    return eqx.tree_at(lambda m: of(m).bias, blank, _array(bias))


def _ints(value: Any, count: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.broadcast_to(np.asarray(value), (count,)))


def _convolution(axes: int) -> Callable[..., Modules]:
    def made(node: Any, shape: Shape, options: Options) -> Modules:
        del shape, options
        weight, stride = _array(node.weight), _ints(node.stride, axes)
        groups, padding = int(node.groups), node.padding
        if isinstance(padding, str):
            if padding == "same" and stride != (1,) * axes:
                raise ValueError(
                    f"got padding 'same' with a stride of {stride}, expected a stride "
                    "of 1. Simulators differ in what it means; give the padding as "
                    "numbers."
                )
            padding = padding.upper()
        else:
            padding = _ints(padding, axes)
        blank = eqx.filter_eval_shape(
            nn.Conv,
            axes,
            weight.shape[1] * groups,
            weight.shape[0],
            weight.shape[2:],
            stride=stride,
            padding=padding,
            dilation=_ints(node.dilation, axes),
            groups=groups,
            use_bias=node.bias is not None,
            key=jax.random.key(0),
        )
        ones = (1,) * axes
        bias = None if node.bias is None else np.asarray(node.bias).reshape(-1, *ones)
        return [("", _filled(blank, lambda m: m.conv, weight, bias))]

    return made


def _pool(node: Any, shape: Shape, options: Options) -> Modules:
    del shape, options
    kernel, stride, padding = (
        _ints(value, 2) for value in (node.kernel_size, node.stride, node.padding)
    )
    if isinstance(node, nir.AvgPool2d):
        return [("", eqx.nn.AvgPool2d(kernel, stride, padding))]
    return [("", eqx.nn.Pool(0.0, lax.add, 2, kernel, stride, padding))]


def _flatten(node: Any, shape: Shape, options: Options) -> Modules:
    del options
    start, end = int(node.start_dim), int(node.end_dim)
    if not all(-len(shape) <= i < len(shape) for i in (start, end)):
        raise ValueError(
            f"got axes {start} to {end}, expected those of an input of shape {shape}. "
            "NIR counts them without the batch."
        )
    return [("", Flatten(start, end))]


def _delay(node: Any, shape: Shape, options: Options) -> Modules:
    steps = options.steps.count(_numbers("delay", node.delay, shape))
    return [("", nn.Delay(shape, steps))]


def _scale(node: Any, shape: Shape, options: Options) -> Modules:
    del options
    _numbers("scale", node.scale, shape)
    factor = nn.Free(jnp.broadcast_to(_array(node.scale), shape))
    return [("", Scale(factor, shape))]


def _threshold(node: Any, shape: Shape, options: Options) -> Modules:
    threshold = nn.Constant(_numbers("threshold", node.threshold, shape))
    return [("", Threshold(threshold, shape, options.spike))]


NODES: dict[type, Callable[[Any, Shape, Options], Modules]] = {
    nir.Affine: _linear,
    nir.AvgPool2d: _pool,
    nir.Conv1d: _convolution(1),
    nir.Conv2d: _convolution(2),
    nir.CubaLI: _current_based(_li_of),
    nir.CubaLIF: _current_based(_lif_of),
    nir.Delay: _delay,
    nir.Flatten: _flatten,
    nir.I: _integrator,
    nir.IF: _if,
    nir.LI: _leaky(_li_of),
    nir.LIF: _leaky(_lif_of),
    nir.Linear: _linear,
    nir.Scale: _scale,
    nir.SumPool2d: _pool,
    nir.Threshold: _threshold,
}
