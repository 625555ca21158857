"""Text is text: what a user wrote never becomes a control token, such as the end of a turn or an image.

A chat template writes control tokens as text between the words of users, and a tokenizer cannot tell who wrote what.
So where a row holds the name of a control token, its words are written with a stand-in for that name, which goes
through the template; then the template's own names get stand-ins, the user's come back, and a copy of the tokenizer
that knows control tokens by their stand-ins alone reads the whole. Everything else is tokenised as ever. Rows without
such names never come here.

Some processors and generating engines are given text, not tokens; there such a row cannot be used, and is named.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import ProcessorMixin

from pivot_plugin.errors import DataError

# noncharacters: no text has them, and every tokenizer takes them
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_STANDS_FOR = re.compile(f"{OPEN}u([0-9]+){CLOSE}")
CONTROL_TEXT = "control token in a text"
SHORTEST = 3
NO_PLAIN_TEXT = "who answers is given text, in which it would become one"
MESSAGES = ("prompt", "chosen", "rejected", "messages")


class ControlText:
    """Names of a model's control tokens in what users wrote.

    Args:
        processor: the model's own.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._tokenizer = processor.tokenizer
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        names = {token.content for token in added.values() if token.special}
        names |= {str(name) for name in getattr(self._tokenizer, "all_special_tokens", ())}
        # of images, whether or not the tokenizer calls them special
        names |= {value for name, value in vars(processor).items() if name.endswith("_token") and _is_name(value)}
        # a few tokenizers pad with a letter or a full stop
        names = {name for name in names if len(name.strip()) >= SHORTEST}
        self.names = sorted(names, key=lambda name: (-len(name), name))
        self._any = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")

    def in_row(self, row: Mapping[str, Any]) -> list[str]:
        """The names of control tokens in the words of a row, each once.

        Args:
            row: in a normal form: of pairs, questions or conversations.

        Raises:
            DataError: if it holds the characters that stand-ins are made of.
        """
        texts = list(_texts(row))
        if any(OPEN in text or CLOSE in text for text in texts):
            raise DataError(
                f"{row.get('id')}: a text holds the character U+FDD0 or U+FDD1, which is none (Unicode 3.1).",
                "Take it out, or leave the row out.",
                CONTROL_TEXT,
            )
        return list(dict.fromkeys(name for text in texts for name in self._any.findall(text)))

    def refuse(self, row: Mapping[str, Any], because: str) -> None:
        """Refuse a row whose words hold the name of a control token, where they cannot be kept words.

        Args:
            row: in a normal form.
            because: why not, as the end of a sentence.

        Raises:
            DataError: naming row and control tokens.
        """
        if names := self.in_row(row):
            raise DataError(
                f"{row.get('id')} holds {', '.join(map(repr, names[:5]))} in its text, a control token of the model, "
                f"and {because}.",
                "Write it differently, or leave the row out (on_bad_row='skip').",
                CONTROL_TEXT,
            )

    def standing_in(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with stand-ins for the names of control tokens in its words; itself where there are none.

        Args:
            row: in a normal form.

        Raises:
            DataError: if the tokenizer cannot be made to read these as words.
        """
        if not self.in_row(row):
            return row
        if self._plain_tokenizer is None:
            self.refuse(row, f"{type(self._tokenizer).__name__} reads it as one")
        return self._rewritten(row, lambda name: f"{OPEN}u{self.names.index(name)}{CLOSE}")

    def without(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with other words in place of the names of control tokens; itself where there are none."""
        if not self.in_row(row):
            return row
        return self._rewritten(row, lambda name: re.sub(r"[\W_]", "", name) or "x")

    def _rewritten(self, row: Mapping[str, Any], replaced: Any) -> dict[str, Any]:
        def text(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "text":
                return part
            return {**part, "text": self._any.sub(lambda match: replaced(match[0]), part["text"])}

        return {**row} | {
            name: [{**message, "content": [text(part) for part in message["content"]]} for message in row[name]]
            for name in MESSAGES
            if name in row
        }

    def tokens(self, text: str) -> list[int] | None:
        """Token ids of a text in the words of the chat template, made of a row of `standing_in`.

        Returns:
            None where the text holds no stand-in, and the tokenizer itself reads it.
        """
        if OPEN not in text:
            return None
        assert self._plain_tokenizer is not None
        tokenizer, ids = self._plain_tokenizer
        written = self._any.sub(lambda match: _stand_in(self.names.index(match[0])), text)
        written = _STANDS_FOR.sub(lambda match: self.names[int(match[1])], written)
        return [ids.get(token, token) for token in tokenizer.encode(written, add_special_tokens=False).ids]

    @cached_property
    def _plain_tokenizer(self) -> tuple[Tokenizer, dict[int, int]] | None:
        """A tokenizer for which the names of control tokens are words, and the ids that its added tokens have in truth.

        None where there is no such.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        state = json.loads(backend.to_str())
        true_ids = {}
        for token in state["added_tokens"]:
            true_id = token["id"]
            if token["content"] in self.names:
                token["content"] = _stand_in(self.names.index(token["content"]))
            true_ids[token["content"]] = true_id
        try:
            tokenizer = Tokenizer.from_str(json.dumps(state))
        # what a tokenizer cannot do with its own description it says in exceptions of the plainest kind
        except Exception:
            return None
        ids = {int(tokenizer.token_to_id(content) or 0): true_id for content, true_id in true_ids.items()}
        return (tokenizer, ids) if self._agrees(tokenizer, ids) else None

    def _agrees(self, tokenizer: Tokenizer, ids: Mapping[int, int]) -> bool:
        """Whether a tokenizer reads names as words, and all else as the model's own does."""
        controls = set(self._tokenizer.convert_tokens_to_ids(self.names))
        for number, name in enumerate(self.names):
            read = [ids.get(token, token) for token in tokenizer.encode(f"a {name} b", add_special_tokens=False).ids]
            if controls & set(read):
                return False
            own = self._tokenizer(f"{name}What is it?\nA cat{name}\n", add_special_tokens=False)["input_ids"]
            written = f"{_stand_in(number)}What is it?\nA cat{_stand_in(number)}\n"
            if own != [ids.get(t, t) for t in tokenizer.encode(written, add_special_tokens=False).ids]:
                return False
        return True


def _stand_in(number: int) -> str:
    """What a control token is called meanwhile."""
    return f"{OPEN}c{number}{CLOSE}"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\S{3,40}", value))


def _texts(row: Mapping[str, Any]) -> Iterable[str]:
    for name in MESSAGES:
        for message in row.get(name) or ():
            for part in message["content"]:
                if part["type"] == "text":
                    yield part["text"]
