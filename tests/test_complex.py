"""Complex states are two real slots; complex weights have complex traces."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, quick_jit

import eqx_etrace as etrace


N, IN, STEPS, BATCH = 5, 3, 5, 2
KEYS = jax.random.split(jax.random.key(5), 10)
XS = jax.random.normal(KEYS[8], (STEPS, IN))


def _complex(key, *shape):
    return jax.lax.complex(*jax.random.normal(key, (2, *shape)))


class Step(eqx.Module):
    """Wraps a function of (weights, x, state) as a model."""

    nu: jax.Array
    theta: jax.Array
    real_in: jax.Array
    complex_in: jax.Array
    readout: jax.Array
    fun: Any = eqx.field(static=True)

    def __call__(self, x, state):
        return self.fun(self, x, state)

    @property
    def eigenvalues(self):
        return jnp.exp(jax.lax.complex(-jnp.exp(self.nu), self.theta))

    def read(self, h):
        return (self.readout @ h).real


def make(fun):
    return Step(
        jax.random.normal(KEYS[0], (N,)),
        jax.random.normal(KEYS[1], (N,)),
        jax.random.normal(KEYS[2], (N, IN)),
        _complex(KEYS[3], N, IN),
        _complex(KEYS[4], 2, N),
        fun,
    )


def _as_complex(a):
    return jax.lax.complex(a, jnp.zeros_like(a))


def _lru(m, x, h):
    h = m.eigenvalues * h + m.complex_in @ _as_complex(x)
    return m.read(h), h


def _real_weights(m, x, h):
    h = m.eigenvalues * h + _as_complex(m.real_in @ x)
    return m.read(h), h


def _not_holomorphic(m, x, h):
    """Conjugates and absolute values: derivatives by the two parts differ."""
    drive = m.complex_in @ _as_complex(x)
    h = jnp.conj(m.eigenvalues) * jnp.conj(h) + drive / _as_complex(1 + jnp.abs(h))
    return jnp.abs(m.read(h)) + jnp.abs(h).sum(), h


def _by_ad(m, x, h):
    """A window of a weight at a place that data give: no closed form."""
    place = (jnp.argmax(x),)
    drive = jax.lax.dynamic_slice(m.complex_in[:, 0], place, (3,))
    turned = jax.lax.dynamic_slice(m.real_in[:, 0], place, (3,))
    h = h * m.eigenvalues[:3] + drive + jax.lax.complex(turned, jnp.sin(turned))
    return jnp.abs(h), h


def _real_state(m, x, h):
    """Complex numbers on the way only."""
    drive = m.complex_in @ _as_complex(x)
    h = 0.5 * h + drive.real * jnp.abs(m.nu) + drive.imag
    return h, h


def _two_leaves(m, x, state):
    """A complex and a real state variable of one unit, driven by old and new state."""
    h, v = state
    new = m.eigenvalues * h + m.complex_in @ _as_complex(x)
    v = 0.5 * v + new.imag * jnp.tanh(h.real)
    return v + new.real, (new, v)


REAL, COMPLEX = jnp.zeros(N), jnp.zeros(N, complex)
# name: (step, state, units x slots, form of the step)
CASES = {
    "lru": (_lru, COMPLEX, (N, 2), "single-step"),
    "real weights": (_real_weights, COMPLEX, (N, 2), "single-step"),
    "not holomorphic": (_not_holomorphic, COMPLEX, (N, 2), "single-step"),
    "by ad": (_by_ad, jnp.zeros(3, complex), (3, 2), "single-step"),
    "real state": (_real_state, REAL, (N, 1), "single-step"),
    "two leaves": (_two_leaves, (COMPLEX, REAL), (N, 3), "single-step"),
}


def _start(state, key):
    def draw(leaf):
        if jnp.iscomplexobj(leaf):
            return _complex(key, *leaf.shape)
        return jax.random.normal(key, leaf.shape)

    return jax.tree.map(draw, state)


def _gradients(graph, model, state, xs):
    """(ours, of plain autodiff), of a loss of the outputs and of the last state."""

    def size(state):
        return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(state))

    def ours(params):
        carry, trace, loss = state, etrace.init_trace(graph), 0.0
        for x in xs:
            out, carry, trace = etrace.step(graph, params, carry, trace, x)
            loss = loss + jnp.sum(jnp.sin(out))
        return loss + size(carry)

    def plain(params):
        step = graph.model(params)
        step = step if graph.batch is None else jax.vmap(step)
        carry, loss = state, 0.0
        for x in xs:
            out, carry = step(x, carry)
            loss = loss + jnp.sum(jnp.sin(out))
        return loss + size(carry)

    params = graph.params(model)
    return quick_jit(jax.grad(ours))(params), quick_jit(jax.grad(plain))(params)


@pytest.mark.parametrize("name", CASES)
def test_local_recurrence_equals_bptt(name):
    fun, state, units, form = CASES[name]
    model = make(fun)
    graph = etrace.compile(model, state, XS[0])
    (group,) = graph.groups
    assert (group.units, group.slots) == units
    assert graph.vjp == form
    got, expected = _gradients(graph, model, _start(state, KEYS[9]), XS)
    assert_same_gradient(got, expected)


@pytest.mark.parametrize("name", ["lru", "not holomorphic"])
def test_multi_step_and_batched(name):
    fun, state, _, _ = CASES[name]
    model = make(fun)
    state = jax.vmap(lambda key: _start(state, key))(KEYS[:BATCH])
    xs = jax.random.normal(KEYS[9], (STEPS, BATCH, IN))
    graph = etrace.compile(model, state, xs[0], batched=True, vjp="multi-step")
    assert_same_gradient(*_gradients(graph, model, state, xs))


def test_names_of_the_parts():
    graph = etrace.compile(make(_two_leaves), CASES["two leaves"][1], XS[0])
    assert graph.groups[0].leaves == ("state[0].real", "state[0].imag", "state[1]")
    assert "state[0].imag" in str(graph.explain(state="state[0]"))
    assert "complex_in" in str(graph.explain(state="state[0].real"))


def test_single_precision_and_the_dtypes_of_traces():
    model = jax.tree.map(
        lambda a: a.astype(jnp.complex64 if jnp.iscomplexobj(a) else jnp.float32),
        make(_lru),
    )
    state = jnp.zeros(N, jnp.complex64)
    graph = etrace.compile(model, state, XS[0].astype(jnp.float32))
    trace = etrace.init_trace(graph)
    dtypes = {
        r.weight: {str(a.dtype) for a in t}
        for r, t in zip(graph.relations, trace, strict=True)
    }
    assert dtypes == {("complex_in",): {"complex64"}, ("nu", "theta"): {"complex64"}}
    _, new, trace = etrace.step(
        graph, graph.params(model), state, trace, XS[0].astype(jnp.float32)
    )
    assert new.dtype == jnp.complex64
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trace))
