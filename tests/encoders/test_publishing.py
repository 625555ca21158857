"""Publishing, against the released client and a Hub that fails in every way: one commit, and the truth about it."""

import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from pivot_plugin import encoders
from pivot_plugin.encoders import PublishOptions
from tests.helpers import hub_server
from tests.helpers.encoders import rehash
from tests.helpers.examples import FUZZING
from tests.helpers.hub_client import Client
from tests.helpers.hub_server import READ_ONLY, TOKEN, Fault, Hub

pytestmark = pytest.mark.slow

KEY = "models/tester/eyes"
AT_ONCE = {"Retry-After": "0"}


def publish(client: Any, folder: Path, **options: Any) -> dict[str, Any]:
    repo_id = options.pop("repo_id", "tester/eyes")
    return client(
        f"from dataclasses import asdict\nanswer = asdict(pivot.publish({str(folder)!r}, {repo_id!r}, **{options!r}))"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, folder: Path, revision: str = "main") -> bool:
    return {n: c for n, c in hub.files(KEY, revision).items() if n != ".gitattributes"} == contents(folder)


def test_everything_goes_up_in_one_commit(hub: Hub, client: Any, saved: Path) -> None:
    found = publish(client, saved)
    assert published(hub, saved)
    assert len(hub.repos[KEY].commits) == 2
    assert found["answer"]["commit"] == hub.repos[KEY].branches["main"]
    assert found["answer"]["url"] == f"{hub.url}/tester/eyes/commit/{found['answer']['commit']}"
    assert hub.count("put") == 2


def test_what_is_published_already_is_not_committed_again(hub: Hub, client: Any, saved: Path) -> None:
    first = publish(client, saved)["answer"]
    second = publish(client, saved)["answer"]
    assert first["commit"] == second["commit"]
    assert len(hub.repos[KEY].commits) == 2


def test_a_new_version_replaces_the_old_and_its_left_over_shards(hub: Hub, client: Any, saved: Path) -> None:
    publish(client, saved)
    repo = hub.repos[KEY]
    repo.add("main", {**hub.files(KEY), "model-00002-of-00002.safetensors": b"old", "notes.md": b"mine"}, "by hand")
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nmore\n")
    publish(client, saved)
    # what others have put there by hand stays
    assert set(hub.files(KEY)) == {*contents(saved), ".gitattributes", "notes.md"}


def test_branches_tags_pull_requests_and_privacy(hub: Hub, client: Any, saved: Path) -> None:
    found = publish(client, saved, revision="v2", tag="v2.0", private=True, commit_message="Second pair of eyes")
    repo = hub.repos[KEY]
    assert repo.private
    assert published(hub, saved, "v2") and set(hub.files(KEY)) == {".gitattributes"}
    assert repo.tags == {"v2.0": found["answer"]["commit"]}
    assert repo.messages[-1] == "Second pair of eyes"
    proposed = publish(client, saved, create_pr=True)
    assert proposed["answer"]["url"].endswith("/discussions/1")
    assert set(hub.files(KEY)) == {".gitattributes"}
    again = publish(client, saved, revision="v2", tag="v2.0")
    assert again["answer"]["commit"] == found["answer"]["commit"] and again["answer"]["tag"] == "v2.0"
    assert publish(client, saved, create_pr=True)["answer"] == proposed["answer"] and len(repo.proposed) == 1


def test_a_tag_on_something_else_is_refused_before_anything_is_changed(hub: Hub, client: Any, saved: Path) -> None:
    publish(client, saved, tag="v1")
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nmore\n")
    found = publish(client, saved, tag="v1")
    assert found["error"] == "PublishError" and "Nothing was changed" in found["finding"]
    assert "Choose another tag" in found["remedy"] and len(hub.repos[KEY].commits) == 2


def test_a_dry_run_sends_nothing(hub: Hub, client: Any, saved: Path) -> None:
    found = publish(client, saved, dry_run=True)["answer"]
    assert found["files"] == {name: len(content) for name, content in contents(saved).items()}
    assert not hub.asked


# What goes wrong, and what stands there afterwards: "complete" after a retry, or "unchanged" with an error


@pytest.mark.parametrize(
    ("fault", "outcome", "words"),
    [
        (Fault("create", "status", 401), "absent", "401"),
        (Fault("create", "status", 403), "absent", "may not write"),
        (Fault("create", "status", 500, AT_ONCE), "complete", ""),
        (Fault("preupload", "status", 429, AT_ONCE), "complete", ""),
        (Fault("preupload", "status", 403), "unchanged", "upload the files"),
        (Fault("batch", "status", 503, AT_ONCE), "complete", ""),
        (Fault("put", "drop"), "complete", ""),
        (Fault("put", "status", 500, AT_ONCE), "complete", ""),
        (Fault("commit", "status", 401), "unchanged", "hf auth login"),
        (Fault("commit", "status", 403), "unchanged", "may not write"),
        (Fault("commit", "status", 404), "unchanged", "is unchanged"),
        (Fault("commit", "status", 409), "unchanged", "Somebody else writes"),
        (Fault("commit", "status", 412), "unchanged", "Somebody else writes"),
        (Fault("commit", "status", 429, AT_ONCE), "complete", ""),
        (Fault("commit", "status", 500, AT_ONCE, times=2), "complete", ""),
        (Fault("commit", "status", 503, AT_ONCE, times=9), "unchanged", "is unchanged, the encoder is not published"),
        (Fault("commit", "drop"), "complete", ""),
        (Fault("commit", "lose"), "complete", ""),
        (Fault("commit", "slow"), "complete", ""),
    ],
    ids=lambda value: f"{value.kind}-{value.action}-{value.status}x{value.times}" if isinstance(value, Fault) else None,
)
def test_a_fault_ends_in_success_or_in_a_clear_error(
    hub: Hub, client: Any, saved: Path, fault: Fault, outcome: str, words: str
) -> None:
    hub.faults.append(fault)
    found = publish(client, saved)
    if outcome == "complete":
        assert "answer" in found, found
        assert published(hub, saved)
        # however often it was tried, it is one commit
        assert len(hub.repos[KEY].commits) == 2
        assert found["answer"]["commit"] == hub.repos[KEY].branches["main"]
    else:
        assert found["error"] == "PublishError", found
        assert found["remedy"]
        assert words in f"{found['finding']} {found['remedy']}", found
        if outcome == "unchanged":
            assert set(hub.files(KEY)) == {".gitattributes"}
        else:
            assert KEY not in hub.repos
    assert TOKEN not in json.dumps(found)


def test_an_answer_that_does_not_come_is_not_waited_for(hub: Hub, client: Any, saved: Path) -> None:
    hub.faults.append(Fault("commit", "hang", seconds=4))
    found = publish(client, saved, time_limit=1.0)
    assert found["error"] == "PublishError"
    assert "got no answer in time" in found["finding"] and "is unchanged" in found["finding"]
    assert "recognised" in found["remedy"]


def test_a_lost_answer_is_found_out_and_said(hub: Hub, client: Any, saved: Path) -> None:
    hub.faults.append(Fault("commit", "lose"))
    found = publish(client, saved)
    assert "The answer to the commit was lost, but tester/eyes holds all files" in found["log"]
    assert hub.count("commit") == 1


def test_weights_that_have_arrived_are_not_sent_again(hub: Hub, client: Any, saved: Path) -> None:
    hub.faults.append(Fault("commit", "status", 403))
    assert publish(client, saved)["error"] == "PublishError"
    assert hub.count("put") == 2
    assert "answer" in publish(client, saved)
    assert hub.count("put") == 2


def test_a_change_by_somebody_else_meanwhile_is_noticed(hub: Hub, client: Any, saved: Path) -> None:
    """The branch moves between the look at it and the commit."""
    publish(client, saved)
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nmore\n")
    more = {**hub.files(KEY), "other.txt": b"x"}
    hub.meanwhile["commit"] = lambda: hub.repos[KEY].add("main", more, "somebody else")
    found = publish(client, saved)
    assert found["error"] == "PublishError"
    assert "changed while the encoder was published" in found["finding"]
    assert "not published" in found["finding"]
    assert hub.files(KEY)["other.txt"] == b"x"


BEFORE_THE_COMMIT = ("create", "info", "paths", "preupload", "batch", "put", "yaml", "commit")


@pytest.mark.parametrize("moment", BEFORE_THE_COMMIT)
def test_two_publishers_leave_the_one_or_the_other(hub: Hub, client: Any, saved: Path, moment: str) -> None:
    """Whenever the other's commit lands: all of it stands there, or all of ours, and what is said is so."""
    publish(client, saved)
    theirs = dict(hub.files(KEY)) | {"model-00002-of-00002.safetensors": b"theirs", "config.json": b"theirs"}
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nours\n")
    (saved / "saliency.png").write_bytes(b"ours")
    rehash(saved)
    hub.meanwhile[moment] = lambda: hub.repos[KEY].add("main", theirs, "the other")
    hub.uploaded.clear()
    found = publish(client, saved)
    assert "answer" in found or found["error"] == "PublishError", found
    assert published(hub, saved) if "answer" in found else hub.files(KEY) == theirs
    assert "answer" in found or "not published" in found["finding"]
    hub.meanwhile.clear()
    assert "answer" in publish(client, saved) and published(hub, saved)


@pytest.mark.parametrize("moment", BEFORE_THE_COMMIT)
def test_what_somebody_puts_there_meanwhile_is_not_overwritten(hub: Hub, client: Any, saved: Path, moment: str) -> None:
    theirs = {".gitattributes": b"", "config.json": b"theirs", "thesis.pdf": b"years of work"}
    hub.repos[KEY] = hub_server.Repo()
    hub.repos[KEY].add("main", {".gitattributes": b""}, "initial commit")
    hub.meanwhile[moment] = lambda: hub.repos[KEY].add("main", theirs, "somebody else")
    found = publish(client, saved)
    if not hub.meanwhile:
        assert found["error"] == "PublishError", found
        assert hub.files(KEY) == theirs
        assert "holds something else already" in publish(client, saved)["finding"]


def test_the_same_files_with_more_beside_them_are_no_publication(hub: Hub, client: Any, saved: Path) -> None:
    """The client makes no commit where all files stand there already."""
    publish(client, saved)
    card = (saved / "README.md").read_text()
    (saved / "README.md").write_text(f"{card}\nours\n")
    theirs = {**hub.files(KEY), "README.md": f"{card}\nours\n".encode(), "model-00002-of-00002.safetensors": b"theirs"}
    hub.meanwhile["preupload"] = lambda: hub.repos[KEY].add("main", theirs, "the other")
    found = publish(client, saved)
    assert found["error"] == "PublishError" and "model-00002-of-00002.safetensors" in found["finding"]
    assert "answer" in publish(client, saved) and published(hub, saved)


def test_a_private_encoder_does_not_go_into_a_public_repository(hub: Hub, client: Any, saved: Path) -> None:
    hub.repos[KEY] = hub_server.Repo()
    hub.repos[KEY].add("main", {".gitattributes": b""}, "initial commit")
    found = publish(client, saved, private=True)
    assert "exists and is public" in found["finding"] and set(hub.files(KEY)) == {".gitattributes"}


# A table that grows: whatever goes wrong wherever, what is said is so, and the same command mends it


KINDS = (
    "create",
    "info",
    "refs",
    "paths",
    "preupload",
    "batch",
    "put",
    "yaml",
    "commit",
    "branch",
    "tag",
    "discussions",
)
ACTIONS = (
    *(("drop", 0, 1), ("drop", 0, 20), ("lose", 0, 1), ("lose", 0, 20), ("truncate", 0, 1), ("cut", 0, 1)),
    *(("status", status, times) for status in (401, 403, 404, 409, 412, 429, 500, 503) for times in (1, 20)),
    *(("hang", 0, 1), ("late", 0, 1)),
)
# seconds that the Hub takes for an answer, and that are waited for one
LATE, WAITED = 1.5, 0.5
ROADS: tuple[dict[str, Any], ...] = ({"tag": "v1"}, {"create_pr": True}, {"revision": "v2", "tag": "v1"})


def what_is_said_is_so(hub: Hub, client: Any, saved: Path, faults: list[Fault], road: dict[str, Any]) -> None:
    """Publish under faults; then without, which ends well, with one commit and one tag or one pull request."""
    hub.repos.clear()
    hub.uploaded.clear()
    hub.faults[:] = faults
    slow = any(fault.action in ("hang", "late") for fault in faults)
    if slow:
        client(f"import pivot_plugin.hub.repository as r; r.w = r.within; r.within = lambda s, ask: r.w({WAITED}, ask)")
    found = publish(client, saved, **road)
    if slow:
        client("import pivot_plugin.hub.repository as r; r.within = r.w")
    hub.faults.clear()
    repo = hub.repos.get(KEY)
    branch = road.get("revision", "main")
    there = repo is not None and any(
        {n: c for n, c in repo.commits[oid].items() if n != ".gitattributes"} == contents(saved)
        for oid in (repo.branches.get(f"refs/pr/{number}" if road.get("create_pr") else branch) for number in (1, 2))
        if oid
    )
    words = found.get("finding", "")
    if "answer" in found:
        assert there and repo is not None
        assert road.get("tag") is None or repo.tags[road["tag"]] == found["answer"]["commit"]
    else:
        assert found["error"] == "PublishError" and found["remedy"], found
        unknown = "not known" in words
        assert unknown or there == ("is published at" in words), (words, there)
        if "tag is not set" in words:
            assert repo is not None and not repo.tags, words
        assert unknown or there or re.search("No file there was changed|[Uu]nchanged|Could not read|[Nn]o pull", words)
    assert TOKEN not in json.dumps(found)
    if slow:
        # what was said not to be there, and to land perhaps, has landed by then
        assert "answer" in found or unknown or "may still land" in words or faults[0].kind != "commit", words
        time.sleep(LATE)
    again = publish(client, saved, **road)
    assert "answer" in again, again
    repo = hub.repos[KEY]
    assert len(repo.commits) == 2 and len(repo.proposed) == (1 if road.get("create_pr") else 0)
    assert road.get("tag") is None or repo.tags == {road["tag"]: again["answer"]["commit"]}


@pytest.fixture
def hurried(client: Any) -> Iterator[Any]:
    """A client that does not wait between attempts."""
    client("import time; time.slept, time.sleep = time.sleep, lambda seconds: None")
    yield client
    client("import time; time.sleep = time.slept")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_after_a_fault_is_so(hub: Hub, hurried: Any, saved: Path, kind: str) -> None:
    """All of the table in `make fuzz`, else every action once."""
    cases = list(itertools.product(ROADS, ACTIONS))
    roads = {"discussions": 1, "branch": 2}
    if not FUZZING:
        cases = [(ROADS[roads.get(kind, 0)], action) for action in ACTIONS if action[1] in (0, 403, 409, 503)]
    for road, (action, status, times) in cases:
        what_is_said_is_so(hub, hurried, saved, [Fault(kind, action, status, AT_ONCE, times, LATE)], road)


def test_a_hub_without_a_xet_store_is_said_with_the_way_around(hub: Hub, saved: Path, tmp_path: Path) -> None:
    """A client with hf_xet sends large files that way alone."""
    pytest.importorskip("hf_xet")
    xet = Client(hub.url, tmp_path, HF_HUB_DISABLE_XET="0")
    try:
        found = publish(xet, saved)
    finally:
        xet.close()
    assert found["error"] == "PublishError"
    assert "HF_HUB_DISABLE_XET=1" in found["remedy"]
    assert set(hub.files(KEY)) == {".gitattributes"}


def test_no_token_a_wrong_one_and_one_that_may_only_read(hub: Hub, client: Any, saved: Path) -> None:
    for token, words in (("hf_wrong_secret", "hf auth login"), (READ_ONLY, "may not write"), (False, "token")):
        found = publish(client, saved, token=token)
        assert found["error"] == "PublishError", found
        assert words in f"{found['finding']} {found['remedy']}"
        assert str(token) == "False" or str(token) not in json.dumps(found)
    assert KEY not in hub.repos


def test_a_repository_with_other_contents_is_left_alone(hub: Hub, client: Any, saved: Path) -> None:
    hub.repos[KEY] = hub_server.Repo()
    hub.repos[KEY].add("main", {".gitattributes": b"", "thesis.pdf": b"years of work"}, "mine")
    found = publish(client, saved)
    assert found["error"] == "PublishError"
    assert "holds something else already: thesis.pdf" in found["finding"] and "--exist-ok" in found["remedy"]
    assert set(hub.files(KEY)) == {".gitattributes", "thesis.pdf"}
    assert "answer" in publish(client, saved, exist_ok=True)
    assert set(hub.files(KEY)) == {".gitattributes", "thesis.pdf", *contents(saved)}


def test_names_that_cannot_be_are_refused_before_anything_is_asked(hub: Hub, client: Any, saved: Path) -> None:
    for name in ("two/slashes/here", "tester/-eyes-", "tester/a--b", "tester/eyes.git", ""):
        found = publish(client, saved, repo_id=name)
        assert found["error"] == "PublishError", name
        assert "cannot be a repository" in found["finding"] and "owner/name" in found["remedy"]
    assert not hub.asked
    assert "may not write" in publish(client, saved, repo_id="somebody/eyes")["remedy"]


def test_folders_that_are_not_whole_are_refused_before_anything_is_asked(hub: Hub, client: Any, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    changed = shutil.copytree(saved, saved.parent / "changed")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    pickled = shutil.copytree(saved, saved.parent / "pickled")
    (pickled / "pytorch_model.bin").touch()
    cardless = shutil.copytree(saved, saved.parent / "cardless")
    (cardless / "README.md").unlink()
    foreign = saved.parent / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    for folder, words in (
        (changed, "model.safetensors"),
        (pickled, "also holds pytorch_model.bin"),
        (cardless, "README.md is missing"),
        (foreign, "pivot.json is missing"),
        (saved.parent / "absent", "is no folder"),
    ):
        found = publish(client, folder)
        assert found["error"] == "EncoderError", folder
        assert words in found["finding"] and found["remedy"]
    assert "has changed since it was saved" in publish(client, changed)["finding"]
    assert not hub.asked


def test_the_marker_token_is_nowhere(hub: Hub, client: Any, saved: Path) -> None:
    """Not in what is published, and not in any message or log of any failure."""
    for fault in (
        Fault("create", "status", 401),
        Fault("info", "status", 500, AT_ONCE, times=20),
        Fault("put", "status", 403),
        Fault("commit", "status", 400),
        Fault("commit", "drop", times=9),
    ):
        hub.faults[:] = [fault]
        assert TOKEN not in json.dumps(publish(client, saved)), fault
    hub.faults.clear()
    publish(client, saved)
    assert all(TOKEN.encode() not in content for content in hub.files(KEY).values())


def test_the_card_is_valid_and_complete(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "llava-hf/tiny"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert data["license"] == "apache-2.0"
    assert {"pivot", "trl", "pivot-family-llava"} <= set(data["tags"])
    results = data["model-index"][0]["results"]
    assert results[0]["metrics"][0]["type"] == "preference_accuracy"
    assert results[0]["metrics"][0]["value"] == 0.75
    for words in ("AutoModel.from_pretrained", "pivot.load_encoder", "hidden_states[-2]", "2510.16333", "## Limits"):
        assert words in card.text


def test_published_encoders_are_listed_by_tag(hub: Hub, client: Any, saved: Path) -> None:
    publish(client, saved)
    hub.repos["models/other/model"] = hub_server.Repo()
    hub.repos["models/other/model"].add("main", {"README.md": b"---\ntags: [clip]\n---\n"}, "x")
    found = client("from dataclasses import asdict\nanswer = [asdict(one) for one in pivot.list_encoders()]")["answer"]
    assert [one["repo_id"] for one in found] == ["tester/eyes"]
    assert found[0]["base"] == "llava-hf/tiny"
    assert found[0]["family"] == "llava"
    assert list(found[0]["scores"].values()) == [0.75]
    assert client("answer = [one.repo_id for one in pivot.list_encoders('nobody')]")["answer"] == []
    hub.faults.append(Fault("list", "status", 500, AT_ONCE, times=20))
    assert client("pivot.list_encoders()")["error"] == "PublishError"


def test_the_options_to_hand_on_are_those_of_publish() -> None:
    options = get_type_hints(PublishOptions)
    keywords = get_type_hints(encoders.publish)
    assert options == {name: keywords[name] for name in keywords.keys() - {"folder", "repo_id", "return"}}
