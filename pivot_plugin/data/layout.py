"""One row, whatever its layout, as a pair or a question in the normal form.

Images stay encoded; a row is checked for everything that can be seen without decoding them.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from trl.data_utils import extract_prompt

from pivot_plugin.errors import DataError, SettingsError, unknown
from pivot_plugin.hooks import ask
from pivot_plugin.hooks.types import Layout

IMAGE_MARKER = "<image>"
ROLE = re.compile(r"[A-Za-z][A-Za-z_ -]{0,31}")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
BESIDE_A_PAIR = ("images", "image", "rejected_images", "id", "source", "score_chosen", "score_rejected")
BESIDE_A_QUESTION = ("images", "image", "id", "source", "answer", "solution", "completions", "prompt", "question")
# where turns and parts keep their text, and how deep: a list of turns, a turn, a list of parts, a part
TEXT_KEYS, TURNS_PARTS_TEXT = ("content", "value", "text", "question", "prompt"), 4
# what a layout needs beside its images, for the message about a row in none of them
KNOWN = {
    "TRL's pairs": ("prompt", "chosen", "rejected"),
    "TRL's pairs with implicit prompt": ("chosen", "rejected"),
    "RLAIF-V and MMPR": ("question", "chosen", "rejected"),
    "scored completions": ("prompt", "completions", "scores"),
    "ranked candidates": ("prompt", "ranked"),
    "ms-swift": ("messages", "rejected_response"),
    "LLaMA-Factory's sharegpt ranking": ("conversations", "chosen", "rejected"),
    "LLaMA-Factory's alpaca ranking": ("instruction", "chosen", "rejected"),
    "LLaMA-Factory v1": ("chosen_messages", "rejected_messages"),
}


def recognise(example: Mapping[str, Any], name: str, columns: Mapping[str, str] | None = None) -> Layout | None:
    """How the rows of a data set become pairs, by its first row.

    Args:
        example: the first row.
        name: of the data, for errors.
        columns: our names to the data's own, for layouts nobody knows: {"prompt": "instruction"}.

    Returns:
        a function from a row to one of TRL's layouts, or None where rows are in one of those already.

    Raises:
        DataError: if no layout fits, with the columns found and the nearest layout.
        SettingsError: if `columns` names a column that is not there.
    """
    if columns:
        return _renamed(example, name, dict(columns))
    names = [str(column) for column in example]
    layout: Layout | None = ask("pivot_preference_layout", columns=names, example=example)  # type: ignore[assignment]
    if layout is not None or ("chosen" in example and {"rejected", "rejected_images"} & example.keys()):
        return layout
    if {"question", "prompt", "problem"} & example.keys() and {"answer", "solution"} & example.keys():
        raise DataError(
            f"The rows of {name} are questions with answers (columns {', '.join(names)}), and pairs are wanted: each "
            "with a chosen and a rejected answer.",
            'Let the model answer them and learn from its own answers: rewards=["accuracy"] (--reward accuracy); or '
            'train with objective="grpo" (--objective grpo).',
            "unknown layout",
        )
    nearest = min(KNOWN, key=lambda known: (sum(c not in example for c in KNOWN[known]), -len(KNOWN[known])))
    lacking = [column for column in KNOWN[nearest] if column not in example]
    raise DataError(
        f"The rows of {name} have the columns {', '.join(names) or 'none'}, which is no known layout: row 0 of {name} "
        f"has no {' and no '.join(map(repr, lacking))}. The nearest is {nearest} ({', '.join(KNOWN[nearest])}, with "
        "image or images).",
        "Say which columns they are, for example columns={'prompt': 'instruction', 'chosen': 'better', 'rejected': "
        "'worse', 'images': 'picture'} (--column prompt=instruction --column chosen=better ...), or write a plugin "
        "with the hook pivot_preference_layout.",
        "unknown layout",
    )


def _renamed(example: Mapping[str, Any], name: str, columns: dict[str, str]) -> Layout:
    allowed = (*PAIR_COLUMNS, *BESIDE_A_PAIR)
    check_columns(columns, allowed, example, name)

    def layout(row: Mapping[str, object]) -> Mapping[str, object]:
        kept = {column: value for column, value in row.items() if column not in columns}
        if "prompt" in columns:
            # who says what the question is says that nothing else is
            kept = {column: value for column, value in kept.items() if column in allowed}
        return kept | {ours: row.get(theirs) for ours, theirs in columns.items()}

    return layout


def check_columns(columns: Mapping[str, str], allowed: Collection[str], example: Mapping[str, Any], name: str) -> None:
    """Refuse `columns` that name what is not there.

    Args:
        columns: our names to the data's own.
        allowed: what ours may be.
        example: the first row.
        name: of the data, for errors.

    Raises:
        SettingsError: naming what is wrong.
    """
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise SettingsError(f"columns names {ours!r}.", f"Its keys are {', '.join(allowed)}.")
        if theirs not in example:
            finding = f"columns[{ours!r}] is {theirs!r}, but the rows of {name} have {', '.join(map(str, example))}."
            raise unknown("column", theirs, example, finding)


def normalise(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a row of TRL's layouts to the normal form of a pair.

    Args:
        row: with `chosen` and `rejected` (text or messages; where there are `rejected_images`, `rejected` may be left
            out), `prompt` unless the answers contain it, and `images` (a list) or `image`.
        where: names the row in errors.

    Returns:
        `id`, `images` (sources), `prompt`, `chosen`, `rejected` (messages with structured content), and
        `rejected_images` (sources, one for each of `images`), `source`, `score_chosen` and `score_rejected` where the
        row has them.

    Raises:
        DataError: for a missing column, an empty answer, equal answers to the same images, or images, rejected images
            and markers that do not agree.
    """
    if row.get("prompt") is None and row.get("question") is not None:
        # rows of a file need not have the columns of its first
        row = {**row, "prompt": row["question"]}
    if row.get("rejected") is None and row.get("rejected_images"):
        # the same answer, of which other images make a wrong one
        row = {**row, "rejected": row.get("chosen")}
    if implicit := row.get("prompt") is None and row.get("chosen") is not None and row.get("rejected") is not None:
        if "prompt" in row and isinstance(row["chosen"], str):
            raise DataError(
                f"{where}: its prompt is null.",
                "Give each row its question, an empty text where it has none, or leave the column prompt out.",
                "missing column",
            )
        row = {**row, **_without_prompt(row, where)}
    if missing := [name for name in PAIR_COLUMNS if row.get(name) is None]:
        raise DataError(
            f"{where} has no {' and no '.join(repr(name) for name in missing)}; it has "
            f"{', '.join(sorted(map(str, row)))}.",
            "A pair needs prompt, chosen and rejected, and images (a list) or image.",
            "missing column",
        )
    pair: dict[str, Any] = {
        **normalise_question(row, where),
        "chosen": messages_of(row["chosen"], "assistant", where, "chosen"),
        "rejected": messages_of(row["rejected"], "assistant", where, "rejected"),
    }
    # of two texts no one knows where their common beginning ceases to be the question
    if (implicit and isinstance(row["chosen"], str)) or not _asks(pair["prompt"]):
        refuse_lost_question(row, where, [name for name in row if name not in (*PAIR_COLUMNS, *BESIDE_A_PAIR)])
    for side in ("chosen", "rejected"):
        if not text_of(pair[side]).strip():
            raise DataError(
                f"{where}: the {side} answer is empty.", "Give both answers some text, or drop the row.", "empty answer"
            )
        if any(part["type"] == "image" for message in pair[side] for part in message["content"]):
            raise DataError(
                f"{where}: the {side} answer holds an image marker.",
                f"Take {IMAGE_MARKER} out of the answers; images belong to the prompt.",
                "image marker in an answer",
            )
    if rejected_images := rejected_images_of(row, len(pair["images"]), where):
        pair["rejected_images"] = rejected_images
    # an answer that is right of one picture and wrong of another is a pair too
    if not rejected_images and text_of(pair["chosen"]) == text_of(pair["rejected"]):
        raise DataError(
            f"{where}: chosen and rejected are equal ({text_of(pair['chosen'])[:60]!r}).",
            "Nothing can be learnt from such a pair; drop it.",
            "equal answers",
        )
    for name in ("score_chosen", "score_rejected"):
        if row.get(name) is not None:
            pair[name] = _number(row[name], where, name)
    if row.get("source") is not None:
        pair["source"] = _writable(str(row["source"]), where, "source")
    return pair


def normalise_question(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring the images and the prompt of a row to the normal form.

    Args:
        row: with `prompt` or `question` (text or messages), and `images` (a list) or `image`.
        where: names the row in errors.

    Returns:
        `id`, `images` (sources) and `prompt` (messages with structured content, one image part per image).

    Raises:
        DataError: for a missing prompt, or images and markers that do not agree.
    """
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("question")
    if prompt is None:
        raise DataError(
            f"{where} has no prompt and no question; it has {', '.join(sorted(map(str, row))) or 'nothing'}.",
            "A question needs prompt or question, and images (a list) or image; say which column it is, for example "
            "columns={'prompt': 'instruction'}.",
            "missing column",
        )
    images = images_of(row, where)
    messages = messages_of(prompt, "user", where, "prompt")
    if "chosen" not in row and not _asks(messages):
        refuse_lost_question(row, where, [name for name in row if name not in BESIDE_A_QUESTION])
    return {
        "id": id_of(row, where),
        "images": images,
        "prompt": with_markers(messages, len(images), where),
    }


def id_of(row: Mapping[str, Any], where: str) -> str:
    """What a row calls itself, its place where it has no name."""
    row_id = row.get("id")
    return where if row_id is None or row_id == "" else _writable(str(row_id), where, "id")


def _asks(prompt: list[dict[str, Any]]) -> bool:
    """Whether a user says something in a prompt."""
    return bool(text_of([message for message in prompt if message["role"] == "user"]).strip())


def refuse_lost_question(row: Mapping[str, Any], where: str, unread: Collection[str], remedy: str = "") -> None:
    """Refuse a row without a question where text stands in a column that nobody reads: that is the question.

    Args:
        row: whose question is empty.
        where: names the row in errors.
        unread: its columns that would be left out.
        remedy: how a question is named; by `columns` where it is not said.

    Raises:
        DataError: naming the columns that hold text.
    """
    columns = [name for name in unread if _holds_text(row[name])]
    if columns:
        raise DataError(
            f"{where} has no question, and text in {', '.join(map(repr, columns))}, which nobody reads; its columns "
            f"are {', '.join(map(str, row))}.",
            (remedy or f"Say which column the question is, for example columns={{'prompt': {columns[0]!r}}}")
            + "; drop these columns if the question is the image alone.",
            "lost question",
        )


def _holds_text(value: object, depth: int = TURNS_PARTS_TEXT) -> bool:
    """Whether a value is text, or turns or parts with text in them; image files in records are none."""
    if isinstance(value, str):
        return bool(value.strip())
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return any(_holds_text(value.get(name), depth - 1) for name in TEXT_KEYS)
    return isinstance(value, list | tuple) and any(_holds_text(item, depth - 1) for item in value)


def _without_prompt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Split off the beginning that two conversations share, as TRL does."""
    for name in ("chosen", "rejected"):
        answer = row[name]
        if not isinstance(answer, str) and not (
            isinstance(answer, list) and len(answer) > 1 and all(isinstance(message, Mapping) for message in answer)
        ):
            raise DataError(
                f"{where} has no 'prompt', and its {name} answer holds none either ({str(answer)[:60]!r}).",
                "Give a prompt, or whole conversations as chosen and rejected.",
                "missing column",
            )
        if not answer:
            raise DataError(
                f"{where}: the {name} answer is empty.", "Give both answers some text, or drop the row.", "empty answer"
            )
    if type(row["chosen"]) is not type(row["rejected"]):
        raise DataError(
            f"{where}: chosen is a {type(row['chosen']).__name__} and rejected a {type(row['rejected']).__name__}.",
            "Give both as text or both as messages.",
            "wrong type",
        )
    if row["chosen"] == row["rejected"]:
        raise DataError(
            f"{where}: chosen and rejected are equal.",
            "Nothing can be learnt from such a pair; drop it.",
            "equal answers",
        )
    return extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})


def images_of(row: Mapping[str, Any], where: str) -> list[Any]:
    """The images of a row, from `images` or `image`.

    Raises:
        DataError: if both hold some and not the same.
    """
    of_columns = {name: _listed(row.get(name)) for name in ("images", "image")}
    images, image = of_columns.values()
    if images and image and not _same(images, image):
        raise DataError(
            f"{where} has {len(images)} image(s) in 'images' and {len(image)} in 'image'.",
            "Keep one of the two columns.",
            "images and markers differ",
        )
    return images or image


def rejected_images_of(row: Mapping[str, Any], images: int, where: str) -> list[Any]:
    """The images of a row that its chosen answer is not right of, in ms-swift's column `rejected_images`.

    Args:
        row: as it was brought.
        images: how many the row has otherwise.
        where: names the row in errors.

    Raises:
        DataError: if there are some, and not one for each.
    """
    rejected = _listed(row.get("rejected_images"))
    if rejected and len(rejected) != images:
        raise DataError(
            f"{where} has {images} image(s) and {len(rejected)} rejected image(s).",
            "Give one rejected image for each image, in their order; what stays the same is given again.",
            "images and rejected images differ",
        )
    return rejected


def _listed(images: object) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _same(images: list[Any], others: list[Any]) -> bool:
    return len(images) == len(others) and all(
        one is other or (isinstance(one, str | bytes | Mapping) and one == other)
        for one, other in zip(images, others, strict=True)
    )


def _number(value: object, where: str, column: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{where}: {column} is {type(value).__name__} {shortened(value)}.", "Give a number.", "wrong type"
        )
    return number


def shortened(value: object) -> str:
    """A value in an error, however long it is."""
    try:
        return repr(str(value)[:60])
    # an integer of thousands of digits cannot be written
    except ValueError:
        return f"of type {type(value).__name__}"


def messages_of(value: object, role: str, where: str, column: str) -> list[dict[str, Any]]:
    """Text or messages as messages with structured content."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    ):
        raise DataError(
            f"{where}: {column} is {type(value).__name__} {str(value)[:60]!r}.",
            "Give a string, or a list of messages with 'role' and 'content'.",
            "wrong type",
        )
    if wrong := next((message["role"] for message in value if not ROLE.fullmatch(message["role"])), None):
        raise DataError(f"{where}: a role in {column} is {wrong[:60]!r}.", "Give a word, such as 'user'.", "wrong type")
    messages = [
        {"role": message["role"], "content": _parts(message.get("content"), where, column)} for message in value
    ]
    for message, given in zip(messages, value, strict=True):
        # a part that says so is meant; in text it is what somebody wrote
        in_text = not isinstance(given.get("content"), list) and any(p["type"] == "image" for p in message["content"])
        if in_text and (message["role"] == "system" or (message["role"] == "assistant" and column == "prompt")):
            raise DataError(
                f"{where}: the {message['role']} turn of {column} holds {IMAGE_MARKER} in its text.",
                "Take it out; images belong to the question.",
                "image marker where nobody asks",
            )
        if given.get("tool_calls"):
            raise DataError(
                f"{where}: a turn of {column} has tool_calls, which would be lost.",
                "Leave the row out, or write the call as text.",
                "tool_calls cannot be read",
            )
    return messages


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
            "wrong type",
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise DataError(
                f"{where}: {column} has a content part {str(part)[:60]!r}.",
                "Parts are {'type': 'text', 'text': ...} or {'type': 'image'}.",
                "wrong type",
            )
        if part["type"] == "image":
            parts.append({"type": "image"})
            continue
        written = part.get("text")
        # of several texts one would be lost
        if not isinstance(written, str) or any(_holds_text(part.get(name)) for name in ("content", "value")):
            raise DataError(
                f"{where}: a text part in {column} has not one text but {str(part)[:60]!r}.",
                "Parts are {'type': 'text', 'text': ...} or {'type': 'image'}; give the text as a string.",
                "wrong type",
            )
        for index, text in enumerate(_writable(written, where, column).split(IMAGE_MARKER)):
            if index:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
    return parts


def _writable(text: str, where: str, column: str) -> str:
    """A text, if it is one: half of a surrogate pair can be hashed, saved and tokenised by nobody."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} holds {text[error.start : error.end]!r} at character {error.start}, which is no text.",
            "Write the row anew in UTF-8, or leave it out.",
            "wrong type",
        ) from error
    return text


def with_markers(prompt: list[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
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
            "images and markers differ",
        )
    first = users[0]
    content = [{"type": "image"}] * images + prompt[first]["content"]
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def text_of(messages: list[dict[str, Any]]) -> str:
    """The text of messages with structured content, without image parts."""
    return "".join(part.get("text", "") for message in messages for part in message["content"])
