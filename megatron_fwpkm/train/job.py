"""A training job from beginning to end, in one of its processes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch.distributed

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.data.manifest import Manifest, check_shards
from megatron_fwpkm.data.prepare import corpus_request, prepare_corpus
from megatron_fwpkm.data.scratch import SCRATCH_VARIABLE, open_scratch, use_as_temporary_folder
from megatron_fwpkm.data.streaming import TokenLoader
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.evaluate.perplexity import HeldOutLoss
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.parallel.backend import megatron_backend
from megatron_fwpkm.train.checkpoint import CheckpointStore
from megatron_fwpkm.train.display import Display, duration, perplexity
from megatron_fwpkm.train.engine import build_engine
from megatron_fwpkm.train.loop import Job, Progress, evaluate, resume, train
from megatron_fwpkm.train.metrics import MetricsWriter
from megatron_fwpkm.train.optimizer import build_optimizer
from megatron_fwpkm.train.run_directory import (
    check_same_configuration,
    lock_run_directory,
    write_description,
    write_summary,
)
from megatron_fwpkm.train.stop import StopRequest, end_with_parent

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this times the tensor-parallel size."""


def prepare_data(config: TrainConfig, report: Callable[[str], None]) -> tuple[Path, Manifest]:
    """The corpus that the configuration asks for, prepared if it is not there."""
    return prepare_corpus(corpus_request(config.data, config.seed), Path(config.data.directory), report)


def run_job(config: TrainConfig) -> None:
    """Train, evaluate and summarize as one rank of the job; every rank calls this with the same configuration.

    Resumes by itself when the run directory has a checkpoint. Raises UserError for what the user can mend.
    """
    started = time.perf_counter()
    stop = StopRequest()
    end_with_parent()
    ranks = parallel.initialize(config.parallel.tensor, config.parallel.timeout_seconds)
    with ExitStack() as open_things:
        open_things.callback(parallel.shut_down)
        scratch = open_things.enter_context(_shared_scratch(ranks))
        run_lock = parallel.agree_on_errors(
            lambda: lock_run_directory(Path(config.run_directory)) if ranks.is_leader else nullcontext(),
            "locking the run directory",
        )
        open_things.enter_context(run_lock)
        say: Callable[[str], None] = _print if ranks.is_leader else _ignore
        # The command that started the processes has prepared the data and said so.
        said = SCRATCH_VARIABLE in os.environ
        corpus, manifest = _prepare_in_turns(config, ranks, _ignore if said else say)
        _check_sizes(config, ranks, manifest)
        job = _build(config, ranks, corpus, manifest, scratch)
        progress = _resume_or_begin(job, say)
        if ranks.is_leader:
            run_directory = Path(config.run_directory)
            job.metrics = open_things.enter_context(MetricsWriter(run_directory, progress.step, config.logging.every))
        job.display = open_things.enter_context(
            Display(ranks.is_leader, config.logging.every, config.training.steps, progress.step)
        )
        job.display.say(_describe(job))
        _train_and_measure(job, progress, stop, started)


def _train_and_measure(job: Job, progress: Progress, stop: StopRequest, started: float) -> None:
    config, display = job.config, job.display
    first_step = progress.step
    train(job, progress, stop.is_set)
    if progress.step < config.training.steps:
        reason = "as asked" if progress.stopped_early else "(training.stop_after_step)"
        display.say(f"stopped after step {progress.step} {reason}; start again to go on")
        return
    if first_step == progress.step:
        display.say("training is complete, nothing left to do; measuring again")
    result = evaluate(job, progress)
    if job.topology.is_leader:
        _summarize(job, progress, result, time.perf_counter() - started)


def _prepare_in_turns(
    config: TrainConfig, ranks: parallel.Topology, say: Callable[[str], None]
) -> tuple[Path, Manifest]:
    """Rank 0 prepares what is missing; the others then find it prepared."""
    if ranks.is_leader:
        corpus = parallel.agree_on_errors(lambda: _prepare_and_verify(config, say), "preparing the data")
        parallel.agree_on_errors(lambda: None, "reading the manifest")
    else:
        parallel.agree_on_errors(lambda: None, "preparing the data")
        corpus = parallel.agree_on_errors(lambda: prepare_data(config, say), "reading the manifest")
    return corpus


def _prepare_and_verify(config: TrainConfig, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    corpus, manifest = prepare_data(config, say)
    check_shards(corpus)
    return corpus, manifest


def _build(config: TrainConfig, ranks: parallel.Topology, corpus: Path, manifest: Manifest, scratch: Path) -> Job:
    multiple = VOCABULARY_MULTIPLE * config.parallel.tensor
    model = Decoder(
        config.model,
        vocab_size=-(-manifest.vocab_size // multiple) * multiple,
        backend=megatron_backend(config.model.initial_std, config.model.norm_epsilon),
        seed=config.seed,
    )
    settings = config.optimizer
    optimizer = build_optimizer(model, settings.learning_rate, settings.betas, settings.epsilon, settings.weight_decay)
    engine = build_engine(model, optimizer, config.training, settings)

    def loader(split: str, shuffle: bool) -> TokenLoader:
        batch_size, data = config.training.micro_batch_size, config.data
        return TokenLoader(corpus / split, scratch / split, batch_size, shuffle, data.shuffle_seed, data.workers)

    return Job(
        config=config,
        topology=ranks,
        engine=engine,
        model=model,
        loader=loader("train", shuffle=True),
        held_out=_held_out(config, ranks, manifest, loader("validation", shuffle=False)),
        corpus={"corpus": manifest.corpus_sha256, "tokenizer": manifest.tokenizer_sha256},
        store=CheckpointStore(Path(config.run_directory) / "checkpoints", config.checkpoint.keep, ranks),
        display=Display(False, config.logging.every, config.training.steps, 0),
        metrics=None,
    )


def _held_out(
    config: TrainConfig, ranks: parallel.Topology, manifest: Manifest, loader: TokenLoader
) -> list[TokenBatch]:
    """This rank's fixed held-out batches: as many as asked for, at most one epoch."""
    sequences = min(config.evaluation.sequences, manifest.splits["validation"].sequences)
    batches = sequences // (ranks.world_size * config.training.micro_batch_size)
    return parallel.agree_on_errors(
        lambda: list(itertools.islice(loader, max(1, batches))), "reading the held-out data"
    )


def _check_sizes(config: TrainConfig, ranks: parallel.Topology, manifest: Manifest) -> None:
    """Raise UserError, on every rank alike, if a split has too few sequences for one batch on every rank."""
    needed = ranks.world_size * config.training.micro_batch_size
    for split, counts in manifest.splits.items():
        if counts.sequences < needed:
            raise SharedUserError(
                f"the {split} split has {counts.sequences} sequences and one microbatch on each of {ranks.world_size} "
                f"processes takes {needed}; lower training.micro_batch_size or data.sequence_length, or raise "
                f"data.max_documents or data.validation_fraction"
            )


def _resume_or_begin(job: Job, say: Callable[[str], None]) -> Progress:
    run_directory = Path(job.config.run_directory)
    latest = parallel.agree_on_errors(job.store.latest, "looking for a checkpoint")
    if latest is None:
        progress = Progress()
    else:
        parallel.agree_on_errors(
            lambda: check_same_configuration(run_directory, job.config), "comparing configurations"
        )
        progress = resume(job, latest)
        complete = progress.step >= job.config.training.steps
        say(f"resumed from {latest}, {'the final checkpoint' if complete else f'step {progress.step}'}")

    def describe() -> None:
        if job.topology.is_leader:
            try:
                run_directory.mkdir(parents=True, exist_ok=True)
                write_description(run_directory, job.config, job.topology.world_size)
            except OSError as error:
                raise UserError(
                    f"cannot write to {run_directory}: {error.strerror}; give another run_directory"
                ) from error

    parallel.agree_on_errors(describe, f"writing to {run_directory}")
    return progress


def _describe(job: Job) -> str:
    config = job.config
    per_step = (
        config.training.micro_batch_size
        * config.training.gradient_accumulation
        * job.topology.replicas
        * config.data.sequence_length
    )
    blocks = list(config.model.memory_layers) or "none"
    flops = job.model.num_flops_per_token(config.data.sequence_length)
    fast = sum(layer.num_parameters()["fast"] for _, layer in job.model.memory_layers())
    return (
        f"model: {job.model.num_parameters() / 1e6:.2f} million slow and {fast / 1e6:.2f} million fast weights, "
        f"{flops / 1e6:.1f} MFLOP a token, memory in blocks {blocks}; {job.topology.world_size} processes, "
        f"{per_step:,} tokens a step, {config.training.steps} steps"
    )


def _summarize(job: Job, progress: Progress, result: HeldOutLoss, seconds: float) -> None:
    config = job.config
    run_directory = Path(config.run_directory)
    values = {
        "step": progress.step,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped_steps,
        "first_loss": progress.first_loss,
        "last_loss": progress.last_loss,
        "perplexity": perplexity(result.with_reads),
        "perplexity_without_reads": perplexity(result.without_reads),
        "held_out_tokens": result.tokens,
        "tokens_per_second": progress.tokens_per_second or None,
        "seconds": seconds,
    }
    write_summary(run_directory, values)
    speed = f"{progress.tokens_per_second:,.0f} tokens/s" if progress.seconds else "no step made in this start"
    job.display.table(
        f"{config.name}: {progress.step} steps, {progress.tokens:,} tokens",
        [
            (
                f"training loss, first step -> mean of last {len(progress.recent_losses)}",
                f"{_number(progress.first_loss)} -> {_number(progress.last_loss)}",
            ),
            ("held-out perplexity", f"{values['perplexity']:.3f}"),
            ("  without memory reads", f"{values['perplexity_without_reads']:.3f}"),
            ("speed", speed),
            ("time of this start", duration(seconds)),
            ("skipped steps", str(progress.skipped_steps)),
            ("run directory", str(run_directory)),
            ("TensorBoard", f"tensorboard --logdir {run_directory / 'tensorboard'}"),
        ],
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


@contextmanager
def _shared_scratch(ranks: parallel.Topology) -> Iterator[Path]:
    """The job's temporary folder, shared by this machine's ranks and theirs alone."""
    given = os.environ.get(SCRATCH_VARIABLE)
    with ExitStack() as opened:
        own = None
        if given is None and ranks.local_rank == 0:
            own, _ = opened.enter_context(open_scratch())
        folders: list[Path | None] = [None] * ranks.world_size
        torch.distributed.all_gather_object(folders, own)
        folder = Path(given) if given else folders[ranks.rank - ranks.local_rank]
        assert folder is not None
        use_as_temporary_folder(folder)
        yield folder
        if given is None:
            torch.distributed.barrier()  # the folder is in use until the last rank is done


def _print(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    pass
