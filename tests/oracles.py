"""Gradients of a sequence, each from another principle, to be compared with each other.

`bptt` is autodiff. `online` and `online_outside` go through the library. The dense
reference is the theory written out with explicit matrices, on the taps of `models.py`.
With h the hidden elements of all groups and p all parameters it holds, of the local
program of one step,

    D = dh'/dh,   F = dh'/dp,   M = dh'/d(delta),     same unit only,

where delta perturbs each new hidden leaf where it is made. The influence matrix follows
J <- D J + F. With T = dL/d(delta) of the whole step, the signal is the partial
derivative l = M^-T T, and the gradient of a sequence is

    single-step:  sum_t  l_t J_t  +  dL_t/dp past all the hidden states,
    multi-step:   sum_t  dL_t/dp of step t  +  dL_t/dh_{t-1} J_{t-1}     (window 1).
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from models import MODELS, Groups, Taps, random_state, sequence

from eqx_etrace import init_trace, step


STEPS = 20


@functools.cache
def quick_options():
    """Compiling is nearly all that these small problems cost, and fusions are most of
    it. One part is enough for a program that is small. Each version of XLA has some of
    these."""
    found = {"xla_backend_optimization_level": 0}
    for option in (
        {"xla_cpu_use_fusion_emitters": False},
        {"xla_cpu_parallel_codegen_split_count": 1},
        {"xla_llvm_disable_expensive_passes": True},
    ):
        try:
            jax.jit(lambda: 0, compiler_options=found | option)()
        except jax.errors.JaxRuntimeError:
            continue
        found |= option
    return found


def quick_jit(fun):
    return jax.jit(fun, compiler_options=quick_options())


def sum_of_squares(out, target):
    return jnp.sum((out - target) ** 2)


def _trainable(model):
    return eqx.partition(model, eqx.is_inexact_array)


def bptt(model, state, xs, ts, loss=sum_of_squares):
    params, static = _trainable(model)

    def total(params):
        def body(state, xt):
            out, state = eqx.combine(params, static)(xt[0], state)
            return state, loss(out, xt[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ts))[1])

    return quick_jit(jax.grad(total))(params)


def one_step(model, state, x, t, loss=sum_of_squares):
    """`jax.grad` of a single step."""
    params, static = _trainable(model)

    def total(params):
        return loss(eqx.combine(params, static)(x, state)[0], t)

    return quick_jit(jax.grad(total))(params)


# Through the library.


def online_steps(graph, params, state, xs, ts, loss=sum_of_squares):
    """`jax.grad` inside each step: the gradient of every step, on a leading axis."""

    def body(carry, xt):
        def at_step(params):
            out, *carried = step(graph, params, carry[0], carry[1], xt[0])
            return loss(out, xt[1]), tuple(carried)

        grads, carry = jax.grad(at_step, has_aux=True)(params)
        return carry, grads

    return jax.lax.scan(body, (state, init_trace(graph)), (xs, ts))[1]


def online(graph, params, state, xs, ts, loss=sum_of_squares):
    """The same, summed over the sequence."""
    grads = online_steps(graph, params, state, xs, ts, loss)
    return jax.tree.map(lambda g: g.sum(0), grads)


def online_outside(graph, params, state, xs, ts, loss=sum_of_squares):
    """One `jax.grad` around the whole scan of `step`."""

    def total(params):
        def body(carry, xt):
            out, *carried = step(graph, params, carry[0], carry[1], xt[0])
            return tuple(carried), loss(out, xt[1])

        return jnp.sum(jax.lax.scan(body, (state, init_trace(graph)), (xs, ts))[1])

    return jax.grad(total)(params)


# The dense reference.


class Dense:
    """One step of a model as a function of flat vectors: `p` all parameters, `h` the
    hidden leaves one after the other, group by group, `delta` like `h`."""

    def __init__(self, model, state, groups: Groups):
        params, self.static = _trainable(model)
        self.p, self.unravel = ravel_pytree(params)
        self.leaves, self.treedef = jax.tree.flatten(state)
        self.hidden = [i for group in groups for i in group]
        self.same_unit = same_unit(self.leaves, groups)

    def flat(self, leaves):
        return jnp.concatenate([leaves[i].reshape(-1) for i in self.hidden])

    def split(self, h, leaves):
        """`leaves` with the hidden ones from `h`."""
        leaves, start = list(leaves), 0
        for i in self.hidden:
            shape, size = leaves[i].shape, leaves[i].size
            leaves[i] = h[start : start + size].reshape(shape)
            start += size
        return leaves

    def step(self, p, h, leaves, x, taps):
        state = jax.tree.unflatten(self.treedef, self.split(h, leaves))
        model = eqx.combine(self.unravel(p), self.static)
        out, new = model.run(x, state, taps)
        return out, jax.tree.leaves(new)

    def perturbed(self, delta, taps):
        added = self.split(delta, self.leaves)
        return dataclasses.replace(taps, new=lambda i, a: a + added[i])

    def local(self, p, h, leaves, x):
        """D, F and M of the local program, on the whole of `h`: not masked."""
        cut = Taps(recur=jax.lax.stop_gradient, leave=jax.lax.stop_gradient)

        def new(p, h, delta):
            return self.flat(self.step(p, h, leaves, x, self.perturbed(delta, cut))[1])

        F, D, M = jax.jacrev(new, argnums=(0, 1, 2))(p, h, jnp.zeros_like(h))
        return D, F, M


def same_unit(leaves, groups: Groups):
    """(hidden, hidden): 1 where two elements belong to the same unit."""
    blocks = []
    for group in groups:
        units = leaves[group[0]].shape[-1]
        slots = sum(leaves[i].size for i in group) // units
        blocks.append(np.kron(np.ones((slots, slots)), np.eye(units)))
    size = sum(len(b) for b in blocks)
    mask, start = np.zeros((size, size)), 0
    for b in blocks:
        mask[start : start + len(b), start : start + len(b)] = b
        start += len(b)
    return mask


def _forms_at_step(dense, loss, p, leaves, J, J_old, M, x, t):
    h = dense.flat(leaves)

    def by_delta(delta):
        out, _ = dense.step(p, h, leaves, x, dense.perturbed(delta, Taps()))
        return loss(out, t)

    def past_state(p):
        taps = Taps(new=lambda i, a: jax.lax.stop_gradient(a))
        return loss(dense.step(p, h, leaves, x, taps)[0], t)

    def whole(p, h):
        return loss(dense.step(p, h, leaves, x, Taps())[0], t)

    total = jax.grad(by_delta)(jnp.zeros_like(h))
    direct = jax.grad(past_state)(p)
    dp, dh = jax.grad(whole, argnums=(0, 1))(p, h)
    return {
        "single-step": jnp.linalg.solve(M.T, total) @ J + direct,
        "multi-step": dp + dh @ J_old,
        "total": total @ J + direct,
    }


def dense_reference(model, state, xs, ts, groups, loss=sum_of_squares):
    """For each form of the step the gradient of every step, on a leading axis.

    The form "total" takes T for the signal, which counts a path twice where one slot of
    a unit feeds another within the step: a fault to be told apart, not a rule.
    """
    dense = Dense(model, state, groups)
    mask = dense.same_unit

    @quick_jit
    def run(p, leaves, xs, ts):
        def body(carry, xt):
            leaves, J_old = carry
            D, F, M = dense.local(p, dense.flat(leaves), leaves, xt[0])
            J = (D * mask) @ J_old + F
            forms = _forms_at_step(dense, loss, p, leaves, J, J_old, M * mask, *xt)
            leaves = dense.step(p, dense.flat(leaves), leaves, xt[0], Taps())[1]
            return (leaves, J), jax.tree.map(dense.unravel, forms)

        carry = (leaves, jnp.zeros((len(mask), p.size)))
        return jax.lax.scan(body, carry, (xs, ts))[1]

    return run(dense.p, dense.leaves, xs, ts)


# The same on the table of models: each is compiled once for all the tests.


@functools.cache
def problem(name, steps=STEPS, cut=False):
    """(model, random state, inputs, targets)."""
    case = MODELS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    model, state = case.make(keys[0], cut=cut)
    xs, ts = sequence(keys[2], case, STEPS)
    return model, random_state(keys[1], state), xs[:steps], ts[:steps]


@functools.cache
def _every_form(name):
    return dense_reference(*problem(name), MODELS[name].groups)


def reference(name, form, steps=STEPS):
    return jax.tree.map(lambda g: g[:steps].sum(0), _every_form(name)[form])


@functools.cache
def autodiff(name, cut=False):
    return bptt(*problem(name, cut=cut))


@functools.cache
def first_step(name):
    model, state, xs, ts = problem(name)
    return one_step(model, state, xs[0], ts[0])


# Comparing.


def _named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in paths]


def differences(got, expected) -> dict[str, float]:
    """For each leaf the norm of the difference, relative to the expected norm."""
    found = {}
    for (name, a), (_, b) in zip(_named(got), _named(expected), strict=True):
        assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
        scale = np.linalg.norm(b) + np.finfo(b.dtype).tiny
        found[name] = float(np.linalg.norm(a - b) / scale)
    return found


def assert_same_gradient(got, expected, rtol=1e-10, atol=1e-13):
    """Leaf by leaf, in norm; every leaf that differs is named."""
    relative = differences(got, expected)
    bad = []
    for (name, a), (_, b) in zip(_named(got), _named(expected), strict=True):
        if not np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) + atol:
            norms = f"|got| {np.linalg.norm(a):.6g}, |expected| {np.linalg.norm(b):.6g}"
            bad.append(f"{name}: relative error {relative[name]:.2e}, {norms}")
    assert not bad, "gradients differ at\n  " + "\n  ".join(bad)


def cosine(a, b) -> float:
    """Without the readout, which learns the same way in every rule."""
    a, b = (eqx.tree_at(lambda m: m.readout, g, None) for g in (a, b))
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
