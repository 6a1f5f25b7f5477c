"""Every setting of every command, once: name, type, default, bounds, help.

Command-line options, keywords of the Python API (`llmpruner.keywords`), what plans and records keep, and the reference
pages derive from these models. Names of components (criteria, budgets …) are checked where the catalog is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import SettingsError
from .values import (
    ComponentValues,
    Count,
    Layers,
    Names,
    Numbers,
    ShareOrCount,
    Size,
    StepName,
    Text,
    refusal,
)

DEMO = "demo"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Reduction = Literal["sum", "mean", "max", "prod", "last"]
LossOn = Literal["all", "answers"]
Shape = Literal["uniform", "free"]
Meet = Literal["nearest", "above", "below"]

_MACHINE = "Memory and time"
_WHAT, _HOW, _ON = "How much", "How to choose", "Calibration"
_TRAINING = "Training"
"""Sections of ``--help``."""


@dataclass(frozen=True)
class Option:
    """The command-line option of a field. ``flags``: its names, by default derived from the field's. ``panel``: its
    section in ``--help``. ``metavar``: the placeholder of its value. ``advanced``: no option of its own, but
    ``--set GROUP.field=value`` with the `Settings.group` of the settings."""

    panel: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    advanced: bool = False


class Settings(BaseModel):
    """Frozen; an unknown name is an error. `model_fields_set` holds the fields that the user gave."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    group: ClassVar[str] = ""
    """What ``--set`` calls these settings; empty where all of them have an option."""

    def given(self) -> dict[str, Any]:
        """The fields that the user gave, as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


S = TypeVar("S", bound=Settings)


def settings_from(model: type[S], values: Mapping[str, Any]) -> S:
    """An instance of ``model``. Raises `SettingsError`, in one line that names the option, what was given and what was
    expected."""
    try:
        return model(**values)
    except ValidationError as error:
        refused = refusal(error)
        name = refused.key.partition(".")[0]
        if refused.kind == "extra_forbidden":
            raise SettingsError(f"unknown setting '{name}'; known: {', '.join(model.model_fields)}") from error
        if refused.kind == "missing":
            raise SettingsError(f"{flag_of(model, name)} must be given") from error
        raise SettingsError(f"{flag_of(model, name)} {refused.value}: {refused.expected}") from error


def option_of(model: type[Settings], name: str) -> Option:
    """The `Option` of a field; an empty one where it declares none."""
    return next((data for data in model.model_fields[name].metadata if isinstance(data, Option)), Option())


def flag_of(model: type[Settings], name: str) -> str:
    """``--target-params`` for ``target_params``; ``--set prune.length`` for one without an option of its own."""
    if name not in model.model_fields:
        return name
    if option_of(model, name).advanced:
        return f"--set {model.group}.{name}"
    return next((f for f in option_of(model, name).flags if f.startswith("--")), "--" + name.replace("_", "-"))


Seed = Annotated[int, Field(ge=0, le=2**32 - 1, description="Same seed, same inputs: same result.")]
Set = Annotated[
    ComponentValues,
    Field(
        description="A setting of a chosen component: NAME.key=value (`llmpruner plugins NAME` lists them), or of the "
        "command where it has no option of its own, as in prune.length=256. Repeatable."
    ),
    Option(flags=("--set",), metavar="NAME.key=value"),
]


class LoadSettings(Settings):
    """How a model is opened."""

    family: Annotated[
        str | None,
        Field(description="Model family; by default the one that matches, else structure is discovered."),
    ] = None
    dtype: Annotated[
        Dtype,
        Field(
            description=f"Weights in memory: {', '.join(get_args(Dtype))}. auto: as stored, but float16 becomes "
            "float32 on a CPU."
        ),
    ] = "auto"
    device: Annotated[str, Field(description="cpu, cuda, cuda:1, mps …")] = "cpu"
    revision: Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")] = None
    trust_remote_code: Annotated[bool, Field(description="Run model code that is part of a checkpoint.")] = False


class RunSettings(Settings):
    """How a long command runs. The result does not depend on it."""

    max_memory: Annotated[
        Annotated[Size, Field(gt=0)] | None,
        Field(
            description="Memory that the command may take: 4GiB, 500MB. A model that does not fit is read from its "
            "files layer by layer and, if need be, hidden states are kept in a file. What cannot fit is refused "
            "beforehand. By default, models larger than half of the free memory are read layer by layer."
        ),
        Option(_MACHINE, metavar="SIZE"),
    ] = None
    restart: Annotated[
        bool,
        Field(description="Start anew instead of continuing an interrupted run of the same command."),
        Option(_MACHINE),
    ] = False


class PruneSettings(Settings):
    """What to remove, how to choose it, and how to compensate for it."""

    group: ClassVar[str] = "prune"

    ratio: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Share of the --budget to remove; the nearest that widths allow."),
        Option(_WHAT),
    ] = None
    budget: Annotated[
        str,
        Field(
            description="What --ratio is a share of: decoder (its parameters), parameters (all of them), bytes (of all "
            "weights), macs (multiply-accumulate operations per token) or kv-cache (its bytes per token). Units of all "
            "--kinds are compared by it; those that save none of it are kept."
        ),
        Option(_WHAT),
    ] = "decoder"
    target_params: Annotated[
        Annotated[Count, Field(gt=0)] | None,
        Field(description="Total parameters that remain: 5.4B, 120M, 98000000."),
        Option(advanced=True),
    ] = None
    unit_ratio: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Share of the units of every selected group to remove, as the paper counts (its 0.25 on layers "
            "4-29 of LLaMA-7B removes 20 % of the parameters).",
        ),
        Option(advanced=True),
    ] = None
    kinds: Annotated[
        Names,
        Field(
            description="What may be removed, comma-separated. mlp: MLP channels; attention: KV heads with query heads "
            "(both together are the paper's block-wise pruning); query: query heads inside KV groups; hidden: channels "
            "of the residual stream (the paper's channel-wise pruning); layer: whole layers; expert: experts of a "
            "mixture of experts; latent: channels of a compressed KV cache. `llmpruner discover` lists a model's."
        ),
        Option(_WHAT),
    ] = ("mlp",)
    layers: Annotated[
        Layers | None,
        Field(
            description="Layers that may lose units: 3-26, 0,5,7-9 or all. By default all with --shape uniform; with "
            "free, and for whole layers, all but both ends (the first and last 10 %, as the paper protects the ends of "
            "LLaMA, or what the family says)."
        ),
        Option(advanced=True),
    ] = None
    shape: Annotated[
        Shape,
        Field(
            description="uniform: all layers keep the same widths, in multiples that suit kernels, so that the result "
            "is an ordinary model for every runtime; free: every layer keeps its own number of units, which --method "
            "llm-pruner sets."
        ),
        Option(_WHAT),
    ] = "uniform"
    round_to: Annotated[
        int | None,
        Field(
            ge=1,
            description="Kept widths are multiples of this. By default 64 with --shape uniform (32 where hidden states "
            "have fewer than 1,024 channels, and a sixteenth of them or less below 512), halved for a group until it "
            "has at least 8 such multiples; else 1.",
        ),
        Option(advanced=True),
    ] = None
    method: Annotated[
        str | None,
        Field(
            description="Defaults of the options below. best (the default): units chosen by gradients on 32,768 "
            "tokens, weights compensated by least squares; fast: fewer samples, no compensation; llm-pruner: the "
            "paper's, first-order Taylor on ten samples, no compensation, --shape free."
        ),
        Option(_HOW),
    ] = None
    importance: Annotated[
        str | None,
        Field(
            description="Criterion: random, l1, l2, taylor, fisher, energy, wanda-sp, flap, activation, pca, obs; "
            "angular, angular-block and block-influence for layers; expert-reap and others for experts; or one that a "
            "plugin adds (see `llmpruner plugins`). Without --method: on ten samples, without compensation."
        ),
        Option(_HOW),
    ] = None
    reduction: Annotated[
        Reduction,
        Field(
            description="How the scores of a unit's parameters are combined to one score: "
            f"{', '.join(get_args(Reduction))}. prod is the geometric mean, which has the order of the product."
        ),
        Option(advanced=True),
    ] = "sum"
    allocation: Annotated[
        str,
        Field(
            description="uniform: equal shares per layer and kind; global: one ranking over all units, whose scores "
            "--set global.normalize=… makes comparable; sensitivity: by the divergence from the dense model that cuts "
            "of each group cause alone."
        ),
        Option(advanced=True),
    ] = "uniform"
    steps: Annotated[
        int,
        Field(ge=1, le=1000, description="Remove in this many steps, with new scores after each."),
        Option(_HOW),
    ] = 1
    compensate: Annotated[
        str | None,
        Field(
            description="refit: fit the weights that read removed units again, by least squares against the dense "
            "model; bias: only their biases; none."
        ),
        Option(advanced=True),
    ] = None
    calibration: Annotated[
        Text,
        Field(
            description="Text to measure and fit on: self (the model generates it), a .txt, .json, .jsonl or .parquet "
            "file with a text, page or content field, a data set (name:config:split), or chat:FILE for "
            "conversations in the model's chat format; several, with commas between them, are mixed in equal parts, or "
            "in shares as in 3*self,1*chat:FILE."
        ),
        Option(_ON),
    ] = "self"
    samples: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_000_000,
            description="Calibration samples: for best 256 that the model generates, or 320 of a file; 64 for fast, "
            "else 10.",
        ),
        Option(_ON),
    ] = None
    length: Annotated[
        int | None,
        Field(
            ge=2,
            le=2**20,
            description="Tokens per sample: 512 for best, 128 for fast, else 64; no more than the model can read.",
        ),
        Option(advanced=True),
    ] = None
    seed: Annotated[Seed, Option(advanced=True)] = 0
    settings: Set = {}


class RecoverSettings(Settings):
    """A training that restores quality after a cut; the passes over the data, the learning rate and the settings of
    adapters are the paper's by default (LLM-Pruner, section 4.1)."""

    group: ClassVar[str] = "recover"

    data: Annotated[
        Text,
        Field(
            description="Instruction data: Alpaca rows (instruction, input, output), ShareGPT conversations, messages, "
            "prompt and completion, or text; a .json, .jsonl or .parquet file, or the name of a data set; self or "
            "self:N for N rows that the dense model generates (512 by default), self-text for texts without "
            "instructions. Several, with commas between them, are joined; 3*FILE,1*FILE takes examples in these shares."
        ),
    ] = "self"
    strategy: Annotated[
        str | None,
        Field(
            description="Recovery strategy: distil, lora, full; see `llmpruner plugins`. By default distil, toward the "
            "dense model's predictions; lora, as in the paper, where the dense model is not found (--data must name a "
            "file or a data set then) or the memory does not suffice for both."
        ),
    ] = None
    limit: Annotated[int | None, Field(ge=1, description="Number of examples to draw at random; all by default.")] = (
        None
    )
    learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            description="Peak learning rate. By default 1e-4 or, of all weights in fewer than 100 steps, "
            "proportionally less.",
        ),
        Option(_TRAINING),
    ] = None
    epochs: Annotated[float, Field(gt=0, le=100_000, description="Passes over the data."), Option(_TRAINING)] = 2.0
    max_steps: Annotated[
        int | None,
        Field(ge=1, le=10**9, description="Number of optimizer steps, instead of --epochs; with --minutes, at most."),
        Option(_TRAINING),
    ] = None
    minutes: Annotated[
        float | None,
        Field(
            gt=0,
            le=1_000_000,
            description="Time that the training may take, instead of --epochs: the learning rate falls with it. "
            "Generating the examples of --data self, loading and saving the model come on top.",
        ),
        Option(_TRAINING),
    ] = None
    batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**20,
            description="Examples per optimizer step. By default 64, halved down to 2 while --epochs give fewer than "
            "200 steps; with --minutes 4.",
        ),
        Option(_TRAINING),
    ] = None
    micro_batch_size: Annotated[
        int,
        Field(ge=1, description="Examples in memory at once; gradients accumulate up to the batch size."),
        Option(advanced=True),
    ] = 4
    cutoff: Annotated[
        int,
        Field(
            ge=2,
            le=2**20,
            description="Tokens per example; longer instructions and conversations are cut, texts are joined to rows "
            "of so many.",
        ),
        Option(_TRAINING),
    ] = 256
    validation: Annotated[
        ShareOrCount,
        Field(
            description="Examples that are measured and not trained on: below 1 a share of --data (16 to 128 examples, "
            "at most a fifth), else a number. The weights with the lowest loss on them, the start's included, are the "
            "result. With 0, all are trained on, and some of them measured."
        ),
        Option(_TRAINING),
    ] = 0.02
    seed: Seed = 0
    settings: Set = {}


class EvaluateSettings(Settings):
    """What to measure of models."""

    perplexity: Annotated[
        Text | None,
        Field(
            description="Perplexity on a .txt, .json, .jsonl or .parquet file, a data set, or 'pydoc', a text that "
            "is part of every Python (the default when nothing else is named); several texts with commas between them."
        ),
        Option(metavar="TEXT"),
    ] = None
    window: Annotated[
        int | None,
        Field(description="Tokens per window of the perplexity, by default 512; windows do not overlap."),
    ] = None
    kl: Annotated[
        bool,
        Field(
            description="Also the KL divergence from the first MODEL on the text of the perplexity, and the share of "
            "tokens with the same most probable prediction (both models are in memory)."
        ),
    ] = False
    tasks: Annotated[
        Names | None,
        Field(
            description="lm-eval tasks, groups or patterns, comma-separated; 'paper' is LLM-Pruner's seven: boolq, "
            "piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa."
        ),
    ] = None
    limit: Annotated[int | None, Field(description="Rows per task; all by default.")] = None
    speed: Annotated[bool, Field(description="Tokens per second and peak memory.")] = False
    metrics: Annotated[
        Names | None,
        Field(description="Metrics by name, comma-separated, such as those of plugins; see `llmpruner plugins`."),
    ] = None
    settings: Set = {}


class BenchSettings(Settings):
    """In which program, and at which sizes, the speed of models is measured."""

    runtime: Annotated[
        str,
        Field(
            description="The program that runs the models: transformers, transformers-static (a cache of fixed size), "
            "llama-cpp (.gguf files), vllm …; see `llmpruner plugins`."
        ),
    ] = "transformers"
    batch: Annotated[
        Numbers, Field(description="Numbers of sequences at a time, comma-separated."), Option(metavar="NUMBERS")
    ] = (1, 4)
    prompt: Annotated[
        Numbers, Field(description="Lengths of the prompt in tokens, comma-separated."), Option(metavar="NUMBERS")
    ] = (128,)
    new: Annotated[int, Field(ge=1, le=2**20, description="Tokens decoded after the prompt.")] = 32
    rounds: Annotated[
        int, Field(ge=1, le=10_000, description="Runs of every model, in turn, after one that is not counted.")
    ] = 5
    settings: Set = {}


class GenerateSettings(Settings):
    """How text is generated."""

    chat: Annotated[
        bool,
        Field(
            description="Put the prompt into the model's chat format: the tokenizer's chat template, or the family's "
            "own; for a model without either, Stanford Alpaca's format for instructions."
        ),
    ] = False
    max_new_tokens: Annotated[int, Field(ge=1, le=2**20, description="Tokens to write at most.")] = 64
    temperature: Annotated[float, Field(ge=0, description="0 takes the likeliest token; above 0 samples.")] = 0.0
    seed: Seed = 0


class PageSettings(Settings):
    """What an HTML page about a model shows."""

    settings: Set = {}


class ExportSettings(Settings):
    """In which format a checkpoint is written."""

    to: Annotated[str, Field(description="Exporter; see `llmpruner plugins`.")]
    settings: Set = {}


class StepSettings(Settings):
    """What a step of a recipe has beside the settings of its command: on the command line, arguments and ``-o``."""

    name: Annotated[
        StepName | None,
        Field(
            description="Its folder in the output, and its name in tables; by default number and command, such as "
            "2-recover. The result of a named step stays when steps are put before it.",
        ),
    ] = None
    models: Annotated[
        Names | None,
        Field(
            description="What evaluate, bench and generate measure: dense, last (the newest checkpoint), or names of "
            "earlier steps; by default dense and every checkpoint so far."
        ),
    ] = None
    prompt: Annotated[str | None, Field(description="The text that generate continues or answers.")] = None


class RecipeSettings(Settings):
    """The top level of a recipe file."""

    model: Annotated[
        str | None, Field(description="The dense model: a directory, a hub id, a .gguf file, or demo.")
    ] = None
    output: Annotated[Path | None, Field(description="Folder for the results of all steps.")] = None
    load: Annotated[
        LoadSettings, Field(description="How models are opened; `revision` is that of the dense model.")
    ] = LoadSettings()
    steps: Annotated[
        list[Any],
        Field(
            description="What is done, in this order: one command with its settings in each, or `rounds: N` with "
            "`steps` that are done N times."
        ),
    ]
