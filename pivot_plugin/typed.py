"""Values and the types that they are annotated with, in words that a user reads."""

import numbers
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

# of a number, and of the text of a value in an error
LARGEST, LONGEST = 2.0**63, 200
_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    Path: "a path",
    type(None): "null",
}


def fits(value: object, expected: Any) -> bool:
    """Whether a value has an annotated type; as in YAML, a whole number is a number, and true is none.

    Args:
        value: to look at.
        expected: annotation.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is list:
        # trainers take one name for a list of one, too
        items = value if isinstance(value, list | tuple) else [value]
        return not isinstance(value, Mapping) and all(fits(item, arguments[0]) for item in items)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values())
    if origin is tuple:
        fixed = len(arguments) == len(value) if isinstance(value, list | tuple) and ... not in arguments else True
        return isinstance(value, list | tuple) and fixed and all(fits(item, arguments[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if expected in (int, float):
        # numpy's numbers too, and none that is not one; no trainer counts beyond what 64 bits hold
        kind = numbers.Integral if expected is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and bool(-LARGEST <= value <= LARGEST)  # type: ignore[operator]
    if expected is str:
        return isinstance(value, str | Path)
    return isinstance(value, type(None) if expected is None else expected)


def wanted(expected: Any) -> str:
    """An annotated type in words.

    Args:
        expected: annotation.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        named = [one for one in arguments if not (isinstance(one, type) and issubclass(one, Enum))]
        return " or ".join(dict.fromkeys(wanted(one) for one in named))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (dict, Mapping):
        return "a mapping"
    if origin is list:
        return "a list" if arguments[0] is Any else f"a list, each of it {wanted(arguments[0])}"
    return _WORDS.get(expected, getattr(expected, "__name__", str(expected)))


def shown(value: object) -> str:
    """A value in an error: what it is where it would be long to say."""
    if isinstance(value, Mapping):
        return "a mapping"
    if value is None or isinstance(value, str | int | float | Path) or (isinstance(value, list) and len(value) < 9):
        try:
            text = repr(value)
        # an integer of thousands of digits cannot be written
        except (ValueError, RecursionError):
            return f"a {type(value).__name__}"
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"a {type(value).__name__}"
