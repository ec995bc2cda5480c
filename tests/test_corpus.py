"""The corpus is the target's own answers, whoever computes them and however often it is stopped."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from specrepro import corpus, draft_training, prompts, target_model
from specrepro.corpus import Answer, Corpus, FeatureCache, Part, shuffled_batches
from specrepro.decoding import decode, decode_autoregressively
from specrepro.target_model import Target

NUM_QUESTIONS, BATCH_SIZE = 22, 3  # eight batches, the last of one
HIDDEN = 64
BF16_ULP = 2**-7  # relative, twice over: features are kept in bfloat16


def ask(number: int) -> prompts.Prompt:
    """A question of its own length."""
    text = f"what is {number} " + "and why " * (number * 7 % 5)
    return prompts.Prompt(f"q{number:02d}", "training", ({"role": "user", "content": text},))


QUESTIONS = [ask(number) for number in range(NUM_QUESTIONS)]


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def training_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "training_prompts", lambda: iter(QUESTIONS))


@pytest.fixture(scope="module")
def whole(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that was never interrupted; not to be written to."""
    return generate(target, tmp_path_factory.mktemp("whole"))


def generate(target: Target, folder: Path, **options: int) -> Path:
    sizes = {"max_new_tokens": 6, "batch_size": BATCH_SIZE}
    corpus.generate(target, QUESTIONS, folder, **sizes | options)
    return folder


def answers_of(folder: Path) -> dict[str, Answer]:
    """Every answer of every part by its prompt; none may be there twice."""
    answers = [a for path in folder.glob("part-*") for a in corpus.Part(path, HIDDEN).answers()]
    found = {answer.prompt_id: answer for answer in answers}
    assert len(found) == len(answers), "a prompt was answered twice"
    return found


def columns_of(batch: corpus.Batch) -> list[Tensor]:
    return [getattr(batch, field.name) for field in fields(batch)]


def sequences_of(target: Target, folder: Path) -> dict[str, tuple[Tensor, ...]]:
    """tokens, is_answer, choices, taps and states of each prompt, one sequence at a time."""
    cache = FeatureCache(folder, target.hidden_size)
    ids = corpus.prompt_ids(target.tokenizer, cache.answers)
    return {
        answer.prompt_id: tuple(column[0] for column in columns_of(cache.batch([place], ids)))
        for place, answer in enumerate(cache.answers)
    }


def assert_same_features(target: Target, one: Path, other: Path) -> None:
    """Where training reads: taps and states up to the last token, choices over the answer."""
    wanted, found = sequences_of(target, one), sequences_of(target, other)
    assert wanted.keys() == found.keys()
    for prompt_id, (tokens, is_answer, choices, *features) in wanted.items():
        their_tokens, their_is_answer, their_choices, *their_features = found[prompt_id]
        assert torch.equal(tokens, their_tokens) and torch.equal(is_answer, their_is_answer)
        is_read = is_answer.clone()
        is_read[-1] = False
        assert torch.equal(choices[is_read], their_choices[is_read])
        for ours, theirs in zip(features, their_features, strict=True):
            assert ours[:-1].abs().min(-1).values.max() > 0, "no feature was written"
            torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=BF16_ULP, atol=1e-3)


# --- generation


def test_every_prompt_is_answered_as_decoding_it_alone_would(target, whole):
    answers, temperatures = answers_of(whole), Counter()
    assert answers.keys() == {question.id for question in QUESTIONS}
    for question in QUESTIONS:
        answer, tokens = answers[question.id], prompts.encode(target.tokenizer, question)
        options = {"temperature": answer.temperature, "seed": answer.seed, "max_new_tokens": 6}
        assert answer.tokens == decode_autoregressively(target, tokens, **options).tokens
        assert answer.prompt_tokens == len(tokens)
        temperatures[answer.temperature] += 1
    assert abs(temperatures[0.0] - temperatures[1.0]) <= 2 * BATCH_SIZE, "half of each, by batches"
    assert len({answer.seed for answer in answers.values()}) == NUM_QUESTIONS


def test_another_seed_changes_sampled_answers_alone(target, whole, tmp_path):
    before, after = answers_of(whole), answers_of(generate(target, tmp_path, seed=1))
    changed = {a.temperature for a in before.values() if a.tokens != after[a.prompt_id].tokens}
    assert changed == {1.0}


def test_a_second_pass_swaps_greedy_and_sampled_and_a_third_samples_anew(target, whole, tmp_path):
    generate(target, tmp_path, num_passes=3)
    by_prompt = defaultdict(list)
    for answer in corpus.Part(tmp_path / "part-0", HIDDEN).answers():
        by_prompt[answer.prompt_id].append(answer)
    first = answers_of(whole)
    assert by_prompt.keys() == first.keys()
    for prompt_id, (one, two, three) in by_prompt.items():
        assert one == first[prompt_id]
        assert {one.temperature, two.temperature} == {0.0, 1.0} and three.temperature == 1.0
        assert len({one.seed, two.seed, three.seed}) == 3


def test_prompts_that_are_too_long_are_left_out(target, tmp_path):
    lengths = {q.id: len(prompts.encode(target.tokenizer, q)) for q in QUESTIONS}
    limit = sorted(lengths.values())[NUM_QUESTIONS // 2]
    answered = answers_of(generate(target, tmp_path, max_prompt_tokens=limit))
    assert answered.keys() == {name for name, length in lengths.items() if length <= limit}
    assert 0 < len(answered) < NUM_QUESTIONS


def test_two_processes_answer_every_prompt_once_and_as_one_would(target, whole, tmp_path):
    for rank in (0, 1):
        generate(target, tmp_path, rank=rank, num_ranks=2)
        parts = [len(corpus.Part(path, HIDDEN).answers()) for path in tmp_path.glob("part-*")]
        assert min(parts) > BATCH_SIZE, "both processes have work"
    assert answers_of(tmp_path) == answers_of(whole)
    temperatures = {a.temperature for a in corpus.Part(tmp_path / "part-1", HIDDEN).answers()}
    assert temperatures == {0.0, 1.0}, "each process does both kinds"
    assert_same_features(target, whole, tmp_path)


def test_going_on_with_another_number_of_processes_answers_nothing_twice(target, whole, tmp_path):
    generate(target, tmp_path, rank=1, num_ranks=2)
    generate(target, tmp_path)
    assert answers_of(tmp_path) == answers_of(whole)


# --- interruption


class Killed(Exception):
    """Stands for whatever stops a run."""


@pytest.fixture
def interrupted(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus whose process died in its third batch."""
    calls = iter(range(100))

    def decode_twice(*arguments: object, **options: object) -> object:
        if next(calls) == 2:
            raise Killed
        return decode(*arguments, **options)

    monkeypatch.setattr(corpus, "decode", decode_twice)
    with pytest.raises(Killed):
        generate(target, tmp_path)
    assert len(answers_of(tmp_path)) == 2 * BATCH_SIZE
    return tmp_path


def test_interrupted_generation_goes_on_to_the_same_answers(target, whole, interrupted):
    generate(target, interrupted)
    assert answers_of(interrupted) == answers_of(whole)
    assert_same_features(target, whole, interrupted)


@pytest.mark.parametrize("num_lines", [6, 4])  # torn in a new batch, and in the middle of one
def test_torn_line_and_features_behind_it_are_cut_off(target, whole, interrupted, num_lines):
    part = interrupted / "part-0"
    lines = (part / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    torn = b'{"prompt_id": "q03", "prompt_to'
    (part / "answers.jsonl").write_bytes(b"".join(lines[:num_lines]) + torn)
    for name in ("taps", "hidden"):  # of a batch whose choices were never written
        with (part / name).open("ab") as file:
            file.write(b"\x01" * 777)
    generate(target, interrupted)
    assert answers_of(interrupted) == answers_of(whole)
    assert_same_features(target, whole, interrupted)


def test_a_finished_corpus_is_not_answered_again(target, whole, monkeypatch):
    monkeypatch.setattr(corpus, "decode", None)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    generate(target, whole)
    assert {path: path.read_bytes() for path in before} == before


def test_a_corpus_can_be_read_while_it_is_written(target, interrupted):
    with (interrupted / "part-0" / "taps").open("ab") as file:
        file.write(b"\x01" * 777)
    with (interrupted / "part-0" / "answers.jsonl").open("a") as file:
        file.write('{"prompt_id": "q0')
    corpus.Part(interrupted / "part-1", target.hidden_size)  # a process that has only just begun
    cache = FeatureCache(interrupted, target.hidden_size)
    assert {answer.prompt_id for answer in cache.answers} == answers_of(interrupted).keys()


# --- features


def test_recorded_features_are_those_of_one_full_pass(target):
    """In float32, on ragged prompts, a batch whose rows end at different times."""
    questions = [prompts.encode(target.tokenizer, question) for question in QUESTIONS[:5]]
    stops = decode_autoregressively(target, questions[1], max_new_tokens=4).tokens[-1:]
    recorder, before = corpus.FeatureRecorder(), target.stop_ids
    target.stop_ids = torch.tensor(stops)
    try:
        runs = decode(target, recorder, questions, max_new_tokens=9)
    finally:
        target.stop_ids = before
    assert len({len(run.tokens) for run in runs}) > 1, "all rows ended together"
    totals = [len(tokens) + len(run.tokens) for tokens, run in zip(questions, runs, strict=True)]
    recorded = recorder.features(totals)
    for tokens, run, one in zip(questions, runs, recorded, strict=True):
        taps, hidden = target.features(torch.tensor([tokens + run.tokens]))
        choices = target.logits(hidden[0]).argmax(-1)
        torch.testing.assert_close(one.taps[:-1], taps[0, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.hidden[:-1], hidden[0, :-1], rtol=1e-4, atol=1e-4)
        assert torch.equal(one.choices[len(tokens) - 1 : -1], choices[len(tokens) - 1 : -1])
        assert not one.taps[-1].any() and not one.hidden[-1].any(), "the last token is never read"


def test_recomputed_features_are_those_that_generation_kept(target, whole, tmp_path):
    destination = corpus.pack(whole, tmp_path / "packed", {})
    answers = corpus.load(destination).answers
    corpus.recompute(target, answers, tmp_path / "again", batch_tokens=150)
    assert_same_features(target, whole, tmp_path / "again")
    size = (tmp_path / "again" / "part-0" / "taps").stat().st_size
    corpus.recompute(target, answers, tmp_path / "again")
    assert (tmp_path / "again" / "part-0" / "taps").stat().st_size == size, "computed twice"


def test_processes_recompute_features_of_answers_of_their_own(target, whole, tmp_path):
    answers = corpus.load(corpus.pack(whole, tmp_path / "packed", {})).answers
    for rank in range(2):
        corpus.recompute(target, answers[rank::2], tmp_path / "shared", rank=rank)
        assert len(corpus.Part(tmp_path / "shared" / f"part-{rank}", HIDDEN).answers()) > 1
    assert_same_features(target, whole, tmp_path / "shared")


def test_live_features_are_those_that_were_kept(target, whole, tmp_path):
    kept = FeatureCache(whole, target.hidden_size)
    live = corpus.features_in(corpus.pack(whole, tmp_path / "packed", {}), target)
    assert isinstance(live, corpus.LiveFeatures) and live.answers == kept.answers
    assert (live.hash, live.num_answer_tokens) == (kept.hash, kept.num_answer_tokens)
    ids = corpus.prompt_ids(target.tokenizer, kept.answers)
    ours, theirs = (one.batch([0, 3, 5], ids) for one in (live, kept))
    assert min(kept.answers[i].num_tokens for i in (0, 3, 5)) < ours.tokens.shape[1], "no padding"
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.is_answer, theirs.is_answer)
    for row, answer in enumerate(kept.answers[i] for i in (0, 3, 5)):
        n, first = answer.num_tokens, answer.prompt_tokens
        assert torch.equal(
            ours.choices[row, first - 1 : n - 1], theirs.choices[row, first - 1 : n - 1]
        )
        for one, other in ((ours.taps, theirs.taps), (ours.hidden, theirs.hidden)):
            own, kept_bits = one[row, : n - 1], other[row, : n - 1].float()
            torch.testing.assert_close(own, kept_bits, rtol=BF16_ULP, atol=1e-2)
            assert not one[row, n:].any(), "padding has features"


def test_answers_without_features_are_read_live_and_a_folder_stays_as_it_was_begun(
    target, whole, tmp_path
):
    generate(target, tmp_path, keep_features=False)
    assert not (tmp_path / "part-0" / "taps").exists()
    ours, theirs = answers_of(tmp_path), answers_of(whole)
    greedy = [name for name, answer in theirs.items() if answer.temperature == 0]
    assert greedy and all(ours[name] == theirs[name] for name in greedy)
    sampled = [name for name in ours if name not in greedy]
    assert any(ours[name].tokens != theirs[name].tokens for name in sampled), "nothing was drawn"
    assert isinstance(corpus.features_in(tmp_path, target), corpus.LiveFeatures)
    generate(target, tmp_path, keep_features=False)  # finds every answer there
    assert answers_of(tmp_path) == ours
    with pytest.raises(ValueError, match="begun without features"):
        generate(target, tmp_path)
    assert isinstance(corpus.features_in(whole, target), FeatureCache)
    with pytest.raises(ValueError, match="no answers"):
        corpus.features_in(tmp_path / "elsewhere", target)


def test_the_command_computes_features_of_a_share_of_the_committed_answers(
    target, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "COMMITTED", corpus.pack(whole, tmp_path / "packed", {}))
    monkeypatch.setattr(corpus.target_model, "load", lambda name: target)
    monkeypatch.setattr(corpus, "decode", None)  # nothing is answered anew
    answers = corpus.load(corpus.COMMITTED)
    corpus.main([str(tmp_path / "half"), "--committed", "--share", "0.5"])
    expected = answers.first(round(0.5 * len(answers.answers))).answers
    assert FeatureCache(tmp_path / "half", target.hidden_size).answers == expected
    corpus.main([str(tmp_path / "half"), "--committed"])
    assert_same_features(target, whole, tmp_path / "half")


def test_answers_that_a_head_was_trained_on_can_be_left_out(target, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "COMMITTED", corpus.pack(whole, tmp_path / "packed", {}))
    monkeypatch.setattr(corpus.target_model, "load", lambda name: target)
    answers = corpus.load(corpus.COMMITTED).answers
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_all_answers", lambda folder: answers[:5])
        seen = corpus.pack(whole, tmp_path / "seen", {})
    corpus.main([str(tmp_path / "new"), "--committed", "--without", str(seen)])
    found = FeatureCache(tmp_path / "new", target.hidden_size).answers
    assert len(found) == len(answers) - 5 > 0
    assert not [one for one in found if one in answers[:5]]
    corpus.main([str(tmp_path / "old"), "--packed", str(seen)])
    kept = FeatureCache(tmp_path / "old", target.hidden_size).answers
    assert sorted(kept, key=str) == sorted(answers[:5], key=str)


def test_the_command_packs_what_was_answered_with_a_card(whole, tmp_path, monkeypatch):
    packer = SimpleNamespace(name="a/b", tokenizer=None)
    monkeypatch.setattr(corpus.target_model, "load", lambda name: packer)
    corpus.main([str(whole), "--pack", str(tmp_path / "packed"), "--max-new-tokens", "9"])
    card = json.loads((tmp_path / "packed" / "card.json").read_text())
    packed = corpus.load(tmp_path / "packed")
    assert len(packed.answers) == card["num_answers"] == len(corpus._all_answers(whole))
    assert (card["hash"], card["target"], card["max_new_tokens"]) == (packed.hash, "a/b", 9)


def test_every_share_has_its_part_of_what_only_some_prompts_have():
    """Prompts are answered in the order of their ids' hash, and only the first of them twice."""
    ids = sorted((f"p/{i}" for i in range(2000)), key=lambda one: sha256(one.encode()).digest())
    greedy = [Answer(one, 3, 0.0, 0, [1]) for one in ids]
    sampled = [Answer(one, 3, 1.0, 1, [1]) for one in ids[:800]]
    first = Corpus(greedy + sampled).first(700).answers
    assert sum(one.temperature for one in first) / 700 == pytest.approx(800 / 2800, abs=0.05)


@pytest.mark.parametrize(
    ("named", "expected"),
    [((), (1, 3)), (("--rank", "2", "--num-ranks", "4"), (2, 4)), (("--rank", "0"), (0, 3))],
)
def test_processes_of_torchrun_write_parts_of_their_own(
    named, expected, target, tmp_path, monkeypatch
):
    monkeypatch.setattr(draft_training, "join_processes", lambda: (1, 3))
    monkeypatch.setattr(corpus.target_model, "load", lambda name: target)
    monkeypatch.setattr(corpus.prompts, "training_prompts", lambda sources: [])
    asked = []
    monkeypatch.setattr(
        corpus, "generate", lambda *_, rank, num_ranks, **__: asked.append((rank, num_ranks))
    )
    corpus.main([str(tmp_path), *named])
    assert asked == [expected]


def test_a_rank_that_no_process_has_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        corpus.main([str(tmp_path), "--rank", "2", "--num-ranks", "2"])
    assert "--rank is 2 of 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "-0.5", "1.5"])
def test_a_share_that_is_no_part_is_refused_before_anything_is_written(share, tmp_path, capsys):
    with pytest.raises(SystemExit):
        corpus.main([str(tmp_path / "new"), "--committed", "--share", share])
    assert f"--share is {float(share)}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_any_part_has_is_not_recomputed(target, tmp_path):
    for rank in range(2):
        generate(target, tmp_path / "parts", rank=rank, num_ranks=2)
    answers = corpus.load(corpus.pack(tmp_path / "parts", tmp_path / "packed", {})).answers
    sizes = {path: path.stat().st_size for path in (tmp_path / "parts").glob("part-*/*")}
    corpus.recompute(target, answers, tmp_path / "parts")
    assert {path: path.stat().st_size for path in sizes} == sizes and len(sizes) == 8


def test_interrupted_recomputation_goes_on(target, whole, tmp_path):
    answers = corpus.load(corpus.pack(whole, tmp_path / "packed", {})).answers
    corpus.recompute(target, answers[:7], tmp_path / "again")
    with (tmp_path / "again" / "part-0" / "hidden").open("ab") as file:
        file.write(b"\x01" * 99)
    corpus.recompute(target, answers, tmp_path / "again")
    assert_same_features(target, whole, tmp_path / "again")


def test_a_batch_of_features_is_padded_and_kept_in_bfloat16(target, whole):
    cache = FeatureCache(whole, target.hidden_size)
    ids = corpus.prompt_ids(target.tokenizer, cache.answers)
    tokens, is_answer, choices, taps, hidden = columns_of(cache.batch([0, 1, 2], ids))
    lengths = [answer.num_tokens for answer in cache.answers[:3]]
    assert len(set(lengths)) > 1, "nothing to pad"
    assert tokens.shape == is_answer.shape == choices.shape == (3, max(lengths))
    assert taps.shape == (3, max(lengths), 3 * HIDDEN) and hidden.shape[-1] == HIDDEN
    assert taps.dtype == hidden.dtype == torch.bfloat16
    for row, answer in enumerate(cache.answers[:3]):
        n = answer.prompt_tokens
        assert tokens[row, : lengths[row]].tolist() == ids[answer.prompt_id] + answer.tokens
        assert is_answer[row].nonzero()[:, 0].tolist() == list(range(n, lengths[row]))
        assert not hidden[row, lengths[row] :].any()


def test_fewer_sequences_are_a_part_of_more(target, whole):
    few, more = (FeatureCache(whole, target.hidden_size, number).answers for number in (4, 9))
    assert (len(few), len(more)) == (4, 9) and more[:4] == few
    assert few == Corpus(list(answers_of(whole).values())).first(4).answers


def test_features_that_are_not_there_are_a_clear_error(target, tmp_path):
    with pytest.raises(ValueError, match=f"no answers in {tmp_path}"):
        FeatureCache(tmp_path, target.hidden_size)
    with pytest.raises(ValueError, match=f"python -m specrepro.corpus {tmp_path}"):
        corpus.pack(tmp_path, tmp_path / "packed", {})


def test_answers_of_other_weights_under_the_same_name_are_refused(target, whole, tmp_path):
    """A model that was tuned again in its folder, or another with the same last name."""
    questions = list(itertools.islice(prompts.training_prompts(), 2))
    corpus.generate(target, questions, tmp_path, max_new_tokens=4)
    tuned = copy.deepcopy(target)
    del tuned.__dict__["fingerprint"]
    with torch.no_grad():
        next(tuned.model.parameters()).mul_(1.01)
    assert tuned.fingerprint != target.fingerprint
    in_half = Target(copy.deepcopy(target.model).bfloat16(), target.tokenizer, target.name)
    assert in_half.fingerprint == target.fingerprint
    for call in (
        lambda: corpus.generate(tuned, questions, tmp_path, max_new_tokens=4),
        lambda: corpus.recompute(tuned, [], tmp_path),
        lambda: corpus.features_in(tmp_path, tuned),
    ):
        with pytest.raises(ValueError, match="whose weights are not those of"):
            call()
    assert len(corpus.features_in(tmp_path, target)) == 2


def test_a_part_that_was_not_copied_whole_is_refused_and_not_filled_with_zeros(
    target, whole, tmp_path
):
    folder = shutil.copytree(whole, tmp_path / "copy")
    column = folder / "part-0" / "hidden"
    os.truncate(column, column.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{column} has .* bytes and its answers want"):
        Part(folder / "part-0", target.hidden_size).reopen()
    assert column.stat().st_size > 0


def test_features_are_not_added_to_a_part_that_has_none(target, whole, tmp_path):
    questions = list(itertools.islice(prompts.training_prompts(), 2))
    corpus.generate(target, questions, tmp_path, max_new_tokens=4, keep_features=False)
    answers = corpus.features_in(whole, target).answers
    with pytest.raises(ValueError, match="begun without features"):
        corpus.recompute(target, answers, tmp_path)


def test_a_changed_chat_template_is_refused(target, whole, monkeypatch):
    answers = FeatureCache(whole, target.hidden_size).answers
    template = target.tokenizer.chat_template
    monkeypatch.setattr(target.tokenizer, "chat_template", template + "{{ ' ' }}")
    with pytest.raises(ValueError, match=r"had \d+ tokens when it was answered and has \d+ now"):
        corpus.prompt_ids(target.tokenizer, answers)


def test_a_template_that_keeps_every_length_is_refused_where_the_hash_is_known(
    target, whole, monkeypatch
):
    answers = FeatureCache(whole, target.hidden_size).answers
    template = target.tokenizer.chat_template
    monkeypatch.setattr(target.tokenizer, "chat_template", template.replace(": ", "> "))
    with pytest.raises(ValueError, match=r"not the same: another chat template .* answer the"):
        corpus.prompt_ids(target.tokenizer, answers)
    unknown = [replace(answer, prompt_hash="") for answer in answers]
    assert corpus.prompt_ids(target.tokenizer, unknown).keys() == {a.prompt_id for a in answers}


def test_an_answer_to_an_unknown_prompt_is_refused(target, monkeypatch, whole):
    monkeypatch.setattr(prompts, "training_prompts", lambda: iter(QUESTIONS[1:]))
    with pytest.raises(ValueError, match="'q00', which is not among the training prompts"):
        corpus.prompt_ids(target.tokenizer, FeatureCache(whole, target.hidden_size).answers)


# --- packing


def test_packing_and_loading_is_a_round_trip(whole, tmp_path):
    folder = corpus.pack(whole, tmp_path, {"command": "python"})
    loaded = corpus.load(folder)
    assert corpus.has_answers(folder) and not corpus.has_answers(whole)
    assert loaded.answers == [answer for _, answer in sorted(answers_of(whole).items())]
    card = json.loads((folder / "card.json").read_text())
    counts = {"num_answers": NUM_QUESTIONS, "num_tokens": loaded.num_tokens}
    assert card == {"hash": loaded.hash, "command": "python"} | counts
    assert loaded.num_tokens == sum(len(answer.tokens) for answer in loaded.answers) > 0
    assert FeatureCache(whole, HIDDEN).hash == loaded.hash


def test_packing_fills_in_the_hashes_that_an_older_version_did_not_keep(target, whole, tmp_path):
    older = tmp_path / "older" / "part-0"
    older.mkdir(parents=True)
    lines = [json.loads(line) for line in (whole / "part-0" / "answers.jsonl").open()]
    texts = [json.dumps({k: v for k, v in line.items() if k != "prompt_hash"}) for line in lines]
    (older / "answers.jsonl").write_text("".join(text + "\n" for text in texts))
    unknown = corpus.load(corpus.pack(older.parent, tmp_path / "unknown", {}))
    assert {answer.prompt_hash for answer in unknown.answers} == {""}
    known = corpus.load(corpus.pack(older.parent, tmp_path / "known", {}, target.tokenizer))
    assert known.answers == [answer for _, answer in sorted(answers_of(whole).items())]
    assert len({answer.prompt_hash for answer in known.answers}) == NUM_QUESTIONS


def one_change(answers: list[Answer]) -> Iterator[list[Answer]]:
    """The same answers with one token, one temperature or one prompt changed, or one left out."""
    for place, answer in enumerate(answers[:3]):
        for at in range(len(answer.tokens)):
            tokens = answer.tokens[:at] + [answer.tokens[at] + 1] + answer.tokens[at + 1 :]
            yield answers[:place] + [replace(answer, tokens=tokens)] + answers[place + 1 :]
        yield answers[:place] + [replace(answer, temperature=0.5)] + answers[place + 1 :]
        yield answers[:place] + [replace(answer, prompt_id="other")] + answers[place + 1 :]
        yield answers[:place] + answers[place + 1 :]


def test_hash_changes_with_any_token(whole):
    answers = list(answers_of(whole).values())
    hashes = [Corpus(changed).hash for changed in one_change(answers)]
    assert len({Corpus(answers).hash, *hashes}) == len(hashes) + 1 > 20


def test_loading_what_is_not_there_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"no corpus at {tmp_path}: answers.parquet is missing"):
        corpus.load(tmp_path)


# --- batches


LENGTHS = np.random.default_rng(0).integers(3, 60, 50).tolist()


@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_hold_every_sequence_once_within_the_budget(epoch):
    batches = shuffled_batches(LENGTHS, 128, seed=0, epoch=epoch)
    assert sorted(place for batch in batches for place in batch) == list(range(50))
    padded = [len(batch) * max(LENGTHS[place] for place in batch) for batch in batches]
    assert max(padded) <= 128 and np.mean(padded) > 90, "within the budget, and making use of it"


def test_a_sequence_longer_than_the_budget_has_a_batch_of_its_own():
    batches = shuffled_batches([10, 500, 10], 100, seed=0, epoch=0)
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]


def test_batches_repeat_with_the_seed_and_differ_by_epoch():
    first = shuffled_batches(LENGTHS, 128, seed=0, epoch=0)
    assert shuffled_batches(LENGTHS, 128, seed=0, epoch=0) == first
    assert shuffled_batches(LENGTHS, 128, seed=0, epoch=1) != first
    assert shuffled_batches(LENGTHS, 128, seed=1, epoch=0) != first


def test_batch_order_goes_through_epochs_in_turn():
    answers = [Answer(str(place), 1, 0.0, 0, [5] * (n - 1)) for place, n in enumerate(LENGTHS)]
    first = shuffled_batches(LENGTHS, 128, seed=3, epoch=0)
    order = corpus.batch_order(answers, 128, 3, len(first) * 2 + 4)
    assert order[: len(first)] == first and len(order) == len(first) * 2 + 4
    seen = Counter(place for batch in order for place in batch)
    assert min(seen.values()) >= 1 and max(seen.values()) <= 3
    assert order[len(first) : 2 * len(first)] != first, "every epoch has an order of its own"
    assert abs(corpus.num_batches(answers, 128, 2.0) - 2 * len(first)) <= 2
