"""Networks as large as a fly's brain: 130 000 spiking neurons with 13 million synapses.

LIF neurons with synaptic currents, each with 100 inputs from others drawn at random,
learn with ES-D-RTRL to follow a signal: one sample, an update every 10 steps.
Every size runs in a process of its own, for its peak of memory. Beside the time of a
step stands a floor: the bytes that cannot stay in a cache (weights and indices of the
forward pass; at an update indices and gradients, and what Adam reads and writes) over
the bandwidth of this machine, measured on a large array. The trace is one vector of
filtered spikes and two of the size of the state, which stay in the cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine

import eqx_etrace as etrace
from eqx_etrace import nn


SIZES, FAN_IN, INPUTS, EVERY = (1_000, 4_000, 16_000, 65_000, 130_000), 100, 4, 10


class Edges(eqx.Module):
    """Synapses one by one, in any order and number per unit: what a connectome is."""

    weight: jax.Array
    pre: jax.Array
    post: jax.Array
    units: int = eqx.field(static=True)

    def __init__(self, units, pre, *, key):
        bound = FAN_IN**-0.5
        order = np.random.default_rng(1).permutation(pre.size)
        self.pre = jnp.asarray(pre.reshape(-1)[order])
        self.post = jnp.asarray(order.astype(np.int32) // FAN_IN)
        self.weight = jax.random.uniform(key, pre.size, minval=-bound, maxval=bound)
        self.units = units

    def init_state(self):
        return ()

    def __call__(self, x, state=()):
        sent = self.weight * x[self.pre]
        return jax.ops.segment_sum(sent, self.post, num_segments=self.units), state


class Net(eqx.Module):
    inputs: nn.Dense
    layer: nn.Recurrent
    readout: eqx.nn.Linear

    def __init__(self, units, edges, *, key):
        one, two, three = jax.random.split(key, 3)
        drawn = np.random.default_rng(0).integers(0, units, (units, FAN_IN), np.int32)
        neuron = nn.LIF(units, tau=20.0, resistance=5.0, spike=nn.superspike(5.0))
        self.inputs = nn.Dense(INPUTS, units, key=one)
        self.layer = nn.Recurrent(
            neuron,
            Edges(units, drawn, key=two)
            if edges
            else nn.Sparse(units, units, FAN_IN, indices=drawn, key=two),
            synapse=nn.Exponential(units, tau=5.0),
        )
        self.readout = eqx.nn.Linear(units, 1, key=three)

    def __call__(self, x, state):
        drive, _ = self.inputs(x)
        spikes, state = self.layer(drive, state)
        return self.readout(spikes), state


def data(steps):
    """Two sines in, their product out."""
    t = jnp.arange(steps)[:, None] / 50
    phases = jnp.linspace(0.0, 3.0, INPUTS)
    xs = 1 + jnp.sin(2 * jnp.pi * t * jnp.array([1.0, 1.0, 2.0, 2.0]) + phases)
    return xs, jnp.sin(2 * jnp.pi * t) * jnp.cos(4 * jnp.pi * t)


def loss_fn(out, target):
    return jnp.sum((out - target) ** 2)


def bandwidth():
    """Bytes per second of an array that is read and written."""
    array = jnp.ones(2**26, jnp.float32)
    update = jax.jit(lambda a: 0.9 * a + 1, donate_argnums=0)
    array = update(array)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        array = jax.block_until_ready(update(array))
        seconds.append(time.perf_counter() - start)
    return 2 * array.nbytes / sorted(seconds)[4]


def floor_bytes(units, edges):
    """Of one step."""
    synapses = 4 * units * FAN_IN
    forward = (2 + edges) * synapses  # Weights and indices.
    gradient = (2 + edges) * synapses / EVERY  # Indices, and what is written.
    update = 7 * synapses / EVERY  # Gradients; weights and two moments, twice.
    return forward + gradient + update


def one(units, steps, edges):
    start = time.perf_counter()
    net = Net(units, edges, key=jax.random.key(0))
    state, (xs, ys) = net.layer.init_state(), data(steps)
    graph = etrace.compile(net, state, xs[0], rule=etrace.ESDRTRL(0.9))
    compiled = time.perf_counter() - start
    params, optimiser = graph.params(net), optax.adam(0.3 / units)
    fun = etrace.learn(graph, loss_fn, optimiser, every=EVERY)
    fun = jax.jit(fun, donate_argnums=(0, 1, 2, 3))
    carry = params, optimiser.init(params), state, etrace.init_trace(graph)
    seconds, losses = [], []
    for _ in range(4):
        start = time.perf_counter()
        loss, *carry = jax.block_until_ready(fun(*carry, xs, ys))
        seconds.append(time.perf_counter() - start)
        losses.append(float(jnp.mean(loss)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "units": units,
        "synapses": units * FAN_IN,
        "compile_s": compiled,
        "first_call_s": seconds[0],
        "ms_per_step": 1e3 * min(seconds[1:]) / steps,
        "floor_ms": 1e3 * floor_bytes(units, edges) / bandwidth(),
        "peak_gb": peak,
        "losses": losses,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--units", nargs="+", type=int, default=SIZES)
    add("--steps", type=int, default=100)
    add(
        "--edges",
        action="store_true",
        help="synapses in a list, not in rows",
    )
    add("--one", action="store_true", help=argparse.SUPPRESS)
    add("--json", type=Path, help="write the numbers to this file too")
    add("--plot", type=Path, help="draw them to this file")
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one(args.units[0], args.steps, args.edges)))
    rows = []
    print(
        "units  synapses  compile s  ms per step  floor ms  peak GB  loss of 4 passes"
    )
    for units in args.units:
        command = [sys.executable, __file__, "--one", "--units", str(units)]
        command += ["--steps", str(args.steps), *["--edges"] * args.edges]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            sys.exit(found.stderr)
        row = json.loads(found.stdout.splitlines()[-1])
        losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
        print(
            f"{units:6} {row['synapses']:9} {row['compile_s']:9.1f} "
            f"{row['ms_per_step']:12.2f} {row['floor_ms']:9.2f} "
            f"{row['peak_gb']:8.2f}  {losses}",
            flush=True,
        )
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "rows": rows}, indent=2))
    if args.plot:
        draw(rows, args.plot)
    return None


def draw(rows, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    synapses = [row["synapses"] for row in rows]
    for key, label in (("ms_per_step", "ES-D-RTRL"), ("floor_ms", "floor")):
        time_axis.loglog(synapses, [row[key] for row in rows], "o-", label=label)
    memory_axis.loglog(synapses, [row["peak_gb"] for row in rows], "o-")
    time_axis.set(xlabel="synapses", ylabel="ms per step")
    memory_axis.set(xlabel="synapses", ylabel="peak memory of the process, GB")
    time_axis.legend(frameon=False)
    figure.savefig(file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
