"""Trees, caches and a quicker interpreter for the tests of the tree-verify kernel."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from specrepro.draft_tree import PADDING, DraftTree

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True, scope="session")
def language_patched_once_a_launch() -> None:
    """Spare the interpreter from patching its language at every nested call, most of its time."""
    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            return original(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", patch)
        patches.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        yield


def random_parents(B: int, N: int, seed: int, padding: int = 0) -> Tensor:
    """Each node below any earlier one, oftener a late one; the last row ends in `padding`."""
    rng = torch.Generator().manual_seed(seed)
    earlier = torch.arange(N)
    lag = (torch.rand(B, N, generator=rng) ** 3 * earlier).long()
    parents = earlier - 1 - lag.clamp_max((earlier - 1).clamp_min(0))
    if padding:
        parents[-1, N - padding :] = PADDING
    return parents


def random_trees(
    B: int, N: int, agreement: float, seed: int, vocab_size: int = 1000
) -> tuple[DraftTree, Tensor]:
    """Trees without repeated siblings, and choices that name some child `agreement` of the time."""
    rng = torch.Generator().manual_seed(seed)
    parents = random_parents(B, N, seed, padding=min(N - 1, 2))
    tokens = torch.stack([torch.randperm(vocab_size, generator=rng)[:N] for _ in range(B)])
    # the tree's own tokens at the wrong places are what a careless walk follows
    choice = tokens.gather(1, torch.randint(0, N, (B, N), generator=rng))
    for b, node in (torch.rand(B, N, generator=rng) < agreement).nonzero().tolist():
        children = (parents[b] == node).nonzero()[:, 0]
        if len(children):
            lucky = children[int(torch.randint(0, len(children), (), generator=rng))]
            choice[b, node] = tokens[b, lucky]
    return DraftTree(tokens, parents), choice


@dataclass(slots=True)
class AttentionCase:
    """Arguments of `tree_attention`, the cache past each prefix full of NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lengths: Tensor
    tree: DraftTree

    @property
    def arguments(self) -> tuple:
        """Fresh caches each time, since attention writes into them."""
        caches = self.k_cache.clone(), self.v_cache.clone()
        return self.q, self.k, self.v, *caches, self.cache_lengths, self.tree


def attention_case(
    N: int,
    G: int = 2,
    D: int = 64,
    lengths: tuple[int, ...] = (37, 0),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_kv_heads: int = 1,
    capacity: int | None = None,
    parents: Tensor | None = None,
    padding: int = 0,
) -> AttentionCase:
    rng = torch.Generator().manual_seed(seed)
    B, S = len(lengths), capacity or max(lengths) + N + 3
    parents = random_parents(B, N, seed, padding) if parents is None else parents

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    q, k, v = normal(B, N, G * num_kv_heads, D), *(normal(B, N, num_kv_heads, D) for _ in range(2))
    k_cache, v_cache = (normal(B, S, num_kv_heads, D) for _ in range(2))
    for cache in (k_cache, v_cache):
        for b, length in enumerate(lengths):
            cache[b, length:] = torch.nan
    tree = DraftTree(torch.arange(N).repeat(B, 1), parents)
    return AttentionCase(q, k, v, k_cache, v_cache, torch.tensor(lengths), tree)


def paged(case: AttentionCase, page_size: int, seed: int) -> tuple[tuple, Tensor]:
    """The case's arguments with its cache in scattered pages, and the block table."""
    B, S = case.k_cache.shape[:2]
    per_row = -(-S // page_size)
    rng = torch.Generator().manual_seed(seed)
    table = torch.randperm(B * per_row + 2, generator=rng)[: B * per_row].view(B, per_row).int()
    pages = []
    for cache in (case.k_cache, case.v_cache):
        padded = torch.nn.functional.pad(
            cache, (0, 0, 0, 0, 0, per_row * page_size - S), value=torch.nan
        )
        scattered = cache.new_full((B * per_row + 2, page_size, *cache.shape[2:]), torch.nan)
        scattered[table.long()] = padded.unflatten(1, (per_row, page_size))
        pages.append(scattered)
    return (case.q, case.k, case.v, *pages, case.cache_lengths, case.tree), table
