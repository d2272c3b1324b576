"""Two processes give what one gives, and stop together; on the loopback."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scripts import ROOT


ocp = pytest.importorskip("orbax.checkpoint")
SCRIPT = ROOT / "examples" / "processes.py"
SECONDS = 120


@pytest.fixture
def start(tmp_path):
    """Starts the example with some arguments; nothing that it starts stays behind."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    env.pop("XLA_FLAGS", None)
    started = []

    def one(*arguments):
        child = subprocess.Popen(
            [sys.executable, "-u", str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(child)
        return child

    yield one
    for child in started:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
        child.stdout.close()


def finish(child):
    text, _ = child.communicate(timeout=SECONDS)
    assert child.returncode == 0, text
    return text


def learnt(folder, step):
    """All arrays of a checkpoint, by their path, on whatever devices they were."""
    at = folder / str(step) / "default"
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(at).item_metadata.tree
    plain = ocp.RestoreArgs(restore_type=np.ndarray)
    found = reader.restore(at, restore_args=jax.tree.map(lambda _: plain, tree))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def saved(folder):
    """The steps of the checkpoints that are complete."""
    return [int(at.name) for at in folder.glob("*") if at.name.isdecimal()]


def losses(text):
    found = re.findall(r"^(\d+) loss (\S+)$", text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def alike(found, expected):
    assert found.keys() == expected.keys() and len(found) > 5
    for name, leaf in expected.items():
        scale = abs(leaf).max()
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-5 * scale)


def pair(start, *arguments):
    """Both of two processes, by hand."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        at = f"localhost:{free.getsockname()[1]}"
    return [
        start("--processes", 2, "--process", number, "--at", at, *arguments)
        for number in range(2)
    ]


def test_two_processes_equal_one_and_another_number_goes_on(start, tmp_path):
    common = "--report-every", 4, "--updates"
    alone = losses(finish(start(*common, 12, "--folder", "one", "--devices", 1)))
    text = finish(start(*common, 8, "--folder", "two", "--launch", 2))
    assert "2 processes, 4 devices" in text
    # Process 0 alone prints.
    assert len(re.findall(r"loss", text)) == 2
    together = losses(text)
    alike(learnt(tmp_path / "two", 8), learnt(tmp_path / "one", 8))
    text = finish(start(*common, 12, "--folder", "two", "--devices", 1))
    assert "goes on from update 8" in text
    alike(learnt(tmp_path / "two", 12), learnt(tmp_path / "one", 12))
    together |= losses(text)
    assert list(together) == list(alone) == [4, 8, 12]
    np.testing.assert_allclose([*together.values()], [*alone.values()], rtol=1e-5)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_when_one_dies_the_other_stops_and_they_go_on(victim, start, tmp_path):
    common = "--report-every", 2, "--folder", "runs"
    first = pair(start, "--updates", 100_000, *common)
    for line in first[0].stdout:
        if "loss" in line and saved(tmp_path / "runs"):
            break
    first[victim].kill()
    begin = time.monotonic()
    other = first[1 - victim]
    text, _ = other.communicate(timeout=60)
    assert other.returncode != 0, text
    print(f"stopped after {time.monotonic() - begin:.0f} s")

    last = max(saved(tmp_path / "runs"))
    rest = pair(start, "--updates", last + 4, *common)
    text = finish(rest[0])
    finish(rest[1])
    assert f"goes on from update {last}" in text
    assert list(losses(text)) == [last + 2, last + 4]
    assert last + 4 in saved(tmp_path / "runs")
