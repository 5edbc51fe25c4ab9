"""Checks of engine, trained tables and steps on a small model with PKM layers; prints what it found on rank 0.

Arguments: a configuration (unused), a folder, and checks by name: train_fp32, train_fp32_3 (the ZeRO stage, if not 1),
guards_bf16, ...
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megatron_fwpkm.checkpoint.engine_state import EngineState
from megatron_fwpkm.checkpoint.parts import SlowWeights, TableValues
from megatron_fwpkm.checkpoint.pieces import Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.memory.pkm_layer import PKMConfig, PKMLayer, named_slow_weights, slow_tables
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train.engine import EngineBundle, build_training
from megatron_fwpkm.train.optimizer import is_decayed, parameter_groups
from megatron_fwpkm.train.settings import OptimizerConfig, TrainingConfig
from megatron_fwpkm.train.step import Stepper, StepResult
from megatron_fwpkm.train.touched_rows import RowSettings
from megatron_fwpkm.train.touched_rows_reference import DenseReference

VOCABULARY, WIDTH, LENGTH, SEQUENCES, ACCUMULATION, STEPS = 24, 16, 6, 4, 2, 5
RATES = [2e-2, 3e-2, 1e-2, 2e-2, 1e-2]
# A large epsilon: AdamW divides tiny gradients by their own size, and would show the last bits of sums as whole steps.
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-2,
    pkm_values_learning_rate=6e-2,
    epsilon=1e-4,
    weight_decay=0.2,
    gradient_clipping=0.3,
    warmup_steps=0,
)


class SmallModel(nn.Module):
    """Embedding, two PKM layers, head; what a Stepper needs of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        wide, narrow = (PKMConfig(heads=2, topk=2, n_subkeys=8, k_dim=8, v_dim=v_dim) for v_dim in (12, 8))
        self.blocks = nn.ModuleList([PKMLayer(WIDTH, wide), PKMLayer(WIDTH, narrow)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.limit_full_attention = False
        self.limits: list[bool] = []
        self.documents: list[tuple[Tensor | None, Tensor | None]] = []

    def spread_layers(self) -> Iterator[tuple[str, PKMLayer]]:
        """As a decoder has them."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, PKMLayer)
            yield f"pkm/block_{index}", block

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        self.limits.append(self.limit_full_attention)
        self.documents.append((documents_BT, positions_BT))
        h_BTE = self.embedding(tokens_BT)
        for block in self.blocks:
            h_BTE = h_BTE + block(h_BTE)
        logits = self.head(self.norm(h_BTE)).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none")
        return loss.view_as(labels_BT)

    def memory_layers(self) -> Iterator[Any]:
        return iter(())

    fast_states = memory_layers


def global_batches(seed: int = 0) -> Iterator[TokenBatch]:
    """Microbatches of all replicas together; very unevenly many labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        share = torch.linspace(0.0, 0.9, SEQUENCES).unsqueeze(1)
        labels[torch.rand(labels.shape, generator=generator) < share] = IGNORED_LABEL
        yield TokenBatch(tokens[:, :-1], labels)


def own_share(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
    rank, size = torch.distributed.get_rank(), SEQUENCES // torch.distributed.get_world_size()
    for batch in batches:
        rows = slice(rank * size, (rank + 1) * size)
        yield TokenBatch(batch.tokens_BT[rows], batch.labels_BT[rows])


def build(precision: str, probability: float = 0.0, stage: int = 1) -> tuple[SmallModel, EngineBundle, TrainingConfig]:
    training = TrainingConfig(
        steps=STEPS,
        micro_batch_size=SEQUENCES // torch.distributed.get_world_size(),
        gradient_accumulation=ACCUMULATION,
        precision=precision,  # type: ignore[arg-type]
        sliding_probability=probability,
        zero_stage=stage,  # type: ignore[arg-type]
    )
    model = SmallModel()
    with torch.no_grad():  # what differs between ranks before, the engine makes equal
        slow_tables(model)["blocks.0.values"].values_ND.add_(torch.distributed.get_rank())
    return model, build_training(model, OPTIMIZER, training), training


def make_stepper(
    model: SmallModel, bundle: EngineBundle, training: TrainingConfig, batches: Iterator[TokenBatch]
) -> Stepper:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ranks = topology.Topology(rank, size, local_rank=rank, local_world_size=size, replica=rank, replicas=size)
    return Stepper(bundle, model, batches, training=training, seed=3, topology=ranks)  # type: ignore[arg-type]


def run(stepper: Stepper, steps: range, stop: bool = False) -> list[StepResult]:
    return [stepper.run(step, RATES[(step - 1) % len(RATES)], lambda: stop) for step in steps]


def all_weights(model: SmallModel) -> dict[str, Tensor]:
    """All weights in float32, those that ZeRO-3 divides gathered."""
    import deepspeed

    parameters = dict(named_slow_weights(model))
    divided = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(divided, enabled=bool(divided)):
        return {name: parameters[name].detach().float().clone() for name in sorted(parameters)}


def digest(model: SmallModel, bundle: EngineBundle) -> str:
    """Of all weights, and of the tables' masters, moments, counts and clocks."""
    found = hashlib.sha256()
    for weight in all_weights(model).values():
        found.update(weight.numpy().tobytes())
    for state in bundle.tables.state_dict().values():
        for value in state.values():
            found.update(value.numpy().tobytes() if isinstance(value, Tensor) else value.hex().encode())
    return found.hexdigest()


def everywhere(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_train(precision: str, folder: Path, stage: int = 1) -> dict[str, Any]:
    """A few steps; the state goes to a file, and a reference in plain torch makes the same steps in fp32."""
    model, bundle, training = build(precision, stage=stage)
    start = everywhere(digest(model, bundle))
    reference = reference_run() if precision == "fp32" else None
    results = run(make_stepper(model, bundle, training, own_share(global_batches())), range(1, STEPS + 1))
    tensors = all_weights(model)
    for name, state in bundle.tables.state_dict().items():
        tensors |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if torch.distributed.get_rank() == 0 and stage == 1:
        torch.save(tensors, folder / f"{precision}_{torch.distributed.get_world_size()}.pt")
    engine: Any = bundle.engine
    found: dict[str, Any] = {
        "equal_at_start": len(set(start)) == 1,
        "equal_at_end": len(set(everywhere(digest(model, bundle)))) == 1,
        "changed": start[0] != digest(model, bundle),
        "applied": [result.applied for result in results],
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "labels": [result.labels for result in results],
        "dtypes": sorted({str(weight.dtype) for _, weight in named_slow_weights(model)}),
        "master_dtypes": sorted({str(state["master_ND"].dtype) for state in bundle.tables.state_dict().values()}),
        "in_partitions": in_partitions(engine.optimizer) if stage in (1, 2) else None,
        "others": sum(w.numel() for n, w in tensors.items() if "/" not in n and n not in slow_tables(model)),
        "untouched": sum(int((bundle.tables[name].updates_N == 0).sum()) for name in slow_tables(model)),
    }
    if reference is not None:
        losses, norms, weights = reference
        found["loss_error"] = largest_error(found["losses"], losses)
        found["norm_error"] = largest_error(found["norms"], norms)
        found["weight_error"] = max(float((tensors[name] - value).abs().max()) for name, value in weights.items())
    return found


def in_partitions(optimizer: Any) -> int:
    """Weights that DeepSpeed's optimizer divides, padding included; its two kinds name them differently."""
    flat = optimizer.bit16_groups_flat if hasattr(optimizer, "bit16_groups_flat") else optimizer.bf16_groups_flat
    return sum(group.numel() for group in flat)


def largest_error(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def reference_run() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """One process with the whole batch in plain torch: one mean over all labels, clip_grad_norm_ over everything."""
    model = SmallModel()
    values = {name: table.values_ND for name, table in slow_tables(model).items()}
    decay = OPTIMIZER.weight_decay
    optimizer = torch.optim.AdamW(parameter_groups(model, decay), betas=OPTIMIZER.betas, eps=OPTIMIZER.epsilon)
    tables = {}
    for name, parameter in values.items():
        settings = RowSettings(OPTIMIZER.betas, OPTIMIZER.epsilon, decay if is_decayed(name) else 0.0)
        tables[name] = DenseReference(parameter.detach(), settings)
    batches, losses, norms = global_batches(), [], []
    for rate in RATES:
        microbatches = [next(batches) for _ in range(ACCUMULATION)]
        tokens, labels = (torch.cat([getattr(b, n) for b in microbatches]) for n in ("tokens_BT", "labels_BT"))
        loss = model(tokens, labels)[labels != IGNORED_LABEL].mean()
        loss.backward()
        touched = {}
        for name, parameter in values.items():
            assert parameter.grad is not None
            rows = parameter.grad.coalesce().indices()[0]
            touched[name] = torch.zeros(len(parameter), dtype=torch.bool).index_fill_(0, rows, True)
            parameter.grad = parameter.grad.to_dense()
        norms.append(
            float(nn.utils.clip_grad_norm_([*model.parameters(), *values.values()], OPTIMIZER.gradient_clipping))
        )
        losses.append(float(loss.detach()))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for name, parameter in values.items():
                assert parameter.grad is not None
                tables[name].update(parameter.grad, touched[name], 2 * rate)
                parameter.copy_(tables[name].table_ND)
        model.zero_grad()
        for parameter in values.values():
            parameter.grad = None
    return losses, norms, {name: weight.detach() for name, weight in named_slow_weights(model)}


def check_guards(precision: str, folder: Path) -> dict[str, Any]:
    """Bad gradients of the tables or of others on one rank, data without labels, a loader that fails: nothing changes.

    Then a resume and what a step tells the model.
    """
    model, bundle, training = build(precision, probability=0.5)
    batches = own_share(global_batches())
    stepper = make_stepper(model, bundle, training, batches)
    run(stepper, range(1, 2))
    before, second = digest(model, bundle), torch.distributed.get_rank() == 1
    skipped = []
    for name in ("blocks.1.values", "head.weight"):
        weight = dict(named_slow_weights(model))[name]
        handle = weight.register_hook(lambda gradient: gradient * math.inf) if second else None
        skipped += run(stepper, range(2, 3))
        if handle is not None:
            handle.remove()
    unchanged = all(everywhere(digest(model, bundle) == before))

    def refusal(loader: Iterator[TokenBatch]) -> str:
        try:
            run(make_stepper(model, bundle, training, loader), range(2, 3))
        except SharedUserError as error:
            return str(error)
        return "none"

    def failing() -> Iterator[TokenBatch]:
        yield next(batches)
        if second:
            raise UserError("the shard is damaged")
        yield next(batches)

    nothing = (TokenBatch(b.tokens_BT, torch.full_like(b.labels_BT, IGNORED_LABEL)) for b in batches)
    return {
        "refusals": [everywhere(refusal(nothing)), everywhere(refusal(failing()))],
        "unchanged_by_refusal": all(everywhere(digest(model, bundle) == before)),
        "skipped": [result.applied for result in skipped],
        "skipped_norms": [str(result.gradient_norm) for result in skipped],
        "unchanged": unchanged,
        **check_resume(model, bundle, training, folder / precision, precision),
    }


def parts_of(model: SmallModel, bundle: EngineBundle) -> tuple[SlowWeights, TableValues]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ranks = topology.Topology(rank, size, rank, size, replica=rank, replicas=size)
    return SlowWeights(EngineState(bundle.engine, model), ranks), TableValues(bundle.tables)


def check_resume(
    model: SmallModel, bundle: EngineBundle, training: TrainingConfig, folder: Path, precision: str
) -> dict[str, Any]:
    """A new model and engine go on from files as the old ones do; the draws of limited attention; documents."""
    saved, second = digest(model, bundle), torch.distributed.get_rank() == 1
    parts = [part.pieces(Staging()) for part in parts_of(model, bundle)]
    save_tensors(folder / "tensors", {name: pieces for part in parts for name, pieces in part.items()})
    model.limits.clear()
    results = run(make_stepper(model, bundle, training, own_share(global_batches(1))), range(2, 10))
    again, resumed, _ = build(precision, probability=0.5)
    for part in parts_of(again, resumed):
        part.load(SavedTensors(folder / "tensors"))
        part.finish_loading()
    same = [digest(again, resumed) == saved]
    replayed = run(make_stepper(again, resumed, training, own_share(global_batches(1))), range(2, 10), stop=second)
    same.append(digest(again, resumed) == digest(model, bundle) != saved)
    drawn = [result.limited_attention for result in results]
    return {
        "applied_later": all(result.applied for result in results),
        "resumed": everywhere(same) == [[True, True]] * 2,
        "same_losses": [result.loss for result in results] == [result.loss for result in replayed],
        "stop": [results[0].stop_requested, replayed[0].stop_requested],
        "draws_agree": len(set(map(tuple, everywhere(drawn)))) == 1 and len(set(drawn)) == 2,
        "draws_used": model.limits == [draw for draw in drawn for _ in range(ACCUMULATION)],
        "draws_replayed": drawn == [result.limited_attention for result in replayed],
        "full_after": model.limit_full_attention is False,
        "documents": documents_reach_the_model(again, resumed, training),
    }


def documents_reach_the_model(model: SmallModel, bundle: EngineBundle, training: TrainingConfig) -> bool:
    """Documents and positions are given to the model where the batches have them, and only there."""
    given_before = [given for pair in model.documents for given in pair if given is not None]
    model.documents.clear()
    batches = list(islice(own_share(global_batches()), ACCUMULATION))
    apart = (TokenBatch(b.tokens_BT, b.labels_BT, b.tokens_BT + 1, b.tokens_BT + 2) for b in batches)
    run(make_stepper(model, bundle, training, apart), range(10, 11))
    given = [torch.stack([tensor for tensor in pair if tensor is not None]) for pair in model.documents]
    expected = [torch.stack([b.tokens_BT + 1, b.tokens_BT + 2]) for b in batches]
    return not given_before and all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def main() -> None:
    folder, names = Path(sys.argv[2]), sys.argv[3:]
    ranks = topology.initialize(ParallelConfig(timeout_seconds=60))
    found = {}
    for name in names:
        check, precision, *stages = name.split("_")
        stage = int(stages[0]) if stages else 1
        found[name] = check_train(precision, folder, stage) if check == "train" else check_guards(precision, folder)
    topology.shut_down()
    if ranks.is_leader:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
