"""Finding plugins and choosing among them.

There is no global plugin manager: `plugin_manager` makes one, `Catalog` reads its hooks once, checks what they
return, and answers every later question.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.reader import CheckpointReader
from ..errors import ModelError, UnsupportedModelError
from ..families.family import ModelFamily
from ..importance.base import ImportanceCriterion
from ..recovery.base import RecoveryStrategy
from .host import BrokenPlugin, PluginHost
from .registry import Registry, T

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Catalog:
    """All that the plugins of a host offer, checked."""

    def __init__(self, host: PluginHost) -> None:
        self.host = host
        self.families: Registry[ModelFamily] = self._collect("family", "llmpruner_model_families", ModelFamily)
        self.criteria: Registry[ImportanceCriterion] = self._collect(
            "criterion", "llmpruner_importance_criteria", ImportanceCriterion
        )
        self.strategies: Registry[RecoveryStrategy] = self._collect(
            "recovery strategy", "llmpruner_recovery_strategies", RecoveryStrategy
        )
        self.readers: Registry[CheckpointReader] = self._collect(
            "checkpoint reader", "llmpruner_checkpoint_readers", CheckpointReader
        )

    def _collect(self, kind: str, hook: str, base: type[T]) -> Registry[T]:
        registry: Registry[T] = Registry(kind)
        impls = getattr(self.host.manager.hook, hook).get_hookimpls()
        for impl in sorted(impls, key=lambda i: (i.plugin_name != "builtin", i.plugin_name)):
            package = self.host.package_of(impl.plugin_name)
            try:
                classes = list(self.host.call(impl))
            except Exception as error:
                self.host.broken.append(
                    BrokenPlugin(impl.plugin_name, package, f"{hook} raised {type(error).__name__}: {error}")
                )
                continue
            for cls in classes:
                registry.add(cls, base, package)
        return registry

    @cached_property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        return tuple(self.host.broken)

    def register_models(self) -> None:
        """Let every family make its own model classes known to transformers."""
        for cls in self.families.values():
            cls().register_models()

    def family_for(self, config: PreTrainedConfig, name: str | None = None) -> ModelFamily:
        """The family of a model: ``name`` when given, else the single most special one that matches.

        Raises `UnsupportedModelError` when none or several match.
        """
        if name is not None:
            return self.families[name]()
        matches = [family for family in (cls() for cls in self.families.values()) if family.matches(config)]
        extended = {ancestor for family in matches for ancestor in self._ancestors(family)}
        left = [family for family in matches if family.name not in extended]
        if len(left) == 1:
            return left[0]
        if not left:
            known = sorted({t for cls in self.families.values() for t in cls.model_types})
            raise UnsupportedModelError(
                f"no family understands model type '{config.model_type}' (known: {', '.join(known)}); "
                "--family auto discovers any decoder's structure, --family NAME chooses one, or install a plugin"
            )
        names = ", ".join(f"{f.name} ({self.families.package_of(f.name)})" for f in left)
        raise UnsupportedModelError(
            f"several families match model type '{config.model_type}': {names}; choose with --family"
        )

    def _ancestors(self, family: ModelFamily) -> Iterable[str]:
        parent, seen = family.extends, {family.name}
        while parent is not None and parent not in seen:
            yield parent
            seen.add(parent)
            parent = self.families[parent].extends if parent in self.families else None

    def reader_for(self, path: Path) -> CheckpointReader | None:
        """The reader that recognises ``path``, or None. Raises `ModelError` when several do."""
        found = [reader for reader in (cls() for cls in self.readers.values()) if reader.recognises(path)]
        if len(found) > 1:
            raise ModelError(f"several readers recognise {path}: {', '.join(r.name for r in found)}")
        return found[0] if found else None
