"""The same training in one process or in several, on this machine or on many.

    python examples/processes.py                         # one process
    python examples/processes.py --launch 2              # two of them, here
    python examples/processes.py --processes 2 --process 0 --at host:1234   # by hand

Recurrent LIF neurons learn by e-prop, with random feedback, to keep a stimulus in mind
(delayed match to sample). The batch is spread over all devices of all processes; each
process makes its own samples, and what is random is drawn from the numbers of updates
and samples, so that the result does not depend on how many there are. Process 0 alone
prints. All of them write checkpoints, by Orbax; a run goes on from the last one, with
another number of processes if need be. When a process dies, the others stop with an
error within half a minute.

On CPUs a process takes `--devices` of them, which share its cores.
"""

import argparse
import itertools
import math
import os
import socket
import subprocess
import sys
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import eqx_etrace as etrace
from eqx_etrace import nn, tasks


STIMULI, UNITS, BATCH, DELAY = 4, 48, 64, 10
TAU = 20.0  # Of neurons and readout, in steps.
SECONDS = 10  # Without a word from a process until it counts as dead.
loss_fn = optax.softmax_cross_entropy_with_integer_labels
task = partial(tasks.delayed_match_to_sample, stimuli=STIMULI, delay_steps=DELAY)


class Net(eqx.Module):
    """Recurrent LIF neurons with a leaky readout."""

    inputs: nn.Dense
    layer: nn.Recurrent
    readout: nn.LeakyReadout

    def __init__(self, *, key):
        one, two, three = jax.random.split(key, 3)
        spike = nn.superspike(slope=2.0, scale=0.3)
        neuron = nn.LIF(UNITS, tau=TAU, resistance=20.0, spike=spike)
        self.inputs = nn.Dense(STIMULI, UNITS, key=one)
        self.layer = nn.Recurrent(neuron, key=two)
        self.readout = nn.LeakyReadout(UNITS, 2, tau=TAU, key=three)

    def init_state(self):
        return self.layer.init_state(), self.readout.init_state()

    def __call__(self, x, state):
        layer, readout = state
        drive, _ = self.inputs(x)
        spikes, layer = self.layer(drive, layer)
        out, readout = self.readout(spikes, readout)
        return out, (layer, readout)


@partial(jax.jit, static_argnums=2)
def make_samples(update, first, count):
    """Some samples of a batch, drawn by their numbers."""
    key = jax.random.fold_in(jax.random.key(1), update)
    keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(count))
    return jax.vmap(partial(task, noise=0.1), out_axes=1)(keys)


def batches(sharding):
    """Batches without an end; a process makes what its devices need."""
    whole = jax.eval_shape(make_samples, 0, 0, BATCH)
    for update in itertools.count():
        parts = {}

        def part(index, *, name, update=update, parts=parts):
            first, last, _ = index[1].indices(BATCH)
            if first not in parts:
                parts[first] = make_samples(update, first, last - first)
            return getattr(parts[first], name)

        yield [
            jax.make_array_from_callback(
                getattr(whole, name).shape, sharding, partial(part, name=name)
            )
            for name in ("inputs", "targets", "mask")
        ]


def train(args):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    net = Net(key=jax.random.key(0))
    state = jax.tree.map(lambda a: jnp.zeros((BATCH, *a.shape)), net.init_state())
    rule = etrace.EProp(
        math.exp(-1 / TAU), signal=etrace.RandomFeedback(jax.random.key(2))
    )
    x = jnp.zeros((BATCH, STIMULI))
    graph = etrace.compile(net, state, x, rule=rule, batched=True)
    there = etrace.shardings(graph, mesh)

    optimiser = optax.adam(5e-3)
    params = jax.device_put(graph.params(net), there.params)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opt_state = jax.device_put(optimiser.init(graph.params(net)), everywhere)
    state = jax.device_put(state, there.state)
    start = etrace.Checkpoint(params, opt_state, state, None, 0)
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(os.path.abspath(args.folder), options=options) as saved:
        if (last := saved.latest_step()) is not None:
            learnt = saved.restore(
                last, args=ocp.args.StandardRestore((params, opt_state))
            )
            tell(f"goes on from update {last}")
            start = etrace.Checkpoint(*learnt, state, None, last)

        def save(now):
            learnt = now.params, now.opt_state
            saved.save(now.step, args=ocp.args.StandardSave(learnt))
            return {}

        etrace.fit(
            there.graph,
            loss_fn,
            optimiser,
            start,
            itertools.islice(batches(there.sequence), start.step, args.updates),
            reduction="mean",
            carry=False,
            evaluate=save,
            report_every=args.report_every,
            callbacks=[lambda step, found: tell(f"{step} loss {found['loss']:.7f}")],
        )


def tell(text):
    if jax.process_index() == 0:
        print(text, flush=True)


def launch(args):
    """As many processes as asked for, of this script on this machine; if one fails the
    others do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--launch", "0"]
    command += ["--processes", str(args.launch), "--at", f"localhost:{port}"]
    children = [
        subprocess.Popen([*command, "--process", str(number)])
        for number in range(args.launch)
    ]
    try:
        return max(abs(child.wait()) for child in children)
    finally:
        for child in children:
            child.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--launch", type=int, default=0, help="start so many processes here")
    add("--processes", type=int, default=1, help="how many there are")
    add("--process", type=int, default=0, help="the number of this one")
    add("--at", help="host and port of process 0")
    add("--devices", type=int, default=2, help="CPU devices of a process")
    add("--updates", type=int, default=400)
    add("--report-every", type=int, default=20, help="updates, and checkpoints")
    add("--folder", default="checkpoints")
    args = parser.parse_args()
    if args.launch:
        return launch(args)
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.distributed.initialize(
            args.at, args.processes, args.process, heartbeat_timeout_seconds=SECONDS
        )
    train(args)
    tell(f"{jax.process_count()} processes, {jax.device_count()} devices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
