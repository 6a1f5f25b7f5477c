"""What a cut did: sizes, tokens and predictions before and after it, as records keep them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..values import html_table


@dataclass(frozen=True)
class BudgetOutcome:
    """The cost of a model under one budget, in units of ``label``, before and after the cut."""

    name: str
    label: str
    before: float
    after: float

    @property
    def removed(self) -> float:
        return 1 - self.after / self.before


@dataclass(frozen=True)
class ScriptTokens:
    """How many tokens of one ``script`` there are and go. ``sample``: some that go, the most used ones first."""

    script: str
    tokens: int
    gone: int
    sample: tuple[str, ...]


@dataclass(frozen=True)
class TextTokens:
    """A text: how many tokens it has, and how many of these go; its bytes per token before and after."""

    tokens: int
    gone: int
    bytes_per_token_before: float
    bytes_per_token_after: float


@dataclass(frozen=True)
class TokenOutcome:
    """The tokens of the vocabulary before and after a cut. ``texts``: ``counted``, the calibration text on which tokens
    were counted, and ``held_out``, the rest of it; empty where no text is read, as for a plan that is replayed."""

    before: int
    after: int
    scripts: tuple[ScriptTokens, ...]
    texts: Mapping[str, TextTokens]

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns, and rows: how many tokens go of each script, of all, and of those in the text."""
        rows = [(s.script, " ".join(map(repr, s.sample)) or "none goes", s.gone, s.tokens) for s in self.scripts]
        rows.append(("all", f"{self.after:,} stay", self.before - self.after, self.before))
        for name, t in self.texts.items():
            about = f"{t.bytes_per_token_before:.2f} bytes per token before, {t.bytes_per_token_after:.2f} after"
            rows.append((f"{name.replace('_', '-')} text", about, t.gone, t.tokens))
        return ("Tokens of", "Such as", "Go", "Of", "Share"), [
            (name, about, f"{gone:,}", f"{of:,}", f"{gone / of:.2%}") for name, about, gone, of in rows
        ]


@dataclass(frozen=True)
class Quality:
    """Predictions before and right after a cut, on ``tokens`` of text of the calibration's sources with which nothing
    was scored or fitted: mean KL(before ‖ after) in nats, and the share with the same most probable token."""

    kl_per_token: float
    top1_agreement: float
    tokens: int

    def __str__(self) -> str:
        kept = f"{self.top1_agreement:.0%} of its top predictions kept"
        where = f"({self.tokens:,} tokens that nothing was fitted to)"
        return f"KL {self.kl_per_token:.3f} from the uncut model, {kept} {where}"


@dataclass(frozen=True)
class Outcome:
    """Sizes before and after a cut: all parameters (tied ones once), those of the decoder's layers, and bytes of the
    weights as they are saved (before: as in the files where that is less, unless the budget is bytes). ``budget``: if
    it counts something else. ``forecast``: what the run was expected to take. ``tokens``: None where all stay.
    ``quality``: None where it was not measured."""

    parameters_before: int
    parameters_after: int
    decoder_before: int
    decoder_after: int
    bytes_before: int
    bytes_after: int
    budget: BudgetOutcome | None = None
    forecast: Mapping[str, Any] | None = None
    tokens: TokenOutcome | None = None
    quality: Quality | None = None

    @property
    def decoder_removed(self) -> float:
        """The share of the decoder's parameters that is removed."""
        return 1 - self.decoder_after / self.decoder_before

    def as_json(self) -> dict[str, Any]:
        """JSON values, including the removed shares."""
        values: dict[str, Any] = {**asdict(self), "decoder_removed": self.decoder_removed}
        if self.budget is not None:
            values["budget"]["removed"] = self.budget.removed
        return {name: value for name, value in values.items() if value is not None and name != "forecast"}

    def _repr_html_(self) -> str:
        rows = [
            ("decoder parameters", self.decoder_before, self.decoder_after),
            ("all parameters", self.parameters_before, self.parameters_after),
            ("bytes of weights", self.bytes_before, self.bytes_after),
            *([(self.budget.label, self.budget.before, self.budget.after)] if self.budget else []),
        ]
        cells = [(name, f"{before:,}", f"{after:,}", f"{1 - after / before:.2%}") for name, before, after in rows]
        return html_table(cells, ("", "before", "after", "removed"))
