"""The oracles against each other, without the library."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_case import one_in
from models import MODELS, Taps
from oracles import (
    Dense,
    assert_same_gradient,
    autodiff,
    cosine,
    differences,
    first_step,
    problem,
    reference,
)


ALL = list(MODELS)
TWINS = [name for name, case in MODELS.items() if case.oracle == "twin"]
LOCAL = [name for name, case in MODELS.items() if case.oracle == "bptt"]
SINGLE = [name for name, case in MODELS.items() if case.vjp == "single-step"]
MULTI = [name for name, case in MODELS.items() if case.vjp == "multi-step"]
FORMS = [(name, "multi-step") for name in ALL] + [(n, "single-step") for n in SINGLE]
# One slot of a unit feeds another one within the step.
SLOTS_IN_SERIES = ["lif", "lif_scalar_tau", "lstm", "alif", "hard_reset", "lif_lif"]
CELLS = ["gru", "lstm", "layernorm_between"]
SPIKING = ["lif", "lif_packed", "alif", "spike_before_hard_reset"]


def _largest(got, expected):
    return max(differences(got, expected).values())


@pytest.mark.parametrize("name", CELLS)
def test_rewritten_formulas_equal_those_of_equinox(name):
    model, state, xs, _ = problem(name)
    got, expected = model.run(xs[0], state, Taps()), model(xs[0], state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SPIKING)
def test_spikes_happen_and_do_not_always_happen(name):
    model, state, xs, _ = problem(name)

    def body(state, x):
        spikes, state = model.layer(x, state, Taps())
        return state, spikes

    rate = jax.lax.scan(body, state, xs)[1].mean()
    assert 0.05 < rate < 0.7


@one_in(3, ALL)
def test_declared_units_hold_the_whole_local_jacobian(name):
    model, state, xs, _ = problem(name)
    dense = Dense(model, state, MODELS[name].groups)
    h = dense.flat(dense.leaves)
    D, _, M = jax.jit(dense.local)(dense.p, h, dense.leaves, xs[0])
    for matrix in (D, M):
        assert np.all(matrix * (1 - dense.same_unit) == 0)
    # Some order of the hidden elements makes M unit triangular.
    nilpotent = np.asarray(M) - np.eye(len(M))
    assert np.all(np.linalg.matrix_power(nilpotent, 3) == 0)


@pytest.mark.parametrize("name", TWINS)
def test_dense_reference_equals_bptt_of_the_hand_cut_twin(name):
    assert_same_gradient(reference(name, "single-step"), autodiff(name, cut=True))


@pytest.mark.parametrize("form", ["single-step", "multi-step"])
@pytest.mark.parametrize("name", LOCAL)
def test_dense_reference_of_a_local_recurrence_equals_bptt(name, form):
    assert_same_gradient(reference(name, form), autodiff(name))


@pytest.mark.parametrize("name, form", FORMS)
def test_one_step_of_the_dense_reference_equals_autodiff(name, form):
    assert_same_gradient(reference(name, form, 1), first_step(name))


@pytest.mark.parametrize("name", SINGLE)
def test_only_the_readout_has_a_gradient_past_the_hidden_state(name):
    model, state, xs, ts = problem(name)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        taps = Taps(new=lambda i, a: jax.lax.stop_gradient(a))
        out, _ = eqx.combine(params, static).run(xs[0], state, taps)
        return jnp.sum((out - ts[0]) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path)
        assert where.startswith(".readout") or not np.any(leaf), where


@one_in(3, ALL)
def test_no_parameter_is_left_out(name):
    grads = reference(name, MODELS[name].vjp)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(leaf), jax.tree_util.keystr(path)


# Guards: the grids would pass with a wrong rule if these gradients were equal.


@one_in(3, [n for n in ALL if n not in LOCAL])
def test_the_rule_is_not_bptt(name):
    got, expected = reference(name, MODELS[name].vjp), autodiff(name)
    assert 0.2 < cosine(got, expected) < 0.9999


@one_in(3, [n for n in ALL if n not in LOCAL])
def test_a_window_of_one_step_is_another_gradient(name):
    single, multi = reference(name, "single-step"), reference(name, "multi-step")
    assert _largest(single, multi) > 1e-3


@pytest.mark.parametrize("name", ["layernorm_between", "alif_trainable_beta"])
def test_single_step_is_wrong_at_once_where_a_weight_moves_other_units(name):
    assert _largest(reference(name, "single-step", 1), first_step(name)) > 1e-3


@pytest.mark.parametrize("name", SLOTS_IN_SERIES)
def test_total_derivative_is_not_the_signal(name):
    assert _largest(reference(name, "total"), reference(name, "single-step")) > 0.05


def test_total_derivative_doubles_the_first_step_of_a_lif_with_current():
    one = reference("lif", "single-step", 1).layer.w_in.weight
    two = reference("lif", "total", 1).layer.w_in.weight
    np.testing.assert_allclose(two, 2 * one, rtol=1e-12)
