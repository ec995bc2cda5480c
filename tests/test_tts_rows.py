"""What records of sessions add up to: identities, side values, sources, and Spec-Bench's layout."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from specrepro import rows, tts_export, tts_rows
from specrepro.hybrid import Round
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.tts import Replayed, Spoken

HERE = {"target": "tiny", "device": "a CPU", "threads": 1, "dtype": "float32", "commit": "c0ffee"}
TO_ROWS = partial(rows.rows_of, environment=HERE, tier="smoke", paper="tts")


def record(
    method: str,
    session: str,
    accepted: list[int],
    seconds: float = 1.0,
    turn: int = 1,
    drafted: list[int] | None = None,
    **more: object,
) -> Record:
    """A generation whose last round is not cut."""
    num = 1 + sum(accepted) + len(accepted)
    if drafted is None:
        drafted = [0 if method == AUTOREGRESSIVE else 4] * len(accepted)
    fixed = {"prompts": "logic", "temperature": 0.0, "seed": 0, "batch": 1, "repeat": 0}
    fixed |= {"max_new_tokens": 99, "top_p": 1.0, "top_k": 0, "target": "tiny", "dtype": "float32"}
    fixed |= {"prompt_id": f"{session} {turn}", "group": f"{session} {turn}", "session": session}
    fixed |= {
        "paradigm": "multi-round",
        "turn": turn,
        "new_tokens": num,
        "tokens": list(range(num)),
    }
    fixed |= {"seconds": seconds, "prefill_seconds": 0.1, "target_passes": len(accepted)}
    fixed |= {"accepted": accepted, "drafted": drafted, "score": 0.0}
    return Record(method=method, **(fixed | more))


def baseline(session: str, num: int, seconds: float, turn: int = 1, **more: object) -> Record:
    return record(AUTOREGRESSIVE, session, [0] * (num - 1), seconds, turn, **more)


def failed(method: str, session: str, turn: int = 1) -> Record:
    empty = {"new_tokens": None, "tokens": [], "seconds": None, "prefill_seconds": None}
    empty |= {"target_passes": None, "score": None, "error": "RuntimeError: out of memory"}
    return record(method, session, [], turn=turn, **empty)


RECORDS = [
    baseline("a", 11, 10.0), record("SAM", "a", [4, 4], 4.0, score=1.0),
    baseline("a", 21, 20.0, 2), record("SAM", "a", [4, 4, 4, 4], 4.0, 2),
    baseline("b", 11, 5.0, prompts="algebra"),
    record("SAM", "b", [0, 4, 3], 5.0, prompts="algebra"),
]  # fmt: skip


def decoded(records: list[Record] = RECORDS) -> pd.DataFrame:
    table = tts_rows.decode_rows(records, TO_ROWS)
    return table[table["quantity"] == "decode"].set_index(["method", "prompts"])


# --- identities


def test_the_mean_acceptance_is_one_and_the_sum_of_products_of_conditional_rates() -> None:
    rng = random.Random(0)
    for _ in range(300):
        accepted = [rng.choice((0, 0, 1, 2, 5, 9)) for _ in range(rng.randint(1, 40))]
        rates = tts_export.conditional_acceptance(accepted)
        length = 1 + sum(np.prod(rates[: n + 1]) for n in range(len(rates)))
        assert length == pytest.approx(np.mean(accepted) + 1, abs=1e-9)
        assert len(rates) == max(accepted)


def test_a_request_adds_up() -> None:
    cut = record("SAM", "a", [4, 0, 2], drafted=[5, 0, 7])
    cut.tokens = cut.tokens[:-2]  # the last round ran beyond the end
    cut.new_tokens = len(cut.tokens)
    found = tts_export.request_summary(cut)
    assert sum(found["acceptance_histogram"].values()) == found["num_spec_steps"] == 3
    lengths = found["acceptance_histogram_by_draft_length"]
    assert sum(sum(counts.values()) for counts in lengths.values()) == 3
    assert found["per_step_accepted"] == [4, 0, 0] and found["steps_without_draft"] == 1
    assert sum(n + 1 for n in found["per_step_accepted"]) == cut.new_tokens - 1
    assert found["mean_acceptance_length"] == pytest.approx((cut.new_tokens - 1) / 3)
    assert found["draft_acceptance_rate"] == pytest.approx(4 / 12)
    assert tts_export.request_summary(failed("SAM", "a")) == {
        "error": "RuntimeError: out of memory"
    }
    nothing = tts_export.request_summary(record("SAM", "a", []))
    assert nothing["mean_acceptance_length"] is None and nothing["num_spec_steps"] == 0


# --- rows


def test_three_acceptance_lengths_stand_side_by_side() -> None:
    quiet = record("SAM", "a", [0, 4, 4], drafted=[0, 4, 4])
    short = record("SAM", "b", [1], drafted=[4])
    row = decoded([baseline("a", 12, 1.0), quiet, baseline("b", 3, 1.0), short]).loc["SAM", "logic"]
    assert row["tau"] == (1 + 5 + 5 + 2) / 4
    assert row["tau_per_round"] == (5 + 5 + 2) / 3, "a round without a draft does not count"
    assert row["tau_per_request"] == (11 / 3 + 2) / 2, "every generation counts alike"
    assert row["rounds_without_draft"] == 1 / 4 and row["drafted_per_round"] == 3
    assert row["draft_acceptance_rate"] == 9 / 12


def test_both_speedups_are_what_their_formulas_say() -> None:
    table = decoded()
    own = {"a": (11 + 21) / 8, "b": 11 / 5}
    base = {"a": 32 / 30, "b": 11 / 5}
    pooled = table.loc["SAM", "overall"]
    legacy = np.mean(list(own.values())) / np.mean(list(base.values()))
    assert pooled["speedup_legacy"] == pytest.approx(legacy)
    assert pooled["speedup"] == pytest.approx((43 / 13) / (43 / 35))
    assert pooled["speedup"] != pytest.approx(legacy, rel=0.1), "the two cannot be told apart"
    assert table.loc[AUTOREGRESSIVE, "overall"]["speedup_legacy"] == 1
    assert table.loc["SAM", "logic"]["speedup_legacy"] == pytest.approx(own["a"] / base["a"])


def test_overall_pools_the_questions_and_mean_averages_the_sets() -> None:
    table = decoded()
    taus = {name: table.loc["SAM", name]["tau"] for name in ("logic", "algebra", "overall", "mean")}
    assert taus["logic"] == 5 and taus["algebra"] == 10 / 3
    assert taus["overall"] == 40 / 9 and taus["mean"] == pytest.approx((5 + 10 / 3) / 2)
    assert table.loc["SAM", "overall"]["num_prompts"] == 2, "questions are counted, not generations"
    assert table.loc["SAM", "mean"]["accuracy"] == 0.25


def test_accuracy_is_that_of_each_generation_and_of_the_best_of_a_question() -> None:
    row = decoded().loc["SAM", "overall"]
    assert row["accuracy"] == pytest.approx(1 / 3) and row["accuracy_any"] == 1 / 2


def test_questions_are_resampled_and_not_their_turns() -> None:
    """Turns of one question that differ widely give no interval."""
    one = [baseline("a", 11, 1.0), record("SAM", "a", [4, 4]), baseline("a", 4, 1.0, 2)]
    one += [record("SAM", "a", [0, 0, 0], turn=2)]
    assert np.isnan(decoded(one).loc["SAM", "logic"]["tau_low"])
    alike = [replace_session(r, name) for name in "abc" for r in one]
    row = decoded(alike).loc["SAM", "logic"]
    assert row["tau_low"] == row["tau_high"] == row["tau"]


def replace_session(one: Record, name: str) -> Record:
    fields = {f: getattr(one, f) for f in one.__dataclass_fields__}
    place = f"{name} {one.turn}"
    return Record(**fields | {"session": name, "prompt_id": place, "group": place})


def test_turns_have_rows_of_their_own() -> None:
    table = tts_rows.turn_rows(RECORDS, TO_ROWS)
    assert set(table["quantity"]) == {"decode_by_turn"} and set(table["paradigm"]) == {
        "multi-round"
    }
    sam = table[table["method"] == "SAM"].set_index(["turn", "prompts"])
    assert sam.loc[(2, "logic"), "speedup"] == pytest.approx((21 / 4) / (21 / 20))
    assert sam.loc[(1, "overall"), "num_prompts"] == 2


def test_paradigms_never_mix() -> None:
    others = [replace_paradigm(one) for one in RECORDS]
    table = tts_rows.decode_rows([*RECORDS, *others], TO_ROWS)
    alone = tts_rows.decode_rows(RECORDS, TO_ROWS)
    assert len(table) == 2 * len(alone)
    for name in ("multi-round", "best-of-n"):
        mine = table[table["paradigm"] == name].reset_index(drop=True)
        pd.testing.assert_series_equal(mine["tau"], alone["tau"])
    pairs = tts_rows.paired_differences([*RECORDS, *others], [("SAM", AUTOREGRESSIVE)])
    assert set(pairs["paradigm"]) == {"multi-round", "best-of-n"}
    pooled = pairs[(pairs["prompts"] == "overall") & (pairs["metric"] == "tau")]
    assert pooled["value"].tolist() == pytest.approx([40 / 9 - 1] * 2)


def replace_paradigm(one: Record) -> Record:
    fields = {f: getattr(one, f) for f in one.__dataclass_fields__}
    return Record(**fields | {"paradigm": "best-of-n", "turn": 1, "sample": one.turn})


def test_a_failed_question_is_a_row_and_leaves_every_ratio() -> None:
    more = [baseline("c", 11, 99.0), failed("SAM", "c"), baseline("c", 11, 99.0, 2)]
    more += [failed("SAM", "c", turn=2)]
    table = tts_rows.decode_rows([*RECORDS, *more], TO_ROWS)
    assert (table["quantity"] == "failed").sum() == 2, "once each, not once more in the pool"
    row = table[(table["method"] == "SAM") & (table["prompts"] == "overall")].iloc[0]
    assert row["speedup"] == decoded().loc["SAM", "overall"]["speedup"]
    assert row["speedup_legacy"] == decoded().loc["SAM", "overall"]["speedup_legacy"]
    assert (row["num_prompts"], row["num_failed"]) == (2, 2)


# --- comparisons


def two_parts() -> tuple[list[Record], list[Record]]:
    """The same three questions in two parts: SAM's tau doubles, its speedup goes from 2 to 3."""
    before, after = [], []
    for n, name in enumerate("abc"):
        before += [baseline(name, 9, 4.0 + n), record("SAM", name, [1, 1, 1, 1], 2.0 + n / 2)]
        after += [baseline(name, 9, 6.0 + n), record("SAM", name, [3, 3], 2.0 + n / 3)]
    return before, after


def test_a_change_is_the_ratio_of_both_parts_less_one() -> None:
    before, after = two_parts()
    alone = record("SAM", "d", [9, 9])  # of the second part alone
    found = tts_rows.changes(before, [*after, alone], "rise").set_index("metric")
    assert set(found["quantity"]) == {"rise"} and set(found["num_prompts"]) == {3}
    assert found["value"].to_dict() == pytest.approx({"tau": 1.0, "speedup": 0.5})
    assert found.loc["tau", "value_low"] == found.loc["tau", "value_high"] == pytest.approx(1.0)
    silent = [one for one in after if one.method == AUTOREGRESSIVE]
    assert tts_rows.changes(before, silent, "rise").empty


def test_a_replay_changes_in_tau_and_says_nothing_of_speed() -> None:
    before, after = two_parts()
    untimed = [replace(r, seconds=None) if r.method == "SAM" else r for r in after]
    found = tts_rows.changes(before, untimed, "fall_off")
    assert found["metric"].tolist() == ["tau"] and found["value"].tolist() == [1.0]


def test_the_hybrid_is_held_against_the_faster_of_its_parts() -> None:
    records = []
    for prompts, parts in {"logic": (2.0, 4.0), "algebra": (4.0, 2.5)}.items():
        for n in (1, 2, 3):
            here = {"prompts": prompts}
            records += [baseline(f"{prompts}{n}", 9, 8.0 * n, **here)]
            records += [record("hybrid", f"{prompts}{n}", [7], 2.0 * n, **here)]
            records += [
                record(name, f"{prompts}{n}", [7], seconds * n, **here)
                for name, seconds in zip(("one", "other"), parts, strict=True)
            ]
    found = tts_rows.gains(records, "hybrid", ("one", "other"), "the parts")
    values = found.set_index("prompts")["value"].to_dict()
    # speedups 4, 4 of the hybrid; 4, 2 of the one part; 2, 3.2 of the other
    assert values["logic"] == pytest.approx(0.0) and values["algebra"] == pytest.approx(0.25)
    assert values["mean"] == pytest.approx(4 / 3 - 1)
    assert values["overall"] == pytest.approx(4 / (2 * 24 / 18) - 1)
    assert found.set_index("prompts")["num_prompts"].to_dict() == {
        "logic": 3, "algebra": 3, "mean": 6, "overall": 6,
    }  # fmt: skip
    alike = found[found["prompts"] != "overall"]
    assert (alike["value_high"] - alike["value_low"]).abs().max() < 1e-9, "as are the questions"
    assert tts_rows.gains(records, "hybrid", ("nobody",), "nobody").empty


def test_a_question_that_one_side_failed_counts_for_neither() -> None:
    before, after = two_parts()
    after += [baseline("c", 9, 6.0, 2), failed("SAM", "c", turn=2)]
    found = tts_rows.changes(before, after, "rise")
    assert set(found["num_prompts"]) == {2}


def test_answers_have_their_tau_and_how_much_they_repeat() -> None:
    once, again = record("SAM", "a", [4, 4]), record("SAM", "b", [4, 4])
    again.tokens = [7] * len(again.tokens)
    found = tts_rows.generation_rows([once, again, failed("SAM", "c")]).set_index("session")
    assert found["tau"].to_dict() == {"a": 5.0, "b": 5.0}
    assert found.loc["a", "repeated"] == 0 and found.loc["b", "repeated"] == 7 / 8


def test_a_replay_that_is_not_what_was_recorded_is_counted() -> None:
    own = record("SAM", "a", [4, 0, 2], sources=["own", "none", "own"])

    def check(accepted: list[int], sources: list[str]) -> float:
        rounds = [Round(*pair) for pair in zip(sources, accepted, strict=True)]
        row = tts_rows.replay_check([[Replayed(Spoken(own, [1]), rounds)]])
        assert row["value"] == row["value_low"] == row["value_high"] and row["num_prompts"] == 1
        return row["value"]

    assert check([4, 0, 2], ["own", "none", "own"]) == 0
    assert check([4, 0, 9], ["own", "none", "own"]) == 0, "nobody recorded what was beyond the end"
    assert check([3, 1, 2], ["own", "none", "own"]) == 1
    assert check([4, 0, 2], ["own", "own", "own"]) == 1


# --- where the time and the drafts come from


def test_sources_share_the_rounds_and_each_has_its_own_tau() -> None:
    first = record(
        "SAM[EAGLE-3]", "a", [4, 0, 2], drafted=[5, 5, 2], sources=["own", "head", "own"]
    )
    second = record("SAM[EAGLE-3]", "b", [1], drafted=[5], sources=["head"])
    both = record(
        "SAM[EAGLE-3]", "c", [4, 0, 2, 1], drafted=[5, 5, 2, 5],
        sources=["own", "head", "own", "head"],
    )  # fmt: skip
    table = tts_rows.source_rows([first, second, both, *RECORDS]).set_index("drafted_from")
    assert table["share"].to_dict() == {"own": 0.5, "head": 0.5}
    assert table["tau"].to_dict() == {"own": 4.0, "head": 1.5}
    assert table["draft_acceptance_rate"].to_dict() == {"own": 6 / 7, "head": 1 / 10}
    assert (table["tau_low"] <= table["tau"]).all() and (table["tau"] <= table["tau_high"]).all()


def test_tau_and_the_cost_of_a_round_make_the_speedup() -> None:
    parts = {"prefill": 0.1, "draft": 0.0, "target": 0.0}
    base = baseline("a", 21, 2.1, seconds_by_part=parts | {"target": 2.0})
    own = record("SAM", "a", [4] * 4, 0.6, seconds_by_part=parts | {"target": 0.4, "draft": 0.1})
    measured, explained = tts_rows.consistency([base, own], "SAM")
    assert measured == pytest.approx((20 / 0.5) / (20 / 2.0)) == explained
    slow = record("SAM", "a", [4] * 4, 1.1, seconds_by_part=parts | {"target": 0.4, "draft": 0.1})
    measured, explained = tts_rows.consistency([base, slow], "SAM")
    assert measured == pytest.approx(explained / 2), "time that no part accounts for shows"


def test_the_parts_of_a_round_are_those_of_generations_drawn_in_turn() -> None:
    """Samples of a session that were not batched are rounds one after the other."""
    parts = {"prefill": 0.1, "target": 0.9}
    two = [record("SAM", "a", [4, 4], 1.0, turn, seconds_by_part=parts) for turn in (1, 2)]
    table = rows.round_parts(two).set_index("part")
    assert table.loc["target", "value"] == pytest.approx(1e3 * 1.8 / 4)
    assert np.isnan(table.loc["target", "value_low"]), "two turns are one question"


def test_replays_have_rows_with_what_was_varied() -> None:
    def replayed(session: str, prompts: str, accepted: list[int]) -> list[Replayed]:
        one = record("SAM", session, accepted, prompts=prompts)
        return [Replayed(Spoken(one, [1]), [Round("own", num) for num in accepted])]

    found = [replayed("a", "logic", [4, 4]), replayed("b", "algebra", [0, 1])]
    table = tts_rows.replay_rows(found, "SAM[EAGLE-3]", threshold=7).set_index("prompts")
    assert table["tau"].to_dict() == {"logic": 5.0, "algebra": 1.5, "overall": 13 / 4}
    assert set(table["threshold"]) == {7} and set(table["quantity"]) == {"replay"}
    assert table.loc["overall", "num_prompts"] == 2


# --- export


def test_the_export_is_what_spec_benchs_scripts_read(tmp_path: Path) -> None:
    cut = record("SAM", "d", [4, 4], 2.0)
    cut.tokens = cut.tokens[:-3]  # the last round ran beyond the end
    cut.new_tokens = len(cut.tokens)
    files = tts_export.export(
        [*RECORDS, failed("SAM", "c"), cut], tmp_path, lambda tokens, **_: f"{len(tokens)} tokens"
    )
    assert len(files) == 2
    path = next(file for file in files if "SAM" in file.name)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [one["question_id"] for one in lines]
    assert names == ["a", "b", "d"], "a failed question is left out"
    assert lines[-1]["choices"][0]["accept_lengths"] == [5, 2]
    assert set(lines[0]) == {
        "question_id", "category", "answer_id", "model_id", "choices", "tstamp",
    }  # fmt: skip
    (choice,) = lines[0]["choices"]
    assert choice["turns"] == ["11 tokens", "21 tokens"]
    assert choice["decoding_steps"] == [2, 4] and choice["wall_time"] == [4.0, 4.0]
    assert choice["accept_lengths"] == [5] * 6
    for one in lines:
        choice = one["choices"][0]
        assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
    # mean accepted tokens as the scripts take it, pooled over all questions and turns
    pooled = [num for one in lines[:2] for num in one["choices"][0]["accept_lengths"]]
    assert np.mean(pooled) == pytest.approx(decoded().loc["SAM", "overall"]["tau"])


def test_every_generation_is_a_request_with_its_rounds(tmp_path: Path) -> None:
    """JSON knows no missing numbers, so what is unknown is null."""
    nothing = record("SAM", "e", [])
    path = tts_export.write_requests([*RECORDS, failed("SAM", "c"), nothing], tmp_path)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert len(lines) == len(RECORDS) + 2 and lines[-1]["mean_acceptance_length"] is None
    assert lines[-2] | {"error": "RuntimeError: out of memory"} == lines[-2]
    first = lines[1]
    assert (first["method"], first["session"], first["score"]) == ("SAM", "a", 1.0)
    assert first["per_step_accepted"] == [4, 4] and first["num_draft_tokens"] == 8
