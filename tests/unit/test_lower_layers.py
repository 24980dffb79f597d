"""The lower layers: what they remember, and how they cut a write into passes of bounded length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import pytest
import torch

from actors.types import WriteExample
from actors.write.frozen_llama import AttentionPattern, FrozenLlama
from actors.write.lower_layers import LowerLayers, chunks_of, parents_of
from tests.unit.write_cases import examples, frozen, tiny_model


@pytest.fixture(scope="module")
def model() -> FrozenLlama:
    return frozen(tiny_model())


def example(seed: int, tokens: int) -> WriteExample:
    """An example with ``tokens`` inputs: the last answer token is none."""
    return WriteExample(tuple(range(seed, seed + tokens)), (1,))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass through the lower layers, as they happen."""
    lengths: list[int] = []
    original = LowerLayers._pass

    def noting(self: LowerLayers, ids: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        lengths.append(len(ids))
        return original(self, ids, pattern)

    monkeypatch.setattr(LowerLayers, "_pass", noting)
    return lengths


def test_the_newest_streams_are_remembered_and_the_oldest_forgotten(
    model: FrozenLlama, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 tokens are kept. A stream that is used again becomes the newest."""
    monkeypatch.setattr("actors.write.lower_layers._KEPT_TOKENS", 40)
    lower = LowerLayers(model, 2, 2048)
    first, second, third = (example(seed, 15) for seed in (0, 20, 40))
    for read in (first, second, first, third):
        lower.read([(0, read)])
    assert passes == [15, 15, 15]
    lower.read([(0, first)], [(0, third)])
    assert passes == [15, 15, 15]
    lower.read([(0, second)])
    assert passes == [15, 15, 15, 15]


def test_a_pass_holds_no_more_tokens_than_a_chunk(model: FrozenLlama, passes: list[int]) -> None:
    """But for an example that is longer by itself. Each example is the same as in one pass for all."""
    flashcards = [(0, card) for card in (*examples(1, 6, shared_prefix=4), example(5, 30))]
    probes = [(0, example(seed, 6)) for seed in (50, 60)]
    whole = LowerLayers(model, 2, 2048).read(flashcards, probes)
    assert len(passes) == 1
    passes.clear()
    cut = LowerLayers(model, 2, 25).read(flashcards, probes)
    assert max(passes) == 30 and sorted(passes)[-2] <= 25 and len(passes) > 3
    for part, same in zip(whole, cut, strict=True):
        assert part.prefix == same.prefix
        for row, other in zip(part.rows, same.rows, strict=True):
            assert torch.allclose(row.hidden, other.hidden, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 4])
def test_chunks_hold_every_row_once_and_stay_within_the_limit(prefix: int) -> None:
    lengths, groups = [3, 9, 2, 7, 7, 30, 1, 5, 5, 8, 2], [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    chunks = list(chunks_of(lengths, groups, [None] * len(lengths), prefix, 20))
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert tokens_of(chunk, lengths, groups, prefix) <= 20 or len(chunk) == 1
    for chunk, following in pairwise(chunks):
        assert tokens_of([*chunk, following[0]], lengths, groups, prefix) > 20, "two chunks fit into one"


def test_a_row_comes_behind_the_row_that_it_continues_and_in_its_chunk() -> None:
    lengths, groups = [12, 3, 7, 4, 9, 30], [0, 0, 0, 0, 1, 1]
    parents = [2, None, 1, None, None, 4]
    chunks = list(chunks_of(lengths, groups, parents, 2, 17))
    assert chunks == [[3], [1, 2, 0], [4, 5]]  # 6 tokens; 14, as each row has only its own; 32, one family


def test_a_card_continues_the_longest_example_that_ends_before_its_answer() -> None:
    inputs = [(1, 2), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 9), (1, 2, 3), (1, 2)]
    answers = [1, 1, 2, 2, 1, 1]
    # the third is in another episode in the second case; the last has the same tokens as the first
    assert parents_of([0] * 6, inputs, answers) == [None, 4, 1, 5, 5, None]
    assert parents_of([0, 0, 1, 0, 0, 0], inputs, answers) == [None, 4, None, 5, 5, None]
    # an answer is never parted: its first token is predicted in the row that holds it all
    assert parents_of([0, 0], [(1, 2, 3), (1, 2, 3, 4)], [1, 2]) == [None, None]


def test_a_continued_card_is_read_once(model: FrozenLlama, passes: list[int]) -> None:
    first = WriteExample((5, 6, 7), (8, 9))
    behind = WriteExample((5, 6, 7, 8, 9, 10, 11), (12, 13))
    alone = [LowerLayers(model, 2, 2048).read([(0, part)])[0] for part in (first, behind)]
    passes.clear()
    output = LowerLayers(model, 2, 2048).read([(0, behind), (0, first)])[0]
    assert passes == [8], "the four inputs of the first, then the four that follow"
    for row, part in zip(output.rows, reversed(alone), strict=True):
        assert torch.allclose(row.hidden, part.rows[0].hidden, atol=1e-5)


def tokens_of(chunk: Sequence[int], lengths: Sequence[int], groups: Sequence[int], prefix: int) -> int:
    """Tokens of a chunk: its rows, and the prefix once for each run of rows of one group."""
    return sum(lengths[row] for row in chunk) + prefix * len(list(groupby(groups[row] for row in chunk)))
