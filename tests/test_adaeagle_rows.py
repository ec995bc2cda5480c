"""AdaEAGLE's accounts add up as Table 2 does, and replays of lengths are what decoding does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from tree_drafters import Knowing, table_of

from specrepro import adaeagle, adaeagle_rows, claims, measure, replay, target_model
from specrepro.adaeagle import Drafter, Fixed, Known, Predicted, Predictor, PredictorConfig
from specrepro.adaeagle_rows import ALL, FIXED, AtPlaces
from specrepro.decoding import decode, decode_autoregressively
from specrepro.eagle3 import TreeConfig
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.replay import Trace
from specrepro.target_model import Target

QUESTIONS = [("a", [10, 20, 30, 40]), ("b", [50, 60, 70]), ("c", [15, 25, 35, 45, 55, 65])]
NUM_NEW, MOST, THRESHOLD = 24, 6, -0.4
NUMBERS = range(1, MOST + 1)
Answers = dict[tuple[int, ...], list[int]]


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def answers(target) -> Answers:
    asked = [ids for _, ids in QUESTIONS]
    said = decode_autoregressively(target, asked, max_new_tokens=NUM_NEW + 10)
    return {tuple(ids): one.tokens for ids, one in zip(asked, said, strict=True)}


@pytest.fixture(scope="module")
def traces(target, answers) -> list[Trace]:
    chain = TreeConfig(MOST - 1, 1, 2)
    return replay.record(
        target, Knowing(answers, 100), QUESTIONS, chain, prompts="chat", max_new_tokens=NUM_NEW
    )


def by_prompt(lengths: AtPlaces) -> dict[tuple[int, ...], Sequence[int]]:
    return {tuple(ids): lengths["chat", name].tolist() for name, ids in QUESTIONS}


@pytest.fixture(scope="module")
def some_lengths(traces) -> AtPlaces:
    """What a predictor might say: nothing at some places."""
    draws = torch.Generator().manual_seed(0)
    return {
        (t.prompts, t.prompt_id): torch.randint(0, MOST + 1, (len(t.drafted),), generator=draws)
        for t in traces
    }


@pytest.fixture(scope="module")
def records(target, answers, traces, some_lengths, tmp_path_factory) -> list[Record]:
    def drafter(lengths, most=MOST, threshold=None) -> Drafter:
        return Drafter(Knowing(answers, 100), lengths, most, threshold)

    oracle = by_prompt(adaeagle_rows.oracle_lengths(traces))
    methods = {FIXED.format("EAGLE", n): drafter(Fixed(n), n) for n in NUMBERS}
    methods["Oracle"] = drafter(Known(oracle))
    methods["AdaEAGLE"] = drafter(Known(by_prompt(some_lengths)))
    methods["DDD"] = drafter(Fixed(0), threshold=THRESHOLD)
    methods["AdaEAGLE-DDD"] = drafter(Known(by_prompt(some_lengths)), threshold=THRESHOLD)
    path = tmp_path_factory.mktemp("records") / "decoded.jsonl"
    return measure.compare(
        target, methods, QUESTIONS, prompts="chat", path=path, max_new_tokens=NUM_NEW
    )


@pytest.fixture(scope="module")
def accounts(records) -> pd.DataFrame:
    found = adaeagle_rows.accounts(records)
    return found[found["prompts"] == ALL].set_index("method")


def test_tau_is_one_and_what_of_the_drafts_was_not_wasted(accounts):
    implied = 1 + (accounts["draft_passes"] - accounts["wasted_drafts"]) / accounts["target_passes"]
    assert implied.to_numpy() == pytest.approx(accounts["tau"].to_numpy(), rel=1e-12)
    plain = accounts.loc[AUTOREGRESSIVE, ["tau", "draft_passes", "wasted_drafts"]]
    assert plain.tolist() == [1, 0, 0]
    assert (accounts["wasted_drafts"] >= 0).all() and accounts["tau"].max() > 2


def test_every_method_emits_the_same_tokens_and_drafts_what_its_rounds_say(accounts, records):
    assert accounts["new_tokens"].nunique() == 1
    for number in NUMBERS:
        own = accounts.loc[FIXED.format("EAGLE", number)]
        assert own["draft_passes"] == number * own["target_passes"] and own["mean_length"] == number
    for method, own in accounts.iterrows():
        mine = [record for record in records if record.method == method]
        assert own["draft_passes"] == sum(sum(record.drafted) for record in mine)
        assert own["target_passes"] == sum(len(record.accepted) for record in mine)
        assert own["seconds"] == pytest.approx(sum(record.seconds for record in mine))
        if method != AUTOREGRESSIVE:
            assert 0 < own["draft_seconds"] < own["seconds"] > own["target_seconds"] > 0


def test_the_oracle_wastes_nothing_and_takes_no_more_passes_than_any_length(accounts, records):
    """On every prompt; the lemma's assumption holds for drafts that depend on the place alone."""
    assert accounts.loc["Oracle", "wasted_drafts"] == 0
    passes = {(r.method, r.prompt_id): r.target_passes for r in records}
    for method, prompt_id in passes:
        assert passes["Oracle", prompt_id] <= passes[method, prompt_id], (method, prompt_id)
    fewest = min(accounts.loc[FIXED.format("EAGLE", n), "target_passes"] for n in NUMBERS)
    assert accounts.loc["Oracle", "target_passes"] <= fewest


def test_adaeagle_ddd_takes_no_more_passes_than_ddd(accounts):
    """Its drafts are at least as long everywhere, and DDD's end no sooner when begun later."""
    passes = accounts["target_passes"]
    assert passes["AdaEAGLE-DDD"] <= passes["DDD"] < passes[AUTOREGRESSIVE]


def test_replays_have_the_counts_of_decoding(records, accounts, traces, some_lengths):
    methods = {FIXED.format("EAGLE", n): adaeagle_rows.repeated(n, n) for n in (1, 3, MOST)} | {
        AUTOREGRESSIVE: None,
        "Oracle": adaeagle_rows.recalled(adaeagle_rows.oracle_lengths(traces), MOST),
        "AdaEAGLE": adaeagle_rows.recalled(some_lengths, MOST),
        "DDD": adaeagle_rows.repeated(0, MOST, THRESHOLD),
        "AdaEAGLE-DDD": adaeagle_rows.recalled(some_lengths, MOST, THRESHOLD),
    }
    replayed = adaeagle_rows.replays(traces, methods, table_of())
    decoded = {(r.method, r.prompt_id): r for r in records}
    for one in replayed:
        other = decoded[one.method, one.prompt_id]
        assert one.tokens == other.tokens
        assert one.drafted == other.drafted, (one.method, one.prompt_id)
        # a replay ends with the text, where decoding may have had more right
        assert one.accepted[:-1] == other.accepted[:-1]
    found = adaeagle_rows.accounts(replayed)
    found = found[found["prompts"] == ALL].set_index("method")
    for name in ("tau", "wasted_drafts"):
        assert found[name].to_numpy() == pytest.approx(accounts.loc[found.index, name].to_numpy())


def test_a_longer_draft_than_the_true_length_never_helps_at_that_place(traces):
    for place, lengths in adaeagle_rows.true_lengths(traces).items():
        oracle = adaeagle_rows.oracle_lengths(traces)[place]
        assert (oracle <= lengths).all() and oracle[-1] == 0
        assert torch.equal(oracle[: -MOST - 1], lengths[: -MOST - 1])
        assert len(lengths.unique()) > 2


def test_outputs_at_places_are_what_decoding_wants_there(target, answers, traces):
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(target.hidden_size, 16))
    with torch.no_grad():
        predictor.last.weight.mul_(8), predictor.last.bias.fill_(2.0)
    lengths = {
        (t.prompts, t.prompt_id): adaeagle.lengths_of(
            adaeagle_rows.outputs_at(predictor, target, ids, t), MOST
        )
        for t, (_, ids) in zip(traces, QUESTIONS, strict=True)
    }
    drafter = Drafter(Knowing(answers, 100), Predicted(predictor, target, MOST), MOST)
    replayed = adaeagle_rows.replays(
        traces, {"AdaEAGLE": adaeagle_rows.recalled(lengths, MOST)}, table_of()
    )
    for (_, ids), one in zip(QUESTIONS, replayed, strict=True):
        run = decode(target, drafter, ids, max_new_tokens=NUM_NEW)
        assert run.drafted == one.drafted
    assert len({number for one in replayed for number in one.drafted}) > 2


def test_the_bar_is_the_best_fixed_length_with_hindsight_on_the_same_prompts(records, accounts):
    found = adaeagle_rows.headroom(records, ["AdaEAGLE", "Oracle"]).set_index("method")
    rates = accounts["tokens_per_second"]
    best = max((FIXED.format("EAGLE", n) for n in NUMBERS), key=lambda name: rates[name])
    assert set(found["versus"]) == {best}
    for method in ("AdaEAGLE", "Oracle"):
        assert found.loc[method, "value"] == pytest.approx(rates[method] / rates[best] - 1)
        low, high = found.loc[method, ["value_low", "value_high"]]
        assert low <= found.loc[method, "value"] <= high


def timed(method: str, prompt_id: str, seconds: float) -> Record:
    return Record(
        method=method, prompts="chat", prompt_id=prompt_id, temperature=0.0, seed=0, batch=1,
        repeat=0, group=prompt_id, max_new_tokens=12, top_p=1.0, top_k=0, target="tiny",
        dtype="float32", new_tokens=12, tokens=list(range(12)), seconds=seconds, target_passes=3,
        accepted=[3, 3, 3], drafted=[4, 4, 4],
    )  # fmt: skip


def test_gains_are_those_of_all_prompts_together_on_what_every_method_decoded():
    """EAGLE 2 alone has a fourth prompt; by hand, of 36 tokens each."""
    spent = {
        "EAGLE 2": (2.0, 4.0, 3.0, 50.0), "AdaEAGLE": (2.0, 3.0, 2.5), "Oracle": (1.0, 3.0, 2.0),
    }  # fmt: skip
    records = [
        timed(method, prompt_id, seconds)
        for method, each in spent.items()
        for prompt_id, seconds in zip("abcd", each, strict=False)
    ]
    ours = adaeagle_rows.gain(records, "AdaEAGLE", "EAGLE 2")
    assert ours["value"] == pytest.approx(9 / 7.5 - 1) and ours["num_prompts"] == 3
    assert ours["share"] == pytest.approx((9 / 7.5 - 1) / (9 / 6 - 1))
    assert ours["value_low"] < 0 and ours["value_high"] > 4 / 3 - 1, "three prompts say little"


def test_costs_read_off_table_2_give_its_times_of_a_round():
    reported = claims.reported("adaeagle")
    costs = adaeagle_rows.paper_costs(reported)
    assert costs.is_modelled and 1.0 < costs.cost("level", 1, 0, 1) < 1.54
    table = reported[reported["table"] == "Table 2"].set_index("method")
    for number in (2, 4, 6):
        own = table.loc[FIXED.format("EAGLE", number)]
        round_ms = costs.round(1, 0, 1, [1] * (number - 1), number + 1)
        assert round_ms == pytest.approx(1e3 * own["seconds"] / own["target_passes"], rel=0.02)


def test_break_even_of_an_account_is_that_of_its_costs():
    rows = [
        {"method": f"EAGLE {n}", "draft_seconds": 0.0015 * n * 100, "draft_passes": n * 100,
         "target_seconds": (0.03 + 0.001 * n) * 100, "target_passes": 100}
        for n in (2, 4, 6)
    ]  # fmt: skip
    rows.append({"method": "AdaEAGLE", "seconds": 4.3, "emitted": 300, "target_passes": 100})
    found = adaeagle_rows.break_even_rows(pd.DataFrame(rows), "AdaEAGLE").set_index("part")
    token = 4.3 / 300
    assert found.loc["drafting alone", "probability"] == pytest.approx(0.0015 / token)
    both = (0.0015 + 0.001) / token
    assert found.loc["drafting and verifying", "probability"] == pytest.approx(both)
    assert found.loc["drafting and verifying", "value"] == pytest.approx((1 - both) / both)


def test_shares_of_lengths_add_up_and_coverage_counts_them():
    true = {("chat", "a"): torch.tensor([0, 2, 2]), ("chat", "b"): torch.tensor([5])}
    wanted = {("chat", "a"): torch.tensor([1, 2, 1]), ("chat", "b"): torch.tensor([5])}
    found = adaeagle_rows.length_rows({"AdaEAGLE": wanted}, true)
    cells = {(row.predicted, row.true): row.value for row in found.itertuples()}
    assert cells == {(1, 0): 0.25, (2, 2): 0.25, (1, 2): 0.25, (5, 5): 0.25}
    (covered,) = adaeagle_rows.coverage_rows({3.0: wanted}, true).to_dict("records")
    assert (covered["value"], covered["expected"], covered["mean_length"]) == (0.75, 0.75, 2.25)


def test_calibration_sets_true_lengths_beside_what_was_predicted():
    predicted = torch.linspace(0, 5, 100)
    found = adaeagle_rows.calibration_rows(
        {("chat", "a"): predicted}, {("chat", "a"): predicted.round()}
    )
    assert len(found) == 10 and (found["num_rounds"] == 10).all()
    assert np.abs(found["predicted"] - found["value"]).max() < 0.3
    assert (found["quantile_high"] >= found["value"]).all()


# --- the paper's own tables


def test_the_papers_accounts_keep_the_identity_but_for_its_oracle():
    table = claims.reported("adaeagle").query("table == 'Table 2'")
    cells = table.set_index("method").drop(AUTOREGRESSIVE)
    implied = 1 + (cells["draft_passes"] - cells["wasted_drafts"]) / cells["target_passes"]
    apart = (implied - cells["tau"]).abs()
    assert apart.drop("Oracle").max() < 0.0051 and apart["Oracle"] == pytest.approx(0.02, abs=0.005)
    tokens = cells["target_passes"] + cells["draft_passes"] - cells["wasted_drafts"]
    assert tokens.drop("Oracle").max() / tokens.drop("Oracle").min() < 1.002
    assert tokens["Oracle"] / tokens["AdaEAGLE"] > 1.09, "of other texts than the other rows"
    costs = cells.loc["EAGLE 3"]
    assert 1e3 * costs["draft_seconds"] / costs["draft_passes"] == pytest.approx(1.54, abs=0.005)


def test_the_papers_means_are_those_of_its_cells_but_for_one_misprint():
    table = claims.reported("adaeagle").query("table == 'Table 3'")
    cells = table[table["prompts"] != "mean"].groupby("method")[["tau", "tokens_per_second"]].mean()
    means = table[table["prompts"] == "mean"].set_index("method")[["tau", "tokens_per_second"]]
    apart = (cells - means).abs()
    assert (apart["tau"] < 0.011).all()
    assert set(apart.index[apart["tokens_per_second"] > 0.011]) == {"Autoregressive"}
    assert cells.loc["Autoregressive", "tokens_per_second"] == pytest.approx(40.56, abs=0.01)
