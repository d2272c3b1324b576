"""Tasks: their shapes, and a solver of each that gets its targets from its inputs."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit
from scipy.integrate import solve_ivp

import eqx_etrace as etrace
from eqx_etrace import nn, tasks


# name: (small arguments, shape of the inputs, shape of the targets, classes or None)
TASKS = {
    "copy": ({"symbols": 4, "length": 3, "delay": 5}, (12, 6), (12,), 5),
    "delayed_match_to_sample": (
        {"stimuli": 3, "sample_steps": 2, "delay_steps": 4, "test_steps": 3},
        (9, 3),
        (9,),
        2,
    ),
    "adding": ({"steps": 11}, (11, 2), (11, 1), None),
    "anbn": ({"min_count": 2, "max_count": 5}, (11, 3), (11,), 3),
    "evidence_accumulation": (
        {"gap_steps": 2, "cue_steps": 3, "delay_steps": 4, "recall_steps": 5}
        | {"channels": 2, "cue_rate": 1.0, "noise_rate": 0.25},
        (44, 8),
        (44,),
        2,
    ),
    "store_recall": (
        {"periods": 10, "period_steps": 3, "channels": 2}
        | {"probability": 0.4, "rate": 1.0},
        (30, 8),
        (30,),
        2,
    ),
    "integrator": ({"steps": 9, "channels": 2, "decay": 0.75}, (9, 2), (9, 2), None),
    "flip_flop": ({"bits": 2, "steps": 30}, (30, 2), (30, 2), None),
    "rotation": ({"steps": 20}, (20, 3), (20, 2), None),
    "mackey_glass": (
        {"steps": 60, "substeps": 20, "washout": 0, "normalise": False},
        (60, 1),
        (60, 1),
        None,
    ),
    "lorenz": (
        {"steps": 60, "substeps": 20, "washout": 0, "normalise": False}
        | {"coordinates": (0, 1, 2)},
        (60, 3),
        (60, 3),
        None,
    ),
    "henon": ({"steps": 80, "horizon": 3}, (80, 1), (80, 1), None),
}
ALL = list(TASKS)
EVERY = pytest.mark.parametrize("name", ALL)
BATCH = 200
# The first two are the same.
SEEDS = jnp.array([0, *range(BATCH - 1)])


@functools.cache
def _batch(name) -> Any:
    """Samples in front, from the small arguments."""
    make = functools.partial(getattr(tasks, name), **TASKS[name][0])
    run = quick_jit(jax.vmap(lambda seed: make(jax.random.key(seed))))
    return jax.tree.map(np.asarray, run(SEEDS))


@EVERY
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_shapes_and_dtypes(name, dtype):
    options, inputs, targets, classes = TASKS[name]
    make = functools.partial(getattr(tasks, name), dtype=dtype, **options)
    sample = jax.eval_shape(make, jax.random.key(0))
    assert [a.shape for a in sample] == [inputs, targets, inputs[:1]]
    assert sample.inputs.dtype == (dtype or "float64")
    assert sample.targets.dtype == (dtype or "float64" if classes is None else int)
    assert sample.mask.dtype == bool


@EVERY
def test_the_key_decides(name):
    inputs, targets, mask = _batch(name)
    for array in (inputs, targets, mask):
        np.testing.assert_array_equal(array[0], array[1])
    assert not np.all(inputs[2:] == inputs[:1])


@EVERY
def test_values_are_finite_and_masks_not_empty(name):
    inputs, targets, mask = _batch(name)
    assert np.isfinite(inputs).all() and np.isfinite(targets).all()
    assert mask.any(1).all()
    classes = TASKS[name][3]
    if classes is not None:
        assert set(np.unique(targets)) == set(range(classes))


def test_defaults_have_the_sizes_of_their_sources():
    shape = jax.eval_shape(tasks.evidence_accumulation, jax.random.key(0)).inputs.shape
    assert shape == (2250, 40)
    shape = jax.eval_shape(tasks.copy, jax.random.key(0)).inputs.shape
    assert shape == (41, 10)


# Solvers: each reads the inputs alone.


def test_copy():
    inputs, targets, mask = _batch("copy")
    symbols = inputs.argmax(-1)
    np.testing.assert_array_equal(inputs, np.eye(6)[symbols])
    assert set(np.unique(symbols[:, :3])) == {0, 1, 2, 3}
    assert np.all(symbols[:, 3:8] == 4) and np.all(symbols[:, 8] == 5)
    assert np.all(symbols[:, 9:] == 4)
    np.testing.assert_array_equal(targets[:, 9:], symbols[:, :3])
    assert np.all(targets[:, :9] == 4)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(12) > 8, (BATCH, 12)))


def test_delayed_match_to_sample():
    inputs, targets, mask = _batch("delayed_match_to_sample")
    first, second = inputs[:, 0].argmax(-1), inputs[:, -1].argmax(-1)
    np.testing.assert_array_equal(inputs[:, :2], np.eye(3)[first][:, None].repeat(2, 1))
    np.testing.assert_array_equal(
        inputs[:, -3:], np.eye(3)[second][:, None].repeat(3, 1)
    )
    assert not inputs[:, 2:6].any()
    np.testing.assert_array_equal(targets, (first == second)[:, None].repeat(9, 1))
    assert 0.4 < targets[:, 0].mean() < 0.6
    assert set(zip(first, second, strict=True)) == set(np.ndindex(3, 3))
    np.testing.assert_array_equal(mask[0], np.arange(9) > 5)


def test_noise_on_the_stimuli():
    key = jax.random.key(0)
    make = functools.partial(tasks.delayed_match_to_sample, delay_steps=200)
    noise = make(key, noise=0.3).inputs - make(key).inputs
    assert abs(np.std(noise) - 0.3) < 0.03


def test_adding():
    inputs, targets, mask = _batch("adding")
    numbers, marks = inputs[..., 0], inputs[..., 1]
    assert np.all((numbers >= 0) & (numbers < 1)) and numbers.std() > 0.25
    np.testing.assert_array_equal(marks[:, :5].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 5:].sum(1), 1)
    assert np.all(marks.any(0)), "a step is never marked"
    total = [n[m == 1].sum() for n, m in zip(numbers, marks, strict=True)]
    expected = np.repeat(np.array(total)[:, None, None], 11, axis=1)
    np.testing.assert_allclose(targets, expected, rtol=1e-12)
    np.testing.assert_array_equal(mask[0], np.arange(11) == 10)


def test_anbn():
    inputs, targets, mask = _batch("anbn")
    counts = set()
    for x, t, m in zip(inputs.argmax(-1), targets, mask, strict=True):
        word = "".join("#ab"[s] for s in [*x, t[-1]])
        match = re.fullmatch("#(a+)(b+)#+", word)
        assert match is not None and len(match[1]) == len(match[2]), word
        counts.add(len(match[1]))
        np.testing.assert_array_equal(t[:-1], x[1:])
        np.testing.assert_array_equal(m, x == 2)
        read = {"a": 0, "b": 0}
        for symbol, target, counted in zip(word, t, m, strict=False):
            if symbol != "#":
                read[symbol] += 1
            if counted:
                assert target == (2 if read["b"] < read["a"] else 0), word
    np.testing.assert_array_equal(inputs.sum(-1), 1)
    assert counts == {2, 3, 4, 5}


def test_evidence_accumulation():
    inputs, targets, mask = _batch("evidence_accumulation")
    groups = inputs.reshape(BATCH, 44, 4, 2)
    np.testing.assert_array_equal(groups[..., :3, 0], groups[..., :3, 1])
    left, right, recall, noise = np.moveaxis(groups[..., 0], -1, 0)
    cues = (left + right)[:, :35].reshape(BATCH, 7, 5)
    np.testing.assert_array_equal(cues, np.broadcast_to([0, 0, 1, 1, 1], cues.shape))
    assert not left[:, 35:].any() and not right[:, 35:].any()
    on_right = right[:, :35].reshape(BATCH, 7, 5)[..., -1].sum(1)
    np.testing.assert_array_equal(targets, (on_right > 3)[:, None].repeat(44, 1))
    np.testing.assert_array_equal(recall, mask)
    np.testing.assert_array_equal(mask[0], np.arange(44) >= 39)
    assert abs(noise.mean() - 0.25) < 0.02
    assert 0.4 < targets[:, 0].mean() < 0.6
    # One side has 0.7 of seven cues: a variance of 7 * 0.21 and a mean 1.4 off 3.5.
    assert abs(np.mean((on_right - 3.5) ** 2) - (7 * 0.21 + 1.4**2)) < 0.8


def test_evidence_all_on_one_side():
    small = TASKS["evidence_accumulation"][0]
    for seed in range(3):
        key = jax.random.key(seed)
        inputs, targets, _ = tasks.evidence_accumulation(key, bias=1.0, **small)
        spikes = inputs[:35].reshape(35, 4, 2).sum((0, 2))
        assert spikes[targets[0]] == 42 and spikes[1 - targets[0]] == 0


def test_rates_of_spikes():
    inputs, _, mask = quick_jit(tasks.evidence_accumulation)(jax.random.key(0))
    means = inputs.reshape(2250, 4, 10).mean((0, 2))
    on = np.array([700, 700, 150, 2250]) / 2250
    assert abs(means[0] + means[1] - 0.04 * on[0]) < 0.002
    assert abs(means[2] - 0.04 * on[2]) < 0.001
    assert abs(means[3] - 0.01) < 0.002
    assert mask.sum() == 150


def test_store_recall():
    inputs, targets, mask = _batch("store_recall")
    periods = inputs.reshape(BATCH, 10, 3, 4, 2)
    shown = periods[:, :, :1, :, :1]
    np.testing.assert_array_equal(periods, np.broadcast_to(shown, periods.shape))
    for sample, wanted, counts in zip(shown, targets, mask, strict=True):
        stored, kept = False, 0
        for number, (zero, one, store, recall) in enumerate(sample.reshape(10, 4)):
            assert zero + one == 1 - recall
            assert not (stored and store) and not (recall and not stored)
            kept = one if store else kept
            stored = (stored or bool(store)) and not recall
            steps = slice(3 * number, 3 * number + 3)
            assert (wanted[steps] == kept).all() and (counts[steps] == recall).all()
        assert not stored
    assert abs(shown[:, :8, ..., 2:, 0].sum(-1).mean() - 0.4) < 0.05
    assert abs(shown[..., 1, 0].mean() / shown[..., :2, 0].sum(-1).mean() - 0.5) < 0.05


def test_store_recall_rate():
    inputs, _, _ = quick_jit(tasks.store_recall)(jax.random.key(2))
    bits = inputs.reshape(2400, 4, 10)[:, :2]
    assert abs(bits.mean() - 0.025) < 0.004


def test_integrator():
    inputs, targets, mask = _batch("integrator")
    y = np.zeros((BATCH, 2))
    for t in range(9):
        y = 0.75 * y + inputs[:, t]
        np.testing.assert_allclose(targets[:, t], y, rtol=1e-12)
    assert abs(inputs.std() - 1 / 3) < 0.02
    assert mask.all()


def test_flip_flop():
    inputs, targets, mask = _batch("flip_flop")
    assert set(np.unique(inputs)) == {-1, 0, 1}
    assert np.all(inputs[:, 0] != 0)
    assert abs((inputs[:, 1:] != 0).mean() - 0.1) < 0.02
    held = inputs[:, 0]
    for t in range(30):
        held = np.where(inputs[:, t] == 0, held, inputs[:, t])
        np.testing.assert_array_equal(targets[:, t], held)
    assert abs(targets.mean()) < 0.2 and mask.all()


def test_rotation():
    inputs, targets, mask = _batch("rotation")
    velocity, shown = inputs[..., 0], inputs[..., 1:]
    assert not shown[:, 1:].any()
    start = np.arctan2(shown[:, 0, 1], shown[:, 0, 0])
    heading = start[:, None] + np.cumsum(velocity, axis=1)
    expected = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    np.testing.assert_allclose(targets, expected, rtol=1e-9, atol=1e-12)
    assert abs(velocity.std() - 0.3) < 0.02 and mask.all()
    assert start.min() < -2.5 and start.max() > 2.5


def _solution(rate, start, times):
    solution = solve_ivp(
        rate, (times[0], times[-1]), start, "DOP853", times, rtol=1e-11, atol=1e-12
    )
    return solution.y.T


def test_lorenz_follows_its_equations():
    inputs, targets, _ = _batch("lorenz")

    def rate(time, s):
        x, y, z = s
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    times = 0.02 * np.arange(61)
    for sample in (0, 5):
        expected = _solution(rate, inputs[sample, 0], times)
        np.testing.assert_allclose(inputs[sample], expected[:-1], atol=1e-5)
        np.testing.assert_allclose(targets[sample], expected[1:], atol=1e-5)


def test_mackey_glass_follows_its_equation():
    """By the method of steps: within a delay the past is a known function."""
    inputs, targets, _ = _batch("mackey_glass")
    first = inputs[5, 0, 0]
    assert 0.5 < first < 1.5
    past, values, start = (lambda time: first), [first], first
    for lap in range(4):
        begin = 17.0 * lap

        def rate(time, x, past=past):
            delayed = past(time - 17.0)
            return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

        span = begin, begin + 17.0
        lap_of = solve_ivp(
            rate, span, [start], "DOP853", rtol=1e-11, atol=1e-12, dense_output=True
        ).sol
        values += list(lap_of(begin + np.arange(1, 18))[0])
        past, start = (lambda time, sol=lap_of: sol(time)[0]), lap_of(span[1])[0]
    np.testing.assert_allclose(inputs[5, :, 0], values[:60], atol=2e-6)
    np.testing.assert_allclose(targets[5, :, 0], values[1:61], atol=2e-6)


def test_henon_follows_its_map():
    """Of a normalised x: x = m + s v, and the map is one of three successive x."""
    inputs, targets, _ = _batch("henon")
    series = np.concatenate([inputs, targets[:, -3:]], axis=1)[..., 0]
    np.testing.assert_array_equal(targets[:, :-3], inputs[:, 3:])
    np.testing.assert_allclose(series.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(series.std(1), 1, rtol=1e-12)
    for v in series[:5]:
        # x2 = 1 - 1.4 x1 ** 2 + 0.3 x0 is linear in 1, v1, v1 ** 2 and v0.
        columns = np.stack([np.ones(81), v[1:-1], v[1:-1] ** 2, v[:-2]], axis=1)
        weights, residual, rank, _ = np.linalg.lstsq(columns, v[2:])
        assert rank == 4 and residual[0] < 1e-20
        s = -weights[2] / 1.4
        m = -weights[1] / 2.8
        np.testing.assert_allclose(weights[3], 0.3, rtol=1e-9)
        expected = (1 - 1.4 * m**2 + 0.3 * m - m) / s
        np.testing.assert_allclose(weights[0], expected, rtol=1e-8)


@pytest.mark.parametrize("make", [tasks.lorenz, tasks.mackey_glass])
def test_streams_are_normalised_and_shifted(make):
    sample = quick_jit(functools.partial(make, steps=300, horizon=7))(jax.random.key(0))
    np.testing.assert_array_equal(sample.targets[:-7], sample.inputs[7:])
    series = np.concatenate([sample.inputs, sample.targets[-7:]])
    np.testing.assert_allclose(series.mean(), 0, atol=1e-12)
    np.testing.assert_allclose(series.std(), 1, rtol=1e-12)
    assert series.shape == (307, 1)


# Tasks and the library.


def test_a_batch_with_time_in_front_trains_a_batched_graph():
    net = nn.Sequential(
        [
            nn.MinGRU(2, 3, key=jax.random.key(0)),
            nn.LinearReadout(3, 1, key=jax.random.key(1)),
        ]
    )
    state = jax.vmap(lambda _: net.init_state())(jnp.arange(4))
    make = jax.vmap(functools.partial(tasks.adding, steps=6), out_axes=1)
    sample = quick_jit(make)(jax.random.split(jax.random.key(2), 4))
    graph = etrace.compile(net, state, sample.inputs[0], batched=True)

    def loss(out, target):
        return jnp.sum((out - target) ** 2, axis=-1)

    run = quick_jit(etrace.value_and_grad(graph, loss))
    args = graph.params(net), state, None, sample.inputs, sample.targets, sample.mask
    losses, grads, *_ = run(*args)
    assert losses.shape == (6, 4)
    assert np.all(losses[:-1] == 0) and np.all(losses[-1] > 0)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


# What is refused. name of the task: arguments, message

REFUSED = [
    ("copy", {"symbols": 0}, "got symbols=0"),
    ("copy", {"length": True}, "got length=True"),
    ("copy", {"delay": -1}, "got delay=-1"),
    ("delayed_match_to_sample", {"stimuli": 1}, "got stimuli=1"),
    ("delayed_match_to_sample", {"test_steps": 0}, "got test_steps=0"),
    ("delayed_match_to_sample", {"delay_steps": -2}, "got delay_steps=-2"),
    ("delayed_match_to_sample", {"noise": -0.1}, "got noise=-0.1"),
    ("adding", {"steps": 1}, "got steps=1"),
    ("anbn", {"min_count": 0}, "got min_count=0"),
    ("anbn", {"min_count": 5, "max_count": 4}, "got max_count=4, .* at least 5"),
    ("evidence_accumulation", {"cues": 4}, "got cues=4, expected an odd number"),
    ("evidence_accumulation", {"bias": 1.5}, "got bias=1.5"),
    ("evidence_accumulation", {"cue_rate": -0.1}, "got cue_rate=-0.1"),
    ("evidence_accumulation", {"recall_steps": 0}, "got recall_steps=0"),
    ("store_recall", {"periods": 1}, "got periods=1"),
    ("store_recall", {"probability": 1.5}, "got probability=1.5"),
    ("store_recall", {"rate": -0.1}, "got rate=-0.1"),
    ("integrator", {"decay": 1.1}, "got decay=1.1"),
    ("integrator", {"scale": 0.0}, "got scale=0.0"),
    ("flip_flop", {"probability": 2.0}, "got probability=2.0"),
    ("flip_flop", {"bits": 0}, "got bits=0"),
    ("rotation", {"speed": -1.0}, "got speed=-1.0"),
    ("mackey_glass", {"tau": 17.03}, "tau=17.03, .* whole number of solver steps"),
    ("mackey_glass", {"tau": 1.0, "substeps": 1}, "at least two"),
    ("mackey_glass", {"power": 0.0}, "got power=0.0"),
    ("lorenz", {"coordinates": (3,)}, r"got coordinates=\(3,\)"),
    ("lorenz", {"horizon": 0}, "got horizon=0"),
    ("lorenz", {"dt": 0.0}, "got dt=0.0"),
    ("henon", {"coordinates": ()}, r"got coordinates=\(\)"),
    ("henon", {"washout": -1}, "got washout=-1"),
]


@pytest.mark.parametrize("name, options, message", REFUSED)
def test_arguments_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"tasks.{name}: .*{message}"):
        getattr(tasks, name)(jax.random.key(0), **options)
