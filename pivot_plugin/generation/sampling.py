"""Candidates from the model itself: n completions a question, each finished batch on disk."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.judging import judge_of_questions
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.errors import PivotError, SettingsError, TrainingError
from pivot_plugin.models.fingerprints import model_fingerprint
from pivot_plugin.models.loading import load_model
from pivot_plugin.progress import Progress

from .engines import Engine, Sampling, TransformersEngine, VLLMEngine
from .kept_lines import KeptLines

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
        model: the MLLM to draw from, an object of another repository that a plugin knows too; may be None with an
            engine that has its own.
        questions: rows with `prompt` or `question`, and `images` or `image`, as `load_questions` takes them.
        processor: the model's; of another repository's object its tokenizer.
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
        TrainingError: if the engine fails; the questions that it has answered are kept in `output_dir`.
    """
    if model is not None:
        # an object of another repository becomes a model of transformers
        model, processor = load_model(model, processor)
    judge = None if processor is None else judge_of_questions(processor, given_text=engine is not None)
    dataset = load_questions(questions).verify(judge=judge)
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
    path = None if output_dir is None else Path(output_dir) / CANDIDATES_FILE
    done = KeptLines(path, settings, "completions")
    if done.values:
        logger.info("%d questions are sampled already in %s.", len(done.values), path)
    bar = Progress(len(dataset), "sampling", "question", len(done.values), quiet_below=32)
    with bar, done:
        for batch in _batches(len(dataset), batch_size):
            missing = [position for position in batch if position not in done.values]
            if not missing:
                continue
            # the whole batch, so that what is drawn does not depend on where an earlier run stopped
            rows = [instructed(dataset[position], instruction) for position in batch]
            try:
                completions = draw(rows, sampling, _seed(seed, batch[0]))
            except PivotError:
                raise
            except Exception as error:
                raise _engine_failed(error, batch, len(done.values), path) from error
            _refuse_other_than_texts(completions, batch, sampling.n)
            for position, texts in zip(batch, completions, strict=True):
                if position in missing:
                    done.add(position, texts)
            bar.update(len(missing))
    rows = [dataset.plain(position) | {"completions": done.values[position]} for position in range(len(dataset))]
    return QuestionDataset(Source(rows, "candidates", dataset.access))


def _engine(engine: Engine | str | None, model: PreTrainedModel | None, processor: ProcessorMixin) -> Engine:
    if isinstance(engine, str):
        return VLLMEngine(engine, processor)
    if engine is not None:
        return engine
    if model is None:
        raise SettingsError("There is neither a model nor an engine to draw from.", "Give model= or engine=.")
    return TransformersEngine(model, processor)


def _engine_failed(error: Exception, batch: range, answered: int, path: Path | None) -> TrainingError:
    asked = f"questions {batch[0]} to {batch[-1]}" if len(batch) > 1 else f"question {batch[0]}"
    kept = (
        "Give output_dir= to keep what is answered before a failure."
        if path is None
        else f"{answered} answered questions are kept in {str(path)!r}; the same call goes on from there."
    )
    return TrainingError(f"The engine failed at {asked} with {type(error).__name__}: {error}.", kept)


def _refuse_other_than_texts(completions: object, batch: range, n: int) -> None:
    """Refuse what is no list of texts for every question.

    Raises:
        TrainingError: with what was given.
    """
    finding = ""
    if not isinstance(completions, list | tuple) or len(completions) != len(batch):
        count = f" of {len(completions)}" if isinstance(completions, list | tuple) else ""
        finding = f"a {type(completions).__name__}{count} for {len(batch)} questions"
    else:
        for position, texts in zip(batch, completions, strict=True):
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                finding = f"{str(texts)[:80]!r} for question {position}"
                break
            if len(texts) != n:
                finding = f"{len(texts)} completions of {n} for question {position}"
                break
    if finding:
        raise TrainingError(f"The engine gave {finding}.", f"An engine returns {n} texts for every question, in order.")


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
