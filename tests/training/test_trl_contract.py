"""What we lean on in TRL, transformers and peft. A failure here names the release that moved it."""

import inspect
import re
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from transformers import Trainer, cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, GenerationMixin
from trl import DPOConfig, DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from pivot_plugin.objectives import loss_types
from pivot_plugin.training.rollout_trainer import IMAGE_COUNTS

VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def in_order(source: str, *calls: str) -> None:
    """Make sure that a function's text has these calls, each for the first time behind the one before."""
    places = [source.find(call) for call in calls]
    assert min(places) >= 0, f"{VERSIONS}: {calls[places.index(-1)] if -1 in places else calls}"
    assert places == sorted(places), f"{VERSIONS}: {sorted(zip(places, calls, strict=True))}"


def test_trl_asks_the_model_once_with_labels_and_a_fused_head() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert source.count("model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1, VERSIONS
    assert 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]' in source, VERSIONS


def test_trl_reads_only_the_fields_we_answer_with() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    fields = {
        line.split("outputs.")[1].split("[")[0].split()[0].strip(",)")
        for line in source.splitlines()
        if "outputs." in line and "#" not in line.split("outputs.")[0] and "ref_outputs" not in line
    }
    known = {"log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "aux_loss"}
    assert {"log_probs"} <= fields <= known, f"{VERSIONS}: {fields}"


def test_the_fused_head_scores_labels_that_are_already_shifted() -> None:
    assert "shift_labels" in inspect.getsource(add_fused_lm_head), VERSIONS
    assert {"log_probs", "entropy", "mean_logits", "is_top1"} <= set(FusedCausalLMOutput.__dataclass_fields__), VERSIONS


def test_the_tokens_of_a_step_are_counted_and_divided_by_where_we_rely_on_it() -> None:
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in source, VERSIONS
    assert "self.model_accepts_loss_kwargs" in inspect.getsource(Trainer._get_num_items_in_batch), VERSIONS
    # accumulated losses of pairs are divided by how many there are, whatever was counted
    assert DPOTrainer.loss_is_scaled_for_ga is False, VERSIONS
    assert "num_items_in_batch" not in inspect.getsource(DPOTrainer._compute_loss), VERSIONS


def test_trl_prepares_rows_and_references_where_we_override_it() -> None:
    initialiser = inspect.getsource(DPOTrainer.__init__)
    in_order(
        initialiser,
        "get_peft_model(",
        "self._prepare_dataset(",
        "super().__init__(",
        "add_fused_lm_head(",
        "self._precompute_ref_logps(",
    )
    parameters = list(inspect.signature(DPOTrainer._precompute_ref_logps).parameters)
    assert parameters == ["self", "dataset", "name", "batch_size"], VERSIONS
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"], VERSIONS


def test_trl_calls_a_data_set_a_vision_one_by_its_columns_alone() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    assert 'self._is_vision_dataset = "image" in dataset_sample or "images" in dataset_sample' in source, VERSIONS


def test_the_trainer_writes_its_state_last_into_a_checkpoint() -> None:
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    state = source.index("self.state.save_to_json(")
    for earlier in ("self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_rng_state("):
        assert source.index(earlier) < state, f"{VERSIONS}: {earlier}"


def test_a_prepared_four_dimensional_mask_is_used_as_it_is() -> None:
    from transformers.masking_utils import create_causal_mask

    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    config._attn_implementation = "sdpa"
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    found = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 3, 8),
        attention_mask=mask,
        past_key_values=None,
        position_ids=torch.arange(3)[None],
    )
    assert found is mask, VERSIONS


def test_defaults_we_build_on_are_still_trl_defaults() -> None:
    assert DPOConfig.__dataclass_fields__["beta"].default == 0.1, VERSIONS
    assert hasattr(dpo_trainer, "DataCollatorForVisionPreference"), VERSIONS


def test_trl_has_these_loss_types_and_no_others() -> None:
    """`objectives.loss_types` reads them off a help text."""
    named = (
        "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
        "discopop sft"
    )
    assert set(loss_types()) == set(named.split()), VERSIONS
    source = inspect.getsource(DPOTrainer._compute_loss)
    for name in loss_types():
        assert f'loss_type == "{name}"' in source, f"{VERSIONS}: {name}"


ROLLOUTS = pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])


@ROLLOUTS
def test_trl_loads_a_reference_by_name_only_where_beta_is_not_zero(trainer: Any) -> None:
    initialiser = inspect.getsource(trainer.__init__)
    in_order(initialiser, "get_peft_model(", "super().__init__(", "self.beta = args.beta", "add_fused_lm_head(")
    reference = initialiser[initialiser.index("self.beta = args.beta") :]
    in_order(reference, "if self.beta == 0.0:", "self.ref_model = None", "self.ref_model = create_model_from_path(")
    # whatever else looked at beta would see the 0 that stands there while the constructor runs
    looks = [line.strip() for line in initialiser.splitlines() if "self.beta" in line or "args.beta" in line]
    assert set(looks) <= {
        "elif is_peft_model(model) and args.beta != 0.0:",
        "self.beta = args.beta",
        "if self.beta == 0.0:",
    }, f"{VERSIONS}: {looks}"
    for method in ("_generate_and_score_completions", "_prepare_inputs", "_get_per_token_logps_and_entropies"):
        assert f"self.{method}(" not in initialiser, f"{VERSIONS}: {method}"


@ROLLOUTS
def test_trl_buffers_a_generation_batch_shuffled_and_split(trainer: Any) -> None:
    source = inspect.getsource(trainer._prepare_inputs)
    in_order(
        source,
        'mode = "train" if self.model.training else "eval"',
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "self._generate_and_score_completions(generation_batch)",
        "shuffle_sequence_dict(generation_batch)",
        "split_tensor_dict(generation_batch, self.args.steps_per_generation)",
        "self._buffered_inputs = [",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    )


@ROLLOUTS
def test_trl_keeps_what_a_processor_gives_about_images_and_two_counts(trainer: Any) -> None:
    source = inspect.getsource(trainer._generate_and_score_completions)
    handed_on = set(re.findall(r'output\["(\w+)"\] = forward_kwargs\["\1"\]', source))
    assert {"pixel_values", "image_grid_thw", "mm_token_type_ids"} <= handed_on, VERSIONS
    counts = set(re.findall(r'output\["(num_\w+)"\]', source))
    assert counts == IMAGE_COUNTS, VERSIONS


@ROLLOUTS
def test_trl_draws_from_what_it_tokenized_by_generate_of_the_model(trainer: Any) -> None:
    """Each distinct prompt is tokenized once and handed on once, with `num_return_sequences` for the rest."""
    in_order(
        inspect.getsource(trainer._generate),
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
        "self._generate_single_turn(",
    )
    source = inspect.getsource(trainer._generate_single_turn)
    in_order(
        source,
        "if self.use_vllm:",
        "elif self.use_transformers_continuous_batching:",
        "for k, v in multimodal_fields.items():",
        "unwrapped_model.generate(",
        "**generate_inputs, generation_config=self.generation_config",
        'prompt_length = generate_inputs["input_ids"].size(1)',
    )
    # rows are counted by the completions, of which there are more than prompts
    assert "is_eos.size(0)" in source, VERSIONS
    assert "multimodal_fields" not in inspect.getsource(trainer._generate_and_score_completions), VERSIONS


def test_generate_prefills_by_a_method_behind_one_that_repeats_prompts() -> None:
    in_order(
        inspect.getsource(GenerationMixin.generate),
        "self._prepare_position_ids_for_generation(",
        "self._expand_inputs_for_generation(",
        "self._prepare_cache_for_generation(",
        "self._get_logits_processor(",
        "decoding_method(",
    )
    source = inspect.getsource(GenerationMixin._sample)
    assert source.count("self._prefill(") == 1, VERSIONS
    in_order(
        source,
        "model_forward = (",
        "self._prefill(",
        "self.prepare_inputs_for_generation(",
        "model_forward(**model_inputs, return_dict=True)",
        "self._update_model_kwargs_for_generation(",
        "outputs.logits[:, -1]",
        "torch.multinomial(probs, num_samples=1)",
    )
    assert list(inspect.signature(GenerationMixin._prefill).parameters)[:4] == [
        "self",
        "input_ids",
        "generation_config",
        "model_kwargs",
    ], VERSIONS
    expanded = list(inspect.signature(GenerationMixin._expand_inputs_for_generation).parameters)
    assert expanded == ["self", "expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"], VERSIONS
    assert {"pixel_values", "image_sizes"} <= set(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL), VERSIONS


def test_a_cache_of_every_kind_repeats_its_rows_by_index() -> None:
    kinds = {*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values(), *cache_utils.STATIC_LAYER_TYPE_MAPPING.values()}
    assert len(kinds) > 8, VERSIONS
    assert all(hasattr(kind, "reorder_cache") for kind in kinds), VERSIONS
    for kind in (DynamicLayer, StaticLayer):
        layer = kind(max_cache_len=4)
        layer.update(*torch.arange(12.0).reshape(2, 2, 1, 3, 1))
        layer.reorder_cache(torch.tensor([0, 0, 1, 1, 1]) % len(layer.keys))
        assert len(layer.keys) == len(layer.values) == 5, VERSIONS


def test_a_dynamic_layer_keeps_what_it_is_given_in_order() -> None:
    """So that the columns of a tree's mask are its prompt, and then a token of each completion a step."""
    layer = DynamicLayer()
    steps = [torch.randn(2, 1, length, 4) for length in (5, 3, 3)]
    for step in steps:
        layer.update(step, step)
    assert torch.equal(layer.keys, torch.cat(steps, dim=2)), VERSIONS
