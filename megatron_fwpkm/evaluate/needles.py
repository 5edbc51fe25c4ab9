"""Needles in haystacks: held-out text with sentences to remember, a question about one, and the scoring of answers.

Prompts are put together from tokens, so that their length is exact: stretches of the held-out text, cut before a word,
with the needles' own tokens between them. For byte-level BPE, which never joins across a word's leading space, that is
the tokenization of the whole text too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.held_out import TextCodec

DIGITS = 6
"""Digits of a secret number."""
_TRIALS = 64  # needles whose number of tokens decides which number is the usual one
_WORD_STARTS = ("Ġ", "▁", " ", "Ċ", "\n")  # how byte-level and SentencePiece vocabularies spell leading blanks


@dataclass(frozen=True)
class Needle:
    """One sentence to remember."""

    identity: str
    """4 hex digits."""
    number: str
    """DIGITS decimal digits."""

    @property
    def text(self) -> str:
        """The sentence, with the space before it."""
        return f" The secret number for ID-{self.identity} is {self.number}."


@dataclass(frozen=True)
class NeedlePrompt:
    """A haystack and a question about one of its needles."""

    sample: int
    """Number of the sample that it was made for."""
    haystack: NDArray[numpy.int64]
    question: NDArray[numpy.int64]
    answer_tokens: int
    """Tokens of the right answer, which decoding is given."""
    needles: tuple[Needle, ...]
    asked: int
    """Index of the needle that is asked for."""
    places: tuple[int, ...]
    """Where in the haystack each needle's first token stands."""

    @property
    def length(self) -> int:
        """Tokens of haystack and question together."""
        return len(self.haystack) + len(self.question)

    @property
    def depth(self) -> float:
        """Place of the needle that is asked for, as a share of the haystack."""
        return self.places[self.asked] / len(self.haystack)


@dataclass(frozen=True)
class Score:
    """How right one answer is."""

    exact: bool
    """The number itself."""
    digits: float
    """Share of digits that are right at their place."""
    candidate: bool
    """The number of any needle of the haystack, the right one included."""


class PromptMaker:
    """Makes prompts of held-out text: the same seed and sample number give the same needles at every length."""

    def __init__(
        self, text: NDArray[numpy.int64], codec: TextCodec, needles: int, depths: Sequence[float] = ()
    ) -> None:
        """`text` is the held-out text as one; `depths` are shares of the haystack, or none for places at random."""
        if depths and len(depths) != needles:
            raise UserError(
                f"evaluation.needles.depths has {len(depths)} places and evaluation.needles.needles is {needles}; "
                "give one place for each needle, or none for places at random"
            )
        self._text, self._codec, self._needles, self._depths = text, codec, needles, tuple(depths)
        spelled = [codec.spelling(token) for token in range(codec.vocab_size)]
        starts = numpy.array([token.startswith(_WORD_STARTS) for token in spelled])
        self._starts_word = starts[text]
        trial = numpy.random.default_rng(0)
        shapes = [_shape(codec, needle) for needle in _draw_needles(trial, _TRIALS)]
        self._shape = Counter(shapes).most_common(1)[0][0]

    def make(self, length: int, seed: int, sample: int) -> NeedlePrompt:
        """A prompt of exactly `length` tokens.

        Raises UserError if the held-out text is too short for it, or it for its needles.
        """
        # The needles are drawn first, so that they are those of this sample whatever the length.
        draw = numpy.random.default_rng([seed, sample])
        needles = self._draw_alike(draw)
        asked = int(draw.integers(self._needles))
        question, answer_tokens = split_needle(self._codec, needles[asked])
        sentences = [self._codec.encode(needle.text) for needle in needles]
        filler_length = length - len(question) - sum(map(len, sentences))
        if filler_length < self._needles:
            raise UserError(
                f"a prompt of {length} tokens has no room for {self._needles} needles and the question; raise "
                "evaluation.needles.lengths or lower evaluation.needles.needles"
            )
        start = self._place_of_filler(draw, filler_length, length)
        filler = self._text[start : start + filler_length]
        cuts = self._cuts(draw, self._starts_word[start : start + filler_length])
        haystack, places = _assemble(filler, cuts, sentences)
        asked_tokens = numpy.array(question, dtype=numpy.int64)
        return NeedlePrompt(sample, haystack, asked_tokens, answer_tokens, needles, asked, places)

    def _draw_alike(self, draw: numpy.random.Generator) -> tuple[Needle, ...]:
        """Needles of the usual number of tokens, so that the prompts of a batch have haystacks of one length."""
        found: dict[str, Needle] = {}
        while len(found) < self._needles:
            for needle in _draw_needles(draw, self._needles):
                new = needle.identity not in found and needle.number not in {known.number for known in found.values()}
                if new and len(found) < self._needles and _shape(self._codec, needle) == self._shape:
                    found[needle.identity] = needle
        return tuple(found.values())

    def _place_of_filler(self, draw: numpy.random.Generator, filler_length: int, length: int) -> int:
        last = len(self._text) - filler_length
        starts = numpy.flatnonzero(self._starts_word[: max(last + 1, 0)])
        if not starts.size:
            raise UserError(
                f"a haystack of {length} tokens needs {filler_length:,} tokens of held-out text, and the split has "
                f"{len(self._text):,}; lower evaluation.needles.lengths or raise data.validation_fraction"
            )
        return int(draw.choice(starts))

    def _cuts(self, draw: numpy.random.Generator, starts_word: NDArray[Any]) -> list[int]:
        """Indices before which a needle goes: starts of words, at the asked depths or at random."""
        starts = numpy.flatnonzero(starts_word)
        starts = starts[starts > 0]
        if not starts.size:
            starts = numpy.arange(1, len(starts_word))
        if self._depths:
            return [int(starts[numpy.abs(starts - depth * len(starts_word)).argmin()]) for depth in self._depths]
        return [int(cut) for cut in draw.choice(starts, self._needles, replace=starts.size < self._needles)]


def _draw_needles(draw: numpy.random.Generator, count: int) -> tuple[Needle, ...]:
    """Needles whose identities differ and whose numbers differ."""
    identities = draw.choice(16**4, count, replace=False)
    numbers = draw.choice(10**DIGITS, count, replace=False)
    return tuple(Needle(f"{i:04x}", f"{n:0{DIGITS}d}") for i, n in zip(identities, numbers, strict=True))


def _shape(codec: TextCodec, needle: Needle) -> tuple[int, int, int]:
    """Tokens of the question, of the number and of the sentence."""
    question, answer_tokens = split_needle(codec, needle)
    return len(question), answer_tokens, len(codec.encode(needle.text))


def split_needle(codec: TextCodec, needle: Needle) -> tuple[list[int], int]:
    """Tokens of the question about a needle, and how many tokens its number takes.

    The question is the needle's own tokens up to the first that depends on the number: ` The secret number for
    ID-xxxx is ` where digits are tokens of their own, without the last space where the vocabulary joins it to them.
    """
    others = [codec.encode(Needle(needle.identity, f"{digit}" * DIGITS).text) for digit in range(10)]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*others, strict=False))
    question = [column[0] for column in shared]
    return question, len(codec.encode(needle.text.removesuffix("."))) - len(question)


def _assemble(
    filler: NDArray[numpy.int64], cuts: Sequence[int], sentences: Sequence[Sequence[int]]
) -> tuple[NDArray[numpy.int64], tuple[int, ...]]:
    """The filler with the sentences before its tokens `cuts`; and where each sentence begins."""
    order = sorted(range(len(cuts)), key=lambda index: (cuts[index], index))
    parts: list[NDArray[numpy.int64]] = []
    places = [0] * len(cuts)
    position = done = 0
    for index in order:
        parts += [filler[done : cuts[index]], numpy.array(sentences[index], dtype=numpy.int64)]
        places[index] = position + cuts[index] - done
        position = places[index] + len(sentences[index])
        done = cuts[index]
    return numpy.concatenate([*parts, filler[done:]]), tuple(places)


def score(prompt: NeedlePrompt, answer: str) -> Score:
    """Compare an answer's first DIGITS characters, after leading blanks, with the numbers of the prompt's needles."""
    given = answer.strip()[:DIGITS]
    wanted = prompt.needles[prompt.asked].number
    right = sum(a == b for a, b in zip(given, wanted, strict=False))
    return Score(given == wanted, right / DIGITS, any(given == needle.number for needle in prompt.needles))
