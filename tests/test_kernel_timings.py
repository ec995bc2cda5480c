"""The timings compare like with like, in turns, and hold a CPU to its bounds."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from specrepro import kernel_launch, kernel_timings, target_model, tree_kernel
from specrepro.target_model import Target

CONTEXT = 20


@pytest.fixture(scope="module")
def targets(tiny_target_folder) -> tuple[Target, Target]:
    """The tiny Llama as it is, and once more under a dense mask."""
    folder = str(tiny_target_folder())
    ours, dense = (target_model.load(folder, dtype="float32", device="cpu") for _ in range(2))
    return ours, kernel_timings.attends_densely(dense)


def said(rows) -> dict[str, dict]:
    return {row["contender"]: row for row in rows}


def test_contenders_take_turns_and_the_first_turn_only_warms_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called, clock = [], itertools.count(0, 0.5)
    monkeypatch.setattr(kernel_timings.time, "perf_counter", lambda: next(clock))
    runs = {name: lambda name=name: called.append(name) for name in "ab"}
    rows = said(kernel_timings.compared(runs, "cpu", turns=3))
    assert called == list("ab") + list("ab") * 4
    assert [row["milliseconds"] for row in rows.values()] == [500, 500]
    assert all(row["turns"] == 3 for row in rows.values())


def test_a_ratio_is_of_times_in_the_same_turn_and_has_an_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a machine that grows slower: the ratio of each turn is 1.5 all the same
    times = iter([9, 9] + [scale * base for scale in (1, 2, 4, 8, 16) for base in (10, 15)])
    monkeypatch.setattr(kernel_timings, "_milliseconds", lambda run, device: next(times))
    first, second = kernel_timings.compared({"a": int, "b": int}, "cpu", turns=5)
    assert (first["milliseconds"], second["milliseconds"]) == (40, 60)
    assert first["ratio"] == 1
    assert second["ratio"] == second["ratio_low"] == second["ratio_high"] == 1.5
    assert second["milliseconds_low"] < 60 < second["milliseconds_high"]


def test_a_contender_that_cannot_run_is_a_row_that_says_why() -> None:
    def absent() -> None:
        raise RuntimeError("no such device\nand a long trace")

    rows = said(kernel_timings.compared({"here": int, "absent": absent}, "cpu", turns=1))
    assert rows["absent"] == {"contender": "absent", "failed": "no such device"}
    assert rows["here"]["milliseconds"] >= 0


def test_ratios_are_to_the_first_contender_or_there_are_none():
    def absent() -> None:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        list(kernel_timings.compared({"absent": absent, "here": int}, "cpu", turns=1))


def test_the_pass_beside_ours_is_the_same_pass(targets: tuple[Target, Target]) -> None:
    tree = kernel_timings._bushy_tree(60, "cpu")
    ours, dense = (
        target.verify(kernel_timings._cached(target, CONTEXT, 60), tree) for target in targets
    )
    torch.testing.assert_close(dense.logits, ours.logits, rtol=1e-4, atol=1e-4)
    assert tree.depths().max() > 2


@pytest.mark.parametrize(("slower", "is_met"), [(1.04, True), (1.06, False)])
def test_a_pass_is_held_to_the_dense_one(
    slower: float, is_met: bool, targets: tuple[Target, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.cycle([100.0, 100.0 * slower])
    monkeypatch.setattr(kernel_timings, "_milliseconds", lambda run, device: next(times))
    rows = said(kernel_timings.passes(*targets, context=CONTEXT, turns=2))
    assert rows["tree_attention"]["ratio"] == pytest.approx(slower)
    assert rows["tree_attention"]["is_met"] is is_met
    assert "is_met" not in rows["SDPA, dense mask"]


@pytest.mark.parametrize(("took", "is_met"), [(1.9, True), (2.1, False)])
def test_a_verdict_walks_five_deep_and_is_held_to_two_milliseconds(
    took: float, is_met: bool, targets: tuple[Target, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_timings, "_milliseconds", lambda run, device: took)
    rows = said(kernel_timings.verdicts(targets[0], context=CONTEXT, turns=2))
    assert [row["accepted"] for row in rows.values()] == [5, 5]
    assert list(rows) == ["greedy", "sampled"]
    assert all(row["is_met"] is is_met for row in rows.values())


def test_a_verdict_leaves_the_cache_as_long_as_it_was(targets: tuple[Target, Target]) -> None:
    cache, tree, scores = kernel_timings._verified(targets[0], CONTEXT)
    assert cache.lengths.tolist() == [CONTEXT]
    assert scores.logits[0, :5].argmax(-1).tolist() == tree.tokens[0, 1:6].tolist()


def test_every_means_attends_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    runs = kernel_timings._contenders(*kernel_timings._case(40, "cpu"))
    found = {name: run() for name, run in runs.items()}
    expected = found.pop("tree_attention")[0]
    assert set(found) >= {"SDPA, dense mask", "flex_attention"}
    for name, out in found.items():
        out = out[0].transpose(0, 1) if "FlashInfer" not in name else out
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-2, msg=name)


def test_what_a_gpu_would_launch_is_what_its_plan_says() -> None:
    table = kernel_timings.launches((512, 8192)).set_index("context")
    plan = kernel_launch.plan(1, 60, 32, 8, 128, 8192 + 60, itemsize=2)
    assert table.loc[8192, "splits"] == plan.splits_of(8192)[1]
    assert table.loc[8192, "programs"] == 8 * plan.splits_of(8192)[1]
    assert table.loc[512, "splits"] < table.loc[8192, "splits"]


def test_the_command_says_what_it_could_not_run_and_writes_its_rows(
    tiny_target_folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    everyone = kernel_timings._contenders
    monkeypatch.setattr(
        kernel_timings,
        "_contenders",
        lambda *case: {k: v for k, v in everyone(*case).items() if k != "flex_attention"},
    )
    command = [
        "timings",
        str(tmp_path / "new" / "rows.csv"),
        "--turns",
        "2",
        "--contexts",
        str(CONTEXT),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--target", str(tiny_target_folder())])
    kernel_timings.main()
    rows = pd.read_csv(tmp_path / "new" / "rows.csv")
    assert rows.groupby("quantity").size().to_dict() == {"layer": 2, "pass": 2, "verify step": 2}
    assert rows["is_met"].notna().sum() == 3
    told = ["device", "threads", "torch", "triton", "when", "milliseconds"]
    assert rows[told].notna().all(axis=None)
    assert "On an H100 a layer would launch" in capsys.readouterr().out


def test_the_kernels_own_module_is_the_command() -> None:
    source = Path(tree_kernel.__file__).read_text()
    assert source.rstrip().endswith(
        'runpy.run_module("specrepro.kernel_timings", run_name="__main__")'
    )
