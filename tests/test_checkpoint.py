"""Checkpoints: nothing is lost, and nothing goes on from another."""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import quick_jit
from windows import of_models, squares

import eqx_etrace as etrace


OPTIMISER = optax.adam(1e-2)
RULES = {"drtrl": etrace.DRTRL(), "uoro": etrace.UORO(jax.random.key(3))}


def _start(rule, name="gru"):
    graph, params, state, xs, ts = of_models.__wrapped__(name, rule, 12)
    opt_state, trace = OPTIMISER.init(params), etrace.init_trace(graph)
    return graph, etrace.Checkpoint(params, opt_state, state, trace, 0), xs, ts


def _learned(graph, start, xs, ts):
    """The checkpoint after these steps, an update at each."""
    fun = quick_jit(etrace.learn(graph, squares, OPTIMISER))
    with jax.numpy_dtype_promotion("standard"):  # Adam wants it.
        _, params, opt_state, state, trace = fun(*start[:4], xs, ts)
    step = start.step + len(xs)
    return etrace.Checkpoint(params, opt_state, state, trace, step)


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_learning_goes_on_in_mid_sequence_bit_for_bit(tmp_path, name):
    graph, start, xs, ts = _start(RULES[name])
    half = _learned(graph, start, xs[:6], ts[:6])
    whole = _learned(graph, half, xs[6:], ts[6:])
    path = tmp_path / "run.eqx"
    etrace.save_checkpoint(path, graph, half)

    model = graph.model(start.params)
    again = etrace.compile(model, start.state, xs[0], RULES[name])
    found = etrace.load_checkpoint(path, again, like=start)
    _assert_equal(found, half)
    assert found.step == 6
    _assert_equal(_learned(again, found, xs[6:], ts[6:]), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.eqx"]


def test_a_file_that_was_cut_is_refused(tmp_path):
    graph, start, *_ = _start(RULES["drtrl"])
    path = tmp_path / "run.eqx"
    etrace.save_checkpoint(path, graph, start)
    whole = path.read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="run.eqx: got .*, expected"):
            etrace.load_checkpoint(path, graph, like=start)
    path.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match="expected its end"):
        etrace.load_checkpoint(path, graph, like=start)
    path.write_bytes(whole)
    _assert_equal(etrace.load_checkpoint(path, graph, like=start), start)


def test_another_graph_is_refused(tmp_path):
    graph, start, *_ = _start(RULES["drtrl"])
    path = tmp_path / "run.eqx"
    etrace.save_checkpoint(path, graph, start)
    other, like, *_ = _start(etrace.ESDRTRL(0.9))
    with pytest.raises(ValueError, match="another graph, whose rule is 'DRTRL'"):
        etrace.load_checkpoint(path, other, like=like)
    other, like, *_ = _start(RULES["drtrl"], "lstm")
    with pytest.raises(ValueError, match="another graph, whose params is"):
        etrace.load_checkpoint(path, other, like=like)


def test_another_optimiser_or_size_is_refused(tmp_path):
    graph, start, *_ = _start(RULES["drtrl"])
    path = tmp_path / "run.eqx"
    etrace.save_checkpoint(path, graph, start)
    plain = optax.sgd(0.1, momentum=0.9).init(start.params)
    with pytest.raises(ValueError, match="got checkpoint.opt_state"):
        etrace.load_checkpoint(path, graph, like=start._replace(opt_state=plain))
    single = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf,
        start,
    )
    with pytest.raises(ValueError, match="float64.*expected.*float32"):
        etrace.load_checkpoint(path, graph, like=single)
    with pytest.raises(ValueError, match="leaves, expected"):
        etrace.load_checkpoint(path, graph, like=start._replace(step=None))


def test_what_fails_on_the_way_leaves_the_old_one(tmp_path, monkeypatch):
    graph, start, *_ = _start(RULES["drtrl"])
    path = tmp_path / "run.eqx"
    etrace.save_checkpoint(path, graph, start)

    def full(file, tree):
        file.write(b"some")
        raise OSError("No space left on device")

    monkeypatch.setattr(eqx, "tree_serialise_leaves", full)
    with pytest.raises(OSError, match="No space"):
        etrace.save_checkpoint(path, graph, start._replace(step=9))
    monkeypatch.undo()
    assert etrace.load_checkpoint(path, graph, like=start).step == 0
    assert [file.name for file in tmp_path.iterdir()] == ["run.eqx"]


def test_a_missing_file_is_the_usual_error(tmp_path):
    graph, start, *_ = _start(RULES["drtrl"])
    with pytest.raises(FileNotFoundError):
        etrace.load_checkpoint(pathlib.Path(tmp_path) / "none", graph, like=start)
