"""Questions are fixed by their seed, answers scored by their generator, and little is passed on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import _character_tokenizer
from transformers import PreTrainedTokenizerFast

from specrepro import prompts, reasoning
from specrepro.reasoning import END_OF_THINKING, Question, final_answer, same_answer, stated_answer

FOUR = Question("q", "arithmetic", "2 + 2?", "4", lambda said: float(said == "4"))


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _character_tokenizer()
    tokenizer.add_tokens([END_OF_THINKING])
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", list(reasoning.GENERATED))
def test_questions_are_fixed_by_their_seed(name: str) -> None:
    few, many = (reasoning.generated(name, num, seed=3) for num in (2, 4))
    assert [one.text for one in few] == [one.text for one in many[:2]]
    assert len({one.id for one in many}) == len({one.text for one in many}) == 4
    assert all(one.text.endswith(reasoning.REASON) and one.answer for one in many)
    other = reasoning.generated(name, 4, seed=4)
    assert {one.text for one in other}.isdisjoint(one.text for one in many)


def test_no_question_is_one_of_the_prompt_set_of_maths() -> None:
    asked = {one.messages[0]["content"] for one in prompts.load("maths", 1319)}
    questions = reasoning.generated("arithmetic", 100)
    assert asked.isdisjoint(one.text.removesuffix(reasoning.REASON) for one in questions)


@pytest.mark.parametrize("name", list(reasoning.GENERATED))
def test_a_right_answer_is_scored_one_however_it_is_given(name: str) -> None:
    one, other = reasoning.generated(name, 2)
    for said in (
        f"First this, then that.\n<answer>{one.answer}</answer>\nDone.",
        f"So it is \\boxed{{{one.answer}}} in the end.",
        f"Thinking about 12 of them.\n\nThe answer is: {one.answer}",
    ):
        assert one.score(said) == 1
    assert one.score("") == one.score("The answer is unknown.") == 0
    if one.answer != other.answer:
        assert one.score(f"<answer>{other.answer}</answer>") == 0


def test_a_number_is_read_without_commas_and_units() -> None:
    question = next(q for q in reasoning.generated("arithmetic", 20) if len(q.answer) == 3)
    assert question.score(f"<answer>{question.answer} dollars</answer>") == 1
    equation = reasoning.generated("algebra", 1)[0]
    assert equation.score(f"<answer>x = {equation.answer}</answer>") == 1
    assert reasoning.last_number("1,234.5 of 7,000 is 12,345") == "12345"
    assert reasoning.last_number("none") == ""


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("<answer>1</answer> or <answer> 2 </answer>", "2"),
        ("\\boxed{1} then \\boxed{\\frac{3}{4}}.", "\\frac{3}{4}"),
        ("One.\nSo the answer is 5.", "5."),
        ("One.\n\n  Two  \n\n", "Two"),
        ("", ""),
    ],
)
def test_what_a_text_states(text: str, stated: str) -> None:
    assert stated_answer(text) == stated


def test_unknown_sets_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="arithmetic, algebra, logic"):
        reasoning.generated("poetry", 1)
    with pytest.raises(ValueError, match="0 questions"):
        reasoning.generated("logic", 0)
    with pytest.raises(ValueError, match="aime24, aime25, math500, gpqa"):
        reasoning.from_hub("maths", 1)


# --- the benchmark's own sets

COLUMNS = {
    "aime24": {"problem": "What?", "answer": 27},
    "aime25": {"problem": "What?", "answer": "70"},
    "math500": {"problem": "What?", "answer": "\\frac{1}{2}"},
    "gpqa": {"Question": "Which?", "Correct Answer": "a magnet"},
}


@pytest.mark.parametrize("name", list(reasoning.FROM_HUB))
def test_a_set_of_the_benchmark_is_the_bare_question(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(COLUMNS[name]) + "\n")
    (one,) = reasoning.from_hub(name, 1, source=str(tmp_path))
    text, answer = map(str, COLUMNS[name].values())
    assert (one.id, one.category, one.text, one.answer) == (f"{name}/0", name, text, answer)
    assert one.first_prompt().messages == ({"role": "user", "content": text},)
    assert one.score(f"... \\boxed{{{answer}}}") == 1
    assert one.score("\\boxed{something else}") == 0


def test_without_math_verify_texts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "find_spec", lambda name: None)
    assert same_answer("1/2", "$1/2$.") == 1 and same_answer("A magnet", "a  magnet") == 1
    assert same_answer("1/2", "0.5") == 0


def test_math_verify_is_asked_where_texts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def verify(gold: str, found: str) -> bool:
        asked.append((gold, found))
        return found == "\\boxed{0.5}"

    monkeypatch.setattr(reasoning, "find_spec", lambda name: object())
    module = SimpleNamespace(parse=lambda text: text, verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", module)
    assert same_answer("1/2", "0.5") == 1 and same_answer("1/2", "3") == 0
    assert same_answer("1/2", "1/2") == 1
    assert asked == [("\\boxed{1/2}", "\\boxed{0.5}"), ("\\boxed{1/2}", "\\boxed{3}")]


# --- what the next turn sees


def test_the_next_prompt_holds_the_question_and_the_final_answer_alone() -> None:
    tokenizer = thinking_tokenizer()
    said = encoded(tokenizer, "Let me see, 2 and 2 and") + encoded(
        tokenizer, "</think>\n\nIt is 4."
    )
    (message,) = FOUR.next_prompt(final_answer(tokenizer, said)).messages
    assert message["role"] == "user" and message["content"].startswith("2 + 2?")
    assert "<answer> It is 4. </answer>" in message["content"]
    assert "Let me see" not in message["content"] and END_OF_THINKING not in message["content"]


def test_thinking_that_never_ended_passes_nothing_on() -> None:
    tokenizer = thinking_tokenizer()
    assert final_answer(tokenizer, encoded(tokenizer, "and on and on")) == ""
    assert FOUR.next_prompt("") == FOUR.first_prompt()
    twice = encoded(tokenizer, "a</think>b</think> c ")
    assert final_answer(tokenizer, twice) == "c", "the last mark counts"


def test_a_target_without_a_thinking_mode_passes_its_last_paragraph_on() -> None:
    tokenizer = _character_tokenizer()
    assert (
        final_answer(tokenizer, encoded(tokenizer, "One.\n\nTwo\nThree.\n \nIt is 4.\n"))
        == "It is 4."
    )


@pytest.mark.parametrize("copies", [1, 3])
def test_the_growing_prompt_repeats_the_question(copies: int) -> None:
    prompt = FOUR.first_prompt(copies)
    assert [message["content"] for message in prompt.messages] == ["2 + 2?"] * copies
    ids = prompts.encode(_character_tokenizer(), prompt)
    text = _character_tokenizer().decode(ids)
    assert text.count("user: 2 + 2?\n") == copies


# --- the budget


def target_like(tokenizer: PreTrainedTokenizerFast, model_type: str) -> SimpleNamespace:
    config = SimpleNamespace(model_type=model_type)
    return SimpleNamespace(tokenizer=tokenizer, config=config, name="some target")


def test_a_target_that_does_not_think_aloud_has_no_budget() -> None:
    target = target_like(_character_tokenizer(), "llama")
    assert reasoning.thinking_of(target, 512) is None
    assert "has no thinking mode" in reasoning.about_thinking(target, None)


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_a_budget_is_four_fifths_of_the_new_tokens(model_type: str) -> None:
    tokenizer = thinking_tokenizer()
    target = target_like(tokenizer, model_type)
    thinking = reasoning.thinking_of(target, 15_000)
    assert thinking.budget == 12_000 and thinking.end_id == tokenizer.get_vocab()[END_OF_THINKING]
    words = tokenizer.decode(list(thinking.forced))
    assert words.startswith("Considering" if model_type == "qwen3" else "\n\n</think>")
    assert words.endswith("\n\n") and list(thinking.forced).count(thinking.end_id) == 1
    assert "after 12000 new tokens" in reasoning.about_thinking(target, thinking)
