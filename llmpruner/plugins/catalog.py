"""The catalog: the components of all plugins, by kind and name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..calibration.calibration import CalibrationSource
from ..component import Component, check_chosen
from ..errors import ModelError, UnknownNameError, UnsupportedModelError, first_line
from ..evaluation.bench import Runtime
from ..evaluation.evaluate import Metric
from ..exporters import Exporter
from ..models.family import AUTO, ModelFamily
from ..models.reference import CheckpointReader
from ..pruning.allocation import Allocation
from ..pruning.budgets import Budget
from ..pruning.compensation.base import Compensation
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.methods import Method
from ..recipes import NamedRecipe
from ..recovery.base import RecoveryStrategy
from ..report.base import ReportSection
from .manager import PluginManager

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T", bound=Component)


class Registry(dict[str, type[T]]):
    """The classes of one kind by name, sorted. Looking up an unknown name raises `UnknownNameError`."""

    def __init__(self, manager: PluginManager, kind: Kind[T]) -> None:
        self.kind, self._manager = kind.name, manager
        classes: dict[str, type[T]] = {}
        for cls in manager.call(kind.hook):
            problem = problem_of(cls, kind.base)
            if problem is None and classes.setdefault(cls.name, cls) is not cls:
                other = classes[cls.name]
                problem = f"{other.__name__} of {manager.package_of(other)} has the name '{cls.name}' already"
            if problem is not None:
                manager.broken.append(f"{kind.hook}: {short_repr(cls)} was skipped: {problem}")
        super().__init__(sorted(classes.items()))

    def __missing__(self, name: str) -> type[T]:
        raise UnknownNameError(self.kind, name, self)

    def package_of(self, name: str) -> str:
        """The distribution of the class ``name``."""
        return self._manager.package_of(self[name])

    def create(self, name: str, values: Mapping[str, Any] | None = None) -> T:
        """The component ``name`` with the settings ``values``. Raises `UnknownNameError` and `SettingsError`."""
        return self[name](**(values or {}))

    def create_only(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> T:
        """`create`, for a command that uses one component: ``settings`` (by component name) may be of no other."""
        component = self.create(name, settings.get(name))
        check_chosen(settings, [component])
        return component


def problem_of(cls: Any, base: type) -> str | None:
    """Why ``cls`` cannot be used as a component derived from ``base``; None when it can."""
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"it is no subclass of {base.__name__}"
    name: Any = getattr(cls, "name", "")
    # Users write names in lists with commas, as NAME.key=value and as NAME:reference.
    if isinstance(name, str) and name == name.lower() and re.fullmatch(r"[^\s,.=:]+", name):
        return None
    return f"its name is {name!r}; expected lower case text without blanks, commas, dots, colons and equals signs"


class Kind(cached_property[Registry[T]], Generic[T]):
    """An attribute of `Catalog`: the `Registry` of the classes that ``hook`` returns, filled when it is first read."""

    attrname: str

    def __init__(self, hook: str, base: type[T]) -> None:
        super().__init__(lambda catalog: Registry(catalog.manager, self))
        self.hook, self.base, self.name = hook, base, base.kind


class Catalog:
    """The components of all plugins, by kind and name. ``manager``: by default with all installed plugins."""

    families = Kind("llmpruner_model_families", ModelFamily)
    criteria = Kind("llmpruner_importance_criteria", ImportanceCriterion)
    allocations = Kind("llmpruner_allocations", Allocation)
    budgets = Kind("llmpruner_budgets", Budget)
    compensations = Kind("llmpruner_compensations", Compensation)
    sources = Kind("llmpruner_calibration_sources", CalibrationSource)
    strategies = Kind("llmpruner_recovery_strategies", RecoveryStrategy)
    metrics = Kind("llmpruner_metrics", Metric)
    exporters = Kind("llmpruner_exporters", Exporter)
    runtimes = Kind("llmpruner_runtimes", Runtime)
    readers = Kind("llmpruner_checkpoint_readers", CheckpointReader)
    sections = Kind("llmpruner_report_sections", ReportSection)
    methods = Kind("llmpruner_methods", Method)
    recipes = Kind("llmpruner_recipes", NamedRecipe)

    def __init__(self, manager: PluginManager | None = None) -> None:
        self.manager = manager or PluginManager()

    @property
    def registries(self) -> dict[str, Registry[Any]]:
        """The registries by the name of their kind."""
        return {name: getattr(self, kind.attrname) for name, kind in KINDS.items()}

    def register_models(self) -> None:
        """Let every family register its models. One that raises is named in ``manager.broken``."""
        for name, cls in self.families.items():
            try:
                cls().register_models()
            except Exception as error:  # of the package that the models come from
                reason = f"{type(error).__name__}: {first_line(error)}"
                line = f"family '{name}' ({self.families.package_of(name)}) cannot register its models: {reason}"
                if line not in self.manager.broken:
                    self.manager.broken.append(line)

    def family_for(self, config: PreTrainedConfig, name: str | None = None) -> ModelFamily:
        """The family ``name``; by default the one that matches and that no other match extends, or ``auto``. Raises
        `UnsupportedModelError` when there are several."""
        if name is not None:
            return self.families[name]()
        matches = [family for cls in self.families.values() if (family := cls()).matches(config)]
        extended = {family.extends for family in matches}
        candidates = [family for family in matches if family.name not in extended]
        if len(candidates) > 1:
            names = ", ".join(f"{family.name} ({self.families.package_of(family.name)})" for family in candidates)
            raise UnsupportedModelError(
                f"several families match model type '{config.model_type}': {names}; choose with --family; in plugins, "
                "name the family that is specialised with 'extends', or let 'matches' leave out other models"
            )
        return candidates[0] if candidates else self.families[AUTO]()

    def reader_for(self, path: Path) -> CheckpointReader | None:
        """The reader that recognises ``path``, or None. Raises `ModelError` when several do."""
        readers = [reader for cls in self.readers.values() if (reader := cls()).recognises(path)]
        if len(readers) > 1:
            raise ModelError(f"several readers recognise {path}: {', '.join(r.name for r in readers)}")
        return readers[0] if readers else None


KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in vars(Catalog).values() if isinstance(kind, Kind)}
"""Every kind of component by name, such as ``budget``."""


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code, for the model types of
    transformers and of the families of installed plugins. Repeated calls have no further effect."""
    from transformers import CONFIG_MAPPING

    from ..models.modeling_llmpruner import MODEL_TYPE_PREFIX
    from ..models.modeling_llmpruner import register as register_types

    catalog = Catalog()
    catalog.register_models()
    types = {*CONFIG_MAPPING, *(t for cls in catalog.families.values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
