"""Microseconds per time step and memory of online learning over windows, next to BPTT.

Four networks, float32, a batch of samples. All methods of a network run in one process,
one after the other in every round, so that a busy machine disturbs them alike: read
the ratios. `methods.py` has the methods; `--help` the options.
"""

import argparse
import fnmatch
import json
import random
import statistics
import time
from pathlib import Path

import jax
from handwritten import relative_error
from machine import machine
from methods import BPTT, METHODS, Job, Unavailable, truth_of
from workloads import WORKLOADS, init_data, init_net


FULL = {"batch": 32, "steps": 200, "peer_steps": 20, "rounds": 7}
QUICK = {"batch": 4, "steps": 40, "peer_steps": 5, "rounds": 3}
QUICK_NET = {"inputs": 12, "units": 24}
PLOT_STEPS = 50, 100, 200, 400, 800, 1600
PLOTTED = (
    BPTT,
    "BPTT checkpointed",
    "by hand: window 32",
    "by hand: ES window 10",
    "etrace: window 32",
    "etrace: ES window 10",
)
ROOM = 2**20


def make_job(name, size, steps):
    shape = {key: size.get(key) for key in ("inputs", "units")}
    net = init_net(jax.random.key(0), name, **shape)
    xs, ys = init_data(jax.random.key(1), net, name, steps, size["batch"])
    return Job(name, net, xs, ys)


def compare(name, got, job, truths):
    """How far a first result is from the one it must have; None if it has none."""
    truth = truth_of(name)
    if truth is None or truth == name:
        return None
    if truth not in truths:
        truths[truth] = METHODS[truth](job).run()
    want = truths[truth]
    return max(map(relative_error, got, want))


def build(names, job, peer_job):
    """The runners of what is there; each has run once and was compared.

    Not after more than 200 steps: by then a rounding error may have flipped a spike,
    and all that follows is another sequence.
    """
    runners, truths, left_out = {}, {}, {}
    for name in names:
        start = time.perf_counter()
        try:
            own = peer_job if name.startswith("braintrace") else job
            runner = METHODS[name](own)
        except Unavailable as reason:
            left_out.setdefault(str(reason), []).append(name)
            continue
        got = jax.block_until_ready(runner.run())
        error = None
        if truth_of(name) == name:
            truths[name] = got
        elif len(job.xs) <= FULL["steps"]:
            error = compare(name, got, job, truths)
        note = "" if error is None else f", {error:.0e} from {truth_of(name)}"
        took = time.perf_counter() - start
        print(f"  {name}: compiled and run in {took:.1f} s{note}", flush=True)
        assert error is None or error < 1e-2, name
        runners[name] = runner
    for reason, absent in left_out.items():
        print(f"  left out, {reason}: {', '.join(absent)}")
    return runners


def measure(runners, rounds, patience):
    """Seconds of every call, in rounds over all methods, each in another order.

    A method of less than a second runs once more before it is timed, so that it does
    not pay for what the one before left in caches and pages. One that has used up the
    patience sits out the rounds that remain, but not before it ran three times: a busy
    machine may hold up one call for long.
    """
    seconds = {name: [] for name in runners}
    for round_ in range(rounds):
        for name in random.Random(round_).sample(list(runners), len(runners)):
            each = seconds[name]
            best = min(each, default=0.0)
            if len(each) >= 3 and len(each) * best > patience:
                continue
            if best < 1.0:
                jax.block_until_ready(runners[name].run())
            start = time.perf_counter()
            jax.block_until_ready(runners[name].run())
            each.append(time.perf_counter() - start)
    return seconds


def summarise(runners, seconds):
    """Per method: microseconds a step, ratio to BPTT, memory in MiB."""
    table = {}
    for name, runner in runners.items():
        each = sorted(1e6 * second / runner.steps for second in seconds[name])
        low, high = each[len(each) // 4], each[-1 - len(each) // 4]
        row = {"us_per_step": statistics.median(each), "low": low, "high": high}
        row["temp_mib"] = None if runner.temp is None else runner.temp / ROOM
        table[name] = row | {"trace_mib": runner.trace / ROOM, "steps": runner.steps}
    if BPTT in table:
        for row in table.values():
            row["to_bptt"] = row["us_per_step"] / table[BPTT]["us_per_step"]
    return table


def cell(row):
    if row is None:
        return f"{'-':>8} {'':>6} {'':>10}"
    ratio = f"{row['to_bptt']:.2f}" if "to_bptt" in row else ""
    room = "-" if row["temp_mib"] is None else f"{row['temp_mib']:.1f}"
    if row["trace_mib"] > 0.05:
        room += f"+{row['trace_mib']:.0f}"
    return f"{row['us_per_step']:8.0f} {ratio:>6} {room:>10}"


def show(tables):
    print("\nus per step, ratio to BPTT, MiB of temporaries (+ of the trace)")
    width = len(cell(None))
    print(f"{'':24}", *(f"{name:>{width}}" for name in tables), sep=" | ")
    for method in METHODS:
        rows = [table.get(method) for table in tables.values()]
        if any(rows):
            print(f"{method:24}", *map(cell, rows), sep=" | ")


def measure_lengths(names, loads, size, options):
    """The same for sequences of growing length."""
    found = {}
    for load in loads:
        found[load] = {}
        for steps in options["plot_steps"]:
            job = make_job(load, size, steps)
            print(f"{load}, {steps} steps", flush=True)
            runners = build([n for n in names if n in PLOTTED], job, job)
            seconds = measure(runners, options["plot_rounds"], options["patience"])
            found[load][steps] = summarise(runners, seconds)
    return found


def draw(found, file):
    """Memory and time against the length, a column for each workload."""
    from matplotlib.figure import Figure

    from eqx_etrace import plot

    figure = Figure(figsize=(4 * len(found), 6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for (load, by_steps), column in zip(found.items(), axes.T, strict=True):
        rows = [
            {
                "method": name,
                "steps": steps,
                "memory": ROOM * (table[name]["temp_mib"] + table[name]["trace_mib"]),
                "time": 1e-6 * table[name]["us_per_step"],
            }
            for name in PLOTTED
            for steps, table in by_steps.items()
            if name in table
        ]
        plot.scaling(rows, column)
        column[0].set_title(load)
    handles = axes[0, 0].get_legend_handles_labels()
    for axis in axes.flat:
        if axis.get_legend() is not None:
            axis.get_legend().remove()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)
    print(f"wrote {file}")


def matching(patterns, names):
    """The names that a pattern fits, such as `by*` or `lif`."""
    found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not found:
        raise SystemExit(f"nothing fits {patterns}; there are {list(names)}")
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", default=["*"], help=f"of {', '.join(WORKLOADS)}")
    add(
        "--methods", nargs="+", default=["*"], help="names or patterns, as 'BPTT' 'by*'"
    )
    add("--steps", type=int, help="length of the sequence")
    add("--rounds", type=int, help="calls of each method")
    add("--patience", type=float, default=30.0, help="seconds a method may use")
    add("--quick", action="store_true", help="small networks")
    add("--json", type=Path, help="write the numbers to this file too")
    add("--plot", type=Path, help="measure growing lengths and draw them to this file")
    return parser.parse_args()


def main():
    args = parse()
    size = QUICK | QUICK_NET if args.quick else dict(FULL)
    size |= {k: v for k in ("steps", "rounds") if (v := getattr(args, k)) is not None}
    loads = matching(args.workloads, WORKLOADS)
    names = matching(args.methods, METHODS)
    print(f"jax {jax.__version__} on {jax.default_backend()}, {size}")
    tables = {}
    for load in loads:
        print(load)
        job = make_job(load, size, size["steps"])
        peer_job = make_job(load, size, size["peer_steps"])
        runners = build(names, job, peer_job)
        tables[load] = summarise(
            runners, measure(runners, size["rounds"], args.patience)
        )
    show(tables)
    facts = {**machine(), **size}
    write(args.json, {**facts, "table": tables})
    if args.plot:
        options = {
            "plot_steps": [20, 40, 80] if args.quick else PLOT_STEPS,
            "plot_rounds": 3,
            "patience": args.patience,
        }
        lengths = measure_lengths(names, loads, size, options)
        write(args.json, {**facts, "table": tables, "lengths": lengths})
        draw(lengths, args.plot)


def write(file, facts):
    if file:
        file.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
