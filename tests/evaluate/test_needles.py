"""Needles and prompts: exact lengths, places, uniqueness, determinism; scoring."""

from __future__ import annotations

import random

import numpy
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.held_out import TextCodec
from megatron_fwpkm.evaluate.needles import Needle, NeedlePrompt, PromptMaker, score, split_needle

VOCABULARY = [random.Random(0).choice("bcdfgklmnprst") + v + c for v in "aeiou" for c in "bdklmnrstz"]
WORDS = " ".join(random.Random(1).choices(VOCABULARY, k=4000))


def trained_codec(digits_apart: bool) -> TextCodec:
    """A byte-level BPE of the words; numbers have been seen joined, where they may be."""
    digits = [pre_tokenizers.Digits(individual_digits=True)] if digits_apart else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    numbers = " ".join(f"is {number} and ID-{number % 65536:04x}" for number in range(0, 1000000, 9973))
    tokenizer.train_from_iterator([WORDS, numbers], trainer=trainer)
    return TextCodec(tokenizer, 0)


@pytest.fixture(scope="module", params=["digits apart", "digits joined"])
def codec(request: pytest.FixtureRequest) -> TextCodec:
    return trained_codec(digits_apart=request.param == "digits apart")


@pytest.fixture(scope="module")
def text(codec: TextCodec) -> numpy.ndarray:
    return numpy.array(codec.encode(WORDS), dtype=numpy.int64)


def make(codec: TextCodec, text: numpy.ndarray, needles: int = 5, depths: tuple[float, ...] = ()) -> PromptMaker:
    return PromptMaker(text, codec, needles, depths)


@pytest.mark.parametrize("length", [256, 300, 511, 1024])
def test_prompts_have_exactly_the_asked_length_and_one_shape(
    codec: TextCodec, text: numpy.ndarray, length: int
) -> None:
    maker = make(codec, text)
    prompts = [maker.make(length, seed=3, sample=sample) for sample in range(12)]
    assert {prompt.length for prompt in prompts} == {length}
    assert len({(len(prompt.haystack), len(prompt.question), prompt.answer_tokens) for prompt in prompts}) == 1


def test_needles_stand_whole_between_words_and_the_rest_is_the_text(codec: TextCodec, text: numpy.ndarray) -> None:
    maker = make(codec, text)
    for sample in range(8):
        prompt = maker.make(400, seed=0, sample=sample)
        rest = list(prompt.haystack)
        for place, needle in sorted(zip(prompt.places, prompt.needles, strict=True), key=lambda pair: -pair[0]):
            tokens = codec.encode(needle.text)
            assert rest[place : place + len(tokens)] == tokens
            del rest[place : place + len(tokens)]
            assert codec.decode(rest[place : place + 1])[:1] == " "
        whole, cut = codec.decode(text.tolist()), codec.decode([int(token) for token in rest])
        assert cut in whole
        # Decoding and encoding the whole gives the same tokens: nothing joins across a cut.
        assert codec.encode(codec.decode(prompt.haystack.tolist())) == prompt.haystack.tolist()


def test_identities_and_numbers_differ_within_a_haystack(codec: TextCodec, text: numpy.ndarray) -> None:
    maker = make(codec, text, needles=12)
    for sample in range(10):
        needles = maker.make(1024, seed=1, sample=sample).needles
        assert len({needle.identity for needle in needles}) == len({needle.number for needle in needles}) == 12
        assert all(len(needle.identity) == 4 and int(needle.identity, 16) >= 0 for needle in needles)
        assert all(len(needle.number) == 6 and needle.number.isdecimal() for needle in needles)


def test_prompts_depend_on_seed_and_sample_alone(codec: TextCodec, text: numpy.ndarray) -> None:
    def content(prompt: NeedlePrompt) -> tuple[object, ...]:
        return (prompt.haystack.tobytes(), prompt.question.tobytes(), prompt.needles, prompt.asked, prompt.places)

    one, other = make(codec, text), make(codec, text)
    assert content(one.make(300, 5, 7)) == content(other.make(300, 5, 7))
    assert len({content(one.make(300, seed, sample)) for seed in (0, 1) for sample in range(4)}) == 8
    short, long = one.make(300, 5, 7), one.make(900, 5, 7)
    assert (short.needles, short.asked) == (long.needles, long.asked)
    assert len({one.make(300, 0, sample).asked for sample in range(40)}) == 5


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depths_are_kept_to_within_a_word(codec: TextCodec, text: numpy.ndarray, depth: float) -> None:
    prompt = make(codec, text, needles=1, depths=(depth,)).make(800, 0, 0)
    filler = len(prompt.haystack) - len(codec.encode(prompt.needles[0].text))
    assert abs(prompt.places[0] - depth * filler) <= 24
    assert prompt.depth == prompt.places[0] / len(prompt.haystack)


def test_several_needles_at_one_depth_stand_one_after_the_other(codec: TextCodec, text: numpy.ndarray) -> None:
    prompt = make(codec, text, needles=3, depths=(0.5, 0.5, 0.1)).make(600, 0, 0)
    length = len(codec.encode(prompt.needles[0].text))
    assert prompt.places[1] == prompt.places[0] + length
    assert prompt.places[2] < prompt.places[0]


def test_the_question_is_the_needle_up_to_its_number(codec: TextCodec) -> None:
    needle = Needle("0a1f", "482913")
    question, answer_tokens = split_needle(codec, needle)
    tokens = codec.encode(needle.text)
    assert tokens[: len(question)] == question
    answer = codec.decode(tokens[len(question) : len(question) + answer_tokens])
    assert answer.strip() == "482913"
    assert codec.decode(question).rstrip() == " The secret number for ID-0a1f is"


def test_digits_that_are_tokens_leave_the_space_to_the_question() -> None:
    codec = trained_codec(digits_apart=True)
    question, answer_tokens = split_needle(codec, Needle("0a1f", "482913"))
    assert codec.decode(question) == " The secret number for ID-0a1f is "
    assert answer_tokens == 6


def test_what_does_not_fit_is_said(codec: TextCodec, text: numpy.ndarray) -> None:
    with pytest.raises(UserError, match=r"no room for 5 needles"):
        make(codec, text).make(64, 0, 0)
    with pytest.raises(UserError, match=r"held-out text.*evaluation\.needles\.lengths"):
        make(codec, text).make(len(text) + 1000, 0, 0)
    with pytest.raises(UserError, match=r"has 2 places.*is 5"):
        make(codec, text, depths=(0.1, 0.2))


@pytest.mark.parametrize(
    ("answer", "exact", "digits", "candidate"),
    [
        ("482913", True, 1.0, True),
        (" 482913.", True, 1.0, True),
        ("482914", False, 5 / 6, False),
        ("824913", False, 3 / 6, False),
        ("111111", False, 1 / 6, True),
        ("4829", False, 4 / 6, False),
        ("", False, 0.0, False),
        ("x482913", False, 0.0, False),
    ],
)
def test_scores(answer: str, exact: bool, digits: float, candidate: bool) -> None:
    needles = (Needle("0000", "482913"), Needle("0001", "111111"))
    empty = numpy.zeros(1, dtype=numpy.int64)
    found = score(NeedlePrompt(0, empty, empty, 6, needles, 0, (0, 0)), answer)
    assert (found.exact, found.digits, found.candidate) == (exact, pytest.approx(digits), candidate)
