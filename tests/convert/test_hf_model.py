"""The model files of an export, as they are loaded from a folder: against our decoder, and against themselves."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.convert.official_names import official_gradients, official_weights
from tests.convert.hf_export import MODEL_FILES, SMALL, export, small_decoder
from tests.exports import error_of_case

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests" / "golden_model").glob("*.json"))
HIDDEN = (
    *("megatron_fwpkm", "fwpkm_kernels", "deepspeed", "megatron", "streaming", "datasets", "pyarrow", "zstandard"),
    *("torchvision", "triton", "fla", "einops", "causal_conv1d", "scipy", "pandas", "matplotlib", "pydantic"),
    *("omegaconf", "tensorboard", "lm_eval", "accelerate", "sklearn", "evaluate", "nltk"),
)
"""What an outsider does not need."""
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "products, clipped, decaying, keys too": {
        "fwpkm_qk_score_type": "dot_product",
        "fwpkm_score_nonlinear": "silu",
        "fwpkm_heads": 2,
        "fwpkm_grad_clip": True,
        "fwpkm_optimizer_lr": 0.7,
        "fwpkm_optimizer_weight_decay": 0.1,
        "fwpkm_mem_grad_to_values_only": False,
        "fwpkm_target_value_lookahead": 2,
        "fwpkm_score_temperature": 1.5,
        "tie_word_embeddings": False,
    },
    "relu, ungated, unfused, no addressing loss": {
        "fwpkm_score_nonlinear": "relu",
        "fwpkm_heads": 3,
        "fwpkm_addr_loss": None,
        "fwpkm_weight_loss_with_gates": False,
        "fwpkm_out_fuse_gate": False,
        "fwpkm_compress_value": None,
        "fwpkm_optimizer_lr": 0.02,
        "fwpkm_target_value_lookahead": 0,
    },
    "softmax moves keys too": {"fwpkm_mem_grad_to_values_only": False, "fwpkm_addr_loss_weight": 0.5},
    "gradients of keys as in the paper's code": {
        "model_type": "fwpkm",
        "fwpkm_mem_grad_to_values_only": False,
        "fwpkm_key_gradient": "official",
    },
    "whole sequence": {"fwpkm_update_chunk_size": "sequence"},
}


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new folder for transformers, which copies the files of a model before it imports them."""
    mend_torchvision()
    import transformers.dynamic_module_utils as dynamic

    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def load(folder: Path, **options: Any) -> Any:
    """The exported model, in float64 unless asked for otherwise."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float64, **options}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def random_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    """None of them 0, which generate() may take for padding."""
    return torch.randint(1, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the whole tensors."""
    return float(((found - wanted).norm() / wanted.norm()).detach())


# -- alone ------------------------------------------------------------------------------------------------------------


def test_files_need_nothing_else() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "configuration_fwpkm"}
    for name in ("configuration_fwpkm.py", "modeling_fwpkm.py"):
        for node in ast.walk(ast.parse((MODEL_FILES / name).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed


def test_an_outsider_loads_it(tmp_path: Path) -> None:
    """All checks of hf_clean.py, in a process that sees nothing of ours."""
    decoder, ids = small_decoder(SMALL).eval(), random_ids(2, 23, seed=3)
    folder = export(tmp_path / "small-model", SMALL, official_weights(decoder))
    wanted = decoder.logits(ids, cache=decoder.make_cache(2))
    save_file({"input_ids": ids, "logits": wanted}, tmp_path / "expected.safetensors")
    command = [sys.executable, str(Path(__file__).with_name("hf_clean.py")), str(folder)]
    command += [str(tmp_path / "expected.safetensors"), "--hide", ",".join(HIDDEN), "--scratch", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        command, cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("passed") == 12


# -- against the paper's code and our decoder -------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_reference_cases(path: Path, tmp_path: Path) -> None:
    config = json.loads(path.read_text())["config"]
    folder = export(tmp_path / "case", config, load_file(path.with_suffix(".safetensors")))
    assert error_of_case(load(folder, memory_mode="shared", cache_mode="official"), path) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory", ["shared", "per_sequence"])
def test_gradients_are_those_of_our_decoder(memory: str, variant: str, tmp_path: Path) -> None:
    config, ids = SMALL | VARIANTS[variant], random_ids(3, 22)
    decoder = small_decoder(config, reset="carry" if memory == "shared" else "per_sequence").train()
    model = load(export(tmp_path / "model", config, official_weights(decoder)), memory_mode=memory).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted, found = decoder.logits(ids), model(ids).logits
    assert error(found, wanted) < 1e-10
    for logits in (wanted, found):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    expected = official_gradients(decoder)
    unused = {name for name, tensor in expected.items() if not tensor.any()}  # gates that weigh nothing
    assert gradients.keys() | unused == expected.keys()
    largest = max(float(tensor.norm()) for tensor in expected.values())
    for name, gradient in gradients.items():
        # A bias before a norm over its columns has no gradient but for rounding.
        assert float((gradient - expected[name]).norm()) <= 1e-9 * float(expected[name].norm()) + 1e-14 * largest, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("memory", "mode", "variant"),
    [
        *[(memory, mode, "usual") for memory in ("shared", "per_sequence") for mode in ("aligned", "official")],
        *[("shared", mode, variant) for mode in ("aligned", "official") for variant in list(VARIANTS)[1:]],
    ],
)
@torch.no_grad()
def test_caches_are_those_of_our_decoder(memory: Any, mode: Any, variant: str, tmp_path: Path) -> None:
    config, ids = SMALL | VARIANTS[variant], random_ids(2, 24)
    decoder = small_decoder(config).eval()
    folder = export(tmp_path / "model", config, official_weights(decoder))
    model = load(folder, memory_mode=memory, cache_mode=mode)
    mask = torch.ones_like(ids)
    if memory == "shared":  # with memories of their own our decoder counts padding, and these files do not
        mask[1, :4] = 0
    cache, ours, start = model.make_cache(2), decoder.make_cache(2, mode=mode, memory=memory), 0
    for size in (13, 1, 1, 2, 7):
        piece, start = slice(start, start + size), start + size
        given = None if memory == "per_sequence" else mask[:, piece] > 0
        wanted = decoder.logits(ids[:, piece], mask_BT=given, cache=ours)
        found = model(ids[:, piece], attention_mask=mask[:, :start], past_key_values=cache).logits
        real = mask[:, piece] > 0
        assert error(found[real], wanted[real]) < 1e-10, piece
    cache.finish()
    ours.finish()
    memories = [layer.memories for layer in cache.layers if layer.memories]
    for own, other in zip(memories, ours.memories(), strict=True):
        for index, one in enumerate(own):
            assert error(one.keys_H2nd, other.view.keys_MH2nd[index]) < 1e-10
        if memory == "shared":
            every = torch.arange(config["fwpkm_n_subkeys"] ** 2)
            assert error(own[0].values.read(every), other.view.values_ND()) < 1e-10


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@torch.no_grad()
def test_longer_contexts(key: str, tmp_path: Path) -> None:
    """YaRN, under the name of the paper's code and as transformers 5 would write it."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    decoder, ids = small_decoder(SMALL | {"rope_scaling": yarn}).eval(), random_ids(1, 30)
    written = yarn if key == "rope_scaling" else yarn | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    folder = export(tmp_path / "model", SMALL | {key: written}, official_weights(decoder))
    model, wanted = load(folder), decoder.logits(ids)
    assert error(model(ids).logits, wanted) < 1e-10
    assert error(small_decoder(SMALL).logits(ids), wanted) > 1e-4
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_scaling"] == yarn and "rope_parameters" not in saved
    assert error(load(tmp_path / "again")(ids).logits, wanted) < 1e-10


# -- against themselves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_any_cut_scores_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = load(export(tmp_path / "model", SMALL), dtype=dtype), random_ids(2, 41)
    wanted, tolerance = model(ids).logits, 1e-10 if dtype == torch.float64 else 1e-5
    for seed in range(4):
        generator, left, cache, parts = torch.Generator().manual_seed(seed), ids, None, []
        while left.shape[1]:
            size = 1 if seed == 0 else int(torch.randint(1, 13, (), generator=generator))
            output = model(left[:, :size], past_key_values=cache, use_cache=True)
            cache, left = output.past_key_values, left[:, size:]
            parts.append(output.logits)
        assert error(torch.cat(parts, 1), wanted) < tolerance


@pytest.mark.parametrize("length", [9, 64, 150])
def test_delta_rule_by_chunk_is_that_by_token(length: int, tmp_path: Path) -> None:
    module = sys.modules[type(load(export(tmp_path / "model", SMALL))).__module__]
    q, k, v = (torch.randn(2, 3, length, width, dtype=torch.float64) for width in (8, 8, 6))
    k = torch.nn.functional.normalize(k, dim=-1)
    decay = -torch.rand(2, 3, length, dtype=torch.float64).square() * 20
    beta, state = torch.rand_like(decay), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    for x in (k, v, q, decay):
        x[1, :, :5] = 0  # padding
    inputs = [x.requires_grad_() for x in (q, k, v, decay, beta, state)]
    results = []
    for rule in (module.delta_rule_by_token, module.delta_rule_by_chunk):
        output, after = rule(*inputs)
        gradients = torch.autograd.grad(output.square().sum() + after.sin().sum(), inputs)
        results.append((output, after, *gradients))
    for wanted, found in zip(*results, strict=True):
        assert error(found, wanted) < 1e-10


def test_loss_of_labels(tmp_path: Path) -> None:
    model, ids = load(export(tmp_path / "model", SMALL)), random_ids(2, 12)
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels)
    logits = output.logits[:, :-1][labels[:, 1:] != -100]
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != -100])
    assert math.isclose(float(output.loss.detach()), float(wanted.detach()), rel_tol=1e-6)
    as_tuple = model(ids, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == SMALL["num_hidden_layers"] + 1
    assert torch.equal(model.lm_head(states[-1]), output.logits)


def test_a_carried_call_stores_what_it_wrote_and_keeps_its_gradients(tmp_path: Path) -> None:
    model, ids = load(export(tmp_path / "model", SMALL)), random_ids(1, 13)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".fwpkm." in name}
    model(ids).logits.sum().backward()
    wanted = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    model(ids, carry_memory=True).logits.sum().backward()
    for name, tensor in model.named_parameters():
        assert tensor.grad is None or torch.equal(tensor.grad, wanted[name])
    assert all(not torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    cache = load(tmp_path / "model").make_cache(1)
    other = load(tmp_path / "model")
    other(ids, past_key_values=cache)
    cache.finish()
    other.model.store([layer.memories for layer in cache.layers])
    for name in before:
        assert error(other.state_dict()[name], model.state_dict()[name]) < 1e-12


@pytest.mark.parametrize("variant", list(VARIANTS)[:2])
@torch.no_grad()
def test_caches_in_use_stay_as_they_are_when_a_memory_is_stored(variant: str, tmp_path: Path) -> None:
    """Several turns with a cache, its memory stored after each, are those without storing; so are others' caches."""
    folder, ids = export(tmp_path / "model", SMALL | VARIANTS[variant]), random_ids(1, 40)
    logits, memories = {}, {}
    for carried in (False, True):
        model = load(folder)
        other = model(random_ids(2, 7, seed=8), use_cache=True).past_key_values
        cache, text, options = None, ids[:, :0], {"max_new_tokens": 4, "return_dict_in_generate": True}
        for turn in (12, 25, 40):
            prompt = torch.cat([text, ids[:, text.shape[1] : turn]], 1)
            told = model.generate(prompt, past_key_values=cache, carry_memory=carried, do_sample=False, **options)
            cache, text = told.past_key_values, told.sequences
        logits[carried] = [
            model(ids[:, :6], past_key_values=cache).logits,
            model(random_ids(2, 9, seed=9), past_key_values=other).logits,
        ]
        memories[carried] = model.model.layers[0].fwpkm.values.clone()
    for found, wanted in zip(logits[True], logits[False], strict=True):
        assert error(found, wanted) < 1e-12
    assert not torch.equal(memories[True], memories[False])
    again = load(folder)
    again(text, carry_memory=True)  # all turns in one call
    assert error(again.model.layers[0].fwpkm.values, memories[True]) < 1e-9


def test_hidden_states_of_generation(tmp_path: Path) -> None:
    model, ids = load(export(tmp_path / "model", SMALL)), random_ids(2, 12)
    told = model.generate(ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert [states[-1].shape[1] for states in told.hidden_states] == [12, 1, 1]
    with pytest.raises(TypeError, match="takes no output_attentions"):
        model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)


def test_models_without_memory(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", SMALL | {"fwpkm_layers": [], "pkm_layers": []})
    model, ids = load(folder, dtype=torch.bfloat16, memory_mode="shared"), random_ids(2, 12)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert model.generate(ids, max_new_tokens=3, num_beams=2, carry_memory=True).shape == (2, 15)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_mode": "own"}, "memory_mode is 'own'"),
        ({"cache_mode": 3}, "cache_mode is 3"),
        ({"fwpkm_qk_score_type": "cosine"}, "fwpkm_qk_score_type is 'cosine'; allowed: 'idw', 'dot_product'"),
        ({"fwpkm_addr_loss": "kl"}, "fwpkm_addr_loss is 'kl'"),
        ({"fwpkm_compress_value": True}, "fwpkm_compress_value is True"),
        ({"fwpkm_optimizer_type": "adam"}, "fwpkm_optimizer_type is 'adam'; allowed: 'sgd'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"fwpkm_topkk": 3}, "fwpkm_topkk is no setting"),
        ({"fwpkm_target_lookahead": 2}, "fwpkm_target_lookahead"),
        ({"fwpkm_topk": 17}, r"fwpkm_topk \(17\)"),
        ({"fwpkm_update_chunk_size": 1}, "fwpkm_update_chunk_size is 1"),
        ({"fwpkm_update_chunk_size": "document"}, "fwpkm_update_chunk_size is 'document'"),
        ({"fwpkm_k_dim": 15}, "fwpkm_k_dim is 15"),
        ({"fwpkm_heads": 0}, "fwpkm_heads is 0"),
        ({"fwpkm_layers": [4]}, r"fwpkm_layers is \[4\]"),
        ({"freeze_memory": "yes"}, "freeze_memory is 'yes'"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"fwpkm_score_temperature": 0.0}, "fwpkm_score_temperature is 0.0"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = export(tmp_path / "model", SMALL, {"nothing": torch.zeros(1)})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_calls_that_are_refused(tmp_path: Path) -> None:
    from transformers import DynamicCache

    model, ids = load(export(tmp_path / "model", SMALL)), random_ids(2, 12)
    cache = model(ids, use_cache=True).past_key_values
    for words, options in (
        (r"attention_mask has shape \(2, 4\); expected \(2, 12\)", {"attention_mask": torch.ones(2, 4)}),
        ("attention_mask has shape", {"attention_mask": torch.ones(2, 1, 12, 12)}),
        ("past_key_values has 2 streams, this call has 1", {"input_ids": ids[:1], "past_key_values": cache}),
        ("past_key_values is a DynamicCache", {"past_key_values": DynamicCache()}),
        ("input_ids or inputs_embeds", {"inputs_embeds": torch.zeros(2, 3, 32)}),
    ):
        with pytest.raises(ValueError, match=words):
            model(**({"input_ids": ids} | options))
    later = torch.ones(2, 24)
    later[0, 0] = 0
    with pytest.raises(ValueError, match="which of the tokens seen are padding"):
        model(ids, attention_mask=later, past_key_values=cache)
    between = torch.ones(2, 12)
    between[1, 4] = 0
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(ids, attention_mask=between)
    with pytest.raises(TypeError, match="takes no output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="none are left to be read"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(ids, position_ids=torch.zeros_like(ids), max_new_tokens=2)
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="on several devices, or offloaded"):
        model(ids)


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> Any:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "<eos>", *"\n ,;abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


@torch.no_grad()
def test_evaluation_harness(tmp_path: Path) -> None:
    """Its scores and texts are those of the model on its own, in batches of texts of any lengths."""
    folder = export(tmp_path / "model", SMALL)
    tokenizer, model = write_tokenizer(folder), load(folder)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    script = Path(__file__).with_name("hf_lm_eval.py")
    command = [sys.executable, str(script), str(folder), str(tmp_path / "results.json")]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    right = []
    for sample in results["samples"]["small_choices"]:
        document, scores = sample["document"], []
        for choice, response in zip(document["choices"], sample["responses"], strict=True):
            prompt, answer = tokenizer.encode(document["question"]), tokenizer.encode(" " + choice)
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
            assert math.isclose(float(response[0][0]), scores[-1], abs_tol=2e-3)
        right.append(scores.index(max(scores)) == document["answer"])
    assert math.isclose(results["metrics"]["small_choices"]["acc,none"], sum(right) / len(right))
    for sample in results["samples"]["small_texts"]:
        prompt = torch.tensor([tokenizer.encode(sample["document"]["question"])])
        text = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=1)
        wanted = tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True)
        assert sample["responses"][0][0] == wanted.split("\n")[0]
