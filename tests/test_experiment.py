"""A run knows what its records depend on, loses nothing, and refuses in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from specrepro import __main__ as command_line
from specrepro import experiment, rows

PAPERS = list(experiment.PAPERS)


@pytest.fixture
def tiny_run(tiny_chat_folder, tmp_path, monkeypatch):
    """A run on a tiny target whose questions are three short prompts."""
    run = experiment.Run(
        "eagle3", tier="smoke", target=str(tiny_chat_folder), dtype="float32", figures_dir=tmp_path
    )
    monkeypatch.setattr(
        run, "questions", lambda name, n=0: [(f"{name}/{i}", [5 + i, 7, 9]) for i in range(3)]
    )
    return run


def test_a_kernel_that_jupyter_starts_beside_its_notebook_writes_where_the_command_does(
    tmp_path, monkeypatch
):
    for started, paths_start in ((experiment.ROOT / "notebooks", experiment.ROOT), (tmp_path,) * 2):
        monkeypatch.chdir(started)
        experiment.Run("eagle3", tier="smoke", figures_dir=tmp_path)
        assert Path.cwd() == paths_start


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eagle4"], "choose one of eagle3"),
        (["eagle3", "--tier", "tiny"], "choose one of smoke, laptop, full, paper"),
        (["eagle3", "-p", "sede", "1"], "unknown parameter 'sede'"),
        (["eagle3", "-p", "seed", "one"], "parameter seed takes a whole number of at least 0"),
        (["eagle3", "-p", "num_prompts", "-3"], "of at least 0, not '-3'"),
        (["eagle3", "-p", "tier", "smoke"], "parameter tier is set with --tier"),
        (["eagle3", "--fre"], "unrecognized arguments: --fre"),
        (["eagle3", "--resume", "--fresh"], "not allowed with argument --resume"),
    ],
)
def test_a_wrong_call_exits_2_and_names_what_is_known(arguments, said, capsys):
    try:
        status = command_line.main(arguments)
    except SystemExit as stopped:  # argparse's way out
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    status = command_line.main(["eagle3", "-p", "figures_dir", str(tmp_path / "file")])
    assert status == 1
    assert "choose another with -p figures_dir" in capsys.readouterr().err


def test_a_dry_run_measures_nothing_and_writes_nothing(tmp_path, capsys):
    status = command_line.main(["eagle3", "--dry-run", "-p", "figures_dir", str(tmp_path / "out")])
    assert status == 0
    assert not (tmp_path / "out").exists()
    assert "archives" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("paper", "said"),
    [
        ("eagle3", "4 prompts of each of 5 sets at temperature 0 and 1, 128 new tokens"),
        ("cast", "2 prompts of each of 3 sets at temperature 0 (chat at 1 too; 24 at batch 8), 40"),
        ("fasteagle", "5 sets at temperature 0 and 1, 64 new tokens"),
        ("gto", "of each of 3 sets"),
        ("adaeagle", "3 prompts of each of 3 sets at temperature 0 (chat at 1 too), 48 new tokens"),
    ],
)
def test_a_dry_run_says_what_this_paper_decodes(paper, said, tmp_path):
    assert said in command_line.plan(paper, "laptop", {}, tmp_path)
    assert "7 prompts of each" in command_line.plan(paper, "laptop", {"num_prompts": 7}, tmp_path)


def test_a_second_run_of_the_same_configuration_decodes_nothing(tiny_run, monkeypatch):
    from specrepro.decoding import Autoregressive

    tiny_run.depends_on(checkpoint="one")
    first = tiny_run.compare({"again": Autoregressive()}, ("chat",))
    monkeypatch.setattr("specrepro.measure.decode", lambda *a, **k: pytest.fail("decoded again"))
    tiny_run.depends_on(checkpoint="one")
    assert tiny_run.compare({"again": Autoregressive()}, ("chat",)) == first


def test_another_checkpoint_sets_the_records_aside_or_refuses_to_resume(tiny_run):
    tiny_run.depends_on(checkpoint="one")
    (tiny_run.records / "decoded.jsonl").write_text("a record\n")
    with pytest.raises(ValueError, match="checkpoint was 'one' and is 'two'"):
        tiny_run.depends_on(resume=True, checkpoint="two")
    assert (tiny_run.records / "decoded.jsonl").read_text() == "a record\n"
    tiny_run.depends_on(checkpoint="two")
    assert not (tiny_run.records / "decoded.jsonl").exists()
    aside = [path.read_text() for path in tiny_run.records.parent.glob("smoke-*/decoded.jsonl")]
    assert aside == ["a record\n"], "records of another configuration must be kept"


def test_records_of_another_machine_are_no_start_for_a_run_on_this_one(tiny_run, monkeypatch):
    tiny_run.depends_on(checkpoint="one")
    (tiny_run.records / "decoded.jsonl").write_text("a record\n")
    here = experiment.provenance.machine()
    other = here | {"threads": here["threads"] + 1}
    monkeypatch.setattr(experiment.provenance, "machine", lambda: other)
    message = f"threads was {here['threads']} and is {other['threads']}"
    with pytest.raises(ValueError, match=message):
        tiny_run.depends_on(resume=True, checkpoint="one")
    tiny_run.depends_on(checkpoint="one")
    assert not (tiny_run.records / "decoded.jsonl").exists()


def test_a_run_replaces_the_rows_of_its_own_tier_alone(tmp_path):
    path = tmp_path / "results.csv"
    experiment.replace_rows(path, pd.DataFrame({"tier": ["full"], "tau": [3.0]}), "full")
    experiment.replace_rows(path, pd.DataFrame({"tier": ["laptop"], "tau": [2.0]}), "laptop")
    experiment.replace_rows(path, pd.DataFrame({"tier": ["laptop"], "tau": [2.5]}), "laptop")
    found = pd.read_csv(path)
    assert dict(zip(found["tier"], found["tau"], strict=True)) == {"full": 3.0, "laptop": 2.5}


def test_rows_beside_stamped_ones_are_told_their_run_too(tiny_run):
    """Or nobody knows where they come from, and the next run does not replace them."""
    tiny_run.keep(pd.DataFrame({"quantity": ["decode"], "value": [1.0]}))
    drawn = pd.DataFrame({"quantity": ["gain"], "value": [2.0]})
    tiny_run.keep(pd.concat([tiny_run.rows, drawn], ignore_index=True))
    for name in rows.ABOUT_RUN:
        assert tiny_run.rows[name].nunique(dropna=False) == 1, name
    path = tiny_run.folder / "results.csv"
    for _ in range(2):
        experiment.replace_rows(path, tiny_run.rows, "smoke")
    assert len(pd.read_csv(path)) == 3


def test_a_stage_is_measured_once_per_configuration(tiny_run):
    tiny_run.depends_on(checkpoint="one")
    calls = []

    def make() -> pd.DataFrame:
        calls.append(1)
        return pd.DataFrame({"quantity": ["pass_cost"], "value": [float(len(calls))]})

    tiny_run.stage("pass_cost", make)
    tiny_run.stage("pass_cost", make)
    assert tiny_run.of("pass_cost")["value"].tolist() == [1.0, 1.0]
    tiny_run.depends_on(checkpoint="two")
    tiny_run.stage("pass_cost", make)
    assert tiny_run.of("pass_cost")["value"].tolist() == [1.0, 1.0, 2.0]


def test_where_auto_comes_to_float32_nothing_is_audited_twice(tiny_run, monkeypatch):
    audited = []

    def losslessness(target, *_, **options):
        audited.append((options["samplings"], options["prompts"], options["batch"]))
        return pd.DataFrame({"quantity": ["losslessness"], "value": [0.0]})

    assert str(tiny_run.target.dtype) == "torch.float32"
    tiny_run.dtype = "auto"  # as it was asked for
    tiny_run.depends_on(checkpoint="one")
    monkeypatch.setattr(experiment.losslessness, "losslessness", losslessness)
    tiny_run.audit({}, num_prompts=2)
    assert len(audited) == len(set(audited)) == 8, "two sets, alone and together, drawn or not"
    assert {batch for _, _, batch in audited} == {1, 2}, "two make no batch of four"
    audited.clear()
    tiny_run.audit({}, num_prompts=1)
    assert len(audited) == 4 and {batch for _, _, batch in audited} == {1}, "one makes no batch"


@pytest.mark.parametrize("name", ["num_prompts", "max_new_tokens"])
def test_a_negative_number_is_refused_rather_than_sliced_by(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}.* -3.*give at least 1, or 0 for the tier's"):
        experiment.Run("eagle3", figures_dir=tmp_path, **{name: -3})


def test_unknown_tiers_name_the_known_ones():
    with pytest.raises(ValueError, match="unknown tier 'huge'; choose one of smoke"):
        experiment.tier_named("huge")


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_module_notebook_claims_and_readme_row(paper):
    root = experiment.ROOT
    for path in (f"specrepro/{paper}.py", f"notebooks/{paper}.ipynb", f"claims/{paper}.yaml"):
        assert (root / path).is_file(), f"{path} is missing"


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_the_notebook_reaches_its_verdict_at_the_smoke_tier(paper, tmp_path):
    command = [sys.executable, "-m", "specrepro", paper, "--tier", "smoke"]
    answer = subprocess.run(
        [*command, "-p", "figures_dir", str(tmp_path)],
        cwd=experiment.ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    folder = tmp_path / paper
    verdict = json.loads((folder / "verdict.json").read_text())
    lossless = [claim for claim in verdict["claims"] if claim["id"].startswith("lossless")]
    assert {claim["verdict"] for claim in lossless} == {"direction holds"}
    assert all(claim["num_prompts"] for claim in lossless)
    drawn = {path.name for path in folder.glob("fig_*.png")}
    committed = {path.name for path in (experiment.ROOT / "figures" / paper).glob("fig_*.png")}
    assert drawn >= committed and len(drawn) >= 5, "a figure was not drawn"
    assert "direction holds" in answer.stdout, "the verdict was not printed"
    assert_resumes_in_place(folder, command, tmp_path)


def assert_resumes_in_place(folder: Path, command: list[str], tmp_path: Path) -> None:
    """A second run decodes nothing again: the records stay as they were."""
    before = (folder / "records" / "smoke" / "decoded.jsonl").read_bytes()
    again = [*command, "--resume", "-p", "figures_dir", str(tmp_path)]
    assert subprocess.run(again, cwd=experiment.ROOT, capture_output=True).returncode == 0
    assert (folder / "records" / "smoke" / "decoded.jsonl").read_bytes() == before
