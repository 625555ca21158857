"""What recipes can name of the embedded world."""

from collections.abc import Callable, Mapping

from pivot_plugin.hooks import hookimpl

from . import miniature


@hookimpl
def pivot_sources() -> Mapping[str, Callable[..., object]]:
    return {
        "embedded-encoder": miniature.encoder,
        "embedded-language-model": miniature.language_model,
        "embedded-captions": miniature.captions,
        "embedded-conversations": miniature.conversations,
        "embedded-pairs": miniature.pairs,
        "embedded-questions": miniature.questions,
        "embedded-masks": miniature.masks,
    }
