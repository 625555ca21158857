"""Layouts in which training stacks keep their rows, read as they are.

ms-swift        pairs: `messages` that end with the chosen answer, with `rejected_response` (text, or the turns after
                the last question) or `rejected_messages` (the whole other conversation), with `rejected_images` alone
                (the same answer to other images) or beside them; its older form has `query`, `response`, `history`
                and `system` in place of messages
LLaMA-Factory   pairs: sharegpt ranking (`conversations` up to the question, `chosen` and `rejected` as records), alpaca
                ranking (`instruction` and `input` are the question), v1 (`chosen_messages` and `rejected_messages`)
VLM-R1, EasyR1  questions: `problem` with `answer` or `solution`, or `conversations` that end with the answer
verl            questions: `prompt` as messages, the answer in `reward_model.ground_truth`
TWIN            questions (glab-caltech/TWIN): `image_1`, `image_2`, `question`, a verdict in `answer`; as pairs, the
                verdict against its contrary

Images that stand in the turns of the rejected answer's conversation, and are not those of the chosen one's, are its
`rejected_images`. What a row holds and a pair cannot (videos, tools) is refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any

from pivot_plugin.errors import DataError
from pivot_plugin.hooks import hookimpl
from pivot_plugin.hooks.types import Layout

from .conversations import turn_of

PASSED_ON = ("id", "source", "score_chosen", "score_rejected", "rejected_images")
REFUSED_IN_BOTH = ("rejected_videos", "rejected_audios", "videos", "audios", "video", "audio", "tools")
REFUSED = ("rejected_images", *REFUSED_IN_BOTH)
REFUSED_IN_PAIRS = (*REFUSED_IN_BOTH, "objects")
INLINE_IMAGES = ("image", "image_url")
MARKER = {"type": "image"}
TWO_IMAGES = ("image_1", "image_2")
CONTRARY = {"yes": "no", "same": "different", "true": "false"}
CONTRARY |= {second: first for first, second in CONTRARY.items()}
VERDICT = re.compile(r"[A-Za-z]+")
TAGGED_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

Messages = list[dict[str, Any]]


@hookimpl
def pivot_preference_layout(columns: list[str], example: Mapping[str, object]) -> Layout | None:
    pictures = "rejected_images" in columns and "chosen" not in columns
    if "messages" in columns and (pictures or {"rejected_response", "rejected_messages"} & set(columns)):
        return _ms_swift
    if {"query", "response"} <= set(columns) and (pictures or "rejected_response" in columns):
        return _ms_swift_query
    if {"chosen_messages", "rejected_messages"} <= set(columns):
        return _llama_factory_v1
    if {*TWO_IMAGES, "question", "answer"} <= set(columns) and not {"chosen", "rejected"} & set(columns):
        return _verdict
    if not {"chosen", "rejected"} <= set(columns) or "prompt" in columns or "question" in columns:
        return None
    if "conversations" in columns or "messages" in columns:
        return _sharegpt_ranking
    return _alpaca_ranking if "instruction" in columns else None


def _ms_swift(row: Mapping[str, Any]) -> Mapping[str, object]:
    messages, inline = _messages(row, "messages")
    if row.get("rejected_messages") is not None:
        other, others = _messages(row, "rejected_messages")
        row = _with_rejected_images(row, inline, others)
        same = messages == other and row.get("rejected_images")
        parted = _split_off(messages, other) if same else _parted(messages, other, "messages", "rejected_messages")
        return _pair(row, inline, *parted)
    rejected = row.get("rejected_response")
    if isinstance(rejected, list):
        question = _last_question(messages, "messages")
        turns, _ = _messages(row, "rejected_response")
        if any(turn["role"] == "user" for turn in turns):
            return _pair(row, inline, *_parted(messages, turns, "messages", "rejected_response"))
        return _pair(row, inline, messages[:question], messages[question:], turns)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"messages end with a turn of {messages[-1]['role']!r}, not with the chosen answer.",
            "Give the chosen answer as the last turn of messages.",
            "missing column",
        )
    return _pair(row, inline, messages[:-1], messages[-1:], rejected)


def _ms_swift_query(row: Mapping[str, Any]) -> Mapping[str, object]:
    return _pair(row, [], _dialogue(row, row.get("query")), row.get("response"), row.get("rejected_response"))


def _llama_factory_v1(row: Mapping[str, Any]) -> Mapping[str, object]:
    chosen, inline = _messages(row, "chosen_messages")
    rejected, others = _messages(row, "rejected_messages")
    row = _with_rejected_images(row, inline, others)
    if chosen == rejected and row.get("rejected_images"):
        return _pair(row, inline, *_split_off(chosen, rejected))
    return _pair(row, inline, *_parted(chosen, rejected, "chosen_messages", "rejected_messages"))


def _sharegpt_ranking(row: Mapping[str, Any]) -> Mapping[str, object]:
    column = "conversations" if row.get("conversations") is not None else "messages"
    messages, inline = _messages(row, column)
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{column} end with a turn of {messages[-1]['role']!r}, not with the question of the two answers.",
            f"Give the answers as chosen and rejected alone, and end {column} with the question.",
            "missing column",
        )
    return _pair(row, inline, _with_system(row, messages), _answer(row, "chosen"), _answer(row, "rejected"))


def _alpaca_ranking(row: Mapping[str, Any]) -> Mapping[str, object]:
    said = [part for part in (row.get("instruction"), row.get("input")) if part is not None]
    if wrong := [part for part in said if not isinstance(part, str)]:
        raise DataError(f"instruction or input is a {type(wrong[0]).__name__}.", "Give both as text.", "wrong type")
    question = "\n".join(part for part in said if part)
    return _pair(row, [], _dialogue(row, question), row.get("chosen"), row.get("rejected"))


def _verdict(row: Mapping[str, Any]) -> Mapping[str, object]:
    answer = row.get("answer")
    said = VERDICT.fullmatch(answer.strip(" .")) if isinstance(answer, str) else None
    contrary = CONTRARY.get(said[0].lower()) if said else None
    if not isinstance(answer, str) or said is None or contrary is None:
        raise DataError(
            f"answer is {str(answer)[:60]!r}, of which the contrary is not known.",
            f"Give one of {', '.join(CONTRARY)}; or pairs, with chosen and rejected.",
            "no verdict",
        )
    word = said[0]
    contrary = contrary.upper() if word.isupper() else contrary.capitalize() if word[0].isupper() else contrary
    kept = {name: row[name] for name in PASSED_ON if name in row}
    images = [row[name] for name in TWO_IMAGES]
    return kept | {
        "images": images,
        "prompt": row.get("question"),
        "chosen": answer,
        "rejected": answer.replace(word, contrary),
    }


def _answer(row: Mapping[str, Any], column: str) -> object:
    """An answer that is text, messages, or a single turn."""
    answer = row.get(column)
    if not isinstance(answer, Mapping):
        return answer
    turn = turn_of(answer, column)
    if turn["role"] != "assistant":
        raise DataError(f"{column} is a turn of {turn['role']!r}.", "Give an assistant's turn.", "wrong type")
    return [turn]


def _dialogue(row: Mapping[str, Any], question: object) -> Messages:
    """The turns of `history`, and the question behind them."""
    if not isinstance(question, str) or not question.strip():
        raise DataError("The question is empty.", "Give each row a question, or drop it.", "missing question")
    turns: Messages = []
    for exchange in row.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise DataError(
                f"history holds {str(exchange)[:60]!r}.", "Give a list of [question, answer].", "wrong type"
            )
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return _with_system(row, [*turns, {"role": "user", "content": question}])


def _with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    system = row.get("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise DataError("There is a column system and a system turn.", "Keep one of the two.", "two system turns")
    return [{"role": "system", "content": system}, *messages]


def _parted(chosen: Messages, rejected: Messages, *columns: str) -> tuple[Messages, Messages, Messages]:
    """Two conversations as the question they share, and two answers."""
    shared = next(
        (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    asked = max((index for index in range(shared) if chosen[index]["role"] == "user"), default=-1) + 1
    if not asked:
        raise DataError(
            f"{' and '.join(columns)} have no question in common at their beginning.",
            "Begin both with the same turns, up to the question.",
            "missing question",
        )
    answers = chosen[asked:], rejected[asked:]
    for column, answer in zip(columns, answers, strict=True):
        if any(turn["role"] == "user" for turn in answer):
            raise DataError(
                f"{column} ask further questions where the two conversations have parted.",
                "Give pairs whose answers follow the same question; cut what comes after them.",
                "questions differ",
            )
    return chosen[:asked], *answers


def _split_off(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """As `_parted`, of two conversations that differ in their images alone."""
    asked = _last_question(chosen, "the conversations")
    return chosen[:asked], chosen[asked:], rejected[asked:]


def _with_rejected_images(row: Mapping[str, Any], inline: list[Any], others: list[Any]) -> Mapping[str, Any]:
    """A row whose rejected conversation shows other images in its turns than the chosen one."""
    if not others or others == inline:
        return row
    if row.get("rejected_images"):
        raise DataError(
            "There are images in the rejected turns and in rejected_images.",
            "Give them in one of the two.",
            "images and rejected images differ",
        )
    return {**row, "rejected_images": others}


def _last_question(messages: Messages, column: str) -> int:
    """How many turns there are up to the last question."""
    asked = max((index for index, turn in enumerate(messages) if turn["role"] == "user"), default=-1) + 1
    if not asked:
        raise DataError(f"{column} hold no turn of a user.", "Give the question in them.", "missing question")
    return asked


def _messages(row: Mapping[str, Any], column: str) -> tuple[Messages, list[Any]]:
    """The turns of a column as messages, and the images that stand in them."""
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(
            f"{column} is {type(turns).__name__} {str(turns)[:60]!r}.",
            "Give a list of turns, each with 'role' and 'content', or 'from' and 'value'.",
            "wrong type",
        )
    inline: list[Any] = []
    messages = []
    for turn in turns:
        message = turn_of(turn, column)
        if isinstance(message["content"], list):
            message["content"] = [_part(part, inline) for part in message["content"]]
        messages.append(message)
    return messages, inline


def _part(part: object, inline: list[Any]) -> object:
    """A part of a turn in the normal form; the image that stands in it goes to the others."""
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "text":
        return {"type": "text", "text": part.get("text") if part.get("text") is not None else part.get("value")}
    if part.get("type") not in INLINE_IMAGES:
        return part
    image = next((part[name] for name in ("value", "image", "image_url", "url") if part.get(name) is not None), None)
    if image is not None:
        inline.append(image["url"] if isinstance(image, Mapping) and isinstance(image.get("url"), str) else image)
    return MARKER


def _refuse(row: Mapping[str, Any], columns: tuple[str, ...]) -> None:
    for column in columns:
        if row.get(column) not in (None, "", "[]", [], {}):
            raise DataError(
                f"The row has {column}, which would be lost.",
                f"Only images of the question are read: drop such rows, or their column {column} where it does not "
                "matter.",
                f"{column} cannot be read",
            )


def _images(row: Mapping[str, Any], inline: list[Any]) -> dict[str, object]:
    listed = {name: row[name] for name in ("images", "image") if row.get(name) is not None}
    if not inline:
        return listed
    if listed.get("images") or listed.get("image"):
        raise DataError(
            "There are images in the turns and in a column.",
            "Give them in one of the two.",
            "images and markers differ",
        )
    return {"images": inline}


def _pair(
    row: Mapping[str, Any], inline: list[Any], prompt: Messages, chosen: object, rejected: object
) -> Mapping[str, object]:
    _refuse(row, REFUSED_IN_PAIRS)
    kept = {name: row[name] for name in PASSED_ON if name in row}
    return kept | _images(row, inline) | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def question_row(row: Mapping[str, Any]) -> Mapping[str, object]:
    """A row of questions with `prompt`, and `answer` where there is one, whichever stack wrote it.

    Args:
        row: with `prompt` or `question`, which stay as they are, or with `problem`, `conversations` or `messages`; its
            images, if it has two columns for them, become a list.

    Returns:
        the row; images that stood in its turns in `images`, the answer of `solution` or `reward_model` in `answer`.

    Raises:
        DataError: for what would be lost, or a question that is empty.
    """
    if row.keys() >= set(TWO_IMAGES) and not row.keys() & {"images", "image"}:
        row = {name: value for name, value in row.items() if name not in TWO_IMAGES} | {
            "images": [row[name] for name in TWO_IMAGES]
        }
    if not row.keys() & {"problem", "conversations", "messages", "reward_model"}:
        return row
    _refuse(row, REFUSED)
    read = dict(row)
    column = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if row.get("prompt") is None and row.get("question") is None:
        if row.get("problem") is not None:
            read["prompt"] = read.pop("problem")
        elif column is not None:
            messages, inline = _messages(row, column)
            asked = _last_question(messages, column)
            answers = messages[asked:]
            read = {name: value for name, value in read.items() if name != column}
            read |= _images(row, inline) | {"prompt": messages[:asked]}
            if len(answers) == 1 and isinstance(answers[0]["content"], str):
                read.setdefault("answer", answers[0]["content"])
    if read.get("answer") is None and (answer := _true_answer(row)) is not None:
        read["answer"] = answer
    return read


def _true_answer(row: Mapping[str, Any]) -> object:
    judged = row.get("reward_model")
    answer = judged.get("ground_truth") if isinstance(judged, Mapping) else None
    answer = row.get("solution") if answer is None else answer
    if isinstance(answer, str) and (tagged := TAGGED_ANSWER.search(answer)):
        return tagged[1].strip()
    return str(answer) if isinstance(answer, int | float) else answer
