"""Strict JAX, and the annotations of the library checked while the tests run."""

import os
import pathlib


# Programs are small here: more threads to compile one take longer. Four devices are
# for `test_shardings`; all else is on the first.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_force_host_platform_device_count=4",
    ]
).strip()

import jax  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402


matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# All modules but the two whose small functions are called a thousand times a model.
SOURCES = pathlib.Path(__file__).parent.parent / "eqx_etrace"
CHECKED = [
    f"eqx_etrace.{path.stem}"
    for path in sorted(SOURCES.iterdir())
    if path.stem not in ("_jaxpr", "_flatten", "__init__")
]

with install_import_hook(CHECKED, "beartype.beartype"):
    import eqx_etrace.nn
    import eqx_etrace.plot
    import eqx_etrace.tasks  # noqa: F401 imported for the hook to take effect


# All that these have is run; of other tests with many cases every second or sixth one,
# and the rest with `-m long`.
WHOLE = {"test_docs", "test_docstrings", "test_fuzz", "test_notebooks"}
MANY = 6


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of one model go to one worker, which compiles it once for all of them."""
    families = {}
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        name = item.callspec.params.get("name")
        if isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(name))
        case = name if isinstance(name, str) else item.callspec.id
        family = families.setdefault((item.path, item.originalname), {})
        family.setdefault(case, []).append(item)
    for (path, _), family in families.items():
        if path.stem in WHOLE or len(family) < MANY:
            continue
        every = 2 if len(family) < 2 * MANY else 6
        for number, case in enumerate(sorted(family)):
            if number % every:
                for item in family[case]:
                    item.add_marker(pytest.mark.long)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz",
        type=int,
        default=0,
        metavar="N",
        help="test N random cells with new seeds, in place of the same few",
    )
