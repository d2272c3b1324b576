"""The report: a table that a person reads, made from the decisions of the compiler."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ._decision import Decision, Kind
from ._errors import size
from ._rules import Composite, GlobalRule, LocalRule, name_of
from ._space import credited, trace_bytes


if TYPE_CHECKING:
    from ._graph import ETraceGraph


class Report(str):
    """Text that shows itself at a prompt as it prints."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return ["  " + line for line in lines]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"


def _weights(graph: "ETraceGraph") -> list[str]:
    header = ("weight", "shape", "op rule", "group", "rule", "trace", "credit")
    rows = []
    leaves = zip(graph.param_leaves.paths, graph.param_leaves.specs, strict=True)
    whole = credited(graph) if isinstance(graph.rule, GlobalRule) else ()
    for path, spec in leaves:
        if isinstance(graph.rule, GlobalRule) and path in whole:
            row = ("-", "-", "-", "in one", graph.rule.credit)
            rows.append((path, _shape(spec.shape), *row))
            continue
        rows += [(path, _shape(spec.shape), *row) for row in _credits(graph, path)]
    if not isinstance(graph.rule, Composite) or len(graph.rule.rules) == 1:
        header, *rows = ((*row[:4], *row[5:]) for row in (header, *rows))
    return table(header, rows)


def _credits(graph: "ETraceGraph", path: str) -> list[tuple[str, ...]]:
    """The rows of one weight: its uses with a trace, then those without."""
    bytes_: dict[tuple[str, str, str, str], int] = {}
    for relation in graph.relations:
        if path in relation.weight:
            leaves = graph.groups[relation.group].leaves
            named = zip(relation.slots, relation.forms, strict=True)
            slots = ", ".join(leaves[slot] + form for slot, form in named)
            assert isinstance(graph.rule, LocalRule)
            rule = name_of(graph.rule.of(relation))
            key = (relation.op.name, str(relation.group), rule, f"trace on {slots}")
            count = (graph.batch or 1) * graph.rule.trace_bytes(relation)
            bytes_[key] = bytes_.get(key, 0) + count
    rows = [(*key[:3], size(count), key[3]) for key, count in bytes_.items()]
    for decision in graph.decisions:
        kinds = (Kind.CURRENT_STEP, Kind.UNUSED)
        if decision.kind in kinds and path in decision.weight:
            text = f"{decision.kind.value}: {decision.reason}"
            rows.append(("none", "-", "-", "0 B", text))
    return list(dict.fromkeys(rows))


def _groups(graph: "ETraceGraph") -> list[str]:
    rows = [
        (str(number), f"{g.units} x {g.slots}", ", ".join(dict.fromkeys(g.leaves)))
        for number, g in enumerate(graph.groups)
    ]
    return table(("group", "units x slots", "state leaves"), rows)


def _list(title: str, decisions: Sequence[Decision]) -> list[str]:
    if not decisions:
        return []
    return ["", title, *(f"  - {d.about}: {d.because}" for d in decisions)]


def report(graph: "ETraceGraph") -> Report:
    """The text of `graph.report()`."""
    total = trace_bytes(graph)
    batch = "unbatched" if graph.batch is None else f"batch {graph.batch}"
    of_kind = {kind: [d for d in graph.decisions if d.kind is kind] for kind in Kind}
    lines = [
        f"{name_of(graph.rule)}, {graph.vjp}, {batch}, "
        f"trace {size((graph.batch or 1) * total)}",
        "",
        "Weights",
        *_weights(graph),
        "",
        "Hidden groups",
        *_groups(graph),
        *_list("State leaves carried along, not hidden", of_kind[Kind.NOT_HIDDEN]),
        *_list(f"Why {graph.vjp}", of_kind[Kind.MULTI_STEP]),
        *_list("Credit between units that is cut", of_kind[Kind.CUT]),
        *_list("Credit across hidden groups", of_kind[Kind.ACROSS_GROUPS]),
        *_list("Read in another form", of_kind[Kind.REWRITTEN]),
        *_list("Rules chosen to fit a budget", of_kind[Kind.CHOSEN]),
        *_list("With the dense Jacobian of the step", of_kind[Kind.DENSE]),
        *_list("Without a closed form", of_kind[Kind.BY_AD]),
        *_list("Warnings", of_kind[Kind.WARNING]),
    ]
    return Report("\n".join(lines))


def _check_path(what: str, path: str | None, paths: Sequence[str]) -> None:
    if path is not None and path not in paths:
        raise ValueError(
            f"{what}: got {path!r}, expected one of the key paths "
            f"{', '.join(paths)}. Copy it from `graph.report()`."
        )


def _names(path: str, paths: Sequence[str]) -> bool:
    """Whether a leaf is among these, or its real or imaginary part is."""
    return any(other in (path, f"{path}.real", f"{path}.imag") for other in paths)


def explain(graph: "ETraceGraph", weight: str | None, state: str | None) -> Report:
    """The text of `graph.explain(...)`."""
    if weight is None and state is None:
        raise ValueError(
            "explain: got neither a weight nor a state, expected one of them. Use "
            "`graph.report()` for everything."
        )
    _check_path("weight", weight, graph.param_leaves.paths)
    leaves = graph.state_leaves
    _check_path("state", state, (*leaves.paths, *leaves.parts.paths))
    chosen = [
        decision
        for decision in graph.decisions
        if (weight is None or weight in decision.weight)
        and (state is None or _names(state, decision.state))
    ]
    about = " and ".join(path for path in (weight, state) if path is not None)
    lines = [f"  - {d}" for d in chosen] or ["  - nothing was decided about this pair"]
    return Report("\n".join([about, *lines]))
