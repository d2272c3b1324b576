"""Learning signals and the kappa filter, against their formulas."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, random_state, sequence, spike
from oracles import assert_same_gradient, bptt, quick_jit
from windows import assert_same, by_steps, differ, local, squares

import eqx_etrace as etrace
from eqx_etrace._errors import size


N, IN, OUT, STEPS = 5, 4, 3, 20
LEAK, KAPPA, SLOW, BETA = 0.6, 0.8, 0.9, 0.7
KEY = jax.random.key(7)


class LIF(eqx.Module):
    """The state is the membrane; adapting, it is (membrane, adaptation)."""

    w: jax.Array
    u: jax.Array
    out: jax.Array
    adapts: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state) -> tuple[jax.Array, Any]:
        v, a = state if self.adapts else (state, jnp.zeros(N))
        z = spike(v - 1 - BETA * a)
        v = LEAK * v + self.w @ x + self.u @ z
        a = SLOW * a + z if self.adapts else a
        return self.out @ spike(v - 1 - BETA * a), (v, a) if self.adapts else v


def _problem(rule, adapts=False, **options):
    rng = np.random.default_rng(0)
    shapes = {"w": (N, IN), "u": (N, N), "out": (OUT, N)}
    plain = {name: rng.normal(0.0, 0.8, shape) for name, shape in shapes.items()}
    net = LIF(**{name: jnp.asarray(a) for name, a in plain.items()}, adapts=adapts)
    xs, ts = rng.normal(size=(STEPS, IN)), rng.normal(size=(STEPS, OUT))
    state = (jnp.zeros(N), jnp.zeros(N)) if adapts else jnp.zeros(N)
    data = state, jnp.asarray(xs), jnp.asarray(ts)
    graph = etrace.compile(net, state, data[1][0], rule=rule, **options)
    return graph, (graph.params(net), *data), (plain, xs, ts)


def _gradient(graph, params, state, xs, ts, window=None, **given):
    fun = etrace.value_and_grad(graph, squares, window=window)
    return quick_jit(lambda *args: fun(*args, **given)[1])(params, state, None, xs, ts)


def _psi(v):
    return np.asarray(jax.vmap(jax.grad(spike))(jnp.asarray(v)))


def _by_formula(plain, xs, ts, signal, kappa=0.0, fresh=1.0, adapts=False):
    """The gradient by w and u; `signal(t, error)` is L of a step."""
    w, u, out = plain["w"], plain["u"], plain["out"]
    v = a = np.zeros(N)
    eps_v = eps_a = filtered = np.zeros((N, IN + N))
    total = np.zeros((N, IN + N))
    beta = BETA if adapts else 0.0
    for t, (x, target) in enumerate(zip(xs, ts, strict=True)):
        old = v - 1 - beta * a
        z, psi = (old > 0) * 1.0, _psi(old)[:, None]
        eps_a = (SLOW - beta * psi) * eps_a + psi * eps_v
        v, a = LEAK * v + w @ x + u @ z, SLOW * a + z
        eps_v = LEAK * eps_v + np.concatenate([x, z])
        now = v - 1 - beta * a
        e = _psi(now)[:, None] * (eps_v - beta * eps_a)
        filtered = kappa * filtered + fresh * e
        error = 2 * (out @ ((now > 0) * 1.0) - target)
        total += np.asarray(signal(t, error))[:, None] * filtered
    return {"w": total[:, :IN], "u": total[:, IN:]}


def _matrix(graph):
    """The random weights of a graph's signal."""
    (matrix,) = local(graph).signal.matrices  # pyright: ignore
    assert matrix.shape[0] == N
    return np.asarray(matrix)


RNG = np.random.default_rng(3)
PER_UNIT = RNG.normal(size=(STEPS, N))
SCALAR = RNG.normal(size=STEPS)
FEEDBACK = etrace.RandomFeedback(KEY, scale=0.5)


def _exact(graph, plain, ts):
    del graph, ts
    return lambda t, error: plain["out"].T @ error


def _random(graph, plain, ts):
    del plain, ts
    return lambda t, error: _matrix(graph) @ error


def _target(graph, plain, ts):
    del plain
    return lambda t, error: _matrix(graph) @ ts[t]


def _per_unit(graph, plain, ts):
    del graph, plain, ts
    return lambda t, error: PER_UNIT[t]


def _scalar(graph, plain, ts):
    del graph, plain, ts
    return lambda t, error: np.full(N, SCALAR[t])


# Rule, formula of its signal, options of the formula, the argument `signal`.
FORMULAS = {
    "e-prop": (etrace.EProp(), _exact, {}, None),
    "e-prop kappa": (etrace.EProp(KAPPA), _exact, {"kappa": KAPPA}, None),
    "e-prop random": (
        etrace.EProp(KAPPA, normalised=True, signal=FEEDBACK),
        _random,
        {"kappa": KAPPA, "fresh": 1 - KAPPA},
        None,
    ),
    "adaptive e-prop": (
        etrace.EProp(KAPPA, signal=FEEDBACK),
        _random,
        {"kappa": KAPPA, "adapts": True},
        None,
    ),
    "random": (etrace.DRTRL(signal=FEEDBACK), _random, {}, None),
    "adaptive random": (etrace.DRTRL(signal=FEEDBACK), _random, {"adapts": True}, None),
    "OTPE": (etrace.OTPE(KAPPA), _exact, {"kappa": KAPPA}, None),
    "OSTTP": (etrace.OSTTP(KEY, OUT), _target, {}, None),
    "three factors": (etrace.ThreeFactor(), _scalar, {}, SCALAR),
    "three factors, units": (etrace.ThreeFactor(), _per_unit, {}, PER_UNIT),
    "three factors, kappa": (
        etrace.ThreeFactor(etrace.Kappa(etrace.DRTRL(), KAPPA)),
        _per_unit,
        {"kappa": KAPPA},
        PER_UNIT,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_is_that_of_the_formula(name):
    rule, signal, options, given = FORMULAS[name]
    graph, args, (plain, xs, ts) = _problem(rule, options.get("adapts", False))
    given = None if given is None else jnp.asarray(given)
    expected = _by_formula(plain, xs, ts, signal(graph, plain, ts), **options)
    exact = _by_formula(plain, xs, ts, _exact(graph, plain, ts))
    if name != "e-prop":
        assert differ(expected, exact)
    windows = (1, None) if name in ("random", "three factors") else (None,)
    for window in windows:
        got = _gradient(graph, *args, window=window, signal=given)
        assert_same_gradient({"w": got.w, "u": got.u}, expected, rtol=1e-10)


def test_rflo_decays_by_its_leak_and_hears_at_random():
    graph, args, (plain, xs, ts) = _problem(etrace.RFLO(LEAK, FEEDBACK))
    expected = _by_formula(plain, xs, ts, _random(graph, plain, ts))
    got = _gradient(graph, *args)
    assert_same_gradient({"w": got.w, "u": got.u}, expected, rtol=1e-10)


def test_the_readout_learns_by_its_exact_gradient_under_any_signal():
    got, exact = (
        _gradient(*_flat(_problem(rule)))
        for rule in (etrace.DRTRL(signal=FEEDBACK), etrace.DRTRL())
    )
    assert_same(got.out, exact.out)
    assert differ(got.w, exact.w)


def _flat(problem):
    graph, args, _ = problem
    return graph, *args


class LeakyReadout(eqx.Module):
    net: LIF

    def __call__(self, x, state):
        v, y = state
        z = spike(v - 1)
        v = LEAK * v + self.net.w @ x + self.net.u @ jax.lax.stop_gradient(z)
        y = KAPPA * y + self.net.out @ spike(v - 1)
        return y, (v, y)


def test_a_leaky_readout_with_its_filter_is_backpropagation():
    graph, args, (plain, *_) = _problem(etrace.DRTRL())
    net = LeakyReadout(graph.model(args[0]))
    state, xs, ts = (jnp.zeros(N), jnp.zeros(OUT)), *args[2:]
    exact = bptt(net, state, xs, ts, loss=squares)
    found = []
    for rule in (etrace.Kappa(etrace.DRTRL(), KAPPA), etrace.DRTRL()):
        graph = etrace.compile(net, state, xs[0], rule=rule)
        found.append(_gradient(graph, graph.params(net), state, xs, ts))
    assert_same_gradient((found[0].net.w, found[0].net.u), (exact.net.w, exact.net.u))
    assert differ(found[1], exact)
    assert plain["w"].shape == (N, IN)


class Transposed(etrace.Signal):
    """The exact signal of one layer, as a formula."""

    weight: jax.Array

    def at_exit(self, number, at, error, given):
        return (self.weight.T @ error).reshape(at.shape)


EXACT = ["gru", "lstm", "lif", "alif", "indrnn", "lif_packed"]


@pytest.mark.parametrize("name", EXACT)
def test_exits_carry_the_exact_signal(name):
    """What the exits pass on to the state is all that the loss says."""
    case = MODELS[name]
    model, state = case.make(jax.random.key(0))
    state = random_state(jax.random.key(1), state)
    xs, ts = sequence(jax.random.key(2), case, 7)
    weight = model.readout.weight
    found = []
    for signal in (Transposed(weight), etrace.Symmetric()):
        graph = etrace.compile(model, state, xs[0], etrace.DRTRL(signal=signal))
        found.append(_gradient(graph, graph.params(model), state, xs, ts, window=3))
    assert_same_gradient(*found, rtol=1e-10)


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
        found.append(_gradient(graph, graph.params(model), state, xs, ts))
    assert any(any(row) for row in graph.groups[0].within_matrix)
    assert_same_gradient(*found)


def _two_layers(rule, batch=None):
    case = MODELS["gru_lif"]
    model, state = case.make(jax.random.key(0))
    lead = () if batch is None else (batch,)
    xs, ts = sequence(jax.random.key(2), case, 6, *lead)
    if batch is not None:
        state = jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), state)
    graph = etrace.compile(model, state, xs[0], rule, batched=batch is not None)
    return graph, graph.params(model), state, xs, ts


@pytest.mark.parametrize("rule", [etrace.DRTRL, etrace.EProp])
def test_a_batch_is_its_samples(rule):
    made = rule(signal=FEEDBACK) if rule is etrace.DRTRL else rule(0.5, signal=FEEDBACK)
    graph, params, state, xs, ts = _two_layers(made, 3)
    got = _gradient(graph, params, state, xs, ts)
    one, *_ = _two_layers(made)
    fun = etrace.grad(one, squares)
    parts = quick_jit(
        jax.vmap(lambda s, x, t: fun(params, s, None, x, t)[0], in_axes=(0, 1, 1))
    )(state, xs, ts)
    assert_same_gradient(got, jax.tree.map(lambda g: g.sum(0), parts))


def test_each_layer_has_its_own_random_weights():
    graph, *_ = _two_layers(etrace.DRTRL(signal=FEEDBACK))
    first, second = local(graph).signal.matrices  # pyright: ignore
    assert first.shape[1] == second.shape[1]
    assert not np.array_equal(first[:2], second[:2])


def test_the_key_alone_decides_the_random_weights():
    graphs = [_problem(etrace.DRTRL(signal=FEEDBACK))[0] for _ in range(2)]
    other = etrace.RandomFeedback(jax.random.key(8), scale=0.5)
    again, now = map(_matrix, graphs)
    assert np.array_equal(again, now)
    assert not np.array_equal(now, _matrix(_problem(etrace.DRTRL(signal=other))[0]))
    drawn = jax.jit(lambda key: etrace.RandomFeedback(key, 0.5).key)(KEY)
    assert np.array_equal(jax.random.key_data(drawn), jax.random.key_data(KEY))
    args = _problem(etrace.DRTRL(signal=FEEDBACK))[1]
    fun = etrace.grad(graphs[0], squares)
    eager = fun(args[0], args[1], None, args[2][:3], args[3][:3])[0]
    jitted = jax.jit(fun)(args[0], args[1], None, args[2][:3], args[3][:3])[0]
    assert_same_gradient(eager, jitted)


def test_evolve_moves_the_filter_as_the_gradient_does():
    graph, (params, state, xs, ts), _ = _problem(etrace.EProp(KAPPA))
    half = STEPS // 2
    _, state, trace = quick_jit(lambda *args: etrace.evolve(graph, *args))(
        params, state, None, xs[:half]
    )
    drive = quick_jit(etrace.grad(graph, squares))
    got, *_ = drive(params, state, trace, xs[half:], ts[half:])
    mask = jnp.arange(STEPS) >= half
    expected, *rest = drive(params, jnp.zeros(N), None, xs, ts, mask)
    assert_same_gradient(got, expected)
    fresh, *_ = drive(params, state, None, xs[half:], ts[half:])
    assert differ(fresh, expected)
    assert jax.tree.structure(rest[1]) == jax.tree.structure(trace)


def test_a_step_and_learn_take_the_modulator_as_an_argument():
    graph, (params, state, xs, ts), _ = _problem(etrace.ThreeFactor())
    signal = jnp.asarray(SCALAR)
    expected = _gradient(graph, params, state, xs, ts, signal=signal)

    def at_step(params, carry, x, t, m):
        state, trace = carry
        out, *new = etrace.step(graph, params, state, trace, x, signal=m)
        return squares(out, t), new

    def body(carry, now):
        grads, new = jax.grad(at_step, has_aux=True)(params, carry, *now)
        return new, grads

    start = [state, etrace.init_trace(graph)]
    grads = jax.lax.scan(body, start, (xs, ts, signal))[1]
    assert_same_gradient(jax.tree.map(lambda g: g.sum(0), grads), expected)
    import optax

    rate = optax.sgd(1e-3)
    learn = quick_jit(etrace.learn(graph, squares, rate, every=STEPS))
    args = params, rate.init(params), state, None, xs, ts
    _, new, *_ = learn(*args, signal=signal)
    moved = jax.tree.map(lambda a, b: (a - b) / 1e-3, params, new)
    assert_same_gradient(moved, expected, rtol=1e-9)


SHAPES = [(), (3,), (3, N), (1, N)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_modulator_of_a_batch_is_for_all_per_sample_or_per_unit(shape):
    rule = etrace.ThreeFactor()
    _, (params, _, xs, ts), _ = _problem(rule)
    net = etrace.compile(LIF(params.w, params.u, params.out), jnp.zeros(N), xs[0]).model
    states, batch = jnp.zeros((3, N)), jnp.stack([xs[0], xs[1], xs[2]])
    graph = etrace.compile(net(params), states, batch, rule, batched=True)
    rng = np.random.default_rng(1)
    m = jnp.asarray(rng.normal(size=shape))
    start = rng.normal(size=(3, N))
    full = jnp.broadcast_to(m[:, None] if shape == (3,) else m, (3, N))

    def gradient(given):
        def loss(params):
            trace = etrace.init_trace(graph)
            out, *_ = etrace.step(graph, params, start, trace, batch, signal=given)
            return jnp.sum(out)

        return jax.grad(loss)(params)

    got, expected = gradient(m), gradient(full)
    assert_same_gradient(got, expected)
    assert np.abs(got.w).max() > 0


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
        found.append(_gradient(graph, params, state, xs, ts))
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

    graph, args, _ = _problem(etrace.DRTRL())
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


REFUSED = {
    "multi-step": (
        lambda: _problem(etrace.DRTRL(signal=FEEDBACK), vjp="multi-step"),
        etrace.CompileError,
        "single-step credit",
    ),
    "kappa of vectors": (
        lambda: etrace.Kappa(etrace.ESDRTRL(0.9), 0.5),
        TypeError,
        "expected a DRTRL",
    ),
    "kappa of one": (
        lambda: etrace.EProp(1.0),
        ValueError,
        "at least 0 and below 1",
    ),
    "a scale": (
        lambda: etrace.RandomFeedback(KEY, scale=0.0),
        ValueError,
        "a number above 0",
    ),
    "no such path": (
        lambda: _problem(etrace.EProp(detach=(("state", "w"),))),
        etrace.CompileError,
        "expected a pair of state leaves",
    ),
    "size": (lambda: etrace.OSTTP(KEY, 0), ValueError, "at least 1"),
    "a target of another size": (
        lambda: _gradient(*_flat(_problem(etrace.OSTTP(KEY, OUT + 1)))),
        ValueError,
        "3 numbers",
    ),
    "no modulator": (
        lambda: _gradient(*_flat(_problem(etrace.ThreeFactor()))),
        ValueError,
        "signal",
    ),
    "a modulator for nothing": (
        lambda: _gradient(*_flat(_problem(etrace.DRTRL())), signal=jnp.asarray(SCALAR)),
        ValueError,
        "takes none",
    ),
    "a modulator of another shape": (
        lambda: _gradient(
            *_flat(_problem(etrace.ThreeFactor())), signal=jnp.ones((STEPS, N + 1))
        ),
        ValueError,
        "hidden group 0",
    ),
    "exact windows": (
        lambda: etrace.steps(*_started(etrace.DRTRL(signal=FEEDBACK))),
        ValueError,
        "expected the exact signal",
    ),
    "no readout": (
        lambda: etrace.compile(
            eqx.nn.GRUCell(2, 3, key=KEY),
            jnp.zeros(3),
            jnp.zeros(2),
            etrace.DRTRL(signal=FEEDBACK),
            call=lambda m, x, h: (m(x, h),) * 2,
        ),
        etrace.CompileError,
        "expected a readout",
    ),
}


def _started(rule):
    graph, (params, state, xs, _), _ = _problem(rule)
    return graph, params, state, etrace.init_trace(graph), xs


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_remedy(name):
    build, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        build()


def test_reward_based_e_prop_is_a_sum_of_gradients_of_the_past():
    """The TD error times all gradients until now, each as old as it is."""
    graph, (params, state, xs, ts), (plain, *_) = _problem(etrace.EProp(KAPPA))
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
    expected = _by_formula(
        plain,
        np.asarray(xs),
        np.asarray(ts),
        lambda t, error: weight[t] * (plain["out"].T @ error),
        kappa=KAPPA,
    )
    assert_same_gradient({"w": got.w, "u": got.u}, expected)


@pytest.mark.parametrize("batch", [None, 3])
def test_the_report_counts_the_filter(batch):
    graph, *_ = _two_layers(etrace.EProp(KAPPA), batch)
    plain, *_ = _two_layers(etrace.DRTRL(), batch)
    found = []
    for made in (graph, plain):
        leaves = jax.tree.leaves(etrace.init_trace(made))
        allocated = sum(leaf.nbytes for leaf in leaves)
        assert f"trace {size(allocated)}" in str(made.report()).splitlines()[0]
        found.append(allocated)
    filtered = sum(int(np.prod(r.trace_shape)) * 8 for r in graph.relations)
    assert found[0] == found[1] + filtered * (batch or 1)
