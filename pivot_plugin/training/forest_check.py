"""The check before training: a forest is what the model itself computes, shown on some of the user's rows.

Every sequence of these rows also goes through the model's own forward pass, as its own processor prepares it, and its
own head. Compared are, in this order:

    tokens       of the prompt, images expanded                     exactly
    inputs       of the decoder's layers: positions and masks       exactly, in whatever precision the model is
                 and embeddings                                     up to rounding
    log-probabilities of every scored token                         up to rounding, computed in float32 where memory
                                                                    allows it, so that half precision hides nothing

Who sees whom is read off the plain passes on the way (attention.py). Trees stand in one row; a model that differs there
gets a row per tree, one that differs in that a row per sequence, each compared in the same way, and one that differs
there too is refused.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.data.pairs import PairStream
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.errors import ModelError, said
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.image_tokens import SEQUENCE, ImageTokens

from .attention import FLEX, FLEX_BLOCK, NotATree, attend_by, observed
from .batch import ForestBatch, ForestCollator, shown_by
from .decoder_inputs import DecoderInputs, recorded
from .forest import RowLayout
from .forward import ForestReading, TokenTypes, answering, on_model, reading_of

logger = logging.getLogger(__name__)

# per token, natural logarithms
EXACT, ROUNDED = 1e-4, 0.05
# rows among which different ones are looked for
LOOKED_AT, LOOKED_AT_OF_STREAM, SIZES_LOOKED_AT = 2000, 16, 8
# of an embedding's length
EMBEDDING_EXACT, EMBEDDING_ROUNDED = 1e-4, 0.06


@dataclass(frozen=True)
class CheckedSequence:
    """A sequence as the model's own processor and forward pass take it.

    Attributes:
        name: of its row, for errors.
        outputs: of the processor, for the prompt with its images.
        completion: token ids of the answer.
    """

    name: str
    outputs: Mapping[str, Any]
    completion: Sequence[int]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return int(self.outputs["input_ids"].shape[1])

    @property
    def tokens(self) -> torch.Tensor:
        """(L,) token ids."""
        return torch.cat([self.outputs["input_ids"][0], torch.tensor(self.completion, dtype=torch.long)])

    @property
    def types(self) -> dict[str, torch.Tensor]:
        """What the processor says of each token of the prompt beside its id, by name: (P,) integers."""
        shape = self.outputs["input_ids"].shape
        return {
            name: value[0]
            for name, value in self.outputs.items()
            if name not in SEQUENCE and getattr(value, "shape", None) == shape and not value.is_floating_point()
        }

    def inputs(self, types: Mapping[str, TokenTypes]) -> dict[str, Any]:
        """What the model is given of the sequence.

        Args:
            types: what is said of tokens; also where the processor says nothing, because a row shows no image.
        """
        length = len(self.completion)
        nothing = torch.zeros(self.prompt, dtype=torch.long)
        per_token = {
            "input_ids": self.tokens,
            "attention_mask": torch.ones(self.prompt + length, dtype=torch.long),
            **{
                name: torch.nn.functional.pad(self.types.get(name, nothing), (0, length), value=of_tokens.answer)
                for name, of_tokens in types.items()
            },
        }
        return {**self.outputs, **{name: values[None] for name, values in per_token.items()}}


def _whole_prompt(image_tokens: ImageTokens, images: Sequence[Any], prompt: str) -> dict[str, Any]:
    """What the processor makes of a whole prompt, in the words of the chat template, with its images (PIL)."""
    if images:
        return image_tokens.processed([images], [prompt])
    settings: dict[str, Any] = {"text": [prompt], "return_tensors": "pt", "add_special_tokens": False}
    try:
        return dict(image_tokens.processor(**settings))
    # some processors take no text without images, though their models do
    except (ValueError, TypeError, AttributeError):
        return dict(image_tokens.processor.tokenizer(settings.pop("text"), **settings))


@dataclass(frozen=True)
class _PlainPass:
    """What a model computed of one sequence by itself.

    Attributes:
        sequence: that it was given.
        decoder: inputs of its decoder's layers, one row.
        logps: (C,) of the tokens of the completion, by the model's own head.
        fused: (C,) the same by TRL's fused head.
    """

    sequence: CheckedSequence
    decoder: DecoderInputs
    logps: torch.Tensor
    fused: torch.Tensor


def varied_rows(rows: RowDataset | PairStream) -> list[dict[str, Any]]:
    """Rows that differ in what a model does with them: no image, one, another, several.

    Args:
        rows: pairs or questions. Of a stream the first are looked at; it gives them again.

    Returns:
        at most four pairs in the normal form; questions get answers, which nobody is to learn.
    """
    if isinstance(rows, PairStream):
        return _varied(rows.peek(LOOKED_AT_OF_STREAM))
    plain = ((position, rows.plain(position)) for position in range(min(len(rows), LOOKED_AT)))
    first: dict[str, list[int]] = {}
    for position, row in plain:
        of_kind = first.setdefault(_kind(row), [])
        # several with one image, among which there may be other sizes
        if len(of_kind) < (SIZES_LOOKED_AT if len(row["images"]) == 1 else 1):
            of_kind.append(position)
    return _varied([_as_pair(rows[position]) for positions in first.values() for position in positions])


def _kind(row: Mapping[str, Any]) -> str:
    return {0: "none", 1: "one"}.get(len(row["images"]), "several")


def _varied(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each kind; of those with one image also one with another, of another size where there is one."""
    chosen = {kind: next((row for row in rows if _kind(row) == kind), None) for kind in ("none", "one", "several")}
    first = chosen["one"]
    others = [row for row in rows if first and _kind(row) == "one" and row["image_key"] != first["image_key"]]
    other_sizes = [row for row in others if first and row["images"][0].size != first["images"][0].size]
    another = next(iter([*other_sizes, *others]), None)
    return [row for row in (chosen["none"], first, another, chosen["several"]) if row is not None]


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A question with two answers; a pair as it is."""
    answers = {"chosen": "It is a red one.", "rejected": "It is blue!"}
    said = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for side, text in answers.items()
    }
    return {**said, **row}


def read_rows(
    model: PreTrainedModel,
    adapter: VisionAdapter,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    packing: Sequence[str] = (),
) -> ForestReading:
    """How a model and its processor read a forest, shown on some rows.

    Args:
        model: the MLLM, without a peft model around it, on the device that it trains on.
        adapter: of its family.
        processor: the model's own.
        rows: pairs in the normal form, with PIL images and `image_key`.
        packing: as for `read_forest`.

    Raises:
        ModelError: if the model computes something else of a forest than of the rows by themselves, naming what
            differs.
    """
    image_tokens = ImageTokens(processor, adapter.image_token_id)
    # processors read the names of control tokens as these, so that nothing could be compared
    rows = [image_tokens.control_text.without(row) for row in rows]
    asked = [(side, shown_by(row, side)) for side in ("chosen", "rejected") for row in rows]
    texts = [image_tokens.texts(row) for _, row in asked]
    if any(image_tokens.rewrites(row, text["prompt"]) for (_, row), text in zip(asked, texts, strict=True)):
        image_tokens = ImageTokens(processor, adapter.image_token_id, whole_prompts=True)
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for (_, row), text in zip(asked, texts, strict=True):
        key = (row["image_key"], text["prompt"])
        if key not in prompts:
            prompts[key] = _whole_prompt(image_tokens, row["images"], text["prompt"])
    sequences = [
        CheckedSequence(
            f"row {row.get('id')!r}", prompts[row["image_key"], text["prompt"]], image_tokens.tokens(text[side])
        )
        for (side, row), text in zip(asked, texts, strict=True)
    ]

    def batch_of(reading: ForestReading) -> ForestBatch:
        whole = image_tokens.whole_prompts
        collator = ForestCollator(
            processor, adapter.image_token_id, reading.shared, whole_prompts=whole, layout=reading.layout
        )
        batch: ForestBatch = collator(rows)["forest"]
        return batch.to(model.device)

    reading = read_forest(model, adapter, sequences, batch_of, packing)
    return replace(reading, whole_prompts=image_tokens.whole_prompts)


@torch.no_grad()
def read_forest(
    model: PreTrainedModel,
    adapter: VisionAdapter,
    sequences: Sequence[CheckedSequence],
    batch_of: Callable[[ForestReading], ForestBatch],
    packing: Sequence[str] = (),
) -> ForestReading:
    """How a model reads a forest, shown on some sequences.

    Args:
        model: the MLLM, without a peft model around it, on the device that it trains on.
        adapter: of its family.
        sequences: of some rows, in the order in which `batch_of` has them.
        batch_of: makes the forest batch of the same rows for a reading.
        packing: attention implementations for several trees in one row, to be tried in this order. The model's decoder
            keeps the first by which it computes the same; where there is none it keeps its own, and trees have a row
            each.

    Raises:
        ModelError: if the model computes something else of a forest than of the sequences, naming what differs.
    """
    with evaluating(model), _in_float32(model) as exact:
        reading, passes = _observed(model, adapter, sequences)
        reading = replace(reading, own_head=_own_head(passes, exact))
        by_row = replace(reading, patterns={}, no_trees=reading.no_trees or "")
        in_trees = None
        if reading.no_trees is None:
            for implementation in packing:
                packed = replace(reading, layout=RowLayout(True, FLEX_BLOCK if implementation == FLEX else 1))
                earlier = attend_by(model, implementation)
                in_one_row = _difference(model, adapter, packed, passes, batch_of(packed), exact)
                if in_one_row is None:
                    return packed
                attend_by(model, earlier)
                logger.info(
                    "%s, several trees in a row by %s: %s.", type(model).__name__, implementation, in_one_row.clause
                )
            in_trees = _difference(model, adapter, reading, passes, batch_of(reading), exact)
            if in_trees is None:
                return reading
            by_row = replace(by_row, no_trees=f"in a tree {in_trees.clause}")
        apart = in_trees
        # what an adapter says wrongly of positions is mended there, and not gone around
        if in_trees is None or in_trees.what != "positions":
            apart = _difference(model, adapter, by_row, passes, batch_of(by_row), exact)
            if apart is None:
                return by_row
    assert apart is not None
    raise ModelError(
        f"{type(model).__name__} computes something else in training than by itself: {apart.clause}.",
        f"The adapter of family {adapter.family!r} does not describe how it takes its images, positions or masks; "
        "write one that does (see VisionAdapter; `pivot check` tells more), or train it with TRL's own trainer.",
    )


def _observed(
    model: PreTrainedModel, adapter: VisionAdapter, sequences: Sequence[CheckedSequence]
) -> tuple[ForestReading, list[_PlainPass]]:
    """How a model reads a forest, as its plain passes show, and these passes."""
    reading = reading_of(model)
    names = sorted({name for sequence in sequences for name in sequence.types})
    # what is said of an answer's tokens is that they are text; a few models call them something else than the prompt's
    for answer_type in (0, 1) if names else (0,):
        types = {name: TokenTypes(_by_token(name, sequences), answer_type) for name in names}
        reading = replace(reading, token_types=types)
        try:
            with answering(model, adapter, reading):
                passes = [_plain(model, sequence, types) for sequence in sequences]
        except torch.OutOfMemoryError:
            raise
        # the model is foreign code, and called as transformers' MLLMs are; what it raises says that it is none
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be run on what its processor makes of {sequences[0].name} and others: "
                f"{type(error).__name__}: {error}",
                "Use a model whose forward pass takes its processor's outputs and whose base model returns "
                "last_hidden_state, or write an adapter.",
            ) from error
        if _is_causal(passes):
            return _with_patterns(reading, adapter, passes), passes
    raise ModelError(
        f"In {type(model).__name__} the tokens of an answer see what follows them, so that their probabilities say "
        "nothing of what it would write.",
        "Use a model that reads its answers from left to right.",
    )


def _with_patterns(reading: ForestReading, adapter: VisionAdapter, passes: Sequence[_PlainPass]) -> ForestReading:
    """A reading with who sees whom in each kind of layer, as the plain passes show it."""
    patterns = {}
    for kind, pattern in reading.patterns.items():
        shown = [one for one in passes if kind in one.decoder.masks]
        try:
            patterns[kind] = observed(
                pattern,
                [one.decoder.masks[kind][0].cpu() for one in shown],
                [reading.is_image(one.sequence.tokens, adapter.image_token_id) for one in shown],
                [one.sequence.prompt for one in shown],
            )
        except NotATree as reason:
            return replace(reading, patterns={}, no_trees=str(reason))
    return replace(reading, patterns=patterns, first_position=_first_position(passes))


def _first_position(passes: Sequence[_PlainPass]) -> int:
    """Of the first token, where positions count up in every pass."""
    firsts = set()
    for one in passes:
        for name in one.decoder.per_token:
            positions = one.decoder.of_row(name, 0)
            if name.startswith("position_ids") and positions.ndim == 1:
                counted = torch.arange(len(positions), device=positions.device) + positions[0]
                firsts.add(int(positions[0]) if torch.equal(positions, counted) else 0)
    return firsts.pop() if len(firsts) == 1 else 0


def _is_causal(passes: Sequence[_PlainPass]) -> bool:
    """Whether no token of an answer sees, or is seen by, what stands before it in the wrong direction."""
    return not any(
        mask[0].triu(1)[one.sequence.prompt :].any() or mask[0].triu(1)[:, one.sequence.prompt :].any()
        for one in passes
        for mask in one.decoder.masks.values()
    )


def _by_token(name: str, sequences: Sequence[CheckedSequence]) -> dict[int, int]:
    """What the processor says of tokens, by their ids, where it is not 0."""
    by_token: dict[int, int] = {}
    for sequence in sequences:
        if name in sequence.types:
            pairs = zip(sequence.tokens.tolist(), sequence.types[name].tolist(), strict=False)
            by_token.update({token: value for token, value in pairs if value})
    return by_token


def _plain(model: PreTrainedModel, sequence: CheckedSequence, types: Mapping[str, TokenTypes]) -> _PlainPass:
    inputs = {name: on_model(value, model) for name, value in sequence.inputs(types).items()}
    with recorded(model, len(sequence.tokens)) as decoder:
        logits = model(**inputs, use_cache=False).logits[0].float()
    tokens = sequence.tokens.to(logits.device)
    logps = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[sequence.prompt - 1 :, 0]
    labels = tokens.clone()
    labels[: sequence.prompt] = -100
    fused = model(**inputs, labels=labels[None], use_cache=False, fused_lm_head=True).log_probs[0].float()
    return _PlainPass(sequence, decoder, logps, fused[sequence.prompt - 1 :])


def _own_head(passes: Sequence[_PlainPass], exact: bool) -> bool:
    """Whether TRL's fused head computes something else than the model's own."""
    gaps = [(one.logps - one.fused).abs().max().item() for one in passes if len(one.logps)]
    return max(gaps, default=0.0) > (EXACT if exact else ROUNDED)


@dataclass(frozen=True)
class _Difference:
    """Something that is not in a forest what it is in a plain pass.

    Attributes:
        what: "tokens", "forward pass", "positions", "masks", "embeddings" or "log-probabilities".
        clause: that says so, with the row.
    """

    what: str
    clause: str


def _where(error: Exception) -> str:
    """The innermost function of the model's own code that an exception came through, with its file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling_" in frame.filename]
    frames = frames or traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].name} ({Path(frames[-1].filename).name})"


def _difference(
    model: PreTrainedModel,
    adapter: VisionAdapter,
    reading: ForestReading,
    passes: Sequence[_PlainPass],
    batch: ForestBatch,
    exact: bool,
) -> _Difference | None:
    """The first thing that differs between the plain passes and the same sequences in a forest; None for nothing."""
    forest = batch.forest
    for one, (row, path) in zip(passes, forest.placed(), strict=True):
        if forest.tokens[row, path].tolist() != one.sequence.tokens.tolist():
            return _Difference("tokens", f"the tokens of {one.sequence.name} are not those that its processor makes")
    try:
        with answering(model, adapter, reading), recorded(model, forest.tokens.shape[1]) as decoder:
            logps = model(forest=batch).log_probs.float()
    # whatever a foreign forward pass raises of inputs it was not made for is a finding here
    except Exception as error:
        return _Difference("forward pass", f"its forward pass stops in {_where(error)} with {said(error)}")
    for index, (one, (row, path)) in enumerate(zip(passes, forest.placed(), strict=True)):
        nodes = path.to(model.device)
        for compare in (_position_difference, _mask_difference, _embedding_difference):
            apart = compare(one, decoder, row, nodes, exact)
            if apart is not None:
                return apart
        gap = (logps[index, : len(one.logps)] - one.logps).abs()
        if len(gap) and gap.max().item() > (EXACT if exact else ROUNDED):
            return _Difference(
                "log-probabilities",
                f"the log-probability of token {int(gap.argmax())} of the answer of {one.sequence.name} is "
                f"{gap.max().item():.2g} apart",
            )
    return None


def _position_difference(
    one: _PlainPass, decoder: DecoderInputs, row: int, nodes: torch.Tensor, exact: bool
) -> _Difference | None:
    # in one order, so that every process names the same difference
    for name in sorted(one.decoder.per_token.keys() & decoder.per_token.keys()):
        plain, forest = one.decoder.of_row(name, 0), decoder.of_row(name, row)[nodes]
        if plain.shape != forest.shape:
            continue
        # rotary embeddings of one position differ by rounding alone, of neighbours by a tenth and more
        differs = (plain - forest).abs() > 1e-2 if plain.is_floating_point() else plain != forest
        tokens = differs.flatten(1).any(1) if differs.ndim > 1 else differs
        if tokens.any():
            token = int(tokens.nonzero()[0])
            return _Difference(
                "positions",
                f"the positions differ from token {token} of {one.sequence.name} on ({name}: {_shown(forest[token])}; "
                f"by itself {_shown(plain[token])})",
            )
    return None


def _mask_difference(
    one: _PlainPass, decoder: DecoderInputs, row: int, nodes: torch.Tensor, exact: bool
) -> _Difference | None:
    for kind, plain in one.decoder.masks.items():
        sees = decoder.masks[kind][row, nodes]
        if not torch.equal(sees[:, nodes], plain[0]) or not torch.equal(sees.sum(1), plain[0].sum(1)):
            return _Difference("masks", f"tokens of {one.sequence.name} see others in its layers of {kind}")
    return None


def _embedding_difference(
    one: _PlainPass, decoder: DecoderInputs, row: int, nodes: torch.Tensor, exact: bool
) -> _Difference | None:
    assert one.decoder.embeddings is not None and decoder.embeddings is not None
    plain, forest = one.decoder.embeddings[0].float(), decoder.embeddings[row, nodes].float()
    gap = (plain - forest).norm(dim=1) / plain.norm(dim=1).clamp(min=1e-6)
    if gap.max().item() > (EMBEDDING_EXACT if exact else EMBEDDING_ROUNDED):
        return _Difference(
            "embeddings",
            f"the embedding of token {int(gap.argmax())} of {one.sequence.name} is {gap.max().item():.2g} of its "
            "length apart",
        )
    return None


def _shown(value: torch.Tensor) -> str:
    numbers = value.flatten().tolist()
    return ", ".join(f"{number:g}" for number in numbers[:4]) + (", ..." if len(numbers) > 4 else "")


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[bool]:
    """A half-precision model in float32 meanwhile, where memory allows; yields whether it is.

    The tensors themselves are put back, not copies of them.
    """
    halves = [
        tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    needed = sum(tensor.numel() for tensor in halves) * 4
    if halves and not _has_room(model.device, needed):
        logger.warning("The check before training runs in %s: float32 copies of the weights do not fit.", model.dtype)
        yield False
        return
    kept = [(tensor, tensor.data) for tensor in halves]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield True
    finally:
        for tensor, data in kept:
            tensor.data = data


def _has_room(device: torch.device, needed: int) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return free > 1.5 * needed
