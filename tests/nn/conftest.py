"""Annotations of the optional part are checked, too, while the tests run."""

from jaxtyping import install_import_hook


with install_import_hook("eqx_etrace.nn", "beartype.beartype"):
    import eqx_etrace.nn  # noqa: F401 imported for the hook to take effect
