"""Trained and given tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_fwpkm.data.tokenizer import END_OF_DOCUMENT, CorpusTokenizer, load_tokenizer, train_tokenizer
from megatron_fwpkm.errors import UserError

TEXT = "def f(x):\n\treturn 'ünïcode \N{SNOWMAN} \x00', 1234567890, x1  # 漢字\n"


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> CorpusTokenizer:
    return train_tokenizer(texts, 400)


def test_trained_tokenizer_keeps_every_byte(trained: CorpusTokenizer) -> None:
    assert trained.vocab_size == 400 and trained.end_id == 0
    assert trained.tokenizer.decode(trained.tokenizer.encode(TEXT).ids) == TEXT


def test_every_digit_is_a_token(trained: CorpusTokenizer) -> None:
    digits = [token for token in trained.tokenizer.get_vocab() if any(letter.isdigit() for letter in token)]
    assert sorted(token for token in digits if token.isascii()) == list("0123456789")
    tokens = trained.tokenizer.encode("The secret number is 907312.").tokens
    assert [token for token in tokens if token.isdigit()] == list("907312")


def test_training_is_deterministic(trained: CorpusTokenizer, texts: list[str]) -> None:
    assert train_tokenizer(texts, 400).sha256() == trained.sha256()
    assert train_tokenizer(texts, 401).sha256() != trained.sha256()


def test_too_large_vocabulary_is_an_error(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"yields only \d+ tokens; set data.vocab_size"):
        train_tokenizer(texts[:2], 60000)


def test_given_tokenizers(trained: CorpusTokenizer, tmp_path: Path) -> None:
    trained.tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = str(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"names no end-of-sequence token; give data.end_of_document"):
        load_tokenizer(file)
    with pytest.raises(UserError, match="has no token '<none>'"):
        load_tokenizer(file, "<none>")
    assert load_tokenizer(file, END_OF_DOCUMENT).sha256() == trained.sha256()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END_OF_DOCUMENT}}))
    assert load_tokenizer(file).sha256() == trained.sha256()


def test_hugging_face_folder(trained: CorpusTokenizer, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=trained.tokenizer, eos_token=END_OF_DOCUMENT).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.end_of_document == END_OF_DOCUMENT and loaded.vocab_size == 400
    assert loaded.tokenizer.encode(TEXT).ids == trained.tokenizer.encode(TEXT).ids
    PreTrainedTokenizerFast(tokenizer_object=trained.tokenizer).save_pretrained(tmp_path / "no-end")
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "no-end"))


def test_unreadable_tokenizers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
