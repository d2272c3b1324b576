"""The xLSTM cells, layers and blocks of noxton, through their `step` methods."""

import functools

import equinox as eqx
import jax
import pytest
from problems import (
    assert_first_step,
    assert_learns,
    assert_near_bptt,
    assert_nothing_is_lost_silently,
    problem,
)


nn = pytest.importorskip("noxton.nn", reason="noxton needs Python 3.13")
pytestmark = pytest.mark.thirdparty

SIZE, HEADS, KERNEL = 4, 2, 3
KEYS = jax.random.split(jax.random.key(0), 3)


def cell(model, x, state):
    return model.step(x, state)


def layer(model, x, state):
    out, state = model.step(x[None], *state)
    return out[0], state


def block(model, x, state):
    out, state = model.step(x[None], state)
    return out[0], state


def _scalar(kernel):
    return nn.sLSTMLayer(SIZE, HEADS, kernel, 0.0, key=KEYS[0], inference=True)


def _matrix():
    sizes = SIZE, SIZE, HEADS, True, KERNEL, 16, HEADS
    return nn.mLSTMLayer(*sizes, 0.0, key=KEYS[0], inference=True)


# The cosine that was measured, less a little.
MODELS = {
    "sLSTMCell": (cell, lambda: nn.sLSTMCell(SIZE, HEADS, key=KEYS[0]), 0.99),
    "sLSTMLayer": (layer, lambda: _scalar(0), 0.99),
    "sLSTMLayer, convolution": (layer, lambda: _scalar(KERNEL), 0.98),
    "mLSTMLayer": (layer, _matrix, 0.99),
    "xLSTMBlock, scalar": (block, lambda: nn.xLSTMBlock(SIZE, _scalar(KERNEL)), 0.98),
    "xLSTMBlock, matrix": (block, lambda: nn.xLSTMBlock(SIZE, _matrix()), 0.99),
}
EVERY = list(MODELS)


def _away_from_zero(model):
    """Fresh recurrent weights of an sLSTM are zeros, and so would be their credit."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEYS[1], len(leaves))
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), static)


@functools.cache
def _problem(name):
    call, make, _ = MODELS[name]
    model = _away_from_zero(make())
    size = 4 * SIZE if call is cell else SIZE
    return problem(model, call, model.init_state(), size, KEYS[2])


@pytest.mark.parametrize("name", EVERY)
def test_first_step_equals_autodiff(name):
    assert_first_step(_problem(name))


@pytest.mark.parametrize("name", EVERY)
def test_near_bptt(name):
    assert_near_bptt(_problem(name), MODELS[name][2])


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_lost_silently(name):
    assert_nothing_is_lost_silently(_problem(name))


@pytest.mark.parametrize("name", EVERY)
def test_learns(name):
    assert_learns(_problem(name))
