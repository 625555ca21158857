"""Candidates from the model itself: n completions a question, each finished batch on disk."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.judging import judge_of_questions
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import same_settings
from pivot_plugin.models.fingerprints import model_fingerprint

from .engines import Engine, Sampling, TransformersEngine, VLLMEngine

logger = logging.getLogger(__name__)

CANDIDATES_FILE = "candidates.jsonl"


def sample(
    model: PreTrainedModel | None,
    questions: object,
    *,
    processor: ProcessorMixin,
    n: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    instruction: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    engine: Engine | str | None = None,
    output_dir: str | Path | None = None,
) -> QuestionDataset:
    """Draw completions for questions, deterministic by seed and batch size.

    Args:
        model: the MLLM to draw from; may be None with an engine that has its own.
        questions: rows with `prompt` or `question`, and `images` or `image`, as `load_questions` takes them.
        processor: the model's.
        n: completions per question.
        temperature, top_p, max_new_tokens: of the sampling; temperature 0 (with n=1) takes the most probable token.
        instruction: put behind the last user turn of every question.
        batch_size: questions at once.
        seed: of the sampling.
        engine: draws the completions; by default transformers in this process, each question's images encoded once. An
            address such as "http://localhost:8000" asks a vLLM server; or a callable like `Engine`.
        output_dir: folder whose `candidates.jsonl` gets a line per finished question; a second call with the same
            arguments goes on from there.

    Returns:
        the questions with a column `completions`, n texts each.

    Raises:
        SettingsError: for settings that cannot be sampled, or a folder with candidates of other settings.
        DataError: for a question that cannot be used.
    """
    dataset = load_questions(questions).verify(judge=judge_of_questions(processor))
    sampling = Sampling(n, temperature, top_p, max_new_tokens)
    draw = _engine(engine, model, processor)
    settings = {
        "sampling": vars(sampling),
        "instruction": instruction,
        "batch_size": batch_size,
        "seed": seed,
        "questions": dataset.fingerprint(),
        "model": None if model is None else model_fingerprint(model),
    }
    done = _Candidates(None if output_dir is None else Path(output_dir) / CANDIDATES_FILE, settings)
    bar = tqdm(
        total=len(dataset), initial=len(done.completions), desc="sampling", disable=len(dataset) < 32, leave=False
    )
    with bar, done:
        for batch in _batches(len(dataset), batch_size):
            missing = [position for position in batch if position not in done.completions]
            if not missing:
                continue
            # the whole batch, so that what is drawn does not depend on where an earlier run stopped
            rows = [instructed(dataset[position], instruction) for position in batch]
            completions = draw(rows, sampling, _seed(seed, batch[0]))
            for position, texts in zip(batch, completions, strict=True):
                if position in missing:
                    done.add(position, texts)
            bar.update(len(missing))
    rows = [dataset.plain(position) | {"completions": done.completions[position]} for position in range(len(dataset))]
    return QuestionDataset(Source(rows, "candidates", dataset.access))


def _engine(engine: Engine | str | None, model: PreTrainedModel | None, processor: ProcessorMixin) -> Engine:
    if isinstance(engine, str):
        return VLLMEngine(engine, processor)
    if engine is not None:
        return engine
    if model is None:
        raise SettingsError("There is neither a model nor an engine to draw from.", "Give model= or engine=.")
    return TransformersEngine(model, processor)


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _seed(seed: int, start: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4], "big")


def instructed(question: dict[str, Any], instruction: str | None) -> dict[str, Any]:
    """A question with an instruction behind its last user turn."""
    if not instruction:
        return question
    prompt = list(question["prompt"])
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    content = [*prompt[last]["content"], {"type": "text", "text": f"\n{instruction}"}]
    prompt[last] = {**prompt[last], "content": content}
    return {**question, "prompt": prompt}


class _Candidates:
    """Finished candidates in memory and, where there is a path, on disk: what they depend on, then a line each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.completions: dict[int, list[str]] = {}
        self._path = path
        self._file: Any = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        # a run that was killed may have left half a line
        whole = lines[:-1]
        if whole:
            same_settings(
                json.loads(whole[0]),
                settings,
                f"The run whose candidates {str(path)!r} holds",
                "Choose another output_dir, delete this one, or use the same settings.",
            )
            for line in whole[1:]:
                row = json.loads(line)
                self.completions[row["question"]] = row["completions"]
            logger.info("%d questions are sampled already in %s.", len(self.completions), path)
        self._file = path.open("ab")
        self._file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            self._file.write(_line(settings))
            self._file.flush()

    def add(self, position: int, texts: list[str]) -> None:
        self.completions[position] = texts
        if self._file is not None:
            self._file.write(_line({"question": position, "completions": texts}))
            self._file.flush()

    def __enter__(self) -> "_Candidates":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
