"""What the gates of a GRU have in common is filtered once."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit
from spread import alike
from windows import apart, each_square, local

import eqx_etrace as etrace
from eqx_etrace._pieces import find_runs


N, IN, STEPS, BATCH = 5, 3, 23, 2
RULE = etrace.ESDRTRL((0.7, 0.8))


class Net(eqx.Module):
    cell: Any

    def __call__(self, x, h):
        h = self.cell(x, h)
        return h, h


def network(batch=None):
    net = Net(eqx.nn.GRUCell(IN, N, key=jax.random.key(0)))
    lead = (STEPS,) if batch is None else (STEPS, batch)
    xs, ts = (jax.random.normal(jax.random.key(n), (*lead, n)) for n in (IN, N))
    return net, jnp.zeros((*lead[1:], N)), xs, ts


def test_a_gru_filters_four_numbers_per_unit():
    net, h, xs, _ = network()
    graph = etrace.compile(net, h, xs[0], RULE)
    names = [relation.name.split(".")[-1] for relation in graph.relations]
    assert names == ["weight_ih", "bias", "weight_hh", "bias_n"]
    in_hh, n_of_hh = graph.relations[2].pieces, graph.relations[3].pieces
    assert in_hh is not None and n_of_hh is not None
    assert (in_hh.runs, in_hh.own) == (((0, 2 * N, 0, 0),), (2 * N, 3 * N))
    assert (n_of_hh.runs, n_of_hh.own) == (((0, N, 2, 2 * N),), None)
    kept = [jax.tree.leaves(entry.postsynaptic) for entry in etrace.init_trace(graph)]
    assert sum(leaf.size for leaves in kept for leaf in leaves) == 4 * N


@pytest.mark.parametrize("window", [1, 7, STEPS])
@pytest.mark.parametrize("batch", [None, BATCH])
def test_it_gives_what_filters_of_all_give(batch, window):
    net, h, xs, ts = network(batch)
    graph = etrace.compile(net, h, xs[0], RULE, batched=batch is not None)
    params = graph.params(net)
    reset = jax.random.bernoulli(jax.random.key(9), 0.2, xs.shape[:-1])
    found = []
    for each in (graph, apart(graph)):
        fun = etrace.value_and_grad(each, each_square, window=window)

        def both(each=each, fun=fun):
            first = fun(params, h, None, xs, ts)
            _, *moved = etrace.evolve(each, params, first[2], first[3], xs)
            again = fun(params, *moved, xs, ts, reset=reset)
            return first[:3], again[:3], local(each).whole(each.relations, again[3])

        found.append(quick_jit(both)())
    alike(found[0][:2], found[1][:2], 1e-12)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        alike(one.postsynaptic, other.postsynaptic, 1e-12)


def test_weights_of_other_rules_share_nothing():
    net, h, xs, _ = network()
    rule = etrace.ByWeight(RULE, {"cell.weight_hh": etrace.ESDRTRL(0.5)})
    graph = etrace.compile(net, h, xs[0], rule)
    assert [r.pieces for r in graph.relations] == [None] * 4
    exact = etrace.compile(net, h, xs[0], etrace.DRTRL())
    assert [r.pieces for r in exact.relations] == [None] * 4


def test_a_budget_counts_what_is_kept():
    net, h, xs, _ = network()
    graph = etrace.compile(net, h, xs[0], RULE)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(etrace.init_trace(graph)))
    fits = etrace.Budget(size, [RULE])
    same = etrace.compile(net, h, xs[0], fits)
    assert jax.tree.structure(etrace.init_trace(same)) == jax.tree.structure(
        etrace.init_trace(graph)
    )
    with pytest.raises(etrace.CompileError, match=f"expected at least {size}"):
        etrace.compile(net, h, xs[0], etrace.Budget(size - 1, [RULE]))


def rows(*numbers):
    return np.array(numbers)[:, None]


@pytest.mark.parametrize(
    ("second", "runs"),
    [
        ((1, 2, 3), ((0, 3, 0, 0),)),
        ((2, 3, 9), ((0, 2, 0, 1),)),
        ((8, 1, 2, 9), ()),  # The rest is in two pieces.
        ((9, 3, 1), ((1, 2, 0, 2), (2, 3, 0, 0))),
        ((3, 2, 1, 3, 2), ()),  # Too many.
        ((7, 8, 9), ()),
    ],
)
def test_runs(second, runs):
    assert find_runs([rows(1, 2, 3), rows(*second)]) == [(), runs]
