"""The README.md of an exported model, written from its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_fwpkm import __version__
from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.convert.begin_run import read_origin
from megatron_fwpkm.data.tokenizer import CorpusTokenizer
from megatron_fwpkm.evaluate.loading import TrainedRun
from megatron_fwpkm.model.settings import DecoderConfig

if TYPE_CHECKING:
    from megatron_fwpkm.convert.source import WholeModel

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- fwpkm
- fast-weights
- product-key-memory
---
"""
_USE = """## Use

```python
from transformers import AutoModelForCausalLM{import_tokenizer}

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
{generate}
```

Needs torch, transformers (4.57 or 5) and safetensors. The memory is written while the model reads and generates:

| | |
| --- | --- |
| `model(input_ids)` | as in training, a memory for each sequence; dropped after the call |
| `generate(...)`, `use_cache=True` | the cache carries attention, delta rule and memory |
| `freeze_memory=True` | reads only, writes nothing |
| `carry_memory=True` | what was written becomes the stored memory (one sequence, or a shared memory) |
| `from_pretrained(..., memory_mode="shared")` | one memory for all sequences of a batch |
| `from_pretrained(..., cache_mode="official")` | writes with a cache as the paper's code does |
"""
_GENERATE = """tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(["A text to go on with"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50))[0])"""
_SCORE = """logits = model(input_ids).logits  # token ids [batch, tokens]"""
_CITE = """## Cite

The layer is that of *Fast-weight Product Key Memory* ([arXiv 2601.00671](https://arxiv.org/abs/2601.00671)):

```bibtex
@misc{fwpkm,
  title = {Fast-weight Product Key Memory},
  year = {2026},
  eprint = {2601.00671},
  archivePrefix = {arXiv},
}
```
"""


def model_card(model: WholeModel, tokenizer: CorpusTokenizer | None, dtype: torch.dtype) -> str:
    """Markdown: what the model is, how to use it, what it was trained on, what was measured, how to cite."""
    name = "Model" if model.run is None else model.run.config.name
    blocks = model.config.memory_layers
    what = (
        f"a decoder with fast-weight product-key memory in {_blocks(blocks)}: sparse, and written while it reads"
        if blocks
        else "a decoder without fast-weight memory"
    )
    sections = [
        _HEAD,
        f"# {name}\n",
        f"A language model: {what}.\n",
        _use(tokenizer),
        _architecture(model, tokenizer, dtype),
        _training(model.run),
        _metrics(model.run),
        _CITE,
    ]
    return "\n".join(section for section in sections if section)


def _use(tokenizer: CorpusTokenizer | None) -> str:
    has = tokenizer is not None
    return _USE.replace("{import_tokenizer}", ", AutoTokenizer" if has else "").replace(
        "{generate}", _GENERATE if has else _SCORE
    )


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"## {heading}\n", "| | |", "| --- | --- |", *lines, ""])


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"block{'' if len(blocks) == 1 else 's'} {', '.join(map(str, sorted(blocks)))}"


def _architecture(model: WholeModel, tokenizer: CorpusTokenizer | None, dtype: torch.dtype) -> str:
    config: DecoderConfig = model.config
    counts = model.decoder.num_parameters()
    mixers = [config.mixer(index) for index in range(config.layers)]
    memory, pkm = config.memory, config.pkm
    rows: dict[str, Any] = {
        "parameters, slow (trained by the optimizer)": f"{counts.slow:,}",
        "parameters, fast (the memory, written by reading)": f"{counts.fast:,}",
        "blocks": ", ".join(f"{mixers.count(kind)} {kind.replace('_', ' ')}" for kind in dict.fromkeys(mixers)),
        "hidden size": f"{config.hidden_size:,}",
        "vocabulary": f"{model.vocab_size:,} rows"
        + (f" for {tokenizer.vocab_size:,} tokens" if tokenizer is not None else ""),
        "tokens of a sequence in training": f"{model.max_positions:,}" if model.max_positions else None,
        "type of the slow weights": f"{str(dtype).removeprefix('torch.')}; the fast ones are float32",
    }
    if config.memory_layers:
        often = "once a sequence" if memory.chunk_size == "sequence" else f"every {memory.chunk_size} tokens"
        rows["memory"] = (
            f"{_blocks(config.memory_layers)}: {memory.num_slots:,} slots of {memory.v_dim:,}, {memory.topk} read per "
            f"head and token, written {often}"
        )
    if config.pkm_layers:
        rows["product-key memory (trained)"] = (
            f"{_blocks(config.pkm_layers)}: {pkm.n_subkeys**2:,} slots of {pkm.v_dim:,}"
        )
    return _table("Model", rows)


def _training(run: TrainedRun | None) -> str:
    if run is None or not run.step:
        return ""
    config: TrainConfig = run.config
    rows = {
        "began with": read_origin(run.directory),
        "data": _data(config),
        "corpus (sha256)": run.corpus.get("corpus"),
        "tokenizer (sha256)": run.corpus.get("tokenizer"),
        "tokens": f"{run.tokens:,}",
        "steps": f"{run.step:,} of {config.training.steps:,}",
        "optimizer": f"AdamW, learning rate {config.optimizer.learning_rate:g} ({config.optimizer.schedule}), "
        f"weight decay {config.optimizer.weight_decay:g}",
        "precision": config.training.precision,
        "checkpoint (sha256 of its manifest)": run.identity,
        "exported by": f"megatron-fwpkm {__version__}",
    }
    return _table("Training", rows) + "\nAll settings are in `config.json` and `training_config.yaml`.\n"


def _data(config: TrainConfig) -> str:
    """What was read, without places that say nothing elsewhere."""
    if config.data.corpus is not None:
        return "a prepared corpus"
    if config.data.source == "huggingface":
        path = config.data.path or ""
        return "a dataset on disk" if path.startswith(("/", ".", "~")) or Path(path).exists() else f"the dataset {path}"
    known = {"stdlib": "source and documentation of Python's standard library", "recall": "drawn pairs and questions"}
    return known.get(config.data.source, f"{config.data.source} of documents")


def _metrics(run: TrainedRun | None) -> str:
    """Of this very checkpoint alone: figures of another step are not this model's."""
    summary = {} if run is None else _read_summary(run)
    evaluation = summary.get("evaluation") or {}
    rows: dict[str, Any] = {}
    if run is not None and summary.get("step") == run.step:
        rows["held-out perplexity"] = _number(summary.get("perplexity"))
        if run.config.model.memory_layers:
            rows["held-out perplexity without memory reads"] = _number(summary.get("perplexity_without_reads"))
        rows["held-out tokens"] = f"{summary['held_out_tokens']:,}" if summary.get("held_out_tokens") else None
        rows["training loss, mean of the last steps"] = _number(summary.get("last_loss"))
    if run is not None and evaluation.get("step") == run.step:
        for label, found in (evaluation.get("perplexity") or {}).items():
            if label != "twin":
                rows[f"perplexity of {evaluation['split']} text, {label} [95 % interval]"] = (
                    f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
                )
    return _table("Measured", rows) if rows else ""


def _read_summary(run: TrainedRun) -> dict[str, Any]:
    try:
        content = json.loads((run.directory / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> str | None:
    return f"{value:.4f}" if isinstance(value, float) else None
