"""Preparation of a corpus: content, reuse, and what a killed preparation leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from megatron_fwpkm.data import prepare
from megatron_fwpkm.data.manifest import read_manifest
from megatron_fwpkm.data.prepare import CorpusRequest, prepare_corpus, smallest_dtype, split_documents
from megatron_fwpkm.data.sources import Document, read_documents
from megatron_fwpkm.data.streaming import import_streaming
from megatron_fwpkm.errors import UserError

REQUEST = CorpusRequest(
    source="stdlib",
    vocab_size=300,
    sequence_length=64,
    validation_fraction=0.2,
    seed=3,
    max_documents=30,
    shard_bytes=1 << 16,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = prepare_corpus(REQUEST, tmp_path_factory.mktemp("data"))
    return folder


def _samples(folder: Path) -> list[numpy.ndarray]:
    dataset = import_streaming().LocalDataset(local=str(folder))
    return [dataset[index]["tokens"] for index in range(len(dataset))]


def _unpacked(corpus: Path, split: str, to: Path) -> Path:
    """A copy that may be unpacked in place."""
    import shutil

    from streaming.base.compression import decompress

    shutil.copytree(corpus / split, to)
    index = json.loads((to / "index.json").read_text())
    for shard in index["shards"]:
        packed = (to / shard["zip_data"]["basename"]).read_bytes()
        assert shard["zip_data"]["hashes"]["sha1"] == hashlib.sha1(packed).hexdigest()
        (to / shard["raw_data"]["basename"]).write_bytes(decompress("zstd", packed))
    return to


def test_samples_are_the_documents_tokens_in_order(corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    train, validation = split_documents(read_documents("stdlib", 30), 0.2, REQUEST.seed)
    for split, documents in (("train", train), ("validation", validation)):
        samples = _samples(_unpacked(corpus, split, tmp_path / split))
        stream = [token for document in documents for token in [*tokenizer.encode(document.text).ids, end]]
        assert all(sample.dtype == numpy.uint16 and sample.shape == (65,) for sample in samples)
        assert len(samples) == (len(stream) - 1) // 64
        for index, sample in enumerate(samples):
            assert sample.tolist() == stream[index * 64 : index * 64 + 65]


def test_tokenizer_keeps_every_byte(corpus: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ünïcode \N{SNOWMAN} \x00'  # 漢字\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_manifest_describes_the_corpus(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    assert manifest.fingerprint == REQUEST.fingerprint() == corpus.name
    assert manifest.vocab_size == 300
    assert manifest.token_dtype == "uint16"
    assert manifest.splits["train"].documents + manifest.splits["validation"].documents == 30
    assert manifest.splits["train"].sequences > manifest.splits["validation"].sequences > 0
    assert set(manifest.versions) == {"tokenizers", "mosaicml-streaming", "torch"}


def test_preparing_twice_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    again, _ = prepare_corpus(REQUEST, tmp_path)
    names = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert (corpus / name).read_bytes() == (again / name).read_bytes(), name


def test_second_start_reuses(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "read_documents", lambda *_: pytest.fail("prepared again"))
    lines: list[str] = []
    folder, _ = prepare_corpus(REQUEST, corpus.parent, lines.append)
    assert folder == corpus
    assert len(lines) == 1 and "reusing" in lines[0]


def test_another_request_has_another_folder() -> None:
    others = [
        replace(REQUEST, vocab_size=301),
        replace(REQUEST, sequence_length=65),
        replace(REQUEST, seed=4),
        replace(REQUEST, max_documents=None),
    ]
    assert len({request.fingerprint() for request in [REQUEST, *others]}) == 5


def test_killed_preparation_is_not_taken_for_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(REQUEST, max_documents=6)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Manifest, "write", die)
        with pytest.raises(Killed):
            prepare_corpus(small, tmp_path)
    assert not (tmp_path / small.fingerprint()).exists()
    folder, _ = prepare_corpus(small, tmp_path)
    read_manifest(folder)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [small.fingerprint()]


@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest", "version"])
def test_damaged_corpus_is_refused(tmp_path: Path, damage: str) -> None:
    small = replace(REQUEST, max_documents=6)
    folder, _ = prepare_corpus(small, tmp_path)
    manifest = folder / "manifest.json"
    shard = next((folder / "train").glob("*.zstd"))
    if damage == "shorten":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="prepare the corpus again"):
        prepare_corpus(small, tmp_path)


def test_too_short_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than one sequence"):
        prepare_corpus(replace(REQUEST, max_documents=3, sequence_length=1 << 20), tmp_path)


def test_unusable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.directory"):
        prepare_corpus(REQUEST, tmp_path / "file" / "data")


def test_too_large_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size"):
        prepare_corpus(replace(REQUEST, max_documents=2, vocab_size=60000), tmp_path)


def test_split_depends_on_each_document_alone() -> None:
    documents = [Document(str(index), str(index), f"{index:064x}") for index in range(400)]
    train, validation = split_documents(documents, 0.1, seed=5)
    assert 20 < len(validation) < 60
    assert not set(train) & set(validation)
    held_out = set(validation)
    _, fewer = split_documents(documents[:200], 0.1, seed=5)
    assert set(fewer) == held_out & set(documents[:200])
    assert set(split_documents(documents, 0.1, seed=6)[1]) != held_out


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_smallest_dtype(vocab_size: int, name: str) -> None:
    assert smallest_dtype(vocab_size) == name


def test_documents_are_ordered_and_distinct() -> None:
    documents = read_documents("stdlib", 50)
    assert [document.name for document in documents] == sorted(document.name for document in documents)
    assert len({document.sha256 for document in documents}) == 50
    assert not any("site-packages" in document.name for document in documents)
    with pytest.raises(UserError, match="unknown"):
        read_documents("web")
