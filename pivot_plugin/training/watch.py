"""The watch: what is looked at while a run goes on, and said when it goes wrong.

The best checkpoint and the early stop are transformers' own (`load_best_model_at_end`, `EarlyStoppingCallback`). Here
stands what they do not know: that DPO can raise the margin while the chosen answers, too, become less probable.
"""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.training_args import TrainingArguments

logger = logging.getLogger(__name__)

# a fall of the chosen answers' mean log-probability that is worth a word: nats, and share of the reference's
COLLAPSE_NATS, COLLAPSE_SHARE = 1.0, 0.1


class Watch(TrainerCallback, ExportableState):
    """Follows the chosen log-probability against the reference, in the log under `watch/chosen_logps_change` (nats).

    A fall by more than 1 nat and a tenth of the reference's is said once.

    Args:
        beta: by which TRL has multiplied the log-probability ratios that it logs as rewards.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._told = False

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"args": {"beta": self._beta}, "attributes": {"_told": self._told}}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        # TRL's logps stand in the log under the same prefix as its rewards
        prefix = "eval_" if "eval_rewards/chosen" in logs else ""
        if f"{prefix}rewards/chosen" not in logs or not self._beta:
            return
        change = float(logs[f"{prefix}rewards/chosen"]) / self._beta
        if state.log_history:
            state.log_history[-1]["watch/chosen_logps_change"] = change
        now = float(logs.get(f"{prefix}logps/chosen", 0.0))
        before = now - change
        if self._told or change > -max(COLLAPSE_NATS, COLLAPSE_SHARE * abs(before)):
            return
        self._told = True
        if state.log_history:
            state.log_history[-1]["watch/collapse"] = change
        if state.is_world_process_zero:
            logger.warning(
                "Step %d: the mean log-probability of the %schosen answers fell from %.2f to %.2f. The margin can grow "
                'all the same, by making both answers less probable. objective="mpo" or "specs" holds it up; so '
                "does a lower learning rate or a larger beta.",
                state.global_step,
                "held-out " if prefix else "",
                before,
                now,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.log_history:
            return
        last = state.log_history[-1]
        if state.best_global_step is not None:
            last["watch/best_step"] = state.best_global_step
        if state.global_step < state.max_steps:
            last["watch/stopped_early_at"] = state.global_step
            if state.is_world_process_zero:
                logger.warning(
                    "Stopped at step %d of %d: held-out %s was best (%.4g) at step %s, and fell short of it, look "
                    "after look, by more than the noise of the rows. patience=None (--set patience=none) runs to the "
                    "end.",
                    state.global_step,
                    state.max_steps,
                    args.metric_for_best_model,
                    state.best_metric or 0.0,
                    state.best_global_step,
                )
