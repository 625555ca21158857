"""The paper's recipe: a bare vision encoder in, a better one out, proved in a new MLLM.

    1-assemble    encoder + projector + language model
    2-align       the projector learns the language model's language
    3-instruct    all of it learns to answer
    4-optimize    arms on the same pairs: SFT, DPO, ...
    5-encoders    the encoder after stage 1 alone
    6-transplant  every encoder, frozen, in a new MLLM
    7-evaluate    probes of encoders and answers of MLLMs

Held against each other: the original encoder, the one after stage 1 alone, and every arm's; without the second nobody
can tell what preferences gave from what meeting a language model gave.

Source: arXiv 2510.16333, sections 3.1 and 6.1, appendices E.1 and E.7.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pivot_plugin.encoders.assemble import assemble
from pivot_plugin.encoders.store import save_encoder
from pivot_plugin.encoders.towers import image_processor_of
from pivot_plugin.files import read_record, write_whole
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.runs.instruct import align, instruct
from pivot_plugin.runs.leftovers import MODEL_FOLDER
from pivot_plugin.training.cost import tower_facts

from .evaluation import Evaluated, Evaluating
from .file import load_recipe
from .inputs import Parts, RecipeData
from .plan import RecipePlan, plan_recipe
from .post_training import PostTraining, PostTrainingResult, run_post_training
from .rates import Arms
from .results import EncoderScore, RecipeResult
from .runs import save_model, tune
from .sections import FRESH, ORIGINAL, STAGE_1, Examined, PivotRecipe, SeedsFrom
from .stages import Stage, stage
from .transplant import kept_layers, load_transplant, transplant

logger = logging.getLogger(__name__)

ORDER: tuple[SeedsFrom, ...] = ("assemble", "optimize", "transplant")
ENCODER_FOLDER = "encoder"
FOLDERS = {
    "assemble": "1-assemble",
    "align": "2-align",
    "instruct": "3-instruct",
    "optimize": "4-optimize",
    "extract": "5-encoders",
    "transplant": "6-transplant",
    "evaluate": "7-evaluate",
}


def pivot(
    encoder: PreTrainedModel | str | Path | Mapping[str, Any],
    language_model: PreTrainedModel | str | Path | Mapping[str, Any],
    *,
    align: Mapping[str, Any],
    instruct: Mapping[str, Any],
    optimize: Mapping[str, Any],
    transplant: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    assemble: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    seeds_from: str = "assemble",
    output_dir: str | Path = "pivot-recipe",
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: object | None = None,
    estimate: bool = True,
) -> RecipeResult:
    """Run the whole recipe. A second call on the same folder goes on where the first stopped.

    Args:
        encoder, language_model, align, instruct, optimize, transplant: as for `PivotRecipe`.
        evaluate, assemble, seeds, seeds_from, output_dir: as for `PivotRecipe`.
        tokenizer, image_processor: of loaded models that have no name.
        estimate: take a few steps of every kind beforehand, and say what the recipe will cost.

    Returns:
        every encoder, every score, and their tables, which also lie in `output_dir` as results.md and results.json.

    Raises:
        SettingsError: for a recipe that cannot be run, or a folder with another recipe's stages.
        DataError, ModelError, EncoderError, TrainingError: as the stages.

    Source:
        arXiv 2510.16333, sections 3.1 and 6.1.
    """
    recipe = PivotRecipe(
        encoder=encoder if image_processor is None else (encoder, image_processor),
        language_model=language_model if tokenizer is None else (language_model, tokenizer),
        # mappings become sections at the door
        align=align,  # type: ignore[arg-type]
        instruct=instruct,  # type: ignore[arg-type]
        optimize=optimize,  # type: ignore[arg-type]
        transplant=transplant,  # type: ignore[arg-type]
        evaluate=evaluate or {},  # type: ignore[arg-type]
        assemble=assemble or {},  # type: ignore[arg-type]
        seeds=seeds,  # type: ignore[arg-type]
        seeds_from=seeds_from,  # type: ignore[arg-type]
        output_dir=output_dir,
    )
    return run_recipe(recipe, estimate=estimate)


@overload
def run_recipe(recipe: PivotRecipe, *, estimate: bool = ...) -> RecipeResult: ...
@overload
def run_recipe(recipe: PostTraining, *, estimate: bool = ...) -> PostTrainingResult: ...
@overload
def run_recipe(recipe: str | Path, *, estimate: bool = ...) -> RecipeResult | PostTrainingResult: ...
def run_recipe(
    recipe: PivotRecipe | PostTraining | str | Path, *, estimate: bool = True
) -> RecipeResult | PostTrainingResult:
    """Run a recipe that was read or made.

    Args:
        recipe: itself, the path of its file, or the name of a ready one.
        estimate: as for `pivot`; of a recipe that begins with an MLLM nothing is measured beforehand.

    Raises:
        PivotError: as `pivot`.
    """
    if not isinstance(recipe, PivotRecipe):
        recipe = recipe if isinstance(recipe, PostTraining) else load_recipe(recipe)
    if isinstance(recipe, PostTraining):
        return run_post_training(recipe)
    run = _Pipeline(recipe)
    if estimate:
        run.estimate()
    return run.all()


class _Pipeline:
    """A recipe on its way through the stages."""

    def __init__(self, recipe: PivotRecipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.described = recipe.described()
        self.result = RecipeResult(self.folder)
        # all that is named is looked at before anything is paid for
        plan_recipe(recipe)
        self.parts = Parts(recipe)
        self.data = RecipeData.opened(recipe)
        self.arms = Arms(recipe, self.data, self.parts, self.result)

    def estimate(self) -> RecipePlan:
        """Say what the recipe will cost, from a few steps of every kind."""
        first = self.recipe.seeds[0]
        start = self._assembled(*self._at("assemble", first))
        data = self.data.by_section()
        plan = plan_recipe(self.recipe, {name: len(rows) for name, rows in data.items()})
        plan = plan.measured(self.recipe, start, data, self.folder / ".estimate", self._ended(first))
        logger.info("%s", plan)
        if PartialState().is_main_process:
            write_whole(self.folder / "plan.json", json.dumps(plan.as_dict(), indent=1))
        return plan

    def all(self) -> RecipeResult:
        """Every stage for every seed."""
        for seed in self.recipe.seeds:
            self._one(seed)
            self._write()
        return self.result

    def _at(self, part: SeedsFrom, seed: int) -> tuple[Path, int]:
        """Folder and seed of a part of the recipe: those before `seeds_from` are shared by all seeds."""
        varies = ORDER.index(part) >= ORDER.index(self.recipe.seeds_from)
        own = seed if varies else self.recipe.seeds[0]
        return self.folder / f"seed-{own}", own

    def _ended(self, seed: int) -> dict[str, tuple[int, float]]:
        """Tokens and seconds of runs of a seed that have ended, by the names of a plan."""
        first, arms, moved = (self._at(part, seed)[0] for part in ORDER)
        moved = moved / FOLDERS["transplant"] / ORIGINAL / f"projector-{FRESH}"
        folders = {
            "align": [first / FOLDERS["align"]],
            "instruct": [first / FOLDERS["instruct"]],
            "transplant align": [moved / FOLDERS["align"]],
            "transplant instruct": [moved / FOLDERS["instruct"]],
        }
        for arm in self.recipe.optimize.arms:
            folders[f"optimize {arm}"] = sorted((arms / FOLDERS["optimize"] / arm).glob("*"))
        ended = {}
        for name, runs in folders.items():
            records = [record for record in map(read_record, runs) if record is not None and record["finished"]]
            if records:
                ended[name] = (records[0]["cost"]["language_tokens"], records[0]["cost"]["seconds"])
        return ended

    def _one(self, seed: int) -> None:
        """Every stage for one seed."""
        place, own = self._at("assemble", seed)
        assembled = self._assembled(place, own)
        aligned = self._aligned(place / FOLDERS["align"], own, assembled)
        stage_1 = self._instructed(place / FOLDERS["instruct"], own, aligned)
        encoders = {ORIGINAL: place / FOLDERS["assemble"] / ENCODER_FOLDER}
        encoders[STAGE_1] = self._extracted(place / FOLDERS["extract"] / STAGE_1, stage_1)
        place, own = self._at("optimize", seed)
        mllms = {STAGE_1: stage_1}
        for arm in self.recipe.optimize.arms:
            run = self.arms.run(place / FOLDERS["optimize"] / arm, arm, own, stage_1)
            mllms[arm], encoders[arm] = run / MODEL_FOLDER, run / ENCODER_FOLDER
        self.result.encoders[seed] = encoders
        place, own = self._at("transplant", seed)
        self._evaluate(place, seed, "encoder", [Evaluated(name, "", folder) for name, folder in encoders.items()])
        self._evaluate(place, seed, "optimized", [Evaluated(name, "", folder) for name, folder in mllms.items()])
        if self.recipe.transplant is None:
            return
        moved: dict[tuple[str, str], Evaluated] = {}
        for variant in self.recipe.transplant.projectors:
            for name, folder in encoders.items():
                # no projector was tuned for the original
                chosen = FRESH if name == ORIGINAL else variant
                target = place / FOLDERS["transplant"] / name / f"projector-{chosen}"
                mllm = self._transplanted(target, own, folder, chosen)
                moved[name, chosen] = Evaluated(name, chosen, mllm)
        self._evaluate(place, seed, "transplant", list(moved.values()))

    # Stages of the first MLLM

    def _assembled(self, place: Path, seed: int) -> Path:
        folder = place / FOLDERS["assemble"]

        def work() -> dict[str, Any]:
            encoder, image_processor = self.parts.encoder(seed)
            decoder, tokenizer = self.parts.language_model(seed)
            model, processor = assemble(
                encoder,
                decoder,
                tokenizer=tokenizer,
                image_processor=image_processor,
                seed=seed,
                **self.recipe.assemble.options(),
            )
            save_model(encoder, image_processor or image_processor_of(encoder), folder / ENCODER_FOLDER)
            save_model(model, processor, folder / MODEL_FOLDER)
            return {"parameters": model.num_parameters()}

        self._note(stage("assemble", folder, self._of("encoder", "language_model", "assemble") | {"seed": seed}, work))
        return folder / MODEL_FOLDER

    def _aligned(self, folder: Path, seed: int, start: Path) -> Path:
        settings = self._of("align") | {"seed": seed, "data": self.data.captions.name}
        options = self.recipe.align.options() | {"seed": seed}

        def work() -> dict[str, Any]:
            return tune(align, folder, lambda: load_model(start, None), self.data.captions, options)

        self._note(stage("align", folder, settings, work))
        return folder / MODEL_FOLDER

    def _instructed(self, folder: Path, seed: int, start: Path) -> Path:
        settings = self._of("instruct") | {"seed": seed, "data": self.data.dialogues.name}
        options = self.recipe.instruct.options() | {"seed": seed}

        def work() -> dict[str, Any]:
            return tune(instruct, folder, lambda: load_model(start, None), self.data.dialogues, options)

        self._note(stage("instruct", folder, settings, work))
        return folder / MODEL_FOLDER

    def _extracted(self, folder: Path, mllm: Path) -> Path:
        def work() -> dict[str, Any]:
            model, processor = load_model(mllm, None)
            adapter = find_adapter(model)
            if PartialState().is_main_process:
                save_encoder(adapter, processor, folder / ENCODER_FOLDER, {"stage": 1, "tower": tower_facts(adapter)})
            return {}

        self._note(stage("extract", folder, {"encoder": STAGE_1}, work))
        return folder / ENCODER_FOLDER

    # Transplant and evaluation

    def _transplanted(self, folder: Path, seed: int, encoder: Path, variant: str) -> Path:
        """The encoder in a new MLLM, which is aligned and instructed."""
        section = self.recipe.transplant
        assert section is not None
        name, first, second = folder.parent.name, folder / FOLDERS["align"], folder / FOLDERS["instruct"]
        # a template of its own, else that of the first MLLM
        template = {} if section.chat_template is None else {"chat_template": section.chat_template}
        settings = self._of("transplant", "assemble") | {
            "encoder": str(encoder.relative_to(self.folder)),
            "projector": variant,
            "seed": seed,
        }

        def aligned() -> dict[str, Any]:
            decoder, tokenizer = self.parts.language_model(seed, moved=True)
            made = self.recipe.assemble.options() | template
            model, processor = transplant(encoder, decoder, variant, seed=seed, tokenizer=tokenizer, **made)
            options = _frozen(section.align.options() | {"seed": seed}, kept_layers(model, variant))
            return tune(align, first, lambda: (model, processor), self.data.moved_captions, options)

        def instructed() -> dict[str, Any]:
            model, processor = load_transplant(first / MODEL_FOLDER)
            options = _frozen(section.instruct.options() | {"seed": seed}, kept_layers(model, variant))
            return tune(instruct, second, lambda: (model, processor), self.data.moved_dialogues, options)

        self._note(stage(f"transplant {name} align", first, settings, aligned))
        self._note(stage(f"transplant {name} instruct", second, settings, instructed))
        return second / MODEL_FOLDER

    def _evaluate(self, place: Path, seed: int, of: Examined, examined: list[Evaluated]) -> None:
        evaluations = {label: one for label, one in self.recipe.evaluate.items() if one.examines == of}
        if not evaluations:
            return
        evaluating = Evaluating(place / FOLDERS["evaluate"] / of, of, evaluations, self.parts)
        done = evaluating.stage(examined, seed)
        self._note(done)
        for one in done.outcome["scores"]:
            for name, value in one["scores"].items():
                score = EncoderScore(seed, one["encoder"], of, one["projector"], name, value)
                self.result.scores.append(score)

    # Records

    def _of(self, *sections: str) -> dict[str, Any]:
        """Sections in words that JSON has, as settings of a stage."""
        return {name: self.described[name] for name in sections}

    def _note(self, done: Stage) -> None:
        self.result.note(done)

    def _write(self) -> None:
        if not PartialState().is_main_process:
            return
        content = {
            "recipe": self.described,
            "rates": self.result.rates,
            "scores": [asdict(score) for score in self.result.scores],
            "seconds": {str(s.folder.relative_to(self.folder)): round(s.seconds, 1) for s in self.result.stages},
        }
        write_whole(self.folder / "results.json", json.dumps(content, indent=1, default=str))
        write_whole(self.folder / "results.md", f"{self.result}\n")


def _frozen(options: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Options of a run with layers frozen beside those that its settings freeze."""
    named: Sequence[str] | None = options.get("frozen")
    return options | {"frozen": [*(named or ()), *layers]}
