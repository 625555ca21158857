"""What commands print is for people: no JSON, no hashes, no columns that are cut."""

from pivot_plugin.cli.showing import readable


def test_a_record_is_read_as_lines() -> None:
    record = {"base": {"mllm": "me/x", "revision": "a1" * 20}, "rows": 3, "change": 0.12345678, "tags": ["a", "b"]}
    assert readable("origin", record) == [
        "origin:",
        "  base:",
        "    mllm: me/x",
        "    revision: a1a1a1a1a1a1...",
        "  rows: 3",
        "  change: 0.123457",
        "  tags: a, b",
    ]
    assert readable("licence", None) == ["licence: not known"]
    assert readable("empty", {}) == ["empty: {}"] and readable("none", []) == ["none: none"]
