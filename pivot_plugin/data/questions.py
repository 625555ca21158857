"""Questions about images as a data set, with whatever columns stand beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.hooks.types import Layout

from .layout import check_columns, normalise_question
from .rows import RowDataset, refuse_late_options
from .sources import open_source
from .stacks import question_row


class QuestionDataset(RowDataset):
    """Questions about images, with whatever columns stand beside them, such as `answer`. As `PairDataset` otherwise."""

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        if not columns:
            return question_row
        renamed = dict(columns)
        check_columns(renamed, ("prompt", "images", "image", "id", "answer"), first, self._name)

        def layout(row: Mapping[str, object]) -> Mapping[str, object]:
            kept = {column: value for column, value in row.items() if column not in renamed}
            return kept | {ours: row.get(theirs) for ours, theirs in renamed.items()}

        return layout

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        # answers of a pair, and turns, are read as such by whoever meets a row
        taken = ("prompt", "question", "image", "images", "id", "chosen", "rejected", "messages")
        beside = {str(name): value for name, value in row.items() if name not in taken}
        return beside | normalise_question(row, where)


def load_questions(
    source: object,
    name: str = "questions",
    columns: Mapping[str, str] | None = None,
    image_folder: str | Path | None = None,
    **options: Any,
) -> QuestionDataset:
    """Questions from what people bring, with the columns beside them.

    Args:
        source: as for `load`, with random access; rows with `prompt` or `question` and `images` or `image`, or as
            EasyR1, VLM-R1 (`problem`, `answer`, `conversations`) and verl (`reward_model`) keep them.
        name: of the data, for errors.
        columns: our column names to the data's own: {"prompt": "instruction", "answer": "label"}.
        image_folder: where relative image paths are looked up first, and then in the data's own folder.
        **options: `split`, `allow_urls`, `max_pixels` as for `load`.

    Raises:
        DataError: if the source cannot be read or is a stream.
        SettingsError: for columns that are not there, or an option that comes too late for rows loaded already.
    """
    if isinstance(source, QuestionDataset):
        refuse_late_options("questions", image_folder=image_folder, columns=columns)
        return source
    opened = open_source(source, name, image_folder=image_folder, **options)
    return QuestionDataset(opened, name=name, columns=columns)
