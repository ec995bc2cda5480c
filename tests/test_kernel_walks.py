"""The sampling walks at vocabularies of many tiles: whatever the tile, the draws are torch's.

Most vocabularies of `test_sampling.py` fit one tile. Here the tile is made smaller than the
vocabulary, or the vocabulary as large as a real one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from tree_cases import language_patched_once_a_launch  # noqa: F401

from specrepro import kernel_launch
from specrepro.draft_tree import DraftTree
from specrepro.races import race, vocabulary_grid
from specrepro.tree_verify import Verdict, verify_sample

STAR = torch.tensor([[-1, 0, 0]])
REJECTING = ("deterministic", "without_replacement", "with_replacement")


def masses_with_gaps(B: int, V: int, rng: torch.Generator) -> Tensor:
    """(B, 3, V) probabilities, about a third of them 0; grid rows without any mass among them."""
    masses = torch.rand(B, 3, V, generator=rng) ** 4
    masses[torch.rand(B, 3, V, generator=rng) < 1 / 3] = 0
    _, C = vocabulary_grid(V)
    if V > 2 * C:
        masses[..., C : 2 * C] = 0
    masses[..., [0, -1]] += 1e-3  # two tokens can be drafted whatever was left out
    return masses / masses.sum(-1, keepdim=True)


def star_of(masses: Tensor, rng: torch.Generator) -> DraftTree:
    """Two drafts for each root, drawn from its distribution without replacement."""
    drafts = torch.multinomial(masses[:, 0], 2, generator=rng)
    tokens = torch.cat([torch.zeros(len(masses), 1).long(), drafts], 1)
    return DraftTree(tokens, STAR.repeat(len(masses), 1))


def raced(probs: Tensor, rng: torch.Generator) -> tuple[DraftTree, Tensor, Verdict]:
    """A star, its race times and what the kernel makes of them."""
    B, N, V = probs.shape
    tree = star_of(probs, rng)
    times = torch.empty(B, N, sum(vocabulary_grid(V))).exponential_(generator=rng)
    verdict = verify_sample(tree, probs, mode="coupled", race_times=times, backend="triton")
    return tree, times, verdict


def assert_is_the_race(probs: Tensor, tree: DraftTree, times: Tensor, verdict: Verdict) -> None:
    first = race(probs[:, 0], times[:, 0])
    is_child = tree.tokens[:, 1:] == first[:, None]
    child = torch.where(is_child.any(1), is_child.long().argmax(1) + 1, 0)
    rows = torch.arange(len(child))
    second = race(probs[rows, child], times[rows, child])
    assert verdict.tokens[:, 0].tolist() == first.tolist()
    assert verdict.num_accepted.tolist() == (child > 0).long().tolist()
    assert verdict.bonus.tolist() == torch.where(child > 0, second, first).tolist()


@pytest.mark.parametrize("tile", [1, 16, 64, 4096])
@pytest.mark.parametrize("V", [2, 3, 37, 83])
def test_a_race_is_the_same_however_its_grid_is_cut(
    V: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_launch, "COUPLED_TILE", tile)
    rng = torch.Generator().manual_seed(V)
    probs = masses_with_gaps(40, V, rng)
    tree, times, verdict = raced(probs, rng)
    assert_is_the_race(probs, tree, times, verdict)
    R, C = vocabulary_grid(V)
    assert 0 < verdict.num_accepted.sum() < 40 or V <= 3, "all walks went alike"
    assert (verdict.tokens[:, 0] >= (R - 1) * C).any(), "no draw fell in the last row"


@pytest.mark.parametrize("V", [49_152, 128_256, 151_936])
def test_a_race_over_a_real_vocabulary_is_torchs(V: int) -> None:
    rng = torch.Generator().manual_seed(V)
    probs = (4 * torch.randn(6, 3, V, generator=rng)).softmax(-1)
    tree, times, verdict = raced(probs, rng)
    assert_is_the_race(probs, tree, times, verdict)
    assert verdict.tokens[:, 0].unique().numel() > 4, "hardly a draw differs from the others"


@pytest.mark.parametrize(("V", "rows"), [(2, 1), (40, 8), (49_152, 16), (151_936, 8), (2**26, 1)])
def test_a_tile_holds_whole_rows_and_no_more_than_the_grid_has(V: int, rows: int) -> None:
    R, C = vocabulary_grid(V)
    assert kernel_launch.race_tile_rows(R, C) == rows
    assert rows * C <= max(kernel_launch.COUPLED_TILE, C) and rows < 2 * R


@pytest.mark.parametrize("tile", [4, 16])
@pytest.mark.parametrize("mode", REJECTING)
def test_a_rejection_is_the_same_however_the_vocabulary_is_cut(
    mode: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_launch, "RESIDUAL_TILE", tile)
    rng = torch.Generator().manual_seed(tile)
    probs = masses_with_gaps(20, 37, rng)
    tree = star_of(probs.flip(-1), rng)
    arguments = dict(uniforms=torch.rand(20, 3, generator=rng), mode=mode)
    arguments["final_uniforms"] = torch.rand(20, generator=rng)
    if mode != "deterministic":
        arguments["draft_probs"] = probs.flip(-1)
    kernel, torchs = (
        verify_sample(tree, probs, **arguments, backend=backend) for backend in ("triton", "torch")
    )
    assert kernel.bonus.tolist() == torchs.bonus.tolist()
    assert kernel.num_accepted.tolist() == torchs.num_accepted.tolist()
    assert (kernel.bonus >= 32).any() and (kernel.bonus < 4).any(), "one tile drew every token"
