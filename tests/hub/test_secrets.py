"""What is shown of another library's error holds no token, should it ever quote one."""

import sys

import pytest
from huggingface_hub.errors import HfHubHTTPError

from pivot_plugin.hub.secrets import HTTP_ERROR, hidden


def test_tokens_are_taken_out_of_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    quoted = "401 for Bearer abc.def with hf_AbCdEf123456, given-by-hand and from-the-environment at hf.co/me/eyes"
    shown = hidden(ValueError(quoted), "given-by-hand")
    assert shown == "401 for Bearer <token> with <token>, <token> and <token> at hf.co/me/eyes"
    assert hidden("nothing secret in api or hf_x") == "nothing secret in api or hf_x"


def test_the_client_s_own_error_is_that_of_the_http_library_it_is_built_on() -> None:
    library = sys.modules[HTTP_ERROR.__module__.partition(".")[0]]
    assert library.HTTPError is HTTP_ERROR
    # refused answers, broken connections and time that has run out, and no error of another kind
    for error in (HfHubHTTPError, library.ConnectError, library.ReadError, library.ReadTimeout):
        assert issubclass(error, HTTP_ERROR)
    assert not issubclass(OSError, HTTP_ERROR) and not issubclass(ValueError, HTTP_ERROR)
