"""A kernel that is broken in any of these ways fails the test named beside it.

A mutant is the source of `tree_kernel.py` with one text replaced, loaded in place of the original.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import test_kernel_compile as compiling
import test_kernel_walks as walks
import test_sampling as sampling
import test_tree_attention as attention
import test_tree_verify as verifying
from tree_cases import language_patched_once_a_launch  # noqa: F401

from specrepro import tree_kernel, tree_verify

Check = Callable[[pytest.MonkeyPatch], None]


def heads(_: pytest.MonkeyPatch) -> None:
    attention.test_matches_the_reference_for_every_group_of_heads(2, "triton")


def words(_: pytest.MonkeyPatch) -> None:
    attention.test_matches_the_reference_at_every_word_boundary(33, "triton")


def splits(_: pytest.MonkeyPatch) -> None:
    attention.test_long_and_ragged_prefixes_are_merged_from_their_splits((256, 257), "triton")


def unseen(_: pytest.MonkeyPatch) -> None:
    attention.test_splits_that_no_row_sees_count_for_nothing("triton")


def window(_: pytest.MonkeyPatch) -> None:
    attention.test_a_sliding_window_counts_depth_and_not_the_node_index(2, "triton")


def stored(_: pytest.MonkeyPatch) -> None:
    attention.test_the_trees_keys_and_values_wait_behind_the_prefix("triton")


def pages(_: pytest.MonkeyPatch) -> None:
    attention.test_pages_in_any_order_give_the_contiguous_result(7, "triton")


def padding(_: pytest.MonkeyPatch) -> None:
    attention.test_matches_the_reference_at_every_word_boundary(63, "triton")


def sizes(_: pytest.MonkeyPatch) -> None:
    compiling.test_splits_of_a_prefix_cover_it_whatever_the_tree(257)


def greedy(_: pytest.MonkeyPatch) -> None:
    verifying.test_the_walk_is_the_references(33, "triton")


def kept(_: pytest.MonkeyPatch) -> None:
    verifying.test_kept_slots_are_the_path_and_nothing_else_moves("triton")


def coin(_: pytest.MonkeyPatch) -> None:
    sampling.test_a_draft_without_target_mass_is_never_accepted_not_even_by_coin_zero(
        "deterministic", 0.0, "triton"
    )


def exhausted(_: pytest.MonkeyPatch) -> None:
    sampling.test_all_tokens_drafted_and_refused_still_leave_one_with_mass("triton")


def race(patches: pytest.MonkeyPatch) -> None:
    walks.test_a_race_is_the_same_however_its_grid_is_cut(37, 16, patches)


def chosen(patches: pytest.MonkeyPatch) -> None:
    walks.test_a_rejection_is_the_same_however_the_vocabulary_is_cut("deterministic", 16, patches)


def sampled(patches: pytest.MonkeyPatch) -> None:
    for mode in ("without_replacement", "with_replacement"):
        walks.test_a_rejection_is_the_same_however_the_vocabulary_is_cut(mode, 16, patches)


MUTATIONS: dict[str, tuple[str, str, Check]] = {
    "the length bound reads one slot too many": (
        "is_used = slots < stop",
        "is_used = slots <= stop",
        heads,
    ),
    "every block of the tree reads the first ancestor word": (
        "tl.cdiv(N, BLOCK_T) + first // BLOCK_T",
        "tl.cdiv(N, BLOCK_T)",
        words,
    ),
    "the heads of a group share one query": (
        "(head * G + rows % G) * q_head",
        "head * G * q_head",
        heads,
    ),
    "the running sum is not faded": (
        "total = total * fade + tl.sum",
        "total = total + tl.sum",
        heads,
    ),
    "the merge does not weigh its splits": (
        "acc = acc * fade[:, None] + split_acc * split_fade[:, None]",
        "acc = acc + split_acc",
        splits,
    ),
    "a split that saw nothing spoils the merge": (
        'shift = tl.where(new_best == float("-inf"), 0.0, new_best)\n        fade, split_fade',
        "shift = new_best\n        fade, split_fade",
        unseen,
    ),
    "splits follow the number of nodes": (
        "min_split, max_splits = FIXED_SPLIT,",
        "min_split, max_splits = FIXED_SPLIT * nodes,",
        sizes,
    ),
    "the window counts node indices": (
        "key_depths[None, :] >= first_seen[:, None]",
        "drafted[None, :] > nodes[:, None] - window",
        window,
    ),
    "the window reaches one slot too far back": (
        "slots[None, :] - length >= first_seen[:, None]",
        "slots[None, :] - length >= first_seen[:, None] - 1",
        window,
    ),
    "the tree's keys are not stored": (
        "_store_vectors(k_cache_ptr, at, keys, is_room, D, BLOCK_D)",
        "pass",
        stored,
    ),
    "pages are read in order": (
        "page = tl.load(at, mask=is_used, other=0).to(tl.int64)",
        "page = sequence * num_pages + slots // page_size",
        pages,
    ),
    "padding keeps its sum": (
        "total = tl.where(is_row, total, 0.0)",
        "total = tl.where(is_row, total, 1.0)",
        padding,
    ),
    "any node with the chosen token counts as a child": (
        "is_it = (parents == parent) & (tokens == token)",
        "is_it = (tokens == token)",
        greedy,
    ),
    "the last accepted slot is left behind": ("range(1, accepted + 1)", "range(1, accepted)", kept),
    "a coin of zero accepts anything": ("mass < wanted * unseen", "mass <= wanted * unseen", coin),
    "a rejection takes the draft's mass unscaled": (
        "spent += mass / unseen",
        "spent += 1.0",
        sampled,
    ),
    "a tried sibling may be proposed again": (
        "unseen -= proposed",
        "unseen -= 0.0",
        sampled,
    ),
    "a sampled sibling meets the original target": (
        "wanted = tl.maximum(wanted - spent * proposed, 0.0)",
        "wanted = tl.maximum(wanted, 0.0)",
        sampled,
    ),
    "a chosen sibling meets the original target": (
        "mass -= wanted",
        "mass -= 0.0",
        exhausted,
    ),
    "a refused draft may still be drawn": (
        "mass = tl.where(ids == tl.load(tokens_ptr + tried), 0.0, mass)",
        "mass = tl.where(ids == tl.load(tokens_ptr + tried), mass, mass)",
        chosen,
    ),
    "a draw forgets the tiles before": (
        "cumulative = running + tl.cumsum(mass, 0)",
        "cumulative = tl.cumsum(mass, 0)",
        chosen,
    ),
    "columns race with the times of the rows": (
        "times_ptr + R + columns",
        "times_ptr + columns",
        race,
    ),
    "the winner is that of the last tile": (
        "winner = tl.where(earliest < best, first + tl.argmin(arrival, 0), winner)",
        "winner = first + tl.argmin(arrival, 0)",
        race,
    ),
    "each tile meets the tile before it and not the best": (
        "best = tl.minimum(best, earliest)",
        "best = earliest",
        race,
    ),
    "a row is numbered within its tile": (
        "first + tl.argmin(arrival, 0), winner)",
        "tl.argmin(arrival, 0), winner)",
        race,
    ),
    "a token without mass arrives": (
        'return tl.where(mass > 0, times / tl.where(mass > 0, mass, 1.0), float("inf"))',
        "return times / tl.where(mass > 0, mass, 1.0)",
        race,
    ),
    "lanes past the vocabulary have mass": (
        "mask=ids < V, other=0.0).to(tl.float32), 1)",
        "mask=ids < V, other=1.0).to(tl.float32), 1)",
        race,
    ),
    "every node races with the times of the root": (
        "times_ptr + at * (R + C)",
        "times_ptr + row * (R + C)",
        race,
    ),
    "every node races with the masses of the root": ("p_ptr + at * V", "p_ptr + row * V", race),
}


def install(source: str, folder: Path, patches: pytest.MonkeyPatch) -> None:
    """Load a kernel module from text wherever the original is used."""
    path = folder / "mutant_kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    patches.setitem(sys.modules, path.stem, mutant)
    spec.loader.exec_module(mutant)
    users: tuple[ModuleType, ...] = (tree_verify, compiling, walks)
    for user in users:
        patches.setattr(user, "tree_kernel", mutant)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, check = MUTATIONS[name]
    source = Path(tree_kernel.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in the kernels: {old}"
    install(source.replace(old, new), tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize("check", dict.fromkeys(check for _, _, check in MUTATIONS.values()))
def test_a_kernel_that_is_only_copied_passes_them_all(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Path(tree_kernel.__file__).read_text(), tmp_path, monkeypatch)
    check(monkeypatch)
