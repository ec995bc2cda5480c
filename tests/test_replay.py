"""A replay visits the rounds that decoding visits, and charges them to a cost table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from tree_drafters import Foretelling, honest_traces, table_of

from specrepro import cast, replay, rows, target_model
from specrepro.cast import Config
from specrepro.decoding import Generation, decode, decode_autoregressively
from specrepro.eagle3 import TreeConfig
from specrepro.measure import Record, sequence_seed
from specrepro.replay import Trace
from specrepro.target_model import Target

QUESTIONS = [
    ("a", [10, 20, 30, 40]),
    ("b", [50, 60, 70]),
    ("c", [15, 25, 35, 45, 55, 65]),
    ("d", [80]),
]
NUM_NEW, VOCABULARY = 24, 100
WIDE = TreeConfig(depth=3, top_k=5, total_tokens=2)


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


Said = Callable[[float], list[list[int]]]


@pytest.fixture(scope="module")
def said(target) -> Said:
    """What the target says after each question, at a temperature."""

    @cache
    def words(temperature: float) -> list[list[int]]:
        seeds = [sequence_seed(0, name) for name, _ in QUESTIONS]
        asked = [ids for _, ids in QUESTIONS]
        options = {"max_new_tokens": NUM_NEW, "temperature": temperature, "seed": seeds}
        return [one.tokens for one in decode_autoregressively(target, asked, **options)]

    return words


def knowing(said: Sequence[Sequence[int]], places: Sequence[int], shape=None) -> Foretelling:
    """A drafter that is the same for a question whatever the batch that it is asked in."""
    drafter = Foretelling(said, VOCABULARY, shape)
    drafter.text, drafter.trust = drafter.text[list(places)], drafter.trust[list(places)]
    return drafter


@pytest.fixture(scope="module")
def traces_at(target, said) -> Callable[[float], list[Trace]]:
    @cache
    def recorded(temperature: float) -> list[Trace]:
        found = []
        for places in ([0, 1, 2], [3]):
            found += replay.record(
                target, knowing(said(temperature), places), [QUESTIONS[p] for p in places], WIDE,
                prompts="chat", max_new_tokens=NUM_NEW, temperature=temperature, batch=3,
            )  # fmt: skip
        return found

    return recorded


@pytest.fixture(scope="module")
def traces(traces_at) -> list[Trace]:
    return traces_at(0.0)


def decoded(
    target: Target, said: list[list[int]], temperature: float, batch: int, wrap
) -> tuple[list[Generation], list[cast.Round]]:
    """Real decoding of the questions in batches, and what shaped trees came to."""
    runs, rounds = [], []
    for start in range(0, len(QUESTIONS), batch):
        places = list(range(len(QUESTIONS)))[start : start + batch]
        drafter = wrap(knowing(said, places))
        seeds = [sequence_seed(0, QUESTIONS[place][0]) for place in places]
        asked = [QUESTIONS[place][1] for place in places]
        runs += decode(target, drafter, asked, NUM_NEW, temperature, seed=seeds)
        rounds += drafter.shape.rounds if isinstance(drafter, cast.Drafter) else []
    return runs, rounds


def with_tree(tree: TreeConfig):
    def wrap(drafter):
        drafter.tree = tree
        return drafter

    return wrap


def emitted(runs: Sequence[Generation | Record]) -> list[list[int]]:
    """Tokens of every round, the last cut where the text ends."""
    found = []
    for run in runs:
        rounds = [num + 1 for num in run.accepted]
        rounds[-1] = len(run.tokens) - 1 - sum(rounds[:-1])
        found.append(rounds)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_traces_hold_the_text_of_every_lossless_method(traces_at, said, temperature):
    traces = traces_at(temperature)
    assert [trace.tokens for trace in traces] == said(temperature)
    for trace in traces:
        assert len(trace.drafted) == len(trace.tokens) - 1
        assert trace.drafted[:, 0].tolist() == trace.tokens[:-1], "the root is the last emitted"


@pytest.mark.parametrize(
    ("tree", "batch", "temperature"),
    [
        (TreeConfig(3, 5, 30), 1, 0.0),
        (TreeConfig(3, 5, 30), 3, 1.0),
        (TreeConfig(2, 5, 9), 3, 0.0),
        (TreeConfig(1, 3, 60), 1, 0.0),  # more than there are
        (TreeConfig(0, 4, 3), 1, 1.0),
    ],
)
def test_a_replayed_fixed_tree_accepts_what_decoding_accepts(
    target, said, traces_at, tree, batch, temperature
):
    traces, words = traces_at(temperature), said(temperature)
    runs, _ = decoded(target, words, temperature, batch, with_tree(tree))
    looked_up = replay.replay(traces, tree, table_of(), method="fixed", batch=batch)
    live = replay.replay(traces, with_tree(tree), table_of(), method="fixed", batch=batch)
    assert emitted(looked_up) == emitted(live) == emitted(runs)
    assert [one.drafted for one in looked_up] == [one.drafted for one in runs]
    assert [one.seconds for one in looked_up] == pytest.approx([one.seconds for one in live])
    most = max(max(run.accepted) for run in runs)
    assert tree.depth / 2 < most <= tree.depth + 1


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.0), (3, 0.0), (3, 1.0)])
def test_a_replayed_shape_decides_and_accepts_as_in_decoding(
    target, said, traces_at, batch, temperature
):
    """Rounds of the very same shapes, so whatever is counted in a replay happens when decoding."""
    traces, words = traces_at(temperature), said(temperature)
    costs = table_of(lambda b, c, n: 10 + 0.3 * n, lambda b, c, n: 1 + 0.2 * n)
    config = Config(TreeConfig(3, 5, 12), depth=3, total_tokens=30)
    runs, rounds = decoded(target, words, temperature, batch, cast.shaped(costs, config))
    seen = []

    def watched(recorded):
        seen.append(cast.Drafter(recorded, costs, config))
        return seen[-1]

    records = replay.replay(traces, watched, costs, method="CAST", batch=batch)
    assert emitted(records) == emitted(runs)
    replayed = [now for drafter in seen for now in drafter.shape.rounds]
    assert [(now.widths, now.num_tokens, now.context) for now in replayed] == [
        (now.widths, now.num_tokens, now.context) for now in rounds
    ]
    assert len({tuple(now.widths) for now in rounds}) > 3, "it always drafted alike"


def test_what_was_not_recorded_ends_the_path_and_is_never_accepted(traces):
    """Records of width 2 leave nodes without children; a wider tree keeps within them."""
    narrow = [replace(trace, top_k=2) for trace in traces]
    with pytest.raises(ValueError, match="5 children a node are asked for and 2 were recorded"):
        replay.replay(narrow, TreeConfig(1, 5, 9), table_of(), method="fixed")
    leaves = [
        replace(
            trace,
            first_child=trace.first_child.index_fill(
                1, torch.arange(1, trace.drafted.shape[1]), -1
            ),
        )
        for trace in traces
    ]
    records = replay.replay(leaves, TreeConfig(3, 5, 60), table_of(), method="fixed")
    assert max(num for one in records for num in one.accepted) == 1
    live = replay.replay(leaves, with_tree(TreeConfig(3, 5, 60)), table_of(), method="fixed")
    assert emitted(live) == emitted(records)


def test_seconds_are_the_tables_sums_over_the_rounds(traces):
    """Two sequences together until one ends, by hand from the formulas of the table."""
    costs = table_of(lambda b, c, n: 100 * b + n, lambda b, c, n: 10 * b + n, bucket=1000)
    tree = TreeConfig(2, 3, 7)
    records = replay.replay(traces[:2], tree, costs, method="fixed", batch=2)
    num_rounds = sorted(one.target_passes for one in records)
    expected = 0.0
    for place in range(num_rounds[-1]):
        b = 2 if place < num_rounds[0] else 1
        expected += 1.5 + 2 * (10 * b + 3) + (100 * b + 7) + 0.25
    assert sum(one.seconds for one in records) == pytest.approx(expected / 1e3)
    plain = replay.replay(traces[:2], None, costs, method="Autoregressive", batch=2)
    lengths = sorted(len(trace.tokens) - 1 for trace in traces[:2])
    total = lengths[0] * 201 + (lengths[1] - lengths[0]) * 101
    assert sum(one.seconds for one in plain) == pytest.approx(total / 1e3)
    assert {one.seconds for one in plain} == {total / 2e3}, "a batch shares its time"


def test_rows_of_replays_are_rows_like_any_other(traces, target):
    costs = table_of()
    records = replay.replay(traces, None, costs, method="Autoregressive")
    records += replay.replay(traces, TreeConfig(3, 5, 12), costs, method="fixed")
    found = rows.rows_of(records, {}, "smoke").set_index("method")
    assert found.loc["Autoregressive", "speedup"] == 1
    rates = [replay.tokens_per_second([r for r in records if r.method == m]) for m in found.index]
    assert found.loc["fixed", "speedup_decode"] == pytest.approx(rates[1] / rates[0])
    assert found.loc["fixed", "tau"] > 1.5


def test_agreement_is_predicted_over_measured_with_prefill_left_out(traces):
    predicted = replay.replay(traces, TreeConfig(2, 5, 12), table_of(), method="CAST")
    measured = [
        replace(one, seconds=1.25 * one.seconds + 3.0, prefill_seconds=3.0) for one in predicted
    ]
    (row,) = replay.agreement(measured, predicted).to_dict("records")
    assert row["value"] == pytest.approx(1.25) and row["num_prompts"] == len(traces)
    assert row["value_low"] == pytest.approx(1.25) == row["value_high"]
    others = [replace(one, method="another") for one in predicted]
    assert replay.agreement(measured, others).empty
    in_twos = replay.replay(traces, TreeConfig(2, 5, 12), table_of(), method="CAST", batch=2)
    (row,) = replay.agreement(in_twos, in_twos).to_dict("records")
    assert row["num_prompts"] == len(traces), "prompts, not batches"


def test_traces_are_kept_and_read_back(traces, tmp_path):
    calls = []
    for _ in range(2):
        found = replay.obtain(tmp_path / "traces", lambda: calls.append(1) or traces)
    assert len(calls) == 1
    for one, other in zip(found, traces, strict=True):
        assert (one.prompt_id, one.tokens, one.context) == (
            other.prompt_id, other.tokens, other.context,
        )  # fmt: skip
        assert torch.equal(one.drafted, other.drafted) and torch.equal(one.scores, other.scores)
        assert torch.equal(one.first_child, other.first_child)


def test_the_running_speedup_starts_where_it_settles_and_no_constant_does_much_better(traces):
    costs = table_of(lambda b, c, n: 10 + 0.25 * b * n, lambda b, c, n: 0.5 + 0.05 * b * n)
    config = Config(TreeConfig(3, 5, 12), depth=3, total_tokens=40)
    plain = replay.tokens_per_second(replay.replay(traces, None, costs, method="", batch=1))

    def speedup(thresholds) -> float:
        make = cast.shaped(costs, replace(config, thresholds=thresholds))
        return replay.tokens_per_second(replay.replay(traces, make, costs, method="")) / plain

    settled = cast.with_running_speedup(traces, costs, config, batch=1).expected_speedup
    assert speedup((settled,) * 3) == pytest.approx(settled, rel=0.05), "a fixed point"
    constants = {x: speedup((x,) * 3) for x in (0.1, 1.0, 2.0, 6.0)}
    assert speedup((settled,) * 3) > 0.9 * max(constants.values()), constants
    assert min(constants.values()) < 0.85 * max(constants.values()), "the threshold hardly mattered"
    assert np.isfinite(settled) and settled > 1


@pytest.fixture(scope="module")
def honest() -> tuple[list[Trace], list[Trace]]:
    """Texts to report on and others to choose on, of drafts whose confidences hold."""
    shape = TreeConfig(4, 6, 2)
    return honest_traces(16, 32, shape), honest_traces(8, 32, shape, seed=1)


@pytest.mark.parametrize("batch", [1, 8])
def test_cast_keeps_up_with_the_best_fixed_tree_chosen_with_hindsight(honest, batch):
    """The paper's utility within 10 %, ours within 1 %, both far above the default in a batch.

    A node of each sequence costs 3 % of a pass, so that in a batch a pass soon costs double.
    """
    reported, others = honest
    costs = table_of(
        lambda b, c, n: 45 + 1.5 * b * n, lambda b, c, n: 4 + 0.05 * b * n,
        batches=(1, 2, 4, 8), bucket=512, num_tokens=40, width=6,
    )  # fmt: skip

    def rate(draft) -> float:
        found = replay.replay(reported, draft, costs, method="", batch=batch)
        return replay.tokens_per_second(found)

    def rate_of(config: Config) -> float:
        return rate(cast.shaped(costs, cast.tuned(others, costs, config, batch)))

    grid = product((0, 1, 2, 4), (1, 2, 4), (2, 3, 4, 6, 12, 24, 40))
    fixed = rate(replay.fastest(reported, [TreeConfig(*one) for one in grid], costs, batch))
    plain = Config(TreeConfig(4, 6, 40), depth=4)
    papers, ours = rate_of(plain), rate_of(replace(plain, utility="net_gain"))
    assert papers > 0.9 * fixed and ours > 0.99 * fixed, (papers, ours, fixed)
    if batch > 1:
        assert papers > 1.1 * rate(TreeConfig(4, 6, 40))
        untuned = cast.with_running_speedup(others, costs, plain, batch)
        assert rate(cast.shaped(costs, untuned)) < 0.93 * fixed, "layer sums alone draft too much"


def test_the_fastest_fixed_tree_is_found_and_of_equals_the_smallest(traces):
    costs = table_of()
    trees = [TreeConfig(*one) for one in product((0, 1, 3), (2, 5), (2, 6, 12))]
    rate = {
        tree: replay.tokens_per_second(replay.replay(traces, tree, costs, method=""))
        for tree in trees
    }
    assert rate[replay.fastest(traces, trees, costs, 1)] == max(rate.values())
    free = table_of(lambda b, c, n: 10.0, lambda b, c, n: 0.0)
    same = [TreeConfig(0, 2, 3), TreeConfig(0, 2, 9)]  # two candidates are all there are
    assert replay.fastest(traces, same, free, 1) == same[0]
