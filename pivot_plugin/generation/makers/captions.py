"""Questions from captions: planted_error."""

from .phrases import Replacements, Slot, planted, slots
from .pictures import Picture
from .protocol import Draw, Maker, Question, Unsuitable

FIND_WORDING = (
    'Description: "{caption}"\nOne phrase of it does not fit the picture. Which? Answer with this phrase alone.',
    'Somebody described the picture so: "{caption}" One phrase is wrong. Say which, and nothing else.',
    'Find the mistake in this description of the picture: "{caption}" Answer with the wrong phrase.',
)
CHOOSE_WORDING = (
    "Which description fits the picture?\nA. {first}\nB. {second}\nAnswer A or B.",
    "One of these descriptions of the picture is wrong.\nA. {first}\nB. {second}\nWhich is right? Answer A or B.",
    "A. {first}\nB. {second}\nSay which one describes the picture, A or B.",
)
DESCRIBE_WORDING = ("Describe the picture.", "What does the picture show?", "Write a caption for this picture.")
# from this difficulty on the wrong phrase is to be found, below it one of two descriptions is chosen
FIND_FROM = 0.5


def phrases_needed(difficulty: float) -> int:
    """How many phrases a caption must have: one to be replaced, and another that might have been where one is found."""
    return 2 if difficulty >= FIND_FROM else 1


def no_phrase(picture: Picture, difficulty: float) -> str:
    """Why nothing can be planted in a picture's captions, "" where something can."""
    if not picture.captions:
        return "without a caption"
    needed = phrases_needed(difficulty)
    if all(len(slots(caption)) < needed for caption in picture.captions):
        return "whose captions hold no phrase to replace" if needed == 1 else "whose captions hold fewer than 2 phrases"
    return ""


def planted_error(draw: Draw) -> Question:
    """Which phrase of a caption was replaced by one of its kind; which of two captions is right where easy."""
    replacements = draw.pictures.once(
        "replacements", lambda: Replacements([picture.captions for picture in draw.pictures])
    )
    picture = draw.picture
    caption = draw.random.choice(picture.captions)
    found = replacements.slots(caption)
    if len(found) < phrases_needed(draw.difficulty):
        raise Unsuitable("its caption holds too few phrases that others could take the place of")
    slot = draw.random.choice(found)
    word = _replacement(draw, slot, replacements)
    if any(word == other.word for other in slots(caption)):
        raise Unsuitable("the phrase stands in the caption already")
    wrong_caption = planted(caption, slot, word)
    pair = (draw.random.choice(DESCRIBE_WORDING), caption, wrong_caption)
    if draw.difficulty < FIND_FROM:
        right, wrong = draw.answer(("A", "B"))
        first, second = (caption, wrong_caption) if right == "A" else (wrong_caption, caption)
        prompt = draw.random.choice(CHOOSE_WORDING).format(first=first, second=second)
        return Question([picture.source], prompt, right, wrong, pair=pair)
    others = [other for other in found if other != slot]
    draw.random.shuffle(others)
    prompt = draw.random.choice(FIND_WORDING).format(caption=wrong_caption)
    return Question([picture.source], prompt, word, [other.word for other in others], pair=pair)


def _replacement(draw: Draw, slot: Slot, replacements: Replacements) -> str:
    words, probable = replacements.of(slot.word)
    drawn = draw.random.random()
    for word, share in zip(words, probable, strict=True):
        drawn -= share
        if drawn < 0:
            return word
    raise Unsuitable("its phrase is said too often to be replaced every time")


MAKERS = {
    "planted_error": Maker(
        "planted_error",
        "ViCrit, arXiv 2506.10128",
        planted_error,
        needs_caption=True,
        cannot_use=no_phrase,
    )
}
