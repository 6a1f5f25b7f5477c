"""Mistakes that are answered at once: what can be seen without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from ..calibration.documents import PYDOC, check_source, parse_mixture
from ..errors import SettingsError, near, not_pruned
from ..files import check_new_directory
from ..models.record import read_record
from ..models.reference import resolve
from ..settings import PruneSettings, RecoverSettings, Settings, flag_of, option_of

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


_GROUPS: dict[str, type[Settings]] = {"plan": PruneSettings, "prune": PruneSettings, "recover": RecoverSettings}
"""The settings of commands that have some without an option."""


def check(command: str, values: Mapping[str, Any], settings: Sequence[Any], catalog: Catalog) -> None:
    """Raise for models, outputs, settings and data that no run could use. ``values``: of the command's parameters.
    ``settings``: several for several ratios."""
    from ..recipes.recipe import JOBS

    models = values.get("models") or [model for model in (values.get("model"),) if model is not None]
    references = [resolve(str(model), catalog) for model in models]
    if command in ("prune", "recover", "export"):
        output = values["output"]
        if len(settings) == 1 or not output.with_name(output.name + ".pruning").is_dir():
            check_new_directory(output)
    if command not in ("plan", *JOBS) or values.get("plan_file") is not None:
        return
    create, check_data = JOBS["prune" if command == "plan" else command]
    job, *_ = [create(each, catalog) for each in settings]
    if command == "evaluate":  # whose metrics read all of their data
        for part in parse_mixture(settings[0].perplexity or PYDOC):
            check_source(part.source)
    else:
        check_data(job)
    if command == "recover":
        folder = references[0].directory
        if job.reads_dense and (folder / "config.json").is_file() and read_record(folder) is None:
            raise not_pruned(references[0].text)


class Command(TyperCommand):
    """A command that answers an unknown option in one line, with the one that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # its module depends on the version of typer
                raise
            option = str(getattr(error, "option_name", ""))
            model = _GROUPS.get(self.name or "")
            field = option.lstrip("-").replace("-", "_")
            if model is not None and option_of(model, field)["advanced"]:
                hint = f"; write {flag_of(model, field)}=…"
            else:
                hint = near(option, [flag for parameter in self.params for flag in parameter.opts])
            raise SettingsError(f"`llmpruner {self.name}` has no option {option}{hint}") from error
