"""A kernel that is broken in any of these ways is caught: no mutant passes.

- the length bound reads one slot too many
- every block of the tree reads the first ancestor word
- the ancestor mask is off by one
- the heads of a group share one query
- the running sum is not faded
- the merge does not weigh its splits
- a split ends one slot too early
- a split that saw nothing spoils the merge
- splits follow the number of nodes
- the window counts node indices
- the window reaches one slot too far back
- the tree's keys are not stored
- pages are read in order
- padding keeps its sum
- padding attends to the prefix
- any node with the chosen token counts as a child
- the last accepted slot is left behind
- a coin of zero accepts anything
- a rejection takes the draft's mass unscaled
- a tried sibling may be proposed again
- a sampled sibling meets the original target
- a chosen sibling meets the original target
- a refused draft may still be drawn
- siblings share one coin
- siblings are tried from the last
- a draw forgets the tiles before
- columns race with the times of the rows
- the winner is that of the last tile
- each tile meets the tile before it and not the best
- a row is numbered within its tile
- a token without mass arrives
- lanes past the vocabulary have mass
- every node races with the times of the root
- every node races with the masses of the root

A mutant is the source of the kernels or of their launchers with one text replaced, loaded in place
of the original. `MUTATIONS` names the test that fails on each; the original passes them all.
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

from specrepro import kernel_launch, tree_kernel, tree_verify

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


def padded(_: pytest.MonkeyPatch) -> None:
    attention.test_padding_gets_zero_and_a_log_sum_exp_of_minus_infinity("triton")


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
    "the ancestor mask is off by one": (
        "(words[:, None] >> tl.arange(0, BLOCK_T)[None, :]",
        "(words[:, None] >> (tl.arange(0, BLOCK_T) + 1)[None, :]",
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
    "a split ends one slot too early": (
        "stop = tl.minimum(start + split_size, length)",
        "stop = tl.minimum(start + split_size - 1, length)",
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
    "padding attends to the prefix": ("is_row = nodes < num_nodes", "is_row = nodes < N", padded),
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
    "siblings share one coin": (
        "_load_uniform(uniforms_ptr + row + child)",
        "_load_uniform(uniforms_ptr + row + node)",
        chosen,
    ),
    "siblings are tried from the last": (
        "return tl.min(tl.where((parents == parent) & (node_ids > after), node_ids, N), 0)",
        "last = tl.max(tl.where((parents == parent) & (node_ids > after), node_ids, -1), 0)\n"
        "    return tl.where(last < 0, N, last)",
        exhausted,
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


NEGATIVE_CONTROLS = {  # rules that others have shipped, and how the drafts came about
    "a chosen sibling meets the original target": "deterministic",
    "a sampled sibling meets the original target": "with_replacement",
    "siblings share one coin": "deterministic",
}


USERS: dict[ModuleType, tuple[ModuleType, ...]] = {  # of each module that is broken
    tree_kernel: (kernel_launch,),
    kernel_launch: (tree_verify, compiling, walks),
}


def source_of(module: ModuleType) -> str:
    return Path(module.__file__).read_text()


def install(module: ModuleType, source: str, folder: Path, patches: pytest.MonkeyPatch) -> None:
    """Load a module from text wherever the original is used."""
    path = folder / f"mutant_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    patches.setitem(sys.modules, path.stem, mutant)
    spec.loader.exec_module(mutant)
    for user in USERS[module]:
        patches.setattr(user, module.__name__.rpartition(".")[2], mutant)


def break_kernels(name: str, folder: Path, patches: pytest.MonkeyPatch) -> Check:
    """Put the mutant of this name in place, and return the test that has to see it."""
    old, new, check = MUTATIONS[name]
    (broken,) = (module for module in USERS for _ in range(source_of(module).count(old)))
    install(broken, source_of(broken).replace(old, new), folder, patches)
    return check


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = break_kernels(name, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize(("name", "mode"), NEGATIVE_CONTROLS.items())
def test_a_kernel_with_a_wrong_rule_fails_the_chi_square(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel itself passes in `test_sampling.py`, at a false alarm in 10^9 runs."""
    break_kernels(name, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        sampling.test_the_kernels_draws_follow_the_target_where_a_wrong_rule_is_far_off(mode)


def test_the_list_above_is_of_all_that_was_broken() -> None:
    assert [line[2:] for line in __doc__.splitlines() if line.startswith("- ")] == list(MUTATIONS)


@pytest.mark.parametrize("check", dict.fromkeys(check for _, _, check in MUTATIONS.values()))
def test_a_kernel_that_is_only_copied_passes_them_all(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tree_kernel, source_of(tree_kernel), tmp_path, monkeypatch)
    check(monkeypatch)
