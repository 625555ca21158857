"""A recipe as a file: read with the lines of its keys, so that a wrong one is named where it stands."""

import re
from importlib.resources import files
from pathlib import Path

import yaml

from pivot_plugin.errors import SettingsError

from .door import Key, RecipeError, values_of
from .sections import PivotRecipe

READY = ("paper", "single-gpu", "embedded")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as everywhere but in YAML 1.1."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: str | Path) -> PivotRecipe:
    """Read a recipe.

    Args:
        path: of a YAML file, or the name of a ready one: "paper", "single-gpu" or "embedded".

    Raises:
        SettingsError: if it cannot be read, or for a key or value that is none, with its line.
    """
    name, text = _text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name} is not YAML: {error}", "Mend it at the place named.") from error
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(
            f"{name} holds no keys.", "Begin with one of the ready recipes: pivot recipe show embedded."
        )
    lines: dict[Key, int] = {}
    _note_lines(node, (), name, lines)
    try:
        return PivotRecipe(**values_of(PivotRecipe, content, ()))
    except RecipeError as error:
        line = _line(error.key, lines)
        where = name if line is None else f"{name}, line {line}"
        raise RecipeError(f"{where}: {error.finding}", error.remedy, error.key) from error


def ready_recipe(name: str) -> str:
    """The text of a ready recipe.

    Raises:
        SettingsError: if there is none of that name.
    """
    if name not in READY:
        raise SettingsError(f"There is no ready recipe {name!r}.", f"There are {', '.join(READY)}.")
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def _text(path: str | Path) -> tuple[str, str]:
    if str(path) in READY:
        return f"{path}.yaml", ready_recipe(str(path))
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The recipe {str(path)!r} cannot be read: {error}.",
            f"Give a YAML file, or one of {', '.join(READY)}.",
        ) from error


def _note_lines(node: yaml.MappingNode, key: Key, name: str, lines: dict[Key, int]) -> None:
    """Remember where every key of a mapping stands; YAML itself would let the last of two win."""
    for key_node, value in node.value:
        at, line = (*key, str(key_node.value)), key_node.start_mark.line + 1
        if at in lines:
            raise SettingsError(
                f"{name}, line {line}: {'.'.join(at)} stands there again, after line {lines[at]}.", "Keep one."
            )
        lines[at] = line
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, at, name, lines)


def _line(key: Key, lines: dict[Key, int]) -> int | None:
    """Where a key stands, or the nearest key around it that does."""
    while key:
        if key in lines:
            return lines[key]
        key = key[:-1]
    return None
