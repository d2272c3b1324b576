"""What a budget chooses, among all that could be chosen."""

import dataclasses
import functools
import itertools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from windows import local, of_models

import eqx_etrace as etrace
from eqx_etrace._compile import _with_rule
from eqx_etrace._report import size
from eqx_etrace._rules import name_of


D, ES = etrace.DRTRL(), etrace.ESDRTRL(0.9)
HALF = etrace.DRTRL(trace_dtype=jnp.float32)
RULES = {"two": (D, ES), "three": (D, HALF, ES)}
# name: (model, batch, rules). In an RNN no weight saves a byte unless others do, too.
CASES = {
    "gru": ("gru", 2, "two"),
    "rnn": ("rnn", None, "two"),
    "three rules": ("lstm", None, "three"),
}


def _allocated(graph):
    trace = jax.eval_shape(lambda: etrace.init_trace(graph))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trace))


def _with(graph, rule):
    """As `compile` would give it, which takes longer."""
    return _with_rule(dataclasses.replace(graph, rule=rule))


def _compiled(name, rule):
    model, batch, _ = CASES[name]
    graph = of_models(model, D, 1, batch)[0]
    return _with_rule(dataclasses.replace(graph, rule=rule))


@functools.cache
def _all_choices(name):
    """The bytes of each way to give a rule to each weight, and the weights."""
    rules = RULES[CASES[name][2]]
    graph = _compiled(name, D)
    paths = tuple(dict.fromkeys(p for r in graph.relations for p in r.weight))
    found = {}
    for choice in itertools.product(range(len(rules)), repeat=len(paths)):
        pairs = {path: rules[n] for path, n in zip(paths, choice, strict=True)}
        found[choice] = _allocated(_compiled(name, etrace.ByWeight(D, pairs)))
    return paths, found


@functools.cache
def _chosen(name, budget):
    """What the budget chose, as `_all_choices` has it, and its graph."""
    rules, (paths, _) = RULES[CASES[name][2]], _all_choices(name)
    given = {} if CASES[name][2] == "two" else {"rules": rules}
    graph = _compiled(name, etrace.Budget(budget, **given))
    assert isinstance(graph.rule, etrace.ByWeight)
    of = {p: graph.rule.of(r) for r in graph.relations for p in r.weight}
    return tuple(rules.index(of[path]) for path in paths), graph


def _budgets(name):
    """Those where something may change, and those one byte below."""
    _, every = _all_choices(name)
    least, most = min(every.values()), every[(0,) * len(next(iter(every)))]
    edges = sorted({n for n in every.values() if least < n <= most})
    some = {*edges[:: max(len(edges) // 8, 1)], most}
    return sorted({least, *(n - k for n in some for k in (1, 0)), 10 * most})


@pytest.mark.parametrize("name", CASES)
def test_nothing_more_exact_fits(name):
    _, every = _all_choices(name)
    last = None
    for budget in _budgets(name):
        choice, graph = _chosen(name, budget)
        assert every[choice] == _allocated(graph) <= budget
        for part, number in enumerate(choice):
            for more in range(number):
                other = (*choice[:part], more, *choice[part + 1 :])
                assert every[other] > budget
        # With more bytes no weight is less exact.
        assert last is None or all(map(int.__le__, choice, last))
        last = choice
    assert last is not None and not any(last)


@pytest.mark.parametrize("name", CASES)
def test_all_are_exact_as_soon_as_that_fits(name):
    _, every = _all_choices(name)
    exact = (0,) * len(next(iter(every)))
    assert _chosen(name, every[exact])[0] == exact != _chosen(name, every[exact] - 1)[0]
    graph = _chosen(name, 1e12)[1]
    assert graph.rule == etrace.ByWeight(D)
    assert "DRTRL, " in _reasons(graph) and "budget of 1000.0 GB" in _reasons(graph)


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_choice_is_the_smallest_there_is(name):
    _, batch, rules = CASES[name]
    least = min(_all_choices(name)[1].values())
    _compiled(name, etrace.Budget(least, RULES[rules]))
    match = f"got {least - 1} bytes, expected at least {least}, .* DRTRL, .*ESDRTRL"
    match += ".*for the batch of 2.*smaller batch" if batch else ".* take. Give"
    with pytest.raises(etrace.CompileError, match=match):
        _compiled(name, etrace.Budget(least - 1, RULES[rules]))


def _reasons(graph):
    return str(graph.report()).split("Rules chosen to fit a budget\n")[1]


def test_the_report_says_why():
    paths, every = _all_choices("gru")
    choice, same = _chosen("gru", 2000)
    graph = of_models("gru", etrace.Budget(2000), 1, 2)[0]
    assert graph.rule == same.rule
    lines = _reasons(graph).splitlines()
    assert len(lines) == sum(choice) > 1
    for part, (path, number) in enumerate(zip(paths, choice, strict=True)):
        more = size(every[(*choice[:part], 0, *choice[part + 1 :])])
        line = (
            f"  - {path}: ESDRTRL(decay=0.9), since with DRTRL all traces would take "
            f"{more}, above the budget of 2.0 kB"
        )
        assert (line in lines) == bool(number)
    told = [d for d in graph.decisions if d.kind is etrace.Kind.CHOSEN]
    assert [d.about for d in told] == [
        p for p, n in zip(paths, choice, strict=True) if n
    ]
    assert f"trace {size(every[choice])}" in str(graph.report()).splitlines()[0]
    assert "since with DRTRL" in str(graph.explain(weight=told[0].weight[0]))


def test_the_documented_report_is_the_real_one():
    text = (pathlib.Path(__file__).parent.parent / "docs/rules.md").read_text()
    shown = text.split("```text\nByWeight")[1].split("```")[0].splitlines()
    cell = eqx.nn.GRUCell(1, 32, dtype=jnp.float32, key=jax.random.key(0))
    state, x = jnp.zeros(32, jnp.float32), jnp.zeros(1, jnp.float32)
    graph = etrace.compile(
        {"cell": cell},
        state,
        x,
        etrace.Budget(4_000),
        call=lambda m, x, h: (m["cell"](x, h),) * 2,
    )
    lines = str(graph.report()).replace("['cell']", "cell").splitlines()
    found, shown = (
        [" ".join(line.split()) for line in some]
        for some in (lines, ["ByWeight" + shown[0], *shown[1:]])
    )
    assert len(shown) == 6
    assert set(shown) <= {*found, "..."}


def test_what_was_chosen_can_be_given_again():
    _, graph = _chosen("gru", 2000)
    again = _compiled("gru", graph.rule)
    assert again.same_structure(graph) and again.rule == graph.rule


class Factors(eqx.Module):
    """A weight of two params, one of which is a weight of its own, too."""

    c: jax.Array
    a: jax.Array
    b: jax.Array

    def __call__(self, x, h):
        drive = self.c @ x + self.a @ x[:2] + (self.a @ self.b) @ x
        h = jax.nn.sigmoid(drive) * h + drive
        return h, h


def test_the_params_of_one_weight_go_together():
    net = Factors(jnp.ones((6, 5)), jnp.ones((6, 2)), jnp.ones((2, 5)))
    graph = etrace.compile(net, jnp.zeros(6), jnp.zeros(5))
    assert sorted(r.weight for r in graph.relations) == [("a",), ("a", "b"), ("c",)]
    seen = {}
    for budget in range(_allocated(graph), 0, -16):
        try:
            now = _with(graph, etrace.Budget(budget))
        except etrace.CompileError:
            break
        assert _allocated(now) <= budget
        of = {r.name: name_of(local(now).of(r)) for r in now.relations}
        assert of["a"] == of["a * b"]
        seen[of["a"], of["c"]] = budget
    es = name_of(ES)
    assert list(seen) == [("DRTRL", "DRTRL"), (es, "DRTRL"), (es, es)]


def test_one_rule_to_choose_from():
    least = _allocated(_compiled("gru", D))
    assert _compiled("gru", etrace.Budget(least, [D])).rule == etrace.ByWeight(D)
    with pytest.raises(etrace.CompileError, match=f"expected at least {least}"):
        _compiled("gru", etrace.Budget(least - 1, [D]))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"bytes": -1}, "bytes: got -1, expected a number of at least 0"),
        ({"bytes": float("nan")}, "bytes: got nan"),
        ({"bytes": True}, "bytes: got True"),
        ({"bytes": 9, "rules": []}, "rules: got none, expected at least one"),
        ({"bytes": 9, "rules": [D, etrace.Immediate()]}, "the same `recursion`"),
    ],
)
def test_bad_budgets_get_a_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        etrace.Budget(**options)
