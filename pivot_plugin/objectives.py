"""Objectives by name: the trainer and the settings of TRL's configuration that a word stands for.

Notation: r(y) = log pi(y|x) - log pi_ref(y|x), summed over the tokens of the answer y; w is chosen, l rejected; s is
the logistic function; r(y|m) is r(y) about a picture m. Any loss type of TRL is an objective under its own name too.
Where a row has `rejected_images`, its rejected answer is about them, as in ms-swift; but for mdpo and svco, which hold
both answers against both pictures.
"""

from collections.abc import Callable, Mapping, Sequence

from trl import DPOConfig

from pivot_plugin.errors import SettingsError, unknown
from pivot_plugin.hooks import hookimpl, offered
from pivot_plugin.hooks.types import ObjectivePreset


def dpo() -> ObjectivePreset:
    """Direct preference optimisation: -log s(beta (r(w) - r(l))), beta 0.1.

    When: pairs of the model's own answers whose better ones are far from right (43 % of the facts right: 0.56 of unseen
    questions against SFT's 0.27, benchmarks/README.md), and the paper's own arm for better encoders. Not where chosen
    answers are nearly right or an oracle's: there SFT was as good or better, and on the nearly right ones dpo lowered
    the model's captions at every rate from 1e-4 on. Hold rows out: answers drift in length.
    Source: Rafailov et al. 2023; arXiv 2510.16333, equation 1 (summed log-probabilities, no SFT term).
    """
    return {"loss_type": ["sigmoid"]}


def sft() -> ObjectivePreset:
    """Supervised fine-tuning on the chosen answers alone: their mean negative log-likelihood per token of the batch.

    When: chosen answers are nearly right (at 87 % of the facts, and with an oracle's, it was ahead of dpo); and as the
    fair baseline, on the same pairs in the same order. It learns what is wrong in the chosen answers too. The rejected
    answers are measured, not trained on.
    Source: arXiv 2510.16333, section 3.1. TRL averages over the batch's tokens, so long answers weigh more, alone and
    in a mix; `sft_average="sequence"` averages per answer first, as LLaMA-Factory does.
    """
    return {"loss_type": ["sft"]}


def mpo() -> ObjectivePreset:
    """Mixed preference optimisation: 0.8 dpo + 0.2 quality (BCO) + 1.0 sft.

    When: pure DPO lets the chosen log-probability fall; the SFT term holds it up. Not on own answers that are far from
    right, where that term pulls back to SFT (0.30 of unseen questions, dpo 0.56).
    Source: Wang et al. 2024 (MPO); arXiv 2510.16333, appendix B.1.
    Relations: mpo = 0.8 sigmoid + 0.2 bco_pair + 1.0 sft.
    """
    return {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def specs() -> ObjectivePreset:
    """The cold start of SPECS: dpo + lambda sft with lambda 1.

    When: before RL with verifiable rewards, on self-distilled pairs.
    Source: arXiv 2510.25801, stage 2.
    Relations: specs = 1.0 sigmoid + 1.0 sft.
    """
    return {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}


def ipo() -> ObjectivePreset:
    """Identity preference optimisation: (r(w)/|w| - r(l)/|l| - 1/(2 beta))^2, beta 0.1, per token.

    When: pairs that are nearly always told apart already, where the logistic loss of dpo runs to the limits.
    Source: Azar et al. 2023; averaged over tokens as TRL does.
    """
    return {"loss_type": ["ipo"]}


def dpo_norm() -> ObjectivePreset:
    """Length-normalised DPO: -log s(beta (r(w)/|w| - r(l)/|l|)); TRL's relative of SimPO that keeps the reference.

    When: one side of the pairs is much longer (`pivot prefs check` names the bias). Its margins are per token and so
    smaller, which a larger beta makes up for: 5, as in Tulu 3.
    Source: Lambert et al. 2024 (Tulu 3), after Meng et al. 2024 (SimPO).
    """
    return {"loss_type": ["sigmoid_norm"], "beta": 5.0}


def mdpo() -> ObjectivePreset:
    """Multimodal DPO: pairs of answers, pairs of pictures, and an anchor, each weighing 1.

    dpo + conditional + anchor, where of the chosen answer w and a picture m it is right of, a rejected one m',
    conditional = -log s(beta (r(w|m) - r(w|m'))) and anchor = -log s(beta r(w|m)), beta 0.1.
    When: rows have `rejected_images`, or they are made (`rejected_images="other_picture"`), and answers that words
    alone tell apart would else be learnt without looking. Rejected pictures that look unnatural teach just that.
    Source: arXiv 2406.11839, section 3, and the authors' code; their rejected pictures are crops.
    Relations: mdpo = 1.0 sigmoid + 1.0 conditional + 1.0 anchor (`image_terms`).
    """
    return {"loss_type": ["sigmoid"], "image_terms": ["conditional", "anchor"]}


def svco() -> ObjectivePreset:
    """Symmetrical visual contrastive optimisation: each of two pictures is right for its own answer.

    -log s(beta (r(w|m) - r(w|0))) - log s(beta (r(w|0) - r(w|m'))) and the same of the rejected answer l and the
    rejected picture m', for which it is right: -log s(beta (r(l|m') - r(l|0))) - log s(beta (r(l|0) - r(l|m))), beta
    0.1; 0 is the question without a picture. Answers of one picture are never held against each other.
    When: pairs of nearly equal pictures, `rejected` the right answer to `rejected_images`. Not where the rejected
    answer is wrong of both, as own answers with made pictures are: there mdpo.
    Source: arXiv 2502.13928, section 3, and the authors' code, which has one beta for each comparison, all 0.1.
    Relations: svco = 1.0 attend + 1.0 reject (`image_terms`).
    """
    return {"loss_type": ["sigmoid"], "loss_weights": [0.0], "image_terms": ["attend", "reject"]}


def grpo() -> ObjectivePreset:
    """Group-relative policy optimisation on the model's own roll-outs, with verifiable rewards.

    Each of G roll-outs of a question has the advantage (reward - mean of the group) / spread of the group; clipped
    importance ratios, no KL term. Default rewards: format (0.5) and accuracy (1.0).
    When: questions with answers that can be checked, and no pairs. Where many roll-outs of a question score alike,
    `redraw=` asks others in their place.
    Source: Shao et al. 2024; rewards of arXiv 2510.25801. TRL's GRPOConfig has all settings.
    """
    return {"trainer": "grpo"}


def rloo() -> ObjectivePreset:
    """REINFORCE leave-one-out on the model's own roll-outs: the baseline is the mean of the group's other roll-outs.

    When: as grpo; without its normalisation by the spread, and with a KL term (beta 0.05).
    Source: Ahmadian et al. 2024. TRL's RLOOConfig has all settings.
    """
    return {"trainer": "rloo"}


BUILT_IN: Mapping[str, Callable[[], ObjectivePreset]] = {
    preset.__name__: preset for preset in (dpo, sft, mpo, specs, ipo, dpo_norm, mdpo, svco, grpo, rloo)
}
ONLINE = ("grpo", "rloo")
# Learning rates where weights train themselves. dpo, sft: arXiv 2510.16333, appendix E.1 (all parameters); specs and
# grpo: arXiv 2510.25801, stages 2 and 3; the others follow dpo, whose loss they vary.
WEIGHTS_LEARNING_RATES: Mapping[str, float] = {"sft": 5e-6}
WEIGHTS_LEARNING_RATE = 1e-6
# Learning rates of LoRA: a fifth of what is best on the embedded world (benchmarks/README.md, the arms), a model of
# 0.6 M parameters, where large ones want smaller steps: sft 3e-3; mpo and specs 1e-3. dpo and grpo are as good at 1e-3
# as at 3e-3 within noise, and collapse at 1e-2; they get a fifth of the smaller. On a model's own answers (the map, one
# seed) sft is best at 3e-3, the largest tried, grpo better at 1e-3 than at 3e-3, and dpo loses the less the smaller its
# rate, down to 1e-4, the smallest tried; at dusk dpo is as good at 1e-4 as at 3e-4, and loses a little from 1e-3 on.
LORA_LEARNING_RATES: Mapping[str, float] = {"sft": 6e-4}
LORA_LEARNING_RATE = 2e-4


def learning_rate(objective: str | Sequence[str], lora: bool) -> float:
    """The default learning rate of an objective.

    Args:
        objective: as for `resolve`.
        lora: whether LoRA trains, or weights themselves.
    """
    named = LORA_LEARNING_RATES if lora else WEIGHTS_LEARNING_RATES
    every = LORA_LEARNING_RATE if lora else WEIGHTS_LEARNING_RATE
    return named.get(objective, every) if isinstance(objective, str) else every


@hookimpl
def pivot_objectives() -> Mapping[str, ObjectivePreset]:
    return {name: preset() for name, preset in BUILT_IN.items()}


def loss_types() -> tuple[str, ...]:
    """TRL's loss types, as its configuration names them."""
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    return tuple(part for part in text.split("'")[1::2] if part.isidentifier())


def resolve(objective: str | Sequence[str]) -> ObjectivePreset:
    """The settings an objective stands for.

    Args:
        objective: a name from a plugin or from `BUILT_IN`, a TRL loss type, or a list of TRL loss types.

    Returns:
        settings; `trainer` among them is "grpo" or "rloo" where the model trains on its own roll-outs.

    Raises:
        SettingsError: for an unknown name, with the nearest ones.
    """
    presets = offered("pivot_objectives")
    if isinstance(objective, str) and objective in presets:
        return presets[objective]
    names = [objective] if isinstance(objective, str) else list(objective)
    for name in names:
        if name not in loss_types():
            if name in presets:
                raise SettingsError(
                    f"{name!r} is a preset, and presets cannot stand in a list.",
                    f"Give it alone, or the loss types it stands for: {presets[name].get('loss_type')}.",
                )
            raise unknown("objective", name, [*presets, *loss_types()])
    return {"loss_type": names}
