"""Making pruned checkpoints ordinary for everything that goes through transformers' auto classes."""

from __future__ import annotations


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code.

    Covers every model type that transformers, or a family of an installed plugin, knows now. Classes are
    built when a checkpoint is read. Safe to call twice.
    """
    from transformers import CONFIG_MAPPING

    from .modeling_llmpruner import MODEL_TYPE_PREFIX
    from .modeling_llmpruner import register as register_types
    from .plugins import Catalog, plugin_manager

    catalog = Catalog(plugin_manager())
    catalog.register_models()
    types = {*CONFIG_MAPPING, *(t for cls in catalog.families.values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
