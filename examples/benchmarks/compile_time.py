"""Seconds that `eqx_etrace.compile` takes, and the cost of importing the library.

Every sample is a process of its own, because the first call is the one that a user
waits for. The import is compared with that of Equinox, in turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


IMPORT = """
import time
start = time.perf_counter()
import {package}
print(time.perf_counter() - start)
"""

# Some unrelated function is jitted first: starting JAX is not the library's time.
COMPILE = """
import time
import equinox as eqx, jax, jax.numpy as jnp
import eqx_etrace as etrace

class Net(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(state), state

keys = jax.random.split(jax.random.key(0))
net = Net(eqx.nn.GRUCell(64, 256, key=keys[0]), eqx.nn.Linear(256, 10, key=keys[1]))
state, x = jnp.zeros(256), jnp.zeros(64)
jax.block_until_ready(jax.jit(lambda a: jnp.sin(a) @ a)(x))
for _ in range(2):
    start = time.perf_counter()
    etrace.compile(net, state, x, rule=etrace.DRTRL())
    print(time.perf_counter() - start)
"""


def sample(code):
    """The numbers that this code prints in a new process."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(line) for line in done.stdout.split()]


def measure(rounds):
    codes = {
        "import equinox": IMPORT.format(package="equinox"),
        "import eqx_etrace": IMPORT.format(package="eqx_etrace"),
        "compile": COMPILE,
    }
    for code in codes.values():
        sample(code)  # Once for the file cache and the byte code.
    names = ["import equinox", "import eqx_etrace", "first compile", "second compile"]
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        numbers = [number for code in codes.values() for number in sample(code)]
        for name, number in zip(names, numbers, strict=True):
            seconds[name].append(number)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    args = parser.parse_args()
    seconds = measure(3 if args.quick else 11)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"{'seconds':20} {'median':>8} {'min':>8} {'max':>8}")
    for name, each in seconds.items():
        print(f"{name:20} {medians[name]:8.3f} {min(each):8.3f} {max(each):8.3f}")
    ratio = medians["import eqx_etrace"] / medians["import equinox"]
    print(f"import eqx_etrace / import equinox: {ratio:.2f}")
    print("compile: GRU 64 -> 256 with a readout, in a process where JAX has started")
    if args.json:
        args.json.write_text(
            json.dumps({"median_s": medians, "import_ratio": ratio}, indent=2)
        )


if __name__ == "__main__":
    main()
