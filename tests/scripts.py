"""Runs the scripts of `examples` and reads the numbers that they print."""

import os
import pathlib
import re
import subprocess
import sys


ROOT = pathlib.Path(__file__).parent.parent


def run(script, *arguments):
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


def numbers(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(group) for group in found.groups()]
