"""Containers do what the same calls by hand do, and tell layers apart."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, bptt, one_step, online, quick_jit

import eqx_etrace as etrace
from eqx_etrace import nn


IN, UNITS, OUT, STEPS = 2, 3, 2, 6
KEYS = jax.random.split(jax.random.key(3), 4)
XS, TS = jax.random.normal(KEYS[3], (2, STEPS, IN))


def _linear(key=KEYS[1]):
    return eqx.nn.Linear(UNITS, OUT, key=key)


@functools.cache
def _sequential():
    return nn.Sequential([nn.IndRNN(IN, UNITS, key=KEYS[0]), jnp.tanh, _linear()])


@functools.cache
def _stack():
    below, above = nn.RNN(IN, UNITS, key=KEYS[0]), nn.RNN(UNITS, OUT, key=KEYS[1])
    return nn.Stack([below, jax.nn.relu, above])


@functools.cache
def _residual():
    unit = nn.LRU(IN, UNITS, IN, key=KEYS[0])
    return nn.Residual(nn.Sequential([unit, jax.nn.gelu]))


def _same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_sequential_is_one_layer_after_the_other():
    net, x = _sequential(), XS[0]
    first, _, last = net.layers
    h, new = first(x, jnp.full(UNITS, 0.5))
    expected = last(jnp.tanh(h)), (new, None, None)
    _same(net(x, (jnp.full(UNITS, 0.5), None, None)), expected)
    _same(net.init_state(), (jnp.zeros(UNITS), None, None))
    assert len(net) == 3 and net[0] is first


def test_stack_joins_the_outputs_of_all_layers():
    net, x = _stack(), XS[0]
    below, _, above = net.layers
    low, low_state = below(x, jnp.full(UNITS, 0.5))
    middle = jax.nn.relu(low)
    high, high_state = above(middle, jnp.full(OUT, 0.5))
    expected = jnp.concatenate([low, middle, high]), (low_state, None, high_state)
    _same(net(x, (jnp.full(UNITS, 0.5), None, jnp.full(OUT, 0.5))), expected)
    assert len(net) == 3 and net[2] is above


def test_residual_adds_its_input():
    net, x = _residual(), XS[0]
    (unit, _), state = net.layer.layers, net.init_state()
    y, h = unit(x, state[0])
    _same(net(x, state), (x + jax.nn.gelu(y), (h, None)))


def test_residual_without_a_state():
    net = nn.Residual(jnp.sin)
    assert net.init_state() is None
    _same(net(XS[0], None), (XS[0] + jnp.sin(XS[0]), None))


# Through the compiler.


def _gradients(net):
    """(ours, of plain autodiff)."""
    state = net.init_state()
    size = eqx.filter_eval_shape(net, XS[0], state)[0].size
    targets = jnp.resize(TS, (STEPS, size))
    graph = etrace.compile(net, state, XS[0])
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(net), state, XS, targets), bptt(net, state, XS, targets)


def test_sequential_of_a_local_recurrence_has_the_gradient_of_bptt():
    assert_same_gradient(*_gradients(_sequential()))


def test_residual_of_a_local_recurrence_has_the_gradient_of_bptt():
    assert_same_gradient(*_gradients(_residual()))


def test_stack_has_a_group_for_each_layer():
    net = _stack()
    graph = etrace.compile(net, net.init_state(), XS[0])
    assert [(group.units, group.slots) for group in graph.groups] == [
        (UNITS, 1),
        (OUT, 1),
    ]
    assert {name for relation in graph.relations for name in relation.weight} == {
        f"layers[{i}].{name}"
        for i in (0, 2)
        for name in ("weight_ih", "weight_hh", "bias")
    }


def test_stack_has_the_gradient_of_one_step():
    net, state = _stack(), _stack().init_state()
    target = jnp.arange(2.0 * UNITS + OUT)
    graph = etrace.compile(net, state, XS[0])
    run = quick_jit(functools.partial(online, graph))
    got = run(graph.params(net), state, XS[:1], target[None])
    assert_same_gradient(got, one_step(net, state, XS[0], target))


# What a user does with a module besides.


def test_functions_are_no_leaves():
    net = _sequential()
    zeros = jax.tree.map(jnp.zeros_like, net)
    _same(zeros(XS[0], zeros.init_state())[0], jnp.zeros(OUT))


def test_weights_of_a_layer_that_is_a_tree_are_leaves():
    layer = jax.tree_util.Partial(jnp.matmul, jnp.ones((OUT, IN)))
    (leaf,) = jax.tree.leaves(nn.Sequential([layer]))
    assert leaf.shape == (OUT, IN)


def test_tree_at():
    net = eqx.tree_at(lambda net: net.layers[2].bias, _sequential(), jnp.full(OUT, 9.0))
    old, new = (m(XS[0], m.init_state())[0] for m in (_sequential(), net))
    np.testing.assert_allclose(new - old, 9 - _sequential().layers[2].bias)


def test_saved_and_loaded():
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, _sequential())
    file.seek(0)
    zeros = jax.tree.map(jnp.zeros_like, _sequential())
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, zeros), _sequential())


class Noisy(eqx.Module):
    """Adds noise, which has its place in the output and in the state."""

    def init_state(self):
        return jnp.zeros(IN)

    def __call__(self, x, state, *, key):
        noise = jax.random.normal(key, x.shape)
        return x + noise, state + noise


def test_each_layer_gets_a_key_of_its_own():
    net = nn.Sequential([Noisy(), jnp.sin, nn.Residual(Noisy()), eqx.nn.Dropout(0.5)])
    run = jax.jit(lambda key: net(jnp.ones(IN), net.init_state(), key=key))
    out, (one, _, two, _) = run(KEYS[0])
    assert np.any(one != two)
    _same(run(KEYS[0])[0], out)
    assert np.any(run(KEYS[1])[1][0] != one)
    inner = jax.random.split(KEYS[0], 4)
    _same(one, jax.random.normal(inner[0], (IN,)))


def test_a_layer_that_takes_no_key_gets_none():
    net = nn.Sequential([jnp.sin, nn.RNN(IN, OUT, key=KEYS[0])])
    state = net.init_state()
    _same(net(XS[0], state, key=KEYS[1]), net(XS[0], state))


# What is refused.


class NoState(eqx.Module):
    def __call__(self, x, state):
        return x, state


class NoPair(eqx.Module):
    def init_state(self):
        return jnp.zeros(IN)

    def __call__(self, x, state):
        return x + state


REFUSED = {
    "gru": (eqx.nn.GRUCell(IN, UNITS, key=KEYS[0]), r"Wrap it: `nn.GRU\(cell\)`"),
    "lstm": (eqx.nn.LSTMCell(IN, UNITS, key=KEYS[0]), r"Wrap it: `nn.LSTM\(cell\)`"),
    "class": (nn.SpikeCount, "Pass an instance, not the class"),
    "array": (np.ones(3), "It cannot be called"),
    "no state": (
        NoState(),
        r"`NoState`.* It takes x, state. Give it .*`init_state\(\)",
    ),
    "two arguments": (jnp.matmul, "It takes a, b"),
    "batch norm": (
        eqx.nn.BatchNorm(IN, axis_name="batch", mode="ema"),
        "equinox.nn.State",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [nn.Sequential, nn.Stack])
def test_layers_that_are_refused(name, kind):
    layer, message = REFUSED[name]
    with pytest.raises(
        TypeError, match=f"nn.{kind.__name__}, layer 1: got .*{message}"
    ):
        kind([jnp.sin, layer])


def test_residual_refuses_the_same():
    with pytest.raises(TypeError, match=r"nn.Residual: got .* Wrap it"):
        nn.Residual(REFUSED["gru"][0])


@pytest.mark.parametrize("layers", [[], ()])
def test_no_layers(layers):
    with pytest.raises(TypeError, match="expected a list or tuple of at least one"):
        nn.Sequential(layers)


def test_a_state_of_other_layers():
    with pytest.raises(ValueError, match="nn.Sequential: got 2 for .* 3 layers"):
        _sequential()(XS[0], (jnp.zeros(UNITS), None))
    with pytest.raises(ValueError, match="nn.Stack: got 2 for .* 3 layers"):
        _stack()(XS[0], (jnp.zeros(UNITS), None))


def test_a_result_that_is_no_pair():
    net = nn.Sequential([NoPair()])
    with pytest.raises(TypeError, match=r"layer 0: got .* from `NoPair`, expected the"):
        net(XS[0], net.init_state())


def test_residual_of_another_size():
    net = nn.Residual(nn.RNN(IN, UNITS, key=KEYS[0]))
    with pytest.raises(ValueError, match=r"shape \(3,\) from `RNN`, expected \(2,\)"):
        net(XS[0], net.init_state())


def test_stack_of_a_matrix():
    net = nn.Stack([lambda x: x[None]])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) from layer 0"):
        net(XS[0], net.init_state())
