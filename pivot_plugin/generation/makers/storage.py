"""Made questions and pairs on disk: rows that say how their pictures are made, and the pictures left where they are."""

import json
from pathlib import Path

from pivot_plugin import __version__
from pivot_plugin.data.edited_rows import write_rows
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import whole_folder

from .making import Making

QUESTIONS_FILE, PAIRS_FILE = "questions.jsonl", "pairs.jsonl"
MADE_FILE = "made.json"
# in the folder of a run on made questions: some of them, and what the model answered before and after
SHEET_FILE = "made-questions.jsonl"


def write_made(made: QuestionDataset | PairDataset, making: Making, folder: str | Path) -> Path:
    """Write made rows: a line each in `questions.jsonl` or `pairs.jsonl`, and in `made.json` how they were made.

    `load_questions`, `load` and `optimize` read the folder, as long as the pictures stay where they are.

    Args:
        made: as `make` gave them.
        making: how they were made.
        folder: to write, as a whole or not at all; it may hold an earlier making.

    Returns:
        the file of rows.

    Raises:
        SettingsError: if the folder holds something else or cannot be written.
        DataError: for a row that cannot be made.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MADE_FILE).is_file())):
        raise SettingsError(f"{str(target)!r} holds something else.", "Choose an empty or new folder.")
    name = PAIRS_FILE if isinstance(made, PairDataset) else QUESTIONS_FILE
    rows = (made.plain(position) for position in range(len(made)))
    try:
        with whole_folder(target) as aside:
            write_rows(rows, aside / name, target, made.access, len(made))
            record = {"version": __version__, "rows": len(made), "making": making.as_dict()}
            (aside / MADE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{str(target)!r} cannot be written: {error.strerror or error}.", "Choose another folder, or make room."
        ) from error
    return target / name
