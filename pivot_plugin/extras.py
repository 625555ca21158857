"""Optional dependencies: imported where they are used, with the command that installs them."""

from importlib import import_module
from importlib.util import find_spec
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


# what transformers reports to, by the name in report_to: modules of which one is needed, and what installs it
TRACKERS = {
    "trackio": (("trackio",), "trackio"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "swanlab": (("swanlab",), "swanlab"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "dvclive": (("dvclive",), "dvclive"),
    "neptune": (("neptune",), "neptune"),
}


def check_trackers(report_to: object) -> None:
    """Make sure that what a run is to report to is installed, before anything is loaded.

    Args:
        report_to: a name, or a list of names; those that are not known here are left to transformers.

    Raises:
        SettingsError: with the command to install it.
    """
    names = [report_to] if isinstance(report_to, str) else report_to if isinstance(report_to, list | tuple) else []
    for name in names:
        modules, package = TRACKERS.get(str(name), ((), ""))
        if modules and not any(find_spec(module) for module in modules):
            raise SettingsError(
                f"report_to names {name!r}, which is not installed.",
                f"Run: pip install {package}; or leave report_to out: the run's own log and report need no tracker.",
            )
