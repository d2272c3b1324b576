"""Another rule for each weight: every weight gets what its rule gives alone."""

import dataclasses
import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_same_gradient, differences, quick_jit
from windows import (
    apart,
    assert_same,
    by_steps,
    each_square,
    of_catalogue,
    of_models,
    random_trace,
    squares,
)

import eqx_etrace as etrace
from eqx_etrace import _window
from eqx_etrace._report import size
from eqx_etrace._rules._by_weight import check_rules, name_of


D, ES, OTTT = etrace.DRTRL(), etrace.ESDRTRL(0.8), etrace.OTTT(0.5)
UNIT = etrace.DRTRL(scope="unit"), etrace.ESDRTRL(0.8, scope="unit")
# Other rules, which give the same numbers.
D_AGAIN, ES_AGAIN = etrace.DRTRL(trace_dtype=jnp.float64), etrace.ESDRTRL((0.8, 0.8))
STEPS, B = 9, 2
RNN = "filtered_rnn"


def _mixed(graph) -> etrace.ByWeight:
    assert isinstance(graph.rule, etrace.ByWeight)
    return graph.rule


def _named(tree):
    """Its leaves by key path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in paths}


# One rule everywhere.


@pytest.mark.parametrize("rule", [D, ES])
def test_one_rule_everywhere_is_that_rule(rule):
    """Not an operation more."""
    again = dataclasses.replace(rule)
    assert again is not rule
    mixed = etrace.ByWeight(rule, {"layer.u": again, "readout": again})
    texts = []
    for given in (rule, mixed):
        graph, params, state, xs, ts = of_models("indrnn", given, 8)
        trace = etrace.init_trace(graph)

        def every(params, state, trace, xs, ts, graph=graph):
            run = etrace.value_and_grad(graph, squares, window=8)
            step = etrace.step(graph, params, state, trace, xs[0])
            return run(params, state, None, xs, ts), step

        text = str(jax.make_jaxpr(every)(params, state, trace, xs, ts))
        texts.append(re.sub("0x[0-9a-f]+", "", text))
    assert texts[0] == texts[1]


PAIRS = {
    "drtrl": (D, etrace.ByWeight(D, {"layer.w_rec": D_AGAIN})),
    "es": (
        ES,
        etrace.ByWeight(ES, {"layer.w_rec": ES_AGAIN, "layer.w_in.bias": ES_AGAIN}),
    ),
}


@pytest.mark.parametrize("name, vjp", [("drtrl", "single-step"), ("es", "multi-step")])
def test_rules_that_agree_are_one(name, vjp):
    """Two rules that do not know of each other that they are the same."""
    found, optimiser = [], optax.sgd(0.01)
    for rule in PAIRS[name]:
        graph, params, state, xs, ts = of_models(
            "filtered_rnn", rule, STEPS, B, vjp=vjp
        )
        learn = quick_jit(etrace.learn(graph, squares, optimiser, every=4))
        # The trace is another where two rules do not share.
        opt_state = optimiser.init(params)
        found.append(learn(params, opt_state, state, None, xs, ts)[:2])
    assert len(_mixed(graph).rules) == 2
    assert_same(*found)


@pytest.mark.parametrize("other", [D_AGAIN, ES])
def test_long_windows_are_taken_back_in_chunks_if_all_rules_can(other, monkeypatch):
    monkeypatch.setattr(_window, "CHUNK", 4)
    rule = etrace.ByWeight(D, {"layer.w_rec": other})
    graph, params, state, xs, ts = of_models(RNN, rule, 12, B)
    run = etrace.value_and_grad(graph, squares, window=12)
    args = params, state, None, xs, ts
    chunks = re.search(r"length=3\b", str(jax.make_jaxpr(run)(*args)))
    assert bool(chunks) == _mixed(graph).by_adjoint == (other is D_AGAIN)
    if chunks:
        expected = functools.partial(by_steps, graph, squares)
        assert_same(quick_jit(run)(*args), quick_jit(expected)(*args))


# Different rules.


def _times(path, shape):
    return "tau" in path and len(shape) == 1


MIXED = {
    "lif": etrace.ByWeight(D, [("layer.w_rec", ES), (_times, OTTT)]),
    "rnn_indrnn": etrace.ByWeight(ES, {"second": D, "second.w_in.bias": ES}),
    "filtered_rnn": etrace.ByWeight(UNIT[1], {"layer.w_rec": UNIT[0]}),
    "spike_before_hard_reset": etrace.ByWeight(D, {"layer.w_in": ES, "layer.tau": ES}),
}


def _gradients(name, rule):
    graph, params, state, xs, ts = of_models(name, rule, STEPS)
    run = quick_jit(functools.partial(by_steps, graph, squares))
    return graph, _named(run(params, state, None, xs, ts)[1])


@pytest.mark.parametrize("name", MIXED)
def test_each_weight_has_the_gradient_of_its_rule(name):
    """Of that rule with all weights, step by step, in either form of the step."""
    graph, got = _gradients(name, MIXED[name])
    rules = _mixed(graph).rules
    alone = {name_of(rule): _gradients(name, rule)[1] for rule in rules}
    assert len(alone) == len(rules) > 1
    of = _mixed(graph).of
    related = {path: of(r) for r in graph.relations for path in r.weight}
    assert {name_of(rule) for rule in related.values()} == set(alone)
    gaps = []
    for path, gradient in got.items():
        mine = name_of(related.get(path, rules[0]))
        assert_same_gradient({path: gradient}, {path: alone[mine][path]}, rtol=1e-12)
        others = (found[path] for rule, found in alone.items() if rule != mine)
        gaps += [differences([gradient], [other])["[0]"] for other in others]
    assert max(gaps) > 1e-2


@pytest.mark.parametrize("name, window", [("lif", STEPS), ("rnn_indrnn", 4)])
def test_windows_equal_their_steps(name, window):
    """A batch, from a trace that is not zero, with a mask and resets."""
    graph, params, state, xs, ts = of_models(name, MIXED[name], STEPS, B)
    assert graph.vjp == "single-step" and len(_mixed(graph).rules) > 1
    rng = np.random.default_rng(3)
    mask = jnp.asarray(rng.uniform(0.5, 1.5, (STEPS, B)))
    options = {"reset": jnp.asarray(rng.uniform(size=(STEPS, B)) < 0.15)}
    args = params, state, random_trace(graph), xs, ts, mask
    fused = etrace.value_and_grad(graph, each_square, window=window)

    @quick_jit
    def both(*args):
        expected = by_steps(graph, each_square, *args, **options)
        return fused(*args, **options), expected

    assert_same(*both(*args))


def test_a_batch_is_its_samples():
    graph, params, state, xs, ts = of_models("lif", MIXED["lif"], STEPS, B)
    one, *_ = of_models("lif", MIXED["lif"], STEPS)

    @quick_jit
    def both(params, state, xs, ts):
        def sample(state, xs, ts):
            return by_steps(one, squares, params, state, None, xs, ts)[1:]

        grads, *rest = jax.vmap(sample, in_axes=(0, 1, 1))(state, xs, ts)
        expected = jax.tree.map(lambda g: g.sum(0), grads), *rest
        return by_steps(graph, squares, params, state, None, xs, ts)[1:], expected

    assert_same(*both(params, state, xs, ts))


# What is kept, and what the report says of it.


class Sums(eqx.Module):
    """Three products with one x; two of them, a third and a bias are summed."""

    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    bias: jax.Array

    def __call__(self, x, h):
        keep = jax.nn.sigmoid(self.d @ x)
        h = keep * h + jnp.tanh(self.a @ x + self.b @ x + self.c @ h + self.bias)
        return h, h


N, IN = 5, 4


def _sums(rule, **options):
    shapes = (N, IN), (N, IN), (N, N), (N, IN), (N,)
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    net = Sums(*map(jax.random.normal, keys, shapes))
    h, x = jnp.zeros((B, N)), jax.random.normal(keys[-1], (STEPS, B, IN))
    graph = etrace.compile(net, h, x[0], rule=rule, batched=True, **options)
    return graph, (graph.params(net), h, None, x, jnp.ones((STEPS, B, N)))


SHARING = [
    {"a": ES, "c": ES, "d": ES},
    {"b": ES, "d": etrace.ESDRTRL(0.7)},
    {"a": ES, "b": ES_AGAIN, "c": ES, "d": ES_AGAIN, "bias": ES_AGAIN},
]


@pytest.mark.parametrize("rules", SHARING)
def test_weights_share_with_those_of_their_rule(rules):
    graph, _ = _sums(etrace.ByWeight(D, rules))
    names, rule = [r.name for r in graph.relations], _mixed(graph)
    alike = {"same_x": {"a", "b", "d"}, "same_df": {"a", "b", "c", "bias"}}
    for number, relation in enumerate(graph.relations):
        mine = relation.name
        with_rule = [n for n in names if rules.get(n) == rules.get(mine)]
        for what, partners in alike.items():
            same = [names.index(n) for n in with_rule if {n, mine} <= partners]
            first = min(same, default=number)
            assert getattr(relation, what) == (None if first == number else first)
    trace = etrace.init_trace(graph)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(trace))
    assert allocated == B * sum(map(rule.trace_bytes, graph.relations))
    assert f"trace {size(allocated)}" in str(graph.report()).splitlines()[0]


def test_what_is_shared_is_what_each_would_keep():
    graph, args = _sums(etrace.ByWeight(D, SHARING[-1]))
    runs = (etrace.value_and_grad(g, squares, window=1) for g in (graph, apart(graph)))
    found = [quick_jit(run)(*args) for run in runs]
    sizes = [sum(a.size for a in jax.tree.leaves(trace)) for *_, trace in found]
    assert sizes[0] < sizes[1]
    assert_same(*(result[:3] for result in found))


def _table(graph):
    """The rows of the weights, by column."""
    lines = str(graph.report()).splitlines()[3:]
    ends = [m.span() for m in re.finditer("-+", lines[1])]
    rows = [[line[a:b].strip() for a, b in ends] for line in lines[: lines.index("")]]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_report_says_which_rule_a_weight_has():
    graph, *_ = of_models("lif", MIXED["lif"], STEPS)
    assert str(graph.report()).startswith(
        "ByWeight(DRTRL, ESDRTRL(decay=0.8), ESDRTRL(decay=(0.5, 0.0))), single-step, "
    )
    assert "ESDRTRL(decay=0.8)" in str(graph.to_text()).splitlines()[0]
    rules = {row["weight"]: row["rule"] for row in _table(graph)}
    assert rules == {
        "layer.w_in.weight": "DRTRL",
        "layer.w_in.bias": "DRTRL",
        "layer.w_rec.weight": "ESDRTRL(decay=0.8)",
        "layer.tau_v": "ESDRTRL(decay=(0.5, 0.0))",
        "layer.tau_g": "ESDRTRL(decay=(0.5, 0.0))",
        "readout.weight": "-",
        "readout.bias": "-",
    }
    for rule in (D, etrace.ByWeight(D, {"layer": D}), etrace.RTRL()):
        graph, *_ = of_models("lif", rule, STEPS)
        assert _table(graph) and all("rule" not in row for row in _table(graph))


def test_names_of_rules():
    names = {
        "DRTRL": D,
        "DRTRL(scope='unit')": UNIT[0],
        "DRTRL(trace_dtype=float64)": D_AGAIN,
        "DRTRL(recursion=0.0)": etrace.Immediate(),
        "ESDRTRL(decay=0.8)": ES,
        "RTRL": etrace.RTRL(),
    }
    assert [name_of(rule) for rule in names.values()] == list(names)


# Keys.


def _rules(rules, name="rnn_indrnn"):
    graph, *_ = of_models(name, etrace.ByWeight(D, rules), STEPS)
    return {p: name_of(_mixed(graph).of(r)) for r in graph.relations for p in r.weight}


def test_which_key_a_param_falls_to():
    def matrix(path, shape):
        return len(shape) == 2 and math.prod(shape) > 40

    found = _rules([(matrix, ES), ("second", OTTT), ("second.w_in.weight", D)])
    es, ottt = name_of(ES), name_of(OTTT)
    assert found == {
        "first.w_in.weight": "DRTRL",
        "first.w_in.bias": "DRTRL",
        "first.w_rec.weight": es,
        "second.w_in.weight": "DRTRL",  # The whole path goes first.
        "second.w_in.bias": ottt,
        "second.u": ottt,
    }
    # What starts a name is not the start of a path.
    found = _rules({"layer.cell.bias": ES}, "gru")
    assert {"layer.cell.bias", "layer.cell.bias_n"} < set(found)
    assert [path for path, rule in found.items() if rule == es] == ["layer.cell.bias"]
    # A predicate may fit none, and the readout has no trace.
    found = _rules({lambda path, shape: False: ES, "readout": OTTT})
    assert set(found.values()) == {"DRTRL"}


def test_what_is_compiled_has_whole_paths():
    """It can be compared, and given again."""
    graphs = []
    for _ in range(2):
        rule = etrace.ByWeight(D, [(lambda path, shape: len(shape) == 2, ES)])
        graph, *_ = _sums(rule)
        graphs.append(graph)
    assert graphs[0].same_structure(graphs[1])
    assert (
        graphs[0].rule
        == graphs[1].rule
        == etrace.ByWeight(D, dict.fromkeys("abcd", ES))
    )
    again, *_ = _sums(graphs[0].rule)
    assert again.same_structure(graphs[0])
    other, *_ = _sums(etrace.ByWeight(D, dict.fromkeys("abc", ES)))
    assert not other.same_structure(graphs[0])
    # A rule that no weight has is gone.
    graph, *_ = _sums(etrace.ByWeight(OTTT, {"bias": D} | dict.fromkeys("abcd", ES)))
    assert sorted(map(name_of, _mixed(graph).rules)) == sorted(map(name_of, (ES, D)))


KEYS = [
    ({"e": ES}, "got the key 'e', which fits no param, .* of a, b, c, d, bias"),
    ({"bi": ES}, "got the key 'bi', which fits no param"),
    ([("a", ES), ("a", D)], "got the key 'a', whose params all fall to other keys"),
    ([(lambda path, shape: True, ES), ("", D)], "got the key '', expected a key path"),
    ({3: ES}, "got the key 3, expected a key path"),
]


@pytest.mark.parametrize("rules, match", KEYS)
def test_keys_that_fit_nothing_are_refused(rules, match):
    with pytest.raises(ValueError, match=match):
        _sums(etrace.ByWeight(D, rules))


def test_a_start_that_comes_too_late_is_refused():
    rules = [(lambda path, shape: True, ES), ("second", D)]
    with pytest.raises(
        etrace.CompileError, match="'second', whose params all .* first"
    ):
        _rules(rules)
    assert name_of(D) in _rules(rules[::-1]).values()


def test_a_weight_of_two_params_has_one_rule():
    graph, *_ = of_catalogue("low_rank_recurrent", D)
    (pair,) = {r.weight for r in graph.relations if len(r.weight) > 1}
    names = (
        f"got DRTRL for {pair[0]} and ESDRTRL(decay=0.8) for {pair[1]}, expected one"
    )
    with pytest.raises(etrace.CompileError, match=re.escape(names) + ".*, at .*py:"):
        of_catalogue("low_rank_recurrent", etrace.ByWeight(D, {pair[1]: ES}))
    both = etrace.ByWeight(D, dict.fromkeys(pair, ES))
    graph, *_ = of_catalogue("low_rank_recurrent", both)
    of = _mixed(graph).of
    assert all(of(r) == ES for r in graph.relations if r.weight == pair)


RULES = [
    ((D, UNIT[1]), r"ESDRTRL\(decay=0.8, scope='unit'\) beside DRTRL, .*scope='local'"),
    ((UNIT[0], ES), "ESDRTRL.* beside DRTRL.*, expected rules .*same .*scope='unit'"),
    ((D, etrace.Immediate()), "the same `recursion`: .*OSTL.*OTTT.*Immediate"),
    ((etrace.DRTRL(recursion=0.5), etrace.Immediate()), "the same `recursion`"),
    ((D, etrace.RTRL()), r"got RTRL, expected local rules such as DRTRL\(\)"),
    ((etrace.UORO(jax.random.key(0)), D), "got UORO, expected local rules"),
    ((D, etrace.ByWeight(D)), r"got ByWeight\(DRTRL\), expected local rules"),
    ((D, etrace.Budget(9)), "got Budget.*, expected local rules"),
    ((D, etrace.DRTRL), "got DRTRL, expected local rules"),
]


@pytest.mark.parametrize("rules, match", RULES)
def test_rules_that_cannot_stand_side_by_side_are_refused(rules, match):
    # Without the type checks of the tests, which would answer first.
    with pytest.raises(ValueError, match="ByWeight: .*" + match):
        check_rules("ByWeight", rules)
    local = all(isinstance(rule, type(D) | type(ES)) for rule in rules)
    if local:
        with pytest.raises(ValueError, match=match):
            etrace.ByWeight(rules[0], {"a": rules[1]})
        with pytest.raises(ValueError, match=match):
            etrace.Budget(1e6, rules)
