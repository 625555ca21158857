"""The door of a recipe: mappings come in, typed sections go out, and whatever is wrong is named by its key.

A section is a dataclass. Its fields are the keys that the recipe itself reads: a value must have the annotated type, is
made a section where that is one, and is given to a function of value and key where one is annotated. A section with a
field `settings` takes every field of the configuration class in `CONFIG` beside them, for the trainer; so nowhere else
need be said which keys are whose.
"""

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from peft import LoraConfig

from pivot_plugin.errors import SettingsError, unknown
from pivot_plugin.training.plan import lora_settings
from pivot_plugin.typed import fits, shown, wanted

Key = tuple[str, ...]
S = TypeVar("S", bound="Section")
SETTINGS = "settings"
# of a configuration: what the recipe itself decides
DECIDED = ("output_dir", "seed", "train")
_PLAIN = (str, int, float, bool)


class RecipeError(SettingsError):
    """A key or a value of a recipe that cannot be used.

    Args:
        finding, remedy: as for `PivotError`.
        key: where it stands: the keys from the root of the recipe to it.
    """

    def __init__(self, finding: str = "", remedy: str = "", key: Key = ()) -> None:
        super().__init__(finding, remedy)
        self.args = (self.finding, self.remedy, key)
        self.key = key


class Section:
    """What the sections of a recipe share."""

    # configuration of the trainer whose fields go into `settings`
    CONFIG: ClassVar[type | None] = None

    def check(self, key: Key) -> None:
        """Look at what one value alone cannot tell.

        Args:
            key: where the section stands.

        Raises:
            RecipeError: for values that do not go together.
        """

    def as_dict(self) -> dict[str, Any]:
        """The section in words that JSON has, without what is null."""
        return {name: plain(value) for name, value in flat(self).items() if value is not None}


def read(section: type[S], value: object, key: Key) -> S:
    """Make a section of what a recipe says.

    Args:
        section: its class.
        value: a mapping, or the section itself, which is checked again.
        key: where it stands.

    Raises:
        RecipeError: for a key that the section has not, a value of another type, or what its own `check` refuses.
    """
    made = section(**values_of(section, value, key))
    made.check(key)
    return made


def values_of(section: type[Section], value: object, key: Key) -> dict[str, Any]:
    """Arguments to make a section of, each read and checked; as `read` otherwise."""
    given: object = flat(value) if isinstance(value, section) else value
    if not isinstance(given, Mapping):
        raise RecipeError(f"{_dotted(key)} is {shown(given)}.", "Give a mapping of its keys.", key)
    own, passed = _own(section), passed_on(section)
    values: dict[str, Any] = {SETTINGS: {}} if passed else {}
    for name, item in given.items():
        at = (*key, str(name))
        if name in own:
            values[name] = _value(item, own[name], at)
        elif name in passed:
            values[SETTINGS][name] = checked(item, passed[name], at)
        else:
            error = unknown("key", name, [*own, *passed], f"{_dotted(key) or 'a recipe'} has no key {str(name)!r}.")
            raise RecipeError(error.finding, error.remedy, at)
    needed = [one.name for one in _fields(section) if one.default is MISSING and one.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        remedy = f"Give {', '.join(lacking)}." if key else "See a ready recipe: pivot recipe show embedded."
        raise RecipeError(f"{_dotted(key) or 'The recipe'} lacks {', '.join(lacking)}.", remedy, key)
    return values


def _value(value: object, expected: Any, key: Key) -> Any:
    """A value of a field, by its annotation."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return arguments[1](value, key)
    if _is_section(expected):
        # a section whose keys are all left out may stand there as nothing
        return read(expected, {} if value is None else value, key)
    if arguments and _is_section(arguments[0]):
        return None if value is None else read(arguments[0], value, key)
    if origin is dict and _is_section(arguments[1]):
        if not isinstance(value, Mapping | None):
            raise RecipeError(f"{_dotted(key)} is {shown(value)}.", "Give a mapping.", key)
        return {str(name): _value(item, arguments[1], (*key, str(name))) for name, item in (value or {}).items()}
    return checked(value, expected, key)


def _is_section(expected: object) -> bool:
    return isinstance(expected, type) and issubclass(expected, Section)


def passed_on(section: type[Section]) -> dict[str, Any]:
    """Keys that a section hands on to the trainer, and their types."""
    if section.CONFIG is None:
        return {}
    hints, own = _hints(section.CONFIG), _own(section)
    return {name: hints[name] for name in _names(section.CONFIG) if name not in (*DECIDED, *own)}


def flat(section: Section) -> dict[str, Any]:
    """A section as the mapping that it can be read from."""
    return {name: getattr(section, name) for name in _own(section)} | dict(getattr(section, SETTINGS, {}))


def checked(value: object, expected: Any, key: Key) -> Any:
    """A value of the type that is expected of it.

    Args:
        value: as given.
        expected: annotation of a field.
        key: where it stands.

    Raises:
        RecipeError: if it is of another type, with what would be right.
    """
    if not fits(value, expected):
        raise RecipeError(f"{_dotted(key)} is {shown(value)}.", f"Give {wanted(expected)}.", key)
    return value


def plain(value: object) -> Any:
    """Settings in words that JSON has: what is loaded already by its class and size, a function by its name."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Section):
        return value.as_dict()
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple) and all(
        item is None or isinstance(item, _PLAIN) or callable(item) for item in value
    ):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, LoraConfig):
        return plain(lora_settings(value))
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    name = (
        getattr(value, "__qualname__", type(value).__name__) if callable(value) and not size else type(value).__name__
    )
    return f"{name}{size}"


def _dotted(key: Key) -> str:
    return ".".join(key)


def _fields(owner: Any) -> tuple[Field[Any], ...]:
    return fields(owner)


def _names(owner: object) -> list[str]:
    return [one.name for one in _fields(owner)]


def _own(section: object) -> dict[str, Any]:
    """Fields of a section, or of its class, and their annotations; what is handed on aside."""
    hints = _hints(section if isinstance(section, type) else type(section))
    return {name: hints[name] for name in _names(section) if name != SETTINGS}


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)
