"""`PivotGRPOTrainer` and `PivotRLOOTrainer`: TRL's trainers on a model's own roll-outs, over the prefix forest.

The G roll-outs of a prompt share its image encoding and its tokens, in generation and in the policy's, the old policy's
and the reference's log-probabilities.

TRL's constructors call, in this order: `get_peft_model`, where LoRA trains; transformers' constructor, with a collator
that hands rows on as they are; the loading of a reference model, unless `beta` is 0 or LoRA trains; and
`add_fused_lm_head`, on both. They call none of the methods below, so that the seam of the forest waits until they are
done.

Overrides, and why each is needed:
    __init__                              rows become checked questions; rewards are guarded; the reference is the model
                                          before training, where TRL would load it anew by name
    _generate_and_score_completions       images are looked up late, and processed once per image set; groups without
                                          spread make room for others, where `redraw` asks for it
    _calculate_rewards                    which groups have spread; rewards are given questions in their own words
    _tokenize_prompts                     each distinct prompt once; one may have no images, beside others with some;
                                          names of control tokens in its words are words
    _generate_single_turn                 each distinct prompt is prefilled once, its images encoded once; a single
                                          answer to a held-out question is the greedy one
    _get_per_token_logps_and_entropies    the forest instead of one row per roll-out
    _get_train_sampler                    the order of an epoch depends on its number, for runs that are resumed in it
    _prepare_inputs                       the roll-outs of a prompt come in one batch
    compute_loss                          a non-finite loss names its questions

Sampling, rewards, advantages, losses, metrics, checkpoints and distribution are TRL's.
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer, RLOOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, split_tensor_dict

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import RolloutConfig
from pivot_plugin.data.launch import Launch, this_launch
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.generation.engines import TransformersEngine
from pivot_plugin.generation.grading import graded
from pivot_plugin.generation.shared_prefill import PromptImages, SharedPrefill
from pivot_plugin.models.control_text import NO_PLAIN_TEXT
from pivot_plugin.models.evaluating import evaluating, undisturbed
from pivot_plugin.models.image_tokens import ProcessedImages
from pivot_plugin.rewards import GuardedReward, Scorer, needs_answer, resolve_rewards

from . import forward
from .attention import attending_by
from .batch import ForestBatch, ForestCollator, ImageSets
from .forest_check import varied_rows
from .looks import Look
from .plan import TrainingPlan, unwrapped
from .refill import put_together, silent_groups
from .rows import pointing
from .sampler import EpochRepeatSampler
from .sharding import is_divided
from .tower import TowerTraining

logger = logging.getLogger(__name__)

Rewards = str | Callable[..., Any] | nn.Module | Sequence[str | Callable[..., Any] | nn.Module]
# generation batches in a row in which every group scored alike, before it is said
SILENT_BATCHES = 3
# what TRL counts beside a processor's outputs about images, to cut these into the shares of batches
IMAGE_COUNTS = {"num_images", "num_tiles"}


@dataclass
class _Shown:
    """The distinct images of one generation batch.

    Attributes:
        collator: processes images.
        questions: for each row the number of its question, equal for roll-outs of one prompt.
        names: of the rows, for errors.
        sets: for each row its image set, -1 for none.
        images: of each set.
        reworded: by row the questions whose words hold names of control tokens, which TRL is given in other words.
    """

    collator: ForestCollator
    questions: list[int]
    names: list[str]
    sets: list[int]
    images: list[list[Any]]
    reworded: dict[int, dict[str, Any]]
    _processed: dict[tuple[int, ...], ProcessedImages] = field(default_factory=dict)

    def processed(self, sets: Sequence[int]) -> ProcessedImages:
        """The images of some sets as the processor makes them, together.

        How an image is cut and padded depends on those beside it, so that shares cannot be taken from a larger batch.
        """
        key = tuple(sets)
        if key not in self._processed:
            image_tokens = self.collator.image_tokens
            self._processed[key] = image_tokens.process_images([self.images[number] for number in sets])
        return self._processed[key]


class Rollouts(TowerTraining):
    """Training on a model's own roll-outs. Stands in front of TRL's GRPOTrainer or RLOOTrainer.

    Args:
        model: the MLLM, loaded; or a peft model around it.
        reward_funcs: names, functions with TRL's signature, reward models or their ids, or a list of these.
        args: settings.
        train_dataset: questions in any form `pivot_plugin.preferences.load_questions` takes, with what rewards need.
        eval_dataset: held-out questions.
        processing_class: the model's processor.
        lora: a LoRA rank, a peft config, or None to train weights themselves.
        adapter: of the model's family; asked from the plugins where not given.
        plan: what trains, where it is known already; made from `args.train`, `args.frozen` and `lora` where not given.
        **kwargs: passed on to TRL's trainer.

    Raises:
        DataError: for questions that cannot be used, or that lack the answer a reward needs.
        ModelError: for a model no adapter knows, or a processor that does not belong to it.
        SettingsError: for an unknown reward.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Rewards,
        args: RolloutConfig,
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
        functions = resolve_rewards(reward_funcs)  # type: ignore[arg-type]
        self._sources = [load_questions(train_dataset).verify(launch=this_launch())]
        if eval_dataset is not None:
            self._sources.append(load_questions(eval_dataset, "eval_questions").verify(launch=this_launch()))
        for questions in self._sources:
            needs_answer(functions, questions)
        rows = pointing(self._sources)
        self.reading = self._read_forest(model, args, processing_class, varied_rows(self._sources[0]))
        self._forest_collator = ForestCollator(
            processing_class,
            self.adapter.image_token_id,
            self.reading.shared,
            whole_prompts=self.reading.whole_prompts,
            layout=self.reading.layout,
        )
        self._shown: dict[str, _Shown] = {}
        self._rows_now: list[int] | None = None
        self._silent, self._told = 0, False
        beta, reference = args.beta, None
        if beta and peft_config is None and not isinstance(model, PeftModel):
            # With a beta and without LoRA, TRL's constructor would load a reference by the model's name, which need not
            # be the model that was given. At beta 0 it loads none: so beta is 0 while it runs and put back behind it,
            # and the reference is a copy made here. Nothing else in the constructor looks at beta but the refusal of
            # `sync_ref_model`.
            reference, args.beta = copy.deepcopy(model), 0.0
        super().__init__(
            model=model,
            reward_funcs=[_guarded(function, args.reward_time_limit) for function in functions],
            args=args,
            train_dataset=rows[0],
            eval_dataset=rows[1] if len(rows) > 1 else None,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self.beta = args.beta = beta
        if reference is not None:
            self.ref_model = self._prepared_reference(reference)
        self._prefill = SharedPrefill(unwrapped(self.accelerator.unwrap_model(self.model)))
        self._answer_from_forest()
        self._watch_training()

    def _prepared_reference(self, reference: PreTrainedModel) -> Any:
        """The reference as TRL prepares the one that it loads."""
        reference.requires_grad_(False)
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def mean_score(self, questions: QuestionDataset) -> float:
        """Mean reward of greedy answers to some questions, weighted; reward models are left out.

        To be called by every process; each asks a share where its model is whole.
        """
        launch = Launch() if is_divided(self.model) else this_launch()
        engine = TransformersEngine(unwrapped(self.accelerator.unwrap_model(self.model)), self.processing_class)
        functions = [function for function in self.reward_funcs if not isinstance(function, nn.Module)]
        weights = [float(w) for w, f in zip(self.reward_weights, self.reward_funcs, strict=True) if f in functions]
        scorer = Scorer(functions, weights, self.args.reward_time_limit)
        size = self.args.per_device_eval_batch_size
        longest = self.max_completion_length
        batches = range(0, len(questions), size)[launch.rank :: launch.count]
        share = [p for start in batches for p in range(start, min(start + size, len(questions)))]
        scores: list[float] = []
        if share:
            with attending_by(engine.model, self._plain_attention):
                asked = graded(engine, scorer, questions.select(share), longest, size, self.args.seed)
                scores = [score for *_, score in asked]
        scores = [score for one in launch.gather(scores) for score in one]
        return sum(scores) / len(scores)

    def reference_metrics(self) -> dict[str, float]:
        """What is measured on the held-out questions before training, when the policy is the reference."""
        return self.look_before().metrics

    def held_out_metrics(self) -> dict[str, float]:
        """Mean reward of answers to the held-out questions, all rewards together and each alone."""
        return self.look_now().metrics

    def look_before(self) -> Look:
        """How the model's answers to the held-out questions score, before training."""
        return self.look_now()

    @torch.no_grad()
    def look_now(self) -> Look:
        """How the model's answers to the held-out questions score as it is now."""
        # measuring must not change what training draws
        with evaluating(self.model), undisturbed(self.args.seed):
            measured = self.evaluate()
        names = {"eval_reward": "reward"} | {
            name: name.removeprefix("eval_").removesuffix("/mean")
            for name in measured
            if name.startswith("eval_rewards/") and name.endswith("/mean")
        }
        metrics = {short: float(measured[name]) for name, short in names.items()}
        return Look("reward", metrics, self.rows_of_look)

    def look_blind(self) -> Look | None:
        """None: answers are not asked for without the picture here; `pivot compare` with the probe vqa does."""
        return None

    @property
    def resumable_every(self) -> int:
        """Steps after which no roll-outs are left from an older model, which no checkpoint keeps."""
        generated_for = self.args.steps_per_generation * self.num_iterations
        return math.lcm(generated_for, self.args.gradient_accumulation_steps) // int(
            self.args.gradient_accumulation_steps
        )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # The seams of TRL's trainers

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = self._mode
        inputs = list(inputs)
        output = self._rolled_out(inputs)
        share_alike = self._metrics[mode]["frac_reward_zero_std"][-1]
        if mode == "train" and self.args.redraw:
            output, share_alike = self._filled_up(inputs, output)
        output["row"] = torch.arange(len(inputs), device=output["advantages"].device)
        if mode == "train":
            self._listen(share_alike)
        return output

    def _rolled_out(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL makes of the roll-outs of some questions, without what is about images."""
        rows = self._looked_up(inputs)
        with self._computing(list(range(len(rows)))):
            output = super()._generate_and_score_completions(rows)
        # images of a batch are processed from `_shown`, so that no copy for each roll-out need wait for its turn
        for name in self._forest_collator.image_tokens.image_names | IMAGE_COUNTS:
            output.pop(name, None)
        return output

    def _filled_up(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """A generation batch with other questions in place of those without spread, and the share still without.

        Args:
            inputs: its rows, a group of roll-outs after another; changed to the questions that stand in the end.
            output: what TRL made of them.
        """
        size = self.num_generations
        silent = [group for group, alike in enumerate(self._alike()) if alike]
        groups = [(0, group) for group in range(len(inputs) // size)]
        batches = [output]
        asked = {row["position"] for row in inputs}
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        for _ in range(self.args.redraw):
            others = self._others(asked, len(silent), generator)
            if not silent or not others:
                break
            asked |= set(others)
            fresh = [{"source": 0, "position": position} for position in others for _ in range(size)]
            batches.append(self._rolled_out(fresh))
            with_spread = [group for group, alike in enumerate(self._alike()) if not alike]
            for place, group in zip(list(silent), with_spread, strict=False):
                groups[place] = (len(batches) - 1, group)
                inputs[place * size : (place + 1) * size] = fresh[group * size : (group + 1) * size]
                silent.remove(place)
        if len(batches) > 1:
            taken = [(batch, group * size + row) for batch, group in groups for row in range(size)]
            output = put_together(batches, taken, self._tokenizer.pad_token_id)
            # images are looked up by the place of a row in the batch
            self._looked_up(inputs)
        redrawn = sum(len(batch["advantages"]) for batch in batches[1:]) // size
        self._metrics["train"]["redrawn_questions"].append(float(redrawn))
        return output, len(silent) / len(groups)

    def _others(self, asked: set[int], count: int, generator: torch.Generator) -> list[int]:
        """Positions of questions that the batch has not asked, fewer where there are no more."""
        free = [position for position in range(len(self._sources[0])) if position not in asked]
        order = torch.randperm(len(free), generator=generator)[:count].tolist()
        return [free[index] for index in order]

    def _alike(self) -> list[bool]:
        """For each group of the roll-outs that were scored last, whether all score alike."""
        return silent_groups(self._rewards, self.reward_weights, self.num_generations)

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = self._shown[self._mode].reworded
        prompts = [own[row]["prompt"] if row in own else prompt for row, prompt in enumerate(prompts)]
        self._rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, *args, **kwargs)
        if self._mode == "eval":
            weights = self.reward_weights.to(self._rewards.device)
            self._looked.append((self._rewards * weights).nansum(dim=1).float().cpu().numpy())
        return self._rewards

    def _looked_up(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The questions that TRL's rows stand for, each read once; their images are processed once."""
        # 1. each question once, by where it stands
        pointers = [(row["source"], row["position"]) for row in inputs]
        questions = {
            (source, position): self._sources[source][position] for source, position in dict.fromkeys(pointers)
        }

        image_tokens = self._forest_collator.image_tokens
        for question in questions.values():
            if not self._generates_here:
                image_tokens.control_text.refuse(question, NO_PLAIN_TEXT)

        # 2. each image set once
        image_sets = {row["image_key"]: row["images"] for row in questions.values() if row["images"]}
        set_number = {key: number for number, key in enumerate(image_sets)}

        # 3. a row per roll-out; TRL is given other words for the names of control tokens, rewards the question's own
        told = {pointer: image_tokens.reworded(question) for pointer, question in questions.items()}
        rows = [dict(told[pointer]) for pointer in pointers]
        reworded = {
            number: questions[pointer]
            for number, pointer in enumerate(pointers)
            if told[pointer] is not questions[pointer]
        }
        question_number = {pointer: number for number, pointer in enumerate(questions)}
        self._shown[self._mode] = _Shown(
            self._forest_collator,
            questions=[question_number[pointer] for pointer in pointers],
            names=[f"question {row['id']}" for row in rows],
            sets=[set_number.get(row.pop("image_key"), -1) for row in rows],
            images=list(image_sets.values()),
            reworded=reworded,
        )
        return rows

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # of each question once; its images are processed with it
        repeats = self._repeats()
        prompt_ids, images, fields = super()._tokenize_prompts(prompts[::repeats])
        # processors take no None for a prompt without images beside others with some
        images = images and [of_prompt or [] for of_prompt in images]
        prompt_ids, fields = self._in_own_words(prompt_ids, fields, repeats)
        return _repeated(prompt_ids, repeats), images and _repeated(images, repeats), fields

    def _in_own_words(
        self, prompt_ids: list[list[int]], fields: dict[str, Any], repeats: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Prompts as tokens in the words of their questions, and what else the processor says of each token.

        Args:
            prompt_ids: of the questions as TRL was given them.
            fields: other outputs of the processor; lists of numbers for each prompt are about its tokens.
            repeats: rows of the batch that each prompt stands for.
        """
        shown = self._shown[self._mode]
        changed = {row // repeats: question for row, question in shown.reworded.items() if row % repeats == 0}
        # an answer to a tool is about other prompts
        if not changed or len(prompt_ids) * repeats != len(shown.sets):
            return prompt_ids, fields
        image_tokens = self._forest_collator.image_tokens
        images = shown.processed(range(len(shown.images)))
        prompt_ids = list(prompt_ids)
        for prompt, question in changed.items():
            expansions = images.expansions_of(shown.sets[prompt * repeats]) or []
            prompt_ids[prompt] = image_tokens.question(question, expansions, prompt_ids[prompt])
        types = [image_tokens.token_types(torch.tensor([ids])) for ids in prompt_ids]
        about_tokens = {name: [of_prompt[name][0].tolist() for of_prompt in types] for name in types[0]}
        return prompt_ids, fields | {name: value for name, value in about_tokens.items() if name in fields}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        shown, repeats = self._shown[self._mode], self._repeats()
        # an answer to a tool is about other prompts
        model = self._prefill.model
        if not self._generates_here or len(prompt_ids) != len(shown.sets):
            with attending_by(model, self._plain_attention):
                return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        images_of_all = shown.processed(range(len(shown.images)))
        prompt_images = PromptImages(
            token_counts=[sum(counts) for counts in images_of_all.counts],
            shown=[number for number in shown.sets[::repeats] if number >= 0],
            inputs={
                name: forward.as_model_takes(value.to(model.device), model)
                for name, value in images_of_all.inputs.items()
            },
        )
        of_trl: Any = self.generation_config
        self.generation_config = copy.copy(of_trl)
        self.generation_config.num_return_sequences = repeats
        if self._mode == "eval" and self.args.num_generations_eval == 1:
            # one drawn answer tells looks apart by luck
            self.generation_config.do_sample = False
            for only_of_sampling in ("temperature", "top_p", "top_k", "min_p"):
                setattr(self.generation_config, only_of_sampling, None)
        try:
            with attending_by(model, self._plain_attention), self._prefill.of(repeats, prompt_images):
                return super()._generate_single_turn(
                    prompt_ids[::repeats], images and images[::repeats], *args, **kwargs
                )
        finally:
            self.generation_config = of_trl

    @property
    def _generates_here(self) -> bool:
        """Whether roll-outs come from `generate` of the model itself."""
        return not (self.use_vllm or self.use_transformers_continuous_batching)

    def _repeats(self) -> int:
        """Roll-outs of a prompt that can be drawn together: a divisor of the length of every group of this batch.

        TRL's batches have a row for each roll-out, those of a question in a row. A process can have part of a group.
        """
        if not self._generates_here or getattr(self, "tools", None):
            return 1
        return math.gcd(*(len(list(group)) for _, group in itertools.groupby(self._shown[self._mode].questions)))

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **about_images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As the parent's, from the forest. The images come from the generation batch, processed once per set."""
        assert self._rows_now is not None
        options = {"output_router_logits": True} if compute_aux_loss else {}
        size = batch_size or len(input_ids)
        logps, entropies, aux_losses = [], [], []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            batch = self._forest(self._rows_now[part], input_ids[part], attention_mask[part], logits_to_keep)
            if not len(batch.forest.edge_token):
                zeros = torch.zeros(len(input_ids[part]), logits_to_keep, device=input_ids.device)
                logps.append(zeros)
                entropies.append(zeros)
                continue
            with self.accelerator.autocast():
                outputs = model(forest=batch, **options)
            logps.append(_padded_to(logits_to_keep, outputs.log_probs))
            if compute_entropy:
                entropies.append(_padded_to(logits_to_keep, outputs.entropy))
            if compute_aux_loss:
                aux_losses.append(outputs.aux_loss)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if aux_losses else None,
        )

    def _forest(self, rows: list[int], ids: torch.Tensor, mask: torch.Tensor, completion_width: int) -> ForestBatch:
        """The forest of some roll-outs: prompts padded on the left, completions of that width on the right."""
        shown = self._shown[self._mode]
        real = mask.bool().cpu()
        sequences = [tokens[keep].tolist() for tokens, keep in zip(ids.cpu(), real, strict=True)]
        starts = real[:, :-completion_width].sum(dim=1).tolist()
        sets = sorted({shown.sets[row] for row in rows} - {-1})
        images = shown.processed(sets)
        number = {-1: -1} | {of_generation: of_batch for of_batch, of_generation in enumerate(sets)}
        image_sets = ImageSets(images.inputs, images.counts, [number[shown.sets[row]] for row in rows])
        return self._forest_collator.batch_of(sequences, starts, image_sets, [shown.names[row] for row in rows])

    generation_config: Any
    _buffered_inputs: list[dict[str, Any]] | None

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        of_trl = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=of_trl.data_source,
            mini_repeat_count=of_trl.mini_repeat_count,
            batch_size=of_trl.batch_size,
            repeat_count=of_trl.repeat_count,
            shuffle=of_trl.shuffle,
            seed=of_trl.seed,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # TRL's own `_prepare_inputs`, in training, is given the rows of a whole generation batch and (1) scores their
        # roll-outs once and buffers them for `steps_per_generation * num_iterations` steps, (2) shuffles them over the
        # whole generation batch, so that those of a question are scattered, and (3) splits them into
        # `steps_per_generation` batches of equal size, of which step n takes the (n mod steps)-th. A new buffer is a
        # new list: it is sorted by question and split again, once, and the step takes its batch from that.
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if self._mode == "eval" or buffered is None or buffered is before or not self.args.group_rollouts:
            return inputs
        self._buffered_inputs = _together(buffered, self._shown["train"].questions)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        shown = self._shown[self._mode]
        rows: list[int] = inputs["row"].tolist()
        with self._computing(rows):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # roll-outs that all scored alike give no gradient, whatever they show
        images = any(shown.sets[row] >= 0 for row in rows) and bool(inputs["advantages"].any())
        return self._checked(loss, model, [shown.names[row] for row in rows], images)

    @contextmanager
    def _computing(self, rows: list[int]) -> Iterator[None]:
        """Log-probabilities asked for meanwhile are those of these rows of the generation batch."""
        self._rows_now = rows
        try:
            yield
        finally:
            self._rows_now = None

    def _listen(self, share_alike: float) -> None:
        """Say once that rewards tell no roll-outs apart, where they do not for some batches in a row."""
        self._silent = self._silent + 1 if share_alike == 1.0 else 0
        if self._silent == SILENT_BATCHES and not self._told:
            self._told = True
            logger.warning(
                "In %d batches in a row all roll-outs of each question scored alike, so nothing is learnt from them. "
                "The questions are too hard or too easy for the model, or the rewards too coarse: sample more "
                "roll-outs (num_generations), raise the temperature, or add a finer reward.",
                SILENT_BATCHES,
            )


class PivotGRPOTrainer(Rollouts, GRPOTrainer):
    """Group-relative policy optimisation of an MLLM's vision tower; arguments as `Rollouts`.

    Source: Shao et al. 2024 (GRPO); TRL's GRPOTrainer.
    """


class PivotRLOOTrainer(Rollouts, RLOOTrainer):
    """REINFORCE leave-one-out on an MLLM's vision tower; arguments as `Rollouts`.

    Source: Ahmadian et al. 2024 (RLOO); TRL's RLOOTrainer.
    """


def _guarded(function: object, time_limit: float) -> object:
    is_model = isinstance(function, str | nn.Module)
    return function if is_model or not callable(function) else GuardedReward(function, time_limit)


def _repeated(values: Sequence[Any], repeats: int) -> list[Any]:
    return [value for value in values for _ in range(repeats)]


def _padded_to(width: int, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(values, (0, width - values.shape[1]))


def _together(batches: Sequence[Mapping[str, Any]], questions: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of some batches, split anew so that those of a question stand together.

    Args:
        batches: of equal size; tensors by row, or single numbers.
        questions: for each row of the generation batch the number of its question.
    """
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    # in the order in which a shuffled batch meets the questions
    turn: dict[int, int] = {}
    for row in rows:
        turn.setdefault(questions[row], len(turn))
    order = sorted(range(len(rows)), key=lambda index: turn[questions[rows[index]]])
    merged = {
        name: value if value is None or value.ndim == 0 else torch.cat([batch[name] for batch in batches])[order]
        for name, value in batches[0].items()
    }
    return list(split_tensor_dict(merged, len(batches)))
