"""Writes the tables and the figure of `benchmarks.md` from the numbers in `data`.

    python docs/make_benchmarks.py           # write
    python docs/make_benchmarks.py --check   # only say whether the page is up to date

A table stands between two comments that name it. One whose file is not there, or has
not what it needs, stays as it is. The page itself says which commands make the files.
"""

import argparse
import json
import re
import sys
from pathlib import Path


DOCS = Path(__file__).parent
PAGE, DATA, FIGURE = DOCS / "benchmarks.md", DOCS / "data", DOCS / "benchmarks.png"
BENCHMARKS = DOCS.parent / "examples" / "benchmarks"
LOADS = {"rnn": "RNN", "gru": "GRU", "lif": "LIF", "alif": "adaptive LIF"}
BPTT = "BPTT"


def table(head, rows):
    """Markdown; a row of nothing but empty cells is left out."""
    rows = [row for row in rows if any(row[1:])]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio(number):
    return f"{number:.{2 if number < 2 else 1 if number < 10 else 0}f}"


def mib(number):
    return f"{number:.{1 if number < 1 else 0}f}"


def on(found):
    """The machine and the versions."""
    versions = {"jax": "JAX", "braintrace": "braintrace", "python": "Python"}
    parts = [f"{versions[key]} {found[key]}" for key in versions if key in found]
    if "cores" in found:
        parts.insert(0, f"{found['backend']}, {found['cores']} cores")
    return f"Measured on {'; '.join(parts)}."


def of_loads(found, first, rows, cell):
    """A column for each network, a row for each method, `cell(row, table)`."""
    loads = {load: found["table"][load] for load in LOADS if load in found["table"]}
    body = [
        [name, *(cell(t[name], t) if name in t else "" for t in loads.values())]
        for name in rows
    ]
    return table([first, *(LOADS[load] for load in loads)], body)


def methods(found):
    names = [name for table in found["table"].values() for name in table]
    return list(dict.fromkeys(names))


def windows_time(found):
    rows = [name for name in methods(found) if name != BPTT and "floor" not in name]
    tables = found["table"].values()
    base = [f"{t[BPTT]['us_per_step']:.0f}" for t in tables]
    body = of_loads(found, "time, BPTT = 1", rows, lambda row, _: ratio(row["to_bptt"]))
    head, rule, *rest = body.splitlines()
    first = "| " + " | ".join(["BPTT, us per step", *base]) + " |"
    return "\n".join([on(found), "", head, rule, first, *rest])


def windows_memory(found):
    def cell(row, _):
        if row["temp_mib"] is None:
            return ""
        trace = f" + {mib(row['trace_mib'])}" if row["trace_mib"] else ""
        return mib(row["temp_mib"]) + trace

    rows = [name for name in methods(found) if "floor" not in name]
    return of_loads(found, "MiB of temporaries + trace", rows, cell)


FLOOR = (
    *("floor: forward", "floor: window 10", "by hand: ES window 10"),
    *("etrace: ES window 10", "floor: whole", "by hand: whole", "etrace: whole"),
)


def floor(found):
    if not any("floor: whole" in table for table in found["table"].values()):
        return None
    return of_loads(
        found, "time, BPTT = 1", FLOOR, lambda row, _: ratio(row["to_bptt"])
    )


def lengths(found):
    del found
    return f"![Time and memory against the length of a sequence]({FIGURE.name})"


def draw(found):
    """The figure that `lengths` shows."""
    sys.path.insert(0, str(BENCHMARKS))
    from windows import draw as draw_lengths

    by_load = {
        LOADS[load]: {int(steps): table for steps, table in by_steps.items()}
        for load, by_steps in found["lengths"].items()
    }
    draw_lengths(by_load, FIGURE)


TRUNCATED = {
    "truncated BPTT": "truncated",
    "etrace: ES-D-RTRL": "ES-D-RTRL",
    "etrace: D-RTRL": "D-RTRL",
}


def by_window(found, first, cell):
    """Rows of (window, method), columns of networks."""
    columns = {
        load: {(row["window"], row["method"]): row for row in part["rows"]}
        for load, part in found["table"].items()
    }
    windows = sorted({key[0] for rows in columns.values() for key in rows})
    body = [
        [
            f"{window}, {label}",
            *(cell(rows.get((window, name))) for rows in columns.values()),
        ]
        for window in windows
        for name, label in TRUNCATED.items()
    ]
    return table([first, *(LOADS[load] for load in columns)], body)


def truncated(found):
    def cell(row):
        return f"{row['cosine']:.2f} ({row['norm_ratio']:.2f})" if row else ""

    return f"{on(found)}\n\n{by_window(found, 'window', cell)}"


def truncated_time(found):
    def cell(row):
        return ratio(row["to_bptt"]) if row else ""

    return by_window(found, "window, time, BPTT = 1", cell)


def which_rule(found):
    sys.path.insert(0, str(BENCHMARKS))
    from which_rule import markdown

    return f"{on(found)}\n\n{markdown(found).strip()}"


BLOCKS = {
    "windows-time": ("windows.json", windows_time),
    "windows-memory": ("windows.json", windows_memory),
    "windows-floor": ("windows.json", floor),
    "windows-lengths": ("lengths.json", lengths),
    "truncated": ("truncated.json", truncated),
    "truncated-time": ("truncated.json", truncated_time),
    "which-rule": ("which_rule.json", which_rule),
}


def read(file, data=DATA):
    path = data / file
    return json.loads(path.read_text()) if path.exists() else None


def filled(page, data=DATA):
    """The page with a new table in all blocks of which `data` has the numbers."""

    def block(match):
        file, make = BLOCKS[match[2]]
        found = read(file, data)
        text = make(found) if found else None
        return f"{match[1]}\n{text}\n{match[3]}" if text else match[0]

    pattern = r"(<!-- begin ([\w-]+) -->)\n.*?(<!-- end \2 -->)"
    return re.sub(pattern, block, page, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    old = PAGE.read_text()
    new = filled(old)
    if args.check:
        raise SystemExit(0 if old == new else "benchmarks.md: its tables are old")
    PAGE.write_text(new)
    found = read("lengths.json")
    if found:
        draw(found)


if __name__ == "__main__":
    main()
