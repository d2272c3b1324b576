"""The plain steps of a window: what they hand on, and how they are spelt."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision
from oracles import assert_same_gradient
from windows import by_steps, each_square

import eqx_etrace as etrace
from eqx_etrace._op_rules import sum_of_first


RULES = {"DRTRL": etrace.DRTRL(), "ESDRTRL": etrace.ESDRTRL(0.8)}
UNITS, BATCH = 4, 3


class Relay(eqx.Module):
    """State leaves of all kinds: `fast` is computed, `late` is `fast` of the step
    before, `other` and `same` change places, and `still` does not change."""

    w_in: Any
    w_rec: Any
    bias: Any

    def __call__(self, x, state):
        fast, late, other, same, still = state
        drive = self.w_in @ x + self.w_rec @ (late * same) + self.bias
        fast_now = jnp.tanh(still * fast + late**2 + other * drive) - 0.3 * fast**2
        return jnp.sin(fast_now), (fast_now, fast, same, other, still)


def _relay(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    net = Relay(
        0.7 * jax.random.normal(keys[0], (UNITS, 2), dtype),
        0.7 * jax.random.normal(keys[1], (UNITS, UNITS), dtype),
        0.3 * jax.random.normal(keys[2], (UNITS,), dtype),
    )
    keys = jax.random.split(jax.random.key(1), 5)
    shape = BATCH, UNITS
    return net, tuple(0.5 * jax.random.normal(key, shape, dtype) for key in keys)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("steps", "window"), [(7, 3), (7, 7), (64, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_a_new_state_is_the_old_one_of_the_next_step(rule, steps, window, reset):
    """Also of leaves that are handed on; not where a lane begins anew."""
    net, state = _relay()
    keys = jax.random.split(jax.random.key(2), 3)
    xs = jax.random.normal(keys[0], (steps, BATCH, 2), jnp.float64)
    ts = jax.random.normal(keys[1], (steps, BATCH, UNITS), jnp.float64)
    fresh = jax.random.bernoulli(keys[2], 0.3, (steps, BATCH)) if reset else None
    graph = etrace.compile(net, state, xs[0], rule=RULES[rule], batched=True)
    assert graph.vjp == "single-step"
    params = graph.params(net)
    initial = jax.tree.map(lambda leaf: 0.1 + leaf, state) if reset else None
    fun = etrace.value_and_grad(graph, each_square, window=window)
    more = {"reset": fresh, "initial": initial}
    got = fun(params, state, None, xs, ts, **more)
    want = by_steps(graph, each_square, params, state, None, xs, ts, **more)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-12)
    for mine, other in zip(got[1:], want[1:], strict=True):
        assert_same_gradient(mine, other, 1e-12)


class Matrices(eqx.Module):
    """A weight before a matrix, the two sides of the product at a precision each."""

    w: Any
    precision: Any = eqx.field(static=True)

    def __call__(self, x, h):
        numbers = ((1,), (0,)), ((), ())
        y = jax.lax.dot_general(self.w, h, numbers, precision=self.precision)
        h = jnp.tanh(y + x)
        return h, h


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("precision", [None, (Precision.HIGHEST, Precision.DEFAULT)])
def test_a_weight_before_a_matrix(precision, batched):
    w = jax.random.normal(jax.random.key(0), (3, 3), jnp.float64)
    lead = (BATCH,) if batched else ()
    h = jnp.full((*lead, 3, 2), 0.2, jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (5, *lead, 3, 2), jnp.float64)
    net = Matrices(w, precision)

    def loss_fn(out, target):
        return jnp.sum((out - target) ** 2)

    graph = etrace.compile(net, h, xs[0], batched=batched)
    params = graph.params(net)
    got = etrace.value_and_grad(graph, loss_fn, window=5)(params, h, None, xs, xs)
    want = by_steps(graph, loss_fn, params, h, None, xs, xs)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert_same_gradient(got[1], want[1], 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_the_sum_over_the_first_axis(dtype):
    array = jax.random.normal(jax.random.key(0), (300, 2, 3)).astype(dtype)
    found, want = sum_of_first(array), jnp.sum(array, 0)
    assert found.dtype == want.dtype and found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
