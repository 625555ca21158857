"""What a recipe names, opened: data, encoders, language models and probes, by path, Hub id or a plugin's maker."""

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pivot_plugin.data.conversations import ConversationDataset, load_conversations
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.encoders import load_encoder
from pivot_plugin.errors import SettingsError
from pivot_plugin.hooks import named
from pivot_plugin.probes.lookup import ProbeTask, runners

from .sections import BENCHMARKS, Evaluation, Made, PivotRecipe, Stored, Tuning

HOOK = "pivot_sources"
# of conversations, before the first stage; the stages look at all
LOOKED_AT = 100
SAME_PAIRS = "Arms need the same pairs: give a list, a data set or a file."


def made(wanted: Made, **defaults: Any) -> Any:
    """What a plugin makes.

    Args:
        wanted: of a recipe.
        **defaults: options where the recipe gives none.

    Raises:
        SettingsError: for a name no plugin offers, or options it does not take.
    """
    maker = named(HOOK, wanted.source, "source")
    try:
        return maker(**defaults | wanted.options)
    except TypeError as error:
        raise SettingsError(f"Source {wanted.source!r}: {error}.", "Give the options it takes.") from error


def conversations(data: object, name: str, image_folder: str | Path | None = None) -> ConversationDataset:
    """Captions or conversations of a recipe, opened.

    Args:
        data: of a section: a path or Hub id, `Stored`, `Made`, or rows.
        name: of the data, for errors.
        image_folder: what relative image paths start from, where the data do not say.

    Raises:
        DataError, SettingsError: if they cannot be opened.
    """
    if isinstance(data, Stored):
        folder = image_folder if data.image_folder is None else data.image_folder
        return sampled(load_conversations(data.path, name, folder, **_split(data)), data)
    return load_conversations(made(data) if isinstance(data, Made) else data, name, image_folder)


def pairs(data: object, name: str = "optimize.data") -> PairDataset:
    """Preference pairs of a recipe, opened; as `conversations` otherwise."""
    if isinstance(data, Stored):
        folder = {} if data.image_folder is None else {"image_folder": data.image_folder}
        return sampled(load_pairs(data.path, name, SAME_PAIRS, **folder, **_split(data)), data)
    return load_pairs(made(data) if isinstance(data, Made) else data, name, SAME_PAIRS)


@dataclass(frozen=True)
class RecipeData:
    """All rows that a recipe trains on, opened and looked at.

    Attributes:
        captions, dialogues: of the first MLLM.
        pairs: of the arms.
        held_out: pairs; None where a share of `pairs` is held out.
        moved_captions, moved_dialogues: of the new MLLMs.
    """

    captions: ConversationDataset
    dialogues: ConversationDataset
    pairs: PairDataset
    held_out: PairDataset | None
    moved_captions: ConversationDataset
    moved_dialogues: ConversationDataset

    @classmethod
    def opened(cls, recipe: PivotRecipe) -> "RecipeData":
        """Open what a recipe names; look at every pair, which come late, and at the first of the conversations.

        Args:
            recipe: which names them.

        Raises:
            DataError, SettingsError: for data that cannot be opened, or a row that cannot be used.
        """
        captions = conversations(recipe.align.data, "align.data", recipe.align.image_folder)
        dialogues = conversations(recipe.instruct.data, "instruct.data", recipe.instruct.image_folder)
        held_out = recipe.optimize.eval_data
        moved = recipe.transplant
        data = cls(
            captions=captions,
            dialogues=dialogues,
            pairs=pairs(recipe.optimize.data),
            held_out=None if held_out is None else pairs(held_out, "optimize.eval_data"),
            moved_captions=captions if moved is None else _own(moved.align, "transplant.align", captions),
            moved_dialogues=dialogues if moved is None else _own(moved.instruct, "transplant.instruct", dialogues),
        )
        for rows in (data.pairs, data.held_out):
            if rows is not None:
                rows.verify(recipe.optimize.on_bad_row)
        for one in (data.captions, data.dialogues, data.moved_captions, data.moved_dialogues):
            for position in range(min(LOOKED_AT, len(one))):
                one.plain(position)
        return data

    def by_section(self) -> dict[str, ConversationDataset | PairDataset]:
        """Rows to train on, by the dotted names of the recipe's sections."""
        return {
            "align": self.captions,
            "instruct": self.dialogues,
            "optimize": self.pairs,
            "transplant.align": self.moved_captions,
            "transplant.instruct": self.moved_dialogues,
        }


class Parts:
    """Encoders, language models and probes that a recipe names; each is made once.

    Args:
        recipe: which names them.

    Raises:
        SettingsError: for a source or a probe that nobody offers.
    """

    def __init__(self, recipe: PivotRecipe) -> None:
        self.recipe = recipe
        # by what the recipe, which outlives this, names, and the seed
        self._kept: dict[tuple[int, int | None], Any] = {}
        moved = None if recipe.transplant is None else recipe.transplant.language_model
        for part in (recipe.encoder, recipe.language_model, moved):
            if isinstance(part, Made):
                named(HOOK, part.source, "source")
        probes = dict(recipe.evaluate)
        if isinstance(recipe.optimize.select, Evaluation):
            probes["select"] = recipe.optimize.select
        if own := self.probings(probes):
            runners(own)

    def encoder(self, seed: int) -> tuple[PreTrainedModel, Any]:
        """The bare encoder and its image processor, None where that comes with the encoder.

        Args:
            seed: for a plugin that trains one.
        """
        part = self.recipe.encoder
        if isinstance(part, Made):
            part = made(part, seed=seed)
        if isinstance(part, str | Path):
            return load_encoder(part, with_processor=True)
        return part if isinstance(part, tuple) else (part, None)

    def language_model(self, seed: int, moved: bool = False) -> tuple[Any, PreTrainedTokenizerBase | None]:
        """A language model of one's own, and its tokenizer, None where that comes with the model.

        Args:
            seed: for a plugin that trains one.
            moved: that of the transplants, not that of the first MLLM.
        """
        part = self.recipe.language_model
        if moved and self.recipe.transplant is not None and self.recipe.transplant.language_model is not None:
            part = self.recipe.transplant.language_model
        if isinstance(part, Made):
            # a maker may train its model, and every transplant of a seed begins with the same
            wanted = part
            part = self._once((id(part), seed), lambda: made(wanted, seed=seed))
        model, tokenizer = part if isinstance(part, tuple) else (part, None)
        # assemble makes its modules part of the MLLM
        return (copy.deepcopy(model) if isinstance(model, PreTrainedModel) else model), tokenizer

    def probings(self, evaluations: Mapping[str, Evaluation]) -> dict[str, object]:
        """Probes by label, as `probes.compare` takes them; lmms-eval's benchmarks are none of them."""
        return {
            label: self._probe_task(evaluation)
            for label, evaluation in evaluations.items()
            if evaluation.probe != BENCHMARKS
        }

    def _probe_task(self, evaluation: Evaluation) -> ProbeTask:
        data = evaluation.data
        if isinstance(data, Made):
            wanted = data
            data = self._once((id(data), None), lambda: made(wanted))
        elif isinstance(data, Stored):
            data = data.path
        return ProbeTask(evaluation.probe, data, evaluation.options)

    def _once(self, key: tuple[int, int | None], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _own(section: Tuning, name: str, otherwise: ConversationDataset) -> ConversationDataset:
    """Rows of a transplant, those of the first MLLM where it has none of its own."""
    if section.data is None:
        return otherwise
    return conversations(section.data, f"{name}.data", section.image_folder)


def _split(data: Stored) -> dict[str, Any]:
    return {} if data.split is None else {"split": data.split}


def sampled(rows: Any, data: Stored) -> Any:
    """Rows of a data set that a recipe names, as many as it wants of them."""
    if data.sample is None or data.sample >= len(rows):
        return rows
    return rows.select(sorted(random.Random(data.seed).sample(range(len(rows)), data.sample)))
