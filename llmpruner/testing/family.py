"""Conformance tests for model families, which load checkpoints in other processes, with and without llmpruner."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedConfig

from ..calibration.written import self_generated
from ..discovery.groups import build_graph, discover_graph
from ..discovery.oracle import VERIFIED, random_plan
from ..discovery.tiny import random_instance
from ..discovery.verify import check_kinds
from ..engine.walk import CalibrationSet
from ..errors import UnsupportedModelError, near
from ..models.family import ModelFamily
from ..models.meta import base_of
from ..models.model import Model
from ..models.modeling_llmpruner import packages_of_models
from ..models.reference import Reference
from ..plugins.installed import load_catalog
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.criteria.estimate import estimate
from ..pruning.saving import save
from ..recovery.base import RecoveryJob
from ..recovery.strategies import LoraStrategy
from ..settings import RecoverSettings
from ..structure.coupling import ATTENTION, MLP, CoupledGroup, CouplingGraph, Span
from .components import label, settings_grid
from .criterion import scorable
from .models import cut_by, letters, make_plan, small_job

_PROBE = """
import json, sys, torch
from transformers import AutoModelForCausalLM

loader, ids, *directories = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("llmpruner"):
            raise ModuleNotFoundError(name)

if loader == "transformers":
    sys.meta_path.insert(0, Block())
    def load(directory):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
else:
    from llmpruner import load_pruned as load
for directory in directories:
    model = load(directory)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    print(json.dumps({"logits": logits.tolist(), "cached": cached.tolist(), "plain": plain.tolist()}), flush=True)
"""

_GRAPHS: dict[tuple[type[ModelFamily], str], CouplingGraph] = {}
"""Family and configuration → the coupling graph; discovery takes seconds."""


class FamilyConformance:
    """Tests for ``family``, on the small model of `config`."""

    family: ClassVar[type[ModelFamily]]

    def config(self) -> PreTrainedConfig:
        """A small configuration: two to four layers, with different widths as far as the architecture allows."""
        raise NotImplementedError

    def loaded(self) -> Model:
        """The small model; random, but the same at every call."""
        config, family = self.config(), self.family()
        key = self.family, config.to_json_string(use_diff=False)
        if key not in _GRAPHS:
            _GRAPHS[key] = build_graph(family, config)
        network = random_instance(config, 0)
        return Model(Reference("tiny"), config, family, _GRAPHS[key], network=network, tokenizer=None)

    def test_the_family_recognises_its_configuration(self) -> None:
        # A text would match every model type that is a part of it.
        types: object = self.family.model_types
        assert not isinstance(types, str), f"family '{self.family.name}': model_types is a text; expected a tuple"
        extends, known = self.family.extends, load_catalog()[ModelFamily]
        unknown = f"extends '{extends}', which is no known family{near(str(extends), known)}"
        assert extends is None or extends in known, f"family '{self.family.name}' {unknown}"
        assert self.family().matches(self.config())

    def test_every_cut_equals_silencing(self) -> None:
        """For each kind, also after saving and loading. Checks that are not possible give a warning."""
        loaded = self.loaded()
        verdicts = check_kinds(loaded.family, loaded.config, loaded.graph)
        assert verdicts, "the family has no coupled groups"
        for skipped in dict.fromkeys(line for v in verdicts for line in v.skipped):
            kinds = ", ".join(v.kind for v in verdicts if skipped in v.skipped)
            warnings.warn(f"{kinds}: not checked: {skipped}", stacklevel=1)
        wrong = [f"{v.kind}: {v.verdict}, {v.reason} {v.where}" for v in verdicts if v.verdict != VERIFIED]
        assert not wrong, "\n".join(wrong)

    def test_declared_groups_agree_with_discovery(self) -> None:
        """Groups of the same name have the same indices, roles and offsets."""
        family, config = self.family(), self.config()
        declared = family.coupled_groups(config)
        if declared is None:
            return
        try:
            discovered = discover_graph(config).groups
        except UnsupportedModelError as error:
            pytest.skip(f"discovery has nothing to compare with: {error}")
        mismatches = differences(declared, discovered)
        assert not mismatches, "\n".join(mismatches)

    def test_checkpoints_may_name_its_model_class(self) -> None:
        """A class outside transformers must be in a package that an entry point names."""
        base = base_of(random_instance(self.config(), 0))
        package = base.__module__.partition(".")[0]
        assert package in packages_of_models(), (
            f"a pruned checkpoint needs {base.__name__} of the package '{package}', which no other process may import: "
            "no entry point names it; write into pyproject.toml of the plugin\n\n"
            f'[project.entry-points."llmpruner.models"]\n{package} = "{package}"\n\nand install the plugin again'
        )

    def test_every_criterion_scores_every_kind(self) -> None:
        loaded = self.loaded()
        calibration = CalibrationSet(self_generated(loaded.network, None, 2, 8, 0), "self")
        for cls in load_catalog()[ImportanceCriterion].values():
            for criterion in settings_grid(cls):
                groups = scorable(loaded.graph, criterion)
                if not groups:
                    continue
                scores = estimate(loaded.network, loaded.graph, groups, criterion, calibration)
                for group in groups:
                    values = scores[group.name]
                    where = f"{label(criterion)} on {group.name}"
                    assert values.shape == (group.units,) and bool(torch.isfinite(values).all()), where
                    assert group.units == 1 or len(set(values.tolist())) > 1, f"{where}: all units score alike"

    def test_a_pruned_model_loads_in_fresh_processes(self, tmp_path: Path) -> None:
        """With and without llmpruner, it gives the same logits, and generates the same with and without a cache."""
        self.test_checkpoints_may_name_its_model_class()
        expected, directories = [], [tmp_path / "even", tmp_path / "uneven"]
        for directory in directories:
            pruned = self._pruned(uneven=directory.name == "uneven")
            save(pruned, directory)
            vocabulary = int(pruned.network.config.get_text_config().vocab_size)
            ids = torch.randint(vocabulary // 2, vocabulary, (2, 7), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected.append(pruned.network.eval()(input_ids=ids).logits)
        for loader in ("llmpruner", "transformers"):
            results = run_probe(directories, loader, ids.tolist())
            for directory, logits, result in zip(directories, expected, results, strict=True):
                where = f"the {directory.name} model, loaded by {loader}"
                difference = float((torch.tensor(result["logits"]) - logits).abs().max())
                assert difference <= 1e-5 * (1 + float(logits.abs().max())), f"{where}: logits differ by {difference}"
                assert result["cached"] == result["plain"], f"{where}: cached generation differs"

    def _pruned(self, *, uneven: bool) -> Model:
        """The model without a quarter of the decoder's parameters, or (``uneven``) with random units of every group."""
        loaded = self.loaded()
        groups = [g for g in loaded.graph.groups if g.layer is not None and g.units > g.minimum]
        kinds = tuple(dict.fromkeys(group.kind for group in groups))
        kinds = tuple(kind for kind in kinds if kind in (MLP, ATTENTION)) or kinds
        plan = make_plan(loaded, small_job(amount=0.25, kinds=kinds))
        if uneven:
            kept = random_plan(groups, seed=3, uneven=True)
            cuts = {n: plan.cuts[n].model_copy(update={"kept": tuple(kept[n])}) for n in plan.cuts if n in kept}
            plan = plan.model_copy(update={"cuts": cuts})
        return cut_by(loaded, plan)

    def test_recovery_takes_a_step(self, tmp_path: Path) -> None:
        """LoRA adapters on the coupled groups of the pruned model are trained and merged."""
        pruned = self._pruned(uneven=False)
        row = {"input_ids": [40, 41, 42, 43], "labels": [40, 41, 42, 43]}
        step = RecoverSettings(data="", max_steps=1, batch_size=2, micro_batch_size=2, learning_rate=0.1)
        before = {name: p.detach().clone() for name, p in pruned.network.named_parameters()}
        job = RecoveryJob(
            pruned.network, letters(), [row] * 4, [row], pruned.graph, step, tmp_path, lambda: self.loaded().network
        )  # fmt: skip
        result = LoraStrategy(dropout=0.0).train(job)
        changed = [n for n, p in result.model.named_parameters() if n in before and not torch.equal(p, before[n])]
        assert len(result.losses) == 1 and changed, "one step of LoRA changed nothing"


def differences(declared: Iterable[CoupledGroup], discovered: Iterable[CoupledGroup]) -> list[str]:
    """A line for each axis of a parameter on which a declared group differs from the discovered one of the same
    name."""
    by_name = {group.name: group for group in discovered}
    lines = []
    for group in declared:
        if not group.spans or group.name not in by_name:
            continue
        ours, theirs = _facts(group), _facts(by_name[group.name])
        for what in dict.fromkeys((*ours, *theirs)):
            (text, value), (expected_text, expected) = (facts.get(what, ("nothing", None)) for facts in (ours, theirs))
            if value != expected:
                lines.append(f"group {group.name}: {what}{text}; discovery finds {expected_text}")
    return lines


def _facts(group: CoupledGroup) -> dict[str, tuple[str, object]]:
    """The size, and parameter and axis → as text, and as a value: `Blocks` and `Explicit` may own the same indices."""
    size = f"{group.units} units in {group.blocks} blocks"
    facts: dict[str, tuple[str, object]] = {"": (size, size)}
    slots: dict[tuple[str, int], list[Span]] = {}
    for span in group.cut_spans:
        slots.setdefault((span.parameter, span.axis), []).append(span)
    for (parameter, axis), spans in slots.items():
        texts = [f"{s.index} ({s.role.value}{f', offset {s.offset:g}' if s.offset else ''})" for s in spans]
        owned = [{index for span in spans for index in span.index.of(unit)} for unit in range(group.units)]
        facts[f"{parameter} axis {axis}: "] = " and ".join(texts), ({(s.role, s.offset) for s in spans}, owned)
    return facts


def run_probe(directories: Sequence[Path], loader: str, ids: list[list[int]]) -> list[dict[str, Any]]:
    """Load checkpoints in a new process, by ``llmpruner`` or ``transformers`` alone. Returns of each the ``logits`` of
    ``ids``, and the tokens generated with (``cached``) and without a cache (``plain``)."""
    done = run_python(_PROBE, loader, json.dumps(ids), *directories)
    if done.returncode:
        raise AssertionError(f"loading by {loader} failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"logits"')]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
