"""e-prop: its filter, its switches, and its parts that need no rule."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaky import (
    BETA,
    FEEDBACK,
    IN,
    KAPPA,
    LEAK,
    LIF,
    OUT,
    SLOW,
    STEPS,
    N,
    by_formula,
    gradient,
    problem,
)
from models import MODELS, random_state, sequence, spike
from oracles import assert_same_gradient, bptt, quick_jit
from windows import assert_same, by_steps, differ, squares

import eqx_etrace as etrace


class LeakyReadout(eqx.Module):
    net: LIF

    def __call__(self, x, state):
        v, y = state
        z = spike(v - 1)
        v = LEAK * v + self.net.w @ x + self.net.u @ jax.lax.stop_gradient(z)
        y = KAPPA * y + self.net.out @ spike(v - 1)
        return y, (v, y)


def test_a_leaky_readout_with_its_filter_is_backpropagation():
    graph, args, (plain, *_) = problem(etrace.DRTRL())
    net = LeakyReadout(graph.model(args[0]))
    state, xs, ts = (jnp.zeros(N), jnp.zeros(OUT)), *args[2:]
    exact = bptt(net, state, xs, ts, loss=squares)
    found = []
    for rule in (etrace.Kappa(etrace.DRTRL(), KAPPA), etrace.DRTRL()):
        graph = etrace.compile(net, state, xs[0], rule=rule)
        found.append(gradient(graph, graph.params(net), state, xs, ts))
    assert_same_gradient((found[0].net.w, found[0].net.u), (exact.net.w, exact.net.u))
    assert differ(found[1], exact)
    assert plain["w"].shape == (N, IN)


@pytest.mark.parametrize("name", ["lif", "lstm"])
def test_a_filter_that_forgets_is_no_filter(name):
    """Slots that act on each other within a step count once."""
    case = MODELS[name]
    model, state = case.make(jax.random.key(0))
    state = random_state(jax.random.key(1), state)
    xs, ts = sequence(jax.random.key(2), case, 5)
    found = []
    for rule in (etrace.Kappa(etrace.DRTRL(), 0.0), etrace.DRTRL()):
        graph = etrace.compile(model, state, xs[0], rule)
        found.append(gradient(graph, graph.params(model), state, xs, ts))
    assert any(any(row) for row in graph.groups[0].within_matrix)
    assert_same_gradient(*found)


class Spiking(eqx.Module):
    """Spike, membrane and adaptation are leaves of their own."""

    w: jax.Array
    out: jax.Array

    def __call__(self, x, state):
        v, z, b = state
        b = SLOW * b + z
        v = LEAK * v + self.w @ x - 0.5 * z
        z = spike(v - 1 - BETA * b)
        return self.out @ z, (v, z, b)


CUT = {
    "reset": (("state[1]", "state[0]"),),
    "adaptation": (("state[1]", "state[2]"),),
    "both": (("state[1]", "state[0]"), ("state[1]", "state[2]")),
}


class Detached(Spiking):
    """The same with these gradients stopped by hand."""

    cut: str = eqx.field(static=True, default="both")

    def __call__(self, x, state):
        v, z, b = state
        still = jax.lax.stop_gradient(z)
        b = SLOW * b + (z if self.cut == "reset" else still)
        v = LEAK * v + self.w @ x - 0.5 * (z if self.cut == "adaptation" else still)
        z = spike(v - 1 - BETA * b)
        return self.out @ z, (v, z, b)


@pytest.mark.parametrize("cut", CUT)
def test_a_detached_path_is_one_stopped_in_the_model(cut):
    rng = np.random.default_rng(0)
    w, out = (jnp.asarray(rng.normal(size=s)) for s in ((N, IN), (OUT, N)))
    xs, ts = (jnp.asarray(rng.normal(size=(STEPS, n))) for n in (IN, OUT))
    state = (jnp.zeros(N),) * 3
    exact = bptt(Detached(w, out, cut), state, xs, ts, loss=squares)
    found = []
    for detach in (CUT[cut], ()):
        rule = etrace.EProp(detach=detach)
        graph = etrace.compile(Spiking(w, out), state, xs[0], rule)
        params = graph.params(Spiking(w, out))
        found.append(gradient(graph, params, state, xs, ts))
        steps = quick_jit(lambda *a, g=graph: by_steps(g, squares, *a))
        assert_same(steps(params, state, None, xs, ts)[1], found[-1], rtol=1e-10)
    assert_same_gradient((found[0].w, found[0].out), (exact.w, exact.out))
    assert differ(found[0].w, found[1].w)


def test_spikes_that_are_returned_are_heard_exactly_under_random_feedback():
    """A regulariser of firing rates needs no rule of its own."""

    class WithSpikes(LIF):
        def __call__(self, x, state):
            y, v = super().__call__(x, state)
            return (y, spike(v - 1)), v

    graph, args, _ = problem(etrace.DRTRL())
    params, state, xs, ts = args
    net = WithSpikes(params.w, params.u, params.out)

    def rates(out, target):
        del target
        return jnp.sum((out[1] - 0.1) ** 2)

    found = []
    for signal in (FEEDBACK, etrace.Symmetric()):
        graph = etrace.compile(net, state, xs[0], etrace.DRTRL(signal=signal))
        fun = quick_jit(etrace.grad(graph, rates))
        found.append(fun(graph.params(net), state, None, xs, ts)[0])
    assert_same_gradient((found[0].w, found[0].u), (found[1].w, found[1].u))
    assert np.abs(found[0].w).max() > 0


def test_reward_based_e_prop_is_a_sum_of_gradients_of_the_past():
    """The TD error times all gradients until now, each as old as it is."""
    graph, (params, state, xs, ts), (plain, *_) = problem(etrace.EProp(KAPPA))
    rng = np.random.default_rng(4)
    errors, discount = jnp.asarray(rng.normal(size=STEPS)), 0.7

    def at_step(params, carry, x, t):
        state, trace = carry
        out, *new = etrace.step(graph, params, state, trace, x)
        return squares(out, t), new

    def body(carry, now):
        carry, past, total = carry
        x, t, error = now
        grads, carry = jax.grad(at_step, has_aux=True)(params, carry, x, t)
        past = jax.tree.map(lambda G, g: discount * G + g, past, grads)
        total = jax.tree.map(lambda a, G: a + error * G, total, past)
        return (carry, past, total), None

    zero = jax.tree.map(jnp.zeros_like, params)
    start = [state, etrace.init_trace(graph)], zero, zero
    (_, _, got), _ = quick_jit(lambda: jax.lax.scan(body, start, (xs, ts, errors)))()
    weight = np.zeros(STEPS)  # What all later TD errors make of the signal of a step.
    for t in reversed(range(STEPS)):
        later = weight[t + 1] if t + 1 < STEPS else 0.0
        weight[t] = errors[t] + discount * later
    expected = by_formula(
        plain,
        np.asarray(xs),
        np.asarray(ts),
        lambda t, error: weight[t] * (plain["out"].T @ error),
        kappa=KAPPA,
    )
    assert_same_gradient({"w": got.w, "u": got.u}, expected)
