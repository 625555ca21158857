"""JSON that strangers may have written: read with limits, and its plain values held to what a tower can have.

A configuration decides how much is built before a single weight is read, and a number in it can change every feature
without anything failing. What is not listed here by name is held to be a finite number at least, and the model that a
configuration describes is compared with the weights there are before it is built (`loading.py`).
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_plugin.errors import EncoderError, foreign_code

LARGEST = 4_000_000
DEEPEST = 12
REMEDY = "Save or download the encoder again."


@dataclass(frozen=True)
class Range:
    """What a value may be.

    Attributes:
        low, high: of a number, or of every number in a list or a mapping.
        whole: whether it counts something.
    """

    low: float
    high: float
    whole: bool = False

    def allows(self, number: object) -> bool:
        """Whether one number may stand there."""
        if isinstance(number, bool) or not isinstance(number, int if self.whole else int | float):
            return False
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


_LAYERS, _SIZE, _EDGE = Range(1, 1024, True), Range(1, 1 << 20, True), Range(1, 1 << 31, True)
_EPSILON, _SHARE, _SCALE = Range(1e-30, 0.1), Range(0, 1), Range(1e-9, 256)
RANGES: dict[str, Range] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "depths", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "head_dim"), _SIZE),
    **dict.fromkeys(("hidden_size", "hidden_sizes", "intermediate_size", "embed_dim", "out_hidden_size"), _SIZE),
    **dict.fromkeys(("patch_size", "image_size", "temporal_patch_size", "spatial_merge_size", "merge_size"), _SIZE),
    **dict.fromkeys(("num_channels", "in_channels", "in_chans"), _SIZE),
    **dict.fromkeys(("size", "crop_size", "pad_size", "min_pixels", "max_pixels"), _EDGE),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "norm_eps"), _EPSILON),
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "dropout", "drop_path_rate"), _SHARE),
    "attention_probs_dropout_prob": _SHARE,
    "mlp_ratio": _SCALE,
    # a name is made for each of them
    "num_labels": Range(0, 100_000, True),
    "rope_theta": Range(1e-9, 1e15),
    "rescale_factor": _SCALE,
    "image_std": _SCALE,
    "image_mean": Range(-256, 256),
    "resample": Range(0, 5, True),
}
"""By name of a setting, of an encoder's configuration and of its image processor's, wherever in them it stands."""

LARGEST_NUMBER = 1e18


def read_plain(file: Path, what: str = "") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        file: in an encoder's folder.
        what: it is, where its name does not say so.

    Raises:
        EncoderError: if it is no file, over-large, no JSON, too deep, or not an object.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise EncoderError(f"{str(file)!r} is no file.", REMEDY)
    if status.st_size > LARGEST:
        raise EncoderError(f"{file.name} has {status.st_size:,} bytes, more than {LARGEST:,}.", REMEDY)
    with foreign_code(f"{str(file)!r} is not JSON", REMEDY, EncoderError):
        value = json.loads(file.read_bytes().decode(), parse_constant=_no_constant)
        # half a surrogate pair can be shown and written nowhere
        json.dumps(value, ensure_ascii=False).encode()
        depth = _depth(value)
    if not isinstance(value, dict):
        raise EncoderError(f"{str(file)!r} is no {what or 'JSON object with settings'}.", REMEDY)
    if depth > DEEPEST:
        raise EncoderError(f"{file.name} is nested more than {DEEPEST} deep.", REMEDY)
    return value


def check_ranges(settings: Mapping[str, Any], name: str) -> None:
    """Hold the plain values of settings to what they can be.

    Args:
        settings: of an encoder or of an image processor.
        name: of their file.

    Raises:
        EncoderError: naming the first value that cannot be.
    """
    for path, value in _values(settings):
        key = path[-1]
        allowed = RANGES.get(key)
        if allowed is not None and value is not None:
            for number in _numbers(value):
                if not allowed.allows(number):
                    raise _cannot_be(name, path, value, str(allowed))
        if key.startswith("do_") and not isinstance(value, bool | None):
            raise _cannot_be(name, path, value, "true or false")
        if isinstance(value, float) and not math.isfinite(value):
            raise _cannot_be(name, path, value, "a number")
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise _cannot_be(name, path, value, f"a number of at most {LARGEST_NUMBER:g}")


def _cannot_be(name: str, path: tuple[str, ...], value: object, expected: str) -> EncoderError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    return EncoderError(f"{name} has {'.'.join(path)}={shown}, which cannot be: {expected} is expected.", REMEDY)


def _values(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in settings.items():
        here = (*path, str(key))
        yield here, value
        if isinstance(value, Mapping):
            yield from _values(value, here)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping):
                    yield from _values(item, here)
                elif not isinstance(item, list):
                    yield here, item


def _numbers(value: Any) -> Iterator[Any]:
    """What a range is about: a number, or those in a list or in the values of a mapping."""
    if isinstance(value, Mapping):
        yield from (item for item in value.values() if item is not None)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
