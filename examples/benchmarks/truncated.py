"""What a trace adds to truncated BPTT: the gradient, the time and the memory.

For windows of K steps, each with the exact gradient within the window: truncated BPTT,
which forgets what was before, and multi-step rules with a trace of D-RTRL or ES-D-RTRL
for it. The cosine and the ratio of norms compare the gradient of the recurrent cell
with that of BPTT through the whole sequence.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import machine
from methods import BPTT, METHODS, Unavailable, by_hand, library, through_time
from multi_step_by_hand import drtrl_before, es_before, multi_step
from windows import FULL, QUICK, QUICK_NET, make_job, matching, measure, summarise
from windows_by_hand import init_es_trace
from workloads import WORKLOADS, truncated_bptt


WINDOWS = 1, 5, 20, 50


def truncated(job, window):
    return through_time(functools.partial(truncated_bptt, window=window), job)


def drtrl_by_hand(job, window):
    fun = functools.partial(multi_step, drtrl_before, window=window)
    return by_hand(fun, job, folded=job.name != "rnn")


def es_by_hand(job, window):
    fun = functools.partial(multi_step, es_before, window=window)
    return by_hand(fun, job, folded=False, init=init_es_trace)


METHODS_OF_WINDOW = {
    "truncated BPTT": truncated,
    "by hand: D-RTRL": drtrl_by_hand,
    "by hand: ES-D-RTRL": es_by_hand,
    "etrace: D-RTRL": functools.partial(library, vjp="multi-step"),
    "etrace: ES-D-RTRL": functools.partial(library, vjp="multi-step", rule="ESDRTRL"),
}


def cell_gradient(job, leaves):
    """That of the recurrent part as one vector."""
    net = jax.tree.unflatten(jax.tree.structure(job.net), leaves)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(net.cell)])


def compare(job, got, want):
    got, want = cell_gradient(job, got), cell_gradient(job, want)
    norms = jnp.linalg.norm(got), jnp.linalg.norm(want)
    cosine = jnp.vdot(got, want) / (norms[0] * norms[1])
    return {"cosine": float(cosine), "norm_ratio": float(norms[0] / norms[1])}


def build(names, job):
    """All runners by (method, window), and how their gradients compare."""
    runners = {BPTT: METHODS[BPTT](job)}
    _, want = runners[BPTT].run()
    quality = {}
    for window in WINDOWS:
        for name in names:
            try:
                method = METHODS_OF_WINDOW[name]
                runner = method(job, window=window)
            except Unavailable:
                continue
            _, got = jax.block_until_ready(runner.run())
            runners[name, window] = runner
            quality[name, window] = compare(job, got, want)
            print(".", end="", flush=True)
    return runners, quality


def rows_of(job, names, rounds, patience):
    runners, quality = build(names, job)
    table = summarise(runners, measure(runners, rounds, patience))
    return [
        {"method": name, "window": window, **quality[name, window], **row}
        for (name, window), row in ((k, v) for k, v in table.items() if k != BPTT)
    ], table[BPTT]


def show(load, rows, whole):
    print(f"\n\n{load}; BPTT: {whole['us_per_step']:.0f} us a step, ", end="")
    print(f"{whole['temp_mib']:.1f} MiB")
    print(f"{'':20} {'K':>4} {'cosine':>7} {'norm':>6} {'us/step':>8}", end="")
    print(f" {'/ BPTT':>7} {'MiB':>7} {'+ trace':>8}")
    for row in rows:
        print(f"{row['method']:20} {row['window']:4}", end="")
        print(f" {row['cosine']:7.3f} {row['norm_ratio']:6.2f}", end="")
        print(f" {row['us_per_step']:8.0f} {row['to_bptt']:7.2f}", end="")
        print(f" {row['temp_mib']:7.1f} {row['trace_mib']:8.1f}")


def plot(tables, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(tables), figsize=(4 * len(tables), 6), squeeze=False, sharex=True
    )
    for column, (load, found) in enumerate(tables.items()):
        for name in METHODS_OF_WINDOW:
            rows = [row for row in found["rows"] if row["method"] == name]
            for axis, key in zip(axes[:, column], ("cosine", "to_bptt"), strict=True):
                if rows:
                    windows = [row["window"] for row in rows]
                    style = ".--" if name.startswith("by hand") else ".-"
                    axis.plot(windows, [row[key] for row in rows], style, label=name)
        axes[0, column].set(title=load, xscale="log", ylim=(None, 1))
        axes[1, column].set(xlabel="window K", ylim=(0, None))
        axes[1, column].set_xticks(WINDOWS, list(map(str, WINDOWS)))
        axes[1, column].minorticks_off()
    axes[0, 0].set_ylabel("cosine with BPTT")
    axes[1, 0].set_ylabel("time, BPTT = 1")
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", default=["*"], help=f"of {', '.join(WORKLOADS)}")
    add("--methods", nargs="+", default=["*"], help="names or patterns: 'by*'")
    add("--steps", type=int, default=200, help="length of the sequence")
    add("--rounds", type=int, default=3, help="calls of each method")
    add("--patience", type=float, default=30.0, help="seconds a method may use")
    add("--quick", action="store_true", help="small networks")
    add("--json", type=Path, help="write the numbers to this file too")
    add("--plot", type=Path, help="draw them to this file")
    args = parser.parse_args()
    size = QUICK | QUICK_NET if args.quick else FULL
    size = size | {"steps": args.steps, "rounds": args.rounds}
    names = matching(args.methods, METHODS_OF_WINDOW)
    print(f"jax {jax.__version__} on {jax.default_backend()}, {size}")
    tables = {}
    for load in matching(args.workloads, WORKLOADS):
        job = make_job(load, size, args.steps)
        rows, whole = rows_of(job, names, args.rounds, args.patience)
        show(load, rows, whole)
        tables[load] = {"bptt": whole, "rows": rows}
    if args.json:
        found = {**machine(), **size, "table": tables}
        args.json.write_text(json.dumps(found, indent=2))
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
