"""Runs scripts and code in other processes, and reads the numbers that they print."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap


ROOT = pathlib.Path(__file__).parent.parent


def run(script, *arguments, timeout: int | None = 300):
    """What a script of `examples` prints."""
    return _python(str(ROOT / "examples" / script), *arguments, timeout=timeout)


def run_code(code, **environment):
    """What this code prints in a process of its own."""
    return _python("-c", textwrap.dedent(code), **environment)


def _python(*arguments, timeout: int | None = 300, **environment):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(group) for group in found.groups()]
