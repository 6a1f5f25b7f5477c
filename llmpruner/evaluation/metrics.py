"""The metrics ``size`` and ``perplexity``. Imports no torch, unlike `perplexity`, which measures the latter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.documents import PYDOC, read_text
from ..component import ComponentSettings
from ..errors import ModelError
from .base import ComparedModel, Metric, MetricSubject, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph

_LOG = logging.getLogger("llmpruner")
_COMPARED = 100_000
"""Characters from the start of a text by which tokenizers are compared."""


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters (tied ones once), those in the decoder layers, bytes of the weights in memory, and multiply-accumulate
    operations to decode one token with ``context`` tokens in the cache."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int


def size(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> Size:
    """The `Size` of ``model``, which may be on the meta device. ``graph``: the coupling graph of this model (after a
    cut, of the cut one)."""
    from ..models.meta import macs_per_token
    from ..models.numbers import stored_bytes

    return Size(
        parameters=graph.total_parameters,
        decoder_parameters=graph.decoder_parameters,
        weight_bytes=sum(map(stored_bytes, model.parameters())),
        macs_per_token=macs_per_token(model, graph, context=context),
        context=context,
    )


class SizeMetric(Metric):
    """Computed from shapes alone."""

    name = "size"
    summary = "parameters, bytes of the weights, and multiply-accumulate operations per decoded token"

    class Settings(ComponentSettings):
        context: int = Field(512, ge=0, description="Tokens in the cache when operations are counted.")

    settings: Settings

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        return asdict(size(subject.model, subject.graph, context=self.settings.context))

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("parameters", result["parameters"], False),
            Row("decoder parameters", result["decoder_parameters"], False),
            Row("weight bytes", result["weight_bytes"], False),
            Row("MACs per token", result["macs_per_token"], False),
        ]


class PerplexityMetric(Metric):
    """Perplexity on one or several texts, with ``kl`` also the divergence from the first model; see
    `llmpruner.evaluation.perplexity.perplexity`."""

    name = "perplexity"
    summary = "perplexity and bits per byte on texts; with kl also the KL divergence from the first model"

    class Settings(ComponentSettings):
        text: str = Field(
            PYDOC,
            description=f"A .txt, .json, .jsonl or .parquet file, a data set, or '{PYDOC}', the text of Python's "
            "help(); several, with commas between them, are measured one by one.",
        )
        window: int = Field(512, ge=2, description="Tokens per window; windows do not overlap.")
        tokens: int | None = Field(
            None, ge=2, description="Number of tokens to use, from the start of each text; all by default."
        )
        kl: bool = Field(
            False,
            description="Also the KL divergence from the first model, and the share of tokens with the same most "
            "probable prediction (both models are in memory).",
        )
        batch_size: int = Field(4, ge=1, description="Windows per batch.")
        autocast: bool = Field(False, description="Compute in bfloat16 under autocast where that is faster (rounds).")

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl

    def prepare(self) -> None:
        given = self.settings.text
        names = [given] if isfile(given) else [name.strip() for name in given.split(",")]
        self._texts = {name: read_text(name) for name in names}

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        from ..models.positions import check_table, warn_beyond
        from ..models.tokenizer import tokens_of

        window = self.settings.window
        what, hint = f"windows of {window:,} tokens", "lower --window"
        for model in models:
            check_table(model.config, window, what, hint, f"'{model.name}'")
            warn_beyond(model.config, window, what, hint, f"'{model.name}'")
        starts = [text[:_COMPARED] for text in self._texts.values()]
        for text in starts if self.settings.kl else ():
            check_same_tokens(models, text)
        if len({len(tokens_of(model.tokenizer, starts[0])) for model in models}) > 1:
            _LOG.warning("the tokenizers differ, and perplexity is per token: compare bits per byte")

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """The `PerplexityResult` on the first text, with its name in ``text``, and in ``others`` those on further
        texts by their names."""
        from .perplexity import perplexity

        reference = subject.reference if self.settings.kl else None
        measured = [
            perplexity(subject.model, subject.tokenizer, text, self.settings, reference, subject.progress)
            for text in self._texts.values()
        ]
        (first, result), *others = zip(self._texts, map(asdict, measured), strict=True)
        return {**result, "text": first, "others": dict(others)}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        results = {result["text"]: result, **result["others"]}
        files = [Path(name).name for name in results]
        rows = []
        for (name, values), file in zip(results.items(), files, strict=True):
            where = f", {file if files.count(file) == 1 else name}" if len(results) > 1 else ""
            rows += [
                Row(f"perplexity{where}", values["perplexity"], False),
                Row(f"bits per byte{where}", values["bits_per_byte"], False),
                Row(f"KL to the first{where}", values["kl_per_token"], False),
                Row(f"top-1 as the first{where}", values["top1_agreement"], True),
            ]
        return rows


def check_same_tokens(models: Sequence[ComparedModel], text: str) -> None:
    """Raise `ModelError` where vocabularies differ in size, or the first tokenizer gives other tokens for another's ids
    of ``text``, unless the other is a part of the first. The ids may differ: a fast and a slow tokenizer of one
    vocabulary do not split every text alike."""
    from ..models.tokenizer import tokens_of
    from ..models.trimmed import old_ids

    first, *others = models
    for other in others:
        sizes = [getattr(model.config.get_text_config(), "vocab_size", 0) for model in (first, other)]
        ids = sorted(set(tokens_of(other.tokenizer, text)))
        tokens = other.tokenizer.convert_ids_to_tokens(ids)
        same = sizes[0] == sizes[1] and first.tokenizer.convert_ids_to_tokens(ids) == tokens
        if not same and (sizes[0] < sizes[1] or old_ids(first.tokenizer, other.tokenizer) is None):
            raise ModelError(
                f"the vocabularies of '{first.name}' and '{other.name}' differ; KL divergence needs one vocabulary: "
                "compare models with the same tokenizer, name the dense model before a trimmed one, or leave kl out"
            )
