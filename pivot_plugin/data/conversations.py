"""Conversations about images, as people have them for supervised fine-tuning of MLLMs, in one normal form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.errors import DataError
from pivot_plugin.hooks.types import Layout

from .layout import IMAGE_MARKER, id_of, images_of, messages_of, refuse_lost_question, text_of, with_markers
from .rows import RowDataset
from .sources import open_source

# who speaks, in the words of LLaVA's files and those that follow them
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
# where others keep questions; a caption may have any other text beside it, such as its address
QUESTION_COLUMNS = ("instruction", "query", "problem", "input", "prompt", "question", "messages", "conversations")
CAPTION_COLUMNS = ("caption", "text")
LAYOUTS = (
    "conversations (LLaVA's: 'from' and 'value'), messages (role and content), caption or text, question and answer, "
    "or prompt and completion; with image or images"
)


class ConversationDataset(RowDataset):
    """Conversations with random access. Images stay encoded until a row is read; text-only rows are welcome.

    Args:
        rows: in a layout of `LAYOUTS`, or an opened source.
        folder: what relative image paths start from.
        name: of the data, for errors.

    Raises:
        DataError: if there are none. Rows that cannot be used are found by `verify`, or when they are read.
    """

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        return None

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return normalise_conversation(row, where)


def normalise_conversation(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a row to the normal form of a conversation.

    As LLaVA does: what an assistant says before anybody asks, and what is asked without being answered, is left out; an
    only image comes before the words of its turn.

    Args:
        row: in a layout of `LAYOUTS`.
        where: names the row in errors.

    Returns:
        `id`, `images` (sources) and `messages` (with structured content, one image part per image).

    Raises:
        DataError: for an unknown layout or speaker, no answer, or images and markers that do not agree.
    """
    # an empty path stands for no image
    images = [image for image in images_of(row, where) if not (image is None or image == "")]
    messages = messages_of(_turns(row, where), "user", where, "conversations")
    if len(images) == 1:
        messages = [_image_first(message) for message in messages]
    first_question = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    messages = [m for index, m in enumerate(messages) if index >= first_question or m["role"] == "system"]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not any(text_of([answer]).strip() for answer in answers):
        raise DataError(f"{where} has no answer.", "Give each conversation at least one, or drop it.", "empty answer")
    if any(part["type"] == "image" for answer in answers for part in answer["content"]):
        raise DataError(
            f"{where}: an answer holds an image marker.",
            f"Take {IMAGE_MARKER} out of the answers; images belong to the questions.",
            "image marker in an answer",
        )
    if not any(text_of([message]).strip() for message in messages if message["role"] == "user"):
        read = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
        unread = [name for name in QUESTION_COLUMNS if name in row and name != read]
        refuse_lost_question(row, where, unread, "Call the column of the question 'question'")
    return {
        "id": id_of(row, where),
        "images": images,
        "messages": with_markers(messages, len(images), where),
    }


def _turns(row: Mapping[str, Any], where: str) -> list[Any]:
    """What is said in a row, in whatever layout, as messages."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError(
                f"{where}: conversations is {type(turns).__name__} {str(turns)[:60]!r}.",
                "Give a list of turns, each with 'from' and 'value', or 'role' and 'content'.",
                "wrong type",
            )
        return [turn_of(turn, where) for turn in turns]
    question = next((row[name] for name in ("prompt", "question") if row.get(name) is not None), None)
    answer = next((row[name] for name in ("completion", "answer") if row.get(name) is not None), None)
    if answer is not None and question is not None:
        return [*_as_list(question, "user"), *_as_list(answer, "assistant")]
    caption = next((row[name] for name in CAPTION_COLUMNS if row.get(name) is not None), None)
    if caption is not None:
        return [*_as_list("" if question is None else question, "user"), *_as_list(caption, "assistant")]
    raise DataError(
        f"{where} is no conversation; it has the columns {', '.join(sorted(map(str, row))) or 'none'}.",
        f"Give one of these: {LAYOUTS}.",
        "unknown layout",
    )


def turn_of(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn of a conversation, in whoever's words, as a message with role and content."""
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise DataError(
            f"{where}: a turn is by {speaker!r}.", f"Speakers are {', '.join(SPEAKERS)}.", "unknown speaker"
        )
    content = turn.get("value") if "value" in turn else turn.get("content")
    return {"role": SPEAKERS[speaker.lower()], "content": content}


def _as_list(content: object, role: str) -> list[Any]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _image_first(message: dict[str, Any]) -> dict[str, Any]:
    """A turn with its image in front of its words, without the line breaks that stood between."""
    parts = message["content"]
    images = [part for part in parts if part["type"] == "image"]
    if not images:
        return message
    words = [part["text"].strip("\n ") for part in parts if part["type"] == "text"]
    text = " ".join(word for word in words if word)
    return {**message, "content": [*images, *([{"type": "text", "text": text}] if text else [])]}


def load_conversations(
    source: object, name: str = "conversations", image_folder: str | Path | None = None, **options: Any
) -> ConversationDataset:
    """Conversations about images from what people bring, lazily.

    Args:
        source: a list of dicts, a `datasets.Dataset`, a Hub id, or the path of a .json, .jsonl, .parquet, .arrow or
            .zip file or of a folder with such files; rows in a layout of `LAYOUTS`: LLaVA-Pretrain, LLaVA-OneVision,
            Cambrian and the like. Images as paths, bytes or PIL.
        name: of the data, for errors.
        image_folder: where relative image paths are looked up first, and then in the data's own folder.
        **options: `split`, `allow_urls`, `max_pixels` as for `load`.

    Raises:
        DataError: if the source cannot be read or is a stream.
    """
    if isinstance(source, ConversationDataset):
        return source
    return ConversationDataset(open_source(source, name, image_folder=image_folder, **options), name=name)
