"""Couplings without a weight, norms, complex states, and quantities with units."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from catalogue_case import (
    IN,
    N,
    around,
    complex_normal,
    everything,
    leaky,
    normal,
    table_of_cases,
    zeros,
)


COUPLING, case = table_of_cases()


# Coupling without a weight: exact where it joins few units, cut and reported beyond.
# The sums below are of what `leave` cuts: all that is not of the own unit.


def _mean(p, x, h, taps):
    h = leaky(h, p["w"] @ x + jnp.mean(taps.leave(h)))
    return h, h


@case(params={"w": (N, IN)}, state=zeros(N), oracle="bptt", units=[(1, N)])
def mean_of_few(p, x, h, taps):
    return _mean(p, x, h, taps)


@case(
    params={"w": (N, IN)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": 2},
)
def mean_of_many(p, x, h, taps):
    return _mean(p, x, h, taps)


@case(params={"w": (N, IN)}, state=zeros(N), oracle="bptt", units=[(1, N)])
def softmax_of_few(p, x, h, taps):
    h = leaky(h, p["w"] @ x + 3.0 * jax.nn.softmax(h))
    return h, h


@case(
    params={"w": (N, IN)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": 2},
)
def softmax_of_many(p, x, h, taps):
    """The sum of the exponentials is cut, the own exponential is not."""
    attention = jnp.exp(h) / jnp.exp(taps.leave(h)).sum()
    h = leaky(h, p["w"] @ x + 3.0 * attention)
    return h, h


def _ring(p, x, h, taps):
    h = leaky(h, p["w"] @ x + 0.5 * jnp.roll(taps.leave(h), 1))
    return h, h


@case(params={"w": (N, IN)}, state=zeros(N), oracle="bptt", units=[(1, N)])
def ring_of_few(p, x, h, taps):
    return _ring(p, x, h, taps)


_drive = (
    "the drive is cut whole because the state of a neighbour was added to it, so that "
    "its weight gets no trace"
)


@case(
    params={"w": (N, IN)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": 2},
    ops={"['w']": {"dense"}},
)
def ring_of_many(p, x, h, taps):
    """The state of the neighbour is added to the drive, before the own state is."""
    return _ring(p, x, h, taps)


@case(
    params={"w": (N, IN), "decay": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": 3},
)
def lattice(p, x, h, taps):
    """Diffusion to the neighbours by a convolution with a fixed kernel."""
    kernel = jnp.array([[[0.2, 0.0, 0.2]]])
    around_it = jax.lax.conv_general_dilated(
        taps.leave(h)[None, None], kernel, (1,), "SAME"
    )
    h = leaky(h, p["w"] @ x + around_it[0, 0] - p["decay"] * h)
    return h, h


@case(
    params={"w": (N, IN)},
    state=(zeros(N), zeros(N, N)),
    x=zeros(IN),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": 3},
)
def hebbian_memory(p, x, state, taps):
    """Fast weights in the state. What is kept of them is data to the local program of
    the activity, and they learn nothing of their own."""
    h, fast = state
    recalled = jax.lax.stop_gradient(fast) @ taps.recur(h)
    new = leaky(h, p["w"] @ x + recalled)
    outer = jax.lax.stop_gradient(new[:, None] * h[None])
    return new, (new, 0.8 * fast + 0.1 * outer)


# Norms.


def _rms(y, gain, taps):
    return gain * y * taps.leave(jax.lax.rsqrt(jnp.mean(y**2) + 1e-3))


@case(
    params={"w": (N, IN), "u": (N, N), "gain": around(1.0, N)},
    state=zeros(N),
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1)],
)
def rms_norm_between(p, x, h, taps):
    """Between product and state: one product moves all units."""
    y = p["w"] @ x + p["u"] @ taps.recur(h)
    h = leaky(h, _rms(y, p["gain"], taps))
    return h, h


@case(
    make=lambda key: (
        {
            "norm": eqx.nn.LayerNorm(IN),
            "w": eqx.nn.Linear(IN, N, key=key),
            "u": normal(N, N)(key),
            "after": eqx.nn.RMSNorm(N),
        },
        zeros(N),
    ),
    oracle="twin+now",
    units=[(N, 1)],
)
def norms_of_input_and_output(p, x, h, taps):
    """The first is without state and in front of a product: its current step. The
    second acts after the state."""
    drive = p["w"](taps.leave(p["norm"](x))) + p["u"] @ taps.recur(h)
    h = leaky(h, drive)
    return p["after"](h), h


@case(
    params={"w": (N, IN), "gain": around(1.0, 3, 2), "bias": (3, 2)},
    state=zeros(3, 2),
    oracle="bptt",
    units=[(3, 2)],
)
def norm_of_pairs_of_the_state(p, x, h, taps):
    """A norm over two old states, in a unit of its own."""
    centred = h - h.mean(1, keepdims=True)
    size = jnp.sqrt((centred**2).mean(1, keepdims=True) + 0.1)
    h = p["gain"] * centred / size + p["bias"] + (p["w"] @ x).reshape(3, 2)
    return h, h


# Complex states.

_complex = everything("complex states and weights are refused")


def _parts(z):
    return jnp.concatenate([z.real, z.imag])


def _eigenvalues(p):
    return jnp.exp(jax.lax.complex(-jnp.exp(p["nu"]), p["theta"]))


@case(
    params={"b": (N, IN), "c": (N, IN), "nu": around(-1.0, N), "theta": (N,)},
    state=jnp.zeros(N, jnp.complex128),
    oracle="bptt",
    units=[(N, 2)],
)
def complex_state_real_weights(p, x, h, taps):
    drive = jax.lax.complex(p["b"] @ x, p["c"] @ x)
    h = _eigenvalues(p) * h + drive
    return jnp.tanh(_parts(h)), h


@case(
    params={
        "b": complex_normal(N, IN),
        "c": complex_normal(3, N),
        "nu": around(-1.0, N),
        "theta": (N,),
    },
    state=jnp.zeros(N, jnp.complex128),
    oracle="bptt",
    units=[(N, 2)],
)
def complex_state_complex_weights(p, x, h, taps):
    h = _eigenvalues(p) * h + p["b"] @ x.astype(h.dtype)
    return (p["c"] @ h).real, h


@case(
    params={"w": (N, IN), "u": complex_normal(N, N), "bias": (N,)},
    state=jnp.zeros(N, jnp.complex128),
    oracle="twin",
    units=[(N, 2)],
)
def complex_recurrence(p, x, h, taps):
    """modReLU: not holomorphic."""
    z = (p["w"] @ x).astype(h.dtype) + p["u"] @ taps.recur(h) + 0.5 * h
    size = jnp.abs(z)
    h = (jax.nn.relu(size + p["bias"]) / (size + 0.1)).astype(z.dtype) * z
    return _parts(h), h


# Quantities: values that are pytrees.


class Quantity(eqx.Module):
    value: Any
    unit: str = eqx.field(static=True)

    def __add__(self, other: "Quantity") -> "Quantity":
        assert self.unit == other.unit, f"{self.unit} + {other.unit}"
        return jax.tree.map(jnp.add, self, other)

    def __sub__(self, other: "Quantity") -> "Quantity":
        return self + -1.0 * other

    def __mul__(self, other: "Quantity") -> "Quantity":
        units = sorted([*self.unit.split(), *other.unit.split()])
        return Quantity(self.value * other.value, " ".join(units))

    def __rmul__(self, factor) -> "Quantity":
        return jax.tree.map(lambda a: factor * a, self)

    def __rmatmul__(self, matrix) -> "Quantity":
        return jax.tree.map(lambda a: matrix @ a, self)

    def __truediv__(self, other: "Quantity") -> Any:
        assert self.unit == other.unit, f"{self.unit} / {other.unit}"
        return self.value / other.value


def _quantities(key):
    k1, k2, k3 = jax.random.split(key, 3)
    p = {
        "w": normal(N, IN)(k1),
        "u": Quantity(normal(N, N)(k2), "mV"),
        "tau": Quantity(around(8.0, N)(k3), "ms"),
    }
    state = {"g": Quantity(zeros(N), "mV"), "v": Quantity(zeros(N), "mV")}
    return p, state


@case(
    make=_quantities,
    x={"i": Quantity(zeros(IN), "mV")},
    oracle="twin",
    units=[(N, 2)],
    ops={"['u'].value": {"dense"}, "['tau'].value": {"elementwise"}},
)
def quantities(p, x, state, taps):
    dt = Quantity(jnp.asarray(2.0), "ms")
    decay = jnp.exp(-1.0 * (dt / p["tau"]))
    rate = jnp.tanh(taps.recur(state["v"].value) / 1.0)
    g = 0.5 * state["g"] + p["w"] @ x["i"] + Quantity(p["u"].value @ rate, "mV")
    v = decay * state["v"] + (1.0 - decay) * g
    return v - 0.5 * g, {"g": g, "v": v}
