"""`compare_gradients`, against numbers computed by hand."""

import json
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_case import one_in
from every_rule import RULES, Problem, with_extras
from models import MODELS, random_state, sequence
from oracles import bptt, quick_jit
from windows import OneStepLate, by_steps, of_models, squares

import eqx_etrace as etrace


def _vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _assert_by_hand(row, found, exact):
    a, b = _vector(found), _vector(exact)
    assert row.size == a.size
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert row.cosine == pytest.approx(a @ b / norms[0] / norms[1], rel=1e-9)
    assert row.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-9)
    gap = np.linalg.norm(a - b) / norms[1]
    assert row.relative_error == pytest.approx(gap, rel=1e-6, abs=1e-12)
    same = np.mean(np.sign(a[b != 0]) == np.sign(b[b != 0]))
    assert row.sign_agreement == pytest.approx(same)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("against", ["bptt", "rtrl"])
def test_the_numbers_are_those_by_hand(against, batch):
    graph, params, state, xs, ts = of_models("gru", etrace.DRTRL(), 12, batch)
    report = etrace.compare_gradients(
        graph, params, state, xs, ts, squares, against=against
    )
    steps = quick_jit(lambda *args: by_steps(graph, squares, *args)[1])
    found = steps(params, state, None, xs, ts)
    model = graph.model(params)
    if batch is None:
        exact = bptt(model, state, xs, ts, loss=squares)
    else:
        singles = [
            bptt(model, state[s], xs[:, s], ts[:, s], loss=squares)
            for s in range(batch)
        ]
        exact = jax.tree.map(lambda *leaves: sum(leaves), *singles)
    _assert_by_hand(report.total, found, exact)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    for path, pair in zip(graph.param_leaves.paths, pairs, strict=True):
        _assert_by_hand(report.leaves[path], *pair)
    assert 0.5 < report.total.cosine < 0.9999
    assert report.zero == report.missing == ()


def test_what_gets_no_gradient_is_named():
    keys = jax.random.split(jax.random.key(0), 4)
    net = OneStepLate(
        jax.random.normal(keys[0], (3, 2)), jax.random.normal(keys[1], (3, 3))
    )
    state, xs = (jnp.zeros(3), jnp.zeros(3)), jax.random.normal(keys[2], (8, 2))
    ts = jax.random.normal(keys[3], (8, 3))
    graph = etrace.compile(net, state, xs[0], vjp="single-step")
    args = graph.params(net), state, xs, ts, squares
    report = etrace.compare_gradients(graph, *args)
    assert report.zero == ("first", "unused")
    assert report.missing == ("first",)
    assert report.leaves["first"].norm_ratio == 0
    assert math.isnan(report.leaves["first"].cosine)
    assert math.isnan(report.leaves["unused"].relative_error)
    lines = str(report).splitlines()
    assert lines[0] == "DRTRL against BPTT, 8 steps"
    assert [line for line in lines if line.endswith("missing")] == [
        line for line in lines if line.split()[:1] == ["first"]
    ]
    again = json.loads(json.dumps(report.to_dict()))
    assert again["missing"] == ["first"]
    assert again["leaves"]["second"]["cosine"] == report.leaves["second"].cosine


def test_a_window_leaves_something_to_the_trace():
    keys = jax.random.split(jax.random.key(0), 3)
    case = MODELS["gru"]
    net, state = case.make(keys[0])
    xs, ts = sequence(keys[1], case, 16)
    graph = etrace.compile(net, state, xs[0], vjp="multi-step")
    args: Any = (
        graph,
        graph.params(net),
        random_state(keys[2], state),
        xs,
        ts,
        squares,
    )
    picked = etrace.compare_gradients(*args)
    assert picked.window == 4
    assert picked.total.cosine < 0.9999
    whole = etrace.compare_gradients(*args, window=16)
    assert whole.total.relative_error < 1e-12


def test_in_double_precision_rounding_is_gone():
    keys = jax.random.split(jax.random.key(0), 3)
    signal = etrace.RandomFeedback(keys[2])
    with jax.enable_x64(False):
        net = eqx.nn.GRUCell(3, 5, key=keys[0])
        w = jax.random.normal(keys[2], (2, 5))

        def call(net, x, h):
            h = net[0](x, h)
            return net[1] @ h, h

        xs = jax.random.normal(keys[1], (12, 3))
        found = {}
        for rule in (etrace.RTRL(), etrace.DRTRL(signal=signal)):
            graph = etrace.compile((net, w), jnp.zeros(5), xs[0], rule, call=call)
            args = graph.params((net, w)), jnp.zeros(5), xs, xs[:, :2], squares
            for double in (False, True):
                report = etrace.compare_gradients(graph, *args, float64=double)
                found[type(rule), double] = report.total
        assert graph.params((net, w))[1].dtype == jnp.float32
    assert 1e-9 < found[etrace.RTRL, False].relative_error < 1e-5
    assert found[etrace.RTRL, True].relative_error < 1e-13
    single, double = (found[etrace.DRTRL, double] for double in (False, True))
    assert single.cosine == pytest.approx(double.cosine, abs=1e-5)
    assert single.cosine < 0.99


@one_in(8, RULES)
def test_every_rule_is_compared(name):
    case, keys = MODELS["lif"], jax.random.split(jax.random.key(3), 3)
    net, state = case.make(keys[0])
    state = random_state(keys[1], state)
    xs, ts = sequence(keys[2], case, 6)
    learns = name in ("EProp adaptive", "DNI")
    if learns:
        net = with_extras(name, Problem(net, state, xs, ts))
    graph = etrace.compile(net, state, xs[0], RULES[name]())
    args: Any = graph.params(net), state, xs, ts, squares
    options = {"signal": jnp.ones(6)} if name == "ThreeFactor" else {}
    report = etrace.compare_gradients(graph, *args, window=3, **options)
    assert math.isfinite(report.total.cosine)
    exact = name in ("RTRL", "SnAp(2)")
    assert (report.total.relative_error < 1e-9) == exact
    paths = set(graph.param_leaves.paths)
    assert learns == (set(report.leaves) < paths)


def test_what_is_no_exact_gradient_is_refused():
    graph, *args = of_models("gru", etrace.DRTRL(), 12)
    with pytest.raises(ValueError, match="expected 'bptt' or 'rtrl'"):
        etrace.compare_gradients(graph, *args, squares, against="bp")  # pyright: ignore
