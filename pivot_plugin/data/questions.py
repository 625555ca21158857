"""Questions about images as a data set, with whatever columns stand beside them."""

from collections.abc import Mapping
from typing import Any

from pivot_plugin.hooks.types import Layout

from .layout import normalise_question
from .rows import RowDataset
from .sources import open_source


class QuestionDataset(RowDataset):
    """Questions about images, with whatever columns stand beside them, such as `answer`. As `PairDataset` otherwise."""

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        return None

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        taken = ("prompt", "question", "image", "images", "id")
        beside = {str(name): value for name, value in row.items() if name not in taken}
        return beside | normalise_question(row, where)


def load_questions(source: object, name: str = "questions", **options: Any) -> QuestionDataset:
    """Questions from what people bring, with the columns beside them.

    Args:
        source: as for `load`, with random access; rows with `prompt` or `question` and `images` or `image`.
        name: of the data, for errors.
        **options: `split`, `allow_urls`, `max_pixels` as for `load`.

    Raises:
        DataError: if the source cannot be read or is a stream.
    """
    if isinstance(source, QuestionDataset):
        return source
    return QuestionDataset(open_source(source, name, **options), name=name)
