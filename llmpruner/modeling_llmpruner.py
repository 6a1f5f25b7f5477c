"""Pruned language models whose layers differ in size, as ordinary Hugging Face models.

A copy of this file lies in every checkpoint whose shapes no stock configuration can state, so that
``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` needs nothing but torch and
transformers. Where llmpruner is installed, the same file serves its ``load_pruned`` and ``register``.

``config.json`` is the configuration of the uniform model it was cut from, with the model type
``llmpruner_<base type>`` and a record of what differs::

    "llmpruner": {
      "version": 1,
      "base": "LlamaForCausalLM",         the class that is resized
      "module": null,                     where it is defined, unless `transformers` exports it
      "shapes": {parameter: [size, …]},   tensors of the state dict
      "attributes": {module: {name: value}},
      "configs": {module: {name: value}}, for modules that read sizes from their own copy of the configuration
      "dropped": {module: {"returns": n, "layer_idx": i}}
    }

There is no table of architectures: ``PrunedLlamaForCausalLM`` is built from ``LlamaForCausalLM`` when asked
for. The module of a base class outside transformers is copied beside this file, with what it imports
relatively, and imported at the end of the copy; such a module may import only torch and transformers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

MODEL_TYPE_PREFIX = "llmpruner_"
CODE_NAME = "modeling_llmpruner"
RECORD_VERSION = 1
SLICED = "sliced_argument"


class Dropped(nn.Module):
    """Stands where a sub-layer was removed; its residual update is zero.

    ``returns``: 0 for a bare tensor, n for a tuple of n values. ``layer_idx``: set for attention, which must
    still feed the key/value cache, or the cache forgets how many tokens it has seen.
    """

    def __init__(self, returns: int = 0, layer_idx: int | None = None) -> None:
        super().__init__()
        self.returns = returns
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *_: Any, **options: Any) -> Any:
        # transformers renamed the argument of attention from past_key_values to cache.
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None and self.layer_idx is not None:
            batch, length = hidden_states.shape[:2]
            placeholder = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(placeholder, placeholder, self.layer_idx)
        update = torch.zeros_like(hidden_states)
        return (update, *[None] * (self.returns - 1)) if self.returns else update


def apply_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give ``model``, built from the uniform configuration, the shapes and attributes of the pruned model."""
    for path, arguments in record.get("dropped", {}).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Dropped(**arguments))
    resized: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, shape in record.get("shapes", {}).items():
        _resize(model, name, tuple(shape), resized)
    for path, values in record.get("attributes", {}).items():
        module = model.get_submodule(path)
        for name, value in values.items():
            is_tuple = isinstance(getattr(module, name, None), tuple)
            setattr(module, name, tuple(value) if is_tuple else value)
        if SLICED in values:
            module.register_forward_pre_hook(_pass_slice, with_kwargs=True)
    for path, values in record.get("configs", {}).items():
        module = model.get_submodule(path)
        config = copy.deepcopy(module.config)
        for name, value in values.items():
            setattr(config, name, value)
        module.config = config


def slice_argument(module: nn.Module, argument: str, axis: int, units: int, kept: Sequence[int]) -> None:
    """From now on pass ``module`` only the ``kept`` of every ``units`` entries of an argument along ``axis``:
    what the rest of the model computes for all heads (ALiBi slopes) reaches the heads it belongs to."""
    earlier = getattr(module, SLICED, None)
    if earlier is None:
        module.register_forward_pre_hook(_pass_slice, with_kwargs=True)
    else:
        units, kept = earlier[2], [earlier[3:][k] for k in kept]
    # A flat list of plain values: it is stored among the attributes of the record.
    setattr(module, SLICED, [argument, axis, units, *kept])


def _pass_slice(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    argument, axis, units, *kept = getattr(module, SLICED)
    tensor = kwargs.get(argument)
    if tensor is None:
        return args, kwargs
    index = torch.tensor(kept, device=tensor.device)
    split = tensor.unflatten(axis, (-1, units)).index_select(axis + 1, index)
    return args, {**kwargs, argument: split.flatten(axis, axis + 1)}


def _resize(
    model: nn.Module, name: str, shape: tuple[int, ...], resized: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    old = table[leaf]
    # Tied parameters are one object and must stay one. The old one is kept, lest its id be reused.
    if id(old) not in resized:
        if len(shape) != old.ndim or any(n > m for n, m in zip(shape, old.shape, strict=True)):
            raise ValueError(f"the pruned shape of {name} {shape} does not fit into {tuple(old.shape)}")
        data = old.detach()[tuple(slice(n) for n in shape)].clone()
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        resized[id(old)] = old, new
    table[leaf] = resized[id(old)][1]
    follow_shape(module, leaf)


def follow_shape(module: nn.Module, leaf: str) -> None:
    """Make the sizes that torch and transformers modules store agree with their parameter ``leaf``."""
    shape = tuple(getattr(module, leaf).shape)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding) and leaf == "weight":
        module.num_embeddings, module.embedding_dim = shape
        if module.padding_idx is not None and module.padding_idx >= shape[0]:
            module.padding_idx = None
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif type(module).__name__ == "Conv1D" and leaf == "weight":
        module.nx, module.nf = shape


@contextlib.contextmanager
def _uniform(config: PreTrainedConfig) -> Iterator[None]:
    """Hide ``per_layer_config`` from stock code that reads the global sizes, which would warn."""
    if not getattr(config, "is_heterogeneous", False):
        yield
        return
    overrides = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = overrides


class PrunedConfigMixin:
    """A stock configuration with a record of what was cut; saving it also saves the code that reads it."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base = base_class(self.llmpruner)  # type: ignore[attr-defined]
        self.auto_map = {
            "AutoConfig": f"{CODE_NAME}.{type(self).__name__}",
            "AutoModelForCausalLM": f"{CODE_NAME}.{pruned_model(base).__name__}",
        }
        write_code(Path(save_directory), base)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def validate(self) -> None:
        with _uniform(self):
            super().validate()  # type: ignore[misc]


class PrunedModelMixin:
    """A stock model resized as its configuration records."""

    pruned_base: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with _uniform(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        apply_record(self, config.llmpruner)  # type: ignore[arg-type]

    def _get_static_cache_init_shape(self) -> None:
        """Layers have no common shape: a static cache takes each from the first keys and values."""


def pruned_config(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """``PrunedXConfig`` for ``XConfig``; always the same class."""
    return _pruned(PrunedConfigMixin, stock, {"model_type": MODEL_TYPE_PREFIX + stock.model_type})


def pruned_model(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``PrunedXForCausalLM`` for ``XForCausalLM``; always the same class."""
    members = {"config_class": pruned_config(base.config_class), "pruned_base": base}
    return _pruned(PrunedModelMixin, base, members)


_built: dict[type, type[Any]] = {}


def _pruned(mixin: type, stock: type, members: dict[str, Any]) -> type[Any]:
    if stock not in _built:
        # With the `_auto_class` of a base class, saving would overwrite the code that is written here.
        members = {**members, "_auto_class": None, "__module__": __name__}
        _built[stock] = type(f"Pruned{stock.__name__}", (mixin, stock), members)
    return _built[stock]


def base_class(record: Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class that a record resizes. Raises `ValueError` when it cannot be found.

    A module named by a checkpoint is imported only when it belongs to transformers or to an installed plugin,
    or has been imported already: a checkpoint must not choose what runs.
    """
    name: str = record["base"]
    module: str | None = record.get("module")
    found = globals().get(name)
    if found is None and module is None:
        found = getattr(transformers, name, None)
    elif found is None and module is not None and _may_import(module):
        found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        source = f"transformers {transformers.__version__}" if module is None else f"an installed plugin ({module})"
        raise ValueError(f"the checkpoint needs the model class {name}, which {source} does not offer")
    return found


def _may_import(module: str) -> bool:
    package = module.partition(".")[0]
    plugins = metadata.entry_points(group="llmpruner")
    return module in sys.modules or package in {
        "transformers",
        *(e.module.partition(".")[0] for e in plugins),
    }


def write_code(directory: Path, base: type[PreTrainedModel]) -> None:
    """Write this file, and the modules of a base class from outside transformers, into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    own = Path(__file__)
    source = own.read_text(encoding="utf-8")
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
    if target.resolve() != own.resolve():
        target.write_text(source, encoding="utf-8")


class _OnDemand:
    """Stands for a pruned model type until a configuration of that type is read, which builds the classes."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        model_class = pruned_model(base_class(config_dict["llmpruner"]))
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **kwargs)


def register(model_types: Iterable[str]) -> None:
    """Let AutoConfig and AutoModelForCausalLM read the pruned kind of each model type without remote code."""
    for model_type in model_types:
        name = MODEL_TYPE_PREFIX + model_type
        AutoConfig.register(name, type("PrunedConfig", (_OnDemand,), {"model_type": name}), exist_ok=True)


def __getattr__(name: str) -> Any:
    if name.startswith("Pruned"):
        stock_name = name.removeprefix("Pruned")
        stock = globals().get(stock_name) or getattr(transformers, stock_name, None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
            return pruned_model(stock)
        if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
            return pruned_config(stock)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
