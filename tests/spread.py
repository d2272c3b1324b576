"""Networks, data and meshes of four devices, for what is spread over them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from models import spike

import eqx_etrace as etrace


IN, UNITS, OUT, BATCH, STEPS = 3, 8, 2, 8, 13
KEY = jax.random.key(5)
WAYS: dict[str, Any] = {
    "samples": ((4,), ("data",)),
    "units": ((4,), ("model",)),
    "both": ((2, 2), ("data", "model")),
}


class LIF(eqx.Module):
    """Membrane and current, with a recurrent product."""

    w: jax.Array
    u: jax.Array
    readout: eqx.nn.Linear
    bias: jax.Array

    def __call__(self, x, state):
        v, i = state
        z = spike(v - 0.5)
        i = 0.8 * i + self.w @ x + self.u @ z
        v = 0.9 * v * (1 - z) + i + self.bias
        return self.readout(spike(v - 0.5)), (v, i)


class GRU(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(state), state


def lif(units=UNITS, batch=BATCH):
    keys = jax.random.split(KEY, 3)
    readout = eqx.nn.Linear(units, OUT, key=keys[2])
    w, u = (jax.random.normal(keys[n], (units, m)) for n, m in ((0, IN), (1, units)))
    model = LIF(w, u / units**0.5, readout, jnp.zeros(units))
    return model, (jnp.zeros((batch, units)),) * 2


class LRU(eqx.Module):
    """A complex state of real params."""

    rate: jax.Array
    w: jax.Array
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        decay = jnp.exp(jax.lax.complex(-jnp.exp(self.rate), self.rate))
        state = decay * state + (self.w @ x).astype(state.dtype)
        return self.readout(state.real), state


class ConvLIF(eqx.Module):
    conv: eqx.nn.Conv1d
    readout: eqx.nn.Linear

    def __call__(self, x, v):
        z = spike(v - 0.5)
        v = 0.8 * v * (1 - z) + self.conv(x[None])
        return self.readout(spike(v - 0.5).reshape(-1)), v


class Delayed(eqx.Module):
    """A unit for each column of the state."""

    w: jax.Array
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        new = jnp.tanh(self.w @ x + 0.5 * state[-1])
        state = jnp.concatenate([new[None], state[:-1]])
        return self.readout(state[-1]), state


def lru():
    readout = eqx.nn.Linear(UNITS, OUT, key=KEY)
    w = jax.random.normal(KEY, (UNITS, IN))
    return LRU(-w[:, 0], w, readout), jnp.zeros((BATCH, UNITS), complex)


def conv():
    layer = eqx.nn.Conv1d(1, 4, 3, padding=1, key=KEY)
    readout = eqx.nn.Linear(4 * IN, OUT, key=KEY)
    return ConvLIF(layer, readout), jnp.zeros((BATCH, 4, IN))


def delayed():
    readout = eqx.nn.Linear(UNITS, OUT, key=KEY)
    w = jax.random.normal(KEY, (UNITS, IN))
    return Delayed(w, readout), jnp.zeros((BATCH, 4, UNITS))


def gru():
    cell = eqx.nn.GRUCell(IN, UNITS, key=KEY)
    return GRU(cell, eqx.nn.Linear(UNITS, OUT, key=KEY)), jnp.zeros((BATCH, UNITS))


def data(steps=STEPS, batch=BATCH):
    keys = jax.random.split(KEY)
    shapes = (steps, batch, IN), (steps, batch, OUT)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def mesh_of(way, kind=AxisType.Auto):
    shape, names = WAYS[way]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def loss_fn(out, target):
    return jnp.sum((out - target) ** 2, axis=-1)


def compiled(make, rule=None):
    model, state = make()
    kwargs = {} if rule is None else {"rule": rule}
    graph = etrace.compile(model, state, data()[0][0], batched=True, **kwargs)
    return graph, graph.params(model), state


def alike(found, expected, rtol=1e-9):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        size = float(np.max(abs(b), initial=1.0, where=np.isfinite(b)))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size)
