"""How much a model recalls of what it has read: accuracy over readings, number of pairs and length of the filler.

A reading is pairs and filler, read once from their beginning; the memories keep what they wrote. Then the questions
follow while nothing is written, so that no answer gets into a memory by way of its question (docs/recall.md).

Shape legend: B sequences, T tokens, E hidden size, Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from megatron_fwpkm.data.recall import MEASUREMENT, RecallConfig, draw_parts
from megatron_fwpkm.model.decoder import Decoder

PAIRS = (64, 128, 256, 512, 1024)
LENGTHS = (1, 2, 4, 8, 16, 32)
"""Lengths of sequences as multiples of the training length."""
LONG_FILLER = 4096
READINGS = 4
SEQUENCES_AT_ONCE = 32
TOKENS_AT_ONCE = 1 << 14
"""Tokens of all sequences that go through the model together: bounds memory, changes no result."""


@dataclass(frozen=True)
class Figure:
    """Accuracy of one model in one case, with its 95 % interval (Wilson)."""

    memory: bool
    """False for the twin without memory."""
    pairs: int
    filler_tokens: int
    readings: int
    """How often pairs and filler were read before the questions; after none an answer is a guess."""
    right: int
    asked: int
    accuracy: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Reader:
    """A model that reads contexts and answers questions, with a memory of its own for each sequence."""

    def __init__(self, model: Decoder, batch: int) -> None:
        self._model = model
        self._cache = model.make_cache(batch, mode="aligned", memory="per_sequence")
        self._piece = max(1, TOKENS_AT_ONCE // batch)

    def read_and_answer(self, context_BT: Tensor, questions_BT: Tensor) -> Tensor:
        """The tokens [B, T] that the model expects after those of the questions, asked behind one more reading.

        Attention starts anew with the context; the memories go on from earlier readings and write all of the context
        and nothing of the questions. An empty context is no reading.
        """
        self._cache.forget_mixers()
        if context_BT.shape[1]:
            for piece_BT in context_BT.split(self._piece, dim=1):
                self._model.logits(piece_BT, cache=self._cache)
            self._cache.finish()
        for memory in self._cache.memories():
            memory.frozen = True
        logits_BTV = self._model.logits(questions_BT, cache=self._cache)
        for memory in self._cache.memories():
            memory.frozen = False
        return logits_BTV.argmax(-1)


def measure(model: Decoder, config: RecallConfig, filler_tokens: int, readings: int, answers: int) -> list[Figure]:
    """Accuracy of the same `answers` questions (or a few more) after 0, 1, .. `readings` readings."""
    sequences = -(-answers // config.questions)
    batch = min(sequences, SEQUENCES_AT_ONCE)
    right = [0] * (readings + 1)
    with _evaluating(model):
        for first in range(0, sequences, batch):
            count = min(batch, sequences - first)
            context_BT, questions_BT = draw_parts(config, filler_tokens, MEASUREMENT, first, count)
            reader = Reader(model, count)
            for number in range(readings + 1):
                read_BT = context_BT if number else context_BT[:, :0]
                expected_BQ = reader.read_and_answer(read_BT, questions_BT)[:, 0::2]
                right[number] += int((expected_BQ == questions_BT[:, 1::2]).sum())
    memory, asked = any(True for _ in model.memory_layers()), sequences * config.questions
    figures = []
    for number, hits in enumerate(right):
        interval = binomtest(hits, asked).proportion_ci(0.95, method="wilson")
        low, high = float(interval.low), float(interval.high)
        figures.append(Figure(memory, config.pairs, filler_tokens, number, hits, asked, hits / asked, low, high))
    return figures


def gate_means(model: Decoder, task: RecallTask, sequences: int = 32) -> dict[int, dict[str, float]]:
    """Block -> kind of token ("keys", "values", "fillers") -> mean gate of its memory over contexts as trained."""
    config = task.config
    context_BT, _ = draw_parts(config, task.filler_tokens, MEASUREMENT, 0, sequences)
    kinds_BT = torch.bucketize(context_BT, torch.tensor([config.values, config.values + config.fillers]), right=True)
    gates: dict[int, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad(), _evaluating(model):
        for index, layer in model.memory_layers():

            def keep(module: nn.Module, inputs: object, output: Tensor, index: int = index) -> None:
                gates[index] = torch.sigmoid(output.mean(-1))

            hooks.callback(layer.gate_projection.register_forward_hook(keep).remove)
        model.logits(context_BT)
    names = ("values", "fillers", "keys")
    return {
        index: {name: float(gate_BT[kinds_BT == kind].mean()) for kind, name in enumerate(names)}
        for index, gate_BT in gates.items()
    }


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class RecallTask:
    """What is measured: the cases around the one that was trained on."""

    config: RecallConfig
    """As trained."""
    sequence_length: int
    """As trained, in tokens."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.config.values

    @property
    def filler_tokens(self) -> int:
        """As trained."""
        return self.config.filler_tokens(self.sequence_length)

    @property
    def numbers_of_pairs(self) -> list[int]:
        """As trained, and PAIRS as far as there are keys."""
        return sorted({self.config.pairs, *(pairs for pairs in PAIRS if pairs <= self.config.keys)})

    def filler_at(self, multiple: int) -> int:
        """Filler of a sequence of `multiple` times the training length with the pairs and questions of training."""
        return self.config.filler_tokens(multiple * self.sequence_length)

    def cases(self, memory: bool) -> dict[tuple[int, int], int]:
        """(pairs, filler tokens) of all cases -> number of readings; without memory more than one changes nothing."""
        longer = {(self.config.pairs, self.filler_at(multiple)): 2 if memory else 1 for multiple in LENGTHS}
        if not memory:
            return longer | {(pairs, self.filler_tokens): 1 for pairs in self.numbers_of_pairs}
        fillers = (self.filler_tokens, LONG_FILLER)
        return longer | {(pairs, tokens): READINGS for tokens in fillers for pairs in self.numbers_of_pairs}

    def with_pairs(self, pairs: int) -> RecallConfig:
        """The same with another number of pairs and, where they are fewer, of questions."""
        return self.config.model_copy(update={"pairs": pairs, "questions": min(pairs, self.config.questions)})


def measure_all(
    model: Decoder, plain: Decoder, task: RecallTask, answers: int, say: Callable[[str], None]
) -> list[Figure]:
    """Measure a model with memory and its twin without in all cases of a task."""
    figures: list[Figure] = []
    for of, memory in ((model, True), (plain, False)):
        for (pairs, filler_tokens), readings in task.cases(memory).items():
            found = measure(of, task.with_pairs(pairs), filler_tokens, readings, answers)
            shown = ", ".join(f"{100 * one.accuracy:.1f}" for one in found)
            name = "with memory" if memory else "without memory"
            say(f"{name}: {pairs} pairs, {filler_tokens} tokens of filler, 0 to {readings} readings: {shown} %")
            figures += found
    return figures


def select(figures: list[Figure], memory: bool, pairs: int, filler_tokens: int) -> list[Figure]:
    """The figures of one case, by number of readings."""
    found = [one for one in figures if (one.memory, one.pairs, one.filler_tokens) == (memory, pairs, filler_tokens)]
    return sorted(found, key=lambda one: one.readings)


@dataclass(frozen=True)
class Claim:
    """Something the run is to show, and whether it does, at 95 % confidence."""

    text: str
    found: str
    holds: bool


def claims(figures: list[Figure], task: RecallTask) -> list[Claim]:
    """The claims of docs/recall.md, each held against the interval rather than the figure."""
    pairs, long = task.config.pairs, task.filler_at(8)
    trained = select(figures, True, pairs, task.filler_tokens)[1]
    plain = select(figures, False, pairs, task.filler_tokens)[1]
    far = select(figures, True, pairs, long)[1]
    result = [
        Claim(f"{pairs} pairs, training length: at least 95 %", str(trained), trained.low >= 0.95),
        # From both sides: not above chance, and measured well enough to say so.
        Claim(
            f"the same without memory: chance ({100 * task.chance:.1f} %)",
            str(plain),
            plain.low <= task.chance and plain.high <= 2 * task.chance,
        ),
        Claim(f"{pairs} pairs, 8 times the training length: at least 90 %", str(far), far.low >= 0.90),
    ]
    most = select(figures, True, max(task.numbers_of_pairs), task.filler_tokens)
    for number in (2, 3):
        before, after = most[number - 1], most[number]
        text = f"{before.pairs} pairs, more than one reading stores: reading {number} helps"
        result.append(Claim(text, f"{before} -> {after}", after.low > before.high))
    return result
