"""A session is one question: what is said in it, what is remembered, and what is on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specrepro import measure, prompts, sessions
from specrepro.decoding import Autoregressive, Drafter, Generation, Thinking, decode
from specrepro.draft_tree import DraftTree
from specrepro.measure import AUTOREGRESSIVE, Record, read_records
from specrepro.ngram import Pia, PromptLookup, Sam, SuffixDecoding
from specrepro.reasoning import Question
from specrepro.recycling import TokenRecycling
from specrepro.sessions import Method, NotedSources, Paradigm, compare
from specrepro.target_model import Target
from specrepro.tts import BATCHED, BEST_OF_N, GROWING, MULTI_ROUND

NUM_NEW = 16
TWO, TWO_AT_ONCE = (replace(paradigm, num_samples=2) for paradigm in (BEST_OF_N, BATCHED))
QUESTIONS = [
    Question(f"q{n}", "logic" if n % 2 else "algebra", text, "4", lambda said: float(len(said) > 3))
    for n, text in enumerate(("2 + 2?", "who lies?", "x = 3?"))
]
METHODS = {
    "PLD": Method("n-gram", "turn", lambda _: PromptLookup()),
    "SAM": Method("n-gram", "question", lambda shares: Sam(carries=True, shares=shares)),
    "PIA": Method("n-gram", "question", lambda _: Pia(carries=True)),
    "Suffix": Method("n-gram", "question", lambda _: SuffixDecoding(carries=True)),
    "Recycling": Method("n-gram", "run", lambda s: TokenRecycling(carries=True, shares=s)),
}
KEEPING = [name for name, method in METHODS.items() if method.keeps == "question"]

pytestmark = pytest.mark.filterwarnings("ignore:the load average is")


@pytest.fixture(scope="module")
def target(quick_target: Target) -> Target:
    return quick_target


def run(
    target: Target,
    path: Path,
    methods: dict[str, Method] = METHODS,
    paradigm: Paradigm = MULTI_ROUND,
    questions: Sequence[Question] = QUESTIONS[:2],
    **options: object,
) -> list[Record]:
    temperature = 0.0 if paradigm.num_turns > 1 else 0.6
    options = {"temperature": temperature, "max_new_tokens": NUM_NEW, **options}
    return compare(target, methods, questions, paradigm, path=path / "r.jsonl", **options)


def of(records: Sequence[Record], method: str, question: str = "q0") -> list[Record]:
    return [one for one in records if (one.method, one.session) == (method, question)]


def whatever_was_measured(record: Record) -> Record:
    """A record without its times."""
    untimed = {"seconds": None, "prefill_seconds": None, "seconds_by_part": {}, "load": None}
    untimed["when"] = ""
    return replace(record, **untimed)


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is passed on, so the second turn is the first once more."""
    monkeypatch.setattr(sessions, "final_answer", lambda tokenizer, tokens: "")


# --- paradigms


@pytest.mark.parametrize("paradigm", [MULTI_ROUND, TWO, TWO_AT_ONCE], ids=lambda p: p.name)
def test_every_method_says_what_the_baseline_says(
    paradigm: Paradigm, target: Target, tmp_path: Path
) -> None:
    records = run(target, tmp_path, paradigm=paradigm)
    assert len(records) == 2 * (1 + len(METHODS)) * paradigm.num_generations
    for question in ("q0", "q1"):
        expected = [one.tokens for one in of(records, AUTOREGRESSIVE, question)]
        for method in METHODS:
            assert [one.tokens for one in of(records, method, question)] == expected
    assert any(sum(one.accepted) for one in records), "nothing was accepted"


def test_none_is_always_the_first_to_answer_and_batches_are_warmed_up_as_batches(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, honest = [], sessions.decode

    def counted(target: Target, drafter: object, asked: list[list[int]], *rest, **named):
        sizes.append(len(asked))
        return honest(target, drafter, asked, *rest, **named)

    monkeypatch.setattr(sessions, "decode", counted)
    two_questions = run(target, tmp_path, paradigm=TWO_AT_ONCE)
    assert set(sizes) == {2}
    written = [one.method for one in measure.read_records(tmp_path / "r.jsonl")]
    begun = {written[0], written[len(two_questions) // 2]}
    assert len(begun) == 2


def test_the_second_turn_sees_the_final_answer_of_the_first(target: Target, tmp_path: Path) -> None:
    first, second = of(run(target, tmp_path, {}), AUTOREGRESSIVE)
    text = target.tokenizer.decode(first.tokens, skip_special_tokens=True)
    prompt = QUESTIONS[0].next_prompt(text.strip().split("\n\n")[-1].strip())
    ids = prompts.encode(target.tokenizer, prompt)
    assert (first.turn, second.turn, second.sample) == (1, 2, 1)
    assert second.tokens == decode(target, Autoregressive(), ids, NUM_NEW).tokens


@pytest.mark.parametrize("paradigm", [BEST_OF_N, BATCHED], ids=lambda p: p.name)
def test_samples_differ_by_seed_and_can_be_drawn_again(
    paradigm: Paradigm, target: Target, tmp_path: Path
) -> None:
    records = [
        run(target, tmp_path / name, {}, paradigm, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    runs = [[one.tokens for one in of(found, AUTOREGRESSIVE)] for found in records]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 4


def test_a_sample_is_the_same_in_turn_and_in_a_batch(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, shares = measure.fill, []

    def noting(record: Record, generation: Generation, share: float = 1.0) -> None:
        shares.append(share)
        fill(record, generation, share)

    monkeypatch.setattr(measure, "fill", noting)
    one_by_one, together = (
        of(run(target, tmp_path / name, {}, paradigm), AUTOREGRESSIVE)
        for name, paradigm in (("a", BEST_OF_N), ("b", BATCHED))
    )
    assert [one.tokens for one in one_by_one] == [one.tokens for one in together]
    assert {one.batch for one in one_by_one} == {1} and {one.batch for one in together} == {4}
    assert len({one.group for one in one_by_one}) == 4 and len({one.group for one in together}) == 1
    assert shares == [1.0] * 8 + [0.25] * 8, "a batch shares its time equally"


@pytest.mark.parametrize(("paradigm", "copies"), [(BEST_OF_N, [1] * 4), (GROWING, [1, 2, 3, 4])])
def test_only_the_switch_makes_the_prompt_grow(
    paradigm: Paradigm,
    copies: list[int],
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, encode = [], prompts.encode

    def noting(tokenizer: object, prompt: prompts.Prompt, *others: object) -> list[int]:
        asked.append(prompt.messages)
        return encode(tokenizer, prompt, *others)

    monkeypatch.setattr(prompts, "encode", noting)
    run(target, tmp_path, {}, paradigm, QUESTIONS[:1])
    turn = {"role": "user", "content": "2 + 2?"}
    assert [list(messages) for messages in asked[1:]] == [[turn] * num for num in copies]


def test_what_makes_no_sense_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temperature 0 are all the same"):
        run(target, tmp_path, {}, BEST_OF_N, temperature=0.0)
    with pytest.raises(ValueError, match="share an id"):
        run(target, tmp_path, {}, questions=[QUESTIONS[0]] * 2)
    with pytest.raises(ValueError, match="several turns or several samples"):
        Paradigm("both", num_turns=2, num_samples=2)
    with pytest.raises(ValueError, match="keeps is 'forever'"):
        Method("n-gram", "forever", lambda _: Sam())
    with pytest.raises(ValueError, match="cannot keep a run"):
        run(target, tmp_path, {"SAM": Method("n-gram", "run", lambda _: Sam(carries=True))})


def test_the_budget_of_thinking_reaches_the_decoder(target: Target, tmp_path: Path) -> None:
    thinking = Thinking(8, 91, (90, 91))
    records = run(target, tmp_path, {"SAM": METHODS["SAM"]}, thinking=thinking)
    assert {tuple(one.forced) for one in records} == {(8, 9)}
    for one in records:
        assert one.tokens[8:10] == [90, 91] and one.error is None


# --- what is remembered


@pytest.mark.parametrize("method", KEEPING)
def test_a_turn_that_repeats_itself_is_known_and_without_memory_it_is_not(
    method: str, target: Target, tmp_path: Path, repeating: None
) -> None:
    makers = {
        "kept": METHODS[method],
        "reset": replace(METHODS[method], keeps="turn", make=FORGETTING[method]),
    }
    records = run(target, tmp_path, makers)
    (first, kept), (_, reset) = of(records, "kept"), of(records, "reset")
    assert kept.target_passes < reset.target_passes == first.target_passes
    assert sum(kept.accepted) > sum(reset.accepted)


FORGETTING: dict[str, Callable[[bool], Drafter]] = {
    "SAM": lambda _: Sam(),
    "PIA": lambda _: Pia(),
    "Suffix": lambda _: SuffixDecoding(),
}


@pytest.mark.parametrize("paradigm", [MULTI_ROUND, TWO, TWO_AT_ONCE], ids=lambda p: p.name)
def test_a_question_knows_nothing_of_the_one_before(
    paradigm: Paradigm, target: Target, tmp_path: Path
) -> None:
    """Even where both ask the same: what is forgotten is decided by the session alone."""
    same = [replace(QUESTIONS[0], id=name) for name in ("q0", "again")]
    records = run(target, tmp_path, paradigm=paradigm, questions=same)
    alone = run(target, tmp_path / "alone", paradigm=paradigm, questions=same[1:])
    for method in (*KEEPING, "PLD"):
        later, fresh = (of(found, method, "again") for found in (records, alone))
        assert [one.drafted for one in later] == [one.drafted for one in fresh]
        assert [one.accepted for one in later] == [one.accepted for one in fresh]
    if paradigm is MULTI_ROUND:
        first, later = (of(records, "Recycling", name)[0] for name in ("q0", "again"))
        assert sum(later.accepted) > sum(first.accepted), "the matrix lives for the whole run"


def test_the_order_of_samples_matters_to_those_that_remember_alone(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: METHODS[name] for name in ("PLD", "SAM")}
    methods |= {"forgetting": Method("n-gram", "turn", lambda _: Sam())}
    seeds = measure.sequence_seed
    runs = [run(target, tmp_path / "a", methods, BEST_OF_N, temperature=0.15)]
    backwards = {f"q0/1/{n}": f"q0/1/{5 - n}" for n in range(1, 5)}
    monkeypatch.setattr(
        measure, "sequence_seed", lambda seed, name: seeds(seed, backwards.get(name, name))
    )
    runs.append(run(target, tmp_path / "b", methods, BEST_OF_N, temperature=0.15))
    for method, is_same in (("PLD", True), ("forgetting", True), ("SAM", False)):
        there, back = ([(one.tokens, one.accepted) for one in of(r, method)] for r in runs)
        assert sorted(tokens for tokens, _ in there) == sorted(tokens for tokens, _ in back)
        assert (there == back[::-1]) == is_same, method


def test_samples_of_a_batch_learn_from_each_other_where_they_share(
    target: Target, tmp_path: Path
) -> None:
    """Sample 2 says what sample 1 said a few rounds ago: known only from a shared store."""
    prompt, said = [10, 20, 30, 40], []
    said = decode(target, Autoregressive(), prompt, 30).tokens
    for drafter, is_shared in ((Sam(), False), (Sam(shares=True), True)):
        drafter.start([prompt, prompt], [said[0], said[0]])
        drafter.unread[0] += said[1:12]
        drafts = drafter.drafts()
        assert (drafts[1].tokens[1:4] == said[1:4]) == is_shared
    alone, shared = TokenRecycling(), TokenRecycling(shares=True)
    for drafter in (alone, shared):
        runs = decode(target, drafter, [prompt, prompt, [7, 8, 9]], 16)
        assert [one.tokens for one in runs[:2]] == [said[:16]] * 2
    assert len(alone.matrix) == 3 and len(shared.matrix) == 1


# --- records


def test_a_failed_generation_has_no_numbers_and_the_next_has_its_own(
    target: Target, tmp_path: Path
) -> None:
    class Failing(PromptLookup):
        def begin(self, prompts: Tensor, *others: Tensor) -> None:
            super().begin(prompts, *others)
            self.num_begun = getattr(self, "num_begun", 0) + 1
            if self.num_begun in (2, 4):  # the first warms up
                raise RuntimeError("out of memory")

    method = {"PLD": Method("n-gram", "turn", lambda _: Failing())}
    turns = run(target, tmp_path, method)
    first, second = of(turns, "PLD"), of(turns, "PLD", "q1")
    assert [one.error for one in first] == ["RuntimeError: out of memory", "turn 1 failed"]
    for one in first:
        assert (one.new_tokens, one.seconds, one.target_passes, one.score) == (None,) * 4
        assert not (one.tokens or one.accepted or one.sources)
    assert second[0].error is None and second[1].error == "RuntimeError: out of memory"
    samples = of(run(target, tmp_path / "n", method, BEST_OF_N), "PLD")
    assert [one.error is None for one in samples] == [False, True, False, True]
    batch = of(run(target, tmp_path / "b", method, BATCHED), "PLD")
    assert {one.error for one in batch} == {"RuntimeError: out of memory"}


def test_a_question_too_long_for_the_context_is_an_error_not_a_crash(
    target: Target, tmp_path: Path
) -> None:
    long = replace(QUESTIONS[0], text="word " * 200)
    records = run(target, tmp_path, {}, questions=[long, QUESTIONS[1]])
    assert "more than max_tokens=496" in of(records, AUTOREGRESSIVE)[0].error
    assert of(records, AUTOREGRESSIVE, "q1")[1].error is None


@pytest.mark.parametrize("cut", [0, 5, 9, 14])
def test_a_run_that_goes_on_ends_with_the_records_of_one_that_was_not_interrupted(
    cut: int, target: Target, tmp_path: Path
) -> None:
    methods = {name: METHODS[name] for name in ("SAM", "Recycling")}
    uncut = run(target, tmp_path / "a", methods, questions=QUESTIONS)
    whole = [whatever_was_measured(one) for one in uncut]
    lines = (tmp_path / "a" / "r.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole) == 18

    class Interrupted(Exception):
        pass

    broken, appended = tmp_path / "b", []
    append = measure.append_record

    def cutting(path: Path, *records: Record) -> None:
        appended.extend(records)
        if len(appended) > cut:
            kept = len(records) - (len(appended) - cut)
            append(path, *records[: max(kept, 0)])
            raise Interrupted
        append(path, *records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "append_record", cutting)
        if cut < 18:
            with pytest.raises(Interrupted):
                run(target, broken, methods, questions=QUESTIONS)
        else:
            run(target, broken, methods, questions=QUESTIONS)
    resumed = run(target, broken, methods, questions=QUESTIONS)
    assert [whatever_was_measured(one) for one in resumed] == whole
    assert len(read_records(broken / "r.jsonl")) == 18


def test_what_was_learnt_is_missed_where_its_file_is_gone(target: Target, tmp_path: Path) -> None:
    method = {"Recycling": METHODS["Recycling"]}
    run(target, tmp_path, method)
    (folder,) = (tmp_path / "learnt").iterdir()
    assert len(list(folder.iterdir())) == 2, "the last two are kept"
    for file in folder.iterdir():
        file.unlink()
    with pytest.warns(RuntimeWarning, match="what Recycling learnt up to q1 is not at"):
        run(target, tmp_path, method, questions=QUESTIONS)


def test_sources_stay_with_their_sequence_when_others_end() -> None:
    class Naming(Autoregressive):
        def begin(self, *arguments: Tensor) -> None:
            super().begin(*arguments)
            self.names = ["a", "b", "c"]

        def propose(self) -> DraftTree:
            self.sources = self.names
            return super().propose()

        def select(self, rows: Tensor) -> None:
            super().select(rows)
            self.names = [self.names[row] for row in rows.tolist()]

    noted, roots = NotedSources(Naming()), torch.tensor([7, 8, 9])
    noted.begin(roots[:, None], torch.ones(3), roots, None)
    noted.propose()
    noted.select(torch.tensor([2, 1]))
    noted.propose()
    noted.select(torch.tensor([0]))
    noted.propose()
    assert noted.by_sequence == [["a"], ["b", "b"], ["c", "c", "c"]]


def test_records_say_where_they_belong(target: Target, tmp_path: Path) -> None:
    records = run(target, tmp_path, {"SAM": METHODS["SAM"]}, repeats=2)
    assert len({one.key for one in records}) == len(records) == 16
    for one in records:
        assert (one.paradigm, one.session, one.unit) == ("multi-round", one.session, one.session)
        assert one.prompts == {"q0": "algebra", "q1": "logic"}[one.session]
        assert one.score in (0.0, 1.0)
        assert len(one.sources) == (one.target_passes if one.method == "SAM" else 0)
    assert records == read_back(tmp_path / "r.jsonl", records)


def read_back(path: Path, records: Sequence[Record]) -> list[Record]:
    held = {one.key: one for one in read_records(path)}
    return [held[one.key] for one in records]


def test_a_record_of_before_there_were_sessions_can_still_be_read(tmp_path: Path) -> None:
    fields = {"method": "A", "prompts": "chat", "prompt_id": "p", "temperature": 0.0, "seed": 0}
    fields |= {"batch": 1, "repeat": 0, "group": "p", "max_new_tokens": 9, "top_p": 1.0, "top_k": 0}
    fields |= {"target": "t", "dtype": "float32"}
    (tmp_path / "r.jsonl").write_text(json.dumps(fields) + "\n")
    (one,) = read_records(tmp_path / "r.jsonl")
    assert (one.session, one.turn, one.sample, one.unit) == ("", 1, 1, "p")
