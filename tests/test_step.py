"""`step` under JAX's transformations, over dtypes, and with wrong arguments."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import spike

import eqx_etrace as etrace


N, IN, OUT = 6, 4, 2
KEY = jax.random.key(0)


class LIF(eqx.Module):
    """Recurrent, with a synaptic current and a trainable membrane time constant."""

    w_in: eqx.nn.Linear
    w_rec: eqx.nn.Linear
    tau: jax.Array
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        v, g = state
        z = spike(v - 1)
        g = 0.9 * g + self.w_in(x) + self.w_rec(z)
        a = jax.nn.sigmoid(self.tau)
        v = a * (v - z) + (1 - a) * g
        return self.readout(spike(v - 1)), (v, g)


class GRU(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        h = self.cell(x, state)
        return self.readout(h), h


def _lif(dtype=jnp.float64):
    keys = jax.random.split(KEY, 3)
    net = LIF(
        eqx.nn.Linear(IN, N, key=keys[0], dtype=dtype),
        eqx.nn.Linear(N, N, use_bias=False, key=keys[1], dtype=dtype),
        jnp.ones((), dtype),
        eqx.nn.Linear(N, OUT, key=keys[2], dtype=dtype),
    )
    return net, (jnp.full(N, 0.8, dtype), jnp.full(N, 0.5, dtype))


def _gru(dtype=jnp.float64):
    keys = jax.random.split(KEY)
    net = GRU(
        eqx.nn.GRUCell(IN, N, key=keys[0], dtype=dtype),
        eqx.nn.Linear(N, OUT, key=keys[1], dtype=dtype),
    )
    return net, jnp.full(N, 0.3, dtype)


NETS = {"lif": _lif, "gru": _gru}


def _setup(name, dtype=jnp.float64, **options):
    net, state = NETS[name](dtype)
    x = jax.random.normal(KEY, (IN,), dtype)
    graph = etrace.compile(net, state, x, **options)
    return graph, graph.params(net), state, etrace.init_trace(graph), x


def _loss(graph, params, state, trace, x):
    out, state, trace = etrace.step(graph, params, state, trace, x)
    return jnp.sum(out**2), (state, trace)


def _close(a, b, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("name", NETS)
def test_new_params_do_not_retrace(name):
    graph, params, state, trace, x = _setup(name)

    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def gradient(params, state, trace, x):
        return jax.grad(lambda p: _loss(graph, p, state, trace, x), has_aux=True)(
            params
        )

    first, (state, trace) = gradient(params, state, trace, x)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
    second, _ = gradient(moved, state, trace, x + 1)
    assert not np.allclose(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])


@pytest.mark.parametrize("name", NETS)
def test_graph_through_filter_jit_and_jit_and_a_scan_carry(name):
    graph, params, state, trace, x = _setup(name)
    expected = _loss(graph, params, state, trace, x)
    _close(eqx.filter_jit(_loss)(graph, params, state, trace, x), expected)
    _close(jax.jit(_loss)(graph, params, state, trace, x), expected)

    def body(graph, _):
        return graph, _loss(graph, params, state, trace, x)[0]

    _, losses = jax.lax.scan(body, graph, None, length=2)
    np.testing.assert_allclose(losses, [expected[0]] * 2, rtol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_cotangents_of_state_and_trace_are_zero(name):
    graph, params, state, trace, x = _setup(name)

    def total(state, trace):
        return _loss(graph, params, state, trace, x)[0]

    for leaf in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(state, trace)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
@pytest.mark.parametrize("name", NETS)
def test_gradient_of_x_is_that_of_the_step(name, vjp):
    graph, params, state, trace, x = _setup(name, vjp=vjp)

    def plain(x):
        return jnp.sum(graph.model(params)(x, state)[0] ** 2)

    got = jax.grad(lambda x: _loss(graph, params, state, trace, x)[0])(x)
    assert np.abs(got).max() > 1e-6
    _close(got, jax.grad(plain)(x))


def test_a_loss_of_the_returned_state_is_heard():
    """The current is read by the membrane alone, unless the loss reads it too."""
    graph, params, state, trace, x = _setup("lif")

    def ours(params):
        _, (v, g), _ = etrace.step(graph, params, state, trace, x)
        return jnp.sum(v * jnp.sin(g))

    def plain(params):
        _, (v, g) = graph.model(params)(x, state)
        return jnp.sum(v * jnp.sin(g))

    assert graph.groups[0].silent == (False, True)
    _close(jax.grad(ours)(params), jax.grad(plain)(params))


@pytest.mark.parametrize("name", NETS)
def test_vmap_over_examples_and_over_params(name):
    graph, params, state, trace, x = _setup(name)
    grad = jax.grad(lambda p, x: _loss(graph, p, state, trace, x)[0])
    xs = jnp.stack([x, 2 * x, -x])
    mapped = jax.vmap(grad, in_axes=(None, 0))(params, xs)
    for i, one in enumerate(xs):
        _close(jax.tree.map(lambda g, i=i: g[i], mapped), grad(params, one))
    several = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
    mapped = jax.vmap(grad, in_axes=(0, None))(several, x)
    half = jax.tree.map(lambda p: 0.5 * p, params)
    _close(jax.tree.map(lambda g: g[1], mapped), grad(half, x))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NETS)
def test_dtypes_are_kept_and_gradients_close(name, dtype, batched):
    dtype = jnp.dtype(dtype)

    def exactly(tree):
        return jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_array(a) else a, tree
        )

    net, state = NETS[name](dtype)
    xs = jax.random.normal(KEY, (5, IN), dtype)

    def run(net, state, xs):
        if batched:
            state = jax.tree.map(lambda h: jnp.stack([h, 0.9 * h]), state)
            xs = jnp.stack([xs, -xs], axis=1)
        graph = etrace.compile(net, state, xs[0], batched=batched)
        trace, total = etrace.init_trace(graph), None
        params = graph.params(net)
        grad = jax.jit(
            jax.grad(lambda p, s, t, x: _loss(graph, p, s, t, x), has_aux=True)
        )
        for x in xs:
            grads, (state, trace) = grad(params, state, trace, x)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return total, state, trace

    grads, new, trace = run(net, state, xs)
    assert all(a.dtype == dtype for a in jax.tree.leaves((grads, new, trace)))
    expected, _, _ = run(*exactly((net, state, xs)))
    # Three products of three rounded factors over five steps, against the largest.
    bound = 40 * float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        a = np.asarray(a, np.float64)
        assert np.abs(a - b).max() <= bound * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("name", NETS)
def test_x64_off(name):
    with jax.enable_x64(False):
        graph, params, state, trace, x = _setup(name, jnp.float32)
        grads, (state, trace) = jax.grad(
            lambda p: _loss(graph, p, state, trace, x), has_aux=True
        )(params)
    leaves = jax.tree.leaves((grads, state, trace))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_surrogate_gradient_survives():
    """Inlining custom_jvp would turn the derivative of a spike into zero."""
    graph, params, state, trace, x = _setup("lif")
    grads, _ = jax.grad(lambda p: _loss(graph, p, state, trace, x), has_aux=True)(
        params
    )
    assert np.abs(grads.w_in.weight).max() > 1e-6


@pytest.mark.parametrize("name", NETS)
def test_nan_in_params_passes_through(name):
    graph, params, state, trace, x = _setup(name)
    params = jax.tree.map(lambda p: p * jnp.nan, params)
    loss, _ = _loss(graph, params, state, trace, x)
    assert np.isnan(loss)


def test_integer_inputs_and_integer_outputs():
    class Embedded(eqx.Module):
        table: jax.Array
        cell: eqx.nn.GRUCell

        def __call__(self, token, h):
            h = self.cell(self.table[token], h)
            return {"h": h, "best": jnp.argmax(h)}, h

    net = Embedded(jnp.ones((3, IN)), eqx.nn.GRUCell(IN, N, key=KEY))
    h, token = jnp.zeros(N), jnp.asarray(1)
    graph = etrace.compile(net, h, token)
    params, trace = graph.params(net), etrace.init_trace(graph)

    def ours(params):
        out, _, _ = etrace.step(graph, params, h, trace, token)
        return jnp.sum(out["h"] ** 2)

    def plain(params):
        return jnp.sum(graph.model(params)(token, h)[0]["h"] ** 2)

    _close(jax.grad(ours)(params), jax.grad(plain)(params))


def test_keys_and_counters_in_the_state():
    class Noisy(eqx.Module):
        cell: eqx.nn.GRUCell

        def __call__(self, x, state):
            h, key, count = state
            key, now = jax.random.split(key)
            h = self.cell(x + 0.1 * jax.random.normal(now, x.shape, x.dtype), h)
            return h, (h, key, count + 1)

    net = Noisy(eqx.nn.GRUCell(IN, N, key=KEY))
    state, x = (jnp.zeros(N), jax.random.key(3), jnp.asarray(0)), jnp.ones(IN)
    graph = etrace.compile(net, state, x)
    params, trace = graph.params(net), etrace.init_trace(graph)
    ours = jax.grad(lambda p: _loss(graph, p, state, trace, x), has_aux=True)
    grads, ((_, key, count), _) = jax.jit(ours)(params)
    assert count == 1 and key != state[1]
    plain = jax.grad(lambda p: jnp.sum(graph.model(p)(x, state)[0] ** 2))
    _close(grads, plain(params))
    batched = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    graph = etrace.compile(net, batched, jnp.stack([x, x]), batched=True)
    _, (h, _, _), _ = etrace.step(
        graph, params, batched, etrace.init_trace(graph), jnp.stack([x, x])
    )
    np.testing.assert_array_equal(h[0], h[1])


def test_an_optimiser_learns_online():
    """Leaky integration of the input: the online loss falls by more than half."""
    graph, params, state, trace, _ = _setup("gru")
    xs = jax.random.normal(KEY, (300, IN))

    def leaky(y, x):
        y = 0.7 * y + 0.3 * x[:OUT]
        return y, y

    _, targets = jax.lax.scan(leaky, xs[0, :OUT], xs)
    optimiser = optax.adam(1e-2)

    def body(carry, xy):
        params, opt_state, state, trace = carry

        def loss(params):
            out, new, moved = etrace.step(graph, params, state, trace, xy[0])
            return jnp.sum((out - xy[1]) ** 2), (new, moved)

        (value, (state, trace)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state, state, trace), value

    start = (params, optimiser.init(params), state, trace)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic needs it
        _, losses = jax.jit(lambda s: jax.lax.scan(body, s, (xs, targets)))(start)
    assert losses[-50:].mean() < 0.5 * losses[:50].mean()


# -- wrong arguments ------------------------------------------------------------------


def _wrong(name, **changes):
    graph, params, state, trace, x = _setup(name)
    given = {"params": params, "state": state, "trace": trace, "x": x}
    given |= {key: change(given[key]) for key, change in changes.items()}
    return lambda: etrace.step(graph, **given)


def _other_trace(_):
    return etrace.init_trace(_setup("gru", batched=False)[0])


WRONG = {
    "integer x": (
        _wrong("gru", x=lambda x: x.astype(int)),
        ["x: got int64[4]", "expected float64[4]"],
    ),
    "missing x": (_wrong("gru", x=lambda x: None), ["x: got None", "float64[4]"]),
    "x of another size": (_wrong("gru", x=lambda x: x[:-1]), ["x: got float64[3]"]),
    "x in a tuple": (_wrong("gru", x=lambda x: (x, x)), ["leaves x[0], x[1]"]),
    "a string": (_wrong("gru", x=lambda x: "x"), ["x: got an object of type `str`"]),
    "the whole model": (
        _wrong("gru", params=lambda p: eqx.tree_at(lambda p: p.cell.bias, p, None)),
        ["cell.bias: got None, expected float64[18]", "graph.params(model)"],
    ),
    "params of another size": (
        _wrong("gru", params=lambda p: jax.tree.map(lambda a: a[:-1], p)),
        ["cell.weight_ih: got float64[17, 4], expected float64[18, 4]"],
    ),
    "params of another dtype": (
        _wrong("lif", params=lambda p: jax.tree.map(lambda a: a.astype("float32"), p)),
        ["w_in.weight: got float32[6, 4], expected float64[6, 4]"],
    ),
    "a state leaf missing": (
        _wrong("lif", state=lambda s: (s[0], None)),
        ["state[1]: got None, expected float64[6]"],
    ),
    "too much state": (
        _wrong("lif", state=lambda s: (*s, s[0])),
        ["state[2]: got float64[6], expected nothing there"],
    ),
    "the trace of another graph": (
        _wrong("lif", trace=_other_trace),
        ["trace: got", "init_trace(graph)"],
    ),
    "the trace of another size": (
        _wrong("gru", trace=lambda t: jax.tree.map(lambda e: e[:-1], t)),
        ["trace[0] of cell.weight_ih: got float64[17, 4]", "float64[18, 4]"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_get_a_sentence(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError) as info:
        call()
    for word in words:
        assert word in str(info.value)


def test_wrong_batch_sizes_get_a_sentence():
    net, state = _lif()
    states = jax.tree.map(lambda h: jnp.stack([h] * 3), state)
    xs = jnp.ones((3, IN))
    graph = etrace.compile(net, states, xs, batched=True)
    params, trace = graph.params(net), etrace.init_trace(graph)
    with pytest.raises(
        ValueError, match=r"x: got float64\[2, 4\], expected float64\[3"
    ):
        etrace.step(graph, params, states, trace, xs[:2])
    with pytest.raises(ValueError, match=r"state\[0\]: got float64\[6\], expected"):
        etrace.step(graph, params, state, trace, xs)
    other = etrace.init_trace(etrace.compile(net, state, xs[0]))
    with pytest.raises(
        ValueError, match=r"trace\[0\] of w_in.weight: got float64\[1, 4"
    ):
        etrace.step(graph, params, states, other, xs)


def test_params_of_another_model_get_a_sentence():
    graph, *_ = _setup("gru")
    with pytest.raises(ValueError, match="model: got the structure"):
        graph.params(_lif()[0])
