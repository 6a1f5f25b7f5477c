"""The catalog: the components of all plugins, checked, by kind and name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from ..calibration.source import CalibrationSource
from ..component import Component
from ..discovery.family import AUTO, ModelFamily
from ..errors import LlmprunerError, ModelError, PluginError, UnknownNameError, UnsupportedModelError, first_line, near
from ..evaluation.base import Metric
from ..evaluation.runtime import Runtime
from ..exporters.base import Exporter
from ..models.reference import CheckpointReader
from ..pruning.allocation.base import Allocation
from ..pruning.budgets.base import Budget
from ..pruning.compensation.base import Compensation
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.methods.base import Method
from ..pruning.methods.recipe import NamedRecipe
from ..recovery.base import RecoveryStrategy
from ..report.base import ReportSection
from .calls import Answer
from .host import BrokenPlugin, PluginHost, plugin_manager
from .registry import Registry, problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")


class Kind(cached_property[Registry[T]], Generic[T]):
    """A kind of component, as an attribute of `Catalog`: the `Registry` of its classes, which are collected when the
    attribute is first read.

    ``name``: in messages. ``hook``: returns the classes. ``base``: their base class.
    """

    attrname: str

    def __init__(self, name: str, hook: str, base: type[T]) -> None:
        super().__init__(lambda catalog: _collect(catalog.host, self))
        self.name, self.hook, self.base = name, hook, base


class Catalog:
    """The components of all plugins of a host.

    Each attribute is the registry of one kind: a mapping from names to classes, which are collected when it is first
    read. Looking a name up raises `UnknownNameError`, or `DuplicateNameError` where two plugins use it.
    """

    families = Kind("family", "llmpruner_model_families", ModelFamily)
    criteria = Kind("criterion", "llmpruner_importance_criteria", ImportanceCriterion)
    allocations = Kind("allocation", "llmpruner_allocations", Allocation)
    budgets = Kind("budget", "llmpruner_budgets", Budget)
    compensations = Kind("compensation", "llmpruner_compensations", Compensation)
    sources = Kind("calibration source", "llmpruner_calibration_sources", CalibrationSource)
    strategies = Kind("recovery strategy", "llmpruner_recovery_strategies", RecoveryStrategy)
    metrics = Kind("metric", "llmpruner_metrics", Metric)
    exporters = Kind("exporter", "llmpruner_exporters", Exporter)
    runtimes = Kind("runtime", "llmpruner_runtimes", Runtime)
    readers = Kind("checkpoint reader", "llmpruner_checkpoint_readers", CheckpointReader)
    sections = Kind("report section", "llmpruner_report_sections", ReportSection)
    methods = Kind("method", "llmpruner_methods", Method)
    recipes = Kind("recipe", "llmpruner_recipes", NamedRecipe)

    def __init__(self, host: PluginHost) -> None:
        self.host = host
        self._unregistered: dict[str, str] = {}  # family that could not register its models → the reason

    @property
    def registries(self) -> tuple[Registry[Any], ...]:
        """The registries of all kinds; calls the hooks that were not called before."""
        return tuple(getattr(self, kind.attrname) for kind in KINDS.values())

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """What was left out of plugins so far; calls no hooks."""
        return self.host.broken

    def registry(self, kind: str) -> Registry[Any]:
        """The registry of a kind by name, such as ``budget``. Raises `UnknownNameError`."""
        if kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
        registry: Registry[Any] = getattr(self, KINDS[kind].attrname)
        return registry

    @overload
    def create(self, kind: Registry[T], name: str, values: Mapping[str, Any] | None = None) -> T: ...
    @overload
    def create(self, kind: str, name: str, values: Mapping[str, Any] | None = None) -> Component: ...
    def create(self, kind: Registry[Any] | str, name: str, values: Mapping[str, Any] | None = None) -> Any:
        """The component ``name`` with the settings ``values``. ``kind``: a registry of this catalog, or its name.

        Raises `UnknownNameError`, `DuplicateNameError`, and `SettingsError` for invalid settings.
        """
        registry = self.registry(kind) if isinstance(kind, str) else kind
        return registry[name](**(values or {}))

    def register_models(self) -> None:
        """Call `ModelFamily.register_models` of every family. One that raises is left out, and recorded in `broken`."""
        for name, cls in self.families.items():
            try:
                cls().register_models()
            except (Exception, SystemExit) as error:
                self._unregistered[name] = self._leave_out(self.families, name, "register_models", error)

    def matching(self, config: PreTrainedConfig) -> tuple[ModelFamily, ...]:
        """The families that match a model. One that raises is left out, and recorded in `broken`."""
        found = []
        for name, cls in self.families.items():
            try:
                if name not in self._unregistered and (family := cls()).matches(config):
                    found.append(family)
            except (Exception, SystemExit) as error:
                self._leave_out(self.families, name, "matches", error)
        return tuple(found)

    def _leave_out(self, registry: Registry[Any], name: str, method: str, error: BaseException) -> str:
        """Record that a method of a plugin's class raised, which must not stop commands on other models. Returns the
        reason."""
        reason = f"{method} raised {type(error).__name__}: {first_line(error)}"
        hook = KINDS[registry.kind].hook
        self.host.record(registry.plugin_of(name), reason, hook, registry[name].__name__)
        return reason

    def family_for(self, config: PreTrainedConfig, name: str | None = None) -> ModelFamily:
        """The family of a model: ``name`` when given, else the one that matches and is not extended by another that
        matches, else ``auto``, which discovers the structure.

        Raises `UnsupportedModelError` when several match, or none and the built-in plugin is blocked, and `PluginError`
        for a name of a family that could not register its models.
        """
        families = self.families
        if name is not None:
            if name in self._unregistered:
                package = families.package_of(name)
                raise PluginError(f"family '{name}' ({package}) cannot be used: {self._unregistered[name]}")
            return families[name]()
        matches = self.matching(config)
        extended = {ancestor for family in matches for ancestor in _ancestors(family, families)}
        left = [family for family in matches if family.name not in extended]
        if len(left) == 1:
            return left[0]
        if left:
            names = ", ".join(f"{f.name} ({families.package_of(f.name)})" for f in left)
            unknown = "".join(
                f"; {f.name} extends '{f.extends}', which is no known family{near(f.extends, families)}"
                for f in left
                if f.extends is not None and f.extends not in families
            )
            raise UnsupportedModelError(
                f"several families match model type '{config.model_type}': {names}{unknown}; choose with --family; in "
                "plugins, name the family that is specialised with 'extends', or let 'matches' leave out other models"
            )
        if AUTO in families:
            return families[AUTO]()
        raise UnsupportedModelError(
            f"no family matches model type '{config.model_type}', and the built-in family that discovers structure is "
            "blocked by LLMPRUNER_BLOCK"
        )

    def reader_for(self, path: Path) -> CheckpointReader | None:
        """The reader that recognises ``path``, or None. One that raises is left out, and recorded in `broken`. Raises
        `ModelError` when several recognise it."""
        found = []
        for name, cls in self.readers.items():
            try:
                if (reader := cls()).recognises(path):
                    found.append(reader)
            except LlmprunerError:
                raise
            except (Exception, SystemExit) as error:
                self._leave_out(self.readers, name, "recognises", error)
        if len(found) > 1:
            raise ModelError(f"several readers recognise {path}: {', '.join(r.name for r in found)}")
        return found[0] if found else None


KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in vars(Catalog).values() if isinstance(kind, Kind)}
"""Every kind of component by name, in the order in which they are listed."""


def _collect(host: PluginHost, kind: Kind[T]) -> Registry[T]:
    """The registry of one kind. Invalid classes are recorded in ``host.broken``."""
    registry: Registry[T] = Registry(kind.name, kind.base)
    for answer in host.call(kind.hook):
        for cls in answer.result:
            plugin = _plugin_of(host, answer, cls)
            problem = problem_of(cls, kind.base)
            if problem is None:
                registry.add(cls, plugin, host.package_of(plugin))
            else:
                host.record(plugin, problem, kind.hook, getattr(cls, "__name__", short_repr(cls)))
    for entry, message in registry.duplicates():
        host.record(entry.plugin, message, kind.hook, entry.cls.__name__)
    return registry


def _plugin_of(host: PluginHost, answer: Answer, cls: Any) -> str:
    """The plugin of a class: the one that was called, or a wrapper if the class is of the wrapper's package."""
    plugins = [answer.plugin] if answer.plugin is not None else []
    plugins += answer.wrappers
    return next((p for p in plugins if _package(host.manager.get_plugin(p)) == _package(cls)), plugins[0])


def _package(thing: Any) -> str:
    """The top-level package of a module, of a class, or of the class of an object."""
    module = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    return str(module).partition(".")[0]


def _ancestors(family: ModelFamily, families: Mapping[str, type[ModelFamily]]) -> set[str]:
    """The names of the families that ``family`` extends, directly or indirectly."""
    found: set[str] = set()
    parent = family.extends
    while parent is not None and parent not in found:
        found.add(parent)
        parent = families[parent].extends if parent in families else None
    return found - {family.name}


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code, for the model types of
    transformers and of the families of installed plugins. Repeated calls have no further effect."""
    from transformers import CONFIG_MAPPING

    from ..models.modeling_llmpruner import MODEL_TYPE_PREFIX
    from ..models.modeling_llmpruner import register as register_types

    catalog = Catalog(plugin_manager())
    catalog.register_models()
    types = {*CONFIG_MAPPING, *(t for cls in catalog.families.values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
