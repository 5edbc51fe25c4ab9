"""Reference cases replayed over several ranks: tokens and slots divided among them, results brought together.

Letters: B sequences, T tokens of a call, Y tokens of this rank in each sequence.
"""

from __future__ import annotations

import pickle
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from megatron_fwpkm.memory.cache import MemoryCache
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import FastState, MemoryView
from megatron_fwpkm.memory.functional import MemoryTrace, fast_memory
from megatron_fwpkm.memory.golden import CaseInputs, CaseResult, Replay, replay_case
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.placement import Placement
from megatron_fwpkm.memory.sharding import TokenShare, token_share
from megatron_fwpkm.memory.tokens import TokenParts
from megatron_fwpkm.memory.whole_state import WholeState


class GroupReplay(Replay):
    """Calls on a memory whose slots are spread over a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def make_state(self, config: MemoryConfig, dtype: torch.dtype) -> FastState:
        """This rank's part."""
        return FastState(config, dtype=dtype, rank=self._rank, ranks=self._ranks)

    def own_values(self, state: FastState, values_ND: Tensor) -> Tensor:
        """The rows that this rank owns."""
        if state.owned is None:
            return values_ND
        return values_ND[state.owned].where((state.owned >= 0).unsqueeze(1), 0)

    def whole_values(self, state: FastState, values_ND: Tensor) -> Tensor:
        """Every owner's rows, put together."""
        if state.owned is None:
            return values_ND
        whole_ND = values_ND.new_zeros(state.config.num_slots, values_ND.shape[1])
        there = state.owned >= 0
        whole_ND[state.owned[there]] = values_ND[there]
        dist.all_reduce(whole_ND, group=self._group)
        return whole_ND

    def make_cache(self, state: FastState, batch: int) -> MemoryCache:
        """A cache to which owners hand out their rows."""
        return MemoryCache(WholeState(state, self._group), batch)

    def call(self, inputs: CaseInputs, view: MemoryView, config: MemoryConfig, trace: MemoryTrace) -> Tensor:
        """Each rank on its share of every chunk; the outputs of all, and the trace as of one rank."""
        query, target, gate, mask = inputs
        batch, tokens = query.shape[:2]
        shares = [token_share(tokens, config, rank, self._ranks) for rank in range(self._ranks)]
        share = shares[self._rank]
        parts = TokenParts([of_rank.own for of_rank in shares], self._group)
        own_query = parts.take(query.transpose(0, 1)).transpose(0, 1)
        own_gate = None if gate is None else parts.take(gate.t().contiguous()).t()
        own_mask = None if mask is None else mask[:, share.own]
        group = make_memory_group(Placement(tensor_group=self._group, memory_group=self._group), config)
        own_target = _Summed.apply(target, self._group)[:, share.targets]
        output = fast_memory(
            own_query, own_target, own_gate, own_mask, view, config, trace=trace, group=group, spans=share.spans
        )
        self._bring_together(trace, parts, share, batch, tokens)
        whole: Tensor = parts.gather(output.transpose(0, 1).contiguous()).transpose(0, 1)
        return whole

    def _bring_together(
        self, trace: MemoryTrace, parts: TokenParts, share: TokenShare, batch: int, tokens: int
    ) -> None:
        assert trace.losses is not None and trace.slots_BTHK is not None and trace.weights_BTHK is not None
        trace.slots_BTHK = parts.all_rows(trace.slots_BTHK.transpose(0, 1)).transpose(0, 1)
        trace.weights_BTHK = parts.all_rows(trace.weights_BTHK.transpose(0, 1)).transpose(0, 1)
        with_target = torch.cat([share.own[span.tokens][: span.own_pairs] for span in share.spans])
        losses_BT = trace.losses.new_zeros(batch, tokens)
        losses_BT[:, with_target] = trace.losses
        have_T = torch.zeros(tokens, dtype=torch.int64)
        have_T[with_target] = 1
        for summed in (losses_BT, have_T):
            dist.all_reduce(summed, group=self._group)
        trace.losses = losses_BT[:, have_T > 0]


class _Summed(torch.autograd.Function):
    """What all ranks have and each uses a part of: gradients are added up."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return whole

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)  # type: ignore[attr-defined]
        return gradient, None


def replay_over_ranks(paths: Sequence[Path], dtype: torch.dtype, ranks: int) -> list[CaseResult]:
    """Replay layer cases in `ranks` processes on this machine, as `replay_case` does in one.

    Raises:
        GoldenCaseError: a case can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="fwpkm-verify-") as folder:
        torch.multiprocessing.spawn(_replay, (ranks, [str(path) for path in paths], dtype, folder), nprocs=ranks)
        outcome: list[CaseResult] | Exception = pickle.loads((Path(folder) / "results").read_bytes())
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _replay(rank: int, ranks: int, paths: list[str], dtype: torch.dtype, folder: str) -> None:
    """One of the processes. All meet the same errors; the first one tells."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    outcome: list[CaseResult] | Exception
    try:
        outcome = [replay_case(Path(path), dtype, GroupReplay(group)) for path in paths]
    except Exception as error:
        outcome = error
    if rank == 0:
        (Path(folder) / "results").write_bytes(pickle.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
