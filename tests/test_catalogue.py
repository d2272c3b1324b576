"""Every model of the catalogue: its structure, one step, a sequence."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE, OWN
from catalogue_case import (
    CHECKS,
    STEPS,
    by_autodiff,
    first_step,
    loss,
    one_in,
    problem,
    sequence,
)
from oracles import assert_same_gradient, online_steps, quick_jit

import eqx_etrace as etrace


def _named(check, names=tuple(OWN), every=1):
    """Names of cases as params of a test, marked where the check is pending, and but
    for every so manieth as long."""
    params = []
    for number, name in enumerate(names):
        why = OWN[name].pending.get(check)
        marks = [] if why is None else [pytest.mark.xfail(strict=True, reason=why)]
        marks += [pytest.mark.long] if number % every else []
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", params)


@functools.cache
def _graph(name):
    case = OWN[name]
    model, state, xs, _ = problem(case)
    x = jax.tree.map(lambda a: a[0], xs)
    options = dict(case.options)
    if case.trainable is not None:
        options["trainable"] = case.trainable(model)
    return etrace.compile(model, state, x, rule=etrace.DRTRL(), **options)


@functools.cache
def _every_step(name):
    """The gradient of each step of the sequence, from the library."""
    graph = _graph(name)
    model, *data = problem(OWN[name])
    run = quick_jit(functools.partial(online_steps, graph, loss=loss))
    return run(graph.params(model), *data)


@functools.cache
def _expected(name):
    return sequence(OWN[name])


def _compare(name, got, expected):
    """On the params that are trained."""
    mask = jax.tree.map(lambda a: a is not None, got, is_leaf=lambda a: a is None)
    assert_same_gradient(got, eqx.filter(expected, mask))


def test_the_catalogue_is_one_table():
    assert len(CATALOGUE) >= 80
    assert not set(OWN) - set(CATALOGUE)
    for case in OWN.values():
        assert set(case.pending) <= set(CHECKS)


@_named("structure")
def test_structure(name):
    case, graph = OWN[name], _graph(name)
    assert [(group.units, group.slots) for group in graph.groups] == case.units
    assert graph.vjp == case.vjp
    for end, ops in case.ops.items():
        relations = [
            r for r in graph.relations if any(w.endswith(end) for w in r.weight)
        ]
        assert {relation.op.name for relation in relations} == ops, end


@_named("one step", every=3)
def test_one_step_equals_autodiff(name):
    got = jax.tree.map(lambda g: g[0], _every_step(name))
    _compare(name, got, first_step(OWN[name]))


@_named("sequence", [n for n, case in OWN.items() if case.oracle != "one step"])
def test_sequence_equals_the_oracle(name):
    got = jax.tree.map(lambda g: g.sum(0), _every_step(name))
    _compare(name, got, _expected(name))


SINGLE = [name for name, case in OWN.items() if case.vjp == "single-step"]


@one_in(7, SINGLE)
def test_windows_equal_their_steps(name):
    """Two windows, the second from the trace that the first has left."""
    graph, steps = _graph(name), STEPS // 2
    model, state, xs, ts = problem(OWN[name])
    run = quick_jit(etrace.value_and_grad(graph, loss, window=steps))
    args, trace, got = graph.params(model), etrace.init_trace(graph), []
    for start in (0, steps):
        now = jax.tree.map(lambda a, i=start: a[i : i + steps], (xs, ts))
        _, grads, state, trace = run(args, state, trace, *now)
        got.append(grads)
    expected = jax.tree.map(lambda g: g[: 2 * steps].sum(0), _every_step(name))
    assert_same_gradient(jax.tree.map(jnp.add, *got), expected, rtol=1e-12)


@_named("nothing left out", every=2)
def test_no_parameter_is_left_out(name):
    got = jax.tree.map(lambda g: g.sum(0), _every_step(name))
    named = jax.tree_util.tree_leaves_with_path(got)
    zero = [jax.tree_util.keystr(path) for path, leaf in named if not np.any(leaf)]
    assert sorted(zero) == sorted(f".p{path}" for path in OWN[name].zero)


def test_the_oracles_of_what_is_pending():
    """So that a case fails for no other reason than the one it gives."""
    for name in (name for name, case in OWN.items() if case.pending):
        for gradient in (first_step(OWN[name]), _expected(name)):
            named = jax.tree_util.tree_leaves_with_path(gradient)
            for path, leaf in named:
                assert np.all(np.isfinite(leaf)), (name, path)
        zero = [jax.tree_util.keystr(path) for path, leaf in named if not np.any(leaf)]
        assert sorted(zero) == sorted(f".p{path}" for path in OWN[name].zero), name


CUTS = [n for n, case in OWN.items() if case.oracle not in ("bptt", "one step")]


@pytest.mark.parametrize("name", CUTS)
def test_the_oracle_is_not_bptt(name):
    """A guard: a model whose taps cut nothing would be checked against BPTT alone."""
    cut, whole = (jax.tree.leaves(g) for g in (_expected(name), by_autodiff(OWN[name])))
    pairs = zip(cut, whole, strict=True)
    gaps = [np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-300) for a, b in pairs]
    assert max(gaps) > 1e-3
