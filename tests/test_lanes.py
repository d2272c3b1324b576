"""A sample that is lost is reported, skipped and begins anew, and the others go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import quick_jit
from spread import (
    BATCH,
    STEPS,
    alike,
    compiled,
    data,
    gru,
    lif,
    loss_fn,
    mesh_of,
)

import eqx_etrace as etrace


LOST = 2
REST = np.array([i for i in range(BATCH) if i != LOST])


def poisoned(xs):
    return xs.at[4, LOST].set(jnp.nan)


def others(tree, axis):
    return jax.tree.map(lambda a: jnp.take(a, REST, axis), tree)


def of_others(make, rule=None):
    """The same graph for a batch without the lost sample."""
    graph, params, state = compiled(make, rule)
    return dataclasses.replace(graph, batch=len(REST)), params, others(state, 0)


@pytest.mark.parametrize(
    "make, window, reduction", [(lif, 1, "mean"), (lif, 5, "sum"), (gru, 5, "mean")]
)
def test_the_gradient_is_that_of_the_others(make, window, reduction):
    graph, params, state = compiled(make)
    fewer, _, of_rest = of_others(make)
    xs, targets = data()
    _, _, trace = etrace.evolve(graph, params, state, None, xs)
    state = jax.tree.map(lambda leaf: leaf + 0.1, state)
    of_rest = others(state, 0)

    def run(graph, skip, *args, **kwargs):
        options = {"window": window, "reduction": reduction, "skip_nonfinite": skip}
        fun = etrace.value_and_grad(graph, loss_fn, **options)
        return quick_jit(lambda args: fun(*args, **kwargs))(args)

    mask = jnp.arange(STEPS) % 3 > 0
    args = params, state, trace, poisoned(xs), targets, mask
    losses, grads, new, end = run(graph, True, *args)
    expected = run(
        fewer, False, params, of_rest, others(trace, 0), *others((xs, targets), 1), mask
    )
    alike((others(losses, 1), grads, others(new, 0), others(end, 0)), expected)
    assert jnp.isnan(losses[:, LOST]).all()
    for leaf in jax.tree.leaves((new, end)):
        assert not leaf[LOST].any()
    # Without the switch all are lost.
    _, grads, *_ = run(graph, False, *args)
    assert jnp.isnan(jax.tree.leaves(grads)[0]).all()


def test_it_begins_anew_and_counts_again():
    graph, params, state = compiled(lif)
    xs, targets = data()
    first = jax.tree.map(lambda leaf: leaf + 0.3, state)
    fun = etrace.value_and_grad(graph, loss_fn, window=5, skip_nonfinite=True)
    run = quick_jit(lambda *args: fun(*args, initial=first))
    *_, new, trace = run(params, state, None, poisoned(xs), targets)
    np.testing.assert_array_equal(new[0][LOST], first[0][LOST])
    losses, grads, *_ = run(params, new, trace, xs, targets)
    plain = quick_jit(etrace.value_and_grad(graph, loss_fn, window=5))
    alike((losses, grads), plain(params, new, trace, xs, targets)[:2])
    assert jnp.isfinite(losses).all()


def test_a_state_a_trace_or_a_loss_that_is_lost():
    graph, params, state = compiled(lif)
    xs, targets = data()
    trace = etrace.init_trace(graph)
    fun = quick_jit(
        etrace.value_and_grad(graph, loss_fn, window=5, skip_nonfinite=True)
    )
    _, expected, *_ = fun(params, state, trace, poisoned(xs), targets)

    def spoil(tree):
        leaves, treedef = jax.tree.flatten(tree)
        leaves[-1] = leaves[-1].at[LOST].set(jnp.inf)
        return jax.tree.unflatten(treedef, leaves)

    cases = {
        "state": (spoil(state), trace, targets),
        "trace": (state, spoil(trace), targets),
        "loss": (state, trace, targets.at[3, LOST].set(jnp.nan)),
    }
    for state_, trace_, targets_ in cases.values():
        losses, grads, *_ = fun(params, state_, trace_, xs, targets_)
        assert jnp.isnan(losses[:, LOST]).all() and jnp.isfinite(losses[:, REST]).all()
        alike(grads, expected)
    # What is masked may be anything.
    mask = jnp.ones((STEPS, BATCH), bool).at[3, LOST].set(False)
    losses, *_ = fun(params, state, trace, xs, cases["loss"][2], mask)
    assert jnp.isfinite(losses).all()


def test_all_are_lost():
    graph, params, state = compiled(lif)
    xs, targets = data()
    fun = quick_jit(etrace.value_and_grad(graph, loss_fn, skip_nonfinite=True))
    losses, grads, *end = fun(params, state, None, xs * jnp.nan, targets)
    assert jnp.isnan(losses).all()
    assert all(not leaf.any() for leaf in jax.tree.leaves((grads, end)))


@pytest.mark.parametrize("every", [1, 4])
def test_updates_and_devices(every):
    graph, params, state = compiled(lif)
    xs, targets = data()
    optimiser = optax.sgd(0.01)

    def run(graph):
        fun = etrace.learn(graph, loss_fn, optimiser, every=every, skip_nonfinite=True)
        args = params, optimiser.init(params), state, None, poisoned(xs), targets
        return quick_jit(fun)(*args)

    losses, *found = run(graph)
    # It is back at the next update.
    lost = np.isnan(losses[:, LOST])
    at = 4 // every * every
    assert list(np.flatnonzero(lost)) == list(range(at, at + every))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    there = etrace.shardings(graph, mesh_of("samples"))
    alike(run(there.graph), (losses, *found))


def test_fit_says_which():
    graph, params, state = compiled(lif)
    xs, targets = data()
    optimiser = optax.sgd(0.01)
    start = etrace.Checkpoint(params, optimiser.init(params), state, None, 0)
    batches = [(xs, targets), (poisoned(xs), targets)]
    seen = []
    options = {"carry": False, "callbacks": [lambda step, found: seen.append(found)]}
    args = graph, loss_fn, optimiser, start, batches
    etrace.fit(*args, skip_nonfinite=True, **options)
    assert [found["skipped samples"] for found in seen] == [0.0, 1.0]
    assert all(np.isfinite(found["loss"]) for found in seen)
    lost = poisoned(targets)
    with pytest.raises(FloatingPointError, match="at step 1 in sample 2, expected"):
        etrace.fit(*args[:4], [(xs, lost)], **options)
    lost = lost.at[0, 5].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="at step 1 in sample 2 and 1 more"):
        etrace.fit(*args[:4], [(xs, lost)], **options)


def test_it_takes_one_loss_per_sample():
    graph, params, state = compiled(lif)
    xs, targets = data()
    fun = etrace.value_and_grad(
        graph, lambda out, target: jnp.mean((out - target) ** 2), skip_nonfinite=True
    )
    with pytest.raises(
        ValueError, match=r"loss_fn: got float64\[\], expected one loss"
    ):
        fun(params, state, None, xs, targets)
