"""Random cells: the library against the dense reference, step by step, in float64.

`pytest tests/test_fuzz.py --fuzz 5000` draws that many new cells at random; without the
option the same 200 are drawn every time. Four tests share them, for `pytest -n`.
"""

import dataclasses
import functools
import secrets
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import (
    IN,
    Cell,
    Drive,
    Population,
    RandomCell,
    Read,
    Slot,
    Source,
    Taps,
    make,
)
from hypothesis import HealthCheck, given, note, seed, settings
from jax.flatten_util import ravel_pytree
from oracles import assert_same_gradient, quick_jit, sum_of_squares
from random_cells import cells, expected_units, is_clean, reads_around, same_unit

import eqx_etrace as etrace


STEPS = 5
CI_EXAMPLES = 200
SHARDS = 4
MULTI = "multi-step"


# The dense reference; the formulas are those at the head of `oracles.py`. What is new
# is that units are given element by element, and that a weight behind a cut, which has
# no trace, gets in the single-step form the whole gradient of the current step.


def _derivatives(cell, unravel_p, unravel_h, p, h, x, t):
    """Of one step: D, F, M of the local program, and the derivatives of the loss."""

    def step(near, far, h, **taps):
        far = unravel_p(far)
        taps = Taps(**taps, far=lambda name, w: far[name])
        return RandomCell(unravel_p(near), cell).run(x, unravel_h(h), taps)

    def perturb(delta):
        added = unravel_h(delta)
        return lambda i, value: value + added[i]

    def local(near, h, delta):
        new = perturb(delta)
        state = step(near, stop(p), h, recur=stop, leave=stop, new=new)[1]
        return ravel_pytree(state)[0]

    def whole(near, far, h, delta):
        return sum_of_squares(step(near, far, h, new=perturb(delta))[0], t)

    def past_state(near):
        out, _ = step(near, p, h, new=lambda i, value: stop(value))
        return sum_of_squares(out, t)

    stop, zero = jax.lax.stop_gradient, jnp.zeros_like(h)
    F, D, M = jax.jacrev(local, argnums=(0, 1, 2))(p, h, zero)
    near, far, dh, T = jax.grad(whole, argnums=(0, 1, 2, 3))(p, p, h, zero)
    direct = jax.grad(past_state)(p) + far
    new = ravel_pytree(step(p, p, h)[1])[0]
    return new, D, F, M, T, dh, near + far, direct


def reference(cell, model, state, xs, ts):
    """For each form of the step the gradient of every step, on a leading axis."""
    p, unravel_p = ravel_pytree(model.params)
    h, unravel_h = ravel_pytree(state)
    one = quick_jit(functools.partial(_derivatives, cell, unravel_p, unravel_h))
    mask = same_unit(cell)
    forms = {"single-step": [], "multi-step": [], "total": []}
    J = np.zeros((h.size, p.size))
    for x, t in zip(xs, ts, strict=True):
        h, *found = one(p, h, x, t)
        D, F, M, T, dh, dp, direct = (np.asarray(value) for value in found)
        np.testing.assert_array_equal((D, M), (D * mask, M * mask))
        J_old, J = J, D @ J + F
        forms["single-step"].append(np.linalg.solve(M.T, T) @ J + direct)
        forms["multi-step"].append(dp + dh @ J_old)
        forms["total"].append(T @ J + direct)
    return {name: _unravelled(model.params, rows) for name, rows in forms.items()}


def _unravelled(params, rows):
    """As `ravel_pytree` does, in NumPy: nothing is compiled."""
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = [zip(np.split(row, ends), leaves, strict=True) for row in rows]
    return [
        jax.tree.unflatten(treedef, [a.reshape(leaf.shape) for a, leaf in part])
        for part in parts
    ]


def online(graph, params, state, xs, ts):
    """The same through the library."""

    @quick_jit
    def one(params, state, trace, x, t):
        def loss(params):
            out, *carried = etrace.step(graph, params, state, trace, x)
            return sum_of_squares(out, t), tuple(carried)

        return jax.grad(loss, has_aux=True)(params)

    grads, trace = [], etrace.init_trace(graph)
    for x, t in zip(xs, ts, strict=True):
        grad, (state, trace) = one(params, state, trace, x, t)
        grads.append(grad.params)
    return grads


def problem(cell: Cell):
    model, state, width = make(cell)
    rng = np.random.default_rng(cell.seed + 100)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    state = tuple(jnp.asarray(0.8 * draw(*leaf.shape)) for leaf in state)
    return model, state, draw(STEPS, IN), draw(STEPS, width)


def found_units(graph) -> set[frozenset[int]]:
    """The units of a graph, by the numbers of their elements through all leaves."""
    sizes = [int(np.prod(spec.shape)) for spec in graph.state_leaves.specs]
    first = np.cumsum([0, *sizes])
    units = set()
    for group in graph.groups:
        slots = []
        for leaf, index in zip(group.slot_leaf, group.index, strict=True):
            number = graph.hidden.leaves[leaf]
            places = np.arange(sizes[number]) if index is None else np.asarray(index)
            slots.append(first[number] + places)
        units |= {frozenset(int(k) for k in unit) for unit in np.stack(slots, axis=1)}
    return units


def compiled(cell, model, state, x):
    """The graph as it chose the form of its step, and with the multi-step form."""
    graph = etrace.compile(model, state, x, max_slots=cell.max_slots)
    both = {graph.vjp: graph, MULTI: dataclasses.replace(graph, vjp=MULTI)}
    # Of every second cell the form it chose is enough.
    return both if len(repr(cell)) % 2 else {graph.vjp: graph}


def check(cell: Cell, tell: Callable[[str], Any] = str) -> None:
    model, state, xs, ts = problem(cell)
    graphs = compiled(cell, model, state, xs[0])
    graph = next(iter(graphs.values()))
    tell(str(graph.report()))
    assert found_units(graph) == expected_units(cell)
    assert graph.vjp == "single-step" or not is_clean(cell)
    assert graph.vjp == MULTI or not reads_around(cell)
    expected = reference(cell, model, state, xs, ts)
    for form, graph in graphs.items():
        got = online(graph, graph.params(model), state, xs, ts)
        for k in range(STEPS):
            tell(f"{form}, step {k}")
            assert_same_gradient(got[k], expected[form][k], atol=1e-12)
            if k == 0:  # nothing is past, and this is plain autodiff
                assert_same_gradient(got[0], expected[MULTI][0], atol=1e-12)


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.slow
def test_random_cells(shard, request):
    wanted = request.config.getoption("--fuzz")
    number = secrets.randbits(32) if wanted else shard
    profile = settings(
        max_examples=-(-(wanted or CI_EXAMPLES) // SHARDS),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @profile
    @seed(number)
    @given(cells())
    def random_cell(cell):
        check(cell, note)

    random_cell()


# Found by the random cells.


@pytest.mark.parametrize("first", ["drive", "state"])
def test_a_sum_joins_slots_in_whatever_order_they_were_added(first):
    """The second slot sums over the first before that is stored."""
    summed = ("summed", ("new", 0), ("half", ("old", 1)))
    one, other = ("drive", 0), ("old", 0)
    inner = (one, other) if first == "drive" else (other, one)
    population = Population(
        units=4,
        slots=(Slot(("add", *inner)), Slot(summed)),
        drives=(Drive((Source("x"),)),),
        leaves=(("flat", (0, 1)),),
    )
    check(Cell((population,), (Read("new", (0, 1)),)))


# What the cells are not drawn to contain.


def _ring(w, u, x, h):
    """Old state of another unit alone joins the product: the cut is before it."""
    del u
    h = jnp.tanh(w @ x + jnp.roll(h, 1))
    return h, h


def _spelt_out(w, u, x, h):
    """A recurrent product as elementwise product and sum: cut before the weight."""
    h = jnp.tanh(w @ x + jnp.sum(u * h[None], axis=1))
    return h, h


def _shared_through_a_sum(w, u, x, h):
    """Both slots hear one drive, the second through a sum that joins nothing."""
    del u
    drive = w @ x
    second = jnp.sum(jnp.stack([drive, x]), axis=0)
    h = jnp.stack([0.9 * h[0] + drive, 0.5 * h[1] + second])
    return h, h


class _Plain(eqx.Module):
    w: jax.Array
    u: jax.Array
    fun: Any = eqx.field(static=True)

    def __call__(self, x, state):
        return self.fun(self.w, self.u, x, state)


def _product(w, u, x, h):
    h = jnp.tanh(w @ x + u @ h)
    return h, h


@pytest.mark.parametrize(
    "fun, shape, weight",
    [
        pytest.param(_product, (IN,), "u", id="product"),
        pytest.param(_ring, (IN,), "w", id="ring"),
        pytest.param(_spelt_out, (IN,), "u", id="spelt out"),
        pytest.param(_shared_through_a_sum, (2, IN), "w", id="shared"),
    ],
)
def test_every_entry_of_a_weight_has_a_trace(fun, shape, weight):
    rng = np.random.default_rng(0)
    w, u = (jnp.asarray(rng.normal(size=(IN, IN))) for _ in range(2))
    model, state, x = _Plain(w, u, fun), jnp.ones(shape), jnp.ones(IN)
    graph = etrace.compile(model, state, x, max_slots=3)
    start = etrace.init_trace(graph)
    trace = etrace.step(graph, graph.params(model), state, start, x)[2]
    pairs = zip(graph.relations, trace, strict=True)
    kept = [entries for r, entries in pairs if r.weight == (weight,)]
    assert kept and all(np.all(leaf) for leaf in jax.tree.leaves(kept))
