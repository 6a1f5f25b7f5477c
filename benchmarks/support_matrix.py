"""Discovery and the oracle on every causal language model that the installed transformers knows.

    python -m benchmarks.support_matrix                 all types, two processes at a time, restartable
    python -m benchmarks.support_matrix llama gpt2      these types again, with their variants
    python -m benchmarks.support_matrix --time-limit 60 give up on a configuration after so many seconds
    python -m benchmarks.support_matrix --render        only write docs/support-matrix.md again

Every configuration runs in a process of its own with limits on time and memory, as a small random instance: the default
one of every type, and others that differ in structure: the `VARIANTS` named here and, up to two in all, those that the
flags of the configuration class give (`other_flags`). Results are JSON lines; an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from .child_process import in_child, prepare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support_matrix.jsonl"
PAGE = ROOT / "docs" / "support-matrix.md"
TIME_LIMIT = 480
WORKERS = 2

KINDS = ("mlp", "attention", "query", "expert", "latent", "hidden", "layer")
PARTS = {
    "mlp": re.compile(r"mlp|feed_?forward|ffn|ffw|\bfc\d|experts|h_to_4h|intermediate|\.ff\b|channel_mix|\bw1\b", re.I),
    "attention": re.compile(r"attn|attention", re.I),
}
"""What a type is said to have, whether or not discovery finds it: by the paths and classes of its modules."""

REQUIRED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "glm", "glm4",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "starcoder2", "stablelm", "olmo2", "granite",
    "cohere", "smollm3", "mixtral", "qwen3_moe", "olmoe",
)  # fmt: skip


_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip

INCOMPLETE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
}
"""What the default configuration of a type leaves open, without which no model can be built from it."""


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bamba": {"attention in some layers": {"attn_layer_indices": [9, 18, 27]}},
    "bloom": {
        "residual after the norm": {"apply_residual_connection_post_layernorm": True},
        "untied": {"tie_word_embeddings": False},
    },
    "cohere": {"norms on queries and keys": {"use_qk_norm": True}},
    "falcon": {
        "new decoder, 8 KV heads": {
            "new_decoder_architecture": True, "hidden_size": 4096, "num_attention_heads": 64, "num_kv_heads": 8,
        },
        "new decoder, multi-head": {"new_decoder_architecture": True},
        "multi-head, sequential": {"multi_query": False, "parallel_attn": False, "bias": True},
        "multi-head, ALiBi, biases": {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    },
    "glm": {"multi-head, no biases": {"num_key_value_heads": 32, "attention_bias": False}},
    "gpt2": {"untied": {"tie_word_embeddings": False}},
    "gpt_bigcode": {"multi-head": {"multi_query": False}},
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False},
        "no attention biases, tied": {"attention_bias": False, "tie_word_embeddings": True},
    },
    "gptj": {"tied": {"tie_word_embeddings": True}},
    "granitemoehybrid": {
        "attention in some layers": {"layer_types": ["mamba", "mamba", "mamba", "attention"] * 8},
        "attention in some layers, no experts": {
            "layer_types": ["mamba", "mamba", "mamba", "attention"] * 8, "num_local_experts": 0,
            "num_experts_per_tok": 0, "position_embedding_type": "rope",
        },
    },
    "llama": {
        "8 KV heads": {"num_key_value_heads": 8},
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "mistral": {"multi-head": {"num_key_value_heads": 32}},
    "mixtral": {"multi-head, tied": {"num_key_value_heads": 32, "tie_word_embeddings": True}},
    "opt": {"norms after": {"do_layer_norm_before": False}, "no biases": {"enable_bias": False}},
    "phi": {"8 KV heads": {"num_key_value_heads": 8}, "norms on queries and keys": {"qk_layernorm": True}},
    "phi3": {
        "8 KV heads": {"num_key_value_heads": 8},
        "tied, half rotary": {"tie_word_embeddings": True, "partial_rotary_factor": 0.5},
    },
    "qwen2": {
        "4 KV heads": {"num_key_value_heads": 4},
        "4 KV heads, tied, sliding windows": {
            "num_key_value_heads": 4, "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 16,
        },
    },
    "qwen3_moe": {"some layers dense": {"decoder_sparse_step": 2, "mlp_only_layers": [1]}},
    "stablelm": {"parallel, norms on queries and keys": {"use_parallel_residual": True, "qk_layernorm": True}},
    "starcoder2": {"multi-head, no biases": {"num_key_value_heads": 24, "use_bias": False}},
}  # fmt: skip
"""Type → what else it may be → how that configuration differs from the default one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to run again; whatever has no result yet otherwise")
    parser.add_argument("--render", action="store_true", help="write the page from the results and stop")
    parser.add_argument(
        "--time-limit",
        type=int,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="for each configuration (default: %(default)s)",
    )
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    prepare()
    if not options.render:
        run(options.types, options.time_limit)
    PAGE.write_text(render(read()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")


def all_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


Case = tuple[str, str]
"""A model type, and the name of a variant of it; empty for the default configuration."""


def all_cases(types: Iterable[str]) -> list[Case]:
    return [(model_type, variant) for model_type in types for variant in ("", *variants_of(model_type))]


def variants_of(model_type: str) -> dict[str, dict[str, Any]]:
    """Name → options of the variants of a type, two where its configuration class has flags for as many."""
    named = VARIANTS.get(model_type, {})
    return named if len(named) >= 2 else {**dict(list(other_flags(model_type).items())[: 2 - len(named)]), **named}


def other_flags(model_type: str) -> dict[str, dict[str, Any]]:
    """Variants by the flags of the configuration class: other numbers of KV heads, and other biases, ties, norms on
    queries and keys, soft caps, shared experts."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type](**INCOMPLETE.get(model_type, {}))
    except Exception:  # a class that refuses its own defaults has no variants; `examine` gives the reason
        return {}
    stated = vars(config)
    heads, shared = stated.get("num_attention_heads"), stated.get("num_key_value_heads")
    found: dict[str, dict[str, Any]] = {}
    if type(heads) is int and type(shared) is int:
        numbers = {"one KV head": 1, "grouped KV heads": heads // 4 if heads % 4 == 0 else 1, "multi-head": heads}
        other = {name: n for name, n in numbers.items() if n != shared and 0 < n <= heads}
        found = {name: {"num_key_value_heads": n} for name, n in list(other.items())[:1]}
    flags = {name: not stated[name] for name in FLAGS if type(stated.get(name)) is bool}
    caps = {name: 30.0 for name in CAPS if name in stated and stated[name] is None}
    if flags or caps:
        found["other " + ", ".join(FLAGS.get(name) or CAPS[name] for name in (*flags, *caps))] = {**flags, **caps}
    return found


FLAGS = {
    "attention_bias": "attention biases", "use_bias": "biases", "mlp_bias": "MLP biases",
    "tie_word_embeddings": "tie", "use_qk_norm": "norms on queries and keys",
    "qk_layernorm": "norms on queries and keys", "parallel_attn": "order of attention and MLP",
    "use_parallel_residual": "order of attention and MLP", "attention_k_eq_v": "keys as values",
}  # fmt: skip
CAPS = {"attn_logit_softcapping": "soft cap of attention", "final_logit_softcapping": "soft cap of logits"}
"""Options of configuration classes that change the structure, and what a variant is called by them."""


def examine(model_type: str, variant: str) -> dict[str, Any]:
    """Build, run, discover and verify one configuration; what stops it is the result."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from llmpruner.discovery.tiny import random_instance
    from llmpruner.discovery.verify import representative, verify
    from llmpruner.errors import UnsupportedModelError, first_line

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    result: dict[str, Any] = {"type": model_type, "variant": variant, "stage": "build"}
    options = {**INCOMPLETE.get(model_type, {}), **(variants_of(model_type)[variant] if variant else {})}
    started = time.monotonic()
    try:
        small = representative(CONFIG_MAPPING[model_type](**options))
        model = random_instance(small)
        result["parameters"] = model.num_parameters()
        result["has"] = [kind for kind, pattern in PARTS.items() if has_part(model, pattern)]
        result["stage"] = "trace"
        verdicts = verify(None, small, shrink=False)
    except UnsupportedModelError as error:
        result["reason"] = str(error)
    except Exception as error:
        result["reason"] = f"the class cannot be used: {first_line(error)} ({type(error).__name__})"
    else:
        result["stage"] = "verified"
        result["verdicts"] = [
            {
                "kind": v.kind,
                "groups": v.groups,
                "units": v.units,
                "verdict": v.verdict,
                "difference": v.difference if v.difference < 1e30 else None,
                "where": v.where,
                "reason": v.reason,
                "checks": list(v.checks),
                "skipped": list(v.skipped),
                "follows": [str(f) for f in v.follows],
            }
            for v in verdicts
        ]
        result["blocked"] = blocked(small)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def has_part(model: Any, pattern: re.Pattern[str]) -> bool:
    """Norms are left out: they are called after what comes before or after them, also where it is of another kind."""
    names = (f"{path} {type(module).__name__}" for path, module in model.named_modules())
    return any(pattern.search(name) for name in names if "norm" not in name.rpartition(".")[2].lower())


def blocked(config: Any) -> list[list[Any]]:
    """Axes of the first layers that are not offered, with reasons."""
    from llmpruner.discovery.groups import discover_graph

    return [[b.parameter, b.axis, b.reason] for b in discover_graph(config).blocked][:40]


def run(types: list[str], time_limit: int) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = read()
    todo = all_cases(types) or [case for case in all_cases(all_types()) if case not in results]
    lock = Lock()

    def one(case: Case) -> None:
        found = in_child(examine, case, seconds=time_limit)
        result = {"type": case[0], "variant": case[1], **found, "time_limit": time_limit}
        with lock:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            kinds = {v["kind"]: v["verdict"] for v in result.get("verdicts", [])}
            print(f"{label(result)}: {kinds or result.get('reason', '')[:120]}", flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, todo))


def read() -> dict[Case, dict[str, Any]]:
    """The latest result of every configuration."""
    if not RESULTS.is_file():
        return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {(r["type"], r.get("variant", "")): r for r in map(json.loads, lines)}


def label(result: Mapping[str, Any]) -> str:
    variant = result.get("variant")
    return f"{result['type']} ({variant})" if variant else str(result["type"])


def limits(results: Iterable[Mapping[str, Any]]) -> str:
    """The limits of time under which ``results`` came; those that do not say it had the default one."""
    used = sorted({r.get("time_limit", TIME_LIMIT) for r in results} or {TIME_LIMIT})
    return " to ".join(str(limit) for limit in dict.fromkeys((used[0], used[-1])))


def counted(results: Iterable[Mapping[str, Any]], kind: str) -> tuple[int, int]:
    """(types in which the kind is verified, types that have it)."""
    has = [r for r in results if kind in r.get("has", []) or kind in verdicts(r)]
    return sum(verdicts(r).get(kind, {}).get("verdict") == "verified" for r in has), len(has)


def is_verified(result: Mapping[str, Any]) -> bool:
    return all(verdicts(result).get(kind, {}).get("verdict") == "verified" for kind in PARTS)


def verdicts(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {v["kind"]: v for v in result.get("verdicts", [])}


def render(results: Mapping[Case, Mapping[str, Any]]) -> str:
    import torch
    import transformers

    known = [results[t, ""] for t in all_types() if (t, "") in results]
    variants = [results[case] for case in all_cases(all_types()) if case[1] and case in results]
    runnable = [r for r in known if "has" in r]
    everything = [r for r in (*known, *variants) if "has" in r]
    silent = [v for r in everything for v in r.get("verdicts", []) if v["verdict"] == "failed"]
    lines = [
        "# Support matrix",
        "",
        "<!-- Written by benchmarks/support_matrix.py; do not edit. -->",
        "",
        f"Every causal language model type that transformers {transformers.__version__} knows ({len(all_types())}), "
        f"with torch {torch.__version__.split('+')[0]} and Python {platform.python_version()}: a small random "
        "instance of its default configuration goes through discovery and the oracle, without code for the type, "
        f"within {limits(known)} s.",
        "",
        "*Verified* means that the oracle ran and agreed: uneven and even random cuts equal the silenced model in "
        "eager attention and in the fused kernels the class has, generation with a cache equals generation without "
        "where the silenced model's does, and the saved checkpoint loads and gives the same logits. *Refused* means "
        "that the kind is found, and the cut model cannot run, be saved, or prove anything. *Failed* means that a "
        "cut model runs and silently disagrees. *Partly* means that the kind is verified in the default configuration "
        "and not in every variant. — means that discovery offers no such units. Which criteria, compensations and "
        "exports run on a type, and the form of its checkpoints: [what runs](support-commands.md).",
        "",
        f"- {len(known)} of {len(all_types())} types tried, {len(runnable)} of them can be built and run on a CPU.",
    ]
    for kind in KINDS:
        good, of = counted(runnable, kind)
        if of:
            whose = "that have them" if kind in PARTS else "in which they are found"
            lines.append(f"- {kind}: verified in {good} of {of} types {whose} ({good / of:.1%}).")
    required = [
        t
        for t in REQUIRED
        if any(verdicts(results.get((t, ""), {})).get(k, {}).get("verdict") != "verified" for k in PARTS)
    ]
    lines += [
        f"- Silent failures: {len(silent)}.",
        f"- Of {len(REQUIRED)} widely used types, those without verified MLP channels and attention: "
        f"{', '.join(required) or 'none'}.",
        "",
        *table(runnable, variants),
        "",
        "## Variants",
        "",
        f"Other configurations of types whose options change the structure ({sum(map(is_verified, variants))} of "
        f"{len(variants)} with verified MLP channels and attention).",
        "",
        *table(r for r in variants if "has" in r),
        "",
        "## Why not",
        "",
        "Kinds that are found and not verified, with the reason.",
        "",
        "| type | kind | reason |",
        "|---|---|---|",
        *(line for r in everything for line in reasons(r)),
        "",
        "## Not counted",
        "",
        "Types whose small instance cannot be built or run on a CPU here.",
        "",
        "| type | reason |",
        "|---|---|",
        *(f"| {label(r)} | {plain(r.get('reason', ''))} |" for r in (*known, *variants) if "has" not in r),
        "",
        "## What follows a cut",
        "",
        "Attributes and arguments that the oracle found must follow; `*` is the number of the layer.",
        "",
        *(f"- `{what}` ({kind}): {', '.join(types)}" for (what, kind), types in follows(everything).items()),
        "",
    ]
    return "\n".join(lines)


def table(results: Iterable[Mapping[str, Any]], variants: Iterable[Mapping[str, Any]] = ()) -> list[str]:
    head = [
        "| type | " + " | ".join(KINDS) + " | variants | largest difference |",
        "|---|" + "---|" * (len(KINDS) + 2),
    ]
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for variant in variants:
        if "has" in variant:
            by_type.setdefault(variant["type"], []).append(variant)
    return [*head, *(row(result, by_type.get(result["type"], [])) for result in results)]


def row(result: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    found = verdicts(result)
    cells = [cell(found[k]["verdict"], k, variants) if k in found else "—" for k in KINDS]
    cells.append(f"{sum(map(is_verified, variants))} of {len(variants)}" if variants else "")
    differences = [
        v["difference"] for v in found.values() if v["verdict"] == "verified" and v["difference"] is not None
    ]
    return f"| {label(result)} | {' | '.join(cells)} | {f'{max(differences):.0e}' if differences else ''} |"


def cell(verdict: str, kind: str, variants: Iterable[Mapping[str, Any]]) -> str:
    """The verdict of the default configuration; *partly* where that of a variant is worse, or it was not traced."""
    others = [
        verdicts(v)[kind]["verdict"] if kind in verdicts(v) else None
        for v in variants
        if kind in verdicts(v) or (kind in v["has"] and "verdicts" not in v)
    ]
    return "partly" if verdict == "verified" and any(other != "verified" for other in others) else verdict


def reasons(result: Mapping[str, Any]) -> list[str]:
    found = verdicts(result)
    lines = [
        f"| {label(result)} | {v['kind']} | {v['verdict']}: {plain(v['reason'])}{where(v)} |"
        for v in found.values()
        if v["verdict"] != "verified"
    ]
    for kind in result["has"]:
        if kind not in found:
            why = result.get("reason") or why_blocked(result, PARTS[kind])
            lines.append(f"| {label(result)} | {kind} | not found: {plain(why)} |")
    return lines


def where(verdict: Mapping[str, Any]) -> str:
    return f" (first at {verdict['where']})" if verdict["where"] else ""


def why_blocked(result: Mapping[str, Any], part: re.Pattern[str]) -> str:
    """The commonest reason among the blocked axes of this part, other than norms over the residual stream."""
    own = Counter(
        reason for name, _, reason in result.get("blocked", []) if part.search(name) and "LayerNorm" not in reason
    )
    return own.most_common(1)[0][0] if own else "no unit of this kind"


def follows(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for kind, verdict in verdicts(result).items():
            for what in verdict["follows"]:
                found.setdefault((what, kind), []).append(label(result))
    return dict(sorted(found.items()))


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+|/\S+/", "", text)).replace("|", "\\|").strip()


if __name__ == "__main__":
    main()
