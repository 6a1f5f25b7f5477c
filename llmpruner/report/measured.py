"""The sections of what was measured: ``quality``, ``cost`` (sizes and speed), and ``answers`` side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..values import bytes_text, count_text, counted, without_folders
from .base import ReportSection, ReportSubject, rendered

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluations

SPEED_COLUMNS = ("Batch", "Prompt", "Model", "Tokens/s (quartiles)", "Speed-up", "Ideal", "Reached")


class QualitySection(ReportSection):
    """A table for each call of ``evaluate``."""

    name = "quality"
    summary = "perplexity, divergence and tasks of dense and pruned models"
    order = 11

    def render(self, subject: ReportSubject) -> str | None:
        tables = [(measured, _texts(measured)) for measured in subject.measured]
        # Texts of an earlier plan count: the weights that it fitted are in the model.
        parts = [part for plan in subject.plans for part in (plan.estimation, plan.compensation)]
        read = dict.fromkeys(without_folders(part.calibration) for part in parts if part and part.calibration)
        return rendered(
            "quality.html.j2", tables=tables, calibration=", ".join(read), name=subject.name, cut=subject.cut_quality
        )


def _texts(measured: Evaluations) -> str:
    """What the perplexity was measured on."""
    perplexities = [each.results["perplexity"] for each in measured if "perplexity" in each.results]
    if not perplexities:
        return ""
    first = perplexities[0]
    texts = {first["text"]: first, **first["others"]}
    each = "; ".join(f"{counted(one['tokens'], 'token')} of {without_folders(text)}" for text, one in texts.items())
    window, predicted = counted(first["window"], "token"), counted(first["window"] - 1, "prediction")
    rates = {round(tokens_per_byte(result), 6) for result in perplexities}
    differ = " It is per token, and the tokens differ between models: compare bits per byte." if len(rates) > 1 else ""
    return f"Perplexity: {each}; windows of {window} with {predicted} each.{differ}"


def tokens_per_byte(result: Mapping[str, Any]) -> float:
    """Of the text of a perplexity, but for a constant factor."""
    return float(result["bits_per_byte"] / result["nll_per_token"])


class CostSection(ReportSection):
    """Sizes by shapes, and a table for each call of ``bench``."""

    name = "cost"
    summary = "parameters, bytes, operations and cache before and after, and measured speed next to the ideal"
    order = 14

    def render(self, subject: ReportSubject) -> str | None:
        dense, own = subject.dense, subject.costs
        pairs: list[tuple[str, float | None, float | None, Any]] = [
            ("Parameters", dense.parameters, own.parameters, count_text),
            ("Parameters of the decoder", dense.decoder_parameters, own.decoder_parameters, count_text),
            ("Bytes of the weights", dense.weight_bytes, own.weight_bytes, bytes_text),
            ("MACs per token", dense.macs_per_token, own.macs_per_token, count_text),
            ("KV cache per token, bytes", dense.cache_bytes, own.cache_bytes, "{:,}".format),
        ]
        rows = [
            # A state space model has no keys and values, of which nothing can be removed.
            (label, text(before), text(after), f"{1 - after / before:.1%}" if before else "–")
            for label, before, after, text in pairs
            if before is not None and after is not None
        ]
        benches = [
            (bench, [("Prefill", speed_rows(bench, "prefill")), ("Decoding", speed_rows(bench, "decode"))])
            for bench in subject.benches
        ]
        return rendered(
            "cost.html.j2", rows=rows, benches=benches, columns=SPEED_COLUMNS, name=subject.name, context=own.context
        )


def speed_rows(bench: Mapping[str, Any], stage: str) -> list[tuple[str, ...]]:
    """Cells of `SPEED_COLUMNS` for every case and model of what ``bench --json`` writes; ``stage``: ``prefill`` or
    ``decode``."""
    rows: list[tuple[str, ...]] = []
    for case in bench["cases"]:
        for model in case["models"]:
            rate = model[stage]
            speed, ideal, share = rate["tokens_per_second"], rate["ideal"], rate["share_of_ideal"]
            median, lower, upper = (
                f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                for value in (speed["median"], speed["lower_quartile"], speed["upper_quartile"])
            )
            rows.append(
                (
                    str(case["batch"]), str(case["prompt_tokens"]), model["name"], f"{median} ({lower}–{upper})",
                    f"{rate['speedup']['median']:.2f}", "–" if ideal is None else f"{ideal:.2f}",
                    "–" if share is None else f"{share:.0%}",
                )
            )  # fmt: skip
    return rows


class AnswersSection(ReportSection):
    """Nothing where no texts were generated."""

    name = "answers"
    summary = "the same prompts answered side by side"
    order = 12

    def render(self, subject: ReportSubject) -> str | None:
        return rendered("answers.html.j2", asked=subject.answers) if subject.answers else None
