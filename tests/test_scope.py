"""`DRTRL(scope="unit")`: the true diagonal block, against dense Jacobians."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS
from oracles import (
    Dense,
    Taps,
    assert_same_gradient,
    cosine,
    first_step,
    online,
    online_steps,
    problem,
    quick_jit,
)

import eqx_etrace as etrace


UNIT = etrace.DRTRL(scope="unit")
STEPS = 8


@functools.cache
def _graph(name):
    model, state, xs, _ = problem(name, STEPS)
    return etrace.compile(model, state, xs[0], UNIT)


def _online(name):
    model, state, xs, ts = problem(name, STEPS)
    graph = _graph(name)
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(model), state, xs, ts)


def _reference(name):
    """J <- B J + F: the blocks of the step's true Jacobians, by the state of a unit and
    by the parameters that act on it. M and the forms are those of the local program."""
    model, state, xs, ts = problem(name, STEPS)
    dense, form = Dense(model, state, MODELS[name].groups), _graph(name).vjp

    def at_step(p, leaves, J, x, t):
        h = dense.flat(leaves)

        def new(p, h):
            return dense.flat(dense.step(p, h, leaves, x, Taps())[1])

        _, local, M = dense.local(p, h, leaves, x)
        F, B = jax.jacrev(new, argnums=(0, 1))(p, h)
        acts = (dense.same_unit @ jnp.abs(local) > 0).astype(h.dtype)
        J_new = (B * dense.same_unit) @ J + F * acts

        def loss(p, h, taps):
            return jnp.sum((dense.step(p, h, leaves, x, taps)[0] - t) ** 2)

        if form == "multi-step":
            dp, dh = jax.grad(loss, argnums=(0, 1))(p, h, Taps())
            grad = dp + dh @ J
        else:
            by_delta = jax.grad(lambda d: loss(p, h, dense.perturbed(d, Taps())))
            stop = Taps(new=lambda i, a: jax.lax.stop_gradient(a))
            signal = jnp.linalg.solve((M * dense.same_unit).T, by_delta(0.0 * h))
            grad = signal @ J_new + jax.grad(loss)(p, h, stop)
        leaves = dense.step(p, h, leaves, x, Taps())[1]
        return leaves, J_new, grad

    at_step = quick_jit(at_step)
    leaves, total = dense.leaves, jnp.zeros_like(dense.p)
    J = jnp.zeros((len(dense.same_unit), dense.p.size))
    for x, t in zip(xs, ts, strict=True):
        leaves, J, grad = at_step(dense.p, leaves, J, x, t)
        total = total + grad
    return dense.unravel(total)


# The one beta of all units acts on each through the spikes of the others as well, which
# the Jacobian by beta cannot tell from what is a unit's own.
TOLD_APART = [name for name in MODELS if name != "alif_trainable_beta"]


@pytest.mark.parametrize("name", TOLD_APART)
def test_sequence_equals_the_reference_of_true_blocks(name):
    assert_same_gradient(_online(name), _reference(name), rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_equals_autodiff(name):
    model, state, xs, ts = problem(name, 1)
    graph = _graph(name)
    run = quick_jit(functools.partial(online_steps, graph))
    got = jax.tree.map(lambda g: g[0], run(graph.params(model), state, xs, ts))
    assert_same_gradient(got, first_step(name))


@pytest.mark.parametrize("name", ["gru", "lstm", "lif", "alif", "rnn"])
def test_one_product_needs_no_dense_jacobian(name):
    graph = _graph(name)
    assert all(group.whole is None for group in graph.groups)
    assert all(group.own_products for group in graph.groups)
    assert "dense Jacobian" not in str(graph.report())
    assert "DRTRL(scope='unit')" in str(graph.report())


@pytest.mark.parametrize("name", ["gru", "rnn"])
def test_it_is_another_rule(name):
    model, state, xs, ts = problem(name, STEPS)
    local = etrace.compile(model, state, xs[0])
    run = quick_jit(functools.partial(online, local))
    other = run(local.params(model), state, xs, ts)
    assert cosine(_online(name), other) < 0.99999


class _TwoHops(eqx.Module):
    """A gate made by one product is inside of another: W (r * h), r = s(U h)."""

    u: jax.Array
    w: jax.Array
    v: jax.Array

    def __call__(self, x, h):
        r = jax.nn.sigmoid(self.u @ h)
        h = jnp.tanh(self.v @ x + self.w @ (r * h) + 0.5 * h)
        return h, h


def test_two_products_in_a_row_are_dense_and_reported():
    n, keys = 5, jax.random.split(jax.random.key(0), 4)
    weights = (jax.random.normal(key, (n, n)) for key in keys[:3])
    model, h = _TwoHops(*weights), jax.random.normal(keys[3], (n,))
    graph = etrace.compile(model, h, jnp.zeros(n), UNIT)
    assert "forms the 5 x 5 Jacobian" in str(graph.report())
    x = jnp.ones(n)
    trace = jax.tree.map(jnp.ones_like, etrace.init_trace(graph))
    moved = etrace.step(graph, graph.params(model), h, trace, x)[2]
    still = jax.tree.map(jnp.zeros_like, trace)
    still = etrace.step(graph, graph.params(model), h, still, x)[2]
    diagonal = np.diag(jax.jacfwd(lambda h: model(x, h)[1])(h))
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(still), strict=True):
        got = one - other
        np.testing.assert_allclose(got, diagonal[:, None] * np.ones_like(got))


def test_scope_is_checked():
    """Without the type checks of the tests, which would answer first."""
    rule = etrace.DRTRL()
    object.__setattr__(rule, "scope", "all")
    with pytest.raises(ValueError, match="got 'all', expected 'local' or 'unit'"):
        rule.__check_init__()


def test_the_only_unit_of_a_layer_is_cut_from_itself_by_the_local_scope():
    """One unit: its recurrent product is all its own. With the scope of a unit the
    rule is BPTT, and the local one is not."""
    keys = jax.random.split(jax.random.key(0), 3)
    cell, h = eqx.nn.GRUCell(3, 1, key=keys[0]), jnp.full(1, 0.3)
    xs = jax.random.normal(keys[1], (6, 3))

    def call(cell, x, h):
        h = cell(x, h)
        return h, h

    def gradient(rule):
        graph = etrace.compile(cell, h, xs[0], rule, call=call)
        ts = jnp.zeros((6, 1))
        return quick_jit(functools.partial(online, graph))(
            graph.params(cell), h, xs, ts
        )

    def total(cell):
        carry, loss = h, 0.0
        for x in xs:
            carry = cell(x, carry)
            loss = loss + jnp.sum(carry**2)
        return loss

    whole = quick_jit(jax.grad(total))(cell)
    assert_same_gradient(gradient(UNIT), whole)
    local = gradient(etrace.DRTRL())
    assert not np.allclose(local.weight_hh, whole.weight_hh, rtol=1e-3)
