"""The plan of a job against the job's real parts."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fwpkm_kernels import SlotPlan
from megatron_fwpkm.config import TrainConfig, UserError, load_train_config
from megatron_fwpkm.memory import FastState, MemoryConfig
from megatron_fwpkm.memory.functional import chunk_spans, fast_memory
from megatron_fwpkm.memory.statistics import MemoryStatistics
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.profiling.memory_rows import ReadGroup, distinct_slots, memory_call
from megatron_fwpkm.train.dry_run import make_plan, padded_vocabulary, parse_bytes, print_plan, readable_bytes
from megatron_fwpkm.train.memory_plan import USABLE

ROOT = Path(__file__).parents[2]
NANO = ROOT / "configs" / "train" / "nano.yaml"


def _nano(*overrides: str) -> TrainConfig:
    return load_train_config(NANO, overrides)


def test_plan_counts_what_the_model_has() -> None:
    config = _nano("training.gradient_accumulation=3", "training.precision=bf16")
    plan = make_plan(config)
    model = Decoder(config.model, padded_vocabulary(4096, 1), TorchBackend(), config.seed)
    slow = sum(weight.numel() for weight in model.parameters())
    assert plan.slow == slow
    (rank,) = plan.memory.stages
    assert plan.fast * 4 == rank.fast_state == sum(state.num_bytes for _, state in model.fast_states())
    assert plan.flops_per_token == model.num_flops_per_token(1024)
    assert sum(kind.flops_per_token for kind in plan.kinds) == plan.flops_per_token
    assert {kind.layers for kind in plan.kinds if "FwPKM" in kind.name} == {2}
    assert plan.active_per_token == model.num_parameters().active_per_token
    assert plan.tokens_per_step == 2 * 3 * 1024 and plan.total_flops == plan.flops_per_token * 2 * 3 * 1024 * 560
    # Under ZeRO-1 in bf16 every rank has the whole sum of gradients, and the last microbatch's.
    assert (rank.parameters, rank.gradients, rank.optimizer) == (2 * slow, 6 * slow, 6 * slow)


def test_plan_counts_untied_embeddings_as_the_model_does() -> None:
    config = _nano("model.tied_embeddings=false")
    plan = make_plan(config)
    count = Decoder(config.model, padded_vocabulary(4096, 1), TorchBackend(), config.seed).num_parameters()
    assert (plan.slow, plan.fast, plan.active_per_token) == (count.slow, count.fast, count.active_per_token)


@pytest.mark.parametrize(
    "changes",
    [{}, {"heads": 2, "topk": 2}, {"chunk_size": "sequence"}, {"gradient_clip": True}, {"reset": "per_sequence"}],
)
def test_kept_rows_are_those_of_the_plan(changes: dict[str, object]) -> None:
    """Against the tensors that autograd really keeps: exactly where the touched rows are known, and at most so many."""
    settings = {"heads": 1, "topk": 2, "n_subkeys": 64, "k_dim": 16, "v_dim": 24, "chunk_size": 16, **changes}
    config = MemoryConfig(**settings)  # type: ignore[arg-type]
    state = FastState(config)
    state.begin_step()
    batch, length = 2, 40
    query = torch.randn(batch, length, config.heads, config.k_dim, requires_grad=True)
    value = torch.randn(batch, length, config.v_dim, requires_grad=True)
    gate = torch.rand(batch, length, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    alive: list[torch.UntypedStorage] = []
    touched: list[int] = []
    plans = MemoryStatistics.add_chunk

    def count(statistics: MemoryStatistics, plan: SlotPlan, memories: int) -> None:
        touched.append(plan.slots_U.numel())
        plans(statistics, plan, memories)

    view = state.view(batch, training=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStatistics, "add_chunk", count)
        output = fast_memory(query, value, gate, None, view, config, statistics=MemoryStatistics(config))
    found = sum(kept.values()) - sum(tensor.nbytes for tensor in (query, value, gate, output))
    spans = chunk_spans(length, config)
    call = memory_call(config, batch, spans, ReadGroup(), touched)
    assert found == call.expected_bytes <= call.most_bytes
    assert memory_call(config, batch, spans, ReadGroup()).expected_bytes <= call.most_bytes


@pytest.mark.parametrize(("slots", "reads"), [(1, 3), (50, 1), (50, 200), (4096, 1024)])
def test_expected_number_of_distinct_slots(slots: int, reads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(slots, (reads,), generator=generator).unique().numel() for _ in range(200)]
    assert distinct_slots(slots, reads) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_stages_and_longest_sequence() -> None:
    """Stages add up to the model; the longest sequence fits, and one chunk more does not."""
    layout = ("parallel.pipeline=2", "parallel.processes=2", "training.gradient_accumulation=3")
    sizes = (*layout, "training.zero_stage=0", "data.vocab_size=512")
    plan = make_plan(_nano(*sizes), 1 << 30)
    first, last = plan.memory.stages
    assert (first.microbatches, last.microbatches) == (2, 1)
    tied = 512 * 192  # on both
    assert first.parameters + last.parameters == 4 * (plan.slow + tied)
    assert first.fast_state + last.fast_state == 4 * plan.fast
    longest = plan.memory.longest_sequence
    assert longest
    for length, fits in ((longest, True), (longest + 128, False)):
        planned = make_plan(_nano(*sizes, f"data.sequence_length={length}"), 1 << 30)
        assert (planned.memory.largest.total <= USABLE * (1 << 30)) == fits
    assert make_plan(_nano(*sizes), 1 << 20).memory.longest_sequence == 0
    console = Console(width=300, record=True, file=io.StringIO())
    print_plan(_nano(*sizes), plan, console)
    text = console.export_text()
    for words in ("stage 0 (most)", "share of stage 0", "Most of it: ", f"Longest sequence that fits: {longest:,} tok"):
        assert words in " ".join(text.split()), words


def test_sizes_of_memory() -> None:
    assert [parse_bytes(text) for text in ("80GiB", "1.5 mib", "80GB", "7")] == [80 << 30, 3 << 19, 80 * 10**9, 7]
    for text in ("", "80 apples", "0GiB", "-1GiB"):
        with pytest.raises(UserError, match="no size of memory"):
            parse_bytes(text)


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.context 2: context parallelism is not supported"):
        _nano("parallel.context=2")


def test_largest_models_are_planned_without_allocating() -> None:
    sizes = {"hidden_size": 8192, "layers": 48, "attention_heads": 64, "key_value_heads": 8, "head_dim": 128}
    overrides = [f"model.{name}={value}" for name, value in {**sizes, "mlp_size": 28672}.items()]
    overrides += ["model.memory.n_subkeys=4096", "model.memory.v_dim=1024", "data.vocab_size=131072"]
    overrides += ["parallel.processes=64", "evaluation.sequences=64"]
    plan = make_plan(_nano(*overrides))
    # Hundreds of GB, had they been allocated.
    assert plan.slow > 30e9 and plan.memory.largest.fast_state > 2 * 64 * 2**30
    console = Console(width=120, record=True, quiet=True)
    print_plan(_nano(*overrides), plan, console)


def test_plan_refuses_processes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = _nano().parallel.model_copy(update={"tensor": 2})
    config = _nano().model_copy(update={"parallel": parallel})
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes can't be divided into .* parallel\.tensor=2"):
        make_plan(config)
    monkeypatch.delenv("WORLD_SIZE")
    many = _nano("evaluation.sequences=128")
    assert make_plan(many, processes=128).replicas == 128
    with pytest.raises(UserError, match=r"evaluation\.sequences \(128\) must be at least .*129 x 1\) \(129 processes"):
        make_plan(many, processes=129)


def test_dry_run_command_starts_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(NANO), "--dry-run"]
    overrides = [f"run_directory={tmp_path / 'run'}", f"data.directory={tmp_path / 'data'}", "training.steps=77"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in (
        "steps: 77",
        "FwPKMLayer",
        "ZeRO-1 over 2 replicas",
        "rows kept by memories",
        "Beside all that, a save copies",
        "replica 1",
        "FLOP in all",
    ):
        assert words in done.stdout, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["--config", str(NANO), "checkpoint.evry=3"], "did you mean `checkpoint.every`?"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_readable_bytes() -> None:
    assert [readable_bytes(size) for size in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.00 KiB", "3.00 MiB", "5.00 GiB"]
