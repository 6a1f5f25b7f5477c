"""Removing experts: which criteria work on which mixtures of experts, and which choose best.

    python -m benchmarks.experts                    all verified types, then the trained mixture; restartable
    python -m benchmarks.experts mixtral olmoe      these types again
    LLMPRUNER_DATA=… python -m benchmarks.experts --trained    the trained mixture again
    python -m benchmarks.experts --render           only write the tables again

*Types*: for each type whose experts the support matrix verifies, a small random instance loses a quarter of its experts
by each criterion, and a process that knows nothing of llmpruner loads each result with plain transformers and
generates. *Trained*: a small mixture learns WikiText-2 byte by byte and loses experts by each criterion, without any
training afterwards. Writes ``benchmarks/results/experts.json`` and the tables of ``docs/criteria-measured.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .measure import as_json, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experts.json"
PAGE = ROOT / "docs" / "criteria-measured.md"
CRITERIA = ("expert-reap", "expert-norm", "expert-contribution", "expert-frequency", "energy", "l2", "random")
OF_TRAINED = (*CRITERIA[:-2], "fisher", *CRITERIA[-2:])
SHARE = 0.25
TIME_LIMIT = 1500

_PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
assert not any(name.startswith("llmpruner") for name in sys.modules)
found = {}
for folder in sys.argv[2:]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        wrong = {key: sorted(map(str, value))[:1] for key, value in info.items() if value}
        if wrong:
            raise ValueError(f"loads with {wrong}")
        model.eval()
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        if written.shape[1] <= 16 or not torch.isfinite(logits).all():
            raise ValueError("generates nothing, or logits that are no numbers")
        torch.save(logits, folder + "/logits.pt")
        found[folder] = ""
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}".splitlines()[0]
json.dump(found, open(sys.argv[1], "w"))
"""
"""Argument 1: the file to write; the others: folders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to run again")
    parser.add_argument("--trained", action="store_true", help="only the trained mixture, again")
    parser.add_argument("--render", action="store_true", help="write the tables from the results and stop")
    parser.add_argument("--one", metavar="TYPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(examine(options.one)))
        return
    results = read()
    if not options.render:
        for model_type in [] if options.trained else options.types or verified():
            if options.types or model_type not in results["types"]:
                results["types"][model_type] = in_process(model_type)
                print(model_type, results["types"][model_type], file=sys.stderr, flush=True)
                write(results)
        if options.trained or not (options.types or results.get("trained")):
            from .experts_trained import measure

            results["trained"] = measure(OF_TRAINED)
            write(results)
    render(results)


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"types": {}}


def write(results: dict[str, Any]) -> None:
    results["machine"], results["share"] = machine(), SHARE
    results["types"] = dict(sorted(results["types"].items()))
    RESULTS.write_text(as_json(results), encoding="utf-8")


def verified() -> list[str]:
    """The types whose experts the support matrix verifies."""
    from .support_matrix import read as support

    rows = {model_type: row for (model_type, variant), row in support().items() if not variant}
    return sorted(
        model_type
        for model_type, row in rows.items()
        if any(v["kind"] == "expert" and v["verdict"] == "verified" for v in row.get("verdicts", ()))
    )


def in_process(model_type: str) -> dict[str, Any]:
    """`examine` in a process of its own, which may crash or take too long."""
    command = [sys.executable, "-m", "benchmarks.experts", "--one", model_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"not finished within {TIME_LIMIT} s"}
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def examine(model_type: str) -> dict[str, Any]:
    """Prune a small random instance of a type by each criterion. ``criteria``: name → what stopped it, empty where the
    result works."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    import llmpruner
    from llmpruner.discovery.tiny import random_instance, small_config
    from llmpruner.errors import LlmprunerError

    from .support_matrix import INCOMPLETE

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = small_config(CONFIG_MAPPING[model_type](**INCOMPLETE.get(model_type, {})))
    with tempfile.TemporaryDirectory() as work:
        dense = Path(work) / "dense"
        random_instance(config).save_pretrained(dense)
        structure = llmpruner.discover(dense)
        groups = structure.graph.of_kinds(["expert"])
        found: dict[str, Any] = {"layers": len(groups), "experts": sorted({g.units for g in groups}), "criteria": {}}
        logits: dict[str, torch.Tensor] = {}
        for name in CRITERIA:
            output = Path(work) / name
            text = {} if name in ("l2", "random") else {"samples": 4, "length": 32}
            try:
                pruned = llmpruner.prune(
                    structure, unit_ratio=SHARE, kinds="expert", layers="all", importance=name, output=output, **text
                )
            except LlmprunerError as error:
                found["criteria"][name] = str(error)
                continue
            kept = sorted({pruned.graph.by_name[g.name].units for g in groups})
            if found.setdefault("kept", kept) != kept or found.setdefault("form", pruned.form) != pruned.form:
                found["criteria"][name] = f"keeps {kept} experts as {pruned.form}"
                continue
            with torch.no_grad():
                logits[str(output)] = pruned.model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
        report = Path(work) / "plain.json"
        if logits:
            subprocess.run([sys.executable, "-c", _PLAIN, str(report), *logits], check=True, capture_output=True)
        for folder, problem in (json.loads(report.read_text()) if logits else {}).items():
            found["criteria"][Path(folder).name] = problem
            if not problem:
                plain = torch.load(Path(folder) / "logits.pt")
                if (plain - logits[folder]).norm() > 1e-4 * plain.norm():
                    found["criteria"][Path(folder).name] = "other logits in plain transformers"
    return found


def types_table(types: Mapping[str, Any]) -> str:
    """Which types work by which criteria."""
    lines = ["| type | experts in a layer | left | works with | does not |", "|---|---|---|---|---|"]
    for model_type, found in types.items():
        criteria: Mapping[str, str] = found.get("criteria", {})
        works = [name for name in CRITERIA if criteria.get(name) == ""]
        fails = {name: criteria[name] for name in CRITERIA if criteria.get(name)}
        if found.get("form") == "shim":
            fails = dict.fromkeys(
                fails, "no configuration of transformers describes the result, which brings its own code"
            )
        reasons = [f"{', '.join(n for n in fails if fails[n] == why)}: {why}" for why in dict.fromkeys(fails.values())]
        reasons += [found["reason"]] if "reason" in found else []
        shown = "all" if len(works) == len(CRITERIA) else ", ".join(f"`{name}`" for name in works) or "none"
        counts = [", ".join(map(str, found.get(key, ()))) for key in ("experts", "kept")]
        lines.append(f"| {model_type} | {' | '.join(counts)} | {shown} | {'; '.join(reasons)} |")
    good = sum(all(f.get("criteria", {}).get(name) == "" for name in CRITERIA) for f in types.values())
    left = [model_type for model_type in verified() if model_type not in types]
    text = f"{good} of {len(types)} types that were tried work with all of {len(CRITERIA)} criteria."
    text += f" Not tried yet: {', '.join(left)}." if left else ""
    return text + "\n\n" + "\n".join(lines)


TRAINED = """
A mixture of experts (OLMoE's architecture: 4 layers, hidden size 64, 16 experts of 48 channels, of which 4 are chosen
for each token) is trained in the same way, with the usual loss for balance. The same share of the experts of every
layer is then removed by each criterion, without any training afterwards. The table gives the rise of the loss (nats per
byte) on held-out text of the calibration's kind, and on other text (Python's help topics): mean and standard deviation
over three calibration sets. The second column is the rank correlation with the rise when one expert alone is removed,
within a layer.
"""


def trained_section(trained: Mapping[str, Any]) -> str:
    """The rise of the loss by criterion and share; empty where it was not measured."""
    if not trained:
        return ""
    shares = list(next(iter(trained["rises"].values())))
    head = ["criterion", "ρ with the truth, within a layer", *shares]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rises in trained["rises"].items():
        rho = trained["spearman"][name]
        cells = [f"{rho['mean']:.2f} ± {rho['spread']:.2f}"]
        cells += [f"{rises[share]['mean']:+.3f} ± {rises[share]['spread']:.3f}" for share in shares]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n### Which criterion chooses best\n" + TRAINED + "\n" + "\n".join(lines) + "\n"


def render(results: Mapping[str, Any]) -> None:
    """Put the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (
        ("types", types_table(results["types"])),
        ("trained", trained_section(results.get("trained", {}))),
    ):
        begin, end = f"<!-- experts-{name}:begin -->", f"<!-- experts-{name}:end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
