"""One export: plan, write, verify, quantise, verify."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ...errors import CheckpointError, first_line
from ...files import model_name
from ...models.checkpoint import model_class
from ...models.messages import quiet_transformers
from ...models.meta import empty_model, meta_model
from ...progress import Progress
from ..base import ExportTask
from .check import check_logits, check_tokens
from .plan import GgufPlan, check_model_type, plan_of
from .reference import GgufFile
from .runtime import block_of, quantize
from .source import entries
from .vocabulary import Vocabulary, vocabulary_of
from .write import write_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_MEGABYTE = 1e6


def export_gguf(task: ExportTask, kind: str, quant: str | None, pre: str | None) -> str:
    """Write a GGUF file and a ``Modelfile``; returns what was written and how it was verified.

    ``kind``: "f32", "f16", "bf16" or "auto". ``quant``: the type that the file is then quantised to, by llama.cpp.
    ``pre``: the name of the pre-tokenizer, instead of the one found.
    """
    # Where there is no configuration (adapters), the sizes are known once the model is loaded.
    skeleton = _skeleton(task.source)
    plan = plan_of(task.model if skeleton is None else skeleton)
    if quant is not None:
        _say_odd_rows(task.model if skeleton is None else skeleton, plan, quant, task.progress)
    kind = _stored_type(task) if kind == "auto" else kind
    vocabulary = _vocabulary(task, plan, pre)
    name = model_name(task.source)
    target = task.directory / f"{name}.gguf"
    written = target if quant is None else task.directory / f"{name}-{kind}.gguf"

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name)
        vocabulary.add_to(writer)

    write_gguf(task.model, plan, written, _DTYPES[kind], describe, task.progress)
    task.progress.status("Comparing the logits of the file with the model's")
    how = check_logits(task.model, written, kind)
    check_tokens(task.loaded.tokenizer, vocabulary, written)
    if quant is not None:
        task.progress.status(f"Quantising to {quant}")
        quantize(written, target, quant)
        written.unlink()
        how = check_logits(task.model, target, quant)
    (task.directory / "Modelfile").write_text(_modelfile(target, vocabulary), encoding="utf-8")
    size = target.stat().st_size / _MEGABYTE
    types = kind if quant is None else _types(target, quant)
    return f"{target.name} ({plan.architecture.name}, {types}, {size:,.1f} MB): {how}{_needs(plan)}"


def _needs(plan: GgufPlan) -> str:
    """A note on a computation that some runtimes leave out without an error; empty for most models."""
    if not plan.architecture.output_cap or plan.computation.output_cap is None:
        return ""
    # https://github.com/ggml-org/llama.cpp/pull/17811
    return "; it caps output logits, which llama.cpp does for this architecture since December 2025"


def _skeleton(source: Path) -> PreTrainedModel | None:
    """The model without weights, from ``config.json``, so that a refusal comes before weights are read."""
    if not (source / "config.json").is_file():
        return None
    try:
        with quiet_transformers():
            stated, _ = PreTrainedConfig.get_config_dict(str(source))
            check_model_type(str(stated.get("model_type")))
            found = model_class(source, trust_remote_code=False)
            if found is AutoModelForCausalLM:
                return meta_model(AutoConfig.from_pretrained(source))
            return empty_model(found, found.config_class.from_pretrained(source))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source / 'config.json'} cannot be used: {first_line(error)}") from error


def _say_odd_rows(model: PreTrainedModel, plan: GgufPlan, quant: str, progress: Progress) -> None:
    """Say which matrices cannot have the type that was asked for."""
    block = block_of(quant)
    rows = {n: e.shape[-1] for n, e in entries(model, plan.architecture).items() if len(e.shape) > 1}
    odd = {name: size for name, size in rows.items() if size % block}
    if odd:
        name, size = next(iter(odd.items()))
        progress.status(
            f"{quant} needs rows in multiples of {block}: {len(odd)} of {len(rows)} matrices have others, such as "
            f"{name} ({size}); llama.cpp stores these in types of more bits"
        )


def _stored_type(task: ExportTask) -> str:
    """The type that weights were asked to be loaded as; else the one that the checkpoint stores, as float16 is float32
    in memory on a CPU."""
    file = task.source / "config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = str(task.dtype or stated.get("dtype") or stated.get("torch_dtype") or task.model.dtype).removeprefix(
        "torch."
    )
    return next((kind for kind, dtype in _DTYPES.items() if str(dtype) == f"torch.{found}"), "f32")


def _vocabulary(task: ExportTask, plan: GgufPlan, pre: str | None) -> Vocabulary:
    folder = task.directory / "tokenizer"
    folder.mkdir()
    tokenizer, generation = task.loaded.tokenizer, task.model.generation_config
    found = vocabulary_of(tokenizer, generation, plan.sizes.vocabulary, folder, pre)
    shutil.rmtree(folder)
    return found


def _types(path: Path, quant: str) -> str:
    """``quant``; with the numbers of tensors of each type, where there are several besides the float32 of vectors."""
    counts = Counter(found.name.lower() for found in GgufFile(path).types.values())
    counts.pop("f32", None)
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{quant}: {listed}" if len(counts) > 1 else quant


def _modelfile(path: Path, vocabulary: Vocabulary) -> str:
    """Ollama's description of a model; it takes the chat template from the file."""
    stops = [f'PARAMETER stop "{text}"' for text in vocabulary.stops if '"' not in text]
    return "\n".join([f"FROM ./{path.name}", *stops]) + "\n"
