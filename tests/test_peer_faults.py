"""Faults that were measured in a peer library, and that ours must be free of.

One fault a section, in the order of a list of thirteen. Each test is against an oracle
that knows nothing of the library: BPTT, BPTT of a twin whose recurrent input is
stop-gradiented by hand, or `jax.grad` of one step.
"""

import functools
import os
import pickle
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, random_state
from oracles import (
    assert_same_gradient,
    autodiff,
    bptt,
    differences,
    first_step,
    online,
    online_outside,
    problem,
    quick_jit,
    reference,
    sum_of_squares,
)

import eqx_etrace as etrace


N, IN, STEPS = 6, 4, 12
stop = jax.lax.stop_gradient


class Net(eqx.Module):
    """A step written as a function of (weights, x, state, cut); in the twin, `cut`
    stops gradients, in the model it does nothing."""

    w: dict[str, jax.Array]
    fun: Any = eqx.field(static=True)
    twin: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        return self.fun(self.w, x, state, stop if self.twin else lambda v: v)


def _net(fun, **shapes):
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return Net(
        {
            name: 0.5 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        },
        fun,
    )


def _twin(net):
    return Net(net.w, net.fun, True)


def _data(net, state, x_shape=(IN,)):
    """A random state, inputs and targets."""
    keys = jax.random.split(jax.random.key(3), 3)
    state = random_state(keys[0], state)
    xs = jax.random.normal(keys[1], (STEPS, *x_shape))
    out = jax.eval_shape(net, xs[0], state)[0]
    return state, xs, jax.random.normal(keys[2], (STEPS, *out.shape))


def _online(net, state, xs, ts, **options):
    graph = etrace.compile(net, state, xs[0], **options)
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(net), state, xs, ts)


def _of_table(name, **options):
    model, state, xs, ts = problem(name)
    return _online(model, state, xs, ts, **options)


# 1. Zero gradient for readouts, reset gates, and weights used through a plain `@`.


def _gru(w, x, h, cut):
    update = jax.nn.sigmoid(w["in_z"] @ x + w["rec_z"] @ cut(h))
    reset = jax.nn.sigmoid(w["in_r"] @ x + w["rec_r"] @ cut(h))
    candidate = jnp.tanh(w["in_n"] @ x + reset * (w["rec_n"] @ cut(h)))
    h = (1 - update) * h + update * candidate
    return w["out"] @ h, h


def test_weights_behind_a_plain_matrix_product_learn():
    shapes = {f"in_{gate}": (N, IN) for gate in "zrn"}
    shapes |= {f"rec_{gate}": (N, N) for gate in "zrn"} | {"out": (3, N)}
    net = _net(_gru, **shapes)
    state, xs, ts = _data(net, jnp.zeros(N))
    got = _online(net, state, xs, ts)
    for name, grad in got.w.items():
        assert jnp.linalg.norm(grad) > 1e-2, name
    assert_same_gradient(got.w, bptt(_twin(net), state, xs, ts).w)


# 2. Paths from one slot of a neuron to another within a step, counted twice.


@pytest.mark.parametrize("name", ["lstm", "lif"])
def test_same_step_paths_count_once(name):
    expected = autodiff(name, cut=True)
    counted_twice = differences(reference(name, "total"), expected)
    assert max(counted_twice.values()) > 0.05
    assert_same_gradient(_of_table(name, vjp="single-step"), expected)


# 3. A weight shared over an axis that is not the batch.


def _shared(w, x, h, cut):
    h = jnp.tanh(jnp.einsum("tk,kn->tn", x, w["in"]) + w["own"] * h)
    return h, h


@pytest.mark.parametrize("batched", [False, True])
def test_weight_shared_over_an_axis(batched):
    places, batch = 3, 2
    net = _net(_shared, **{"in": (IN, N), "own": (places, N)})
    state, xs, ts = _data(net, jnp.zeros((places, N)), (places, IN))
    if not batched:
        got, expected = _online(net, state, xs, ts), bptt(net, state, xs, ts)
    else:
        state = jnp.stack([state, -state])
        xs, ts = (jnp.stack([a, a[::-1]], axis=1) for a in (xs, ts))
        got = _online(net, state, xs, ts, batched=True)
        each = [bptt(net, state[b], xs[:, b], ts[:, b]) for b in range(batch)]
        expected = jax.tree.map(jnp.add, *each)
    assert_same_gradient(got.w, expected.w)


# 4. Transforms of a weight before its use, whose derivative was left out.

_MASK = np.arange(N * IN).reshape(N, IN) % 3 > 0
TRANSFORMS = {
    "doubled": ((N, IN), lambda w: 2 * w),
    "transposed": ((IN, N), lambda w: w.T),
    "masked": ((N, IN), lambda w: jnp.where(_MASK, w, 0.0)),
    "positive": ((N, IN), lambda w: jnp.abs(w)),
    "normed": ((N, IN), lambda w: w / jnp.linalg.norm(w, axis=1, keepdims=True)),
}


def _transformed(transform, w, x, h, cut):
    h = jnp.tanh(transform(w["in"]) @ x + w["own"] * h)
    return h, h


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_weight_gets_the_gradient_of_the_raw_one(name):
    shape, transform = TRANSFORMS[name]
    fun = functools.partial(_transformed, transform)
    net = _net(fun, **{"in": shape, "own": (N,)})
    data = _data(net, jnp.zeros(N))
    assert_same_gradient(_online(net, *data).w, bptt(net, *data).w)


# 5. Two weights added before their use: the second got zero.


def _added(w, x, h, cut):
    h = jnp.tanh((w["first"] + w["second"]) @ x + w["own"] * h)
    return h, h


def test_both_of_two_added_weights_learn():
    net = _net(_added, first=(N, IN), second=(N, IN), own=(N,))
    data = _data(net, jnp.zeros(N))
    got = _online(net, *data)
    assert_same_gradient(got.w, bptt(net, *data).w)
    np.testing.assert_allclose(got.w["first"], got.w["second"], rtol=1e-12)


# 6. Coupling without a matrix product, whose column sum was taken for the diagonal.


def _mean(h, cut):
    return 0.5 * h + 0.8 * cut(h).mean()


def _roll(h, cut):
    return 0.5 * h + 0.8 * jnp.roll(cut(h), 1)


def _softmax(h, cut):
    """The numerator is a unit's own, the sum is everyone's."""
    if cut is not stop:
        return 0.5 * h + 2.0 * jax.nn.softmax(h)
    return 0.5 * h + 2.0 * jnp.exp(h) / cut(jnp.exp(h)).sum()


def _coupled(coupling, w, x, h, cut):
    h = jnp.tanh(w["in"] @ x + coupling(h, cut))
    return h, h


@pytest.mark.parametrize("coupling", [_mean, _roll, _softmax])
def test_a_coupling_keeps_the_own_diagonal(coupling):
    net = _net(functools.partial(_coupled, coupling), **{"in": (N, IN)})
    data = _data(net, jnp.zeros(N))
    got, expected = _online(net, *data, max_slots=2), bptt(_twin(net), *data)
    assert max(differences(expected, bptt(net, *data)).values()) > 0.01
    assert_same_gradient(got.w, expected.w)


# 7. LayerNorm between product and state: the gradient was exactly zero.


def test_layernorm_between_product_and_state():
    name = "layernorm_between"
    model, state, xs, ts = problem(name)
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == "multi-step"
    first = quick_jit(functools.partial(online, graph))
    got = first(graph.params(model), state, xs[:1], ts[:1])
    assert jnp.linalg.norm(got.layer.w_in.weight) > 1e-2
    assert_same_gradient(got, first_step(name))
    assert_same_gradient(_of_table(name), reference(name, "multi-step"))


# 8. Biases scaled wrongly, by another start-up correction than their weights.


def _with_bias(w, x, h, cut):
    h = 0.8 * h + jnp.tanh(w["in"] @ x + w["rec"] @ cut(h) + w["bias"][:, 0])
    return h, h


def _with_constant_input(w, x, h, cut):
    one = jnp.ones(1, x.dtype)
    h = 0.8 * h + jnp.tanh(w["in"] @ x + w["rec"] @ cut(h) + w["bias"] @ one)
    return h, h


def test_a_bias_learns_as_a_product_with_one():
    """The fault was that of a rule with filtered factors, ours are exact: a bias, and
    the same bias spelt as a product with a constant input of one, get one gradient."""
    shapes = {"in": (N, IN), "rec": (N, N), "bias": (N, 1)}
    bias, product = (_net(f, **shapes) for f in (_with_bias, _with_constant_input))
    data = _data(bias, jnp.zeros(N))
    expected = bptt(_twin(bias), *data)
    assert_same_gradient(_online(bias, *data).w, expected.w)
    assert_same_gradient(_online(product, *data).w, expected.w)


# 9. Several steps inside one `grad`, counted twice.


@pytest.mark.parametrize("name", ["lif", "spike_before_hard_reset"])
def test_many_steps_inside_one_grad_count_once(name):
    model, state, xs, ts = problem(name)
    graph = etrace.compile(model, state, xs[0])
    outside = quick_jit(functools.partial(online_outside, graph))
    got = outside(graph.params(model), state, xs, ts)
    assert_same_gradient(got, _of_table(name), rtol=1e-12)
    assert_same_gradient(got, reference(name, MODELS[name].vjp))


# 10. What a rule carries was advanced in the backward pass alone.


@pytest.mark.parametrize("name", ["alif", "layernorm_between"])
def test_the_trace_advances_without_a_gradient(name):
    """Forward alone, under `grad` and under `vmap`: the same trace."""
    model, state, xs, ts = problem(name)
    graph = etrace.compile(model, state, xs[0])
    params = graph.params(model)

    def forward(carry, xt):
        return etrace.step(graph, params, carry[0], carry[1], xt[0])[1:], None

    def under_grad(carry, xt):
        def loss(params):
            out, *carried = etrace.step(graph, params, carry[0], carry[1], xt[0])
            return sum_of_squares(out, xt[1]), tuple(carried)

        return jax.grad(loss, has_aux=True)(params)[1], None

    def last(body, state, xs, ts):
        start = (state, etrace.init_trace(graph))
        return jax.lax.scan(body, start, (xs, ts))[0]

    alone = quick_jit(functools.partial(last, forward))(state, xs, ts)
    learning = quick_jit(functools.partial(last, under_grad))(state, xs, ts)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), (state, xs, ts))
    mapped = quick_jit(jax.vmap(functools.partial(last, forward)))(*both)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(alone[1]))
    _assert_close(learning, alone)
    for b in range(2):
        _assert_close(jax.tree.map(lambda a, b=b: a[b], mapped), alone)


def _assert_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


# 11. Any dtype but the default float failed.


def _cast(tree, dtype):
    return jax.tree.map(
        lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, tree
    )


@pytest.mark.parametrize("name", ["gru", "filtered_rnn"])
@pytest.mark.parametrize(
    "dtype, rtol",
    [("bfloat16", 0.05), ("float16", 5e-3), ("float32", 1e-5), ("float64", 1e-10)],
)
def test_every_float_dtype(name, dtype, rtol):
    """Params, state, trace and gradient keep it; the error is that of rounding."""
    model, state, xs, ts = _cast(problem(name, 5), dtype)
    graph = etrace.compile(model, state, xs[0])
    run = quick_jit(functools.partial(online, graph))
    got = run(graph.params(model), state, xs, ts)
    for leaf in jax.tree.leaves((got, etrace.init_trace(graph))):
        assert leaf.dtype == dtype
    twin = bptt(*problem(name, 5, cut=True))
    assert_same_gradient(_cast(got, "float64"), twin, rtol=rtol)


# 12. Credit of a layer through the memory of the next one.


def _stack(w, x, state, cut):
    first, second = state
    first = 0.9 * first + w["in"] @ x
    second = 0.95 * second + w["up"] @ jnp.tanh(first)
    return w["out"] @ second, (first, second)


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_credit_through_the_next_layer_is_missing_and_reported(vjp):
    """The lower layer's weight lacks the credit that only the upper layer remembers;
    all else is exact. A window of one step sees as little of it as a single step: the
    cosine with BPTT is the same."""
    net = _net(_stack, **{"in": (N, IN), "up": (N, N), "out": (3, N)})
    data = _data(net, (jnp.zeros(N), jnp.zeros(N)))
    graph = etrace.compile(net, data[0], data[1][0], vjp=vjp)
    got, exact = _online(net, *data, vjp=vjp).w, bptt(net, *data).w
    assert_same_gradient((got["up"], got["out"]), (exact["up"], exact["out"]))
    assert _cosine(got["in"], exact["in"]) == pytest.approx(0.9372, abs=1e-4)
    (told,) = (d for d in graph.decisions if d.kind is etrace.Kind.ACROSS_GROUPS)
    assert told.weight == ("w['in']",)
    assert "a multi-step window recovers it" in str(graph.report())


def test_credit_through_the_next_layer_is_recovered_by_windows():
    """The wider the window, the more; one as long as the sequence has all of it."""
    net = _net(_stack, **{"in": (N, IN), "up": (N, N), "out": (3, N)})
    state, xs, ts = data = _data(net, (jnp.zeros(N), jnp.zeros(N)))
    graph = etrace.compile(net, state, xs[0], vjp="multi-step")
    exact, similar = bptt(net, *data), []
    for window in (1, 3, 6, STEPS):
        run = quick_jit(etrace.grad(graph, sum_of_squares, window=window))
        got, *_ = run(graph.params(net), state, None, xs, ts)
        similar.append(_cosine(got.w["in"], exact.w["in"]))
    assert similar == sorted(similar)
    assert similar[0] == pytest.approx(0.9372, abs=1e-4)
    assert_same_gradient(got.w, exact.w)


def _cosine(a, b) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


# 13. Usable under its own transforms alone: no `jit`, `grad`, pickling or sharding.


def test_under_the_transforms_of_jax():
    """Nested: the graph is closed over in one, an argument in the other."""
    model, state, xs, ts = problem("lif", 4)
    graph = etrace.compile(model, state, xs[0])
    params, expected = graph.params(model), reference("lif", "single-step", 4)
    argument = quick_jit(online_outside)(graph, params, state, xs, ts)
    assert_same_gradient(argument, expected)

    both = jax.tree.map(lambda a: jnp.stack([a, a]), (xs, ts))
    closed = jax.checkpoint(functools.partial(online_outside, graph, params, state))
    mapped = quick_jit(jax.vmap(jax.jit(closed)))(*both)
    for b in range(2):
        assert_same_gradient(jax.tree.map(lambda g, b=b: g[b], mapped), expected)


def test_what_is_carried_can_be_pickled():
    """Params, state and trace are all that a checkpoint needs."""
    model, state, xs, _ = problem("lif", 4)
    graph = etrace.compile(model, state, xs[0])
    carried = graph.params(model), state, etrace.init_trace(graph)

    @quick_jit
    def two_steps(carried, xs):
        for x in xs:
            _, *rest = etrace.step(graph, carried[0], carried[1], carried[2], x)
            carried = (carried[0], *rest)
        return carried

    carried = two_steps(carried, xs[:2])
    again = pickle.loads(pickle.dumps(carried))
    got, expected = two_steps(again, xs[2:]), two_steps(carried, xs[2:])
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_enable_x64", True)
import equinox as eqx
import eqx_etrace as etrace

assert len(jax.devices()) == 2
net = eqx.nn.GRUCell(3, 5, key=jax.random.key(0))
xs = jax.random.normal(jax.random.key(1), (4, 6, 3))
h = jnp.zeros((6, 5))
call = lambda m, x, h: (m(x, h),) * 2
graph = etrace.compile(net, h, xs[0], call=call, batched=True)
trace = etrace.init_trace(graph)

@jax.jit
def run(params, h, trace, xs):
    def body(carry, x):
        def loss(params):
            out, h, trace = etrace.step(graph, params, *carry, x)
            return jnp.sum(out**2), (h, trace)
        grads, carry = jax.grad(loss, has_aux=True)(params)
        return carry, grads
    (h, trace), grads = jax.lax.scan(body, (h, trace), xs)
    return jax.tree.map(lambda g: g.sum(0), grads), h, trace

params = graph.params(net)
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
sharded = put(params, P()), put(h, P("batch")), put(trace, P("batch"))
got = run(*sharded, put(xs, P(None, "batch")))
expected = run(params, h, trace, xs)
assert len(jax.tree.leaves(got[2])[0].sharding.device_set) == 2
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
print("equal")
"""


def test_a_batch_sharded_over_two_devices():
    """In a process of its own, where the host passes for two devices."""
    flags = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    )
    found = subprocess.run(
        [sys.executable, "-c", _SHARDED],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr
