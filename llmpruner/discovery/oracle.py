"""The oracle: on a small random model, the logits of a cut must be those of the model with the units silenced."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import LlmprunerError, first_line
from ..models.messages import quiet_transformers, why_it_stops
from ..models.opening import load_pruned
from ..models.save import save_checkpoint
from ..models.surgery import cut_tensors, silence
from ..models.vocabulary import named_tokens
from ..structure.coupling import EXPERT, LAYER, VOCABULARY, CoupledGroup, CouplingGraph, Role
from ..structure.kept import Kept, removed_layers
from .follow import Rule, apply_rules, candidates, find, tables
from .tiny import random_instance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..models.family import ModelFamily

BATCH, TIME = 3, 13
NEW_TOKENS = 4  # that are generated with a cache
TOLERANCE = 2e-4
"""Largest difference of logits, relative to the largest logit; float32 rounding stays ten times below it."""
VISIBLE = 1e-3
"""Smallest change of the dense model's logits by silencing: after a smaller one, agreement proves nothing."""
VERIFIED, FAILED, REFUSED = "verified", "failed", "refused"


@dataclass
class Verdict:
    """What the oracle says of one kind of unit. ``verdict``: *verified*, *failed* (the outputs are wrong), *refused*
    (the cut model cannot run, or the checks prove nothing: see ``reason``). ``difference``: largest difference of
    logits relative to the largest logit, over ``checks``. ``where``: path of the first module whose output differs.
    ``follows``: rules for attributes that must change too. ``skipped``: checks that were not possible, and why."""

    kind: str
    groups: int
    units: int
    verdict: str = VERIFIED
    difference: float = 0.0
    where: str = ""
    reason: str = ""
    checks: list[str] = field(default_factory=list)
    follows: tuple[Rule, ...] = ()
    skipped: list[str] = field(default_factory=list)


class Oracle:
    """Compares cut with silenced copies of one random model."""

    def __init__(self, config: PreTrainedConfig, graph: CouplingGraph, family: ModelFamily, seed: int) -> None:
        self.config, self.graph, self.family, self.seed = config, graph, family, seed
        self.models, self.skipped = _instances(config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        vocabulary = config.get_text_config().vocab_size
        self.tokens = torch.randint(min(40, vocabulary // 2), vocabulary, (BATCH, TIME), generator=generator)
        self.dense = {name: logits(model, self.tokens) for name, model in self.models.items()}

    def judge(self, kind: str) -> Verdict:
        """Compare random cuts with silenced models: the logits, generation with a cache, and saving and loading."""
        every = self.graph.of_kinds([kind])
        groups = [group for group in every if _choices(group)]
        verdict = Verdict(kind, len(every), max(group.units for group in every), skipped=list(self.skipped))
        if len(groups) < len(every):
            verdict.skipped.append(f"{len(every) - len(groups)} of {len(every)} groups: no unit can be removed")
        try:
            self._check(kind, groups, verdict)
        except Exception as error:  # the cut model may raise anything
            if verdict.verdict != FAILED:
                verdict.verdict, verdict.difference = REFUSED, 0.0
            verdict.reason = why_it_stops(error)
        return verdict

    def _check(self, kind: str, groups: Sequence[CoupledGroup], verdict: Verdict) -> None:
        cases = {name: self._references(kept) for name, kept in self._plans(kind, groups).items()}
        silent = cases["uneven"][0]
        with silent.mode:
            no_cache = why_no_generation(silent.model, silent.tokens.before)
        must_find = self.family.refresh(copy.deepcopy(self.models["eager"])) is NotImplemented
        if must_find and kind != LAYER:
            verdict.follows = self._follows(groups, cases["uneven"], cached=not no_cache)
        eager: dict[str, PreTrainedModel] = {}
        for name, references in cases.items():
            for reference in references:
                dense = self.dense[reference.implementation]
                if name == "uneven" and distance(reference.logits, dense) < VISIBLE:
                    raise LlmprunerError("silencing the units does not change the logits, so the cut can't be verified")
                model = self._cut(reference, verdict.follows)
                eager.setdefault(name, model)  # of the first implementation
                difference = distance(logits(model, reference.tokens.after), reference.logits)
                if not difference <= TOLERANCE:
                    verdict.where = first_difference(model, reference)
                _require(verdict, difference, f"the cut model disagrees ({reference.implementation})")
                verdict.difference = max(verdict.difference, difference)
                verdict.checks.append(f"{name} {reference.implementation}")
        if no_cache:
            verdict.skipped.append(f"cached generation: the model {no_cache}")
        else:
            difference = cached_difference(eager["uneven"], silent.tokens.after)
            _require(verdict, difference, "generation with a cache differs from generation without")
            verdict.checks.append("cached generation")
        for name, model in eager.items():
            tokens = cases[name][0].tokens.after
            expected = logits(model, tokens)
            with tempfile.TemporaryDirectory() as parent:
                save_checkpoint(model, Path(parent) / "pruned", record={})
                loaded = load_pruned(Path(parent) / "pruned", attn_implementation="eager")
                difference = distance(logits(loaded, tokens), expected)
            _require(verdict, difference, f"the saved and reloaded model differs ({name})")
        verdict.checks.append("save and load")

    def _plans(self, kind: str, groups: Sequence[CoupledGroup]) -> dict[str, dict[str, list[int]]]:
        """Random units to keep, and those that must stay: another share in each group, or the same."""
        uneven, even = (random_plan(groups, self.seed + n, uneven=n == 0) for n in (0, 1))
        plans = {"uneven": uneven, "even": even}
        types = getattr(self.config.get_text_config(), "layer_types", None) or ()
        # Without an attention layer, the cache of transformers does not count tokens, and generation raises.
        attention = [n for n, t in enumerate(types) if t.endswith("attention") and t != "linear_attention"]
        attention = attention if kind == LAYER and len(types) == self.graph.num_layers else []
        for kept in plans.values():
            for name, units in kept.items():
                if kind == VOCABULARY:
                    kept[name] = sorted({*units, *named_tokens(self.models["eager"])})
                elif attention and set(attention).isdisjoint(units):
                    kept[name] = sorted([*units[:-1], attention[0]])
        return plans

    def _references(self, kept: Kept) -> list[Reference]:
        tokens, references = kept_tokens(self.tokens, self.graph, kept), []
        for implementation, dense in self.models.items():
            model = copy.deepcopy(dense)
            mode = silenced(model, self.graph, kept)
            with mode:
                expected = logits(model, tokens.before)[..., tokens.predicted]
            references.append(Reference(implementation, kept, tokens, model, mode, expected))
        return references

    def _cut(self, reference: Reference, follows: Sequence[Rule]) -> PreTrainedModel:
        model = copy.deepcopy(self.models[reference.implementation])
        cut_tensors(model, self.graph, reference.kept)
        if self.family.refresh(model) is NotImplemented:
            apply_rules(follows, model, self.graph, reference.kept)
        return model

    def _follows(
        self, groups: Sequence[CoupledGroup], references: Sequence[Reference], *, cached: bool
    ) -> tuple[Rule, ...]:
        """The fewest rules with which a cut gives the logits of its references, ``cached`` ones too; or no rules."""

        def agrees(*rules: Rule) -> bool:
            try:
                for reference in references:
                    model = self._cut(reference, rules)
                    if not distance(logits(model, reference.tokens.after), reference.logits) <= TOLERANCE:
                        return False
                eager = references[0]
                return not cached or cached_difference(self._cut(eager, rules), eager.tokens.after) <= TOLERANCE
            except Exception:  # a model cut with the wrong rules may raise anything
                return False

        attributes = candidates(self.models["eager"], self.graph, groups)
        if (rules := find(attributes, agrees)) is not None:
            return rules
        # Every layer is given the same tables, so one group of the kind shows them.
        for table in tables(self.models["eager"], self.graph, groups[0], [self.tokens, self.tokens.flip(0, 1)]):
            if (rules := find(attributes, partial(agrees, table))) is not None:
                return (table, *rules)
        return ()


@dataclass(frozen=True)
class Reference:
    """A ``model``, run inside ``mode``, with all but ``kept`` silenced, and its ``logits`` (B, T, V) for ``tokens``."""

    implementation: str
    kept: Kept
    tokens: Tokens
    model: PreTrainedModel
    mode: AbstractContextManager[object]
    logits: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """Token ids (B, T) ``before`` and ``after`` a cut; ``predicted``: ids before it of all tokens that stay."""

    before: torch.Tensor
    after: torch.Tensor
    predicted: torch.Tensor | slice


def kept_tokens(tokens: torch.Tensor, graph: CouplingGraph, kept: Kept) -> Tokens:
    """``tokens`` of the dense model, or others where those may be removed."""
    for name, units in kept.items():
        if graph.by_name[name].kind == VOCABULARY:
            after, predicted = tokens % len(units), torch.tensor(units)
            return Tokens(predicted[after], after, predicted)
    return Tokens(tokens, tokens, slice(None))


def _require(verdict: Verdict, difference: float, otherwise: str) -> None:
    if not difference <= TOLERANCE:  # or NaN
        verdict.verdict, verdict.difference = FAILED, min(1e30, difference)  # JSON has neither infinity nor NaN
        raise LlmprunerError(otherwise)


def _choices(group: CoupledGroup) -> list[int]:
    """The numbers of units that each block may keep, from a third on; empty where no unit can be removed."""
    per_block = group.units // group.blocks
    least = max(-(-group.minimum // group.blocks), per_block // 3, 1)
    return [n for n in range(least, per_block) if n * group.blocks % group.multiple == 0]


def random_plan(groups: Sequence[CoupledGroup], seed: int, *, uneven: bool) -> dict[str, list[int]]:
    """Random units to keep in every group that can lose any: a random number (``uneven``), or about two thirds."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[int]] = {}
    for group, choices in ((group, choices) for group in groups if (choices := _choices(group))):
        per_block, units = group.units // group.blocks, kept.setdefault(group.name, [])
        pick = int(torch.randint(len(choices), (1,), generator=generator)) if uneven else len(choices) // 2
        for block in range(group.blocks):
            order = torch.randperm(per_block, generator=generator)[: choices[pick]]
            units += sorted(block * per_block + int(i) for i in order)
    if not kept:
        raise LlmprunerError("no unit can be removed from any group")
    return kept


def first_difference(model: PreTrainedModel, reference: Reference) -> str:
    """The path of the first module whose output differs from that in the reference; empty for none."""
    with reference.mode:
        expected = _outputs(reference.model, reference.tokens.before)
    both = ((path, output) for path, output in _outputs(model, reference.tokens.after).items() if path in expected)
    alike = ((path, output) for path, output in both if output.shape == expected[path].shape)
    return next((path for path, output in alike if distance(output, expected[path]) > TOLERANCE), "")


def _outputs(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs: dict[str, torch.Tensor] = {}
    paths = {module: path for path, module in model.named_modules() if path}

    def keep(module: torch.nn.Module, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if module in paths and isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs.setdefault(paths[module], value.detach())

    with register_module_forward_hook(keep):
        logits(model, tokens)
    return outputs


def cached_difference(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """`distance` of logits with a cache from those without. Raises what generation raises."""
    with torch.no_grad(), quiet_transformers():
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        full = logits(model, output.sequences)
    cached = torch.stack(output.logits, 1)
    return distance(cached, full[:, tokens.shape[1] - 1 : -1])


def why_no_generation(model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """Why generation of ``model`` with and without a cache can't be compared; empty where it can."""
    try:
        difference = cached_difference(model, tokens)
    except Exception as error:  # classes without support for generation raise anything
        return f"cannot generate with a cache ({type(error).__name__}: {first_line(error)[:160]})"
    return "" if difference <= TOLERANCE else f"gives other logits with a cache ({difference:.0e})"


def _instances(config: PreTrainedConfig, seed: int) -> tuple[dict[str, PreTrainedModel], list[str]]:
    """A model for each implementation that the class has, eager and fused kernels; and why it lacks others."""
    eager = copy.deepcopy(config)
    for part in (eager, eager.get_text_config()):
        part._experts_implementation = "eager"
    models = {"eager": random_instance(eager, seed)}
    try:
        return {**models, "sdpa": random_instance(config, seed, "sdpa")}, []
    except LlmprunerError as error:
        skipped = [f"sdpa attention: {error}"]
    parts = (module for module in models["eager"].modules() if isinstance(module, PreTrainedModel))
    if any(part._can_set_experts_implementation() for part in parts):
        models["fused experts"] = random_instance(config, seed)
    return models, skipped


def silenced(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> AbstractContextManager[object]:
    """Silence all but ``kept`` in place, also layers and experts; the dense ``model`` must run inside the result."""

    def pass_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return entering if isinstance(output, torch.Tensor) else (entering, *output[1:])

    for number in removed_layers(graph, kept):
        model.get_submodule(f"{graph.layers}.{number}").register_forward_hook(pass_on, with_kwargs=True)
    routed = {name: units for name, units in kept.items() if graph.by_name[name].kind == EXPERT}
    silence(model, graph, {n: u for n, u in kept.items() if graph.by_name[n].kind not in (EXPERT, LAYER)})
    return ClosedRoutes(model, graph, routed) if routed else nullcontext()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) for ``tokens`` (B, T), without a cache."""
    return cast("torch.Tensor", model(input_ids=tokens, use_cache=False).logits)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite for other shapes or NaN."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


class ClosedRoutes(TorchFunctionMode):
    """While active, removed experts have logits of minus infinity, and again in top-k choices, after a sigmoid."""

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        super().__init__()
        self.closed: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self.current: list[Any] = []  # the removed experts of the last router, and the number of all
        for name, units in kept.items():
            group = graph.by_name[name]
            removed = sorted(set(range(group.units)) - set(units))
            for span in group.spans_with(Role.PRODUCES):
                parameter = model.get_parameter(span.parameter)
                if parameter.ndim == 2 and span.axis == 0:
                    rows = torch.tensor(span.indices(removed))
                    self.closed[id(parameter)] = rows, torch.tensor(removed), group.units

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and self.current:
            experts, number = self.current
            if args and number in (args[0].shape[-1], args[0].shape[1:].numel()):  # in groups, or not
                flat = args[0].reshape(-1, number).index_fill(-1, experts, float("-inf"))
                args = (flat.view(args[0].shape), *args[1:])
        result = func(*args, **kwargs)
        if self.closed and func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if closed := self.closed.get(id(weight)):
                rows, *self.current = closed
                result = result.index_fill(-1, rows, float("-inf"))
        return result
