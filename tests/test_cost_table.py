"""A cost table holds what decoding costs, says where, and is refused where that is elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tree_drafters import Foretelling, table_of

from specrepro import cast, cost_model, cost_table, target_model
from specrepro.cost_table import CostTable, Grid
from specrepro.decoding import Autoregressive, decode, decode_autoregressively
from specrepro.draft_tree import take_shape
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Target

GRID = Grid(
    (1, 2), bucket=32, num_buckets=2, sizes=(1, 2, 6, 12), widths=(1, 3), warm_up=2, repeats=4
)


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def header(target) -> dict:
    return cost_table.header_of(target, "foretelling", 4)


@pytest.fixture(scope="module")
def measured(target, header) -> CostTable:
    drafter = Foretelling([], target.vocab_size)
    return cost_table.profile(target, drafter, header, GRID)


# --- lookups


@pytest.mark.parametrize(
    ("context", "expected"), [(0, 256), (1, 256), (255, 256), (256, 512), (800, 1024), (5000, 1024)]
)
def test_a_context_stands_for_the_next_multiple_and_for_the_last_one_beyond(context, expected):
    assert cost_table.select(context, 256, 4) == expected


def test_the_papers_index_with_max_would_leave_the_table():
    """Why `select` reads min: max gives M L at best, whatever the context."""
    found = {(max(c // 256, 4 - 1) + 1) * 256 for c in range(0, 1024)}
    assert found == {1024} and (max(1024 // 256, 3) + 1) * 256 == 1280


def test_sizes_between_are_interpolated_and_contexts_are_not():
    points = pd.DataFrame(
        {"part": part, "batch": 1, "context": context, "num_tokens": n, "value": context + 10.0 * n}
        for part in cost_table.PARTS
        for context in (100, 200)
        for n in (1, 2, 5)
    )
    table = CostTable({}, points)
    assert table.curve("target", 1, 99).tolist() == [110, 120, 130, 140, 150]
    assert table.cost("level", 1, 150, 3) == 230
    assert table.cost("rest", 1, 100_000, 99) == 250, "beyond what was timed, the most that was"
    assert table.cost("target", 1, 150, 99) == 200 + 990, "a pass goes on along the last two sizes"
    assert table.round(1, 90, 2, [3, 1], 5) == 120 + 130 + 110 + 150 + 150
    # ten of the drafted nodes lie in the cache: the next level's context is in the next bucket
    assert table.round(1, 90, 2, [10, 1], 5) == 120 + 150 + 210 + 150 + 150


def test_a_batch_between_two_costs_what_the_larger_does_and_none_is_extrapolated():
    table = table_of(lambda b, c, n: 100 * b + n, batches=(1, 4))
    assert table.cost("target", 3, 10, 1) == 401 and table.cost("target", 1, 10, 1) == 101
    with pytest.raises(
        ValueError, match="batches of up to 4 sequences, not 5.* batch 5 in its grid"
    ):
        table.cost("target", 5, 10, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda points: points[points["part"] != "rest"], "lacks .'rest', 1."),
        (lambda points: points.assign(context=points["context"] + 1), "are not L, 2 L, 3 L"),
    ],
)
def test_a_table_with_holes_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CostTable({}, change(table_of().points))


# --- the file


def test_a_stored_table_is_the_same_table(tmp_path, measured, header):
    path = measured.save(tmp_path / "costs.json")
    again = CostTable.load(path, header)
    pd.testing.assert_frame_equal(again.points, measured.points, check_dtype=False)
    assert again.header == measured.header and again.machine == measured.machine
    assert set(header) == {*cost_table.PLACES, "drafter", "top_k"}


@pytest.mark.parametrize("name", ["threads", "dtype", "device", "torch", "drafter", "top_k"])
def test_a_table_measured_otherwise_is_refused_by_name(tmp_path, measured, header, name):
    path = measured.save(tmp_path / "costs.json")
    with pytest.raises(ValueError) as refusal:
        cost_table.obtain(path, header | {name: "another"}, lambda: pytest.fail("measured again"))
    said = str(refusal.value)
    assert f"{name} {header[name]!r}, this run has 'another'" in said
    assert "costs.json" in said and "measure it again" in said and "\n" not in said


def test_what_is_no_table_is_refused_in_one_line(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({"header": {}}))
    with pytest.raises(ValueError, match="is no cost table .KeyError: 'points'"):
        CostTable.load(tmp_path / "costs.json")


def test_a_table_is_measured_once(tmp_path, measured, header):
    calls = []
    for _ in range(2):
        table = cost_table.obtain(
            tmp_path / "costs.json", header, lambda: calls.append(1) or measured
        )
    assert len(calls) == 1 and table.batches == [1, 2]


# --- measuring


def test_every_size_of_the_grid_was_timed_often_enough(measured):
    points = measured.points
    for batch in GRID.batches:
        for context in (32, 64):
            here = points[(points["batch"] == batch) & (points["context"] == context)]
            found = {part: set(rows["num_tokens"]) for part, rows in here.groupby("part")}
            assert found["target"] == set(GRID.sizes) and found["level"] == {1, 3, 4}
            assert found["extend"] and found["rest"]
            repeats = here[here["part"].isin(["target", "level"])]["repeats"]
            assert repeats.min() >= GRID.repeats_of(batch)
    assert (points["value_low"] <= points["value"]).all()
    assert (points["value"] <= points["value_high"]).all() and (points["value"] > 0).all()


def test_large_batches_are_spared_the_largest_trees():
    grid = replace(GRID, max_rows=16)
    assert grid.sizes_of(1) == [1, 2, 6, 12] and grid.sizes_of(2) == [1, 2, 6]
    assert grid.sizes_of(64) == [1, 2], "a tree has two nodes at least"


class Slow:
    """A clock that only moves when told to, by what is slept on it."""

    now = 0.0

    def elapsed(self) -> float:
        return self.now


@pytest.fixture
def slowed(target, monkeypatch) -> tuple[Slow, type[Foretelling]]:
    """A target that takes 1 s and 10 ms a node of the batch; a level 20 ms a node, a start 300."""
    clock, verify = Slow(), target.verify
    monkeypatch.setattr(cost_table, "Clock", lambda device: clock)

    def slow_verify(cache, tree):
        clock.now += 1 + 0.01 * tree.tokens.numel()
        return verify(cache, tree)

    class SlowDrafter(Foretelling):
        def propose(self):
            clock.now += 0.3
            return super().propose()

        def _branch(self, growth, pool, places):
            if pool.shape[1] > 1:
                clock.now += 0.02 * growth.tokens.shape[1]
            return super()._branch(growth, pool, places)

        def observe(self, verdict, scores):
            clock.now += 0.004
            super().observe(verdict, scores)

    monkeypatch.setattr(target, "verify", slow_verify)
    return clock, SlowDrafter


def test_each_part_is_timed_by_what_runs_in_it(target, slowed):
    drafter = slowed[1]([], target.vocab_size)
    grid = replace(GRID, batches=(1,), num_buckets=1)
    table = cost_table.profile(target, drafter, {"top_k": 4}, grid)
    for part, expected in (
        ("target", lambda n: 1000 + 10 * n),
        ("level", lambda n: 20 * n),
        ("extend", lambda n: 300),
        ("rest", lambda n: 4),
    ):
        rows = table.points[table.points["part"] == part]
        assert rows["value"].tolist() == pytest.approx([expected(n) for n in rows["num_tokens"]])


def test_costs_timed_a_little_at_a_time_follow_a_machine_that_slows_down(
    target, slowed, monkeypatch
):
    """Three repeats at full speed, three at half of it, and other batches in between."""
    clock, drafter_type = slowed
    drafter = drafter_type([], target.vocab_size)
    profiler = cost_table.Profiler(target, drafter, {"top_k": 4}, GRID)
    tables = []
    for slowness in (1, 2):
        monkeypatch.setattr(clock, "elapsed", lambda by=slowness: by * clock.now)
        for batch, context in GRID.cases:
            profiler.repeat(batch, context, 3)
        tables.append(profiler.table())
    keys, timed = [*cost_table.KEYS], "part == 'target' and num_tokens in @GRID.sizes"
    fast, both = (table.points.query(timed).set_index(keys) for table in tables)
    assert len(fast) == len(both) == len(GRID.cases) * len(GRID.sizes)
    assert (both["repeats"] >= 6).all()
    assert both["value_low"].to_numpy() == pytest.approx(fast["value"])
    assert both["value_high"].to_numpy() == pytest.approx(2 * fast["value"])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_table_foretells_what_rounds_take(target, slowed, batch):
    """Within 10 %, rounds of any width, depth and size, summed as the running speedup sums them."""
    clock, drafter_type = slowed
    table = cost_table.profile(target, drafter_type([], target.vocab_size), {"top_k": 4}, GRID)
    prompts = [[7] * 20, [9] * 12][:batch]
    said = decode_autoregressively(target, prompts, max_new_tokens=40, ignore_stop=True)
    source = drafter_type([one.tokens for one in said], target.vocab_size)
    config = cast.Config(TreeConfig(2, 4, 12), depth=3, thresholds=(0.5, 0.5, 0.5))
    drafter, began = cast.Drafter(source, table, config), clock.now
    decode(target, drafter, prompts, 40, ignore_stop=True)
    rounds = drafter.shape.rounds
    foretold = sum(
        table.round(one.batch, one.context, one.num_rows, one.widths, one.num_tokens)
        for one in rounds
    )
    assert foretold / 1e3 == pytest.approx(clock.now - began, rel=0.1)
    assert len({(*one.widths, one.num_tokens) for one in rounds}) > 2, "every round was alike"


def test_the_parts_of_a_round_add_up_to_what_decoding_takes(target):
    """Nothing is left out and nothing counted twice: sums of laps against one clock outside."""
    clock = SimpleNamespace(elapsed=time.process_time)  # which waiting for others does not move
    drafter = Foretelling([], target.vocab_size)
    timed = cost_table._Metronome(drafter, clock, [1, 6, 12], [1, 3, 4], 4, 1)
    take_shape(drafter, timed)
    timed.warm_up = 0
    began = time.process_time()
    decode(target, timed, [7] * 20, 60, ignore_stop=True)
    whole = 1e3 * (time.process_time() - began)
    assert 0.8 * whole < sum(value for _, _, value in timed.samples) < whole


def test_threads_are_set_back():
    before = torch.get_num_threads()
    with cost_table.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- modelled costs


def test_a_modelled_cascade_reads_the_head_once_where_eagle3_reads_it_at_every_level():
    for name in cost_model.CARDS:
        theirs = cost_model.table(name, batches=(1,), num_buckets=1)
        ours = cost_model.table(name, batches=(1,), num_buckets=1, cascade=3)
        level, one_pass = theirs.cost("level", 1, 256, 6), ours.cost("extend", 1, 256, 3)
        assert level < one_pass < 3 * level
        assert ours.cost("target", 1, 256, 10) == theirs.cost("target", 1, 256, 10)


def test_modelled_tables_say_that_they_are():
    tables = {
        name: cost_model.table(name, batches=(1,), num_buckets=1) for name in cost_model.CARDS
    }
    assert set(tables) == {"A800", "H20", "RTX 4090", "H100"}
    for table in tables.values():
        assert table.is_modelled and table.machine.endswith("(modelled)")
        assert table.rows()["modelled"].all()
    with pytest.raises(ValueError, match="unknown card 'T4'; choose one of A800"):
        cost_model.table("T4")


def test_a_modelled_pass_is_its_weights_until_arithmetic_takes_longer():
    """8.0 billion parameters less the embedding are read at 2.04 TB/s: 7.4 ms on an A800."""
    sizes, card = cost_model.LLAMA_3_1_8B, cost_model.CARDS["A800"]
    assert sizes.target_weights == pytest.approx(7.50e9, rel=0.01)
    one = cost_model.table("A800", batches=(1, 32), num_buckets=1)
    assert one.cost("target", 1, 10, 1) == pytest.approx(2 * 7.50e9 / 2.039e12 * 1e3, rel=0.02)
    # the roofline's ridge lies at 312e12 / 2.039e12 = 153 tokens
    assert one.cost("target", 1, 10, 64) == pytest.approx(one.cost("target", 1, 10, 1), rel=0.02)
    ratio = one.cost("target", 32, 10, 129) / one.cost("target", 32, 10, 64)
    assert ratio == pytest.approx(129 / 64, rel=0.02)
    assert cost_model.pass_seconds(card, sizes, 10**9, 1, 1, 10, 1) > 1e9 * 2 / 2.039e12


def test_the_card_with_the_least_arithmetic_for_its_memory_takes_the_smallest_trees():
    """H20 reads twice as fast as an A800 and computes half as fast: batches pay sooner there."""
    config = cast.Config(TreeConfig(3, 8, 30), thresholds=(2.0, 2.0, 2.0))
    sizes = {}
    for name in ("A800", "H20"):
        costs = cost_model.table(name, batches=(16,), num_buckets=1)
        words = torch.randint(5, 90, (16, 60), generator=torch.Generator().manual_seed(0))
        drafter = cast.Drafter(Foretelling(words.tolist(), 100), costs, config)
        drafter.begin(None, torch.full((16,), 20), words[:, 0], None)
        sizes[name] = drafter.propose().tokens.shape[1]
    assert sizes["H20"] < sizes["A800"]


def test_plain_decoding_has_no_shape_to_profile(target):
    with pytest.raises(ValueError, match="Autoregressive drafts no trees"):
        cost_table.profile(target, Autoregressive(), {"top_k": 4}, GRID)
