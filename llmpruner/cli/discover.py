"""``llmpruner discover``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from ..errors import CouplingError
from ..settings import LoadSettings
from ..structure.coupling import HIDDEN, LAYER, VOCABULARY, CoupledGroup, CouplingGraph, Span
from ..values import count_text, counted
from .console import note, out, print_json, table
from .derive import Json, ModelName, takes


@takes(LoadSettings, omit=("dtype", "device"))
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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of --verify.")] = 0,
    as_json: Json = False,
) -> None:
    """Show the coupled groups of a model: parameters that must be removed together. Reads no weights."""
    from .. import api

    progress, catalog = arguments["progress"], arguments["catalog"]
    structure = api.discover(model, progress=progress, catalog=catalog, **arguments["load"].given())
    verdicts = api.verify(structure, seed=seed, progress=progress) if verify else []
    if as_json:
        proof = {"verdicts": [asdict(verdict) for verdict in verdicts]} if verify else {}
        print_json({"model": model, "family": structure.family.name, **_graph_json(structure.graph), **proof})
    else:
        graph = structure.graph
        total, decoder = count_text(graph.total_parameters), count_text(graph.decoder_parameters)
        what = f"family {structure.family.name}, {counted(graph.num_layers, 'layer')}"
        out.print(f"[bold]{escape(model)}[/]: {what}, {total} parameters, {decoder} of them in the decoder")
        columns = ("Kind", "Groups", "Units", "Parameters per unit", "Share of decoder")
        table("Coupled groups", columns, [_kind_row(graph, kind) for kind in graph.kinds])
        for kind in graph.kinds:
            out.print(_tree(graph, graph.of_kinds([kind])[0]))
        if verdicts:
            rows = [(v.kind, v.verdict, v.groups, v.units, f"{v.difference:.0e}", len(v.checks)) for v in verdicts]
            facts = ("Kind", "Verdict", "Groups", "Units", "Difference", "Checks")
            table("On a small random model", facts, rows, left=2)
        notes: dict[str, list[str]] = {}  # many are those of all kinds
        for verdict in verdicts:
            lines = [f"{verdict.reason} {verdict.where}"] if verdict.reason else []
            for line in (*lines, *(f"not checked: {what}" for what in verdict.skipped)):
                notes.setdefault(line, []).append(verdict.kind)
        for line, kinds in notes.items():
            out.print(f"{', '.join(kinds)}: {line}", highlight=False, markup=False)
    if any(verdict.verdict == "failed" for verdict in verdicts):
        raise CouplingError("a cut disagrees with silencing, so this structure is wrong; see the table")
    if not as_json:
        note(f"next: llmpruner prune {model} --ratio 0.2 -o DIR")


def _kind_row(graph: CouplingGraph, kind: str) -> tuple[str, ...]:
    """Number of groups, their units, parameters per unit, and the share of the decoder that the kind owns."""
    groups = graph.of_kinds([kind])
    units, costs = [g.units for g in groups], [graph.parameters_per_unit(g) for g in groups]
    ranges = (f"{min(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}" for n in (units, costs))
    owned = sum(number * cost for number, cost in zip(units, costs, strict=True))
    # Hidden channels also own parameters outside of the decoder, and square matrices twice, by rows and columns.
    share = {HIDDEN: "all", VOCABULARY: "none"}.get(kind, f"{owned / graph.decoder_parameters:.1%}")
    return (kind, str(len(groups)), *ranges, share)


def _tree(graph: CouplingGraph, group: CoupledGroup) -> Tree:
    """One group as a tree: its spans by role, then those of buffers, or the layers."""
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
    if group.kind == LAYER:
        tree.add(f"{graph.layers}.0 … {graph.layers}.{group.units - 1}")
    return tree


def _graph_json(graph: CouplingGraph) -> dict[str, Any]:
    return {
        "layers": graph.num_layers,
        "parameters": graph.total_parameters,
        "decoder_parameters": graph.decoder_parameters,
        "groups": [
            {
                **{key: getattr(g, key) for key in ("name", "kind", "layer", "units")},
                "parameters_per_unit": graph.parameters_per_unit(g),
                "blocks": g.blocks,
                "minimum": g.minimum,
                "spans": [_span_json("parameter", s) for s in g.spans],
                "buffers": [_span_json("buffer", s) for s in g.buffers],
                "modules": [f"{graph.layers}.{n}" for n in range(g.units)] if g.kind == LAYER else [],
            }
            for g in graph.groups
        ],
        "blocked": list(map(asdict, graph.blocked)),
    }


def _span_json(what: str, span: Span) -> dict[str, Any]:
    return {what: span.parameter, "axis": span.axis, "role": span.role.value, "index": str(span.index)}
