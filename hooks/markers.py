"""The two markers of pluggy under this project's name."""

import pluggy

ENTRY_POINT_GROUP = "pivot_plugin"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)
