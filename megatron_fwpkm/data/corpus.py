"""The corpus that a data section asks for: a finished one by its folder, or prepared from its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fwpkm.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, read_manifest
from megatron_fwpkm.data.prepare import plan_preparation, prepare_missing
from megatron_fwpkm.data.tokenizer import CorpusTokenizer, load_tokenizer
from megatron_fwpkm.errors import UserError

if TYPE_CHECKING:
    from megatron_fwpkm.data.settings import DataConfig


def prepare_corpus(
    settings: DataConfig,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
    processes: int | None = None,
) -> tuple[Path, Manifest]:
    """Return the folder and manifest of the corpus, preparing it first unless it is there already.

    `seed` decides the document split; `report` is called with one line of text per stage; `processes` prepare at once
    (default: data.processes, or one a core). Several processes may call this at once: one prepares, the others wait
    and reuse. Raises UserError on a damaged folder or an unusable source, and prepare.PreparationStopped on SIGTERM and
    SIGINT; started again, it goes on.
    """
    if settings.corpus is not None:
        folder = Path(settings.corpus)
        manifest = _read_given(folder, settings)
    else:
        preparation = plan_preparation(settings, seed)
        folder = prepare_missing(preparation, processes or settings.processes, report)
        manifest = read_manifest(folder)
    sizes = ", ".join(f"{name} {counts.tokens:,}" for name, counts in manifest.splits.items())
    report(f"data: reading {folder} (tokens: {sizes})")
    return folder, manifest


def find_corpus(settings: DataConfig, hashes: Mapping[str, str]) -> tuple[Path, Manifest]:
    """The prepared corpus with these hashes ("corpus" and "tokenizer"): data.corpus, or any folder of data.directory.

    Another text would give other figures, or have been trained on. Raises UserError if it is not there or damaged.
    """
    wanted = (hashes.get("corpus"), hashes.get("tokenizer"))
    place = settings.corpus or settings.directory
    folders = (
        [Path(place)] if settings.corpus else sorted(path.parent for path in Path(place).glob(f"*/{MANIFEST_FILE}"))
    )
    for folder in folders:
        try:
            content = json.loads((folder / MANIFEST_FILE).read_text())
            found = (content["corpus_sha256"], content["tokenizer_sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found == wanted:
            return folder, read_manifest(folder)
    raise UserError(
        f"the corpus that was trained on (sha256 {str(wanted[0])[:12]}) is not in {place}: give its folder as "
        "data.corpus. Another one, of another version of the source say, may hold out what was trained on"
    )


def corpus_tokenizer(corpus: Path) -> CorpusTokenizer:
    """The tokenizer of a prepared corpus. Raises UserError if it is not the one that the manifest names."""
    manifest = read_manifest(corpus)
    tokenizer = load_tokenizer(str(corpus / TOKENIZER_FILE), manifest.end_of_document)
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise UserError(
            f"{corpus / TOKENIZER_FILE} (sha256 {tokenizer.sha256()[:12]}) is not the tokenizer that the corpus was "
            f"prepared with ({manifest.tokenizer_sha256[:12]}); replace it by an intact copy"
        )
    return tokenizer


def _read_given(folder: Path, settings: DataConfig) -> Manifest:
    """The manifest of a corpus given by its folder, compared with a tokenizer and vocabulary that are given too."""
    if not (folder / MANIFEST_FILE).is_file():
        what = f"has no {MANIFEST_FILE}" if folder.is_dir() else "is not there"
        raise UserError(
            f"data.corpus: {folder} {what}; give the folder of a finished preparation (data_prep/tokenize.py names it)"
        )
    manifest = read_manifest(folder)
    if settings.vocab_size not in (None, manifest.vocab_size):
        raise UserError(
            f"data.vocab_size is {settings.vocab_size} but corpus {folder} has a vocabulary of {manifest.vocab_size}; "
            f"set data.vocab_size={manifest.vocab_size} or null, or give another data.corpus"
        )
    if settings.tokenizer is not None:
        given = load_tokenizer(settings.tokenizer, settings.end_of_document)
        if given.sha256() != manifest.tokenizer_sha256:
            raise UserError(
                f"data.tokenizer {settings.tokenizer} (sha256 {given.sha256()[:12]}, {given.vocab_size} tokens, end "
                f"{given.end_of_document!r}) is not the one of corpus {folder} (sha256 "
                f"{manifest.tokenizer_sha256[:12]}, {manifest.vocab_size} tokens, end {manifest.end_of_document!r}); "
                f"leave data.tokenizer out, or prepare the source with it"
            )
    return manifest
