"""Seconds and memory that `eqx_etrace.compile` takes, and the cost of importing it.

Every sample is a process of its own, because the first call is the one that a user
waits for. The import is compared with that of Equinox, in turns. Three models of
growing size show whether compiling grows linearly:

- `gru`: stacked `eqx.nn.GRUCell(512)` layers with a readout, by layers;
- `elementwise`: a layer of spiking neurons with a synaptic current, driven by one input
  weight each, by hidden elements (two a neuron);
- `edges`: a recurrent layer of the same neurons, connected by an edge list with ten
  edges a neuron, by edges.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


IMPORT = """
import time
start = time.perf_counter()
import {package}
print(time.perf_counter() - start)
"""
SIZES = {
    "gru": (1, 3, 6, 12),
    "elementwise": (10_000, 100_000, 1_000_000),
    "edges": (10_000, 100_000, 1_000_000),
}
WHAT = {"gru": "layers", "elementwise": "hidden elements", "edges": "edges"}


def gru(layers, width=512):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    class Net(eqx.Module):
        cells: list[eqx.nn.GRUCell]
        readout: eqx.nn.Linear

        def __call__(self, x, state):
            new = []
            for cell, h in zip(self.cells, state, strict=True):
                x = cell(x, h)
                new.append(x)
            return self.readout(x), new

    *keys, last = jax.random.split(jax.random.key(0), layers + 1)
    cells = [eqx.nn.GRUCell(width, width, key=key) for key in keys]
    net = Net(cells, eqx.nn.Linear(width, 10, key=last))
    return net, [jnp.zeros(width)] * layers, jnp.zeros(width)


def _spiking(drive_of):
    """A step of current, membrane and spikes around `drive_of(model, x, membrane)`."""
    import equinox as eqx
    import jax.numpy as jnp
    from jax import nn
    from jaxtyping import Array, Float, Int

    class Net(eqx.Module):
        w: Float[Array, " weights"]
        tau: Float[Array, ""]
        source: Int[Array, " edges"] | None = None
        target: Int[Array, " edges"] | None = None

        def __call__(self, x, state):
            current, membrane = state
            decay = nn.sigmoid(self.tau)
            current = decay * current + drive_of(self, x, membrane)
            membrane = 0.9 * membrane + current
            return jnp.sum(membrane), (current, membrane)

    return Net


def elementwise(elements):
    import jax.numpy as jnp

    neurons = elements // 2
    net = _spiking(lambda m, x, v: m.w * x)(jnp.ones(neurons), jnp.zeros(()))
    state = jnp.zeros(neurons), jnp.zeros(neurons)
    return net, state, jnp.zeros(neurons)


def edges(edges):
    import jax
    import jax.numpy as jnp
    import numpy as np

    def drive(model, x, membrane):
        sent = model.w * jax.nn.sigmoid(membrane)[model.source]
        return x + jnp.zeros_like(membrane).at[model.target].add(sent)

    neurons = edges // 10
    random = np.random.default_rng(0)
    source, target = random.integers(0, neurons, (2, edges), dtype=np.int32)
    net = _spiking(drive)(jnp.ones(edges), jnp.zeros(()), source, target)
    return net, (jnp.zeros(neurons), jnp.zeros(neurons)), jnp.zeros(neurons)


def one_compile(model, size):
    """Print the seconds of two compiles and the process's peak memory in bytes."""
    import jax
    import jax.numpy as jnp

    import eqx_etrace as etrace

    net, state, x = {"gru": gru, "elementwise": elementwise, "edges": edges}[model](
        size
    )
    # Some unrelated function is jitted first: starting JAX is not the library's time.
    jax.block_until_ready(jax.jit(lambda a: jnp.sin(a) @ a)(jnp.ones(3)))
    for _ in range(2):
        start = time.perf_counter()
        etrace.compile(net, state, x, rule=etrace.DRTRL())
        print(time.perf_counter() - start)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def sample(*arguments):
    """The numbers that a new Python process with these arguments prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(line) for line in done.stdout.split()]


def import_times(rounds):
    codes = {
        f"import {package}": IMPORT.format(package=package)
        for package in ("equinox", "eqx_etrace")
    }
    for code in codes.values():
        sample("-c", code)  # Once for the file cache and the byte code.
    seconds = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            seconds[name] += sample("-c", code)
    print(f"{'seconds':20} {'median':>8} {'min':>8} {'max':>8}")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:20} {median:8.3f} {min(each):8.3f} {max(each):8.3f}")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians["import eqx_etrace"] / medians["import equinox"]
    print(f"import eqx_etrace / import equinox: {ratio:.2f}")
    return {"median_s": medians, "import_ratio": ratio}


def compile_times(models, rounds):
    """A row for each model and size: medians over processes."""
    print(
        f"\n{'compile':12} {'size':>10} {'first s':>8} {'second s':>9} {'peak MB':>8}"
    )
    rows = []
    for model in models:
        for size in SIZES[model]:
            arguments = (__file__, "--one", model, str(size))
            each = [sample(*arguments) for _ in range(rounds)]
            first, second, peak = map(statistics.median, zip(*each, strict=True))
            print(f"{model:12} {size:10d} {first:8.2f} {second:9.2f} {peak / 1e6:8.0f}")
            row = {"first_s": first, "second_s": second, "peak_bytes": peak}
            rows.append({"model": model, "size": size} | row)
    sizes = ", ".join(f"{model} in {WHAT[model]}" for model in models)
    print(f"sizes: {sizes}; each in a process where JAX has started")
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="one process a sample")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_compile(args.one[0], int(args.one[1]))
        return
    numbers = import_times(1 if args.quick else 11)
    numbers["compile"] = compile_times(args.models, 1 if args.quick else 3)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
