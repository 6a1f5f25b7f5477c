"""Conformance tests for recovery strategies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ..models.checkpoint import load_pruned
from ..models.surgery import cut
from ..pruning.saving import save
from ..recovery.base import RecoveryStrategy
from ..recovery.data import prepare
from ..recovery.job import train
from ..settings import RecoverSettings
from .components import check_component
from .models import first_change, scramble, tiny_llama

if TYPE_CHECKING:
    from ..models.model import Model
    from ..recovery.base import TrainingResult

_STEPS, _INTERRUPTED_AT = 6, 4


class RecoveryConformance:
    """Tests for a recovery strategy, on a tiny LLaMA whose layers were cut unevenly.

    ``strategy``: the class under test; it is created without settings, and may load the dense model. ``resumes``:
    whether an interrupted run continues where it stopped; if not, it must still end with the same result.
    """

    strategy: ClassVar[type[RecoveryStrategy]]
    resumes: ClassVar[bool] = True

    def settings(self) -> RecoverSettings:
        """Six steps that clearly change weights. Override it for other needs."""
        return RecoverSettings(
            max_steps=_STEPS, batch_size=4, micro_batch_size=2, learning_rate=1e-3, cutoff=32, validation=0
        )

    def loaded(self) -> Model:
        """The pruned model that is trained; the same at every call."""
        loaded = tiny_llama()
        kept = {"layers.0.mlp": range(30), "layers.1.mlp": range(3, 40), "layers.1.attention": [0, 2]}
        return replace(loaded, graph=cut(loaded.model, loaded.graph, kept, loaded.family))

    def test_it_is_a_component_that_an_entry_point_registers(self) -> None:
        """It has a name, a summary, and settings with defaults and descriptions."""
        check_component("recovery strategy", self.strategy)
        json.dumps(self.strategy().record())

    def test_it_trains(self, tmp_path: Path) -> None:
        """One step changes parameters, keeps all names and shapes, and is reported with its loss."""
        loaded = self.loaded()
        before = {name: p.detach().clone() for name, p in loaded.model.state_dict().items()}
        seen: list[tuple[int, int, float]] = []
        settings = self.settings().model_copy(update={"max_steps": 1})
        result = self._run(loaded, tmp_path, settings, lambda *step: seen.append(step))
        name = self.strategy.name
        after = result.model.state_dict()
        assert type(result.model) is type(loaded.model), (
            f"strategy '{name}' turns a {type(loaded.model).__name__} into a {type(result.model).__name__}"
        )
        shapes = [{n: tuple(p.shape) for n, p in state.items()} for state in (before, after)]
        odd = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        assert not odd, f"strategy '{name}' must keep names and shapes; it changes those of '{odd[0]}'"
        bad = sorted(n for n, p in after.items() if not bool(torch.isfinite(p).all()))
        assert not bad, f"strategy '{name}' leaves values that are not finite in parameter '{bad[0]}'"
        assert first_change(before, after), f"strategy '{name}': after one step every parameter is what it was"
        assert result.trainable_parameters > 0, f"strategy '{name}' reports no trained parameters"
        assert len(result.losses) == 1 and all(isfinite(loss) for loss in result.losses), (
            f"strategy '{name}' took one step and returns the losses {result.losses}; expected one finite number"
        )
        assert seen == [(1, 1, result.losses[0])], (
            f"strategy '{name}' must call job.on_step(1, 1, {result.losses[0]:g}) after its only step; it called {seen}"
        )

    def test_it_leaves_an_ordinary_checkpoint(self, tmp_path: Path) -> None:
        """The trained model is saved as any other, and gives equal logits when loaded again."""
        loaded = self.loaded()
        result = self._run(loaded, tmp_path / "work", self.settings().model_copy(update={"max_steps": 1}))
        save(replace(loaded, model=result.model), tmp_path / "saved")
        again = load_pruned(tmp_path / "saved")
        change = first_change(result.model.state_dict(), again.state_dict())
        assert not change, f"strategy '{self.strategy.name}': after saving and loading, {change}"
        ids = torch.arange(20, 40)[None]
        with torch.no_grad():
            expected, reloaded = (model(input_ids=ids).logits for model in (result.model, again))
        difference = float((reloaded - expected).abs().max())
        assert difference <= 1e-5, (
            f"strategy '{self.strategy.name}': the logits of the reloaded model differ by up to {difference:.1e}"
        )

    def test_the_same_seed_gives_the_same_model(self, tmp_path: Path) -> None:
        """Independent of the state of global random generators."""
        runs = []
        for number in range(2):
            scramble(number)
            runs.append(
                self._run(self.loaded(), tmp_path / str(number), self.settings().model_copy(update={"max_steps": 2}))
            )
        change = first_change(*(run.model.state_dict() for run in runs))
        assert not change, f"strategy '{self.strategy.name}' run twice with one seed: {change}"
        assert runs[0].losses == runs[1].losses, (
            f"strategy '{self.strategy.name}' run twice with one seed: losses {runs[0].losses} and {runs[1].losses}"
        )

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, tmp_path: Path) -> None:
        """The same job, started again in the same directory, gives the same model and all losses."""
        name = self.strategy.name
        whole = self._run(self.loaded(), tmp_path / "whole", self.settings())
        assert len(whole.losses) == _STEPS, f"strategy '{name}' returns {len(whole.losses)} losses of {_STEPS} steps"
        interrupted = False
        try:
            self._run(self.loaded(), tmp_path / "parts", self.settings(), _interrupt)
        except KeyboardInterrupt:
            interrupted = True
        assert interrupted, f"strategy '{name}' goes on when job.on_step raises KeyboardInterrupt at step 4"
        steps: list[int] = []
        resumed = self._run(self.loaded(), tmp_path / "parts", self.settings(), lambda step, *_: steps.append(step))
        change = first_change(whole.model.state_dict(), resumed.model.state_dict(), atol=1e-6)
        assert not change, f"strategy '{name}', interrupted and run again: {change}"
        far = [n for n, (a, b) in enumerate(zip(whole.losses, resumed.losses, strict=False), 1) if abs(a - b) > 1e-5]
        assert len(resumed.losses) == _STEPS and not far, (
            f"strategy '{name}', interrupted and run again, returns the losses {resumed.losses}, not {whole.losses}"
        )
        assert not self.resumes or steps[0] > 1, (
            f"strategy '{name}' starts again at step 1 after an interruption; keep its state in job.work_dir, "
            "or set resumes = False"
        )

    def _run(
        self,
        loaded: Model,
        work_dir: Path,
        settings: RecoverSettings,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> TrainingResult:
        words = ("a b c", "d e f g", "h i j", "k l", "m n o p q", "r s t")
        answers = [f"{words[(n + 1) % 6]} {words[(n + 2) % 6]}" for n in range(12)]
        rows = [{"instruction": words[n % 6], "output": answer} for n, answer in enumerate(answers)]
        file = work_dir.with_suffix(".jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = settings.model_copy(update={"data": str(file)})
        data = prepare(settings, loaded.family, loaded.tokenizer)
        return train(
            loaded.model, loaded.tokenizer, loaded.graph, data, self.strategy(), settings, work_dir,
            load_teacher=lambda: tiny_llama().model, on_step=on_step,
        )  # fmt: skip


def _interrupt(step: int, *_: object) -> None:
    if step == _INTERRUPTED_AT:
        raise KeyboardInterrupt
