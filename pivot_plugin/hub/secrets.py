"""What the Hub's client raises, and how it is shown: tokens stay secret."""

import os
import re

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

# httpx's, or that of its successor, whichever the installed client is built on: refused answers and broken connections
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_LIKE_A_TOKEN = re.compile(r"\b(?:hf|api)_[A-Za-z0-9_]{6,}|(?<=Bearer )\S+")


def hidden(error: object, token: str | None = None) -> str:
    """A text without tokens.

    Args:
        error: an exception or a text.
        token: that was given, if any.
    """
    text = str(error)
    for secret in known_tokens(token):
        if len(secret) > 3:
            text = text.replace(secret, "<token>")
    return _LIKE_A_TOKEN.sub("<token>", text)


def known_tokens(token: str | None = None) -> list[str]:
    """Every token for the Hub that this process could use.

    Args:
        token: that was given, if any.
    """
    known = (token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token())
    return [secret for secret in known if isinstance(secret, str) and secret]


def status_of(error: BaseException) -> int | None:
    """The status of a refused answer; None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
