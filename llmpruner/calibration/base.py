"""What a calibration source is, and what it is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.family import ModelFamily


@dataclass(frozen=True)
class SampleTask:
    """The request to a source: ``samples`` sequences of ``length`` tokens each, without padding.

    ``model``: with its weights, in evaluation mode; in bfloat16 for a source that writes, if that is faster.
    ``reference``: a file or data set; for other sources than text, what follows ``NAME:``. ``tokenizer``: None where
    the model has none. ``family``: with the model's chat format.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    reference: str
    samples: int
    length: int
    seed: int
    family: ModelFamily
    progress: Progress = QUIET


class CalibrationSource(Component):
    """Provides calibration samples; selected by ``--calibration NAME`` or ``NAME:reference``."""

    kind: ClassVar[str] = "calibration source"
    hook: ClassVar[str] = "llmpruner_calibration_sources"
    writes: ClassVar[bool] = False
    """Whether the model generates the text. This is slower than reading, and the tokens depend on the machine's
    arithmetic, so that they may differ when a plan is replayed."""

    def check(self, reference: str) -> None:
        """Raise `DataError` for errors that can be found before a model is loaded. Checks nothing by default."""

    def sample(self, task: SampleTask) -> torch.Tensor:
        """Token ids, int64 of shape (samples, length); the same task gives the same. Raises `DataError` for a text that
        is missing, malformed or too short, and `ModelError` for a model without a tokenizer where one is needed."""
        raise NotImplementedError
