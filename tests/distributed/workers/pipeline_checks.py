"""A model in pipeline stages against the same on one rank, step by step; prints what it found on rank 0.

pipeline_checks.py <configuration, unused> <check>...
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fwpkm_kernels.reference import subkey_scores
from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.evaluate.perplexity import batch_loss, held_out_loss, measuring
from megatron_fwpkm.memory import MemoryConfig, addressing
from megatron_fwpkm.memory.addressing import Address
from megatron_fwpkm.model.decoder import BlockStack, Decoder
from megatron_fwpkm.model.settings import DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import TorchBackend, megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train import engine
from megatron_fwpkm.train.optimizer import parameter_groups
from megatron_fwpkm.train.schedule import limits_attention
from megatron_fwpkm.train.settings import OptimizerConfig, TrainingConfig
from megatron_fwpkm.train.step import StepResult

VOCABULARY, LENGTH, ROWS, STEPS = 64, 16, 2, 3
RATES = [2e-3, 3e-3, 1e-3]
CONFIG = DecoderConfig(
    hidden_size=32,
    layers=3,
    mixers=("full_attention", "gated_delta_net", "sliding_attention"),
    attention_heads=4,
    key_value_heads=2,
    head_dim=8,
    mlp_size=48,
    window=8,
    delta_net=DeltaNetConfig(key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=6),
    memory=MemoryConfig(heads=1, topk=2, n_subkeys=5, k_dim=16, v_dim=16, chunk_size=8),
    memory_layers=(0, 2),
    initial_std=0.1,
)
# A large epsilon: AdamW divides tiny gradients by their own size, and would show the last bits of sums as whole steps.
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, epsilon=1e-3, gradient_clipping=0.5, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout and what is trained in it."""

    seed: int
    tensor: int = 1
    replicas: int = 1
    accumulation: int = 1
    tied: bool = True
    documents: bool = False
    sgd: bool = False
    double: bool = False
    sequence_parallel: bool = False

    @property
    def config(self) -> DecoderConfig:
        return dataclasses.replace(CONFIG, tied_embeddings=self.tied)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def training(self) -> TrainingConfig:
        options: dict[str, Any] = {"gradient_accumulation": self.accumulation, "sliding_probability": 0.5}
        training = TrainingConfig(steps=STEPS, micro_batch_size=ROWS, **options)
        return training.model_copy(update={"zero_stage": 0}) if self.double else training

    def batches(self, replica: int) -> Iterator[TokenBatch]:
        generator = torch.Generator().manual_seed(100 * self.seed + replica)
        while True:
            tokens_BT = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
            labels_BT = tokens_BT[:, 1:].clone()
            labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.2 * (1 + replica)] = IGNORED_LABEL
            batch = TokenBatch(tokens_BT[:, :-1], labels_BT)
            if self.documents:
                starts_BT = torch.rand(labels_BT.shape, generator=generator) < 0.1
                batch = dataclasses.replace(batch, documents_BT=starts_BT.long().cumsum(1))
            yield batch


CASES = {
    "one microbatch": Case(1),
    "four in flight": Case(18, accumulation=4, documents=True),
    "untied, SGD": Case(2, accumulation=4, tied=False, sgd=True),
    "float64": Case(6, accumulation=4, double=True),
    "replicas": Case(8, replicas=2, accumulation=2),
    "replicas, float64": Case(6, replicas=2, accumulation=2, double=True),
    "tensor": Case(5, tensor=2, accumulation=4),
    "tensor, sequence": Case(5, tensor=2, accumulation=4, sequence_parallel=True),
    "tensor, sequence, float64": Case(6, tensor=2, accumulation=4, sequence_parallel=True, double=True),
}


def build_sgd(model: torch.nn.Module, rate: float, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
    """In place of AdamW."""
    return torch.optim.SGD(parameter_groups(model, 0.1), lr=rate)


def optimizer_of(case: Case) -> Callable[..., torch.optim.Optimizer]:
    return build_sgd if case.sgd else engine.build_optimizer


@dataclasses.dataclass
class Run:
    """What a training leaves."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]
    """Of this rank's replica."""
    statistics: dict[str, float]
    margin: float = math.inf


# -- one rank ---------------------------------------------------------------------------------------------------------


def margin_of(address: Address, query_GXd: Tensor, keys_MH2nd: Tensor, config: MemoryConfig) -> float:
    """Smallest distance between a score that was taken and the best one that was not."""
    k, (one, other) = config.topk, (slice(0, None, 2), slice(1, None, 2))
    scores_GXn = torch.stack(
        [subkey_scores(q, keys, config.score_type) for q, keys in zip(query_GXd, keys_MH2nd.flatten(0, 2), strict=True)]
    )
    best_GXn = scores_GXn.topk(k + 1, -1).values
    sums = (best_GXn[one, :, :k, None] + best_GXn[other, :, None, :k]).flatten(2).topk(k + 1, -1).values
    return min(float((found[..., k - 1] - found[..., k]).min()) for found in (best_GXn, sums))


def train_on_one_rank(case: Case, replica: int) -> Run:
    """The obvious way: replicas one after the other, gradients added up, one optimizer."""
    models = [
        Decoder(case.config, VOCABULARY, TorchBackend(CONFIG.initial_std), seed=case.seed, fast_dtype=case.dtype)
        for _ in range(case.replicas)
    ]
    for model in models:
        model.to(case.dtype).train()
    whole = models[0]
    options = OPTIMIZER
    optimizer = optimizer_of(case)(whole, options.learning_rate, options.betas, options.epsilon, options.weight_decay)
    streams = [case.batches(index) for index in range(case.replicas)]
    run = Run([], [], {}, {}, {}, {})

    def watched(query_GXd: Tensor, keys_MH2nd: Tensor, config: MemoryConfig) -> Address:
        found = find(query_GXd, keys_MH2nd, config)
        run.margin = min(run.margin, margin_of(found, query_GXd.detach(), keys_MH2nd.detach(), config))
        return found

    find = addressing.address
    for step in range(1, STEPS + 1):
        batches = [list(itertools.islice(stream, case.accumulation)) for stream in streams]
        labels = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for share in batches for batch in share)
        total = 0.0
        with mock.patch.object(addressing, "address", watched):
            for model, share in zip(models, batches, strict=True):
                model.limit_full_attention = limits_attention(case.seed, step, case.training.sliding_probability)
                for batch in share:
                    loss = model(batch.tokens_BT, batch.labels_BT, batch.documents_BT).sum() / labels
                    loss.backward()
                    total += float(loss.detach())
        for copies in zip(*(model.parameters() for model in models), strict=True):
            copies[0].grad = sum(copy.grad for copy in copies if copy.grad is not None)
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None, name
            run.gradients[f"{step} {name}"] = parameter.grad.clone()
        norms = [parameter.grad.norm() for parameter in whole.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if options.gradient_clipping:
            factor = min(1.0, options.gradient_clipping / (float(norm) + 1e-6))
            for parameter in whole.parameters():
                assert parameter.grad is not None
                parameter.grad *= factor
        for group in optimizer.param_groups:
            group["lr"] = RATES[step - 1]
        optimizer.step()
        with torch.no_grad():
            for copies in zip(*(model.parameters() for model in models), strict=True):
                for copy in copies:
                    copy.copy_(copies[0])
                    copy.grad = None
        run.losses.append(total)
        run.norms.append(float(norm))
    run.weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    run.states = states_of(models[replica])
    return run


def states_of(model: BlockStack, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Copies of sub-keys and values; values that are spread over a group whole."""
    found = {}
    for index, state in model.fast_states():
        found[f"block {index} keys"] = state.keys_H2nd.clone()
        values_ND = state.values_ND()
        if state.owned is not None:
            own_ND, there = values_ND, state.owned >= 0
            values_ND = own_ND.new_zeros(state.config.num_slots, own_ND.shape[1])
            values_ND[state.owned[there]] = own_ND[there]
            dist.all_reduce(values_ND, group=group)
        found[f"block {index} values"] = values_ND
    return found


# -- a pipeline -------------------------------------------------------------------------------------------------------


class Stage:
    """A rank's stage of a model in training, and what measures it."""

    def __init__(self, case: Case) -> None:
        from megatron_fwpkm.model.pipeline import PipelineDecoder
        from megatron_fwpkm.train.pipeline_step import PipelineStepper, pipeline_loss_sum

        options: dict[str, Any] = {"tensor": case.tensor, "sequence_parallel": case.sequence_parallel}
        self.ranks = topology.build_groups(ParallelConfig(pipeline=2, timeout_seconds=60, **options))
        backend = megatron_backend(CONFIG.initial_std, CONFIG.norm_epsilon, self.ranks.placement)
        self.model = PipelineDecoder(case.config, VOCABULARY, backend, case.seed, self.ranks, LENGTH, case.dtype)
        self.model.to(case.dtype)
        self.start = {name: tensor.clone() for name, tensor in self.weights().items()}
        with mock.patch.object(engine, "build_optimizer", optimizer_of(case)):
            bundle = engine.build_training(self.model, OPTIMIZER, case.training)
        self.engine = bundle.engine
        self.stepper = PipelineStepper(
            bundle,
            self.model,
            case.batches(self.ranks.replica),
            training=case.training,
            seed=case.seed,
            topology=self.ranks,
        )
        self.loss_sum = partial(pipeline_loss_sum, self.engine)

    def step(self, number: int) -> StepResult:
        return self.stepper.run(number, RATES[(number - 1) % len(RATES)], lambda: False)

    def weights(self) -> dict[str, Tensor]:
        """By the names that they have in a Decoder."""
        return {self.model.decoder_name(name): value.detach() for name, value in self.model.named_parameters()}

    def everything(self) -> dict[str, Tensor]:
        """Copies of weights and fast states."""
        return {
            name: tensor.clone()
            for name, tensor in {**self.weights(), **states_of(self.model, self.ranks.placement.memory_group)}.items()
        }


def train_in_stages(case: Case) -> tuple[Run, topology.Topology]:
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    stage = Stage(case)
    model, ranks = stage.model, stage.ranks
    run = Run([], [], {}, {}, {}, {})
    reduce_gradients = PipelineEngine._INSTRUCTION_MAP[schedule.ReduceGrads]

    def watched(self: PipelineEngine) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            gradient = parameter.grad.clone()
            dist.all_reduce(gradient, group=model._grid.dp_proc_group)
            run.gradients[f"{len(run.losses) + 1} {model.decoder_name(name)}"] = gradient / ranks.replicas
        reduce_gradients(self)

    with mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.ReduceGrads: watched}):
        for step in range(1, STEPS + 1):
            result = stage.step(step)
            assert result.applied
            run.losses.append(result.loss)
            run.norms.append(result.gradient_norm)
    run.statistics = result.memory
    run.weights, run.states = stage.weights(), states_of(model, ranks.placement.memory_group)
    return run, ranks


def compare(case: Case) -> dict[str, Any]:
    run, ranks = train_in_stages(case)
    wanted = train_on_one_rank(case, ranks.replica)
    errors: dict[str, float] = {
        "loss": max(abs(a - b) / b for a, b in zip(run.losses, wanted.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(run.norms, wanted.norms, strict=True)),
    }
    for kind in ("gradients", "weights", "states"):
        found, expected = getattr(run, kind), getattr(wanted, kind)
        # Smaller gradients, of decay rates, are what is left of terms that cancel; float64 shows that they are right.
        floor = 1e-3 * min(wanted.norms) if kind == "gradients" and not case.double else 1e-12
        errors[kind] = max(error_ratio(tensor, expected[name], ranks, floor) for name, tensor in found.items())
    shared: list[Any] = [None] * ranks.world_size
    names = (sorted(run.weights), sorted(run.states))
    dist.all_gather_object(shared, (errors, names, sorted(run.statistics)))
    weights = set().union(*(set(names[0]) for _, names, _ in shared))
    states = set().union(*(set(names[1]) for _, names, _ in shared))
    assert weights == set(wanted.weights), weights ^ set(wanted.weights)
    assert states == set(wanted.states)
    blocks = {name.split("/")[1] for name in shared[0][2]}
    assert blocks == {"block_0", "block_2"} and all(found[2] == shared[0][2] for found in shared)
    worst = {kind: max(found[0][kind] for found in shared) for kind in errors}
    return {**worst, "margin": wanted.margin, "layers": [len(found[1][0]) for found in shared]}


def error_ratio(found: Tensor, wanted: Tensor, ranks: topology.Topology, floor: float = 1e-12) -> float:
    """Normwise, against this rank's part of a whole tensor; what is smaller than `floor` is held against that."""
    for dim in range(wanted.dim()):
        if wanted.shape[dim] != found.shape[dim]:
            wanted = wanted.chunk(ranks.tensor_ranks, dim)[ranks.tensor_rank]
    return float((found - wanted).norm() / wanted.norm().clamp_min(floor))


def everywhere(value: bool) -> bool:
    return bool(topology.sum_over_ranks(torch.tensor(float(value))).item() == dist.get_world_size())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether on all ranks all tensors are the same bits."""
    return everywhere(
        one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    )


def count_labels(batches: list[TokenBatch]) -> int:
    return sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches)


def check_measuring(case: Case) -> dict[str, Any]:
    """A pipeline starts as one rank does, measures the same, and goes on as if it had not measured."""
    stage = Stage(case)
    held_out = list(itertools.islice(case.batches(3), 3))
    decoder = Decoder(case.config, VOCABULARY, TorchBackend(CONFIG.initial_std), case.seed, case.dtype)
    start = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    starts_equal = same(stage.start, {name: start[name] for name in stage.start})
    first = held_out_loss(stage.model, held_out, stage.ranks.reports_loss, stage.loss_sum)
    wanted = [mean_loss(decoder, held_out, condition) for condition in ("memory", "reads_off")]
    stage.step(1)
    before = stage.everything()
    second, third = (held_out_loss(stage.model, held_out, stage.ranks.reports_loss, stage.loss_sum) for _ in range(2))
    unchanged = same(before, stage.everything())
    stage.step(2)
    undisturbed = Stage(case)
    undisturbed.step(1)
    undisturbed.step(2)
    return {
        "starts_equal": starts_equal,
        "error": max(abs(a - b) / b for a, b in zip((first.with_reads, first.without_reads), wanted, strict=True)),
        "reads_matter": first.with_reads != first.without_reads,
        "tokens": first.tokens == count_labels(held_out) * stage.ranks.replicas,
        "repeatable": second == third,
        "unchanged": unchanged,
        "undisturbed": same(stage.everything(), undisturbed.everything()),
    }


def mean_loss(decoder: Decoder, batches: list[TokenBatch], condition: Any) -> float:
    """The obvious way."""
    with measuring(decoder, condition):
        losses = [batch_loss(decoder, batch).double().sum() for batch in batches]
    return float(torch.stack(losses).sum()) / count_labels(batches)


def check_not_finite(case: Case, poison: Callable[[Stage], Callable[[], Any]]) -> dict[str, Any]:
    """A step with one bad microbatch on one stage changes nothing on any."""
    stage = Stage(case)
    first = stage.step(1)
    before = stage.everything()
    cure = poison(stage)
    bad = stage.step(2)
    cure()
    unchanged = same(before, stage.everything())
    good = stage.step(3)
    return {
        "applied": [first.applied, bad.applied, good.applied],
        "unchanged": unchanged,
        "changed_later": not same(before, stage.everything()),
        "good": math.isfinite(good.loss) and math.isfinite(good.gradient_norm),
    }


def poison_statistics(stage: Stage) -> Callable[[], Any]:
    """The second microbatch of the first stage's memory reports what is not finite; its output is sound."""
    if stage.ranks.stage:
        return lambda: None
    (_, layer), *_ = stage.model.memory_layers()
    calls = itertools.count()
    sound = layer.statistics

    def statistics() -> dict[str, Tensor]:
        bad = next(calls) == 1
        return {name: value * math.nan if bad else value for name, value in sound().items()}

    layer.statistics = statistics  # type: ignore[method-assign]
    return partial(layer.__dict__.pop, "statistics")


def poison_gradient(stage: Stage) -> Callable[[], Any]:
    """A gradient of the last stage is infinite."""
    if not stage.ranks.stage:
        return lambda: None
    weight = next(weight for name, weight in stage.model.named_parameters() if "mlp.down" in name)
    return weight.register_hook(lambda gradient: gradient * math.inf).remove  # type: ignore[no-untyped-call]


def check_rank_order() -> dict[str, Any]:
    """Four ranks, two stages: DeepSpeed's grid in our order is Megatron's, in its own default order it is refused."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology

    from megatron_fwpkm.model.pipeline import check_grid

    topology.build_groups(ParallelConfig(pipeline=2, timeout_seconds=60))
    check_grid(PipelineParallelGrid(ProcessTopology(["data", "pipe", "model"], [2, 2, 1])))
    try:
        check_grid(PipelineParallelGrid(ProcessTopology(["pipe", "data", "model"], [2, 2, 1])))
    except RuntimeError as error:
        return {"refused": str(error)}
    return {"refused": ""}


GUARDED = Case(1, accumulation=3)
CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: partial(compare, case) for name, case in CASES.items()},
    "measuring": lambda: check_measuring(GUARDED),
    "bad statistics": lambda: check_not_finite(GUARDED, poison_statistics),
    "rank order": check_rank_order,
    "bad gradient": lambda: check_not_finite(GUARDED, poison_gradient),
}


def main() -> None:
    names = sys.argv[2:]
    topology.initialize(ParallelConfig(timeout_seconds=60))
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    types = [*accelerator.supported_dtypes(), torch.float64]
    with mock.patch.object(accelerator, "supported_dtypes", lambda: types):
        found = {name: CHECKS[name]() for name in names}
    leads = dist.get_rank() == 0
    topology.shut_down()
    if leads:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
