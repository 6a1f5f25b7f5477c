"""Making pruned checkpoints ordinary for everything that goes through transformers' auto classes."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from ..models.modeling_llmpruner import MODEL_TYPE_PREFIX
from ..models.modeling_llmpruner import register as register_types
from ..plugins.catalog import Catalog
from ..plugins.host import plugin_manager


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code.

    Covers every model type that transformers, or a family of an installed plugin, knows now. Classes are
    built when a checkpoint is read. Safe to call twice.
    """
    catalog = Catalog(plugin_manager())
    catalog.register_models()
    types = {*CONFIG_MAPPING, *(t for cls in catalog.families.values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
