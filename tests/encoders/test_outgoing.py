"""What of an encoder's folder goes out: listed files alone, and nothing private in any of them."""

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pivot_plugin as pivot
from pivot_plugin.cli.app import cli
from pivot_plugin.encoders.outgoing import outgoing
from pivot_plugin.encoders.record import plain_name, without_paths
from pivot_plugin.errors import EncoderError, PublishError
from tests.helpers.encoders import rehash

WHOLE = {
    *("config.json", "preprocessor_config.json", "model.safetensors"),
    *("projector.safetensors", "pivot.json", "README.md"),
}
SECRETS = (
    "hf_AbCdEf0123456789AbCd",
    "ghp_abcdefghijklmnopqrstuvwxyz01",
    "sk-proj-abcdefghijklmnop0123",
    "AKIAABCDEFGHIJKLMNOP",
    "https://alice:hunter22@example.org/x",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
)


def test_other_files_stay_here_and_are_named(saved: Path) -> None:
    for name in (".env", "notes.md", "train.log", "hyper.yaml"):
        (saved / name).write_text("HF_TOKEN=hf_AbCdEf0123456789AbCd")
    going = outgoing(saved)
    assert {path.name for path in going.files} == WHOLE
    assert going.left_out == (".env", "hyper.yaml", "notes.md", "train.log")
    assert not going.shows_pictures


def test_a_file_that_nobody_recorded_stays_here_even_with_a_known_name(saved: Path) -> None:
    (saved / "saliency.png").write_bytes(b"somebody's")
    assert outgoing(saved).left_out == ("saliency.png",)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "pivot.json"])
def test_a_link_is_not_followed(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    with pytest.raises(EncoderError, match="is a link"):
        outgoing(saved)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_in_the_card_is_found_and_not_repeated(saved: Path, secret: str) -> None:
    card = saved / "README.md"
    card.write_text(card.read_text() + f"\n\nby {secret}\n")
    with pytest.raises(PublishError, match=r"README\.md has what looks like a token .* in line \d+") as caught:
        outgoing(saved)
    assert secret not in str(caught.value) and caught.value.remedy


def test_secrets_of_the_environment_and_paths_are_found_in_every_kind_of_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    for word, found in (
        ("correct horse battery", "a token or a password"),
        ("given-by-hand", "a token or a password"),
        ("/home/alice/project/x", "a path of this machine"),
        (r"C:\\Users\\alice\\x", "a path of this machine"),
        (f"{Path.cwd()}/x", "a path of this machine"),
    ):
        for name in ("config.json", "preprocessor_config.json", "model.safetensors", "pivot.json"):
            before = {path.name: path.read_bytes() for path in saved.iterdir()}
            file = saved / name
            if name.endswith(".safetensors"):
                save_file(load_file(file), file, {"format": "pt", "note": word})
            else:
                file.write_text(json.dumps({**json.loads(file.read_text()), "note": word}))
            rehash(saved)
            with pytest.raises(PublishError, match=f"{re.escape(name)} has .*{found}"):
                outgoing(saved, token="given-by-hand")
            for path in saved.iterdir():
                path.write_bytes(before[path.name])
    outgoing(saved, token="given-by-hand")


def test_words_in_a_picture_are_looked_at_too(saved: Path) -> None:
    text = b"tEXtComment\0/home/alice/secret-project/a.png"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (saved / "saliency.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    rehash(saved)
    with pytest.raises(PublishError, match=r"saliency\.png has a path"):
        outgoing(saved)


def test_the_dry_run_shows_files_pictures_and_the_card(saved: Path) -> None:
    (saved / "saliency.png").write_bytes(b"\x89PNG")
    rehash(saved)
    (saved / ".env").write_text("x")
    done = CliRunner().invoke(cli, ["push", str(saved), "me/eyes", "--dry-run"])
    assert done.exit_code == 0, done.output
    for name in (*WHOLE, "saliency.png"):
        assert re.search(rf"{(saved / name).stat().st_size:,}  {re.escape(name)}\n", done.output), name
    assert "Left out: .env" in done.output
    assert "saliency.png shows pictures of your held-out rows" in done.output
    assert (saved / "README.md").read_text().strip() in done.output


def test_names_of_models_and_data_lose_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "pairs").mkdir(parents=True)
    for source, name in (
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("gpt2", "gpt2"),
        ("mine/pairs", "pairs"),
        ("gone/pairs.jsonl", "pairs.jsonl"),
        ("a/b/c", "c"),
        ("/home/alice", ""),
        ("/home/alice/x", "x"),
        ("C:\\Users\\alice", ""),
        ("C:\\Users\\alice\\x", "x"),
        ("~/x", "x"),
        ("https://alice:pw@host/data.jsonl?token=x", "data.jsonl"),
        ("x" * 5000, "x" * 5000),
        (Path("mine/other"), "other"),
        (None, ""),
    ):
        assert plain_name(source) == name, source


def test_a_record_loses_paths_in_keys_and_sentences() -> None:
    record: dict[str, Any] = {
        "probes": {"linear=/home/alice/flowers": 1},
        "note": f"from {Path.cwd()}/run 3, and /Users/alice/run",
        "url": "https://huggingface.co/home/alice",
        "sentence": "2 x 2 blocks, and/or others",
    }
    assert without_paths(record) == {
        "probes": {"linear=flowers": 1},
        "note": "from run 3, and run",
        "url": "https://huggingface.co/home/alice",
        "sentence": "2 x 2 blocks, and/or others",
    }


def test_a_saved_encoder_can_be_published_as_it_is(saved: Path) -> None:
    assert {path.name for path in outgoing(saved).files} == WHOLE
    assert pivot.publish(saved, "me/eyes", dry_run=True).card.startswith("---\n")
