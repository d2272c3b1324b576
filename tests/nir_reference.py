"""NIR's equations by Euler's method, in NumPy and double precision.

The reference of Pedersen et al., Nature Communications 15, 2024, with the new current
acting on the membrane. It knows nothing of JAX and of the library under test.

`simulate` calls the nodes in the order that it is given. What is read of a node that
comes later in that order is what it sent in the step before, zero at first.
"""

import itertools

import numpy as np


def simulate(nodes, edges, order, xs, dt):
    """**Returns:** what each node sent, step by step, by its key. dt is in seconds;
    xs is for a node "input"."""
    states, sent, history = {}, {}, {key: [] for key in order}
    for x in xs:
        sent["input"] = np.asarray(x, float)
        for key in order:
            arrived = [sent[a] for a, b in edges if b == key and a in sent]
            node = nodes[key]
            total = sum(arrived) if arrived else np.zeros(node.input_type["input"])
            sent[key], states[key] = call(node, total, states.get(key), dt)
            history[key].append(sent[key])
    return {key: np.stack(values) for key, values in history.items()}


def call(node, x, state, dt):
    return globals()[f"_{type(node).__name__.lower()}"](node, x, state, dt)


def _output(node, x, state, dt):
    return x, state


_input = _output


def _linear(node, x, state, dt):
    return node.weight.astype(float) @ x, state


def _affine(node, x, state, dt):
    return node.weight.astype(float) @ x + node.bias, state


def _scale(node, x, state, dt):
    return node.scale * x, state


def _threshold(node, x, state, dt):
    return (x > node.threshold).astype(float), state


def _flatten(node, x, state, dt):
    last = node.end_dim % x.ndim
    shape = x.shape[: node.start_dim], x.shape[last + 1 :]
    return x.reshape(*shape[0], -1, *shape[1]), state


def _delay(node, x, state, dt):
    state = [*(state or []), x]
    out = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        ago = round(float(np.broadcast_to(node.delay, x.shape)[i]) / dt)
        out[i] = state[-1 - ago][i] if ago < len(state) else 0.0
    return out, state


def _leak(node, tau, v, current, dt):
    return v + dt / tau * (node.v_leak - v + node.r * current)


def _fire(node, v):
    z = v > node.v_threshold
    return z.astype(float), np.where(z, node.v_reset, v)


def _lif(node, x, v, dt):
    v = node.v_leak + np.zeros(x.shape) if v is None else v
    return _fire(node, _leak(node, node.tau.astype(float), v, x, dt))


def _li(node, x, v, dt):
    v = node.v_leak + np.zeros(x.shape) if v is None else v
    v = _leak(node, node.tau.astype(float), v, x, dt)
    return v, v


def _if(node, x, v, dt):
    v = node.v_reset + np.zeros(x.shape) if v is None else v
    return _fire(node, v + dt * node.r * x)


def _i(node, x, v, dt):
    v = (0.0 if v is None else v) + dt * node.r * x
    return v, v


def _current(node, x, state, dt):
    current, v = (0.0, node.v_leak + np.zeros(x.shape)) if state is None else state
    current = current + dt / node.tau_syn.astype(float) * (node.w_in * x - current)
    return current, _leak(node, node.tau_mem.astype(float), v, current, dt)


def _cubalif(node, x, state, dt):
    current, v = _current(node, x, state, dt)
    z, v = _fire(node, v)
    return z, (current, v)


def _cubali(node, x, state, dt):
    current, v = _current(node, x, state, dt)
    return v, (current, v)


def _windows(x, kernel, stride, padding, dilation):
    """(at, window) for each place of a window over the axes after the first."""
    x = np.pad(x, [(0, 0), *padding])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    counts = [
        (size - r) // s + 1
        for size, r, s in zip(x.shape[1:], reach, stride, strict=True)
    ]
    for at in itertools.product(*map(range, counts)):
        parts = zip(at, stride, reach, dilation, strict=True)
        cut = tuple(slice(i * s, i * s + r, d) for i, s, r, d in parts)
        yield at, x[(slice(None), *cut)]


def _tuple(value, count):
    return tuple(int(n) for n in np.broadcast_to(value, (count,)))


def _convolve(node, x):
    axes, weight = x.ndim - 1, node.weight.astype(float)
    kernel, dilation = weight.shape[2:], _tuple(node.dilation, axes)
    if isinstance(node.padding, str):
        totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        same = [(total // 2, total - total // 2) for total in totals]
        padding = same if node.padding == "same" else [(0, 0)] * axes
    else:
        padding = [(p, p) for p in _tuple(node.padding, axes)]
    found = {}
    for at, window in _windows(x, kernel, _tuple(node.stride, axes), padding, dilation):
        groups = np.split(window, node.groups), np.split(weight, node.groups)
        parts = [
            np.tensordot(w, part, part.ndim) for part, w in zip(*groups, strict=True)
        ]
        found[at] = np.concatenate(parts) + node.bias
    return _placed(found)


def _placed(found):
    counts = np.max(list(found), axis=0) + 1
    channels = len(next(iter(found.values())))
    out = np.zeros((channels, *counts))
    for at, values in found.items():
        out[(slice(None), *at)] = values
    return out


def _conv1d(node, x, state, dt):
    return _convolve(node, x), state


_conv2d = _conv1d


def _pool(node, x, mean):
    kernel = _tuple(node.kernel_size, 2)
    padding = [(p, p) for p in _tuple(node.padding, 2)]
    windows = _windows(x, kernel, _tuple(node.stride, 2), padding, (1, 1))
    size = np.prod(kernel) if mean else 1
    return _placed({at: w.sum((1, 2)) / size for at, w in windows})


def _sumpool2d(node, x, state, dt):
    return _pool(node, x, mean=False), state


def _avgpool2d(node, x, state, dt):
    return _pool(node, x, mean=True), state
