"""The model card: what the encoder is, how to load it, what was measured, on what it was trained."""

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pivot_plugin import __version__
from pivot_plugin.verdict import READABLE, Verdict, is_constant, words_of

from .downloading import answered

logger = logging.getLogger(__name__)

TAG = "pivot"
FAMILY_TAG = "pivot-family-"
CARD = "README.md"
PICTURE = "saliency.png"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def card(
    record: Mapping[str, Any],
    usage: str = "",
    encoder_module: str | None = None,
    *,
    sections: Sequence[str] = (),
    picture: bool = False,
) -> ModelCard:
    """The card of an encoder's folder, from its provenance.

    Args:
        record: provenance, as `pivot.json` has it.
        usage: lines of Python that read the encoder, as its adapter knows them; of a LoRA there are none.
        encoder_module: where the encoder's class is, if AutoModel does not know it.
        sections: markdown of plugins.
        picture: whether a picture of saliency maps lies beside it.
    """
    base, data, metrics = (record.get(name) or {} for name in ("base", "data", "metrics"))
    lora = record.get("weights") == "lora"
    # taken out of an MLLM that others may have trained: nothing is known of how
    extracted = bool(record.get("extracted"))
    title = f"{record.get('encoder_class')} {'of an MLLM' if extracted else 'after preference optimisation'}"
    metadata = ModelCardData(
        base_model=_repo(base.get("encoder")) or _repo(base.get("mllm")),
        library_name="peft" if lora else "transformers",
        license=str(record.get("license") or "other"),
        pipeline_tag="image-feature-extraction",
        tags=[TAG, *([] if extracted else ["trl"]), f"{FAMILY_TAG}{record.get('family')}", *(["lora"] if lora else [])],
        datasets=[dataset] if (dataset := _repo(data.get("name"))) else None,
        model_name=title,
        eval_results=_results(record) or None,
        base_model_relation="adapter" if lora else "finetune",
    )
    layer = record.get("feature_layer")
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=title,
        extracted=extracted,
        compared_with=record.get("compared_with"),
        change=record.get("change") or {},
        mllm=base.get("mllm") or record.get("mllm_class"),
        mllm_class=record.get("mllm_class"),
        encoder_class=record.get("encoder_class"),
        saved_with=record.get("versions", {}).get("transformers"),
        made_with=record.get("versions", {}).get("pivot_plugin"),
        reads="its last output" if layer is None else f"hidden state {layer}",
        lora=lora,
        contract=record.get("contract") or {},
        loader=record.get("encoder_class") if encoder_module else "AutoModel",
        encoder_module=encoder_module,
        usage=usage,
        metrics=metrics,
        verdict=Verdict.from_dict(record.get("verdict")),
        readable=READABLE,
        words_of=words_of,
        is_constant=is_constant,
        metric_names=sorted({name for values in metrics.values() for name in values}),
        probes=record.get("probes") or {},
        picture=PICTURE if picture else "",
        data=data,
        rows=f"{data['rows']:,}" if isinstance(data.get("rows"), int) else None,
        fingerprint=str(data.get("fingerprint"))[:16],
        settings=record.get("settings") or {},
        sections=[section.strip() for section in sections if section.strip()],
        version=__version__,
        code=_code,
        text=_text,
        drawn=_drawn,
        number=_number,
        scored=_scored,
    )


def licence_of(base: str) -> str | None:
    """The licence of a base model, from its card in a folder or on the Hub; None where it is not known.

    Args:
        base: folder or Hub id.
    """
    if not base:
        return None
    card = Path(base) / "README.md"
    if Path(base).is_dir() and not card.is_file():
        return None
    try:
        licence = answered(lambda: ModelCard.load(card if card.is_file() else base)).data.license
    # of a stranger's card or a Hub that fails: an encoder that is paid for is saved all the same
    except Exception as error:
        logger.info("The licence of %s is not known (%s).", base, type(error).__name__)
        return None
    return str(licence) if licence else None


def _repo(name: object) -> str | None:
    """A name that can be a Hub id, for metadata that links there."""
    text = str(name or "")
    return text if _REPO.fullmatch(text) and not text.startswith(".") else None


def _code(value: object) -> str:
    """A value from a record as text that no markdown or HTML can hide in."""
    text = html.escape(str(value), quote=False).replace("`", "'").replace("\n", " ")
    return f"`{text[:200]}`"


def _text(value: object) -> str:
    """Words from a record, in which code may be marked, as a cell of a table that nothing can break out of."""
    text = html.escape(str(value), quote=False).replace("|", "/").replace("\n", " ").replace("[", "(").replace("]", ")")
    return text[:600]


def _drawn(line: object) -> str:
    """A line from a record inside a block of code, which nothing can break out of."""
    return str(line).replace("`", "'").replace("\n", " ")[:200]


def _scored(score: object) -> str:
    if not isinstance(score, Mapping):
        return ""
    value, low, high = (score.get(name) for name in ("value", "low", "high"))
    return f"{_number(value)} ({_number(low)} to {_number(high)})" if low != high else _number(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _results(record: Mapping[str, Any]) -> list[EvalResult]:
    """For `model-index`: held-out metrics and probe scores after training."""
    data = str((record.get("data") or {}).get("name") or "preference pairs")
    results = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="preference optimisation",
            dataset_type=data,
            dataset_name=f"held-out rows of {data}",
            metric_type=name,
            metric_value=round(float(value), 6),
        )
        for name, value in ((record.get("metrics") or {}).get("after") or {}).items()
    ]
    for label, scores in (record.get("probes") or {}).items():
        for name, values in scores.items():
            if isinstance(values.get("after"), Mapping):
                results.append(
                    EvalResult(
                        task_type="image-feature-extraction",
                        task_name=f"probe {label}",
                        dataset_type=str(label),
                        dataset_name=str(label),
                        metric_type=str(name),
                        metric_value=round(float(values["after"]["value"]), 6),
                    )
                )
    return results
