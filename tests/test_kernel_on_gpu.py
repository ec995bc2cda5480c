"""What only a GPU can show: the kernels compiled, in every number format, and captured in a graph.

    pytest -m gpu

Without it they are skipped, and the same claims are tested in Triton's interpreter elsewhere.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from scripted_drafters import Scripted
from test_decoding_by_kernels import PROMPTS, tiny_model
from test_sampling import sampled_batch
from torch import Tensor
from tree_cases import TOLERANCE, AttentionCase, attention_case, paged, random_trees

from specrepro import kernel_timings
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import DraftTree
from specrepro.target_model import Target
from specrepro.tree_verify import (
    keep_accepted,
    tree_attention,
    verify_greedy,
    verify_sample,
)
from specrepro.verify_checks import HEAD_SIZES, SAMPLING_MODES
from specrepro.verify_reference import tree_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on_gpu(case: AttentionCase) -> AttentionCase:
    moved = {
        field.name: getattr(case, field.name).cuda()
        for field in fields(case)
        if field.name != "tree"
    }
    return AttentionCase(**moved, tree=tree_on_gpu(case.tree))


def tree_on_gpu(tree: DraftTree) -> DraftTree:
    return DraftTree(tree.tokens.cuda(), tree.parents.cuda())


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """An output rounds to half a unit in its own last place, so the bound grows with its size."""
    error = (found.cpu().float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
    assert error.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_the_compiled_kernels_match_and_no_row_depends_on_others(
    dtype: torch.dtype, D: int
) -> None:
    case = attention_case(60, 4, D, lengths=(1021, 300, 0), dtype=dtype, num_kv_heads=2)
    expected, expected_lse = tree_attention_reference(*case.arguments, return_lse=True)
    case = on_gpu(case)
    out, lse = tree_attention(*case.arguments, return_lse=True)
    assert_near(out, expected, dtype)
    assert_near(lse, expected_lse, dtype)
    for N in (1, 17, 33):
        part = DraftTree(case.tree.tokens[:, :N], case.tree.parents[:, :N])
        own = (case.q[:, :N], case.k[:, :N], case.v[:, :N])
        rows = tree_attention(*own, *case.arguments[3:6], part)
        assert torch.equal(rows, out[:, :N]), f"the first {N} rows changed"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [{"window": 5}, {"softcap": 3.0}, {"deterministic": False}])
def test_windows_caps_pages_and_free_splits_match_when_compiled(
    options: dict, dtype: torch.dtype
) -> None:
    case = attention_case(33, 3, 128, lengths=(600, 31), dtype=dtype, num_kv_heads=2, padding=4)
    meaning = {name: value for name, value in options.items() if name != "deterministic"}
    expected = tree_attention_reference(*case.arguments, **meaning)
    assert_near(tree_attention(*on_gpu(case).arguments, **options), expected, dtype)
    arguments, table = paged(case, 16, seed=0)
    *tensors, tree = arguments
    pages = [tensor.cuda() for tensor in tensors]
    out = tree_attention(*pages, tree_on_gpu(tree), block_table=table.cuda(), **options)
    assert_near(out, expected, dtype)


def test_walk_and_cache_are_those_of_the_cpu() -> None:
    tree, choice = random_trees(64, 129, agreement=0.9, seed=1)
    lengths, cache = torch.randint(0, 50, (64,)), torch.randn(2, 64, 200, 2, 16)
    moved, verdict = cache.cuda(), verify_greedy(tree_on_gpu(tree), choice.cuda())
    keep_accepted(moved, verdict, lengths.cuda())
    expected = verify_greedy(tree, choice)
    kept = keep_accepted(cache, expected, lengths)
    assert verdict.num_accepted.tolist() == expected.num_accepted.tolist()
    assert verdict.num_accepted.max() > 3, "no walk went deep"
    P = expected.path.shape[1]
    assert torch.equal(verdict.path[:, :P].cpu(), expected.path)
    for b, length in enumerate(kept.tolist()):
        assert torch.equal(moved[:, b, :length].cpu(), cache[:, b, :length])


@pytest.mark.parametrize("mode", SAMPLING_MODES)
def test_draws_are_those_of_the_cpu(mode: str) -> None:
    tree, arguments, _, _ = sampled_batch(mode, 500, [-1, 0, 0, 1, 2, 1, 4], seed=3)
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    found = verify_sample(tree_on_gpu(tree), **moved)
    expected = verify_sample(tree, **arguments)
    assert expected.num_accepted.max() > 1, "no walk went deep"
    assert found.num_accepted.tolist() == expected.num_accepted.tolist()
    assert found.bonus.tolist() == expected.bonus.tolist()


def test_a_round_is_captured_in_a_cuda_graph_and_replayed_at_other_lengths() -> None:
    case = on_gpu(attention_case(33, 2, lengths=(300, 77), dtype=torch.float16, capacity=700))
    q, k, v, k_cache, v_cache, lengths, tree = case.arguments
    caches = torch.stack([k_cache, v_cache]).nan_to_num(0.0)
    choice = tree.tokens.roll(-1, 1)

    def verify() -> tuple[Tensor, Tensor, Tensor]:
        out = tree_attention(q, k, v, *caches, lengths, tree)
        verdict = verify_greedy(tree, choice)
        return out, verdict.path, keep_accepted(caches, verdict, lengths)

    before = caches.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and warms up what may not be made during capture
        verify()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = verify()
    lengths.copy_(torch.tensor([511, 3]))
    q.copy_(torch.randn_like(q))
    caches.copy_(before)
    graph.replay()
    replayed = [*(one.clone() for one in captured), caches.clone()]
    caches.copy_(before)
    for found, expected in zip(replayed, [*verify(), caches], strict=True):
        assert torch.equal(found, expected)


class ScriptedOnGpu(Scripted):
    def propose(self) -> DraftTree:
        return tree_on_gpu(super().propose())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decode_on_the_gpu_says_what_the_cpu_says(temperature: float, is_compiled: bool) -> None:
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    on_cpu = Target(tiny_model(), None, "tiny")
    words = [run.tokens for run in decode_autoregressively(on_cpu, PROMPTS, **options)]
    target = Target(tiny_model().cuda(), None, "tiny", compile=is_compiled)
    runs = decode(target, ScriptedOnGpu(words, 6, 0.8, is_bushy=True), PROMPTS, **options)
    assert [run.tokens for run in runs] == words
    assert max(runs[0].accepted + runs[1].accepted) > 1, "no walk went deep"
    parts = runs[0].seconds_by_part
    assert min(parts.values()) > 0 and sum(parts.values()) < 1.01 * runs[0].seconds


def test_every_means_of_attention_that_is_installed_is_timed() -> None:
    rows = list(kernel_timings.layers("cuda", contexts=(300,), turns=2))
    failed = {row["contender"]: row["failed"] for row in rows if "failed" in row}
    assert not failed
    assert {"SDPA, dense mask", "tree_attention", "flex_attention"} <= {
        row["contender"] for row in rows
    }
    assert all(row["milliseconds"] > 0 for row in rows)


def test_the_tolerance_notices_another_scale() -> None:
    case = attention_case(33, 2, lengths=(300,), dtype=torch.float16)
    expected = tree_attention_reference(*case.arguments)
    with pytest.raises(AssertionError):
        assert_near(tree_attention(*on_gpu(case).arguments, scale=0.13), expected, torch.float16)
