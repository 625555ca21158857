"""Rows that say where a row is: what TRL is given as a data set, so that images load in the collator, in its worker."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from datasets import Dataset, IterableDataset

POINTER = ("source", "position")


class Source(Protocol):
    """Rows with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> dict[str, Any]: ...


S = TypeVar("S", bound=Source)


def pointing(sources: Sequence[Source], first: int = 0) -> list[Dataset]:
    """A data set per source, whose rows hold `source`, its number, and `position`.

    Args:
        sources: of rows.
        first: number of the first of them.
    """
    return [
        Dataset.from_dict({"source": [number] * len(source), "position": list(range(len(source)))})
        for number, source in enumerate(sources, first)
    ]


def streaming(rows: Iterable[dict[str, Any]], endless: bool = False) -> IterableDataset:
    """A data set over rows that no position points to; its rows hold the `row` itself.

    Args:
        rows: that come in order.
        endless: begin again where they end, if they can be read again. Transformers' trainer would, too, but a run that
            it resumes it takes to be in its first pass, however many batches it has to skip.
    """
    return IterableDataset.from_generator(_items, gen_kwargs={"rows": rows, "endless": endless})


def _items(rows: Iterable[dict[str, Any]], endless: bool) -> Iterator[dict[str, Any]]:
    # an iterator is its own iterator, and gives its rows once; a stream of pairs may stand before one
    once = getattr(rows, "once", iter(rows) is rows)
    for number in itertools.count():
        if number and (once or not endless):
            return
        for row in rows:
            yield {"row": row}


@dataclass
class Loading(Generic[S]):
    """Collates rows of `pointing` and `streaming`: looks them up, which loads their images.

    Args:
        sources: by their numbers.
        collator: of the rows themselves; columns that were added to a row that points are added to the row.
    """

    sources: list[S]
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = field(repr=False)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.collator([self._row(item) for item in items])

    def _row(self, item: Mapping[str, Any]) -> dict[str, Any]:
        if "row" in item:
            row: dict[str, Any] = item["row"]
            return row
        added = {name: value for name, value in item.items() if name not in POINTER}
        return self.sources[item["source"]][item["position"]] | added

    def source_of(self, rows: Dataset) -> S:
        """The source that a data set of `pointing` points to."""
        return self.sources[rows[0]["source"]]
