"""Model classes whose code is in a checkpoint: used where the user allowed it, without questions on the terminal.

transformers asks on the terminal when its argument ``trust_remote_code`` is not given, so every call of its auto
classes in llmpruner gives it. The user allows the code when the configuration is read (``--trust-remote-code``). From
then on the class of the configuration shows it: a class that was loaded from a checkpoint means that its code may run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALLOW = "allow it with --trust-remote-code (trust_remote_code=True) if you trust it"
"""End of the messages that refuse to run code of a checkpoint."""

_CAUSAL = "AutoModelForCausalLM"


def register_model_class(config: PreTrainedConfig, revision: str | None = None) -> None:
    """Make sure that AutoModelForCausalLM has a class for ``config``; a class in the checkpoint is registered if the
    class of ``config`` is from the checkpoint, too. ``revision``: of the checkpoint, on the hub. Raises `ModelError`
    when the class is code of a checkpoint that may not run, and `UnsupportedModelError` when there is none."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    reference = (getattr(config, "auto_map", None) or {}).get(_CAUSAL)
    if reference is None:
        raise UnsupportedModelError(
            f"there is no causal language model for model type '{config.model_type}' ({type(config).__name__})"
        )
    if type(config).__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
        raise ModelError(f"the model class of '{config.name_or_path}' is code that the checkpoint brings; {ALLOW}")
    model_class = _load(reference, config.name_or_path, revision)
    AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(model_class), exist_ok=True)


def pruned_class(directory: str | Path) -> type[PreTrainedModel]:
    """The class of the pruned checkpoint in ``directory``, loaded from the code in it. The dense classes that
    it was made from are registered with AutoConfig and AutoModelForCausalLM. Call it only where that code may run."""
    values, _ = PreTrainedConfig.get_config_dict(str(directory))
    pruned = _load(values["auto_map"][_CAUSAL], str(directory), None)
    base: type[PreTrainedModel] = pruned.pruned_base
    AutoConfig.register(base.config_class.model_type, base.config_class, exist_ok=True)
    AutoModelForCausalLM.register(base.config_class, base, exist_ok=True)
    loaded: type[PreTrainedModel] = pruned
    return loaded


def _load(reference: str, location: str, revision: str | None) -> Any:
    """The class that ``reference`` (``[repository--]module.Class``) names in the repository at ``location``."""
    repository, _, name = reference.rpartition("--")
    return get_class_from_dynamic_module(name, repository or location, revision=None if repository else revision)
