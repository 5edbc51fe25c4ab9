"""What `launch/convert.py` does, with what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.convert.begin_run import TOKENIZER_FILE, begin_run, training_config
from megatron_fwpkm.convert.folder import check_new_folder
from megatron_fwpkm.convert.huggingface import (
    TRAINING_FILE,
    export_model,
    export_official,
    read_config,
    read_exported,
)
from megatron_fwpkm.convert.source import WholeModel, count_run_memories, model_of_files, model_of_run
from megatron_fwpkm.data.corpus import corpus_tokenizer, find_corpus
from megatron_fwpkm.data.tokenizer import CorpusTokenizer, load_tokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.terminal import ProgressBar, new_console, print_line


def run_to_hf(
    place: Path,
    out: Path,
    checkpoint: str | None,
    memory: int,
    dtype: str,
    max_shard_size: str,
    tokenizer: str | None,
    *,
    with_tokenizer: bool,
) -> None:
    """Export the model of a run for transformers. Raises UserError."""
    out = out.absolute()
    check_new_folder(out)
    if tokenizer is not None and not with_tokenizer:
        raise UserError("--tokenizer and --no-tokenizer contradict each other; give one")
    model = _read_run(place, checkpoint, memory)
    found = _tokenizer_of(model, tokenizer) if with_tokenizer else None
    _export(model, out, found, dtype, max_shard_size)


def hf_to_run(folder: Path, out: Path, train_config: Path | None, overrides: Sequence[str]) -> None:
    """Begin a run with an exported model. Raises UserError."""
    out = out.absolute()
    check_new_folder(out)
    shipped = folder / TRAINING_FILE
    settings = train_config or (shipped if shipped.is_file() else None)
    model = read_exported(folder)
    tokenizer = load_tokenizer(str(folder / TOKENIZER_FILE)) if (folder / TOKENIZER_FILE).is_file() else None
    if tokenizer is not None:
        _check_size(model, tokenizer)
    config = training_config(settings, model, out, overrides, tokenizer)
    _begin(model, config, out, f"the Hugging Face folder {folder.resolve().name}", tokenizer)


def run_to_official(place: Path, out: Path, checkpoint: str | None, memory: int, max_shard_size: str) -> None:
    """Write the model of a run as the paper's code reads it. Raises UserError."""
    out = out.absolute()
    check_new_folder(out)
    model = _read_run(place, checkpoint, memory)
    with _writing(model) as advance:
        export_official(model, out, max_shard_size, advance)
    print_line(f"wrote {out}")


def official_to_run(
    weights: Path,
    config: Path,
    out: Path | None,
    hf: Path | None,
    train_config: Path | None,
    overrides: Sequence[str],
    dtype: str,
    max_shard_size: str,
    tokenizer: str | None,
) -> None:
    """Bring weights of the paper's code here, to Hugging Face, or both. Raises UserError."""
    out, hf = (None if target is None else target.absolute() for target in (out, hf))
    for target in (out, hf):
        if target is not None:
            check_new_folder(target)
    if out is not None and out == hf:
        raise UserError(f"--out and --hf are both {out}; give two folders")
    if out is None and (train_config is not None or overrides):
        raise UserError("settings of a training are for the run that --out names; give --out too")
    if hf is None and tokenizer is not None:
        raise UserError("--tokenizer is for the folder that --hf names; give --hf too")
    found = None if tokenizer is None else load_tokenizer(tokenizer)
    model = model_of_files(weights, read_config(config))
    counts = model.decoder.num_parameters()
    print_line(f"{weights}: all names and shapes fit; {counts.slow:,} slow and {counts.fast:,} fast weights")
    settings = None if out is None else training_config(train_config, model, out, overrides)
    if hf is not None:
        _export(model, hf, found, dtype, max_shard_size)
    if out is not None and settings is not None:
        _begin(model, settings, out, f"weights of the paper's code, {weights.resolve().name}")


def _read_run(place: Path, checkpoint: str | None, memory: int) -> WholeModel:
    model = model_of_run(place, checkpoint, memory)
    assert model.run is not None
    print_line(f"read {model.run.checkpoint} (step {model.run.step:,}, {model.run.tokens:,} tokens)")
    memories = count_run_memories(model.run)
    if memories > 1:
        print_line(
            f"each layer has {memories} memories, written by replicas on their own: took memory {memory} (--memory)"
        )
    return model


def _tokenizer_of(model: WholeModel, given: str | None) -> CorpusTokenizer | None:
    assert model.run is not None
    if given is not None:
        tokenizer = load_tokenizer(given)
        wanted = model.run.corpus.get("tokenizer")
        if wanted not in (None, tokenizer.sha256()):
            raise UserError(
                f"{given} (sha256 {tokenizer.sha256()[:12]}) is not the tokenizer that the run was trained with "
                f"({wanted[:12]}); give that one"
            )
    elif "tokenizer" in model.run.corpus and "corpus" not in model.run.corpus:  # nothing has been read yet
        tokenizer = load_tokenizer(str(model.run.directory / TOKENIZER_FILE), model.run.config.data.end_of_document)
    elif "tokenizer" in model.run.corpus:
        try:
            tokenizer = corpus_tokenizer(find_corpus(model.run.config.data, model.run.corpus)[0])
        except UserError as error:
            raise UserError(
                f"no tokenizer: {error}. Give --tokenizer with its tokenizer.json, or --no-tokenizer"
            ) from error
    else:
        print_line("the run has read no text, so no tokenizer is known: none is written (--tokenizer gives one)")
        return None
    _check_size(model, tokenizer)
    return tokenizer


def _check_size(model: WholeModel, tokenizer: CorpusTokenizer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model's embedding {model.vocab_size:,} rows: "
            "they don't belong together; give the tokenizer of this model"
        )


def _export(model: WholeModel, out: Path, tokenizer: CorpusTokenizer | None, dtype: str, max_shard_size: str) -> None:
    if tokenizer is not None:
        _check_size(model, tokenizer)
    with _writing(model) as advance:
        export_model(model, out, tokenizer, dtype=getattr(torch, dtype), max_shard_size=max_shard_size, advance=advance)
    print_line(f'wrote {out}: AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)')


def _begin(
    model: WholeModel, config: TrainConfig, out: Path, origin: str, tokenizer: CorpusTokenizer | None = None
) -> None:
    checkpoint = begin_run(model, config, out, origin, tokenizer)
    # Replicas that write memories of their own all begin with the one that there is.
    asks = model.config.memory_layers and model.config.memory.reset == "carry" and config.checkpoint.memories is None
    policy = " checkpoint.memories=keep" if asks else ""
    print_line(f"wrote {checkpoint}; go on with: python launch/train.py --config {out / 'config.yaml'}{policy}")


@contextmanager
def _writing(model: WholeModel) -> Iterator[Callable[[int], None]]:
    """Progress over the bytes of weights, where a person looks on."""
    counts, done = model.decoder.num_parameters(), 0
    with ProgressBar(new_console(), "writing", total=counts.slow + counts.fast) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(done // 4)

        yield advance
