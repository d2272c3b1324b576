"""SK-RTRL against its formula, its two ends, and its own certificate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, random_state, sequence
from oracles import assert_same_gradient, bptt, differences, quick_jit
from plain_rnn import STEPS, as_weights, gradient, plain_rnn
from windows import squares

import eqx_etrace as etrace


def _problem(rule, name="rnn_rnn"):
    case = MODELS[name]
    model, state = case.make(jax.random.key(0))
    state = random_state(jax.random.key(1), state)
    xs, ts = sequence(jax.random.key(2), case, STEPS)
    graph = etrace.compile(model, state, xs[0], rule)
    return graph, graph.params(model), (state, xs, ts)


TWO_LAYERS = ["rnn_rnn", "gru_lif", "lif", "lstm"]


@pytest.mark.parametrize("name", TWO_LAYERS)
def test_at_full_rank_it_is_backpropagation(name):
    graph, params, data = _problem(etrace.SKRTRL(100), name)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert_same_gradient(gradient(graph, params, data), exact, rtol=1e-9)
    less = _problem(etrace.SKRTRL(1), name)
    assert max(differences(gradient(*less), exact).values()) > 1e-4


@pytest.mark.parametrize("name", ["rnn_rnn", "lif", "lstm"])
def test_at_rank_zero_it_is_the_diagonal_block(name):
    graph, params, data = _problem(etrace.SKRTRL(0), name)
    other, *_ = _problem(etrace.SnAp(1), name)
    got, expected = (gradient(g, params, data) for g in (graph, other))
    if name == "rnn_rnn":
        # Between layers D-RTRL has no credit within a step, the block has.
        got, expected = got.second, expected.second
    assert_same_gradient(got, expected, rtol=1e-9)


def _by_formula(plain, rank):
    """S and the residual as whole matrices, the latter cut by an SVD."""
    w, u, out, h, xs, ts = plain
    n, total = h.size, np.zeros(w.size + u.size)
    S = np.zeros((n, total.size))
    E = np.zeros_like(S)
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        slope = 1 - h**2
        D = slope[:, None] * u
        fresh = np.hstack([np.kron(np.eye(n), v) for v in (x, old)])
        diagonal = np.diag(D)
        residual = D @ E + (D - np.diag(diagonal)) @ S
        S = diagonal[:, None] * S + slope[:, None] * fresh
        left, values, right = np.linalg.svd(residual, full_matrices=False)
        E = (left[:, :rank] * values[:rank]) @ right[:rank]
        total += (out.T @ (2 * (out @ h - t))) @ (S + E)
    return as_weights(total, plain)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_the_gradient_is_that_of_the_formula(rank):
    graph, params, data, plain = plain_rnn(etrace.SKRTRL(rank), units=5)
    got = gradient(graph, params, data)
    expected = _by_formula(plain, rank)
    assert_same_gradient({"w": got.w, "u": got.u}, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "rank", [0, 2, 5, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 4))]
)
@pytest.mark.parametrize(
    "name", ["plain", "lif", pytest.param("gru_lif", marks=pytest.mark.long)]
)
def test_the_certificate_is_never_violated(name, rank):
    rules = etrace.SKRTRL(rank), etrace.RTRL()
    found = [
        plain_rnn(r, units=5)[:3] if name == "plain" else _problem(r, name)
        for r in rules
    ]
    (graph, params, (state, xs, _)), (exact, *_) = found
    assert isinstance(graph.rule, etrace.SKRTRL) and graph.rule.plan is not None
    row, column = graph.rule.plan[0].kept

    @quick_jit
    def run(params, state, xs):
        def body(carry, x):
            _, new, trace = etrace.step(graph, params, carry[0], carry[1], x)
            _, _, J = etrace.step(exact, params, carry[0], carry[2], x)
            estimate = trace.left @ trace.right.T
            estimate = estimate.at[row, column].add(trace.entries)
            return (new, trace, J), (jnp.linalg.norm(J - estimate), trace.bound)

        start = state, etrace.init_trace(graph), etrace.init_trace(exact)
        return jax.lax.scan(body, start, xs)[1]

    error, bound = map(np.asarray, run(params, state, xs))
    assert (error <= bound).all()
    if rank < 3:
        assert error.max() > 1e-3
    # It says something: at first it is the error itself.
    assert bound[1] <= 1.01 * error[1] + 1e-6


def test_a_larger_rank_is_closer():
    exact = None
    errors = []
    for rank in (0, 1, 2, 4):
        graph, params, data, _ = plain_rnn(etrace.SKRTRL(rank), units=5)
        if exact is None:
            exact = bptt(graph.model(params), *data, loss=squares)
        gaps = differences(gradient(graph, params, data), exact)
        errors.append(max(gaps.values()))
    assert errors == sorted(errors, reverse=True)


def test_ranks_that_are_none_get_a_sentence():
    with pytest.raises(ValueError, match="rank: got -1, expected an integer"):
        etrace.SKRTRL(-1)
