"""Tiny random models, data and a recipe for `benchmarks.torture`.

python -m benchmarks.tiny_checkpoints FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

TEXT = (
    "The quick brown fox jumps over the lazy dog. A model predicts the next token from those before it. "
    "Paris is the capital of France, and Rome is the capital of Italy. Two and two make four.\n"
) * 40


@dataclass(frozen=True)
class Work:
    """The files in ``folder``."""

    folder: Path

    @property
    def dense(self) -> Path:
        return self.folder / "dense"

    @property
    def pruned(self) -> Path:
        """Layers of different widths, so that it has the shim."""
        return self.folder / "pruned"

    @property
    def meta(self) -> Path:
        return self.folder / "meta"

    @property
    def gguf(self) -> Path:
        return self.folder / "gguf"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"


def write_work(folder: Path) -> Work:
    """Needs torch, which `benchmarks.torture` does not import."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import llmpruner

    work = Work(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work.dense)
    base = ByteLevelBPETokenizer()
    base.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(work.dense)
    work.text.write_text(TEXT, encoding="utf-8")
    rows = [{"instruction": "Add the numbers.", "input": f"{n} and 2", "output": f"{n + 2}."} for n in range(12)]
    work.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    llmpruner.prune(work.dense, unit_ratio=0.25, layers=[1, 2], importance="l1", output=work.pruned)
    llmpruner.plan(work.dense, ratio=0.2, importance="l1").save(work.plan)
    llmpruner.export(work.dense, to="gguf", output=work.gguf)
    next(work.gguf.glob("*.gguf")).rename(work.gguf / "model.gguf")
    from llmpruner_llama.meta_writer import convert_to_meta

    convert_to_meta(work.dense, work.meta, tokenizer=None)
    work.recipe.write_text(
        f"model: {work.dense}\nsteps:\n  - prune: {{ratio: 0.2, importance: l1}}\n  - evaluate: {{metrics: size}}\n"
        "  - export: {to: stock}\n",
        encoding="utf-8",
    )
    return work


if __name__ == "__main__":
    write_work(Path(sys.argv[1]))
