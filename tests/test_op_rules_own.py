"""Own primitives: the page that explains them runs, and what can go wrong is said."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive, primitives as prims
from oracles import assert_same_gradient, bptt, online, quick_jit

import eqx_etrace as etrace
from eqx_etrace import Kind


PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "op-rules.md").read_text()


@pytest.fixture(scope="module")
def page():
    """What the blocks of the page define, run one after the other as a user does."""
    names = {"__name__": "op_rules_page"}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile("\n".join(blocks), "op-rules.md", "exec"), names)
    return names


def _problem(page, kind="Net", n=5, steps=6):
    keys = jax.random.split(jax.random.key(3), 4)
    decay = jnp.linspace(0.2, 0.9, n)
    model = page[kind](jax.random.normal(keys[0], (n,)), decay)
    xs, ts = jax.random.normal(keys[1], (2, steps, n))
    return model, 0.5 * jax.random.normal(keys[2], (n,)), xs, ts


def _online(graph, model, state, xs, ts):
    run = quick_jit(functools.partial(online, graph))
    return run(graph.params(model), state, xs, ts)


@pytest.mark.parametrize("kind", ["Net", "Squashed"])
def test_own_primitives_equal_bptt(page, kind):
    model, state, xs, ts = _problem(page, kind)
    own = {page["circulant_p"]: page["circulant_rule"]}
    own[page["squash_p"]] = "elementwise"
    graph = etrace.compile(model, state, xs[0], op_rules=own)
    names = [relation.op.name for relation in graph.relations]
    assert names == ["elementwise", "circulant"]
    got = _online(graph, model, state, xs, ts)
    assert_same_gradient(got, bptt(model, state, xs, ts))


def test_a_batch_is_mapped_over_an_own_rule(page):
    model, state, xs, ts = _problem(page)
    own = {page["circulant_p"]: page["circulant_rule"]}
    state, xs, ts = (jnp.stack([a, -2 * a], -2) for a in (state, xs, ts))
    graph = etrace.compile(model, state, xs[0], op_rules=own, batched=True)
    got = _online(graph, model, state, xs, ts)
    each = [bptt(model, state[b], xs[:, b], ts[:, b]) for b in range(2)]
    assert_same_gradient(got, jax.tree.map(lambda a, b: a + b, *each))


def test_without_a_rule_the_default_takes_it_and_the_report_says_so(page):
    model, state, xs, ts = _problem(page)
    graph = etrace.compile(model, state, xs[0])
    (decision,) = [d for d in graph.decisions if d.kind is Kind.BY_AD]
    assert decision.weight == ("w",)
    assert "`circulant` has no op rule, its trace has 5 x 5 entries" in graph.report()
    got = _online(graph, model, state, xs, ts)
    assert_same_gradient(got, bptt(model, state, xs, ts))


def test_an_unknown_primitive_mixes(page):
    """All that it reads; more than a unit may have is no unit's."""
    model, state, xs, _ = _problem(page, "Squashed", n=70)
    with pytest.raises(etrace.CompileError, match="No weight feeds single units"):
        etrace.compile(model, state, xs[0])


def test_a_builder_that_declines_leaves_it_to_the_library(page):
    model, state, xs, _ = _problem(page)
    seen = []

    def decline(use):
        seen.append(use)

    own = {page["circulant_p"]: decline, prims.mul_p: decline}
    graph = etrace.compile(model, state, xs[0], op_rules=own)
    assert [relation.op.name for relation in graph.relations] == [
        "elementwise",
        "by AD",
    ]
    product, circulant = seen
    assert product.primitive is prims.mul_p and product.elementwise
    assert (circulant.operand, circulant.output, circulant.params) == (0, 0, {})
    assert (circulant.weight.shape, circulant.y.shape) == ((5,), (5,))
    assert circulant.weight.dtype == jnp.float64 and not circulant.elementwise
    (y,) = circulant.apply([jnp.arange(5.0), jnp.eye(5)[0]])
    assert y.tolist() == [0.0, 4.0, 3.0, 2.0, 1.0]


@dataclasses.dataclass(frozen=True)
class Doubled(etrace.OpRule):
    """Wrong on purpose, to be seen at work."""

    name = "doubled"

    def expand(self, v):
        return v

    def influence(self, df, operands):
        return 2 * df * operands[1]


def test_own_rules_come_before_those_of_the_library():
    class Net(eqx.Module):
        w: jax.Array

        def __call__(self, x, h):
            h = jnp.tanh(0.5 * h + self.w * x)
            return h, h

    def doubled(use):
        return Doubled(use.y.shape, use.weight.shape, ())

    model, state, xs = Net(jnp.ones(3)), jnp.zeros(3), jnp.ones((2, 3))
    graphs = [
        etrace.compile(model, state, xs[0], op_rules=own)
        for own in ({}, {prims.mul_p: doubled})
    ]
    right, twice = (_online(g, model, state, xs, 0 * xs).w for g in graphs)
    assert_same_gradient(twice, 2 * right)


def _circulant(page, shape=(5, 5), weight=(5,), summed=(0,)):
    def builder(use):
        return page["Circulant"](shape, weight, summed)

    return builder


class Narrow(Doubled):
    def expand(self, v):
        return v[:, None, None]

    def influence(self, df, operands):
        return jnp.zeros(self.trace_shape, df.dtype)


WRONG = {
    "weight_shape": dict(weight=(4,)),
    "influence": dict(shape=(5, 4)),
    "summed": dict(summed=()),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_rule_with_wrong_shapes_is_refused(page, what):
    model, state, xs, _ = _problem(page)
    own = {page["circulant_p"]: _circulant(page, **WRONG[what])}
    message = rf"op_rules\[circulant\]\.{what}: got the shape .* expected .*layout"
    with pytest.raises(etrace.CompileError, match=message):
        etrace.compile(model, state, xs[0], op_rules=own)


def test_a_rule_that_expands_wrongly_is_refused(page):
    model, state, xs, _ = _problem(page)
    own = {page["circulant_p"]: lambda use: Narrow((5, 5), (5,), (0,))}
    with pytest.raises(etrace.CompileError, match=r"op_rules\[circulant\]\.expand"):
        etrace.compile(model, state, xs[0], op_rules=own)


def test_a_builder_that_returns_something_else_is_refused(page):
    model, state, xs, _ = _problem(page)
    own: Any = {page["circulant_p"]: lambda use: "elementwise"}
    with pytest.raises(TypeError, match="expected an `OpRule` or None"):
        etrace.compile(model, state, xs[0], op_rules=own)


def test_what_is_not_elementwise_is_refused():
    total_p = Primitive("total")
    total_p.def_impl(jnp.sum)
    total_p.def_abstract_eval(lambda v: v.update(shape=()))

    class Net(eqx.Module):
        w: jax.Array

        def __call__(self, x, h):
            h = jnp.tanh(0.5 * h + self.w * total_p.bind(x))
            return h, h

    with pytest.raises(etrace.CompileError, match=r"op_rules\[total\] says 'elem"):
        etrace.compile(
            Net(jnp.ones(3)),
            jnp.zeros(3),
            jnp.ones(3),
            op_rules={total_p: "elementwise"},
        )


@pytest.mark.parametrize(
    "op_rules, message",
    [
        ({"mul": lambda use: None}, "got the key 'mul', expected a JAX primitive"),
        ({jnp.multiply: lambda use: None}, "expected a JAX primitive"),
        ({prims.mul_p: "mixing"}, r"op_rules\[mul\]: got 'mixing', expected"),
        ({prims.mul_p: Doubled}, r"op_rules\[mul\]: got .*Doubled.*, expected"),
        ([prims.mul_p], "got an object of type `list`, expected a mapping"),
    ],
)
def test_arguments_are_checked(op_rules, message):
    from eqx_etrace._op_rules import check_op_rules

    with pytest.raises(TypeError, match=message):
        check_op_rules(op_rules)
