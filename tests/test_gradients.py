"""The gradient of the library on every model of the table, against the oracles."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, random_state, sequence
from oracles import (
    assert_same_gradient,
    autodiff,
    bptt,
    cosine,
    first_step,
    one_step,
    online,
    online_outside,
    online_steps,
    problem,
    quick_jit,
    reference,
    sum_of_squares,
)

import eqx_etrace as etrace


ALL = list(MODELS)
TWINS = [name for name, case in MODELS.items() if case.oracle == "twin"]
LOCAL = [name for name, case in MODELS.items() if case.oracle == "bptt"]
SINGLE = [name for name, case in MODELS.items() if case.vjp == "single-step"]
FORMS = [(name, "multi-step") for name in ALL] + [(n, "single-step") for n in SINGLE]
# Enough to meet every kind of state, weight and form of the step.
SOME = ["gru", "filtered_rnn", "lif_packed", "alif", "gru_lif", "layernorm_between"]
WATCHED = ["lstm", "lif", "lif_packed", "alif", "hard_reset", "lru"]
BATCH = 3


@functools.cache
def _graph(name, vjp: Any = "auto"):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0], rule=etrace.DRTRL(), vjp=vjp)


@functools.cache
def _every_step(name, vjp="auto"):
    model, state, xs, ts = problem(name)
    graph = _graph(name, vjp)
    run = quick_jit(functools.partial(online_steps, graph))
    return run(graph.params(model), state, xs, ts)


def _online(name, vjp=None, steps=None):
    """By the graph that chose the form itself, unless another form is asked for."""
    if vjp is None or vjp == _graph(name).vjp:
        vjp = "auto"
    return jax.tree.map(lambda g: g[:steps].sum(0), _every_step(name, vjp))


@pytest.mark.parametrize("name", ALL)
def test_form_of_the_step(name):
    assert _graph(name).vjp == MODELS[name].vjp


@pytest.mark.parametrize("name, vjp", [("lif", "multi-step"), ("rnn", "single-step")])
def test_form_that_was_asked_for(name, vjp):
    assert _graph(name, vjp).vjp == vjp


@pytest.mark.parametrize("name", ALL)
def test_forward_is_the_model(name):
    model, state, xs, _ = problem(name)
    graph = _graph(name)
    trace = etrace.init_trace(graph)
    got = etrace.step(graph, graph.params(model), state, trace, xs[0])[:2]
    expected = model(xs[0], state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name, vjp", FORMS)
def test_one_step_equals_autodiff(name, vjp):
    assert_same_gradient(_online(name, vjp, steps=1), first_step(name))


@pytest.mark.parametrize("name", TWINS)
def test_sequence_equals_bptt_of_the_hand_cut_twin(name):
    assert_same_gradient(_online(name), autodiff(name, cut=True))


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
@pytest.mark.parametrize("name", LOCAL)
def test_local_recurrence_equals_bptt(name, vjp):
    assert_same_gradient(_online(name, vjp), autodiff(name))


@pytest.mark.parametrize("name, vjp", FORMS)
def test_sequence_equals_the_dense_reference(name, vjp):
    assert_same_gradient(_online(name, vjp), reference(name, vjp))


@pytest.mark.parametrize("name", ALL)
def test_no_parameter_is_left_out(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(_online(name)):
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", [n for n in ALL if n not in LOCAL])
def test_the_rule_is_not_bptt(name):
    """A guard: every test above would also pass at T steps if all rules were equal."""
    assert cosine(_online(name), autodiff(name)) < 0.9999


# A loss of the new state, besides that of the outputs.


def _watched(out_and_state, target):
    out, state = out_and_state
    leaves = [a for a in jax.tree.leaves(state) if eqx.is_inexact_array(a)]
    return sum_of_squares(out, target) + sum(jnp.sum(a**2) for a in leaves)


class _Watched(eqx.Module):
    """Gives its state out."""

    model: Callable

    def __call__(self, x, state):
        out, state = self.model(x, state)
        return (out, state), state


def _call_watched(model, x, state):
    return _Watched(model)(x, state)


@pytest.mark.parametrize("name", ALL)
def test_one_step_with_a_loss_of_the_returned_state(name):
    model, state, xs, ts = problem(name)
    graph = _graph(name)

    def loss(params):
        trace = etrace.init_trace(graph)
        out, new, _ = etrace.step(graph, params, state, trace, xs[0])
        return _watched((out, new), ts[0])

    got = quick_jit(jax.grad(loss))(graph.params(model))
    expected = one_step(_Watched(model), state, xs[0], ts[0], _watched).model
    assert_same_gradient(got, expected)


@pytest.mark.parametrize("name", WATCHED)
def test_sequence_with_a_loss_of_the_state_that_is_given_out(name):
    model, state, xs, ts = problem(name)
    graph = etrace.compile(model, state, xs[0], call=_call_watched)
    assert graph.vjp == "single-step"
    run = quick_jit(functools.partial(online, graph, loss=_watched))
    got = run(graph.params(model), state, xs, ts)
    twin, *_ = problem(name, cut=True)
    expected = bptt(_Watched(twin), state, xs, ts, _watched).model
    assert_same_gradient(got, expected)


# The same gradient by other ways.


@pytest.mark.parametrize("name", SOME)
def test_grad_outside_the_scan_equals_grad_inside(name):
    model, state, xs, ts = problem(name)
    graph = _graph(name)
    outside = jax.jit(functools.partial(online_outside, graph))
    got = outside(graph.params(model), state, xs, ts)
    assert_same_gradient(got, _online(name), rtol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_eager_steps_equal_the_compiled_scan(name):
    model, state, xs, ts = problem(name)
    graph = _graph(name)
    params, trace = graph.params(model), etrace.init_trace(graph)

    def loss(params, state, trace, x, t):
        out, state, trace = etrace.step(graph, params, state, trace, x)
        return sum_of_squares(out, t), (state, trace)

    total = jax.tree.map(jnp.zeros_like, params)
    for x, t in zip(xs[:3], ts[:3], strict=True):
        grad = jax.grad(loss, has_aux=True)
        grads, (state, trace) = grad(params, state, trace, x, t)
        total = jax.tree.map(jnp.add, total, grads)
    assert_same_gradient(total, _online(name, steps=3), rtol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_graph_as_an_argument_of_jit(name):
    model, state, xs, ts = problem(name)
    graph = _graph(name)
    got = eqx.filter_jit(online)(graph, graph.params(model), state, xs[:4], ts[:4])
    assert_same_gradient(got, _online(name, steps=4), rtol=1e-12)


@pytest.mark.parametrize("name", [*SOME, "lru", "lif_scalar_tau"])
def test_batched_equals_the_sum_of_vmapped(name):
    case, (model, state, _, _) = MODELS[name], problem(name)
    keys = jax.random.split(jax.random.key(1), BATCH)
    states = jax.vmap(lambda key: random_state(key, state))(keys)
    xs, ts = sequence(keys[0], case, 8, BATCH)
    batched = etrace.compile(model, states, xs[0], batched=True)
    assert batched.vjp == case.vjp
    params = batched.params(model)
    got = jax.jit(functools.partial(online, batched))(params, states, xs, ts)

    one = functools.partial(online, _graph(name), params)
    each = quick_jit(jax.vmap(one, in_axes=(0, 1, 1)))(states, xs, ts)
    expected = jax.tree.map(lambda g: g.sum(0), each)
    assert_same_gradient(got, expected, rtol=1e-10)
