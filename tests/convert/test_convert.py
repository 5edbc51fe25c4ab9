"""launch/convert.py: to Hugging Face and back, from the paper's code and back, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fwpkm.checkpoint.store import read_state
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.convert.folder import new_folder
from megatron_fwpkm.convert.huggingface import read_exported
from megatron_fwpkm.convert.official_config import (
    OfficialConfigError,
    decoder_config,
    exported_config,
    official_config,
)
from megatron_fwpkm.convert.official_names import official_weights
from megatron_fwpkm.convert.source import WholeModel, model_of_run
from megatron_fwpkm.convert.weight_files import read_weights, write_weights
from megatron_fwpkm.data.tokenizer import train_tokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig, YarnConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.checkpoints import differing, whole_tensors
from tests.commands import run_command
from tests.exports import error_of_case, load_exported

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden_model").glob("*.safetensors"))
ROWS = 320
MODEL = """
model:
  {hidden_size: 32, layers: 3, mixers: [gated_delta_net, sliding_attention, full_attention], attention_heads: 4,
   key_value_heads: 2, head_dim: 8, mlp_size: 48, window: 16, initial_std: 0.2, tied_embeddings: false,
   delta_net: {key_heads: 2, value_heads: 4, key_head_dim: 8, value_head_dim: 6},
   memory_layers: [0, 2], memory: {topk: 4, n_subkeys: 8, k_dim: 16, v_dim: 16, chunk_size: 16, weight_decay: 0.01},
   pkm_layers: [1], pkm: {heads: 2, topk: 2, n_subkeys: 4, k_dim: 8, v_dim: 8}}
data: {sequence_length: 64}
"""


def convert(*arguments: str | Path, expected: int = 0) -> str:
    """Run the command; returns the words that it printed."""
    return " ".join(run_command("convert", *arguments, expected=expected).split())


def write_run(folder: Path, memories: int = 1) -> Decoder:
    """A run with a checkpoint of two steps, of a model that has read; further memories are other ones."""
    from megatron_fwpkm.checkpoint.parts import fast_name, memory_pieces
    from megatron_fwpkm.checkpoint.pieces import Staging
    from megatron_fwpkm.checkpoint.store import JobState, save_alone
    from megatron_fwpkm.checkpoint.whole_model import whole_model_pieces

    config = tiny_config(folder)
    model = Decoder(config.model, ROWS, TorchBackend(config.model.initial_std), seed=7).train()
    model.logits(torch.randint(ROWS, (2, 64), generator=torch.Generator().manual_seed(1)))  # writes the memories
    pieces = whole_model_pieces(model)
    for memory in range(1, memories):
        for block, fast in model.fast_states():
            fast.table_ND.mul_(2)
            pieces |= memory_pieces(fast, fast_name(memory, block), Staging())
    state = JobState(2, 256, 0, 5.0, [5.0], {}, {}, {})
    save_alone(folder / "checkpoints", state, pieces)
    (folder / "config.yaml").write_text(to_yaml(config))
    return model


def tiny_config(folder: Path) -> TrainConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(MODEL)
    return load_train_config(folder / "tiny.yaml", [f"run_directory={folder}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 264 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(["a little text to learn from, again and again " * 20] * 3, 264)
    trained.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": trained.end_of_document}))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def exported(run: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    assert "wrote" in convert("to-hf", run, folder, "--tokenizer", tokenizer)
    return folder


def test_logits_are_those_of_the_training_model(run: Path, exported: Path, tmp_path: Path) -> None:
    """With memory writing over several chunks; a call without a cache leaves the stored memory as it was."""
    model = load_exported(exported, tmp_path).model
    ours = model_of_run(run).decoder.train()
    tokens_BT = torch.randint(264, (1, 70), generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        found, again = model(tokens_BT).logits, model(tokens_BT).logits
        wanted = ours.logits(tokens_BT)
    assert torch.equal(found, again)
    assert differing(before, dict(model.state_dict())) == []
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    frozen = model(tokens_BT, freeze_memory=True).logits
    assert float((frozen - wanted).norm() / wanted.norm()) > 1e-4  # the memory matters


def test_folder_has_what_users_look_for(exported: Path, tmp_path: Path) -> None:
    loaded = load_exported(exported, tmp_path)
    model, found = loaded.model, loaded.tokenizer
    inputs = found(["a little text", "again"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["attention_mask"][1, 0] == 0
    told = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20)
    assert told.shape == (2, inputs["input_ids"].shape[1] + 20)
    assert int(told.max()) < found.vocab_size == 264  # rows of the embedding that are no token are not generated
    card = (exported / "README.md").read_text()
    counts = Decoder(model_config(exported), ROWS, TorchBackend(), seed=0).num_parameters()
    told_of = (f"| {counts.slow:,} |", f"| {counts.fast:,} |", "blocks 0, 2: 64 slots of 16", "320 rows for 264 tokens")
    for text in (*told_of, "| 256 |", "2601.00671", "AutoTokenizer"):
        assert text in card, text
    assert "Measured" not in card  # nothing was
    assert "model:" not in (exported / "training_config.yaml").read_text()
    for path in exported.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, path


def model_config(folder: Path) -> DecoderConfig:
    return decoder_config(json.loads((folder / "config.json").read_text()))[0]


def test_there_and_back_is_bitwise(run: Path, exported: Path, tmp_path: Path) -> None:
    """The run that from-hf begins has the same weights and true values; exported again they are the same bytes."""
    output = convert("from-hf", exported, tmp_path / "back", "training.steps=70")
    assert "step_00000000" in output and "launch/train.py" in output
    before = whole_tensors(run / "checkpoints" / "step_00000002")
    after = whole_tensors(tmp_path / "back" / "checkpoints" / "step_00000000")
    assert differing(true_values(before), true_values(after)) == []
    config = load_train_config(tmp_path / "back" / "config.yaml")
    assert config.data.tokenizer == str(tmp_path / "back" / "tokenizer.json") and config.data.vocab_size is None
    assert read_state(tmp_path / "back" / "checkpoints" / "step_00000000").corpus.keys() == {"tokenizer"}
    assert (config.training.steps, config.data.sequence_length) == (70, 64)
    assert config.model == dataclasses.replace(tiny_config(tmp_path / "x").model, mixers=config.model.mixers)
    convert("to-hf", tmp_path / "back", tmp_path / "again")
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (exported, tmp_path / "again")]
    assert tokenizers[0] == tokenizers[1] and "## Training" not in (tmp_path / "again" / "README.md").read_text()
    same = (exported / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert same


def test_what_transformers_saved_again_comes_back(exported: Path, tmp_path: Path) -> None:
    """It leaves keys out that are as usual, tied embeddings among them, and adds others."""
    config = json.loads(GOLDEN[0].with_suffix(".json").read_text())["config"]
    assert config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert("from-official", GOLDEN[0], "--config", tmp_path / "config.json", "--hf", tmp_path / "tied")
    for number, folder in enumerate((exported, tmp_path / "tied")):
        load_exported(folder, tmp_path / "modules").model.save_pretrained(tmp_path / f"again{number}")
        found, wanted = read_exported(tmp_path / f"again{number}"), read_exported(folder)
        assert (found.config, found.vocab_size) == (wanted.config, wanted.vocab_size)
        assert differing(official_weights(found.decoder), official_weights(wanted.decoder)) == []
    content = json.loads((tmp_path / "again1" / "config.json").read_text())
    assert content.pop("tie_word_embeddings") is True
    assert decoder_config(content)[0].tied_embeddings  # of versions that leave it out


def test_settings_of_any_file_take_the_model_of_the_weights(exported: Path, tmp_path: Path) -> None:
    """Only then, and with the overrides, must they fit together."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: {layers: 1}\ndata: {source: folder}\ntraining: {steps: 4}\nparallel: {pipeline: 3}\n")
    base = ("from-hf", exported, tmp_path / "out", "--train-config", settings)
    assert "data.source folder needs data.path" in convert(*base, "optimizer.warmup_steps=1", expected=2)
    output = convert(*base, "optimizer.warmup_steps=1", "data.path=/x", "parallel.processes=3")
    assert output.endswith("checkpoint.memories=keep")
    config = load_train_config(tmp_path / "out" / "config.yaml")
    assert (config.model.layers, config.data.path, config.parallel.pipeline) == (3, "/x", 3)


def test_places_may_be_relative(run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    convert("to-hf", run, ".", "--no-tokenizer")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    monkeypatch.chdir(run / "checkpoints")
    convert("to-hf", "step_00000002", tmp_path / "other", "--no-tokenizer")
    monkeypatch.chdir(tmp_path)
    convert("from-hf", exported, "begun")
    assert load_train_config(tmp_path / "begun" / "config.yaml").run_directory == str(tmp_path / "begun")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link" in convert("to-hf", run, "link", "--no-tokenizer", expected=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "x"},
        {"vocab_size": -1},
        {"hidden_size": 32.5},
        {"rope_scaling": "yarn"},
        {"layer_types": 5},
        {"num_attention_heads": 3},
        {"fwpkm_topk": 0},
        {"max_position_embeddings": "abc"},
    ],
)
def test_configurations_that_are_refused_in_one_line(changes: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    content = json.loads((exported / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content | changes))
    assert convert("from-hf", tmp_path / "hf", tmp_path / "out", expected=2).startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), new_folder(tmp_path / "x"):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "x"
    (tmp_path / ".x.partial" / "left").mkdir(parents=True)  # by one that was killed
    with new_folder(target) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
        with pytest.raises(UserError, match="another process is writing"), new_folder(target):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]
    (tmp_path / ".y.partial").symlink_to(target)
    with pytest.raises(UserError, match="is a link"), new_folder(tmp_path / "y"):
        pass
    assert (target / "file").exists()


def true_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of memories the values times the scale, which files of other programs don't have."""
    found = {}
    for name, tensor in tensors.items():
        folder, _, part = name.rpartition("/")
        if part == "values.by_slot":
            found[name] = tensor * tensors[f"{folder}/scale"].to(tensor.dtype)
        elif part not in ("scale", "version"):
            found[name] = tensor
    return found


def test_shards_and_types(run: Path, exported: Path, tmp_path: Path) -> None:
    convert("to-hf", run, tmp_path / "parts", "--no-tokenizer", "--max-shard-size", "60KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    whole = load_file(exported / "model.safetensors")
    assert differing(read_weights(tmp_path / "parts"), whole) == []
    assert differing(dict(load_exported(tmp_path / "parts", tmp_path).model.state_dict()), whole) == []
    convert("to-hf", run, tmp_path / "small", "--no-tokenizer", "--dtype", "bfloat16")
    small = load_file(tmp_path / "small" / "model.safetensors")
    fast = {name for name in small if ".fwpkm." in name}
    assert len(fast) == 4 and all(torch.equal(small[name], whole[name]) for name in fast)
    assert all(torch.equal(small[name], whole[name].bfloat16()) for name in small.keys() - fast)
    assert "max-shard-size" in convert(
        "to-hf", run, tmp_path / "no", "--no-tokenizer", "--max-shard-size", "x", expected=2
    )
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*partial"))


def test_one_of_several_memories(tmp_path: Path) -> None:
    write_run(tmp_path / "run", memories=2)
    output = convert("to-hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer", "--memory", "1")
    assert "2 memories" in output and "took memory 1" in output
    convert("to-hf", tmp_path / "run", tmp_path / "first", "--no-tokenizer")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "hf"))
    fast = [f"model.layers.{block}.fwpkm.values" for block in (0, 2)]
    assert differing(first, second) == fast
    assert all(torch.equal(first[name] * 2, second[name]) for name in fast)
    refused = convert("to-hf", tmp_path / "run", tmp_path / "no", "--memory", "2", expected=2)
    assert "has no memory 2: 2 were written" in refused


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_weights_of_the_papers_code_come_and_go(path: Path, tmp_path: Path) -> None:
    """As safetensors, as pytorch_model.bin and as DeepSpeed's file; back they are the same bytes of every tensor.

    In transformers the export has the logits that the paper's code has.
    """
    weights = load_file(path)
    config = json.loads(path.with_suffix(".json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for number, name in enumerate(("pytorch_model.bin", "mp_rank_00_model_states.pt", "model.safetensors")):
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        if name.endswith(".safetensors"):
            shutil.copy(path, file)
        else:
            torch.save({"module": weights, "ds_version": "0"} if "rank" in name else weights, file)
        out, hf = tmp_path / f"run{number}", tmp_path / f"hf{number}"
        printed = convert("from-official", file, "--config", tmp_path / "config.json", "--out", out, "--hf", hf)
        assert "all names and shapes fit" in printed
        convert("to-official", out, tmp_path / f"official{number}")
        back = load_file(tmp_path / f"official{number}" / "model.safetensors")
        assert differing(back, weights) == []
        assert differing(back, load_file(hf / "model.safetensors")) == []
    as_there: dict[str, Any] = {"dtype": torch.float64, "memory_mode": "shared", "cache_mode": "official"}
    assert error_of_case(load_exported(tmp_path / "hf0", tmp_path, **as_there).model, path) < 1e-6
    written = json.loads((tmp_path / "official0" / "config.json").read_text())
    assert decoder_config(written) == decoder_config(config)
    assert {key: config[key] for key in written if key in config} == {
        key: written[key] for key in written if key in config
    }


def test_names_that_do_not_fit_are_listed_before_anything_is_written(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    weights = load_file(exported / "model.safetensors")
    weights["model.norm.wait"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    refused = convert("from-hf", tmp_path / "hf", tmp_path / "out", expected=2)
    assert "missing model.norm.weight, unknown model.norm.wait" in refused
    assert not (tmp_path / "out").exists()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "hf" / name).write_bytes((exported / name).read_bytes()[:100])
        assert "cannot read" in convert("from-hf", tmp_path / "hf", tmp_path / "out", expected=2)
    refused = convert("from-hf", tmp_path / "none", tmp_path / "out", expected=2)
    assert "cannot read" in refused and "config.json" in refused


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("1 / 0",))


def test_pickles_run_no_code_and_other_files_are_told_apart(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "more": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run its code, so it is refused"):
        read_weights(tmp_path)
    torch.save({"module": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"its 'module' is empty.*zero_to_fp32"):
        read_weights(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(UserError, match="a list instead of weights"):
        read_weights(tmp_path / "b.pt")
    torch.save({"module.a": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "c.pt")
    assert list(read_weights(tmp_path / "c.pt")) == ["a", "b"]
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(UserError, match="of no known kind"):
        read_weights(tmp_path / "d.txt")
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match=r"has no weights: none of model\.safetensors"):
        read_weights(tmp_path / "e")
    for rank in range(2):
        torch.save({"module": {"a": torch.ones(1)}}, tmp_path / "e" / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(UserError, match="one part of several"):
        read_weights(tmp_path / "e")


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    weights = {name: torch.arange(4.0) + number for number, name in enumerate("abc")}
    write_weights(tmp_path, weights, "0.02KB", lambda num_bytes: None)
    assert differing(read_weights(tmp_path), weights) == []
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["d"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cannot read weights .*and the index differ in \['d'\]"):
        read_weights(tmp_path)
    content["weight_map"] = {"a": "../a.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no file beside the index"):
        read_weights(tmp_path)


def test_nothing_is_overwritten_and_mistakes_are_told(
    run: Path, exported: Path, tokenizer: Path, tmp_path: Path
) -> None:
    for command in (("to-hf", run, exported), ("to-official", run, exported), ("from-hf", exported, run)):
        assert "is there already and not empty" in convert(*command, expected=2)
    weights, config = GOLDEN[0], tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(weights.with_suffix(".json").read_text())["config"]))
    base: tuple[str | Path, ...] = ("from-official", weights, "--config", config)
    assert "all names and shapes fit" in convert(*base)  # a check alone
    assert "give --out too" in convert(*base, "training.steps=3", expected=2)
    out, hf = tmp_path / "both", tmp_path / "too"
    assert "stepz" in convert(*base, "--out", out, "--hf", hf, "training.stepz=3", expected=2)
    assert "give two folders" in convert(*base, "--out", out, "--hf", out, expected=2)
    assert not out.exists() and not hf.exists()
    assert "give --hf too" in convert(*base, "--tokenizer", tokenizer, expected=2)
    refused = convert(*base, "--hf", tmp_path / "hf", "--tokenizer", tokenizer, expected=2)
    assert "264 tokens and the model's embedding 61 rows" in refused
    assert "contradict" in convert("to-hf", run, tmp_path / "o", "--tokenizer", "x", "--no-tokenizer", expected=2)
    refused = convert("from-hf", exported, tmp_path / "o", "model.layers=2", expected=2)
    assert "the model is that of the weights" in refused
    refused = convert("from-hf", exported, tmp_path / "o", "training.stepz=2", expected=2)
    assert "unknown key `training.stepz`" in refused
    assert "has no complete checkpoint" in convert("to-hf", exported, tmp_path / "o", expected=2)
    assert not (tmp_path / "o").exists()


def test_every_setting_is_exported() -> None:
    """Settings other than the defaults come back; what the paper's code lacks is refused on the way there."""
    memory = MemoryConfig(
        heads=2, topk=3, n_subkeys=8, k_dim=6, v_dim=10, chunk_size="sequence", lookahead=2, score_type="dot_product",
        score_nonlinearity="silu", temperature=2.0, learning_rate=0.5, weight_decay=0.1, gradient_clip=True,
        addressing_loss="none", addressing_loss_weight=0.5, values_only=False, key_gradient="official",
        weigh_write_by_gate=False, fuse_output_by_gate=False, normalize_value=False, gate_outputs=3, reset="per_step",
        cache_mode="official", cache_memory="shared",
    )  # fmt: skip
    untouched = {
        field.name
        for field in dataclasses.fields(memory)
        if getattr(memory, field.name) == getattr(MemoryConfig(), field.name)
    }
    assert untouched == {"check_finite"}  # not of the model
    config = DecoderConfig(
        layers=2, mixers=("full_attention", "gated_delta_net"), window=7, rotary_base=500.0, memory=memory,
        rope_scaling=YarnConfig(4.0, 128, 16.0, 2.0, 1.5), memory_layers=(1,),
    )  # fmt: skip
    assert decoder_config(exported_config(config, 61, 128)) == (config, 61)
    with pytest.raises(OfficialConfigError, match="gate_outputs is 3; the official code has 8"):
        official_config(config, 61, 128)
    with pytest.raises(OfficialConfigError, match="model_type is 'llama'"):
        decoder_config({**exported_config(config, 61, 128), "model_type": "llama"})
    with pytest.raises(OfficialConfigError, match="unknown keys fwpkm_reset"):
        decoder_config({**official_config(DecoderConfig(), 61, 128), "fwpkm_reset": "carry"})


def test_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert "no space left" in convert("to-hf", run, tmp_path / "hf", "--no-tokenizer", expected=2)
    assert list(tmp_path.iterdir()) == []


def test_whole_model_knows_its_shape(run: Path) -> None:
    model: WholeModel = model_of_run(run)
    assert (model.vocab_size, model.max_positions) == (ROWS, 64)
    assert model.config == tiny_config(run).model
