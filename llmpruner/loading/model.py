"""Opening models, with and without weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..amounts import counted
from ..checkpoints.adapters import adapter_base, with_adapter
from ..checkpoints.base_config import values_of
from ..checkpoints.lazy import LazyModel, lazy_checkpoint, tied_differ
from ..checkpoints.load import load_pruned
from ..checkpoints.manifest import check_weights
from ..checkpoints.number_types import check_quantisation, check_stored_types
from ..checkpoints.record import read_any_record, read_json, read_record
from ..checkpoints.shards import check_index, names_in
from ..engine.weights import StreamedWeights, Weights
from ..errors import CheckpointError, LlmprunerError, MissingExtraError, ModelError, first_line, reason_of
from ..families.family import ModelFamily
from ..families.graph import build_graph
from ..models.content import Content
from ..models.empty import meta_model
from ..models.gguf import RECORDED_PRE, gguf_parsed_once, pre_tokenizer_of
from ..models.quiet import quiet_gguf, quiet_transformers
from ..models.remote import ALLOW, check_own_class, pruned_class, register_model_class
from ..settings import DEMO, LoadSettings
from ..structure.kept import restrict
from ..structure.outcome import Outcome
from ..structure.plan import PruningPlan
from ..validation import refusal
from .by_layer import format_conversion_rate, open_by_layer, weight_file_bytes, why_format_is_not_streamed
from .reference import Reference, resolve
from .tokenizer_files import TOKENIZER_FILES, damaged_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..checkpoints.reader import CheckpointReader
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph

_LOG = logging.getLogger("llmpruner")
AnyStructure = TypeVar("AnyStructure", bound="Structure")


@dataclass(frozen=True, repr=False)
class Structure:
    """A model without its weights.

    ``ref``: the reference that the user gave. ``plans``: the cuts that were applied. ``config``: of the dense model,
    before all cuts. ``graph``: the coupled groups after all cuts. ``record``: its ``llmpruner.json``; of an adapter,
    that of its base, with the adapter's training. ``path``: the absolute path of local files (of an adapter, its own),
    None for a hub id and the demo model.
    """

    ref: str
    config: PreTrainedConfig
    family: ModelFamily
    graph: CouplingGraph
    plans: tuple[PruningPlan, ...] = ()
    record: Mapping[str, Any] | None = None
    path: str | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        """One line: the shapes and indices of all fields would be thousands."""
        times = len(self.plans)
        state = f"pruned {times} times" if times > 1 else "pruned" if times else "not pruned"
        graph = self.graph
        return (
            f"<{type(self).__name__} '{self.ref}': {self.config.model_type}, {graph.num_layers} layers, "
            f"{graph.total_parameters:,} parameters, {state}>"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks: family, layers, parameters, and the kinds of units."""
        graph = self.graph
        rows = [
            ("model", self.ref),
            ("family", self.family.name),
            ("layers", str(graph.num_layers)),
            ("parameters", f"{graph.total_parameters:,}"),
            ("decoder parameters", f"{graph.decoder_parameters:,}"),
            *((f"{kind} groups", str(len(graph.of_kinds([kind])))) for kind in graph.kinds),
        ]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        return f"<table>{cells}</table>"


@dataclass(frozen=True, kw_only=True, repr=False)
class Model(Structure):
    """A model with its weights. ``model``: the transformers model, which stages change in place. ``tokenizer``: None
    where the checkpoint has none. ``outcome``: sizes before and after the last cut in this process. ``form``: of the
    last `llmpruner.save` in this process. ``passages``: fingerprints of the calibration text of prunes in this process
    (`llmpruner.data.passages`). ``work``: for each cut in this process, ``fits`` and ``scores`` as ``llmpruner.json``
    keeps them. ``streamed``: reads the weights when they are needed; None where they are in memory. ``unfinished``: the
    stage that began to change the weights and did not end; None for a model that is whole."""

    model: PreTrainedModel
    tokenizer: Any | None
    outcome: Outcome | None = None
    form: str | None = None
    passages: tuple[str, ...] = ()
    work: tuple[Mapping[str, Any], ...] = ()
    streamed: StreamedWeights | None = None
    unfinished: str | None = None

    @property
    def weights(self) -> Weights:
        """Where the weights of ``model`` come from."""
        return self.streamed or Weights(self.model, self.graph.layers)

    @contextlib.contextmanager
    def changing(self, stage: str) -> Iterator[None]:
        """For what changes the weights in place. Where it ends by an exception, the model stays ``unfinished``, unless
        it is a refusal that came before anything was changed."""
        # Changes of weights that are read from files are in files, too.
        before = Content(self.model) if self.streamed is None else None
        vars(self)["unfinished"] = stage
        try:
            yield
        except LlmprunerError:
            if before is not None and before.is_in(self.model):
                vars(self)["unfinished"] = None
            raise
        vars(self)["unfinished"] = None

    def become(self, result: Model) -> Model:
        """This object with all fields of ``result``, which has its weights. The class is frozen, as stages make new
        values; but whoever holds a model whose weights were changed in place must have the graph and the plans of these
        weights, too."""
        vars(self).update({**vars(result), "unfinished": None})
        return self

    def check_whole(self) -> None:
        """Raise `ModelError` for a model that is ``unfinished``."""
        if self.unfinished is not None:
            raise ModelError(
                f"'{self.ref}' was left half-changed by a {self.unfinished} that did not end; load the model again"
            )


def load_structure(text: str, catalog: Catalog, options: LoadSettings | None = None) -> Structure:
    """The structure of a model, pruned or not, without reading its weights."""
    options = options or LoadSettings()
    base = adapter_base(Path(text))
    if base is not None:
        return _adapted(load_structure(base, catalog, options), text)
    ref = resolve(text, catalog, revision=options.revision)
    catalog.register_models()
    record = read_record(ref.directory) if ref.directory.is_dir() and not ref.gguf_file else None
    if record is not None:
        return _pruned_structure(ref, record, catalog, options)
    config = _read_config(ref, options)
    _check_values(text, config)
    wanted = options.family or (ref.reader.family if ref.reader else None)
    family = catalog.family_for(config, wanted)
    return Structure(text, config, family, _graph_of(text, family, config), path=ref.local_path)


def load_model(
    text: str, catalog: Catalog, options: LoadSettings | None = None, structure: Structure | None = None
) -> Model:
    """A model, pruned or not, with weights on ``options.device``, in evaluation mode.

    ``structure``: the result of `load_structure`, if it was called before. Raises `ModelError`,
    `UnsupportedModelError` or `CheckpointError`.
    """
    options = options or LoadSettings()
    base = adapter_base(Path(text))
    if base is not None:
        check_weights(Path(text))  # before the base is read
        loaded = load_model(base, catalog, options)
        merged = with_adapter(loaded.model, Path(text)).merge_and_unload().eval()
        return replace(_adapted(loaded, text), model=merged)
    ref = resolve(text, catalog, revision=options.revision)
    with _parsing(ref):
        structure = structure or load_structure(text, catalog, options)
        _check_amount(structure)
        tokenizer = _read_tokenizer(ref, options, structure.config)
        model = _read_model(ref, structure, options)
    _check_stored(ref, structure, model, options)
    model = model.to(options.device).eval()
    check_shapes(model, structure.graph, text)
    _check_ties(ref, model, structure.graph)
    return Model(**vars(structure), model=model, tokenizer=tokenizer)


def _adapted(base: AnyStructure, text: str) -> AnyStructure:
    """``base`` with the adapter in folder ``text``. Whoever reads the model again by its ``path`` needs both."""
    folder, record = Path(text), base.record
    if record is not None:
        trained = (read_any_record(folder) or {}).get("recovery")
        # With adapters of other programs, nothing but their name tells that weights are not those of the cut.
        record = {**record, "adapters": [*record.get("adapters", ()), folder.resolve().name]}
        if _is_list_of(trained, (dict,)):
            record["recovery"] = trained
    return replace(base, ref=text, record=record, path=str(folder.resolve()))


def load_tokenizer(structure: Structure, catalog: Catalog, options: LoadSettings | None = None) -> Any | None:
    """The tokenizer of a model, without its weights; None where it has none."""
    options = options or LoadSettings()
    text = structure.ref
    while (base := adapter_base(Path(text))) is not None:
        text = base
    ref = resolve(text, catalog, revision=options.revision)
    with _parsing(ref, keep=True):
        return _read_tokenizer(ref, options, structure.config)


def open_streamed(
    text: str,
    catalog: Catalog,
    options: LoadSettings,
    structure: Structure,
    beside: Path | None = None,
    *,
    ahead: bool = True,
    once: bool = False,
) -> Model:
    """As `load_model`, for a model that `why_not_streamed` accepts: its weights stay in their files, and are read part
    by part when they are needed. Tensors that are not stored as the model has them are converted into a temporary
    folder, in ``beside`` or where the system has such folders. ``ahead``: whether the next layer is read while one is
    in use. ``once``: values that take time to compute (of a GGUF file) are kept in such a folder in ``beside``, too."""
    ref = resolve(text, catalog, revision=options.revision)
    _check_files(ref)
    with _parsing(ref):
        tokenizer = _read_tokenizer(ref, options, structure.config)
        lazy = lazily(text, catalog, options, structure, beside, once=once)
    lazy.reads_ahead = ahead
    streamed = StreamedWeights(lazy, structure.graph.layers, torch.device(options.device))
    return Model(**vars(structure), model=lazy.model, tokenizer=tokenizer, streamed=streamed)


def lazily(
    text: str,
    catalog: Catalog,
    options: LoadSettings,
    structure: Structure,
    beside: Path | None = None,
    *,
    once: bool = False,
) -> LazyModel:
    """The model of `open_streamed` without weights, and what reads them; names and shapes are checked."""
    ref, graph = resolve(text, catalog, revision=options.revision), structure.graph
    dtype = _dtype(options, structure, ref)
    with _one_line(ref), _naming_missing(ref.directory, graph):
        lazy = open_by_layer(
            ref, _reader(ref, structure), structure.config, dtype, graph.layers, beside, once=once,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    if lazy.info is not None:
        check_loaded(text, lazy.model, lazy.info)
    _check_stored(ref, structure, lazy.model, options)
    check_shapes(lazy.model, graph, text)
    return lazy


@contextlib.contextmanager
def _naming_missing(directory: Path, graph: CouplingGraph) -> Iterator[None]:
    """Name the missing tensor of safetensors files, at which accelerate stops without naming it."""
    try:
        yield
    except ValueError as error:
        if "meta device" not in str(error):
            raise
        stored = check_index(directory)
        missing = sorted(graph.shapes.keys() - graph.ties.keys() - stored.keys())
        if not missing or stored.keys() - graph.shapes.keys() - graph.buffers.keys():
            raise
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint of '{directory}' lacks tensor '{missing[0]}'{more}; it is incomplete or damaged"
        ) from error


def reopened(pruned: Model, directory: Path, *, trust_remote_code: bool) -> Model:
    """``pruned``, whose weights were read from the files of the dense model, with those that it was saved with in
    ``directory``, which are read layer by layer too. Where this process does not see the directory, ``pruned``."""
    if pruned.streamed is None or not (directory / "config.json").is_file():
        return pruned
    path, beside = pruned.graph.layers, directory.resolve().parent
    lazy = lazy_checkpoint(directory, pruned.model.dtype, path, beside, trust_remote_code=trust_remote_code)
    return replace(pruned, model=lazy.model, streamed=StreamedWeights(lazy, path, pruned.streamed.device))


def why_not_streamed(
    text: str, catalog: Catalog, options: LoadSettings, structure: Structure, *, cuts: bool = True
) -> str | None:
    """Why a model cannot be read layer by layer; None if it can. ``cuts``: whether it will be cut."""
    if adapter_base(Path(text)) is not None:
        return "it is an adapter, which is added to a model in memory"
    ref = resolve(text, catalog, revision=options.revision)
    reason = why_format_is_not_streamed(ref, _reader(ref, structure))
    if reason is not None:
        return reason
    if cuts and structure.plans:
        return "it was pruned before, and is loaded as a whole"
    if getattr(structure.config, "quantization_config", None) is not None:
        return "it is quantised"
    if any(structure.graph.is_decoder(name) for name in structure.graph.ties):
        return "its layers share parameters"
    return None


def dtype_of(structure: Structure, catalog: Catalog, options: LoadSettings) -> torch.dtype:
    """The dtype that weights will have in memory."""
    return _dtype(options, structure, resolve(structure.ref, catalog, revision=options.revision))


def stored_dtype(structure: Structure) -> torch.dtype | None:
    """The dtype that the files of a model state; None where they state none, and for GGUF files, which have types of
    their own."""
    if structure.ref == DEMO or (structure.path is not None and structure.path.endswith(".gguf")):
        return None
    return _stated_dtype(structure)


def _stated_dtype(structure: Structure) -> torch.dtype | None:
    """The dtype in the configuration of a model; None where there is none."""
    stated = getattr(structure.config, "dtype", None)
    if structure.record is not None and structure.path is not None:
        # The configuration of the structure is that of the dense model, which may be stored in another dtype.
        folder = Path(structure.path)
        while (base := adapter_base(folder)) is not None:
            folder = Path(base)
        file = folder / "config.json"
        stated = read_json(file).get("dtype", stated) if file.is_file() else stated
    return getattr(torch, stated, None) if isinstance(stated, str) else stated


def widened(structure: Structure, catalog: Catalog, options: LoadSettings) -> str | None:
    """A line for a model whose weights take more room once they are saved than they are stored in; None for others."""
    stored, memory = stored_dtype(structure), dtype_of(structure, catalog, options)
    if options.dtype != "auto" or stored != torch.float16 or memory != torch.float32:
        return None
    return (
        f"'{structure.ref}' is stored in float16, and is loaded and saved as float32, in which a CPU computes; --dtype "
        "float16 keeps it"
    )


def loaded_bytes(structure: Structure, catalog: Catalog, options: LoadSettings) -> int:
    """Bytes that the weights of a model take in memory."""
    return structure.graph.total_parameters * dtype_of(structure, catalog, options).itemsize


def conversion_rate(structure: Structure, catalog: Catalog, options: LoadSettings) -> float | None:
    """Values per second that are computed of those in the files when a model is read layer by layer; None where tensors
    are mapped from the files as they are."""
    ref = resolve(structure.ref, catalog, revision=options.revision)
    return format_conversion_rate(ref, _reader(ref, structure))


def file_bytes(structure: Structure) -> int:
    """Bytes of a model's local weight files; 0 for other models."""
    return weight_file_bytes(Path(structure.path)) if structure.path else 0


def _reader(ref: Reference, structure: Structure) -> CheckpointReader | None:
    """The reader of the weights. What llmpruner saved is in transformers' format."""
    return None if structure.record is not None else ref.reader


def brings_tokenizer(text: str, catalog: Catalog) -> bool:
    """Whether a local model has a tokenizer; True for a hub model, as a check would download files."""
    base = adapter_base(Path(text))
    if base is not None:
        return brings_tokenizer(base, catalog)
    ref = resolve(text, catalog)
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory) is not None
    if ref.gguf_file or not ref.directory.is_dir():
        return True
    return any((ref.directory / name).is_file() for name in TOKENIZER_FILES)


def _pruned_structure(ref: Reference, record: Mapping[str, Any], catalog: Catalog, options: LoadSettings) -> Structure:
    try:
        return _recorded_structure(ref, record, catalog, options)
    except LlmprunerError:
        raise
    except ValidationError as error:
        found = refusal(error)
        reason = f"{found.key} of a plan {found.value}: {found.expected}"
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged ({reason})") from error
    except Exception as error:
        # Classes of configurations raise what they like for values that they do not expect.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged ({reason})") from error


def _recorded_structure(
    ref: Reference, record: Mapping[str, Any], catalog: Catalog, options: LoadSettings
) -> Structure:
    _check_types(ref, record)
    values = values_of(record)
    if values["model_type"] not in CONFIG_MAPPING and "auto_map" in values:
        # Pruned from a model with code in its checkpoint, of which this one contains a copy.
        if not options.trust_remote_code:
            raise ModelError(f"'{ref.text}' needs code that the checkpoint brings; {ALLOW}")
        pruned_class(ref.location)
    plans = tuple(PruningPlan.model_validate(plan) for plan in record["plans"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    _check_values(ref.text, config)
    family = catalog.family_for(config, options.family or (plans[0].family if plans else None))
    graph = build_graph(family, config)
    for plan in plans:
        plan.check(graph)
        graph = restrict(graph, plan.kept)
    return Structure(ref.text, config, family, graph, plans, record, path=ref.local_path)


def _check_types(ref: Reference, record: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for what later stages read of a record, and would fail on after their work."""
    work, recovery, adapters = (record.get(name) for name in ("work", "recovery", "adapters"))
    for name, right in (
        ("work", work is None or _is_list_of(work, (dict, type(None)))),
        ("recovery", recovery is None or _is_list_of(recovery, (dict,))),
        *((name, isinstance(record.get(name), str | None)) for name in ("base_path", "base_weights")),
        ("adapters", adapters is None or _is_list_of(adapters, (str,))),
    ):
        if not right:
            raise CheckpointError(f"{ref.text}/llmpruner.json is damaged ('{name}' has a value of another type)")


def _is_list_of(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(one, types) for one in value)


def _read_config(ref: Reference, options: LoadSettings) -> PreTrainedConfig:
    if ref.reader is not None:
        return ref.reader.read_config(ref.directory)
    with _one_line(ref), quiet_transformers(), _parsing(ref, keep=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **_gguf(ref)
        )
        if options.trust_remote_code:
            check_own_class(config)
            register_model_class(config, options.revision)
        return config


_SIZES = {
    "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 26, "num_hidden_layers": 1 << 13,
    "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
}  # fmt: skip
"""Far beyond all models that exist: a damaged configuration must not take all memory."""


def _check_values(text: str, config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a size in a configuration that no model has, and where results would have no names."""
    text_config = config.get_text_config()
    for one in (config, text_config):
        if not getattr(one, "return_dict", True):
            raise ModelError(
                f"the configuration of '{text}' has return_dict {one.return_dict!r}, with which transformers runs no "
                "model; expected true"
            )
    values = text_config.to_dict()
    for name, most in _SIZES.items():
        value = values.get(name)
        if isinstance(value, int) and not 0 <= value <= most:
            raise ModelError(
                f"the configuration of '{text}' has {name} {value}; expected at most {most:,}, not below 0"
            )


def _graph_of(text: str, family: ModelFamily, config: PreTrainedConfig) -> CouplingGraph:
    """As `build_graph`. Raises `ModelError` where transformers cannot build a model of the configuration."""
    try:
        return build_graph(family, config)
    except LlmprunerError:
        raise
    except Exception:
        try:
            meta_model(config)
        except LlmprunerError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError(f"no model can be built of the configuration of '{text}' ({reason})") from error
        raise


def _read_model(ref: Reference, structure: Structure, options: LoadSettings) -> PreTrainedModel:
    dtype = _dtype(options, structure, ref)
    if structure.record is not None:
        return load_pruned(
            ref.directory, dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
    if ref.reader is not None:
        return ref.reader.read_model(ref.directory, dtype)
    check_quantisation(structure.config, ref.text)
    _check_files(ref)
    with _one_line(ref), quiet_gguf() if ref.gguf_file else quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            ref.location,
            dtype=dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_gguf(ref),
        )
    check_loaded(ref.text, model, info)
    if ref.gguf_file:
        forget_quantisation(model)
    return cast("PreTrainedModel", model)


def check_loaded(text: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that a checkpoint was complete: transformers initializes missing tensors randomly.

    ``info``: the loading info of ``from_pretrained``. Raises `ModelError` for tensors that are missing or have another
    shape, and for those of modules of the model that do not use them (a bias without ``bias`` in the configuration).
    Tensors of modules that the model does not have (a second head, buffers of older versions) give a warning.
    """
    missing = sorted(map(str, info["missing_keys"]))
    # transformers adds both shapes to the name.
    wrong = sorted(key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"])
    unexpected = sorted(map(str, info["unexpected_keys"]))
    modules = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    unused = [key for key in unexpected if key.rpartition(".")[0] in modules]
    for keys, what in (
        (missing, "lacks tensor"),
        (wrong, "has in another shape than its configuration gives the tensor"),
        (unused, "has, for a module of the model that does not use it, the tensor"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"the checkpoint of '{text}' {what} '{keys[0]}'{more}; it is incomplete or damaged")
    if unexpected:
        belong, were = ("belongs", "was") if len(unexpected) == 1 else ("belong", "were")
        _LOG.warning(
            "%s of '%s' %s to no module of the model and %s left out (%s …)",
            counted(len(unexpected), "tensor"), text, belong, were, unexpected[0],
        )  # fmt: skip


def _gguf(ref: Reference) -> dict[str, Any]:
    return {"gguf_file": ref.gguf_file} if ref.gguf_file else {}


def _parsing(ref: Reference, *, keep: bool = False) -> contextlib.AbstractContextManager[None]:
    """For what reads a GGUF file; ``keep``: its weights are still to be loaded."""
    return gguf_parsed_once(keep=keep) if ref.gguf_file else contextlib.nullcontext()


def forget_quantisation(model: Any) -> None:
    """Remove the marks of quantisation from a dequantised model, which prevent training and saving."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)


def _read_tokenizer(ref: Reference, options: LoadSettings, config: PreTrainedConfig) -> Any | None:
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory)
    if ref.directory.is_dir() and not ref.gguf_file and not any((ref.directory / f).is_file() for f in TOKENIZER_FILES):
        return None
    # The tokenizer's class is found by the dense configuration; that of a pruned checkpoint needs its remote code.
    extra: dict[str, Any] = _gguf(ref) or {"config": config}
    with _one_line(ref, damaged_tokenizer), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **extra
        )
    pre = pre_tokenizer_of(ref.directory / ref.gguf_file) if ref.gguf_file else None
    if pre is not None:
        # Saved with the tokenizer: transformers does not keep the name, and a GGUF file of the pruned model needs it.
        tokenizer.init_kwargs[RECORDED_PRE] = pre
    return tokenizer


def _dtype(options: LoadSettings, structure: Structure, ref: Reference) -> torch.dtype:
    if options.dtype != "auto":
        return cast("torch.dtype", getattr(torch, options.dtype))
    stored = _stated_dtype(structure) or torch.float32
    if ref.gguf_file or (stored == torch.float16 and options.device == "cpu"):
        return torch.float32
    return stored


def check_shapes(model: PreTrainedModel, graph: CouplingGraph, text: str) -> None:
    """Raise `ModelError` for a parameter of another shape than ``graph`` gives. ``text``: the reference."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = graph.shapes.get(name)
        if expected is None or tuple(parameter.shape) != expected:
            raise ModelError(
                f"'{text}': parameter '{name}' has shape {tuple(parameter.shape)}, its configuration gives {expected}"
            )


def _check_files(ref: Reference) -> None:
    """See `check_weights`; for what llmpruner wrote. Indexes of other models are not always right."""
    if ref.directory.is_dir() and not ref.gguf_file and read_any_record(ref.directory) is not None:
        check_weights(ref.directory)


def _check_ties(ref: Reference, model: PreTrainedModel, graph: CouplingGraph) -> None:
    """Raise `CheckpointError` where parameters that ``graph`` has tied are two: transformers leaves them so where the
    files hold both, with different values. A cut would follow one of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in graph.ties.items():
        if parameters[name] is not parameters[other]:
            raise tied_differ(ref.directory, name, other)


_LEAST_BYTES = 0.1
"""Of a parameter in a file; the smallest types of GGUF have 0.2."""


def _check_amount(structure: Structure) -> None:
    """Raise `ModelError` for local files that are far too small for the parameters of the configuration, of which a
    model would be allocated before its shapes are compared."""
    stored, parameters = file_bytes(structure), structure.graph.total_parameters
    if 0 < stored < _LEAST_BYTES * parameters:
        raise ModelError(
            f"the configuration of '{structure.ref}' is of {parameters:,} parameters, and the weight files have "
            f"{stored:,} bytes; one of both is damaged"
        )


def _check_stored(ref: Reference, structure: Structure, model: PreTrainedModel, options: LoadSettings) -> None:
    """See `check_stored_types`; for files of transformers' formats alone, and none of a quantised model."""
    configs = structure.config, model.config
    quantised = any(getattr(config, "quantization_config", None) is not None for config in configs)
    if quantised or ref.gguf_file or _reader(ref, structure) is not None:
        return
    directory = ref.directory
    if not directory.is_dir():
        found = try_to_load_from_cache(ref.location, "config.json", revision=options.revision)
        if not isinstance(found, str):
            return
        directory = Path(found).parent
    check_stored_types(directory, model)


@contextlib.contextmanager
def _one_line(ref: Reference, damaged: Callable[[Path], str | None] | None = None) -> Iterator[None]:
    """Convert exceptions of transformers for missing or damaged models to `ModelError` with one line. ``damaged``: what
    is wrong with a file in the directory; by default with one of weights."""
    try:
        yield
    except LlmprunerError:
        raise
    except ImportError as error:
        if "gguf" in str(error).lower():
            raise MissingExtraError("gguf", "gguf") from error
        raise ModelError(f"cannot load model '{ref.text}': {first_line(error)}") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"'{ref.text}' needs code that the checkpoint brings; {ALLOW}") from error
        known = ref.directory.exists()
        what = "" if known else ": neither a directory, a .gguf file, 'demo', nor a hub id within reach"
        local = not ref.gguf_file and ref.reader is None
        named = ((damaged or _damaged_weights)(ref.directory) if local else None) or reason_of(error)
        raise ModelError(f"cannot load model '{ref.text}'{what} ({named})") from error


def _damaged_weights(directory: Path) -> str | None:
    """What is wrong with the first safetensors file that cannot be opened, which transformers does not name; None where
    all can."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            names_in(file)
        except CheckpointError as error:
            return str(error)
    return None
