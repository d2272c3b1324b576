"""What is done to params before they meet the data, and which leaves are params."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from catalogue_case import (
    IN,
    N,
    around,
    leaky,
    normal,
    table_of_cases,
    zeros,
)


WEIGHTS, case = table_of_cases()
_mask = np.random.default_rng(1).random((N, N)) < 0.6
_sign = np.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
_dense = {"['w']": {"dense"}, "['u']": {"dense"}}


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops=_dense,
)
def masked_and_scaled(p, x, h, taps):
    u = jnp.where(_mask, 2.0 * p["u"], 0.0)
    h = leaky(h, 3.0 * p["w"] @ x + u @ taps.recur(h))
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops=_dense,
)
def dale(p, x, h, taps):
    """The sign of a weight is that of its presynaptic unit."""
    u = jnp.abs(p["u"]) * _sign[None]
    h = leaky(h, p["w"] @ x + u @ jax.nn.sigmoid(taps.recur(h)))
    return h, h


@case(
    params={"w": (IN + N, 2 * N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def slices_of_a_transpose(p, x, h, taps):
    """Input and recurrent weights of a gate and a candidate in one matrix."""
    w = p["w"].T
    gate, candidate = jnp.split(w[:, :IN] @ x + w[:, IN:] @ taps.recur(h), 2)
    h = jax.nn.sigmoid(gate) * h + jnp.tanh(candidate)
    return h, h


@case(
    params={"w": (N, IN + N), "bias": (N,)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def one_product_of_input_and_state(p, x, h, taps):
    h = leaky(h, p["w"] @ jnp.concatenate([x, taps.recur(h)]) + p["bias"])
    return h, h


@case(
    params={"w": (N, IN), "ee": (4, 4), "ei": (4, 2), "ie": (2, 4), "ii": (2, 2)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['ei']": {"dense"}},
)
def concatenated_blocks(p, x, h, taps):
    excited = jnp.concatenate([jax.nn.softplus(p["ee"]), -jnp.exp(p["ei"])], axis=1)
    inhibited = jnp.concatenate([p["ie"], p["ii"]], axis=1)
    u = jnp.concatenate([excited, inhibited])
    h = leaky(h, p["w"] @ x + u @ taps.recur(h))
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "v": (N, N), "scale": ()},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"dense"}, "['v']": {"dense"}, "['scale']": {"dense"}},
)
def sum_of_two_weights(p, x, h, taps):
    u = p["u"] + p["scale"] * p["v"] * jnp.sin(p["u"])
    h = leaky(h, p["w"] @ x + u @ taps.recur(h))
    return h, h


@case(
    params={"w": (N, IN), "u": normal(N, N, scale=1.0)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops=_dense,
)
def straight_through_quantised(p, x, h, taps):
    def quantised(w):
        return w + jax.lax.stop_gradient(jnp.round(2 * w) / 2 - w)

    pruned = jnp.where(jnp.abs(p["w"]) > 0.2, p["w"], 0.0)
    h = leaky(h, pruned @ x + quantised(p["u"]) @ taps.recur(h))
    return h, h


@case(
    params={"w": (N, IN), "a": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['a']": {"dense"}},
)
def orthogonal_by_cayley(p, x, h, taps):
    """A linear solve of weights alone is a preparation."""
    skew, one = p["a"] - p["a"].T, jnp.eye(N)
    u = jnp.linalg.solve(one + skew, one - skew)
    h = leaky(h, p["w"] @ x + u @ taps.recur(h))
    return h, h


@case(
    params={"w": (N, IN), "a": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['a']": {"dense"}},
)
def loop_over_a_weight(p, x, h, taps):
    """A loop and a branch that only weights pass are a preparation."""
    u = jax.lax.fori_loop(0, 3, lambda i, u: 0.5 * u + 0.1 * u @ u.T, p["a"])
    u = jax.lax.cond(u.sum() > 0, lambda u: u, lambda u: -2.0 * u, u)
    h = leaky(h, p["w"] @ x + u @ taps.recur(h))
    return h, h


def _weight_norm(key):
    k1, k2 = jax.random.split(key)
    w = eqx.nn.WeightNorm(eqx.nn.Linear(IN, N, key=k1), "weight")
    u = eqx.nn.WeightNorm(eqx.nn.Linear(N, N, use_bias=False, key=k2), "weight", axis=1)
    return {"w": w, "u": u}, zeros(N)


@case(
    make=_weight_norm,
    oracle="twin",
    units=[(N, 1)],
    ops={"['w'].g": {"dense"}, "['u'].layer.weight": {"dense"}},
)
def weight_norm(p, x, h, taps):
    h = leaky(h, p["w"](x) + p["u"](taps.recur(h)))
    return h, h


def _spectral_norm(key):
    k1, k2 = jax.random.split(key)

    def build():
        layer = eqx.nn.Linear(IN, N, key=k1)
        return eqx.nn.SpectralNorm(layer, "weight", key=k2)

    norm, state = eqx.nn.make_with_state(build)()
    return {"norm": norm}, (state, zeros(N))


@case(
    make=_spectral_norm,
    oracle="twin+now",
    units=[(N, 1)],
)
def spectral_norm(p, x, state, taps):
    """Its power iteration is a state. The norm moves all units: current step only."""
    power, h = state
    if taps.leave is jax.lax.stop_gradient:
        drive, power = _spectral_norm_cut(p["norm"], x, power)
    else:
        drive, power = p["norm"](x, power)
    h = leaky(h, drive)
    return h, (power, h)


def _spectral_norm_cut(norm, x, power):
    _, power = norm(x, power)
    u, v = power.get(norm.uv_index)
    size = jax.lax.stop_gradient(jnp.einsum("i,ij,j->", u, norm.layer.weight, v))
    return (norm.layer.weight / size) @ x + norm.layer.bias, power


def _shared(key):
    k1, k2 = jax.random.split(key)
    pair = (eqx.nn.Linear(N, N, key=k1), eqx.nn.Linear(N, N, key=k2))
    shared = eqx.nn.Shared(
        pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight
    )
    return {"pair": shared}, zeros(N)


@case(
    make=_shared,
    x=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"[0].weight": {"dense"}, "[1].bias": {"elementwise"}},
)
def shared(p, x, h, taps):
    w, u = p["pair"]()
    h = leaky(h, w(x) + u(taps.recur(h)))
    return h, h


def _ensemble(key):
    keys = jax.random.split(key, 3)
    return {"cells": eqx.filter_vmap(lambda k: eqx.nn.GRUCell(IN, 2, key=k))(keys)}, (
        zeros(3, 2)
    )


@case(
    make=_ensemble,
    oracle="twin",
    units=[(6, 1)],
    ops={".weight_ih": {"dense"}, ".weight_hh": {"dense"}},
)
def ensemble(p, x, h, taps):
    """Three cells with params of their own, one model under a vmap."""

    def one(cell, h):
        new = cell(x, h)
        if taps.recur is not jax.lax.stop_gradient:
            return new
        return _gru_cut(cell, x, h)

    h = eqx.filter_vmap(one)(p["cells"], h)
    return h.sum(0), h


def _gru_cut(cell, x, h):
    old = jax.lax.stop_gradient(h)
    in_r, in_z, in_n = jnp.split(cell.weight_ih @ x + cell.bias, 3)
    rec_r, rec_z, rec_n = jnp.split(cell.weight_hh @ old, 3)
    reset, update = jax.nn.sigmoid(in_r + rec_r), jax.nn.sigmoid(in_z + rec_z)
    candidate = jnp.tanh(in_n + reset * (rec_n + cell.bias_n))
    return candidate + update * (h - candidate)


@case(
    params={"w": (N, IN), "tau": around(0.5, 3)},
    state=zeros(3, N),
    oracle="bptt",
    units=[(N, 3)],
    ops={"['w']": {"dense"}},
)
def population_of_one_cell(p, x, h, taps):
    """One product drives three copies, each with its time constant: three slots."""
    h = jax.vmap(lambda h, tau: leaky(h, tau * (p["w"] @ x) - tau * h))(h, p["tau"])
    return h, h


def _cell(key):
    return {"cell": eqx.nn.GRUCell(IN, N, key=key)}, zeros(N)


def _is_vector(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) and leaf.ndim == 1


@case(
    make=_cell,
    oracle="bptt",
    units=[(1, N)],
    trainable=lambda model: _is_vector,
    ops={".bias": {"elementwise"}, ".bias_n": {"elementwise"}},
)
def biases_alone(p, x, h, taps):
    """A predicate. A fixed recurrent matrix is a coupling: it joins few units."""
    h = p["cell"](x, h)
    return h, h


def _not_recurrent(model):
    spec = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda m: m.p["u"], spec, False)


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    trainable=_not_recurrent,
    options={"max_slots": N - 1},
    ops={"['w']": {"dense"}},
)
def fixed_recurrence(p, x, h, taps):
    """A filter spec without the recurrent matrix: a coupling, too wide to join."""
    h = leaky(h, p["w"] @ x + p["u"] @ taps.recur(h) - p["tau"] * h)
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(1, N)],
    trainable=_not_recurrent,
    ops={"['w']": {"dense"}},
)
def fixed_recurrence_of_few(p, x, h, taps):
    """The same, joined into one unit, where credit is exact."""
    h = leaky(h, p["w"] @ x + p["u"] @ taps.recur(h) - p["tau"] * h)
    return h, h


def _with_key(key):
    k1, k2 = jax.random.split(key)
    return {"w": normal(N, IN)(k1)}, (zeros(N), k2)


@case(
    make=_with_key,
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"elementwise"}},
)
def dropped_connections(p, x, state, taps):
    """A random mask on the weight at every step, its key in the state."""
    h, key = state
    key, now = jax.random.split(key)
    keep = jax.random.bernoulli(now, 0.7, (N, IN))
    h = leaky(h, jnp.where(keep, p["w"], 0.0) @ x)
    return h, (h, key)
