"""Leaky spiking neurons, and the gradient of their rules by formula."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from models import spike
from oracles import quick_jit
from windows import squares

import eqx_etrace as etrace


N, IN, OUT, STEPS = 5, 4, 3, 20
LEAK, KAPPA, SLOW, BETA = 0.6, 0.8, 0.9, 0.7
KEY = jax.random.key(7)
FEEDBACK = etrace.RandomFeedback(KEY, scale=0.5)


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


def problem(rule, adapts=False, **options):
    rng = np.random.default_rng(0)
    shapes = {"w": (N, IN), "u": (N, N), "out": (OUT, N)}
    plain = {name: rng.normal(0.0, 0.8, shape) for name, shape in shapes.items()}
    net = LIF(**{name: jnp.asarray(a) for name, a in plain.items()}, adapts=adapts)
    xs, ts = rng.normal(size=(STEPS, IN)), rng.normal(size=(STEPS, OUT))
    state = (jnp.zeros(N), jnp.zeros(N)) if adapts else jnp.zeros(N)
    data = state, jnp.asarray(xs), jnp.asarray(ts)
    graph = etrace.compile(net, state, data[1][0], rule=rule, **options)
    return graph, (graph.params(net), *data), (plain, xs, ts)


def gradient(graph, params, state, xs, ts, window=None, **given):
    fun = etrace.value_and_grad(graph, squares, window=window)
    return quick_jit(lambda *args: fun(*args, **given)[1])(params, state, None, xs, ts)


def psi_of(v):
    return np.asarray(jax.vmap(jax.grad(spike))(jnp.asarray(v)))


def by_formula(plain, xs, ts, signal, kappa=0.0, fresh=1.0, adapts=False):
    """The gradient by w and u; `signal(t, error)` is L of a step."""
    w, u, out = plain["w"], plain["u"], plain["out"]
    v = a = np.zeros(N)
    eps_v = eps_a = filtered = np.zeros((N, IN + N))
    total = np.zeros((N, IN + N))
    beta = BETA if adapts else 0.0
    for t, (x, target) in enumerate(zip(xs, ts, strict=True)):
        old = v - 1 - beta * a
        z, psi = (old > 0) * 1.0, psi_of(old)[:, None]
        eps_a = (SLOW - beta * psi) * eps_a + psi * eps_v
        v, a = LEAK * v + w @ x + u @ z, SLOW * a + z
        eps_v = LEAK * eps_v + np.concatenate([x, z])
        now = v - 1 - beta * a
        e = psi_of(now)[:, None] * (eps_v - beta * eps_a)
        filtered = kappa * filtered + fresh * e
        error = 2 * (out @ ((now > 0) * 1.0) - target)
        total += np.asarray(signal(t, error))[:, None] * filtered
    return {"w": total[:, :IN], "u": total[:, IN:]}


def flat(made):
    graph, args, _ = made
    return graph, *args
