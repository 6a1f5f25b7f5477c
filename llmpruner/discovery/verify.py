"""The oracle: checks on a small random model that cutting units equals silencing them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LlmprunerError, UnsupportedModelError, first_line
from ..models.checkpoint import load_pruned
from ..models.config import for_all_layers
from ..models.messages import quiet_transformers, why_it_stops
from ..models.meta import graph_of
from ..models.save import save_checkpoint
from ..models.surgery import cut
from ..structure.architecture import declared_groups
from ..structure.coupling import ATTENTION, LAYER, CoupledGroup, CouplingGraph
from ..structure.kept import Kept
from .compare import differences
from .follow import Follower, Rule, candidates, find, tables
from .groups import discover_groups
from .silenced import distance, logits, silenced
from .tiny import HEADS, random_instance, small_config, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.architecture import Architecture


BATCH, TIME = 3, 13
NEW_TOKENS = 4
"""Tokens that are generated with a cache."""

TOLERANCE = 2e-4
"""Largest difference of logits, relative to the largest logit of the reference: float32 rounding through a few
layers stays ten times below it, a wrong index far above."""
VISIBLE = 1e-3
"""Smallest change of the dense model's logits by silencing; with less, agreement would not be evidence."""

VERIFIED, FAILED, REFUSED = "verified", "failed", "refused"


@dataclass(frozen=True)
class Verdict:
    """The result of the oracle for one kind of unit.

    ``verdict``: *verified*; *failed* (the cut model runs and its outputs are wrong); *refused* (the cut model cannot
    run, or the checks gave no evidence: see ``reason``). ``difference``: largest difference of logits relative to the
    largest logit, over ``checks``. ``where``: path of the first module whose output differs. ``follows``: rules for
    attributes that must change with the cut. ``skipped``: checks that were not possible, each with the reason.
    ``differences``: for a kind that is not verified, one line for each parameter in which the declared groups differ
    from the discovered ones.
    """

    kind: str
    groups: int
    units: int
    verdict: str
    difference: float
    where: str = ""
    reason: str = ""
    checks: tuple[str, ...] = ()
    follows: tuple[Rule, ...] = ()
    skipped: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def verify(
    source: Architecture | Sequence[CoupledGroup] | None,
    config: PreTrainedConfig,
    *,
    kinds: Iterable[str] | None = None,
    seed: int = 0,
    shrink: bool = True,
) -> list[Verdict]:
    """Check every kind of unit of ``source`` on a small random model of the architecture of ``config``.

    ``source``: a family; groups of exactly ``config`` (then pass ``shrink=False``); or None for discovery.
    One verdict per kind, in order of appearance. Raises `UnsupportedModelError` when the small model cannot be
    built or traced.
    """
    kinds = None if kinds is None else list(kinds)
    family = None if source is None or isinstance(source, Sequence) or source.is_discovered else source
    small = config
    if shrink:
        small = representative(config, kinds) if family is None else small_config(config)
    model = random_instance(small, seed)
    if source is None:
        graph = graph_of(model, lambda: discover_groups(small))
    elif not isinstance(source, Sequence):
        graph = graph_of(model, lambda: declared_groups(source, small))
    else:
        graph = graph_of(model, lambda: source)
    wanted = graph.kinds if kinds is None else [k for k in graph.kinds if k in set(kinds)]
    oracle = Oracle(small, graph, family, seed)
    verdicts = [oracle.judge(kind) for kind in wanted]
    if source is None or all(v.verdict == VERIFIED for v in verdicts):
        return verdicts
    return _with_differences(verdicts, graph, small)


def representative(config: PreTrainedConfig, kinds: Collection[str] | None = None) -> PreTrainedConfig:
    """A small configuration of the class of ``config`` whose model has units of ``kinds`` (None: heads, where the
    configuration counts any): a class may spread its heads over a fixed number of parts, and has none with another
    number of heads. The first that runs, where no other has more of them.

    Raises `UnsupportedModelError` when no small model can be built, run and traced.
    """
    text = for_all_layers(config.get_text_config())
    heads = {ATTENTION} if getattr(text, "num_attention_heads", None) else set()
    wanted = heads if kinds is None else set(kinds)
    found: list[tuple[int, PreTrainedConfig]] = []
    failed: list[UnsupportedModelError] = []
    for small in islice(small_configs(config), len(HEADS)):
        try:
            missing = wanted - {group.kind for group in discover_groups(small)}
        except UnsupportedModelError as error:
            failed.append(error)
            continue
        found.append((len(missing), small))
        if not missing:
            break
    if not found:
        raise failed[0]
    return min(found, key=lambda one: one[0])[1]


def _with_differences(verdicts: Sequence[Verdict], graph: CouplingGraph, config: PreTrainedConfig) -> list[Verdict]:
    """``verdicts``, with ``differences`` of the groups of ``graph`` from discovered ones where not *verified*."""
    try:
        discovered = discover_groups(config)
    except UnsupportedModelError as error:
        nothing = f"the groups were not compared with discovered ones: {error}"
        return [v if v.verdict == VERIFIED else replace(v, differences=(nothing,)) for v in verdicts]
    return [
        v if v.verdict == VERIFIED else replace(v, differences=differences(graph.of_kinds([v.kind]), discovered))
        for v in verdicts
    ]


@dataclass
class _Record:
    """The results so far for one kind of unit, as in the fields of `Verdict`."""

    checks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    difference: float = 0.0
    follows: tuple[Rule, ...] = ()


class Oracle:
    """Compares cut with silenced copies of one random model."""

    def __init__(self, config: PreTrainedConfig, graph: CouplingGraph, family: Architecture | None, seed: int) -> None:
        self.config, self.graph, self.family, self.seed = config, graph, family, seed
        self.models, self.skipped = _instances(config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        vocabulary = config.get_text_config().vocab_size
        self.tokens = torch.randint(min(40, vocabulary // 2), vocabulary, (BATCH, TIME), generator=generator)
        self.no_cache = why_no_generation(self.models["eager"], self.tokens)
        """Why generation cannot be checked; empty when it can."""
        self.dense = {name: logits(model, self.tokens) for name, model in self.models.items()}

    def judge(self, kind: str) -> Verdict:
        every = self.graph.of_kinds([kind])
        groups = [g for g in every if _choices(g)]
        record = _Record(skipped=list(self.skipped))
        if len(groups) < len(every):
            record.skipped.append(f"{len(every) - len(groups)} of {len(every)} groups: no unit can be removed")

        def verdict(name: str, difference: float, where: str = "", reason: str = "") -> Verdict:
            return Verdict(
                kind,
                len(every),
                max((g.units for g in every), default=0),
                name,
                difference,
                where,
                reason,
                tuple(record.checks),
                record.follows,
                tuple(record.skipped),
            )

        if not groups:
            return verdict(REFUSED, 0.0, reason="no unit can be removed from any group")
        try:
            self._try(kind, groups, record)
        except Disagreement as found:
            return verdict(FAILED, found.difference, found.where, str(found))
        except Exception as error:  # the cut model may raise anything
            return verdict(REFUSED, 0.0, reason=why_it_stops(error))
        return verdict(VERIFIED, record.difference)

    def _try(self, kind: str, groups: Sequence[CoupledGroup], record: _Record) -> None:
        plans = {
            "uneven": random_plan(groups, self.seed, uneven=True),
            "even": random_plan(groups, self.seed + 1, uneven=False),
        }
        types = getattr(self.config.get_text_config(), "layer_types", None) or ()
        if kind == LAYER and len(types) == self.graph.num_layers:
            plans = {name: {g: with_attention(u, types) for g, u in kept.items()} for name, kept in plans.items()}
        if self.family is None and kind != LAYER:
            record.follows = self._follows(groups, plans["uneven"])
        for name, kept in plans.items():
            for implementation, dense in self.models.items():
                difference = self._compare(dense, implementation, kept, record.follows, strict=name == "uneven")
                record.difference = max(record.difference, difference)
                record.checks.append(f"{name} {implementation}")
        why_not = self._generate(plans["uneven"], record.follows)
        if why_not:
            record.skipped.append(f"cached generation: {why_not}")
        else:
            record.checks.append("cached generation")
        for name, kept in plans.items():
            model = self._cut(self.models["eager"], kept, record.follows)
            difference = round_trip_difference(model, self.tokens)
            if not difference <= TOLERANCE:
                raise Disagreement(f"the saved and reloaded model differs ({name})", difference, "")
        record.checks.append("save and load")

    def _follows(self, groups: Sequence[CoupledGroup], kept: Kept) -> tuple[Rule, ...]:
        first: list[Exception] = []
        dense = next(iter(self.models.values()))

        def agrees(chosen: Sequence[Rule]) -> bool:
            try:
                for name, model in self.models.items():
                    self._compare(model, name, kept, chosen, strict=False)
                self._generate(kept, chosen)
            except Exception as error:  # a model cut with the wrong rules may raise anything
                first.append(error)
                return False
            return True

        attributes: list[Rule] = [*candidates(dense, self.graph, groups)]
        found = find(attributes, agrees)
        if found is None:
            # Every layer is given the same tables, so one group of the kind shows them.
            for table in tables(dense, self.graph, groups[0], [self.tokens, self.tokens.flip(0, 1)]):
                found = find([table, *attributes], _only_with(table, agrees))
                if found is not None:
                    break
        if found is None:
            silent = [e for e in first if isinstance(e, Disagreement)]
            raise silent[0] if silent and isinstance(first[0], Disagreement) else first[0]
        return found

    def _generate(self, kept: Kept, follows: Sequence[Rule]) -> str:
        """Check generation with a cache. Returns why it cannot be checked (the dense or the silenced model does not
        give the same logits with a cache as without), else an empty string."""
        if self.no_cache:
            return f"the dense model {self.no_cache}"
        dense = self.models["eager"]
        _, reference, mode = self._reference(dense, kept)
        with mode:
            why_not = why_no_generation(reference, self.tokens)
        if why_not:
            return f"the model with silenced units {why_not}"
        difference = cached_difference(self._cut(dense, kept, follows), self.tokens)
        if not difference <= TOLERANCE:
            raise Disagreement("generation with a cache differs from generation without", difference, "")
        return ""

    def _cut(self, dense: PreTrainedModel, kept: Kept, follows: Sequence[Rule]) -> PreTrainedModel:
        model = copy.deepcopy(dense)
        cut(model, self.graph, kept, self.family or Follower(follows))
        return model

    def _compare(
        self, dense: PreTrainedModel, implementation: str, kept: Kept, follows: Sequence[Rule], *, strict: bool
    ) -> float:
        model = self._cut(dense, kept, follows)
        expected, reference, mode = self._reference(dense, kept)
        if strict and distance(expected, self.dense[implementation]) < VISIBLE:
            raise LlmprunerError("silencing the units does not change the logits, so the cut cannot be verified")
        difference = distance(logits(model, self.tokens), expected)
        if not difference <= TOLERANCE:
            where = first_difference(model, reference, self.tokens, mode)
            raise Disagreement(f"the cut model disagrees ({implementation})", difference, where)
        return difference

    def _reference(
        self, dense: PreTrainedModel, kept: Kept
    ) -> tuple[torch.Tensor, PreTrainedModel, AbstractContextManager[object]]:
        """The logits of a silenced copy of ``dense``, that copy, and the context in which it must run."""
        model = copy.deepcopy(dense)
        mode = silenced(model, self.graph, kept)
        with mode:
            return logits(model, self.tokens), model, mode


def _only_with(rule: Rule, agrees: Callable[[Sequence[Rule]], bool]) -> Callable[[Sequence[Rule]], bool]:
    return lambda chosen: rule in chosen and agrees(chosen)


class Disagreement(LlmprunerError):
    """The cut model runs, and its outputs are wrong."""

    def __init__(self, message: str, difference: float, where: str) -> None:
        super().__init__(message)
        self.difference, self.where = difference, where


def _choices(group: CoupledGroup) -> list[int]:
    """How many units of each block may be kept, a third of them or more; empty where no unit can be removed."""
    per_block = group.units // group.blocks
    least = max(-(-group.minimum // group.blocks), per_block // 3, 1)
    return [n for n in range(least, per_block) if n * group.blocks % group.multiple == 0]


def random_plan(groups: Sequence[CoupledGroup], seed: int, *, uneven: bool) -> dict[str, list[int]]:
    """Random units to keep: a random number in every group (``uneven``), or the same share as far as possible.
    Groups of which no unit can be removed are left out."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        choices = _choices(group)
        if not choices:
            continue
        per_block = group.units // group.blocks
        pick = int(torch.randint(len(choices), (1,), generator=generator)) if uneven else len(choices) // 2
        units: list[int] = []
        for block in range(group.blocks):
            order = torch.randperm(per_block, generator=generator)[: choices[pick]]
            units += sorted(block * per_block + int(i) for i in order)
        kept[group.name] = units
    if not kept:
        raise LlmprunerError("no unit can be removed from any group")
    return kept


def with_attention(layers: list[int], types: Sequence[str]) -> list[int]:
    """As many layers as in ``layers``, an attention layer among them where the model has one (``types``: of all its
    layers). Without one, the cache of transformers does not count tokens, and generation raises."""
    attention = [n for n, kind in enumerate(types) if kind.endswith("attention") and kind != "linear_attention"]
    if not attention or set(attention) & set(layers):
        return layers
    return sorted([*layers[:-1], attention[0]])


def first_difference(
    model: PreTrainedModel, reference: PreTrainedModel, tokens: torch.Tensor, mode: AbstractContextManager[object]
) -> str:
    """The path of the first module, in order of execution, whose output differs between two models; empty where none
    does. ``mode``: in which ``reference`` runs, see `silenced`."""
    seen = _outputs(model, tokens)
    with mode:
        expected = _outputs(reference, tokens)
    for path, output in seen.items():
        other = expected.get(path)
        if other is not None and other.shape == output.shape and distance(output, other) > TOLERANCE:
            return path
    return ""


def _outputs(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs.setdefault(path, value.detach())

        return hook

    handles = [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if path]
    try:
        logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def cached_difference(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """`distance` of logits with a key/value cache from those of full forward passes. Raises what generation raises."""
    with torch.no_grad(), quiet_transformers():
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        full = logits(model, output.sequences)
    cached = torch.stack(output.logits, 1)
    return distance(cached, full[:, tokens.shape[1] - 1 : -1])


def why_no_generation(model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """Why generation of ``model`` with a cache cannot be compared with generation without; empty when it can."""
    try:
        difference = cached_difference(model, tokens)
    except Exception as error:  # classes without support for generation raise anything
        return f"cannot generate with a cache ({type(error).__name__}: {first_line(error)[:160]})"
    return "" if difference <= TOLERANCE else f"gives other logits with a cache ({difference:.0e})"


def round_trip_difference(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """`distance` of the logits after saving and loading from those before."""
    expected = logits(model, tokens)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "pruned"
        save_checkpoint(model, directory, record={})
        loaded = load_pruned(directory, attn_implementation="eager")
        return distance(logits(loaded, tokens), expected)


def _instances(config: PreTrainedConfig, seed: int) -> tuple[dict[str, PreTrainedModel], list[str]]:
    """One model per implementation: eager, and the fused kernels that the class has; and one line for each
    implementation that it lacks, with the reason."""
    models = {"eager": _instance(config, seed, "eager", "eager")}
    try:
        return {**models, "sdpa": _instance(config, seed, "sdpa", None)}, []
    except LlmprunerError as error:
        # Where attention has no fused kernel, experts may have one.
        return {**models, "fused experts": _instance(config, seed, "eager", None)}, [f"sdpa attention: {error}"]


def _instance(config: PreTrainedConfig, seed: int, attention: str, experts: str | None) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if experts is not None:
            part._experts_implementation = experts
    return random_instance(config, seed, attention)
