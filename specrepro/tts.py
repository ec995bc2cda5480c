"""SpecTTS-Bench: drafters under test-time scaling, one protocol for all of them.

arXiv:2509.04474.

Reproduced: the two paradigms, best-of-N (N samples of one question) and multi-round thinking (a
second turn that sees the final answer of the first and no more); the drafters of the paper's three
categories and their hybrid; how long each remembers (`METHODS`, `sessions`); temperatures 0 and 0.6
without top-k or top-p; the thinking budget, each forced token being a round that accepts nothing.
Not reproduced: a verifier that chooses among samples, which the paper has not either.
Read at second hand: the paper through its released code, whose slips are not repeated. That its
sample j sees j + 1 copies of the question is a switch (`GROWING`), off by default.
Departs from the paper:
- beside samples drawn in turn there is a batch of them, whose drafters learn from each other where
  they can (SAM, SuffixDecoding, Token Recycling; PIA keeps a store per sample);
- every method answers with its own words, as there, but all draw alike: of one seed the answers are
  the same, unless rounding turns a near tie;
- the budget falls on the same token whatever was drafted; the reference looks between rounds;
- SpS drafts a chain of a fixed length, that of its checkpoint, or `ASSISTED` of a model from the
  Hub, where the reference leaves it to transformers' assisted generation, which may stop earlier;
- Suffix[EAGLE-3] and SuffixDecoding are not among the paper's methods.

`replay` tells from recorded answers, in seconds, what another drafter, threshold or an oracle would
have accepted of them. What the records add up to is in `tts_rows`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specrepro import corpus, draft_lm, eagle3, hybrid, ngram, reasoning, recycling
from specrepro import target_model as targets
from specrepro.decoding import Drafter
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.ngram import TextDrafter
from specrepro.reasoning import Question
from specrepro.sessions import Method, Paradigm, compare, prompt_ids
from specrepro.suffix import SuffixArray
from specrepro.target_model import Target

__all__ = ["Method", "Paradigm", "Question", "compare"]  # what a notebook needs of others

TEMPERATURES = (0.0, 0.6)
TREE_DEPTH = 5  # of EAGLE-3's tree, where the benchmark runs it
ASSISTED = 20  # tokens that assisted generation drafts, where the benchmark runs SpS with it
MULTI_ROUND = Paradigm("multi-round", num_turns=2)
BEST_OF_N = Paradigm("best-of-n", num_samples=4)
BATCHED = Paradigm("best-of-n, batched", num_samples=4, is_batched=True)
GROWING = Paradigm("best-of-n, growing prompt", num_samples=4, growing_prompt=True)


HEADLINE = ("EAGLE-3", "SAM", "Recycling", "SAM[EAGLE-3]")


@dataclass(frozen=True, slots=True)
class Size:
    """How much of the benchmark a tier runs; of methods, () are all that can be run."""

    num_prompts: int  # questions per set
    max_new_tokens: int
    timed: tuple[str, ...] = ()  # in multi-round thinking at temperature 0
    timed_warm: tuple[str, ...] = ()  # at 0.6
    num_warm: int = 0  # questions per set at 0.6; 0 is all
    times_samples: bool = True  # best-of-N by every method, else the baseline's samples alone
    with_head: tuple[tuple[str, float], ...] = ((MULTI_ROUND.name, 0.0),)  # replays of the head
    has_store: bool = True  # REST's
    audited: tuple[str, ...] = ()
    num_audited: int = 0  # prompts; 0 is what the tier audits elsewhere
    num_cost_rounds: int = 200  # timed of each drafter without a model


SIZES = {
    "smoke": Size(
        1, 24, HEADLINE, ("EAGLE-3", "Recycling"), times_samples=False, has_store=False,
        audited=HEADLINE, num_audited=1, num_cost_rounds=20,
    ),
    "laptop": Size(
        2, 512, (*HEADLINE, "SpS"), ("EAGLE-3", "SAM", "Recycling"), num_warm=1,
        times_samples=False, num_audited=1,
    ),
    "full": Size(
        10, 512, with_head=tuple((MULTI_ROUND.name, t) for t in TEMPERATURES), num_audited=12
    ),
    "paper": Size(30, 15_000),
}  # fmt: skip


def questions(
    tier: str, num_questions: int = 0, seed: int = 0, folder: Path | str = ""
) -> list[Question]:
    """Questions of every set: the benchmark's own at tier `paper`, generated ones below it.

    `folder` holds a folder for each of the benchmark's sets, where they do not come from the Hub.
    """
    num = num_questions or SIZES[tier].num_prompts
    if tier != "paper":
        found = [reasoning.generated(name, num, seed) for name in reasoning.GENERATED]
    else:
        found = [
            reasoning.from_hub(name, num, seed, str(Path(folder) / name) if folder else None)
            for name in reasoning.FROM_HUB
        ]
    return sum(found, [])


def measures(tier: str, num_prompts: int, max_new_tokens: int) -> str:
    """What a run of a tier decodes, in a line."""
    num_sets = len(reasoning.FROM_HUB if tier == "paper" else reasoning.GENERATED)
    timed = ", ".join(SIZES[tier].timed) or "every method"
    return (
        f"{num_prompts} questions of each of {num_sets} sets, in two turns at temperature 0 and"
        f" {TEMPERATURES[-1]} and in four samples, {max_new_tokens} new tokens, by {timed} and the"
        " baseline"
    )


# --- the methods

NGRAM_METHODS = {
    "PLD": Method("n-gram", "turn", lambda _: ngram.PromptLookup()),
    "SAM": Method("n-gram", "question", lambda shares: ngram.Sam(carries=True, shares=shares)),
    "SuffixDecoding": Method("n-gram", "question", lambda _: ngram.SuffixDecoding(carries=True)),
    "PIA": Method("n-gram", "question", lambda _: ngram.Pia(carries=True)),
    "Lookahead": Method("n-gram", "turn", lambda _: recycling.Lookahead()),
    "Recycling": Method(
        "n-gram", "run", lambda shares: recycling.TokenRecycling(carries=True, shares=shares)
    ),
}


def methods(
    target: Target,
    checkpoint: Path | str = eagle3.CHECKPOINT,
    draft_model: Path | str = draft_lm.CHECKPOINT,
    store: SuffixArray | None = None,
    **tree: int,
) -> tuple[dict[str, Method], dict[str, str]]:
    """Every method that can be run on this target, and for the others why not, in a line each.

    `checkpoint` holds an EAGLE-3 head, whose sizes `tree` overrides where not 0; `draft_model` is
    a folder of `draft_lm`, or the Hub id of a smaller model of the target's vocabulary; `store` is
    REST's.
    """
    found, left_out = dict(NGRAM_METHODS), {}
    if store is None:
        left_out["REST"] = "no datastore: build one with tts.rest_store from a corpus of answers"
    else:
        found["REST"] = Method("n-gram", "turn", lambda shares: ngram.Rest(store))
    if (Path(checkpoint) / "config.json").is_file():
        found |= _with_head(target, checkpoint, tree)
    else:
        line = _how_to_train(checkpoint, "eagle3")
        left_out |= dict.fromkeys(("EAGLE-3", "SAM[EAGLE-3]", "Suffix[EAGLE-3]"), line)
    if Path(draft_model) == draft_lm.CHECKPOINT and (why := _no_small_model(target)):
        left_out["SpS"] = why
    else:
        found["SpS"] = Method("model-based", "turn", lambda _: small_model(target, draft_model))
    return found, left_out


def _no_small_model(target: Target) -> str:
    """Why the committed small model cannot draft for this target; empty where it can."""
    config = draft_lm.CHECKPOINT / "config.json"
    if not config.is_file():
        return _how_to_train(draft_lm.CHECKPOINT, "draft_lm")
    own = json.loads(config.read_text())["vocab_size"]
    if own == target.vocab_size:
        return ""
    return (
        f"the committed small model has a vocabulary of {own} tokens and {target.name} one of"
        f" {target.vocab_size}: name a model of the target's family with `-p draft_model`"
    )


def _how_to_train(folder: Path | str, module: str) -> str:
    here = Path(folder).absolute()
    shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else folder
    return f"no checkpoint at {shown}: train one with `python -m specrepro.{module} CORPUS {shown}`"


def _with_head(
    target: Target, checkpoint: Path | str, tree: Mapping[str, int]
) -> dict[str, Method]:
    """EAGLE-3 and its hybrids over one head."""
    head, own = eagle3.load_head(checkpoint)
    shape = replace(own, **{name: value for name, value in tree.items() if value})

    def alone(shares: bool) -> Drafter:
        return eagle3.Drafter(head, target, shape)

    def with_sam(shares: bool) -> Drafter:
        return hybrid.sam_hybrid(alone(shares), carries=True, shares=shares)

    def with_suffix(shares: bool) -> Drafter:
        return hybrid.suffix_hybrid(alone(shares), carries=True)

    return {
        "EAGLE-3": Method("training-based", "turn", alone),
        "SAM[EAGLE-3]": Method("hybrid", "question", with_sam),
        "Suffix[EAGLE-3]": Method("hybrid", "question", with_suffix),
    }


def small_model(target: Target, name: Path | str) -> draft_lm.Drafter:
    """Speculative sampling with a folder of `draft_lm`, or any smaller model of the vocabulary."""
    config = Path(name) / "config.json"
    if config.is_file() and "specrepro_num_drafted" in json.loads(config.read_text()):
        return draft_lm.Drafter.load(name, target)
    own = targets.load(str(name), dtype=target.dtype, device=target.device.type)
    return draft_lm.Drafter(own.model, target, ASSISTED)


def rest_store(folder: Path | str = corpus.COMMITTED, depth: int = 16) -> SuffixArray:
    """REST's datastore: a corpus of the target's answers, none of them to a question asked here."""
    answers = corpus.load(Path(folder)).answers
    return SuffixArray.of([answer.tokens for answer in answers], depth)


# --- replay


@dataclass(frozen=True, slots=True)
class Spoken:
    """One recorded generation with the prompt that it answers: all that a replay reads."""

    record: Record
    prompt: list[int]

    @property
    def answer(self) -> list[int]:
        return self.record.tokens


def spoken(
    target: Target,
    questions: Sequence[Question],
    paradigm: Paradigm,
    records: Sequence[Record],
    method: str = AUTOREGRESSIVE,
) -> list[list[Spoken]]:
    """Session by session, what a method said at temperature 0 or at any other, its first repeat."""
    own = [r for r in records if (r.method, r.paradigm, r.repeat) == (method, paradigm.name, 0)]
    by_session: dict[str, list[Record]] = {}
    for record in own:
        by_session.setdefault(record.session, []).append(record)
    asked = {question.id: question for question in questions}
    return [
        list(_with_prompts(target, asked[session], paradigm, found))
        for session, found in by_session.items()
        if all(record.error is None for record in found)
    ]


def _with_prompts(
    target: Target, question: Question, paradigm: Paradigm, records: Sequence[Record]
) -> Iterator[Spoken]:
    said = None
    for record in sorted(records, key=lambda record: (record.turn, record.sample)):
        most = record.max_new_tokens
        yield Spoken(record, prompt_ids(target, question, paradigm, most, record.sample, said))
        said = record.tokens if paradigm.num_turns > 1 else None


@dataclass(frozen=True, slots=True)
class Replayed:
    """A generation's rounds with another drafter; no time was measured."""

    spoken: Spoken
    rounds: list[hybrid.Round]

    @property
    def accepted(self) -> list[int]:
        return [one.accepted for one in self.rounds]

    def as_record(self, method: str) -> Record:
        """What decoding would have left on record, but for its times and what was drafted."""
        return replace(
            self.spoken.record, method=method, accepted=self.accepted, drafted=[],
            sources=[one.source for one in self.rounds], target_passes=len(self.rounds),
            seconds=None, prefill_seconds=None, seconds_by_part={}, load=None,
        )  # fmt: skip


def in_turn(sessions: Sequence[Sequence[Spoken]]) -> list[list[Spoken]]:
    """Samples of batches as if they had been drawn in turn; in float32 their words are the same."""
    own = {"batch": 1, "paradigm": BEST_OF_N.name}
    return [[replace(one, record=replace(one.record, **own)) for one in s] for s in sessions]


Heads = Sequence[Sequence[Mapping[int, int]]]  # per session and generation: see head_acceptance


def replay(
    sessions: Sequence[Sequence[Spoken]],
    drafter: TextDrafter,
    keeps: str = "question",
    heads: Heads | None = None,
    takes_text: hybrid.Takes = lambda draft: True,
) -> list[list[Replayed]]:
    """What a text drafter, or with `heads` and a rule a hybrid, would accept of recorded answers.

    Exactly what decoding with it accepts, at temperature 0 and at any other. Samples that were
    batched cannot be replayed, since they shared a store.
    """

    def rounds(one: Spoken, known: Mapping[int, int]) -> list[hybrid.Round]:
        forced = one.record.forced
        return hybrid.replay(one.prompt, one.answer, drafter, known, takes_text, forced)

    return _replayed(sessions, drafter, keeps, heads, rounds)


def oracle(
    sessions: Sequence[Sequence[Spoken]],
    drafter: TextDrafter,
    heads: Heads,
    keeps: str = "question",
) -> list[list[Replayed]]:
    """The fewest rounds that any switch between a text drafter and a head could take."""

    def rounds(one: Spoken, known: Mapping[int, int]) -> list[hybrid.Round]:
        return hybrid.oracle(one.prompt, one.answer, drafter, known, one.record.forced)

    return _replayed(sessions, drafter, keeps, heads, rounds)


def _replayed(
    sessions: Sequence[Sequence[Spoken]],
    drafter: TextDrafter,
    keeps: str,
    heads: Heads | None,
    rounds: Callable[[Spoken, Mapping[int, int]], list[hybrid.Round]],
) -> list[list[Replayed]]:
    """Session by session, the drafter forgetting when its life is over."""
    if any(one.record.batch > 1 for session in sessions for one in session):
        raise ValueError("samples of a batch share a store; replay those drawn in turn")
    found = []
    for place, session in enumerate(sessions):
        if keeps != "run":
            drafter.reset()
        known = heads[place] if heads else [{}] * len(session)
        pairs = zip(session, known, strict=True)
        found.append([Replayed(one, rounds(one, accepted)) for one, accepted in pairs])
    return found


def head_acceptance(
    target: Target, head: Drafter, sessions: Sequence[Sequence[Spoken]]
) -> list[list[dict[int, int]]]:
    """What a head has right at every place of recorded answers: the `heads` of `replay`."""
    return [
        [
            hybrid.head_acceptance(target, head, one.prompt, one.answer, one.record.forced)
            for one in session
        ]
        for session in sessions
    ]
