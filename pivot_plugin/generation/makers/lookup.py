"""Makers by name: the built-in ones through the hook that everyone's come through."""

from collections.abc import Mapping

from pivot_plugin.errors import PluginError, SettingsError
from pivot_plugin.hooks import hookimpl, named, offered
from pivot_plugin.hooks.manager import DISABLE_VARIABLE

from . import captions, comparing, geometry
from .protocol import Maker

HOOK = "pivot_makers"
BUILT_IN: dict[str, Maker] = {**geometry.MAKERS, **comparing.MAKERS, **captions.MAKERS}


@hookimpl
def pivot_makers() -> Mapping[str, Maker]:
    """The built-in makers of questions."""
    return BUILT_IN


def makers() -> dict[str, Maker]:
    """Every maker there is, by name, those of plugins among them."""
    return {name: _checked(name, maker) for name, maker in offered(HOOK).items()}


def maker_of(name: str, difficulty: float, rejected: bool = False) -> Maker:
    """A maker by its name, able to make what is wanted.

    Args:
        name: of the maker.
        difficulty: to be made.
        rejected: whether rejected pictures are wanted, else questions.

    Raises:
        SettingsError: if there is none of that name, it makes something else, or not of that difficulty.
        PluginError: if a plugin offers something else under that name.
    """
    maker = _checked(name, named(HOOK, name, "maker"))
    if (maker.rejected if rejected else maker.questions) is None:
        makes, wanted = ("questions", "rejected pictures") if rejected else ("rejected pictures", "questions")
        fitting = [one.name for one in makers().values() if (one.rejected if rejected else one.questions) is not None]
        raise SettingsError(
            f"The maker {name!r} makes {makes}, and {wanted} are wanted.", f"Choose one of {', '.join(fitting)}."
        )
    lowest, highest = maker.difficulty
    # not a number lies in no range
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | float) or not lowest <= difficulty <= highest:
        raise SettingsError(
            f"difficulty is {difficulty!r}, and the maker {name!r} makes {lowest:g} to {highest:g}.",
            f"Give a number from {lowest:g} (easy) to {highest:g} (hard).",
        )
    return maker


def _checked(name: str, maker: object) -> Maker:
    if not isinstance(maker, Maker):
        raise PluginError(
            f"A plugin offers a {type(maker).__name__} as the maker {name!r}.",
            f"It must be a pivot_plugin.generation.makers.Maker; mend or disable it ({DISABLE_VARIABLE}).",
        )
    return maker
