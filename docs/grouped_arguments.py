"""An extension of griffe: `first, second: what both are` in a docstring is read as an entry for each of them."""

import re

from griffe import Extension, Object

GROUPED = re.compile(r"^( +)((?:\*{0,2}\w+, )+\*{0,2}\w+):((?:.*)(?:\n\1 +.*)*)$", re.MULTILINE)


def apart(docstring: str) -> str:
    """A docstring with an entry for each of the names that share one."""
    return GROUPED.sub(
        lambda entry: "\n".join(f"{entry[1]}{name}:{entry[3]}" for name in entry[2].split(", ")), docstring
    )


class GroupedArguments(Extension):
    """Reads the docstrings of every object so."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring:
            obj.docstring.value = apart(obj.docstring.value)
