"""Conformance tests for recovery strategies."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ..discovery.cut import cut
from ..models.model import Model
from ..models.opening import load_pruned
from ..pruning.saving import save
from ..recovery.base import RecoveryStrategy, TrainingResult, nothing
from ..recovery.data import RecoverySetup, prepare, read_data
from ..recovery.recover import train
from ..settings import RecoverSettings
from .components import check_component
from .models import first_change, scramble, tiny_llama

_STEPS, _INTERRUPTED_AT = 6, 4


class RecoveryConformance:
    """Tests for ``strategy``, with its defaults, on a tiny LLaMA whose layers were cut unevenly."""

    strategy: ClassVar[type[RecoveryStrategy]]

    def loaded(self) -> Model:
        """The pruned model that is trained; the same at every call."""
        loaded = tiny_llama()
        kept = {"layers.0.mlp": range(30), "layers.1.mlp": range(3, 40), "layers.1.attention": [0, 2]}
        return replace(loaded, graph=cut(loaded.network, loaded.graph, kept, loaded.family))

    def test_it_is_a_component_that_an_entry_point_registers(self) -> None:
        """It has a name, a summary, and settings with defaults and descriptions."""
        check_component("recovery strategy", self.strategy)

    def test_it_trains(self, tmp_path: Path) -> None:
        """One step changes parameters, keeps all names and shapes, and is reported with its loss."""
        name, loaded = self.strategy.name, self.loaded()
        before = {key: p.detach().clone() for key, p in loaded.network.state_dict().items()}
        seen: list[tuple[int, int, float]] = []
        result = self._run(loaded, tmp_path, 1, lambda *step: seen.append(step))
        after = result.model.state_dict()
        cls, trained = type(loaded.network), type(result.model)
        assert trained is cls, f"strategy '{name}' turns a {cls.__name__} into a {trained.__name__}"
        old, new = ({key: tuple(p.shape) for key, p in state.items()} for state in (before, after))
        changed = sorted(key for key, _ in old.items() ^ new.items())
        assert not changed, f"strategy '{name}' must keep names and shapes; it changes those of '{changed[0]}'"
        infinite = sorted(key for key, p in after.items() if not bool(torch.isfinite(p).all()))
        assert not infinite, f"strategy '{name}' leaves values that are not finite in parameter '{infinite[0]}'"
        assert first_change(before, after), f"strategy '{name}': one step changes no parameter"
        assert result.trainable_parameters > 0, f"strategy '{name}' reports no trained parameters"
        losses = f"took one step and returns the losses {result.losses}; expected one finite number"
        assert len(result.losses) == 1 and isfinite(result.losses[0]), f"strategy '{name}' {losses}"
        call = f"must call job.on_step(1, 1, {result.losses[0]:g}) after its only step; it called {seen}"
        assert seen == [(1, 1, result.losses[0])], f"strategy '{name}' {call}"

    def test_it_leaves_an_ordinary_checkpoint(self, tmp_path: Path) -> None:
        """The trained model is saved as any other, and gives equal logits when loaded again."""
        loaded = self.loaded()
        result = self._run(loaded, tmp_path / "work", 1)
        save(replace(loaded, network=result.model), tmp_path / "saved")
        again = load_pruned(tmp_path / "saved")
        change = first_change(result.model.state_dict(), again.state_dict())
        assert not change, f"strategy '{self.strategy.name}': after saving and loading, {change}"
        ids = torch.arange(20, 40)[None]
        with torch.no_grad():
            expected, reloaded = (model(input_ids=ids).logits for model in (result.model, again))
        difference = float((reloaded - expected).abs().max())
        assert difference <= 1e-5, f"strategy '{self.strategy.name}': reloaded logits differ by {difference:.1e}"

    def test_the_same_seed_gives_the_same_model(self, tmp_path: Path) -> None:
        """Independent of the state of global random generators."""
        runs = []
        for number in range(2):
            scramble(number)
            runs.append(self._run(self.loaded(), tmp_path / str(number), 2))
        self._check_same("run twice with one seed", *runs, atol=0)

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, tmp_path: Path) -> None:
        """The same job, started again in the same directory, gives the same model and all losses."""
        name = self.strategy.name
        whole = self._run(self.loaded(), tmp_path / "whole")
        assert len(whole.losses) == _STEPS, f"strategy '{name}' returns {len(whole.losses)} losses of {_STEPS} steps"
        with suppress(KeyboardInterrupt):
            self._run(self.loaded(), tmp_path / "parts", on_step=_interrupt)
            raise AssertionError(f"strategy '{name}' goes on when job.on_step raises KeyboardInterrupt at step 4")
        steps: list[int] = []
        resumed = self._run(self.loaded(), tmp_path / "parts", on_step=lambda step, *_: steps.append(step))
        self._check_same("interrupted and run again", whole, resumed, atol=1e-6)
        again = "starts again at step 1 after an interruption; keep its state in job.work_dir"
        assert steps[0] > 1, f"strategy '{name}' {again}"

    def _check_same(self, how: str, expected: TrainingResult, actual: TrainingResult, *, atol: float) -> None:
        change = first_change(expected.model.state_dict(), actual.model.state_dict(), atol)
        assert not change, f"strategy '{self.strategy.name}' {how}: {change}"
        losses = f"strategy '{self.strategy.name}' {how} returns the losses {actual.losses}, not {expected.losses}"
        assert actual.losses == pytest.approx(expected.losses, rel=0, abs=10 * atol), losses

    def _run(
        self, loaded: Model, work_dir: Path, steps: int = _STEPS, on_step: Callable[[int, int, float], object] = nothing
    ) -> TrainingResult:
        words = ("a b c", "d e f g", "h i j", "k l", "m n o p q", "r s t") * 3
        rows = [{"instruction": words[n], "output": f"{words[n + 1]} {words[n + 2]}"} for n in range(12)]
        file = work_dir.with_suffix(".jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # Clearly changes weights.
        settings = RecoverSettings(
            data=str(file), max_steps=steps, batch_size=4, micro_batch_size=2, learning_rate=1e-3, cutoff=32,
            validation=0,
        )  # fmt: skip
        data = prepare(settings, read_data(settings.data), loaded.family, loaded.tokenizer)
        job = RecoverySetup(settings, self.strategy())
        return train(loaded, job, data, work_dir, lambda: tiny_llama().network, on_step=on_step)[0]


def _interrupt(step: int, *_: object) -> None:
    if step == _INTERRUPTED_AT:
        raise KeyboardInterrupt
