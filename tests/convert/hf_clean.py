"""Checks of an exported model as an outsider loads it, with torch, transformers and safetensors alone.

    python hf_clean.py EXPORT EXPECTED [--hide PACKAGE,...] [--scratch FOLDER]

EXPORT holds config.json, model.safetensors and the model files. EXPECTED is a safetensors file with `input_ids` [B, T],
2 or more rows of 20 tokens or more, none of them 0, and float64 `logits` [B, T, V] of each row alone. `--hide` makes
packages look as if they were not installed. One line is printed for each check; the exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKS: list[Callable[[Setting], None]] = []
NEW_TOKENS = 10


def check(function: Callable[[Setting], None]) -> Callable[[Setting], None]:
    """Run it as one of the checks."""
    CHECKS.append(function)
    return function


def hide(packages: set[str]) -> None:
    """Let packages look as if they were not installed, to imports and to whoever asks whether they are there."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            return None if fullname.split(".")[0] in packages else super().find_spec(fullname, path, target)

    # Without the finders of packages that are installed in place, which have their own.
    kept = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Finder]
    sys.meta_path[:] = kept  # type: ignore[assignment]
    for name in packages:
        assert importlib.util.find_spec(name) is None, name


class Setting:
    """The export, and what is expected of it."""

    def __init__(self, folder: Path, expected: Path, scratch: Path) -> None:
        from safetensors.torch import load_file

        self.folder, self.scratch = folder, scratch
        tensors = load_file(expected)
        self.ids, self.logits = tensors["input_ids"].long(), tensors["logits"]

    def load(self, folder: Path | None = None, **options: Any) -> Any:
        """The model in float64, in which caches and paddings agree to the last digits."""
        from transformers import AutoModelForCausalLM

        options = {"dtype": torch.float64, **options}
        return AutoModelForCausalLM.from_pretrained(folder or self.folder, trust_remote_code=True, **options).eval()


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest deviation over the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def assert_refused(words: str, call: Callable[[], Any]) -> None:
    """The call must raise a ValueError whose message has these words."""
    try:
        call()
    except ValueError as refusal:
        assert words in str(refusal), f"{words!r} is not in: {refusal}"
        return
    raise AssertionError(f"was not refused: {words}")


def stored(model: Any) -> dict[str, Tensor]:
    """A copy of the stored memories."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".fwpkm." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def greedy(model: Any, ids: Tensor | None, **options: Any) -> Tensor:
    """Prompt and NEW_TOKENS tokens more."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **options}
    return model.generate(ids, **options)  # type: ignore[no-any-return]


@check
def files_are_all_there_is(setting: Setting) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(setting.folder, trust_remote_code=True)
    assert type(config).__name__ == "FwPKMConfig" and config.model_type == "fwpkm"
    options: Any = {"trust_remote_code": True, "output_loading_info": True}
    _, found = AutoModelForCausalLM.from_pretrained(setting.folder, **options)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    base, found = AutoModel.from_pretrained(setting.folder, **options)
    assert not found["missing_keys"] and set(found["unexpected_keys"]) <= {"lm_head.weight"}, found
    assert base(setting.ids).last_hidden_state.shape == (*setting.ids.shape, config.hidden_size)


@check
@torch.no_grad()
def logits(setting: Setting) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = setting.load(dtype=dtype)(setting.ids).logits
        assert found.dtype == dtype
        assert error(found, setting.logits) < tolerance, error(found, setting.logits)


@check
@torch.no_grad()
def a_cache_in_calls_of_any_size(setting: Setting) -> None:
    model, length = setting.load(), setting.ids.shape[1]
    before = stored(model)
    for sizes in ([1] * length, [length - 1, 1], [3, 1, length - 11, 7]):
        cache, parts = None, []
        for piece in setting.ids.split(sizes, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert cache is not None and cache.get_seq_length() == length
        assert error(torch.cat(parts, 1), setting.logits) < 1e-9, sizes
    assert same(before, stored(model))


@check
@torch.no_grad()
def generation_with_and_without_cache(setting: Setting) -> None:
    model = setting.load()
    by_hand = setting.ids
    for _ in range(NEW_TOKENS):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, setting.ids), by_hand)
    assert torch.equal(greedy(model, setting.ids, use_cache=False), by_hand)
    embeds = model.get_input_embeddings()(setting.ids)
    assert torch.equal(greedy(model, None, inputs_embeds=embeds), by_hand[:, setting.ids.shape[1] :])
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        sampled.append(greedy(model, setting.ids, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(*sampled) and sampled[0].shape[0] == 3 * len(setting.ids)


@check
@torch.no_grad()
def beams(setting: Setting) -> None:
    model, ids = setting.load(), setting.ids
    found = greedy(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(found, greedy(model, ids, num_beams=3, num_return_sequences=2, use_cache=False))
    assert not torch.equal(found[0], greedy(model, ids)[0])  # or beams would not have been reordered
    cache = model.make_cache(2)
    model(ids[:2], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    for part in ids[:2, :9].flip(0).split(1, 1):
        ended = model(part, past_key_values=cache).logits
    wanted = model(torch.cat([ids[:2].flip(0), ids[:2, :9].flip(0)], 1)).logits[:, -1:]
    assert error(ended, wanted) < 1e-9


@check
@torch.no_grad()
def left_padding(setting: Setting) -> None:
    model, long, pads = setting.load(), setting.ids[0], 7
    short = setting.ids[1, pads:]
    rows = torch.stack([long, torch.cat([short.new_zeros(pads), short])])
    mask = torch.ones_like(rows)
    mask[1, :pads] = 0
    found = model(rows, attention_mask=mask).logits
    alone = model(short[None]).logits
    assert error(found[1, pads:], alone[0]) < 1e-9
    assert error(found[0], setting.logits[0]) < 1e-9
    generated = greedy(model, rows, attention_mask=mask)
    assert torch.equal(generated[1, pads:], greedy(model, short[None])[0])
    assert torch.equal(generated[0], greedy(model, long[None])[0])
    searched = greedy(model, rows, attention_mask=mask, num_beams=3)
    assert torch.equal(searched[1, pads:], greedy(model, short[None], num_beams=3)[0])


@check
@torch.no_grad()
def frozen_memory(setting: Setting) -> None:
    model = setting.load()
    before, ids = stored(model), setting.ids
    # Text read twice changes what a memory answers; a frozen one has not read it.
    cache = model.make_cache(len(ids))
    model(ids, past_key_values=cache, freeze_memory=True)
    parts = [model(piece, freeze_memory=True).logits[:, -1] for piece in (ids[:, :5], ids)]
    assert error(model(ids[:, :5]).logits[:, -1], parts[0]) < 1e-12  # nothing written yet
    assert error(model(ids).logits[:, -1], parts[1]) > 1e-4
    assert not any(memory.values.slots_U.numel() or memory.waiting for memory in cache.memories())
    frozen = greedy(model, ids, freeze_memory=True)
    by_hand = ids
    for _ in range(NEW_TOKENS):
        by_hand = torch.cat([by_hand, model(by_hand, freeze_memory=True).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(frozen, by_hand)
    assert torch.equal(greedy(setting.load(freeze_memory=True), ids, carry_memory=True), by_hand)
    assert same(before, stored(model))


@check
@torch.no_grad()
def carried_memory(setting: Setting) -> None:
    ids = setting.ids[:1]
    for options in ({}, {"use_cache": False}, {"past_key_values": "own"}):
        model, other = setting.load(), setting.load()
        before = stored(model)
        if "past_key_values" in options:
            options = {"past_key_values": model.make_cache(1)}
        text = greedy(model, ids, carry_memory=True, **options)
        assert not same(before, stored(model))
        other(text, carry_memory=True)
        for name, tensor in stored(other).items():
            assert error(stored(model)[name], tensor) < 1e-9, name
        assert error(model(ids).logits, other(ids).logits) < 1e-8
        assert error(model(ids).logits, setting.logits[:1]) > 1e-5
    model = setting.load(carry_memory=True)
    assert_refused("carry_memory", lambda: greedy(model, setting.ids))
    assert_refused("carry_memory", lambda: greedy(model, ids, num_beams=2))
    assert_refused("carry_memory", lambda: model(setting.ids))
    assert same(before, stored(model))
    shared = setting.load(memory_mode="shared")
    greedy(shared, setting.ids, carry_memory=True)
    assert not same(before, stored(shared))


@check
def what_would_take_tokens_back(setting: Setting) -> None:
    model, ids = setting.load(), setting.ids[:1]
    assert_refused("assisted", lambda: greedy(model, ids, prompt_lookup_num_tokens=2))
    assert_refused("assisted", lambda: greedy(model, ids, assistant_model=model))
    assert_refused("contrastive", lambda: greedy(model, ids, penalty_alpha=0.6, top_k=4))
    assert_refused("cache_implementation", lambda: greedy(model, ids, cache_implementation="static"))
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(ids.shape[1])
    assert_refused("cropped", lambda: cache.crop(-1))
    assert_refused("share", lambda: greedy(setting.load(memory_mode="shared"), ids, num_beams=2))
    assert_refused("memory_mode", lambda: setting.load(memory_mode="sharde"))
    model.config.memory_mode = "shared"
    assert_refused("make another cache", lambda: model(ids, past_key_values=cache))
    assert_refused("nothing to read", lambda: model(ids[:, :0]))


@check
@torch.no_grad()
def half_precision(setting: Setting) -> None:
    model = setting.load(dtype=torch.bfloat16)
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == stored(model).keys() and len(wide) >= 2, wide
    found = model(setting.ids).logits
    assert found.dtype == torch.bfloat16 and error(found, setting.logits) < 0.2
    assert greedy(model, setting.ids).shape[1] == setting.ids.shape[1] + NEW_TOKENS


@check
def training(setting: Setting) -> None:
    model = setting.load(dtype=torch.float32).train()
    optimizer = torch.optim.SGD([tensor for tensor in model.parameters() if tensor.requires_grad], 0.05)
    losses = []
    for _ in range(5):
        output = model(setting.ids, labels=setting.ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    try:
        model.gradient_checkpointing_enable()
    except ValueError as refusal:
        assert "checkpointing" in str(refusal)
    else:
        raise AssertionError("a memory can't be written twice, but gradient checkpointing was taken")


@check
def saved_again(setting: Setting) -> None:
    from safetensors.torch import load_file

    for dtype in (torch.float32, torch.bfloat16):
        again = setting.scratch / f"again-{dtype}".replace(".", "-")
        model = setting.load(dtype=dtype)
        model.save_pretrained(again)
        for name in ("configuration_fwpkm.py", "modeling_fwpkm.py"):
            assert (again / name).read_bytes() == (setting.folder / name).read_bytes(), name
        loaded = setting.load(again, dtype=dtype)
        assert same(model.state_dict(), loaded.state_dict())
        names = load_file(again / "model.safetensors").keys()
        assert names == load_file(setting.folder / "model.safetensors").keys()
        found, wanted = loaded.config.to_dict(), model.config.to_dict()
        assert set(found["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}, found["auto_map"]
        differing = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
        assert differing <= {"_name_or_path", "transformers_version", "auto_map"}, differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--hide", default="", help="packages, with commas between them")
    parser.add_argument("--scratch", type=Path, default=None)
    arguments = parser.parse_args()
    scratch = arguments.scratch or Path(tempfile.mkdtemp())
    os.environ |= {"HF_HOME": str(scratch / "home"), "HF_MODULES_CACHE": str(scratch / "modules")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    hidden = set(filter(None, arguments.hide.split(",")))
    if hidden:
        hide(hidden)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    setting, failed = Setting(arguments.export, arguments.expected, scratch), 0
    for function in CHECKS:
        try:
            function(setting)
            print(f"passed  {function.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}")
    loaded = sorted(hidden & {name.split(".")[0] for name in sys.modules})
    assert not loaded, f"imported in spite of being hidden: {loaded}"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
