"""The benchmark's methods and tiers, and replays that accept what decoding accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_eagle3 import make_head
from test_tts_sessions import QUESTIONS, of

from specrepro import __main__ as command_line
from specrepro import draft_lm, eagle3, hybrid, ngram, reasoning, tts
from specrepro.decoding import Thinking
from specrepro.eagle3 import TreeConfig
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.ngram import TextDrafter
from specrepro.suffix import SuffixArray
from specrepro.target_model import Target
from specrepro.tts import BATCHED, BEST_OF_N, MULTI_ROUND, Method, compare

NUM_NEW = 20
TWO, TWO_AT_ONCE = (replace(paradigm, num_samples=2) for paradigm in (BEST_OF_N, BATCHED))
PAPERS_METHODS = {  # the paper's three categories, and ours beside them
    "SpS": ("model-based", "turn"),
    "EAGLE-3": ("training-based", "turn"),
    "PLD": ("n-gram", "turn"),
    "SAM": ("n-gram", "question"),
    "SuffixDecoding": ("n-gram", "question"),
    "PIA": ("n-gram", "question"),
    "Lookahead": ("n-gram", "turn"),
    "Recycling": ("n-gram", "run"),
    "REST": ("n-gram", "turn"),
    "SAM[EAGLE-3]": ("hybrid", "question"),
    "Suffix[EAGLE-3]": ("hybrid", "question"),
}

pytestmark = pytest.mark.filterwarnings("ignore:the load average is")


@pytest.fixture(scope="module")
def target(quick_target: Target) -> Target:
    return quick_target


@pytest.fixture(scope="module")
def head_folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    return eagle3.save_head(make_head(target), folder / "head", TreeConfig(2, 3, 8))


@pytest.fixture(scope="module")
def draft_folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = draft_lm.DraftLM(32, 64, 1, 2, num_drafted=3)
    model = recipe.new_module(target, [])
    return recipe.save(model, tmp_path_factory.mktemp("draft") / "draft")


@pytest.fixture(scope="module")
def every_method(target: Target, head_folder: Path, draft_folder: Path) -> dict[str, Method]:
    store = SuffixArray.of([[40, 50, 60, 70, 80]])
    found, left_out = tts.methods(target, head_folder, draft_folder, store)
    assert not left_out
    return found


# --- methods


def test_every_method_of_the_paper_has_its_category_and_its_life(
    every_method: dict[str, Method],
) -> None:
    assert {n: (m.category, m.keeps) for n, m in every_method.items()} == PAPERS_METHODS
    carrying = {
        name: getattr(text_of(method.make(False)), "carries", False)
        for name, method in every_method.items()
    }
    assert carrying == {name: keeps != "turn" for name, (_, keeps) in PAPERS_METHODS.items()}


def text_of(drafter: object) -> object:
    return drafter.text if isinstance(drafter, hybrid.Hybrid) else drafter


def test_what_cannot_be_run_is_left_out_with_a_line_that_says_how(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_lm, "CHECKPOINT", tmp_path / "draft_lm")
    found, left_out = tts.methods(target, tmp_path / "no", tmp_path / "draft_lm")
    assert set(found) == set(tts.NGRAM_METHODS)
    assert set(left_out) == {"SpS", "EAGLE-3", "SAM[EAGLE-3]", "Suffix[EAGLE-3]", "REST"}
    assert f"python -m specrepro.draft_lm CORPUS {tmp_path / 'draft_lm'}" in left_out["SpS"]
    assert "python -m specrepro.eagle3 CORPUS" in left_out["EAGLE-3"]
    assert "rest_store" in left_out["REST"]


def test_the_committed_small_model_is_left_out_where_the_target_speaks_other_tokens(
    target: Target, head_folder: Path
) -> None:
    found, left_out = tts.methods(target, head_folder)
    assert "SpS" not in found
    assert f"49152 tokens and {target.name} one of {target.vocab_size}" in left_out["SpS"]
    assert "-p draft_model" in left_out["SpS"]


def test_a_small_model_may_be_any_causal_model_of_the_vocabulary(
    target: Target, tiny_chat_folder: Path, head_folder: Path
) -> None:
    found, _ = tts.methods(target, head_folder, tiny_chat_folder)
    drafter = found["SpS"].make(False)
    assert drafter.num_drafted == 20, "a tau of 7 is reported of it"
    found, _ = tts.methods(target, head_folder, tiny_chat_folder, total_tokens=5)
    assert found["EAGLE-3"].make(False).max_nodes == 5


@pytest.mark.parametrize("paradigm", [MULTI_ROUND, TWO, TWO_AT_ONCE], ids=lambda p: p.name)
def test_every_method_is_lossless_in_every_paradigm(
    paradigm: tts.Paradigm, target: Target, every_method: dict[str, Method], tmp_path: Path
) -> None:
    temperature = 0.0 if paradigm is MULTI_ROUND else 0.6
    records = compare(
        target, every_method, QUESTIONS[:1], paradigm, path=tmp_path / "r.jsonl",
        temperature=temperature, max_new_tokens=NUM_NEW, thinking=Thinking(15, 91, (90, 91)),
    )  # fmt: skip
    expected = [(one.tokens, one.forced) for one in of(records, AUTOREGRESSIVE)]
    assert [15, 16] in [forced for _, forced in expected], "nothing was forced"
    for name in every_method:
        found = of(records, name)
        assert [(one.tokens, one.forced) for one in found] == expected, name
        assert all(one.error is None and len(one.accepted) == one.target_passes for one in found)
        for one in found:
            assert sum(one.emitted) == one.new_tokens - 1
    assert {"head"} < {source for one in of(records, "SAM[EAGLE-3]") for source in one.sources} | {
        "own"
    }


def test_a_tier_says_which_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(reasoning, "from_hub", lambda *args: asked.append(args) or [])
    assert tts.questions("paper", seed=3) == []
    assert asked == [(name, 30, 3, None) for name in ("aime24", "aime25", "math500", "gpqa")]
    tts.questions("paper", 2, folder="sets")
    assert asked[-1] == ("gpqa", 2, 0, "sets/gpqa")
    assert [one.category for one in tts.questions("smoke")] == ["arithmetic", "algebra", "logic"]
    assert len(tts.questions("laptop", 3)) == 9
    assert tts.SIZES["laptop"].max_new_tokens == 512 and tts.SIZES["paper"] == tts.Size(30, 15_000)


def test_a_dry_run_says_what_a_tier_decodes(capsys: pytest.CaptureFixture) -> None:
    assert command_line.main(["tts", "--dry-run", "-p", "num_prompts", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 questions of each of 3 sets" in said and "512 new tokens, by EAGLE-3, SAM" in said
    assert command_line.main(["tts", "--tier", "paper", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Qwen/Qwen3-8B" in said and "depth 5, top-k 10, 60 nodes" in said
    assert "30 questions of each of 4 sets" in said and "15000 new tokens, by every method" in said
    assert "aime" in said and "cnn_dailymail" not in said


@pytest.mark.slow
def test_the_store_of_rest_is_the_committed_corpus() -> None:
    store = tts.rest_store()
    assert store.depth == 16 and len(store.tokens) > 1_000_000
    text = store.tokens[1000:1016].tolist()
    assert 1016 in store.search(text)


# --- replay

TEXT = {
    "PLD": (ngram.PromptLookup, "turn"),
    "SAM": (lambda: ngram.Sam(carries=True), "question"),
    "SuffixDecoding": (lambda: ngram.SuffixDecoding(carries=True), "question"),
    "PIA": (lambda: ngram.Pia(carries=True), "question"),
}


def assert_accepts_the_same(
    replayed: Sequence[Sequence[tts.Replayed]], found: list[Record]
) -> None:
    """Round by round, but for what the last round accepted beyond the end."""
    rounds = [one for session in replayed for one in session]
    assert len(rounds) == len(found)
    for one, record in zip(rounds, found, strict=True):
        assert one.accepted[:-1] == record.accepted[:-1]
        assert len(one.accepted) == len(record.accepted)
        assert 1 + one.accepted[-1] >= record.emitted[-1]
        assert [each.source for each in one.rounds] == record.sources


@pytest.mark.parametrize(
    ("paradigm", "thinking"),
    [(MULTI_ROUND, None), (MULTI_ROUND, Thinking(9, 91, (90, 91, 90))), (TWO, None)],
    ids=["turns", "turns, forced", "samples"],
)
def test_recorded_answers_replay_to_what_was_accepted(
    paradigm: tts.Paradigm,
    thinking: Thinking | None,
    target: Target,
    every_method: dict[str, Method],
    tmp_path: Path,
) -> None:
    """From the baseline's answers alone: text drafters, the hybrids, and over several questions."""
    names = (*TEXT, "SAM[EAGLE-3]", "Suffix[EAGLE-3]")
    records = compare(
        target, {name: every_method[name] for name in names}, QUESTIONS[:2], paradigm,
        path=tmp_path / "r.jsonl", temperature=0.0 if paradigm is MULTI_ROUND else 0.2,
        max_new_tokens=NUM_NEW, thinking=thinking,
    )  # fmt: skip
    sessions = tts.spoken(target, QUESTIONS, paradigm, records)
    assert [len(session) for session in sessions] == [paradigm.num_generations] * 2
    by_method = {name: [r for r in records if r.method == name] for name in names}
    for name, (make, keeps) in TEXT.items():
        assert_accepts_the_same(tts.replay(sessions, make(), keeps), by_method[name])
    head = every_method["EAGLE-3"].make(False)
    heads = tts.head_acceptance(target, head, sessions)
    for name in ("SAM[EAGLE-3]", "Suffix[EAGLE-3]"):
        whole = every_method[name].make(False)
        rule = hybrid.above(whole.threshold)
        replayed = tts.replay(sessions, whole.text, "question", heads, rule)
        assert_accepts_the_same(replayed, by_method[name])
    first, heads = ([session[:1] for session in many] for many in (sessions, heads))
    best = tts.oracle(first, ngram.Sam(), heads)
    for threshold in (0, 1, 5, 99):
        other = tts.replay(first, ngram.Sam(), "question", heads, hybrid.above(threshold))
        assert num_rounds(best) <= num_rounds(other)


def num_rounds(replayed: Sequence[Sequence[tts.Replayed]]) -> int:
    return sum(len(one.rounds) for session in replayed for one in session)


def test_samples_of_a_batch_are_not_replayed(
    target: Target, every_method: dict[str, Method], tmp_path: Path
) -> None:
    records = compare(
        target, {}, QUESTIONS[:1], BATCHED, path=tmp_path / "r.jsonl", temperature=0.6,
        max_new_tokens=8,
    )  # fmt: skip
    sessions = tts.spoken(target, QUESTIONS, BATCHED, records)
    with pytest.raises(ValueError, match="share a store"):
        tts.replay(sessions, ngram.Sam())


def test_a_drafter_of_ones_own_needs_no_change_here(target: Target, tmp_path: Path) -> None:
    maker: Callable[[], TextDrafter] = lambda: ngram.Sam(ngram.SamConfig(max_nodes=3))  # noqa: E731
    own = {"short SAM": Method("n-gram", "turn", lambda _: maker())}
    records = compare(
        target, own, QUESTIONS[:1], MULTI_ROUND, path=tmp_path / "r.jsonl",
        max_new_tokens=NUM_NEW,
    )  # fmt: skip
    sessions = tts.spoken(target, QUESTIONS, MULTI_ROUND, records, method="short SAM")
    assert_accepts_the_same(tts.replay(sessions, maker(), "turn"), of(records, "short SAM"))
