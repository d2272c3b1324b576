"""Populations, layers, slots, delays, and state that is not hidden."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from catalogue_case import IN, N, around, leaky, normal, table_of_cases, zeros
from models import spike


STRUCTURE, case = table_of_cases()


# Layers and populations. A group is read by another group at its new state
# (single-step) or at its old one (multi-step).


@case(
    params={"w": (N, IN), "u": (N, N), "v": (5, N), "a": (5, 5), "out": (4, 5)},
    state=[zeros(N), zeros(5), zeros(4)],
    oracle="dense",
    units=[(N, 1), (5, 1), (4, 1)],
    groups=((0,), (1,), (2,)),
)
def three_layers(p, x, state, taps):
    """The last one is a leaky readout, with a trace of its own."""
    h = taps.new(0, leaky(state[0], p["w"] @ x + p["u"] @ taps.recur(state[0])))
    drive = p["v"] @ taps.leave(h) + p["a"] @ taps.recur(state[1])
    g = taps.new(1, leaky(state[1], drive))
    y = taps.new(2, 0.8 * state[2] + p["out"] @ taps.leave(g))
    return y, [h, g, y]


@case(
    params={"w": (N, IN), "u": (N, N), "v": (5, N), "skip": (5, IN), "out": (3, N)},
    state=[zeros(N), zeros(5)],
    oracle="dense",
    units=[(N, 1), (5, 1)],
    groups=((0,), (1,)),
)
def skip_connections(p, x, state, taps):
    """The input feeds both layers, and the readout sees both."""
    h = taps.new(0, leaky(state[0], p["w"] @ x + p["u"] @ taps.recur(state[0])))
    g = leaky(state[1], p["v"] @ taps.leave(h) + p["skip"] @ x)
    g = taps.new(1, g)
    return (p["out"] @ h, g), [h, g]


@case(
    params={"w": (N, IN), "u": (N, N), "v": (N, N)},
    state=[zeros(N), zeros(N)],
    oracle="twin+now",
    units=[(N, 2)],
)
def residual_layers(p, x, state, taps):
    """Added element by element, the two layers are one unit each."""
    h = leaky(state[0], p["w"] @ x + p["u"] @ taps.recur(state[0]))
    g = h + leaky(state[1], p["v"] @ taps.recur(state[1]))
    return g, [h, g]


@case(
    params={"w": (5, IN), "ee": (5, 5), "ei": (5, 3), "ie": (3, 5), "ii": (3, 3)},
    state={"e": zeros(5), "i": zeros(3)},
    oracle="multi",
    vjp="multi-step",
    units=[(5, 1), (3, 1)],
)
def excitation_and_inhibition(p, x, state, taps):
    """Both populations read the old state of both."""
    e, i = (jax.nn.sigmoid(taps.recur(state[name])) for name in ("e", "i"))
    drive = p["w"] @ x + jnp.abs(p["ee"]) @ e - jnp.abs(p["ei"]) @ i
    inhibition = jnp.abs(p["ie"]) @ e - jnp.abs(p["ii"]) @ i
    new = {"e": leaky(state["e"], drive), "i": leaky(state["i"], inhibition)}
    return new["e"], new


@case(
    params={"w": (N, IN), "down": (N, 1), "up": (1, N), "tau": around(0.3, 1)},
    state={"e": zeros(N), "i": zeros(1)},
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1), (1, 1)],
)
def one_interneuron(p, x, state, taps):
    """A product that feeds a single unit from many others."""
    e, i = state["e"], state["i"]
    drive = p["w"] @ x - p["down"] @ taps.recur(i)
    i = leaky(i, p["up"] @ taps.recur(e) - p["tau"] * i)
    return e + i, {"e": leaky(e, drive), "i": i}


_drive = "the drive is cut whole because another unit's state was added to it"


@case(
    params={"w": (N, IN), "down": (N,), "up": (N,), "tau": around(0.3)},
    state={"e": zeros(N), "i": zeros()},
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1), (1, 1)],
    options={"max_slots": 2},
)
def one_interneuron_elementwise(p, x, state, taps):
    """The same, its inhibition spelt as a product of a vector and a number."""
    e, i = state["e"], state["i"]
    drive = p["w"] @ x - p["down"] * taps.recur(i)
    i = leaky(i, p["up"] @ taps.recur(e) - p["tau"] * i)
    return e + i, {"e": leaky(e, drive), "i": i}


@case(
    params={"w": (N, IN), "ab": (N, N), "ba": (N, N), "gain": around(0.4, N)},
    state=(zeros(N), zeros(N)),
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1), (N, 1)],
)
def bidirectional(p, x, state, taps):
    """Two groups of the same size read each other through products."""
    a, b = state
    new_a = leaky(a, p["w"] @ x + p["ab"] @ taps.recur(b))
    new_b = leaky(b, p["ba"] @ taps.recur(a) - p["gain"] * b)
    return new_b, (new_a, new_b)


@case(
    params={"w": (N, IN), "u": (N, N), "k": around(0.5, N)},
    state=(zeros(N), zeros(N)),
    oracle="twin",
    units=[(N, 2)],
)
def bidirectional_elementwise(p, x, state, taps):
    """A unit of one group and its partner in the other are one unit."""
    a, b = state
    new_a = leaky(a, p["w"] @ x + p["u"] @ taps.recur(a) + 0.3 * b)
    new_b = leaky(b, p["k"] * a)
    return new_a + new_b, (new_a, new_b)


# Several states of a unit.


@case(
    params={"w": (N, IN), "u": (N, N), "rate": around(0.5, 3, N), "g": around(0.3, N)},
    state={"h": zeros(N), "m": zeros(N), "n": zeros(N), "v": zeros(N)},
    oracle="twin",
    units=[(N, 4)],
)
def gates_of_a_channel(p, x, state, taps):
    """In the manner of Hodgkin and Huxley: three gates that follow the voltage."""
    rates = 0.5 * jax.nn.sigmoid(p["rate"])
    targets = [jax.nn.sigmoid(s * state["v"]) for s in (-1.0, 2.0, 1.0)]
    new = {
        name: state[name] + rate * (target - state[name])
        for name, rate, target in zip("hmn", rates, targets, strict=True)
    }
    current = p["g"] * new["m"] ** 2 * new["h"] * (1.0 - state["v"]) - new["n"]
    drive = p["w"] @ x + p["u"] @ jnp.tanh(taps.recur(state["v"]))
    new["v"] = 0.8 * state["v"] + 0.3 * current + 0.3 * drive
    return new["v"], new


_coupling = np.array([[0.8, 0.1, 0.0], [0.1, 0.7, 0.2], [0.0, 0.2, 0.6]])


def _compartments(p, x, h, taps):
    drive = p["w"] @ x + p["u"] @ taps.recur(h[:, 2])
    return (h @ _coupling).at[:, 0].add(drive)


@case(
    params={"w": (N, IN), "u": (N, N), "leak": around(0.2, N)},
    state=zeros(N, 3),
    oracle="twin",
    units=[(N, 3)],
)
def compartments(p, x, h, taps):
    """A fixed coupling of three compartments; the first is driven, the last fires."""
    h = _compartments(p, x, h, taps) * jax.nn.sigmoid(p["leak"])[:, None]
    h = jnp.tanh(h)
    return h[:, 2], h


@case(
    params={"w": (N, IN), "u": (N, N), "leak": around(0.2, N)},
    state=zeros(N, 3),
    oracle="twin",
    units=[(N, 3)],
)
def multiplied_in_place(p, x, h, taps):
    """The same with a leak of the compartment in the middle alone."""
    h = _compartments(p, x, h, taps)
    h = h.at[:, 1].multiply(jax.nn.sigmoid(p["leak"]))
    h = jnp.tanh(h)
    return h[:, 2], h


@case(
    params={"w": (N, IN), "a": (3, 3)},
    state=zeros(N, 3),
    oracle="twin",
    units=[(3 * N, 1)],
)
def compartments_with_trained_coupling(p, x, h, taps):
    """A weight that all neurons share couples their compartments: that is a product
    with a weight, and cut."""
    rec = jnp.einsum("nk,jk->nj", taps.recur(h), p["a"])
    drive = jnp.stack([p["w"] @ x, jnp.zeros(N), jnp.zeros(N)], axis=1)
    h = leaky(h, drive + rec)
    return h.sum(1), h


_hippo = -np.tril(np.sqrt(np.outer(*[2 * np.arange(4) + 1.0] * 2)), -1) * 0.1


@case(
    params={"b": (N, 4), "c": (N, 4), "w": (N, IN), "dt": around(-1.0, N)},
    state=zeros(N, 4),
    oracle="bptt",
    units=[(N, 4)],
    ops={"['b']": {"elementwise"}, "['dt']": {"elementwise"}},
)
def state_space_channels(p, x, h, taps):
    """Each channel has four states, a fixed matrix and a trained step size."""
    dt = jnp.exp(p["dt"])[:, None]
    change = jnp.einsum("jk,nk->nj", _hippo, h) - 0.5 * h
    h = h + dt * (change + p["b"] * (p["w"] @ x)[:, None])
    return (p["c"] * h).sum(1), h


@case(
    params={"w": (N, IN), "u": (N, N)},
    state={"buffer": zeros(2, N), "v": zeros(N)},
    oracle="twin",
    units=[(N, 3)],
)
def delay_line(p, x, state, taps):
    """A shift buffer: what is driven now arrives two steps later."""
    buffer = state["buffer"]
    v = leaky(state["v"], buffer[-1])
    drive = p["w"] @ x + p["u"] @ taps.recur(state["v"])
    buffer = jnp.concatenate([drive[None], buffer[:-1]])
    return v, {"buffer": buffer, "v": v}


_ring = "a write at an index of the state may reach every place: no trace"


@case(
    params={"w": (N, IN), "tau": around(0.4, N)},
    state={"buffer": zeros(3, N), "count": jnp.zeros((), int), "v": zeros(N)},
    oracle="bptt",
    units=[(N, 4)],
    ops={"['w']": {"dense"}},
)
def ring_buffer(p, x, state, taps):
    """A delay by a counter and a buffer that is not moved."""
    now = state["count"] % 3
    v = leaky(state["v"], state["buffer"][now] - p["tau"] * state["v"])
    buffer = state["buffer"].at[now].set(p["w"] @ x)
    return v, {"buffer": buffer, "count": state["count"] + 1, "v": v}


@case(
    params={"w": (2 * N, IN), "nu": around(-1.0, N), "theta": (N,)},
    state=zeros(2 * N),
    oracle="bptt",
    units=[(N, 2)],
    ops={"['w']": {"dense"}},
)
def halves(p, x, h, taps):
    """Real and imaginary parts one after the other in a single leaf."""
    re, im = jnp.split(h, 2)
    size = jnp.exp(-jnp.exp(p["nu"]))
    cos, sin = size * jnp.cos(p["theta"]), size * jnp.sin(p["theta"])
    h = jnp.concatenate([cos * re - sin * im, sin * re + cos * im]) + p["w"] @ x
    return jnp.tanh(h), h


@case(
    params={"w": (N, IN), "tau": around(0.5, N)},
    state=zeros(3, N),
    oracle="bptt",
    units=[(N, 3)],
)
def interleaved(p, x, h, taps):
    """Three filters of one drive, stacked; each decays in its own time."""
    decay = jnp.array([[0.2], [0.5], [0.8]])
    h = decay * h + jnp.broadcast_to(jnp.tanh(p["w"] @ x - p["tau"] * h[0]), (3, N))
    return h.sum(0), h


# State that is not hidden.


def _random(key):
    k1, k2, k3 = jax.random.split(key, 3)
    state = {
        "count": jnp.zeros((), int),
        "fast": zeros(IN),
        "h": zeros(N),
        "key": k3,
        "slow": zeros(IN),
    }
    return {"w": normal(N, 2 * IN)(k1), "u": normal(N, N)(k2)}, state


@case(
    make=_random,
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def filters_counter_and_key(p, x, state, taps):
    """Two filters of the input, noise and a clock: carried along, not hidden."""
    key, now = jax.random.split(state["key"])
    fast, slow = 0.3 * state["fast"] + x, 0.9 * state["slow"] + 0.1 * x
    noise = 0.1 * jax.random.normal(now, (N,))
    clock = jnp.sin(state["count"].astype(x.dtype))
    drive = p["w"] @ jnp.concatenate([fast, slow]) + p["u"] @ taps.recur(state["h"])
    h = leaky(state["h"], drive + noise + clock)
    count = state["count"] + 1
    return h, {"count": count, "fast": fast, "h": h, "key": key, "slow": slow}


def _dropped(key):
    k1, k2, k3 = jax.random.split(key, 3)
    p = {"w": normal(N, IN)(k1), "u": normal(N, N)(k2), "drop": eqx.nn.Dropout(0.3)}
    return p, (zeros(N), k3)


@case(make=_dropped, oracle="twin", units=[(N, 1)])
def dropout(p, x, state, taps):
    h, key = state
    key, now = jax.random.split(key)
    rec = p["u"] @ p["drop"](taps.recur(h), key=now)
    h = leaky(h, p["w"] @ x + rec)
    return h, (h, key)


class _Stateful(eqx.Module):
    """A layer that keeps its membrane and a count in an `eqx.nn.State`."""

    w: jax.Array
    u: jax.Array
    index: eqx.nn.StateIndex
    count: eqx.nn.StateIndex

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.w, self.u = normal(N, IN)(k1), normal(N, N)(k2)
        self.index = eqx.nn.StateIndex(zeros(N))
        self.count = eqx.nn.StateIndex(jnp.zeros((), int))

    def __call__(self, x, state, taps):
        h = state.get(self.index)
        h = leaky(h, self.w @ x + self.u @ taps.recur(h))
        state = state.set(self.index, h)
        return h, state.set(self.count, state.get(self.count) + 1)


@case(
    make=lambda key: eqx.nn.make_with_state(_Stateful)(key),
    oracle="twin",
    units=[(N, 1)],
    ops={".w": {"dense"}},
)
def equinox_state(p, x, state, taps):
    return p(x, state, taps)


class Quantity:
    """As a library of units has them: a pytree class that names no keys."""

    def __init__(self, value, unit):
        self.value, self.unit = value, unit


jax.tree_util.register_pytree_node(
    Quantity,
    lambda quantity: ((quantity.value,), quantity.unit),
    lambda unit, children: Quantity(*children, unit),
)


def quantities(*shapes, unit):
    return lambda key: Quantity(normal(*shapes)(key), unit)


@case(
    params={
        "w": quantities(N, IN, unit="nS"),
        "u": quantities(N, N, unit="nS"),
        "tau": quantities(N, unit="ms"),
    },
    state={"v": Quantity(zeros(N), "mV")},
    x={"drive": Quantity(zeros(IN), "mV")},
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}, "['u']": {"dense"}, "['tau']": {"elementwise"}},
)
def quantities_with_units(p, x, state, taps):
    """What has no key of its own has the path of the array in it."""
    v = state["v"].value
    drive = p["w"].value @ x["drive"].value + p["u"].value @ taps.recur(v)
    v = Quantity(leaky(v, drive - p["tau"].value * v), state["v"].unit)
    return v, {"v": v}


# Spikes.


@jax.custom_vjp
def _spike(v):
    return (v > 0).astype(v.dtype)


_spike.defvjp(lambda v: (_spike(v), v), lambda v, g: (g * jnp.exp(-(v**2)),))


@case(
    params={"w": normal(N, IN, scale=1.5), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def surrogate_by_custom_vjp(p, x, v, taps):
    """The new membrane fires; a reset that is detached."""
    z = _spike(v - 1)
    keep = jax.nn.sigmoid(p["tau"]) * v * (1 - jax.lax.stop_gradient(z))
    v = keep + p["w"] @ x + p["u"] @ taps.recur(z)
    return _spike(v - 1), v


@case(
    params={"w": normal(N, IN, scale=1.5), "u": (N, N), "out": (3, N)},
    state=(zeros(N), jnp.zeros(N, int)),
    oracle="twin",
    units=[(N, 1)],
)
def refractory(p, x, state, taps):
    """An integer count down keeps a unit silent after a spike."""
    v, rest = state
    free = rest == 0
    drive = p["w"] @ x + p["u"] @ taps.recur(jnp.tanh(v))
    v = jnp.where(free, 0.8 * v + drive, 0.5 * v)
    z = spike(v - 1)
    rest = jnp.where(z > 0, 2, jnp.maximum(rest - 1, 0))
    return p["out"] @ z, (v, rest)
