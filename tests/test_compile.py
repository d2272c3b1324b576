"""What the compiler finds: hidden leaves, units, groups, relations, and its errors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike

import eqx_etrace as etrace
from eqx_etrace._graph import _check_arguments


N, IN = 6, 4
KEY = jax.random.key(0)


class Step(eqx.Module):
    """Wraps a function of (weights, x, state) as a model."""

    w: jax.Array
    u: jax.Array
    fun: Any = eqx.field(static=True)

    def __call__(self, x, state):
        return self.fun(self, x, state)


def _model(fun, shape=(N, N)):
    keys = jax.random.split(KEY)
    return Step(
        0.3 * jax.random.normal(keys[0], (shape[0], IN)),
        0.3 * jax.random.normal(keys[1], shape),
        fun,
    )


def _compile(fun, state, **options):
    return etrace.compile(_model(fun), state, jnp.zeros(IN), **options)


def _units(graph):
    return [(group.units, group.slots) for group in graph.groups]


def _rnn(m, x, h):
    h = jnp.tanh(m.w @ x + m.u @ h)
    return h, h


def _counted(m, x, state):
    h, count, key, filtered = state
    filtered = 0.5 * filtered + x
    h = jnp.tanh(m.w @ filtered + m.u @ h)
    return h, (h, count + 1, key, filtered)


def _adaptive(m, x, state):
    v, a = state["v"], state["a"]
    z = spike(v - a)
    v = 0.9 * v + m.w @ x + m.u @ z
    return z, {"v": v, "a": 0.8 * a + z}


def _packed(m, x, h):
    v, g = jnp.split(h, 2)
    g = 0.5 * g + m.w @ x + m.u @ jnp.tanh(v)
    v = 0.9 * v + g
    return v, jnp.concatenate([v, g])


def _compartments(m, x, h):
    """[n, 3]: three coupled compartments a neuron."""
    coupling = jnp.array([[0.8, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.1, 0.8]])
    drive = m.w @ x + m.u @ h[:, 2]
    h = h @ coupling + drive[:, None] * jnp.eye(3)[:1]
    return h[:, 2], h


def _reversed(m, x, state):
    """Unit i of one leaf goes with element n - 1 - i of the other."""
    v, g = state
    g = 0.5 * g + m.w @ x + m.u @ v
    v = jnp.tanh(v + g[::-1])
    return v, (v, g)


def _mean_coupled(m, x, h):
    h = jnp.tanh(m.w @ x + m.u @ h + 0.1 * h.mean())
    return h, h


def _rolled(m, x, h):
    h = jnp.tanh(m.w @ x + 0.5 * h + 0.1 * jnp.roll(h, 1))
    return h, h


# name: (step, state, [(units, slots)], hidden leaves)
STRUCTURES = {
    "rnn": (_rnn, jnp.zeros(N), [(N, 1)], ["state"]),
    "carried along": (
        _counted,
        (jnp.zeros(N), jnp.zeros((), int), jax.random.key(1), jnp.zeros(IN)),
        [(N, 1)],
        ["state[0]"],
    ),
    "two slots": (
        _adaptive,
        {"v": jnp.zeros(N), "a": jnp.zeros(N)},
        [(N, 2)],
        ["state['a']", "state['v']"],
    ),
    "halves of one leaf": (_packed, jnp.zeros(2 * N), [(N, 2)], ["state", "state"]),
    "compartments": (
        _compartments,
        jnp.zeros((N, 3)),
        [(N, 3)],
        ["state", "state", "state"],
    ),
    "reversed": (
        _reversed,
        (jnp.zeros(N), jnp.zeros(N)),
        [(N, 2)],
        ["state[0]", "state[1]"],
    ),
    "mean within max_slots": (_mean_coupled, jnp.zeros(N), [(1, N)], ["state"] * N),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_units_and_slots(name):
    fun, state, units, leaves = STRUCTURES[name]
    graph = _compile(fun, state)
    assert _units(graph) == units
    assert list(graph.groups[0].leaves) == leaves


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_step_equals_autodiff(name):
    fun, state, _, _ = STRUCTURES[name]
    model = _model(fun)
    graph = etrace.compile(model, state, jnp.zeros(IN))
    state = jax.tree.map(
        lambda a: a + 0.7 if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )
    x = jax.random.normal(KEY, (IN,))

    def ours(params):
        out, _, _ = etrace.step(graph, params, state, etrace.init_trace(graph), x)
        return jnp.sum(jnp.sin(out))

    def plain(params):
        return jnp.sum(jnp.sin(graph.model(params)(x, state)[0]))

    params = graph.params(model)
    got, expected = jax.grad(ours)(params), jax.grad(plain)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fun", [_mean_coupled, _rolled])
def test_joins_beyond_max_slots_are_undone_and_reported(fun):
    graph = _compile(fun, jnp.zeros(N), max_slots=2)
    assert _units(graph) == [(N, 1)]
    cuts = [d for d in graph.decisions if d.kind is etrace.Kind.CUT]
    assert any("a coupling" in decision.reason for decision in cuts)


def test_a_roll_keeps_the_credit_of_the_own_past():
    """Past max_slots, D is the factor of the unit's own state, not a column sum."""
    graph = _compile(_rolled, jnp.zeros(N), max_slots=2)
    model = _model(_rolled)
    params, x = graph.params(model), jnp.ones(IN)
    state, trace = jnp.linspace(-1.0, 1.0, N), etrace.init_trace(graph)
    trace = jax.tree.map(jnp.ones_like, trace)
    _, new, moved = etrace.step(graph, params, state, trace, x)
    slope = 1 - new**2
    (got,) = moved[0]
    np.testing.assert_allclose(got, (0.5 * slope + slope)[:, None] * np.ones((N, IN)))


def test_readouts_have_no_trace_and_no_group():
    class Net(eqx.Module):
        cell: eqx.nn.GRUCell
        readout: eqx.nn.Linear

        def __call__(self, x, h):
            h = self.cell(x, h)
            return self.readout(h), h

    net = Net(eqx.nn.GRUCell(IN, N, key=KEY), eqx.nn.Linear(N, 2, key=KEY))
    graph = etrace.compile(net, jnp.zeros(N), jnp.zeros(IN))
    traced = {path for relation in graph.relations for path in relation.weight}
    cell = {"cell.weight_ih", "cell.weight_hh", "cell.bias", "cell.bias_n"}
    assert traced == cell
    assert graph.vjp == "single-step"


def test_shape_structs_compile():
    model = _model(_rnn)
    h, x = (jax.ShapeDtypeStruct((n,), jnp.float64) for n in (N, IN))
    graph = etrace.compile(model, h, x)
    assert _units(graph) == [(N, 1)]


def test_trainable_selects_the_params():
    spec = jax.tree.map(lambda _: False, _model(_rnn))
    spec = eqx.tree_at(lambda m: m.u, spec, True)
    graph = _compile(_rnn, jnp.zeros(N), trainable=spec)
    assert graph.param_leaves.paths == ("u",)
    params = graph.params(_model(_rnn))
    assert params.w is None and params.u is not None
    back = graph.model(params)
    assert eqx.tree_equal(back, _model(_rnn))


def test_graph_model_inverts_params():
    model = _model(_rnn)
    graph = _compile(_rnn, jnp.zeros(N))
    assert eqx.tree_equal(graph.model(graph.params(model)), model)


def test_call_adapts_state_first_models():
    def state_first(h, x):
        h = jnp.tanh(model.w @ x + model.u @ h)
        return h, 2 * h

    model = _model(None)

    class StateFirst(eqx.Module):
        inner: Step

        def __call__(self, h, x):
            h = jnp.tanh(self.inner.w @ x + self.inner.u @ h)
            return h, 2 * h

    def call(model, x, state):
        state, out = model(state, x)
        return out, state

    net = StateFirst(model)
    graph = etrace.compile(net, jnp.zeros(N), jnp.zeros(IN), call=call)
    x, h = jnp.ones(IN), jnp.ones(N)
    out, new, _ = etrace.step(graph, graph.params(net), h, etrace.init_trace(graph), x)
    np.testing.assert_allclose(new, state_first(h, x)[0], rtol=1e-14)
    np.testing.assert_allclose(out, 2 * new, rtol=1e-14)


def test_call_adapts_cells_that_return_only_the_state():
    cell = eqx.nn.GRUCell(IN, N, key=KEY)

    def call(cell, x, h):
        h = cell(x, h)
        return h, h

    graph = etrace.compile(cell, jnp.zeros(N), jnp.zeros(IN), call=call)
    x, h = jnp.ones(IN), jnp.ones(N)
    out, new, _ = etrace.step(graph, graph.params(cell), h, etrace.init_trace(graph), x)
    np.testing.assert_allclose(new, cell(x, h), rtol=1e-14)
    np.testing.assert_array_equal(out, new)


# -- errors: (step, state, options, what the message must say) -----------------------


def _extra_leaf(m, x, h):
    h = jnp.tanh(m.w @ x + m.u @ h)
    return h, (h, h)


def _wrong_shape(m, x, state):
    v, a = state["v"], state["a"]
    return v, {"v": (0.5 * v + m.w @ x)[:-1], "a": a}


def _wrong_dtype(m, x, h):
    return h, (h + m.w @ x).astype(jnp.float32)


def _only_state(m, x, h):
    return jnp.tanh(m.w @ x + m.u @ h)


def _swapped(m, x, state):
    v = jnp.tanh(m.w @ x + m.u @ state[0])
    return (v,), v


def _no_memory(m, x, h):
    return m.w @ x, 0.5 * h


def _detached(m, x, h):
    h = 0.5 * h + jax.lax.stop_gradient(m.w @ x)
    return h, h


def _hard_threshold(m, x, h):
    h = 0.5 * h + (m.w @ x > 0).astype(h.dtype)
    return h, h


def _sorted(m, x, h):
    h = 0.5 * h + jnp.sort(m.w @ x)
    return h, h


def _looped(m, x, h):
    h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(m.w @ x + m.u @ h), h)
    return h, h


def _branched(m, x, h):
    h = jax.lax.cond(x[0] > 0, lambda h: m.u @ h, lambda h: h, h)
    return h, h


def _unknown(m, x, h):
    h = jax.lax.custom_linear_solve(
        lambda v: v + 0.1 * (m.u @ v), h, lambda f, b: b, lambda f, b: b
    )
    return h, h


_TWO = {"v": jnp.zeros(N), "a": jnp.zeros(N)}
ERRORS = {
    "another structure": (_extra_leaf, jnp.zeros(N), {}, ["another state", "state[0]"]),
    "another shape": (
        _wrong_shape,
        _TWO,
        {},
        ["state['v']", f"float64[{N - 1}]", f"float64[{N}]"],
    ),
    "another dtype": (_wrong_dtype, jnp.zeros(N), {}, ["float32[6]", "float64[6]"]),
    "no pair": (_only_state, jnp.zeros(N), {}, ["(out, state)", "call="]),
    "the pair swapped": (_swapped, (jnp.zeros(N),), {}, ["(out, state)", "state[0]"]),
    "no weight reaches the state": (_no_memory, jnp.zeros(N), {}, ["w, u", "state"]),
    "stop_gradient between": (_detached, jnp.zeros(N), {}, ["stop_gradient"]),
    "no surrogate": (_hard_threshold, jnp.zeros(N), {}, ["surrogate"]),
    "nothing trainable": (
        _rnn,
        jnp.zeros(N),
        {"trainable": lambda _: False},
        ["the params none", "trainable"],
    ),
    "only mixing paths": (_sorted, jnp.zeros(N), {}, ["mix units", "sort"]),
    "no state": (lambda m, x, s: (m.w @ x, s), None, {}, ["state leaves none"]),
    "a loop": (_looped, jnp.zeros(N), {}, ["control flow", "test_compile.py:"]),
    "a branch": (_branched, jnp.zeros(N), {}, ["`cond`", "test_compile.py:"]),
    "an unknown call": (_unknown, jnp.zeros(N), {}, ["does not know", "test_compile"]),
    "too many slots": (
        lambda m, x, s: (s, (jnp.tanh(m.w @ x + s[0] + s[1] + s[2]),) * 3),
        (jnp.zeros(N),) * 3,
        {"max_slots": 2},
        ["3 state variables", "max_slots=3"],
    ),
    "integers selected": (
        lambda m, x, h: (h, jnp.tanh(m.w @ x)),
        jnp.zeros(N),
        {"trainable": lambda leaf: True},
        ["fun", "floating-point"],
    ),
    "a state that is no array": (_rnn, "zero", {}, ["state", "`str`"]),
    "no batch axis": (
        _rnn,
        jnp.zeros((3, N)),
        {"batched": True},
        ["3 in state", "4 in x"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_compile_errors_say_what_where_and_why(name):
    fun, state, options, words = ERRORS[name]
    model = _model(fun)
    if name == "integers selected":
        model = (model.w, "a string")

        def call(model, x, h):
            return h, jnp.tanh(model[0] @ x)

        options, words = options | {"call": call}, ["[1]", "`str`", "floating-point"]
    with pytest.raises(etrace.CompileError) as info:
        etrace.compile(model, state, jnp.zeros(IN), **options)
    for word in words:
        assert word in str(info.value)


def test_wrong_arguments_of_compile():
    """Without the type checks of the tests, which would answer first."""
    with pytest.raises(TypeError, match="expected a learning rule"):
        _check_arguments(etrace.DRTRL, "auto", 16)
    with pytest.raises(ValueError, match="'auto', 'single-step' or 'multi-step'"):
        _check_arguments(etrace.DRTRL(), "both", 16)
    with pytest.raises(ValueError, match="max_slots: got 0"):
        _compile(_rnn, jnp.zeros(N), max_slots=0)


def test_calls_on_data_and_on_weights_alone_may_be_anything():
    def fun(m, x, h):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)
        u = jax.lax.scan(lambda u, _: (u / jnp.linalg.norm(u), None), m.u, None, 3)[0]
        h = jnp.tanh(m.w @ x + u @ h)
        return h, h

    graph = _compile(fun, jnp.zeros(N))
    assert {"w", "u"} == {path for r in graph.relations for path in r.weight}


def test_two_compiles_of_one_model_agree():
    first, second = (_compile(_adaptive, _TWO) for _ in range(2))
    assert str(first.report()) == str(second.report())
    assert first.decisions == second.decisions


def test_what_is_stopped_is_no_weight():
    """A stop_gradient on the weight itself: no trace, no cut, said in the report."""

    def fun(m, x, h):
        h = jnp.tanh(m.w @ x + jax.lax.stop_gradient(m.u) @ h)
        return h, h

    graph = _compile(fun, jnp.zeros(N))
    assert {path for r in graph.relations for path in r.weight} == {"w"}
    assert "no gradient at all" in str(graph.explain(weight="u"))


@pytest.mark.parametrize("what", ["state", "weight"])
def test_complex_numbers_are_refused(what):
    def fun(m, x, h):
        if what == "state":
            h = 0.9j * h + m.w @ x
        else:
            h = 0.9 * h + jnp.real(jax.lax.complex(m.w, m.w) @ x)
        return jnp.abs(h), h

    dtype = jnp.complex128 if what == "state" else jnp.float64
    with pytest.raises(etrace.CompileError, match="expected real numbers"):
        with jax.numpy_dtype_promotion("standard"):
            _compile(fun, jnp.zeros(N, dtype))


def test_numbers_and_numpy_arrays_are_inputs_too():
    def fun(m, x, h):
        h = jnp.tanh(m.w @ x["drive"] + x["gain"] * (m.u @ h))
        return h, h

    model, h = _model(fun), np.ones(N)
    x = {"drive": np.ones(IN), "gain": 0.5}
    graph = etrace.compile(model, h, x)
    params, trace = graph.params(model), etrace.init_trace(graph)

    def ours(params):
        return etrace.step(graph, params, h, trace, x)[0].sum()

    def plain(params):
        return graph.model(params)(jax.tree.map(jnp.asarray, x), h)[0].sum()

    got, expected = jax.grad(ours)(params), jax.grad(plain)(params)
    np.testing.assert_allclose(got.u, expected.u, rtol=1e-12)
