"""``llmpruner discover``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from ..errors import CouplingError
from ..files import check_page
from ..report.structure import KIND_COLUMNS, kind_rows
from ..settings import LoadSettings, PageSettings
from ..structure.coupling import CoupledGroup, CouplingGraph, Span
from ..values import counted
from .console import count, note, out, print_json, table, warning_line
from .derive import Json, ModelName, takes

if TYPE_CHECKING:
    from ..discovery.oracle import Verdict
    from ..models.model import Structure


@takes(LoadSettings, PageSettings, omit=("dtype", "device"))
def discover(
    model: ModelName,
    arguments: dict[str, Any],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Verify that a cut equals silencing, for each kind, on a small random model of this architecture.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a drawing of one block to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of --verify.")] = 0,
    as_json: Json = False,
) -> None:
    """Show the coupled groups of a model: parameters that must be removed together. Reads no weights."""
    from .. import api

    if html is not None:
        check_page(html)
    progress, catalog = arguments["progress"], arguments["catalog"]
    structure = api.discover(model, progress=progress, catalog=catalog, **arguments["load"].given())
    if html is not None:
        for warning in api.write_page(structure, html, catalog=catalog, settings=arguments.get("settings")):
            warning_line(warning)
        note(f"written to {html}")
    verdicts = api.verify(structure, seed=seed, progress=progress) if verify else []
    if as_json:
        proof = {"verdicts": [asdict(verdict) for verdict in verdicts]} if verify else {}
        print_json({"model": model, "family": structure.family.name, **_graph_json(structure.graph), **proof})
    else:
        _show(model, structure)
        if verdicts:
            _show_verdicts(verdicts)
    if any(verdict.verdict == "failed" for verdict in verdicts):
        raise CouplingError("a cut disagrees with silencing, so this structure is wrong; see the table")


def _show(model: str, structure: Structure) -> None:
    graph = structure.graph
    out.print(
        f"[bold]{escape(model)}[/]: family {structure.family.name}, {counted(graph.num_layers, 'layer')}, "
        f"{count(graph.total_parameters)} parameters, {count(graph.decoder_parameters)} of them in the decoder"
    )
    table("Coupled groups", KIND_COLUMNS, kind_rows(graph))
    for kind in graph.kinds:
        out.print(_tree(graph, graph.of_kinds([kind])[0]))


def _show_verdicts(verdicts: Sequence[Verdict]) -> None:
    rows = [(v.kind, v.verdict, v.groups, v.units, f"{v.difference:.0e}", len(v.checks)) for v in verdicts]
    table("On a small random model", ("Kind", "Verdict", "Groups", "Units", "Difference", "Checks"), rows, left=2)
    for verdict in verdicts:
        lines = [f"{verdict.reason} {verdict.where}"] if verdict.reason else []
        for line in (*lines, *verdict.differences, *(f"not checked: {what}" for what in verdict.skipped)):
            out.print(f"{verdict.kind}: {line}", highlight=False, markup=False)


def _tree(graph: CouplingGraph, group: CoupledGroup) -> Tree:
    """One group as a tree: its spans by role, then those of buffers, or its modules."""
    constraint = f", the same number in each of {group.blocks} blocks" if group.blocks > 1 else ""
    tree = Tree(f"[bold]{group.name}[/]: {group.units} units{constraint}")
    for what, spans, shapes in (("", group.spans, graph.shapes), (" (buffers)", group.buffers, graph.buffers)):
        for role in dict.fromkeys(span.role for span in spans):
            branch = tree.add(f"[cyan]{role.value}{what}[/]")
            of_role = [span for span in spans if span.role == role]
            for s in of_role[:8]:
                branch.add(f"{s.parameter} {list(shapes[s.parameter])} axis {s.axis}: {s.index}", highlight=False)
            if len(of_role) > 8:
                branch.add(f"… and {len(of_role) - 8} more")
    if group.modules:
        tree.add(f"{group.modules[0]} … {group.modules[-1]}")
    return tree


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
