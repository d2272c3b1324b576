"""Rules that are a choice of parts, against their formulas."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike
from oracles import assert_same_gradient, online, quick_jit
from windows import assert_same, by_steps, differ, of_catalogue, of_models, squares

import eqx_etrace as etrace


N, IN, OUT, STEPS = 5, 4, 3, 20
LEAK, SLOW, DECAY = 0.6, 0.8, 0.7


class Rate(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        h = LEAK * h + (1 - LEAK) * jnp.tanh(self.w @ x + self.u @ h)
        return self.out @ h, h


class LIF(eqx.Module):
    """Without a current: the state is the membrane."""

    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, v):
        v = LEAK * v + self.w @ x + self.u @ spike(v - 1)
        return self.out @ spike(v - 1), v


def _problem(model, rule):
    rng = np.random.default_rng(0)
    shapes = {"w": (N, IN), "u": (N, N), "out": (OUT, N)}
    plain = {name: rng.normal(0.0, 0.8, shape) for name, shape in shapes.items()}
    net = model(**{name: jnp.asarray(value) for name, value in plain.items()})
    h, xs, ts = (rng.normal(size=s) for s in ((N,), (STEPS, IN), (STEPS, OUT)))
    data = tuple(map(jnp.asarray, (h, xs, ts)))
    graph = etrace.compile(net, data[0], data[1][0], rule=rule)
    return graph, (graph.params(net), *data), (plain, h, xs, ts)


def _slope(v):
    return np.asarray(jax.vmap(jax.grad(spike))(jnp.asarray(v - 1)))


def _filtered(plain, h, xs, ts, model, of_x, of_df):
    """The gradient of a trace (df) x with x and df filtered, or their product."""
    total = {name: np.zeros_like(value) for name, value in plain.items()}
    w, u, out = plain.values()
    trace = {"w": np.zeros_like(w), "u": np.zeros_like(u)}
    inputs = {"w": np.zeros(IN), "u": np.zeros(N)}
    for x, t in zip(xs, ts, strict=True):
        fed = h if model is Rate else np.asarray(spike(jnp.asarray(h - 1)))
        drive = w @ x + u @ fed
        if model is Rate:
            h = LEAK * h + (1 - LEAK) * np.tanh(drive)
            df, z, slope = (1 - LEAK) * (1 - np.tanh(drive) ** 2), h, np.ones(N)
        else:
            h = LEAK * h + drive
            df, slope = np.ones(N), _slope(h)
            z = np.asarray(spike(jnp.asarray(h - 1)))
        error = 2 * (out @ z - t)
        total["out"] += np.outer(error, z)
        signal = slope * (out.T @ error)
        for name, value in (("w", x), ("u", fed)):
            inputs[name] = of_x * inputs[name] + value
            trace[name] = of_df * trace[name] + np.outer(df, inputs[name])
            total[name] += signal[:, None] * trace[name]
    return total


RULES = {
    "immediate": (etrace.Immediate(), 0.0, 0.0),
    "scalar leak": (etrace.DRTRL(recursion=DECAY), 0.0, DECAY),
    "ostl": (etrace.OSTL(), 0.0, LEAK),
    "ottt": (etrace.OTTT(DECAY), DECAY, 0.0),
}


@pytest.mark.parametrize("model", [Rate, LIF])
@pytest.mark.parametrize("name", RULES)
def test_the_gradient_is_that_of_the_formula(name, model):
    rule, of_x, of_df = RULES[name]
    graph, args, plain = _problem(model, rule)
    got = quick_jit(functools.partial(online, graph, loss=squares))(*args)
    expected = _filtered(*plain, model, of_x, of_df)
    assert_same_gradient({k: getattr(got, k) for k in expected}, expected, rtol=1e-10)


def test_a_weight_of_a_unit_on_itself_counts_where_asked():
    """OSTL with its recurrent term: D is the whole derivative of a unit by itself."""
    graph, args, (plain, h, xs, ts) = _problem(Rate, etrace.OSTL(recurrent=True))
    got = quick_jit(functools.partial(online, graph, loss=squares))(*args)
    w, u, out = plain.values()
    trace, total = np.zeros((N, IN)), np.zeros((N, IN))
    for x, t in zip(xs, ts, strict=True):
        drive = w @ x + u @ h
        h = LEAK * h + (1 - LEAK) * np.tanh(drive)
        df = (1 - LEAK) * (1 - np.tanh(drive) ** 2)
        trace = (LEAK + df * np.diag(u))[:, None] * trace + np.outer(df, x)
        total += (out.T @ (2 * (out @ h - t)))[:, None] * trace
    assert_same_gradient({"w": got.w}, {"w": total}, rtol=1e-10)


MODELS = ["gru", "lstm", "lif", "gru_lif"]


@pytest.mark.parametrize("name", MODELS)
def test_the_current_step_by_itself(name):
    """`Immediate` is backpropagation that stops at the state of the step before."""
    graph, params, state, xs, ts = of_models(name, etrace.Immediate(), 6)

    def of_the_step(params):
        def body(state, now):
            out, state = graph.model(params)(now[0], jax.lax.stop_gradient(state))
            return state, squares(out, now[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ts))[1])

    expected = quick_jit(jax.grad(of_the_step))(params)
    run = quick_jit(etrace.value_and_grad(graph, squares))
    assert_same_gradient(run(params, state, None, xs, ts)[1], expected)
    other, *_ = of_models(name, etrace.DRTRL(), 6)
    run = quick_jit(etrace.value_and_grad(other, squares))
    assert differ(run(params, state, None, xs, ts)[1], expected)


@pytest.mark.parametrize("rule", [etrace.Immediate(), etrace.DRTRL(recursion=0.7)])
@pytest.mark.parametrize("name", ["lif", "hard_reset", "conv2d_recurrent", "two_uses"])
def test_windows_equal_their_steps(name, rule):
    graph, params, state, xs, ts = of_catalogue(name, rule)
    args = params, state, None, xs, ts
    run = quick_jit(etrace.value_and_grad(graph, squares, window=4))
    assert_same(
        run(*args), quick_jit(functools.partial(by_steps, graph, squares))(*args)
    )


def test_without_a_past_there_are_no_large_traces():
    graph, *_ = of_models("lif", etrace.Immediate(), 2)
    other, *_ = of_models("lif", etrace.DRTRL(recursion=0.7), 2)
    # A gain for each unit is as small as what is kept instead.
    products = [r for r in graph.relations if len(r.weight_shape) == 2]
    assert products and not any(relation.array_slots for relation in products)
    # A leak that all units have in common leaves a filtered input.
    products = [r for r in other.relations if len(r.weight_shape) == 2]
    assert products and all(all(r.alike) for r in products if r.reached == r.slots)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"recursion": 1.5}, "recursion: got 1.5, expected 'jacobian' or a number"),
        ({"recursion": -0.1}, "recursion: got -0.1, expected 'jacobian' or a number"),
        ({"recursion": 0.5, "scope": "unit"}, "scope: got 'unit' beside recursion=0.5"),
    ],
)
def test_bad_recursions_get_a_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        etrace.DRTRL(**options)


def test_the_scope_comes_first():
    assert etrace.DRTRL("unit") == etrace.DRTRL(scope="unit") != etrace.DRTRL()
    assert etrace.ESDRTRL(0.9, "unit") == etrace.ESDRTRL(decay=0.9, scope="unit")
