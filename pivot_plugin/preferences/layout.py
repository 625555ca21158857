"""One row, whatever its layout, as a pair in the normal form.

Images stay encoded; the row is checked for everything that can be seen without decoding them.
"""

from collections.abc import Mapping
from typing import Any

from trl.data_utils import extract_prompt

from pivot_plugin.errors import DataError
from pivot_plugin.hooks import ask
from pivot_plugin.types import Layout

IMAGE_MARKER = "<image>"


def find_layout(columns: list[str], example: Mapping[str, object]) -> Layout | None:
    """A plugin's layout for these columns, None where the row is in one of TRL's own."""
    return ask("pivot_preference_layout", columns=columns, example=example)  # type: ignore[return-value]


def normalise(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a row of TRL's layouts to the normal form.

    Args:
        row: with `chosen` and `rejected` (text or messages), `prompt` unless the answers contain it, and `images` (a
            list) or `image`.
        where: names the row in errors.

    Returns:
        `id`, `images` (sources), `prompt`, `chosen`, `rejected` (messages with structured content).

    Raises:
        DataError: for a missing column, an empty answer, equal answers, or images and markers that do not agree.
    """
    if "prompt" not in row and {"chosen", "rejected"} <= row.keys():
        row = {**row, **extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})}
    if missing := [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]:
        raise DataError(
            f"{where} has no {' and no '.join(repr(name) for name in missing)}; it has {', '.join(sorted(row))}.",
            "A pair needs prompt, chosen and rejected, and images (a list) or image.",
        )
    images = _images(row)
    pair: dict[str, Any] = {
        "id": str(row.get("id") or where),
        "images": images,
        "prompt": _messages(row["prompt"], "user", where, "prompt"),
        "chosen": _messages(row["chosen"], "assistant", where, "chosen"),
        "rejected": _messages(row["rejected"], "assistant", where, "rejected"),
    }
    for side in ("chosen", "rejected"):
        if not _text(pair[side]).strip():
            raise DataError(f"{where}: the {side} answer is empty.", "Give both answers some text, or drop the row.")
    if _text(pair["chosen"]) == _text(pair["rejected"]):
        raise DataError(
            f"{where}: chosen and rejected are equal ({_text(pair['chosen'])[:60]!r}).",
            "Nothing can be learnt from such a pair; drop it.",
        )
    pair["prompt"] = _with_markers(pair["prompt"], len(images), where)
    return pair


def _images(row: Mapping[str, Any]) -> list[Any]:
    sources = row["images"] if row.get("images") is not None else row.get("image")
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def _messages(value: object, role: str, where: str, column: str) -> list[dict[str, Any]]:
    """Text or messages as messages with structured content."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise DataError(
            f"{where}: {column} is {type(value).__name__} {str(value)[:60]!r}.",
            "Give a string, or a list of messages with 'role' and 'content'.",
        )
    return [{"role": message["role"], "content": _parts(message.get("content"), where, column)} for message in value]


def _parts(content: object, where: str, column: str) -> list[dict[str, Any]]:
    """Message content as a list of text and image parts; markers in text become image parts."""
    if content is None:
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(
            f"{where}: the content of a message in {column} is a {type(content).__name__}.",
            "Give text, or a list of parts with 'type'.",
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise DataError(
                f"{where}: {column} has a content part {str(part)[:60]!r}.",
                "Parts are {'type': 'text', 'text': ...} or {'type': 'image'}.",
            )
        if part["type"] == "image":
            parts.append({"type": "image"})
            continue
        for index, text in enumerate(str(part.get("text") or "").split(IMAGE_MARKER)):
            if index:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
    return parts


def _with_markers(prompt: list[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
    """A prompt with one image part per image: as given, or all in front of the first user turn where it has none."""
    markers = sum(part["type"] == "image" for message in prompt for part in message["content"])
    if markers == images:
        return prompt
    users = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if markers or not users:
        raise DataError(
            f"{where} has {images} image(s) and {markers} image marker(s) in its prompt.",
            f"Give one {IMAGE_MARKER} or one {{'type': 'image'}} part per image, or none at all to have the images "
            "put before the first user turn.",
        )
    first = users[0]
    content = [{"type": "image"}] * images + prompt[first]["content"]
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _text(messages: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for message in messages for part in message["content"])
