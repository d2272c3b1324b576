"""Units, slots and groups of small models, and that their gradients are right."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike

import eqx_etrace as etrace


N, IN = 6, 4
KEY = jax.random.key(0)


class Step(eqx.Module):
    """Wraps a function of (weights, x, state) as a model."""

    w: jax.Array
    u: jax.Array
    fun: Any = eqx.field(static=True)

    def __call__(self, x, state):
        return self.fun(self, x, state)


def make(fun, shape=(N, N)):
    keys = jax.random.split(KEY)
    return Step(
        0.3 * jax.random.normal(keys[0], (shape[0], IN)),
        0.3 * jax.random.normal(keys[1], shape),
        fun,
    )


def compiled(fun, state, **options):
    return etrace.compile(make(fun), state, jnp.zeros(IN), **options)


def sizes(graph):
    return [(group.units, group.slots) for group in graph.groups]


def rnn(m, x, h):
    h = jnp.tanh(m.w @ x + m.u @ h)
    return h, h


def _counted(m, x, state):
    h, count, key, filtered = state
    filtered = 0.5 * filtered + x
    h = jnp.tanh(m.w @ filtered + m.u @ h)
    return h, (h, count + 1, key, filtered)


def adaptive(m, x, state):
    v, a = state["v"], state["a"]
    z = spike(v - a)
    v = 0.9 * v + m.w @ x + m.u @ z
    return z, {"v": v, "a": 0.8 * a + z}


def _packed(m, x, h):
    v, g = jnp.split(h, 2)
    g = 0.5 * g + m.w @ x + m.u @ jnp.tanh(v)
    v = 0.9 * v + g
    return v, jnp.concatenate([v, g])


def _compartments(m, x, h):
    """[n, 3]: three coupled compartments a neuron."""
    coupling = jnp.array([[0.8, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.1, 0.8]])
    drive = m.w @ x + m.u @ h[:, 2]
    h = h @ coupling + drive[:, None] * jnp.eye(3)[:1]
    return h[:, 2], h


def _reversed(m, x, state):
    """Unit i of one leaf goes with element n - 1 - i of the other."""
    v, g = state
    g = 0.5 * g + m.w @ x + m.u @ v
    v = jnp.tanh(v + g[::-1])
    return v, (v, g)


def _mean_coupled(m, x, h):
    h = jnp.tanh(m.w @ x + m.u @ h + 0.1 * h.mean())
    return h, h


def _rolled(m, x, h):
    h = jnp.tanh(m.w @ x + 0.5 * h + 0.1 * jnp.roll(h, 1))
    return h, h


def _bias_last(m, x, h):
    """The value of the last use is the new state itself."""
    h = jnp.tanh(m.u @ h) + m.w[:, 0]
    return h, h


def _weight_is_state(m, x, state):
    h, v = state
    return h + v, (jnp.tanh(m.w @ x + 0.5 * h), m.u[0])


def _copied(m, x, state):
    """The same new value in two leaves, of which the old is read in neither."""
    h = jnp.tanh(m.w @ x + m.u @ state[0])
    return h, (h, h)


def _shared_drive(m, x, state):
    """Two filters of one product are one unit, for it drives both."""
    fast, slow = state
    drive = m.w @ x
    return fast @ slow, (0.5 * fast + drive, 0.9 * slow + jnp.tanh(drive))


def _added_outputs(m, x, state):
    """Joined in the output only: two groups, not one."""
    h, v = state
    h, v = jnp.tanh(m.w @ x + 0.5 * h), jnp.tanh(m.u[:, :IN] @ x + 0.9 * v)
    return h + v, (h, v)


def _summed_output(m, x, h):
    h = jnp.tanh(m.w @ x + 0.5 * h)
    return h.sum(), h


def _scattered(m, x, h):
    """Products added into chosen compartments."""
    drive = m.w @ x
    h = (0.5 * h).at[:, 0].add(drive).at[jnp.arange(N), 1].add(2.0 * drive)
    return h.sum(1), h


def _scalar_gate(m, x, h):
    """One number gates more units than a unit may have slots: its path is cut."""
    gate = jax.nn.sigmoid(m.u[0, :IN] @ x)
    h = gate * h + (1 - gate) * jnp.tanh(m.w @ x)
    return h, h


def _tiled(m, x, h):
    """Each unit sums the products of two branches of three places."""
    places = m.u.reshape(2, N, 3) * x[0]
    h = jnp.tanh(m.w @ x + 0.5 * h + places.sum((0, 2)))
    return h, h


def _one_unit_twice(m, x, state):
    """The last element of one product drives a unit of another leaf, too."""
    h, g = state
    drive = m.w @ x
    h, g = jnp.tanh(0.5 * h + drive), jnp.tanh(0.9 * g + drive[N - 1 :])
    return h.sum() + 2.0 * g.sum(), (h, g)


def _gated_echo(m, x, state):
    """One number drives the first leaf, and the second reads it."""
    h, echo = state
    h = jax.nn.sigmoid(m.u[0, :IN] @ x) * x.sum() * jnp.arange(1.0, N + 1)
    echo = jnp.tanh(m.w @ x + 0.7 * echo + h)
    return echo, (h, echo)


# name: (step, state, [(units, slots)], hidden leaves)
STRUCTURES = {
    "rnn": (rnn, jnp.zeros(N), [(N, 1)], ["state"]),
    "carried along": (
        _counted,
        (jnp.zeros(N), jnp.zeros((), int), jax.random.key(1), jnp.zeros(IN)),
        [(N, 1)],
        ["state[0]"],
    ),
    "two slots": (
        adaptive,
        {"v": jnp.zeros(N), "a": jnp.zeros(N)},
        [(N, 2)],
        ["state['a']", "state['v']"],
    ),
    "halves of one leaf": (_packed, jnp.zeros(2 * N), [(N, 2)], ["state", "state"]),
    "compartments": (
        _compartments,
        jnp.zeros((N, 3)),
        [(N, 3)],
        ["state", "state", "state"],
    ),
    "reversed": (
        _reversed,
        (jnp.zeros(N), jnp.zeros(N)),
        [(N, 2)],
        ["state[0]", "state[1]"],
    ),
    "bias last": (_bias_last, jnp.zeros(N), [(N, 1)], ["state"]),
    "a weight is the new state": (
        _weight_is_state,
        (jnp.zeros(N),) * 2,
        [(N, 1)] * 2,
        ["state[0]"],
    ),
    "one value in two leaves": (
        _copied,
        (jnp.zeros(N),) * 2,
        [(N, 2)],
        ["state[0]", "state[1]"],
    ),
    "shared drive": (
        _shared_drive,
        (jnp.zeros(N),) * 2,
        [(N, 2)],
        ["state[0]", "state[1]"],
    ),
    "added outputs": (
        _added_outputs,
        (jnp.zeros(N),) * 2,
        [(N, 1)] * 2,
        ["state[0]"],
    ),
    "summed output": (_summed_output, jnp.zeros(N), [(N, 1)], ["state"]),
    "scatter-add": (_scattered, jnp.zeros((N, 2)), [(N, 2)], ["state", "state"]),
    "tiled": (_tiled, jnp.zeros(N), [(N, 1)], ["state"]),
    "two units' drive": (
        _one_unit_twice,
        (jnp.zeros(N), jnp.zeros(1)),
        [(N - 1, 1), (1, 2)],
        ["state[0]"],
    ),
    "scalar gate within max_slots": (
        _scalar_gate,
        jnp.zeros(N),
        [(1, N)],
        ["state"] * N,
    ),
    "mean within max_slots": (_mean_coupled, jnp.zeros(N), [(1, N)], ["state"] * N),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_units_and_slots(name):
    fun, state, units, leaves = STRUCTURES[name]
    graph = compiled(fun, state)
    assert sizes(graph) == units
    assert list(graph.groups[0].leaves) == leaves


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_step_equals_autodiff(name):
    fun, state, _, _ = STRUCTURES[name]
    model = make(fun)
    graph = etrace.compile(model, state, jnp.zeros(IN))
    state = jax.tree.map(
        lambda a: a + 0.7 if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )
    x = jax.random.normal(KEY, (IN,))

    def ours(params):
        out, _, _ = etrace.step(graph, params, state, etrace.init_trace(graph), x)
        return jnp.sum(jnp.sin(out))

    def plain(params):
        return jnp.sum(jnp.sin(graph.model(params)(x, state)[0]))

    params = graph.params(model)
    got, expected = jax.grad(ours)(params), jax.grad(plain)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


LOCAL = [
    "tiled",
    "two units' drive",
    "shared drive",
    "added outputs",
    "summed output",
    "scatter-add",
    "scalar gate within max_slots",
    "a weight is the new state",
]


@pytest.mark.parametrize("name", LOCAL)
def test_local_recurrence_equals_bptt(name):
    fun, state, _, _ = STRUCTURES[name]
    model, xs = make(fun), jax.random.normal(KEY, (6, IN))
    graph = etrace.compile(model, state, xs[0])

    def ours(params):
        def body(carry, x):
            state, trace = carry
            out, state, trace = etrace.step(graph, params, state, trace, x)
            return (state, trace), jnp.sum(jnp.sin(out))

        return jax.lax.scan(body, (state, etrace.init_trace(graph)), xs)[1].sum()

    def plain(params):
        def body(state, x):
            out, state = graph.model(params)(x, state)
            return state, jnp.sum(jnp.sin(out))

        return jax.lax.scan(body, state, xs)[1].sum()

    params = graph.params(model)
    got, expected = jax.grad(ours)(params), jax.grad(plain)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_a_number_that_drives_too_many_units_is_cut():
    graph = compiled(_scalar_gate, jnp.zeros(N), max_slots=N - 1)
    assert sizes(graph) == [(N, 1)]
    assert {path for r in graph.relations for path in r.weight} == {"w"}
    assert "only through a mixing equation" in str(graph.explain(weight="u"))


def test_the_new_state_joins_what_reads_it():
    """Even where what drives it joins too many units to be one unit's drive."""
    graph = compiled(_gated_echo, (jnp.zeros(N),) * 2, max_slots=2)
    assert sizes(graph) == [(N, 2)]


def test_a_product_that_drives_two_units_is_not_single_step():
    graph = compiled(_one_unit_twice, (jnp.zeros(N), jnp.zeros(1)), max_slots=1)
    assert sizes(graph) == [(N, 1), (1, 1)]
    assert graph.vjp == "multi-step"
    (reason,) = (d for d in graph.decisions if d.kind is etrace.Kind.MULTI_STEP)
    assert reason.weight == ("w",)


@pytest.mark.parametrize("fun", [_mean_coupled, _rolled])
def test_joins_beyond_max_slots_are_undone_and_reported(fun):
    graph = compiled(fun, jnp.zeros(N), max_slots=2)
    assert sizes(graph) == [(N, 1)]
    cuts = [d for d in graph.decisions if d.kind is etrace.Kind.CUT]
    assert any("the coupling" in decision.reason for decision in cuts)


def test_a_roll_keeps_the_credit_of_the_own_past():
    """Past max_slots, D is the factor of the unit's own state, not a column sum."""
    graph = compiled(_rolled, jnp.zeros(N), max_slots=2)
    model = make(_rolled)
    params, x = graph.params(model), jnp.ones(IN)
    state, trace = jnp.linspace(-1.0, 1.0, N), etrace.init_trace(graph)
    trace = jax.tree.map(jnp.ones_like, trace)
    _, new, moved = etrace.step(graph, params, state, trace, x)
    slope = 1 - new**2
    (got,) = moved[0]
    np.testing.assert_allclose(got, (0.5 * slope + slope)[:, None] * np.ones((N, IN)))
