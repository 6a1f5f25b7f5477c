"""What runs on each model type: every criterion, every compensation, the form of the result, every exporter.

    python -m benchmarks.type_commands                  all types with verified MLP channels or heads; restartable
    python -m benchmarks.type_commands llama gpt2       these types again

A small random instance of the default configuration of each type, in a process of its own with limits on time and
memory, loses a fifth of its MLP channels (of its heads, where it has none) by each criterion and with each
compensation; what comes out must have fewer parameters and finite logits. It is saved with equal widths in all layers
and with different ones, which gives the form of the checkpoint, and exported. Criteria of experts are measured by
`benchmarks.experts`. Results are lines of ``results/type_commands.jsonl``, drawn as ``docs/support-commands.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from .child_process import in_child, prepare
from .support_matrix import INCOMPLETE, plain, read, verdicts

RESULTS = Path(__file__).parent / "results" / "type_commands.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "support-commands.md"
TIME_LIMIT, WORKERS = 900, 2
SHARE = 0.2
SHAPES = ("uniform", "free")
REFUSED = "refused: "
LAYER_SHARE = 0.34
"""Of the layers, of which a small instance has three or four."""
EXPORTERS = ("stock", "nemotron-nas", "gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types (default: those that are not measured yet)")
    parser.add_argument("--workers", type=int, default=WORKERS, help="types at once (default: %(default)s)")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    prepare()
    verified = [
        model_type
        for (model_type, variant), result in read().items()
        if not variant and any(verdicts(result).get(k, {}).get("verdict") == "verified" for k in ("mlp", "attention"))
    ]
    done, lock = measured(), Lock()

    def one(model_type: str) -> None:
        started = time.monotonic()
        found = in_child(examine, (model_type,), seconds=TIME_LIMIT)
        result = {"type": model_type, **found, "seconds": round(time.monotonic() - started, 1)}
        with lock:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{model_type}: {summary(result)} ({result['seconds']} s)", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, options.types or [t for t in sorted(verified) if t not in done]))
    PAGE.write_text(page(), encoding="utf-8")


def measured() -> dict[str, dict[str, Any]]:
    """The latest result of every type."""
    if not RESULTS.is_file():
        return {}
    return {r["type"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}


def examine(model_type: str) -> dict[str, Any]:
    """For each criterion, compensation and exporter an empty string, or why it does not run; for each of `SHAPES` the
    form of the checkpoint, or why there is none."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from llmpruner import Catalog, LoadSettings, ModelError, Signal, api, load_pruned, plugin_manager
    from llmpruner.discovery.tiny import random_instance
    from llmpruner.discovery.verify import logits, representative
    from llmpruner.exporters.gguf.plan import plan_of
    from llmpruner.testing.tiny import letters

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    catalog, of_layers = Catalog(plugin_manager()), {Signal.STREAM, Signal.STREAM_BLOCKS}
    tokens = torch.arange(20, 40).reshape(2, 10)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = random_instance(representative(CONFIG_MAPPING[model_type](**INCOMPLETE.get(model_type, {}))))
        dense.save_pretrained(work / "dense")
        letters().save_pretrained(work / "dense")
        # Text that the model writes would need generation, which some tiny instances do not have.
        (work / "text.txt").write_text(" ".join("abcdefghijklmnopqrstuvwxyz"[n * n % 26] for n in range(400)))
        text = {"calibration": str(work / "text.txt"), "samples": 4, "length": 16}
        before = dense.num_parameters()
        kinds = {group.kind for group in api.discover(work / "dense", catalog=catalog).graph.groups}
        units = "mlp" if "mlp" in kinds else "attention"

        def cut(criterion: str, compensation: str, *, shape: str = "free", **options: Any) -> api.Model:
            signals = catalog.create(catalog.criteria, criterion, {}).signals
            kind = "layer" if signals & of_layers else "hidden" if criterion == "pca" else units
            reads = signals - {Signal.WEIGHT} or catalog.compensations[compensation].reads_text
            pruned = api.prune(
                work / "dense", kinds=kind, unit_ratio=LAYER_SHARE if kind == "layer" else SHARE, importance=criterion,
                compensate=compensation, catalog=catalog, load=LoadSettings(dtype="float32"),
                **({} if kind == "layer" else {"shape": shape}), **(text if reads else {}),
                **options,
            )  # fmt: skip
            if pruned.model.num_parameters() >= before:
                raise ModelError("nothing is removed")
            if not logits(pruned.model, tokens).isfinite().all():
                raise ModelError("the logits are not finite")
            return pruned

        def form(shape: str) -> str:
            # Cutting the first layer alone gives different widths.
            options = {} if shape == "uniform" else {"layers": "0"}
            return api.save(cut("l2", "none", shape=shape, **options), work / shape)

        def exported(name: str) -> None:
            source = next((work / shape for shape in SHAPES if (work / shape).is_dir()), None)
            if source is None:
                raise ModelError("no checkpoint was written")
            if name == "gguf":
                plan_of(load_pruned(source))
            else:
                api.export(source, to=name, output=work / f"as-{name}", catalog=catalog)

        criteria = {name: why_not(cut, name, "none") for name, one in catalog.criteria.items() if one.kinds is None}
        fits = {name: why_not(cut, "l2", name) for name in catalog.compensations if name != "none"}
        forms = {shape: why_not(form, shape, value=True) for shape in SHAPES}
        exports = {name: why_not(exported, name) for name in EXPORTERS}
    return {"type": model_type, "units": units, "criteria": criteria, "compensations": fits, "forms": forms,
            "exports": exports}  # fmt: skip


def why_not(run: Callable[..., Any], *arguments: str, value: bool = False) -> str:
    """The first line of the error that ends ``run``; otherwise an empty string, or with ``value`` what it returns."""
    from llmpruner.errors import LlmprunerError, first_line

    try:
        found = run(*arguments)
    except LlmprunerError as error:
        return REFUSED + first_line(error)
    except Exception as error:
        return f"{REFUSED}{type(error).__name__}: {first_line(error)}"
    return str(found) if value else ""


def summary(result: Mapping[str, Any]) -> str:
    if "reason" in result:
        return str(result["reason"])
    return ", ".join(
        f"{name} {sum(not why.startswith(REFUSED) for why in result[name].values())}/{len(result[name])}"
        for name in ("criteria", "compensations", "forms", "exports")
    )


def page() -> str:
    """``docs/support-commands.md``: a table, and the reasons of what does not run."""
    found = [one for _, one in sorted(measured().items())]
    run = [one for one in found if "reason" not in one]
    criteria, fits = (list(run[0][name]) for name in ("criteria", "compensations"))
    lines = [
        "# Support matrix: what runs",
        "",
        "<!-- Written by benchmarks/type_commands.py; do not edit. -->",
        "",
        f"For {len(found)} of the types of the [support matrix](support-matrix.md) with verified MLP channels or "
        "heads, others were not tried yet: a fifth of the MLP channels (of the heads, where it has no MLP) of a small "
        "random instance is removed. *Criteria*: of "
        f"{code(criteria)}, how many give a smaller model with finite logits (criteria of experts are in "
        "[Criteria, measured](criteria-measured.md)). *Compensations*: the same for "
        f"{code(fits)}. *Form*: of the saved checkpoint, with equal widths in all layers and with different ones: "
        "stock, which transformers alone loads, or shim, which has a modeling file. *Exports*: of the checkpoint with "
        "equal widths; for GGUF, whether the exporter writes the architecture, without writing a file.",
        "",
        "| type | units | criteria | compensations | form, equal widths | form, different widths | exports |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in run:
        cells = [
            counted(one["criteria"]), counted(one["compensations"]), *map(form_cell, one["forms"].values()),
            ", ".join(name for name, why in one["exports"].items() if not why) or "none",
        ]  # fmt: skip
        lines.append(f"| {one['type']} | {one['units']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## What does not run",
        "",
        "`pca` removes hidden channels, which is not exact where layer norms run over them; `bias` needs biases; "
        "`nemotron-nas` has LLaMA's layers alone, and the exporter `gguf` writes few architectures "
        "([Deploy](how-to/deploy.md)). Other reasons:",
        "",
        "| type | what | reason |",
        "|---|---|---|",
    ]
    for one in found:
        by_reason: dict[str, list[str]] = {plain(one["reason"]): ["all"]} if "reason" in one else {}
        for part in ("criteria", "compensations", "forms", "exports"):
            for name, why in one.get(part, {}).items():
                if why.startswith(REFUSED) and name not in ("pca", "bias", "nemotron-nas", "gguf"):
                    by_reason.setdefault(plain(why.removeprefix(REFUSED)), []).append(name)
        lines += [f"| {one['type']} | {', '.join(names)} | {why} |" for why, names in by_reason.items()]
    return "\n".join([*lines, ""])


def counted(found: Mapping[str, str]) -> str:
    good = sum(not why for why in found.values())
    return f"all {good}" if good == len(found) else f"{good} of {len(found)}"


def form_cell(value: str) -> str:
    return "refused" if value.startswith(REFUSED) else value


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
