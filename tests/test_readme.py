"""The README is true: its example trains every weight, its report is the real one."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from snippets import blocks, default_modes

import eqx_etrace as etrace


README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def _block(language):
    found = re.search(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def example():
    first, *others = blocks(README)
    names = {}
    with default_modes():
        exec(compile(first, "README.md", "exec"), names)
        of_first = dict(names)
        for block in others:
            exec(compile(block, "README.md", "exec"), names)
        yield of_first


def test_loss_falls(example):
    losses = np.asarray(example["losses"])
    assert losses[-1000:].mean() < 0.15 * losses[:1000].mean()


def test_every_weight_has_a_gradient(example):
    graph, state, trace = (example[name] for name in ("graph", "state", "trace"))

    def loss(params):
        out, *_ = etrace.step(graph, params, state, trace, example["xs"][0])
        return jnp.sum((out - example["targets"][0]) ** 2)

    for params in (graph.params(example["net"]), example["params"]):
        leaves = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
        zero = [jax.tree_util.keystr(path) for path, g in leaves if not jnp.any(g)]
        assert len(leaves) == 6
        assert not zero


def test_report(example):
    def without_sources(report):
        return (
            str(report).split("Credit between units")[0].strip()
        )  # lines of Equinox's files follow

    report = example["graph"].report()
    assert without_sources(_block("text")) == without_sources(report)
