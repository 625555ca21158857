"""How tensors of a repository and of transformers correspond: one table, read in both directions."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Cut:
    """How one tensor of a repository becomes several of transformers.

    Attributes:
        pieces: cuts it.
        whole: puts the pieces together again.
        views: whether the pieces lie in the whole one's memory, so that training them trains it.
    """

    pieces: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    whole: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    views: bool = True


UNCUT = Cut(lambda tensor: (tensor,), lambda pieces: pieces[0])
THIRDS = Cut(lambda tensor: tensor.chunk(3), lambda pieces: torch.cat(list(pieces)))
"""A fused projection whose rows are all queries, then all keys, then all values."""


def grouped(heads: int, key_value_heads: int) -> Cut:
    """A fused projection whose rows are, for each key head, its queries, its key and its value: InternLM2's wqkv.

    Args:
        heads: query heads.
        key_value_heads: of which each serves `heads / key_value_heads` query heads.
    """
    queries = heads // key_value_heads

    def pieces(fused: torch.Tensor) -> list[torch.Tensor]:
        by_group = fused.unflatten(0, (key_value_heads, queries + 2, -1))
        parts = by_group[:, :queries], by_group[:, queries], by_group[:, queries + 1]
        # a group's queries lie apart from the next one's, so these are copies
        return [part.reshape(-1, *fused.shape[1:]) for part in parts]

    def whole(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        query, key, value = (
            part.unflatten(0, (key_value_heads, count, -1)) for part, count in zip(parts, (queries, 1, 1), strict=True)
        )
        return torch.cat([query, key, value], dim=1).flatten(0, 2)

    return Cut(pieces, whole, views=False)


@dataclass(frozen=True)
class Binding:
    """One tensor of a repository and those of transformers that hold the same numbers.

    Attributes:
        theirs: its name in the repository.
        ours: their names, in the order of the pieces.
        cut: how it becomes them.
    """

    theirs: str
    ours: tuple[str, ...]
    cut: Cut = UNCUT


@dataclass(frozen=True)
class Rule:
    """A line of a table.

    Attributes:
        theirs: name in the repository; {n} stands for a number, {rest} for whatever follows.
        ours: names in transformers, with the same fields.
        cut: how the tensor becomes ours.
    """

    theirs: str
    ours: tuple[str, ...]
    cut: Cut = UNCUT

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_pattern(template) for template in (self.theirs, *self.ours))

    def by_theirs(self, name: str) -> Binding | None:
        """The binding of a repository's tensor, None where this is not its line."""
        match = self._patterns[0].fullmatch(name)
        if match is None:
            return None
        return Binding(name, tuple(template.format(**match.groupdict()) for template in self.ours), self.cut)

    def by_ours(self, name: str) -> Binding | None:
        """The binding that a tensor of transformers belongs to, None where this is not its line."""
        for pattern in self._patterns[1:]:
            if match := pattern.fullmatch(name):
                return self.by_theirs(self.theirs.format(**match.groupdict()))
        return None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)"))


def rename(theirs: str, ours: str) -> Rule:
    """A line for a tensor that only has another name."""
    return Rule(theirs, (ours,))


@dataclass(frozen=True)
class NameTable:
    """The names of one layout.

    Attributes:
        rules: the first that fits decides, in both directions.
        computed: patterns of names that hold no weights but what the classes compute themselves.
    """

    rules: tuple[Rule, ...]
    computed: tuple[str, ...] = (r".*rotary_emb\.inv_freq", r".*\.position_ids")

    def is_computed(self, name: str) -> bool:
        """Whether a tensor of the repository is no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.computed)

    def by_theirs(self, name: str) -> Binding | None:
        """The binding of a repository's tensor, None for an unknown one."""
        return _first(rule.by_theirs(name) for rule in self.rules)

    def by_ours(self, name: str) -> Binding | None:
        """The binding that a tensor of transformers belongs to, None for an unknown one."""
        return _first(rule.by_ours(name) for rule in self.rules)


def _first(answers: Iterable[Binding | None]) -> Binding | None:
    return next((answer for answer in answers if answer is not None), None)
