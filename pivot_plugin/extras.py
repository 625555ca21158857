"""Optional dependencies: imported where they are used, with the command that installs them."""

from importlib import import_module
from types import ModuleType

from pivot_plugin.errors import SettingsError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an extra.

    Args:
        module: dotted name.
        extra: the extra of this package that brings it.
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        SettingsError: with the command to install it, where it is not installed. A module that is installed but broken
            raises its own error.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise SettingsError(
            f"{purpose} needs {error.name}, which is not installed.", f'Run: pip install "pivot-plugin[{extra}]".'
        ) from error
