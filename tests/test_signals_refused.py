"""Learning signals that cannot be, and what the error says."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from leaky import FEEDBACK, KEY, OUT, STEPS, N, flat, gradient, problem

import eqx_etrace as etrace


REFUSED = {
    "multi-step": (
        lambda: problem(etrace.DRTRL(signal=FEEDBACK), vjp="multi-step"),
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
        lambda: problem(etrace.EProp(detach=(("state", "w"),))),
        etrace.CompileError,
        "expected a pair of state leaves",
    ),
    "size": (lambda: etrace.OSTTP(KEY, 0), ValueError, "at least 1"),
    "a target of another size": (
        lambda: gradient(*flat(problem(etrace.OSTTP(KEY, OUT + 1)))),
        ValueError,
        "3 numbers",
    ),
    "no modulator": (
        lambda: gradient(*flat(problem(etrace.ThreeFactor()))),
        ValueError,
        "signal",
    ),
    "a modulator for nothing": (
        lambda: gradient(*flat(problem(etrace.DRTRL())), signal=jnp.ones(STEPS)),
        ValueError,
        "takes none",
    ),
    "a modulator of another shape": (
        lambda: gradient(
            *flat(problem(etrace.ThreeFactor())), signal=jnp.ones((STEPS, N + 1))
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
    "no error": (
        lambda: etrace.compile(
            _Shown(jnp.eye(N)),
            (jnp.zeros(N), jnp.zeros(N)),
            jnp.zeros(N),
            etrace.DRTRL(signal=FEEDBACK),
        ),
        etrace.CompileError,
        "no output error",
    ),
}


class _Shown(eqx.Module):
    """The units that the output shows act on others, which it does not show."""

    w: jax.Array

    def __call__(self, x, state):
        first = jnp.tanh(0.5 * state[0] + self.w @ x)
        second = jnp.tanh(0.5 * state[1] + self.w @ first)
        return first, (first, second)


def _started(rule):
    graph, (params, state, xs, _), _ = problem(rule)
    return graph, params, state, etrace.init_trace(graph), xs


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_remedy(name):
    build, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        build()
