"""Convolutions: the closed form on random shapes, and models end to end."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import reduce_window_sum_p
from jax.lax import ConvDimensionNumbers
from oracles import assert_same_gradient, bptt, one_step, online, quick_jit
from test_op_rules import check_batch, check_gradient, use_of

import eqx_etrace as etrace
from eqx_etrace import Kind
from eqx_etrace._op_rules import ByAD, Convolution
from eqx_etrace._windows import window_reads


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with everything drawn at random."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    params: dict

    def __call__(self, w, x):
        return jax.lax.conv_general_dilated(x, w, **self.params)


def _draw(seed, spatial):
    """Small, valid, and with an output that is not empty."""
    rng = np.random.default_rng(seed)

    def pick(low: int, high: int) -> np.ndarray:
        return np.asarray(rng.integers(low, high, spatial))

    groups = int(rng.integers(1, 4)) if seed % 2 else 1
    per_group, outputs = int(rng.integers(1, 3)), groups * int(rng.integers(1, 3))
    size, kernel = pick(2, 6 - spatial), pick(1, 4)
    lhs_dilation, rhs_dilation = pick(1, 3), pick(1, 3)
    reach = (kernel - 1) * rhs_dilation + 1
    missing = np.maximum(reach - ((size - 1) * lhs_dilation + 1), 0)
    # Negative padding crops, where there is enough to crop.
    low, high = pick(-1, 2), pick(0, 2)
    low = np.maximum(low, missing - high)
    x_shape = [int(rng.integers(1, 3)), groups * per_group, *size]
    w_shape = [outputs, per_group, *kernel]
    of_x, of_w, of_y = (tuple(rng.permutation(spatial + 2).tolist()) for _ in "xwy")
    shapes = []
    for shape, order in ((x_shape, of_x), (w_shape, of_w)):
        put = dict(zip(order, shape, strict=True))
        shapes.append(tuple(int(put[axis]) for axis in range(spatial + 2)))
    params = {
        "window_strides": tuple(pick(1, 3).tolist()),
        "padding": tuple(zip(low.tolist(), high.tolist(), strict=True)),
        "lhs_dilation": tuple(lhs_dilation.tolist()),
        "rhs_dilation": tuple(rhs_dilation.tolist()),
        "feature_group_count": groups,
        "dimension_numbers": ConvDimensionNumbers(of_x, of_w, of_y),
    }
    return Conv(shapes[0], shapes[1], params)


def _random_use(conv):
    keys = jax.random.split(jax.random.key(3))
    w = jax.random.normal(keys[0], conv.w_shape)
    return use_of(conv, w, jax.random.normal(keys[1], conv.x_shape))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 5))]
)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_random_convolution_equals_the_default(spatial, seed):
    rule, default, operands, shape = _random_use(_draw(seed, spatial))
    assert type(rule) is Convolution
    assert math.prod(shape) > 0
    check_gradient(rule, default, operands, shape)
    check_batch(rule, shape)


def test_the_draws_cover_what_they_should():
    draws = [_draw(seed, spatial).params for seed in range(5) for spatial in (1, 2, 3)]
    for key in ("window_strides", "lhs_dilation", "rhs_dilation"):
        assert any(max(p[key]) > 1 for p in draws), key
    assert any(p["feature_group_count"] > 1 for p in draws)
    assert any(min(low for low, _ in p["padding"]) < 0 for p in draws)


def test_depthwise_trace_is_as_small_as_its_kernel():
    conv = Conv((1, 4, 5), (8, 1, 3), {"window_strides": (1,), "padding": "VALID"})
    conv.params["feature_group_count"] = 4
    rule, *_ = _random_use(conv)
    assert rule.trace_shape == (1, 3, 8, 1, 3)


def test_other_places_of_the_weight_are_left_to_the_default():
    def as_x(w, x):
        return jax.lax.conv_general_dilated(w, x, (1,), "VALID")

    w, x = jnp.ones((1, 2, 5)), jnp.ones((3, 2, 2))
    assert type(use_of(as_x, w, x)[0]) is ByAD

    def example_groups(w, x):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", batch_group_count=2)

    w, x = jnp.ones((4, 2, 3)), jnp.ones((4, 2, 5))
    assert type(use_of(example_groups, w, x)[0]) is ByAD


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_patches_are_exact_and_sums_do_not_stall(dtype):
    """The sum over 3000 places stalls at 256 or 2048 in 16 bits."""
    x = jnp.ones((1, 1, 3000), dtype)
    rule, _, operands, shape = use_of(
        lambda w, x: jax.lax.conv(x, w, (1,), "VALID"), jnp.ones((1, 1, 1), dtype), x
    )
    trace = rule.influence(jnp.ones(shape, dtype), operands)
    assert trace.dtype == dtype
    np.testing.assert_array_equal(trace, np.ones(rule.trace_shape))
    got = rule.contract([jnp.ones(shape, dtype)], [trace])
    np.testing.assert_array_equal(got, [[[3000.0]]])


# Models.

KEY = jax.random.key(0)


class Local(eqx.Module):
    """h' = tanh(0.5 h + conv(x)): the recurrence stays within the unit."""

    conv: eqx.Module

    def __call__(self, x, h):
        h = jnp.tanh(0.5 * h + self.conv(x))  # pyright: ignore[reportCallIssue]
        return h, h


class Recurrent(eqx.Module):
    """A convolution over the hidden state as well; `cut` is the twin."""

    conv: eqx.nn.Conv2d
    over_h: eqx.nn.Conv2d
    leak: jax.Array
    cut: bool = eqx.field(static=True, default=False)

    def __call__(self, x, h):
        seen = jax.lax.stop_gradient(h) if self.cut else h
        leak = jax.nn.sigmoid(self.leak)
        h = leak * h + jnp.tanh(self.conv(x) + self.over_h(seen))
        return jnp.sin(h), h


def _recurrent(cut=False):
    keys = jax.random.split(KEY)
    over_h = eqx.nn.Conv2d(3, 3, 3, padding=1, key=keys[0])
    conv = eqx.nn.Conv2d(2, 3, (2, 3), padding="SAME", key=keys[1])
    return Recurrent(conv, over_h, jnp.linspace(-1, 1, 3)[:, None, None], cut)


class Pooled(eqx.Module):
    """Convolution, then pooling, then one unit a place."""

    conv: eqx.nn.Conv2d
    pool: eqx.Module

    def __call__(self, x, h):
        h = 0.5 * h + self.pool(self.conv(x))  # pyright: ignore[reportCallIssue]
        h = jnp.tanh(h)
        return h, h


LOCAL = {
    "1-D, strided": (eqx.nn.Conv1d(2, 3, 3, stride=2, key=KEY), (2, 7)),
    "1-D, dilated": (eqx.nn.Conv1d(2, 3, 2, dilation=2, key=KEY), (2, 6)),
    "2-D, groups": (eqx.nn.Conv2d(4, 4, 2, groups=2, padding=1, key=KEY), (4, 3, 3)),
    "2-D, circular": (
        eqx.nn.Conv2d(1, 2, 3, padding="SAME", padding_mode="CIRCULAR", key=KEY),
        (1, 3, 4),
    ),
    "3-D": (eqx.nn.Conv3d(1, 2, 2, key=KEY), (1, 3, 3, 2)),
    "transposed": (
        eqx.nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, key=KEY),
        (2, 4),
    ),
}


def _sequence(shape, out_shape, steps=6):
    keys = jax.random.split(jax.random.key(7), 3)
    xs = jax.random.normal(keys[0], (steps, *shape))
    ts = jax.random.normal(keys[1], (steps, *out_shape))
    return 0.5 * jax.random.normal(keys[2], out_shape), xs, ts


def _online(graph, model, state, xs, ts):
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(model), state, xs, ts)


def _check_local(model, shape, out_shape):
    state, xs, ts = _sequence(shape, out_shape)
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == "single-step"
    assert {r.op.name for r in graph.relations} == {"convolution", "elementwise"}
    got = _online(graph, model, state, xs, ts)
    assert_same_gradient(got, bptt(model, state, xs, ts))
    got = _online(graph, model, state, xs[:1], ts[:1])
    assert_same_gradient(got, one_step(model, state, xs[0], ts[0]))
    return graph


@pytest.mark.parametrize("name", LOCAL)
def test_local_recurrence_equals_bptt(name):
    conv, shape = LOCAL[name]
    out_shape = jax.eval_shape(conv, jnp.zeros(shape)).shape
    graph = _check_local(Local(conv), shape, out_shape)
    assert [g.units for g in graph.groups] == [math.prod(out_shape)]


def test_a_recurrent_convolution_equals_the_hand_cut_twin():
    model, twin = _recurrent(), _recurrent(cut=True)
    state, xs, ts = _sequence((2, 3, 4), (3, 3, 4))
    graph = etrace.compile(model, state, xs[0])
    assert (graph.vjp, [g.units for g in graph.groups]) == ("single-step", [36])
    assert [r.op.name for r in graph.relations].count("convolution") == 2
    assert any(
        d.kind is Kind.CUT and "the recurrent product" in d.reason
        for d in graph.decisions
    )
    got = _online(graph, model, state, xs, ts)
    expected = bptt(twin, state, xs, ts)
    assert_same_gradient(got, expected)
    exact = bptt(model, state, xs, ts)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_same_gradient(got, exact, rtol=1e-3)
    got = _online(graph, model, state, xs[:1], ts[:1])
    assert_same_gradient(got, one_step(model, state, xs[0], ts[0]))


def test_a_batch_of_examples_sums_their_gradients():
    model = _recurrent()
    _, xs, ts = _sequence((2, 2, 3), (3, 2, 3), steps=3)
    xs, ts = (jnp.stack([a, 2 * a[::-1]], axis=1) for a in (xs, ts))
    state = 0.3 * ts[0]
    graph = etrace.compile(model, state, xs[0], batched=True)
    got = _online(graph, model, state, xs, ts)
    single = etrace.compile(model, state[0], xs[0, 0])
    each = [_online(single, model, state[b], xs[:, b], ts[:, b]) for b in range(2)]
    assert_same_gradient(got, jax.tree.map(lambda a, b: a + b, *each))


def test_a_fixed_kernel_over_the_state_is_cut():
    """A smoothing kernel couples neighbours without a weight."""

    class Smoothed(eqx.Module):
        conv: eqx.nn.Conv1d
        cut: bool = eqx.field(static=True, default=False)

        def __call__(self, x, h):
            kernel = jnp.ones((1, 1, 3)) / 3
            seen = jax.lax.stop_gradient(h) if self.cut else h
            mean = jax.lax.conv(seen[None], kernel, (1,), "SAME")[0]
            h = jnp.tanh(0.5 * h + self.conv(x) - mean)
            return h, h

    conv = eqx.nn.Conv1d(2, 1, 3, padding=1, key=KEY)
    state, xs, ts = _sequence((2, 40), (1, 40))
    graph = etrace.compile(Smoothed(conv), state, xs[0])
    assert [(g.units, g.slots) for g in graph.groups] == [(40, 1)]
    got = _online(graph, Smoothed(conv), state, xs, ts)
    expected = bptt(Smoothed(conv, cut=True), state, xs, ts)
    assert_same_gradient(got, expected)


POOLS = {
    "mean": eqx.nn.AvgPool2d(2, 2),
    "mean, padded": eqx.nn.AvgPool2d(2, 2, padding=1),
    "maximum": eqx.nn.MaxPool2d((2, 1), (2, 1)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_between_convolution_and_units_keeps_the_credit(name):
    """Each place of the convolution falls into one window, and so feeds one unit."""
    conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=KEY)
    model = Pooled(conv, POOLS[name])
    out_shape = jax.eval_shape(lambda x: model.pool(conv(x)), jnp.zeros((2, 4, 4)))  # pyright: ignore
    _check_local(model, (2, 4, 4), out_shape.shape)


def test_windows_that_overlap_mix():
    """A place that feeds two units has no unit of its own: its credit is that of the
    current step, and the form of the step that gives it is chosen."""
    conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=KEY)
    model = Pooled(conv, eqx.nn.AvgPool2d(2, 1))
    state, xs, ts = _sequence((2, 3, 3), (2, 2, 2), steps=1)
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == "multi-step"
    assert "moves other units, too, through `reduce_window_sum`" in graph.report()
    got = _online(graph, model, state, xs, ts)
    assert_same_gradient(got, one_step(model, state, xs[0], ts[0]))


@pytest.mark.parametrize("seed", range(4))
def test_the_reads_of_a_window_are_those_of_its_derivative(seed):
    rng = np.random.default_rng(seed)
    shape = (3, 5)
    low, high = rng.integers(-1, 3, (2, 2)).tolist()
    params = {
        "window_dimensions": tuple(rng.integers(1, 4, 2).tolist()),
        "window_strides": tuple(rng.integers(1, 3, 2).tolist()),
        "padding": tuple(zip(low, high, strict=True)),
        "base_dilation": tuple(rng.integers(1, 3, 2).tolist()),
        "window_dilation": tuple(rng.integers(1, 3, 2).tolist()),
    }
    reads = window_reads(np.arange(15).reshape(shape), params)
    jacobian = jax.jacobian(
        lambda x: reduce_window_sum_p.bind(x, **params).reshape(-1)
    )(jnp.zeros(shape))
    got = np.zeros((reads[0].size, 15))
    for row in reads.reshape(len(reads), -1):
        got[np.flatnonzero(row >= 0), row[row >= 0]] += 1
    assert got.size > 0
    np.testing.assert_array_equal(got, jacobian.reshape(got.shape))
