"""``llmpruner discover``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.tree import Tree

from ..errors import CouplingError, PlanError
from ..files import write_text
from ..loading.options import LoadOptions
from ..plugins.builtin import llmpruner_report_sections
from ..report.base import ReportSubject
from ..report.groups import KIND_COLUMNS, kind_rows
from ..report.page import report_page
from ..structure.coupling import CoupledGroup, CouplingGraph, Span
from .console import count, note, out, print_json, table, warning_line
from .options import Family, Json, Model, RemoteCode, Revision, Seed, catalog_of, new_file

if TYPE_CHECKING:
    from ..loading.model import LoadedConfig
    from ..oracle.verify import Verdict


def add_commands(app: typer.Typer) -> None:
    app.command()(discover)


def discover(
    ctx: typer.Context,
    model: Model,
    family: Family = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Prove it: on a small random model of this architecture, cutting must equal silencing, for each kind.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Draw one block, with its coupled axes, into this page.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show the coupled groups of a model: what must be removed together. Reads no weights."""
    options = LoadOptions(family=family, revision=revision, trust_remote_code=trust_remote_code)
    from ..loading.model import load_config

    loaded = load_config(model, catalog_of(ctx), options)
    if html is not None:
        _draw(html, f"{model} ({loaded.family.name})", loaded)
    verdicts = _verify(loaded, seed) if verify else []
    if as_json:
        proof = {"verdicts": [asdict(verdict) for verdict in verdicts]} if verify else {}
        print_json({"model": model, "family": loaded.family.name, **_graph_json(loaded.graph), **proof})
        _exit_unless_proved(verdicts)
        return
    graph = loaded.graph
    out.print(
        f"[bold]{model}[/]: family {loaded.family.name}, {graph.num_layers} layers, "
        f"{count(graph.total_parameters)} parameters, {count(graph.decoder_parameters)} of them in the decoder"
    )
    table("Coupled groups", KIND_COLUMNS, kind_rows(graph))
    for kind in graph.kinds:
        out.print(_tree(graph, graph.of_kinds([kind])[0]))
    if verify:
        rows = [(v.kind, v.verdict, v.groups, v.units, f"{v.difference:.0e}", len(v.checks)) for v in verdicts]
        table("On a small random model", ("Kind", "Verdict", "Groups", "Units", "Difference", "Checks"), rows, left=2)
        for verdict in verdicts:
            if verdict.reason:
                out.print(f"{verdict.kind}: {verdict.reason} {verdict.where}", highlight=False, markup=False)
    _exit_unless_proved(verdicts)


def _verify(loaded: LoadedConfig, seed: int) -> list[Verdict]:
    from ..models.quiet import quiet_transformers
    from ..oracle.verify import verify

    if loaded.plans:
        raise PlanError(f"'{loaded.ref}' is pruned already; verify the model that it was pruned from")
    note("cutting and silencing a small random model")
    with quiet_transformers():
        return verify(loaded.family, loaded.config, seed=seed)


def _exit_unless_proved(verdicts: list[Verdict]) -> None:
    if any(verdict.verdict == "failed" for verdict in verdicts):
        raise CouplingError("a cut disagrees with silencing, so this structure is wrong; see the table")


def _draw(path: Path, title: str, loaded: LoadedConfig) -> None:
    subject = ReportSubject(title, loaded.graph, loaded.record or {})
    page = report_page(subject, [section() for section in llmpruner_report_sections()])
    for warning in page.warnings:
        warning_line(warning)
    write_text(new_file(path), page.html)
    note(f"drawn in {path}")


def _tree(graph: CouplingGraph, group: CoupledGroup) -> Tree:
    """One group as a tree: its spans by role, then those of buffers, or its modules."""
    constraint = f", the same number in each of {group.blocks} blocks" if group.blocks > 1 else ""
    tree = Tree(f"[bold]{group.name}[/]: {group.units} units{constraint}")
    for what, spans, shapes in (("", group.spans, graph.shapes), (" (buffers)", group.buffers, graph.buffers)):
        for role in dict.fromkeys(span.role for span in spans):
            _branch(tree, role.value + what, [span for span in spans if span.role == role], shapes)
    if group.modules:
        tree.add(f"{group.modules[0]} … {group.modules[-1]}")
    return tree


def _branch(tree: Tree, title: str, spans: Sequence[Span], shapes: Mapping[str, tuple[int, ...]]) -> None:
    branch = tree.add(f"[cyan]{title}[/]")
    for span in spans[:8]:
        branch.add(f"{span.parameter} {list(shapes[span.parameter])} axis {span.axis}: {span.index}", highlight=False)
    if len(spans) > 8:
        branch.add(f"… and {len(spans) - 8} more")


def _graph_json(graph: CouplingGraph) -> dict[str, Any]:
    return {
        "layers": graph.num_layers,
        "parameters": graph.total_parameters,
        "decoder_parameters": graph.decoder_parameters,
        "groups": [
            {
                "name": g.name,
                "kind": g.kind,
                "layer": g.layer,
                "units": g.units,
                "parameters_per_unit": graph.parameters_per_unit(g),
                "blocks": g.blocks,
                "minimum": g.minimum,
                "spans": [_span_json("parameter", s) for s in g.spans],
                "buffers": [_span_json("buffer", s) for s in g.buffers],
                "modules": list(g.modules),
            }
            for g in graph.groups
        ],
        "blocked": [{"parameter": b.parameter, "axis": b.axis, "reason": b.reason} for b in graph.blocked],
    }


def _span_json(what: str, span: Span) -> dict[str, Any]:
    return {what: span.parameter, "axis": span.axis, "role": span.role.value, "index": str(span.index)}
