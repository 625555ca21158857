"""The plugin manager: who is installed, who is asked, and who is at fault.

Plain pluggy does not isolate plugins: the first that fails to load stops the others, a second distribution with a name
already taken is skipped in silence, and one raising implementation keeps the rest from being called. So entry points
are loaded and hooks are called one plugin at a time here. Built-in plugins are imported when one of their hooks is
first called: who looks for an adapter imports no probe and no trainer.
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
from pluggy import HookImpl

from pivot_plugin.errors import PivotError, PluginError, unknown

from . import hookspecs
from .markers import ENTRY_POINT_GROUP


@dataclass(frozen=True)
class BuiltIn:
    """A plugin of this package.

    Attributes:
        module: where it is.
        hooks: those it implements.
    """

    module: str
    hooks: tuple[str, ...]


BUILT_IN = {
    "published-layouts": BuiltIn("pivot_plugin.data.published", ("pivot_preference_layout",)),
    "stack-layouts": BuiltIn("pivot_plugin.data.stacks", ("pivot_preference_layout",)),
    "objectives": BuiltIn("pivot_plugin.objectives", ("pivot_objectives",)),
    "rewards": BuiltIn("pivot_plugin.rewards.lookup", ("pivot_rewards",)),
    "probes": BuiltIn("pivot_plugin.probes.lookup", ("pivot_probes",)),
    "makers": BuiltIn("pivot_plugin.generation.makers.lookup", ("pivot_makers",)),
    "rejected-pictures": BuiltIn("pivot_plugin.generation.makers.rejected", ("pivot_makers",)),
    "embedded-world": BuiltIn("pivot_plugin.quickstart.sources", ("pivot_sources",)),
    "generic": BuiltIn("pivot_plugin.adapters.generic", ("pivot_adapter",)),
    "llava": BuiltIn("pivot_plugin.adapters.llava", ("pivot_adapter",)),
    "qwen-vl": BuiltIn("pivot_plugin.adapters.qwen_vl", ("pivot_adapter",)),
    "internvl": BuiltIn("pivot_plugin.adapters.internvl", ("pivot_adapter",)),
    "granite-vision": BuiltIn("pivot_plugin.adapters.granite_vision", ("pivot_adapter",)),
    "minicpm": BuiltIn("pivot_plugin.adapters.minicpm", ("pivot_adapter",)),
    "paddleocr-vl": BuiltIn("pivot_plugin.adapters.paddleocr_vl", ("pivot_adapter",)),
    "foreign-checkpoints": BuiltIn(
        "pivot_plugin.adapters.foreign.plugin", ("pivot_model", "pivot_model_trained", "pivot_write_model")
    ),
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
    """The one plugin manager of the process, with every plugin of other distributions that is not disabled.

    A plugin that cannot be loaded is reported in a warning and listed by `installed`; it does not stop the others.
    Built-in plugins join when a hook of theirs is first called.
    """
    return _load()[0]


def installed() -> tuple[PluginInfo, ...]:
    """Every plugin found, loaded or not, in the order in which they are asked."""
    disabled = _disabled()
    built_in = [
        PluginInfo(
            name,
            "pivot-plugin",
            "built in",
            () if name in disabled else plugin.hooks,
            f"disabled by {DISABLE_VARIABLE}" if name in disabled else None,
        )
        for name, plugin in BUILT_IN.items()
    ]
    return tuple(reversed([*built_in, *_load()[1]]))


def _disabled() -> set[str]:
    return {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",") if name.strip()}


@cache
def _load() -> tuple[pluggy.PluginManager, list[PluginInfo]]:
    plugins = pluggy.PluginManager(ENTRY_POINT_GROUP)
    plugins.add_hookspecs(hookspecs)
    disabled = _disabled()
    infos: list[PluginInfo] = []
    for entry, distribution, version in _entry_points():
        if entry.name in disabled:
            problem: str | None = f"disabled by {DISABLE_VARIABLE}"
        else:
            taken = dict.fromkeys(BUILT_IN, "pivot-plugin") | {info.name: info.distribution for info in infos}
            problem = _register(plugins, entry, taken)
            if problem:
                logger.warning(
                    "Plugin %r of distribution %s %s is left out: %s. Update or uninstall it, or set %s=%s.",
                    *(entry.name, distribution, version, problem, DISABLE_VARIABLE, entry.name),
                )
        hooks = () if problem else _hooks_of(plugins, entry.name)
        infos.append(PluginInfo(entry.name, distribution, version, hooks, problem))
    return plugins, infos


def _register_built_ins(hook: str) -> None:
    """Import and register the built-in plugins that implement a hook, where they are not yet."""
    plugins, disabled = manager(), _disabled()
    for name, plugin in BUILT_IN.items():
        if hook in plugin.hooks and name not in disabled and not plugins.has_plugin(name):
            plugins.register(import_module(plugin.module), name)


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


def _implementations(hook: str) -> list[HookImpl]:
    """Who implements a hook, in calling order: the newest plugin first, the built-in ones last."""
    _register_built_ins(hook)
    newest_first = getattr(manager().hook, hook).get_hookimpls()[::-1]
    # the built-in ones join late, and are asked last all the same
    return sorted(newest_first, key=lambda implementation: implementation.plugin_name in BUILT_IN)


def _blame(name: str, hook: str, error: Exception) -> PluginError:
    info = next((info for info in installed() if info.name == name), PluginInfo(name, "unknown", "?"))
    return PluginError(
        f"Plugin {name!r} of distribution {info.distribution} ({info.version}) raised "
        f"{type(error).__name__} in {hook}: {error}.",
        f"Mend or update {info.distribution}, or leave the plugin out with {DISABLE_VARIABLE}={name}.",
    )


def _call(implementation: HookImpl, hook: str, arguments: Mapping[str, object]) -> Any:
    """Call one plugin; what it raises by accident is blamed on it, what it raises on purpose is passed on."""
    try:
        return implementation.function(*(arguments[name] for name in implementation.argnames))
    except PivotError:
        raise
    except Exception as error:
        raise _blame(implementation.plugin_name, hook, error) from error


def ask(hook: str, **arguments: object) -> object | None:
    """Call a firstresult hook, one plugin at a time, and return the first answer that is not None.

    Raises:
        PluginError: naming the plugin and its distribution, if an implementation raises; a `PivotError` it raises on
            purpose is passed on as it is.
    """
    for implementation in _implementations(hook):
        if (answer := _call(implementation, hook, arguments)) is not None:
            return answer
    return None


def collect(hook: str, *, tolerant: bool = False, **arguments: object) -> list[tuple[str, Any]]:
    """Call a collected hook; return (plugin name, answer) in order of registration, so that later ones may override.

    Args:
        hook: its name.
        tolerant: name a plugin that raises in a warning and leave it out, where paid-for work must not be lost.
        **arguments: of the hook.

    Raises:
        PluginError: as `ask`, unless tolerant.
    """
    answers: list[tuple[str, Any]] = []
    for implementation in _implementations(hook):
        try:
            answer = _call(implementation, hook, arguments)
        except PivotError as error:
            if not tolerant:
                raise
            logger.warning("%s", error)
            continue
        if answer is not None:
            answers.append((implementation.plugin_name, answer))
    return answers[::-1]


def offered(hook: str) -> dict[str, Any]:
    """What plugins offer by name through a collected hook; a plugin's wins over a built-in one.

    Raises:
        PluginError: as `ask`, or if a plugin offers no mapping.
    """
    by_name: dict[str, Any] = {}
    for plugin, answer in collect(hook):
        if not isinstance(answer, Mapping):
            raise PluginError(
                f"Plugin {plugin!r} answered {hook} with a {type(answer).__name__}.",
                f"It must return a mapping of names to functions; mend or disable it ({DISABLE_VARIABLE}).",
            )
        by_name.update(answer)
    return by_name


def named(hook: str, name: str, what: str) -> Any:
    """What plugins offer under one name through a collected hook.

    Args:
        hook: its name.
        name: asked for.
        what: it is, in a word, for errors: "reward".

    Raises:
        SettingsError: if nobody offers it, with the nearest names.
        PluginError: as `offered`.
    """
    by_name = offered(hook)
    if name not in by_name:
        raise unknown(what, name, by_name)
    return by_name[name]


def notify(hook: str, **arguments: object) -> None:
    """Call a notified hook on every plugin; one that raises is named in a warning and does not stop the rest."""
    # foreign code after the paid-for work: nothing it raises may lose the run
    collect(hook, tolerant=True, **arguments)
