"""The `paper` tier: its settings are the papers', and its whole road runs without the Hub.

Local folders stand in for target, head and prompt sets, tiny models of the same families with the
names of the real ones.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import huggingface_hub
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from specrepro import __main__ as command_line
from specrepro import (
    assets,
    checkpoints,
    claims,
    eagle3,
    eagle3_lab,
    experiment,
    paper_tier,
    prompts,
    target_model,
)
from specrepro.eagle3 import DraftHead, HeadConfig
from specrepro.paper_tier import PaperTarget

LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=128256,
)  # fmt: skip
SIZES = {  # of the targets' own config.json
    "Llama-3.1-8B-Instruct": LLAMA_8B,
    "DeepSeek-R1-Distill-Llama-8B": LLAMA_8B,
    "Llama-3.3-70B-Instruct": LLAMA_8B
    | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "vicuna-13b-v1.3": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40, head_dim=128, vocab_size=32000,
    ),
    "Qwen3-8B": LLAMA_8B | dict(intermediate_size=12288, num_hidden_layers=36, vocab_size=151936),
}  # fmt: skip
PUBLISHED = {Path(one.target).name: one for one in paper_tier.published()}
SET_ROWS = {  # one row of each set, in the columns of the papers' own
    "chat": {"prompt": ["Name a colour.", "Another."]},
    "humaneval": {"prompt": "def f(x):"},
    "maths": {"question": "1 + 1?", "answer": "2"},
    "instruction": {"instruction": "Translate.", "input": "Tag", "output": "day"},
    "summarisation": {"article": "It rained."},
}


@pytest.fixture(params=PUBLISHED)
def one(request: pytest.FixtureRequest) -> PaperTarget:
    return PUBLISHED[request.param]


# --- the settings


def test_trees_and_precision_are_the_papers():
    nodes = {name: one.total_tokens for name, one in PUBLISHED.items()}
    assert nodes == {
        "Llama-3.1-8B-Instruct": 60, "Llama-3.3-70B-Instruct": 48, "vicuna-13b-v1.3": 50,
        "DeepSeek-R1-Distill-Llama-8B": 60, "Qwen3-8B": 60,
    }  # fmt: skip
    assert {(one.depth, one.top_k) for one in PUBLISHED.values()} == {(7, 10)}
    halves = {one.dtype for name, one in PUBLISHED.items() if name != "Qwen3-8B"}
    assert halves == {"float16"} and PUBLISHED["Qwen3-8B"].dtype == "bfloat16"


def test_parameters_are_those_of_the_architectures(one):
    family = "qwen3" if "Qwen3" in one.target else "llama"
    sizes = SIZES[Path(one.target).name]
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == one.parameters


@pytest.mark.parametrize("name", [name for name in SIZES if name != "Llama-3.3-70B-Instruct"])
def test_heads_of_the_targets_sizes_have_the_parameters_named(name):
    sizes = {key: value for key, value in SIZES[name].items() if key != "num_hidden_layers"}
    with torch.device("meta"):
        head = DraftHead(HeadConfig(**sizes))
    assert sum(weight.numel() for weight in head.parameters()) == PUBLISHED[name].head_parameters


def test_claims_and_settings_call_a_target_by_the_same_names():
    models = yaml.safe_load((experiment.ROOT / "claims" / "eagle3.yaml").read_text())["models"]
    names = {one.model: one.target for one in PUBLISHED.values()}
    assert models.items() <= names.items() and names.keys() - models.keys() == {"Qwen3-8B"}


def test_reported_speedups_are_the_means_of_table_1(one):
    table = claims.reported("eagle3")
    means = table[
        (table["model"] == one.model)
        & (table["method"] == "EAGLE-3")
        & (table["prompts"] == "mean")
    ]
    found = means.sort_values("temperature", ascending=False)["speedup"].tolist()
    assert found == list(one.speedup) or one.model == "Qwen3-8B" and not found


def test_a_target_goes_by_its_id_or_by_the_name_of_its_folder(tmp_path):
    assert paper_tier.find("Qwen/Qwen3-8B") is PUBLISHED["Qwen3-8B"]
    assert paper_tier.find(str(tmp_path / "qwen3-8b")) is PUBLISHED["Qwen3-8B"]
    assert paper_tier.find("Qwen/Qwen3-4B") is None


# --- the plan


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the plan reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def dry_run(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, str]:
    """The lines of a plan by name."""
    assert command_line.main(["eagle3", "--tier", "paper", "--dry-run", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:9].strip(): line[10:] for line in lines}


def test_a_dry_run_names_what_is_fetched_and_estimates_the_rest(one, no_network, capsys):
    plan = dry_run(capsys, "-p", "target", one.target)
    assert plan["target"].startswith(one.target) and one.target not in plan["others"]
    assert all(other.target in plan["target"] + plan["others"] for other in PUBLISHED.values())
    assert plan["head"].startswith(one.head)
    assert plan["tree"] == f"depth 7, top-k 10, {one.total_tokens} nodes"
    assert f"target {2 * one.parameters / 1e9:.1f} GB" in plan["fetches"]
    assert prompts.HUB_SETS["maths"].revision[:12] in plan["prompts"]
    assert all("an estimate" in plan[name] for name in ("disk", "memory", "time"))
    assert "80 prompts of each of 5 sets" in plan["measures"]


def test_a_dry_run_without_a_target_is_of_the_papers_8b(no_network, capsys):
    assert dry_run(capsys)["target"].startswith("meta-llama/Llama-3.1-8B-Instruct ")


def test_what_lies_in_folders_is_not_fetched(no_network, capsys, tmp_path):
    target, head = tmp_path / "Qwen3-8B", tmp_path / "head"
    target.mkdir(), head.mkdir()
    named = [
        "-p",
        "target",
        str(target),
        "-p",
        "checkpoint",
        str(head),
        "-p",
        "prompts_dir",
        "sets",
    ]
    plan = dry_run(capsys, *named)
    assert (plan["fetches"], plan["head"], plan["prompts"]) == ("nothing", str(head), "sets")
    assert plan["disk"] == "0 GB, an estimate"


def test_more_prompts_take_longer_and_fewer_bits_take_less(one):
    def hours(**changed: object) -> float:
        plan = paper_tier.Plan(replace(one, **changed), 80, 512, 3)
        return float(plan.lines()["time"].split()[0])

    assert hours(dtype="float32") == pytest.approx(2 * hours(), rel=0.05)
    double = paper_tier.Plan(one, 160, 512, 3).lines()["time"]
    assert float(double.split()[0]) == pytest.approx(2 * hours(), rel=0.05)


# --- the road, on tiny models


def tiny_target(name: str, folder: Path) -> Path:
    """A tiny model of the family, where the Hub's would lie, with a tokenizer of characters."""
    config = conftest._tiny_config("qwen3" if name == "Qwen3-8B" else "llama", conftest.END)
    config.max_position_embeddings = 4096
    if name == "vicuna-13b-v1.3":
        config.num_key_value_heads = config.num_attention_heads
    model = AutoModelForCausalLM.from_config(config).float().eval()
    conftest._draw_decisive_weights(model)
    tokenizer = conftest._character_tokenizer()
    if name == "vicuna-13b-v1.3":
        tokenizer.chat_template = None
    model.save_pretrained(folder / name), tokenizer.save_pretrained(folder / name)
    return folder / name


def released_head(name: str, target: Path, folder: Path) -> Path:
    """A random head as the Hub has it: a pickle in half precision, and a config with gaps."""
    sizes = json.loads((target / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {key: sizes[key] for key in (*names, "vocab_size")} | {"draft_vocab_size": 40}
    if name == "Llama-3.3-70B-Instruct":
        config |= {"hidden_size": 32, "target_hidden_size": 64}
    if name == "vicuna-13b-v1.3":
        del config["draft_vocab_size"], config["num_key_value_heads"]
    else:
        config["head_dim"] = 16
    whole = {"draft_vocab_size": sizes["vocab_size"], "head_dim": 16, "num_key_value_heads": 4}
    head = DraftHead(HeadConfig(**whole | config))
    if hasattr(head, "d2t"):
        head.set_vocabulary(torch.arange(10, 50))
    state = {key: x.half() if x.is_floating_point() else x for key, x in head.state_dict().items()}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    about = {"model_type": "llama", "num_hidden_layers": sizes["num_hidden_layers"]}
    (folder / "config.json").write_text(json.dumps(config | about))
    return folder


@pytest.fixture
def stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[PaperTarget], dict[str, str]]:
    """Folders in place of target, prompt sets and Hub; what is set with -p to use them."""

    def lay_out(one: PaperTarget) -> dict[str, str]:
        name = Path(one.target).name
        target = tiny_target(name, tmp_path)
        head = released_head(name, target, tmp_path / "snapshot")
        hub = {one.head: str(head)}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hub[name])
        monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path / "cache"))
        for set_name, row in SET_ROWS.items():
            (tmp_path / "sets" / set_name).mkdir(parents=True)
            (tmp_path / "sets" / set_name / "rows.jsonl").write_text(json.dumps(row))
        return {"target": str(target), "prompts_dir": str(tmp_path / "sets")}

    return lay_out


def run_as_the_notebook(num_cells: int | None = 2, **given: object) -> dict[str, object]:
    """The names there are after the notebook's first cells of code: parameters, loading, ..."""
    cells = json.loads((experiment.ROOT / "notebooks" / "eagle3.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec(code[0], names)
    assert given.keys() <= names.keys(), "a parameter that the notebook does not have"
    names |= given
    for source in code[1:num_cells]:
        exec(source, names)
    return names


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_road_from_settings_to_records_runs_without_the_hub(one, dtype, stand_ins, tmp_path):
    names = run_as_the_notebook(
        **stand_ins(one), tier="paper", dtype=dtype, num_prompts=1, max_new_tokens=40,
        figures_dir=str(tmp_path / "figures"),
    )  # fmt: skip
    run, drafter, folder = names["run"], names["drafter"], names["folder"]
    assert asdict(drafter.tree) == {"depth": 7, "top_k": 10, "total_tokens": one.total_tokens}
    assert (folder / checkpoints.WEIGHTS).is_file() and not list(folder.glob("*.bin"))
    assert set(names["reported"]["model"]) <= {one.model}
    for name in prompts.PROMPT_SETS:
        [(prompt_id, ids)] = run.questions(name)
        assert prompt_id == f"hub/{name}/0"
        said = run.target.tokenizer.decode(ids)
        assert (one.system or "user: ")[:40] in said
        assert said.rstrip().lower().endswith("assistant:")
    run.tier = replace(run.tier, repeats=1)
    records = run.compare({"EAGLE-3": drafter}, ("chat",), (0.0,))
    drafted, plain = ([r.tokens for r in records if r.method == m]
                      for m in ("EAGLE-3", "Autoregressive"))  # fmt: skip
    own = one.dtype if dtype == "auto" else dtype
    same = 40 if own != "bfloat16" else 8  # near ties, which the audit looks at, part these later
    assert drafted[0][:same] == plain[0][:same] and len(drafted[0]) == len(plain[0]) == 40
    accepted = [max(r.accepted) for r in records if r.method == "EAGLE-3"]
    assert max(accepted) > 0 or dtype == "auto", "a random head is right by chance"
    decoded = run.decode_rows(records)
    assert set(decoded["tier"]) == {"paper"} and set(decoded["dtype"]) == {own}


@pytest.mark.slow
def test_the_whole_notebook_reaches_its_verdict_where_the_paper_reports_nothing(
    stand_ins, tmp_path, monkeypatch
):
    small = {"repeats": 1, "audited_prompts": 2, "audited_tokens": 4, "exact_tokens": 4}
    tier = replace(experiment.TIERS["paper"], **small)
    monkeypatch.setitem(experiment.TIERS, "paper", tier)
    names = run_as_the_notebook(
        None, **stand_ins(PUBLISHED["Qwen3-8B"]), tier="paper", dtype="float32", num_prompts=1,
        max_new_tokens=4, figures_dir=str(tmp_path / "figures"),
    )  # fmt: skip
    found = {verdict.id: verdict.verdict for verdict in names["verdicts"]}
    assert found["lossless-greedy"] == "direction holds"
    assert found["llama-3.1-8b-greedy-tau"] == "proxy", "another target's number"
    assert len(list((tmp_path / "figures" / "eagle3").glob("fig_*.png"))) == 7


def test_half_precision_and_the_float32_audit_are_the_settings(one, tmp_path):
    run = experiment.Run("eagle3", tier="paper", target=one.target, figures_dir=tmp_path)
    assert run.dtype == one.dtype and run.reported_model == one.model
    stages = []
    run.target = SimpleNamespace(dtype=getattr(torch, run.dtype))
    row = pd.DataFrame({"quantity": ["losslessness"]})
    run.once = lambda name, make: stages.append(name) or row
    run.environment = {}
    run.audit({})
    assert any("float32" in name for name in stages) == one.exact
    assert any(one.dtype in name for name in stages)


def test_prompts_that_leave_no_room_for_the_answer_are_passed_over_and_named(tmp_path):
    articles = ["It rained.", *(["word " * 900] * 5), "It snowed."]
    (tmp_path / "summarisation").mkdir()
    rows = "\n".join(json.dumps({"article": article}) for article in articles)
    (tmp_path / "summarisation" / "rows.jsonl").write_text(rows)
    run = experiment.Run(
        "eagle3", tier="paper", target="lmsys/vicuna-13b-v1.3", prompts_dir=str(tmp_path),
        num_prompts=2, max_new_tokens=512, figures_dir=tmp_path / "figures",
    )  # fmt: skip
    run.target = SimpleNamespace(tokenizer=conftest._character_tokenizer(), max_context=2048)
    ids = {f"hub/summarisation/{row}" for row in range(7)}
    assert {one for one, _ in run.questions("summarisation")} == {min(ids), max(ids)}
    assert run.passed_over and run.passed_over <= ids - {min(ids), max(ids)}
    with pytest.raises(ValueError, match="has 2 prompts, 3 were asked for"):
        run.questions("summarisation", 3)


def test_no_stage_asks_for_more_prompts_than_mt_bench_has():
    plan = eagle3_lab.PLANS["paper"]
    fewest = [batch * eagle3_lab.FEWEST_BATCHES for batch in plan.batches if batch > 1]
    assert max(*fewest, plan.num_prompts) <= 80


def test_training_puts_a_prompt_as_evaluation_does(one, tmp_path):
    folder = tiny_target(Path(one.target).name, tmp_path)
    loaded = target_model.load(str(folder))  # as the corpus and training do
    asked = prompts.encode(loaded.tokenizer, prompts.written_by_target("id", "Hi"))
    said = loaded.tokenizer.decode(asked)
    assert (one.system or "Hi") in said and "Hi" in said


def test_a_head_is_fetched_and_converted_once(stand_ins, monkeypatch):
    one = PUBLISHED["Llama-3.1-8B-Instruct"]
    stand_ins(one)
    folder = paper_tier.obtain_head(one.head)
    (folder / "config.json").unlink()  # as where the first conversion was stopped half-way
    assert paper_tier.obtain_head(one.head) == folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("again"))
    assert paper_tier.obtain_head(one.head) == folder
    head, tree = eagle3.load_head(folder)
    assert tree == eagle3.TreeConfig() and head.draft_token_ids().tolist() == list(range(10, 50))


def test_without_the_hub_one_line_names_the_alternatives(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path))
    with pytest.raises(assets.AssetError, match="cannot fetch the draft head yuhuili/") as refused:
        paper_tier.obtain_head(PUBLISHED["vicuna-13b-v1.3"].head)
    assert "-p checkpoint FOLDER" in str(refused.value) and "\n" not in str(refused.value)


def test_a_target_that_no_head_was_released_for_needs_one_named(tmp_path):
    run = experiment.Run("eagle3", tier="paper", target="a/b", figures_dir=tmp_path)
    with pytest.raises(ValueError, match="no released head is known for target 'a/b'.*Qwen/Qwen3"):
        run.head("")
    assert run.head("", from_scratch=True) == "" and run.head(str(tmp_path)) == str(tmp_path)
    assert run.tree(depth=0, top_k=3) == {"depth": 0, "top_k": 3}, "the checkpoint's own"


def test_a_size_that_is_given_goes_before_the_papers():
    sizes = {"depth": 3, "top_k": 0, "total_tokens": 0}
    assert PUBLISHED["vicuna-13b-v1.3"].tree(**sizes) == sizes | {"top_k": 10, "total_tokens": 50}


def test_vicuna_is_asked_in_its_own_template_and_no_other_template_is_touched():
    vicuna, tokenizer = PUBLISHED["vicuna-13b-v1.3"], conftest._character_tokenizer()
    vicuna.prepare(tokenizer)
    assert tokenizer.chat_template == conftest.CHAT_TEMPLATE
    tokenizer.chat_template = None
    vicuna.prepare(tokenizer)
    asked = prompts.Prompt("q", "chat", prompts._conversation(["Hi", "Hello.", "Why?"]))
    text = tokenizer.decode(prompts.encode(tokenizer, asked))
    assert text == f"<s>{vicuna.system} USER: Hi ASSISTANT: Hello.</s>USER: Why? ASSISTANT:"
