"""What plugin authors test with: conformance classes for pytest.

Subclass, say what is tested, and run pytest::

    from llmpruner.testing import FamilyConformance

    class TestMyFamily(FamilyConformance):
        family = MyFamily

        def config(self):
            return MyConfig(num_hidden_layers=2, hidden_size=64, ...)

Every failure names the parameter, module or kind that disagrees.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .discovery.verify import VERIFIED, random_plan, verify
from .families import ModelFamily, build_graph
from .importance.estimate import estimate
from .loading import LoadedModel
from .pipeline import PruneSettings, apply_plan, make_plan, save
from .plan import Target
from .plugins import Catalog, plugin_manager

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PROBE = """
import json, sys, torch
if sys.argv[2] == "stranger":
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0].startswith("llmpruner"):
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Block())
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
else:
    import llmpruner
    model = llmpruner.load_pruned(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
mask = torch.ones_like(ids)
options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
cached = model.generate(ids, use_cache=True, **options)
plain = model.generate(ids, use_cache=False, **options)
print(json.dumps({"logits": logits.tolist(), "cached": cached.tolist(), "plain": plain.tolist()}))
"""


class FamilyConformance:
    """Everything a family must get right, on the small model of `config`.

    ``family``: the class under test. ``loads_elsewhere``: whether a pruned model must load with transformers alone
    where llmpruner is not installed (it must, unless transformers itself lacks the model class).
    """

    family: ClassVar[type[ModelFamily]]
    loads_elsewhere: ClassVar[bool] = True

    def config(self) -> PreTrainedConfig:
        """A small configuration: two to four layers, and no two widths alike where the architecture allows."""
        raise NotImplementedError

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A random instance. Weights must be large enough for mistakes to show in the logits."""
        from .discovery.tiny import random_instance

        return random_instance(config, 0)

    def loaded(self) -> LoadedModel:
        config = self.config()
        family = self.family()
        return LoadedModel(
            "tiny", config, family, build_graph(family, config), model=self.build(config), tokenizer=None
        )

    def test_the_family_recognises_its_configuration(self) -> None:
        assert self.family().matches(self.config())

    def test_every_cut_equals_silencing(self) -> None:
        """Each kind, cut evenly and unevenly, eager and sdpa, with cached generation, saved and loaded again."""
        verdicts = verify(self.family(), self.config(), shrink=False)
        assert verdicts, "the family has no coupled groups"
        wrong = [f"{v.kind}: {v.verdict}, {v.reason} {v.where}" for v in verdicts if v.verdict != VERIFIED]
        assert not wrong, "\n".join(wrong)

    def test_declared_groups_agree_with_discovery(self) -> None:
        """Where discovery finds a group of the same name, it finds the same indices."""
        from .discovery import discover_groups

        def owned(group: Any) -> set[tuple[str, int, int, int]]:
            every = (
                (s.parameter, s.axis, u, i) for s in group.spans for u in range(group.units) for i in s.index.of(u)
            )
            return set(every)

        config = self.config()
        discovered = {group.name: group for group in discover_groups(config)}
        for group in self.family().coupled_groups(config):
            found = discovered.get(group.name)
            if found is not None and group.spans:
                assert owned(group) == owned(found), f"group {group.name} differs from what discovery finds"

    def test_every_criterion_scores_every_kind(self) -> None:
        from .calibration import calibration_set

        loaded = self.loaded()
        calibration = calibration_set("self", loaded.model, None, samples=2, length=8, seed=0)
        for cls in Catalog(plugin_manager()).criteria.values():
            for variant in cls.variants or (None,):
                scores = estimate(loaded.model, loaded.graph, loaded.graph.groups, cls(variant), calibration)
                for group in loaded.graph.groups:
                    values = scores.by_group[group.name]
                    where = f"{cls.name} {variant or ''} on {group.name}"
                    assert values.shape == (group.units,) and bool(torch.isfinite(values).all()), where
                    assert group.units == 1 or len(set(values.tolist())) > 1, f"{where}: all units score alike"

    def test_a_pruned_model_loads_in_fresh_processes(self, tmp_path: Path) -> None:
        """With llmpruner, and where it is not installed: the same logits, and cached generation as without cache."""
        for number, uneven in enumerate((False, True)):
            loaded = self.loaded()
            groups = [g for g in loaded.graph.groups if g.layer is not None and g.units > g.minimum]
            target = Target(by="ratio", amount=0.25)
            made = make_plan(loaded, _magnitude(), PruneSettings(target=target, kinds=_kinds(loaded, groups)))
            if uneven:
                kept = random_plan(groups, seed=3, uneven=True)
                cuts = {n: made.cuts[n].model_copy(update={"kept": tuple(kept[n])}) for n in made.cuts if n in kept}
                made = made.model_copy(update={"cuts": cuts})
            pruned = apply_plan(loaded, made)
            directory = tmp_path / f"pruned-{number}"
            save(pruned, directory)
            vocabulary = int(pruned.model.config.get_text_config().vocab_size)
            ids = torch.randint(vocabulary // 2, vocabulary, (2, 7), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = pruned.model.eval()(input_ids=ids).logits
            for who in ("llmpruner", "stranger") if self.loads_elsewhere else ("llmpruner",):
                found = run_probe(directory, who, ids.tolist())
                torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
                assert found["cached"] == found["plain"], f"cached generation differs ({who})"

    def test_recovery_takes_a_step(self, tmp_path: Path) -> None:
        """LoRA finds its targets in the coupled groups of the pruned model, trains them, and merges."""
        from .recovery.base import RecoveryJob, RecoverySettings
        from .recovery.lora import LoraStrategy
        from .recovery.run import merge_adapters

        loaded = self.loaded()
        settings = PruneSettings(target=Target(by="ratio", amount=0.2), kinds=_kinds(loaded, loaded.graph.groups))
        pruned = apply_plan(loaded, make_plan(loaded, _magnitude(), settings))
        row = {"input_ids": [40, 41, 42, 43], "labels": [40, 41, 42, 43]}
        step = replace(
            RecoverySettings(), max_steps=1, batch_size=2, micro_batch_size=2, learning_rate=0.1, dropout=0.0
        )
        tokenizer = _Padding()
        before = {name: p.detach().clone() for name, p in pruned.model.named_parameters()}
        result = LoraStrategy().train(RecoveryJob(pruned.model, tokenizer, [row] * 4, pruned.graph, step, tmp_path))
        merged = merge_adapters(result.model)
        changed = [n for n, p in merged.named_parameters() if n in before and not torch.equal(p, before[n])]
        assert len(result.losses) == 1 and changed, "one step of LoRA changed nothing"

    def test_lm_eval_gets_an_answer(self) -> None:
        """lm-evaluation-harness sees the pruned model as an ordinary one: one request, one log-likelihood."""
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        loaded = self.loaded()
        settings = PruneSettings(target=Target(by="ratio", amount=0.2), kinds=_kinds(loaded, loaded.graph.groups))
        pruned = apply_plan(loaded, make_plan(loaded, _magnitude(), settings))
        harness = HFLM(pretrained=pruned.model, tokenizer=letters(), batch_size=1, backend="causal")
        request = Instance(request_type="loglikelihood", doc={}, arguments=("a b c", " d e"), idx=0)
        ((likelihood, _),) = harness.loglikelihood([request], disable_tqdm=True)
        assert -200 < likelihood < 0


def letters() -> Any:
    """A tokenizer of single letters, whose ids any vocabulary of 60 tokens has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{chr(97 + n): 20 + n for n in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


class _Padding:
    """As much of a tokenizer as a trainer needs."""

    pad_token_id = 0
    eos_token_id = 1
    padding_side = "right"


def _magnitude() -> Any:
    return Catalog(plugin_manager(entry_points=False)).criteria["l1"]()


def _kinds(loaded: LoadedModel, groups: Sequence[Any]) -> tuple[str, ...]:
    return tuple(
        kind for kind in ("mlp", "attention") if kind in loaded.graph.kinds and any(g.kind == kind for g in groups)
    )


def run_probe(directory: Path, who: str, ids: list[list[int]]) -> dict[str, Any]:
    """Load a checkpoint in a fresh process, as ``llmpruner`` or as a ``stranger`` without it; returns its logits and
    what it generates with and without cache. Raises `AssertionError` with the process's last words."""
    command = [sys.executable, "-c", _PROBE, str(directory), who, json.dumps(ids)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise AssertionError(f"loading as {who} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
