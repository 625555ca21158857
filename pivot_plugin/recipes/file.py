"""A recipe as a file: read with the lines of its keys, so that a wrong one is named where it stands."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pivot_plugin.errors import SettingsError, said

from .door import Key, RecipeError, values_of
from .plan import check_settings
from .post_training import PostTraining, check_post_training
from .sections import PivotRecipe

READY = ("paper", "single-gpu", "embedded", "twin")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as everywhere but in YAML 1.1."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: str | Path) -> PivotRecipe | PostTraining:
    """Read a recipe: one that begins with an MLLM, where it has a key `model`, else with a bare encoder.

    Args:
        path: of a YAML file, or the name of a ready one: "paper", "single-gpu", "embedded" or "twin".

    Raises:
        SettingsError: if it cannot be read, or for a key or value that is none, with its line.
    """
    name, text = _text(path)
    with _yaml(name, text):
        node = yaml.compose(text, Loader=_Loader)
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(
            f"{name}, line 1: it holds no keys.", "Begin with one of the ready recipes: pivot recipe show embedded."
        )
    lines: dict[Key, int] = {}
    _note_lines(node, (), name, lines)
    with _yaml(name, text):
        content = _Constructing(text, node).content
    try:
        if "model" in content:
            post_training = PostTraining(**values_of(PostTraining, content, ()))
            check_post_training(post_training)
            return post_training
        recipe = PivotRecipe(**values_of(PivotRecipe, content, ()))
        check_settings(recipe)
        return recipe
    except RecipeError as error:
        raise RecipeError(
            f"{name}, line {_line(error.key, lines)}: {error.finding}", error.remedy, error.key
        ) from error


class _Constructing(_Loader):
    """The values of a document that is composed already, and where the one stands that cannot be made."""

    def __init__(self, text: str, document: yaml.Node) -> None:
        super().__init__(text)
        self.content: Any = self.construct_document(document)  # type: ignore[no-untyped-call]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (yaml.YAMLError, RecursionError):
            raise
        # a tag may ask for an integer where a word stands: whatever its reader raises
        except Exception as error:
            raise yaml.constructor.ConstructorError(None, None, said(error), node.start_mark) from error


@contextmanager
def _yaml(name: str, text: str) -> Iterator[None]:
    """Errors of the parser in one sentence, with the line."""
    try:
        yield
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
        line = text[:position].count("\n") if mark is None and isinstance(position, int) else getattr(mark, "line", 0)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or said(error)
        raise SettingsError(f"{name}, line {line + 1}, is not YAML: {problem}.", "Mend that line.") from error
    except RecursionError as error:
        raise SettingsError(f"{name}, line 1: it is nested too deeply.", "Mend it.") from error


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
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SettingsError(
            f"{Path(path).name}, line {line}, is no UTF-8: {said(error)}.", "Save it as UTF-8."
        ) from error
    except (OSError, ValueError) as error:
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


def _line(key: Key, lines: dict[Key, int]) -> int:
    """Where a key stands, or the nearest key around it that does; the whole recipe begins in line 1."""
    while key:
        if key in lines:
            return lines[key]
        key = key[:-1]
    return 1
