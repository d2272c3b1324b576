"""What trains, where it is found, and that modules are plain pytrees."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import quick_jit

from eqx_etrace import nn


KEY = jax.random.key(0)


def _paths(module):
    leaves = jax.tree_util.tree_leaves_with_path(
        eqx.filter(module, eqx.is_inexact_array)
    )
    return [jax.tree_util.keystr(path) for path, _ in leaves]


NEURONS = [
    nn.IF(3),
    nn.LIF(3, tau=[1.0, 2.0, 3.0]),
    nn.ALIF(3),
    nn.GIF(3),
    nn.AdEx(3),
    nn.Izhikevich(3),
    nn.HodgkinHuxley(3),
    nn.LI(3),
]


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
def test_nothing_trains_unasked(neuron):
    """Not even as a number that `jax.grad` of the whole module would see."""
    assert jax.tree.leaves(neuron) == []


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
def test_everything_trains_when_asked(neuron):
    fields = vars(neuron).items()
    names = [name for name, value in fields if isinstance(value, nn.Parameter)]
    found = type(neuron)(3, trainable=tuple(names))
    assert sorted(_paths(found)) == sorted(f".{name}.raw" for name in names)
    for name in names:
        got, expected = getattr(found, name), getattr(type(neuron)(3), name)
        assert got.shape == (3,)
        np.testing.assert_allclose(got(), expected() * np.ones(3), rtol=1e-6)

    def total(found):
        state, start = found.init_state(), 0.0
        for current in (30.0, 20.0):
            out, state = found(jnp.full(3, current), state)
            inexact = eqx.filter(state, eqx.is_inexact_array)
            start += sum(jnp.sum(leaf) for leaf in jax.tree.leaves((out, inexact)))
        return start

    grads = quick_jit(jax.grad(total))(found)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), jax.tree_util.keystr(path)


def test_paths_are_guessable():
    layer = nn.Recurrent(
        nn.ALIF(3, trainable=("tau", "tau_a")),
        synapse=nn.Exponential(3, trainable="tau"),
        key=KEY,
    )
    expected = ["neuron.tau.raw", "neuron.tau_a.raw", "connection.weight"]
    assert _paths(layer) == [f".{path}" for path in [*expected, "synapse.tau.raw"]]
    leaves = jax.tree_util.tree_leaves_with_path(layer.init_state())
    found = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert found == [".neuron.v", ".neuron.a", ".synapse.g"]


def test_bounds_hold_whatever_training_does():
    neuron = nn.LIF(3, tau=[5.0, 10.0, 20.0], resistance=2.0, trainable=("tau",))
    far = jnp.array([-1e3, 0.0, 1e3])
    pushed = eqx.tree_at(lambda n: n.tau.raw, neuron, far)
    np.testing.assert_allclose(pushed.tau(), [0.1, 100.05, 200.0], rtol=1e-12)
    grads = jax.grad(lambda n: jnp.sum(n(jnp.ones(3), n.init_state())[1].v))(pushed)
    assert np.all(np.isfinite(grads.tau.raw))
    positive = nn.Positive([1e-6, 1.0, 1e6])
    np.testing.assert_allclose(positive(), [1e-6, 1.0, 1e6], rtol=1e-9)
    bounded = nn.Bounded([1.5, 2.0, 2.5], lower=1.0, upper=3.0)
    np.testing.assert_allclose(bounded(), [1.5, 2.0, 2.5], rtol=1e-12)


def test_time_constants_of_a_dual_exponential_do_not_cross():
    names = ("tau_rise", "tau_decay")
    synapse = nn.DualExponential(2, tau_rise=2.0, tau_decay=8.0, trainable=names)
    up, down = jnp.full(2, 1e3), jnp.full(2, -1e3)

    def where(s):
        return s.tau_rise.raw, s.tau_decay.raw

    apart = eqx.tree_at(where, synapse, (down, up))
    np.testing.assert_allclose(apart.tau_rise(), 0.1)
    np.testing.assert_allclose(apart.tau_decay(), 80.0)
    close = eqx.tree_at(where, synapse, (up, down))
    assert np.all(close.tau_rise() <= 4.0) and np.all(close.tau_decay() >= 4.0)


def test_one_parameter_for_all_units():
    shared = nn.Bounded(jnp.asarray(7.0), lower=1.0, upper=50.0)
    neuron = nn.LIF(3, tau=shared)
    assert neuron.tau.shape == ()
    np.testing.assert_allclose(neuron.tau(), 7.0, rtol=1e-12)
    plain, (v,) = nn.LIF(3, tau=7.0), (jnp.arange(3.0),)
    got = neuron(v, nn.LIFState(v))[1].v
    np.testing.assert_allclose(got, plain(v, nn.LIFState(v))[1].v, rtol=1e-12)


@pytest.mark.parametrize("value", [0.5, 3.0])
def test_starts_outside_of_the_bounds(value):
    with pytest.raises(ValueError, match="Bounded: got .*, expected numbers between 1"):
        nn.Bounded(value, lower=1.0, upper=3.0)


def test_starts_that_are_not_positive():
    with pytest.raises(ValueError, match="Positive: got .*, expected numbers"):
        nn.Positive([1.0, 0.0])


# Plain pytrees.


def _layer(key, tau: Any = 20.0):
    lif = nn.LIF(3, tau=tau, trainable="tau")
    return nn.Recurrent(lif, nn.Sparse(3, 3, 2, key=key), synapse=nn.Alpha(3))


def test_serialisation():
    layer, other = _layer(KEY), _layer(jax.random.key(1), tau=5.0)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, other)
    # The bound of tau belongs to how a module is made.
    arrays = [jax.tree.leaves(module) for module in (layer, loaded)]
    for a, b in zip(*arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_surgery_and_maps():
    layer = _layer(KEY)
    changed = eqx.tree_at(lambda m: m.neuron.v_rest, layer, nn.Free(jnp.ones(3)))
    assert ".neuron.v_rest.raw" in _paths(changed)
    fixed = eqx.tree_at(lambda m: m.neuron.tau, layer, nn.Constant(3.0))
    assert fixed.neuron.tau() == 3.0 and ".neuron.tau.raw" not in _paths(fixed)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    model = eqx.combine(doubled, static)
    np.testing.assert_array_equal(model.connection.weight, 2 * layer.connection.weight)


def test_float32_stays_float32():
    layer = _layer(KEY, tau=[1.0, 2.0, 3.0])
    pieces = (layer, nn.LIF(3, tau=[1.0, 2.0, 3.0]), nn.HodgkinHuxley(3))
    for piece in (*pieces, nn.STP(3), nn.AdEx(3)):
        small, state = (
            jax.tree.map(
                lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
            )
            for tree in (piece, piece.init_state())
        )
        out, new = small(jnp.ones(3, jnp.float32), state)
        assert out.dtype == jnp.float32
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(new)]
        assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_ensembles_and_batches():
    keys = jax.random.split(KEY, 4)
    layers = eqx.filter_vmap(lambda key: nn.Recurrent(nn.LIF(3), key=key))(keys)
    state = nn.LIF(3).init_state()
    states = jax.tree.map(
        lambda a: jnp.stack([a] * 4), nn.RecurrentState(state, (), ())
    )
    run = eqx.filter_vmap(lambda layer, x, s: layer(x, s))
    out, _ = run(layers, 30 * jnp.ones((4, 3)), states)
    assert out.shape == (4, 3)
    one = nn.Recurrent(nn.LIF(3), key=KEY)
    outs, _ = jax.vmap(one)(30 * jnp.ones((4, 3)), states)
    np.testing.assert_array_equal(outs, np.ones((4, 3)))


def test_bptt_trains_a_layer():
    """Backpropagation through time and optax, as for any Equinox module: the number of
    spikes in 40 ms comes to be what it should."""
    lif = nn.LIF(3, tau=10.0, spike=nn.superspike(2.0), trainable="tau")
    layer, target = nn.Recurrent(lif, key=KEY), jnp.array([4.0, 8.0, 12.0])
    optimiser = optax.sgd(1e-3)
    params, static = eqx.partition((layer, jnp.full(3, 2.0)), eqx.is_inexact_array)

    def loss(params):
        layer, current = eqx.combine(params, static)

        def body(state, _):
            out, state = layer(current, state)
            return state, out

        outs = jax.lax.scan(body, layer.init_state(), None, length=40)[1]
        return jnp.sum((outs.sum(0) - target) ** 2)

    @jax.jit
    def update(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimiser.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, values = optimiser.init(params), []
    for _ in range(12):
        params, opt_state, value = update(params, opt_state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
