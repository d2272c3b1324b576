"""What the compiler accepts, how models are adapted to it, and what its errors say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_units import IN, KEY, N, Step, adaptive, compiled, make, rnn, sizes

import eqx_etrace as etrace
from eqx_etrace._compile import _check_arguments


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
    model = make(rnn)
    h, x = (jax.ShapeDtypeStruct((n,), jnp.float64) for n in (N, IN))
    graph = etrace.compile(model, h, x)
    assert sizes(graph) == [(N, 1)]


def test_trainable_selects_the_params():
    spec = jax.tree.map(lambda _: False, make(rnn))
    spec = eqx.tree_at(lambda m: m.u, spec, True)
    graph = compiled(rnn, jnp.zeros(N), trainable=spec)
    assert graph.param_leaves.paths == ("u",)
    params = graph.params(make(rnn))
    assert params.w is None and params.u is not None
    back = graph.model(params)
    assert eqx.tree_equal(back, make(rnn))


def test_graph_model_inverts_params():
    model = make(rnn)
    graph = compiled(rnn, jnp.zeros(N))
    assert eqx.tree_equal(graph.model(graph.params(model)), model)


def test_call_adapts_state_first_models():
    def state_first(h, x):
        h = jnp.tanh(model.w @ x + model.u @ h)
        return h, 2 * h

    model = make(None)

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
        rnn,
        jnp.zeros(N),
        {"trainable": lambda _: False},
        ["the params none", "trainable"],
    ),
    "only mixing paths": (_sorted, jnp.zeros(N), {}, ["mix units", "sort"]),
    "no state": (lambda m, x, s: (m.w @ x, s), None, {}, ["state leaves none"]),
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
    "a state that is no array": (rnn, "zero", {}, ["state", "`str`"]),
    "no batch axis": (
        rnn,
        jnp.zeros((3, N)),
        {"batched": True},
        ["3 in state", "4 in x"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_compile_errors_say_what_where_and_why(name):
    fun, state, options, words = ERRORS[name]
    model = make(fun)
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
        _check_arguments(etrace.DRTRL, "auto", 64, 16)
    with pytest.raises(ValueError, match="'auto', 'single-step' or 'multi-step'"):
        _check_arguments(etrace.DRTRL(), "both", 64, 16)
    with pytest.raises(ValueError, match="max_slots: got 0"):
        compiled(rnn, jnp.zeros(N), max_slots=0)


def test_calls_on_data_and_on_weights_alone_may_be_anything():
    def fun(m, x, h):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)
        u = jax.lax.scan(lambda u, _: (u / jnp.linalg.norm(u), None), m.u, None, 3)[0]
        h = jnp.tanh(m.w @ x + u @ h)
        return h, h

    graph = compiled(fun, jnp.zeros(N))
    assert {"w", "u"} == {path for r in graph.relations for path in r.weight}


def test_two_compiles_of_one_model_agree():
    first, second = (compiled(adaptive, _TWO) for _ in range(2))
    assert str(first.report()) == str(second.report())
    assert first.decisions == second.decisions


def test_what_is_stopped_is_no_weight():
    """A stop_gradient on the weight itself: no trace, no cut, said in the report."""

    def fun(m, x, h):
        h = jnp.tanh(m.w @ x + jax.lax.stop_gradient(m.u) @ h)
        return h, h

    graph = compiled(fun, jnp.zeros(N))
    assert {path for r in graph.relations for path in r.weight} == {"w"}
    assert "no gradient at all" in str(graph.explain(weight="u"))


def test_numbers_and_numpy_arrays_are_inputs_too():
    def fun(m, x, h):
        h = jnp.tanh(m.w @ x["drive"] + x["gain"] * (m.u @ h))
        return h, h

    model, h = make(fun), np.ones(N)
    x = {"drive": np.ones(IN), "gain": 0.5}
    graph = etrace.compile(model, h, x)
    params, trace = graph.params(model), etrace.init_trace(graph)

    def ours(params):
        return etrace.step(graph, params, h, trace, x)[0].sum()

    def plain(params):
        return graph.model(params)(jax.tree.map(jnp.asarray, x), h)[0].sum()

    got, expected = jax.grad(ours)(params), jax.grad(plain)(params)
    np.testing.assert_allclose(got.u, expected.u, rtol=1e-12)
