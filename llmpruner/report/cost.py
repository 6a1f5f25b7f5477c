"""The section ``cost``: what the dense and the pruned model take, and how fast they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..amounts import bytes_text, count_text, counted
from .base import Costs, ReportSection, ReportSubject
from .templates import rendered


class CostSection(ReportSection):
    """Nothing without evidence."""

    name = "cost"
    summary = "parameters, bytes, operations and cache before and after, and measured speed beside the ideal"
    order = 14

    def render(self, subject: ReportSubject) -> str | None:
        evidence = subject.evidence
        if evidence is None or evidence.dense is None or evidence.costs is None:
            return None
        rows = _rows(evidence.dense, evidence.costs)
        benches = [(_title(bench), _speeds(bench)) for bench in evidence.benches]
        return rendered("cost.html.j2", rows=rows, benches=benches, name=evidence.name, context=evidence.costs.context)


def _rows(dense: Costs, own: Costs) -> list[tuple[str, str, str, str]]:
    pairs: list[tuple[str, float | None, float | None, Any]] = [
        ("Parameters", dense.parameters, own.parameters, count_text),
        ("Parameters of the decoder", dense.decoder_parameters, own.decoder_parameters, count_text),
        ("Bytes of the weights", dense.weight_bytes, own.weight_bytes, bytes_text),
        ("MACs per token", dense.macs_per_token, own.macs_per_token, count_text),
        ("KV cache per token, bytes", dense.cache_bytes, own.cache_bytes, "{:,}".format),
    ]
    return [
        # A state space model has no keys and values, of which nothing can be removed.
        (label, text(before), text(after), f"{1 - after / before:.1%}" if before else "–")
        for label, before, after, text in pairs
        if before is not None and after is not None
    ]


def _title(bench: Mapping[str, Any]) -> str:
    runs, tokens = counted(bench["rounds"], "run"), counted(bench["new_tokens"], "token")
    return f"{bench['runtime']}, medians of {runs} in turn, {tokens} decoded"


def _speeds(bench: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (stage, str(case["batch"]), f"{case['prompt_tokens']:,}", one["name"], *_cells(one[key]))
        for key, stage in (("prefill", "Prefill"), ("decode", "Decoding"))
        for case in bench["cases"]
        for one in case["models"]
    ]


def _cells(rate: Mapping[str, Any]) -> tuple[str, ...]:
    speed = rate["tokens_per_second"]
    median, lower, upper = (_number(speed[key]) for key in ("median", "lower_quartile", "upper_quartile"))
    ideal, share = rate["ideal"], rate["share_of_ideal"]
    return (
        median, f"{lower}–{upper}", f"{rate['speedup']['median']:.2f}", "–" if ideal is None else f"{ideal:.2f}",
        "–" if share is None else f"{share:.0%}",
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
