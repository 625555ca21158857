"""The doors of this package: hook specifications, the marker plugins use, and the plugin manager.

A plugin is an installed distribution with an entry point in the group `pivot_plugin`; its functions are marked with
`hookimpl` and named after the specifications in `pivot_plugin.hooks.hookspecs`.
"""

from .manager import PluginInfo, ask, collect, installed, manager, named, notify, offered
from .markers import ENTRY_POINT_GROUP, hookimpl, hookspec

__all__ = [
    "ENTRY_POINT_GROUP",
    "PluginInfo",
    "ask",
    "collect",
    "hookimpl",
    "hookspec",
    "installed",
    "manager",
    "named",
    "notify",
    "offered",
]
