"""PKM layers spread over ranks against whole ones in this process, in float64; prints what it found on rank 0.

Arguments: a configuration (unused), a folder.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fwpkm.checkpoint.parts import TableValues
from megatron_fwpkm.checkpoint.pieces import Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory.pkm_layer import PKMConfig, PKMLayer, named_slow_weights, slow_tables
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.memory.slow_table import SlowTable
from megatron_fwpkm.memory.tokens import summed_over
from megatron_fwpkm.train.optimizer import build_optimizer, is_decayed
from megatron_fwpkm.train.tables import TrainedTables
from megatron_fwpkm.train.touched_rows import RowSettings
from megatron_fwpkm.train.touched_rows_reference import DenseReference
from tests.memory_tables import whole_table

WIDTH = 12
CASES: dict[str, tuple[PKMConfig, int, int]] = {  # settings, sequences, tokens of each
    "even": (PKMConfig(2, 3, 8, 8, 8), 2, 12),
    "uneven tokens and sub-keys": (PKMConfig(2, 3, 7, 8, 5), 3, 7),
    "fewer tokens than ranks": (PKMConfig(2, 3, 6, 8, 5), 1, 1),
    "one read": (PKMConfig(1, 1, 5, 8, 5), 2, 6),
    "all to one owner": (PKMConfig(1, 1, 8, 8, 4), 2, 6),
    "dense gradients": (PKMConfig(2, 3, 8, 8, 8, sparse_gradients=False), 2, 4),
}
SETTINGS = RowSettings(betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1)
CLIPPING, STEPS, RATE = 0.02, 4, 1e-2


class SharedLinear(nn.Linear):
    """A layer of tokens that are divided over ranks."""

    def __init__(self, in_features: int, out_features: int, bias: bool, group: dist.ProcessGroup) -> None:
        super().__init__(in_features, out_features, bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, summed_over(self.weight, self.group), summed_over(self.bias, self.group))


def make_layer(config: PKMConfig, placement: Placement) -> PKMLayer:
    torch.manual_seed(7)
    group = placement.tensor_group
    linear = nn.Linear if group is None else partial(SharedLinear, group=group)
    layer = PKMLayer(WIDTH, config, linear=linear, placement=placement).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_()
    return layer


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gather_whole(table: SlowTable, rows_ND: Tensor, group: dist.ProcessGroup) -> Tensor:
    shards = [torch.empty_like(rows_ND) for _ in range(table.ranks)]
    dist.all_gather(shards, rows_ND.contiguous(), group=group)
    return whole_table(shards, table.config.n_subkeys)


def gather_tokens(own_BTE: Tensor, placement: Placement) -> Tensor:
    if not placement.sequence_parallel:
        return own_BTE
    parts = [torch.empty_like(own_BTE) for _ in range(placement.tensor_ranks)]
    dist.all_gather(parts, own_BTE.contiguous(), group=placement.tensor_group)
    return torch.cat(parts, 1)


def run(name: str, placement: Placement, tokens: int) -> dict[str, Tensor]:
    """Initial weights, two passes, gradients of their sum: all as one rank would have them."""
    config, batch, _ = CASES[name]
    layer = make_layer(config, placement)
    group, found = placement.tensor_group, {}
    for key, weight in named_slow_weights(layer):
        whole = (
            weight.detach() if key != "values" or group is None else gather_whole(layer.table, weight.detach(), group)
        )
        found[f"initial {key}"] = whole.clone()
    for call in range(2):
        x, cotangent = draw(batch, tokens, WIDTH, seed=call), draw(batch, tokens, WIDTH, seed=10 + call)
        if name == "all to one owner":
            x = x[:1, :1] + 1e-9 * x
        if placement.sequence_parallel:
            x, cotangent = (t.chunk(placement.tensor_ranks, 1)[placement.tensor_rank] for t in (x, cotangent))
        x = x.clone().requires_grad_()
        output = layer(x)
        (output * cotangent).sum().backward()
        assert x.grad is not None
        found[f"output {call}"] = gather_tokens(output.detach(), placement)
        found[f"d x {call}"] = gather_tokens(x.grad, placement)
    for key, weight in named_slow_weights(layer):
        assert weight.grad is not None, key
        if key == "values":
            assert weight.grad.is_sparse == config.sparse_gradients
            gradient = weight.grad.to_dense()
            found["d values"] = gradient if group is None else gather_whole(layer.table, gradient, group)
        else:
            found[f"d {key}"] = weight.grad
    return found


def compare_layers(groups: dict[int, dist.ProcessGroup]) -> dict[str, dict[str, float]]:
    """For each case, number of ranks and layout the relative error of every tensor, the largest of all ranks."""
    errors: dict[str, dict[str, float]] = {}
    for name, (_, _, tokens) in CASES.items():
        for ranks, group in groups.items():
            if dist.get_rank() >= ranks:
                continue
            for sequence_parallel in (False, True):
                length = -(-tokens // ranks) * ranks if sequence_parallel else tokens
                wanted = run(name, ALONE, length)
                found = run(name, Placement(group, group, sequence_parallel), length)
                assert list(found) == list(wanted)
                own = [
                    float((found[key] - whole).norm() / whole.norm().clamp_min(1e-30)) for key, whole in wanted.items()
                ]
                largest = torch.tensor(own, dtype=torch.float64)
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
                label = f"{name}, {ranks} ranks, {'sequence' if sequence_parallel else 'plain'}"
                errors[label] = dict(zip(wanted, largest.tolist(), strict=True))
    return errors


class TwoMemories(nn.Module):
    """Two PKM layers with a plain layer between, which every rank computes for all tokens."""

    def __init__(self, placement: Placement, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        wide, narrow = PKMConfig(2, 3, 7, 8, 10), PKMConfig(2, 3, 6, 8, 4)
        self.first, self.second = make_layer(wide, placement), make_layer(narrow, placement)
        torch.manual_seed(1)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.to(dtype)

    def loss(self, x_BTE: Tensor) -> Tensor:
        h_BTE = self.middle(x_BTE + self.first(x_BTE))
        return (h_BTE + self.second(h_BTE)).square().mean()


def batches(step: int) -> list[Tensor]:
    return [draw(4, 3, WIDTH, seed=100 * step + microbatch) for microbatch in range(2)]


def train_whole() -> tuple[dict[str, Tensor], list[float]]:
    """Plain torch with the whole batch: AdamW, clip_grad_norm_ over everything, the dense reference."""
    model = TwoMemories(ALONE)
    weights = dict(named_slow_weights(model))
    values = {name: weights[name] for name in slow_tables(model)}
    references = {name: DenseReference(value.detach(), SETTINGS) for name, value in values.items()}
    optimizer = build_optimizer(model, RATE, SETTINGS.betas, SETTINGS.epsilon, SETTINGS.weight_decay)
    norms = []
    for step in range(STEPS):
        for weight in weights.values():
            weight.grad = None
        for batch in batches(step):
            model.loss(batch).backward()
        touched = {}
        for name, value in values.items():
            assert value.grad is not None
            rows = value.grad.coalesce().indices()[0]
            touched[name] = torch.zeros(len(value), dtype=torch.bool).index_fill_(0, rows, True)
            value.grad = value.grad.to_dense()
        norms.append(float(nn.utils.clip_grad_norm_(list(weights.values()), CLIPPING)))
        optimizer.step()
        with torch.no_grad():
            for name, value in values.items():
                assert value.grad is not None
                references[name].update(value.grad, touched[name], RATE)
                value.copy_(references[name].table_ND)
    found = {name: weight.detach() for name, weight in weights.items()}
    for name, reference in references.items():
        found |= {f"{name} first": reference.first_ND, f"{name} second": reference.second_ND}
        found |= {f"{name} updates": reference.updates_N.unsqueeze(1), f"{name} clock": reference.clock_N.unsqueeze(1)}
    return found, norms


class Trainer:
    """The same over replicas (2) and tensor ranks (2), as the engine does it: gradients of others averaged, clipped."""

    def __init__(self, placement: Placement, replicas: dist.ProcessGroup, dtype: torch.dtype = torch.float64) -> None:
        self.placement, self.replicas = placement, replicas
        self.model = TwoMemories(placement, dtype)
        if dist.get_rank(replicas) == 1:  # what differs between replicas before is made equal
            with torch.no_grad():
                self.model.first.values.add_(1.0)
        self.tables = TrainedTables(
            self.model,
            SETTINGS,
            is_decayed=is_decayed,
            clipping=CLIPPING,
            group=replicas,
            model_group=placement.tensor_group,
        )
        self.optimizer = build_optimizer(self.model, RATE, SETTINGS.betas, SETTINGS.epsilon, SETTINGS.weight_decay)

    def step(self, step: int, factor: float = 1.0) -> float:
        """Returns the norm of all gradients; a step with an infinite one is dropped."""
        self.optimizer.zero_grad()
        self.tables.begin_step()
        dtype = self.model.middle.weight.dtype
        for batch in batches(step):
            own = batch.chunk(2)[dist.get_rank(self.replicas)].to(dtype)
            (self.model.loss(own) * factor).backward()
        gradients = []
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            wide = parameter.grad.double()
            dist.all_reduce(wide, group=self.replicas)
            parameter.grad.copy_(wide / 2)
            gradients.append(parameter.grad)
        norm = self.tables.join_norm(torch.stack([gradient.double().norm() for gradient in gradients]).norm())
        if not bool(norm.isfinite()):
            self.tables.discard()
            return float(norm)
        for gradient in gradients:
            gradient.mul_((CLIPPING / (norm + 1e-6)).clamp(max=1.0).to(dtype))
        self.optimizer.step()
        self.tables.apply(RATE, norm)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Weights and what belongs to tables, whole."""
        group = self.placement.tensor_group
        assert group is not None
        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, shard in slow_tables(self.model).items():
            table = self.tables[name]
            updates, clock = (t.double().unsqueeze(1) for t in (table.updates_N, table.clock_N))
            parts = {"": table.master_ND, " first": table.first_moment_ND, " second": table.second_moment_ND}
            for key, rows in (parts | {" updates": updates, " clock": clock}).items():
                found[name + key] = gather_whole(shard, rows, group)
        return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def agree(values: Any) -> bool:
    """Whether all ranks have the same."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return all(other == found[0] for other in found)


def train_sharded(tensor: dist.ProcessGroup, replicas: dist.ProcessGroup) -> dict[str, Any]:
    """Relative errors of norms, weights and all that belongs to tables, against the whole batch in one process."""
    wanted, wanted_norms = train_whole()
    trainer = Trainer(Placement(tensor, tensor), replicas)
    norms = [trainer.step(step) for step in range(STEPS)]
    state = trainer.state()
    return {
        "errors": {name: float((state[name] - whole).norm() / whole.norm()) for name, whole in wanted.items()},
        "norms": [abs(one / other - 1) for one, other in zip(norms, wanted_norms, strict=True)],
        "clipped": min(norms) > 2 * CLIPPING,
        "updates": sorted({int(count) for count in state["first.values updates"].flatten().tolist()}),
        "replicas_equal": agree({name: tensor.tolist() for name, tensor in state.items()}),
        "rows": [table.num_slots for table in slow_tables(trainer.model).values()],
        "counted": [layer.num_parameters().slow for layer in (trainer.model.first, trainer.model.second)],
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (trainer.model.first, trainer.model.second)],
    }


def resume_sharded(
    tensor: dist.ProcessGroup,
    replicas: dist.ProcessGroup,
    alone: dist.ProcessGroup,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, Any]:
    """A step spoilt by one rank's rows changes nothing; a job goes on from files as without; what is refused."""
    placement = Placement(tensor, tensor)
    trainer = Trainer(placement, replicas, dtype)
    for step in range(2):
        trainer.step(step)
    save_tensors(folder, TableValues(trainer.tables).pieces(Staging()))
    before, weights = trainer.state(), copy.deepcopy(trainer.model.state_dict())
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    spoil = trainer.model.second.values.register_hook(lambda gradient: gradient * float("inf"))
    if dist.get_rank() != 3:
        spoil.remove()
    spoilt = trainer.step(2)
    spoil.remove()
    unchanged = equal(before, trainer.state())
    resumed = Trainer(placement, replicas, dtype)
    TableValues(resumed.tables).load(SavedTensors(folder))
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    restored = equal(before, resumed.state())
    for step in range(2, STEPS):
        trainer.step(step)
        resumed.step(step)
    model = TwoMemories(ALONE, dtype)
    whole, names = TrainedTables(model, SETTINGS, group=alone), list(slow_tables(trainer.model))
    TableValues(whole).load(SavedTensors(folder))
    return {
        "dtypes": sorted({str(values.values_ND.dtype) for values in slow_tables(trainer.model).values()}),
        "spoilt": not math.isfinite(spoilt),
        "unchanged": unchanged,
        "restored": restored,
        "resumed": equal(trainer.state(), resumed.state()) and not equal(before, trainer.state()),
        "replicas_equal": agree({name: tensor.tolist() for name, tensor in trainer.state().items()}),
        "files_are_whole": all(torch.equal(whole[name].master_ND, before[name]) for name in names),
        "refusals": [
            refusal(lambda: TrainedTables(trainer.model, SETTINGS, group=replicas)),
            refusal(lambda: PKMLayer(WIDTH, PKMConfig(1, 1, 1, 8, 4), placement=placement)),
        ],
    }


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (UserError, ValueError) as error:
        return str(error)
    return "none"


def main() -> None:
    dist.init_process_group("gloo")
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (2, 3, 4)}
    tensor_groups = [dist.new_group(members) for members in ([0, 1], [2, 3])]
    replica_groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    tensor, replicas = tensor_groups[rank // 2], replica_groups[rank % 2]
    found: dict[str, Any] = {"layers": compare_layers(groups), "trained": train_sharded(tensor, replicas)}
    for dtype in (torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[name] = resume_sharded(tensor, replicas, alone[rank], dtype, Path(sys.argv[2]) / name)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
