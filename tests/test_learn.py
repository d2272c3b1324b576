"""`learn` against loops written by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import MODELS
from oracles import problem, quick_jit
from windows import assert_same, chain, each_square, squares, where

import eqx_etrace as etrace


STEPS, B = 9, 3


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic needs it
        yield


def _weights_alone(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


OPTIMISERS = {
    "sgd": lambda: optax.sgd(0.05),
    "adam, a schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 5)),
    "clipping": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)
    ),
    "several steps": lambda: optax.MultiSteps(
        optax.adam(0.05), 4
    ).gradient_transformation(),
    "weight decay of some": lambda: optax.adamw(
        0.05, weight_decay=0.1, mask=_weights_alone
    ),
}


def _update(optimiser, params, opt_state, grads):
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _by_hand(
    graph, loss_fn, optimiser, carry, xs, ts, mask=None, reset=None, initial=None
):
    """The loop that one would write with `step`."""
    fresh = etrace.init_trace(graph)

    def body(carry, now):
        params, opt_state, state, trace = carry
        x, t, weight, new = now
        if new is not None:
            state, trace = where(new, (initial, fresh), (state, trace))

        def at_step(params):
            out, *moved = etrace.step(graph, params, state, trace, x)
            losses = loss_fn(out, t)
            losses = losses if weight is None else losses * weight
            return jnp.sum(losses), (losses, moved)

        grads, (losses, moved) = jax.grad(at_step, has_aux=True)(params)
        return (*_update(optimiser, params, opt_state, grads), *moved), losses

    carry, losses = jax.lax.scan(body, carry, (xs, ts, mask, reset))
    return losses, *carry


def _identical(got, expected):
    """Bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def _start(optimiser, graph, params, state):
    return params, optimiser.init(params), state, etrace.init_trace(graph)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_update_each_step_is_the_loop_by_hand(name):
    optimiser = OPTIMISERS[name]()
    graph, params, state, xs, ts = chain(2, STEPS)
    carry = _start(optimiser, graph, params, state)
    expected = quick_jit(functools.partial(_by_hand, graph, squares, optimiser))
    run = quick_jit(etrace.learn(graph, squares, optimiser))
    got = run(*carry, xs, ts)
    _identical(got, expected(carry, xs, ts))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), got[1], params)
    assert all(jax.tree.leaves(moved))


def test_masks_and_resets_in_the_loop_by_hand():
    optimiser = optax.adam(0.05)
    graph, params, state, xs, ts = chain(2, STEPS, B)
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.uniform(size=(STEPS, B)))
    reset = jnp.asarray(rng.uniform(size=(STEPS, B)) < 0.3)
    carry = _start(optimiser, graph, params, state)
    by_hand = quick_jit(functools.partial(_by_hand, graph, each_square, optimiser))
    run = quick_jit(etrace.learn(graph, each_square, optimiser))
    for initial in (None, state):
        got = run(*carry, xs, ts, mask, reset=reset, initial=initial)
        zeros = jax.tree.map(jnp.zeros_like, state)
        start = zeros if initial is None else initial
        # XLA of JAX 0.12 rounds a masked loss otherwise in another program.
        assert_same(got, by_hand(carry, xs, ts, mask, reset, start), rtol=1e-14)


@pytest.mark.parametrize("name", ["lif", "layernorm_between"])
def test_an_update_each_step_of_either_form(name):
    model, state, xs, ts = problem(name, STEPS)
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == MODELS[name].vjp
    optimiser = optax.adam(0.01)
    carry = _start(optimiser, graph, graph.params(model), state)
    expected = quick_jit(functools.partial(_by_hand, graph, squares, optimiser))
    run = quick_jit(etrace.learn(graph, squares, optimiser))
    # XLA may round a layer normalisation otherwise in another program.
    assert_same(run(*carry, xs, ts), expected(carry, xs, ts), rtol=1e-14)


# 4 leaves a step over, 3 none; 20 is longer than the sequence.
@pytest.mark.parametrize("every", [3, 4, 20])
@pytest.mark.parametrize("batch", [None, B])
def test_an_update_every_few_steps(every, batch):
    """Chunk by chunk the gradient of `value_and_grad`, and an update."""
    optimiser = optax.adam(0.05)
    graph, params, state, xs, ts = chain(2, STEPS, batch)
    mask = jnp.linspace(0.0, 1.0, STEPS)
    carry = _start(optimiser, graph, params, state)
    got = quick_jit(etrace.learn(graph, squares, optimiser, every=every))
    got = got(*carry, xs, ts, mask)
    chunk = quick_jit(etrace.value_and_grad(graph, squares))
    params, opt_state, *carried = carry
    losses = []
    for start in range(0, STEPS, every):
        some = slice(start, start + every)
        part = xs[some], ts[some], mask[some]
        found, grads, *carried = chunk(params, *carried, *part)
        params, opt_state = _update(optimiser, params, opt_state, grads)
        losses.append(found)
    assert_same(got, (jnp.concatenate(losses), params, opt_state, *carried))


@pytest.mark.parametrize("every", [1, 4])
def test_what_comes_with_the_loss(every):
    graph, params, state, xs, ts = chain(1, STEPS)
    optimiser = optax.sgd(0.05)

    def loss_fn(out, target):
        return squares(out, target), {"out": out, "best": jnp.argmax(out)}

    carry = _start(optimiser, graph, params, state)
    run = etrace.learn(graph, loss_fn, optimiser, every=every, has_aux=True)
    (losses, aux), *got = quick_jit(run)(*carry, xs, ts)
    plain = etrace.learn(graph, squares, optimiser, every=every)
    assert_same((losses, *got), quick_jit(plain)(*carry, xs, ts))
    np.testing.assert_allclose(losses, ((aux["out"] - ts) ** 2).sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(aux["best"], aux["out"].argmax(-1))


def test_a_trace_of_none_is_zero():
    graph, params, state, xs, ts = chain(1, 4)
    optimiser = optax.sgd(0.05)
    run = quick_jit(etrace.learn(graph, squares, optimiser))
    carry = _start(optimiser, graph, params, state)
    _identical(run(*carry[:3], None, xs, ts), run(*carry, xs, ts))


@pytest.mark.parametrize("every", [1, 4])
def test_what_comes_out_again_may_be_donated(every):
    """JAX warns of a donated buffer that no result can take."""
    graph, params, state, xs, ts = chain(2, STEPS, B)
    optimiser = optax.adam(0.05)
    carry = _start(optimiser, graph, params, state)
    run = etrace.learn(graph, squares, optimiser, every=every)
    expected = jax.jit(run)(*carry, xs, ts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        donating = jax.jit(run, donate_argnums=(0, 1, 2, 3))
        given = jax.tree.map(jnp.array, carry)
        found = donating(*given, xs, ts)
    assert_same(found, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
