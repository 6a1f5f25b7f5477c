"""A drill in real proportions: two layers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, on random weights.

    python -m benchmarks.chatglm_drill [--work DIR] [--models chatglm,chatglm2,chatglm3]

Writes checkpoints in the released format (sharded float16 ``.bin`` files, released widths and vocabulary sizes, special
tokens at their released ids), takes each through the command line, and loads every result once with `load_pruned` and
once in a virtual environment that has transformers and no llmpruner. Writes ``benchmarks/results/chatglm_drill.json``
and the table in ``docs/models.md``. Takes about 20 GB of disk, one model at a time, all removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .measure import as_json, machine, run

# Torch is imported by the steps alone: Linux counts what this process holds into the peak of those it starts.

RESULTS = Path(__file__).parent / "results" / "chatglm_drill.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- drill:begin -->", "<!-- drill:end -->"
LAYERS, HIDDEN, STD = 2, 4096, 0.02
SHARDS = 3
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Philosophy begins in wonder, and wonder never stops.",
    "你好，世界。我是一个语言模型，很高兴认识你。",
]
ROWS = [
    {"instruction": "What jumps over the dog?", "output": "The quick brown fox."},
    {"instruction": "Where does philosophy begin?", "output": "In wonder."},
]
IDS = [[40, 41, 42, 43, 44, 45, 46, 47]]

FIRST = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "model_type": "chatglm", "torch_dtype": "float16", "use_cache": True, "vocab_size": 130528, "hidden_size": HIDDEN,
    "num_layers": LAYERS, "num_attention_heads": 32, "inner_hidden_size": 16384, "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048, "position_encoding_2d": True, "bos_token_id": 130004, "eos_token_id": 130005,
    "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3,
}  # fmt: skip
LATER = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "model_type": "chatglm", "torch_dtype": "float16", "use_cache": True, "padded_vocab_size": 65024,
    "hidden_size": HIDDEN, "num_layers": LAYERS, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "layernorm_epsilon": 1e-5,
    "add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False,
    "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "tie_word_embeddings": False, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {"chatglm": FIRST, "chatglm2": LATER | {"seq_length": 32768}, "chatglm3": LATER | {"seq_length": 8192}}

LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
who, folder, file, ids = sys.argv[1], sys.argv[2], sys.argv[3], torch.tensor([eval(sys.argv[4])])[0]
if who == "transformers":
    from importlib.util import find_spec
    if any(map(find_spec, ("llmpruner", "llmpruner_chatglm"))):
        raise SystemExit("llmpruner can be imported where it should be missing")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
else:
    from llmpruner import load_pruned
    model = load_pruned(folder)
with torch.no_grad():
    logits = model.eval()(ids).logits
if who == "transformers":
    save_file({"logits": logits}, file)
else:
    print(float((logits - load_file(file)["logits"]).abs().max()), float(logits.abs().max()))
"""


def make(name: str, folder: Path) -> None:
    """The checkpoint of ``name``, as its authors released it but for depth and values."""
    folder.mkdir()
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if name == "chatglm":
        marks = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
        make_vocabulary(folder / "ice_text.model", "unigram", dict(enumerate(marks, start=130000)), 130344)
        tokenizer = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}
        shapes = dict(first_generation())
    else:
        make_vocabulary(folder / "tokenizer.model", "bpe", {}, 64789)
        roles = {str(64794 + n): {"content": f"<|{r}|>"} for n, r in enumerate(("system", "user"))}
        tokenizer = {"tokenizer_class": "ChatGLMTokenizer", "added_tokens_decoder": roles if name == "chatglm3" else {}}
        shapes = dict(later_generations())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    make_weights(folder, shapes)


def make_vocabulary(file: Path, kind: str, marks: dict[int, str], size: int) -> None:
    """A small SentencePiece model, filled up to ``size`` with pieces that no text contains; ``marks``: id → piece."""
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=trained, model_type=kind, vocab_size=400, pad_id=3,
        byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=["<n>", "<|tab|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    for number in range(len(model.pieces), size):
        piece = model.pieces.add()
        piece.piece, piece.score = marks.get(number, f"<|filler_{number}|>"), -100.0
        used = number in marks
        piece.type = piece.USER_DEFINED if used else piece.UNUSED
    file.write_bytes(model.SerializeToString())


def first_generation() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of ChatGLM-6B by their released names. Embedding and head are tied, and both stored."""
    inner = FIRST["inner_hidden_size"]
    yield "transformer.word_embeddings.weight", (FIRST["vocab_size"], HIDDEN)
    for n in range(LAYERS):
        path = f"transformer.layers.{n}"
        yield f"{path}.attention.rotary_emb.inv_freq", (32,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from ((f"{path}.{norm}.weight", (HIDDEN,)), (f"{path}.{norm}.bias", (HIDDEN,)))
        for linear, rows, columns in (
            ("attention.query_key_value", 3 * HIDDEN, HIDDEN), ("attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", inner, HIDDEN), ("mlp.dense_4h_to_h", HIDDEN, inner),
        ):  # fmt: skip
            yield from ((f"{path}.{linear}.weight", (rows, columns)), (f"{path}.{linear}.bias", (rows,)))
    yield from (("transformer.final_layernorm.weight", (HIDDEN,)), ("transformer.final_layernorm.bias", (HIDDEN,)))
    yield "lm_head.weight", (FIRST["vocab_size"], HIDDEN)


def later_generations() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of ChatGLM2-6B and ChatGLM3-6B by their released names."""
    width, vocabulary = LATER["ffn_hidden_size"], LATER["padded_vocab_size"]
    fused = HIDDEN + 2 * LATER["multi_query_group_num"] * LATER["kv_channels"]
    yield "transformer.embedding.word_embeddings.weight", (vocabulary, HIDDEN)
    yield "transformer.rotary_pos_emb.inv_freq", (32,)
    for n in range(LAYERS):
        path = f"transformer.encoder.layers.{n}"
        yield f"{path}.input_layernorm.weight", (HIDDEN,)
        yield f"{path}.self_attention.query_key_value.weight", (fused, HIDDEN)
        yield f"{path}.self_attention.query_key_value.bias", (fused,)
        yield f"{path}.self_attention.dense.weight", (HIDDEN, HIDDEN)
        yield f"{path}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{path}.mlp.dense_h_to_4h.weight", (2 * width, HIDDEN)
        yield f"{path}.mlp.dense_4h_to_h.weight", (HIDDEN, width)
    yield "transformer.encoder.final_layernorm.weight", (HIDDEN,)
    yield "transformer.output_layer.weight", (vocabulary, HIDDEN)


def make_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    names, weight_map = list(shapes), {}
    embedding = None
    for number in range(1, SHARDS + 1):
        state = {}
        for name in names[(number - 1) * len(names) // SHARDS : number * len(names) // SHARDS]:
            if "norm.weight" in name or "inv_freq" in name:
                state[name] = torch.ones(shapes[name], dtype=torch.float16)
            elif name == "lm_head.weight":
                state[name] = embedding
            else:
                state[name] = (torch.randn(shapes[name], generator=generator) * STD).half()
            embedding = state[name] if "word_embeddings" in name else embedding
        file = f"pytorch_model-{number:05}-of-{SHARDS:05}.bin"
        torch.save(state, folder / file)
        weight_map |= dict.fromkeys(state, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def other_environment(folder: Path) -> Path:
    """The interpreter of a virtual environment that sees the installed packages, and no editable llmpruner: a folder
    that a ``.pth`` file names joins the path without its own ``.pth`` files."""
    venv.create(folder, with_pip=False, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def difference(folder: Path, python: Path, work: Path) -> dict[str, float]:
    """Greatest difference between the logits of `load_pruned` and of transformers alone, and the greatest logit."""
    file = work / "logits.safetensors"
    # -I: no PYTHONPATH may make llmpruner importable.
    for interpreter, who in (([str(python), "-I"], "transformers"), ([sys.executable], "llmpruner")):
        command = [*interpreter, "-c", LOGITS, who, str(folder), str(file), json.dumps(IDS)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
        if done.returncode:
            raise SystemExit(f"loading {folder.name} as {who} failed: {done.stderr.strip()[-2000:]}")
    apart, greatest = map(float, done.stdout.split())
    return {"greatest_difference": apart, "greatest_logit": greatest}


def drill(name: str, work: Path, python: Path) -> dict[str, Any]:
    """Every step on one model: what each took and, where it wrote a model, how far the two ways of loading differ."""
    source, text, data = work / name, work / "text.txt", work / "data.jsonl"
    subprocess.run([sys.executable, "-m", "benchmarks.chatglm_drill", "--make", name, str(source)], check=True)
    text.write_text("\n".join(SENTENCES * 40), encoding="utf-8")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    small = ("--layers", "all", "--samples", "2", "--length", "16", "--json")
    step = ("--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "1", "--cutoff", "32")
    commands = {
        "prune-10": ("prune", str(source), "--ratio", "0.1", *small),
        "prune-25": ("prune", str(source), "--ratio", "0.25", *small),
        "prune-25-mlp-attention": ("prune", str(source), "--ratio", "0.25", "--kinds", "mlp,attention", *small),
        "recover": ("recover", str(work / "prune-25"), "--data", str(data), *step),
    }
    steps: dict[str, Any] = {}
    for label, command in commands.items():
        print(f"{name}: {label}", file=sys.stderr)
        out = work / label
        took = run(*command, "-o", str(out))
        output = took.pop("output")
        if command[0] == "prune":
            took["result"] = json.loads(output)["result"]
        steps[label] = took | difference(out, python, work)
    print(f"{name}: evaluate", file=sys.stderr)
    table = work / "evaluation.json"
    took = run(
        "evaluate", str(source), str(work / "prune-25"), str(work / "recover"), "--perplexity", str(text),
        "--set", "perplexity.tokens=256", "--window", "64", "--json", str(table),
    )  # fmt: skip
    del took["output"]
    rows = json.loads(table.read_text())
    steps["evaluate"] = took | {"perplexity": {Path(r["name"]).name: r["perplexity"]["perplexity"] for r in rows}}
    stored = sum(file.stat().st_size for file in source.glob("*.bin"))
    return {"shape": CONFIGS[name], "stored_bytes": stored, "steps": steps}


def table(results: dict[str, Any]) -> str:
    """What the document shows of the results."""
    lines = [
        "| model | step | seconds | CPU seconds | peak MiB | decoder removed | logits differ by at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["models"].items():
        for step, took in found["steps"].items():
            removed = f"{took['result']['decoder_removed']:.1%}" if "result" in took else ""
            apart = f"{took['greatest_difference']:.0e}" if took.get("greatest_difference") else "0"
            apart = apart if "greatest_difference" in took else ""
            cells = (name, step, took["seconds"], took["cpu_seconds"], took["peak_mib"], removed, apart)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def render(results: dict[str, Any]) -> None:
    """Put the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where to put the files (a temporary folder inside it)")
    parser.add_argument("--models", default=",".join(CONFIGS), help="which of them, comma-separated")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make[0], Path(arguments.make[1]))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: dict[str, Any] = {"machine": machine(), "models": {}}
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            os.environ["HF_HOME"] = f"{work}/home"
            found = drill(name, Path(work), other_environment(Path(work) / "other"))
            # Where things lay on this machine is nobody's business.
            results["models"][name] = json.loads(json.dumps(found).replace(work, "$WORK"))
        RESULTS.write_text(as_json(results))
    render(results)


if __name__ == "__main__":
    main()
