"""Pruned language models whose layers differ in size, as ordinary Hugging Face models.

Checkpoints whose shapes no stock configuration can represent contain a copy of this file, so that
``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` needs only torch and transformers;
``AutoModel`` gives the model without its head, which is what vLLM builds. llmpruner uses this file too.

``config.json`` is the configuration of the uniform model that was cut, with a record of what differs::

    "llmpruner": {
      "version": 1,
      "base": "LlamaForCausalLM",         the class that is resized
      "module": null,                     where it is defined, unless `transformers` exports it
      "shapes": {tensor: [size, …]},      parameters and buffers of the state dict
      "attributes": {module: {name: value}},
      "configs": {module: {name: value}}, for modules that read sizes from their own copy of the configuration
      "layers": {"path": list of layers, "kept": [number, …], "config": {name: value for all layers}},
      "per_layer": {layer: {name: value}} where layers of the uniform model differ by its own ``per_layer_config``
    }

The model type is that of the uniform model, so that tokenizers are found without remote code; where transformers does
not know it, ``llmpruner_<base type>``. Sizes of single layers are in transformers' ``per_layer_config`` too, unless the
uniform model has some there; a stock class that does not read it refuses the weights for their shapes.

``PrunedLlamaForCausalLM`` is built from ``LlamaForCausalLM`` when it is first used. The module of a base class outside
transformers is copied too, with its relative imports; it may import only torch and transformers besides.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MODEL_TYPE_PREFIX = "llmpruner_"
CODE_NAME = "modeling_llmpruner"
SLICED = "sliced_argument"
PER_LAYER = "per_layer_config"
LAYERS = "layers_kept"
"""Attribute of a model from which layers were removed: the record of `drop_layers`."""

_DERIVING = "deriving_class"
_FIRST = re.compile(r"^first_k_dense_replace$|^num_dense_layers$|layer_start_index$|^max_window_layers$")
_NUMBERED = re.compile(r"only_layers$|layer_indices$|^moe_layers$|cross_attention_layers$")
"""Attributes of configurations: how many first layers there are of a kind, and lists of numbers of layers."""


def apply_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give ``model``, built from the uniform configuration, the shapes and attributes of the pruned model."""
    resized: dict[int, torch.Tensor] = {}
    for name, shape in record.get("shapes", {}).items():
        corner = tuple(slice(size) for size in shape)
        replace_tensor(model, name, lambda tensor, corner=corner: tensor[corner].clone(), resized)  # type: ignore[misc]
    for path, values in record.get("attributes", {}).items():
        module = model.get_submodule(path)
        for name, value in values.items():
            is_tuple = isinstance(getattr(module, name, None), tuple)
            setattr(module, name, tuple(value) if is_tuple else value)
        if SLICED in values:
            module.register_forward_pre_hook(_pass_slice, with_kwargs=True)
    for path, values in record.get("configs", {}).items():
        module = model.get_submodule(path)
        module.config = copy.deepcopy(module.config)
        for name, value in values.items():
            setattr(module.config, name, value)


def drop_layers(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Keep only the layers ``kept`` (increasing numbers) of the list ``path``, and follow in modules and configuration.
    ``model.layers_kept`` records what is needed to do the same to a new instance."""
    layers: Any = model.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([layers[n] for n in kept]))
    for number, old in enumerate(kept):
        for module in layers[old].modules():
            for name in ("layer_idx", "layer_id", "layer_number"):
                # The cache is indexed by it: a gap raises IndexError in generation.
                if getattr(module, name, None) == old and isinstance(getattr(module, name), int):
                    setattr(module, name, number)
    stated = _follow_layers(model.config.get_text_config(), len(layers), kept)
    record = getattr(model.config, "llmpruner", None)
    if record is not None and "per_layer" not in record:
        # The sizes of single layers are those of an earlier cut, which the uniform model does not have.
        stated.pop(PER_LAYER, None)
    if earlier := vars(model).get(LAYERS):
        kept, stated = [earlier["kept"][n] for n in kept], {**stated, **earlier["config"]}
    setattr(model, LAYERS, {"path": path, "kept": list(kept), "config": stated})


def layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]] | None:
    """Layer number → name → value, of transformers' ``per_layer_config``; None where all layers have the same sizes."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    return {int(number): dict(values) for number, values in config.to_dict()[PER_LAYER].items()}


def set_values(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Set the values of a text configuration that `drop_layers` changed."""
    # transformers checks the numbers of layers in ``per_layer_config`` against the number of layers, so it comes last.
    for name in sorted(values, key=lambda name: name == PER_LAYER):
        setattr(config, name, values[name])


def _follow_layers(config: PreTrainedConfig, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """Change what ``config`` states of its ``count`` layers to hold for those ``kept``; returns the values before."""
    before: dict[str, Any] = {}
    lists = per_layer_lists(config, count)
    for name, value in [(n, v) for n, v in vars(config).items() if not n.startswith("_")]:
        new: Any = value
        if isinstance(value, (list, tuple)) and _NUMBERED.search(name) and set(value) <= set(range(count)):
            new = [kept.index(n) for n in value if n in kept]
        elif name in lists:
            new = [value[n] for n in kept]
        elif type(value) is int and _FIRST.search(name):
            new = sum(n < value for n in kept)
        elif type(value) is int and name.endswith("layer_end_index"):
            new = sum(n <= value for n in kept) - 1
        if new != value:
            before[name] = value
            setattr(config, name, new)
    overrides = layer_overrides(config)
    counts = ("num_hidden_layers", "num_layers", "decoder_layers", "num_decoder_layers")
    for name in (getattr(config, "attribute_map", {}).get(n, n) for n in counts):
        if vars(config).get(name) == count:
            before[name] = count
            setattr(config, name, len(kept))
    if overrides:
        before[PER_LAYER] = overrides
        config.per_layer_config = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
    for name, value in lists.items():
        new = [value[n] for n in kept]
        if list(getattr(config, name)) != new:
            # Derived from a period that no longer applies: a subclass overrides the property with a fixed value.
            cls = type(config)
            config.__class__ = type(cls.__name__, (cls,), {name: new, "__module__": cls.__module__, _DERIVING: cls})
    return before


def derive_lists(config: PreTrainedConfig) -> None:
    """Undo the class of its own that `drop_layers` gave ``config``: lists are derived from a period again."""
    while _DERIVING in vars(type(config)):
        config.__class__ = vars(type(config))[_DERIVING]


def per_layer_lists(config: PreTrainedConfig, count: int) -> dict[str, list[Any]]:
    """The fields and properties of ``config`` that are lists with an entry for each of its ``count`` layers."""
    derived = [n for c in type(config).__mro__ for n, v in vars(c).items() if isinstance(v, property) and "layer" in n]
    values = {n: v for n, v in vars(config).items() if not (n.startswith("_") or "token" in n or _NUMBERED.search(n))}
    values |= {name: getattr(config, name) for name in derived}
    return {n: list(v) for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count}


def slice_argument(module: nn.Module, argument: str, axis: int, units: int, kept: Sequence[int]) -> None:
    """Pass ``module`` only the ``kept`` of every ``units`` entries of an argument along ``axis`` (slopes of ALiBi)."""
    earlier = getattr(module, SLICED, None)
    if earlier is None:
        module.register_forward_pre_hook(_pass_slice, with_kwargs=True)
    else:
        units, kept = earlier[2], [earlier[3:][k] for k in kept]
    # A flat list of plain values: it is stored among the attributes of the record.
    setattr(module, SLICED, [argument, axis, units, *kept])


def _pass_slice(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    argument, axis, units, *kept = getattr(module, SLICED)
    if (tensor := kwargs.get(argument)) is None:
        return args, kwargs
    index = torch.tensor(kept, device=tensor.device)
    split = tensor.unflatten(axis, (-1, units)).index_select(axis + 1, index)
    return args, {**kwargs, argument: split.flatten(axis, axis + 1)}


def replace_tensor(
    model: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor], replaced: dict[int, torch.Tensor]
) -> None:
    """Put ``change`` of a parameter or buffer in its place. ``replaced``: id of the old → the new, for tied ones."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    old = table[leaf]
    if id(old) not in replaced:
        data = change(old.detach())
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        # Also by its own id, which may be that of an old one that is gone; a module with two names comes here twice.
        replaced[id(old)] = replaced[id(new)] = new
    table[leaf] = replaced[id(old)]
    follow_shape(module, leaf)


def follow_shape(module: nn.Module, leaf: str) -> None:
    """Update the sizes that torch and transformers modules store to the shape of ``leaf``, a parameter or buffer that
    was cut. A buffer becomes persistent: if it were computed again, it would have entries for all units."""
    module._non_persistent_buffers_set.discard(leaf)
    shape = tuple(getattr(module, leaf).shape)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding) and leaf == "weight":
        module.num_embeddings, module.embedding_dim = shape
        if module.padding_idx is not None and module.padding_idx >= shape[0]:
            module.padding_idx = None
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = shape
    elif type(module).__name__ == "Conv1D" and leaf == "weight":
        module.nx, module.nf = shape


@contextlib.contextmanager
def _as_built(config: PreTrainedConfig) -> Iterator[None]:
    """Let ``config`` describe the uniform model: transformers warns of sizes of all layers next to single ones."""
    record: Mapping[str, Any] = getattr(config, "llmpruner", {})
    layers = record.get("layers", {"config": {}})
    text = config.get_text_config()
    pruned = {n: layer_overrides(text) if n == PER_LAYER else getattr(text, n) for n in layers["config"]}
    cls = type(text)
    overrides = layer_overrides(config)
    config.per_layer_config = record.get("per_layer")
    derive_lists(text)
    set_values(text, layers["config"])
    try:
        yield
    finally:
        if _DERIVING in vars(cls):
            text.__class__ = cls
        set_values(text, pruned)
        config.per_layer_config = overrides


class PrunedConfigMixin:
    """A stock configuration with a record of the cut; saving it also saves the code of its class."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base = base_class(self.llmpruner)  # type: ignore[attr-defined]
        classes = {"AutoConfig": type(self), "AutoModelForCausalLM": pruned_model(base)}
        if headless := headless_class(base):
            classes["AutoModel"] = pruned_model(headless)
        self.auto_map = {name: f"{CODE_NAME}.{each.__name__}" for name, each in classes.items()}
        write_code(Path(save_directory), base)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def validate(self) -> None:
        with _as_built(self):
            super().validate()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        return self._with_type(super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return self._with_type(super().to_diff_dict())  # type: ignore[misc]

    def _with_type(self, values: dict[str, Any]) -> dict[str, Any]:
        """The model type is that of the stock class, which refuses weights of other shapes. Where no shape differs, it
        would load them and compute something else; then the type is one that it does not know."""
        # Some versions of transformers make an instance without a record, to know the defaults.
        record: Mapping[str, Any] | None = getattr(self, "llmpruner", None)
        if record is not None and not record.get("shapes") and not values["model_type"].startswith(MODEL_TYPE_PREFIX):
            values["model_type"] = MODEL_TYPE_PREFIX + values["model_type"]
        return values

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if "llmpruner" in values:
            # Both types are of this class.
            values["model_type"] = cls.model_type  # type: ignore[attr-defined]
        return values, rest


class PrunedModelMixin:
    """A stock model, resized according to the record in its configuration."""

    pruned_base: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        record = config.llmpruner
        if self.pruned_base.__name__ != record["base"]:
            record = without_head(record, self.pruned_base.base_model_prefix)
        with _as_built(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            if layers := record.get("layers"):
                drop_layers(self, layers["path"], layers["kept"])
        apply_record(self, record)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the stock class: in custom code, transformers would not fill the buffers that are not saved."""
        return bool(cls.pruned_base.is_custom_code())

    def initialize_weights(self) -> None:
        """Skips parameters that stay in files, for which some classes (Mamba) would make values in dense sizes."""
        for parameter in self.parameters():  # type: ignore[attr-defined]
            if parameter.is_meta:
                parameter._is_hf_initialized = True
        super().initialize_weights()  # type: ignore[misc]

    def _get_static_cache_init_shape(self) -> None:
        """None: layers have no common shape, so a static cache takes each from the first keys and values."""


def pruned_config(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """``PrunedXConfig`` for ``XConfig``; the same class at every call."""
    prefix = "" if stock.__module__.startswith("transformers.") else MODEL_TYPE_PREFIX
    return _pruned(PrunedConfigMixin, stock, {"model_type": prefix + stock.model_type})


def pruned_model(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``PrunedXForCausalLM`` for ``XForCausalLM``; the same class at every call."""
    members = {"config_class": pruned_config(base.config_class), "pruned_base": base}
    return _pruned(PrunedModelMixin, base, members)


def _pruned(mixin: type, stock: type, members: dict[str, Any]) -> type[Any]:
    key = f"pruned {stock.__module__}.{stock.__qualname__}"
    # Classes are kept among the names of the module: programs that send a configuration to another process by value
    # (vLLM) send all that its code refers to, and a table of classes cannot be sent.
    if key not in globals():
        # With the `_auto_class` of a base class, saving would overwrite the code that is written here.
        members = {**members, "_auto_class": None, "__module__": __name__}
        globals()[key] = type(f"Pruned{stock.__name__}", (mixin, stock), members)
    built: type[Any] = globals()[key]
    return built


def base_class(record: Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class that a record resizes. Its module is imported only if it belongs to transformers or an installed
    plugin, or was imported already: a checkpoint cannot run code. Raises `ValueError` when there is no such class."""
    name: str = record["base"]
    module: str = record.get("module") or ""
    base = globals().get(name)
    if base is None and not module:
        base = getattr(transformers, name, None)
    elif base is None and (module in sys.modules or module.partition(".")[0] in packages_of_models()):
        base = getattr(importlib.import_module(module), name, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        source = f"transformers {transformers.__version__}" if not module else f"an installed plugin ({module})"
        raise ValueError(f"the checkpoint needs the model class {name}, which {source} does not offer")
    return base


def headless_class(base: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """The class that ``base`` puts a language model head on, where transformers has it; else None."""
    # Some model types map to several classes, of which the first is the default.
    mapped: Any = MODEL_MAPPING.get(base.config_class, None)
    headless: type[PreTrainedModel] | None = mapped[0] if isinstance(mapped, tuple) else mapped
    below = headless and headless is not base and headless.base_model_prefix == base.base_model_prefix != ""
    return headless if below else None


def without_head(record: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a record on the model below ``prefix``, with the names that it has there."""

    def inside(values: Mapping[str, Any]) -> dict[str, Any]:
        below = {name: value for name, value in values.items() if f"{name}.".startswith(f"{prefix}.")}
        return {name.removeprefix(prefix).removeprefix("."): value for name, value in below.items()}

    kept = {**record, **{part: inside(record[part]) for part in ("shapes", "attributes", "configs") if part in record}}
    if "layers" in record:
        kept["layers"] = {**record["layers"], "path": record["layers"]["path"].removeprefix(f"{prefix}.")}
    return kept


def packages_of_models() -> set[str]:
    """Packages from which a checkpoint may import its model class: transformers, installed plugins (entry points of the
    group ``llmpruner``), and entry points of the group ``llmpruner.models``, which hold model classes alone."""
    entries = (*metadata.entry_points(group="llmpruner"), *metadata.entry_points(group="llmpruner.models"))
    return {"transformers", *(entry.module.partition(".")[0] for entry in entries)}


def write_code(directory: Path, base: type[PreTrainedModel]) -> None:
    """Write this file, and the modules of a base class from outside transformers, into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    this = Path(__file__)
    source = this.read_text(encoding="utf-8")
    for cls in (base, base.config_class):
        file = sys.modules[cls.__module__].__file__
        if cls.__module__.partition(".")[0] == "transformers" or file is None:
            continue
        statement = f"from .{Path(file).stem} import {cls.__name__}"
        if statement not in source.splitlines():
            source += f"{statement}\n"
        for needed in (file, *get_relative_import_files(file)):
            target = directory / Path(needed).name
            if Path(needed).resolve() != target.resolve():
                shutil.copyfile(needed, target)
    target = directory / f"{CODE_NAME}.py"
    if target.resolve() != this.resolve():
        target.write_text(source, encoding="utf-8")


class _OnDemand(type):
    """Stands for the configuration class of a model type in AutoConfig: a file with a record of a cut gives the pruned
    class, which is built when it is first read; all else is done by the stock class ``stock_name`` of transformers."""

    stock_name: str

    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "llmpruner" not in config_dict:
            return cls._stock().from_dict(config_dict, **kwargs)
        base = base_class(config_dict["llmpruner"])
        model_class = pruned_model(base)
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        if headless := headless_class(base):
            AutoModel.register(model_class.config_class, pruned_model(headless), exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **kwargs)

    def _stock(cls) -> Any:
        return getattr(transformers, cls.stock_name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._stock()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._stock(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._stock())


def register(model_types: Iterable[str]) -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load the pruned variant of each model type."""
    for model_type in model_types:
        stock = CONFIG_MAPPING_NAMES.get(model_type)
        for name in (MODEL_TYPE_PREFIX + model_type, *((model_type,) if stock else ())):
            stand_in = _OnDemand("PrunedConfig", (), {"model_type": name, "stock_name": stock or ""})
            AutoConfig.register(name, stand_in, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name.startswith("Pruned"):
        stock_name = name.removeprefix("Pruned")
        stock = globals().get(stock_name) or getattr(transformers, stock_name, None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
            return pruned_model(stock)
        if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
            return pruned_config(stock)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
