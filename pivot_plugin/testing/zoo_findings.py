"""What this package makes of every family, found by the conformance kit on tiny models, and kept in a file.

    python -m pivot_plugin.testing.zoo_findings tests/testing/families.json README.md

asks every family that can be built here, writes the file, and writes README's table of families out of it. What needs
a package that is not installed stays as it was recorded.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from . import families, zoo
from .kit import Check, conformance

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
WAYS = {
    "trees": "train, each shared prefix computed once",
    "by row": "train, one sequence a row",
    "refused": "refused in a sentence",
}
KNOWS, FOREST = "an adapter knows the model", "forest equals plain passes"
TOKENS = "the processor's tokens are the model's"
LORA = "LoRA goes on the tower's linear layers that have a gradient"
PATCHES, SALIENCY = "a lit patch shows in its own cell", "saliency looks at the view of the whole"
ENCODER = (
    "an encoder is extracted, saved and loaded as it was",
    "an encoder is grafted",
    "the card's lines run when pasted",
)
BY_ROW = "one sequence a row, because "


@dataclass(frozen=True)
class FamilyFinding:
    """What was found of one family.

    Attributes:
        model: class of its MLLM.
        training: "trees", "by row" or "refused".
        patches: of patch features on their grid: "verified", "not verified" or "refused".
        saliency: of saliency maps on the view of the whole, the same.
        encoder: whether its encoder goes out, in, and into another model: "yes" or "refused".
        limits: what a user should know, in sentences without a full stop.
    """

    model: str
    training: str
    patches: str
    saliency: str
    encoder: str
    limits: tuple[str, ...]


def all_names() -> list[str]:
    """Every family: those with a tiny model among the built-in ones, and those of the zoo."""
    return [*families.FAMILIES, *zoo.FAMILIES]


def missing_packages(name: str) -> list[str]:
    """Packages that a family needs and that are not installed.

    Args:
        name: of a family.
    """
    return [] if name in families.FAMILIES else zoo.missing_packages(name)


def finding_of(name: str) -> FamilyFinding:
    """Ask one family.

    Args:
        name: of a family whose packages are installed.
    """
    model, processor = (families if name in families.FAMILIES else zoo).build(name)
    return summary(model, conformance(model, processor))


def summary(model: PreTrainedModel, checks: Sequence[Check]) -> FamilyFinding:
    """The checks of a family in one record.

    Args:
        model: that was tried.
        checks: of the kit.
    """
    by_name = {check.name: check for check in checks}
    kind = type(model).__name__
    if KNOWS in by_name:
        return FamilyFinding(
            kind, "refused", "refused", "refused", "refused", (_first_sentence(by_name[KNOWS].reason),)
        )
    forest, limits = by_name[FOREST], []
    training = "refused" if forest.result == "failed" else "by row" if forest.reason.startswith(BY_ROW) else "trees"
    if training == "by row":
        limits.append(f"no trees, because {forest.reason.removeprefix(BY_ROW).partition('; rows:')[0]}")
    if "; images also go through " in (parts := by_name["parts are found and disjoint"].reason):
        limits.append(f"images also go through {parts.partition('; images also go through ')[2]}")
    if "; " in (tokens := by_name[TOKENS].reason):
        limits.append(_first_sentence(tokens.partition("; ")[2]))
    if by_name[LORA].result == "skipped":
        limits.append("no linear layer for LoRA: train with lora=None")
    places = {name: _of_grid(by_name[name]) for name in (PATCHES, SALIENCY)}
    if "not verified" in places.values():
        limits.append("the tiny model mixes its patches too much to verify the grid: ask `pivot check` on yours")
    encoder = "refused" if any(by_name[name].result == "failed" for name in ENCODER) else "yes"
    limits += list(dict.fromkeys(_said(one) for one in checks if one.result == "failed"))
    return FamilyFinding(kind, training, places[PATCHES], places[SALIENCY], encoder, tuple(limits))


def _said(check: Check) -> str:
    """Why a check failed, without what differs from machine to machine."""
    is_seen = check.name in (PATCHES, SALIENCY) and check.reason.startswith("on the ")
    return f"{check.name}: no" if is_seen else _first_sentence(check.reason)


def _of_grid(check: Check) -> str:
    return {"passed": "verified", "failed": "refused"}.get(check.result, "not verified")


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def read_record(path: Path) -> dict[str, FamilyFinding]:
    """The findings of a file, by family.

    Args:
        path: of the file.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: FamilyFinding(**{**entry, "limits": tuple(entry["limits"])}) for name, entry in entries.items()}


def in_short(record: Mapping[str, FamilyFinding]) -> str:
    """README's account of the families, in Markdown: a line for each way of training.

    Args:
        record: of every family.
    """
    lines = [counted(record), "", "| | |", "|---|---|"]
    for training, said in WAYS.items():
        names = ", ".join(name for name, one in record.items() if one.training == training)
        lines.append(f"| {said} | {names} |")
    return "\n".join(lines)


def counted(record: Mapping[str, FamilyFinding]) -> str:
    """How many families train, and how.

    Args:
        record: of every family.
    """
    served = [one for one in record.values() if one.training != "refused"]
    in_trees = sum(one.training == "trees" for one in served)
    return (
        f"Of {len(record)} families of transformers {len(served)} train ({in_trees} in trees, {len(served) - in_trees} "
        "with one sequence a row, and the log says why); the others are refused in a sentence."
    )


def table(record: Mapping[str, FamilyFinding]) -> str:
    """The documents' table of families, in Markdown.

    Args:
        record: of every family.
    """
    lines = ["| family | class | training | patch grid | saliency | encoder out and in | to know |", "|" + "---|" * 7]
    for name, one in record.items():
        limits = "; ".join(limit.replace("|", "\\|") for limit in one.limits)
        cells = (name, f"`{one.model}`", one.training, one.patches, one.saliency, one.encoder, limits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([counted(record), "", *lines])


def between_marks(page: str, text: str) -> str:
    """A page with a text between its marks.

    Args:
        page: that has the marks.
        text: in Markdown.
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def write_pages(record: Mapping[str, FamilyFinding], readme: Path, page: Path) -> None:
    """Write what a record says into README and into the documents.

    Args:
        record: of every family.
        readme: gets it in short.
        page: gets the table.
    """
    for path, text in ((readme, in_short(record)), (page, table(record))):
        path.write_text(between_marks(path.read_text(encoding="utf-8"), text), encoding="utf-8")


def main(record_file: Path, readme: Path, page: Path) -> None:
    """Ask every family, and write the record and the pages made of it.

    Args:
        record_file: of findings.
        readme: with the marks of the families.
        page: of the documents, with the marks of their table.
    """
    logging.disable(logging.WARNING)
    recorded = read_record(record_file) if record_file.exists() else {}
    record = {}
    for name in all_names():
        if missing := missing_packages(name):
            print(f"{name}: as recorded, {', '.join(missing)} is not installed")
            record[name] = recorded[name]
            continue
        record[name] = finding_of(name)
        print(f"{name}: {record[name].training}")
    text = json.dumps({name: asdict(one) for name, one in record.items()}, indent=1, ensure_ascii=False)
    record_file.write_text(text + "\n", encoding="utf-8")
    write_pages(record, readme, page)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
