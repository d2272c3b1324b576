"""Sequences that do not fit: a sentence that names the argument and both shapes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from windows import chain, each_square, squares

import eqx_etrace as etrace
from eqx_etrace._drive import check_window


T, B = 5, 3
BATCHED = chain(2, T, B)
SINGLE = chain(2, T)
SGD = optax.sgd(0.1)


def _value_and_grad(*given, made=SINGLE, loss_fn=squares, options=(), **changes):
    """The call, with some of its arguments changed."""
    graph, params, state, xs, ts = made
    args = {"params": params, "state": state, "trace": None, "xs": xs, "targets": ts}
    args |= {k: v(args.get(k)) if callable(v) else v for k, v in changes.items()}

    def run():
        return etrace.value_and_grad(graph, loss_fn, **dict(options))(**args)

    return run


def _learn(*, made=SINGLE, every=1, **changes):
    graph, params, state, xs, ts = made
    args = {"params": params, "state": state, "trace": None, "xs": xs, "targets": ts}
    args |= {"opt_state": SGD.init(params)} | changes
    return lambda: etrace.learn(graph, squares, SGD, every=every)(**args)


def _of_window(fun, **changes):
    graph, params, state, xs, _ = SINGLE
    args = {"params": params, "state": state, "xs": xs}
    args |= {"trace": etrace.init_trace(graph)} | changes
    return lambda: fun(graph, **args)


def _other_trace():
    return etrace.init_trace(chain(3, 1)[0])


def _shorter_trace():
    return jax.tree.map(lambda a: a[:-1], etrace.init_trace(SINGLE[0]))


class _Two(eqx.Module):
    w: jax.Array

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x["a"] + x["b"] - 0.5 * h)
        return h, h


def _two(**xs):
    net, x = _Two(jnp.ones((4, 3))), {"a": jnp.ones(3), "b": jnp.ones(4)}
    graph = etrace.compile(net, jnp.zeros(4), x)
    made = graph, graph.params(net), jnp.zeros(4), xs, jnp.ones((T, 4))
    return _value_and_grad(made=made)


a, b = jnp.ones((T, 3)), jnp.ones((T, 4))
one = etrace.SingleStepData
window = "expected an integer of at least 1"
of_window = {"options": {"window": 3}}

# name: (call, parts of the sentence)
WRONG = {
    "window of 0": (
        _value_and_grad(options={"window": 0}),
        ["window: got 0, expected an integer of at least 1. It counts steps."],
    ),
    "window below 0": (_value_and_grad(options={"window": -2}), ["got -2", window]),
    "every 0": (_learn(every=0), ["every: got 0, " + window]),
    "targets too short": (
        _value_and_grad(targets=lambda t: t[:-1]),
        ["targets: got float64[4, 3], expected 5 steps in front."],
    ),
    "one of the targets too long": (
        _value_and_grad(targets=lambda t: {"y": (t, jnp.ones(6))}),
        ["targets['y'][1]: got float64[6], expected 5 steps in front."],
    ),
    "targets without time": (
        _value_and_grad(targets=1.0),
        ["targets: got", "expected an axis of steps. Put time in front"],
    ),
    "no steps": (
        _value_and_grad(xs=lambda xs: xs[:0], targets=lambda t: t[:0]),
        ["xs: got 0 steps, expected at least one."],
    ),
    "inputs without time": (
        _value_and_grad(xs=lambda xs: xs[0]),
        ["xs: got float64[5], expected float64[5, 5]."],
    ),
    "inputs of another size": (
        _value_and_grad(xs=lambda xs: xs[:, :-1]),
        ["xs: got float64[5, 4], expected float64[5, 5].", "have the steps of xs"],
    ),
    "inputs of another dtype": (
        _value_and_grad(xs=lambda xs: xs.astype("float32")),
        ["xs: got float32[5, 5], expected float64[5, 5]."],
    ),
    "inputs without a batch": (
        _value_and_grad(made=BATCHED, xs=lambda xs: xs[:, 0]),
        ["xs: got float64[5, 5], expected float64[5, 3, 5]."],
    ),
    "batch first": (
        _value_and_grad(made=BATCHED, xs=lambda xs: xs.swapaxes(0, 1)),
        ["xs: got float64[3, 5, 5], expected float64[3, 3, 5]."],
    ),
    "inputs of several lengths": (
        _two(a=a, b=b[:-1]),
        ["xs['b']: got float64[4, 4], expected float64[5, 4].", "of xs['a'] in front"],
    ),
    "an input without time": (
        _two(a=a, b=b[0]),
        ["xs['b']: got float64[4], expected float64[5, 4].", "`SingleStepData`"],
    ),
    "a single input with time": (
        _two(a=a, b=one(b)),
        ["xs['b']: got float64[5, 4], expected float64[4]."],
    ),
    "an input missing": (_two(a=a), ["xs: got PyTreeDef", "expected PyTreeDef"]),
    "an input too many": (
        _two(a=a, b=b, c=b),
        ["xs: got PyTreeDef", "'c'", "expected PyTreeDef"],
    ),
    "nothing moves": (
        _of_window(etrace.evolve, xs=one(jnp.ones(5))),
        ["xs: got no leaf with a time axis, expected at least one."],
    ),
    "mask too short": (
        _value_and_grad(mask=jnp.ones(4)),
        ["mask: got float64[4], expected the shape (5,). One entry for each step."],
    ),
    "mask of lanes, one loss": (
        _value_and_grad(made=BATCHED, mask=jnp.ones((T, B))),
        ["mask: got float64[5, 3], expected the shape (5,)."],
    ),
    "mask of too many lanes": (
        _value_and_grad(made=BATCHED, loss_fn=each_square, mask=jnp.ones((T, 4))),
        ["mask: got float64[5, 4], expected the shape (5,) or the shape (5, 3)."],
    ),
    "mask, batch first": (
        _value_and_grad(made=BATCHED, loss_fn=each_square, mask=jnp.ones((B, T))),
        ["mask: got float64[3, 5], expected the shape (5,) or the shape (5, 3)."],
    ),
    "mask of complex numbers": (
        _value_and_grad(mask=jnp.ones(T, complex)),
        ["mask: got complex128[5], expected a real mask."],
    ),
    "mask of no array": (_value_and_grad(mask="all"), ["mask: got", "shape (5,)"]),
    "reset too long": (
        _value_and_grad(reset=jnp.ones(6, bool)),
        ["reset: got bool[6], expected the shape (5,)."],
    ),
    "reset of too many lanes": (
        _value_and_grad(made=BATCHED, reset=jnp.ones((T, 4), bool)),
        ["reset: got bool[5, 4], expected the shape (5,) or the shape (5, 3)."],
    ),
    "initial state of one lane": (
        _value_and_grad(
            made=BATCHED, reset=jnp.ones(T, bool), initial=(jnp.ones(6), jnp.ones(6))
        ),
        ["[0]: got float64[6], expected float64[3, 6]."],
    ),
    "loss of each output": (
        _value_and_grad(loss_fn=lambda out, t: (out - t) ** 2),
        ["loss_fn: got float64[3], expected float[]. Return a scalar loss"],
    ),
    "loss of each output, batched": (
        _value_and_grad(made=BATCHED, loss_fn=lambda out, t: (out - t) ** 2),
        ["loss_fn: got float64[3, 3], expected float[] or float[3].", "per sample"],
    ),
    "loss of integers": (
        _value_and_grad(loss_fn=lambda out, t: jnp.argmax(out)),
        ["loss_fn: got int64[], expected float[]."],
    ),
    "loss of complex numbers": (
        _value_and_grad(loss_fn=lambda out, t: jnp.sum(out).astype(complex)),
        ["loss_fn: got complex128[], expected float[]."],
    ),
    "a pair without has_aux": (
        _value_and_grad(loss_fn=lambda out, t: (squares(out, t), out)),
        ["loss_fn: got", "expected float[]."],
    ),
    "has_aux without a pair": (
        _value_and_grad(options={"has_aux": True}),
        ["loss_fn: got ShapeDtypeStruct, expected a pair (loss, aux)", "`has_aux`."],
    ),
    "state of one lane": (
        _value_and_grad(made=BATCHED, state=lambda s: jax.tree.map(lambda a: a[0], s)),
        ["state[0]: got float64[6], expected float64[3, 6]."],
    ),
    "params of another size": (
        _value_and_grad(params=lambda p: jax.tree.map(lambda a: a[1:], p)),
        ["w: got float64[5, 5], expected float64[6, 5]."],
    ),
    "trace of another graph": (
        _value_and_grad(trace=_other_trace()),
        ["trace: got PyTreeDef", "expected PyTreeDef", "`init_trace(graph)`"],
    ),
    "trace of another size": (
        _value_and_grad(trace=_shorter_trace()),
        ["trace[0] of w: got float64[5, 5], expected float64[6, 5]."],
    ),
    "steps: trace of another size": (
        _of_window(etrace.steps, trace=_shorter_trace()),
        ["trace[0] of w: got float64[5, 5], expected float64[6, 5]."],
    ),
    "evolve: trace of another graph": (
        _of_window(etrace.evolve, trace=_other_trace()),
        ["trace: got PyTreeDef"],
    ),
    "steps: no steps": (
        _of_window(etrace.steps, xs=jnp.ones((0, 5))),
        ["xs: got 0 steps, expected at least one."],
    ),
    "evolve: inputs of another size": (
        _of_window(etrace.evolve, xs=jnp.ones((T, 4))),
        ["xs: got float64[5, 4], expected float64[5, 5]."],
    ),
    "learn: targets too short": (
        _learn(targets=jnp.ones((4, 3))),
        ["targets: got float64[4, 3], expected 5 steps in front."],
    ),
    "learn: mask too long": (
        _learn(mask=jnp.ones(6)),
        ["mask: got float64[6], expected the shape (5,)."],
    ),
    "learn: trace of another graph": (
        _learn(trace=_other_trace()),
        ["trace: got PyTreeDef", "expected PyTreeDef"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_gets_a_sentence(name):
    call, parts = WRONG[name]
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("window", [2.0, True, "all"])
def test_a_window_is_a_number_of_steps(window):
    """By itself: the types of public arguments are checked in these tests."""
    with pytest.raises(ValueError, match=f"window: got {window!r}, expected an int"):
        check_window(window)


DECAYS = [1.0, -0.1, 1.5, -1, (0.5, 1.0), (-0.1, 0.5), float("nan")]


@pytest.mark.parametrize("decay", DECAYS)
def test_a_decay_outside_of_its_range(decay):
    found = "decay: got .*, expected a number of at least 0 and below 1, a pair of them"
    with pytest.raises(ValueError, match=found):
        etrace.ESDRTRL(decay)


@pytest.mark.parametrize(
    "decay, pair",
    [(0, (0.0, 0.0)), (0.0, (0.0, 0.0)), (1, (0.0, 0.0)), (19, (0.9, 0.9)),
     (0.8, (0.8, 0.8)), ((0.7, 0.9), (0.7, 0.9))],
)  # fmt: skip
def test_what_a_decay_stands_for(decay, pair):
    assert etrace.ESDRTRL(decay).decays == pair
