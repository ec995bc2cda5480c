"""Claims are read strictly, and every verdict is what its rows say."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from specrepro import claims

EAGLE3 = claims.CLAIMS_FOLDER / "eagle3.yaml"
SETTING = {"method": "EAGLE-3", "prompts": "mean", "temperature": 0}
# the paper's own means that differ from the mean of their five cells by more than rounding explains
SPEEDUP_MEANS_THE_PAPER_GETS_WRONG = {
    ("Llama-3.1-8B", "HASS", 1): -0.012,
    ("Llama-3.1-8B", "EAGLE-3", 1): 0.032,
    ("Llama-3.3-70B", "EAGLE-3", 0): 0.042,
}


def row(low: float | None, high: float | None, metric: str = "tau", /, **columns) -> dict:
    """A decoding row whose metric lies in the middle of its interval."""
    numbers = {metric: 1.0}
    if low is not None:
        numbers = {metric: (low + high) / 2, f"{metric}_low": low, f"{metric}_high": high}
    common = {
        "quantity": "decode",
        "batch": 1,
        "dtype": "float32",
        "num_prompts": 40,
        "tier": "full",
    }
    return common | SETTING | numbers | columns


def claim(kind: str, **parts) -> claims.Claim:
    defaults = {"id": "c", "statement": "s", "where": "Table 1", "metric": "tau"}
    defaults |= {"setting": SETTING, "tier_needed": "paper" if kind == "value" else "smoke"}
    return claims.Claim(**defaults | {"kind": kind} | parts)


def verdict_of(one: claims.Claim, rows: list[dict], tier: str = "full") -> claims.Verdict:
    return claims.judge([one], pd.DataFrame(rows), tier)[0]


VALUE = claim("value", reported=6.0, tolerance=0.10)
ABOVE_PLD = claim("ordering", versus={"method": "PLD"})
FASTER = claim("threshold", metric="speedup", direction="above", bound=1)
RISES = claim("trend", direction="rises", along="total_tokens")
LOSSLESS = claim(
    "threshold",
    metric="value",
    setting={"quantity": "losslessness", "method": "EAGLE-3", "dtype": "float32"},
    direction="equals",
    bound=0,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (5.8, 6.1, "reproduced"),
        (5.0, 5.45, "inconclusive"),  # reaches into the band from 5.4 to 6.6
        (6.5, 7.0, "inconclusive"),
        (6.7, 7.0, "better"),
        (4.0, 5.3, "not reproduced"),
        (4.0, 8.0, "inconclusive"),  # such an interval would confirm nearly anything
        (None, None, "inconclusive"),
    ],
)
def test_a_value_is_judged_at_tier_paper_by_its_tolerance_band(low, high, expected):
    assert verdict_of(VALUE, [row(low, high, tier="paper")], "paper").verdict == expected


@pytest.mark.parametrize("tier", ["smoke", "laptop", "full"])
def test_a_value_below_tier_paper_is_a_proxy_even_when_it_agrees(tier):
    verdict = verdict_of(VALUE, [row(5.9, 6.1, tier=tier, target="SmolLM2")], tier)
    assert (verdict.verdict, verdict.measured, verdict.low) == ("proxy", 6.0, 5.9)
    assert "SmolLM2" in verdict.why and "not comparable" in verdict.why


@pytest.mark.parametrize(("row_tier", "tier"), [("full", "paper"), ("paper", "full")])
def test_the_lower_of_the_rows_tier_and_the_runs_tier_counts(row_tier, tier):
    assert verdict_of(VALUE, [row(5.9, 6.1, tier=row_tier)], tier).verdict == "proxy"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "reproduced"),
        ("models/Llama-3.1-8B-Instruct", "reproduced"),  # a local copy
        ("lmsys/vicuna-13b-v1.3", "proxy"),
        (None, "proxy"),
    ],
)
def test_a_value_counts_only_on_the_model_it_was_reported_for(target, expected):
    model = {"model": "Llama-3.1-8B", "target": "meta-llama/Llama-3.1-8B-Instruct"}
    one = claim("value", reported=6.0, tolerance=0.10, **model)
    rows = [row(5.9, 6.1, tier="paper", target=target)]
    assert verdict_of(one, rows, "paper").verdict == expected


def test_the_worst_cell_of_a_table_decides_and_is_named():
    cells = {"chat": 6.0, "maths": 5.0, "mean": 5.5}
    one = claim("value", reported=cells, tolerance=0.1, along="prompts")
    intervals = {"chat": (5.9, 6.1), "maths": (2.0, 2.2), "mean": (5.4, 5.6)}
    rows = [row(*ends, prompts=name, tier="paper") for name, ends in intervals.items()]
    verdict = verdict_of(one, rows, "paper")
    assert verdict.verdict == "not reproduced" and "maths 2.10 for 5.00" in verdict.why
    assert (verdict.reported, verdict.measured) == (5.5, 5.5)
    one_below = [rows[0], rows[1] | {"tier": "full"}, rows[2]]
    assert verdict_of(one, one_below, "paper").verdict == "proxy"
    without_maths = verdict_of(one, [rows[0], rows[2]], "paper")
    assert (without_maths.verdict, without_maths.why) == (
        "inconclusive",
        "no row for prompts maths",
    )


@pytest.mark.parametrize("tier", claims.TIERS)
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.6, 2.9, "direction holds"),
        (1.2, 1.4, "not reproduced"),
        (1.7, 2.9, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_an_ordering_is_judged_at_any_tier_by_its_two_intervals(tier, low, high, expected):
    rows = [row(low, high), row(1.5, 1.8, method="PLD")]
    assert verdict_of(ABOVE_PLD, rows, tier).verdict == expected


def test_an_ordering_prefers_the_paired_interval():
    overlapping = [row(1.5, 2.5), row(1.4, 2.4, method="PLD")]
    assert verdict_of(ABOVE_PLD, overlapping).verdict == "inconclusive"
    paired = row(0.05, 0.15, "value", quantity="paired_difference", versus="PLD", metric="tau")
    verdict = verdict_of(ABOVE_PLD, [*overlapping, paired])
    assert (verdict.verdict, verdict.low) == ("direction holds", 0.05)
    of_another_metric = paired | {"metric": "speedup"}
    assert verdict_of(ABOVE_PLD, [*overlapping, of_another_metric]).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(1.1, 1.2), (1.5, 1.6)], "direction holds"),
        ([(0.9, 1.2), (1.5, 1.6)], "inconclusive"),
        ([(0.8, 0.9), (1.5, 1.6)], "not reproduced"),
    ],
)
def test_a_threshold_is_as_good_as_its_worst_row(ends, expected):
    rows = [row(*pair, "speedup", seed=seed) for seed, pair in enumerate(ends)]
    verdict = verdict_of(FASTER, rows)
    assert (verdict.verdict, verdict.low) == (expected, ends[0][0])
    assert verdict.reported == 1


@pytest.mark.parametrize(
    ("ends", "direction", "expected"),
    [
        ([(1.0, 1.1), (1.5, 1.6), (1.9, 2.0)], "rises", "direction holds"),
        ([(1.0, 1.1), (2.5, 2.6), (1.9, 2.0)], "rises", "not reproduced"),  # a step back
        ([(1.0, 1.1), (1.0, 1.2), (0.9, 1.3)], "rises", "inconclusive"),
        ([(1.9, 2.0), (1.5, 1.6), (1.0, 1.1)], "rises", "not reproduced"),
        ([(1.9, 2.0), (1.5, 1.6), (1.0, 1.1)], "falls", "direction holds"),
        ([(0.79, 0.80), (0.78, 0.80), (0.79, 0.81)], "flat", "direction holds"),
        ([(0.79, 0.80), (0.60, 0.62), (0.50, 0.52)], "flat", "not reproduced"),
        ([(0.70, 0.90), (0.60, 0.90), (0.60, 0.90)], "flat", "inconclusive"),
    ],
)
def test_a_trend_needs_its_ends_apart_and_no_step_back(ends, direction, expected):
    one = claim("trend", direction=direction, along="total_tokens", tolerance=0.10)
    rows = [row(*pair, total_tokens=8 * place) for place, pair in enumerate(ends, start=1)]
    assert verdict_of(one, rows[::-1]).verdict == expected


def test_one_point_is_no_trend():
    assert verdict_of(RISES, [row(1.0, 1.1, total_tokens=8)]).verdict == "not tested"


def test_a_claim_without_rows_says_why():
    assert verdict_of(FASTER, []).why == (
        "no row with method = EAGLE-3, prompts = mean, temperature = 0"
    )
    one = claim("ordering", versus={"method": "EAGLE-2"}, untested_why="needs an EAGLE-2 head")
    verdict = verdict_of(one, [row(2.6, 2.9)])
    assert (verdict.verdict, verdict.why) == ("not tested", "needs an EAGLE-2 head")
    assert verdict.measured is None


def test_a_row_with_a_missing_number_counts_as_no_row():
    failed = row(1.1, 1.2, "speedup") | {"speedup": None}
    assert verdict_of(FASTER, [failed]).verdict == "not tested"


def test_two_rows_for_one_number_are_refused_and_the_difference_named():
    verdict = verdict_of(VALUE, [row(5.9, 6.1), row(3.0, 3.1, dtype="bfloat16")])
    assert verdict.verdict == "not tested"
    assert verdict.why == "2 rows match; they differ in dtype"


def test_rows_measured_now_go_before_committed_ones_and_are_never_mixed_with_them():
    committed = "committed full rows"
    now = [row(1.0, 1.1, source=claims.MEASURED_NOW)]
    full = [row(2.6, 2.9, source=committed), row(1.5, 1.8, method="PLD", source=committed)]
    assert verdict_of(ABOVE_PLD, now + full).verdict == "direction holds"
    now.append(row(1.5, 1.8, method="PLD", source=claims.MEASURED_NOW))
    assert verdict_of(ABOVE_PLD, now + full).verdict == "not reproduced"


def test_a_claim_that_needs_tier_paper_is_a_proxy_below_it_whatever_its_kind():
    one = claim("threshold", direction="above", bound=1, tier_needed="paper")
    assert verdict_of(one, [row(2.6, 2.9)], "laptop").verdict == "proxy"
    one = claim("ordering", versus={"method": "PLD"}, tier_needed="paper")
    rows = [row(2.6, 2.9, tier="paper"), row(1.5, 1.8, method="PLD", tier="full")]
    assert verdict_of(one, rows, "paper").verdict == "proxy"


def losslessness(num_differing: int, dtype: str = "float32") -> dict:
    common = {"quantity": "losslessness", "method": "EAGLE-3", "prompts": "chat", "temperature": 0}
    return common | {"dtype": dtype, "value": num_differing, "num_prompts": 20}


def test_losslessness_is_an_exact_count():
    assert verdict_of(LOSSLESS, [losslessness(0), losslessness(0)]).verdict == "direction holds"
    verdict = verdict_of(LOSSLESS, [losslessness(0), losslessness(2)])
    assert (verdict.verdict, verdict.measured) == ("not reproduced", 2)


def test_an_audit_of_many_prompts_goes_before_one_of_few_unless_that_one_failed():
    full = losslessness(0) | {"source": "committed full rows", "num_prompts": 20}
    now = losslessness(0) | {"source": claims.MEASURED_NOW, "num_prompts": 2}
    assert verdict_of(LOSSLESS, [now, full]).num_prompts == 20
    verdict = verdict_of(LOSSLESS, [now | {"value": 1}, full])
    assert (verdict.verdict, verdict.num_prompts) == ("not reproduced", 2)


def test_no_speedup_is_judged_when_half_precision_parted_at_a_large_gap():
    tie = {"quantity": "near_tie", "method": "EAGLE-3", "dtype": "bfloat16", "temperature": 0}
    rows = [row(1.5, 1.6, "speedup"), tie | {"prompts": "chat", "value": 1.0}]
    assert verdict_of(FASTER, rows).why == "a losslessness check failed"
    rows[1]["value"] = 0.0
    assert verdict_of(FASTER, rows).verdict == "direction holds", "a near tie is no failure"


def test_nothing_is_judged_when_a_losslessness_check_failed():
    rows = [row(1.5, 1.6, "speedup"), row(1.1, 1.2, "speedup", method="PLD"), losslessness(1)]
    rows += [row(2.6, 2.9), row(1.5, 1.8, method="PLD")]
    speed = claim("value", metric="speedup", reported=4.4, tolerance=0.1)
    judged = claims.judge([FASTER, speed, ABOVE_PLD], pd.DataFrame(rows), "full")
    assert [verdict.verdict for verdict in judged[:2]] == ["inconclusive"] * 2
    assert {verdict.why for verdict in judged[:2]} == {"a losslessness check failed"}
    assert judged[2].why == "a losslessness check failed", "nor is what else it accepts"


def test_a_claim_of_several_methods_needs_a_row_of_each_or_one_that_fails():
    both = claim(
        "threshold", direction="above", bound=2.0,
        setting=SETTING | {"method": ["EAGLE-3", "PLD"], "prompts": ["mean", "aime24"]},
    )  # fmt: skip
    lone = row(2.6, 2.9)
    verdict = verdict_of(both, [lone])
    assert (verdict.verdict, verdict.why) == ("not tested", "no row for method PLD")
    replayed = [row(2.5, 2.7, method=name, source="replayed") for name in ("EAGLE-3", "PLD")]
    assert verdict_of(both, [lone, *replayed]).verdict == "direction holds", (
        "another source has all"
    )
    assert verdict_of(both, [row(1.2, 1.4)]).verdict == "not reproduced", "one that fails is enough"


def test_a_range_that_is_no_interval_is_called_what_it_is():
    above = claim("threshold", direction="above", bound=2.0)
    verdict = verdict_of(above, [row(2.6, 2.9, ends="10 to 90 % of 50 repeats")])
    assert verdict.why == "the range (10 to 90 % of 50 repeats) lies on the claimed side"
    assert verdict_of(above, [row(2.6, 2.9)]).why == "the 95 % interval lies on the claimed side"


def test_near_ties_in_half_precision_do_not_silence_speedups():
    rows = [row(1.5, 1.6, "speedup"), losslessness(3, dtype="bfloat16")]
    assert verdict_of(FASTER, rows).verdict == "direction holds"


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match="unknown tier 'huge'"):
        claims.judge([VALUE], pd.DataFrame(), "huge")
    with pytest.raises(ValueError, match="unknown tiers .'medium'.*known: smoke"):
        verdict_of(VALUE, [row(5.9, 6.1, tier="medium")])


def every_verdict() -> list[claims.Verdict]:
    rows = [row(2.6, 2.9), row(1.5, 1.8, method="PLD")]
    one = claim("threshold", direction="above", bound=1, statement="long | words " * 20)
    return claims.judge([one, VALUE, ABOVE_PLD, FASTER], pd.DataFrame(rows), "full")


def test_verdict_json_has_the_designed_shape_and_no_leftovers(tmp_path):
    path = claims.write_verdict(tmp_path / "eagle3/verdict.json", "eagle3", "full", every_verdict())
    content = json.loads(path.read_text())
    assert list(content) == ["paper", "tier", "claims"]
    expected = "id statement where reported measured low high num_prompts verdict why".split()
    assert [list(entry) for entry in content["claims"]] == [expected] * 4
    assert content["claims"][3]["measured"] is None
    assert [file.name for file in path.parent.iterdir()] == ["verdict.json"]


def test_a_verdict_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = claims.write_verdict(tmp_path / "verdict.json", "eagle3", "full", every_verdict())
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(claims.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        claims.write_verdict(path, "eagle3", "smoke", [])
    assert path.read_bytes() == before


def test_the_terminal_table_fits_and_ends_in_a_count():
    lines = claims.as_table(every_verdict()).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[-1] == "2 direction holds · 1 proxy · 1 not tested"
    assert any("2.75 [2.60, 2.90]" in line for line in lines)


def test_the_markdown_table_has_a_line_per_claim_and_escapes_pipes():
    header, rule, *lines = claims.as_markdown(every_verdict()).splitlines()
    assert len(lines) == 4
    num_columns = rule.count("|")
    assert {line.replace("\\|", "").count("|") for line in [header, *lines]} == {num_columns}


def altered(tmp_path: Path, change) -> Path:
    """The EAGLE-3 claims with one thing changed."""
    document = yaml.safe_load(EAGLE3.read_text())
    change(document)
    path = tmp_path / "altered.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["claims"][2].update(colour="red"),
            "claim faster-greedy: unknown key 'colour'",
        ),
        (lambda d: d["claims"][2].pop("bound"), "claim faster-greedy: missing key 'bound'"),
        (
            lambda d: d["claims"][2].update(kind="hunch"),
            "claim faster-greedy: key 'kind' is 'hunch'",
        ),
        (lambda d: d["claims"][2].pop("kind"), "claim faster-greedy: missing key 'kind'"),
        (lambda d: d["claims"][2].update(direction="up"), "key 'direction' is 'up'"),
        (lambda d: d["claims"][2].update(tier_needed="x"), "key 'tier_needed' is 'x'"),
        (lambda d: d["claims"][2].update(model="GPT"), "key 'model' is 'GPT'"),
        (lambda d: d["claims"][2].update(id="faster-sampling"), "'id' is used 2 times"),
        (lambda d: d["claims"][4].update(reported="Table 9"), "'Table 9' has 0 matching cells"),
        (lambda d: d["reported"][0].update(page=3), "table Table 1: unknown key 'page'"),
        (lambda d: d["reported"][0]["rows"][0].pop(), "table Table 1: key 'rows'"),
        (lambda d: d["reported"][0]["rows"][0].__setitem__(3, 1.93), "cell 1.93 should hold"),
        (lambda d: d.update(notes=""), "top level: unknown key 'notes'"),
        (lambda d: d.pop("models"), "top level: missing key 'models'"),
    ],
)
def test_a_claims_file_with_a_mistake_is_refused_by_name(tmp_path, change, message):
    path = altered(tmp_path, change)
    with pytest.raises(ValueError, match="altered.yaml") as refusal:
        claims.load(path)
    assert message in str(refusal.value)


def test_a_flat_trend_without_a_tolerance_is_refused(tmp_path):
    def forget(document):
        next(c for c in document["claims"] if c["id"] == "n-alpha-flat").pop("tolerance")

    with pytest.raises(ValueError, match="claim n-alpha-flat: missing key 'tolerance'"):
        claims.load(altered(tmp_path, forget))


def test_an_unknown_paper_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match="papers with one: .*eagle3"):
        claims.load("eagle33")


def test_the_eagle3_claims_load_and_cover_table_1():
    loaded = {one.id: one for one in claims.load("eagle3")}
    tables = [one for one in loaded.values() if one.kind == "value" and one.where == "Table 1"]
    assert len(tables) == 4 * 2 * 2, "four models, two temperatures, speedup and tau"
    assert all(list(one.reported)[-1] == "mean" and len(one.reported) == 6 for one in tables)
    assert all(one.tier_needed == "paper" and one.target for one in tables)
    assert loaded["llama-3.1-8b-greedy-tau"].reported["mean"] == 6.23
    assert loaded["tau-above-eagle2-greedy"].reported == pytest.approx(6.23 - 4.11)


def test_the_eagle3_claims_ask_only_for_columns_that_rows_have():
    columns = set(SETTING) | {"quantity", "batch", "dtype", "depth", "top_k", "engine"}
    columns |= {"data_scale", "budget", "shape", "versus", "metric"}
    asked = {column for one in claims.load("eagle3") for column in [*one.setting, *one.versus]}
    assert asked <= columns


@pytest.mark.parametrize("metric", ["speedup", "tau"])
def test_every_reported_mean_is_the_mean_of_its_five_cells(metric):
    table = claims.reported(EAGLE3).query("table == 'Table 1'")
    keys = ["model", "method", "temperature"]
    cells = table[table["prompts"] != "mean"].groupby(keys)[metric]
    means = table[table["prompts"] == "mean"].set_index(keys)[metric]
    assert len(means) == 26 and (cells.size() == 5).all()
    # half a hundredth from the cells and half a hundredth from the mean itself
    gaps = (cells.mean() - means).round(4)
    wrong = gaps[gaps.abs() > 0.0101].to_dict()
    assert wrong == (SPEEDUP_MEANS_THE_PAPER_GETS_WRONG if metric == "speedup" else {})


def test_re_measurements_by_others_are_kept_apart():
    cells = claims.reported("eagle3")
    assert set(cells["by"]) == {"authors", "others"}
    assert set(cells[cells["by"] == "others"]["table"]) == {"re-measured by others"}
    assert cells[cells["approximate"]]["table"].unique().tolist() == [
        "data scaling figure",
        "n-alpha figure",
    ]
