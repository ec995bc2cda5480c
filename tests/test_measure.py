"""One ruler for every method: what is counted, what is kept, and what is caught."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from specrepro import decoding, losslessness, measure, provenance, rows, target_model
from specrepro.decoding import Autoregressive, decode
from specrepro.draft_tree import DraftTree
from specrepro.measure import AUTOREGRESSIVE, GENERATE, Record, compare, read_records
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict

LEVELS = 3
QUESTIONS = [
    ("q0", [10, 20, 30, 40]),
    ("q1", [50, 60, 70]),
    ("q2", [15, 25, 35, 45, 55]),
    ("q3", [80, 33, 21]),
]
HERE = {"target": "tiny", "device": "a CPU", "threads": 1, "dtype": "float32", "commit": "c0ffee"}
TOO_LONG = [7] * 600

pytestmark = pytest.mark.filterwarnings("ignore:the load average is")


@pytest.fixture(scope="module")
def target(tiny_target_folder: Callable[..., Path]) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32")


class Chain:
    """Drafts `LEVELS` tokens of a known continuation, with every `wrong_every`-th one spoilt."""

    max_nodes = LEVELS + 1

    def __init__(self, target: Target, wrong_every: int = 0, num_ahead: int = 40):
        self.target, self.wrong_every, self.num_ahead = target, wrong_every, num_ahead

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, taps: Tensor) -> None:
        known = [row[:n] for row, n in zip(prompts.tolist(), lengths.tolist(), strict=True)]
        room = min(self.num_ahead, self.target.max_context - prompts.shape[1])
        self.ahead = torch.tensor([self._continuation(tuple(prompt), room) for prompt in known])
        self.ahead = torch.nn.functional.pad(self.ahead, (0, LEVELS + 1))
        self.places, self.roots = torch.zeros(len(known), dtype=torch.long), roots

    @cache  # noqa: B019
    def _continuation(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        return decode(self.target, Autoregressive(), prompt, num_tokens, ignore_stop=True).tokens

    def propose(self) -> DraftTree:
        places = self.places[:, None] + torch.arange(1, LEVELS + 1)
        drafted = self.ahead.gather(1, places)
        if self.wrong_every:
            drafted = torch.where(places % self.wrong_every == 0, (drafted + 1) % 90, drafted)
        return DraftTree.chain(torch.cat([self.roots[:, None], drafted], 1))

    def observe(self, verdict: Verdict, taps: Tensor) -> None:
        self.roots, self.places = verdict.bonus, self.places + verdict.num_accepted + 1

    def select(self, rows: Tensor) -> None:
        self.ahead, self.places, self.roots = self.ahead[rows], self.places[rows], self.roots[rows]


def run(target: Target, path: Path, methods=None, questions=QUESTIONS, **options) -> list[Record]:
    options = {"prompts": "chat", "max_new_tokens": 21, **options}
    methods = {"perfect": Chain(target)} if methods is None else methods
    return compare(target, methods, questions, path=path, **options)


def table(records: list[Record]):
    found = rows.rows_of(records, HERE, "smoke")
    return found[found["quantity"] == "decode"].set_index(["method", "prompts"])


def record(method: str, prompt_id: str, rounds: list[int], seconds: float | None, **more) -> Record:
    """A record made by hand: `rounds` are the numbers of accepted tokens, of three drafted."""
    num = 1 + sum(rounds) + len(rounds)
    drafted = [0 if method == AUTOREGRESSIVE else 3] * len(rounds)
    fixed = {"prompts": "chat", "temperature": 0.0, "seed": 0, "batch": 1, "repeat": 0}
    fixed |= {"group": prompt_id, "max_new_tokens": 99, "top_p": 1.0, "top_k": 0, "target": "tiny"}
    fixed |= {"dtype": "float32", "new_tokens": num, "tokens": list(range(num)), "seconds": seconds}
    fixed |= {"prefill_seconds": 0.1, "target_passes": len(rounds)}
    lists = {"accepted": rounds, "drafted": drafted}
    return Record(method=method, prompt_id=prompt_id, **(fixed | lists | more))


def test_autoregressive_tau_and_speedup_are_exactly_one(target, tmp_path) -> None:
    row = table(run(target, tmp_path / "r.jsonl")).loc[(AUTOREGRESSIVE, "chat")]
    assert [row[name] for name in ("tau", "tau_low", "tau_high")] == [1.0, 1.0, 1.0]
    assert [row[name] for name in ("speedup", "speedup_low", "speedup_high")] == [1.0, 1.0, 1.0]
    assert np.isnan(row["tau_per_round"]), "it never drafted"


def test_perfect_drafter_has_tau_of_its_levels_and_the_bonus(target, tmp_path) -> None:
    # 21 tokens: one of the prefill and five whole rounds of four
    records = run(target, tmp_path / "r.jsonl")
    row = table(records).loc[("perfect", "chat")]
    assert row["tau"] == row["tau_per_round"] == row["tau_per_request"] == LEVELS + 1
    assert row["new_tokens"] == 21 * len(QUESTIONS) and row["target_passes"] == 5 * len(QUESTIONS)


def test_rounds_add_up_to_the_tokens_emitted_before_truncation(target, tmp_path) -> None:
    records = run(target, tmp_path / "r.jsonl", {"half": Chain(target, 2), "all": Chain(target)})
    cut = run(target, tmp_path / "s.jsonl", {"all": Chain(target)}, max_new_tokens=20)
    drafted = [one for one in records + cut if one.method != AUTOREGRESSIVE]
    for one in drafted:
        emitted = 1 + sum(num + 1 for num in one.accepted)
        assert 0 <= emitted - one.new_tokens <= LEVELS
        assert 1 + sum(one.emitted) == one.new_tokens == len(one.tokens)
    assert len({one.new_tokens - sum(n + 1 for n in one.accepted) for one in drafted}) > 1


def test_a_truncated_last_round_lowers_tau(target, tmp_path) -> None:
    row = table(run(target, tmp_path / "r.jsonl", max_new_tokens=20)).loc[("perfect", "chat")]
    assert row["tau"] == pytest.approx(19 / 5)


@pytest.mark.parametrize("batch", [1, 3])
def test_second_baseline_counts_the_same_tokens(tiny_target_folder, tmp_path, batch) -> None:
    first = target_model.load(str(tiny_target_folder()), dtype="float32")
    stop = decode(first, Autoregressive(), QUESTIONS[0][1], 12).tokens[7]
    target = target_model.load(str(tiny_target_folder("llama", stop)), dtype="float32")
    own = target.model.generation_config
    own.repetition_penalty = 9.0  # what a published generation config may hold
    records = run(target, tmp_path / "r.jsonl", {GENERATE: None}, batch=batch)
    tokens = {name: [r.tokens for r in records if r.method == name] for name in (GENERATE,)}
    ours = [r.tokens for r in records if r.method == AUTOREGRESSIVE]
    assert tokens[GENERATE] == ours and ours[0][-1] == stop and len(ours[0]) <= 8
    assert table(records).loc[(GENERATE, "chat"), "tau"] == 1.0
    assert target.model.generation_config is own, "the model's own settings were not put back"
    assert target.model.config._attn_implementation == target_model.ATTENTION


def test_a_method_is_run_untimed_once_in_a_process(tmp_path, tiny_target_folder, monkeypatch):
    """Not for every prompt set; but again for another batch size, and where it samples."""
    target, made = target_model.load(str(tiny_target_folder()), dtype="float32"), []
    monkeypatch.setattr(measure, "decode", lambda *a, **k: made.append(a[3]) or decode(*a, **k))
    cases = [("chat", 0.0, 1), ("maths", 0.0, 1), ("chat", 1.0, 1), ("maths", 0.0, 2)]
    for name, temperature, batch in cases:
        compare(
            target, {}, QUESTIONS[:2], prompts=name, path=tmp_path / "records.jsonl",
            temperature=temperature, max_new_tokens=20, batch=batch,
        )  # fmt: skip
    assert made == [16, 20, 20, 20, 20, 16, 20, 20, 16, 20]


def test_methods_take_turns_prompt_by_prompt(target, tmp_path) -> None:
    run(target, tmp_path / "r.jsonl", repeats=2)
    found = [(r.prompt_id, r.repeat, r.method) for r in read_records(tmp_path / "r.jsonl")]
    methods = (AUTOREGRESSIVE, "perfect")
    turns = [(place, q, n) for place, (q, _) in enumerate(QUESTIONS) for n in (0, 1)]
    # what a new prompt costs whoever comes first must not fall on one method alone
    assert found == [
        (q, n, m) for place, q, n in turns for m in methods[:: 1 - (place + n) % 2 * 2]
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_resuming_measures_only_the_rest_and_ends_with_the_same_records(
    target, tmp_path, batch
) -> None:
    options = {"temperature": 1.0, "batch": batch, "methods": {"half": Chain(target, 2)}}
    whole = run(target, tmp_path / "whole.jsonl", **options)
    broken = tmp_path / "broken.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    resumed = run(target, broken, **options)
    assert broken.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert len(read_records(broken)) == len(whole)
    names = ("method", "prompt_id", "seed", "group", "tokens", "accepted", "drafted")
    assert [[getattr(r, name) for name in names] for r in resumed] == [
        [getattr(r, name) for name in names] for r in whole
    ]
    options["methods"] = {"half": lambda: pytest.fail("nothing is left to measure")}
    assert run(target, broken, **options) == resumed


def test_an_interruption_loses_no_finished_prompt(target, tmp_path) -> None:
    class Interrupted(Chain):
        def begin(self, prompts: Tensor, *others: Tensor) -> None:
            if prompts[0, 0] == QUESTIONS[2][1][0]:
                raise KeyboardInterrupt
            super().begin(prompts, *others)

    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path / "r.jsonl", {"drafted": Interrupted(target)})
    done = Counter(r.method for r in read_records(tmp_path / "r.jsonl"))
    assert done == {AUTOREGRESSIVE: 3, "drafted": 2}


def test_records_of_another_setting_are_refused(target, tmp_path) -> None:
    run(target, tmp_path / "r.jsonl", questions=QUESTIONS[:1])
    with pytest.raises(ValueError, match="max_new_tokens 21, but this run has 8"):
        run(target, tmp_path / "r.jsonl", questions=QUESTIONS[:1], max_new_tokens=8)


def test_a_torn_line_is_cut_off_when_the_file_is_reopened(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    one, two = record("A", "q0", [1], 1.0), record("A", "q1", [2], 2.0)
    measure.append_record(path, one)
    path.write_bytes(path.read_bytes() + b'{"method": "A", "promp')
    assert read_records(path) == [one]
    measure.append_record(path, two)
    assert read_records(path) == [one, two]


def test_a_broken_line_inside_a_file_is_named(tmp_path) -> None:
    (tmp_path / "r.jsonl").write_text('{"method": "A"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1 is not a record"):
        read_records(tmp_path / "r.jsonl")


def test_a_failed_prompt_is_a_row_that_says_so_and_counts_nowhere_else(target, tmp_path) -> None:
    questions = [("long", TOO_LONG), *QUESTIONS]
    found = rows.rows_of(run(target, tmp_path / "r.jsonl", questions=questions), HERE, "smoke")
    failed = found[found["quantity"] == "failed"]
    assert set(failed["method"]) == {AUTOREGRESSIVE, "perfect"}
    assert failed["detail"].str.contains("600 tokens").all() and failed["tau"].isna().all()
    kept = found[found["quantity"] == "decode"]
    assert (kept["num_prompts"] == len(QUESTIONS)).all() and (kept["num_failed"] == 1).all()
    assert set(kept.set_index("method")["tau"]) == {1.0, LEVELS + 1}


def test_our_own_mistakes_are_not_recorded_as_failed_prompts(target, tmp_path) -> None:
    class Broken(Chain):
        def propose(self) -> DraftTree:
            raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        run(target, tmp_path / "r.jsonl", {"broken": Broken(target)})


def test_a_prompt_that_one_method_failed_is_left_out_for_both() -> None:
    records = [record(AUTOREGRESSIVE, f"q{i}", [0] * 4, 4.0 + i) for i in range(3)]
    records += [record("M", f"q{i}", [3], 1.0) for i in range(2)]
    empty = {"new_tokens": None, "tokens": [], "prefill_seconds": None, "target_passes": None}
    records.append(record("M", "q2", [], None, **empty, error="ValueError: no"))
    row = table(records).loc[("M", "chat")]
    assert row["speedup"] == pytest.approx((10 / 2) / (10 / 9.0))
    assert row["num_prompts"] == 2 and row["num_failed"] == 1


def test_speedups_are_ratios_of_totals_with_prefill_in_and_out() -> None:
    records = [record(AUTOREGRESSIVE, "q0", [0] * 8, 8.1), record("M", "q0", [3, 3], 2.1)]
    records += [record(AUTOREGRESSIVE, "q1", [0] * 2, 2.1), record("M", "q1", [1], 2.1)]
    row = table(records).loc[("M", "chat")]
    assert row["speedup"] == pytest.approx((12 / 4.2) / (12 / 10.2))
    assert row["speedup_decode"] == pytest.approx(10.0 / 4.0)
    assert row["speedup_mean_of_prompts"] == pytest.approx((8.1 / 2.1 + 1.0) / 2)
    assert row["tau"] == pytest.approx(10 / 3) and row["tau_per_request"] == pytest.approx(3)


def test_a_repeated_prompt_counts_once_with_its_median_time() -> None:
    records = [record(AUTOREGRESSIVE, "q0", [0] * 4, s, repeat=i) for i, s in enumerate((2, 90, 4))]
    records += [record("M", "q0", [3], s, repeat=i) for i, s in enumerate((1, 50, 2))]
    row = table(records).loc[("M", "chat")]
    assert row["speedup"] == pytest.approx(2.0) and row["new_tokens"] == 5
    assert row["num_prompts"] == 1 and np.isnan(row["speedup_low"]), "one prompt has no interval"


def simulated(seed: int, num_prompts: int = 40, prompts: str = "chat") -> list[Record]:
    """Prompts whose true ratio of totals is 2: noisy lengths, and times noisy in both arms."""
    random = np.random.default_rng(seed)
    records = []
    for i in range(num_prompts):
        num_rounds, slowness = int(random.integers(5, 40)), random.lognormal(0, 0.4)
        for method, rate in ((AUTOREGRESSIVE, 1.0), ("M", 2.0)):
            seconds = (num_rounds + 1) * slowness * random.uniform(0.7, 1.3) / rate
            rounds = [0] * num_rounds
            records.append(record(method, f"q{i}", rounds, seconds, prompts=prompts))
    return records


def test_bootstrap_interval_covers_the_true_speedup_about_95_times_in_100() -> None:
    num_covered = 0
    for seed in range(60):
        row = table(simulated(seed)).loc[("M", "chat")]
        num_covered += row["speedup_low"] <= 2.0 <= row["speedup_high"]
        assert row["speedup_low"] < row["speedup"] < row["speedup_high"]
    assert 52 <= num_covered <= 59, f"{num_covered} of 60 intervals cover the true value"


@pytest.mark.parametrize("num_sets", [1, 5])
def test_intervals_over_the_four_prompts_of_a_set_cover_as_often(num_sets) -> None:
    name = "chat" if num_sets == 1 else "mean"
    num_covered = 0
    for seed in range(60):
        sets = [
            simulated(seed * num_sets + i, num_prompts=4, prompts="chat" if i == 0 else f"set {i}")
            for i in range(num_sets)
        ]
        row = table([r for one in sets for r in one]).loc[("M", name)]
        num_covered += row["speedup_low"] <= 2.0 <= row["speedup_high"]
    assert 52 <= num_covered <= 59, f"{num_covered} of 60 intervals cover the true value"


def test_sets_of_two_prompts_have_an_interval_together_unless_one_of_them_decides() -> None:
    names, ends = ("chat", "maths", "logic", "code", "stories"), ["speedup_low", "speedup_high"]
    sets = [simulated(20 + i, num_prompts=2, prompts=name) for i, name in enumerate(names)]
    found = table([r for one in sets for r in one])
    assert found.loc[("M", "chat"), ends].isna().all()
    assert found.loc[("M", "mean"), ends].notna().all()
    next(r for r in sets[0] if r.method == "M").seconds /= 100
    found = table([r for one in sets for r in one])
    assert found.loc[("M", "mean"), ends].isna().all(), "its spread is that of two prompts"
    differences = rows.paired_differences(sets[0], [("M", AUTOREGRESSIVE)])
    assert differences["value"].notna().all() and differences["value_low"].isna().all()
    assert np.isnan(rows.bootstrap(np.ones((2, 1)))).all()


def test_widened_totals_keep_sums_that_are_none_or_negative() -> None:
    sums = np.array([[1.0, 0.0, -1.0], [2.0, 0.0, 3.0], [4.0, 0.0, 1.0]])
    draws = rows.bootstrap(sums)
    assert np.isfinite(draws).all() and (draws[:, 0] > 0).all() and not draws[:, 1].any()
    assert np.median(draws[:, 2]) == pytest.approx(3.0, abs=1.0) and draws[:, 2].min() < -3.0


def test_pairing_keeps_differences_between_prompts_out_of_the_interval() -> None:
    row = table(simulated(0)).loc[("M", "chat")]
    paired, alone = (
        (row[f"{metric}_high"] - row[f"{metric}_low"]) / row[metric]
        for metric in ("speedup", "tokens_per_second")
    )
    assert paired < 0.6 * alone, f"{paired:.3f} of the speedup, {alone:.3f} of tokens per second"


def test_mean_row_averages_the_prompt_sets_and_resamples_within_them() -> None:
    easy = [record("M", f"q{i}", [3], 1.0, prompts="maths") for i in range(5)]
    easy += [record(AUTOREGRESSIVE, f"q{i}", [0] * 4, 4.0, prompts="maths") for i in range(5)]
    rows_found = table(simulated(1) + easy)
    mean, chat, maths = (rows_found.loc[("M", name)] for name in ("mean", "chat", "maths"))
    assert mean["tau"] == pytest.approx((chat["tau"] + maths["tau"]) / 2)
    assert mean["num_prompts"] == 45 and maths["speedup_low"] == maths["speedup_high"] == 4.0
    half_width = (chat["speedup_high"] - chat["speedup_low"]) / 2
    assert mean["speedup_high"] - mean["speedup_low"] == pytest.approx(half_width, rel=0.01)


def test_a_method_that_lacks_a_prompt_set_has_no_mean() -> None:
    other = [record(AUTOREGRESSIVE, "q0", [0], 1.0, prompts="maths")]
    found = table(simulated(1) + other)
    assert ("M", "mean") not in found.index and (AUTOREGRESSIVE, "mean") in found.index
    assert ("M", "mean") not in table(simulated(1)).index, "one set has no mean beside it"


def test_paired_difference_is_tighter_than_two_intervals_apart() -> None:
    records = simulated(3)
    better = [r for r in records if r.method == "M"]
    records += [record("N", r.prompt_id, r.accepted, r.seconds * 0.95) for r in better]
    differences = rows.paired_differences(records).set_index(["method", "versus", "metric"])
    there = differences.loc[("N", "M", "speedup")]
    back = differences.loc[("M", "N", "speedup")]
    assert there["value_low"] > 0 and there["value"] == -back["value"]
    apart = table(records)
    assert apart.loc[("M", "chat"), "speedup_high"] > apart.loc[("N", "chat"), "speedup_low"]
    chosen = rows.paired_differences(records, [("N", "M")], ["tau"])
    assert len(chosen) == 1 and (chosen["quantity"] == "paired_difference").all()


def test_a_gain_less_another_gain_is_paired_over_the_prompts_of_all_four() -> None:
    base = simulated(3)
    ours = [r for r in base if r.method == "M"]
    records = list(base)
    for name, seconds in (("M+", 0.8), ("N", 1.0), ("N+", 0.9)):
        records += [record(name, r.prompt_id, r.accepted, r.seconds * seconds) for r in ours]
    (tau, speedup) = rows.paired_gains(records, ("M+", "M"), ("N+", "N")).to_dict("records")
    assert (tau["metric"], tau["value"], tau["quantity"]) == ("tau", 0.0, "paired_gain")
    of = table(records)["speedup"]
    gain, other = (of[f"{m}+", "chat"] - of[m, "chat"] for m in "MN")
    assert speedup["value"] == pytest.approx(gain - other)
    assert 0 < speedup["value_low"] < speedup["value"] < speedup["value_high"]
    fewer = [r for r in records if r.method != "N" or r.prompt_id != ours[0].prompt_id]
    found = rows.paired_gains(fewer, ("M+", "M"), ("N+", "N"))
    assert (found["num_prompts"] == len(ours) - 1).all(), "a prompt that one lacks counts for none"
    assert rows.paired_gains(base, ("M+", "M"), ("N+", "N")).empty


def test_acceptance_at_a_depth_is_given_that_those_above_were_accepted() -> None:
    rounds = [0, 3, 2], [1, 3], [3, 0, 1]
    records = [record("M", f"q{i}", accepted, 1.0) for i, accepted in enumerate(rounds)]
    found = rows.acceptance_by_depth(records, fewest_rounds=1).set_index("depth")
    assert found["num_rounds"].to_dict() == {1: 8, 2: 6, 3: 4}
    assert found["value"].to_dict() == {1: 6 / 8, 2: 4 / 6, 3: 3 / 4}
    assert (found["value_low"] <= found["value"]).all()
    deeper = rows.acceptance_by_depth(records, levels=5, fewest_rounds=1)["depth"]
    assert deeper.max() == 3, "three drafted tokens reach no fourth depth"
    told = rows.acceptance_by_depth(records, fewest_rounds=5)["depth"].tolist()
    assert told == [1, 2], "four rounds are no share of anything"


def test_acceptance_by_depth_is_compared_on_the_same_prompts() -> None:
    """One method is right a little more often on every prompt, and prompts differ by much more."""
    draws, records = np.random.default_rng(0), []
    for prompt in range(12):
        right = draws.uniform(0.2, 0.7)
        for method, more in (("A", 0.1), ("B", 0.0)):
            accepted = (draws.uniform(size=400) < right + more).astype(int).tolist()
            records.append(record(method, f"q{prompt}", accepted, 1.0))
    one = rows.paired_by_depth(records, [("A", "B")], levels=1).iloc[0]
    shuffled = [records[i] for i in draws.permutation(len(records))]
    again = rows.paired_by_depth(shuffled, [("A", "B")], levels=1).iloc[0]
    values = ["value", "value_low", "value_high"]
    assert (one[values] == again[values]).all(), "the order of records is no matter"
    assert 0.05 < one["value_low"] < one["value"] < one["value_high"] < 0.15
    apart = rows.acceptance_by_depth(records).set_index("method")
    assert apart.loc["A", "value_low"] < apart.loc["B", "value_high"], "apart they overlap"
    assert one["value"] == apart.loc["A", "value"] - apart.loc["B", "value"]
    back = rows.paired_by_depth([*records, record("A", "new", [1], 1.0)], [("B", "A")], levels=1)
    assert back["value"].item() == -one["value"] and back["num_prompts"].item() == 12


def test_parts_of_a_round_add_up_to_its_wall_time(target, tmp_path) -> None:
    for batch in (1, 4):
        records = run(target, tmp_path / f"{batch}.jsonl", batch=batch)
        found = rows.round_parts(records)
        mine = found[found["method"] == "perfect"].set_index("part")["value"]
        assert set(mine.index) == {"target", "draft", "verify", "rest"} and (mine > 0).all()
        drafted = [r for r in records if r.method == "perfect"]
        wall = sum(r.seconds - r.prefill_seconds for r in drafted)
        num_rounds = sum(r.target_passes for r in drafted) / batch
        assert mine.sum() == pytest.approx(1e3 * wall / num_rounds)


def test_costs_have_a_row_per_size_and_cover_whole_trees(target) -> None:
    passes = measure.pass_cost(target, (1, 8), prefix=16, repeats=3)
    assert passes["num_tokens"].tolist() == [1, 8] and (passes["value"] > 0).all()
    assert (passes["value_low"] <= passes["value"]).all()
    with pytest.raises(ValueError, match="holds 512"):
        measure.pass_cost(target, (1, 64), prefix=500)
    drafting = measure.drafter_cost(target, "chain", Chain(target), [5, 6], repeats=6).iloc[0]
    assert drafting["num_tokens"] == LEVELS + 1 and drafting["repeats"] >= 6


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    assert rows.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert rows.repetition([1] * 8) == pytest.approx(4 / 5)
    assert rows.repetition([1, 2, 3]) == 0.0


def test_split_by_repetition_follows_the_baseline_output() -> None:
    records = []
    for i, texts in enumerate(([1] * 9, list(range(9)), [1, 2] * 5, list(range(9, 18)))):
        passes = [0] * (len(texts) - 1)
        records.append(record(AUTOREGRESSIVE, f"q{i}", passes, 1.0, tokens=texts))
        records.append(record("M", f"q{i}", [3, 3] if i in (0, 2) else [0, 0], 1.0))
    found = rows.split_by_repetition(records)
    assert set(found["quantity"]) == {"decode_by_repetition"}
    tau = found[found["method"] == "M"].set_index("repetition")["tau"]
    assert tau.to_dict() == {"low": 1.0, "high": 4.0}


def test_methods_that_do_not_lie_are_lossless_in_float32(target) -> None:
    methods = {"perfect": Chain(target), "wrong": Chain(target, 1), GENERATE: None}
    found = losslessness.losslessness(
        target, methods, QUESTIONS, prompts="chat", max_new_tokens=20, batch=2
    )
    assert set(found["method"]) == {AUTOREGRESSIVE, "perfect", "wrong"}
    assert set(found["temperature"]) == {0.0, 1.0} and (found["value"] == 0).all()
    assert (found["num_prompts"] == len(QUESTIONS)).all() and (found["dtype"] == "float32").all()
    assert (found["detail"] == "").all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_token_that_was_accepted_is_caught_and_placed(
    target, monkeypatch, temperature
) -> None:
    name = "verify_sample" if temperature else "verify_greedy"
    honest = getattr(decoding, name)

    def lies_about_drafts(tree: DraftTree, scores: object, **randomness: Tensor) -> Verdict:
        verdict = honest(tree, scores, **randomness)
        if tree.tokens.shape[1] > 1:
            verdict.bonus[:] = (verdict.bonus + 1) % 90
            verdict.tokens.scatter_(1, verdict.num_accepted[:, None], verdict.bonus[:, None])
        return verdict

    monkeypatch.setattr(decoding, name, lies_about_drafts)
    found = losslessness.losslessness(
        target, {"lies": Chain(target, 1)}, QUESTIONS, prompts="chat", max_new_tokens=8
    ).set_index(["method", "temperature"])
    assert found.loc[("lies", temperature), "value"] == len(QUESTIONS)
    assert "q0 at new token 1:" in found.loc[("lies", temperature), "detail"]
    assert found.loc[("lies", 1.0 - temperature), "value"] == 0
    assert (found.loc[AUTOREGRESSIVE, "value"] == 0).all()


@pytest.mark.parametrize("bound", [0.0, 1e6])
def test_a_sampled_parting_is_excused_by_a_near_tie_and_a_greedy_one_by_nothing(
    target, monkeypatch, bound
) -> None:
    def shifted(honest: Callable) -> Callable:
        def lies_about_drafts(tree: DraftTree, at: Callable, **randomness: Tensor) -> Verdict:
            shift = int(tree.tokens.shape[1] > 1)
            return honest(tree, lambda nodes: at(nodes).roll(shift, -1), **randomness)

        return lies_about_drafts

    monkeypatch.setattr(losslessness, "near_tie_bound", lambda _: bound)
    monkeypatch.setattr(decoding, "verify_sample", shifted(decoding.verify_sample))
    honest = decoding.verify_greedy
    monkeypatch.setattr(
        decoding,
        "verify_greedy",
        lambda tree, at: honest(tree, lambda n: (at(n) + (tree.tokens.shape[1] > 1)) % 90),
    )
    found = losslessness.losslessness(
        target, {"lies": Chain(target, 1)}, QUESTIONS, prompts="chat", max_new_tokens=8
    ).set_index(["method", "temperature"])
    sampled, greedy = found.loc[("lies", 1.0)], found.loc[("lies", 0.0)]
    assert sampled["num_divergences"] == greedy["num_divergences"] == len(QUESTIONS)
    assert sampled["value"] == (0 if bound else len(QUESTIONS)) and ", gap " in sampled["detail"]
    assert greedy["value"] == len(QUESTIONS) and ", gap " not in greedy["detail"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_wrong_drafts_are_refused_and_change_nothing(target, temperature) -> None:
    prompts, options = [ids for _, ids in QUESTIONS], {"temperature": temperature, "seed": 2}
    alone = decode(target, Autoregressive(), prompts, 12, **options)
    wrong = decode(target, losslessness.WrongDrafts(), prompts, 12, **options)
    assert [run.tokens for run in wrong] == [run.tokens for run in alone]
    assert all(set(run.drafted) == {9} for run in wrong)
    assert sum(sum(run.accepted) for run in wrong) <= 0.1 * sum(run.num_passes for run in wrong)


def test_an_early_end_is_a_divergence() -> None:
    parted = losslessness.first_divergence("q0", [1, 2, 3], [1, 2])
    assert str(parted) == "q0 at new token 2: the end instead of 3"
    assert losslessness.first_divergence("q0", [1, 2], [1, 2]) is None


def test_half_precision_excuses_near_ties_and_nothing_else(tiny_target_folder, monkeypatch) -> None:
    half = target_model.load(str(tiny_target_folder()), dtype="bfloat16")
    honest = decoding.verify_greedy

    def lies_about_drafts(tree: DraftTree, choice: Callable[[Tensor], Tensor]) -> Verdict:
        is_drafted = tree.tokens.shape[1] > 1
        return honest(tree, lambda nodes: (choice(nodes) + is_drafted) % 90)

    monkeypatch.setattr(decoding, "verify_greedy", lies_about_drafts)
    methods = {"lies": Chain(half)}
    strict, lenient = (
        losslessness.losslessness(
            half, methods, QUESTIONS, prompts="chat", max_new_tokens=8, bound=bound
        )
        for bound in (0.0, 1e6)
    )
    summary = strict[strict["quantity"] == "near_tie"].iloc[0]
    each = strict[strict["quantity"] == "divergence"]
    assert (each["gap"] > 0).all() and summary["gap"] == each["gap"].max()
    assert summary["value"] == summary["num_divergences"] == len(each) == len(QUESTIONS)
    assert lenient[lenient["quantity"] == "near_tie"]["value"].item() == 0
    base = decode(half, Autoregressive(), QUESTIONS[0][1], 8, record_gaps=True)
    assert each.iloc[0]["gap"] == base.gaps[each.iloc[0]["place"].astype(int)]


def test_a_tie_excuses_the_two_that_are_tied_and_no_third_token(
    tiny_target_folder, monkeypatch
) -> None:
    half = target_model.load(str(tiny_target_folder()), dtype="bfloat16")
    baseline = decode(half, Autoregressive(), QUESTIONS[0][1], 8, record_gaps=True)
    bound = max(baseline.gaps)  # as if every place were a tie

    def least(logits: Tensor) -> Tensor:
        return logits.float().argmin(-1)

    class Worst(Chain):
        def judge(self, tree: DraftTree, scores: object, *_: object) -> Verdict:
            return decoding.verify_greedy(tree, least(scores.logits))

    audited = losslessness.losslessness(
        half, {"worst": Worst(half), "honest": Chain(half, 1)}, QUESTIONS[:1],
        prompts="chat", max_new_tokens=8, bound=bound,
    )  # fmt: skip
    found = audited[audited["quantity"] == "near_tie"].set_index("method")
    assert found.loc["worst", "shortfall"] > bound >= found.loc["worst", "gap"]
    assert found.loc["worst", "value"] == 1 and "below the best" in found.loc["worst", "detail"]
    assert found.loc["honest", "value"] == 0 and found.loc["honest", "shortfall"] <= 0.5


def test_rows_carry_the_fixed_columns_and_where_they_come_from(target, tmp_path) -> None:
    here = rows.environment(target)
    found = rows.rows_of(run(target, tmp_path / "r.jsonl"), here, "smoke", paper="eagle3")
    assert list(found.columns[: len(rows.COLUMNS)]) == rows.COLUMNS
    assert set(found["paper"]) == {"eagle3"} and set(found["source"]) == {rows.MEASURED_NOW}
    assert set(found["dtype"]) == {"float32"} and found["device"].str.len().gt(0).all()
    assert "/" not in here["target"], "a folder's path means nothing elsewhere"
    json.dumps(here)


def test_rows_are_of_the_code_that_decoded_whatever_code_adds_them_up(
    target, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "older")
    monkeypatch.setattr(provenance, "now", lambda: "2026-01-01T00:00:00+00:00")
    records = run(target, tmp_path / "r.jsonl")
    here = rows.environment(target) | {"commit": "newer", "when": "2026-02-02T00:00:00+00:00"}
    found = rows.rows_of(read_records(tmp_path / "r.jsonl"), here, "smoke", paper="eagle3")
    assert set(found["commit"]) == {"older"} and set(found["when"].str[:10]) == {"2026-01-01"}
    records[-1].commit, records[-1].when = "newer", "2026-01-03T00:00:00+00:00"
    both = rows.rows_of(records, here, "smoke", paper="eagle3")
    assert set(both["commit"]) == {"older and newer"}
    assert set(both["when"].str[:10]) == {"2026-01-03"}


def test_commit_is_empty_outside_a_repository(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit.__wrapped__() == ""


def test_a_machine_that_others_use_is_noted(monkeypatch) -> None:
    monkeypatch.setattr(measure.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (2.2, 9.0, 9.0))
    assert measure.load_average_warning() is None
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (3.4, 0.0, 0.0))
    assert "3.4" in measure.load_average_warning()
