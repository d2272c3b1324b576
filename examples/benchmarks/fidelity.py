"""How close the gradient of each rule is to that of RTRL while a network trains online.

A tanh RNN learns four tasks, each rule by its own gradient, with an update at every
step that has a target. In pieces of the run RTRL goes along, with the same weights,
states and inputs, and the cosine between the two gradients of the recurrent weights is
taken at each of these steps. Tasks, sizes and what is averaged are those of the paper
on SK-RTRL (2026), whose numbers stand beside. With `--quick` one rule trains, for the
others to go along as RTRL does.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqx_etrace as etrace


UNITS, BATCH = 64, 8
# All tasks are padded to one shape, so that a rule is compiled once.
INPUTS, OUTPUTS = 10, 8


# Tasks: streams of episodes; the state starts anew with each of them.


class Stream(NamedTuple):
    """Time first, then the batch."""

    xs: Any
    targets: Any
    """Numbers, or probabilities of classes."""
    labelled: Any
    """Per step, whether there is a target."""
    fresh: Any
    """Whether an episode starts, per step and sample."""


def _padded(array, size):
    rest = [(0, 0)] * (array.ndim - 1)
    return np.pad(array, [*rest, (0, size - array.shape[-1])]).astype(np.float32)


def _stream(xs, targets, labelled, fresh):
    xs, targets = _padded(xs, INPUTS), _padded(targets, OUTPUTS)
    return Stream(*map(jnp.asarray, (xs, targets, labelled, fresh)))


def _together(episode: Callable, length: int, steps: int, labelled: Callable):
    """A stream of episodes of one length, of all samples at once."""
    pairs = [episode() for _ in range(-(-steps // length))]
    xs, targets = (np.concatenate(part)[:steps] for part in zip(*pairs, strict=True))
    when = np.arange(steps) % length
    fresh = np.broadcast_to((when == 0)[:, None], (steps, BATCH))
    return _stream(xs, targets, labelled(when), fresh)


def copy(rng, steps, symbols=8, length=5, delay=40):
    """Say again, after a delay, which symbols there were."""

    def episode():
        said = np.eye(symbols)[rng.integers(0, symbols, (length, BATCH))]
        xs = np.zeros((2 * length + delay, BATCH, symbols + 2))
        xs[:length, :, :symbols] = said
        xs[length:-length, :, symbols] = 1
        xs[-length:, :, symbols + 1] = 1
        return xs, np.concatenate([np.zeros((length + delay, BATCH, symbols)), said])

    whole = 2 * length + delay
    return _together(episode, whole, steps, lambda when: when >= length + delay)


def adding(rng, steps, length=100):
    """Add the two of a hundred numbers that are marked."""

    def episode():
        values, marks = rng.uniform(size=(length, BATCH)), np.zeros((length, BATCH))
        for first in (0, length // 2):
            marks[rng.integers(first, first + length // 2, BATCH), range(BATCH)] = 1
        targets = np.zeros((length, BATCH, 1))
        targets[-1, :, 0] = (values * marks).sum(0)
        return np.stack([values, marks], -1), targets

    return _together(episode, length, steps, lambda when: when == length - 1)


def rotation(rng, steps, size=8, length=64):
    """Turn a vector that was shown once by the same rotation at every step."""
    turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
    turn[:, 0] *= np.sign(np.linalg.det(turn))

    def episode():
        vector = rng.normal(size=(BATCH, size))
        vector /= np.linalg.norm(vector, axis=1, keepdims=True)
        xs = np.zeros((length, BATCH, size + 1))
        xs[0] = np.concatenate([vector, np.ones((BATCH, 1))], 1)
        turned = [vector := vector @ turn.T for _ in range(length)]
        return xs, np.stack(turned)

    return _together(episode, length, steps, lambda when: when >= 0)


def anbn(rng, steps, most=16):
    """Predict the next letter of a^n b^n, and a full stop at the end."""

    def sample():
        letters: list[int] = []
        starts: list[int] = []
        while len(letters) <= steps:
            n = int(rng.integers(1, most + 1))
            starts.append(len(letters))
            letters += [0] * n + [1] * n + [2]
        now, later = np.asarray(letters[:steps]), np.asarray(letters[1 : steps + 1])
        # Another episode is nothing to predict.
        return now, np.where(now == 2, 2, later), np.isin(np.arange(steps), starts)

    samples = zip(*(sample() for _ in range(BATCH)), strict=True)
    now, later, fresh = (np.stack(part, 1) for part in samples)
    return _stream(np.eye(3)[now], np.eye(3)[later], np.ones(steps, bool), fresh)


class Task(NamedTuple):
    stream: Callable[[np.random.Generator, int], Stream]
    outputs: int
    classes: bool
    """Whether the targets are classes."""
    episode: int
    """How many steps it has, if all are alike."""
    length: int
    """Of a piece of the run that RTRL goes along."""
    warm_up: int
    """How many of these steps belong to episodes that have begun before."""
    whole: bool
    """Whether the published mean is over the whole run, not over its last fifth."""
    published: tuple[tuple[float, float], ...]
    """By the rules as they follow: mean and standard deviation of five seeds."""


RULES: dict[str, Callable[[Any], Any]] = {
    "SKRTRL(16)": lambda key: etrace.SKRTRL(16),
    "SKRTRL(4)": lambda key: etrace.SKRTRL(4),
    "SnAp(1)": lambda key: etrace.SnAp(1),
    "KFRTRL": etrace.KFRTRL,
    # RFLO with a time constant of ten steps.
    "DRTRL(recursion=0.9)": lambda key: etrace.DRTRL(recursion=0.9),
    "UORO": etrace.UORO,
}
TASKS = {
    "copy": Task(
        *(copy, 8, True, 50, 50, 0, False),
        ((0.856, 0.039), (0.822, 0.022), (0.700, 0.016))
        + ((0.499, 0.208), (0.343, 0.024), (0.040, 0.022)),
    ),
    "adding": Task(
        *(adding, 1, False, 100, 100, 0, True),
        ((0.887, 0.017), (0.884, 0.019), (0.606, 0.021))
        + ((0.501, 0.050), (0.581, 0.037), (0.105, 0.011)),
    ),
    "rotation": Task(
        *(rotation, 8, False, 64, 64, 0, False),
        ((0.981, 0.003), (0.985, 0.007), (0.422, 0.028))
        + ((0.559, 0.120), (0.157, 0.033), (0.059, 0.021)),
    ),
    "anbn": Task(
        *(anbn, 3, True, 1, 64, 33, False),
        ((0.983, 0.006), (0.979, 0.004), (0.425, 0.089))
        + ((0.450, 0.034), (0.494, 0.051), (0.091, 0.021)),
    ),
}


# Training.


class Net(eqx.Module):
    w: jax.Array
    u: jax.Array
    b: jax.Array
    readout: jax.Array
    bias: jax.Array

    def __init__(self, rng):
        def uniform(*shape):
            bound = UNITS**-0.5
            return jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32)

        self.w, self.u = uniform(UNITS, INPUTS), uniform(UNITS, UNITS)
        self.b = jnp.zeros(UNITS, jnp.float32)
        self.readout, self.bias = uniform(OUTPUTS, UNITS), uniform(OUTPUTS)

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x + self.u @ h + self.b)
        return self.readout @ h + self.bias, h


@functools.cache
def compiled(rule):
    """The graph of a rule, or of RTRL."""
    make = RULES.get(rule, lambda key: etrace.RTRL())
    x, h = (jnp.zeros((BATCH, size), jnp.float32) for size in (INPUTS, UNITS))
    net = Net(np.random.default_rng(0))
    return etrace.compile(net, h, x, make(jax.random.key(0)), batched=True)


def _loss(task, out, target):
    """The mean over the batch of cross entropies, or of squares over outputs too."""
    outputs, classes = task
    there = jnp.arange(OUTPUTS) < outputs
    entropy = jax.nn.log_softmax(jnp.where(there[None], out, -1e9))
    each = jnp.where(classes, -target * entropy, (out - target) ** 2 / outputs)
    return jnp.sum(jnp.where(there[None], each, 0)) / BATCH


def _renewed(fresh, zero, old):
    """Zero where an episode starts; the keys of a rule go on."""

    def choose(zero, old):
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            return old
        return jnp.where(fresh.reshape(-1, *(1,) * (old.ndim - 1)), zero, old)

    return jax.tree.map(choose, zero, old)


def _cosine(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in (g.w, g.u, g.b)]) for g in (a, b))
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


class Run(NamedTuple):
    """Where a training stands."""

    params: Net
    optimiser: optax.OptState
    state: jax.Array
    trace: Any


OPTIMISER = optax.adam(1e-3)


@jax.jit
def _train(graphs, task, run, stream):
    """On through a part of a stream, by the gradient of the first graph; the others go
    along. The loss of every step, and the cosines with the last graph."""
    zeros = [etrace.init_trace(graph) for graph in graphs]

    def body(carry, now):
        run, others = carry
        x, target, labelled, fresh = now
        state = _renewed(fresh, jnp.zeros_like(run.state), run.state)

        def loss(params, graph, trace):
            out, *new = etrace.step(graph, params, state, trace, x)
            return _loss(task, out, target), new

        found, traces = [], []
        for graph, zero, trace in zip(graphs, zeros, (run.trace, *others), strict=True):
            trace = _renewed(fresh, zero, trace)
            of_loss = jax.value_and_grad(loss, has_aux=True)
            (value, (new, trace)), grads = of_loss(run.params, graph, trace)
            found.append(grads)
            traces.append(trace)
        cosines = jnp.stack(
            [_cosine(grads, found[-1]) for grads in found[:-1]] or [1.0]
        )
        updates, optimiser = OPTIMISER.update(found[0], run.optimiser)
        moved = optax.apply_updates(run.params, updates), optimiser
        params, optimiser = jax.tree.map(
            functools.partial(jnp.where, labelled), moved, run[:2]
        )
        run = Run(params, optimiser, new, traces[0])
        return (run, tuple(traces[1:])), (value, cosines)

    (run, _), found = jax.lax.scan(body, (run, tuple(zeros[1:])), stream)
    return run, found


def parts(task, steps, pieces):
    """(start, stop, whether RTRL goes along) of the parts of a run: it does in so many
    pieces, each from the start of an episode."""
    first, last = (0 if task.whole else steps - steps // 5), steps - task.length
    now = 0
    for start in np.linspace(last, first, pieces)[::-1].astype(int):
        start = int(start) // task.episode * task.episode
        if start > now:
            yield now, start, False
        if start >= now:
            now = start + task.length
            yield start, now, True


def fidelity(
    name: str, rules: Sequence[str], seed: int, steps: int, pieces: int
) -> tuple[dict[str, float], float]:
    """The cosine of each rule with RTRL, and the loss at the end. The first rule
    trains, the others go along."""
    task, rng = TASKS[name], np.random.default_rng(seed)
    stream, net = task.stream(rng, steps), Net(rng)
    graphs = [compiled(rule) for rule in rules]
    params = graphs[0].params(net)
    state = jnp.zeros((BATCH, UNITS), jnp.float32)
    run = Run(params, OPTIMISER.init(params), state, etrace.init_trace(graphs[0]))
    cosines, losses = [], []
    for start, stop, beside in parts(task, steps, pieces):
        part = jax.tree.map(lambda a, s=slice(start, stop): a[s], stream)
        now = (*graphs, compiled("RTRL")) if beside else graphs[:1]
        run, (loss, found) = _train(now, (task.outputs, task.classes), run, part)
        labelled = np.asarray(part.labelled)
        losses.append(np.asarray(loss)[labelled])
        if beside:
            labelled = labelled & (np.arange(stop - start) >= task.warm_up)
            cosines.append(np.asarray(found)[labelled])
    means = map(float, np.nanmean(np.concatenate(cosines), axis=0))
    loss = float(np.concatenate(losses)[-200:].mean())
    return dict(zip(rules, means, strict=True)), loss


def measure(args):
    """One row for each task, rule and seed."""
    for name, seed in itertools.product(args.tasks, range(args.seeds)):
        groups = [[rule] for rule in args.rules]
        if args.quick:
            groups = [["SnAp(1)", *(r for r in args.rules if r != "SnAp(1)")]]
        for rules in groups:
            cosines, loss = fidelity(name, rules, seed, args.steps, args.pieces)
            print(".", end="", flush=True)
            for rule, cosine in cosines.items():
                row = {"task": name, "rule": rule, "seed": seed}
                yield row | {"cosine": cosine, "loss": loss}


def show(rows, tasks):
    print("\ncosine with RTRL (published)")
    print(" " * 22 + "".join(f"{name:>14}" for name in tasks))
    for k, rule in enumerate(RULES):
        print(f"{rule:22}", end="")
        for name in tasks:
            found = [
                r["cosine"] for r in rows if (r["task"], r["rule"]) == (name, rule)
            ]
            mean = f"{np.mean(found):.2f}" if found else "-"
            print(f"{mean:>7} ({TASKS[name].published[k][0]:.2f})", end="")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--rules", nargs="+", default=list(RULES), choices=RULES)
    add("--seeds", type=int, default=1, help="how many")
    add("--steps", type=int, default=20_000, help="of a training")
    add("--pieces", type=int, default=12, help="of it that RTRL goes along")
    add("--quick", action="store_true", help="SnAp(1) trains, the others go along")
    add("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {UNITS} units, batch {BATCH}, {args.steps} steps")
    rows = list(measure(args))
    show(rows, args.tasks)
    if args.json:
        published = {
            name: dict(zip(RULES, task.published, strict=True))
            for name, task in TASKS.items()
        }
        found = {"published": published, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
