"""Places in the state that data choose: ring buffers, queues, memories."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, quick_jit

import eqx_etrace as etrace


N, IN, PLACES = 5, 3, 4
KEYS = jax.random.split(jax.random.key(0), 4)
XS = jax.random.normal(KEYS[0], (9, IN))


class Ring(eqx.Module):
    """A buffer of the last products, written and read at the place of a counter."""

    w: jax.Array
    leak: jax.Array
    fun: Any = eqx.field(static=True)

    def __call__(self, x, state):
        buffer, i = state
        out, buffer = self.fun(self, x, buffer, i)
        return out, (buffer, (i + 1) % PLACES)


def _set(m, x, buffer, i):
    old = buffer[i]
    y = jnp.tanh(m.w @ x + m.leak * old)
    return old + y, buffer.at[i].set(y)


def _slices(m, x, buffer, i):
    old = jax.lax.dynamic_index_in_dim(buffer, i, 0, keepdims=False)
    y = jnp.tanh(m.w @ x + m.leak * old)
    return old + y, jax.lax.dynamic_update_index_in_dim(buffer, y, i, 0)


def _add(m, x, buffer, i):
    old = buffer[(i + 1) % PLACES]
    y = jnp.tanh(m.w @ x + m.leak * old)
    return old + y, (0.5 * buffer).at[i].add(y)


def _columns(m, x, buffer, i):
    """[N, PLACES]: the place is the last axis."""
    buffer = buffer.T
    old = buffer[:, i]
    y = jnp.tanh(m.w @ x + m.leak * old)
    return old + y, buffer.at[:, i].set(y).T


def _out_of_bounds(m, x, buffer, i):
    """Reads nothing there, and writes nothing."""
    old = buffer.at[i + PLACES].get(mode="fill", fill_value=0.25)
    y = jnp.tanh(m.w @ x + m.leak * (old + buffer[i]))
    buffer = buffer.at[i + 2 * PLACES].set(7.0 * y, mode="drop")
    return y, buffer.at[i + PLACES - 1].set(y, mode="clip")


def _a_weight_is_written(m, x, buffer, i):
    buffer = jnp.tanh(0.5 * buffer).at[i].set(m.leak)
    return (buffer + (m.w @ x)[None]).sum(0), buffer


ROWS, APART = (N, PLACES), (N * PLACES, 1)
# name: (step, (units, slots)); rows that do not act on each other are units apart
CASES = {
    "set": (_set, ROWS),
    "slices": (_slices, ROWS),
    "add": (_add, ROWS),
    "columns": (_columns, ROWS),
    "out of bounds": (_out_of_bounds, ROWS),
    "a weight is written": (_a_weight_is_written, APART),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_unit_are_its_slots_and_the_gradient_that_of_bptt(name):
    fun, units = CASES[name]
    weights = jax.random.normal(KEYS[1], (N, IN)), jax.random.normal(KEYS[2], (N,))
    model = Ring(*weights, fun)
    start = (jax.random.normal(KEYS[3], (PLACES, N)), jnp.asarray(1))
    graph = etrace.compile(model, start, XS[0])
    assert [(g.units, g.slots) for g in graph.groups] == [units]
    assert "compared with every place" in str(graph.explain(state="state[0]"))

    def ours(params, carry, x):
        out, *carry = etrace.step(graph, params, carry[0], carry[1], x)
        return out, carry

    def plain(params, carry, x):
        model: Any = graph.model(params)
        out, state = model(x, carry[0])
        return out, (state, carry[1])

    def gradient(step):
        def loss(params):
            carry, outs = (start, etrace.init_trace(graph)), []
            for x in XS:
                out, carry = step(params, carry, x)
                outs.append(out)
            return jnp.sum(jnp.sin(jnp.stack(outs))), jnp.stack(outs)

        return quick_jit(jax.grad(loss, has_aux=True))(graph.params(model))

    (got, values), (expected, wanted) = gradient(ours), gradient(plain)
    np.testing.assert_allclose(values, wanted, rtol=1e-12)
    assert_same_gradient(got, expected)


def test_a_missing_row_is_not_a_number_as_in_jax():
    def fun(m, x, buffer, i):
        row = buffer.at[i + PLACES].get(mode="fill")
        return row, buffer + (m.w @ x)[None]

    model = Ring(jnp.ones((N, IN)), jnp.ones(N), fun)
    state = jnp.ones((PLACES, N)), jnp.asarray(0)
    graph = etrace.compile(model, state, XS[0])
    trace = etrace.init_trace(graph)
    out, *_ = etrace.step(graph, graph.params(model), state, trace, XS[0])
    np.testing.assert_array_equal(out, model(XS[0], state)[0])
    assert np.isnan(out).all()
