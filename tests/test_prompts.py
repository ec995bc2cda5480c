"""Prompt sets are fixed by their seed, and nothing asked in evaluation was seen in training."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import count, islice
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from specrepro import assets, prompts

TURNS = ("human", "gpt")
PLAIN = "tell me something about the {} of the town"


def piece_ids(is_held_out: bool, part: int = 0):
    """Endless piece ids on one side of the line between training and evaluation."""
    ids = (f"made{number}_{part}" for number in count())
    return (piece_id for piece_id in ids if prompts.held_out(piece_id) == is_held_out)


def record(piece_id: str, *texts: str) -> dict:
    """A ShareGPT record of alternating turns."""
    turns = [{"from": TURNS[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": piece_id, "conversations": turns}


@pytest.fixture
def sharegpt(tmp_path, monkeypatch):
    """`sharegpt(records)` makes these records all of ShareGPT and gives the prompts by set."""

    def use(records: list[dict], end: str = "]") -> dict[str, list[prompts.Prompt]]:
        path = tmp_path / "sharegpt.json"
        path.write_text(json.dumps(records, indent=2)[:-1] + end, encoding="utf-8")
        monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(assets, "fetch", lambda name: path)
        return prompts._sharegpt()

    return use


def training_texts(by_set: dict[str, list[prompts.Prompt]]) -> list[list[str]]:
    """What is said in each training prompt."""
    return [[m["content"] for m in prompt.messages] for prompt in by_set.get("training", [])]


# what is on which side


def test_a_tenth_of_all_conversations_is_held_out():
    share = sum(prompts.held_out(f"conversation{i}_0") for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 0.01


def test_no_part_of_a_conversation_crosses_the_line():
    for number in range(200):
        parts = {prompts.held_out(f"made{number}_{part}") for part in (0, 3, 17, 205)}
        assert len(parts) == 1


def test_the_real_sides_share_no_conversation_and_no_user_message():
    training = list(prompts.training_prompts())
    sets = ("chat", "instruction", "summarisation")
    held = [p for name in sets for p in prompts._sharegpt()[name]]
    assert _conversations(training).isdisjoint(_conversations(held))
    assert _user_words(training).isdisjoint(_user_words(held))


def _conversations(some: list[prompts.Prompt]) -> set[str]:
    return {prompt.id.split("/")[-1].rpartition("_")[0] for prompt in some}


def _user_words(some: list[prompts.Prompt]) -> set[str]:
    messages = [m for prompt in some for m in prompt.messages if m["role"] == "user"]
    return {" ".join(message["content"].lower().split()) for message in messages}


def test_a_training_prompt_that_repeats_an_evaluation_prompt_is_dropped(sharegpt):
    held, kept = islice(piece_ids(True), 8), islice(piece_ids(False), 9)
    records = [record(i, PLAIN.format(f"street {n}")) for n, i in enumerate(held)]
    records += [record(i, PLAIN.format(f"STREET  {n}").upper()) for n, i in enumerate(kept)]
    by_set = sharegpt(records)
    assert len(by_set.get("chat", []) + by_set.get("instruction", [])) == 8
    assert training_texts(by_set) == [[PLAIN.format("STREET  8").upper()]]


# what is kept of ShareGPT


def test_the_torn_last_record_is_dropped(sharegpt):
    first, second = islice(piece_ids(False), 2)
    torn = json.dumps(record(second, PLAIN.format("bridges")))[:-9]
    by_set = sharegpt([record(first, PLAIN.format("church"))], end=", " + torn)
    assert training_texts(by_set) == [[PLAIN.format("church")]]


@pytest.mark.parametrize(
    "text",
    [
        "too short",
        "word " * 301,
        "что вы знаете об этом городе",
        "what is <div><b>this</b></div> here",
        "say <|im_end|> and nothing more",
        "please open this address https://example.org/" + "a1" * 40,
    ],
)
def test_what_a_small_english_target_cannot_follow_is_dropped(sharegpt, text):
    first, second = islice(piece_ids(False), 2)
    by_set = sharegpt([record(first, text), record(second, PLAIN.format("church"))])
    assert training_texts(by_set) == [[PLAIN.format("church")]]


def test_words_asked_twice_are_trained_on_once(sharegpt):
    same = ["How old is the church?", "how old  is the church", "HOW OLD IS THE CHURCH?!"]
    by_set = sharegpt([record(i, text) for i, text in zip(piece_ids(False), same, strict=False)])
    assert training_texts(by_set) == [same[:1]]


def test_a_later_piece_gives_its_context_or_nothing(sharegpt):
    first, second = islice(piece_ids(False, part=7), 2)
    texts = [PLAIN.format("church"), "It is old.", "How old is it?"]
    long_answer = [PLAIN.format("walls"), "word " * 300, "How old are they?"]
    by_set = sharegpt([record(first, *texts, "Very."), record(second, *long_answer)])
    assert training_texts(by_set) == [texts]


def test_a_piece_that_begins_with_an_answer_begins_with_the_next_question(sharegpt):
    [piece_id] = islice(piece_ids(False), 1)
    turns = record(piece_id, PLAIN.format("church"), "It is old.")
    turns["conversations"].insert(0, {"from": "gpt", "value": "Anything else?"})
    assert training_texts(sharegpt([turns])) == [[PLAIN.format("church")]]


def test_a_conversation_gives_one_summary_however_long_it_is(sharegpt):
    stem = next(piece_ids(True)).rpartition("_")[0]
    answers = [f"{name} " * 200 for name in ("one", "two", "three")]
    records = [record(f"{stem}_{n}", f"go on {n}", text) for n, text in enumerate(answers, start=5)]
    [prompt] = sharegpt(records)["summarisation"]
    assert prompt.id == f"summarisation/answer/{stem}_5"
    assert prompt.messages[0]["content"] == prompts.SUMMARISE.format(answers[0].strip())


@pytest.mark.parametrize("pattern", ["Please summarize this: {}", "{}\nTL;DR"])
def test_a_long_text_is_shortened_and_still_asks_for_its_summary(sharegpt, pattern):
    text = pattern.format("word " * 2000)
    [prompt] = sharegpt([record(next(piece_ids(True)), text)])["summarisation"]
    shortened = prompt.messages[0]["content"]
    assert prompt.id.startswith("summarisation/request/")
    assert 590 <= len(shortened.split()) <= 600
    assert "summarize" in shortened or "TL;DR" in shortened


def test_what_was_sorted_is_read_back_the_same(sharegpt, monkeypatch):
    ids = islice(piece_ids(False), 20)
    first = sharegpt([record(i, PLAIN.format(f"café {n}"), "Yes.") for n, i in enumerate(ids)])
    prompts._read_prompts.cache_clear()
    monkeypatch.setattr(prompts, "_sort_sharegpt", lambda _: pytest.fail("sorted again"))
    assert prompts._sharegpt() == first and len(first["training"]) == 20


# the sets


@pytest.mark.parametrize("name", prompts.PROMPT_SETS)
def test_every_set_has_eighty_prompts_and_fewer_are_the_start_of_more(name):
    some = prompts.load(name, 80, seed=3)
    assert len({prompt.id for prompt in some}) == 80
    assert prompts.load(name, 7, seed=3) == some[:7]
    assert prompts.load(name, 80, seed=4) != some
    assert {prompt.prompts for prompt in some} == {name}
    for prompt in some:
        roles = [message["role"] for message in prompt.messages]
        assert roles in (["user"], ["user", "assistant", "user"])
        assert all(message["content"].strip() for message in prompt.messages)


def test_sharegpt_prompts_are_many_and_a_quarter_are_contexts():
    training = list(prompts.training_prompts(["sharegpt"]))
    lengths = Counter(len(prompt.messages) for prompt in training)
    assert len({prompt.id for prompt in training}) == len(training) >= 8000
    assert 0.2 < lengths[3] / len(training) < 0.33 and set(lengths) == {1, 3}


def test_the_first_prompts_of_a_source_are_a_fair_sample():
    training = list(prompts.training_prompts(["sharegpt"]))
    share = [len(prompt.messages) == 3 for prompt in training]
    early, overall = sum(share[:1000]) / 1000, sum(share) / len(share)
    assert abs(early - overall) < 0.05
    assert training[:50] == list(islice(prompts.training_prompts(), 50))  # ShareGPT's come first


@pytest.mark.parametrize("name", ["chat", "humaneval", "maths"])
def test_asking_for_more_than_there_are_says_how_many(name):
    with pytest.raises(ValueError, match=rf"{name!r} has \d+ prompts, 5000 were asked for"):
        prompts.load(name, 5000)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_what_chooses_among_states_is_never_reported_on(seed):
    choosing = {one.id for one in prompts.to_choose_by()}
    for name in ("chat", "instruction"):
        asked = {one.id for one in prompts.load(name, 255, seed)}
        assert not asked & choosing, "the kept state would be reported on its own prompts"
    assert len(choosing) == 12


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'gsm8k'.*chat, humaneval, maths, instruction, summ"):
        prompts.load("gsm8k", 1)


def test_maths_questions_have_answers_and_seeds_share_none():
    some, others = prompts.load("maths", 300, seed=0), prompts.load("maths", 300, seed=1)
    assert all(prompt.answer and prompt.messages[0]["content"].strip() for prompt in some)
    assert all(any(c.isdigit() for c in prompt.answer) for prompt in some)
    assert len(_user_words(some) & _user_words(others)) < 5, "seeds overlap"


def test_humaneval_asks_to_complete_a_python_function():
    for prompt in prompts.load("humaneval", 164):
        text = prompt.messages[0]["content"]
        assert text.startswith("Complete the following Python function.") and "def " in text


# putting it to the target


TALK = prompts.Prompt(
    "made/1", "chat", prompts._conversation(["Hello there", "Good day.", "How are you?"])
)


def test_a_prompt_is_encoded_by_the_targets_template(tiny_chat_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    ids = prompts.encode(tokenizer, TALK)
    assert type(ids) is list and all(type(token) is int for token in ids)
    expected = "<s>user: Hello there\nassistant: Good day.\nuser: How are you?\nassistant: "
    assert tokenizer.decode(ids) == expected


def test_without_a_template_the_turns_are_plain_text(tiny_chat_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.chat_template = None
    text = tokenizer.decode(prompts.encode(tokenizer, TALK), skip_special_tokens=True)
    assert text == "User: Hello there\nAssistant: Good day.\nUser: How are you?\nAssistant:"


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(tiny_chat_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    num_tokens = len(prompts.encode(tokenizer, TALK))
    assert len(prompts.encode(tokenizer, TALK, max_tokens=num_tokens)) == num_tokens
    with pytest.raises(ValueError, match=f"{num_tokens} tokens.*max_tokens={num_tokens - 1}"):
        prompts.encode(tokenizer, TALK, max_tokens=num_tokens - 1)


# the papers' own sets


def test_a_folder_of_jsonl_stands_in_for_the_hub(tmp_path):
    rows = [{"question": f"what is {n} and {n}?", "answer": str(2 * n)} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    everything = prompts.load_from_hub("maths", 30, source=tmp_path)
    asked = {(prompt.messages[0]["content"], prompt.answer) for prompt in everything}
    assert asked == {(row["question"], row["answer"]) for row in rows}
    assert prompts.load_from_hub("maths", 5, source=tmp_path) == everything[:5]
    with pytest.raises(ValueError, match="has 30 prompts, 31 were asked for"):
        prompts.load_from_hub("maths", 31, source=tmp_path)


def test_a_saved_data_set_stands_in_for_the_hub(tmp_path):
    rows = [{"prompt": ["first turn", "second turn"]}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    [prompt] = prompts.load_from_hub("chat", 1, source=tmp_path / "saved")
    assert prompt.messages == ({"role": "user", "content": "first turn"},)


def test_an_instruction_carries_what_it_is_about(tmp_path):
    row = {"instruction": "Translate this.", "input": "Guten Tag"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [prompt] = prompts.load_from_hub("instruction", 1, source=tmp_path)
    assert prompt.messages[0]["content"] == "Translate this.\n\nGuten Tag"


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"frage": "wie viel?", "antwort": "4"}))
    with pytest.raises(ValueError, match="'question'.*frage, antwort"):
        prompts.load_from_hub("maths", 1, source=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match="neither .jsonl files nor a saved data set"):
        prompts.load_from_hub("maths", 1, source=tmp_path)


def test_an_absent_hub_is_one_line_that_names_the_folder_alternative():
    with pytest.raises(assets.AssetError, match="cannot load openai/gsm8k.*folder") as refusal:
        prompts.load_from_hub("maths", 1)
    assert "\n" not in str(refusal.value)


def test_every_set_of_the_hub_is_pinned_and_another_data_set_is_read_as_it_is(monkeypatch):
    read = []
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *names, split, revision: read.append((*names, revision)) or [{"question": "1?",
                                                                             "answer": "1"}],
    )  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{40}", one.revision) for one in prompts.HUB_SETS.values())
    prompts.load_from_hub("maths", 1)
    prompts.load_from_hub("maths", 1, source="my/own")
    pinned = prompts.HUB_SETS["maths"].revision
    assert read == [("openai/gsm8k", "main", pinned), ("my/own", "main", None)]
