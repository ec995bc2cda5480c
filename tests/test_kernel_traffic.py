"""What attention moves, counted from its own loops: each key and value once for all the heads that
share it, and what follows from that on a card, which is modelled.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tree_cases import attention_case, language_patched_once_a_launch  # noqa: F401

from specrepro import kernel_launch, kernel_traffic, tree_kernel
from specrepro.kernel_report import roofline
from specrepro.tree_verify import tree_attention

SHAPE = dict(nodes=60, query_heads=32, kv_heads=8, head_size=128, itemsize=2)


def test_each_key_and_value_is_loaded_once_per_head_at_2048_tokens_and_60_nodes() -> None:
    geometry = kernel_launch.plan(1, 60, 32, 8, 128, 2048 + 60, 2, architecture=90)
    moved = kernel_traffic.traffic(geometry, [2048], **SHAPE)
    least = kernel_traffic.minimum_traffic([2048], **SHAPE)
    assert moved.kv_bytes <= 1.10 * least.kv_bytes
    unpacked = kernel_traffic.dense_mask_traffic([2048], **SHAPE, packs_heads=False)
    assert unpacked.kv_bytes == 4 * least.kv_bytes


def test_the_count_notices_a_tile_too_narrow_for_its_rows() -> None:
    geometry = kernel_launch.plan(1, 60, 32, 8, 128, 2048 + 60, 2, architecture=80)
    moved = kernel_traffic.traffic(geometry, [2048], **SHAPE)
    least = kernel_traffic.minimum_traffic([2048], **SHAPE)
    assert geometry.row_blocks == 2 and moved.kv_bytes == 2 * least.kv_bytes


@pytest.mark.parametrize("lengths", [(40, 0), (600,), (513, 3)])
@pytest.mark.parametrize(("nodes", "group"), [(7, 2), (9, 2), (5, 7)])
def test_the_count_is_what_the_kernels_load(
    nodes: int, group: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = attention_case(nodes, group, lengths=lengths, num_kv_heads=2, capacity=610)
    tiles = kernel_launch.choose_tiles(nodes * group, 64, itemsize=4)
    assert tiles.rows != tiles.slots == kernel_launch.WORD_BITS, "no telling queries from keys"
    loaded, load = {"keys and values": 0, "queries": 0}, tree_kernel._load_vectors

    def counting(ptr, at, is_there, D, BLOCK_D):
        if is_there.shape[0] in (tiles.rows, tiles.slots):
            is_query = is_there.shape[0] == tiles.rows
            num_vectors = int(is_there.handle.data.sum())
            loaded["queries" if is_query else "keys and values"] += num_vectors
        return load(ptr, at, is_there, D, BLOCK_D)

    monkeypatch.setattr(tree_kernel, "_load_vectors", counting)
    monkeypatch.setattr(kernel_launch, "MERGE_ROWS", 8)  # so that what a merge loads is not counted
    tree_attention(*case.arguments, backend="triton")
    geometry = kernel_launch.plan(len(lengths), nodes, 2 * group, 2, 64, 610, itemsize=4)
    moved = kernel_traffic.traffic(geometry, list(lengths), nodes, 2 * group, 2, 64, itemsize=4)
    assert loaded["keys and values"] * 64 * 4 == moved.kv_bytes
    num_splits = sum(geometry.splits_of(length)[1] for length in lengths)
    assert loaded["queries"] == num_splits * 2 * nodes * group


def test_every_floor_is_reached_by_memory_and_not_by_arithmetic_at_batch_one() -> None:
    geometry = kernel_launch.plan(1, 60, 32, 8, 128, 2048 + 60, 2, architecture=90)
    moved = kernel_traffic.traffic(geometry, [2048], **SHAPE)
    h100 = next(card for card in kernel_traffic.CARDS if "H100" in card.name)
    from_memory = (moved.kv_bytes + moved.other_bytes) / h100.bytes_per_second
    assert kernel_traffic.floor_seconds(h100, moved) == pytest.approx(from_memory)


def test_what_heads_that_are_not_packed_read_more_is_the_keys_and_values() -> None:
    shape, lengths = (60, 32, 8, 128, 2), [2048, 100]
    packed = kernel_traffic.traffic(kernel_launch.plan(2, 60, 32, 8, 128, 2108, 2), lengths, *shape)
    geometry = kernel_launch.plan(2, 60, 32, 32, 128, 2108, 2)
    apart = kernel_traffic.traffic(geometry, lengths, *shape, packs_heads=False)
    assert apart.kv_bytes == 4 * packed.kv_bytes
    assert apart.other_bytes == packed.other_bytes
    assert apart.scratch_bytes == packed.scratch_bytes


def test_float32_products_count_as_three_in_tf32() -> None:
    arithmetic = kernel_traffic.Traffic(0, 0, 0, operations=10**12)
    h100 = next(card for card in kernel_traffic.CARDS if "H100" in card.name)
    in_half, in_full = (kernel_traffic.floor_seconds(h100, arithmetic, size) for size in (2, 4))
    assert in_half == pytest.approx(1 / 989) and in_full == pytest.approx(6 / 989)


def test_the_roofline_has_a_floor_for_every_card_context_and_attention() -> None:
    table = roofline()
    assert (table["modelled_floor_us"] > 0).all() and len(table) == 3 * 3 * 4
    ours = table[(table["attention"] == "tree kernel") & (table["card"] == "H100 SXM")]
    assert (ours["kv_over_minimum"] <= 1.10).all()
    floors = table.pivot(index=["card", "context"], columns="attention", values="modelled_floor_us")
    assert (floors["tree kernel"] < floors["tree kernel, heads not packed"]).all()
    assert (floors["tree kernel"] < floors["SDPA, dense mask"]).all()


@pytest.mark.parametrize(
    "change",
    [{"batch": 8}, {"nodes": 240}, {"contexts": (4096,)}, {"head_size": 256}, {"dtype": "fp32"}],
)
def test_the_roofline_follows_every_dimension_of_the_layer(change: dict) -> None:
    before, after = roofline(contexts=(2048,)), roofline(**{"contexts": (2048,)} | change)
    assert (after["megabytes"] > before["megabytes"]).all()
    assert (after["gigaoperations"] > 0).all() and set(after.columns) == set(before.columns)


class NotLaunched:
    """Stands for a kernel and notes the grids that it would be launched on."""

    def __init__(self) -> None:
        self.grids: list[tuple] = []

    def __getitem__(self, grid: tuple):
        return lambda *_, **options: self.grids.append((grid, *sorted(map(str, options.items()))))


def test_launches_depend_on_shapes_and_never_on_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, merge = NotLaunched(), NotLaunched()
    monkeypatch.setattr(tree_kernel, "tree_attention_kernel", attention)
    monkeypatch.setattr(tree_kernel, "merge_splits_kernel", merge)
    for length in (0, 1, 300, 790):
        case = attention_case(9, 2, lengths=(length, 5), capacity=800)
        tree_attention(*case.arguments, backend="triton")
    for kernel in (attention, merge):
        assert len(kernel.grids) == 4 and len(set(kernel.grids)) == 1


def test_one_split_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = NotLaunched()
    monkeypatch.setattr(tree_kernel, "merge_splits_kernel", merge)
    one_split = attention_case(3, 2, lengths=(200,), capacity=kernel_launch.FIXED_SPLIT)
    tree_attention(*one_split.arguments, backend="triton")
    assert not merge.grids
    two = attention_case(3, 2, lengths=(200,), capacity=kernel_launch.FIXED_SPLIT + 1)
    tree_attention(*two.arguments, backend="triton")
    assert len(merge.grids) == 1


def test_no_kernel_adds_in_an_order_of_its_own() -> None:
    source = Path(tree_kernel.__file__).read_text()
    assert not re.search(r"\btl\.atomic|\binline_asm|\bextern_elementwise", source)


@pytest.mark.parametrize("head_size", [80, 96, 128])
@pytest.mark.parametrize("deterministic", [True, False])
def test_no_tile_of_128_rows_meets_wide_heads_on_hopper(
    head_size: int, deterministic: bool
) -> None:
    """On an H100 such tiles gave some wrong rows, others each time; no interpreter shows it."""
    rows = {
        kernel_launch.choose_tiles(
            num_rows, head_size, 2, 90, deterministic, is_plain=is_plain, group=group
        ).rows
        for num_rows in (1, 33, 65, 99, 128, 129, 240, 512)
        for is_plain in (True, False)
        for group in (1, 3, 4)
    }
    assert 64 in rows and 128 not in rows
