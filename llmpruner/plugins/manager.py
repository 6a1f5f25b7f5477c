"""pluggy's plugin manager, but leaving out single invalid implementations instead of whole plugins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs

if TYPE_CHECKING:
    from pluggy import HookimplOpts

HOOKS: dict[str, Callable[..., Any]] = {
    name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.PROJECT}_spec")
}
"""Name of every hook → its specification, in order of definition."""


class HookManager(pluggy.PluginManager):
    """A plugin manager with the hooks of `hookspecs`. ``refused``: implementations that were left out at registration,
    each as (plugin, hook, reason)."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.refused: list[tuple[object, str, str]] = []
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> HookimplOpts | None:
        """The options of an implementation, None for other attributes; pluggy calls it for all attributes of a plugin.

        Raises `TypeError` for a plugin that cannot be used at all.
        """
        options = super().parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in HOOKS:
                self._refuse_unmarked(plugin, name)
            return None
        hash(plugin)  # raises for a plugin without a hash value, which pluggy could not call
        hook = options.get("specname") or name
        if hook not in HOOKS and options.get("optionalhook"):
            return None
        reason = _mismatch(hook, getattr(plugin, name)) or self._wrong_wrapper(plugin, name, hook, options)
        if reason is None:
            return options
        self.refused.append((plugin, hook, reason))
        return None

    def _refuse_unmarked(self, plugin: Any, hook: str) -> None:
        value = getattr(plugin, hook)
        if not callable(value):
            raise TypeError(f"{hook} is {short_repr(value)}; expected a function marked with @hookimpl")
        self.refused.append((plugin, hook, "the function is not marked with @hookimpl"))

    def _wrong_wrapper(self, plugin: Any, name: str, hook: str, options: HookimplOpts) -> str | None:
        """Why a wrapper cannot be called; None when it can, or when the function is no wrapper."""
        if not _wraps(options):
            return None
        if options.get("wrapper") and options.get("hookwrapper"):
            return "the function is marked both wrapper and hookwrapper; keep wrapper"
        if not inspect.isgeneratorfunction(getattr(plugin, name)):
            return "the function is marked as a wrapper and does not yield"
        # A hook is called for one plugin by leaving out the others, and with them their wrappers.
        for other in dir(plugin):
            found = super().parse_hookimpl_opts(plugin, other)
            if found and (found.get("specname") or other) == hook and not _wraps(found):
                return "a plugin either implements a hook or wraps it; give the wrapper an entry point of its own"
        return None


def _wraps(options: HookimplOpts) -> bool:
    return bool(options.get("wrapper") or options.get("hookwrapper"))


def _mismatch(hook: str, function: Callable[..., Any]) -> str | None:
    """Why this version cannot call ``function`` for ``hook``; None when it can."""
    if hook not in HOOKS:
        near = get_close_matches(hook, HOOKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"this version of llmpruner (hooks {hookspecs.HOOK_VERSION}) has no such hook{hint}"
    known = inspect.signature(HOOKS[hook]).parameters
    unknown = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in known
    ]
    if not unknown:
        return None
    return f"the hook has no argument {' or '.join(unknown)}; it has: {', '.join(known) or 'none'}"
