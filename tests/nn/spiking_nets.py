"""Small networks of the pieces, with the places marked where units are cut apart.

A `Net` is a user's model: input weights, a `Recurrent` layer, a readout. `Net.run` goes
through the same pieces one by one, with the taps of `models.py`: what goes to other
units passes `recur`, each new state leaf passes `new` where it is made. Nothing in this
file uses the library under test, the pieces apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from models import PLAIN, Groups, Taps

from eqx_etrace import nn


IN, UNITS, OUT, STEPS = 2, 3, 2, 6
WIDE = nn.superspike(0.5)
KEY = jax.random.key(0)


class Chain(eqx.Module):
    """A piece with a state, and a dense connection behind it."""

    first: Any
    dense: nn.Dense

    def init_state(self):
        return self.first.init_state(), ()

    def __call__(self, x, state):
        x, first = self.first(x, state[0])
        y, _ = self.dense(x, ())
        return y, (first, ())


class Net(eqx.Module):
    w_in: Any
    body: nn.Recurrent
    readout: eqx.nn.Linear
    cut: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        if self.cut:
            return self.run(x, state, Taps(recur=jax.lax.stop_gradient))
        drive, _ = self.w_in(x, ())
        out, state = self.body(drive, state)
        return self.readout(out.reshape(-1)), state

    def run(self, x, state, taps):
        body = self.body
        first = len(jax.tree.leaves(state.neuron))
        synaptic = len(jax.tree.leaves(state.synapse))
        sent = body.neuron.output(state.neuron)
        far = taps.from_leaf(first + synaptic)
        back, connection = _connect(body.connection, sent, state.connection, far)
        drive = jax.tree.map(jnp.add, self.w_in(x, ())[0], back)
        synapse = state.synapse
        if synapse != ():
            synapse = body.synapse.advance(synapse, drive)
            synapse = _tapped(synapse, taps.from_leaf(first))
            drive = body.synapse.output(synapse)
        neuron = _integrate(body.neuron, drive, state.neuron, taps)
        out = self.readout(body.neuron.output(neuron).reshape(-1))
        return out, nn.RecurrentState(neuron, synapse, connection)


def _tapped(tree, taps, first=0):
    leaves, treedef = jax.tree.flatten(tree)
    new = [
        taps.new(first + i, leaf) if eqx.is_inexact_array(leaf) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, new)


def _integrate(neuron, drive, state, taps):
    state = neuron.after_spike(state)
    if isinstance(neuron, nn.COBA):
        inner = len(jax.tree.leaves(state.neuron))
        state = neuron.conduct(state, drive)
        pair = _tapped((state.g_exc, state.g_inh), taps, inner)
        state = neuron.drift(state._replace(g_exc=pair[0], g_inh=pair[1]))
        return state._replace(neuron=_tapped(state.neuron, taps))
    return _tapped(neuron.advance(state, drive), taps)


def _connect(connection: Any, x, state, taps):
    if isinstance(connection, Chain):
        y, first = _piece(connection.first, x, state[0], taps)
        return connection.dense(taps.recur(y), ())[0], (first, ())
    bias: Any = getattr(connection, "bias", None)
    if isinstance(connection, nn.DelayedDense):
        history = jnp.concatenate([x[None], state.buffer])
        seen = history[connection.delays, np.arange(x.size)[None]]
        seen = jnp.where(np.eye(x.size, dtype=bool), seen, taps.recur(seen))
        y = jnp.sum(connection.weight * seen, axis=1) + bias
        return y, nn.DelayState(taps.new(0, history[:-1]))
    if isinstance(connection, nn.Sparse):
        # Each entry is a product of its own: one of a unit with itself is not cut.
        own = np.asarray(connection.indices) == np.arange(x.size)[:, None]
        seen = x[connection.indices]
        seen = jnp.where(own, seen, taps.recur(seen))
        return jnp.sum(connection.weight * seen, axis=1) + bias, ()
    return connection(taps.recur(x), ())[0], ()


def _piece(piece, x, state, taps):
    """A delay or a plastic synapse, written out."""
    if isinstance(piece, nn.Delay):
        history = jnp.concatenate([x[None], state.buffer])
        y = history[np.array(piece.steps), np.arange(x.size)]
        return y, nn.DelayState(taps.new(0, history[:-1]))
    release, tau_d = piece.release(), piece.tau_d()
    r = 1 - (1 - state.r) * jnp.exp(-piece.dt / tau_d)
    if isinstance(piece, nn.STD):
        y = release * r * x
        return y, nn.STDState(taps.new(0, r - y))
    u = state.u * jnp.exp(-piece.dt / piece.tau_f())
    u = taps.new(0, u + release * (1 - u) * x)
    y = u * r * x
    return y, nn.STPState(u, taps.new(1, r - y))


# The table.


@dataclasses.dataclass(frozen=True)
class Case:
    """**Arguments:**

    - `body`: the recurrent layer.
    - `groups`: for the dense reference, as in `models.Case`.
    - `slots`: of a unit.
    - `scale`: of the weights, in the unit of the current.
    - `drive`: of all units, in units of `scale`.
    - `spread`: of the random part of the state, by leaf name; 0.4 for the others.
    - `vjp`: the form that the compiler has to choose.
    - `w_in`: the input weights, if not dense.
    - `now`: a weight acts through the recurrent product alone, and gets the gradient of
      the current step.
    """

    body: nn.Recurrent
    groups: Groups
    slots: int
    scale: float = 2.0
    drive: float = 1.0
    spread: dict[str, float] = dataclasses.field(default_factory=dict)
    vjp: str = "single-step"
    w_in: Callable[..., Any] | None = None
    now: bool = False


def _layer(neuron, connection=None, synapse=None):
    return nn.Recurrent(neuron, connection, synapse=synapse, key=KEY)


def _dense():
    return nn.Dense(UNITS, UNITS, key=KEY)


_LIF: dict[str, Any] = {"tau": 4.0, "spike": WIDE}
_MV: dict[str, Any] = {"spike": nn.superspike(0.05)}
_SPREAD = {"v": 12.0}

CASES: dict[str, Case] = {
    "IF, sparse": Case(
        _layer(
            nn.IF(UNITS, spike=WIDE, trainable="capacitance"),
            nn.Sparse(UNITS, UNITS, 2, key=KEY),
            nn.Delta(UNITS),
        ),
        ((0,),),
        1,
    ),
    "LIF, whole reset, Dale": Case(
        _layer(
            nn.LIF(UNITS, **_LIF, reset="value", detach_reset=False),
            nn.Dale(UNITS, UNITS, excitatory=2, key=KEY),
        ),
        ((0,),),
        1,
    ),
    "LIF, threshold": Case(
        _layer(nn.LIF(UNITS, **_LIF, trainable=("threshold", "v_reset"))),
        ((0,),),
        1,
        now=True,
    ),
    "LI": Case(_layer(nn.LI(UNITS, tau=4.0)), ((0,),), 1),
    "Refractory": Case(_layer(nn.Refractory(nn.LIF(UNITS, **_LIF), 2.0)), ((0,),), 1),
    "ALIF, exponential": Case(
        _layer(
            nn.ALIF(UNITS, **_LIF, tau_a=10.0, trainable=("tau", "tau_a")),
            synapse=nn.Exponential(UNITS, trainable="tau"),
        ),
        ((0, 1, 2),),
        3,
    ),
    "GIF": Case(
        _layer(nn.GIF(UNITS, **_MV, a=0.01, jump_1=0.4, jump_2=-0.1, trainable=("a",))),
        ((0, 1, 2, 3),),
        4,
        scale=10.0,
        spread=_SPREAD | {"threshold": 6.0},
    ),
    "AdEx": Case(
        _layer(nn.AdEx(UNITS, **_MV, v_peak=-45.0, trainable=("tau_w", "a", "b"))),
        ((0, 1),),
        2,
        scale=6000.0,
        spread=_SPREAD | {"w": 100.0},
    ),
    "Izhikevich": Case(
        _layer(nn.Izhikevich(UNITS, **_MV, trainable=("a", "b", "c", "d"))),
        ((0, 1),),
        2,
        scale=30.0,
        spread=_SPREAD | {"u": 2.0},
    ),
    "HodgkinHuxley": Case(
        _layer(nn.HodgkinHuxley(UNITS, **_MV, dt=0.5, substeps=2)),
        ((0, 1, 2, 3),),
        4,
        scale=200.0,
        spread={"v": 30.0, "m": 0.02, "h": 0.1, "n": 0.1},
    ),
    "LIF, exponential": Case(
        _layer(
            nn.LIF(UNITS, **_LIF, trainable=("tau", "v_rest", "resistance")),
            synapse=nn.Exponential(UNITS),
        ),
        ((0, 1),),
        2,
    ),
    "LIF, alpha": Case(
        _layer(nn.LIF(UNITS, **_LIF), synapse=nn.Alpha(UNITS, trainable="tau")),
        ((0, 1, 2),),
        3,
    ),
    "LIF, dual exponential": Case(
        _layer(
            nn.LIF(UNITS, **_LIF),
            synapse=nn.DualExponential(UNITS, trainable=("tau_rise", "tau_decay")),
        ),
        ((0, 1, 2),),
        3,
    ),
    "LIF, COBA": Case(
        _layer(
            nn.COBA(
                nn.LIF(UNITS, **_LIF),
                e_exc=5.0,
                e_inh=-1.0,
                trainable=("tau_exc", "tau_inh", "e_inh"),
            ),
            nn.ExcInh(UNITS, UNITS, excitatory=2, key=KEY),
        ),
        ((0, 1, 2),),
        3,
        scale=5.0,
        spread={"g_exc": 0.1, "g_inh": 0.1},
        w_in=lambda key: nn.ExcInh(IN, UNITS, excitatory=1, key=key),
    ),
    "delay": Case(
        _layer(nn.LIF(UNITS, **_LIF), Chain(nn.Delay(UNITS, [0, 2, 1]), _dense())),
        ((0, 1),),
        3,
    ),
    "delays of connections": Case(
        _layer(
            nn.LIF(UNITS, **_LIF),
            nn.DelayedDense(UNITS, UNITS, [[0, 1, 2], [2, 1, 0], [1, 1, 2]], key=KEY),
        ),
        ((0, 1),),
        3,
    ),
    "STP": Case(
        _layer(
            nn.LIF(UNITS, **_LIF),
            Chain(
                nn.STP(
                    UNITS,
                    tau_f=6.0,
                    tau_d=4.0,
                    trainable=("release", "tau_f", "tau_d"),
                ),
                _dense(),
            ),
        ),
        ((0, 1, 2),),
        3,
        vjp="multi-step",
    ),
    "STD": Case(
        _layer(nn.LIF(UNITS, **_LIF), Chain(nn.STD(UNITS, tau_d=4.0), _dense())),
        ((0, 1),),
        2,
    ),
    "convolution": Case(
        _layer(
            nn.LIF((2, 3), **_LIF),
            nn.Conv(1, 2, 2, 3, padding=1, key=KEY),
            nn.Exponential((2, 3)),
        ),
        ((0, 1),),
        2,
        w_in=lambda key: nn.Conv(1, 1, 2, 2, key=key),
    ),
}


def _scaled(module, scale):
    """Weights are drawn of order one; those behind softplus grow as its argument."""

    def grow(leaf):
        positive = isinstance(leaf, nn.Positive)
        return nn.Positive(scale * leaf()) if positive else scale * leaf

    leaves, treedef = jax.tree.flatten(
        module,
        is_leaf=lambda leaf: isinstance(leaf, nn.Positive),
    )
    new = [
        leaf
        if isinstance(leaf, jax.Array) and not eqx.is_inexact_array(leaf)
        else grow(leaf)
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, new)


def _around(state, spread, rng):
    def jitter(path, leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        noise = spread.get(path[-1].name, 0.4) * rng.normal(size=leaf.shape)
        return leaf + jnp.asarray(abs(noise) if path[-1].name in _POSITIVE else noise)

    return jax.tree_util.tree_map_with_path(jitter, state)


_POSITIVE = ("g_exc", "g_inh", "m", "a", "u")


def _weights(body):
    connection = body.connection
    return connection.dense if isinstance(connection, Chain) else connection


def problem(case: Case):
    """(model, state, inputs, targets)."""
    keys, rng = jax.random.split(jax.random.key(1), 2), np.random.default_rng(2)
    conv = isinstance(case.body.connection, nn.Conv)
    w_in = (case.w_in or (lambda key: nn.Dense(IN, UNITS, key=key)))(keys[0])
    width = int(np.prod(case.body.shape))
    body = case.body
    connection = _scaled(_weights(body), 0.5 * case.scale)
    body = eqx.tree_at(_weights, body, connection)
    w_in = _scaled(w_in, case.scale)
    if isinstance(w_in, nn.Dense):
        drive = jnp.full(UNITS, case.drive * case.scale)
        w_in = eqx.tree_at(lambda w: w.bias, w_in, drive)
    model = Net(w_in, body, eqx.nn.Linear(width, OUT, key=keys[1]))
    state = _around(body.init_state(), case.spread, rng)
    shape = (1, 4) if conv else (IN,)
    xs = jnp.asarray(rng.normal(1.0, 1.0, (STEPS, *shape)))
    if isinstance(w_in, nn.ExcInh):
        xs = jnp.abs(xs)
    return model, state, xs, jnp.asarray(rng.normal(size=(STEPS, OUT)))


class Now(eqx.Module):
    """A step from a state that no gradient passes."""

    model: Net

    def __call__(self, x, state):
        inexact, rest = eqx.partition(state, eqx.is_inexact_array)
        return self.model(x, eqx.combine(jax.lax.stop_gradient(inexact), rest))


__all__ = ["CASES", "PLAIN", "Net", "Now", "problem"]
