"""The plugin manager: who is installed, who is asked, and who is at fault.

Plain pluggy does not isolate plugins: the first that fails to load stops the others, a second distribution with a name
already taken is skipped in silence, and one raising implementation keeps the rest from being called. So entry points
are loaded and hooks are called one plugin at a time here.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from typing import Any

import pluggy

from pivot_plugin.errors import PivotError, PluginError

from . import specs
from .markers import ENTRY_POINT_GROUP

BUILT_IN = {
    "published-layouts": "pivot_plugin.preferences.published",
    "objectives": "pivot_plugin.objectives",
    "rewards": "pivot_plugin.rewards.lookup",
    "probes": "pivot_plugin.probes.lookup",
    "embedded-world": "pivot_plugin.quickstart.sources",
    "generic": "pivot_plugin.adapters.generic",
    "llava": "pivot_plugin.adapters.llava",
    "qwen-vl": "pivot_plugin.adapters.qwen_vl",
    "internvl": "pivot_plugin.adapters.internvl",
}
DISABLE_VARIABLE = "PIVOT_DISABLE_PLUGINS"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginInfo:
    """What is known of one plugin.

    Attributes:
        name: its entry-point name.
        distribution: the distribution it came with, "pivot-plugin" for built-in ones.
        version: of that distribution.
        hooks: names of the hooks it implements, empty where it is not loaded.
        problem: why it is not loaded, None where it is.
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    problem: str | None = None


@cache
def manager() -> pluggy.PluginManager:
    """The one plugin manager of the process, with everything installed and not disabled.

    Built-in adapters are registered first and so asked last. A plugin that cannot be loaded is reported in a warning
    and listed by `installed`; it does not stop the others.
    """
    return _load()[0]


@cache
def installed() -> tuple[PluginInfo, ...]:
    """Every plugin found, loaded or not, in the order in which they are asked."""
    return tuple(reversed(_load()[1]))


@cache
def _load() -> tuple[pluggy.PluginManager, list[PluginInfo]]:
    plugins = pluggy.PluginManager(ENTRY_POINT_GROUP)
    plugins.add_hookspecs(specs)
    disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",") if name.strip()}
    found = []
    for name, module in BUILT_IN.items():
        if name in disabled:
            found.append(PluginInfo(name, "pivot-plugin", "built in", problem=f"disabled by {DISABLE_VARIABLE}"))
            continue
        plugins.register(import_module(module), name)
        found.append(PluginInfo(name, "pivot-plugin", "built in", _hooks_of(plugins, name)))
    for entry, distribution, version in _entry_points():
        if entry.name in disabled:
            problem: str | None = f"disabled by {DISABLE_VARIABLE}"
        else:
            problem = _register(plugins, entry, {info.name: info.distribution for info in found})
            if problem:
                logger.warning(
                    "Plugin %r of distribution %s %s is left out: %s. Update or uninstall it, or set %s=%s.",
                    *(entry.name, distribution, version, problem, DISABLE_VARIABLE, entry.name),
                )
        hooks = () if problem else _hooks_of(plugins, entry.name)
        found.append(PluginInfo(entry.name, distribution, version, hooks, problem))
    return plugins, found


def _entry_points() -> Iterator[tuple[EntryPoint, str, str]]:
    seen = set()
    for distribution in sorted(distributions(), key=lambda found: found.name):
        for entry in distribution.entry_points.select(group=ENTRY_POINT_GROUP):
            key = (distribution.name, entry.name)
            if key not in seen:
                seen.add(key)
                yield entry, distribution.name, distribution.version


def _register(plugins: pluggy.PluginManager, entry: EntryPoint, taken: dict[str, str]) -> str | None:
    """Load and register one entry point; return what went wrong, if anything."""
    if entry.name in taken:
        return f"the name is taken by a plugin of {taken[entry.name]}"
    try:
        plugins.register(entry.load(), entry.name)
        plugins.check_pending()
    # a plugin is foreign code: whatever it raises while loading must not stop the others
    except Exception as error:
        if plugins.has_plugin(entry.name):
            plugins.unregister(name=entry.name)
        return f"{type(error).__name__}: {error}"
    return None


def _hooks_of(plugins: pluggy.PluginManager, name: str) -> tuple[str, ...]:
    callers = plugins.get_hookcallers(plugins.get_plugin(name)) or []
    return tuple(sorted(caller.name for caller in callers))


def _one_at_a_time(hook: str) -> Iterator[tuple[str, pluggy.HookCaller]]:
    """Plugins that implement a hook, in calling order, each with a caller for it alone."""
    plugins = manager()
    everyone = plugins.get_plugins()
    for implementation in reversed(getattr(plugins.hook, hook).get_hookimpls()):
        others = [plugin for plugin in everyone if plugin is not implementation.plugin]
        yield implementation.plugin_name, plugins.subset_hook_caller(hook, remove_plugins=others)


def _blame(name: str, hook: str, error: Exception) -> PluginError:
    info = next((info for info in installed() if info.name == name), PluginInfo(name, "unknown", "?"))
    return PluginError(
        f"Plugin {name!r} of distribution {info.distribution} ({info.version}) raised "
        f"{type(error).__name__} in {hook}: {error}.",
        f"Mend or update {info.distribution}, or leave the plugin out with {DISABLE_VARIABLE}={name}.",
    )


def _call(name: str, hook: str, caller: pluggy.HookCaller, arguments: dict[str, object]) -> Any:
    """Call one plugin; what it raises by accident is blamed on it, what it raises on purpose is passed on."""
    try:
        return caller(**arguments)
    except PivotError:
        raise
    except Exception as error:
        raise _blame(name, hook, error) from error


def ask(hook: str, **arguments: object) -> object | None:
    """Call a firstresult hook, one plugin at a time, and return the first answer that is not None.

    Raises:
        PluginError: naming the plugin and its distribution, if an implementation raises; a `PivotError` it raises on
            purpose is passed on as it is.
    """
    for name, caller in _one_at_a_time(hook):
        if (answer := _call(name, hook, caller, arguments)) is not None:
            return answer
    return None


def collect(hook: str, **arguments: object) -> list[tuple[str, Any]]:
    """Call a collected hook; return (plugin name, answer) in order of registration, so that later ones may override.

    Raises:
        PluginError: as `ask`.
    """
    answers: list[tuple[str, Any]] = []
    for name, caller in _one_at_a_time(hook):
        results = _call(name, hook, caller, arguments)
        answers.extend((name, answer) for answer in results if answer is not None)
    return answers[::-1]


def offered(hook: str) -> dict[str, Any]:
    """What plugins offer by name through a collected hook; a plugin's wins over a built-in one.

    Raises:
        PluginError: as `ask`, or if a plugin offers no mapping.
    """
    found: dict[str, Any] = {}
    for name, answer in collect(hook):
        if not isinstance(answer, Mapping):
            raise PluginError(
                f"Plugin {name!r} answered {hook} with a {type(answer).__name__}.",
                f"It must return a mapping of names to functions; mend or disable it ({DISABLE_VARIABLE}).",
            )
        found.update(answer)
    return found


def gather(hook: str, **arguments: object) -> list[tuple[str, Any]]:
    """As `collect`; a plugin that raises is named in a warning and left out."""
    answers: list[tuple[str, Any]] = []
    for name, caller in _one_at_a_time(hook):
        try:
            answers.extend((name, answer) for answer in caller(**arguments) if answer is not None)
        # foreign code after the paid-for work: nothing it raises may lose the result
        except Exception as error:
            logger.warning("%s", _blame(name, hook, error))
    return answers[::-1]


def notify(hook: str, **arguments: object) -> None:
    """Call a notified hook on every plugin; one that raises is named in a warning and does not stop the rest."""
    for name, caller in _one_at_a_time(hook):
        try:
            caller(**arguments)
        # foreign code after the paid-for work: nothing it raises may lose the run
        except Exception as error:
            logger.warning("%s", _blame(name, hook, error))
