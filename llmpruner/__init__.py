"""llmpruner: structural pruning of large language models.

Everything here is public and loaded on first use, so that ``import llmpruner`` is light: no torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "coupling": (
        "Blocked", "Blocks", "CoupledGroup", "CouplingGraph", "Explicit", "Role", "Span", "index_map",
        "ATTENTION", "EXPERT", "HIDDEN", "LAYER", "MLP", "QUERY", "VOCABULARY",
    ),
    "errors": (
        "CheckpointError", "CouplingError", "DataError", "DuplicateNameError", "LlmprunerError", "MissingExtraError",
        "ModelError", "OutputError", "PlanError", "PluginError", "SelectionError", "UnknownNameError",
        "UnsupportedModelError",
    ),
    "families": ("ModelFamily", "alpaca_prompt", "build_graph"),
    "checkpoint": ("load_pruned", "save_checkpoint"),
    "registration": ("register",),
    "checkpoint_readers": ("CheckpointReader",),
    "hookspecs": ("HOOK_VERSION", "hookimpl"),
    "meta": ("meta_model",),
    "importance.base": ("ImportanceCriterion", "ParameterSignals", "Signal"),
    "recovery.base": ("RecoveryJob", "RecoverySettings", "RecoveryStrategy", "TrainingResult"),
    "recovery.sharegpt": ("read_sharegpt",),
    "recovery.training": ("fit",),
    "plugins": ("Catalog", "PluginHost", "plugin_manager"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = ("layouts",)

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_MODULE_OF), *_SUBMODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'llmpruner' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
