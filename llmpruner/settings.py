"""Every setting of every command, once: name, type, default, bounds, help. All else derives from these models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from .errors import SettingsError
from .values import ComponentValues, Count, Layers, Names, Numbers, Text, validated

DEMO = "demo"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Reduction = Literal["sum", "mean", "max", "prod", "last"]
Shape = Literal["uniform", "free"]

_WHAT, _HOW, _ON = "How much", "How to choose", "Calibration"
_MACHINE, _TRAINING = "Memory and time", "Training"
"""Sections of ``--help``."""


def option(default: Any, panel: str | None = None, *, advanced: bool = False, **bounds: Any) -> Any:
    """A field with an option in section ``panel`` of ``--help``, or, ``advanced``, with ``--set GROUP.field=value``.
    ``bounds``: of `pydantic.Field`."""
    return Field(default, json_schema_extra={"panel": panel, "advanced": advanced}, **bounds)


class Settings(BaseModel):
    """Frozen; an unknown name is an error. The text below a field is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True, use_attribute_docstrings=True
    )
    group: ClassVar[str] = ""
    """What ``--set`` calls these settings; empty where all of them have an option."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

    def given(self) -> dict[str, Any]:
        """The fields that the user gave, as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


S = TypeVar("S", bound=Settings)


def settings_from(model: type[S], values: Mapping[str, Any]) -> S:
    """An instance of ``model``. Raises `SettingsError`, in one line that names the option."""
    others: dict[str, type[Settings]] = {"load": LoadSettings}
    if model is PruneSettings:
        others["run"] = RunSettings
    for keyword, other in others.items():
        for name in sorted(values.keys() & other.model_fields.keys() - model.model_fields.keys()):
            raise SettingsError(
                f"unknown setting '{name}'; write {keyword}={other.__name__}({name}=…), or {flag_of(other, name)}"
            )
    return validated(model, values, label=lambda name: flag_of(model, name))


def option_of(model: type[Settings], name: str) -> dict[str, Any]:
    """The ``panel`` and ``advanced`` of a field."""
    extra: Any = getattr(model.model_fields.get(name), "json_schema_extra", None)
    return extra or {"panel": None, "advanced": False}


def flag_of(model: type[Settings], name: str) -> str:
    """``--target-params`` for ``target_params``; ``--set prune.length`` for one without an option of its own."""
    if option_of(model, name)["advanced"]:
        return f"--set {model.group}.{name}"
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


Seed = Annotated[int, Field(ge=0, le=2**32 - 1, description="Same seed, same inputs: same result.")]
_SET = (
    "A setting of a chosen component: NAME.key=value (`llmpruner plugins NAME` lists them), or of the command where it "
    "has no option of its own, as in prune.length=256. Repeatable."
)
Set = Annotated[ComponentValues, Field(description=_SET)]


class LoadSettings(Settings):
    """How a model is opened."""

    family: str | None = None
    """Model family; by default the one that matches, else structure is discovered."""
    dtype: Dtype = "auto"
    """Weights in memory: auto, float32, bfloat16, float16. auto: as stored, but float16 becomes float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, xpu … auto: the accelerator that is there, else the CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run model code that is part of a checkpoint."""


class RunSettings(Settings):
    """How a long command runs. The result does not depend on it."""

    max_memory: ByteSize | None = option(None, _MACHINE, gt=0)
    """Memory that the command may take: 4GiB, 500MB. A model that does not fit is read from its files layer by layer;
    what cannot fit is refused beforehand. By default, weights may take half of the free memory, and on an accelerator
    the whole run all of it."""
    restart: bool = option(False, _MACHINE)
    """Start anew instead of continuing an interrupted run of the same command."""


class PruneSettings(Settings):
    """What to remove, how to choose it, and how to compensate for it."""

    group: ClassVar[str] = "prune"

    ratio: float | None = option(None, _WHAT, gt=0, lt=1)
    """Share of the --budget to remove; the nearest that widths allow. `prune` takes several with commas between them,
    and writes a folder of -o for each."""
    budget: str = option("decoder", _WHAT)
    """What --ratio is a share of: decoder (its parameters), parameters (all of them), bytes (of all weights), macs
    (multiply-accumulate operations per token) or kv-cache (its bytes per token). Units of all --kinds are compared by
    it; those that save none of it are kept."""
    target_params: Count | None = option(None, advanced=True, gt=0)
    """Total parameters that remain: 5.4B, 120M, 98000000."""
    unit_ratio: float | None = option(None, gt=0, lt=1, advanced=True)
    """Share of the units of every selected group to remove, as the paper counts (its 0.25 on layers 4-29 of LLaMA-7B
    removes 20 % of the parameters)."""
    kinds: Names = option(("mlp",), _WHAT)
    """What may be removed, comma-separated. mlp: MLP channels; attention: KV heads with query heads (both together are
    the paper's block-wise pruning); query: query heads inside KV groups; hidden: channels of the residual stream (the
    paper's channel-wise pruning); layer: whole layers; expert: experts of a mixture of experts; latent: channels of a
    compressed KV cache; vocabulary: tokens, of the model and of its tokenizer. `llmpruner discover` lists a model's."""
    layers: Layers | None = option(None, advanced=True)
    """Layers that may lose units: 3-26, 0,5,7-9 or all. By default all with --shape uniform; with free, and for whole
    layers, all but the first and last 10 %, as in the paper."""
    shape: Shape = option("uniform", _WHAT)
    """uniform: all layers keep the same widths, in multiples that suit kernels, for every runtime; free (the default of
    --method llm-pruner): every layer keeps its own number of units."""
    round_to: int | None = option(None, ge=1, advanced=True)
    """Kept widths are multiples of this. By default 64 with --shape uniform (less below 1,024 hidden channels), halved
    for a group until it has at least 8 such multiples; else 1."""
    method: str | None = option(None, _HOW)
    """Defaults of the options below. best (the default): units chosen by gradients on 32,768 tokens, weights
    compensated by least squares; fast: fewer samples, no compensation; llm-pruner: the paper's, first-order Taylor on
    ten samples, no compensation, --shape free."""
    importance: str | None = option(None, _HOW)
    """Criterion: random, l1, l2, taylor, fisher, energy, wanda-sp, flap, activation, pca, obs; angular, angular-block
    and block-influence for layers; expert-reap and others for experts; or one that a plugin adds (see `llmpruner
    plugins`). Without --method: on ten samples, without compensation."""
    reduction: Reduction = option("sum", advanced=True)
    """How the scores of a unit's parameters become one: sum, mean, max, prod (their geometric mean), last."""
    allocation: str = option("uniform", advanced=True)
    """uniform: equal shares per layer and kind; global: one ranking over all units, made comparable by --set
    global.normalize=…; sensitivity: by the divergence from the dense model that cuts of each group cause alone."""
    steps: int = option(1, _HOW, ge=1, le=1000)
    """Remove in this many steps, with new scores after each."""
    compensate: str | None = option(None, advanced=True)
    """refit: fit the weights that read removed units again, by least squares; bias: only their biases; none."""
    calibration: Text = option("self", _ON)
    """Text to measure and fit on: self (the model generates it), a .txt, .json, .jsonl or .parquet file with a text,
    page or content field, a data set (name:config:split), or chat:FILE for conversations in the model's chat format;
    several, with commas between them, are mixed in equal parts, or in shares as in 3*self,1*chat:FILE."""
    samples: int | None = option(None, _ON, ge=1, le=1_000_000)
    """Calibration samples: for best 96 that the model generates, or 128 of a file, and two thirds of that from 250M
    decoder parameters; 64 for fast, else 10."""
    length: int | None = option(None, ge=2, le=2**20, advanced=True)
    """Tokens per sample: 512 for best, 128 for fast, else 64; no more than the model can read."""
    seed: Seed = option(0, advanced=True)
    settings: Set = {}


class RecoverSettings(Settings):
    """A training that restores quality after a cut; the passes over the data and the settings of adapters are the
    paper's by default (LLM-Pruner, section 4.1)."""

    group: ClassVar[str] = "recover"

    data: Text = "self"
    """Instruction data: Alpaca rows (instruction, input, output), ShareGPT conversations, messages, prompt and
    completion, or text; a .json, .jsonl or .parquet file, or a data set; self or self:N for N rows that the dense model
    generates (512 by default), self-text without instructions. Several, with commas between them, are joined, in shares
    as in 3*FILE,1*FILE."""
    strategy: str = "distil"
    """Recovery strategy: distil, toward the dense model's predictions; lora, as in the paper, or full, on the data
    alone; see `llmpruner plugins`."""
    limit: int | None = option(None, ge=1)
    """Number of examples to draw at random; all by default."""
    learning_rate: float | None = option(None, _TRAINING, gt=0)
    """Peak learning rate. By default the paper's 1e-4 for LoRA adapters; for weights, 1/5000 of their typical size in
    batches of 2 rows, more in larger ones."""
    epochs: float = option(2.0, _TRAINING, gt=0, le=100_000)
    """Passes over the data."""
    max_steps: int | None = option(None, _TRAINING, ge=1, le=10**9)
    """Number of optimizer steps, instead of --epochs; with --minutes, at most."""
    minutes: float | None = option(None, _TRAINING, gt=0, le=1_000_000)
    """Time that the training may take, instead of --epochs: the learning rate falls with it. Generating the examples of
    --data self, loading and saving the model come on top."""
    batch_size: int | None = option(None, _TRAINING, ge=1, le=2**20)
    """Rows per step. By default 64, halved down to 2 while --epochs give fewer than 200 steps; with --minutes 2."""
    micro_batch_size: int = option(4, ge=1, advanced=True)
    """Rows in memory at once; gradients accumulate up to the batch size."""
    sharded: bool | None = option(None, advanced=True)
    """Whether several processes keep shards of weights, gradients and optimizer, by torch's FSDP, instead of a copy
    each; by default where the copies would not fit into memory."""
    cutoff: int = option(512, _TRAINING, ge=2, le=2**20)
    """Tokens per row: examples are joined, one after the other, and cut into rows of so many."""
    validation: float = option(0.02, _TRAINING, ge=0)
    """Examples that are measured and not trained on: below 1 a share of --data (48 to 128 examples, at most a fifth),
    else a number. The weights with the lowest loss on them, the start's included, are the result. With 0, all are
    trained on, and some of them measured."""
    seed: Seed = 0
    settings: Set = {}


class EvaluateSettings(Settings):
    """What to measure of models."""

    perplexity: Text | None = None
    """Perplexity on a .txt, .json, .jsonl or .parquet file, a data set, or 'pydoc', a text that is part of every Python
    (the default when nothing else is named); several with commas between them."""
    window: int | None = None
    """Tokens per window of the perplexity, by default 512; windows do not overlap."""
    kl: bool = False
    """Also the KL divergence from the first MODEL on the text of the perplexity, and the share of tokens with the same
    most probable prediction (both models are in memory)."""
    tasks: Names | None = None
    """lm-eval tasks, groups or patterns, comma-separated; 'paper' is LLM-Pruner's seven: boolq, piqa, hellaswag,
    winogrande, arc_easy, arc_challenge, openbookqa."""
    limit: int | None = None
    """Rows per task; all by default."""
    metrics: Names | None = None
    """Metrics by name, comma-separated, such as those of plugins; see `llmpruner plugins`."""
    settings: Set = {}


class BenchSettings(Settings):
    """In which program, and at which sizes, the speed of models is measured."""

    runtime: str = "transformers"
    """The program that runs the models: transformers, llama-cpp (.gguf files), vllm …; see `llmpruner plugins`."""
    batch: Numbers = (1, 4)
    """Numbers of sequences at a time, comma-separated."""
    prompt: Numbers = (128,)
    """Lengths of the prompt in tokens, comma-separated."""
    new: int = option(32, ge=1, le=2**20)
    """Tokens decoded after the prompt."""
    rounds: int = option(5, ge=1, le=10_000)
    """Runs of every model, in turn, after one that is not counted."""
    settings: Set = {}


class GenerateSettings(Settings):
    """How text is generated."""

    chat: bool = False
    """Put the prompt into the model's chat format: the tokenizer's chat template, or the family's own; for a model
    without either, Stanford Alpaca's format for instructions."""
    max_new_tokens: int = option(64, ge=1, le=2**20)
    """Tokens to write at most."""
    temperature: float = option(0.0, ge=0)
    """0 takes the likeliest token; above 0 samples."""
    seed: Seed = 0


class PageSettings(Settings):
    """What a report shows."""

    settings: Set = {}


class ExportSettings(Settings):
    """In which format a checkpoint is written."""

    to: str
    """Exporter; see `llmpruner plugins`."""
    settings: Set = {}


class StepSettings(Settings):
    """What a step of a recipe has beside the settings of its command: on the command line, arguments and ``-o``."""

    name: str | None = option(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Its folder in the output, and its name in tables; by default number and command, such as 2-recover. The result of
    a named step stays when steps are put before it."""
    models: Names | None = None
    """What evaluate, bench and generate measure: dense, last (the newest checkpoint), or names of earlier steps; by
    default dense and every checkpoint so far."""
    prompt: str | None = None
    """The text that generate continues or answers."""


class RoundsSettings(Settings):
    """Steps of a recipe that are done several times."""

    rounds: int = Field(ge=1)
    steps: list[str | dict[str, Any]] = Field(min_length=1)


class RecipeSettings(Settings):
    """The top level of a recipe file."""

    model: str | None = None
    """The dense model: a directory, a hub id, a .gguf file, or demo."""
    output: Path | None = None
    """Folder for the results of all steps."""
    load: LoadSettings = LoadSettings()
    """How models are opened; `revision` is that of the dense model."""
    steps: list[str | dict[str, Any]] = Field(min_length=1)
    """What is done, in this order: a command with its settings in each, or `rounds: N` with `steps`, done N times."""
