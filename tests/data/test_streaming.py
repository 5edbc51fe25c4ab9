"""The token loader in one process: order, epochs, cursor."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_fwpkm.data.prepare import CorpusRequest, prepare_corpus
from megatron_fwpkm.data.streaming import TokenLoader
from megatron_fwpkm.errors import UserError

REQUEST = CorpusRequest("stdlib", 300, 128, 0.3, 3, 12, 1 << 20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(REQUEST, tmp_path_factory.mktemp("data"))[0]


Make = Callable[..., TokenLoader]


@pytest.fixture
def make(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds loaders with caches and lock files of their own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    count = itertools.count()

    def build(batch_size: int = 3, shuffle: bool = True) -> TokenLoader:
        return TokenLoader(corpus / "validation", tmp_path / str(next(count)), batch_size, shuffle, seed=5)

    return build


def _read(loader: TokenLoader, count: int) -> torch.Tensor:
    return torch.cat([next(loader).tokens_BT for _ in range(count)]) if count else torch.empty(0, 128)


def test_labels_follow_tokens(make: Make) -> None:
    batch = next(make())
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (3, 128)
    assert batch.tokens_BT.dtype == torch.int64
    assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])


def test_cursor_continues_exactly_over_epochs(make: Make) -> None:
    loader = make()
    sequences = loader._dataset.size
    per_epoch = sequences // 3
    assert per_epoch > 2
    everything = _read(loader, 3 * per_epoch)
    assert not torch.equal(everything[: 3 * per_epoch], everything[3 * per_epoch : 6 * per_epoch])
    for done in (0, 1, per_epoch, per_epoch + 2, 2 * per_epoch):
        first = make()
        _read(first, done)
        state = first.state_dict()
        del first
        second = make()
        second.load_state_dict(state)
        assert torch.equal(_read(second, 3 * per_epoch - done), everything[3 * done :]), done


def test_too_few_sequences_is_an_error(make: Make) -> None:
    with pytest.raises(UserError, match="too few sequences"):
        next(make(batch_size=10_000))
