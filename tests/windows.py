"""What the tests of windows and drivers share: a loop of `step` as their reference."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from catalogue import CATALOGUE
from catalogue_case import problem
from models import IN, MODELS, OUT, random_state, sequence
from oracles import assert_same_gradient

import eqx_etrace as etrace
from eqx_etrace._rules import LocalRule


def local(graph: etrace.ETraceGraph) -> LocalRule:
    """Its rule, which is a local one."""
    assert isinstance(graph.rule, LocalRule)
    return graph.rule


def squares(out, target):
    """One number for a step."""
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(out))


def each_square(out, target):
    """One number for each sample."""
    return jnp.sum((out - target) ** 2, axis=-1)


def where(mask, new, old):
    """The leaves of `new` in the lanes of `mask`, and those of `old` in the others."""

    def choose(new, old):
        return jnp.where(
            mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old
        )

    return jax.tree.map(choose, new, old)


def by_steps(
    graph, loss_fn, params, state, trace, xs, ts, mask=None, *, reset=None, initial=None
):
    """What `value_and_grad` has to give: `jax.grad` of each step, inside a scan."""
    trace = etrace.init_trace(graph) if trace is None else trace
    start = jax.tree.map(jnp.zeros_like, state) if initial is None else initial

    def body(carry, now):
        x, t, weight, fresh = now
        if fresh is not None:
            carry = where(fresh, (start, etrace.init_trace(graph)), carry)

        def at_step(params):
            out, *new = etrace.step(graph, params, carry[0], carry[1], x)
            losses = loss_fn(out, t)
            losses = losses if weight is None else losses * weight
            return jnp.sum(losses), (losses, tuple(new))

        grads, (losses, carry) = jax.grad(at_step, has_aux=True)(params)
        return carry, (losses, grads)

    steps = (xs, ts, mask, reset)
    (state, trace), (losses, grads) = jax.lax.scan(body, (state, trace), steps)
    return losses, jax.tree.map(lambda g: g.sum(0), grads), state, trace


def apart(graph) -> Any:
    """Every relation with a filter for all of its dy/dw and of its df."""
    relations = [
        dataclasses.replace(relation.whole(), same_x=None, same_df=None)
        for relation in graph.relations
    ]
    return dataclasses.replace(graph, relations=tuple(relations))


def random_trace(graph) -> Any:
    """A trace of no past in particular."""
    rng = np.random.default_rng(5)

    def draw(leaf):
        value = rng.uniform(0.2, 0.8, leaf.shape)
        if jnp.iscomplexobj(leaf):
            value = value + 1j * rng.uniform(-0.5, 0.5, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, etrace.init_trace(graph))


def _comparable(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return np.asarray(leaf) if inexact else np.asarray(leaf, np.float64)


def assert_same(got, expected, rtol=1e-12, atol=1e-13):
    """Leaf by leaf, in norm, whatever the leaves are."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    assert all(a.dtype == b.dtype for a, b in pairs)
    got, expected = (jax.tree.map(_comparable, tree) for tree in (got, expected))
    assert_same_gradient(got, expected, rtol, atol)


def differ(a, b, by=1e-3) -> bool:
    """Whether some leaf of two gradients is another one altogether."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    gaps = [np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-300) for x, y in pairs]
    return bool(max(gaps) > by)


# The models of the tables, compiled.


def of_catalogue(name, rule, **options):
    """(graph, params, state, inputs, targets) of a case of the catalogue."""
    case = CATALOGUE[name]
    model, state, xs, ts = problem(case)
    x = jax.tree.map(lambda a: a[0], xs)
    options = dict(case.options) | options
    if case.trainable is not None:
        options["trainable"] = case.trainable(model)
    graph = etrace.compile(model, state, x, rule=rule, **options)
    # Anew: an `eqx.nn.State` may be used only once.
    return graph, graph.params(model), problem(case)[1], xs, ts


@functools.cache
def of_models(name, rule, steps, batch=None, dtype="float64", vjp: Any = "auto"):
    """The same of a model of `models.py`, with a batch of random states and inputs."""
    case = MODELS[name]
    keys = jax.random.split(jax.random.key(7), 3)
    model, state = case.make(keys[0])
    lead = () if batch is None else (batch,)
    each = [random_state(key, state) for key in jax.random.split(keys[1], batch or 1)]
    state = jax.tree.map(lambda *a: jnp.stack(a), *each) if lead else each[0]
    data = (model, state, *sequence(keys[2], case, steps, *lead))
    model, state, xs, ts = jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a, data
    )
    batched = batch is not None
    graph = etrace.compile(model, state, xs[0], rule=rule, batched=batched, vjp=vjp)
    return graph, graph.params(model), state, xs, ts


class OneStepLate(eqx.Module):
    """What the first layer makes is read by the second in the next step alone, and
    nothing of its own Jacobian changes from step to step."""

    first: jax.Array
    second: jax.Array
    unused: jax.Array = eqx.field(default_factory=lambda: jnp.ones(2))

    def __call__(self, x, state) -> tuple[jax.Array, Any]:
        g, h = state
        h = 0.9 * h + self.second @ jnp.tanh(g)
        return h, (0.5 * g + self.first @ x, h)


# A unit with as many state variables as one likes.


class Chain(eqx.Module):
    """Each variable of a unit reads the new one before it and the old one after it."""

    w: jax.Array
    u: jax.Array
    gain: jax.Array

    def __call__(self, x, state):
        drive = self.w @ x + self.u @ jnp.tanh(state[-1])
        later, new = (*state[1:], state[0]), []
        for gain, h, after in zip(self.gain, state, later, strict=True):
            drive = jnp.tanh(gain * h + drive - 0.3 * after)
            new.append(drive)
        return new[-1][:OUT], tuple(new)


def chain(slots, steps, batch=None, rule=None, dtype="float64"):
    """(graph, params, state, inputs, targets) of a `Chain`."""
    rng = np.random.default_rng(slots)
    lead = () if batch is None else (batch,)

    def normal(*shape, scale=0.6):
        return jnp.asarray(rng.normal(0.0, scale, shape), dtype)

    net = Chain(normal(6, IN), normal(6, 6), 0.7 + normal(slots, 6, scale=0.1))
    state = tuple(normal(*lead, 6) for _ in range(slots))
    xs, ts = normal(steps, *lead, IN), normal(steps, *lead, OUT)
    batched, rule = batch is not None, rule or etrace.DRTRL()
    graph = etrace.compile(net, state, xs[0], rule=rule, batched=batched)
    return graph, graph.params(net), state, xs, ts
