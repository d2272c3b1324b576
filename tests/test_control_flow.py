"""Control flow inside a step: what it is read as, and that gradients are right."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PLAIN, spike
from oracles import assert_same_gradient, dense_reference, online_steps, quick_jit

import eqx_etrace as etrace


N, IN, STEPS = 6, 4, 5
KEY = jax.random.key(3)
XS = jax.random.normal(jax.random.fold_in(KEY, 1), (STEPS, IN))


class Step(eqx.Module):
    """Wraps a function of (model, x, state); `cut` stops the recurrent credit."""

    w: jax.Array
    u: jax.Array
    a: jax.Array
    fun: Any = eqx.field(static=True)
    cut: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        return self.fun(self, x, state)

    def recur(self, h):
        return jax.lax.stop_gradient(h) if self.cut else h


def make(fun: Any, cut: bool = False) -> Any:
    keys = jax.random.split(KEY, 3)
    return Step(
        0.3 * jax.random.normal(keys[0], (N, IN)),
        0.3 * jax.random.normal(keys[1], (N, N)),
        jax.random.uniform(keys[2], (N,), minval=0.3, maxval=0.9),
        fun,
        cut,
    )


def _cond_of_state(m, x, h):
    """One branch reads weights and state, the other the state alone."""

    def update(h):
        return jnp.tanh(m.w @ x + m.u @ m.recur(h) + m.a * h)

    h = jax.lax.cond(x[0] > 0, update, lambda h: 0.9 * h, h)
    return h, h


def _switch(m, x, h):
    drive = m.w @ x
    branches = [
        lambda h: jnp.tanh(drive + h),
        lambda h: m.a * h + drive,
        lambda h: 0.5 * h,
    ]
    h = jax.lax.switch(jnp.argmax(x) % 4, branches, h)
    return h, h


def _nan_in_the_branch_not_taken(m, x, h):
    """The square root has no derivative where the other branch is taken."""

    def root(h):
        return jnp.sqrt(m.a * x[0]) + 0.5 * h + m.w @ x

    h = jax.lax.cond(x[0] > 0, root, lambda h: 0.5 * h - m.w @ x, h)
    return h, h


def _nested_branches(m, x, h):
    """Taken is what both say, or the gradient of `a` is not a number."""

    def inner(h):
        return jax.lax.cond(
            x[1] > -100.0, lambda h: jnp.log(m.a * x[0]) + h, lambda h: h, h
        )

    h = jax.lax.cond(x[0] > 0, inner, lambda h: 0.5 * h + m.w @ x, h)
    return h, h


def _gathered_loop(m, x, h):
    """Substeps of a neuron; the product is outside."""
    drive = m.w @ x

    def substep(h, scale):
        h = h + 0.1 * scale * (drive - m.a * h)
        return h, spike(h - 0.3)

    h, z = jax.lax.scan(substep, h, jnp.linspace(0.5, 1.0, 4))
    return z.sum(0) + h, h


def _reversed_loop(m, x, h):
    """Scans over weights as well, from the last to the first."""

    def layer(h, w):
        return jnp.tanh(h + w[:N] * x[0]), h

    h, ys = jax.lax.scan(layer, h, m.u[:3], reverse=True)
    return ys[0] + 2.0 * h, h


def _long_loop(m, x, state):
    """More substeps than are unrolled, elementwise: one Jacobian of the whole."""
    v, n = state
    drive = m.w @ x

    def substep(_, s):
        v, n = s
        v = v + 0.01 * (drive - m.a * v - n)
        return v, n + 0.01 * (jnp.tanh(v) - n)

    v, n = jax.lax.fori_loop(0, 100, substep, (v, n))
    return v, (v, n)


def _bounded_loop(m, x, h):
    """Equinox's own loops are scans of conditionals, or plain loops."""
    drive = m.w @ x

    def body(carry):
        h, i = carry
        return h + 0.1 * (drive - m.a * h), i + 1

    def go_on(carry):
        return carry[1] < jnp.where(x[0] > 0, 4, 3)

    h, _ = eqx.internal.while_loop(go_on, body, (h, 0), kind="bounded", max_steps=5)
    return h, h


def _state_in_while(m, x, h):
    """Elementwise, of unknown length, without weights: in forward mode."""
    limit = jnp.where(x[0] > 0, 3, 2)

    def body(carry):
        i, h = carry
        return i + 1, 0.9 * h + 0.1 * jnp.sin(h)

    _, h = jax.lax.while_loop(lambda c: c[0] < limit, body, (0, h))
    h = jnp.tanh(h + m.w @ x)
    return h, h


def _coupled_while(m, x, h):
    """The same with pairs of places that act on each other: a dense Jacobian."""
    limit = jnp.where(x[0] > 0, 3, 2)
    mix = jnp.array([[0.9, 0.1], [-0.1, 0.9]])

    def body(carry):
        i, h = carry
        return i + 1, h @ mix

    _, h = jax.lax.while_loop(lambda c: c[0] < limit, body, (0, h))
    h = jnp.tanh(h + (m.w @ x)[:2])
    return h.sum(), h


def _data_alone(m, x, h):
    """Where no credit passes, anything may happen."""

    def body(carry):
        i, y = carry
        return i + 1, jnp.sort(y) * 0.9

    _, y = jax.lax.while_loop(lambda c: c[0] < c[1].sum() + 3, body, (0, x))
    y = jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, y)
    h = jnp.tanh(m.w @ y + m.u @ m.recur(h))
    return h, h


Z = jnp.zeros(N)
# name: (step, state, words of the report)
CASES = {
    "cond": (_cond_of_state, Z, "all 2 branches run"),
    "switch": (_switch, Z, "all 3 branches run"),
    "nan in the branch not taken": (_nan_in_the_branch_not_taken, Z, "branches run"),
    "nested branches": (_nested_branches, Z, "all 2 branches run"),
    "substeps": (_gathered_loop, Z, "unrolled to 4 steps"),
    "reversed loop": (_reversed_loop, Z, "unrolled to 3 steps"),
    "long loop": (_long_loop, (Z, Z), ""),
    "bounded loop": (_bounded_loop, Z, "all 2 branches run"),
    "state in while": (_state_in_while, Z, "a diagonal Jacobian"),
    "coupled while": (_coupled_while, jnp.zeros(2), "a dense Jacobian"),
    "data alone": (_data_alone, Z, ""),
}


def _sequence(run, params, state, grad=jax.grad):
    """The gradient over all steps of a function (params, carry, x)."""

    def total(params):
        carry, loss = state, 0.0
        for x in XS:
            out, carry = run(params, carry, x)
            loss = loss + jnp.sum(jnp.sin(out + 0.3))
        return loss

    return quick_jit(grad(total))(params)


def _start(state):
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    drawn = [jax.random.normal(key, leaf.shape) for key, leaf in pairs]
    return jax.tree.unflatten(treedef, drawn)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_that_of_the_cut_twin(name):
    fun, state, words = CASES[name]
    model, state = make(fun), _start(state)
    graph = etrace.compile(model, state, XS[0])
    assert words in str(graph.report())
    params, trace = graph.params(model), etrace.init_trace(graph)

    def online(params, carry, x):
        out, *carry = etrace.step(graph, params, carry[0], carry[1], x)
        return out, carry

    params_cut, static = eqx.partition(make(fun, cut=True), eqx.is_inexact_array)

    def twin(params, carry, x):
        model: Any = eqx.combine(params, static)
        return model(x, carry)

    got = _sequence(online, params, [state, trace])
    # Backward, JAX cannot run a loop of unknown length.
    grad = jax.jacfwd if "while" in name else jax.grad
    expected = _sequence(twin, params_cut, state, grad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert_same_gradient(got, expected)


class _LoopWithProducts(eqx.Module):
    """Recurrent substeps: within the step the credit is whole, from step to step it is
    that of single units."""

    w: jax.Array
    u: jax.Array

    def __call__(self, x, state):
        return self.run(x, state, PLAIN)

    def run(self, x, h, taps):
        def substep(_, h):
            return jnp.tanh(self.w @ x + self.u @ taps.recur(h) + 0.3 * h)

        h = taps.new(0, jax.lax.fori_loop(0, 3, substep, h))
        return h, h


@pytest.mark.parametrize("unroll", [0, 64])
def test_recurrent_substeps_are_multi_step(unroll):
    model = _LoopWithProducts(make(None).w, make(None).u)
    state, targets = _start(Z), jnp.zeros((STEPS, N))
    graph = etrace.compile(model, state, XS[0], max_unroll=unroll)
    assert graph.vjp == "multi-step"
    run = quick_jit(functools.partial(online_steps, graph))
    got = run(graph.params(model), state, XS, targets)
    expected = dense_reference(model, state, XS, targets, ((0,),))["multi-step"]
    assert_same_gradient(got, expected)


def _noisy(m, x, state):
    """[N, 2]: two packed state variables, noise and spikes along the loop, a weight
    inside; more substeps than are unrolled."""
    drive = m.w @ x
    noise = 0.1 * jnp.sin(jnp.arange(80.0 * N)).reshape(80, N)

    def substep(state, noise):
        v, a = state[:, 0], state[:, 1]
        v = v + 0.05 * (drive + noise - jnp.abs(m.a) * v - a)
        z = spike(v - 0.5)
        return jnp.stack([v - 0.2 * z, a + 0.05 * (z - a)], axis=1), z

    state, spikes = jax.lax.scan(substep, state, noise)
    return spikes.mean(0) + state[:, 0], state


def _states_alone(m, x, h):
    """A long loop without weights: a lattice of two, coupled."""
    mix = jnp.array([[0.99, 0.01], [-0.01, 0.99]])
    h = jax.lax.fori_loop(0, 90, lambda _, h: jnp.tanh(h @ mix), h)
    h = h + (m.w @ x).reshape(3, 2)
    return h.sum(1), h


LONG = {
    "noisy": (_noisy, jnp.zeros((N, 2)), (N, 2)),
    "states alone": (_states_alone, jnp.zeros((3, 2)), (3, 2)),
    "substeps": (_gathered_loop, Z, (N, 1)),
    "long loop": (_long_loop, (Z, Z), (N, 2)),
}


@pytest.mark.parametrize("name", LONG)
def test_loops_that_are_not_unrolled_equal_bptt_within_units(name):
    fun, state, units = LONG[name]
    model, state = make(fun), _start(state)
    graph = etrace.compile(model, state, XS[0], max_unroll=0)
    (group,) = graph.groups
    assert (group.units, group.slots) == units
    assert "unrolled to" not in str(graph.report())
    params, trace = graph.params(model), etrace.init_trace(graph)
    for relation in graph.relations:
        assert relation.op.trace_shape in ((N, IN), (N,))

    def online(params, carry, x):
        out, *carry = etrace.step(graph, params, carry[0], carry[1], x)
        return out, carry

    def plain(params, carry, x):
        model: Any = graph.model(params)
        return model(x, carry)

    got = _sequence(online, params, [state, trace])
    assert_same_gradient(got, _sequence(plain, params, state))


def test_a_long_loop_in_a_batch():
    model = make(_noisy)
    states = _start(jnp.zeros((2, N, 2)))
    graph = etrace.compile(model, states, XS[:2], batched=True)
    params, trace = graph.params(model), etrace.init_trace(graph)

    def online(params, carry, x):
        out, *carry = etrace.step(graph, params, carry[0], carry[1], jnp.stack([x, -x]))
        return out, carry

    def plain(params, carry, x):
        return jax.vmap(graph.model(params))(jnp.stack([x, -x]), carry)

    got = _sequence(online, params, [states, trace])
    assert_same_gradient(got, _sequence(plain, params, states))


def _long_over_weights(m, x, h):
    many = jnp.stack([m.a] * 100)
    return h, jax.lax.scan(lambda h, a: (jnp.tanh(a * h), None), h, many)[0]


def _weight_in_while(m, x, h):
    limit = jnp.where(x[0] > 0, 3, 2)
    body = lambda c: (c[0] + 1, m.a * c[1])  # noqa: E731 one line is clearer
    return h, jax.lax.while_loop(lambda c: c[0] < limit, body, (0, h))[1] + m.w @ x


def _print_in_a_branch(m, x, h):
    def shown(h):
        jax.debug.print("{}", h.sum())
        return h

    return h, jax.lax.cond(x[0] > 0, shown, jnp.sin, h) + m.w @ x


REFUSED = {
    "long, over weights": (_long_over_weights, ["goes along a weight", "=100"]),
    "weight in while": (_weight_in_while, ["unknown length", "reads a weight", "scan"]),
    "print in a branch": (_print_in_a_branch, ["side effect", "out of the branch"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_line(name):
    fun, words = REFUSED[name]
    with pytest.raises(etrace.CompileError) as info:
        etrace.compile(make(fun), Z, XS[0])
    for word in [*words, "test_control_flow.py:"]:
        assert word in str(info.value)
