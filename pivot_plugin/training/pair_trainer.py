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
    compute_loss              a non-finite loss names its pairs; the SFT loss may average per sequence

What it shares with the other trainers stands in tower.py.

Losses, metrics, logging, checkpoints, accelerate, FSDP and DeepSpeed are TRL's.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOTrainer

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotConfig
from pivot_plugin.data.launch import this_launch
from pivot_plugin.data.pairs import PairDataset, PairStream, load
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import cache_folder
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.fingerprints import model_fingerprint, processor_fingerprint

from .balance import BalancedSampler, measure_rates
from .batch import ForestBatch, ForestCollator
from .forest_check import varied_rows
from .held_out import HeldOutLoader, looks_of
from .plan import TrainingPlan, unwrapped
from .reference import ReferenceCache
from .reference_pass import ReferencePass
from .rows import POINTER, Loading, pointing, streaming
from .sampler import ImageGroupSampler
from .sharding import as_it_is
from .tower import TowerTraining

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of some pairs under one model.

    Attributes:
        chosen, rejected: (pairs,) natural logarithms, summed over the tokens of an answer.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor

    def metrics(self) -> dict[str, float]:
        """Preference accuracy (share with chosen above rejected), mean margin and mean log-probabilities."""
        margin = self.chosen - self.rejected
        return {
            "preference_accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(),
            "logps_chosen": self.chosen.mean().item(),
            "logps_rejected": self.rejected.mean().item(),
        }


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
        pairs = load(train_dataset)
        held_out = None if eval_dataset is None else load(eval_dataset, name="eval_prefs")
        for data in (pairs, held_out):
            if isinstance(data, PairDataset):
                data.verify(launch=this_launch())
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
            }
            if args.precompute_ref_log_probs
            else {}
        )
        self.reading = self._read_forest(model, args, processing_class, varied_rows(pairs))
        self._forest_collator = ForestCollator(
            processing_class,
            self.adapter.image_token_id,
            self.reading.shared,
            args.max_length,
            self.reading.whole_prompts,
        )
        sources = [data for data in (pairs, held_out) if isinstance(data, PairDataset)]
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
        if isinstance(pairs, PairStream):
            return streaming(pairs)
        self._collator.sources.append(pairs)
        return pointing([pairs], first=len(self._collator.sources) - 1)[0]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._answer_from_forest()
        pairs = self._collator.source_of(dataset)
        cache = ReferenceCache(Path(self.args.reference_cache or cache_folder("reference")), self._reference)
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        compute = ReferencePass(cache, partial(self._reference_of, model), batch_size, this_launch())
        with evaluating(model, self.accelerator.device), as_it_is(model):
            logps = compute(pairs, name, self.args.disable_tqdm)
        return dataset.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])

    def _reference_of(
        self, model: PreTrainedModel, pairs: PairDataset, positions: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each batch its positions, and (pairs, 2) reference log-probabilities of chosen and rejected answers."""
        for of_batch, batch in self._collated(pairs, positions, size):
            scores = self.compute_ref_log_probs(model, self._prepare_inputs(batch))
            yield of_batch, np.stack([side.float().cpu().numpy() for side in scores], axis=1)

    def _collated(
        self, pairs: PairDataset, positions: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Pairs in batches, each with the positions that it holds.

        Args:
            pairs: to read.
            positions: of those wanted, in order.
            size: of a batch, in pairs.
        """
        for start in range(0, len(positions), size):
            of_batch = list(positions[start : start + size])
            yield of_batch, self._forest_collator([pairs[position] for position in of_batch])

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

    @property
    def _averages_tokens(self) -> bool:
        return "sft" in self.loss_types and self.args.sft_average == "token"

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As the parent's; with the chosen tokens of the optimiser step where its loss is their mean."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        several = self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1
        if not (batches and several and self._averages_tokens):
            return batches, items
        counts = [_chosen_tokens(batch["completion_mask"]).to(device) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(), "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        per_sequence = self.args.sft_average == "sequence" and "sft" in self.loss_types
        over_step = self._averages_tokens and (num_items_in_batch is not None or self.accelerator.num_processes > 1)
        watched = per_sequence or over_step
        seen: AbstractContextManager[list[Any]] = self._policy_outputs(model) if watched else nullcontext([])
        with seen as outputs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if per_sequence:
            loss = loss + self._sft_weight() * _per_sequence_instead(outputs[-1].log_probs, inputs["completion_mask"])
        elif over_step:
            correction = self._over_all_tokens(outputs[-1].log_probs, inputs["completion_mask"], num_items_in_batch)
            loss = loss + self._sft_weight() * correction
        batch: ForestBatch = inputs["forest"]
        loss = self._checked(loss, model, batch.pair_ids, bool(batch.image_tokens))
        return (loss, result[1]) if return_outputs else loss

    @contextmanager
    def _policy_outputs(self, model: Any) -> Iterator[list[Any]]:
        """What the policy answers meanwhile; TRL keeps it to itself."""
        seen: list[Any] = []
        hook = self.accelerator.unwrap_model(model).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            yield seen
        finally:
            hook.remove()

    def _over_all_tokens(
        self, logps: torch.Tensor, completion_mask: torch.Tensor, step_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """What to add to TRL's mean over a batch's chosen tokens, so that all batches' mean is that of all tokens.

        Args:
            logps, completion_mask: as for `_per_sequence_instead`.
            step_tokens: chosen tokens of the optimiser step, over its batches and all processes; None outside of
                training, where a batch of each process stands alone.
        """
        total = logps.chunk(2)[0].sum()
        tokens = _chosen_tokens(completion_mask)
        if step_tokens is None:
            mean_share = self.accelerator.reduce(tokens, "mean")
        else:
            # what transformers and the engine divide the loss by
            mean_share = step_tokens / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        return total / tokens.clamp(min=1) - total / mean_share.clamp(min=1)

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
    def score(self, pairs: PairDataset) -> PairScores:
        """Log-probabilities of pairs under the model as it is now; to be called by every process, each scores a share.

        Args:
            pairs: to score, the same in every process, in batches of `per_device_eval_batch_size`.
        """
        model = self.accelerator.unwrap_model(self.model)
        size, launch = self.args.per_device_eval_batch_size, this_launch()
        batches = [list(range(start, min(start + size, len(pairs)))) for start in range(0, len(pairs), size)]
        share = batches[launch.rank :: launch.count]
        if len(share) < -(-len(batches) // launch.count):
            # where weights are divided all compute together: who has a batch less computes the first again
            share = [batches[0], *share]
        positions = [position for batch in share for position in batch]
        scored: dict[int, torch.Tensor] = {}
        with evaluating(model, self.accelerator.device), as_it_is(model):
            for of_batch, batch in self._collated(pairs, positions, size):
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    logps = model(forest=inputs["forest"]).log_probs.float().sum(dim=1)
                scored[of_batch[0]] = torch.stack(logps.cpu().chunk(2))
        everyones = {first: logps for one in launch.gather(scored) for first, logps in one.items()}
        chosen, rejected = torch.cat([everyones[batch[0]] for batch in batches], dim=1)
        return PairScores(chosen, rejected)

    def mean_score(self, pairs: PairDataset) -> float:
        """Preference accuracy on some pairs under the model as it is now."""
        return self.score(pairs).metrics()["preference_accuracy"]

    def reference_metrics(self) -> dict[str, float]:
        """What is measured on the held-out pairs before training, when the policy is the reference."""
        return self.reference_scores().metrics()

    def held_out_metrics(self) -> dict[str, float]:
        """What is measured on the held-out pairs under the model as it is now."""
        return self.score(self._collator.source_of(self.eval_dataset)).metrics()

    def reference_scores(self) -> PairScores:
        """Log-probabilities of the held-out pairs under the reference: read from the cache, or scored now."""
        rows = self.eval_dataset
        if "ref_chosen_logps" not in rows.column_names:
            return self.score(self._collator.source_of(rows))
        return PairScores(torch.tensor(rows["ref_chosen_logps"][:]), torch.tensor(rows["ref_rejected_logps"][:]))


class _WithoutReferenceModel(TrainerCallback):
    """Told by transformers' constructor that it is done, when TRL's goes on to the reference."""

    def __init__(self, trainer: PivotTrainer) -> None:
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._reference_by_name = not args.precompute_ref_log_probs


def _chosen_tokens(completion_mask: torch.Tensor) -> torch.Tensor:
    """How many tokens the chosen answers of a (S, 1 + C) mask have, chosen ones first."""
    return completion_mask[:, 1:].chunk(2)[0].sum().float()


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
