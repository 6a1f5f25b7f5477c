"""CalibrationSource: where the token sequences come from that importance and compensation are computed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SampleTask:
    """What a source must give: ``samples`` sequences of ``length`` tokens each, without padding.

    ``reference``: what the user named (a file, a data set; for ``NAME:rest`` of a plugin's source, the rest).
    ``tokenizer``: None where the model brings none.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    reference: str
    samples: int
    length: int
    seed: int


class CalibrationSource(Component):
    """Gives calibration samples. ``--calibration`` names one: ``NAME``, or ``NAME:reference``."""

    kind: ClassVar[str] = "calibration source"
    writes: ClassVar[bool] = False
    """Whether the model writes the text itself: slower than reading, and dependent on the machine's arithmetic, so that
    a replayed plan does not insist on the same tokens."""

    def check(self, reference: str) -> None:
        """Raise `DataError` for what can be refused before a model is loaded. Nothing by default."""

    def sample(self, task: SampleTask) -> torch.Tensor:
        """int64 of shape (samples, length). The same task gives the same tokens. Raises `DataError`."""
        raise NotImplementedError
