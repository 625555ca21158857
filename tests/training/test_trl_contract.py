"""What we lean on in TRL, transformers and peft. A failure here names the release that moved it."""

import inspect

import peft
import torch
import transformers
import trl
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


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
    assert fields <= known, f"{VERSIONS}: {fields - known}"


def test_the_fused_head_scores_labels_that_are_already_shifted() -> None:
    assert "shift_labels" in inspect.getsource(add_fused_lm_head), VERSIONS
    assert {"log_probs", "entropy", "mean_logits", "is_top1"} <= set(FusedCausalLMOutput.__dataclass_fields__), VERSIONS


def test_trl_prepares_rows_and_references_where_we_override_it() -> None:
    initialiser = inspect.getsource(DPOTrainer.__init__)
    for call in ("self._prepare_dataset(", "self._precompute_ref_logps(", "add_fused_lm_head("):
        assert call in initialiser, f"{VERSIONS}: {call}"
    assert initialiser.index("add_fused_lm_head(") < initialiser.index("self._precompute_ref_logps("), VERSIONS
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
