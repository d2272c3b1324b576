"""Learning signals and the kappa filter, against their formulas."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaky import (
    FEEDBACK,
    KAPPA,
    KEY,
    LEAK,
    LIF,
    OUT,
    STEPS,
    N,
    by_formula,
    flat,
    gradient,
    problem,
)
from models import MODELS, random_state, sequence, spike
from oracles import assert_same_gradient, quick_jit
from scripts import run_code
from windows import assert_same, differ, local, squares

import eqx_etrace as etrace
from eqx_etrace._errors import size


def _matrix(graph):
    """The random weights of a graph's signal."""
    (matrix,) = local(graph).signal.matrices  # pyright: ignore
    assert matrix.shape[0] == N
    return np.asarray(matrix)


RNG = np.random.default_rng(3)
PER_UNIT = RNG.normal(size=(STEPS, N))
SCALAR = RNG.normal(size=STEPS)


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
    graph, args, (plain, xs, ts) = problem(rule, options.get("adapts", False))
    given = None if given is None else jnp.asarray(given)
    expected = by_formula(plain, xs, ts, signal(graph, plain, ts), **options)
    exact = by_formula(plain, xs, ts, _exact(graph, plain, ts))
    if name != "e-prop":
        assert differ(expected, exact)
    windows = (1, None) if name in ("random", "three factors") else (None,)
    for window in windows:
        got = gradient(graph, *args, window=window, signal=given)
        assert_same_gradient({"w": got.w, "u": got.u}, expected, rtol=1e-10)


def test_rflo_decays_by_its_leak_and_hears_at_random():
    graph, args, (plain, xs, ts) = problem(etrace.RFLO(LEAK, FEEDBACK))
    expected = by_formula(plain, xs, ts, _random(graph, plain, ts))
    got = gradient(graph, *args)
    assert_same_gradient({"w": got.w, "u": got.u}, expected, rtol=1e-10)


def test_the_readout_learns_by_its_exact_gradient_under_any_signal():
    got, exact = (
        gradient(*flat(problem(rule)))
        for rule in (etrace.DRTRL(signal=FEEDBACK), etrace.DRTRL())
    )
    assert_same(got.out, exact.out)
    assert differ(got.w, exact.w)


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
        found.append(gradient(graph, graph.params(model), state, xs, ts, window=3))
    assert_same_gradient(*found, rtol=1e-10)


class LeakyReadout(eqx.Module):
    """The output is the membrane of the readout; spikes may be told beside it."""

    net: LIF
    tells: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        v, y = state
        v = LEAK * v + self.net.w @ x + self.net.u @ spike(v - 1)
        z = spike(v - 1)
        y = KAPPA * y + self.net.out @ z
        return ((y, z) if self.tells else y), (v, y)


@pytest.mark.parametrize("tells", [False, True])
def test_the_error_of_a_leaky_readout_is_that_of_its_membrane(tells):
    """Spikes that are told, too, are no error, and count by themselves."""
    graph, (params, _, xs, ts), _ = problem(etrace.DRTRL())
    net = LeakyReadout(graph.model(params), tells)
    state = jnp.zeros(N), jnp.zeros(OUT)

    def loss(out, target):
        y, z = out if tells else (out, jnp.zeros(N))
        return squares(y, target) + jnp.sum(z)

    found = []
    for signal in (etrace.Symmetric(), Transposed(net.net.out), FEEDBACK):
        for rule in (etrace.DRTRL(signal=signal), etrace.EProp(KAPPA, signal=signal)):
            graph = etrace.compile(net, state, xs[0], rule)
            run = quick_jit(etrace.grad(graph, loss))
            found.append(run(graph.params(net), state, None, xs, ts)[0].net)
    for plain, formula in ((0, 2), (1, 3)):
        assert_same_gradient(found[plain], found[formula], rtol=1e-10)
    for plain, other in ((0, 1), (0, 4), (1, 5)):
        assert differ(found[plain].w, found[other].w)
        assert_same(found[plain].out, found[other].out)


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
    got = gradient(graph, params, state, xs, ts)
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
    graphs = [problem(etrace.DRTRL(signal=FEEDBACK))[0] for _ in range(2)]
    other = etrace.RandomFeedback(jax.random.key(8), scale=0.5)
    again, now = map(_matrix, graphs)
    assert np.array_equal(again, now)
    assert not np.array_equal(now, _matrix(problem(etrace.DRTRL(signal=other))[0]))
    drawn = jax.jit(lambda key: etrace.RandomFeedback(key, 0.5).key)(KEY)
    assert np.array_equal(jax.random.key_data(drawn), jax.random.key_data(KEY))
    args = problem(etrace.DRTRL(signal=FEEDBACK))[1]
    fun = etrace.grad(graphs[0], squares)
    eager = fun(args[0], args[1], None, args[2][:3], args[3][:3])[0]
    jitted = jax.jit(fun)(args[0], args[1], None, args[2][:3], args[3][:3])[0]
    assert_same_gradient(eager, jitted)


def test_evolve_moves_the_filter_as_the_gradient_does():
    graph, (params, state, xs, ts), _ = problem(etrace.EProp(KAPPA))
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
    graph, (params, state, xs, ts), _ = problem(etrace.ThreeFactor())
    signal = jnp.asarray(SCALAR)
    expected = gradient(graph, params, state, xs, ts, signal=signal)

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
    _, (params, _, xs, ts), _ = problem(rule)
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


ON_EVERY_DEVICE = """
    import jax, jax.numpy as jnp, numpy as np
    import eqx_etrace as etrace

    def call(weights, x, h):
        h = 0.5 * h + weights[0] @ x
        return weights[1] @ jnp.tanh(h), h

    weights = jnp.ones((6, 3)), jnp.ones((2, 6))
    found = []
    for device in jax.devices():
        with jax.default_device(device):
            signal = etrace.RandomFeedback(jax.random.key(7))
            rule = etrace.DRTRL(signal=signal)
            graph = etrace.compile(weights, jnp.zeros(6), jnp.zeros(3), rule, call=call)
            (matrix,) = graph.rule.signal.matrices
            found.append((matrix.devices(), np.asarray(matrix)))
    assert len(found) == 2 and found[0][0] != found[1][0]
    assert (found[0][1] == found[1][1]).all() and np.ptp(found[0][1]) > 0.1
"""


def test_random_feedback_is_the_same_on_every_device():
    run_code(ON_EVERY_DEVICE, XLA_FLAGS="--xla_force_host_platform_device_count=2")
