"""Hidden groups and relations as a user works with them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import assert_close, dense_of, graph_of, jacobians_of
from models import MODELS, random_state
from oracles import problem, quick_jit

import eqx_etrace as etrace


ALL = list(MODELS)
LOCAL = [name for name, case in MODELS.items() if case.oracle == "bptt"]
N, IN = 6, 4
KEY = jax.random.key(0)


# Slots of a state, side by side.


@pytest.mark.parametrize("name", ALL)
def test_every_hidden_element_is_in_one_column(name):
    dense, _, places = dense_of(name)
    found = np.concatenate([p.reshape(-1) for p in places])
    assert sorted(found) == list(range(dense.flat(dense.leaves).size))


@pytest.mark.parametrize("name", ALL)
def test_split_is_the_inverse_of_concat(name):
    _, state, _, _ = problem(name)
    for group in graph_of(name).groups:
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
    first, second = graph_of("gru_lif").groups
    new = second.split(second.concat(state) + 1, state)
    np.testing.assert_array_equal(new[0], state[0])
    np.testing.assert_array_equal(first.concat(new), first.concat(state))
    np.testing.assert_array_equal(new[1][0], state[1][0] + 1)


def test_concat_and_split_of_a_batch():
    _, state, _, _ = problem("lif_packed")
    (group,) = graph_of("lif_packed").groups
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
    for group, inputs in zip(
        graph_of(name).groups, jacobians_of(name).inputs, strict=True
    ):
        assert_close(
            group.transition(group.concat(state), inputs), group.concat(new), 1e-12
        )


@pytest.mark.parametrize("name", LOCAL)
def test_transition_of_another_state_is_the_step_where_recurrence_is_local(name):
    model, state, xs, _ = problem(name)
    other = random_state(jax.random.key(7), state)
    (group,), (inputs,) = graph_of(name).groups, jacobians_of(name).inputs
    got = group.transition(group.concat(other), inputs)
    assert_close(got, group.concat(model(xs[0], other)[1]), 1e-12)
    assert not np.allclose(got, group.concat(model(xs[0], state)[1]))


@pytest.mark.parametrize("name", ALL)
def test_transition_depends_on_the_own_unit_alone(name):
    """Values, not only derivatives: what is read through a cut is held."""
    _, state, _, _ = problem(name)
    for group, inputs in zip(
        graph_of(name).groups, jacobians_of(name).inputs, strict=True
    ):
        h = group.concat(state)
        moved = group.transition(h.at[1:].add(0.5), inputs)
        assert_close(moved[0], group.transition(h, inputs)[0], 1e-13)


@pytest.mark.parametrize("name", ALL)
def test_diagonal_jacobian_is_all_of_the_jacobian_of_transition(name):
    """At another state than the one that the inputs come from."""
    _, state, _, _ = problem(name)
    other = random_state(jax.random.key(3), state)
    for group, inputs in zip(
        graph_of(name).groups, jacobians_of(name).inputs, strict=True
    ):
        h = group.concat(other)
        full = quick_jit(jax.jacrev(group.transition))(h, inputs)
        got = eqx.filter_jit(group.diagonal_jacobian)(h, inputs)
        assert got.shape == (group.units, group.slots, group.slots)
        eye = jnp.eye(group.units)[:, None, :, None]
        assert_close(full, eye * got[:, :, None, :])


@pytest.mark.parametrize("name", ALL)
def test_hidden_to_hidden_is_the_dense_jacobian(name):
    _, state, _, _ = problem(name)
    _, (D, _, _), places = dense_of(name)
    found = jacobians_of(name)
    for number, group in enumerate(graph_of(name).groups):
        where = places[number]
        expected = D[where[:, :, None], where[:, None, :]]
        assert_close(found.hidden_to_hidden[number], expected)
        alone = group.diagonal_jacobian(group.concat(state), found.inputs[number])
        assert_close(alone, expected)


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
    assert_close(
        group.transition(column, inputs)[:, 0], _rolled(linear, x, h)[1], 1e-13
    )
    new = jnp.tanh(linear(x) + 0.5 * 2 * h + 0.3 * 2 * h * jnp.roll(h, 1))
    assert_close(group.transition(2 * column, inputs)[:, 0], new, 1e-13)
    new = _rolled(linear, x, h)[1]
    expected = (1 - new**2) * (0.5 + 0.3 * jnp.roll(h, 1))
    assert_close(found.hidden_to_hidden[0][:, 0, 0], expected)


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
    assert_close(got, jnp.tanh(linear(x) + 0.5 * 2 * h + 0.3 * 2 * h * before), 1e-13)
    J = group.diagonal_jacobian(2 * group.concat(h), inputs)[:, 0, 0]
    own = 0.5 + 0.3 * before + jnp.where(jnp.arange(N) == 0, 0.3 * 2 * h, 0.0)
    assert_close(J, (1 - got**2) * own)


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
        assert_close(got, group.concat(new), 1e-13)
        assert_close(group.diagonal_jacobian(h, inputs), J)


# Wrong arguments of groups.


def _lif_group():
    _, state, _, _ = problem("lif")
    (group,) = graph_of("lif").groups
    return group, state, group.concat(state), jacobians_of("lif").inputs[0]


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
    graph, found = graph_of(name), jacobians_of(name)
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
    graph = graph_of("gru")
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
    graph = graph_of("lif")
    assert repr(graph.groups[0]) == (
        "HiddenGroup(7 units x 2 slots: state[0], state[1])"
    )
    text = repr(next(r for r in graph.relations if r.name == "layer.w_in.weight"))
    assert "layer.w_in.weight [7, 5] -> y [7] -> group 0" in text
    assert "dense trace [7, 5] on slots [1, 0]" in text
    assert ".py:" in text and len(text) < 200
