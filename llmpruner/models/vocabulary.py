"""A vocabulary with fewer tokens: which tokens need each other, the tokenizer that remains, the new ids, and the dense
model in the remaining tokens.

Text whose tokens are all kept is tokenised as before; in other text, the parts of removed tokens stand for them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import inf, nextafter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import nn

from ..errors import PlanError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDS = re.compile("token_(id|index)s?$|^(begin_)?suppress_tokens$|^padding_idx$")
"""Names of configurations, and of attributes of modules, whose values are token ids."""
_NEVER = -1e4  # a logit of probability 0

Pair = tuple[str, str]


class Vocabulary:
    """The tokens of a tokenizer of the `tokenizers` library: BPE, Unigram or WordPiece; raises for any other."""

    def __init__(self, tokenizer: Any) -> None:
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
            has = "it has no tokenizer" if tokenizer is None else f"it has a {type(tokenizer).__name__}"
            need = "tokens are removed from the model and from a tokenizer of the tokenizers library"
            raise UnsupportedModelError(f"{need}, and {has}")
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = self._spec["model"]
        if self._model["type"] not in ("BPE", "Unigram", "WordPiece"):
            raise UnsupportedModelError(f"tokens cannot be removed from a {self._model['type']} tokenizer")
        self._tokenizer = tokenizer

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Token → id, without those of ``added_tokens`` that the model of the tokenizer lacks."""
        vocabulary = self._model["vocab"]
        if self._model["type"] == "Unigram":
            return {piece: number for number, (piece, _) in enumerate(vocabulary)}
        return dict(vocabulary)

    @cached_property
    def required(self) -> frozenset[int]:
        """The ids that always stay: special and added tokens, bytes, single characters, and what no merge gives."""
        prefix, unknown = self._model.get("continuing_subword_prefix") or "", self._model.get("unk_token")
        stay = {token["id"] for token in self._spec["added_tokens"]} | {
            number
            for token, number in self.ids.items()
            if len(token.removeprefix(prefix)) <= 1 or re.fullmatch("<0x[0-9A-F]{2}>", token) or token == unknown
        }
        if self._model["type"] == "Unigram" and self._model.get("unk_id") is not None:
            stay.add(self._model["unk_id"])
        if self._model["type"] == "BPE":
            made = {left + right for left, right in self._ranks}
            stay.update(number for token, number in self.ids.items() if token not in made)
        return frozenset(stay)

    @cached_property
    def parts(self) -> Mapping[int, tuple[int, ...]]:
        """Id → the ids of the two tokens that BPE merges into this one."""
        made: dict[str, list[Pair]] = {}
        for left, right in self._ranks:
            made.setdefault(left + right, []).append((left, right))
        parts = {}
        for token, pairs in made.items():
            # Most tokens have one merge; of several, it is the one that encoding the token itself ends with.
            pair = pairs[0] if len(pairs) == 1 else last_merge(token, self._ranks)
            if pair is not None and token in self.ids:
                parts[self.ids[token]] = (self.ids[pair[0]], self.ids[pair[1]])
        return parts

    def longest_first(self) -> list[tuple[int, tuple[int, ...]]]:
        """The items of `parts`, each before those of its parts."""
        length = {number: len(token) for token, number in self.ids.items()}
        return sorted(self.parts.items(), key=lambda item: -length[item[0]])

    @cached_property
    def _ranks(self) -> Mapping[Pair, int]:
        return {(left, right): rank for rank, (left, right) in enumerate(self._model.get("merges") or ())}

    def check_kept(self, kept: Iterable[int], rows: int) -> None:
        """Raise `PlanError` unless ``kept`` has what `trimmed` needs. ``rows``: of the embedding."""
        stay = {*kept}
        needed = {*self.required, *(part for whole, parts in self.parts.items() if whole in stay for part in parts)}
        if lost := sorted(number for number in needed - stay if number < rows):
            raise PlanError(f"the plan removes {len(lost)} tokens that others or the tokenizer need, first {lost[0]}")

    def trimmed(self, kept: Iterable[int]) -> Any:
        """A copy with the tokens ``kept``, numbered anew in order; they include `required`, and `parts` of each."""
        new = {old: number for number, old in enumerate(sorted({*kept, *self.required}))}
        spec = copy.deepcopy(self._spec)
        model = spec["model"]
        if model["type"] == "Unigram":
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {token: new[number] for token, number in self.ids.items() if number in new}
        if model["type"] == "BPE":
            stay = model["vocab"].keys()
            model["merges"] = [[a, b] for a, b in self._ranks if {a, b, a + b} <= stay]
        for token in spec["added_tokens"]:
            token["id"] = new[token["id"]]
        spec["post_processor"] = _renumbered(spec.get("post_processor"), new)
        if spec.get("padding"):
            spec["padding"]["pad_id"] = new.get(spec["padding"]["pad_id"], 0)
        trimmed = copy.deepcopy(self._tokenizer)
        trimmed._tokenizer = Tokenizer.from_str(json.dumps(spec))
        # A file of sentencepiece has the whole vocabulary.
        trimmed.vocab_file = None
        trimmed.init_kwargs.pop("vocab_file", None)
        return trimmed


def removable_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The rows of the embedding that may go: ``tokenizer`` and configurations need the others."""
    vocabulary = Vocabulary(tokenizer)
    stay = {*vocabulary.required, *named_tokens(model)}
    for whole, parts in vocabulary.longest_first():
        if whole in stay:
            stay.update(parts)
    return frozenset(range(model.get_input_embeddings().weight.shape[0])) - stay


def whole_first(scores: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """``scores`` of tokens, (V,), raised so that tokens go before their parts, as float64."""
    values = scores.tolist()
    for whole, parts in Vocabulary(tokenizer).longest_first():
        for part in parts:
            if values[part] <= values[whole]:
                values[part] = nextafter(values[whole], inf)
    return torch.tensor(values, dtype=torch.float64)


def last_merge(token: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The last two tokens that BPE merges when it encodes ``token``; None where it does not get there."""
    symbols, pair = list(token), None
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        lowest = min(range(len(pairs)), key=lambda n: ranks.get(pairs[n], len(ranks)))
        pair = pairs[lowest]
        if pair not in ranks:
            return None
        symbols[lowest : lowest + 2] = ["".join(pair)]
    return pair


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids: ``{"ids": [1]}`` in templates, ``["</s>", 2]`` in those of BERT and RoBERTa."""
    if isinstance(processor, dict):
        return {k: [new[i] for i in v] if k == "ids" else _renumbered(v, new) for k, v in processor.items()}
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int):
            return [processor[0], new[processor[1]]]
        return [_renumbered(value, new) for value in processor]
    return processor


def named_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The ids of tokens that the configurations of ``model`` name."""
    values = [value for config in _configs(model) for _, value in _token_ids(config)]
    return frozenset(token for value in values for token in (value if isinstance(value, list | tuple) else [value]))


def renumber(model: PreTrainedModel, kept: Sequence[int], before: int) -> None:
    """Set the new ids of tokens that configurations and modules name, and the vocabulary size, which was ``before``."""
    new = {old: number for number, old in enumerate(kept)}
    for owner in (*_configs(model), *model.modules()):
        for name, value in _token_ids(owner):
            stay = [new[v] for v in value if v in new] if isinstance(value, list | tuple) else new.get(value)
            setattr(owner, name, stay)
        if vars(owner).get("vocab_size") == before:
            owner.vocab_size = len(kept)


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations of ``model`` and of its modules, each once."""
    of_modules = (vars(module).get("config") for module in model.modules())
    configs = (model.config, model.config.get_text_config(), model.generation_config, *of_modules)
    return list({id(config): config for config in configs if config is not None}.values())


def _token_ids(owner: Any) -> list[tuple[str, Any]]:
    """The attributes of a configuration or module that are the id of a token, or a list of ids."""
    values = [(name, value) for name, value in vars(owner).items() if _IDS.search(name)]
    return [(n, v) for n, v in values if isinstance(v, list | tuple) or (isinstance(v, int) and v >= 0)]


def old_ids(dense: Any, trimmed: Any) -> list[int] | None:
    """The ids that the tokenizer ``dense`` has for the tokens of ``trimmed``; None unless it has all, in order."""
    if dense is None or not getattr(trimmed, "is_fast", False):
        return None
    old, new = dense.get_vocab(), trimmed.get_vocab()
    ids = [old.get(token, -1) for token in sorted(new, key=new.__getitem__)]
    ascending = all(a < b for a, b in pairwise([-1, *ids]))
    return ids if ascending and len(ids) == max(new.values()) + 1 else None


class InTokens(nn.Module):
    """``model`` in the tokens of a trimmed vocabulary. It reads removed tokens whole, as it was trained to. Its logits
    (B, T, kept tokens) are those after each token of its own that ends there, and 0 inside a removed one.

    ``old``: the id in ``model`` of each token. ``pieces``: those of each removed token, by its id in ``model``.
    ``teaching``: a removed token counts for its first piece, after which the next pieces are certain; otherwise a model
    that is trained toward these logits would not learn to write the pieces.
    """

    def __init__(self, model: Any, old: Sequence[int], pieces: Mapping[int, tuple[int, ...]], teaching: bool) -> None:
        super().__init__()
        self.model, self.device, self.teaching = model, model.device, teaching
        self.wholes = {(new,): before for new, before in enumerate(old)} | {p: token for token, p in pieces.items()}
        self.longest: dict[int, int] = {}
        counts_for = [len(old)] * len(model.get_input_embeddings().weight)
        for parts, token in self.wholes.items():
            self.longest[parts[0]] = max(len(parts), self.longest.get(parts[0], 1))
            counts_for[token] = parts[0]
        self.old, self.counts_for = torch.tensor(old).to(self.device), torch.tensor(counts_for).to(self.device)

    def read(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of ``model`` that ``ids`` are, and at which of ``ids`` each of them ends."""
        tokens, ends, start = list[int](), list[int](), 0
        while start < len(ids):
            parts = (tuple(ids[start : start + length]) for length in range(self.longest[ids[start]], 0, -1))
            whole = next(part for part in parts if part in self.wholes)
            start += len(whole)
            tokens.append(self.wholes[whole])
            ends.append(start - 1)
        return tokens, ends

    def agree(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Whether after each of the tokens, (T,), the next one is the same token in both vocabularies."""
        ends = torch.zeros(len(ids_T) + 1, dtype=torch.bool)
        ends[self.read(ids_T.tolist())[1]] = True
        return ends[:-1] & ends[1:]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        places = [mask.nonzero()[:, 0] for mask in attention_mask]
        read = [self.read(ids[place].tolist()) for ids, place in zip(input_ids, places, strict=True)]
        tokens_BM = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in read], True, -1).to(self.device)
        mask_BM = (tokens_BM >= 0).long()
        logits_BMV = self.model(input_ids=tokens_BM.clamp_min(0), attention_mask=mask_BM, use_cache=use_cache).logits
        kept, dtype = len(self.old), torch.float32 if self.teaching else logits_BMV.dtype
        logits_BTK = logits_BMV.new_zeros((*input_ids.shape, kept), dtype=dtype)
        for row, (tokens, ends) in enumerate(read):
            logits_MK = logits_BMV[row, : len(tokens)][:, self.old]
            if self.teaching:
                logits_BTK[row].fill_(_NEVER).scatter_(1, input_ids[row].roll(-1)[:, None], 0.0)
                p_MV = logits_BMV[row, : len(tokens)].float().softmax(-1)
                p_MK = p_MV.new_zeros((len(tokens), kept + 1)).index_add_(1, self.counts_for, p_MV)[:, :kept]
                logits_MK = p_MK.log().clamp_min_(_NEVER)
            logits_BTK[row, places[row][ends]] = logits_MK
        return SimpleNamespace(logits=logits_BTK)
