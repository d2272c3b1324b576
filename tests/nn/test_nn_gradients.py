"""The library on networks of the pieces: units, slots, and the gradient of D-RTRL."""

import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from models import PLAIN
from oracles import (
    assert_same_gradient,
    bptt,
    dense_reference,
    differences,
    online,
    quick_jit,
)
from spiking_nets import CASES, Net, Now, problem

import eqx_etrace as etrace


ALL = list(CASES)


@functools.cache
def _graph(name):
    model, state, xs, _ = problem(CASES[name])
    return etrace.compile(model, state, xs[0])


@functools.cache
def _online(name):
    model, state, xs, ts = problem(CASES[name])
    graph = _graph(name)
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(model), state, xs, ts)


def _twin(model):
    return Net(model.w_in, model.body, model.readout, cut=True)


@functools.cache
def _expected(name):
    case = CASES[name]
    model, *data = problem(case)
    if not case.now:
        # Flat units: the dense reference knows the last axis alone.
        state, xs, ts = _flat_data(model, data)
        forms = dense_reference(_flat(model), state, xs, ts, case.groups)
        return jax.tree.map(lambda g: g.sum(0), forms[case.vjp])
    past = bptt(_twin(model), *data)
    now, less = bptt(Now(model), *data), bptt(Now(_twin(model)), *data)
    leaves = [jax.tree.leaves(tree) for tree in (past, now, less)]
    total = [a + (b - c) for a, b, c in zip(*leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(_online(name)), total)


class _Flat(eqx.Module):
    """A net whose state leaves have one axis of units."""

    net: Net

    def run(self, x, state, taps):
        like = self.net.body.init_state()
        shaped = jax.tree.map(lambda a, b: a.reshape(b.shape), state, like)

        def new(i, leaf):
            return taps.new(i, leaf.reshape(-1)).reshape(leaf.shape)

        out, state = self.net.run(x, shaped, type(taps)(taps.recur, taps.leave, new))
        return out, jax.tree.map(lambda a: a.reshape(-1), state)


def _flat(model):
    return _Flat(model) if len(model.body.shape) > 1 else model


def _flat_data(model, data):
    if len(model.body.shape) == 1:
        return data
    state, *rest = data
    return jax.tree.map(lambda a: a.reshape(-1), state), *rest


@pytest.mark.parametrize("name", ALL)
def test_the_taps_are_on_the_model(name):
    """The net that the references see is the net of the pieces, step by step."""
    model, state, xs, _ = problem(CASES[name])

    def both(state, x):
        out, new = model(x, state)
        return new, ((out, new), model.run(x, state, PLAIN), model.body.output(new))

    run = quick_jit(lambda state, xs: jax.lax.scan(both, state, xs)[1])
    pieces, tapped, sent = run(state, xs)
    pairs = zip(jax.tree.leaves(pieces), jax.tree.leaves(tapped), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert name == "LI" or 3 <= np.sum(sent) <= 0.8 * np.size(sent)


@pytest.mark.parametrize("name", ALL)
def test_units_and_slots(name):
    case, graph = CASES[name], _graph(name)
    units = int(np.prod(case.body.shape))
    assert [(g.units, g.slots) for g in graph.groups] == [(units, case.slots)]
    assert graph.vjp == case.vjp


@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_the_reference(name):
    expected = _expected(name)
    if isinstance(expected, _Flat):
        expected = expected.net
    assert_same_gradient(_online(name), expected)


@pytest.mark.parametrize("name", ALL)
def test_no_parameter_is_left_out(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(_online(name)):
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["ALIF, exponential", "LIF, COBA", "STP"])
def test_the_rule_is_not_bptt(name):
    model, *data = problem(CASES[name])
    gaps = differences(_online(name), bptt(model, *data))
    assert max(gaps.values()) > 1e-3
