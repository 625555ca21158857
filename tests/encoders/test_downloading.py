"""Encoders from the Hub: whole or not at all, pinned, offline, and never code that nobody asked for."""

import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.encoders.downloading import ANSWER_LIMIT_S, STALL_LIMIT_S
from pivot_plugin.encoders.plain import LARGEST
from pivot_plugin.errors import EncoderError
from pivot_plugin.files import sha256
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build
from tests.helpers import hub_server
from tests.helpers.examples import FUZZING
from tests.helpers.hub_client import Client
from tests.helpers.hub_server import TOKEN, Fault, Hub

pytestmark = pytest.mark.slow

KEY = "models/tester/eyes"
AT_ONCE = {"Retry-After": "0"}
HANGING_S = 1.5


@pytest.fixture
def online(hub: Hub, saved: Path) -> dict[str, bytes]:
    """The encoder on the Hub; what it consists of."""
    hub.repos[KEY] = hub_server.Repo()
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.repos[KEY].add("main", dict(files), "encoder")
    return files


def load(client: Client, cache: Path, **options: Any) -> dict[str, Any]:
    return client(
        f"encoder = pivot.load_encoder('tester/eyes', cache_dir={str(cache)!r}, **{options!r})\n"
        "answer = [type(encoder).__name__, encoder.pivot_origin.repo, encoder.pivot_origin.revision,"
        " encoder.config.vision_feature_layer, sum(p.double().sum().item() for p in encoder.parameters())]"
    )


def total() -> float:
    model, _ = build("llava")
    return sum(p.double().sum().item() for p in find_adapter(model).tower.parameters())


def test_an_encoder_comes_down_as_it_went_up(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    name, repo, commit, layer, weights = load(client, tmp_path)["answer"]
    assert (name, repo, layer) == ("CLIPVisionModel", "tester/eyes", -2)
    assert commit == hub.repos[KEY].branches["main"]
    assert weights == pytest.approx(total())


def test_a_revision_is_pinned_and_recorded(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    first = hub.repos[KEY].branches["main"]
    hub.repos[KEY].tags["v1"] = first
    hub.repos[KEY].add("main", {"README.md": b"gone"}, "broken later")
    assert load(client, tmp_path, revision="v1")["answer"][2] == first
    assert load(client, tmp_path, revision=first)["answer"][2] == first
    assert load(client, tmp_path)["error"] == "EncoderError"
    found = load(client, tmp_path, revision="v9")
    assert found["error"] == "EncoderError" and "the revision" in found["remedy"]


def test_what_is_in_the_cache_is_read_without_the_hub(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    before = load(client, tmp_path)["answer"]
    hub.asked.clear()
    found = load(client, tmp_path, local_files_only=True)
    assert found.get("answer") == before, found
    assert not hub.asked
    found = load(client, tmp_path / "other", local_files_only=True)
    assert found["error"] == "EncoderError"
    offline = Client(hub.url, tmp_path, HF_HUB_OFFLINE="1")
    try:
        assert load(offline, tmp_path)["answer"] == before
        assert not hub.asked
        found = offline("pivot.publish('x', 'tester/eyes')")
        assert found["error"] == "EncoderError"
    finally:
        offline.close()


@pytest.mark.parametrize(
    ("fault", "loads"),
    [
        (Fault("resolve", "cut"), None),
        (Fault("resolve", "truncate", times=99), False),
        (Fault("resolve", "corrupt", times=99), False),
        (Fault("resolve", "slow", times=3), True),
        (Fault("resolve", "status", 500, times=99), False),
        (Fault("resolve", "status", 403, times=99), False),
        (Fault("info", "status", 401, times=99), False),
        (Fault("info", "status", 404, times=99), False),
        (Fault("info", "status", 503, times=99), False),
    ],
    ids=lambda value: f"{value.kind}-{value.action}-{value.status}" if isinstance(value, Fault) else None,
)
def test_a_broken_download_never_gives_a_wrong_encoder(
    hub: Hub, client: Client, online: Any, tmp_path: Path, fault: Fault, loads: bool | None
) -> None:
    hub.faults.append(fault)
    found = load(client, tmp_path)
    if "answer" in found:
        assert loads is not False
        assert found["answer"][4] == pytest.approx(total())
    else:
        assert loads is not True
        assert found["error"] == "EncoderError", found
        assert found["remedy"]
        hub.faults.clear()
        # what came down broken is not believed later
        assert load(client, tmp_path)["answer"][4] == pytest.approx(total())
    assert TOKEN not in json.dumps(found)


# A table that grows: it loads, or it says why, in time; and what came down broken mends itself


REFUSALS = (401, 403, 404, 429, 500, 503) if FUZZING else (403, 503)
ACTIONS = (
    *(("drop", 0, 1), ("drop", 0, 99), ("cut", 0, 1), ("cut", 0, 99), ("truncate", 0, 1), ("truncate", 0, 99)),
    *(("corrupt", 0, 1), ("corrupt", 0, 3), ("corrupt", 0, 99), ("slow", 0, 99), ("hang", 0, 1), ("hang", 0, 99)),
    *(("status", status, times) for status in REFUSALS for times in (1, 99)),
)


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_whatever_goes_wrong_the_next_call_mends_it(
    hub: Hub, impatient: Client, online: Any, tmp_path: Path, kind: str
) -> None:
    for number, (action, status, times) in enumerate(ACTIONS):
        hub.faults[:] = [Fault(kind, action, status, AT_ONCE, times, seconds=HANGING_S)]
        begun = time.monotonic()
        found = load(impatient, tmp_path / str(number))
        assert time.monotonic() - begun < 20, (action, status, times)
        if "answer" in found:
            assert found["answer"][4] == pytest.approx(total())
        else:
            assert found["error"] == "EncoderError" and found["remedy"], (action, status, times, found)
        assert TOKEN not in json.dumps(found)
        hub.faults.clear()
        # in a process that is not still waiting for an answer that never comes
        time.sleep(1.2 * HANGING_S if action == "hang" else 0)
        again = load(impatient, tmp_path / str(number))
        assert "answer" in again, (action, status, times, found, again)
        assert again["answer"][4] == pytest.approx(total())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pivot.json", "preprocessor_config.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_lies_broken_in_the_cache_mends_itself(
    hub: Hub, client: Client, online: Any, tmp_path: Path, name: str, how: str
) -> None:
    load(client, tmp_path)
    blob = next(tmp_path.rglob(f"snapshots/*/{name}")).resolve()
    content = blob.read_bytes()
    blob.unlink()
    if how != "gone":
        blob.write_bytes(content[:-9] + b"#" + content[-8:] if how == "flipped" else content[: len(content) // 2])
    offline = load(client, tmp_path, local_files_only=True)
    assert offline["error"] == "EncoderError" and name in offline["finding"]
    assert "mends itself" in offline["remedy"] or "with network access" in offline["finding"]
    assert load(client, tmp_path)["answer"][4] == pytest.approx(total())
    assert load(client, tmp_path, local_files_only=True)["answer"][4] == pytest.approx(total())


def test_a_hub_that_is_down_is_no_matter_for_what_is_in_the_cache(
    hub: Hub, client: Client, online: Any, tmp_path: Path
) -> None:
    load(client, tmp_path)
    hub.faults.append(Fault("info", "status", 503, AT_ONCE, times=99))
    found = load(client, tmp_path)
    assert found["answer"][4] == pytest.approx(total()) and "read from the cache" in found["log"]
    hub.faults[:] = [Fault("info", "status", 403, times=99)]
    assert load(client, tmp_path)["error"] == "EncoderError"


@pytest.mark.parametrize("verb", ["verify", "list_encoders"])
def test_verifying_and_listing_raise_errors_of_ours_alone(
    hub: Hub, impatient: Client, online: Any, tmp_path: Path, verb: str
) -> None:
    calls = {
        "verify": f"pivot.verify('tester/eyes', cache_dir={str(tmp_path)!r}).passed",
        "list_encoders": "bool(pivot.list_encoders())",
    }
    for action, status, times in ACTIONS:
        fault = partial(Fault, action=action, status=status, headers=AT_ONCE, times=times, seconds=HANGING_S)
        hub.faults[:] = [fault(kind) for kind in ("list", "info", "resolve")]
        found = impatient(f"answer = {calls[verb]}")
        assert found.get("answer") in (True, False) or found["error"] == "PublishError", (action, status, found)


@pytest.fixture
def impatient(client: Client) -> Iterator[Client]:
    """A client that waits for no Hub for long."""
    limits = "import pivot_plugin.encoders.downloading as d\nd.ANSWER_LIMIT_S, d.STALL_LIMIT_S = {}, {}"
    client(limits.format(1.0, 1.0))
    yield client
    client(limits.format(ANSWER_LIMIT_S, STALL_LIMIT_S))


def test_one_changed_byte_of_the_weights_is_noticed(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    weights = bytearray(online["model.safetensors"])
    weights[-3] ^= 1
    hub.repos[KEY].add("main", {**online, "model.safetensors": bytes(weights)}, "tampered")
    found = load(client, tmp_path)
    assert found["error"] == "EncoderError"
    assert "model.safetensors" in found["finding"] and "has changed since it was saved" in found["finding"]


def test_weights_that_the_record_does_not_know_are_refused(
    hub: Hub, client: Client, online: Any, tmp_path: Path
) -> None:
    hub.repos[KEY].add("main", {**online, "extra.safetensors": online["projector.safetensors"]}, "more")
    assert "extra.safetensors" in load(client, tmp_path)["finding"]


def test_pickles_and_code_are_refused_by_name(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    config = json.loads(online["config.json"])
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    evil = b"raise SystemExit('this code ran')"
    for number, (files, words) in enumerate(
        (
            ({**online, "pytorch_model.bin": b"pickle"}, "pytorch_model.bin"),
            ({**online, "modeling_evil.py": evil}, "modeling_evil.py"),
            ({**online, "config.json": json.dumps(config).encode()}, "class modeling_evil.Evil"),
            ({"config.json": online["config.json"], "pytorch_model.bin": b"pickle"}, "pytorch_model.bin"),
        )
    ):
        hub.repos[KEY].add("main", files, f"evil {number}")
        found = load(client, tmp_path)
        assert found["error"] == "EncoderError", words
        assert "would run code from its author" in found["finding"] and words in found["finding"]
        assert "trust_remote_code=True" in found["remedy"]
    assert not list(tmp_path.rglob("*.py")) and not list(tmp_path.rglob("*.bin"))


def test_code_that_is_asked_for_is_said_before_it_runs(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    hub.repos[KEY].add("main", {**online, "notes.py": b""}, "code")
    found = load(client, tmp_path, trust_remote_code=True)
    assert "tester/eyes runs code from its author, as trust_remote_code=True allows: notes.py" in found["log"]
    assert found.get("answer", [found])[0] == "CLIPVisionModel"


def test_a_plain_encoder_beside_old_pickles_loads_with_a_note(
    hub: Hub, client: Client, online: Any, tmp_path: Path
) -> None:
    plain = {name: online[name] for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    hub.repos[KEY].add("main", {**plain, "pytorch_model.bin": b"pickle"}, "as older repositories are")
    found = load(client, tmp_path)
    assert found["answer"][4] == pytest.approx(total())
    assert "has no pivot.json: it has no provenance" in found["log"]
    assert "pytorch_model.bin, which are not read" in found["log"]
    assert not list(tmp_path.rglob("*.bin"))


def test_file_names_cannot_lead_out_of_the_folder(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    hub.siblings.append("../../../evil.json")
    found = load(client, tmp_path)
    assert found["error"] == "EncoderError"
    assert "leads out of its folder" in found["finding"]
    assert not (tmp_path.parent / "evil.json").exists()


def test_a_private_encoder_needs_a_token(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    hub.repos[KEY].private = True
    assert load(client, tmp_path)["answer"][0] == "CLIPVisionModel"
    found = load(client, tmp_path / "other", token=False)
    assert found["error"] == "EncoderError" and "needs a token" in found["remedy"]


# The record, which strangers may have written


def test_records_that_are_too_large_deep_or_new_are_refused(saved: Path) -> None:
    record = json.loads((saved / "pivot.json").read_text())
    deep: Any = {}
    for _ in range(40):
        deep = {"x": deep}
    for content, message in (
        (json.dumps({**record, "notes": "x" * LARGEST}), "more than"),
        (json.dumps({**record, "deep": deep}), "nested more than"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({**record, "format": 99}), "has format 99"),
        (json.dumps({**record, "sha256": {"../config.json": "0"}}), "no name in its folder"),
        (json.dumps({**record, "sha256": {"model.safetensors": 3}}), "has no hash"),
        (json.dumps(record).replace('"format": 2', '"format": NaN'), "is not JSON"),
    ):
        (saved / "pivot.json").write_text(content)
        with pytest.raises(EncoderError, match=message) as caught:
            pivot.load_encoder(saved)
        assert caught.value.remedy


def test_a_folder_with_its_processor(saved: Path) -> None:
    encoder, processor = pivot.load_encoder(saved, with_processor=True)
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    assert encoder.pivot_origin.folder == saved and encoder.pivot_origin.repo is None
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json is missing"):
        pivot.load_encoder(saved, with_processor=True)
    (saved / "pivot.json").unlink()
    with pytest.raises(EncoderError, match="holds no image processor"):
        pivot.load_encoder(saved, with_processor=True)
    with pytest.raises(EncoderError, match="has no revision 'v1'"):
        pivot.load_encoder(saved, "v1")


# Verification


def test_a_published_encoder_is_verified(family: str, tiny: Any, tmp_path: Path) -> None:
    folder = save_encoder(find_adapter(tiny[0]), tiny[1], tmp_path / "encoder", {"base": {"mllm": "x/y"}})
    found = pivot.verify(folder)
    assert found.passed, found.checks
    assert [check.name for check in found.checks] == ["files", "load", "features"]
    assert found.provenance()["base"] == {"mllm": "x/y"}


def test_verification_finds_what_does_not_agree(saved: Path) -> None:
    record = json.loads((saved / "pivot.json").read_text())
    # the same weights, read at another layer
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(json.dumps({**json.loads(config), "vision_feature_layer": -1}))
    found = pivot.verify(saved)
    assert not found.passed
    assert found.checks[-1].name == "files" and "config.json" in found.checks[-1].detail
    # and by somebody who knows of hashes
    hashes = {**record["sha256"], "config.json": sha256(saved / "config.json")}
    (saved / "pivot.json").write_text(json.dumps({**record, "sha256": hashes}))
    found = pivot.verify(saved)
    assert not found.passed
    assert found.checks[-1].name == "features" and "apart" in found.checks[-1].detail
    (saved / "config.json").write_text(config)
    (saved / "pivot.json").write_text(json.dumps({**record, "signature": {"width": "many"}}))
    assert pivot.verify(saved).checks[-1].passed is False
    (saved / "pivot.json").write_text(json.dumps({n: v for n, v in record.items() if n != "signature"}))
    assert pivot.verify(saved).checks[-1].passed is None and not pivot.verify(saved).passed
    (saved / "pivot.json").unlink()
    assert [check.passed for check in pivot.verify(saved).checks] == [None, True, None]
    (saved / "model.safetensors").write_bytes(b"")
    assert pivot.verify(saved).checks[-1].passed is False


def test_verification_from_the_hub(hub: Hub, client: Client, online: Any, tmp_path: Path) -> None:
    found = client(
        f"found = pivot.verify('tester/eyes', cache_dir={str(tmp_path)!r})\n"
        "answer = [found.passed, found.origin.revision, found.provenance()['family']]"
    )
    assert found["answer"] == [True, hub.repos[KEY].branches["main"], "llava"]


def test_rounding_of_another_precision_is_no_difference(saved: Path, llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    half = save_encoder(find_adapter(model.to(torch.bfloat16)), processor, tmp_path / "half", {})
    assert json.loads((half / "pivot.json").read_text())["signature"]["dtype"] == "bfloat16"
    assert pivot.verify(half).passed
    shutil.rmtree(half)


def test_a_download_that_finds_no_room_is_said_and_mends_itself(
    hub: Hub, client: Client, online: Any, tmp_path: Path
) -> None:
    client(
        "import resource as r; limits = r.getrlimit(r.RLIMIT_FSIZE); r.setrlimit(r.RLIMIT_FSIZE, (20000, limits[1]))"
    )
    found = load(client, tmp_path / "cache")
    client("import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (r.getrlimit(r.RLIMIT_FSIZE)[1],) * 2)")
    assert found["error"] == "EncoderError", found
    assert str(tmp_path / "cache") in found["finding"] and "File too large" in found["finding"]
    assert "Make room" in found["remedy"]
    assert load(client, tmp_path / "cache")["answer"][4] == pytest.approx(total())
