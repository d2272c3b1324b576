"""One device next to several, which on a CPU share its cores.

The gradient of a sequence in windows of 32, D-RTRL and ES-D-RTRL, float32: on one
device, spread by samples, by units and by both, with the bytes that a device holds. All
run in one process, one after the other in every round; `--devices` virtual ones, unless
the machine has others.
"""

import argparse
import json
import os
import statistics
from pathlib import Path


RULES = "DRTRL", "ESDRTRL"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", nargs="+", default=["*"], help="names or patterns")
    add("--devices", type=int, default=2, help="virtual ones, on a CPU")
    add("--batch", type=int, default=64)
    add("--steps", type=int, default=96)
    add("--rounds", type=int, default=9)
    add("--quick", action="store_true", help="small networks")
    add("--json", type=Path, help="write the numbers to this file too")
    return parser.parse_args()


def meshes(jax, count):
    auto = jax.sharding.AxisType.Auto
    shapes = {"samples": ((count,), ("data",)), "units": ((count,), ("model",))}
    if count % 2 == 0 and count > 2:
        shapes["both"] = (count // 2, 2), ("data", "model")
    return {
        way: jax.make_mesh(shape, names, axis_types=(auto,) * len(names))
        for way, (shape, names) in shapes.items()
    }


def runners(job, rule, jax, etrace, loss_fn):
    """On one device, and each way of several."""
    made = etrace.ESDRTRL(decay=0.9) if rule == "ESDRTRL" else etrace.DRTRL()
    graph = etrace.compile(job.net, job.state, job.xs[0], rule=made, batched=True)
    args = graph.params(job.net), job.state, etrace.init_trace(graph), job.xs, job.ys
    cases = {"one device": (graph, args)}
    for way, mesh in meshes(jax, jax.device_count()).items():
        there = etrace.shardings(graph, mesh)
        where = there.params, there.state, there.trace, there.sequence, there.sequence
        cases[way] = there.graph, jax.device_put(args, where)
    found = {}
    for way, (each, given) in cases.items():
        fun = etrace.value_and_grad(each, loss_fn, window=32)
        compiled = jax.jit(fun).lower(*given).compile()
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        found[way] = compiled, given, held
    return found


def main():
    args = parse()
    flag = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

    # Only now: JAX reads the flag when it starts.
    import jax
    import jax.numpy as jnp
    from machine import machine
    from methods import Runner
    from windows import QUICK_NET, make_job, matching, measure
    from workloads import WORKLOADS

    import eqx_etrace as etrace

    def loss_fn(out, target):
        return jnp.sum((out - target) ** 2, axis=-1)

    size = {"batch": args.batch} | (QUICK_NET if args.quick else {})
    print(machine(), f"batch {args.batch}, {args.steps} steps", jax.devices())
    rows = []
    for load in matching(args.workloads, WORKLOADS):
        for rule in RULES:
            job = make_job(load, size, args.steps)
            found = runners(job, rule, jax, etrace, loss_fn)
            plain = {
                way: Runner(lambda run=run, given=given: run(*given))
                for way, (run, given, _) in found.items()
            }
            seconds = measure(plain, args.rounds, 60.0)
            base = statistics.median(seconds["one device"])
            for way, times in seconds.items():
                median, held = statistics.median(times), found[way][2]
                row = {"workload": load, "rule": rule, "way": way}
                row |= {"us": 1e6 * median / args.steps, "ratio": median / base}
                row |= {"mib": held / 2**20}
                rows.append(row)
                print(
                    f"{load:6} {rule:8} {way:12} {row['us']:9.0f} us per step, "
                    f"{row['ratio']:.2f} of one device, {row['mib']:7.1f} MiB each",
                    flush=True,
                )
    if args.json:
        found = {**machine(), **vars(args), "json": None, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
