"""Training in any layout against one rank: the cells of the equivalence matrix.

The yardstick has the same microbatches in the same order. Replicas that write one memory are one rank whose
microbatches are theirs put together; independent ones are one process with a memory for each, whose slow gradients
are added up. Slots are chosen by far: the smallest margin of a top-k is reported, and must be far above rounding.

Run as a script: equivalence.py <configuration, unused> <file of cells as JSON> [<file that gets each cell's result>]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fwpkm_kernels.reference import subkey_scores
from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.evaluate.perplexity import held_out_loss
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
from megatron_fwpkm.train.step import Stepper
from tests.distributed.cells import KINDS, SUBKEYS, Cell

VOCABULARY, LENGTH, ROWS, STEPS = 64, 8, 2, 5
RATES = [2e-3, 3e-3, 1e-3, 2e-3, 1e-3]
BAD_STEP = 3
LAST_BIT, SHAKEN_RUNS = 6e-8, 5
SLIDING = 0.5
"""Share of steps in which full attention is limited."""
CONFIG = DecoderConfig(
    hidden_size=32,
    layers=4,  # a pipeline of four stages has two without a memory
    mixers=("full_attention", "gated_delta_net", "gated_delta_net", "sliding_attention"),
    attention_heads=8,
    key_value_heads=4,
    head_dim=8,
    mlp_size=48,
    window=4,
    delta_net=DeltaNetConfig(key_heads=4, value_heads=4, key_head_dim=8, value_head_dim=6),
    # Chunks of 5 tokens in sequences of 8: neither divides evenly.
    memory=MemoryConfig(heads=1, topk=2, n_subkeys=SUBKEYS, k_dim=16, v_dim=16, chunk_size=5),
    memory_layers=(0, 3),
    initial_std=0.1,
)
# A large epsilon: AdamW divides tiny gradients by their own size, and would show the last bits of sums as whole steps.
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, epsilon=1e-3, gradient_clipping=0.5, warmup_steps=0)


def batches(cell: Cell, replica: int) -> Iterator[TokenBatch]:
    """A replica's microbatches, with unevenly many labels."""
    generator = torch.Generator().manual_seed(100 * cell.seed + replica)
    while True:
        tokens_BT = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        labels_BT = tokens_BT[:, 1:].clone()
        labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.2 * (1 + replica)] = IGNORED_LABEL
        batch = TokenBatch(tokens_BT[:, :-1], labels_BT)
        if cell.documents:
            starts_BT = torch.rand(labels_BT.shape, generator=generator) < 0.2
            batch = dataclasses.replace(batch, documents_BT=starts_BT.long().cumsum(1))
        yield batch


def prepare(model: BlockStack, cell: Cell, rank: int = 0, ranks: int = 1) -> None:
    """Initial values that tell more than those that training starts from."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # Slow decay: with the usual fast one its gradients are what rounding leaves of terms that cancel.
                whole = torch.linspace(0.05, 0.4, len(parameter) * ranks).log()
                parameter.copy_(whole.chunk(ranks)[rank])
            elif cell.one_owner and "query_projection" in name:
                if name.endswith("weight"):
                    parameter.zero_()
                else:
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)).sin())


def build_sgd(model: nn.Module, rate: float, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
    """In place of AdamW."""
    return torch.optim.SGD(parameter_groups(model, 0.1), lr=rate)


def optimizer_of(cell: Cell) -> Callable[..., torch.optim.Optimizer]:
    return build_sgd if cell.optimizer == "sgd" else engine.build_optimizer


def dtype_of(cell: Cell) -> torch.dtype:
    return torch.float64 if cell.precision == "float64" else torch.float32


def model_config(cell: Cell) -> DecoderConfig:
    topk = 1 if cell.one_owner else CONFIG.memory.topk
    memory = dataclasses.replace(CONFIG.memory, topk=topk, reset=cell.reset)
    return dataclasses.replace(CONFIG, tied_embeddings=cell.tied, memory=memory)


@dataclasses.dataclass
class Run:
    """What a training leaves."""

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    """Of all gradients of a step together, before they are clipped."""
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    states: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    """Of each group of replicas that share memories: sub-keys, values, and losses in the last microbatch."""
    applied: list[bool] = dataclasses.field(default_factory=list)
    margin: float = math.inf


# -- one rank ---------------------------------------------------------------------------------------------------------


def margin_of(query_GXd: Tensor, keys_MH2nd: Tensor, config: MemoryConfig) -> float:
    """Smallest distance between a score that was taken and the best one that was not."""
    k, (one, other) = config.topk, (slice(0, None, 2), slice(1, None, 2))
    scores_GXn = torch.stack(
        [subkey_scores(q, keys, config.score_type) for q, keys in zip(query_GXd, keys_MH2nd.flatten(0, 2), strict=True)]
    )
    best_GXn = scores_GXn.topk(k + 1, -1).values
    sums = (best_GXn[one, :, :k, None] + best_GXn[other, :, None, :k]).flatten(2)
    found = [best_GXn[..., k - 1] - best_GXn[..., k]]
    if k > 1:
        sums = sums.topk(k + 1, -1).values
        found.append(sums[..., k - 1] - sums[..., k])
    return min(float(margin.min()) for margin in found)


def concatenated(parts: list[TokenBatch]) -> TokenBatch:
    documents = [part.documents_BT for part in parts if part.documents_BT is not None]
    return TokenBatch(
        torch.cat([part.tokens_BT for part in parts]),
        torch.cat([part.labels_BT for part in parts]),
        torch.cat(documents) if documents else None,
    )


@lru_cache(maxsize=64)
def train_on_one_rank(cell: Cell, narrow_start: bool = False, shaken: int = 0) -> Run:
    """The obvious way, of a cell without a layout: memories one after the other, gradients added up, one optimizer.

    With `narrow_start` a float64 cell starts from the fast states of a float32 one: they are drawn in their own type.
    With `shaken` last bits of the weights are changed, by noise of that seed.
    """
    together = cell.replicas if cell.memory_replicas == "synced" else 1
    models = [
        Decoder(model_config(cell), VOCABULARY, TorchBackend(CONFIG.initial_std), cell.seed, fast_dtype=dtype_of(cell))
        for _ in range(cell.replicas // together)
    ]
    for model in models:
        model.to(dtype_of(cell)).train()
        prepare(model, cell)
        if shaken:
            noise = torch.Generator().manual_seed(shaken)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + LAST_BIT * torch.randn(parameter.shape, generator=noise))
        if narrow_start:
            narrow = Decoder(model_config(cell), VOCABULARY, TorchBackend(CONFIG.initial_std), cell.seed)
            for (_, state), (_, start) in zip(model.fast_states(), narrow.fast_states(), strict=True):
                state.replace(start.keys_H2nd, start.table_ND)
    whole, options, run = models[0], OPTIMIZER, Run()
    optimizer = optimizer_of(cell)(whole, options.learning_rate, options.betas, options.epsilon, options.weight_decay)
    streams = [batches(cell, index) for index in range(cell.replicas)]
    find = addressing.address

    def watched(query_GXd: Tensor, keys_MH2nd: Tensor, config: MemoryConfig) -> Address:
        run.margin = min(run.margin, margin_of(query_GXd.detach(), keys_MH2nd.detach(), config))
        return find(query_GXd, keys_MH2nd, config)

    for step in range(1, STEPS + 1):
        shares = [list(itertools.islice(stream, cell.accumulation)) for stream in streams]
        groups = [shares[first : first + together] for first in range(0, len(shares), together)]
        labels = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for share in shares for batch in share)
        bad = cell.incidents and step == BAD_STEP
        run.applied.append(not bad)
        if bad:  # as if it had not been
            run.losses.append(math.nan)
            run.norms.append(math.nan)
            continue
        total = 0.0
        with mock.patch.object(addressing, "address", watched):
            for model, group in zip(models, groups, strict=True):
                model.limit_full_attention = limits_attention(cell.seed, step, SLIDING)
                for _, state in model.fast_states():
                    state.begin_step()
                for parts in zip(*group, strict=True):
                    batch = concatenated(list(parts))
                    loss = model(batch.tokens_BT, batch.labels_BT, batch.documents_BT).sum() / labels
                    loss.backward()
                    total += float(loss.detach())
                for _, state in model.fast_states():
                    state.commit_step()
        for copies in zip(*(model.parameters() for model in models), strict=True):
            copies[0].grad = sum(copy.grad for copy in copies if copy.grad is not None)
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None, name
            run.gradients[f"{step} {name}"] = parameter.grad.clone()
        run.norms.append(float(nn.utils.clip_grad_norm_(whole.parameters(), options.gradient_clipping)))
        for settings in optimizer.param_groups:
            settings["lr"] = RATES[step - 1]
        optimizer.step()
        with torch.no_grad():
            for copies in zip(*(model.parameters() for model in models), strict=True):
                for copy in copies:
                    copy.copy_(copies[0])
                    copy.grad = None
        run.losses.append(total)
    run.weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    run.states = [{**states_of(model, None), **losses_of(model)} for model in models]
    return run


def rounding(cell: Cell) -> float:
    """Largest error that one rank's own float32 makes in a tensor of a cell: what nearly cancels shows here.

    Of several runs with other last bits: by luck an error is small now and then.
    """
    wide = train_on_one_rank(dataclasses.replace(cell, precision="float64"), narrow_start=True)
    largest = 0.0
    for shaken in range(SHAKEN_RUNS):
        narrow = train_on_one_rank(cell, shaken=shaken)
        pairs = [(narrow.gradients, wide.gradients), (narrow.weights, wide.weights)]
        pairs += list(zip(narrow.states, wide.states, strict=True))
        largest = max(largest, *(float((n[name] - w[name]).norm() / w[name].norm()) for n, w in pairs for name in w))
    return largest


def losses_of(model: BlockStack) -> dict[str, Tensor]:
    """Of each memory in the last microbatch: what memories that are reset have written shows in these alone."""
    found = {}
    for index, block in model.indexed_blocks():
        if block.memory is not None:
            statistics = block.memory.statistics()
            found[f"block {index} losses"] = torch.stack([statistics["memory_loss"], statistics["addressing_loss"]])
    return found


def states_of(model: BlockStack, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Copies of sub-keys and whole values."""
    found = {}
    for index, state in model.fast_states():
        found[f"block {index} keys"] = state.keys_H2nd.clone()
        values_ND = state.values_ND()
        if state.owned is not None:
            own_ND, there = values_ND, state.owned >= 0
            values_ND = own_ND.new_zeros(state.config.num_slots, own_ND.shape[1])
            values_ND[state.owned[there]] = own_ND[there]
            dist.all_reduce(values_ND, group=group)
        elif values_ND.shape[1] < state.config.v_dim:
            parts = [torch.empty_like(values_ND) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, values_ND.contiguous(), group=group)
            values_ND = torch.cat(parts, 1)
        found[f"block {index} values"] = values_ND
    return found


# -- a layout ---------------------------------------------------------------------------------------------------------


class Trainer:
    """A cell's model and stepper on this rank, with the names that its weights have in a Decoder."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        layout: dict[str, Any] = {
            "tensor": cell.tensor,
            "sequence_parallel": cell.sequence_parallel,
            "pipeline": cell.pipeline,
            "timeout_seconds": 60,
            "memory": {"sharding": cell.sharding, "routing": cell.routing, "replicas": cell.memory_replicas},
        }
        self.ranks = topology.build_groups(ParallelConfig.model_validate(layout))
        assert self.ranks.replicas == cell.replicas
        backend = megatron_backend(CONFIG.initial_std, CONFIG.norm_epsilon, self.ranks.placement)
        options = (model_config(cell), VOCABULARY, backend, cell.seed)
        self.model: Any
        if cell.pipeline > 1:
            from megatron_fwpkm.model.pipeline import PipelineDecoder

            self.model = PipelineDecoder(*options, self.ranks, LENGTH, dtype_of(cell))
            self.name = self.model.decoder_name
        else:
            self.model = Decoder(*options, fast_dtype=dtype_of(cell))
            self.name = lambda name: name
        self.model.to(dtype_of(cell)).train()
        prepare(self.model, cell, self.ranks.tensor_rank, self.ranks.tensor_ranks)
        self.model.recompute_sublayers(cell.recompute)
        training = TrainingConfig.model_validate(
            {
                "steps": STEPS,
                "micro_batch_size": ROWS,
                "gradient_accumulation": cell.accumulation,
                "sliding_probability": SLIDING,
            }
        )
        training = training.model_copy(update={"zero_stage": cell.zero})
        # Of the class that keeps norms and clipping without ZeRO there is one for AdamW alone.
        patched = cell.optimizer == "sgd" and cell.zero > 0
        build = build_sgd if patched else engine.build_optimizer
        with mock.patch.object(engine, "build_optimizer", build):
            bundle = engine.build_training(self.model, OPTIMIZER, training)
        self.bundle, self.engine = bundle, bundle.engine
        kind: type[Stepper] = Stepper
        if cell.pipeline > 1:
            from megatron_fwpkm.train.pipeline_step import PipelineStepper

            kind = PipelineStepper
        stream = batches(cell, self.ranks.replica)
        self.stepper = kind(bundle, self.model, stream, training=training, seed=cell.seed, topology=self.ranks)

    def run(self) -> Run:
        run = Run()
        for step in range(1, STEPS + 1):
            with self._watching(run, step):
                if self.cell.incidents and step == BAD_STEP:
                    with self._poisoned():
                        result = self.stepper.run(step, RATES[step - 1], lambda: False)
                else:
                    result = self.stepper.run(step, RATES[step - 1], lambda: False)
            run.losses.append(result.loss)
            run.norms.append(result.gradient_norm)
            run.applied.append(result.applied)
            if self.cell.incidents and step == 2:
                self._evaluate()
        run.weights = self._weights()
        states = states_of(self.model, self.ranks.placement.memory_group)
        run.states = [{**states, **losses_of(self.model)}]
        return run

    def end(self) -> None:
        """Let go of what is in cycles that the collector does not see: hooks, and graphs of a pipeline's last step."""
        if self.cell.pipeline > 1:
            for tensors in self.engine.pipe_buffers.values():
                tensors.clear()
            self.engine.loss = None
        self.engine.destroy()

    def _evaluate(self) -> None:
        """A measurement in the middle of training, which must change nothing."""
        other = dataclasses.replace(self.cell, seed=self.cell.seed + 1000)
        held_out = list(itertools.islice(batches(other, self.ranks.replica), 2))
        self.model.eval()
        if self.cell.pipeline > 1:
            from megatron_fwpkm.train.pipeline_step import pipeline_loss_sum

            held_out_loss(self.model, held_out, self.ranks.reports_loss, partial(pipeline_loss_sum, self.engine))
        else:
            held_out_loss(self.model, held_out, self.ranks.reports_loss)
        self.model.train()

    @property
    def _zero_parts(self) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()), enabled=self.cell.zero == 3)

    def _weights(self) -> dict[str, Tensor]:
        with self._zero_parts:
            return {self.name(n): p.detach().clone() for n, p in self.model.named_parameters()}

    def _watching(self, run: Run, step: int) -> Any:
        """Within the context a step's gradients are taken, over all replicas and before they are clipped."""
        if self.cell.incidents and step == BAD_STEP:
            return mock.patch.object(self, "cell", self.cell)
        return self._watching_stages(run, step) if self.cell.pipeline > 1 else self._watching_engine(run, step)

    def _watching_engine(self, run: Run, step: int) -> Any:
        from deepspeed.utils import safe_get_full_grad

        update = self.engine.step

        def watched() -> None:
            if self.engine.is_gradient_accumulation_boundary():
                for name, parameter in self.model.named_parameters():
                    found = parameter.grad if self.cell.zero == 0 else safe_get_full_grad(parameter)
                    assert found is not None, name
                    run.gradients[f"{step} {name}"] = found.clone()
            update()

        return mock.patch.object(self.engine, "step", watched)

    def _watching_stages(self, run: Run, step: int) -> Any:
        from deepspeed.runtime.pipe import schedule
        from deepspeed.runtime.pipe.engine import PipelineEngine

        model, ranks, reduce_gradients = self.model, self.ranks, PipelineEngine._INSTRUCTION_MAP[schedule.ReduceGrads]

        def watched(engine: PipelineEngine) -> None:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                gradient = parameter.grad.clone()
                dist.all_reduce(gradient, group=model._grid.dp_proc_group)
                run.gradients[f"{step} {model.decoder_name(name)}"] = gradient / ranks.replicas
            reduce_gradients(engine)

        return mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.ReduceGrads: watched})

    def _poisoned(self) -> Any:
        """Within the context the last rank's last MLP gives what is not finite."""
        *_, (_, block) = self.model.indexed_blocks()
        if self.ranks.rank < self.ranks.world_size - 1:
            return mock.patch.object(self, "ranks", self.ranks)
        return _hooked(block.mlp)


class _hooked:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_hook(lambda module, given, output: output * math.nan)

    def __exit__(self, *arguments: Any) -> None:
        self._handle.remove()


def worst(errors: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest error and where it is; what is not a number is infinitely wrong; of nothing (0, "")."""
    return max(((math.inf if math.isnan(error) else error, where) for error, where in errors), default=(0.0, ""))


def number_error(found: float | None, wanted: float) -> float:
    """Relative; a step that is not finite must be so in both."""
    finite = found is not None and math.isfinite(found)
    if found is None or not (finite and math.isfinite(wanted)):
        return math.inf if finite or math.isfinite(wanted) else 0.0
    return abs(found - wanted) / abs(wanted)


def error_ratio(found: Tensor, wanted: Tensor, ranks: topology.Topology) -> float:
    """Normwise, against this rank's part of a whole tensor."""
    norm = wanted.norm()
    for dim in range(wanted.dim()):
        if wanted.shape[dim] != found.shape[dim]:
            wanted = wanted.chunk(ranks.tensor_ranks, dim)[ranks.tensor_rank]
    return float((found.to(wanted.dtype) - wanted).norm() / norm.clamp_min(1e-30))


def train_yardsticks(cells: Sequence[Cell]) -> dict[Cell, Run]:
    """What one rank makes of each cell without its layout; each rank trains its share of them, and all get all."""
    distinct = list(dict.fromkeys(cell.without_layout() for cell in cells))
    own = {cell: train_on_one_rank(cell) for cell in distinct[dist.get_rank() :: dist.get_world_size()]}
    shares: list[dict[Cell, Run]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return {cell: run for share in shares for cell, run in share.items()}


def compare(cell: Cell, wanted: Run) -> dict[str, Any]:
    """Errors of a cell, worst over ranks and tensors, with the tensor that has each."""
    trainer = Trainer(cell)
    found, ranks = trainer.run(), trainer.ranks
    trainer.end()
    together = cell.replicas if cell.memory_replicas == "synced" else 1
    assert found.applied == wanted.applied, (found.applied, wanted.applied)
    errors: dict[str, tuple[float, str]] = {
        kind: worst((number_error(a, b), f"step {step}") for step, (a, b) in enumerate(zip(*both, strict=True), 1))
        for kind, both in {"loss": (found.losses, wanted.losses), "norm": (found.norms, wanted.norms)}.items()
    }
    pairs = {
        "gradients": (found.gradients, wanted.gradients),
        "weights": (found.weights, wanted.weights),
        "states": (found.states[0], wanted.states[ranks.replica // together]),
    }
    for kind, (of_layout, of_one) in pairs.items():
        errors[kind] = worst((error_ratio(t, of_one[name], ranks), name) for name, t in of_layout.items())
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, (errors, {kind: sorted(of_layout) for kind, (of_layout, _) in pairs.items()}))
    for kind, (_, of_one) in pairs.items():  # together the ranks have everything
        names = {name for _, names in every for name in names[kind]}
        assert names == set(of_one), (kind, names ^ set(of_one))
    of_all = {kind: worst(found[kind] for found, _ in every) for kind in errors}
    return {
        **{kind: error for kind, (error, _) in of_all.items()},
        "where": {kind: name for kind, (_, name) in of_all.items()},
        "margin": wanted.margin,
    }


def main() -> None:
    cells = [Cell(**values) for values in json.loads(Path(sys.argv[2]).read_text())]
    topology.initialize(ParallelConfig(timeout_seconds=120))
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    types = [*accelerator.supported_dtypes(), torch.float64]
    found = {}
    with mock.patch.object(accelerator, "supported_dtypes", lambda: types):
        yardsticks = train_yardsticks(cells)
        for cell in cells:
            started = time.perf_counter()
            found[cell.name] = compare(cell, yardsticks[cell.without_layout()])
            topology.end_groups()
            if dist.get_rank() == 0:
                if len(sys.argv) > 3:
                    with Path(sys.argv[3]).open("a") as results:
                        results.write(json.dumps({"cell": cell.name, **found[cell.name]}) + "\n")
                seconds = time.perf_counter() - started
                worst = " ".join(f"{kind} {found[cell.name][kind]:.0e}" for kind in KINDS)
                print(f"{cell.name}: {worst} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    leads = dist.get_rank() == 0
    topology.shut_down()
    if leads:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
