"""Diagrams show every weight, group, output and cut, and Mermaid can read them."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from models import MODELS
from oracles import problem

import eqx_etrace as etrace
from eqx_etrace._diagram import draw, escape


ALL = list(MODELS)
N, IN = 6, 4
KEY = jax.random.key(0)
NODE = re.compile(r'  ([a-z]\d+)(\[|\(\[|\[\[)"([^"]*)"(\]|\]\)|\]\])')
EDGE = re.compile(r'  ([a-z]\d+) (-->|-\.->)(?:\|"([^"]*)"\|)? ([a-z]\d+)')


def _graph(name):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0])


def _unescape(text):
    return re.sub(r"#(\d+);", lambda m: chr(int(m[1])), text)


def _check_label(label, line):
    for part in label.split("<br/>"):
        assert not re.search(r"[\"'`\[\](){}<>|&]", part), line
        assert not re.search(r"#(?!\d+;)", part), line


def _parse(text):
    """Nodes {id: lines of the label} and edges (source, target, label, dashed)."""
    first, comment, *lines = str(text).splitlines()
    assert first == "flowchart LR" and comment.startswith("  %% ")
    nodes, edges = {}, set()
    for line in lines:
        if edge := EDGE.fullmatch(line):
            label = edge[3] or ""
            edges.add((edge[1], edge[4], _unescape(label), edge[2] == "-.->"))
        else:
            node = NODE.fullmatch(line)
            assert node is not None, line
            assert not edges and node[1] not in nodes
            label = node[3]
            nodes[node[1]] = [_unescape(part) for part in label.split("<br/>")]
        _check_label(label, line)
    for source, target, *_ in edges:
        assert source in nodes and target in nodes
    return nodes, edges


def _named(text):
    """The edges by the first line of the labels of their nodes."""
    nodes, edges = _parse(text)
    return {(nodes[a][0], nodes[b][0], label, cut) for a, b, label, cut in edges}


@pytest.mark.parametrize("name", ALL)
def test_every_weight_group_and_output_is_a_node(name):
    graph = _graph(name)
    nodes, edges = _parse(graph.to_mermaid())
    firsts = [label[0] for label in nodes.values()]
    groups = [f"hidden group {i}" for i in range(len(graph.groups))]
    paths = [*graph.param_leaves.paths, *groups, *graph.out_leaves.paths]
    assert firsts == paths
    for i, group in enumerate(graph.groups):
        label = nodes[f"g{i}"]
        assert re.fullmatch(rf"{group.units} units x {group.slots} slots?", label[1])
        assert all(leaf in label[2] for leaf in group.leaves)
    # No weight of these models is unused: each has an arrow to somewhere.
    assert {a for a, *_ in edges} >= {i for i in nodes if i.startswith("w")}


@pytest.mark.parametrize("name", ALL)
def test_every_relation_is_a_solid_edge(name):
    graph = _graph(name)
    expected = {
        (path, f"hidden group {r.group}", f"{r.op.name} trace", False)
        for r in graph.relations
        for path in r.weight
    }
    got = {edge for edge in _named(graph.to_mermaid()) if edge[2].endswith("trace")}
    assert got == expected


@pytest.mark.parametrize("name", ALL)
def test_every_cut_is_a_dashed_edge(name):
    graph = _graph(name)
    dashed = [edge for edge in draw(graph).edges if edge.dashed]
    cuts = [d for d in graph.decisions if d.kind is etrace.Kind.CUT]
    own = [edge for edge in dashed if edge.source == edge.target]
    across = [d for d in graph.decisions if d.kind is etrace.Kind.ACROSS_GROUPS]
    assert len(own) == len({(d.state, d.reason) for d in cuts})
    for decision in cuts:
        assert any(edge.label[len("cut: ") :] in decision.reason for edge in own)
    assert sum(edge.label == "cut: later steps" for edge in dashed) == len(across)


def test_layers():
    edges = _named(_graph("gru_lif").to_mermaid())
    one, two = "hidden group 0", "hidden group 1"
    assert (one, two, "same step", False) in edges
    assert (one, two, "cut: later steps", True) in edges
    assert (two, "out", "", False) in edges
    assert ("readout.weight", "out", "", False) in edges
    assert (one, one, "own past", False) in edges
    assert not any(a == two and b == one for a, b, *_ in edges)
    assert not any(a == one and b == "out" for a, b, *_ in edges)
    assert any(a == b == one and cut and "_rnn.py" in t for a, b, t, cut in edges)
    edges = _named(_graph("delayed_layers").to_mermaid())
    assert (one, two, "last step", False) in edges
    assert not any(label == "same step" for *_, label, _ in edges)


def test_ways_past_the_new_state():
    edges = _named(_graph("spike_before_hard_reset").to_mermaid())
    assert ("layer.w_in.weight", "out", "past the state", False) in edges
    assert ("hidden group 0", "out", "old state", False) in edges
    edges = _named(_graph("lif").to_mermaid())
    assert not any(label in ("past the state", "old state") for *_, label, _ in edges)


def test_a_plain_rnn_has_no_past_of_its_own():
    edges = _named(_graph("rnn").to_mermaid())
    assert not any(label == "own past" for *_, label, _ in edges)


class Net(eqx.Module):
    """A weight behind another weight, an unused one, and names that need escapes."""

    cell: eqx.nn.GRUCell
    parts: dict

    def __call__(self, x, state):
        h = self.cell(jnp.tanh(self.parts['a "quoted" [x] <b>'] @ x), state["#h|"])
        return {"(out)": h, "hidden": h}, {"#h|": h}


def _awkward():
    parts = {'a "quoted" [x] <b>': jnp.ones((IN, IN)), "unused": jnp.ones(2)}
    net = Net(eqx.nn.GRUCell(IN, N, key=KEY), parts)
    return etrace.compile(net, {"#h|": jnp.zeros(N)}, jnp.ones(IN))


def test_awkward_names_are_escaped():
    graph = _awkward()
    text = graph.to_mermaid()
    nodes, _ = _parse(text)
    paths = {label[0] for label in nodes.values()}
    assert set(graph.param_leaves.paths) < paths
    assert "out['(out)']" in paths
    assert nodes["g0"][2] == "state['#h|']"
    assert "#34;quoted#34; #91;x#93; #60;b#62;" in text


def test_weights_without_a_trace():
    edges = _named(_awkward().to_mermaid())
    behind = "parts['a \"quoted\" [x] <b>']"
    assert (behind, "hidden group 0", "current step only", True) in edges
    nodes, _ = _parse(_awkward().to_mermaid())
    unused = [label for label in nodes.values() if label[0] == "parts['unused']"]
    assert unused == [["parts['unused']", "2", "no gradient at all"]]
    text = _awkward().to_text()
    assert "parts['unused'], 2, no gradient at all" in text.splitlines()
    assert re.search(r"<~~ parts\['a .* current step only", text)


@pytest.mark.parametrize("name", ["alif", "gru_lif", "alif_trainable_beta"])
def test_text_holds_every_edge(name):
    graph = _graph(name)
    drawing = draw(graph)
    blocks = {}
    for block in str(graph.to_text()).split("\n\n")[1:-1]:
        head, *lines = block.splitlines()
        blocks[head.split(",")[0]] = lines
    names = {node.id: node.label[0] for node in drawing.nodes}
    for edge in drawing.edges:
        arrow = "<~~" if edge.dashed else "<--"
        wanted = rf"  {re.escape(arrow)} {re.escape(names[edge.source])}"
        wanted += rf" *{re.escape(edge.label)}"
        assert any(re.fullmatch(wanted, line) for line in blocks[names[edge.target]])
    assert sum(map(len, blocks.values())) == len(drawing.edges)
    assert max(map(len, str(graph.to_text()).splitlines())) < 120


def test_title():
    text = _graph("gru").to_text()
    assert str(text).splitlines()[0] == "DRTRL, single-step, unbatched"
    assert "%% DRTRL, single-step, unbatched" in _graph("gru").to_mermaid()


def test_escape():
    assert escape('a["b"]#') == "a#91;#34;b#34;#93;#35;"
