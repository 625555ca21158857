"""Published PIVOT encoders, found by their tag."""

from dataclasses import dataclass

from huggingface_hub import HfApi

from pivot_plugin.errors import PublishError
from pivot_plugin.hub.secrets import hidden

from .card import FAMILY_TAG, TAG
from .downloading import answered


@dataclass(frozen=True)
class Listed:
    """One published encoder.

    Attributes:
        repo_id: on the Hub.
        base: model it was made of, "" where its card names none.
        family: of the MLLM it was trained in, "" where not named.
        scores: from its card, by "data set: metric".
    """

    repo_id: str
    base: str
    family: str
    scores: dict[str, float]


def list_encoders(author: str | None = None, token: str | None = None, limit: int | None = 100) -> list[Listed]:
    """Published encoders with the tag of this package.

    Args:
        author: user or organisation; all where None.
        token: to see private ones.
        limit: how many at most.

    Raises:
        PublishError: if the Hub cannot be asked.
    """
    try:
        api = HfApi(token=token)
        found = answered(
            lambda: list(api.list_models(filter=TAG, author=author, limit=limit, full=True, cardData=True))
        )
    # the client raises its own errors, those of its HTTP library, and of what it cannot parse
    except Exception as error:
        raise PublishError(f"The Hub could not be asked: {hidden(error, token)}", "Try again later.") from error
    listed = []
    for info in found:
        family = next((tag.removeprefix(FAMILY_TAG) for tag in info.tags or [] if tag.startswith(FAMILY_TAG)), "")
        card = info.card_data
        base = getattr(card, "base_model", None) if card is not None else None
        results = (getattr(card, "eval_results", None) or []) if card is not None else []
        scores = {
            f"{result.dataset_name}: {result.metric_type}": float(result.metric_value)
            for result in results
            if isinstance(result.metric_value, int | float)
        }
        bases = base if isinstance(base, list) else [base]
        listed.append(Listed(info.id, ", ".join(str(one) for one in bases if one), family, scores))
    return listed
