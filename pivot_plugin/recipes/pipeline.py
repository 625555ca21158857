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

import copy
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.encoders import load_encoder
from pivot_plugin.encoders.assemble import assemble
from pivot_plugin.encoders.store import save_encoder
from pivot_plugin.encoders.towers import image_processor_of
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import read_record, write_whole
from pivot_plugin.hooks import named
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.probes.benchmarks import run_benchmarks
from pivot_plugin.probes.comparison import Comparison, compare
from pivot_plugin.probes.lookup import NEED_MLLM, ProbeTask, runners
from pivot_plugin.runs.instruct import MODEL_FOLDER, align, instruct
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.training.cost import tower_facts

from . import inputs
from .file import CONTROLS, PivotRecipe, described, load_recipe
from .plan import Plan, plan_recipe
from .stages import Stage, stage
from .transplant import kept_layers, load_transplant, transplant

logger = logging.getLogger(__name__)

BENCHMARKS = "lmms-eval"
ORIGINAL, STAGE_1 = CONTROLS
ORDER = ("assemble", "optimize", "transplant")
LOOKED_AT = 100
# what a section tells the recipe and not the trainer
_OWN = ("data", "eval_data", "arms", "select")


@dataclass(frozen=True)
class EncoderScore:
    """One score of one encoder with one seed.

    Attributes:
        seed: of the run.
        encoder: "original", "stage-1" or an arm.
        of: what was examined: "encoder", "optimized" or "transplant".
        projector: variant of the transplant, "" for the others.
        score: label of the probe and name of the score.
        value: the score.
    """

    seed: int
    encoder: str
    of: str
    projector: str
    score: str
    value: float


@dataclass
class RecipeResult:
    """What the recipe came to.

    Attributes:
        output_dir: folder of all stages.
        encoders: by seed and name, folders of the encoders.
        rates: per arm, the learning rate chosen.
        scores: every score of every encoder with every seed.
        stages: in the order in which they ended.
    """

    output_dir: Path
    encoders: dict[int, dict[str, Path]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    scores: list[EncoderScore] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def table(self, of: str) -> str:
        """Encoders by row, scores by column, mean and standard deviation over seeds, as markdown.

        Args:
            of: "encoder", "optimized" or "transplant".
        """
        rows = [score for score in self.scores if score.of == of]
        names = list(dict.fromkeys(row.score for row in rows))
        lines = [f"| encoder | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for encoder, projector in dict.fromkeys((row.encoder, row.projector) for row in rows):
            shown = f"{encoder}, projector {projector}" if projector else encoder
            cells = []
            for name in names:
                values = [r.value for r in rows if (r.encoder, r.projector, r.score) == (encoder, projector, name)]
                cells.append(_mean_and_spread(values) if values else "")
            lines.append(f"| {shown} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def differences(self, of: str) -> str:
        """Each encoder against the one before it, within a seed: mean difference, spread, and how often above zero."""
        rows = [score for score in self.scores if score.of == of]
        names = list(dict.fromkeys(row.score for row in rows))
        order = list(dict.fromkeys(row.encoder for row in rows))
        lines = [f"| difference | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for projector in dict.fromkeys(row.projector for row in rows):
            for first, second in _contrasts(order):
                cells = []
                for name in names:
                    value = {
                        (r.seed, r.encoder): r.value
                        for r in rows
                        if r.score == name and (r.projector == projector or r.encoder == ORIGINAL)
                    }
                    seeds = [s for s, e in value if e == first and (s, second) in value]
                    gaps = [value[seed, second] - value[seed, first] for seed in seeds]
                    above = sum(gap > 0 for gap in gaps)
                    cells.append(f"{_mean_and_spread(gaps, '+.3f')} ({above}/{len(gaps)})" if gaps else "")
                shown = f"{second} - {first}" + (f", projector {projector}" if projector else "")
                if any(cells):
                    lines.append(f"| {shown} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = []
        for of in dict.fromkeys(score.of for score in self.scores):
            parts += [f"## {_TITLES[of]}", "", self.table(of), "", self.differences(of), ""]
        seeds = len({score.seed for score in self.scores})
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in self.rates.items() if rate is not None)
        note = f"Mean ± standard deviation over {seeds} seed(s); differences within a seed, and how many are above 0."
        return "\n".join([*parts, note + (f" Learning rates: {rates}." if rates else "")])


_TITLES = {
    "encoder": "Encoders",
    "optimized": "The MLLMs they were trained in",
    "transplant": "Transplanted: encoder frozen, new language model and projector",
}


def _contrasts(order: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of encoders whose difference is asked for: what each step added, and arms against each other."""
    arms = [name for name in order if name not in CONTROLS]
    steps = [(ORIGINAL, STAGE_1)] if ORIGINAL in order and STAGE_1 in order else []
    steps += [(STAGE_1 if STAGE_1 in order else ORIGINAL, arm) for arm in arms]
    return steps + [(first, second) for i, first in enumerate(arms) for second in arms[i + 1 :]]


def _mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


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
        encoder, language_model, align, instruct, optimize, transplant, evaluate, assemble, seeds, seeds_from,
        output_dir: as for `PivotRecipe`.
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
        align=align,
        instruct=instruct,
        optimize=optimize,
        transplant=transplant,
        evaluate=evaluate or {},
        assemble=assemble or {},
        seeds=list(seeds),
        seeds_from=seeds_from,  # type: ignore[arg-type]
        output_dir=str(output_dir),
    )
    return run_recipe(recipe, estimate=estimate)


def run_recipe(recipe: PivotRecipe | str | Path, *, estimate: bool = True) -> RecipeResult:
    """Run a recipe that was read or made.

    Args:
        recipe: itself, the path of its file, or the name of a ready one.
        estimate: as for `pivot`.

    Raises:
        as `pivot`.
    """
    if not isinstance(recipe, PivotRecipe):
        recipe = load_recipe(recipe)
    run = _Run(recipe)
    if estimate:
        run.estimate()
    return run.all()


class _Run:
    """A recipe on its way through the stages."""

    def __init__(self, recipe: PivotRecipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.plain = described(recipe)
        self.result = RecipeResult(self.folder)
        self._made: dict[str, Any] = {}
        # all that is named is looked at before anything is paid for
        plan_recipe(recipe)
        self._check_names()
        self.captions = self._conversations(recipe.align, "align")
        self.dialogues = self._conversations(recipe.instruct, "instruct")
        self.pairs = inputs.pairs(recipe.optimize["data"])
        held_out = recipe.optimize.get("eval_data")
        self.held_out = None if held_out is None else inputs.pairs(held_out, "optimize.eval_data")
        moved = recipe.transplant or {}
        self.moved_captions = self._conversations(moved.get("align") or {}, "transplant.align", self.captions)
        self.moved_dialogues = self._conversations(moved.get("instruct") or {}, "transplant.instruct", self.dialogues)
        self._look()

    def _check_names(self) -> None:
        specs = [self.recipe.encoder, self.recipe.language_model, (self.recipe.transplant or {}).get("language_model")]
        for spec in specs:
            if isinstance(spec, Mapping):
                named("pivot_sources", str(spec.get("source")), "source")
        probes = {**self.recipe.evaluate}
        if isinstance(select := self.recipe.optimize.get("select"), Mapping):
            probes["select"] = select
        asked = {label: self._probing(label, p) for label, p in probes.items() if p["probe"] != BENCHMARKS}
        if asked:
            runners(asked)

    def _look(self) -> None:
        """Look at every pair, which come late, and at the first of the conversations, which their stages look at."""
        bad = self.recipe.optimize.get("on_bad_row", "raise")
        for rows in (self.pairs, self.held_out):
            if rows is not None:
                rows.verify(bad)
        for data in (self.captions, self.dialogues, self.moved_captions, self.moved_dialogues):
            for position in range(min(LOOKED_AT, len(data))):
                data.plain(position)

    def _conversations(
        self, section: Mapping[str, Any], name: str, otherwise: ConversationDataset | None = None
    ) -> ConversationDataset:
        if section.get("data") is None and otherwise is not None:
            return otherwise
        return inputs.conversations(section["data"], f"{name}.data", section.get("image_folder"))

    # Where things are

    def _place(self, name: str, seed: int) -> tuple[Path, int]:
        """Folder and seed of a stage: those before `seeds_from` are shared by all seeds."""
        varies = ORDER.index(name) >= ORDER.index(self.recipe.seeds_from)
        own = seed if varies else self.recipe.seeds[0]
        return self.folder / f"seed-{own}", own

    # Stages

    def estimate(self) -> Plan:
        """Say what the recipe will cost, from a few steps of every kind."""
        first = self.recipe.seeds[0]
        place, seed = self._place("assemble", first)
        start = self._assembled(place, seed)
        rows = {
            "align": len(self.captions),
            "instruct": len(self.dialogues),
            "optimize": len(self.pairs),
            "transplant.align": len(self.moved_captions),
            "transplant.instruct": len(self.moved_dialogues),
        }
        plan = plan_recipe(self.recipe, rows)
        data: dict[str, Any] = {
            "align": self.captions,
            "instruct": self.dialogues,
            "optimize": self.pairs,
            "transplant.align": self.moved_captions,
            "transplant.instruct": self.moved_dialogues,
        }
        plan = plan.measured(self.recipe, start, data, self.folder / ".estimate", self._ended(first))
        logger.info("%s", plan)
        if PartialState().is_main_process:
            write_whole(self.folder / "plan.json", json.dumps(plan.as_dict(), indent=1))
        return plan

    def _ended(self, seed: int) -> dict[str, tuple[int, float]]:
        """Tokens and seconds of runs of a seed that have ended, by the names of a plan."""
        place, optimized = self._place("assemble", seed)[0], self._place("optimize", seed)[0]
        moved = self._place("transplant", seed)[0] / "6-transplant" / ORIGINAL / "projector-0"
        folders = {
            "align": [place / "2-align"],
            "instruct": [place / "3-instruct"],
            "transplant align": [moved / "2-align"],
            "transplant instruct": [moved / "3-instruct"],
            **{
                f"optimize {arm}": sorted((optimized / "4-optimize" / arm).glob("*"))
                for arm in self.recipe.optimize["arms"]
            },
        }
        records = {name: [read_record(folder) or {} for folder in found] for name, found in folders.items()}
        costs = {name: [r["cost"] for r in found if r.get("finished")] for name, found in records.items()}
        return {name: (found[0]["language_tokens"], found[0]["seconds"]) for name, found in costs.items() if found}

    def all(self) -> RecipeResult:
        """Every stage for every seed."""
        for seed in self.recipe.seeds:
            self._one(seed)
            self._write()
        return self.result

    def _one(self, seed: int) -> None:
        place, own = self._place("assemble", seed)
        assembled = self._assembled(place, own)
        aligned = self._aligned(place / "2-align", own, assembled)
        stage_1 = self._instructed(place / "3-instruct", own, aligned)
        encoders = {ORIGINAL: place / "1-assemble" / "encoder"}
        encoders[STAGE_1] = self._extracted(place / "5-encoders" / STAGE_1, stage_1)
        place, own = self._place("optimize", seed)
        optimized = {STAGE_1: stage_1}
        for arm in self.recipe.optimize["arms"]:
            run = self._arm(place / "4-optimize", arm, own, stage_1)
            optimized[arm], encoders[arm] = run / MODEL_FOLDER, run / "encoder"
        self.result.encoders[seed] = encoders
        place, own = self._place("transplant", seed)
        # the folder of what is examined, by what it is called
        self._evaluate(place, seed, "encoder", {(name, ""): folder for name, folder in encoders.items()})
        self._evaluate(place, seed, "optimized", {(name, ""): folder for name, folder in optimized.items()})
        if self.recipe.transplant is None:
            return
        moved = {}
        for variant in map(str, self.recipe.transplant.get("projectors") or ["0"]):
            for name, folder in encoders.items():
                # no projector was tuned for the original
                chosen = "0" if name == ORIGINAL else variant
                target = place / "6-transplant" / name / f"projector-{chosen}"
                moved[name, chosen] = self._transplanted(target, own, name, folder, chosen)
        self._evaluate(place, seed, "transplant", moved)

    def _assembled(self, place: Path, seed: int) -> Path:
        folder = place / "1-assemble"
        settings = {name: self.plain[name] for name in ("encoder", "language_model", "assemble")} | {"seed": seed}

        def work() -> dict[str, Any]:
            encoder, image_processor = self._encoder(seed)
            decoder, tokenizer = self._language_model(self.recipe.language_model, seed)
            options = dict(self.recipe.assemble)
            model, processor = assemble(
                encoder, decoder, tokenizer=tokenizer, image_processor=image_processor, seed=seed, **options
            )
            if PartialState().is_main_process:
                images: Any = image_processor or image_processor_of(encoder)
                for part, target in ((encoder, "encoder"), (model, MODEL_FOLDER)):
                    part.save_pretrained(folder / target)
                images.save_pretrained(folder / "encoder")
                processor.save_pretrained(folder / MODEL_FOLDER)
            return {"parameters": model.num_parameters()}

        self._note(stage("assemble", folder, settings, work))
        return folder / MODEL_FOLDER

    def _aligned(self, folder: Path, seed: int, start: Path) -> Path:
        settings = {"align": self.plain["align"], "seed": seed, "data": self.captions.name}
        work = self._tuning(align, folder, start, self.captions, self.recipe.align, seed)
        self._note(stage("align", folder, settings, work))
        return folder / MODEL_FOLDER

    def _instructed(self, folder: Path, seed: int, start: Path) -> Path:
        settings = {"instruct": self.plain["instruct"], "seed": seed, "data": self.dialogues.name}
        given = {"train": "all", **self.recipe.instruct}
        self._note(
            stage("instruct", folder, settings, self._tuning(instruct, folder, start, self.dialogues, given, seed))
        )
        return folder / MODEL_FOLDER

    def _tuning(
        self,
        verb: Callable[..., Any],
        folder: Path,
        start: Path | tuple[PreTrainedModel, ProcessorMixin],
        data: ConversationDataset,
        section: Mapping[str, Any],
        seed: int,
        **given: Any,
    ) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            record = read_record(folder)
            if record and record.get("finished"):
                return {"loss": _last_loss(record["history"]), "steps": _last_step(record["history"])}
            model, processor = load_transplant(start) if isinstance(start, Path) else start
            result = verb(
                model,
                data,
                processor=processor,
                output_dir=folder,
                resume=record is not None,
                seed=seed,
                **{k: v for k, v in inputs.accumulated(section).items() if k not in (*_OWN, "image_folder")},
                **given,
            )
            return {"loss": _last_loss(result.history), "steps": _last_step(result.history)}

        return work

    def _extracted(self, folder: Path, model: Path) -> Path:
        def work() -> dict[str, Any]:
            loaded, processor = load_model(model, None)
            adapter = find_adapter(loaded)
            if PartialState().is_main_process:
                save_encoder(adapter, processor, folder / "encoder", {"stage": 1, "tower": tower_facts(adapter)})
            return {}

        self._note(stage("extract", folder, {"encoder": STAGE_1}, work))
        return folder / "encoder"

    # Arms

    def _arm(self, folder: Path, arm: str, seed: int, start: Path) -> Path:
        """The run of an arm at its learning rate, which the first seed chooses."""
        own = dict(self.recipe.optimize["arms"][arm] or {})
        rates = own.pop("learning_rate", self.recipe.optimize.get("learning_rate"))
        rates = list(rates) if isinstance(rates, list | tuple) else [rates]
        if arm not in self.result.rates:
            found = {}
            for rate in rates:
                run = self._optimized(folder / arm, arm, own, rate, seed, start)
                found[rate] = self._selected(run) if len(rates) > 1 else 0.0
            best = max(found, key=lambda rate: found[rate])
            self.result.rates[arm] = best
            if len(rates) > 1:
                shown = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in found.items())
                logger.info("%s: learning rate %g (%s)", arm, best, shown)
                if best in (min(rates), max(rates)):
                    logger.warning("%s: the best learning rate %g is at the edge of those tried; try more.", arm, best)
        return self._optimized(folder / arm, arm, own, self.result.rates[arm], seed, start)

    def _optimized(
        self, folder: Path, arm: str, own: Mapping[str, Any], rate: float | None, seed: int, start: Path
    ) -> Path:
        folder = folder / ("default" if rate is None else f"lr-{rate:g}")
        taken = (*_OWN, "learning_rate", "image_folder")
        common = {name: value for name, value in self.recipe.optimize.items() if name not in taken}
        options = {"objective": arm, **common, **own} | ({} if rate is None else {"learning_rate": rate})
        settings = {
            **{k: v for k, v in options.items() if k != "lora"},
            **{"lora": options.get("lora"), "seed": seed, "data": self.plain["optimize"]["data"]},
        }

        def work() -> dict[str, Any]:
            record = read_record(folder)
            finished = record is not None and record.get("finished") and (folder / MODEL_FOLDER).is_dir()
            if finished and record is not None:
                return {"metrics": record.get("metrics", {})}
            model, processor = load_model(start, None)
            # the paper trains all weights; a recipe that wants LoRA says so
            chosen = {"train": "all", "lora": None, "saliency": 0, **inputs.accumulated(options)}
            if self.held_out is not None:
                chosen |= {"eval_prefs": self.held_out, "eval_fraction": 0}
            result = optimize(
                model,
                self.pairs,
                processor=processor,
                output_dir=folder,
                resume=record is not None,
                seed=seed,
                **chosen,
            )
            if PartialState().is_main_process:
                aside = folder / f".{MODEL_FOLDER}"
                result.model.save_pretrained(aside)
                processor.save_pretrained(aside)
                aside.rename(folder / MODEL_FOLDER)
            return {"metrics": result.metrics}

        self._note(stage(f"optimize {arm}" + ("" if rate is None else f" at {rate:g}"), folder, settings, work))
        return folder

    def _selected(self, run: Path) -> float:
        """What `optimize.select` says of an arm's MLLM."""
        select = self.recipe.optimize["select"]
        if isinstance(select, str):
            metrics = (read_record(run) or {}).get("metrics", {}).get("after", {})
            if select not in metrics:
                raise SettingsError(
                    f"optimize.select is {select!r}, which is no metric of held-out pairs.",
                    f"Choose of {', '.join(metrics) or 'those of optimize.eval_data, which is not given'}, or a probe.",
                )
            return float(metrics[select])
        model, processor = load_model(run / MODEL_FOLDER, None)
        found = compare({"run": model}, {"select": self._probing("select", select)}, processor=processor)
        return found.results["run"]["select"].main.value

    # Transplant and evaluation

    def _transplanted(self, folder: Path, seed: int, name: str, encoder: Path, variant: str) -> Path:
        section = self.recipe.transplant
        assert section is not None
        spec = section.get("language_model", self.recipe.language_model)
        settings = {"transplant": self.plain["transplant"], "encoder": str(encoder.relative_to(self.folder))}
        settings |= {"projector": variant, "seed": seed, "assemble": self.plain["assemble"]}

        def aligned() -> dict[str, Any]:
            decoder, tokenizer = self._language_model(spec, seed)
            model, processor = transplant(
                *(encoder, decoder, variant),
                feature_layer=int(self.recipe.assemble.get("feature_layer", -2)),
                seed=seed,
                tokenizer=tokenizer,
                chat_template=section.get("chat_template", self.recipe.assemble.get("chat_template")),
            )
            given, frozen = section.get("align") or {}, kept_layers(model, variant)
            return self._tuning(*(align, first, (model, processor), self.moved_captions, given, seed), frozen=frozen)()

        def instructed() -> dict[str, Any]:
            start = load_transplant(first / MODEL_FOLDER)
            given, frozen = section.get("instruct") or {}, kept_layers(start[0], variant)
            return self._tuning(
                *(instruct, second, start, self.moved_dialogues, given, seed),
                frozen=frozen,
                train="projector+language_model",
            )()

        first, second = folder / "2-align", folder / "3-instruct"
        self._note(stage(f"transplant {name} align", first, settings, aligned))
        self._note(stage(f"transplant {name} instruct", second, settings, instructed))
        return second / MODEL_FOLDER

    def _evaluate(self, place: Path, seed: int, of: str, examined: Mapping[tuple[str, str], Path]) -> None:
        probes = {label: probing for label, probing in self.recipe.evaluate.items() if _of(probing) == of}
        if not probes:
            return
        folder = place / "7-evaluate" / of
        settings = {"evaluate": {label: self.plain["evaluate"][label] for label in probes}, "of": of, "seed": seed}

        def work() -> dict[str, Any]:
            comparison, scores = Comparison(), {}
            asked = {label: self._probing(label, p) for label, p in probes.items() if p["probe"] != BENCHMARKS}
            for (name, projector), path in examined.items():
                shown = f"{name} {projector}".strip()
                found: dict[str, float] = {}
                if asked:
                    model, processor = (load_encoder(path), None) if of == "encoder" else load_transplant(path)
                    whole = compare({shown: model}, asked, processor=processor)
                    comparison.results |= whole.results
                    for label, result in whole.results[shown].items():
                        found |= {f"{label} {score}": s.value for score, s in result.scores.items()}
                    del model
                for label, probing in probes.items():
                    if probing["probe"] == BENCHMARKS:
                        found |= self._benchmarks(label, probing, path, folder / shown.replace(" ", "-"))
                scores[f"{name}|{projector}"] = found
            if PartialState().is_main_process:
                comparison.save(folder / "comparison.json")
            return {"scores": scores}

        done = stage(f"evaluate {of}", folder, settings, work)
        self._note(done)
        for key, found in done.outcome["scores"].items():
            name, _, projector = key.partition("|")
            # how far seeds of a probe lie apart is no score
            scores = {score: value for score, value in found.items() if not score.endswith("/spread")}
            self.result.scores += [EncoderScore(seed, name, of, projector, score, v) for score, v in scores.items()]

    def _benchmarks(self, label: str, probing: Mapping[str, Any], model: Path, folder: Path) -> dict[str, float]:
        results = run_benchmarks(str(model), output_dir=folder, **(probing.get("options") or {}))
        return {f"{label} {task}": next(iter(metrics.values())) for task, metrics in results.items() if metrics}

    def _probing(self, label: str, spec: Mapping[str, Any]) -> ProbeTask:
        if label not in self._made:
            self._made[label] = ProbeTask(
                spec["probe"], inputs.plain(spec.get("data")), dict(spec.get("options") or {})
            )
        made: ProbeTask = self._made[label]
        return made

    # Parts

    def _encoder(self, seed: int) -> tuple[PreTrainedModel, Any]:
        spec = self.recipe.encoder
        if isinstance(spec, Mapping):
            spec = inputs.made({"seed": seed, **spec})
        if isinstance(spec, str | Path):
            encoder, image_processor = load_encoder(spec, with_processor=True)
            return encoder, image_processor
        return spec if isinstance(spec, tuple) else (spec, None)

    def _language_model(self, spec: Any, seed: int) -> tuple[Any, PreTrainedTokenizerBase | None]:
        if isinstance(spec, Mapping):
            # a maker may train its model, and every transplant of a seed begins with the same
            key = json.dumps({"seed": seed, **spec}, sort_keys=True, default=str)
            if key not in self._made:
                self._made[key] = inputs.made({"seed": seed, **spec})
            spec = self._made[key]
        model, tokenizer = spec if isinstance(spec, tuple) else (spec, None)
        # assemble makes its modules part of the MLLM
        return (copy.deepcopy(model) if isinstance(model, PreTrainedModel) else model), tokenizer

    # Results

    def _note(self, done: Stage) -> None:
        if done.folder not in [earlier.folder for earlier in self.result.stages]:
            self.result.stages.append(done)

    def _write(self) -> None:
        if not PartialState().is_main_process:
            return
        content = {
            "recipe": self.plain,
            "rates": self.result.rates,
            "scores": [asdict(score) for score in self.result.scores],
            "seconds": {str(s.folder.relative_to(self.folder)): round(s.seconds, 1) for s in self.result.stages},
        }
        write_whole(self.folder / "results.json", json.dumps(content, indent=1, default=str))
        write_whole(self.folder / "results.md", f"{self.result}\n")


def _of(probing: Mapping[str, Any]) -> str:
    """What a probe of a recipe examines."""
    whole = "transplant" if probing["probe"] in (*NEED_MLLM, BENCHMARKS) else "encoder"
    return str(probing.get("of", whole))


def _last_loss(history: Sequence[Mapping[str, float]]) -> float | None:
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)


def _last_step(history: Sequence[Mapping[str, float]]) -> int | None:
    return next((int(entry["step"]) for entry in reversed(history) if "step" in entry), None)
