"""Small Equinox models, one time step each, and the facts that a test may ask about.

Every model is called as `model(x, state) -> (out, state)`. The same step can be run
with `Taps` put in by hand, at the places where the theory of local learning rules
needs them:

- `recur` meets the hidden state where it enters a recurrent mixing product,
- `leave` meets any other value on its way from one unit to another unit,
- `new` meets each new state leaf at the place where it is made, before its first use.

So one set of formulas gives the plain model (no taps), its hand-cut twin (`recur`
stops gradients), the local program (`recur` and `leave` stop gradients) and the step
with its new state perturbed. No part of this file uses the library under test.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree


IN, UNITS, OUT = 5, 7, 3
Groups = tuple[tuple[int, ...], ...]


def _keep(value: Array) -> Array:
    return value


def _keep_new(index: int, value: Array) -> Array:
    del index
    return value


@dataclasses.dataclass(frozen=True)
class Taps:
    recur: Callable[[Array], Array] = _keep
    leave: Callable[[Array], Array] = _keep
    new: Callable[[int, Array], Array] = _keep_new

    def from_leaf(self, first: int) -> "Taps":
        """The same taps for a layer whose state leaves are numbered from `first`."""
        if self is PLAIN:
            return self
        return dataclasses.replace(self, new=lambda i, a: self.new(first + i, a))


PLAIN = Taps()
TWIN = Taps(recur=jax.lax.stop_gradient)


@jax.custom_jvp
def spike(v: Array) -> Array:
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    return spike(v), dv * 0.5 / (1 + jnp.abs(2 * v)) ** 2


# Layers: (x, state, taps) -> (signal for whoever reads this layer, new state).


class GRU(eqx.Module):
    cell: eqx.nn.GRUCell

    def __call__(self, x, h, taps):
        if taps is PLAIN:
            new = self.cell(x, h)
            return new, new
        cell: Any = self.cell
        in_r, in_z, in_n = jnp.split(cell.weight_ih @ x + cell.bias, 3)
        rec_r, rec_z, rec_n = jnp.split(cell.weight_hh @ taps.recur(h), 3)
        reset, update = jax.nn.sigmoid(in_r + rec_r), jax.nn.sigmoid(in_z + rec_z)
        candidate = jnp.tanh(in_n + reset * (rec_n + cell.bias_n))
        new = taps.new(0, candidate + update * (h - candidate))
        return new, new


class LSTM(eqx.Module):
    cell: eqx.nn.LSTMCell

    def __call__(self, x, state, taps):
        if taps is PLAIN:
            new = self.cell(x, state)
            return new[0], new
        h, c = state
        cell = self.cell
        lin = cell.weight_ih @ x + cell.weight_hh @ taps.recur(h) + cell.bias
        i, f, g, o = jnp.split(lin, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        c = taps.new(1, c)
        h = taps.new(0, jax.nn.sigmoid(o) * jnp.tanh(c))
        return h, (h, c)


class RNN(eqx.Module):
    """`skip`: whoever reads this layer sees the old state as well as the new one."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    skip: bool = eqx.field(static=True, default=False)

    def __call__(self, x, h, taps):
        new = taps.new(0, jnp.tanh(self.w_in(x) + self.w_rec(taps.recur(h))))
        return (h + new if self.skip else new), new


class FilteredRNN(eqx.Module):
    """A leaky RNN behind a fixed filter of its input and a counter: of the three state
    leaves only `h` is hidden."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    leak: Array

    def __call__(self, x, state, taps):
        count = state["count"] + 1
        phase = jnp.cos(0.3 * count.astype(x.dtype))
        filtered = 0.5 * state["filtered"] + phase * x
        a = jax.nn.sigmoid(self.leak)
        drive = self.w_in(filtered) + self.w_rec(taps.recur(state["h"]))
        h = taps.new(2, a * state["h"] + (1 - a) * jnp.tanh(drive))
        return h, {"count": count, "filtered": filtered, "h": h}


class IndRNN(eqx.Module):
    w_in: eqx.nn.Linear
    u: Array

    def __call__(self, x, h, taps):
        new = taps.new(0, jnp.tanh(self.w_in(x) + self.u * h))
        return new, new


class LRU(eqx.Module):
    """A linear recurrent unit: complex diagonal, written with real numbers."""

    b_re: eqx.nn.Linear
    b_im: eqx.nn.Linear
    nu: Array
    theta: Array

    def __call__(self, x, state, taps):
        re, im = state
        size = jnp.exp(-jnp.exp(self.nu))
        lam_re, lam_im = size * jnp.cos(self.theta), size * jnp.sin(self.theta)
        new_re = taps.new(0, lam_re * re - lam_im * im + self.b_re(x))
        new_im = taps.new(1, lam_im * re + lam_re * im + self.b_im(x))
        return jnp.concatenate([new_re, new_im]), (new_re, new_im)


class LIF(eqx.Module):
    """Leaky integrate and fire with a synaptic current and a soft reset. `packed` keeps
    membrane and current in one array of shape (2, units)."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    tau_v: Array
    tau_g: Array
    packed: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state, taps):
        v, g = state
        z = spike(v - 1)
        a, b = jax.nn.sigmoid(self.tau_v), jax.nn.sigmoid(self.tau_g)
        g = b * g + self.w_in(x) + self.w_rec(taps.recur(z))
        if self.packed:
            new = taps.new(0, jnp.stack([a * (v - z) + (1 - a) * g, g]))
            return spike(new[0] - 1), new
        g = taps.new(1, g)
        v = taps.new(0, a * (v - z) + (1 - a) * g)
        return spike(v - 1), (v, g)


class ALIF(eqx.Module):
    """LIF with a threshold that adapts: three slots, the current feeds the membrane
    and both feed the adaptation within the step. With a trainable `beta` the spike that
    enters the recurrent product holds a weight, and it is not a door."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    tau_v: Array
    tau_g: Array
    tau_b: Array
    beta: float | Array = 1.8

    def __call__(self, x, state, taps):
        g, v, b = state["current"], state["membrane"], state["adaptation"]
        z = spike(v - 1 - self.beta * b)
        kg, kv, kb = (jax.nn.sigmoid(t) for t in (self.tau_g, self.tau_v, self.tau_b))
        g = taps.new(1, kg * g + self.w_in(x) + self.w_rec(taps.recur(z)))
        v = taps.new(2, kv * (v - z) + (1 - kv) * g)
        fast = spike(v - 1 - self.beta * b)
        b = taps.new(0, kb * b + (1 - kb) * fast + 0.1 * g)
        signal = spike(v - 1 - self.beta * b)
        return signal, {"current": g, "membrane": v, "adaptation": b}


class SpikeBeforeHardReset(eqx.Module):
    """The spike is read before the reset, and the stored membrane has forgotten it."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    tau: Array

    def __call__(self, x, v, taps):
        drive = self.w_in(x) + self.w_rec(taps.recur(jnp.tanh(v)))
        before = jax.nn.sigmoid(self.tau) * v + drive
        z = spike(before - 1)
        new = taps.new(0, before * (1 - jax.lax.stop_gradient(z)))
        return z, new


class HardReset(eqx.Module):
    """The same neuron with its spike in the state: the new state is the only door.
    The reset is not detached, so that one slot feeds the other within the step."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    tau: Array

    def __call__(self, x, state, taps):
        v, z = state
        drive = self.w_in(x) + self.w_rec(taps.recur(z))
        v = jax.nn.sigmoid(self.tau) * v + drive
        z = taps.new(1, spike(v - 1))
        v = taps.new(0, v * (1 - z))
        return z + v, (v, z)


class LayerNormBetween(eqx.Module):
    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __call__(self, x, h, taps):
        drive = self.w_in(x) + self.w_rec(taps.recur(h))
        if taps is PLAIN:
            new = jnp.tanh(self.norm(drive))
            return new, new
        norm: Any = self.norm
        mean = jnp.mean(taps.leave(drive), keepdims=True)
        variance = jnp.maximum(0.0, jnp.var(taps.leave(drive), keepdims=True))
        normed = (drive - mean) * jax.lax.rsqrt(variance + norm.eps)
        new = taps.new(0, jnp.tanh(norm.weight * normed + norm.bias))
        return new, new


# Networks.


class OneLayer(eqx.Module):
    layer: Callable
    readout: eqx.nn.Linear
    cut: bool = eqx.field(static=True)

    def __call__(self, x, state):
        return self.run(x, state, TWIN if self.cut else PLAIN)

    def run(self, x, state, taps: Taps):
        signal, state = self.layer(x, state, taps)
        return self.readout(signal), state


class TwoLayer(eqx.Module):
    """Layer 2 reads what layer 1 makes in this step, or with `delayed` the state that
    layer 1 had before it."""

    first: Callable
    second: Callable
    readout: eqx.nn.Linear
    delayed: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        return self.run(x, state, PLAIN)

    def run(self, x, state, taps: Taps):
        above = taps.from_leaf(len(jax.tree.leaves(state[0])))
        signal, first = self.first(x, state[0], taps)
        feed = taps.leave(state[0] if self.delayed else signal)
        signal, second = self.second(feed, state[1], above)
        return self.readout(signal), (first, second)


# Builders of layers: (key, inputs) -> (layer, zero state, width of its signal).


def _zeros(*shape: int) -> Array:
    return jnp.zeros(shape or UNITS)


def _products(key: PRNGKeyArray, inputs: int, recur: float = 1.0, drive: float = 1.0):
    k1, k2 = jax.random.split(key)
    w_in = eqx.nn.Linear(inputs, UNITS, key=k1)
    w_rec = eqx.nn.Linear(UNITS, UNITS, use_bias=False, key=k2)
    scaled = jax.tree.map(lambda a: drive * a, w_in)
    return scaled, eqx.tree_at(lambda w: w.weight, w_rec, recur * w_rec.weight)


def _times(key: PRNGKeyArray, n: int, centre: float = 1.0) -> list[Array]:
    keys = jax.random.split(key, n)
    return [centre + 0.5 * jax.random.normal(k, (UNITS,)) for k in keys]


def _gru(key, inputs):
    return GRU(eqx.nn.GRUCell(inputs, UNITS, key=key)), _zeros(), UNITS


def _lstm(key, inputs):
    cell = eqx.nn.LSTMCell(inputs, UNITS, key=key)
    return LSTM(cell), (_zeros(), _zeros()), UNITS


def _rnn(key, inputs, skip=False):
    return RNN(*_products(key, inputs, 2.0), skip), _zeros(), UNITS


def _rnn_skip(key, inputs):
    return _rnn(key, inputs, skip=True)


def _filtered_rnn(key, inputs):
    count = jnp.zeros((), jnp.int32)
    state = {"count": count, "filtered": _zeros(inputs), "h": _zeros()}
    layer = FilteredRNN(*_products(key, inputs, 2.0), *_times(key, 1))
    return layer, state, UNITS


def _indrnn(key, inputs):
    layer = IndRNN(_products(key, inputs)[0], *_times(key, 1, 0.7))
    return layer, _zeros(), UNITS


def _lru(key, inputs):
    k1, k2, k3 = jax.random.split(key, 3)
    b_re, b_im = (eqx.nn.Linear(inputs, UNITS, False, key=k) for k in (k1, k2))
    nu, theta = _times(k3, 2, -1.0)
    return LRU(b_re, b_im, nu, theta), (_zeros(), _zeros()), 2 * UNITS


def _lif(key, inputs):
    w_in, w_rec = _products(key, inputs, 4.0, 3.0)
    tau_v, tau_g = _times(key, 2)
    layer = LIF(w_in, w_rec, tau_v, tau_g)
    return layer, (_zeros(), _zeros()), UNITS


def _lif_scalar(key, inputs):
    tau_v, tau_g = jnp.asarray(1.2), jnp.asarray(1.4)
    layer = LIF(*_products(key, inputs, 4.0, 3.0), tau_v, tau_g)
    return layer, (_zeros(), _zeros()), UNITS


def _lif_packed(key, inputs):
    w_in, w_rec = _products(key, inputs, 4.0, 3.0)
    tau_v, tau_g = _times(key, 2)
    layer = LIF(w_in, w_rec, tau_v, tau_g, packed=True)
    return layer, _zeros(2, UNITS), UNITS


def _alif(key, inputs, beta: float | Array = 1.8):
    w_in, w_rec = _products(key, inputs, 4.0, 3.0)
    layer = ALIF(w_in, w_rec, *_times(key, 3), beta=beta)
    names = ("current", "membrane", "adaptation")
    return layer, {name: _zeros() for name in names}, UNITS


def _alif_beta(key, inputs):
    return _alif(key, inputs, jnp.asarray(1.8))


def _spike_before_hard_reset(key, inputs):
    layer = SpikeBeforeHardReset(*_products(key, inputs), *_times(key, 1))
    return layer, _zeros(), UNITS


def _hard_reset(key, inputs):
    layer = HardReset(*_products(key, inputs, 2.0), *_times(key, 1))
    return layer, (_zeros(), _zeros()), UNITS


def _layernorm(key, inputs):
    norm = eqx.nn.LayerNorm(UNITS)
    return LayerNormBetween(*_products(key, inputs, 2.0), norm), _zeros(), UNITS


def _one(build) -> Callable[..., tuple[Any, PyTree]]:
    def make(key: PRNGKeyArray, cut: bool = False):
        k1, k2 = jax.random.split(key)
        layer, state, width = build(k1, IN)
        return OneLayer(layer, eqx.nn.Linear(width, OUT, key=k2), cut), state

    return make


def _two(build_first, build_second, delayed: bool = False):
    def make(key: PRNGKeyArray, cut: bool = False):
        if cut:
            raise ValueError("a stack of layers has no hand-cut twin")
        k1, k2, k3 = jax.random.split(key, 3)
        first, state1, width1 = build_first(k1, IN)
        second, state2, width2 = build_second(k2, width1)
        readout = eqx.nn.Linear(width2, OUT, key=k3)
        return TwoLayer(first, second, readout, delayed), (state1, state2)

    return make


@dataclasses.dataclass(frozen=True)
class Case:
    """**Arguments:**

    - `make(key, cut=False)` gives a model and its zero state; `cut=True` the twin.
    - `groups`: for each hidden group the indices of its leaves in `tree.leaves(state)`.
      The last axis of such a leaf is the units, the axes before it are slots.
    - `oracle`: what besides the dense reference equals the online gradient: "twin"
      (BPTT of the hand-cut twin), "bptt" (BPTT of the model itself: its recurrence is
      local), or "dense" (nothing else).
    - `vjp`: the form of the step that suits the model.
    """

    make: Callable[..., tuple[Any, PyTree]]
    groups: Groups
    oracle: str = "twin"
    vjp: str = "single-step"
    inputs: int = IN


def _multi(make, groups: Groups) -> Case:
    return Case(make, groups, "dense", "multi-step")


MODELS: dict[str, Case] = {
    "gru": Case(_one(_gru), ((0,),)),
    "lstm": Case(_one(_lstm), ((0, 1),)),
    "rnn": Case(_one(_rnn), ((0,),)),
    "filtered_rnn": Case(_one(_filtered_rnn), ((2,),)),
    "lif": Case(_one(_lif), ((0, 1),)),
    "lif_scalar_tau": Case(_one(_lif_scalar), ((0, 1),)),
    "lif_packed": Case(_one(_lif_packed), ((0,),)),
    "alif": Case(_one(_alif), ((0, 1, 2),)),
    "hard_reset": Case(_one(_hard_reset), ((0, 1),)),
    "indrnn": Case(_one(_indrnn), ((0,),), "bptt"),
    "lru": Case(_one(_lru), ((0, 1),), "bptt"),
    "gru_lif": Case(_two(_gru, _lif), ((0,), (1, 2)), "dense"),
    "lif_lif": Case(_two(_lif, _lif), ((0, 1), (2, 3)), "dense"),
    "rnn_rnn": Case(_two(_rnn, _rnn), ((0,), (1,)), "dense"),
    "rnn_indrnn": Case(_two(_rnn, _indrnn), ((0,), (1,)), "dense"),
    "spike_before_hard_reset": _multi(_one(_spike_before_hard_reset), ((0,),)),
    "layernorm_between": _multi(_one(_layernorm), ((0,),)),
    "alif_trainable_beta": _multi(_one(_alif_beta), ((0, 1, 2),)),
    "old_state_readout": _multi(_one(_rnn_skip), ((0,),)),
    "delayed_layers": _multi(_two(_rnn, _rnn, delayed=True), ((0,), (1,))),
}


def random_state(key: PRNGKeyArray, state: PyTree) -> PyTree:
    """A state of the same structure with its inexact leaves drawn at random."""
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        0.8 * jax.random.normal(k, leaf.shape, leaf.dtype)
        if eqx.is_inexact_array(leaf)
        else leaf
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def sequence(key: PRNGKeyArray, case: Case, steps: int, *batch: int):
    """Random inputs and targets, time first."""
    k1, k2 = jax.random.split(key)
    xs = 2 * jax.random.normal(k1, (steps, *batch, case.inputs))
    return xs, jax.random.normal(k2, (steps, *batch, OUT))
