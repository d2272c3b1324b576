"""`jacobians` and `learning_signal` against the explicit matrices of a step."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from compiled import assert_close, dense_of, graph_of, jacobians_of
from models import MODELS, Taps, random_state, sequence
from oracles import assert_same_gradient, problem, quick_jit, sum_of_squares
from windows import local

import eqx_etrace as etrace
from eqx_etrace._jacobian import prepare


ALL = list(MODELS)
BATCH = 3
N, IN = 6, 4
KEY = jax.random.key(0)


# Jacobians by the weights.


def _pull(name, seeds):
    """The derivative by params of seeds . new hidden state, through df and operands."""
    model, state, xs, _ = problem(name)
    graph, found = graph_of(name), jacobians_of(name)
    leaves, tree = jax.tree.flatten(graph.params(model))
    (weights, prepared), pull = jax.vjp(lambda p: prepare(graph, p), leaves)
    total = dict(zip(graph.weights, map(jnp.zeros_like, weights), strict=True))
    values = dict(zip(graph.weights, weights, strict=True))
    for relation, use in zip(graph.relations, found.hidden_to_weight, strict=True):
        operands = list(use.operands)
        operands.insert(relation.operand, values[relation.ref])
        for seed, df in zip(seeds[relation.group].T, use.df, strict=True):
            assert df.shape == relation.y_shape
            influence = relation.op.influence(df, tuple(operands))
            put = relation.map.spread(seed)
            total[relation.ref] += relation.op.contract([put], [influence])
    rest = jax.tree.map(_no_cotangent, prepared)
    return jax.tree.unflatten(tree, pull((tuple(total.values()), rest))[0])


def _no_cotangent(leaf):
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if inexact else np.zeros(leaf.shape, jax.dtypes.float0)


@pytest.mark.parametrize("name", ALL)
def test_hidden_to_weight_is_the_dense_jacobian(name):
    dense, (_, F, _), places = dense_of(name)
    keys = jax.random.split(KEY, len(places))
    seeds = [jax.random.normal(k, p.shape) for k, p in zip(keys, places, strict=True)]
    flat = jnp.zeros(len(F))
    for place, seed in zip(places, seeds, strict=True):
        flat = flat.at[place].set(seed)
    assert_same_gradient(_pull(name, seeds), dense.unravel(flat @ F))


def test_df_of_a_lif_with_current_by_hand():
    model, state, xs, _ = problem("lif")
    graph = graph_of("lif")
    decay = jax.nn.sigmoid(model.layer.tau_v)
    membrane, current = state
    for relation, use in zip(
        graph.relations, jacobians_of("lif").hidden_to_weight, strict=True
    ):
        if relation.name in ("layer.w_in.weight", "layer.w_rec.weight"):
            at_membrane, at_current = use.df
            assert_close(at_current, np.ones(7))
            assert_close(at_membrane, 1 - decay)
        if relation.name == "layer.w_in.weight":
            assert_close(use.operands[0], xs[0])
        if relation.name == "layer.tau_g" and relation.y_shape == current.shape:
            assert any(np.allclose(op, current) for op in use.operands)


@pytest.mark.parametrize("name", ALL)
def test_out_and_state_are_those_of_the_model(name):
    model, state, xs, _ = problem(name)
    expected = model(xs[0], state)
    got = (jacobians_of(name).out, jacobians_of(name).state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["alif", "gru_lif"])
def test_a_batch_is_the_samples_side_by_side(name):
    case, (model, state, _, _) = MODELS[name], problem(name)
    states = jax.vmap(lambda k: random_state(k, state))(jax.random.split(KEY, BATCH))
    (x,), (t,) = sequence(KEY, case, 1, BATCH)
    batched = etrace.compile(model, states, x, batched=True)
    params, one = batched.params(model), graph_of(name)

    got = quick_jit(etrace.jacobians)(batched, params, states, x)
    each = jax.vmap(functools.partial(etrace.jacobians, one, params))
    expected = quick_jit(each)(states, x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, 1e-12)
    for group, inputs, J in zip(
        batched.groups, got.inputs, got.hidden_to_hidden, strict=True
    ):
        h = jax.vmap(group.concat)(states)
        assert_close(jax.vmap(group.diagonal_jacobian)(h, inputs), J, 1e-12)
        new = jax.vmap(group.transition)(h, inputs)
        assert_close(new, jax.vmap(group.concat)(got.state), 1e-12)

    got = quick_jit(etrace.learning_signal)(batched, params, states, x, t)
    signal = functools.partial(etrace.learning_signal, one, params)
    expected = quick_jit(jax.vmap(signal))(states, x, t)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-12)


# The learning signal.


@functools.cache
def _signal(name):
    model, state, xs, ts = problem(name)
    graph, params = graph_of(name), graph_of(name).params(model)
    cotangent = jax.grad(sum_of_squares)(model(xs[0], state)[0], ts[0])
    run = quick_jit(functools.partial(etrace.learning_signal, graph))
    return run(params, state, xs[0], cotangent)


@pytest.mark.parametrize("name", ALL)
def test_learning_signal_is_the_dense_one(name):
    """For multi-step models too: by the new state it means the same."""
    model, state, xs, ts = problem(name)
    dense, (_, _, M), places = dense_of(name)
    h = dense.flat(dense.leaves)

    def by_delta(delta):
        taps = dense.perturbed(delta, Taps())
        out, _ = dense.step(dense.p, h, dense.leaves, xs[0], taps)
        return sum_of_squares(out, ts[0])

    total = quick_jit(jax.grad(by_delta))(jnp.zeros_like(h))
    expected = np.linalg.solve((M * dense.same_unit).T, total)
    for got, place in zip(_signal(name), places, strict=True):
        assert_close(got, expected[place])


@pytest.mark.parametrize("name", ["alif", "lstm", "gru_lif"])
def test_signal_times_trace_is_the_gradient(name):
    model, state, xs, ts = problem(name)
    graph, params = graph_of(name), graph_of(name).params(model)
    trace = etrace.init_trace(graph)
    for x in xs[:2]:
        _, state, trace = etrace.step(graph, params, state, trace, x)
    x, t = xs[2], ts[2]

    def loss(params):
        out, _, new = etrace.step(graph, params, state, trace, x)
        return sum_of_squares(out, t), (out, new)

    expected, (out, new) = jax.grad(loss, has_aux=True)(params)
    cotangent = jax.grad(sum_of_squares)(out, t)
    signals = etrace.learning_signal(graph, params, state, x, cotangent)
    flat, tree = jtu.tree_flatten(params)
    total: dict[int, Any] = dict.fromkeys(graph.weights, 0.0)
    for relation, entries in zip(graph.relations, new, strict=True):
        signal = list(signals[relation.group].T)
        total[relation.ref] += local(graph).gradient(relation, entries, signal)
    (weights, prepared), pull = jax.vjp(lambda p: prepare(graph, p), flat)
    given = tuple(
        jnp.broadcast_to(total[ref], w.shape)
        for ref, w in zip(graph.weights, weights, strict=True)
    )
    rest = jax.tree.map(_no_cotangent, prepared)
    got = jtu.tree_unflatten(tree, pull((given, rest))[0])
    forget = functools.partial(eqx.tree_at, lambda m: m.readout, replace=None)
    assert_same_gradient(forget(got), forget(expected))


def test_signal_of_a_state_that_has_forgotten_the_spike():
    """The reset membrane is not read: all credit passes it by, hence multi-step."""
    assert graph_of("spike_before_hard_reset").vjp == "multi-step"
    np.testing.assert_array_equal(_signal("spike_before_hard_reset")[0], 0)


class _ManyOutputs(eqx.Module):
    cell: eqx.nn.GRUCell

    def __call__(self, x, h):
        h = self.cell(x, h)
        return {"h": h, "twice": 2 * h, "count": jnp.sum(h > 0)}, h


def _many():
    model = _ManyOutputs(eqx.nn.GRUCell(IN, N, key=KEY))
    h, x = jnp.full(N, 0.1), jnp.ones(IN)
    graph = etrace.compile(model, h, x)
    return functools.partial(etrace.learning_signal, graph, graph.params(model), h, x)


def test_cotangents_may_be_none():
    signal = _many()
    ones, zeros = jnp.ones(N), jnp.zeros(N)
    np.testing.assert_array_equal(
        signal({"h": ones, "twice": None, "count": None})[0], np.ones((N, 1))
    )
    (got,) = signal({"h": ones, "twice": ones, "count": jnp.zeros((), int)})
    np.testing.assert_array_equal(got, 3 * np.ones((N, 1)))
    (got,) = signal({"h": None, "twice": None, "count": None})
    np.testing.assert_array_equal(got, np.zeros((N, 1)))
    assert not np.any(signal({"h": zeros, "twice": zeros, "count": None})[0])


WRONG_COTANGENTS = [
    ({"h": jnp.ones(N), "twice": None}, r"cotangent: out\['count'\]: got nothing"),
    (jnp.ones(N), r"cotangent: out\['count'\]: got nothing"),
    ({"h": jnp.ones(2), "twice": None, "count": None}, r"out\['h'\]: got float64\[2\]"),
    (
        {"h": jnp.ones(N, jnp.float32), "twice": None, "count": None},
        r"out\['h'\]: got float32\[6\], expected float64\[6\]",
    ),
    ({"h": None, "twice": None, "count": None, "z": 1.0}, r"out\['z'\]: got float"),
    ((None, None), r"cotangent: out\['count'\]: got nothing"),
]


@pytest.mark.parametrize("cotangent, message", WRONG_COTANGENTS)
def test_wrong_cotangents(cotangent, message):
    with pytest.raises(ValueError, match=message):
        _many()(cotangent)
