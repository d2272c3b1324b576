"""Every rule on every kind of network; `python tests/every_rule.py` prints the cosines
that `test_every_rule.py` holds."""

import functools
import math
import sys
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import IN, MODELS, OUT, random_state, sequence, spike
from oracles import bptt, quick_jit
from windows import squares

import eqx_etrace as etrace


STEPS, UNITS, UPDATES, RATE = 12, 6, 12, 2e-3
KEY = jax.random.key(11)


class SparseRNN(eqx.Module):
    """Three sources for each unit."""

    w: jax.Array
    u: jax.Array
    source: jax.Array
    readout: eqx.nn.Linear

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x + jnp.sum(self.u * h[self.source], axis=1))
        return self.readout(h), h


class ConvLIF(eqx.Module):
    conv: eqx.nn.Conv1d
    readout: eqx.nn.Linear

    def __call__(self, x, v):
        z = jax.lax.stop_gradient(spike(v - 0.5))
        v = 0.8 * v * (1 - z) + self.conv(x[None])
        return self.readout(spike(v - 0.5).reshape(-1)), v


class Learner(eqx.Module):
    """A network with what a learned signal needs besides."""

    net: Any
    feedback: tuple[jax.Array, ...] = ()
    synthesiser: Any = None

    def __call__(self, x, state):
        return self.net(x, state)


class Problem(NamedTuple):
    net: Any
    state: Any
    xs: Any
    ts: Any


def _of_models(name):
    case = MODELS[name]
    model, state = case.make(KEY)
    state = random_state(jax.random.key(1), state)
    return model, state, *sequence(jax.random.key(2), case, STEPS)


def _sparse():
    keys = jax.random.split(KEY, 3)
    source = jnp.asarray(np.random.default_rng(0).integers(0, UNITS, (UNITS, 3)))
    readout = eqx.nn.Linear(UNITS, OUT, key=keys[2])
    w, u = (jax.random.normal(k, (UNITS, n)) for k, n in zip(keys, (IN, 3)))  # noqa: B905 the third is the readout's
    return SparseRNN(w, 0.6 * u, source, readout), jnp.zeros(UNITS), *_data()


def _conv():
    keys = jax.random.split(KEY)
    conv = eqx.nn.Conv1d(1, 2, 3, padding=1, key=keys[0])
    readout = eqx.nn.Linear(2 * IN, OUT, key=keys[1])
    return ConvLIF(conv, readout), jnp.zeros((2, IN)), *_data()


def _data():
    keys = jax.random.split(jax.random.key(2))
    return [jax.random.normal(k, (STEPS, n)) for k, n in zip(keys, (IN, OUT))]  # noqa: B905 two of each


NETS = {
    **{
        name: functools.partial(_of_models, name)
        for name in ("gru", "lstm", "lif", "alif", "gru_lif")
    },
    "conv-LIF": _conv,
    "sparse RNN": _sparse,
}

FEEDBACK = etrace.RandomFeedback(KEY)


def _hybrid():
    return etrace.ByWeight(
        etrace.DRTRL(), [(lambda path, shape: len(shape) > 1, etrace.ESDRTRL(0.8))]
    )


RULES = {
    "RTRL": etrace.RTRL,
    "SnAp(1)": lambda: etrace.SnAp(1),
    "SnAp(2)": lambda: etrace.SnAp(2),
    "SKRTRL(2)": lambda: etrace.SKRTRL(2),
    "UORO": lambda: etrace.UORO(KEY),
    "KFRTRL": lambda: etrace.KFRTRL(KEY),
    "DRTRL": etrace.DRTRL,
    "DRTRL unit": lambda: etrace.DRTRL(scope="unit"),
    "ESDRTRL": lambda: etrace.ESDRTRL(0.8),
    "EProp": lambda: etrace.EProp(0.8),
    "EProp random": lambda: etrace.EProp(0.8, signal=FEEDBACK),
    "EProp adaptive": lambda: etrace.EProp(signal=etrace.AdaptiveFeedback()),
    "OSTL": etrace.OSTL,
    "OTTT": lambda: etrace.OTTT(0.8),
    "OTPE": lambda: etrace.OTPE(0.8),
    "Immediate": etrace.Immediate,
    "RFLO": lambda: etrace.RFLO(0.8, FEEDBACK),
    "ThreeFactor": etrace.ThreeFactor,
    "OSTTP": lambda: etrace.OSTTP(KEY, OUT),
    "DNI": etrace.DNI,
    "ByWeight": _hybrid,
    "Budget": lambda: etrace.Budget(1200),
}


def with_extras(name, problem):
    """The network with feedback weights or a synthesiser, where the rule wants them."""
    net, state = problem.net, problem.state
    if name == "EProp adaptive":
        rule = etrace.DRTRL(signal=FEEDBACK)
        graph = etrace.compile(net, state, problem.xs[0], rule, vjp="single-step")
        matrices: Any = graph.rule.signal.matrices  # pyright: ignore
        return Learner(net, feedback=matrices)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    guess = eqx.nn.Linear(size, size, key=KEY)
    return Learner(net, synthesiser=jax.tree.map(jnp.zeros_like, guess))


def measure(net, name) -> tuple[float, float, float]:
    """Of a rule on a network: the cosine of its gradient with that of BPTT by the
    weights that have a trace, and the loss before and after some updates."""
    problem = Problem(*NETS[net]())
    model = problem.net
    if name in ("EProp adaptive", "DNI"):
        model = with_extras(name, problem)
    graph = etrace.compile(model, problem.state, problem.xs[0], RULES[name]())
    params = graph.params(model)
    signal = None
    if name == "ThreeFactor":
        signal = -jnp.sin(jnp.arange(STEPS, dtype=float))
    rate = optax.sgd(RATE)
    fun = etrace.learn(graph, squares, rate, every=4)
    start = params, rate.init(params), problem.state, None

    def epochs(params, opt_state):
        def body(carry, _):
            args = *carry, problem.state, None, problem.xs, problem.ts
            losses, params, opt_state, *_ = fun(*args, signal=signal)
            return (params, opt_state), jnp.sum(losses)

        return jax.lax.scan(body, (params, opt_state), None, UPDATES)[1]

    drive = etrace.grad(graph, squares, window=4)

    def both(params, opt_state):
        args = params, problem.state, None, problem.xs, problem.ts
        return drive(*args, signal=signal)[0], epochs(params, opt_state)

    grads, losses = quick_jit(both)(*start[:2])
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    assert all(g.shape == p.shape and bool(jnp.isfinite(g).all()) for g, p in pairs)
    grads = grads.net if isinstance(model, Learner) else grads
    traced, exact = reference(net)
    hidden = [
        [leaf for leaf, keep in zip(jax.tree.leaves(g), traced, strict=True) if keep]
        for g in (grads, exact)
    ]
    assert math.isfinite(float(losses[-1]))
    a, b = (np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in hidden)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(cosine), float(losses[0]), float(losses[-1])


@functools.cache
def reference(net):
    """Which leaves have a trace, and the gradient of BPTT."""
    problem = Problem(*NETS[net]())
    graph = etrace.compile(problem.net, problem.state, problem.xs[0])
    paths = {path for relation in graph.relations for path in relation.weight}
    traced = [path in paths for path in graph.param_leaves.paths]
    return traced, bptt(problem.net, *problem[1:], loss=squares)


def main():
    for net in sys.argv[1:] or NETS:
        print(f'    "{net}": {{', flush=True)
        for name in RULES:
            try:
                found, first, last = measure(net, name)
                note = "" if last < first else f"  # {first} {last}"
                print(f'        "{name}": {found:.3f},{note}', flush=True)
            except Exception as error:
                print(
                    f"        # {name}: {type(error).__name__}: {str(error)[:300]}",
                    flush=True,
                )
        print("    },")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
