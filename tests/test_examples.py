"""The examples reach in their short form what they state."""

import os
import pathlib
import re
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parent.parent

# model, update, accuracy, cosine with BPTT before training.
# Ten epochs give 0.89 to 0.91, cosines of 0.988 and more (three seeds).
DIGITS = [
    ("gru", "sequence", 0.85, 0.97),
    ("lif", "sequence", 0.85, 0.97),
    ("lif", "step", 0.85, 0.97),
]


def _run(script, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _numbers(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(group) for group in found.groups()]


@pytest.mark.slow
@pytest.mark.parametrize("model, update, accuracy, cosine", DIGITS)
def test_digits(tmp_path, model, update, accuracy, cosine):
    figure = tmp_path / "digits.png"
    text = _run(
        "digits.py",
        "--quick",
        *("--model", model, "--update", update, "--figure", str(figure)),
    )

    (reached,) = _numbers(r"test accuracy: (\S+)", text)
    assert reached > accuracy
    before, _ = _numbers(r"(\S+) before training, (\S+) after", text)
    assert before > cosine

    online, bptt = _numbers(r"\b64 steps +(\S+) MiB +(\S+) MiB", text)
    longer_online, longer_bptt = _numbers(r"640 steps +(\S+) MiB +(\S+) MiB", text)
    assert longer_online < 1.1 * online
    assert longer_bptt > 5 * bptt
    assert online < bptt

    assert figure.read_bytes().startswith(b"\x89PNG")
