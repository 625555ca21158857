"""What is shown of another library's error holds no token, should it ever quote one."""

import pytest

from pivot_plugin.encoders.secrets import hidden


def test_tokens_are_taken_out_of_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    quoted = "401 for Bearer abc.def with hf_AbCdEf123456, given-by-hand and from-the-environment at hf.co/me/eyes"
    shown = hidden(ValueError(quoted), "given-by-hand")
    assert shown == "401 for Bearer <token> with <token>, <token> and <token> at hf.co/me/eyes"
    assert hidden("nothing secret in api or hf_x") == "nothing secret in api or hf_x"
