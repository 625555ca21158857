"""`PivotTrainer`: TRL's DPOTrainer over the prefix forest, with a cached reference and an eye on the vision tower.

TRL's constructor calls, in this order: `get_peft_model`, where LoRA trains; `_prepare_dataset`, of the rows to train on
and of those held out; transformers' constructor, after which there are `model`, `accelerator` and `data_collator`;
`add_fused_lm_head`, on the policy and on a reference model; `_precompute_ref_logps`, of both data sets, where
`args.precompute_ref_log_probs` is set. The last scores pairs through the forest, so that before `super().__init__`
there must be the adapter and the plan (`_prepare_model`), the collator with its sources, and what the reference cache
depends on (`_reference`); and `_precompute_ref_logps` itself lets the model answer from the forest, whose seam replaces
the fused head's `forward`. Without it that happens after the constructor.

Overrides, and why each is needed:
    __init__                  rows become checked pairs, and the collator builds forests
    _prepare_dataset          pairs are tokenised with their images, in the collator; nothing is left to prepare
    _precompute_ref_logps     the reference pass runs over forests and is kept on disk by content
    _get_train_sampler        pairs that share an image come together; processes get equally much of a step
    get_eval_dataloader, prediction_step
                              every held-out pair counts once, in however many processes
    get_batch_samples         the SFT loss is a mean over the chosen tokens of an optimiser step, which are counted here
    training_step             a batch that does not fit into `max_nodes` is computed part by part
    compute_loss              a non-finite loss names its pairs; the SFT loss may average per sequence; terms that hold
                              pictures against each other, which TRL has none of, come to its loss

What it shares with the other trainers stands in tower.py.

Losses, metrics, logging, checkpoints, accelerate, FSDP and DeepSpeed are TRL's.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOTrainer

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotConfig
from pivot_plugin.data.blind import WithoutPicture
from pivot_plugin.data.launch import this_launch
from pivot_plugin.data.pairs import PairDataset, PairStream, load
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import cache_folder
from pivot_plugin.generation.rejected_images import warn_of_made_looks, with_rejected_images
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.fingerprints import model_fingerprint, processor_fingerprint

from . import micro_batches
from .balance import BalancedSampler, measure_rates
from .batch import REFERENCE_BESIDE, ForestBatch, ForestCollator
from .forest_check import varied_rows
from .held_out import HeldOutLoader, looks_of, shares_of
from .image_terms import CHOSEN, CHOSEN_ELSEWHERE, REJECTED, ImageTerms
from .looks import Look
from .micro_batches import PARTS, SHARE, TOKENS, MergedMetrics, parts_of
from .plan import TrainingPlan, unwrapped
from .reference import ReferenceCache
from .reference_pass import ReferencePass
from .rows import POINTER, Loading, pointing, streaming
from .sampler import ImageGroupSampler
from .sharding import as_it_is
from .tower import TowerTraining
from .workers import default_workers

logger = logging.getLogger(__name__)

# held-out pairs that are scored without their pictures too
BLIND_ROWS = 256


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of some pairs under one model.

    Attributes:
        chosen, rejected: (pairs,) natural logarithms, summed over the tokens of an answer.
        elsewhere: (pairs,) of the chosen answer about the rejected images; None where no term of the loss asks for it.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    elsewhere: torch.Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """Preference accuracy (share with chosen above rejected), mean margin and mean log-probabilities.

        With terms about pictures also the share whose chosen answer is more probable about its own images than about
        the rejected ones, and by how much.
        """
        margin = self.chosen - self.rejected
        metrics = {
            "preference_accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(),
            "logps_chosen": self.chosen.mean().item(),
            "logps_rejected": self.rejected.mean().item(),
        }
        if self.elsewhere is not None:
            of_pictures = self.chosen - self.elsewhere
            metrics["image_accuracy"] = (of_pictures > 0).float().mean().item()
            metrics["image_margin"] = of_pictures.mean().item()
        return metrics

    def look(self) -> Look:
        """The metrics, and for each pair whether its chosen answer is the more probable one."""
        right = (self.chosen > self.rejected).float().numpy()
        return Look("preference accuracy", self.metrics(), right, chance=0.5)


class PivotTrainer(TowerTraining, DPOTrainer):
    """Preference optimisation of an MLLM's vision tower.

    Args:
        model: the MLLM, loaded; or a peft model around it, whose LoRA is then trained as it is.
        args: settings.
        train_dataset: pairs in any form `pivot_plugin.preferences.load` takes.
        eval_dataset: held-out pairs, in the same forms.
        processing_class: the model's processor.
        lora: a LoRA rank, a peft config, or None to train weights themselves.
        adapter: of the model's family; asked from the plugins where not given.
        plan: what trains, where it is known already; made from `args.train`, `args.frozen` and `lora` where not given.
        **kwargs: passed on to `DPOTrainer`; `ref_model=` replaces the model before training as the reference.

    Raises:
        DataError: for pairs that cannot be used.
        ModelError: for a model no adapter knows, or a processor that does not belong to it.
        SettingsError: for settings that exclude each other.
    """

    _runs_fsdp = False
    _reference_by_name = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PivotConfig,
        train_dataset: object,
        eval_dataset: object | None = None,
        processing_class: ProcessorMixin | None = None,
        lora: int | LoraConfig | None = 16,
        adapter: VisionAdapter | None = None,
        plan: TrainingPlan | None = None,
        **kwargs: Any,
    ) -> None:
        peft_config = self._prepare_model(model, args, processing_class, lora, adapter, plan)
        assert processing_class is not None
        losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        micro_batches.check(losses, args.max_nodes, args.world_size, _balances_experts(args, unwrapped(model)))
        pairs = load(train_dataset)
        held_out = None if eval_dataset is None else load(eval_dataset, name="eval_prefs")
        self.image_terms = ImageTerms.of(args.image_terms, args.image_weights)
        if args.rejected_images is not None:
            pairs = _rejecting(pairs, args, self.image_terms)
            held_out = None if held_out is None else _rejecting(held_out, args, self.image_terms)
        sources = [data for data in (pairs, held_out) if isinstance(data, PairDataset)]
        for source in sources:
            source.verify(launch=this_launch())
            self.image_terms.check(source)
        # a stream has no end to precompute; and log-probabilities of a LoRA that goes on training are not the base's
        args.precompute_ref_log_probs = isinstance(pairs, PairDataset) and not isinstance(model, PeftModel)
        if isinstance(pairs, PairStream) and self.plan and self.plan.lora is None and kwargs.get("ref_model") is None:
            raise SettingsError(
                "A stream of pairs with lora=None needs a reference model.",
                "Pass ref_model= (a second copy of the model), use LoRA, or give the pairs as a data set.",
            )
        self._reference = (
            {
                "model": model_fingerprint(kwargs.get("ref_model") or unwrapped(model)),
                "processor": processor_fingerprint(processing_class),
                "max_length": args.max_length,
                "ld_alpha": args.ld_alpha,
                "precision": self._precision(args, unwrapped(model)),
                **({"beside": [view.name for view in self.image_terms.beside]} if self.image_terms else {}),
            }
            if args.precompute_ref_log_probs
            else {}
        )
        self.reading = self._read_forest(model, args, processing_class, self.image_terms.with_rows(varied_rows(pairs)))
        self._forest_collator = ForestCollator(
            processing_class,
            self.adapter.image_token_id,
            self.reading.shared,
            args.max_length,
            self.reading.whole_prompts,
            self.image_terms.beside if self.image_terms else (),
            self.reading.layout,
            args.max_nodes,
            self.adapter.select_images,
        )
        if args.default_workers and isinstance(pairs, PairDataset):
            args.dataloader_num_workers = default_workers()
        self._collator = Loading(sources, self._forest_collator)
        pointers = iter(pointing(sources))
        train_rows, eval_rows = (
            None if data is None else streaming(data, data is pairs) if isinstance(data, PairStream) else next(pointers)
            for data in (pairs, held_out)
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            data_collator=self._collator,
            peft_config=peft_config,
            callbacks=[*(kwargs.pop("callbacks", None) or []), _WithoutReferenceModel(self)],
            **kwargs,
        )
        self._reference_by_name = True
        self.callback_handler.pop_callback(_WithoutReferenceModel)
        self._answer_from_forest()
        self._watch_training()

    # The seams of DPOTrainer

    @property
    def is_fsdp_enabled(self) -> bool:  # type: ignore[override]
        """Whether FSDP runs; not while TRL decides whether to load a reference by the model's name.

        Under FSDP it would load one, although the pass over the pairs uses the model, which is whole until it trains.
        """
        return self._runs_fsdp and self._reference_by_name

    @is_fsdp_enabled.setter
    def is_fsdp_enabled(self, runs: bool) -> None:
        self._runs_fsdp = runs

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        points = isinstance(dataset, Dataset) and set(POINTER) <= set(dataset.column_names)
        if points or isinstance(dataset, IterableDataset):
            return dataset
        # TRL's `evaluate` takes other pairs than those of the constructor
        pairs = load(dataset)
        if self.args.rejected_images is not None:
            pairs = _rejecting(pairs, self.args, self.image_terms)
        if isinstance(pairs, PairStream):
            return streaming(pairs)
        self.image_terms.check(pairs)
        self._collator.sources.append(pairs)
        return pointing([pairs], first=len(self._collator.sources) - 1)[0]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._answer_from_forest()
        pairs = self._collator.source_of(dataset)
        columns = 2 + len(self.image_terms.beside if self.image_terms else ())
        folder = Path(self.args.reference_cache or cache_folder("reference"))
        cache = ReferenceCache(folder, self._reference, columns)
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        compute = ReferencePass(cache, partial(self._reference_of, model), batch_size, this_launch())
        with evaluating(model, self.accelerator.device), as_it_is(model):
            logps = compute(pairs, name, self.args.disable_tqdm)
        dataset = dataset.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
        return dataset.add_column(REFERENCE_BESIDE, logps[:, 2:].tolist()) if columns > 2 else dataset

    def _reference_of(
        self, model: PreTrainedModel, pairs: PairDataset, positions: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each batch its positions, and (pairs, 2 + views) reference log-probabilities.

        They are those of both answers, and of what is scored beside them.
        """
        for of_batch, batch in self._collated(pairs, positions, size):
            scores = []
            for part in parts_of(batch):
                with _outputs_of(model) as outputs:
                    own = self.compute_ref_log_probs(model, self._prepared(part))
                beside = _beside(outputs[-1], len(part["completion_mask"]) // 2)
                scores.append(torch.stack([*own, *beside], dim=1).float().cpu())
            yield of_batch, torch.cat(scores).numpy()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not (self.args.group_by_image and isinstance(rows, Dataset)):
            return super()._get_train_sampler(train_dataset)
        pairs, seed = self._collator.source_of(rows), self.args.data_seed or self.args.seed
        order = ImageGroupSampler(pairs.image_keys, seed)
        if self.accelerator.num_processes == 1 or self.args.accelerator_config.split_batches:
            return order
        rates = measure_rates(pairs.looks, lambda position: self._forest_collator([pairs[position]]))
        # measured on different machines, they must not differ in the last bit
        nodes = this_launch().broadcast(rates, 0).nodes(pairs.looks)
        size, accumulated = self._train_batch_size, self.args.gradient_accumulation_steps
        return BalancedSampler(order, nodes, self.accelerator.num_processes, size, accumulated, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's; held-out pairs come in shares in which each counts once."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if not isinstance(rows, Dataset):
            return super().get_eval_dataloader(eval_dataset)
        return HeldOutLoader(
            rows,
            looks_of(len(rows), self.args.eval_batch_size, this_launch()),
            self._collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """As the parent's; what it logs counts as much as the batch has pairs."""
        before = {name: len(values) for name, values in self._metrics["eval"].items()}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loader = self.callback_handler.eval_dataloader
        if not isinstance(loader, HeldOutLoader):
            return loss, logits, labels
        for name, values in self._metrics["eval"].items():
            # a count is replaced and not added to
            if len(values) > before.get(name, 0) and name != "num_tokens":
                values[-1] *= loader.weight
        return loss * loader.weight, logits, labels

    def _collated(
        self, pairs: PairDataset | WithoutPicture, positions: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Pairs in batches, prepared by workers like those to train on, each with the positions that it holds.

        Args:
            pairs: to read.
            positions: of those wanted, in order.
            size: of a batch, in pairs.
        """
        collator = self._forest_collator
        if isinstance(pairs, WithoutPicture):
            # which have no rejected pictures either, so that nothing is scored beside the answers
            collator = replace(collator, beside=())
        collate = _Reading(pairs, collator)
        # no more workers than batches
        workers = min(self.args.dataloader_num_workers, -(-len(positions) // size))
        # of its own, so that what training draws does not depend on what a cache holds
        generator = torch.Generator()
        yield from DataLoader(
            list(positions),  # type: ignore[arg-type]
            size,
            collate_fn=collate,
            num_workers=workers,
            generator=generator,
        )

    def _prepared(self, part: dict[str, Any]) -> Any:
        """A collated batch, or a part of one, on the device."""
        return self._prepare_inputs({name: value for name, value in part.items() if name != SHARE})

    @property
    def _averages_tokens(self) -> bool:
        return "sft" in self.loss_types and self.args.sft_average == "token"

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As the parent's; with the chosen tokens of the optimiser step where its loss is their mean."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [part for batch in batches for part in parts_of(batch)]
        several = self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1
        if not (batches and (several or len(parts) > len(batches)) and self._averages_tokens):
            return batches, items
        counts = [_chosen_tokens(part["completion_mask"]).to(device) for part in parts]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(), "sum")

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As the parent's; part by part, with the gradient of the whole, where a batch is larger than `max_nodes`."""
        parts = parts_of(inputs)
        if len(parts) == 1:
            return super().training_step(model, parts[0], num_items_in_batch)
        metrics = MergedMetrics(self._metrics["train"])
        losses = [super(PivotTrainer, self).training_step(model, dict(part), num_items_in_batch) for part in parts]
        metrics.merge(parts)
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # in evaluation, which has no backward pass in between; in training parts come one by one
        if PARTS in inputs:
            return self._loss_of_parts(model, inputs)
        share, batch_tokens = inputs.pop(SHARE, 1.0), inputs.pop(TOKENS, None)
        per_sequence = self.args.sft_average == "sequence" and "sft" in self.loss_types
        over_step = self._averages_tokens and (
            num_items_in_batch is not None or batch_tokens is not None or self.accelerator.num_processes > 1
        )
        watched = per_sequence or over_step or self.image_terms or not model.training
        # what TRL does not read it would hand on to the model
        for_trl = {name: value for name, value in inputs.items() if name != REFERENCE_BESIDE}
        policy = self.accelerator.unwrap_model(model)
        seen: AbstractContextManager[list[Any]] = _outputs_of(policy) if watched else nullcontext([])
        # a reference that is not the policy without its LoRA answers for itself
        also: AbstractContextManager[list[Any]] = nullcontext([])
        if self.image_terms and self.ref_model is not None:
            also = _outputs_of(self.accelerator.unwrap_model(self.ref_model))
        with seen as outputs, also as of_reference:
            result = super().compute_loss(model, for_trl, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        # the policy is asked first
        if per_sequence:
            loss = loss + self._sft_weight() * _per_sequence_instead(outputs[0].log_probs, inputs["completion_mask"])
        elif over_step:
            mean_tokens = batch_tokens
            if mean_tokens is None:
                mean_tokens = self._mean_tokens(inputs["completion_mask"], num_items_in_batch)
            correction = _over_all_tokens(outputs[0].log_probs, inputs["completion_mask"], mean_tokens, share)
            loss = loss + self._sft_weight() * correction
        if not model.training and outputs:
            self._row_scores = self._scored_rows(outputs[0].log_probs.detach().float(), inputs)
        if self.image_terms:
            loss = loss + self._image_loss([*outputs[:1], *(of_reference or outputs[1:])], inputs)
        batch: ForestBatch = inputs["forest"]
        loss = self._checked(loss * share, model, batch.pair_ids, bool(batch.image_tokens))
        return (loss, result[1]) if return_outputs else loss

    def _scored_rows(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
        """(B,) how well each held-out pair goes by the objective: what noise is measured on, not what is minimised.

        Where the loss is that of SFT alone, the mean log-probability of a chosen token; else log s(beta margin). None
        where the reference does not come with the batch.
        """
        chosen, rejected = logps.sum(dim=1).chunk(2)
        if set(self.loss_types) == {"sft"}:
            return chosen / inputs["completion_mask"][:, 1:].chunk(2)[0].sum(dim=1).clamp(min=1)
        if "ref_chosen_logps" not in inputs:
            return None
        margin = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        return torch.nn.functional.logsigmoid(self.beta * margin.float())

    def _image_loss(self, outputs: Sequence[Any], inputs: Mapping[str, Any]) -> torch.Tensor:
        """The weighted sum of the terms that hold pictures against each other; their values go into the log.

        Args:
            outputs: of the policy, and of the reference where it was asked.
            inputs: of the batch, with the reference's log-probabilities where it was not.
        """
        pairs = len(inputs["completion_mask"]) // 2
        policy = _of_pairs(outputs[0], pairs)
        if REFERENCE_BESIDE in inputs:
            own = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            reference = [*own, *inputs[REFERENCE_BESIDE].unbind(dim=1)]
        else:
            reference = _of_pairs(outputs[1], pairs)
        views = (CHOSEN, REJECTED, *self.image_terms.beside)
        rewards = {view: one - other for view, one, other in zip(views, policy, reference, strict=True)}
        losses = self.image_terms.losses(rewards, self.beta)
        margins = self.beta * (rewards[CHOSEN] - rewards[CHOSEN_ELSEWHERE]).detach()
        logged = {
            "rewards/image_accuracies": (margins > 0).float(),
            "rewards/image_margins": margins,
            **{f"image_terms/{name}": value.detach()[None] for name, value in losses.items()},
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in logged.items():
            metrics[name].append(self.accelerator.gather(values).mean().item())
        return torch.stack([self.image_terms.weights[name] * value for name, value in losses.items()]).sum()

    def _loss_of_parts(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch in parts, without gradients in between."""
        parts = parts_of(inputs)
        metrics = MergedMetrics(self._metrics["train" if self.model.training else "eval"])
        tokens = torch.stack([_chosen_tokens(part["completion_mask"]) for part in parts]).sum()
        losses, row_scores = [], []
        for part in parts:
            losses.append(self.compute_loss(model, {**part, TOKENS: tokens}))
            row_scores.append(self._row_scores)
        metrics.merge(parts)
        whole = [scores for scores in row_scores if scores is not None]
        self._row_scores = torch.cat(whole) if len(whole) == len(parts) else None
        return torch.stack(losses).sum()

    def _mean_tokens(self, completion_mask: torch.Tensor, step_tokens: torch.Tensor | None) -> torch.Tensor:
        """Chosen tokens of a batch in the mean.

        Args:
            completion_mask: (S, 1 + C) of this one.
            step_tokens: chosen tokens of the optimiser step, over its batches and all processes; None outside of
                training, where a batch of each process stands alone.
        """
        if step_tokens is None:
            return self.accelerator.reduce(_chosen_tokens(completion_mask), "mean")
        # what transformers and the engine divide the loss by
        return step_tokens / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)

    def _precision(self, args: PivotConfig, model: PreTrainedModel) -> str:
        """In which log-probabilities are computed: autocast's, which a launcher may bring along, or the model's."""
        asked = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        brought = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = next((name for name in (asked, brought) if name != "no"), "no")
        if precision not in (asked, "no"):
            logger.warning(
                "The launcher brings %s along, so that this run computes in it; bf16=True says the same.", precision
            )
        return str(model.dtype) if precision == "no" else precision

    def _sft_weight(self) -> float:
        weights = self.loss_weights or [1.0] * len(self.loss_types)
        return float(sum(weight for name, weight in zip(self.loss_types, weights, strict=True) if name == "sft"))

    # What is measured beside the loss

    @torch.no_grad()
    def score(self, pairs: PairDataset | WithoutPicture) -> PairScores:
        """Log-probabilities of pairs under the model as it is now; to be called by every process, each scores a share.

        Args:
            pairs: to score, the same in every process, in batches of `per_device_eval_batch_size`.
        """
        model = self.accelerator.unwrap_model(self.model)
        size, launch = self.args.per_device_eval_batch_size, this_launch()
        batches, share = shares_of(len(pairs), size, launch)
        positions = [position for batch in share for position in batch]
        scored: dict[int, torch.Tensor] = {}
        with evaluating(model, self.accelerator.device), as_it_is(model):
            for of_batch, batch in self._collated(pairs, positions, size):
                parts = []
                for part in parts_of(batch):
                    inputs = self._prepared(part)
                    with self.accelerator.autocast():
                        outputs = model(forest=inputs["forest"])
                    parts.append(torch.stack(_of_pairs(outputs, len(inputs["completion_mask"]) // 2)).float().cpu())
                scored[of_batch[0]] = torch.cat(parts, dim=1)
        everyones = {first: logps for one in launch.gather(scored) for first, logps in one.items()}
        # of the views beside them the first, by the order of `ImageTerms.beside`
        chosen, rejected, *others = torch.cat([everyones[batch[0]] for batch in batches], dim=1)
        return PairScores(chosen, rejected, others[0] if others else None)

    def mean_score(self, pairs: PairDataset) -> float:
        """Preference accuracy on some pairs under the model as it is now."""
        return self.score(pairs).metrics()["preference_accuracy"]

    def reference_metrics(self) -> dict[str, float]:
        """What is measured on the held-out pairs before training, when the policy is the reference."""
        return self.look_before().metrics

    def held_out_metrics(self) -> dict[str, float]:
        """What is measured on the held-out pairs under the model as it is now."""
        return self.look_now().metrics

    def look_before(self) -> Look:
        """Which held-out pairs the reference tells apart."""
        return self.reference_scores().look()

    def look_now(self) -> Look:
        """Which held-out pairs the model tells apart as it is now."""
        return self.score(self._collator.source_of(self.eval_dataset)).look()

    def look_blind(self) -> Look | None:
        """The same of some of them with every picture its mean colour, None where they show none."""
        held_out = self._collator.source_of(self.eval_dataset)
        some = held_out.select(range(min(len(held_out), BLIND_ROWS)))
        return self.score(WithoutPicture(some, "mean")).look() if any(some.image_keys) else None

    def reference_scores(self) -> PairScores:
        """Log-probabilities of the held-out pairs under the reference: read from the cache, or scored now."""
        rows = self.eval_dataset
        if "ref_chosen_logps" not in rows.column_names:
            return self.score(self._collator.source_of(rows))
        elsewhere = torch.tensor(rows[REFERENCE_BESIDE][:])[:, 0] if self.image_terms else None
        chosen, rejected = (torch.tensor(rows[name][:]) for name in ("ref_chosen_logps", "ref_rejected_logps"))
        return PairScores(chosen, rejected, elsewhere)


def _balances_experts(args: PivotConfig, model: PreTrainedModel) -> bool:
    """Whether TRL adds a loss of how evenly a mixture of experts is used."""
    config = model.config.get_text_config()
    weight = args.router_aux_loss_coef
    if weight is None:
        weight = getattr(config, "router_aux_loss_coef", 0.0)
    return hasattr(config, "output_router_logits") and weight != 0.0


@dataclass(frozen=True)
class _Reading:
    """Reads and collates pairs by their positions, in a worker."""

    pairs: PairDataset | WithoutPicture
    collator: ForestCollator

    def __call__(self, positions: list[int]) -> tuple[list[int], dict[str, Any]]:
        return positions, self.collator([self.pairs[position] for position in positions])


class _WithoutReferenceModel(TrainerCallback):
    """Told by transformers' constructor that it is done, when TRL's goes on to the reference."""

    def __init__(self, trainer: PivotTrainer) -> None:
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._reference_by_name = not args.precompute_ref_log_probs


def _rejecting(pairs: PairDataset | PairStream, args: PivotConfig, terms: ImageTerms) -> PairDataset:
    """Pairs with rejected images, made where they have none.

    Raises:
        SettingsError: for a stream, or a maker that there is not.
        DataError: for a row of which nothing can be made.
    """
    make = args.rejected_images
    assert make is not None
    if isinstance(pairs, PairStream):
        raise SettingsError(
            f"rejected_images={make!r} is given for a stream of pairs.",
            "Give rows with random access, or a stream whose rows have rejected_images.",
        )
    if terms.symmetric:
        logger.warning(
            "The objective takes each rejected answer for right of its rejected image, and %r makes images without "
            "asking what they show: mdpo does not take it so.",
            make,
        )
    made = with_rejected_images(pairs, make, args.rejected_difficulty, args.data_seed or args.seed).verify()
    warn_of_made_looks(made, make)
    return made


@contextmanager
def _outputs_of(model: torch.nn.Module) -> Iterator[list[Any]]:
    """What a model answers meanwhile; TRL keeps it to itself."""
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def _beside(output: Any, pairs: int) -> list[torch.Tensor]:
    """(pairs,) log-probabilities of each view that is scored beside the pairs' own answers."""
    logps = getattr(output, "beside_log_probs", None)
    return [] if logps is None else list(logps.sum(dim=1).split(pairs))


def _of_pairs(output: Any, pairs: int) -> list[torch.Tensor]:
    """(pairs,) log-probabilities of chosen and rejected answers, and of each view beside them."""
    return [*output.log_probs.sum(dim=1).split(pairs), *_beside(output, pairs)]


def _chosen_tokens(completion_mask: torch.Tensor) -> torch.Tensor:
    """How many tokens the chosen answers of a (S, 1 + C) mask have, chosen ones first."""
    return completion_mask[:, 1:].chunk(2)[0].sum().float()


def _over_all_tokens(
    logps: torch.Tensor, completion_mask: torch.Tensor, mean_tokens: torch.Tensor, share: float
) -> torch.Tensor:
    """What to add to TRL's mean over a batch's chosen tokens, so that all batches' mean is that of all tokens.

    Args:
        logps, completion_mask: as for `_per_sequence_instead`.
        mean_tokens: chosen tokens of a whole batch, in the mean over batches.
        share: of its batch's pairs, by which the loss of a part is weighted.
    """
    total = logps.chunk(2)[0].sum()
    tokens = _chosen_tokens(completion_mask)
    return total / tokens.clamp(min=1) - total / (share * mean_tokens.clamp(min=1))


def _per_sequence_instead(logps: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """What to add to TRL's mean over all chosen tokens to get the mean over chosen answers of their means.

    Args:
        logps: (S, C) of all completions, chosen ones first, zero for padding.
        completion_mask: (S, 1 + C).
    """
    chosen, mask = logps.chunk(2)[0], completion_mask[:, 1:].chunk(2)[0]
    tokens = mask.sum(dim=1)
    of_sequence = chosen.sum(dim=1) / tokens.clamp(min=1)
    return chosen.sum() / tokens.sum().clamp(min=1) - of_sequence.mean()
