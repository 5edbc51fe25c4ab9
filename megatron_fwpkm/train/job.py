"""A training job from beginning to end, in one of its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_fwpkm.checkpoint.engine_state import EngineState
from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.folder import CHECKPOINTS, checkpoints_in, newest_whole
from megatron_fwpkm.checkpoint.parts import (
    CheckpointPart,
    FastStates,
    RandomGenerators,
    SlowWeights,
    TableValues,
    embedding_rows,
)
from megatron_fwpkm.checkpoint.store import CheckpointStore, group_for_files, layout_of
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.scratch import SCRATCH_VARIABLE
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.perplexity import HeldOutLoss
from megatron_fwpkm.model.decoder import BlockStack, Decoder
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.parallel.backend import megatron_backend
from megatron_fwpkm.profiling.peak import Peak, device_peak
from megatron_fwpkm.terminal import duration, print_line
from megatron_fwpkm.train.display import perplexity
from megatron_fwpkm.train.dry_run import padded_vocabulary
from megatron_fwpkm.train.engine import EngineBundle, build_training
from megatron_fwpkm.train.environment import describe_environment
from megatron_fwpkm.train.job_data import JobData, open_data
from megatron_fwpkm.train.joining import Joined, joined_job
from megatron_fwpkm.train.loop import Job, Progress, evaluate, resume, train
from megatron_fwpkm.train.recorder import Recorder
from megatron_fwpkm.train.run_directory import check_same_configuration, write_description, write_summary
from megatron_fwpkm.train.samples import Sampler, prompts_from
from megatron_fwpkm.train.settings import MemoryPolicy
from megatron_fwpkm.train.stop import StopRequest


def run_job(config: TrainConfig) -> None:
    """Train, evaluate and summarize as one rank of the job; every rank calls this with the same configuration.

    Resumes by itself when the run directory has a checkpoint. Raises UserError for what the user can mend, and
    SystemExit with a status above 0, the reason said and logged, when this rank or another one failed.
    """
    started = time.perf_counter()
    with joined_job(config) as joined:
        _run(config, joined, started)


def _run(config: TrainConfig, joined: Joined, started: float) -> None:
    ranks = joined.ranks
    say: Callable[[str], None] = print_line if ranks.is_leader else _ignore
    # The command that started the processes has prepared the data and said so.
    said = SCRATCH_VARIABLE in os.environ
    data = open_data(config, ranks, joined.scratch, _ignore if said else say)
    notes: list[str] = []
    files = group_for_files(config.checkpoint.timeout_seconds)
    source = _find_checkpoint(config, ranks, files, notes.append)
    job = _build(config, ranks, data, _vocabulary(config, data, source, files), files)
    progress = _resume_or_begin(job, source, notes.append)
    reason = _no_samples_because(config, ranks)
    if reason and config.logging.samples:
        notes.append(f"no prompts are continued at evaluations: {reason}")
    peak = _describe_run(job)
    with job.recorder as recorder:
        parallel.agree_on_errors(lambda: recorder.open(progress.step), "opening metrics and logs")
        for line in (*notes, _describe(job, peak)):
            recorder.say(line)
        try:
            _train_and_measure(job, progress, joined.stop, started)
        finally:
            job.loader.close()
        parallel.agree_on_errors(recorder.check, "recording the run")


def _train_and_measure(job: Job, progress: Progress, stop: StopRequest, started: float) -> None:
    config = job.config
    first_step = progress.step
    train(job, progress, stop.is_set)
    if progress.step < config.training.steps:
        reason = "as asked" if progress.stopped_early else "(training.stop_after_step)"
        job.recorder.say(f"stopped after step {progress.step} {reason}; start again to go on")
        return
    if first_step == progress.step:
        job.recorder.say("training is complete, nothing left to do; measuring again")
    result = evaluate(job, progress)
    seconds = time.perf_counter() - started
    parallel.on_leader(lambda: _summarize(job, progress, result, seconds), "writing the summary")


def _find_checkpoint(
    config: TrainConfig, ranks: parallel.Topology, files: torch.distributed.ProcessGroup, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint of this run to go on from, if it has any."""
    run_directory = Path(config.run_directory)
    folder = run_directory / CHECKPOINTS

    def compare() -> None:
        if checkpoints_in(folder):
            check_same_configuration(run_directory, config)

    parallel.on_leader(compare, "comparing configurations")
    return newest_whole(folder, ranks, say, files)


def _vocabulary(config: TrainConfig, data: JobData, source: Path | None, files: torch.distributed.ProcessGroup) -> int:
    """Rows of the embedding: those of the checkpoint, where there is one."""
    if source is None:
        return padded_vocabulary(data.vocab_size, config.parallel.tensor)
    return vocabulary_of(source, config.parallel.tensor, files, data.vocab_size)


def vocabulary_of(source: Path, tensor_ranks: int, files: torch.distributed.ProcessGroup, tokens: int = 0) -> int:
    """Rows of a checkpoint's embedding; all ranks call this together, and wait for it in the group for files.

    Raises SharedUserError where they can't be split over so many ranks, or are fewer than so many tokens.
    """

    def read() -> int:
        try:
            return embedding_rows(SavedTensors(source / TENSORS), tensor_ranks, tokens)
        except ValueError as error:
            raise UserError(f"{source} can't be loaded: {error}") from error

    return parallel.on_leader(read, f"reading {source}", files)


def _build(
    config: TrainConfig,
    ranks: parallel.Topology,
    data: JobData,
    vocab_size: int,
    files: torch.distributed.ProcessGroup,
) -> Job:
    model = build_model(config, ranks, vocab_size)
    model.recompute_sublayers(config.training.activation_checkpointing == "sublayers")
    count = model.num_parameters()  # before ZeRO-3 takes the weights apart
    bundle = build_training(model, config.optimizer, config.training)
    recorder = Recorder(config, ranks.is_leader)
    prompts_BT = prompts_from(data.held_out, config.logging.samples, config.logging.sample_prompt_tokens)
    sampling = ranks.replica == 0 and not _no_samples_because(config, ranks)
    if sampling and prompts_BT is not None and data.tokenizer is not None and isinstance(model, Decoder):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(data.tokenizer))
        recorder.sampler = Sampler(model, tokenizer, prompts_BT, config.logging.sample_new_tokens)
    return Job(
        config=config,
        topology=ranks,
        engine_bundle=bundle,
        model=model,
        loader=data.loader,
        held_out=data.held_out,
        corpus=data.identity,
        store=CheckpointStore(
            Path(config.run_directory) / CHECKPOINTS,
            ranks,
            checkpoint_parts(bundle, model, ranks, config.checkpoint.memories),
            keep_last_k=config.checkpoint.keep_last_k,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            group=files,
        ),
        layout=describe_layout(config, ranks),
        recorder=recorder,
        parameters=count,
        **_ways_of_a_pipeline(ranks, bundle.engine),
    )


def describe_layout(config: TrainConfig, ranks: parallel.Topology) -> dict[str, Any]:
    """How the ranks of a job divide the work, as checkpoints tell it."""
    training = config.training
    return layout_of(ranks, training.zero_stage, training.micro_batch_size, training.gradient_accumulation)


def checkpoint_parts(
    bundle: EngineBundle, model: BlockStack, ranks: parallel.Topology, memories: MemoryPolicy | None = None
) -> dict[str, CheckpointPart]:
    """The owners of everything that a job's checkpoint has."""
    name_of = getattr(model, "decoder_name", str)  # a stage of a pipeline has other names
    return {
        "slow weights": SlowWeights(EngineState(bundle.engine, model, name_of), ranks),
        "trained tables": TableValues(bundle.tables, name_of, ranks.replica, ranks.replicas),
        "memories": FastStates(model, ranks, memories),
        "random generators": RandomGenerators(ranks),
    }


def build_model(config: TrainConfig, ranks: parallel.Topology, vocab_size: int) -> BlockStack:
    """The model, or this rank's stage of it; `vocab_size` are the rows of the whole embedding."""
    backend = megatron_backend(config.model.initial_std, config.model.norm_epsilon, ranks.placement)
    if ranks.stages == 1:
        return Decoder(config.model, vocab_size, backend, config.seed)
    from megatron_fwpkm.model.pipeline import PipelineDecoder

    return PipelineDecoder(config.model, vocab_size, backend, config.seed, ranks, config.data.sequence_length)


def _ways_of_a_pipeline(ranks: parallel.Topology, engine: Any) -> dict[str, Any]:
    """What makes steps of stages and measures them; nothing for a whole model."""
    if ranks.stages == 1:
        return {}
    from megatron_fwpkm.train.pipeline_step import PipelineStepper, pipeline_loss_sum

    return {"stepper": PipelineStepper, "loss_sum": partial(pipeline_loss_sum, engine)}


def _no_samples_because(config: TrainConfig, ranks: parallel.Topology) -> str:
    """Why the ranks of the first replica can't run the model on their own; empty if they can."""
    if config.training.zero_stage == 3:
        return "with training.zero_stage 3 every use of a weight is an exchange between replicas"
    if ranks.stages > 1:
        return "the layers are divided into stages"
    return "a memory is spread over several replicas" if ranks.placement.replicas > 1 else ""


def _resume_or_begin(job: Job, source: Path | None, say: Callable[[str], None]) -> Progress:
    if source is None:
        return Progress()
    progress = resume(job, source, say)
    complete = progress.step >= job.config.training.steps
    say(f"resumed from {source}, {'the final checkpoint' if complete else f'step {progress.step}'}")
    return progress


def _describe_run(job: Job) -> Peak:
    """Write config.yaml and environment.json; sets the job's peak and returns one process's."""
    config, run_directory = job.config, Path(job.config.run_directory)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]
    torch.distributed.barrier()  # measured on all ranks at once: they share cores
    peak = device_peak(job.engine.device, dtype, config.logging.peak_teraflops)
    total = torch.tensor(peak.flops, dtype=torch.float64, device=job.engine.device)
    job.peak_flops = parallel.sum_over_ranks(total).item()

    def write() -> None:
        try:
            write_description(run_directory, config, describe_environment(job.topology.world_size, peak))
        except PermissionError as error:
            raise UserError(f"cannot write to {run_directory}: {error.strerror}; give another run_directory") from error

    parallel.on_leader(write, f"writing to {run_directory}")
    return peak


def _describe(job: Job, peak: Peak) -> str:
    config = job.config
    per_step = (
        config.training.micro_batch_size
        * config.training.gradient_accumulation
        * job.topology.replicas
        * config.data.sequence_length
    )
    blocks = list(config.model.memory_layers) or "none"
    flops = job.model.num_flops_per_token(config.data.sequence_length)
    count = job.parameters
    each = "" if job.topology.tensor_ranks * job.topology.stages == 1 else " a process"
    return (
        f"model: {count.slow / 1e6:.2f} million slow and {count.fast / 1e6:.2f} million fast weights{each}, "
        f"{flops / 1e6:.1f} MFLOP a token, memory in blocks {blocks}; {job.topology.world_size} processes, "
        f"{per_step:,} tokens a step, {config.training.steps} steps; MFU is of {job.peak_flops / 1e12:.3g} TFLOP/s "
        f"({peak.source}; {job.topology.world_size} x {peak.flops / 1e12:.3g})"
    )


def _summarize(job: Job, progress: Progress, result: HeldOutLoss, seconds: float) -> None:
    config = job.config
    run_directory = Path(config.run_directory)
    flops_per_token = job.model.num_flops_per_token(config.data.sequence_length)
    mfu = flops_per_token * progress.tokens_per_second / job.peak_flops
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
        "mfu": mfu or None,
        "peak_flops": job.peak_flops,
        "seconds": seconds,
    }
    write_summary(run_directory, values)
    speed = f"{progress.tokens_per_second:,.0f} tokens/s" if progress.seconds else "no step made in this start"
    job.recorder.table(
        f"{config.name}: {progress.step} steps, {progress.tokens:,} tokens",
        [
            (
                f"training loss, first step -> mean of last {len(progress.recent_losses)}",
                f"{_number(progress.first_loss)} -> {_number(progress.last_loss)}",
            ),
            ("held-out perplexity", f"{values['perplexity']:.3f}"),
            ("  without memory reads", f"{values['perplexity_without_reads']:.3f}"),
            ("speed", speed),
            ("  model FLOPs utilization", f"{mfu:.1%} of {job.peak_flops / 1e12:.3g} TFLOP/s"),
            ("time of this start", duration(seconds)),
            ("skipped steps", str(progress.skipped_steps)),
            ("run directory", str(run_directory)),
            ("TensorBoard", f"tensorboard --logdir {run_directory / 'tensorboard'}"),
        ],
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _ignore(line: str) -> None:
    pass
