"""Lookups in a weight: the closed form in every spelling, and models end to end."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_case import one_in
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from oracles import assert_same_gradient, bptt, one_step, online, quick_jit
from test_op_rules import check_batch, check_gradient, use_of

import eqx_etrace as etrace
from eqx_etrace._op_rules import ByAD, Gather


ROWS, COLUMNS = 6, 4
I = jnp.asarray(2)  # noqa: E741
MANY = jnp.asarray([1, 3, 1])
TABLE = jnp.asarray([[0, 3, 3], [1, 2, 0]])


def _gather(mode, sizes, **numbers):
    def fun(w, i):
        return jax.lax.gather(
            w,
            i,
            GatherDimensionNumbers(**numbers),
            sizes,
            mode=mode,
            fill_value=0.0,
        )

    return fun


CLIP, FILL = GatherScatterMode.CLIP, GatherScatterMode.FILL_OR_DROP
ROW = {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}
BOTH = {"offset_dims": (1, 2), "collapsed_slice_dims": (), "start_index_map": (0, 1)}
# name: (lookup, shape of the weight, indices)
CASES = {
    "W[i]": (lambda w, i: w[i], (ROWS, COLUMNS), I),
    "W[-i]": (lambda w, i: w[-i], (ROWS, COLUMNS), I),
    "W[:, i]": (lambda w, i: w[:, i], (ROWS, COLUMNS), I),
    "W[i, i]": (lambda w, i: w[i, i], (ROWS, COLUMNS), I),
    "w[i]": (lambda w, i: w[i], (ROWS,), I),
    "W[i:i + 1]": (
        lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1),
        (ROWS, COLUMNS),
        I,
    ),
    "take": (lambda w, i: jnp.take(w, i, axis=0), (ROWS, COLUMNS), I),
    "W[indices]": (lambda w, i: w[i], (ROWS, COLUMNS), MANY),
    "W[table]": (lambda w, i: w[i], (ROWS, COLUMNS), TABLE),
    "W[:, indices]": (lambda w, i: w[:, i], (ROWS, COLUMNS), MANY),
    "W[:, indices, :]": (lambda w, i: w[:, i], (2, ROWS, 3), MANY),
    "W[indices, :, indices]": (lambda w, i: w[i, :, i], (4, 3, 5), MANY),
    "W[indices, indices]": (lambda w, i: w[i, i], (ROWS, COLUMNS), MANY),
    "take of columns": (lambda w, i: jnp.take(w, i, axis=1), (3, COLUMNS), TABLE),
    "take along": (
        lambda w, i: jnp.take_along_axis(w, i, axis=1),
        (2, COLUMNS),
        TABLE,
    ),
    "one row per head": (jax.vmap(lambda w, i: w[i]), (3, ROWS, 2), MANY),
    "rows per head": (jax.vmap(lambda w, i: w[i]), (2, ROWS, 2), TABLE),
    "rows of a module": (
        lambda w, i: jax.vmap(eqx.nn.Embedding(weight=w))(i),
        (ROWS, COLUMNS),
        MANY,
    ),
    "8-bit indices of a long axis": (
        lambda w, i: _gather(CLIP, (1, 1), **ROW)(w, i[:, None]),
        (300, 1),
        jnp.asarray([3, 255, 44], jnp.uint8),
    ),
    "an index of an axis taken whole": (
        lambda w, i: _gather(CLIP, (1, 3), **BOTH)(w, i),
        (ROWS, 3),
        jnp.asarray([[2, 0], [5, 1]]),
    ),
    "an axis at zero without an index": (
        lambda w, i: _gather(FILL, (1, 1), **ROW)(w, i[:, None]),
        (ROWS, 3),
        MANY,
    ),
}
# The same with indices that lie outside on either side.
OUTSIDE = jnp.asarray([-9, -1, 2, 5, 6, 99])
BEYOND = {
    "clip": lambda w, i: _gather(CLIP, (1, COLUMNS), **ROW)(w, i[:, None]),
    "fill": lambda w, i: _gather(FILL, (1, COLUMNS), **ROW)(w, i[:, None]),
    "take, fill": lambda w, i: jnp.take(w, i, axis=0, fill_value=0.0),
    "take, clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "take, wrap": lambda w, i: jnp.take(w, i, axis=0, mode="wrap"),
    "an axis taken whole is filled": lambda w, i: _gather(FILL, (1, COLUMNS), **BOTH)(
        w, jnp.stack([jnp.abs(i) % ROWS, i // 5], axis=1)
    ),
    "slice": lambda w, i: jax.lax.dynamic_slice(w, (i[5], i[0]), (1, COLUMNS)),
}


def _use(case):
    fun, shape, indices = case
    return use_of(fun, jax.random.normal(jax.random.key(0), shape), indices)


@one_in(3, CASES)
def test_a_lookup_equals_the_default(name):
    rule, default, operands, shape = _use(CASES[name])
    assert type(rule) is Gather
    assert np.abs(check_gradient(rule, default, operands, shape)).max() > 1e-3
    check_batch(rule, shape)


@pytest.mark.parametrize("name", BEYOND)
def test_indices_out_of_bounds_equal_the_default(name):
    rule, default, operands, shape = _use((BEYOND[name], (ROWS, COLUMNS), OUTSIDE))
    assert type(rule) is Gather
    check_gradient(rule, default, operands, shape)


def test_an_index_out_of_bounds_has_no_influence_unless_clipped():
    for mode, expected in ((CLIP, 1.0), (FILL, 0.0)):
        rule, _, operands, shape = use_of(
            lambda w, i, mode=mode: _gather(mode, (1, 2), **ROW)(w, i[:, None]),
            jnp.ones((3, 2)),
            jnp.asarray([3]),
        )
        found = rule.influence(jnp.ones(shape), operands)
        np.testing.assert_array_equal(found[0, 2], [expected] * 2)
        np.testing.assert_array_equal(found[0, :2], np.zeros((2, 2)))


def test_what_is_filled_in_does_not_spoil_the_trace():
    """`jnp.take` gives nan for an index out of bounds, and so may df be."""
    rule, _, operands, shape = use_of(
        lambda w, i: jnp.take(w, i, axis=0), jnp.ones((3, 2)), jnp.asarray([1, 3])
    )
    df = jnp.ones(shape).at[1].set(jnp.nan)
    found = rule.influence(df, operands)
    np.testing.assert_array_equal(found[1], np.zeros((3, 2)))


def test_the_trace_has_one_entry_per_index_and_entry_of_the_weight():
    for name, expected in {
        "W[i]": (ROWS, COLUMNS),
        "W[table]": (2, 3, ROWS, COLUMNS),
        "rows per head": (3, 2, ROWS, 2),
        "take along": (3, 2, COLUMNS),
    }.items():
        assert _use(CASES[name])[0].trace_shape == expected, name


def test_windows_of_a_weight_are_left_to_the_default():
    rule, *rest = _use(
        (lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 2), (ROWS, COLUMNS), I)
    )
    assert type(rule) is ByAD


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_over_16_bit_lookups_do_not_stall(dtype):
    rule, _, operands, shape = use_of(
        lambda w, i: w[i], jnp.ones((2, 1), dtype), jnp.ones(4096, int)
    )
    ones = jnp.ones(shape, dtype)
    trace = rule.influence(ones, operands)
    assert trace.dtype == dtype
    np.testing.assert_array_equal(rule.contract([ones], [trace]), [[0.0], [4096.0]])


# Models.


class Local(eqx.Module):
    """h' = tanh(decay * h + lookup(x)): the recurrence stays within the unit."""

    lookup: eqx.Module
    decay: jax.Array

    def __call__(self, x, h):
        h = jnp.tanh(self.decay * h + self.lookup(x))  # pyright: ignore
        return h, h


class Recurrent(eqx.Module):
    """An embedding drives a layer with a recurrent product; `cut` is the twin."""

    embedding: eqx.nn.Embedding
    w_rec: eqx.nn.Linear
    readout: eqx.nn.Linear
    cut: bool = eqx.field(static=True, default=False)

    def __call__(self, x, h):
        seen = jax.lax.stop_gradient(h) if self.cut else h
        h = 0.6 * h + jnp.tanh(self.embedding(x) + self.w_rec(seen))
        return self.readout(h), h


class Bag(eqx.Module):
    """The sum of several rows."""

    table: jax.Array

    def __call__(self, x):
        return jnp.sum(self.table[x], axis=0)


class Column(eqx.Module):
    table: jax.Array

    def __call__(self, x):
        return jnp.take(self.table, x, axis=1, fill_value=0.0)


KEY = jax.random.key(0)
WEIGHT = jax.random.normal(KEY, (ROWS, COLUMNS))
TOKENS = jnp.asarray([2, 0, 2, 5, 2, 0])
LOOKUPS = {
    "embedding": (eqx.nn.Embedding(weight=WEIGHT), TOKENS),
    "bag": (Bag(WEIGHT), jnp.stack([TOKENS, TOKENS[::-1], TOKENS], axis=1)),
    # The last index is out of bounds: zeros, and no credit.
    "column": (Column(WEIGHT.T), TOKENS.at[5].set(ROWS)),
}


def _targets(shape, seed=7):
    keys = jax.random.split(jax.random.key(seed))
    h = 0.5 * jax.random.normal(keys[0], shape)
    return h, jax.random.normal(keys[1], (len(TOKENS), *shape))


def _online(graph, model, state, xs, ts):
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(model), state, xs, ts)


@pytest.mark.parametrize("name", LOOKUPS)
def test_local_recurrence_equals_bptt(name):
    lookup, xs = LOOKUPS[name]
    model = Local(lookup, jnp.linspace(0.2, 0.9, COLUMNS))
    state, ts = _targets((COLUMNS,))
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == "single-step"
    assert sorted(r.op.name for r in graph.relations) == ["elementwise", "gather"]
    got = _online(graph, model, state, xs, ts)
    assert_same_gradient(got, bptt(model, state, xs, ts))
    got = _online(graph, model, state, xs[:1], ts[:1])
    assert_same_gradient(got, one_step(model, state, xs[0], ts[0]))


def _recurrent(cut=False):
    keys = jax.random.split(KEY, 3)
    w_rec = eqx.nn.Linear(COLUMNS, COLUMNS, key=keys[1])
    readout = eqx.nn.Linear(COLUMNS, 3, key=keys[2])
    return Recurrent(eqx.nn.Embedding(weight=WEIGHT), w_rec, readout, cut)


def test_an_embedding_in_a_recurrent_layer_equals_the_hand_cut_twin():
    model = _recurrent()
    state, ts = _targets((COLUMNS,))[0], _targets((3,))[1]
    graph = etrace.compile(model, state, TOKENS[0])
    got = _online(graph, model, state, TOKENS, ts)
    assert_same_gradient(got, bptt(_recurrent(cut=True), state, TOKENS, ts))
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_same_gradient(got, bptt(model, state, TOKENS, ts), rtol=1e-3)
    # A row that was never looked up has no gradient.
    assert not np.any(got.embedding.weight[1]) and np.any(got.embedding.weight[2])


def test_a_batch_of_examples_sums_their_gradients():
    model = _recurrent()
    xs = jnp.stack([TOKENS, TOKENS[::-1]], axis=1)
    ts = jnp.stack([_targets((3,), seed)[1] for seed in (1, 2)], axis=1)
    state = jnp.stack([_targets((COLUMNS,), seed)[0] for seed in (1, 2)])
    graph = etrace.compile(model, state, xs[0], batched=True)
    got = _online(graph, model, state, xs, ts)
    single = etrace.compile(model, state[0], xs[0, 0])
    each = [_online(single, model, state[b], xs[:, b], ts[:, b]) for b in range(2)]
    assert_same_gradient(got, jax.tree.map(lambda a, b: a + b, *each))
