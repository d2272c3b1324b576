"""The comparison of all rules: what it measures, and the pages made from it."""

import importlib.util
import inspect
import json
import subprocess
import sys

import pytest
from scripts import ROOT, run, run_code

import eqx_etrace as etrace


# Of the GRU of `--quick`: 6 inputs, 12 units, a batch of 4, in float32.
WEIGHTS = 36 * 6 + 36 * 12 + 36 + 12
BLOCK = "<!-- begin {0} -->\n{1}\n<!-- end {0} -->\n"
LIST = """
import sys, json
sys.path.insert(0, {path!r})
import which_rule
print(json.dumps([list(which_rule.RULES), which_rule.SAME]))
"""


def _public_rules():
    """Names of functions and classes that make a rule, but for the base class."""
    for name, thing in vars(etrace).items():
        module = getattr(thing, "__module__", "")
        if module.startswith("eqx_etrace._rules") and inspect.isroutine(thing):
            yield name
        elif inspect.isclass(thing) and module.startswith("eqx_etrace._rules"):
            if thing is not etrace.LocalRule:
                yield name


def test_every_rule_takes_part():
    path = str(ROOT / "examples" / "benchmarks")
    rules, same = json.loads(run_code(LIST.format(path=path)))
    public = set(_public_rules())
    assert {"DRTRL", "RTRL", "EProp", "ThreeFactor"} < public
    measured = {rule.split("(")[0].split(",")[0] for rule in rules}
    assert measured | set(same) == public
    assert set(same.values()) <= set(rules)


@pytest.mark.slow
def test_quick(tmp_path):
    file = tmp_path / "found.json"
    names = "RTRL()", "DRTRL()"
    options = "--quick", "--networks", "GRU", "--rules", *names, "--json", str(file)
    text = run("benchmarks/which_rule.py", *options)
    found = json.loads(file.read_text())["table"]["GRU"]
    rows = found["rules"]
    assert not found["why"]
    assert list(rows) == list(names)
    assert all(abs(cosine - 1) < 1e-5 for cosine in rows["RTRL()"]["cosine"])
    assert all(abs(ratio - 1) < 1e-5 for ratio in rows["RTRL()"]["norm_ratio"])
    assert all(0.9 < cosine < 0.9999 for cosine in rows["DRTRL()"]["cosine"])
    assert rows["DRTRL()"]["trace_mib"] * 2**20 == 4 * 4 * WEIGHTS
    assert rows["RTRL()"]["trace_mib"] * 2**20 == 12 * 4 * 4 * WEIGHTS
    assert all(row["to_bptt"] > 0 for row in rows.values())
    assert "| `RTRL()` | 1.00 |" in text


def _pages():
    path = ROOT / "docs" / "make_benchmarks.py"
    spec = importlib.util.spec_from_file_location("make_benchmarks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_data():
    command = [sys.executable, str(ROOT / "docs" / "make_benchmarks.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_follow_the_data(tmp_path):
    """A file with other numbers gives another table, and leaves the rest alone."""
    pages, loads = _pages(), ("rnn", "gru")
    row = {"us_per_step": 123.4, "to_bptt": 1.0, "temp_mib": 2.5, "trace_mib": 0.0}
    step = row | {"to_bptt": 0.77, "trace_mib": 30.2}
    tables = {load: {"BPTT": row, "etrace: step": step} for load in loads}
    facts = {"jax": "9.9", "backend": "cpu", "cores": 64, "python": "3.99"}
    (tmp_path / "windows.json").write_text(json.dumps(facts | {"table": tables}))
    page = (
        "a\n" + BLOCK.format("windows-time", "old") + BLOCK.format("truncated", "kept")
    )
    new = pages.filled(page, tmp_path)
    assert "old" not in new and "kept" in new
    assert new.startswith("a\n<!-- begin windows-time -->\nMeasured on cpu, 64 cores;")
    assert "| time, BPTT = 1 | RNN | GRU |" in new
    assert "| BPTT, us per step | 123 | 123 |" in new
    assert "| etrace: step | 0.77 | 0.77 |" in new
    assert pages.filled(new, tmp_path) == new
    assert "| etrace: step | 2 + 30 | 2 + 30 |" in pages.windows_memory(
        json.loads((tmp_path / "windows.json").read_text())
    )
