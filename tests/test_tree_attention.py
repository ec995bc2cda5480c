"""Tree attention: the kernel, run by Triton's interpreter, and the torch path both do what the
reference says.

Bitwise claims are about the kernel's order of reduction; `test_kernel_on_gpu.py` repeats
them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tree_cases import (
    TOLERANCE,
    AttentionCase,
    attention_case,
    language_patched_once_a_launch,  # noqa: F401
    paged,
)

from specrepro.draft_tree import DraftTree
from specrepro.tree_verify import (
    attention_mask,
    attention_takes_kernels,
    pack,
    store_tree,
    tree_attention,
)
from specrepro.verify_reference import tree_attention_reference

BACKENDS = ("triton", "torch")
CHAIN = torch.arange(-1, 8).expand(1, 9)


def error_of(case, backend: str, **options) -> float:
    """Largest difference from the reference, in the output and in the log-sum-exp."""
    expected, expected_lse = tree_attention_reference(*case.arguments, return_lse=True, **options)
    out, lse = tree_attention(*case.arguments, return_lse=True, backend=backend, **options)
    assert not out.isnan().any() and not lse.isnan().any()
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    lse_error = (lse - expected_lse).nan_to_num(0.0).abs().max()
    return max((out - expected).abs().max().item(), lse_error.item())


def test_the_reference_is_a_dense_masked_softmax_in_float64() -> None:
    case = attention_case(12, 3, lengths=(9, 0), num_kv_heads=2, seed=1, padding=3)
    options = {"softcap": 2.0, "scale": 0.3, "window": 5}
    out, lse = tree_attention_reference(*case.arguments, return_lse=True, **options)
    mask = attention_mask(case.tree, case.cache_lengths, case.k_cache.shape[1], window=5)
    store_tree(case.k, case.v, case.k_cache, case.v_cache, case.cache_lengths)
    keys, values = (
        cache.nan_to_num(0.0).double().repeat_interleave(3, 2)
        for cache in (case.k_cache, case.v_cache)
    )
    scores = torch.einsum("bnhd,bshd->bnhs", case.q.double(), keys) * 0.3
    scores = (2 * (scores / 2).tanh()).masked_fill(~mask[:, :, None], -torch.inf)
    dense = torch.einsum("bnhs,bshd->bnhd", scores.softmax(-1).nan_to_num(0.0), values)
    torch.testing.assert_close(out, dense.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [1, 31, 32, 33, 63, 64, 65, 127, 128, 257])
def test_matches_the_reference_at_every_word_boundary(N: int, backend: str) -> None:
    case = attention_case(N, G=1, lengths=(5,), seed=N, padding=N > 60)
    assert error_of(case, backend) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("G", [1, 2, 3, 4, 7, 8])
def test_matches_the_reference_for_every_group_of_heads(G: int, backend: str) -> None:
    case = attention_case(5, G, lengths=(33, 0), num_kv_heads=2, seed=G, padding=2)
    assert error_of(case, backend) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_matches_the_reference_at_every_head_size(D: int) -> None:
    assert error_of(attention_case(6, 3, D, lengths=(41,)), "triton") < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float16, "triton"), (torch.float16, "torch"), (torch.bfloat16, "torch")],
)
def test_half_precision_stays_within_its_tolerance(dtype: torch.dtype, backend: str) -> None:
    case = attention_case(33, 2, lengths=(300, 77), dtype=dtype)
    expected = tree_attention_reference(*case.arguments)
    out = tree_attention(*case.arguments, backend=backend)
    # an output rounds to half a unit in its own last place, so the bound grows with its size
    assert ((out - expected).abs() / expected.abs().clamp_min(1)).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(256, 257), (600, 3, 511)])
def test_long_and_ragged_prefixes_are_merged_from_their_splits(
    lengths: tuple[int, ...], backend: str
) -> None:
    assert error_of(attention_case(3, 2, lengths=lengths), backend) < TOLERANCE[torch.float32]


def test_a_very_long_prefix_gets_larger_splits_rather_than_more() -> None:
    case = attention_case(2, 1, lengths=(4097,), dtype=torch.float16)
    assert error_of(case, "triton") < TOLERANCE[torch.float16]


@pytest.mark.parametrize("deterministic", [True, False])
def test_splitting_by_occupancy_changes_nothing_but_rounding(deterministic: bool) -> None:
    case = attention_case(9, 4, lengths=(190, 64), dtype=torch.float16)
    expected = tree_attention_reference(*case.arguments)
    out = tree_attention(*case.arguments, backend="triton", deterministic=deterministic)
    assert (out - expected).abs().max() < TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 2, 40])
def test_a_sliding_window_counts_depth_and_not_the_node_index(window: int, backend: str) -> None:
    # SGLang #39287: twelve leaves of one root lie at depth 1, yet up to twelve indices from it
    star = torch.tensor([[-1] + [0] * 12, [-1, *range(12)]])
    case = attention_case(13, 2, lengths=(70, 9), parents=star)
    assert error_of(case, backend, window=window) < TOLERANCE[torch.float32]
    before = tree_attention(*case.arguments, window=window, backend=backend)
    case.v[0, 0] += 1
    moved = tree_attention(*case.arguments, window=window, backend=backend) - before
    # the last leaf is one step from the root, whatever its index
    assert (moved[0, 12].abs().max() > 1e-4) == (window > 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_that_no_row_sees_count_for_nothing(backend: str) -> None:
    case = attention_case(9, 2, lengths=(600, 258), padding=2)
    assert error_of(case, backend, window=3) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_scale_and_window_work_together(backend: str) -> None:
    case = attention_case(7, 2, lengths=(50, 11))
    options = dict(softcap=3.0, scale=0.4, window=6)
    assert error_of(case, backend, **options) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_pages_in_any_order_give_the_contiguous_result(page_size: int, backend: str) -> None:
    case = attention_case(6, 2, lengths=(35, 50), num_kv_heads=2)
    plain = tree_attention(*case.arguments, backend=backend)
    arguments, table = paged(case, page_size, seed=page_size)
    out = tree_attention(*arguments, block_table=table, backend=backend)
    if backend == "triton":
        assert torch.equal(out, plain)
    assert (out - plain).abs().max() < TOLERANCE[torch.float32]
    stored = arguments[3][table.long()].flatten(1, 2)
    for b, length in enumerate(case.cache_lengths.tolist()):
        assert torch.equal(stored[b, length : length + 6], case.k[b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trees_keys_and_values_wait_behind_the_prefix(backend: str) -> None:
    case = attention_case(5, 2, lengths=(20, 8), num_kv_heads=2)
    arguments = case.arguments
    tree_attention(*arguments, backend=backend)
    for cache, own, before in zip(
        arguments[3:5], (case.k, case.v), (case.k_cache, case.v_cache), strict=True
    ):
        for b, length in enumerate((20, 8)):
            assert torch.equal(cache[b, length : length + 5], own[b])
            assert torch.equal(cache[b, :length], before[b, :length])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gets_zero_and_a_log_sum_exp_of_minus_infinity(backend: str) -> None:
    case = attention_case(9, 2, lengths=(12, 300), padding=4)
    case.k[1, 5:], case.v[1, 5:] = torch.nan, torch.nan
    out, lse = tree_attention(*case.arguments, return_lse=True, backend=backend)
    assert (out[1, 5:] == 0).all() and lse[1, 5:].isneginf().all()
    assert out[1, :5].isfinite().all() and out[0].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_branch_is_plain_attention_over_a_chain(backend: str, dtype: torch.dtype) -> None:
    case = attention_case(24, 2, lengths=(40,), seed=3, dtype=dtype)
    out = tree_attention(*case.arguments, backend=backend)
    parents, longest = case.tree.parents[0].tolist(), 0
    for leaf in set(range(24)) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        longest = max(longest, len(path))
        plain = causal_attention(case, path)
        assert (out[:, path] - plain).abs().max() < TOLERANCE[dtype]
    assert longest > 4, "no branch is long enough to mean anything"


def causal_attention(case: AttentionCase, path: list[int]) -> torch.Tensor:
    """The nodes of `path` behind the first sequence's prefix, as a model would attend to them."""
    length, n = int(case.cache_lengths[0]), len(path)
    keys = torch.cat([case.k_cache[:1, :length], case.k[:1, path]], 1).transpose(1, 2)
    values = torch.cat([case.v_cache[:1, :length], case.v[:1, path]], 1).transpose(1, 2)
    mask = torch.ones(n, length + n, dtype=torch.bool).tril(length)
    out = torch.nn.functional.scaled_dot_product_attention(
        case.q[:1, path].transpose(1, 2), keys, values, mask, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("is_chain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_row_depends_on_what_else_is_in_the_tree(dtype: torch.dtype, is_chain: bool) -> None:
    """One node alone, a chain cut anywhere and a tree with nodes added give the same bits."""
    parents = torch.arange(-1, 36).expand(2, 37) if is_chain else None
    whole = attention_case(37, 3, lengths=(280, 31), dtype=dtype, seed=5, parents=parents)
    out = tree_attention(*whole.arguments, backend="triton")
    for N in (1, 2, 9, 33):
        tree = DraftTree(whole.tree.tokens[:, :N], whole.tree.parents[:, :N])
        caches = whole.k_cache.clone(), whole.v_cache.clone()
        own = (whole.q[:, :N], whole.k[:, :N], whole.v[:, :N])
        part = tree_attention(*own, *caches, whole.cache_lengths, tree, backend="triton")
        assert torch.equal(part, out[:, :N]), (
            f"the first {N} rows changed with the nodes behind them"
        )


def test_no_row_depends_on_the_capacity_or_on_the_batch_beside_it() -> None:
    case = attention_case(5, 2, lengths=(280, 31))
    out = tree_attention(*case.arguments, backend="triton")
    q, k, v, k_cache, v_cache, lengths, tree = case.arguments
    grown = [
        torch.nn.functional.pad(c, (0, 0, 0, 0, 0, 700), value=torch.nan)[1:]
        for c in (k_cache, v_cache)
    ]
    alone = tree_attention(
        q[1:], k[1:], v[1:], *grown, lengths[1:], tree.rows([1]), backend="triton"
    )
    assert torch.equal(alone, out[1:])


def test_a_chain_is_causal_attention() -> None:
    case = attention_case(9, 2, lengths=(0,), parents=CHAIN)
    out = tree_attention(*case.arguments, backend="triton")
    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert (out - plain.transpose(1, 2)).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_node_attends_alone_as_it_does_in_a_tree_of_64(dtype: torch.dtype) -> None:
    # vLLM #54506: where splits follow the number of rows, decoding and verification part
    tree = attention_case(64, 2, lengths=(600, 0), dtype=dtype, seed=9)
    out, lse = tree_attention(*tree.arguments, return_lse=True, backend="triton")
    q, k, v, *caches, lengths, whole = tree.arguments
    root = DraftTree.root_only(whole.tokens[:, 0])
    own = (x[:, :1] for x in (q, k, v))
    alone, alone_lse = tree_attention(
        *own, *caches, lengths, root, return_lse=True, backend="triton"
    )
    assert torch.equal(alone[:, 0], out[:, 0]) and torch.equal(alone_lse[:, 0], lse[:, 0])


def test_permuting_siblings_permutes_outputs_and_nothing_else() -> None:
    case = attention_case(40, 2, lengths=(20,), seed=2)
    out = tree_attention(*case.arguments, backend="triton")
    parents = case.tree.parents[0]
    order = in_another_order(parents.tolist(), seed=1)
    place = order.argsort()
    moved = torch.where(parents < 0, parents, place[parents.clamp_min(0)])[order]
    shuffled = DraftTree(case.tree.tokens[:, order], moved[None])
    own = (x[:, order] for x in (case.q, case.k, case.v))
    again = tree_attention(*own, *case.arguments[3:6], shuffled, backend="triton")[:, place]
    is_ancestor = case.tree.ancestor_mask()[0]
    stays = ~(is_ancestor & (place != torch.arange(40))).any(1)
    assert 2 < stays.sum() < 30, "all nodes moved, or hardly one"
    assert torch.equal(again[:, stays], out[:, stays])
    # where an ancestor's key lies elsewhere in its block, it is added at another place
    assert (again - out).abs().max() < 1e-6


def in_another_order(parents: list[int], seed: int) -> torch.Tensor:
    """The nodes with siblings and what hangs below them shuffled, parents still before children."""
    rng, order = random.Random(seed), [0]
    waiting = [node for node, parent in enumerate(parents) if parent == 0]
    while waiting:
        # the first keep their places, so that some paths stay as they are
        order.append(waiting.pop(0 if len(order) < 12 else rng.randrange(len(waiting))))
        waiting += [node for node, parent in enumerate(parents) if parent == order[-1]]
        waiting.sort()
    return torch.tensor(order)


def test_a_packed_tree_can_be_shared_by_layers() -> None:
    case = attention_case(9, 2, lengths=(20,))
    shared = tree_attention(*case.arguments, packed=pack(case.tree), backend="triton")
    assert torch.equal(shared, tree_attention(*case.arguments, backend="triton"))


def test_heads_may_lie_before_slots_in_memory() -> None:
    case = attention_case(4, 2, lengths=(30,), num_kv_heads=3)
    expected = tree_attention(*case.arguments, backend="triton")
    q, k, v, k_cache, v_cache, *rest = case.arguments
    caches = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k_cache, v_cache))
    assert torch.equal(tree_attention(q, k, v, *caches, *rest, backend="triton"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 4, 3, 64)), "3 query heads cannot share 2"),
        (dict(k=torch.zeros(2, 3, 2, 64)), "k and v must be"),
        (dict(cache_lengths=torch.tensor([5])), "cache_lengths must be"),
        (dict(cache_lengths=torch.tensor([5, 1000])), "from 5 to 1000; with 4 nodes"),
        (dict(cache_lengths=torch.tensor([-1, 3])), "from -1 to 3"),
        (dict(tree=DraftTree.chain(torch.zeros(2, 3).long())), "the tree must be"),
        (
            dict(tree=DraftTree(torch.zeros(2, 4).long(), torch.tensor([[-1, 2, 1, 0]] * 2))),
            "a parent must come before",
        ),
        (
            dict(tree=DraftTree(torch.zeros(2, 4).long(), torch.tensor([[-1, 0, 9, 0]] * 2))),
            "a parent must come before",
        ),
        (dict(q=torch.zeros(4, 4, 64)), "must have four dimensions: q \\(4, 4, 64\\) float32"),
        (dict(k=torch.zeros(2, 4, 2, 64).half()), "must be of one dtype on one device"),
        (dict(window=0), "window must be positive, or None for none, not 0"),
        (dict(softcap=-2.0), "softcap must be positive, or None for none, not -2.0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_refused_before_anything_runs(
    change: dict, message: str, backend: str
) -> None:
    case = attention_case(4, 2, lengths=(20, 8), num_kv_heads=2)
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_lengths", "tree")
    arguments = dict(zip(names, case.arguments, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments, backend=backend)
    assert torch.equal(arguments["k_cache"].nan_to_num(7), case.k_cache.nan_to_num(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:1], r"the block table must be \(2, pages\)"),
        (lambda table: table.index_fill(1, torch.tensor([1]), 99), "page 1 of sequence 0 is 99"),
        (lambda table: table.index_fill(1, torch.tensor([0]), -1), "page 0 of sequence 0 is -1"),
        (lambda table: table[:, :2], "with 4 nodes behind them they must fit the 14 slots"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_are_not_there_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, backend: str
) -> None:
    arguments, table = paged(
        attention_case(4, 2, lengths=(20, 8), capacity=40), page_size=7, seed=0
    )
    with pytest.raises(ValueError, match=message):
        tree_attention(*arguments, block_table=change(table), backend=backend)
    # a page behind the tree is nobody's, whatever the table says
    unused = table.index_fill(1, torch.tensor([table.shape[1] - 1]), -1)
    assert tree_attention(*arguments, block_table=unused, backend=backend).isfinite().all()


@pytest.mark.parametrize(("head_size", "takes_kernels"), [(48, False), (64, True), (512, False)])
def test_on_a_gpu_auto_leaves_head_sizes_that_the_kernels_lack_to_torch(
    head_size: int, takes_kernels: bool
) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, shape=(1, 5, 2, head_size))
    assert attention_takes_kernels(on_gpu) == takes_kernels
    assert attention_takes_kernels(on_gpu, "triton") and not attention_takes_kernels(
        on_gpu, "torch"
    )


def test_what_no_kernel_does_is_named() -> None:
    case = attention_case(2, 1, D=48, lengths=(3,))
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose auto"):
        tree_attention(*case.arguments, backend="cuda")
    with pytest.raises(ValueError, match="64, 80, 96, 128, 256, not 48"):
        tree_attention(*case.arguments, backend="triton")
    if not torch.cuda.is_available():
        half = attention_case(2, 1, lengths=(3,), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
            tree_attention(*half.arguments, backend="triton")
