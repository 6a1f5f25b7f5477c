"""The dense model of a recovery: it writes examples, predicts what a distillation learns, or teaches beside it."""

from __future__ import annotations

import gc
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..calibration.conversations import Example, read_examples
from ..discovery.opening import Opener, placed_as
from ..errors import no_tokenizer
from ..files import write_text
from ..models.devices import device_of, free_memory, processes_on
from ..models.model import Model, Structure
from ..models.numbers import dtype_of, loaded_bytes
from ..models.opening import load_model, open_streamed, why_not_streamed
from .data import DenseText, write_examples

JOB_FILE = "job.json"
"""Identifies the recovery of which a folder has the state."""
_LOGITS = 1 << 30  # bytes beside the weights that a pass over the rows takes


class DenseModel:
    """Of ``opened``. ``structure``: None where nothing reads it, or it was not looked for. ``folder``: of the work."""

    def __init__(self, opened: Structure, structure: Structure | None, opener: Opener, folder: Path) -> None:
        self.opened, self.structure, self.opener, self.folder = opened, structure, opener, folder
        self._loaded: Model | None = None

    @property
    def identity(self) -> list[str]:
        base = self.opened.plans[0].base
        return [base.model, base.structure, str(dtype_of(self.opened, self.opener.load))]

    def loaded(self) -> Model:
        """In memory, until `free`."""
        if self._loaded is None:
            structure = self.structure or self.opener.dense_structure(self.opened)
            self._loaded = load_model(structure, placed_as(self.opened, self.opener.load))
        return self._loaded

    def free(self) -> None:
        self._loaded = None
        gc.collect()

    def teacher(self) -> Any:
        """Its network in the tokens of the pruned model."""
        return self.loaded().teacher_of(self.opened, self.opener.tokenizer(self.opened))

    def to_read(self) -> tuple[Model, Any]:
        """In memory if it is there or fits, else streamed; and its network as by `teacher`."""
        assert self.structure is not None
        structure, load = self.structure, placed_as(self.opened, self.opener.load)
        device = device_of(load.device)
        # With a copy of the weights in bfloat16, which autocast keeps of those in float32.
        needed = processes_on(device) * (loaded_bytes(structure, load) * 3 // 2 + _LOGITS)
        if self._loaded is not None or needed <= free_memory(device) or why_not_streamed(structure):
            model = self.loaded()
        else:
            self.opener.progress.status(f"{structure.ref} is read layer by layer")
            model = open_streamed(structure, load, self.folder)
        with model.weights.outside():
            return model, model.teacher_of(self.opened, self.opener.tokenizer(self.opened))

    def written(self, text: DenseText, seed: int) -> list[tuple[str, Example]]:
        """The examples that it writes, kept for an interrupted run."""
        identity = json.dumps([asdict(text), seed, *self.identity])
        file = self.folder / f"self-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
        if not file.is_file():
            model = self.loaded()
            if model.tokenizer is None:
                raise no_tokenizer(f"the dense model '{model.ref}'", "it cannot write examples")
            examples = write_examples(text, model, seed, self.opener.progress)
            self.mark()
            write_text(file, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in examples))
        return read_examples(str(file))

    def mark(self) -> None:
        """The folder as that of a recovery, until the training identifies itself: a run that was killed goes on."""
        if not (self.folder / JOB_FILE).is_file():
            write_text(self.folder / JOB_FILE, "{}\n")
