"""The cells as data: their formulas written out once more, for NumPy and JAX alike.

A step is `(xp, cell, x, state, taps) -> (out, state)`, with the taps of `models.py`:
with NumPy it is the trajectory that the cell has to follow, with JAX the dense
reference of the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from models import Groups

from eqx_etrace import nn


IN, UNITS, OUT = 2, 3, 2


def sigmoid(xp, y):
    return 1 / (1 + xp.exp(-y))


def gate(p, x, h):
    return p.weight_ih @ x + p.weight_hh @ h + p.bias


# The steps.


def _rnn(xp, p, x, h, taps):
    new = taps.new(0, xp.tanh(gate(p, x, taps.recur(h))))
    return new, new


def _indrnn(xp, p, x, h, taps):
    new = taps.new(0, sigmoid(xp, p.weight_ih @ x + p.weight_hh * h + p.bias))
    return new, new


def _mgu(xp, p, x, h, taps):
    f = sigmoid(xp, gate(p.forget, x, taps.recur(h)))
    candidate = xp.tanh(gate(p.candidate, x, taps.leave(f * h)))
    new = taps.new(0, (1 - f) * h + f * candidate)
    return new, new


def _minimal_rnn(xp, p, x, h, taps):
    z = xp.tanh(p.encoder.weight @ x + p.encoder.bias)
    u = sigmoid(xp, gate(p.update, taps.leave(z), taps.recur(h)))
    new = taps.new(0, u * h + (1 - u) * z)
    return new, new


def _cfn(xp, p, x, h, taps):
    theta = sigmoid(xp, gate(p.forget, x, taps.recur(h)))
    eta = sigmoid(xp, gate(p.input, x, taps.recur(h)))
    new = theta * xp.tanh(h) + eta * xp.tanh(p.candidate.weight @ x)
    new = taps.new(0, new)
    return new, new


def _urlstm(xp, p, x, state, taps):
    h, c = taps.recur(state[0]), state[1]
    f = p.forget.weight_ih @ x + p.forget.weight_hh @ h + p.forget_bias
    r = p.refine.weight_ih @ x + p.refine.weight_hh @ h - p.forget_bias
    f, r = sigmoid(xp, f), sigmoid(xp, r)
    g = 2 * r * f + (1 - 2 * r) * f**2
    c = taps.new(1, g * c + (1 - g) * xp.tanh(gate(p.candidate, x, h)))
    h = taps.new(0, sigmoid(xp, gate(p.output, x, h)) * xp.tanh(c))
    return h, (h, c)


def _min_gru(xp, p, x, h, taps):
    z = sigmoid(xp, p.update.weight @ x + p.update.bias)
    new = (1 - z) * h + z * (p.candidate.weight @ x + p.candidate.bias)
    new = taps.new(0, new)
    return new, new


def _min_lstm(xp, p, x, h, taps):
    f = sigmoid(xp, p.forget.weight @ x + p.forget.bias)
    i = sigmoid(xp, p.input.weight @ x + p.input.bias)
    candidate = p.candidate.weight @ x + p.candidate.bias
    new = taps.new(0, f / (f + i) * h + i / (f + i) * candidate)
    return new, new


def _quasi_lstm(xp, p, x, c, taps):
    f = p.forget.weight_ih @ x + p.forget.weight_hh * c + p.forget.bias
    z = p.candidate.weight_ih @ x + p.candidate.weight_hh * c + p.candidate.bias
    f, z = sigmoid(xp, f), xp.tanh(z)
    c = taps.new(0, f * c + (1 - f) * z)
    return sigmoid(xp, gate(p.output, x, c)) * c, c


def _lru(xp, p, x, h, taps):
    lam = xp.exp(-xp.exp(p.nu_log) + 1j * xp.exp(p.theta_log))
    b, c = p.b_real + 1j * p.b_imag, p.c_real + 1j * p.c_imag
    h = taps.new(0, lam * h + xp.exp(p.gamma_log) * (b @ x))
    return (c @ h).real + p.d @ x, h


def _turned(xp, p, x, state):
    c1, c2 = state
    r, theta = xp.exp(-xp.exp(p.nu_log)), xp.exp(p.theta_log)
    g, phi, norm = r * xp.cos(theta), r * xp.sin(theta), xp.sqrt(1 - r**2)
    c1, c2 = g * c1 - phi * c2, g * c2 + phi * c1
    return c1 + norm * (p.weight_1 @ x), c2 + norm * (p.weight_2 @ x)


def _rtu(xp, p, x, state, taps):
    new = tuple(taps.new(i, c) for i, c in enumerate(_turned(xp, p, x, state)))
    return xp.tanh(xp.concatenate(new)), new


def _nonlinear_rtu(xp, p, x, state, taps):
    turned = _turned(xp, p, x, state)
    new = tuple(taps.new(i, xp.tanh(c)) for i, c in enumerate(turned))
    return xp.concatenate(new), new


def _gru(xp, p, x, h, taps):
    p, old = p.cell, taps.recur(h)
    in_r, in_z, in_n = xp.split(p.weight_ih @ x + p.bias, 3)
    rec_r, rec_z, rec_n = xp.split(p.weight_hh @ old, 3)
    candidate = xp.tanh(in_n + sigmoid(xp, in_r + rec_r) * (rec_n + p.bias_n))
    z = sigmoid(xp, in_z + rec_z)
    new = taps.new(0, (1 - z) * candidate + z * h)
    return new, new


def _lstm(xp, p, x, state, taps):
    p, h, c = p.cell, taps.recur(state[0]), state[1]
    i, f, g, o = xp.split(p.weight_ih @ x + p.weight_hh @ h + p.bias, 4)
    c = taps.new(1, sigmoid(xp, f) * c + sigmoid(xp, i) * xp.tanh(g))
    h = taps.new(0, sigmoid(xp, o) * xp.tanh(c))
    return h, (h, c)


@dataclasses.dataclass(frozen=True)
class Case:
    """`oracle`: "bptt" where units remember themselves alone, "dense" for any cell
    whose state is real. `paths`: those of all params."""

    make: Callable[..., Any]
    step: Callable[..., Any]
    paths: str
    slots: int = 1
    vjp: str = "single-step"
    oracle: tuple[str, ...] = ("dense",)

    @property
    def groups(self) -> Groups:
        return (tuple(range(self.slots)),)


def _made(kind, **options):
    return functools.partial(kind, IN, UNITS, **options)


def _gates(*names):
    parts = "weight_ih", "weight_hh", "bias"
    return " ".join(f"{name}.{part}" for name in names for part in parts)


LOCAL = ("dense", "bptt")
RING = "nu_log theta_log "
CASES = {
    "rnn": Case(_made(nn.RNN), _rnn, "weight_ih weight_hh bias"),
    "indrnn": Case(
        _made(nn.IndRNN, activation=jax.nn.sigmoid),
        _indrnn,
        "weight_ih weight_hh bias",
        oracle=LOCAL,
    ),
    "mgu": Case(_made(nn.MGU), _mgu, _gates("forget", "candidate"), vjp="multi-step"),
    "minimal_rnn": Case(
        _made(nn.MinimalRNN),
        _minimal_rnn,
        "encoder.weight encoder.bias " + _gates("update"),
        vjp="multi-step",
    ),
    "cfn": Case(_made(nn.CFN), _cfn, _gates("forget", "input") + " candidate.weight"),
    "urlstm": Case(
        _made(nn.URLSTM),
        _urlstm,
        "forget.weight_ih forget.weight_hh refine.weight_ih refine.weight_hh "
        + _gates("candidate", "output")
        + " forget_bias",
        slots=2,
    ),
    "min_gru": Case(
        _made(nn.MinGRU),
        _min_gru,
        "update.weight update.bias candidate.weight candidate.bias",
        oracle=LOCAL,
    ),
    "min_lstm": Case(
        _made(nn.MinLSTM),
        _min_lstm,
        "forget.weight forget.bias input.weight input.bias candidate.weight "
        "candidate.bias",
        oracle=LOCAL,
    ),
    "quasi_lstm": Case(
        _made(nn.QuasiLSTM),
        _quasi_lstm,
        _gates("forget", "candidate", "output"),
        oracle=LOCAL,
    ),
    "lru": Case(
        functools.partial(nn.LRU, IN, UNITS, OUT),
        _lru,
        RING + "gamma_log b_real b_imag c_real c_imag d",
        slots=2,
        oracle=("bptt",),
    ),
    "rtu": Case(
        _made(nn.RTU, activation=jnp.tanh),
        _rtu,
        RING + "weight_1 weight_2",
        slots=2,
        oracle=LOCAL,
    ),
    "nonlinear_rtu": Case(
        _made(nn.NonlinearRTU, activation=jnp.tanh),
        _nonlinear_rtu,
        RING + "weight_1 weight_2",
        slots=2,
        oracle=LOCAL,
    ),
    "gru": Case(
        lambda key, **options: nn.GRU(eqx.nn.GRUCell(IN, UNITS, key=key, **options)),
        _gru,
        "cell.weight_ih cell.weight_hh cell.bias cell.bias_n",
    ),
    "lstm": Case(
        lambda key, **options: nn.LSTM(eqx.nn.LSTMCell(IN, UNITS, key=key, **options)),
        _lstm,
        "cell.weight_ih cell.weight_hh cell.bias",
        slots=2,
    ),
}
