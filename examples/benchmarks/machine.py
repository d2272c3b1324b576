"""On what numbers were measured."""

import importlib.metadata
import os
import platform

import jax


def machine() -> dict[str, str | int]:
    """Versions and the device, for the files that `--json` writes."""
    found = {
        name: importlib.metadata.version(name)
        for name in ("jax", "equinox", "braintrace")
        if _installed(name)
    }
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f" ({device.device_kind})"
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return found | {"python": python, "backend": device.platform + kind, "cores": cores}


def _installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
