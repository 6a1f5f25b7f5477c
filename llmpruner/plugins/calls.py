"""Calling one hook, without implementations or wrappers that fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

import pluggy

BUILTIN = "builtin"
"""The name of the plugin that holds the built-in components."""


@dataclass(frozen=True)
class Answer:
    """The result of one call. ``plugin``: whose implementation was called; None where a hook has only wrappers.
    ``wrappers``: the plugins whose wrappers were called around it. ``result``: all returned elements in one list; empty
    for a hook that returns nothing. ``arguments``: those of the call."""

    plugin: str | None
    wrappers: tuple[str, ...]
    result: list[Any]
    arguments: Mapping[str, Any]


class WrongResult(Exception):
    """A hook did not return a list."""


class HookCalls:
    """All calls of one hook. ``failed``: each implementation or wrapper that was left out, as (plugin, reason)."""

    def __init__(
        self, manager: pluggy.PluginManager, hook: str, arguments: Callable[[], Mapping[str, Any]], returns: bool
    ) -> None:
        self.failed: list[tuple[str, str]] = []
        self._manager, self._hook, self._arguments, self._returns = manager, hook, arguments, returns
        found = getattr(manager.hook, hook).get_hookimpls()
        self._plugins = {i.plugin_name: i.plugin for i in found}
        # The order in pluggy: the first is the innermost.
        self._wrappers = tuple(dict.fromkeys(i.plugin_name for i in found if i.wrapper or i.hookwrapper))
        implementing = self._plugins.keys() - {*self._wrappers}
        self._implementing = sorted(implementing, key=lambda name: (name != BUILTIN, name))

    def answers(self) -> list[Answer]:
        """The answers of all implementations that do not fail, the built-in one first, then by the plugin's name."""
        while self._plugins:
            wrappers = self._wrappers
            answers = [self._answer(plugin) for plugin in self._implementing or (None,)]
            # If a wrapper failed, all are called again without it, so that it has an effect on all results or on none.
            if self._wrappers == wrappers:
                return [answer for answer in answers if answer is not None]
        return []

    def _answer(self, plugin: str | None) -> Answer | None:
        """The answer of one implementation, without wrappers that fail; None when the implementation fails."""
        outcome = self._try(plugin, self._wrappers)
        if self._wrappers and not isinstance(outcome, Answer):
            outcome = self._try(plugin, ())
            if isinstance(outcome, Answer):
                return self._without_failing_wrappers(plugin, outcome)
        if isinstance(outcome, Answer):
            return outcome
        self._fail(plugin, outcome)
        return None

    def _without_failing_wrappers(self, plugin: str | None, answer: Answer) -> Answer:
        """The answer with all wrappers that do not fail, tried from the innermost. ``answer``: without wrappers."""
        working: tuple[str, ...] = ()
        for wrapper in self._wrappers:
            outcome = self._try(plugin, (*working, wrapper))
            if isinstance(outcome, Answer):
                answer, working = outcome, (*working, wrapper)
            else:
                self._fail(wrapper, outcome)
        self._wrappers = working
        return answer

    def _fail(self, plugin: str | None, error: BaseException) -> None:
        reason = str(error) if isinstance(error, WrongResult) else f"it raised {type(error).__name__}: {error}"
        self.failed.append((str(plugin), reason))

    def _try(self, plugin: str | None, wrappers: Sequence[str]) -> Answer | BaseException:
        arguments = self._arguments()
        inside = f", inside the wrappers of {', '.join(wrappers)}" if wrappers else ""
        self._trace(f"{self._hook} of {plugin}{inside}")
        try:
            return Answer(plugin, tuple(wrappers), self._call(plugin, wrappers, arguments), arguments)
        except (Exception, SystemExit) as error:
            self._trace(f"{self._hook} of {plugin}{inside} failed: {type(error).__name__}: {error}")
            return error

    def _call(self, plugin: str | None, wrappers: Sequence[str], arguments: Mapping[str, Any]) -> list[Any]:
        """Call the hook for these plugins alone."""
        absent = [other for name, other in self._plugins.items() if name not in (plugin, *wrappers)]
        with warnings.catch_warnings():
            # pluggy warns of an old-style wrapper that raises; the failure is recorded.
            warnings.simplefilter("ignore", pluggy.PluggyTeardownRaisedWarning)
            results = self._manager.subset_hook_caller(self._hook, absent)(**arguments)
        if not self._returns:
            return []
        if plugin is not None and not results:
            # pluggy leaves None out of its results; or a wrapper has emptied them.
            if not wrappers:
                raise WrongResult("it returned None; expected a list of classes")
            self._call(plugin, (), self._arguments())
        return _joined(results)

    def _trace(self, line: str) -> None:
        self._manager.trace.root.get("plugin")(line)


def _joined(results: Any) -> list[Any]:
    """The elements of all lists that the implementations of a hook returned. Raises `WrongResult`."""
    if not isinstance(results, (list, tuple)):
        raise WrongResult(f"it returned {short_repr(results)}; expected what it was given, a list of results")
    found: list[Any] = []
    for result in results:
        if not isinstance(result, (list, tuple, Iterator)):
            raise WrongResult(f"it returned {short_repr(result)}; expected a list of classes")
        found.extend(result)
    return found
