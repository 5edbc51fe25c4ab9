"""A whole evaluation from beginning to end, in one of its processes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.gates import gates_of
from megatron_fwpkm.evaluate.held_out import HeldOutText, open_held_out
from megatron_fwpkm.evaluate.loading import TrainedRun, load_decoder, open_run, read_run_config
from megatron_fwpkm.evaluate.needles import NeedlePrompt, PromptMaker, score
from megatron_fwpkm.evaluate.perplexity import CONDITIONS, bucket_edges, stream_losses
from megatron_fwpkm.evaluate.pieces import Piece, PieceStore, run_pieces
from megatron_fwpkm.evaluate.plan import NeedleWork, StreamWork, needle_pieces, stream_pieces
from megatron_fwpkm.evaluate.reading import Reader
from megatron_fwpkm.evaluate.report import Findings, Meter, report
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.parallel.backend import megatron_backend
from megatron_fwpkm.train.stop import StopRequest, end_with_parent

EVALUATION_FOLDER = "evaluation"
PIECES_FILE = "pieces.jsonl"
HAYSTACK_CHOICE = 16
"""Haystacks are stretches of so many times their length of held-out text, where there is as much."""


@dataclass(frozen=True)
class Request:
    """What an evaluation was asked for."""

    run: Path
    against: Path | None
    checkpoint: str | None
    overrides: Sequence[str]


def run_evaluation(request: Request) -> None:
    """Measure, draw and summarize as one rank of the job; every rank calls this with the same request.

    Finished pieces are kept in <run>/evaluation; another call with the same request goes on there. Raises UserError
    for what the user can mend.
    """
    stop = StopRequest()
    end_with_parent()
    config = read_run_config(request.run, request.overrides)
    ranks = parallel.initialize(config.parallel)
    with ExitStack() as open_things:
        open_things.callback(parallel.shut_down)
        runs = _open_runs(request, config, ranks)
        held_out = parallel.agree_on_errors(lambda: _open_text(config, runs[0]), "reading the held-out text")
        measurement = Measurement(config, runs, held_out)
        pieces = parallel.agree_on_errors(measurement.pieces, "preparing the measurements")
        path = request.run / EVALUATION_FOLDER / PIECES_FILE
        store = parallel.agree_on_errors(
            lambda: PieceStore(path) if ranks.is_leader else None, "reading finished measurements"
        )
        if store is not None:
            open_things.callback(store.close)
        meter = open_things.enter_context(Meter(ranks.is_leader))
        meter.say(f"measuring {runs[0].checkpoint}" + (f" against {runs[1].checkpoint}" if runs[1:] else ""))
        if runs[1:] and runs[1].tokens != runs[0].tokens:
            meter.say(
                f"note: {runs[0].config.name} was trained on {runs[0].tokens:,} tokens and {runs[1].config.name} on "
                f"{runs[1].tokens:,}: the comparison is not one of architectures"
            )
        results = run_pieces(pieces, measurement.compute, store, ranks, stop.is_set, meter.update)
        if results is None:
            meter.say("stopped as asked; start again to go on")
            return
        findings = parallel.agree_on_errors(lambda: measurement.findings(pieces, results), "measuring the gates")
        parallel.agree_on_errors(lambda: report(findings, meter) if ranks.is_leader else None, "writing the report")


def _open_runs(request: Request, config: TrainConfig, ranks: parallel.Topology) -> list[TrainedRun]:
    """The run and its twin, verified by rank 0; the same on every rank. Raises UserError if they don't compare."""

    def open_all() -> list[TrainedRun]:
        runs = [open_run(request.run, config, request.checkpoint)]
        if request.against is not None:
            runs.append(open_run(request.against, read_run_config(request.against, request.overrides), None))
            if runs[1].corpus != runs[0].corpus:
                raise UserError(
                    f"{request.against} was trained on another corpus or tokenizer than {request.run}: their "
                    "perplexities don't compare; give a run on the same data to --against"
                )
        return runs

    shared = [parallel.agree_on_errors(lambda: open_all() if ranks.is_leader else None, "opening the runs")]
    torch.distributed.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]


def _open_text(config: TrainConfig, run: TrainedRun) -> HeldOutText:
    """The held-out text of the corpus that the run was trained on. Raises UserError without that."""
    needles, length = config.evaluation.needles, config.data.sequence_length
    haystack = max(needle_lengths(config), default=0) if needles.samples else 0
    needed = max(config.evaluation.sequences * length + 1, HAYSTACK_CHOICE * haystack, config.evaluation.gate_tokens)
    return open_held_out(config, needed, run.corpus)


def needle_lengths(config: TrainConfig) -> tuple[int, ...]:
    """Lengths of prompts: those asked for, or 1, 2 and 4 times the training length."""
    length = config.data.sequence_length
    return tuple(sorted(set(config.evaluation.needles.lengths or (length, 2 * length, 4 * length))))


class Measurement:
    """Plans the pieces of work, computes any of them, and puts the results together."""

    def __init__(self, config: TrainConfig, runs: Sequence[TrainedRun], held_out: HeldOutText) -> None:
        self._config, self._held_out = config, held_out
        self._runs = {("run", "twin")[index]: run for index, run in enumerate(runs)}
        self._length = config.data.sequence_length
        self._decoder = functools.lru_cache(maxsize=2)(self._load_decoder)

    def pieces(self) -> list[Piece]:
        """Everything to be measured. Raises UserError where the held-out text is too short."""
        evaluation, needles = self._config.evaluation, self._config.evaluation.needles
        sequences = self._held_out.sequences(evaluation.sequences, self._length)
        prompts = self._prompts() if needles.samples else {}
        pieces: list[Piece] = []
        for name, run in self._runs.items():
            has_memory = name == "run" and bool(run.config.model.memory_layers)
            conditions = CONDITIONS if has_memory else CONDITIONS[:1]
            pieces += stream_pieces(name, self._identity(name, None), conditions, sequences, evaluation.streams)
            # A twin is compared at the first reading; without a memory every number of readings gives the same answers.
            iterations = sorted(set(needles.iterations)) if has_memory else [0]
            identity = functools.partial(self._identity, name)
            pieces += needle_pieces(name, identity, prompts, iterations, needles)
        return pieces

    def compute(self, piece: Piece) -> Any:
        """The result of one piece, as JSON values. No fast state changes."""
        work: StreamWork | NeedleWork = piece.work
        if isinstance(work, StreamWork):
            return asdict(stream_losses(self._decoder(work.run, None, None), work.batches, work.condition))
        protocol = self._config.evaluation.needles.protocol
        rope_factor = self._rope_factor(work.run, work.length)
        model = self._decoder(work.run, "sequence" if protocol == "official" else None, rope_factor)
        reader = Reader(model, protocol, len(work.batches[0]), self._held_out.codec.vocab_size)
        found = []
        for prompts in work.batches:
            for prompt, tokens in zip(prompts, reader.answer(prompts, work.readings), strict=True):
                answer = self._held_out.codec.decode(tokens)
                found.append({"answer": answer, "depth": prompt.depth, **asdict(score(prompt, answer))})
        return found

    def findings(self, pieces: Sequence[Piece], results: Mapping[str, Any]) -> Findings:
        """What the pieces say together, and the gates over a stretch of text."""
        tokens = self._held_out.tokens[: self._config.evaluation.gate_tokens]
        gates = gates_of(self._decoder("run", None, None), torch.from_numpy(tokens.copy()).unsqueeze(0))
        return Findings(
            runs=self._runs,
            config=self._config,
            pieces=pieces,
            results=results,
            edges=bucket_edges(self._length),
            gate_text=[self._held_out.codec.decode([token]) for token in tokens.tolist()],
            gates={block: gate_BT[0].tolist() for block, gate_BT in gates.items()},
        )

    def _prompts(self) -> dict[int, list[NeedlePrompt]]:
        needles = self._config.evaluation.needles
        text = self._held_out
        maker = PromptMaker(text.as_one(), text.codec, needles.needles, needles.depths)
        return {
            length: [maker.make(length, needles.seed, sample) for sample in range(needles.samples)]
            for length in needle_lengths(self._config)
        }

    def _identity(self, name: str, length: int | None) -> dict[str, Any]:
        """What determines a run's model and memory, for prompts of a length."""
        run = self._runs[name]
        model = run.config.model_dump(mode="json")["model"]
        return {
            "checkpoint": run.identity,
            "model": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
            "precision": run.config.training.precision,
            "replica": self._config.evaluation.replica,
            "rope_factor": None if length is None else self._rope_factor(name, length),
        }

    def _rope_factor(self, name: str, length: int) -> float | None:
        """YaRN's factor for prompts of a length; None leaves RoPE as trained."""
        setting = self._config.evaluation.rope_scaling
        trained = self._runs[name].config
        if setting == "none" or length <= trained.data.sequence_length:
            return None
        if setting == "auto":
            return length / trained.data.sequence_length if "full_attention" in trained.model.mixers else None
        return float(setting)

    def _load_decoder(self, name: str, chunk_size: Literal["sequence"] | None, rope_factor: float | None) -> Decoder:
        run = self._runs[name]
        settings = run.config.model
        backend = megatron_backend(settings.initial_std, settings.norm_epsilon)
        return load_decoder(run, backend, self._config.evaluation.replica, chunk_size, rope_factor)


def processes_to_start(request: Request) -> int:
    """One process a core and for each GPU, unless `parallel.processes` is given.

    The run's own number is no measure: it may have been trained on a larger machine. Raises UserError for what can be
    seen before processes start.
    """
    config = read_run_config(request.run, request.overrides)
    if any(text.startswith("parallel.processes=") for text in request.overrides):
        return config.parallel.processes
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))
