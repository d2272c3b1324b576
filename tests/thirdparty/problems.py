"""Other packages' models as they are, and what to compare their gradients with.

The library and the oracles take the same `call`, which only puts the arguments in
order, so that no model is wrapped, subclassed or changed. Every model gets a linear
readout, which is part of the pytree that is compiled: `(model, readout)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from oracles import assert_same_gradient, quick_jit

import eqx_etrace as etrace
from eqx_etrace import CompileError


STEPS = 20


@dataclasses.dataclass(frozen=True)
class Problem:
    model: Any
    """The package's own model and a readout."""
    call: Callable
    state: Any
    xs: Float[Array, "time inputs"]
    targets: Float[Array, " time"]

    @functools.cached_property
    def graph(self):
        return etrace.compile(self.model, self.state, self.xs[0], call=self.call)

    @property
    def params(self):
        return eqx.filter(self.model, eqx.is_inexact_array)

    def step(self, params, x, state):
        static = eqx.filter(self.model, eqx.is_inexact_array, inverse=True)
        return self.call(eqx.combine(params, static), x, state)


def problem(model, call, state, size, key, scale=1.0) -> Problem:
    """Random inputs of this size, and a slow random signal to be learnt by heart.

    The state is the one that the model has reached after a few steps, where no
    element is special.
    """
    keys = jax.random.split(key, 3)
    xs = scale * jax.random.normal(keys[0], (STEPS + 5, size))
    for x in xs[STEPS:]:
        out, state = call(model, x, state)
    readout = eqx.nn.Linear(out.size, 1, key=keys[1])
    readout = jax.tree.map(lambda a: a.astype(out.dtype), readout)
    noise = jax.random.normal(keys[2], (STEPS,))
    targets = jnp.convolve(noise, 0.4 * 0.8 ** jnp.arange(STEPS))[:STEPS]

    def with_readout(model, x, state):
        out, state = call(model[0], x, state)
        return model[1](out.reshape(-1))[0], state

    return Problem((model, readout), with_readout, state, xs[:STEPS], targets)


# -- gradients of a sequence -----------------------------------------------------------


def _bptt(p: Problem, steps=STEPS):
    def loss(params):
        def body(state, xt):
            out, state = p.step(params, xt[0], state)
            return state, (out - xt[1]) ** 2

        return jnp.sum(
            jax.lax.scan(body, p.state, (p.xs[:steps], p.targets[:steps]))[1]
        )

    return quick_jit(jax.grad(loss))(p.params)


def _online(p: Problem, graph, params, steps=STEPS):
    """Loss and gradient of the library, one `jax.grad` a step, summed."""

    def body(carry, xt):
        state, trace, total = carry

        def loss(params):
            out, *carried = etrace.step(graph, params, state, trace, xt[0])
            return (out - xt[1]) ** 2, carried

        (value, (state, trace)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (state, trace, jax.tree.map(jnp.add, total, grads)), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = p.state, etrace.init_trace(graph), zeros
    carry, losses = jax.lax.scan(body, carry, (p.xs[:steps], p.targets[:steps]))
    return jnp.sum(losses), carry[2]


def _online_gradient(p: Problem, steps=STEPS):
    graph = p.graph
    return quick_jit(lambda params: _online(p, graph, params, steps)[1])(p.params)


def _cosine(a, b) -> float:
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


# -- what every model is tested for ----------------------------------------------------


def assert_first_step(p: Problem, rtol=1e-10):
    """At T = 1 every leaf has the gradient of autodiff."""
    assert_same_gradient(_online_gradient(p, 1), _bptt(p, 1), rtol)


def assert_equals_bptt(p: Problem, rtol=1e-10):
    assert_same_gradient(_online_gradient(p), _bptt(p), rtol)


def assert_near_bptt(p: Problem, least: float):
    """Cosine without the readout, which learns the same way in every rule. Below one:
    where it is one, the test of equality is the one to use."""
    got = _cosine(_online_gradient(p)[0], _bptt(p)[0])
    assert least <= got < 1 - 1e-9, got


def assert_nothing_is_lost_silently(p: Problem):
    """Every param has a trace, or the report says why it has none."""
    with_trace = {path for r in p.graph.relations for path in r.weight}
    named = {path for d in p.graph.decisions for path in d.weight or ()}
    assert set(p.graph.param_leaves.paths) <= with_trace | named
    text = str(p.graph.report())
    assert all(path in text for path in p.graph.param_leaves.paths)


def assert_learns(p: Problem, factor=0.5, updates=300, rate=2e-2):
    """Online updates bring the loss of the sequence below `factor` of the first."""
    graph, optimiser = p.graph, optax.adam(rate)

    def body(carry, _):
        params, opt_state = carry
        value, grads = _online(p, graph, params)
        change, opt_state = optimiser.update(grads, opt_state)
        return (optax.apply_updates(params, change), opt_state), value

    @quick_jit
    def run(params):
        carry = params, optimiser.init(params)
        return jax.lax.scan(body, carry, length=updates)[1]

    losses = run(p.params)
    assert losses[-1] < factor * losses[0], (losses[0], losses[-1])


def message_of_refusal(p: Problem) -> str:
    try:
        graph = p.graph
    except CompileError as error:
        return str(error)
    raise AssertionError(f"compiled: {graph}")
