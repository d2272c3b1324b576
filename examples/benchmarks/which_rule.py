"""Every rule on four networks: its gradient next to BPTT, its memory, its time.

A GRU, a linear recurrent unit, and recurrent LIF and adaptive LIF neurons with synaptic
currents learn by backpropagation through time (BPTT) to repeat two symbols after a
delay. At the weights where that leads, on fresh data, each rule gives its gradient of
the weights in front of the readout: the cosine with that of BPTT and the ratio of
norms. All run in turns in one process, for times to be read next to BPTT. A rule that a
network cannot have says why.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from machine import machine
from methods import BPTT, Runner, size_of
from which_networks import (
    CLASSES,
    INPUTS,
    NETS,
    Data,
    Net,
    forward,
    make_data,
    make_net,
    rest,
)
from windows import matching, measure, summarise

import eqx_etrace as etrace


FULL = {"units": 64, "batch": 16, "delay": 20, "seeds": 3, "updates": 300, "rounds": 7}
QUICK = {"units": 12, "batch": 4, "delay": 6, "seeds": 2, "updates": 5, "rounds": 2}
DNI_WINDOW = 10
KEY = jax.random.key(7)
loss_fn = optax.softmax_cross_entropy_with_integer_labels


# Rules. Those that are another name for one of these are in `SAME`.


class Setting(NamedTuple):
    """What the choice of a rule depends on."""

    kappa: float
    """By how much the readout remembers."""
    trace: int
    """Bytes of the traces of D-RTRL, of all samples."""


def hybrid():
    """Exact traces but for the recurrent weights."""

    def recurrent(path, shape):
        return len(shape) == 2 and shape[1] > INPUTS

    return etrace.ByWeight(etrace.DRTRL(), [(recurrent, etrace.ESDRTRL(0.9))])


RANDOM, ADAPTIVE = etrace.RandomFeedback(KEY), etrace.AdaptiveFeedback("feedback")
BASE = "DRTRL()"
DRAWN = etrace.DRTRL(signal=RANDOM)
RULES: dict[str, Callable[[Setting], Any]] = {
    "RTRL()": lambda at: etrace.RTRL(),
    "SKRTRL(16)": lambda at: etrace.SKRTRL(16),
    "KFRTRL(key)": lambda at: etrace.KFRTRL(KEY),
    "UORO(key)": lambda at: etrace.UORO(KEY),
    "SnAp(1)": lambda at: etrace.SnAp(1),
    BASE: lambda at: etrace.DRTRL(),
    "EProp(kappa)": lambda at: etrace.EProp(at.kappa),
    "OTPE(kappa)": lambda at: etrace.OTPE(at.kappa),
    "ESDRTRL(0.9)": lambda at: etrace.ESDRTRL(0.9),
    "ByWeight(...)": lambda at: hybrid(),
    "Budget(half)": lambda at: etrace.Budget(at.trace // 2),
    "OTTT(0.9)": lambda at: etrace.OTTT(0.9),
    "Immediate()": lambda at: etrace.Immediate(),
    # Beside the small gradient of a network that has learnt, no guess is better.
    "DNI(), guess 0": lambda at: etrace.DNI(),
    "EProp, adaptive": lambda at: etrace.EProp(at.kappa, signal=ADAPTIVE),
    "EProp, random": lambda at: etrace.EProp(at.kappa, signal=RANDOM),
    "RFLO(0.9, random)": lambda at: etrace.RFLO(0.9, RANDOM),
    "OSTTP(key)": lambda at: etrace.OSTTP(KEY, CLASSES),
    "ThreeFactor()": lambda at: etrace.ThreeFactor(),
}
# Other names for one of these, and what all local rules are made from.
SAME = {"OSTL": BASE, "PPProp": "ESDRTRL(0.9)", "Kappa": "EProp(kappa)"}
ADAPTING = "EProp, adaptive"
LEARNED = ADAPTING, "DNI(), guess 0"


class Learner(eqx.Module):
    """A network, and what learned signals need beside it."""

    net: Net
    feedback: Any
    synthesiser: Any

    def __call__(self, x, state):
        return self.net(x, state)


# Gradients.


class Case(NamedTuple):
    """A network with what learned signals need, at rest, and what it is fed."""

    learner: Learner
    state: Any
    data: Data


def from_outside(name, case, outs):
    """What a rule is told besides: a reward, or the target of the steps that ask."""
    _, targets, mask = case.data
    asked = mask.astype(outs.dtype)
    if name == "ThreeFactor()":
        return jnp.where(outs.argmax(-1) == targets, -1.0, 1.0) * asked
    if name == "OSTTP(key)":
        return jax.nn.one_hot(targets, CLASSES) * asked[..., None]
    return None


def model_of(name, learner):
    return learner if name in LEARNED else learner.net


def trained_leaves(model):
    """All but the leak of a readout, which e-prop takes for what it is."""
    trained = jax.tree.map(eqx.is_inexact_array, model)

    def leak(model):
        net = model.net if isinstance(model, Learner) else model
        return getattr(net.readout, "raw_tau", None)

    if leak(model) is None:
        return trained
    return eqx.tree_at(leak, trained, False)


def compiled(case, name, rule):
    model = model_of(name, case.learner)
    options = {"trainable": trained_leaves(model), "batched": True}
    return etrace.compile(model, case.state, case.data.xs[0], rule, **options)


def backward(graph):
    """The gradient of BPTT by the params of a graph."""

    def loss(params, state, data):
        outs = forward(graph.model(params), state, data.xs)
        return jnp.sum(loss_fn(outs, data.targets), where=data.mask)

    return jax.grad(loss)


def online(graph, name):
    """That of a rule, and its trace."""
    window = DNI_WINDOW if name.startswith("DNI") else None
    drive = etrace.value_and_grad(graph, loss_fn, window=window)

    def gradient(trace, params, state, data, signal):
        _, grads, _, trace = drive(params, state, trace, *data, signal=signal)
        return grads, trace

    return gradient


def traced_leaves(graph):
    """Which params have a trace and are no part of the readout."""
    paths = {path for relation in graph.relations for path in relation.weight}
    found = paths - {path for path in paths if path.startswith("readout")}
    return [path in found for path in graph.param_leaves.paths]


def vector(grads, traced):
    grads = grads.net if isinstance(grads, Learner) else grads
    pairs = zip(jax.tree.leaves(grads), traced, strict=True)
    return jnp.concatenate([leaf.ravel() for leaf, keep in pairs if keep])


def compare(found, exact):
    norms = jnp.linalg.norm(found), jnp.linalg.norm(exact)
    cosine = jnp.vdot(found, exact) / (norms[0] * norms[1])
    return {"cosine": float(cosine), "norm_ratio": float(norms[0] / norms[1])}


# Training.


def newborn(name, size, key):
    """The network with random feedback weights, and a guess of zeros."""
    keys = jax.random.split(key, 3)
    net, data = make_net(name, size["units"], keys[0]), make_data(keys[1], size)
    state = rest(net, size["batch"])
    drawn = compiled(Case(Learner(net, (), ()), state, data), "", DRAWN)
    matrices = drawn.rule.signal.matrices
    hidden = jax.tree.leaves(net.init_state())
    count = sum(a.size * (1 + jnp.iscomplexobj(a)) for a in hidden)
    guess = eqx.nn.Linear(count, count, key=keys[2])
    learner = Learner(net, matrices, jax.tree.map(jnp.zeros_like, guess))
    return Case(learner, state, data)


OPTIMISERS = {
    "net": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "feedback": optax.adamw(1e-2),
    "synthesiser": optax.set_to_zero(),
}


def trainer(case, size, graphs):
    """A function (learner, key) -> learner: updates of the network by BPTT, and of
    feedback weights by their own gradient."""
    optimiser = optax.multi_transform(OPTIMISERS, lambda _: Learner(*OPTIMISERS))
    base = graphs[BASE]

    def gradient(learner, data):
        of_net = backward(base)(base.params(learner.net), case.state, data)
        zeros = jax.tree.map(jnp.zeros_like, eqx.filter(learner, eqx.is_inexact_array))
        found = dataclasses.replace(zeros, net=of_net)
        if ADAPTING in graphs:
            args = graphs[ADAPTING].params(learner), case.state, data, None
            grads, _ = online(graphs[ADAPTING], ADAPTING)(None, *args)
            found = dataclasses.replace(found, feedback=grads.feedback)
        return found

    @eqx.filter_jit
    def train(learner, key):
        params, static = eqx.partition(learner, trained_leaves(learner))

        def body(carry, key):
            params, opt_state = carry
            grads = gradient(eqx.combine(params, static), make_data(key, size))
            change, opt_state = optimiser.update(grads, opt_state, params)
            return (optax.apply_updates(params, change), opt_state), None

        keys = jax.random.split(key, size["updates"])
        carry = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(body, carry, keys)
        return eqx.combine(params, static)

    return train


# Measuring.


def through_time(graph, case):
    params = graph.params(case.learner.net)
    fun = jax.jit(backward(graph)).lower(params, case.state, case.data).compile()
    temp = fun.memory_analysis().temp_size_in_bytes

    def run(case=case):
        return fun(graph.params(case.learner.net), case.state, case.data)

    return run, Runner(run, temp, 0, len(case.data.xs))


def forward_in_time(graph, name, case, signal):
    """The gradient from an empty trace, and the rule as something to be timed, which is
    handed the trace of the call before to write into."""
    trace = etrace.init_trace(graph)
    jitted = jax.jit(online(graph, name), donate_argnums=0)

    def args(case, signal):
        params = graph.params(model_of(name, case.learner))
        return params, case.state, case.data, signal

    fun = jitted.lower(trace, *args(case, signal)).compile()
    temp = fun.memory_analysis().temp_size_in_bytes

    def fresh(case, signal):
        return fun(etrace.init_trace(graph), *args(case, signal))[0]

    def run():
        nonlocal trace
        grads, trace = fun(trace, *args(case, signal))
        return grads

    return fresh, Runner(run, temp, size_of(trace), len(case.data.xs))


def graphs_of(names, case, kappa):
    """Those that can be compiled, and why the others cannot. The first is `BASE`."""
    graphs = {BASE: compiled(case, BASE, RULES[BASE](Setting(kappa, 0)))}
    setting = Setting(kappa, size_of(etrace.init_trace(graphs[BASE])))
    reasons = {}
    for name in names:
        try:
            graphs[name] = compiled(case, name, RULES[name](setting))
        except (etrace.CompileError, ValueError) as error:
            reasons[name] = str(error)
    return graphs, reasons


def accuracy(case, outs):
    right = outs.argmax(-1) == case.data.targets
    return float(jnp.mean(right, where=case.data.mask))


def together(rows):
    """Of dicts of numbers a dict of lists."""
    rows = list(rows)
    return {key: [row[key] for row in rows] for key in rows[0]}


def study(load, names, size, patience):
    """One network: a row for each rule and for BPTT."""
    keys = jax.random.split(jax.random.key(0), size["seeds"])
    cases = [newborn(load, size, key) for key in keys]
    graphs, reasons = graphs_of(names, cases[0], NETS[load].kappa)
    train = trainer(cases[0], size, graphs)
    cases = [
        case._replace(learner=train(case.learner, key))
        for case, key in zip(cases, keys, strict=True)
    ]
    run = jax.jit(lambda case: forward(case.learner.net, case.state, case.data.xs))
    outs = [run(case) for case in cases]
    traced, runners, alike = traced_leaves(graphs[BASE]), {}, {}
    exact, runners[BPTT] = through_time(graphs[BASE], cases[0])
    truths = [vector(exact(case), traced) for case in cases]
    for name in (name for name in names if name in graphs):
        signals = list(map(functools.partial(from_outside, name), cases, outs))
        args = graphs[name], name, cases[0], signals[0]
        fresh, runners[name] = forward_in_time(*args)
        found = [vector(grads, traced) for grads in map(fresh, cases, signals)]
        if not any(map(jnp.any, found)):
            reasons[name] = "its gradient in front of the readout is zero"
            del runners[name]
            continue
        alike[name] = together(map(compare, found, truths))
        print(".", end="", flush=True)
    table = summarise(runners, measure(runners, size["rounds"], patience))
    rows = {name: table[name] | alike[name] for name in alike}
    hits = {"accuracy": list(map(accuracy, cases, outs))}
    return {"bptt": table[BPTT] | hits, "rules": rows, "why": reasons}


# Tables.


def mean(numbers):
    return sum(numbers) / len(numbers)


def cosine_cell(row, batch):
    low, high = min(row["cosine"]), max(row["cosine"])
    spread = "" if high - low < 0.02 else f" ({low:.2f} to {high:.2f})"
    return f"{mean(row['cosine']):.2f}{spread}"


def trace_cell(row, batch):
    return f"{1024 * row['trace_mib'] / batch:.1f}"


def time_cell(row, batch):
    return f"{row['to_bptt']:.2g}"


CELLS = {
    "cosine with BPTT, mean over seeds (and range)": cosine_cell,
    "trace per sample, KiB": trace_cell,
    "time, BPTT = 1": time_cell,
}


def markdown(found):
    """A table for each of `CELLS`, of what `--json` writes."""
    loads, lines = found["table"], []
    names = [n for n in RULES if any(n in load["rules"] for load in loads.values())]
    for title, cell in CELLS.items():
        lines += [f"| {title} | " + " | ".join(loads) + " |"]
        lines += ["|---" * (1 + len(loads)) + "|"]
        for name in names:
            rows = [load["rules"].get(name) for load in loads.values()]
            cells = [cell(row, found["batch"]) if row else "" for row in rows]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", default=["*"], help=f"of {', '.join(NETS)}")
    add("--rules", nargs="+", default=["*"], help="names or patterns, as 'EProp*'")
    add("--patience", type=float, default=10.0, help="seconds a rule may use")
    add("--quick", action="store_true", help="small networks, hardly trained")
    add("--json", type=Path, help="write the numbers to this file too")
    for name, number in FULL.items():
        add(f"--{name}", type=int, help=f"{number}, with --quick {QUICK[name]}")
    return parser.parse_args()


def main():
    args = parse()
    size = dict(QUICK if args.quick else FULL)
    size |= {key: given for key in size if (given := getattr(args, key)) is not None}
    print(f"{machine()}, {size}")
    names, tables = matching(args.rules, RULES), {}
    for load in matching(args.networks, NETS):
        print(load, end=" ", flush=True)
        tables[load] = study(load, names, size, args.patience)
        hits = ", ".join(f"{hit:.2f}" for hit in tables[load]["bptt"]["accuracy"])
        print(f" accuracy with BPTT {hits}")
        for name, why in tables[load]["why"].items():
            print(f"  not {name}: {why}")
        found = {**machine(), **size, "table": tables}
        if args.json:
            args.json.write_text(json.dumps(found, indent=2))
    print("\n" + markdown(found))


if __name__ == "__main__":
    main()
