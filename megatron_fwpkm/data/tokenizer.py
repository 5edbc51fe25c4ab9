"""Tokenizers of corpora: a byte-level BPE trained on the documents, or any fast Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|end|>"
"""End of a document in trained tokenizers; id 0."""
DEFAULT_VOCABULARY = 4096
"""Tokens of a trained tokenizer where data.vocab_size is null."""


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer and the token that it ends documents with."""

    tokenizer: Tokenizer
    end_of_document: str

    @property
    def vocab_size(self) -> int:
        """Smallest number that is larger than every token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_id(self) -> int:
        """Id of the token that ends a document."""
        return int(self.tokenizer.token_to_id(self.end_of_document))

    def sha256(self) -> str:
        """Hash of the tokenizer and its end token."""
        return hashlib.sha256(f"{self.tokenizer.to_str()}\0{self.end_of_document}".encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> CorpusTokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens on the texts; END_OF_DOCUMENT has id 0.

    Every digit is a token of its own, so that numbers are read and answered digit by digit. Deterministic for the same
    texts in the same order. Raises UserError if the texts are none, or too few for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError(
            "the source has no text to train a tokenizer on; give a data.path and data.files (or a data.text_field) "
            "with text, or raise data.max_documents if all documents are held out"
        )
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the corpus yields only {tokenizer.get_vocab_size()} tokens; set data.vocab_size to that or less"
        )
    return CorpusTokenizer(tokenizer, END_OF_DOCUMENT)


def load_tokenizer(path: str, end_of_document: str | None = None) -> CorpusTokenizer:
    """Load a tokenizer.json, or the fast tokenizer of a Hugging Face folder.

    Documents end with `end_of_document`, or with the end-of-sequence token that the folder's settings name. Raises
    UserError if the tokenizer can't be read or has no such token.
    """
    where = Path(path)
    if where.is_file():
        tokenizer, end = _read_tokenizer_file(where), _stated_end(where.parent)
    elif where.is_dir():
        tokenizer, end = _load_folder(where)
    else:
        raise UserError(f"data.tokenizer: there is no {path}; give a tokenizer.json or a folder with one")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = end_of_document or end
    if end is None:
        raise UserError(f"tokenizer {path} names no end-of-sequence token; give data.end_of_document")
    if tokenizer.token_to_id(end) is None:
        raise UserError(f"tokenizer {path} has no token {end!r}; give one of its tokens as data.end_of_document")
    return CorpusTokenizer(tokenizer, end)


def _read_tokenizer_file(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"cannot read tokenizer {path}: {error}") from error


def _stated_end(folder: Path) -> str | None:
    """The end-of-sequence token in the settings that Hugging Face keeps beside a tokenizer.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            stated = json.loads((folder / name).read_text()).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        if stated:
            return str(stated["content"] if isinstance(stated, dict) else stated)
    return None


def _load_folder(folder: Path) -> tuple[Tokenizer, str | None]:
    mend_torchvision()
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
    except Exception as error:  # missing files, unknown classes, missing libraries: types differ
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot load tokenizer {folder}: {reason[0] if reason else type(error).__name__}; it needs a "
            f"tokenizer.json, or the files of a Hugging Face tokenizer"
        ) from error
    if not loaded.is_fast:
        raise UserError(f"tokenizer {folder} has no fast version; convert it to a tokenizer.json")
    return loaded.backend_tokenizer, loaded.eos_token
