"""Hidden groups, relations, Jacobians and signals as a user works with them."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from models import MODELS, Taps, random_state, sequence
from oracles import Dense, assert_same_gradient, problem, quick_jit, sum_of_squares

import eqx_etrace as etrace
from eqx_etrace._jacobian import prepare


ALL = list(MODELS)
LOCAL = [name for name, case in MODELS.items() if case.oracle == "bptt"]
SINGLE = [name for name, case in MODELS.items() if case.vjp == "single-step"]
SOME = ["gru", "lif_packed", "alif", "gru_lif", "layernorm_between"]
BATCH = 3
N, IN = 6, 4
KEY = jax.random.key(0)


@functools.cache
def _graph(name, vjp: Any = "auto"):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0], vjp=vjp)


@functools.cache
def _found(name):
    model, state, xs, _ = problem(name)
    graph = _graph(name)
    run = quick_jit(functools.partial(etrace.jacobians, graph))
    return run(graph.params(model), state, xs[0])


@functools.cache
def _dense(name):
    """The dense reference, its D, F and M, and where it keeps each slot."""
    model, state, xs, _ = problem(name)
    dense = Dense(model, state, MODELS[name].groups)
    h = dense.flat(dense.leaves)
    matrices = quick_jit(dense.local)(dense.p, h, dense.leaves, xs[0])
    numbers = dense.split(jnp.arange(float(h.size)), dense.leaves)
    numbered = jax.tree.unflatten(dense.treedef, numbers)
    places = [np.asarray(g.concat(numbered), int) for g in _graph(name).groups]
    return dense, matrices, places


def _close(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-13)


# Slots of a state, side by side.


@pytest.mark.parametrize("name", ALL)
def test_every_hidden_element_is_in_one_column(name):
    dense, _, places = _dense(name)
    found = np.concatenate([p.reshape(-1) for p in places])
    assert sorted(found) == list(range(dense.flat(dense.leaves).size))


@pytest.mark.parametrize("name", ALL)
def test_split_is_the_inverse_of_concat(name):
    _, state, _, _ = problem(name)
    for group in _graph(name).groups:
        h = group.concat(state)
        assert h.shape == (group.units, group.slots) and h.dtype == group.dtype
        columns = group.split(h)
        assert [v.dtype for v in columns] == list(group.dtypes)
        np.testing.assert_array_equal(jnp.stack(columns, axis=1), h)
        new = group.split(h + 1, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        np.testing.assert_array_equal(group.concat(new), h + 1)
        same = jax.tree.leaves(group.split(h, new))
        for a, b in zip(same, jax.tree.leaves(state), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-15)


def test_split_leaves_the_rest_of_the_state_alone():
    _, state, _, _ = problem("gru_lif")
    first, second = _graph("gru_lif").groups
    new = second.split(second.concat(state) + 1, state)
    np.testing.assert_array_equal(new[0], state[0])
    np.testing.assert_array_equal(first.concat(new), first.concat(state))
    np.testing.assert_array_equal(new[1][0], state[1][0] + 1)


def test_concat_and_split_of_a_batch():
    _, state, _, _ = problem("lif_packed")
    (group,) = _graph("lif_packed").groups
    states = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    h = jax.vmap(group.concat)(states)
    assert h.shape == (2, group.units, group.slots)
    np.testing.assert_array_equal(h[1], 2 * group.concat(state))
    back = jax.vmap(group.split)(h, states)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(states), strict=True):
        np.testing.assert_array_equal(a, b)


def _mixed(m, x, state):
    """The slots of a unit have different dtypes."""
    slow, fast = state
    fast = jnp.tanh(0.5 * fast + m(x) + 0.1 * slow.astype(fast.dtype))
    slow = 0.9 * slow + 0.1 * fast.astype(slow.dtype)
    return fast, (slow, fast)


def test_slots_of_different_dtypes():
    linear = eqx.nn.Linear(IN, N, key=KEY, dtype=jnp.float32)
    x = jnp.ones(IN, jnp.float32)
    state = (jnp.full(N, 0.3, jnp.bfloat16), jnp.full(N, 0.1, jnp.float32))
    graph = etrace.compile(linear, state, x, call=_mixed)
    (group,) = graph.groups
    assert group.dtype == jnp.float32
    h = group.concat(state)
    assert [v.dtype for v in group.split(h)] == [jnp.bfloat16, jnp.float32]
    found = etrace.jacobians(graph, graph.params(linear), state, x)
    new = group.transition(h, found.inputs[0])
    np.testing.assert_allclose(new, group.concat(found.state), rtol=1e-6)
    got = group.diagonal_jacobian(h, found.inputs[0])
    np.testing.assert_allclose(got, found.hidden_to_hidden[0], rtol=2e-2)


# The local program on its own.


@pytest.mark.parametrize("name", ALL)
def test_transition_at_its_inputs_is_the_step(name):
    model, state, xs, _ = problem(name)
    new = model(xs[0], state)[1]
    for group, inputs in zip(_graph(name).groups, _found(name).inputs, strict=True):
        _close(group.transition(group.concat(state), inputs), group.concat(new), 1e-12)


@pytest.mark.parametrize("name", LOCAL)
def test_transition_of_another_state_is_the_step_where_recurrence_is_local(name):
    model, state, xs, _ = problem(name)
    other = random_state(jax.random.key(7), state)
    (group,), (inputs,) = _graph(name).groups, _found(name).inputs
    got = group.transition(group.concat(other), inputs)
    _close(got, group.concat(model(xs[0], other)[1]), 1e-12)
    assert not np.allclose(got, group.concat(model(xs[0], state)[1]))


@pytest.mark.parametrize("name", ALL)
def test_transition_depends_on_the_own_unit_alone(name):
    """Values, not only derivatives: what is read through a cut is held."""
    _, state, _, _ = problem(name)
    for group, inputs in zip(_graph(name).groups, _found(name).inputs, strict=True):
        h = group.concat(state)
        moved = group.transition(h.at[1:].add(0.5), inputs)
        _close(moved[0], group.transition(h, inputs)[0], 1e-13)


@pytest.mark.parametrize("name", ALL)
def test_diagonal_jacobian_is_all_of_the_jacobian_of_transition(name):
    """At another state than the one that the inputs come from."""
    _, state, _, _ = problem(name)
    other = random_state(jax.random.key(3), state)
    for group, inputs in zip(_graph(name).groups, _found(name).inputs, strict=True):
        h = group.concat(other)
        full = quick_jit(jax.jacrev(group.transition))(h, inputs)
        got = eqx.filter_jit(group.diagonal_jacobian)(h, inputs)
        assert got.shape == (group.units, group.slots, group.slots)
        eye = jnp.eye(group.units)[:, None, :, None]
        _close(full, eye * got[:, :, None, :])


@pytest.mark.parametrize("name", ALL)
def test_hidden_to_hidden_is_the_dense_jacobian(name):
    _, state, _, _ = problem(name)
    _, (D, _, _), places = _dense(name)
    found = _found(name)
    for number, group in enumerate(_graph(name).groups):
        where = places[number]
        expected = D[where[:, :, None], where[:, None, :]]
        _close(found.hidden_to_hidden[number], expected)
        alone = group.diagonal_jacobian(group.concat(state), found.inputs[number])
        _close(alone, expected)


def _rolled(m, x, h):
    """Past max_slots, "same index" is all that joins: elementwise edges are cut."""
    h = jnp.tanh(m(x) + 0.5 * h + 0.3 * h * jnp.roll(h, 1))
    return h, h


def test_transition_holds_what_elementwise_neighbours_say():
    linear = eqx.nn.Linear(IN, N, key=KEY)
    x, h = jnp.ones(IN), jnp.linspace(-1, 1, N)
    graph = etrace.compile(linear, h, x, call=_rolled, max_slots=2)
    (group,) = graph.groups
    found = etrace.jacobians(graph, graph.params(linear), h, x)
    (inputs,) = found.inputs
    column = group.concat(h)
    _close(group.transition(column, inputs)[:, 0], _rolled(linear, x, h)[1], 1e-13)
    new = jnp.tanh(linear(x) + 0.5 * 2 * h + 0.3 * 2 * h * jnp.roll(h, 1))
    _close(group.transition(2 * column, inputs)[:, 0], new, 1e-13)
    new = _rolled(linear, x, h)[1]
    expected = (1 - new**2) * (0.5 + 0.3 * jnp.roll(h, 1))
    _close(found.hidden_to_hidden[0][:, 0, 0], expected)


def _shifted(m, x, h):
    """The first unit reads itself, the others their neighbour: an edge cut in part."""
    before = jnp.concatenate([h[:1], h[:-1]])
    h = jnp.tanh(m(x) + 0.5 * h + 0.3 * h * before)
    return h, h


def test_transition_holds_a_part_of_what_an_equation_reads():
    linear = eqx.nn.Linear(IN, N, key=KEY)
    x, h = jnp.ones(IN), jnp.linspace(-1, 1, N)
    graph = etrace.compile(linear, h, x, call=_shifted, max_slots=2)
    (group,) = graph.groups
    assert group.masked
    (inputs,) = etrace.jacobians(graph, graph.params(linear), h, x).inputs
    got = group.transition(2 * group.concat(h), inputs)[:, 0]
    before = jnp.concatenate([2 * h[:1], h[:-1]])
    _close(got, jnp.tanh(linear(x) + 0.5 * 2 * h + 0.3 * 2 * h * before), 1e-13)
    J = group.diagonal_jacobian(2 * group.concat(h), inputs)[:, 0, 0]
    own = 0.5 + 0.3 * before + jnp.where(jnp.arange(N) == 0, 0.3 * 2 * h, 0.0)
    _close(J, (1 - got**2) * own)


def _two_kinds(m, x, h):
    """One leaf, two groups: the second half has a partner, the first has none."""
    h, a = h
    y = m(x)
    half, inverse = N // 2, jnp.sin(h) / h
    free = jnp.tanh(y[:half] + inverse[:half])
    bound = jnp.tanh(y[half:] + inverse[half:] - a)
    return h, (jnp.concatenate([free, bound]), 0.5 * a + bound)


def test_groups_that_share_a_leaf():
    linear = eqx.nn.Linear(IN, N, key=KEY)
    x, state = jnp.ones(IN), (jnp.linspace(0.2, 1, N), jnp.linspace(0.1, 1, N // 2))
    graph = etrace.compile(linear, state, x, call=_two_kinds)
    assert sorted((g.units, g.slots) for g in graph.groups) == [(3, 1), (3, 2)]
    found = etrace.jacobians(graph, graph.params(linear), state, x)
    new = _two_kinds(linear, x, state)[1]
    for group, inputs, J in zip(
        graph.groups, found.inputs, found.hidden_to_hidden, strict=True
    ):
        h = group.concat(state)
        with jax.debug_nans(True):  # nothing stands in for the other group's elements
            got = group.transition(h, inputs)
        _close(got, group.concat(new), 1e-13)
        _close(group.diagonal_jacobian(h, inputs), J)


# Jacobians by the weights.


def _pull(name, seeds):
    """The derivative by params of seeds . new hidden state, through df and operands."""
    model, state, xs, _ = problem(name)
    graph, found = _graph(name), _found(name)
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
    dense, (_, F, _), places = _dense(name)
    keys = jax.random.split(KEY, len(places))
    seeds = [jax.random.normal(k, p.shape) for k, p in zip(keys, places, strict=True)]
    flat = jnp.zeros(len(F))
    for place, seed in zip(places, seeds, strict=True):
        flat = flat.at[place].set(seed)
    assert_same_gradient(_pull(name, seeds), dense.unravel(flat @ F))


def test_df_of_a_lif_with_current_by_hand():
    model, state, xs, _ = problem("lif")
    graph = _graph("lif")
    decay = jax.nn.sigmoid(model.layer.tau_v)
    membrane, current = state
    for relation, use in zip(
        graph.relations, _found("lif").hidden_to_weight, strict=True
    ):
        if relation.name in ("layer.w_in.weight", "layer.w_rec.weight"):
            at_membrane, at_current = use.df
            _close(at_current, np.ones(7))
            _close(at_membrane, 1 - decay)
        if relation.name == "layer.w_in.weight":
            _close(use.operands[0], xs[0])
        if relation.name == "layer.tau_g" and relation.y_shape == current.shape:
            assert any(np.allclose(op, current) for op in use.operands)


@pytest.mark.parametrize("name", ALL)
def test_out_and_state_are_those_of_the_model(name):
    model, state, xs, _ = problem(name)
    expected = model(xs[0], state)
    got = (_found(name).out, _found(name).state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        _close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["alif", "gru_lif"])
def test_a_batch_is_the_samples_side_by_side(name):
    case, (model, state, _, _) = MODELS[name], problem(name)
    states = jax.vmap(lambda k: random_state(k, state))(jax.random.split(KEY, BATCH))
    (x,), (t,) = sequence(KEY, case, 1, BATCH)
    batched = etrace.compile(model, states, x, batched=True)
    params, one = batched.params(model), _graph(name)

    got = quick_jit(etrace.jacobians)(batched, params, states, x)
    each = jax.vmap(functools.partial(etrace.jacobians, one, params))
    expected = quick_jit(each)(states, x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        _close(a, b, 1e-12)
    for group, inputs, J in zip(
        batched.groups, got.inputs, got.hidden_to_hidden, strict=True
    ):
        h = jax.vmap(group.concat)(states)
        _close(jax.vmap(group.diagonal_jacobian)(h, inputs), J, 1e-12)
        new = jax.vmap(group.transition)(h, inputs)
        _close(new, jax.vmap(group.concat)(got.state), 1e-12)

    got = quick_jit(etrace.learning_signal)(batched, params, states, x, t)
    signal = functools.partial(etrace.learning_signal, one, params)
    expected = quick_jit(jax.vmap(signal))(states, x, t)
    for a, b in zip(got, expected, strict=True):
        _close(a, b, 1e-12)


# The learning signal.


@functools.cache
def _signal(name):
    model, state, xs, ts = problem(name)
    graph, params = _graph(name), _graph(name).params(model)
    cotangent = jax.grad(sum_of_squares)(model(xs[0], state)[0], ts[0])
    run = quick_jit(functools.partial(etrace.learning_signal, graph))
    return run(params, state, xs[0], cotangent)


@pytest.mark.parametrize("name", ALL)
def test_learning_signal_is_the_dense_one(name):
    """For multi-step models too: by the new state it means the same."""
    model, state, xs, ts = problem(name)
    dense, (_, _, M), places = _dense(name)
    h = dense.flat(dense.leaves)

    def by_delta(delta):
        taps = dense.perturbed(delta, Taps())
        out, _ = dense.step(dense.p, h, dense.leaves, xs[0], taps)
        return sum_of_squares(out, ts[0])

    total = quick_jit(jax.grad(by_delta))(jnp.zeros_like(h))
    expected = np.linalg.solve((M * dense.same_unit).T, total)
    for got, place in zip(_signal(name), places, strict=True):
        _close(got, expected[place])


@pytest.mark.parametrize("name", ["alif", "lstm", "gru_lif"])
def test_signal_times_trace_is_the_gradient(name):
    model, state, xs, ts = problem(name)
    graph, params = _graph(name), _graph(name).params(model)
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
        signal = [relation.map.spread(v) for v in signals[relation.group].T]
        total[relation.ref] += graph.rule.gradient(relation, entries, signal)
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
    assert _graph("spike_before_hard_reset").vjp == "multi-step"
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


# Wrong arguments of groups.


def _lif_group():
    _, state, _, _ = problem("lif")
    (group,) = _graph("lif").groups
    return group, state, group.concat(state), _found("lif").inputs[0]


def test_wrong_states_of_a_group():
    group, (v, g), _, _ = _lif_group()
    with pytest.raises(ValueError, match=r"state\[1\]: got nothing, expected float64"):
        group.concat((v,))
    with pytest.raises(ValueError, match=r"state\[1\]: got float64\[2\].*jax.vmap"):
        group.concat((v, jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"state\[0\]: got float32"):
        group.concat((v.astype(jnp.float32), g))
    with pytest.raises(ValueError, match=r"state\[0\]: got float64\[3, 7\]"):
        group.concat((jnp.zeros((3, 7)), jnp.zeros((3, 7))))


def test_wrong_hidden_arrays_and_inputs():
    group, state, h, inputs = _lif_group()
    for call in (
        lambda h: group.split(h),
        lambda h: group.split(h, state),
        lambda h: group.transition(h, inputs),
        lambda h: group.diagonal_jacobian(h, inputs),
    ):
        with pytest.raises(ValueError, match=r"h: got float64\[2, 7\].*\(7, 2\)"):
            call(h.T)
    with pytest.raises(ValueError, match=r"inputs: got 1, expected .*jacobians"):
        group.transition(h, inputs[:1])
    wrong = [jnp.zeros(9), *inputs[1:]]
    with pytest.raises(ValueError, match=r"inputs\[0\]: got float64\[9\]"):
        group.diagonal_jacobian(h, wrong)


# Names and sizes.


@pytest.mark.parametrize("name", ["gru", "alif", "gru_lif"])
def test_names_of_inputs(name):
    graph, found = _graph(name), _found(name)
    for number, group in enumerate(graph.groups):
        names = graph.input_names(number)
        values = found.inputs[number]
        assert len(names) == len(group.input_specs) == len(values)
        for spec, value in zip(group.input_specs, values, strict=True):
            assert (spec.shape, spec.dtype) == (value.shape, value.dtype)
        assert all(names)
    if name == "gru":
        assert any("cell.bias_n" in name for name in graph.input_names(0))
        assert any("dot_general" in name for name in graph.input_names(0))


def test_attributes_of_relations():
    graph = _graph("gru")
    relation = next(r for r in graph.relations if r.name == "layer.cell.weight_hh")
    assert relation.weight == ("layer.cell.weight_hh",)
    assert relation.group == 0 and relation.slots == (0,)
    assert relation.weight_shape == relation.trace_shape == (21, 7)
    assert relation.y_shape == (21,)
    np.testing.assert_array_equal(relation.units, np.tile(np.arange(7), 3))
    assert relation.op.name == "dense" and "_rnn.py:" in relation.source


def test_units_of_a_relation_that_feeds_a_part():
    linear = eqx.nn.Linear(IN, N, key=KEY)
    state = (jnp.linspace(0.2, 1, N), jnp.linspace(0.1, 1, N // 2))
    graph = etrace.compile(linear, state, jnp.ones(IN), call=_two_kinds)
    found = {
        tuple(np.asarray(relation.units).tolist())
        for relation in graph.relations
        if relation.name == "weight"
    }
    assert found == {(0, 1, 2, -1, -1, -1), (-1, -1, -1, 0, 1, 2)}


def test_groups_and_relations_show_themselves():
    graph = _graph("lif")
    assert repr(graph.groups[0]) == (
        "HiddenGroup(7 units x 2 slots: state[0], state[1])"
    )
    text = repr(next(r for r in graph.relations if r.name == "layer.w_in.weight"))
    assert "layer.w_in.weight [7, 5] -> y [7] -> group 0" in text
    assert "dense trace [7, 5] on slots [1, 0]" in text
    assert ".py:" in text and len(text) < 200
