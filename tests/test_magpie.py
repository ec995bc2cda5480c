"""The target's own prompts are whole, plain, reproducible, and none of the evaluation's."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from specrepro import magpie, prompts, target_model
from specrepro.target_model import Target


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


@pytest.fixture
def talkative(target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target whose every text would pass for a user's: what is dropped did not end."""
    monkeypatch.setattr(prompts, "is_plain_request", bool)
    return target


def lines_of(batches: list[list[prompts.Prompt]]) -> list[str]:
    return [prompts.to_line(one) for batch in batches for one in batch]


def test_opening_is_all_that_every_prompt_begins_with(target):
    begin = magpie.opening(target.tokenizer)
    for text in ("why is that", "what now"):
        asked = prompts.Prompt("q", "training", ({"role": "user", "content": text},))
        ids = prompts.encode(target.tokenizer, asked)
        assert ids[: len(begin)] == begin
        assert text in target.tokenizer.decode(ids[len(begin) :])


def test_opening_needs_a_template_that_shows_the_words(target, monkeypatch):
    monkeypatch.setattr(target.tokenizer, "chat_template", "{% for m in messages %}?{% endfor %}")
    with pytest.raises(ValueError, match="does not show"):
        magpie.opening(target.tokenizer)
    monkeypatch.setattr(target.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        magpie.opening(target.tokenizer)


def test_batches_do_not_change_what_a_seed_writes(talkative):
    options = {"seed": 3}
    at_once = lines_of(magpie.write(talkative, 24, batch_size=12, **options))
    in_three = lines_of(magpie.write(talkative, 24, batch_size=5, **options))
    others = lines_of(magpie.write(talkative, 24, batch_size=12, **options | {"seed": 4}))
    assert at_once == in_three and len(at_once) >= 2
    assert set(at_once).isdisjoint(others)


def test_prompts_that_did_not_end_are_left_out(talkative, monkeypatch):
    cut = lines_of(magpie.write(talkative, 8, max_new_tokens=1))
    monkeypatch.setattr(magpie, "_request", lambda target, tokens: "words")
    assert len(lines_of(magpie.write(talkative, 8, max_new_tokens=1))) == 8 > len(cut)


def test_a_second_call_goes_on_after_the_last_batch_kept(talkative, tmp_path, monkeypatch):
    monkeypatch.setattr(target_model, "load", lambda name: talkative)
    run = ["--batch-size", "4", "--seed", "3"]
    magpie.main([str(tmp_path / "whole"), "--num-prompts", "16", *run])
    magpie.main([str(tmp_path / "parts"), "--num-prompts", "8", *run])
    magpie.main([str(tmp_path / "parts"), "--num-prompts", "16", *run])
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text() != ""


def test_what_an_interruption_tore_is_written_again_whatever_the_batch_size(
    talkative, tmp_path, monkeypatch
):
    monkeypatch.setattr(target_model, "load", lambda name: talkative)
    run = ["--num-prompts", "16", "--seed", "3", "--batch-size"]
    magpie.main([str(tmp_path / "whole"), *run, "4"])
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    torn = tmp_path / "torn"
    torn.write_text("".join(lines[:-1]) + lines[-1][:9])
    magpie.main([str(torn), *run, "5"])
    assert torn.read_text() == (tmp_path / "whole").read_text()


def test_what_was_written_is_read_in_a_fair_order_and_never_an_evaluation_prompt(
    tmp_path, monkeypatch
):
    held = prompts.load("chat", 1)[0].messages[-1]["content"]
    texts = [held.upper(), "What is a tree?", "what is a tree", "Why not?", "How far is it?"]
    path = tmp_path / "magpie.jsonl.xz"
    written = [prompts.written_by_target(f"0/{n}", text) for n, text in enumerate(texts)]
    path.write_bytes(lzma.compress("".join(map(prompts.to_line, written)).encode()))
    monkeypatch.setattr(prompts, "WRITTEN", path)
    read = list(prompts.training_prompts(["magpie"]))
    assert {one.id for one in read} == {"magpie/0/1", "magpie/0/3", "magpie/0/4"}
    everything = [one.id for one in prompts.training_prompts()]
    assert everything[-3:] == [one.id for one in read]
    assert not any(name.startswith("magpie") for name in everything[:-3])
