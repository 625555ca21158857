"""`PivotTrainer`: TRL's DPOTrainer over the prefix forest, with a cached reference and an eye on the vision tower.

Overrides, and why each is needed:
    __init__                  rows become checked pairs, and the collator builds forests
    _prepare_dataset          pairs are tokenised with their images, in the collator; nothing is left to prepare
    _precompute_ref_logps     the reference pass runs over forests and is kept on disk by content
    _get_train_sampler        pairs that share an image come together
    create_optimizer          learning rates per part
    compute_loss              a non-finite loss names its pairs; a batch without images still has a gradient

Losses, metrics, logging, checkpoints, accelerate, FSDP and DeepSpeed are TRL's.
"""

import copy
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotConfig
from pivot_plugin.errors import ModelError, SettingsError, TrainingError
from pivot_plugin.fingerprints import model_fingerprint, processor_fingerprint
from pivot_plugin.hooks import ask
from pivot_plugin.preferences import PairDataset, PairStream, load

from . import forward
from .batch import ForestBatch, ForestCollator
from .parts import TrainingPlan, count_parameters, original_name, plan, unwrapped
from .reference import ReferenceCache, default_folder
from .sampler import ImageGroupSampler

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PARTS = 20.0


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


class PivotTrainer(DPOTrainer):
    """Preference optimisation of an MLLM's vision tower.

    Args:
        model: the MLLM, loaded; or a peft model around it, whose LoRA is then trained as it is.
        args: settings.
        train_dataset: pairs in any form `pivot_plugin.preferences.load` takes.
        eval_dataset: held-out pairs, in the same forms.
        processing_class: the model's processor.
        lora: a LoRA rank, a peft config, or None to train weights themselves.
        adapter: of the model's family; asked from the plugins where not given.
        **kwargs: passed on to `DPOTrainer`; `ref_model=` replaces the model before training as the reference.

    Raises:
        DataError: for pairs that cannot be used.
        ModelError: for a model no adapter knows, or a processor that does not belong to it.
        SettingsError: for settings that exclude each other.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PivotConfig,
        train_dataset: object,
        eval_dataset: object | None = None,
        processing_class: ProcessorMixin | None = None,
        lora: int | LoraConfig | None = 16,
        adapter: VisionAdapter | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise SettingsError(
                "PivotTrainer got no processor.", "Pass processing_class=AutoProcessor.from_pretrained(...)."
            )
        base = unwrapped(model)
        self.adapter = adapter or find_adapter(base)
        check_processor(base, processing_class, self.adapter)
        self._no_trees = forward.takes_trees(base)
        if self._no_trees:
            logger.warning(
                "%s gets one sequence per row, images still encoded once: %s.", type(base).__name__, self._no_trees
            )
        pairs = load(train_dataset)
        held_out = None if eval_dataset is None else load(eval_dataset, name="eval_prefs")
        self.plan: TrainingPlan | None = None
        if not isinstance(model, PeftModel):
            self.plan = plan(self.adapter, args.train, lora)
            trained = set(self.plan.parameters)
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(name in trained)
        # a stream has no end to precompute; and log-probabilities of a LoRA that goes on training are not the base's
        args.precompute_ref_log_probs = isinstance(pairs, PairDataset) and not isinstance(model, PeftModel)
        if isinstance(pairs, PairStream) and self.plan and self.plan.lora is None and kwargs.get("ref_model") is None:
            raise SettingsError(
                "A stream of pairs with lora=None needs a reference model.",
                "Pass ref_model= (a second copy of the model), use LoRA, or give the pairs as a data set.",
            )
        self._reference = (
            {
                "model": model_fingerprint(kwargs.get("ref_model") or base),
                "processor": processor_fingerprint(processing_class),
                "max_length": args.max_length,
                "ld_alpha": args.ld_alpha,
                "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else str(base.dtype),
            }
            if args.precompute_ref_log_probs
            else {}
        )
        self._collator = _PairCollator(
            ForestCollator(processing_class, self.adapter.image_token_id, not self._no_trees, args.max_length), []
        )
        self._answers_from_forest = False
        self.saw_images = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._rows(pairs),
            eval_dataset=None if held_out is None else self._rows(held_out),
            processing_class=processing_class,
            data_collator=self._collator,
            peft_config=self.plan.lora if self.plan else None,
            **kwargs,
        )
        self._answer_from_forest()
        self.add_callback(_GradientCheck(self))

    def _answer_from_forest(self) -> None:
        """Let policy and reference answer forest calls; TRL has given both their fused head by now."""
        if self._answers_from_forest:
            return
        self._answers_from_forest = True
        forward.install(unwrapped(self.accelerator.unwrap_model(self.model)), self.adapter)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            forward.install(reference, find_adapter(reference))
        if self._collator.sources:
            self._check_forest(self._collator.sources[0][0])

    @torch.no_grad()
    def _check_forest(self, pair: dict[str, Any]) -> None:
        """Compare one pair through the forest with the plain forward pass, and refuse a model where they differ."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.to(self.accelerator.device).eval()
        plain = self._prepare_inputs(DataCollatorForVisionPreference(self.processing_class)([_as_trl(pair)]).data)
        mask = plain.pop("completion_mask")
        labels = plain["input_ids"].masked_fill(mask == 0, -100)
        ours = self._prepare_inputs(replace(self._collator.collator, max_length=None)([pair]))
        with self.accelerator.autocast():
            expected = model(**plain, labels=labels, use_cache=False, fused_lm_head=True).log_probs.float().sum(dim=1)
            found = model(forest=ours["forest"]).log_probs.float().sum(dim=1)
        model.train(training)
        per_token = ((found - expected).abs() / mask.sum(dim=1)).max().item()
        exact = model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        if per_token > (1e-4 if exact else 0.05):
            raise ModelError(
                f"{type(unwrapped(model)).__name__} gives other log-probabilities through the prefix forest than in a "
                f"plain forward pass: {per_token:.2g} per token apart on pair {pair.get('id')!r}.",
                f"The adapter of family {self.adapter.family!r} does not describe its attention or positions; write "
                "one that does (see VisionAdapter.positions), or train it with TRL's DPOTrainer.",
            )

    # The seams of DPOTrainer

    def _rows(self, pairs: PairDataset | PairStream) -> Dataset | IterableDataset:
        """Pairs as TRL wants a data set: rows that say where a pair is, so that images load in the collator."""
        if isinstance(pairs, PairStream):
            return IterableDataset.from_generator(_items_of, gen_kwargs={"stream": pairs})
        self._collator.sources.append(pairs)
        source = len(self._collator.sources) - 1
        return Dataset.from_dict({"source": [source] * len(pairs), "position": list(range(len(pairs)))})

    def _pairs_of(self, rows: Dataset) -> PairDataset:
        return self._collator.sources[rows[0]["source"]]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(dataset, IterableDataset) or (
            isinstance(dataset, Dataset) and {"source", "position"} <= set(dataset.column_names)
        )
        return dataset if ours else self._rows(load(dataset))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._answer_from_forest()
        pairs = self._pairs_of(dataset)
        cache = ReferenceCache(Path(self.args.reference_cache or default_folder()), self._reference)
        keys = [pairs.content_key(position) for position in range(len(pairs))]
        known = cache.read()
        missing = list({key: position for position, key in enumerate(keys) if key not in known}.values())
        if missing:
            self._fill(cache, pairs, missing, keys, name, batch_size)
            known = cache.read()
        return dataset.add_column("ref_chosen_logps", [known[key][0] for key in keys]).add_column(
            "ref_rejected_logps", [known[key][1] for key in keys]
        )

    def _fill(
        self, cache: ReferenceCache, pairs: PairDataset, missing: list[int], keys: list[str], name: str, size: int
    ) -> None:
        """Compute missing reference log-probabilities, each process its share, and keep them every few seconds."""
        by_image: dict[str, list[int]] = defaultdict(list)
        for position in missing:
            by_image[pairs.image_keys[position]].append(position)
        ordered = [position for group in by_image.values() for position in group]
        share = ordered[self.accelerator.process_index :: self.accelerator.num_processes]
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        model.to(self.accelerator.device).eval()
        fresh: list[tuple[str, tuple[float, float]]] = []
        written = time.monotonic()
        bar = tqdm(total=len(share), desc=f"reference of {name} pairs", disable=self.args.disable_tqdm)
        try:
            for start in range(0, len(share), size):
                positions = share[start : start + size]
                batch = self._collator.collator([pairs[position] for position in positions])
                scores = self.compute_ref_log_probs(model, self._prepare_inputs(batch))
                chosen, rejected = (side.float().tolist() for side in scores)
                fresh += [(keys[p], (c, r)) for p, c, r in zip(positions, chosen, rejected, strict=True)]
                if time.monotonic() - written > SECONDS_BETWEEN_PARTS:
                    cache.add(fresh)
                    fresh, written = [], time.monotonic()
                bar.update(len(positions))
        finally:
            # what was computed before an interruption is paid for
            cache.add(fresh)
            bar.close()
        self.accelerator.wait_for_everyone()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.group_by_image and isinstance(rows, Dataset):
            return ImageGroupSampler(self._pairs_of(rows).image_keys.tolist(), self.args.data_seed or self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with one group per learning rate where parts have their own."""
        if self.args.learning_rates and self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    part = self.adapter.part_of(original_name(name))
                    rate = self.args.learning_rates.get(part, self.args.learning_rate)
                    decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()], **settings
            )
        return super().create_optimizer()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        batch: ForestBatch = inputs["forest"]
        self.saw_images = self.saw_images or bool(batch.image_tokens)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss.item()} at step {self.state.global_step} on pairs {', '.join(batch.pair_ids)}.",
                f"Look at these pairs, lower the learning rate, or train in another precision. Checkpoints are in "
                f"{self.args.output_dir}.",
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            # no image in the batch, so nothing that trains was used: a zero gradient instead of an error
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
            result = (loss, result[1]) if return_outputs else loss
        return result

    # What is measured beside the loss

    @torch.no_grad()
    def score(self, pairs: PairDataset) -> PairScores:
        """Log-probabilities of pairs under the model as it is now.

        Args:
            pairs: to score, in batches of `per_device_eval_batch_size`.
        """
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.to(self.accelerator.device).eval()
        chosen, rejected = [], []
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(pairs), size):
            batch = self._collator.collator(
                [pairs[position] for position in range(start, min(start + size, len(pairs)))]
            )
            inputs = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                logps = model(forest=inputs["forest"]).log_probs.float().sum(dim=1)
            first, second = logps.cpu().chunk(2)
            chosen.append(first)
            rejected.append(second)
        model.train(training)
        return PairScores(torch.cat(chosen), torch.cat(rejected))

    def reference_scores(self) -> PairScores:
        """Log-probabilities of the held-out pairs under the reference: read from the cache, or scored now."""
        rows = self.eval_dataset
        if "ref_chosen_logps" not in rows.column_names:
            return self.score(self._pairs_of(rows))
        return PairScores(torch.tensor(rows["ref_chosen_logps"][:]), torch.tensor(rows["ref_rejected_logps"][:]))

    def trained_parameters(self) -> dict[str, tuple[int, int]]:
        """Per part, how many parameters train and how many there are."""
        return count_parameters(self.adapter, self.accelerator.unwrap_model(self.model))

    def parameter_table(self) -> str:
        """What trains, a line per part: parameters that train, of how many."""
        model = type(unwrapped(self.accelerator.unwrap_model(self.model))).__name__
        lines = [
            f"  {part:<15} {trained:>15,} of {total:>15,} parameters train"
            for part, (trained, total) in self.trained_parameters().items()
        ]
        return "\n".join([f"{model}, family {self.adapter.family}:", *lines])


def find_adapter(model: PreTrainedModel) -> VisionAdapter:
    """The adapter of a model's family, from the newest plugin that knows it.

    Raises:
        ModelError: if no plugin knows the model.
        PluginError: if a plugin raises.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"The model is a {type(model).__name__}, not a transformers PreTrainedModel.",
            "Load it with a transformers class such as LlavaForConditionalGeneration.",
        )
    adapter = ask("pivot_adapter", model=model)
    if adapter is None:
        raise ModelError(
            f"No adapter knows {type(model).__name__}.", "Install a plugin for its family; `pivot adapters` lists them."
        )
    if not isinstance(adapter, VisionAdapter):
        raise ModelError(
            f"A plugin answered pivot_adapter with a {type(adapter).__name__}.",
            "It should return a VisionAdapter or None.",
        )
    return adapter


def check_processor(model: PreTrainedModel, processor: object, adapter: VisionAdapter) -> None:
    """Refuse a processor that does not belong to a model.

    Raises:
        ModelError: naming what does not fit.
    """
    remedy = "Pass the processor the model was published with: AutoProcessor.from_pretrained(<same id>)."
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"The processor is a {type(processor).__name__}, without an image processor.", remedy)
    marker = getattr(processor, "image_token", None)
    token = processor.tokenizer.convert_tokens_to_ids(marker) if marker else None
    if token != adapter.image_token_id:
        raise ModelError(
            f"{type(processor).__name__} does not belong to {type(model).__name__}: its image token {marker!r} is "
            f"{token}, the model's is {adapter.image_token_id}.",
            remedy,
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(processor.tokenizer) > embeddings:
        raise ModelError(
            f"The tokenizer of {type(processor).__name__} has {len(processor.tokenizer)} tokens, "
            f"{type(model).__name__} embeds only {embeddings}.",
            remedy,
        )


@dataclass
class _PairCollator:
    """Collates rows of the data sets given to TRL: looks their pairs up and loads the images, in the worker."""

    collator: ForestCollator
    sources: list[PairDataset]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([self._pair(item) for item in items])

    def _pair(self, item: dict[str, Any]) -> dict[str, Any]:
        if "pair" in item:
            return item["pair"]
        where = ("source", "position")
        pair = self.sources[item["source"]][item["position"]]
        return {**pair, **{name: value for name, value in item.items() if name not in where}}


def _as_trl(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair with the columns TRL's own collator knows; it changes what it is given."""
    return {name: copy.copy(pair[name]) for name in ("images", "prompt", "chosen", "rejected")}


def _items_of(stream: PairStream) -> Iterator[dict[str, Any]]:
    for pair in stream:
        yield {"pair": pair}


class _GradientCheck(TrainerCallback):
    """After the first backward pass that saw an image: every part that should train has a gradient."""

    def __init__(self, trainer: PivotTrainer) -> None:
        self._trainer = trainer
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(self._trainer.parameter_table())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        if self._done or not trainer.saw_images:
            return
        self._done = True
        reached: dict[str, bool] = {}
        for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if parameter.requires_grad:
                part = trainer.adapter.part_of(original_name(name))
                reached[part] = reached.get(part, False) or bool(
                    parameter.grad is not None and parameter.grad.abs().max() > 0
                )
        if deaf := [part for part, found in reached.items() if not found]:
            raise TrainingError(
                f"After the first step the {' and the '.join(deaf)} got no gradient at all, although it should train.",
                "The loss does not reach it: check that the model uses its images, that gradient checkpointing keeps "
                "gradients, and that the adapter names the right modules (`pivot inspect`).",
            )
