"""Finding plugins and choosing among them.

There is no global plugin manager: `plugin_manager` makes one, `Catalog` reads its hooks once, checks what they
return, and answers every later question.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from . import hookspecs
from .checkpoint_readers import CheckpointReader
from .errors import DuplicateNameError, ModelError, PluginError, UnknownNameError, UnsupportedModelError
from .families import ModelFamily
from .importance.base import ImportanceCriterion
from .recovery.base import RecoveryStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that was skipped."""

    name: str
    package: str
    reason: str

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.package}) is broken and was skipped: {self.reason}"


@dataclass
class PluginHost:
    """A plugin manager with the story of how it was filled."""

    manager: pluggy.PluginManager
    packages: dict[str, str] = field(default_factory=dict)
    """Plugin name → the distribution it comes from."""
    broken: list[BrokenPlugin] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)

    def package_of(self, plugin: str) -> str:
        return self.packages.get(plugin, "in-process")

    def call(self, implementation: pluggy.HookImpl, **arguments: Any) -> Any:
        """Call one plugin's implementation of a hook: one by one, so that a failure has a name."""
        result = implementation.function(**arguments)
        trace = self.manager.trace.root.get("hook")
        trace(f"{implementation.function.__name__} of {implementation.plugin_name} gave {result!r}")
        return result


def plugin_manager(*, entry_points: bool = True) -> PluginHost:
    """A fresh plugin manager with the built-ins and, unless switched off, every installed plugin.

    ``LLMPRUNER_BLOCK`` (comma-separated plugin names) leaves plugins out. ``LLMPRUNER_TRACE=1`` prints every hook
    call to standard error. A plugin that fails to import is recorded in ``broken``, never fatal.
    """
    from . import builtin

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("LLMPRUNER_TRACE"):
        manager.trace.root.setwriter(sys.stderr.write)
    host = PluginHost(manager)
    manager.register(builtin, "builtin")
    host.packages["builtin"] = "llmpruner"
    if entry_points:
        blocked = {name.strip() for name in os.environ.get("LLMPRUNER_BLOCK", "").split(",")} - {""}
        for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: (e.name, e.value)):
            _load(host, entry, blocked)
    return host


def _load(host: PluginHost, entry: metadata.EntryPoint, blocked: set[str]) -> None:
    package = entry.dist.name if entry.dist else "unknown package"
    if entry.name in blocked:
        host.blocked.append(entry.name)
        return
    if host.manager.has_plugin(entry.name):
        if host.manager.get_plugin(entry.name) is not _loaded(entry):
            other = host.package_of(entry.name)
            host.broken.append(BrokenPlugin(entry.name, package, f"its name is taken by a plugin of {other}"))
        return
    # Whatever a third party's import raises, SystemExit included, must not take the application down.
    try:
        plugin = entry.load()
        host.manager.register(plugin, entry.name)
        host.manager.check_pending()
    except (Exception, SystemExit) as error:
        if host.manager.has_plugin(entry.name):
            host.manager.unregister(name=entry.name)
        reason = shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")
        host.broken.append(BrokenPlugin(entry.name, package, reason))
    else:
        host.packages[entry.name] = package


def _loaded(entry: metadata.EntryPoint) -> Any:
    """What a second listing of the same entry point refers to (one package seen through two path entries)."""
    return sys.modules.get(entry.module)


class Registry(Mapping[str, type[T]], Generic[T]):
    """Checked classes by name, with the package each comes from. Looking up an unknown name offers near misses."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        self._packages: dict[str, str] = {}

    def add(self, cls: Any, base: type[T], package: str) -> None:
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise PluginError(f"{package} registers {cls!r} as a {self.kind}; expected a subclass of {base.__name__}")
        name = getattr(cls, "name", "")
        if not (isinstance(name, str) and name and name == name.strip().lower()):
            raise PluginError(
                f"{self.kind} {cls.__name__} of {package} has the name {name!r}; expected lower case text"
            )
        if name in self._classes:
            raise DuplicateNameError(
                f"two {self.kind} classes are named '{name}': {self._classes[name].__name__} of "
                f"{self._packages[name]} and {cls.__name__} of {package}; block one with LLMPRUNER_BLOCK"
            )
        self._classes[name] = cls
        self._packages[name] = package

    def package_of(self, name: str) -> str:
        return self._packages[name]

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise UnknownNameError(self.kind, name, self._classes)
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Any:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)


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
