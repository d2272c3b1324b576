"""A tanh RNN for the formulas of rules that follow the whole state."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from oracles import online, quick_jit
from windows import squares

import eqx_etrace as etrace


IN, OUT, STEPS = 3, 2, 20


class RNN(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x + self.u @ h)
        return self.out @ h, h


class Plain(NamedTuple):
    """The same numbers as NumPy arrays."""

    w: Any
    u: Any
    out: Any
    h: Any
    xs: Any
    ts: Any


def plain_rnn(rule, units=4, steps=STEPS, **options):
    """(graph, params, data, `Plain`) with the data (state, inputs, targets)."""
    rng = np.random.default_rng(0)
    shapes = (units, IN), (units, units), (OUT, units)
    shapes += (units,), (steps, IN), (steps, OUT)
    plain = Plain(*(rng.normal(size=shape) for shape in shapes))
    w, u, out, *data = map(jnp.asarray, plain)
    net = RNN(w, u, out)
    graph = etrace.compile(net, data[0], data[1][0], rule, **options)
    return graph, graph.params(net), data, plain


def gradient(graph, params, data):
    return quick_jit(functools.partial(online, graph, loss=squares))(params, *data)


def as_weights(total, plain):
    """A gradient by w and u in one vector as that of each."""
    w, u = np.split(total, [plain.w.size])
    return {"w": w.reshape(plain.w.shape), "u": u.reshape(plain.u.shape)}
