"""What shards hold, and streams read from them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fwpkm.data.blocks import BlockWriter, import_streaming, smallest_dtype
from megatron_fwpkm.data.corpus import corpus_tokenizer, prepare_corpus
from megatron_fwpkm.data.manifest import Manifest, check_shards
from megatron_fwpkm.data.parts import SplitRule
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.sources import open_source
from megatron_fwpkm.data.sources.base import read_documents
from megatron_fwpkm.data.token_stream import TokenStream, read_stream, stream_tokens
from megatron_fwpkm.errors import UserError

Corpus = tuple[Path, Manifest]


def _expected(config: DataConfig, corpus: Path, split: str, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, documents and positions of a split, the slow and obvious way."""
    tokenizer = corpus_tokenizer(corpus)
    rule = SplitRule(seed, config.validation_fraction, config.test_fraction)
    source = open_source(config)
    stream: tuple[list[int], list[int], list[int]] = ([], [], [])
    document_number = 0
    for part in source.parts(int(config.part_megabytes * (1 << 20))):
        for document in sorted(read_documents(source, part), key=rule.key):
            if rule.split(document) == split:
                tokens = [*tokenizer.tokenizer.encode(document.text).ids, tokenizer.end_id]
                stream[0].extend(tokens)
                stream[1].extend([document_number] * len(tokens))
                stream[2].extend(range(len(tokens)))
                document_number += 1
    return stream


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_stream_is_the_documents_tokens(
    corpus: Corpus, settings: Callable[..., DataConfig], tmp_path: Path, split: str
) -> None:
    folder, manifest = corpus
    tokens, documents, positions = _expected(settings(tmp_path), folder, split, seed=3)
    assert len(tokens) == manifest.splits[split].tokens == stream_tokens(folder, split)
    assert len(set(documents)) == manifest.splits[split].documents
    stream = TokenStream(folder, manifest, split, tmp_path, open_shards=1, limit_bytes=0)
    whole = stream.read(0, len(tokens))
    assert whole.tokens.dtype == numpy.uint16
    assert whole.tokens.tolist() == tokens
    assert whole.documents.tolist() == documents
    assert whole.positions.tolist() == positions
    for start, count in [(0, 1), (len(tokens) - 1, 1), (99, 2), (250, 1100), (100, 100), (5, 0)]:
        piece = read_stream(folder, split, start, count)
        assert [values.tolist() for values in piece] == [
            values[start : start + count] for values in (tokens, documents, positions)
        ]
        assert stream.read_tokens(start, count).tolist() == piece.tokens.tolist()
    with pytest.raises(IndexError):
        stream.read(len(tokens) - 1, 2)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(16, 40))
def test_blocks_of_any_documents(lengths: list[int], block_tokens: int) -> None:
    documents = [numpy.arange(length, dtype=numpy.uint16) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train", "000000")
        writer = BlockWriter(path, "uint16", block_tokens, 4000)
        for document in documents:
            writer.add(document)
        counts = writer.finish()
        assert (counts.documents, counts.tokens) == (len(lengths), sum(lengths))
        shards = [{**shard, "zip_data": None, "compression": None} for shard in counts.shards]
        for shard in counts.shards:
            packed = path / shard["zip_data"]["basename"]
            from streaming.base.compression import decompress

            (path / shard["raw_data"]["basename"]).write_bytes(decompress("zstd", packed.read_bytes()))
        (path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
        blocks = import_streaming().LocalDataset(local=str(path))
        starts = numpy.cumsum([0, *lengths])
        place = 0
        for number in range(len(blocks)):
            block = blocks[number]
            size = len(block["tokens"])
            assert size == block_tokens or number == len(blocks) - 1
            first = int(numpy.searchsorted(starts, place, side="right")) - 1
            assert (block["first_document"], block["first_position"]) == (first, place - starts[first])
            inside = [start - place for start in starts[:-1] if place <= start < place + size]
            assert block["starts"].tolist() == [*inside, size]
            place += size
        assert place == sum(lengths)


def test_an_empty_stream_leaves_nothing(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path / "split" / "000000", "uint8", 16, 1000)
    assert writer.finish().shards == []
    assert not (tmp_path / "split" / "000000").exists()


def test_one_part_and_large_blocks_hold_the_same_text(
    corpus: Corpus, settings: Callable[..., DataConfig], tmp_path: Path
) -> None:
    """Blocks and shards are no more than containers."""
    config = settings(tmp_path, part_megabytes=100, block_tokens=16)
    large = settings(tmp_path, part_megabytes=100, block_tokens=5000)
    found = [prepare_corpus(each, seed=3) for each in (config, large)]
    assert found[0][1].corpus_sha256 == found[1][1].corpus_sha256 != corpus[1].corpus_sha256
    streams = [read_stream(folder, "train", 0, stream_tokens(folder, "train")) for folder, _ in found]
    assert all((one == other).all() for one, other in zip(*streams, strict=True))


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_smallest_dtype(vocab_size: int, name: str) -> None:
    assert smallest_dtype(vocab_size) == name


def test_a_missing_split_is_named(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="no other split, only test, train, validation"):
        read_stream(corpus[0], "other", 0, 1)


def test_shards_are_checked_before_a_job(corpus: Corpus, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus[0], copy)
    check_shards(copy)
    shard = sorted((copy / "train").glob("*/*.zstd"))[1]
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        check_shards(copy)
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        read_stream(copy, "train", 0, stream_tokens(copy, "train"))
