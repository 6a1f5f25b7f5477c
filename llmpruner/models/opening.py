"""Opening a model with its weights: in memory, or read from safetensors files layer by layer."""

from __future__ import annotations

import logging
import mmap
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..errors import CheckpointError, MissingExtraError, ModelError, first_line, is_out_of_memory
from ..settings import LoadSettings
from .devices import CPU, device_of
from .gguf import forget_gguf
from .messages import ALLOW, from_pretrained, in_one_line, quiet_transformers
from .model import Model, Structure
from .modeling_llmpruner import base_class, pruned_model
from .numbers import dtype_of, stored_value
from .record import check_weights, has_shards, names_in
from .reference import adapter_base
from .tokenizer import load_tokenizer
from .weights import StreamedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph

_LOG = logging.getLogger("llmpruner")

# Without the hub's kernels, the default of transformers 5.25: they are downloaded binaries, for few kinds of devices.
_LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_kernels": False}


def load_model(structure: Structure, options: LoadSettings | None = None) -> Model:
    """The model of ``structure``, pruned or not, on ``options.device``, in evaluation mode; an adapter is merged.
    Raises `ModelError`, `UnsupportedModelError` or `CheckpointError`."""
    options, reference = options or LoadSettings(), structure.reference
    if reference.adapter is not None:
        check_weights(reference.adapter)  # before the base is read
    tokenizer = load_tokenizer(structure, options)
    model = _read_model(structure, options).to(device_of(options.device)).eval()
    check_shapes(model, structure.graph, reference.ref)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in structure.graph.ties.items():
        # transformers leaves them separate where the files hold both, with different values; a cut would keep one.
        if parameters[name] is not parameters[other]:
            raise tied_differ(reference.directory, name, other)
    if reference.adapter is not None:
        model = with_adapter(model, reference.adapter).merge_and_unload().eval()
    return Model(**vars(structure), network=model, tokenizer=tokenizer)


def _read_model(structure: Structure, options: LoadSettings) -> PreTrainedModel:
    reference, dtype, trusted = structure.reference, dtype_of(structure, options), options.trust_remote_code
    device = device_of(options.device)
    if structure.record is not None:
        return load_pruned(reference.directory, dtype=dtype, device=device, trust_remote_code=trusted)
    if reference.reader is not None:
        with in_one_line(reference):
            return reference.reader.read_model(reference.directory, dtype)
    check_weights(reference.directory)
    placed = {} if reference.gguf_file else _placed(device)
    model, info = from_pretrained(
        AutoModelForCausalLM, reference, dtype=dtype, trust_remote_code=trusted, **_LOADING, **placed
    )
    check_loaded(reference.ref, model, info)
    if reference.gguf_file:
        forget_gguf()
        # Of the file's quantisation; they prevent training and saving.
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(model.config).pop(name, None)
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        if structure.config.tie_word_embeddings and not model.config.tie_word_embeddings:
            # Stored twice. The head is the one to keep: llama.cpp gives it more bits.
            model.get_input_embeddings().weight = model.get_output_embeddings().weight
            model.config.tie_word_embeddings = True
    return model


def load_pruned(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint of `save_checkpoint`, stock or not, or an adapter for one.

    ``path``: a directory or a hub id; any other stock checkpoint loads too. ``dtype``: None: as saved.
    ``trust_remote_code``: whether code in the checkpoint may run, which a model needs whose class is in neither
    transformers nor an installed plugin. Raises `CheckpointError` when a file is missing or damaged, or a tensor is
    missing, unknown or of another shape.
    """
    place = Path(path)
    base = adapter_base(place)
    check_weights(place)
    attention: Any = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if base is not None:
        model = load_pruned(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **attention)
        return with_adapter(model, place)
    try:
        options = {"dtype": dtype or "auto", "use_safetensors": True, **attention, **_placed(torch.device(device))}
        model, info = _loaded(path, trust_remote_code, **options)
    except Exception as error:  # classes of configurations and the libraries of weights raise what they like
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in sorted(map(str, info[trouble])):
            raise CheckpointError(f"the weights of {path} are incomplete or damaged: {trouble[:-5]} tensor {key}")
    return model.to(device).eval()


def _placed(device: torch.device) -> dict[str, Any]:
    """For transformers, to read weights one by one onto an accelerator: the host may have less memory than that."""
    return {} if device == CPU else {"device_map": {"": device}}


@quiet_transformers()
def _loaded(path: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """(model, loading information) by transformers; tensors of another shape are in the information, and no error."""
    config, _ = PreTrainedConfig.get_config_dict(str(path))
    model_class: Any = AutoModelForCausalLM
    if "llmpruner" in config:
        try:
            model_class = pruned_model(base_class(config["llmpruner"]))
        except ValueError as error:
            if not trust_remote_code:
                raise ValueError(f"{first_line(error)}; the checkpoint contains a copy: {ALLOW}") from error
            model_class = pruned_class(path)
    return model_class.from_pretrained(str(path), trust_remote_code=trust_remote_code, **_LOADING, **options)


def pruned_class(directory: str | Path) -> type[PreTrainedModel]:
    """The class of the pruned checkpoint in ``directory``, loaded from the code in it. The dense classes that it was
    made from are registered with AutoConfig and AutoModelForCausalLM. Call it only where that code may run."""
    values, _ = PreTrainedConfig.get_config_dict(str(directory))
    pruned: Any = get_class_from_dynamic_module(values["auto_map"]["AutoModelForCausalLM"], str(directory))
    base: type[PreTrainedModel] = pruned.pruned_base
    AutoConfig.register(base.config_class.model_type, base.config_class, exist_ok=True)
    AutoModelForCausalLM.register(base.config_class, base, exist_ok=True)
    return cast("type[PreTrainedModel]", pruned)


def with_adapter(model: PreTrainedModel, path: Path) -> Any:
    """``model`` with the peft adapter in ``path``. Raises `CheckpointError` for one that is damaged or does not fit."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("peft", "recover") from error
    # A damaged adapter can raise anything, from the parser of its configuration to torch.
    try:
        with warnings.catch_warnings():
            # peft only warns of missing tensors, and initializes them randomly.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft reads a name that transformers has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(path)).eval()
        weights = path / "adapter_model.safetensors"
        # There are older formats.
        stored = set(names_in(weights)) if weights.is_file() else set()
        if unknown := stored - get_peft_model_state_dict(adapted).keys():
            raise ValueError(f"the model has no place for its tensor {min(unknown)}")
        return adapted
    except Exception as error:
        base = model.config.name_or_path
        raise CheckpointError(f"the adapter in {path} does not fit '{base}': {first_line(error)}") from error


def open_streamed(structure: Structure, options: LoadSettings, scratch: Path | None = None) -> Model:
    """`load_model` with `CheckpointWeights`, which read layer by layer; `why_not_streamed` must be None."""
    check_weights(structure.reference.directory)
    tokenizer, weights = load_tokenizer(structure, options), open_weights(structure, options, scratch)
    return Model(**vars(structure), network=weights.model, tokenizer=tokenizer, streamed=weights)


def open_weights(structure: Structure, options: LoadSettings, scratch: Path | None = None) -> CheckpointWeights:
    """The weights of `open_streamed`; names and shapes of the stored tensors are checked."""
    reference, graph = structure.reference, structure.graph
    with in_one_line(reference):
        weights = CheckpointWeights(
            reference.directory, dtype_of(structure, options), graph.layers, device_of(options.device), scratch,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    check_loaded(reference.ref, weights.model, weights.info)
    check_shapes(weights.model, graph, reference.ref)
    return weights


class CheckpointWeights(StreamedWeights):
    """The weights in the safetensors files of ``directory``. At most two layers are in memory: the one in use, and the
    next one in the direction of the walk, which a thread reads meanwhile.

    transformers loads the model with everything on disk (accelerate's offloading): tensors that are stored as the model
    has them stay in their files, others (experts one by one, fused projections) are converted into a temporary folder
    in ``scratch`` (None: the system's), which goes with this object. ``info``: the loading information."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, path: str, device: torch.device, scratch: Path | None = None, *,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix=".converted-", suffix=".partial", dir=scratch)
        model, self.info = _loaded(
            directory, trust_remote_code, dtype=dtype, device_map={"": "disk"}, offload_folder=self._folder.name
        )
        self._stored = _offloaded(model)
        remove_hook_from_submodules(model)
        vars(model).pop("hf_device_map", None)
        _tie(directory, model, self._stored)
        super().__init__(model.eval(), path, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmpruner-read")
        self._next: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._last = -1

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        running, self._next = self._next, None
        tensors = running[1].result() if running is not None and running[0] == part else self._read(part)
        if part is not None:
            following = part + (1 if part > self._last else -1)
            self._last = part
            if following in self.numbers:
                self._next = following, self._thread.submit(self._read, following, pages=True)
        return tensors

    def _read(self, part: int | None, *, pages: bool = False) -> dict[str, torch.Tensor]:
        """``pages``: touch every page of the mapped files, so that they are read from the disk now."""
        try:
            tensors = {name: self._stored[name] for name in self._names.get(part, ())}
            for tensor in filter(torch.numel, tensors.values()) if pages else ():
                tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].max()
            return tensors
        except Exception as error:  # safetensors, torch and the system raise what they like
            raise CheckpointError(f"the weights of a layer cannot be read: {first_line(error)}") from error


def _offloaded(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """accelerate's map from parameters to their values in files, which its hooks on ``model`` share."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (weights := getattr(each, "weights_map", None)) is not None:
                return cast("Mapping[str, torch.Tensor]", getattr(weights, "dataset", weights))
    raise CheckpointError("accelerate keeps none of this model's weights on disk")


def _tie(directory: Path, model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> None:
    """Tie what the configuration ties and the files hold twice. `CheckpointError` where the values differ."""
    loaded = dict(model.named_parameters(remove_duplicate=False))
    model.tie_weights()
    tied = dict(model.named_parameters(remove_duplicate=False))
    names = {id(value): name for name, value in tied.items() if loaded[name] is value}
    for name, value in tied.items():
        if loaded[name] is not value and not torch.equal(stored[name], stored[names[id(value)]]):
            raise tied_differ(directory, name, names[id(value)])


def tied_differ(directory: Path, name: str, other: str) -> CheckpointError:
    """For parameters that the configuration ties, and that are stored with different values."""
    differ = f"{directory}: {name} and {other} differ, but the configuration ties them"
    return CheckpointError(f'{differ}; set "tie_word_embeddings": false in config.json')


def reopened(pruned: Model, directory: Path, *, trust_remote_code: bool) -> Model:
    """A streamed ``pruned``, from now on of the files in ``directory``, where it was saved and this process sees it."""
    if pruned.streamed is None or not (directory / "config.json").is_file():
        return pruned
    weights = CheckpointWeights(
        directory, pruned.network.dtype, pruned.graph.layers, pruned.streamed.device, directory.resolve().parent,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return replace(pruned, network=weights.model, streamed=weights)


def why_not_streamed(structure: Structure, *, cuts: bool = True) -> str | None:
    """Why a model cannot be read layer by layer; None if it can. ``cuts``: whether it will be cut."""
    reference = structure.reference
    convert = f"convert it once by llmpruner export {structure.ref} --to stock -o DIR, and take DIR"
    reasons = {
        "it is an adapter, which is added to a model in memory": reference.adapter is not None,
        "it is not on this machine; download it first": not reference.directory.is_dir(),
        f"its weights are not in safetensors files; {convert}": (
            reference.gguf_file
            or (reference.reader is not None and structure.record is None)
            or not has_shards(reference.directory)
        ),
        "it was pruned before, and is loaded as a whole": cuts and bool(structure.plans),
        "it is quantised": stored_value(structure, "quantization_config") is not None,
        "its layers share parameters": any(map(structure.graph.is_decoder, structure.graph.ties)),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def check_loaded(text: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` for tensors that are missing, of another shape, or not used by their module; warn of those of
    modules that the model does not have (a second head, buffers of older versions)."""
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
        _LOG.warning("'%s': no module of the model for %d tensors (%s …)", text, len(unexpected), unexpected[0])


def check_shapes(model: PreTrainedModel, graph: CouplingGraph, text: str) -> None:
    """Raise `ModelError` for a parameter of another shape than ``graph`` gives. ``text``: the reference."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, expected = tuple(parameter.shape), graph.shapes.get(name)
        if shape != expected:
            raise ModelError(f"'{text}': parameter '{name}' has shape {shape}, its configuration gives {expected}")
