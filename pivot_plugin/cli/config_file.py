"""A run written down: `--config run.yaml`, with the names of the function's arguments and of `--set`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import typer

from pivot_plugin.choices import OnBadRow, Train
from pivot_plugin.errors import SettingsError
from pivot_plugin.typed import fits, shown, wanted

# options of the command that a file may name, and what they may be; every other key is a setting of the trainer
KEYS: dict[str, Any] = {
    "model": str,
    "prefs": str,
    "output_dir": str,
    "objective": str,
    "train": Train,
    "lora": int | str | None,
    "eval_prefs": str | None,
    "eval_fraction": float,
    "rewards": dict[str, float] | list[str] | str | None,
    "columns": dict[str, str] | None,
    "split": str | None,
    "allow_urls": bool,
    "image_folder": str | None,
    "make": dict[str, float] | list[str] | str | None,
    "difficulty": float | None,
    "count": int | None,
    "on_bad_row": OnBadRow,
    "save_model": bool,
}


class Config:
    """What a file says of a run; what the command line says comes first.

    Args:
        context: of the command, which knows what was typed.
        file: YAML, None for nothing.

    Raises:
        SettingsError: if it cannot be read, holds no mapping, or a value is of another type.
    """

    def __init__(self, context: typer.Context, file: Path | None) -> None:
        self._context = context
        self._said = {} if file is None else _read(file)

    def of(self, name: str, value: Any, key: str = "") -> Any:
        """The value of an option.

        Args:
            name: of the parameter.
            value: that the command has, typed or by default.
            key: in the file, where it is another.
        """
        key = key or name
        source = self._context.get_parameter_source(name)
        # by name: typer may bring a click of its own
        typed = source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT", "PROMPT")
        return value if typed or key not in self._said else self._said[key]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that is no option: settings of the trainer."""
        return {name: value for name, value in self._said.items() if name not in KEYS}


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        said = yaml.load(file.read_text(encoding="utf-8"), Loader=_Numbers())
    except OSError as error:
        raise SettingsError(f"{str(file)!r} cannot be read: {error.strerror}.", "Write one by `pivot init`.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{str(file)!r} is no YAML: {error}", "Write one by `pivot init`.") from error
    if not isinstance(said, Mapping) or not all(isinstance(name, str) for name in said):
        raise SettingsError(f"{str(file)!r} holds no settings by name.", "Write one by `pivot init`.")
    for name, value in said.items():
        if name in KEYS and not fits(value, KEYS[name]):
            kind = KEYS[name]
            words = (
                f"one of {', '.join(map(repr, get_args(kind)))}" if name in ("train", "on_bad_row") else wanted(kind)
            )
            raise SettingsError(f"{name} in {str(file)!r} is {shown(value)}.", f"Give {words}.")
    return dict(said)


def _Numbers() -> type[Any]:
    """YAML's safe loader, which reads 1e-4 as the number it is, and not as text."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader
