"""Registering pruned model types with transformers' auto classes."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from ..plugins.catalog import Catalog
from ..plugins.host import plugin_manager
from .modeling_llmpruner import MODEL_TYPE_PREFIX
from .modeling_llmpruner import register as register_types


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code.

    For the model types of transformers and of the families of installed plugins. Classes are built when a checkpoint
    is read. Repeated calls have no further effect.
    """
    catalog = Catalog(plugin_manager())
    catalog.register_models()
    types = {*CONFIG_MAPPING, *(t for cls in catalog.families.values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
