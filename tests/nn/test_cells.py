"""The cells: their formulas, and their gradients under D-RTRL."""

import ast
import functools
import io
import pathlib
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cell_cases import CASES, IN, OUT, UNITS, gate, sigmoid
from models import PLAIN
from oracles import (
    assert_same_gradient,
    bptt,
    dense_reference,
    differences,
    online,
    quick_jit,
)

import eqx_etrace as etrace
from eqx_etrace import nn


STEPS = 6
KEY = jax.random.key(7)
ALL = list(CASES)
OF = {
    oracle: [name for name, case in CASES.items() if oracle in case.oracle]
    for oracle in ("dense", "bptt")
}
EVERY = pytest.mark.parametrize("name", ALL)


class Net(eqx.Module):
    """A cell and a readout. `run` is the same with the cell's step written out."""

    cell: Any
    readout: eqx.nn.Linear
    step: Callable = eqx.field(static=True)

    def __call__(self, x, state):
        y, state = self.cell(x, state)
        return self.readout(y), state

    def run(self, x, state, taps):
        y, state = self.step(jnp, self.cell, x, state, taps)
        return self.readout(y), state


def _random(rng, leaf):
    values = rng.normal(size=(2, *leaf.shape))
    return values[0] + 1j * values[1] if np.iscomplexobj(leaf) else values[0]


@functools.cache
def _cell(name):
    """A cell, a random state and inputs, as NumPy and JAX arrays."""
    cell = CASES[name].make(key=KEY)
    rng = np.random.default_rng(5)
    state = jax.tree.map(functools.partial(_random, rng), cell.init_state())
    return cell, state, rng.normal(size=(20, IN))


@functools.cache
def _problem(name):
    """(net, state, inputs, targets)."""
    cell, state, xs = _cell(name)
    state = jax.tree.map(jnp.asarray, state)
    size = eqx.filter_eval_shape(cell, jnp.zeros(IN), state)[0].size
    net = Net(cell, eqx.nn.Linear(size, OUT, key=KEY), CASES[name].step)
    targets = np.random.default_rng(6).normal(size=(STEPS, OUT))
    return net, state, jnp.asarray(xs[:STEPS]), jnp.asarray(targets)


@functools.cache
def _graph(name):
    net, state, xs, _ = _problem(name)
    return etrace.compile(net, state, xs[0])


@functools.cache
def _online(name):
    net, *data = _problem(name)
    graph = _graph(name)
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(net), *data)


@functools.cache
def _bptt(name):
    return bptt(*_problem(name))


@EVERY
def test_trajectory_equals_the_formula(name):
    cell, state, xs = _cell(name)
    run = quick_jit(lambda state, xs: jax.lax.scan(_swapped(cell), state, xs))
    last, outs = run(jax.tree.map(jnp.asarray, state), jnp.asarray(xs))
    plain, expected = jax.tree.map(np.asarray, cell), []
    for x in xs:
        out, state = CASES[name].step(np, plain, x, state, PLAIN)
        expected.append(out)
    np.testing.assert_allclose(outs, expected, rtol=1e-10, atol=1e-12)
    for got, new in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(got, new, rtol=1e-10, atol=1e-12)
    assert np.ptp(outs, axis=0).min() > 1e-3, "an output does not move"


def _swapped(cell):
    def body(state, x):
        out, state = cell(x, state)
        return state, out

    return body


@EVERY
def test_structure(name):
    graph, case = _graph(name), CASES[name]
    assert [(group.units, group.slots) for group in graph.groups] == [
        (UNITS, case.slots)
    ]
    assert graph.vjp == case.vjp


@pytest.mark.parametrize("name", OF["dense"])
def test_gradient_equals_the_dense_reference(name):
    case, (net, *data) = CASES[name], _problem(name)
    forms = dense_reference(net, *data, groups=case.groups)
    expected = jax.tree.map(lambda g: g.sum(0), forms[case.vjp])
    assert_same_gradient(_online(name), expected)


@pytest.mark.parametrize("name", OF["bptt"])
def test_local_recurrence_equals_bptt(name):
    assert_same_gradient(_online(name), _bptt(name))


@pytest.mark.parametrize("name", [name for name in ALL if name not in OF["bptt"]])
def test_recurrent_products_are_not_bptt(name):
    """A guard: at six steps the two would agree if nothing were cut."""
    assert max(differences(_online(name), _bptt(name)).values()) > 1e-3


@EVERY
def test_no_param_is_left_out(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(_online(name)):
        assert np.any(leaf), jax.tree_util.keystr(path)


# Literal formulas of real-time recurrent learning for element-wise recurrences.


def _numbers(name):
    """The net and its data as NumPy arrays, and dl/dy of an output y of the cell."""
    net, *data = jax.tree.map(np.asarray, _problem(name))

    def by_output(y, target):
        residual = net.readout.weight @ y + net.readout.bias - target
        return 2 * net.readout.weight.T @ residual

    return net.cell, *data, by_output


def _add(total, **parts):
    for name, part in parts.items():
        total[name] = total.get(name, 0) + part


def test_formula_of_the_lru():
    p, h, xs, ts, by_output = _numbers("lru")
    lam = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    gamma, b, c = (
        np.exp(p.gamma_log),
        p.b_real + 1j * p.b_imag,
        p.c_real + 1j * p.c_imag,
    )
    e_lam, e_gam, e_b, total = 0, 0, 0, {}
    for x, t in zip(xs, ts, strict=True):
        e_lam = lam * e_lam + h
        e_gam = lam * e_gam + b @ x
        e_b = lam[:, None] * e_b + gamma[:, None] * x
        h = lam * h + gamma * (b @ x)
        out = (c @ h).real + p.d @ x
        # dl = Re(signal * dh) for a change dh of the complex state.
        by_out = by_output(out, t)
        signal = c.T @ by_out
        _add(
            total,
            nu_log=(signal * e_lam * lam * -np.exp(p.nu_log)).real,
            theta_log=(signal * e_lam * lam * 1j * np.exp(p.theta_log)).real,
            gamma_log=(signal * e_gam * gamma).real,
            b_real=(signal[:, None] * e_b).real,
            b_imag=-(signal[:, None] * e_b).imag,
            c_real=np.outer(by_out, h.real),
            c_imag=-np.outer(by_out, h.imag),
            d=np.outer(by_out, x),
        )
    _assert_formula("lru", total)


def _assert_formula(name, total):
    got = _online(name).cell
    for param, expected in total.items():
        value = functools.reduce(getattr, param.split("__"), got)
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-13)


def _rtu_formula(factor):
    """`factor`: what stands for theta in the derivatives by theta_log."""
    p, (c1, c2), xs, ts, by_output = _numbers("rtu")
    nu, theta = np.exp(p.nu_log), np.exp(p.theta_log)
    r = np.exp(-nu)
    g, phi, norm = r * np.cos(theta), r * np.sin(theta), np.sqrt(1 - r**2)
    zeros = np.zeros(UNITS), np.zeros(UNITS)
    wide = np.zeros((UNITS, IN)), np.zeros((UNITS, IN))
    e = {"nu_log": zeros, "theta_log": zeros, "weight_1": wide, "weight_2": wide}
    total = {}
    for x, t in zip(xs, ts, strict=True):
        w1, w2 = p.weight_1 @ x, p.weight_2 @ x
        d_norm = nu * r**2 / norm
        by_theta = factor(theta)
        direct = {
            "nu_log": (
                -nu * g * c1 + nu * phi * c2 + d_norm * w1,
                -nu * g * c2 - nu * phi * c1 + d_norm * w2,
            ),
            "theta_log": (
                -phi * by_theta * c1 - g * by_theta * c2,
                -phi * by_theta * c2 + g * by_theta * c1,
            ),
            "weight_1": (np.outer(norm, x), 0),
            "weight_2": (0, np.outer(norm, x)),
        }
        c1, c2 = g * c1 - phi * c2 + norm * w1, g * c2 + phi * c1 + norm * w2
        out = np.tanh(np.concatenate([c1, c2]))
        s1, s2 = np.split(by_output(out, t) * (1 - out**2), 2)
        for name, (e1, e2) in e.items():
            g_, phi_ = (a.reshape(-1, *(1,) * (e1.ndim - 1)) for a in (g, phi))
            d1, d2 = direct[name]
            e[name] = e1, e2 = g_ * e1 - phi_ * e2 + d1, g_ * e2 + phi_ * e1 + d2
            s1_, s2_ = (a.reshape(-1, *(1,) * (e1.ndim - 1)) for a in (s1, s2))
            _add(total, **{name: s1_ * e1 + s2_ * e2})
    return total


def test_formula_of_the_rtu():
    _assert_formula("rtu", _rtu_formula(lambda theta: theta))


def test_formula_of_the_rtu_without_its_chain_factor_is_wrong():
    wrong = _rtu_formula(np.ones_like)
    right = _online("rtu").cell
    np.testing.assert_allclose(right.nu_log, wrong["nu_log"], rtol=1e-10)
    assert not np.allclose(right.theta_log, wrong["theta_log"], rtol=0.1)


def test_formula_of_the_quasi_lstm():
    p, c, xs, ts, by_output = _numbers("quasi_lstm")
    wf, wz = p.forget.weight_hh, p.candidate.weight_hh
    e, total = {}, {}
    for x, t in zip(xs, ts, strict=True):
        f = sigmoid(np, p.forget.weight_ih @ x + wf * c + p.forget.bias)
        z = np.tanh(p.candidate.weight_ih @ x + wz * c + p.candidate.bias)
        z_by, f_by = (1 - f) * (1 - z**2), (c - z) * f * (1 - f)
        a = f + z_by * wz + f_by * wf
        direct = {
            "candidate__weight_ih": np.outer(z_by, x),
            "forget__weight_ih": np.outer(f_by, x),
            "candidate__weight_hh": z_by * c,
            "forget__weight_hh": f_by * c,
            "candidate__bias": z_by,
            "forget__bias": f_by,
        }
        c = f * c + (1 - f) * z
        o = sigmoid(np, gate(p.output, x, c))
        by_out = by_output(o * c, t)
        signal = by_out * o + p.output.weight_hh.T @ (by_out * c * o * (1 - o))
        for name, now in direct.items():
            wide = (UNITS, *(1,) * (now.ndim - 1))
            e[name] = a.reshape(wide) * e.get(name, 0) + now
            _add(total, **{name: signal.reshape(wide) * e[name]})
    _assert_formula("quasi_lstm", total)


# What a user does with a module besides.


def _paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path).lstrip(".") for path, _ in leaves]


@EVERY
def test_key_paths_of_the_params(name):
    assert sorted(_paths(_cell(name)[0])) == sorted(CASES[name].paths.split())


@EVERY
def test_saved_and_loaded(name):
    cell, other = _cell(name)[0], CASES[name].make(key=jax.random.key(8))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cell)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, jax.tree.map(jnp.zeros_like, other))
    assert eqx.tree_equal(loaded, cell)
    assert not eqx.tree_equal(other, cell)


@EVERY
def test_dtype_of_params_state_and_output(name):
    make = functools.partial(CASES[name].make, dtype=jnp.float32)
    cell = eqx.filter_eval_shape(make, key=KEY)
    state = cell.init_state()
    call = eqx.filter_eval_shape(type(cell).__call__, cell, jnp.ones(IN, "f4"), state)
    out, new = call
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cell)} == {"float32"}
    single = {"complex64"} if name == "lru" else {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state, new))} == single
    assert out.dtype == jnp.float32
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert before.shape == after.shape == (UNITS,)
        assert not np.any(before)


@EVERY
def test_wrong_sizes_are_refused(name):
    cell, state, _ = _cell(name)
    state = jax.tree.map(jnp.asarray, state)
    with pytest.raises(ValueError, match=rf"shape \({IN + 1},\), expected \({IN},\)"):
        cell(jnp.ones(IN + 1), state)
    with pytest.raises(ValueError, match=r"use `jax.vmap` for a batch"):
        cell(jnp.ones((5, IN)), state)
    leaves, treedef = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        short = [*leaves[:i], jnp.ones(1, leaf.dtype), *leaves[i + 1 :]]
        with pytest.raises(ValueError, match=rf"shape \(1,\), expected \({UNITS},\)"):
            cell(jnp.ones(IN), jax.tree.unflatten(treedef, short))


MAKERS = {n: c.make for n, c in CASES.items() if n not in ("gru", "lstm")}


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_that_are_none_are_refused(name):
    kind = MAKERS[name].func
    more = (OUT,) if name == "lru" else ()
    with pytest.raises(ValueError, match="got hidden_size=0, expected an integer"):
        kind(IN, 0, *more, key=KEY)
    with pytest.raises(ValueError, match="got input_size=True"):
        kind(True, UNITS, *more, key=KEY)


@pytest.mark.parametrize("kind", [nn.RNN, nn.IndRNN, nn.MGU, nn.URLSTM, nn.MinLSTM])
def test_without_a_bias(kind):
    cell = kind(IN, UNITS, use_bias=False, key=KEY)
    assert not [path for path in _paths(cell) if path.rsplit(".")[-1] == "bias"]
    cell(jnp.ones(IN), cell.init_state())


def test_complex_states_have_no_half_precision():
    with pytest.raises(
        ValueError, match="nn.LRU: got dtype bfloat16, expected float32"
    ):
        nn.LRU(IN, UNITS, OUT, dtype=jnp.bfloat16, key=KEY)


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_core_and_convenience_do_not_import_each_other():
    root = pathlib.Path(etrace.__file__).parent
    for path in root.rglob("*.py"):
        first = path.relative_to(root).parts[0]
        if first in ("plot", "_nir"):  # These stand above both.
            continue
        own = first in ("nn", "tasks")
        for name in _imported(path):
            if own:
                assert not name.startswith(("..", "eqx_etrace")), (path, name)
            else:
                assert not re.search(r"\b(nn|tasks|plot)\b", name), (path, name)


def test_wrappers_refuse_another_cell():
    gru = eqx.nn.GRUCell(IN, UNITS, key=KEY)
    with pytest.raises(TypeError):
        nn.LSTM(gru)  # pyright: ignore[reportArgumentType] it is the wrong one


def test_eigenvalues_start_on_the_ring():
    cells = (
        nn.LRU(IN, 50, OUT, r_min=0.4, r_max=0.9, max_phase=0.3, key=KEY),
        nn.RTU(IN, 50, r_min=0.4, r_max=0.9, max_phase=0.3, key=KEY),
    )
    for cell in cells:
        r = np.exp(-np.exp(cell.nu_log))
        assert 0.4 < r.min() < 0.5 and 0.85 < r.max() < 0.9
        assert 0 < np.exp(cell.theta_log).min() < 0.05
        assert 0.25 < np.exp(cell.theta_log).max() < 0.3
    np.testing.assert_allclose(
        np.exp(cells[0].gamma_log), np.sqrt(1 - np.exp(-2 * np.exp(cells[0].nu_log)))
    )


@pytest.mark.parametrize("options", [{"r_min": 0.9, "r_max": 0.5}, {"max_phase": 0.0}])
def test_a_ring_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="nn.LRU: got "):
        nn.LRU(IN, UNITS, OUT, key=KEY, **options)
    with pytest.raises(ValueError, match="nn.RTU: got "):
        nn.NonlinearRTU(IN, UNITS, key=KEY, **options)


def test_forget_gates_start_on_many_time_scales():
    share = np.sort(jax.nn.sigmoid(nn.URLSTM(IN, 200, key=KEY).forget_bias))
    np.testing.assert_allclose(share, np.linspace(1 / 200, 1 - 1 / 200, 200), atol=0.1)


def test_gates_of_min_lstm_are_finite_for_large_inputs():
    cell = nn.MinLSTM(1, 1, dtype=jnp.float32, key=KEY)
    cell = jax.tree.map(jnp.ones_like, cell)
    out, _ = cell(jnp.full(1, -300, jnp.float32), jnp.ones(1, jnp.float32))
    assert np.isfinite(out).all()
