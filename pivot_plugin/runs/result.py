"""What a finished run has: the model, its encoder, what was measured; saved, published, reported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.encoders import Publication, publish, save_encoder, save_lora
from pivot_plugin.encoders.compatibility import save_model
from pivot_plugin.encoders.publishing import PublishOptions
from pivot_plugin.encoders.record import versions
from pivot_plugin.encoders.store import SHARD
from pivot_plugin.errors import EncoderError, SettingsError
from pivot_plugin.files import whole_folder
from pivot_plugin.generation.own_answers import AnswerSummary
from pivot_plugin.hooks import collect
from pivot_plugin.models.writing import write_like
from pivot_plugin.probes.comparison import Comparison
from pivot_plugin.probes.scores import ProbeResult
from pivot_plugin.probes.storage import saved_results
from pivot_plugin.report import saliency_sheet, write_report
from pivot_plugin.training.cost import Cost
from pivot_plugin.verdict import Verdict

from .provenance import published_settings

Weights = Literal["encoder", "lora"]


@dataclass(repr=False)
class PivotResult:
    """A finished run.

    Attributes:
        model: the MLLM with the trained tower, LoRA merged.
        processor: the one it was trained with.
        output_dir: the run's folder.
        metrics: "before" and "after", on the held-out rows: preference_accuracy, margin, logps_chosen, logps_rejected
            of pairs (image_accuracy and image_margin too, where pictures are held against each other), reward and each
            reward alone of questions; empty where none were held out.
        history: the trainer's log, a dict per entry; the watch's findings under names that begin with "watch/".
        weight_change: relative change of the tower's weights, per block.
        trained: per part, parameters that trained and parameters there are.
        settings: the options that the run was started with.
        adapter: of the model's family.
        cost: time, memory and floating-point operations.
        origin: model, data and versions, as they may be published.
        answers: what came of asking the model, a summary a round; empty where it learnt from given pairs or roll-outs.
        verdict: better, worse, no change or not measured, and by how much.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    output_dir: Path
    metrics: dict[str, dict[str, float]]
    history: list[dict[str, float]]
    weight_change: dict[str, float]
    trained: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    adapter: VisionAdapter
    cost: Cost = field(default_factory=Cost)
    origin: dict[str, Any] = field(default_factory=dict)
    answers: list[AnswerSummary] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    _encoder: PreTrainedModel | None = field(default=None, repr=False)
    _lora: tuple[LoraConfig, dict[str, torch.Tensor]] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return as_lines(self._told())

    def _repr_html_(self) -> str:
        return as_table(self._told())

    def _told(self) -> list[tuple[str, str]]:
        """What happened, what came of it, by how much, and what to do next: five lines."""
        objective = self.settings.get("objective", "")
        named = objective if isinstance(objective, str) else " + ".join(objective)
        data = self.origin.get("data") or {}
        rows = f" on {data['rows']:,} rows" if isinstance(data.get("rows"), int) else ""
        verdict, largest = self.verdict, max(self.weight_change.values(), default=0.0)
        first, *others = verdict.sentences() or [""]
        return [
            (
                "run",
                f"{named}{rows}, {verdict.taken:,} of {verdict.planned:,} steps in {self.cost.seconds:,.0f} s; "
                f"{self.settings.get('train')} of {type(self.model).__name__} ({self.family})",
            ),
            ("verdict", f"{verdict.title}. {first}"),
            ("more", " ".join(others) or "-"),
            ("weights", f"the tower's blocks changed by up to {100 * largest:.2g} % of their length"),
            ("next", f"{self._next()}"),
        ]

    def _next(self) -> str:
        folder = self.output_dir
        if not self.verdict.moved:
            return "train longer, at a larger learning_rate, or on pairs that the picture decides (pivot prefs audit)"
        if self.verdict.outcome == "not measured":
            return f"measure it: pivot compare BASE {folder / 'encoder'} --probe linear=DATA"
        return f"result.report('report.html') shows it all; the encoder is in {folder / 'encoder'}"

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self.adapter.family

    @property
    def encoder(self) -> PreTrainedModel:
        """The trained tower as a stand-alone transformers model; a copy, made once."""
        if self._encoder is None:
            self._encoder = self.adapter.extract()
        return self._encoder

    def save(
        self,
        folder: str | Path,
        weights: Weights = "encoder",
        *,
        licence: str | None = None,
        picture: bool = False,
        max_shard_size: str = SHARD,
    ) -> Path:
        """Write the encoder with its projector, provenance and card.

        Args:
            folder: to write; replaced as a whole if it holds an encoder already.
            weights: "encoder", a stand-alone transformers model; or "lora", a PEFT folder for the base encoder.
            licence: for the card; that of the base model where None, "other" where that is not known.
            picture: put saliency maps of four held-out pairs, and so images of your data, into the folder and its card.
            max_shard_size: of weight files, as transformers takes it.

        Raises:
            EncoderError: if the folder holds something else, cannot be written, or there is no LoRA to save.
            SettingsError: for unknown weights.
        """
        if weights not in get_args(Weights):
            raise SettingsError(f"weights is {weights!r}.", f"Choose {' or '.join(map(repr, get_args(Weights)))}.")
        record = {
            "base": self.origin.get("base"),
            "data": self.origin.get("data"),
            "cost": self.origin.get("cost"),
            "versions": self.origin.get("versions") or versions(),
            "settings": published_settings(self.settings),
            "metrics": self.metrics,
            "probes": _before_and_after(self.probes),
            "weight_change": self.weight_change,
            "verdict": self.verdict.as_dict(),
            "license": licence or (self.origin.get("base") or {}).get("licence") or "other",
        }
        sections = [str(text) for _, text in collect("pivot_card_sections", tolerant=True, result=self)]
        shown = saliency_sheet(self.probes) if picture else None
        if weights == "encoder":
            return save_encoder(
                self.adapter,
                self.processor,
                folder,
                record,
                sections=sections,
                picture=shown,
                max_shard_size=max_shard_size,
            )
        if self._lora is None:
            several = int(self.settings.get("rounds") or 1) > 1
            finding = (
                "The LoRA of the last round is not all that was trained."
                if several
                else "This run trained the weights themselves."
            )
            raise EncoderError(finding, 'Save the encoder: weights="encoder".')
        return save_lora(self.adapter, *self._lora, folder, record, sections=sections, picture=shown)

    def save_model(self, folder: str | Path, *, like: str | Path | None = None) -> Path:
        """Write the whole MLLM, in transformers' form, or in that of the checkpoint it was read from.

        Args:
            folder: to write; must be empty or absent.
            like: folder or Hub id of the checkpoint of another repository that training began with, whose form is
                wanted again.

        Raises:
            SettingsError: if the folder holds something.
            ModelError: if the checkpoint is of no known form, or of another than this model.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise SettingsError(f"Folder {str(target)!r} is not empty.", "Choose another folder, or empty it.")
        if like is not None:
            return write_like(self.model, like, target)
        with whole_folder(target) as aside:
            save_model(self.model, aside)
            self.processor.save_pretrained(aside)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        weights: Weights = "encoder",
        licence: str | None = None,
        picture: bool = False,
        max_shard_size: str = SHARD,
        **options: Unpack[PublishOptions],
    ) -> Publication:
        """Save the encoder in the run's folder and publish it in one commit.

        Args:
            repo_id: "owner/name".
            weights, licence, picture, max_shard_size: as for `save`.
            **options: as for `pivot.publish`: `private`, `revision`, `tag`, `token`, `commit_message`, `create_pr`,
                `exist_ok`, `dry_run`, `time_limit`.

        Raises:
            EncoderError: as `save`.
            PublishError: as `pivot.publish`.
        """
        folder = self.save(
            self.output_dir / weights, weights, licence=licence, picture=picture, max_shard_size=max_shard_size
        )
        return publish(folder, repo_id, **options)

    @property
    def probes(self) -> dict[str, dict[int, ProbeResult]]:
        """What probes found during the run, by label and step."""
        return saved_results(self.output_dir)

    def report(self, path: str | Path, comparison: Comparison | None = None) -> Path:
        """Write one self-contained HTML page about the run.

        Args:
            path: of the file.
            comparison: of encoders, to be shown in it.

        Raises:
            SettingsError: if the file cannot be written.
        """
        return write_report(path, [self.output_dir], comparison)


def as_lines(told: Sequence[tuple[str, str]]) -> str:
    """Names and what is told of them, a line each."""
    return "\n".join(f"{name + ':':<9} {text}" for name, text in told)


def as_table(told: Sequence[tuple[str, str]]) -> str:
    """The same as HTML, for a notebook."""
    rows = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in told
    )
    return f"<table>{rows}</table>"


def _before_and_after(probes: Mapping[str, Mapping[int, ProbeResult]]) -> dict[str, Any]:
    """Scores of probes before the first step and after the last, by label and name."""
    table: dict[str, Any] = {}
    for label, steps in probes.items():
        first, last = steps.get(0), steps[max(steps)]
        table[label] = {
            name: {
                "before": first.scores[name].as_dict() if first and name in first.scores else None,
                "after": score.as_dict() if last is not first else None,
            }
            for name, score in last.scores.items()
        }
    return table
