"""The four networks of `which_rule.py`, and the task that they learn."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from eqx_etrace import nn, tasks


SYMBOLS = 4
INPUTS, CLASSES = SYMBOLS + 2, SYMBOLS + 1
TAU_OUT = 5.0  # time steps, of the leaky readout


class Net(eqx.Module):
    """A recurrent part and a readout, both with a state."""

    body: Any
    readout: Any

    def init_state(self):
        return self.body.init_state(), self.readout.init_state()

    def __call__(self, x, state):
        body, readout = state
        y, body = self.body(x, body)
        out, readout = self.readout(y, readout)
        return out, (body, readout)


def gru(units, key):
    return nn.GRU(eqx.nn.GRUCell(INPUTS, units, key=key))


def lru(units, key):
    # All it has to remember is in eigenvalues near one.
    cell = nn.LRU(INPUTS, units, units, r_min=0.9, r_max=0.99, key=key)
    return nn.Sequential([cell, jax.nn.gelu])


def spiking(neuron, units, key):
    one, two = jax.random.split(key)
    tau = jnp.linspace(5.0, 50.0, units)
    made = neuron(
        units, tau=10.0, resistance=20 / tau, spike=nn.superspike(slope=2.0, scale=0.3)
    )
    layer = nn.Recurrent(made, synapse=nn.Exponential(units, tau=tau), key=two)
    return nn.Sequential([nn.Dense(INPUTS, units, key=one), layer])


class Kind(NamedTuple):
    make: Callable[[int, Any], Any]
    kappa: float = 0.0
    """By how much the readout remembers."""


LEAK = math.exp(-1 / TAU_OUT)
NETS = {
    "GRU": Kind(gru),
    "LRU": Kind(lru),
    "LIF": Kind(functools.partial(spiking, nn.LIF), LEAK),
    "adaptive LIF": Kind(functools.partial(spiking, nn.ALIF), LEAK),
}


def make_net(name, units, key):
    one, two = jax.random.split(key)
    body = NETS[name].make(units, one)
    if NETS[name].kappa:
        readout = nn.LeakyReadout(units, CLASSES, tau=TAU_OUT, key=two)
    else:
        readout = nn.LinearReadout(units, CLASSES, key=two)
    return Net(body, readout)


class Data(NamedTuple):
    """Time first, then the batch."""

    xs: jax.Array
    targets: jax.Array
    mask: jax.Array


def make_data(key, size):
    options = {"symbols": SYMBOLS, "length": 2, "delay": size["delay"]}
    task = functools.partial(tasks.copy, **options)
    return Data(*jax.vmap(task, out_axes=1)(jax.random.split(key, size["batch"])))


def rest(net, batch):
    state = net.init_state()
    return jax.tree.map(lambda a: jnp.zeros((batch, *a.shape), a.dtype), state)


def forward(net, state, xs):
    def body(state, x):
        out, state = jax.vmap(net)(x, state)
        return state, out

    return jax.lax.scan(body, state, xs)[1]
