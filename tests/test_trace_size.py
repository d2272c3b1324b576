"""Trace updates and contractions at full size against NumPy.

A faulty jaxlib computes wrong sums only above some ten thousand elements, so that small
tests do not show it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_etrace as etrace


UNITS, INPUTS, BATCH = 420, 310, 8  # more than a million entries a trace


class Chain(eqx.Module):
    """`slots` leaky integrators in a row in each unit, driven by one product."""

    weight: jax.Array
    leaks: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, x, state):
        new, drive = [], self.weight @ x
        for leak, h in zip(self.leaks, state, strict=True):
            drive = leak * h + jnp.sin(drive)
            new.append(drive)
        return new[-1], tuple(new)


def _numpy(weight, leaks, xs, state):
    """Traces and the gradient of sum(out) over the steps, for every sample."""
    slots = len(leaks)
    state = [np.asarray(h) for h in state]
    traces = [np.zeros((BATCH, UNITS, INPUTS), np.float32) for _ in leaks]
    gradient = np.zeros((UNITS, INPUTS))
    for x in xs:
        drive = np.einsum("oi,bi->bo", weight, x)
        inner = x[:, None, :] * np.ones((1, UNITS, 1), np.float32)
        for s in range(slots):
            slope = np.cos(drive)[:, :, None]
            traces[s] = np.float32(leaks[s]) * traces[s] + slope * inner
            inner = traces[s]
            drive = leaks[s] * state[s] + np.sin(drive)
            state[s] = drive
        gradient += traces[-1].astype(np.float64).sum(0)
    return traces, gradient


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_traces_and_gradient_equal_numpy(slots):
    keys = jax.random.split(jax.random.key(slots), 2)
    leaks = (0.9, 0.7, 0.8)[:slots]
    weight = 0.1 * jax.random.normal(keys[0], (UNITS, INPUTS), jnp.float32)
    xs = jax.random.normal(keys[1], (3, BATCH, INPUTS), jnp.float32)
    net = Chain(weight, leaks)
    state = (jnp.zeros((BATCH, UNITS), jnp.float32),) * slots
    graph = etrace.compile(net, state, xs[0], batched=True)
    assert graph.vjp == "single-step"
    assert graph.groups[0].slots == slots

    @jax.jit
    def run(params):
        def body(carry, x):
            state, trace, total = carry

            def loss(params):
                out, new, moved = etrace.step(graph, params, state, trace, x)
                return jnp.sum(out), (new, moved)

            grads, (state, trace) = jax.grad(loss, has_aux=True)(params)
            total = jax.tree.map(jnp.add, total, grads)
            return (state, trace, total), None

        zero = jax.tree.map(jnp.zeros_like, params)
        start = (state, etrace.init_trace(graph), zero)
        return jax.lax.scan(body, start, xs)[0][1:]

    trace, grads = run(graph.params(net))
    assert all(leaf.size > 1_000_000 for leaf in jax.tree.leaves(trace))
    expected, gradient = _numpy(np.asarray(weight), leaks, np.asarray(xs), state)
    (got,) = trace
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(grads.weight, gradient, rtol=2e-4, atol=2e-3)
