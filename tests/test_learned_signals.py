"""Signals with weights of their own: adaptive feedback, and synthetic gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_same_gradient, quick_jit
from windows import differ, squares

import eqx_etrace as etrace


N, IN, OUT, STEPS = 6, 3, 2, 12


class Net(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear
    feedback: jax.Array
    synthesiser: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(state), state


def _net():
    keys = jax.random.split(jax.random.key(0), 4)
    return Net(
        eqx.nn.GRUCell(IN, N, key=keys[0]),
        eqx.nn.Linear(N, OUT, key=keys[1]),
        0.3 * jax.random.normal(keys[2], (N, OUT)),
        eqx.nn.Linear(N, N, key=keys[3]),
    )


def _problem(rule, batch=None, **options):
    net, lead = _net(), () if batch is None else (batch,)
    rng = np.random.default_rng(0)
    sizes = (STEPS, *lead, IN), (STEPS, *lead, OUT)
    xs, ts = (jnp.asarray(rng.normal(size=size)) for size in sizes)
    state = jnp.zeros((*lead, N))
    made = etrace.compile(net, state, xs[0], rule, batched=batch is not None, **options)
    return made, (made.params(net), state, None, xs, ts)


ADAPTIVE = etrace.DRTRL(signal=etrace.AdaptiveFeedback("feedback"))


class Fixed(etrace.Signal):
    weight: jax.Array

    def at_exit(self, number, at, error, given):
        return self.weight @ error


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("batch", [None, 3])
def test_adaptive_feedback_hears_by_its_weights_and_learns_as_the_readout(
    window, batch
):
    graph, args = _problem(ADAPTIVE, batch)
    got = quick_jit(etrace.value_and_grad(graph, squares, window=window))(*args)[1]
    fixed, _ = _problem(etrace.DRTRL(signal=Fixed(_net().feedback)), batch)
    expected = quick_jit(etrace.value_and_grad(fixed, squares))(*args)[1]
    assert_same_gradient(got.cell, expected.cell)
    assert_same_gradient(got.feedback, expected.readout.weight.T)
    exact, _ = _problem(etrace.DRTRL(), batch)
    assert differ(
        got.cell, quick_jit(etrace.value_and_grad(exact, squares))(*args)[1].cell
    )


def test_feedback_and_readout_come_to_agree():
    graph, (params, state, _, xs, ts) = _problem(ADAPTIVE)
    rate = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.05))
    learn = quick_jit(etrace.learn(graph, squares, rate))
    apart = []
    carry = params, rate.init(params), state, None
    for _ in range(20):
        params = carry[0]
        gap = jnp.linalg.norm(params.feedback - params.readout.weight.T)
        apart.append(float(gap))
        carry = learn(*carry, xs, ts)[1:]
    assert apart[-1] < 0.7 * apart[0]


def _by_hand(graph, window, params, state, _, xs, ts):
    """Windows with the guess at their end, and its lesson at their start."""
    total = jax.tree.map(jnp.zeros_like, params)

    def losses(params, state, xs, ts):
        model, loss = graph.model(params), 0.0
        for x, t in zip(xs, ts, strict=True):
            out, state = jax.vmap(model)(x, state)
            loss = loss + squares(out, t)
        guess = jax.lax.stop_gradient(jax.vmap(model.synthesiser)(state))
        return loss + jnp.sum(guess * state), state

    def lesson(params, state, target):
        wrong = jax.vmap(graph.model(params).synthesiser)(state) - target
        return jnp.sum(wrong**2) / 2

    both = jax.grad(losses, argnums=(0, 1), has_aux=True)
    for start in range(0, STEPS, window):
        part = slice(start, start + window)
        (grads, target), new = both(params, state, xs[part], ts[part])
        more = jax.grad(lesson)(params, state, target)
        total = jax.tree.map(lambda *g: sum(g), total, grads, more)
        state = new
    return total


@pytest.mark.parametrize("window", [1, 5, STEPS])
def test_synthetic_gradients_are_those_of_the_formula(window):
    graph, args = _problem(etrace.DNI(), 2)
    got = quick_jit(etrace.value_and_grad(graph, squares, window=window))(*args)[1]
    expected = _by_hand(graph, window, *args)
    assert_same_gradient(got.cell, expected.cell)
    assert_same_gradient(got.synthesiser, expected.synthesiser)
    assert np.abs(expected.synthesiser.bias).max() > 0


@pytest.mark.parametrize("call", ["step", "steps"])
def test_step_and_steps_guess_too(call):
    graph, args = _problem(etrace.DNI(), 2)
    params, state, _, xs, ts = args
    length = 1 if call == "step" else 4
    args = params, state, None, xs[:length], ts[:length]

    def loss(params):
        trace = etrace.init_trace(graph)
        if call == "step":
            out, *_ = etrace.step(graph, params, state, trace, xs[0])
        else:
            out, *_ = etrace.steps(graph, params, state, trace, xs[:length])
        return jnp.sum((out - (ts[0] if call == "step" else ts[:length])) ** 2)

    got = quick_jit(jax.grad(loss))(params)
    window = quick_jit(etrace.value_and_grad(graph, squares, window=length))
    assert_same_gradient(got, window(*args)[1])


def test_a_guess_that_has_learnt_is_better_than_none():
    """On a fixed stream the guess comes closer to the gradient of what follows."""
    graph, (params, state, _, xs, ts) = _problem(etrace.DNI(), 2)

    def alone(updates):
        still = jax.tree.map(jnp.zeros_like, updates)
        return eqx.tree_at(lambda p: p.synthesiser, still, updates.synthesiser)

    only = optax.stateless(lambda updates, params: alone(updates))
    rate = optax.chain(optax.sgd(0.05, momentum=0.9), only)
    learn = quick_jit(etrace.learn(graph, squares, rate, every=3))
    zero = jax.tree.map(jnp.zeros_like, params.synthesiser)
    params = eqx.tree_at(lambda p: p.synthesiser, params, zero)
    drive = quick_jit(etrace.value_and_grad(graph, squares, window=3))
    whole = quick_jit(etrace.value_and_grad(graph, squares, window=STEPS))
    exact = whole(params, state, None, xs, ts)[1].cell
    before = drive(params, state, None, xs, ts)[1].cell
    opt = rate.init(params)
    for _ in range(150):
        _, params, opt, _, _ = learn(params, opt, state, None, xs, ts)
    after = drive(params, state, None, xs, ts)[1].cell

    def gap(cell):
        pairs = zip(jax.tree.leaves(cell), jax.tree.leaves(exact), strict=True)
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)

    assert gap(after) < 0.5 * gap(before)


class RNN(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array
    guess: eqx.nn.Linear

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x + self.u @ h)
        return self.out @ h, h


def _dni_by_formula(plain, xs, ts, window):
    w, u, out, a, b = (plain[name] for name in ("w", "u", "out", "a", "b"))
    total = {name: np.zeros_like(value) for name, value in plain.items()}
    h = np.zeros(N)
    for start in range(0, len(xs), window):
        states = [h]
        for x in xs[start : start + window]:
            states.append(np.tanh(w @ x + u @ states[-1]))
        back = a @ states[-1] + b  # The guess at the end.
        for k in reversed(range(len(states) - 1)):
            error = 2 * (out @ states[k + 1] - ts[start + k])
            total["out"] += np.outer(error, states[k + 1])
            drive = (1 - states[k + 1] ** 2) * (out.T @ error + back)
            total["w"] += np.outer(drive, xs[start + k])
            total["u"] += np.outer(drive, states[k])
            back = u.T @ drive
        wrong = a @ states[0] + b - back  # Its lesson at the start.
        total["a"] += np.outer(wrong, states[0])
        total["b"] += wrong
        h = states[-1]
    return total


def test_synthetic_gradients_on_paper():
    rng = np.random.default_rng(2)
    shapes = {"w": (N, IN), "u": (N, N), "out": (OUT, N), "a": (N, N), "b": (N,)}
    plain = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    xs, ts = rng.normal(size=(20, IN)), rng.normal(size=(20, OUT))
    guess = eqx.nn.Linear(N, N, key=jax.random.key(0))
    values = [jnp.asarray(plain[name]) for name in ("a", "b")]
    guess = eqx.tree_at(lambda m: (m.weight, m.bias), guess, values)
    w, u, out = (jnp.asarray(plain[name]) for name in ("w", "u", "out"))
    net = RNN(w, u, out, guess)
    graph = etrace.compile(net, jnp.zeros(N), jnp.asarray(xs[0]), etrace.DNI("guess"))
    args = graph.params(net), jnp.zeros(N), None, jnp.asarray(xs), jnp.asarray(ts)
    got = quick_jit(etrace.value_and_grad(graph, squares, window=3))(*args)[1]
    found = {"w": got.w, "u": got.u, "out": got.out}
    found |= {"a": got.guess.weight, "b": got.guess.bias}
    assert_same_gradient(found, _dni_by_formula(plain, xs, ts, 3))


REFUSED = {
    "no such leaf": (
        lambda: _problem(etrace.DRTRL(signal=etrace.AdaptiveFeedback("b"))),
        etrace.CompileError,
        "no such param",
    ),
    "a leaf of another shape": (
        lambda: _problem(etrace.DRTRL(signal=etrace.AdaptiveFeedback("synthesiser"))),
        etrace.CompileError,
        r"expected \[\(6, 2\)\]",
    ),
    "a leaf in use": (
        lambda: _problem(etrace.DNI("readout")),
        etrace.CompileError,
        "reads itself",
    ),
    "single-step": (
        lambda: _problem(etrace.DNI(), vjp="single-step"),
        ValueError,
        "multi-step",
    ),
    "a trace besides": (
        lambda: _problem(etrace.DRTRL(signal=etrace.Bootstrapped()), vjp="multi-step"),
        etrace.CompileError,
        "count twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    build, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        build()
