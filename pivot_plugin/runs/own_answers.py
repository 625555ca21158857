"""A run that learns from the model's own answers: questions become pairs before the first step, and again each round.

A round answers, makes pairs of the answers, and trains on them. The last round is the run in the folder that was asked
for; earlier ones are whole runs in `round-1`, `round-2`, ... below it, each with the weights that it ended with. A run
that was cut off goes on in the round, and in the part of it, where it stopped.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.config import PivotConfig
from pivot_plugin.data.layout import recognise
from pivot_plugin.data.pairs import PairDataset, PairStream
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.errors import DataError, SettingsError, TrainingError, unknown
from pivot_plugin.files import read_record, write_whole
from pivot_plugin.generation.own_answers import OPTION_NAMES, AnswerSummary, OwnAnswers, pairs_of_own_answers
from pivot_plugin.hooks import collect
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.fingerprints import model_fingerprint
from pivot_plugin.models.loading import load_model
from pivot_plugin.training.plan import plan
from pivot_plugin.training.snapshot import put_back, trainable_weights

from .folder import claim
from .run import Run, RunOptions
from .settings import unwatched

logger = logging.getLogger(__name__)

ANSWERS_FOLDER = "own-answers"
HELD_OUT_FOLDER = "held-out"
TRAINED_FILE = "trained.safetensors"
# apart, so that a round asks with other random numbers than the one before
SEEDS_OF_A_ROUND = 101


@dataclass(frozen=True)
class Round:
    """Which round a run is.

    Attributes:
        number, of: from 1 on.
        reference: what the policy is held against, None for the model as the round begins.
        before: the weights that may change, as they were before the first round; None in a first.
        earlier: what came of asking in the rounds before.
    """

    number: int = 1
    of: int = 1
    reference: PreTrainedModel | None = None
    before: Mapping[str, torch.Tensor] | None = None
    earlier: tuple[AnswerSummary, ...] = ()


def own_answers(
    settings: Mapping[str, Any], objective: object, rewards: object | None, online: bool
) -> tuple[OwnAnswers | None, dict[str, Any]]:
    """How the model's own answers become pairs, where it learns from them, and the settings that are left.

    Args:
        settings: the user's, by name.
        objective: of the run.
        rewards: as given.
        online: whether the objective itself draws roll-outs.

    Raises:
        SettingsError: for options of own answers where there are none, or values that cannot be.
    """
    if rewards is not None and not online:
        own = {name: value for name, value in settings.items() if name in OPTION_NAMES}
        left = {name: value for name, value in settings.items() if name not in own}
        trainer = {field.name for field in fields(PivotConfig)}
        if absent := [name for name in left if name not in trainer]:
            names = [*OPTION_NAMES, *trainer]
            raise unknown("option", absent[0], names, f"optimize on own answers has no option {absent[0]!r}.")
        return OwnAnswers(**own), left
    # the trainers have some of these names themselves
    only_own = ("samples", "instruction", "sampling_batch_size", "engine", "pair_up", "margin", "rounds", "reference")
    if given := [name for name in only_own if name in settings]:
        remedy = (
            "The trainer draws its own roll-outs: num_generations=, temperature=, use_vllm=."
            if online
            else "Give rewards= and questions, so that the model's own answers are asked for and scored."
        )
        raise SettingsError(f"{given[0]} is given, and objective={objective!r} makes no pairs of own answers.", remedy)
    return None, dict(settings)


def refuse_pairs(rows: object, name: str = "prefs") -> None:
    """Refuse rows that are pairs already where rewards are to make them, as far as can be told without opening them.

    Args:
        rows: as given, or questions that were read from them.
        name: of the data, for errors.

    Raises:
        SettingsError: naming what shows it.
    """
    finding = ""
    if isinstance(rows, PairDataset | PairStream):
        finding = f"{name} holds preference pairs"
    elif (first := _first_row(rows)) is not None and _is_pair(first, name):
        finding = f"The rows of {name} are preference pairs (columns {', '.join(sorted(map(str, first)))})"
    if finding:
        raise SettingsError(
            f"{finding}, and rewards are given, which make pairs of the model's own answers.",
            "Leave rewards= out to train on these pairs, or give questions without answers of their own.",
        )


def refuse_pairs_as_questions(questions: QuestionDataset, objective: object) -> None:
    """Refuse pairs where the model is to draw answers of its own and have them scored.

    Args:
        questions: read from what was given.
        objective: of the run.

    Raises:
        SettingsError: for rows with chosen and rejected answers and none that a reward could compare with.
    """
    first = questions.unread(0) if len(questions) else {}
    if not {"answer", "solution"} & set(first) and _is_pair(first, questions.name):
        raise SettingsError(
            f"The rows of {questions.name} are preference pairs (columns {', '.join(sorted(map(str, first)))}), and "
            f"objective={objective!r} asks questions and has the model's answers scored.",
            'Train on the pairs with objective="dpo" (--objective dpo), or give questions with an answer.',
        )


def is_of_pairs(questions: QuestionDataset) -> bool:
    """Whether rows that were read as questions are preference pairs, in any layout that is known."""
    return _is_pair(questions.unread(0), questions.name)


def _first_row(rows: object) -> Mapping[str, Any] | None:
    if isinstance(rows, QuestionDataset):
        return rows.unread(0)
    first = rows[0] if isinstance(rows, Sequence) and not isinstance(rows, str) and rows else None
    return first if isinstance(first, Mapping) else None


def _is_pair(row: Mapping[str, Any], name: str) -> bool:
    try:
        recognise(row, name)
    except DataError:
        return False
    return True


def answered(
    run: Run, rewards: Sequence[Callable[..., Any]], settings: OwnAnswers, number: int
) -> tuple[Run, AnswerSummary]:
    """A run on questions as one on pairs of the model's own answers to them, kept in its folder.

    Args:
        run: its rows, and those held out unless these are pairs, are questions.
        rewards: score the answers.
        settings: of the answers.
        number: of the round.

    Raises:
        SettingsError: in several processes.
        DataError, TrainingError: as `pairs_of_own_answers`.
    """
    if run.config.world_size > 1:
        raise SettingsError(
            f"{run.config.world_size} processes train, and own answers are asked for in one.",
            "Make the pairs first, by pivot prefs build in one process, and train on them in several.",
        )
    assert isinstance(run.rows, QuestionDataset)
    folder = run.output_dir / ANSWERS_FOLDER
    seed = run.config.seed + SEEDS_OF_A_ROUND * (number - 1)
    held_out: RowDataset | None = run.held_out
    with _on_device(run.model, run.config.device):
        pairs, summary = pairs_of_own_answers(run.model, run.processor, run.rows, rewards, settings, folder, seed)
        if isinstance(held_out, QuestionDataset):
            held_out = _held_out(run, held_out, rewards, settings, folder / HELD_OUT_FOLDER, seed + 1)
    if held_out is None:
        unwatched(run.config)
    logger.info("Own answers of the model:\n%s", summary)
    return replace(run, rows=pairs, held_out=held_out), summary


def _held_out(
    run: Run,
    questions: QuestionDataset,
    rewards: Sequence[Callable[..., Any]],
    settings: OwnAnswers,
    folder: Path,
    seed: int,
) -> PairDataset | None:
    try:
        return pairs_of_own_answers(run.model, run.processor, questions, rewards, settings, folder, seed)[0]
    except DataError as error:
        logger.warning("Nothing is held out: of the %d questions held out, %s", len(questions), error.finding)
        return None


@contextmanager
def _on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """A model on the device that it will train on, and back where it was if asking fails."""
    was_on = model.device
    movable = not hasattr(model, "hf_device_map")
    with evaluating(model, device if movable else None):
        try:
            yield
        except BaseException:
            if movable:
                model.to(was_on)
            raise


TrainRound = Callable[[PreTrainedModel, ProcessorMixin, Path, Round], Any]


def in_rounds(
    model: PreTrainedModel | str | Path,
    processor: ProcessorMixin | None,
    options: RunOptions,
    settings: OwnAnswers,
    train_round: TrainRound,
) -> Any:
    """Train a model in rounds, each on its answers as it is then.

    Args:
        model, processor: as for `begin`.
        options: of the last round.
        settings: of the own answers.
        train_round: trains one round in a folder, in place, and returns its result.

    Returns:
        the result of the last round.

    Raises:
        SettingsError: for a folder of another run.
        PivotError: as a round does; the model is as it was before the first one then, finished rounds are kept.
    """
    if options.config.world_size > 1:
        raise SettingsError(
            f"rounds is {settings.rounds}, in {options.config.world_size} processes.", "Give rounds=1, or one process."
        )
    claim(options.folder, options.settings, options.resume)
    model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    training_plan = plan(adapter, options.config.train, options.lora, options.config.frozen or ())
    before = trainable_weights(adapter, training_plan)
    begun_with = model_fingerprint(model)
    done: tuple[AnswerSummary, ...] = ()
    try:
        for number in range(1, settings.rounds + 1):
            last = number == settings.rounds
            folder = options.folder if last else options.folder / f"round-{number}"
            trained = folder / TRAINED_FILE
            if options.resume and not last and trained.is_file():
                claim(folder, options.settings, resume=True)
                _take_up(model, trained, begun_with)
                done = (*done, _summary_in(folder))
                continue
            this = Round(number, settings.rounds)
            if number > 1:
                reference = _as_before(model, before) if settings.reference == "first" else None
                this = Round(number, settings.rounds, reference, before, done)
            logger.info("Round %d of %d; the reference is %s.", number, settings.rounds, _told(this))
            result = train_round(model, processor, folder, this)
            del this
            if not last:
                done = (*done, *result.answers[-1:])
                _keep(model, before, trained, begun_with)
    except BaseException:
        put_back(model, before)
        collect("pivot_model_trained", model=model)
        raise
    return result


def _as_before(model: PreTrainedModel, before: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a model with the weights that it had before the first round."""
    reference = copy.deepcopy(model)
    put_back(reference, before)
    return reference


def _told(this: Round) -> str:
    if this.number == 1:
        return "the model as it is"
    return "the model as this round begins" if this.reference is None else "the model before the first round"


def _keep(model: PreTrainedModel, names: Mapping[str, object], file: Path, begun_with: str) -> None:
    """Write the weights that a round has changed."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if name in names}
    write_whole(file, lambda path: save_file(weights, path, metadata={"begun_with": begun_with}))


def _take_up(model: PreTrainedModel, file: Path, begun_with: str) -> None:
    """Give a model the weights that an earlier call ended a round with.

    Raises:
        SettingsError: if that began with another model.
    """
    with safe_open(file, "pt") as kept:
        if (kept.metadata() or {}).get("begun_with") != begun_with:
            raise SettingsError(
                f"The rounds in {str(file.parent.parent)!r} began with a model of other weights.",
                "Give the model that they began with, or choose another output_dir.",
            )
        put_back(model, {name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118


def _summary_in(folder: Path) -> AnswerSummary:
    record = read_record(folder) or {}
    if not record.get("answers"):
        raise TrainingError(f"{str(folder)!r} holds no finished round.", "Delete it, and go on by resume=True.")
    return AnswerSummary.from_dict(record["answers"][-1])
