"""SpecTTS-Bench's experiments at a tier: what is decoded, what is replayed, and the rows of both.

Decoded and timed are the methods that the tier's `Size` names, in both paradigms and at both
temperatures. Everything that token ids can tell is replayed from the baseline's answers instead
(`tts.replay`): the other text drafters and other settings of them, any threshold of the hybrids, an
oracle. What a draft head would have had right at every place of these answers is found once and
kept beside the records; with it the head and its hybrids are replayed too. Rows of replays have a
tau and no time, and `source` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from specrepro import checkpoints, hybrid, ngram, reasoning, rows, tts, tts_export, tts_rows
from specrepro.decoding import Drafter, Thinking
from specrepro.drafting_cost import drafting_cost
from specrepro.experiment import Run
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.ngram import LookupConfig, SuffixConfig, TextDrafter
from specrepro.reasoning import Question
from specrepro.sessions import Method, Paradigm
from specrepro.target_model import EMBEDDED, Target
from specrepro.tts import BATCHED, BEST_OF_N, GROWING, MULTI_ROUND, Replayed, Size, Spoken
from specrepro.tts_rows import OVERALL, REPLAYED

HEAD, SAM, WITH_SAM = "EAGLE-3", "SAM", "SAM[EAGLE-3]"
HYBRIDS = (WITH_SAM, "Suffix[EAGLE-3]")
PAIRS = (  # compared question by question
    ("SpS", HEAD), (HEAD, SAM), (SAM, HEAD), (SAM, "Recycling"), (WITH_SAM, SAM),
    *(("Recycling", name) for name in (SAM, "PLD", "PIA", "Lookahead")),
)  # fmt: skip
SETTINGS = {  # of the text drafters, beside their papers' own
    "PLD, any length": lambda: ngram.PromptLookup(LookupConfig(require_full=False)),
    "PLD, any length, last": lambda: ngram.PromptLookup(
        LookupConfig(require_full=False, occurrence="last")
    ),
    "SuffixDecoding, tree": lambda: ngram.SuffixDecoding(SuffixConfig(is_tree=True), carries=True),
    "SAM, forgetting": ngram.Sam,  # what came before the turn or sample
    "PIA, forgetting": ngram.Pia,
    "SuffixDecoding, forgetting": ngram.SuffixDecoding,
}
THRESHOLDS = tuple(range(1, 13))

Sessions = list[list[Spoken]]
Heads = list[list[dict[int, int]]]


@dataclass
class Lab:
    """What the notebook asks for, each thing made once."""

    run: Run
    checkpoint: Path  # of EAGLE-3's head
    draft_model: str = ""  # of speculative sampling; empty is the committed one
    tree: Mapping[str, int] = field(default_factory=dict)  # sizes of EAGLE-3's, where not 0
    is_growing: bool = False  # the prompt of best-of-N, as in the reference
    size: Size | None = None

    def __post_init__(self) -> None:
        self.size = self.size or tts.SIZES[self.run.tier_name]
        sizes = dict(self.tree)
        if self.run.published:
            sizes["depth"] = sizes.get("depth") or tts.TREE_DEPTH
        self.tree = self.run.tree(**sizes)
        self.methods, self.left_out = self._methods(self.run.target)

    def _methods(self, target: Target) -> tuple[dict[str, Method], dict[str, str]]:
        named = {"draft_model": self.draft_model} if self.draft_model else {}
        return tts.methods(target, self.checkpoint, store=self._store, **named, **self.tree)

    @cached_property
    def _store(self) -> Any:
        """REST's: the committed answers are the embedded target's, so no other has one."""
        is_own = self.run.target_name == EMBEDDED and self.size.has_store
        return tts.rest_store() if is_own else None

    @property
    def identity(self) -> dict[str, Any]:
        """What records depend on besides the run's own settings."""
        size = asdict(self.size) | {"num_prompts": self.run.num_prompts}
        named = {"tree": dict(self.tree), "size": size, "is_growing": self.is_growing}
        named |= {"draft_model": self.draft_model}
        return {"checkpoint": checkpoints.digest(self.checkpoint)} | named

    @cached_property
    def questions(self) -> list[Question]:
        run = self.run
        return tts.questions(run.tier_name, run.num_prompts, run.seed, run.prompts_dir)

    @cached_property
    def thinking(self) -> Thinking | None:
        return reasoning.thinking_of(self.run.target, self.run.max_new_tokens)

    def about(self) -> str:
        """What is not measured here and why, a line each."""
        lines = [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, reasoning.about_thinking(self.run.target, self.thinking)])

    # --- what is decoded and timed

    def compare(self, paradigm: Paradigm, temperature: float, names: Sequence[str]) -> list[Record]:
        """Answers of the baseline and of methods, from the record where they are on it."""
        is_headline = paradigm is MULTI_ROUND and temperature == 0
        return tts.compare(
            self.run.target, {n: self.methods[n] for n in names if n in self.methods},
            self.asked(temperature), paradigm, path=self.run.records / "decoded.jsonl",
            temperature=temperature, max_new_tokens=self.run.max_new_tokens,
            thinking=self.thinking, seed=self.run.seed,
            repeats=self.run.tier.repeats if is_headline else 1,
        )  # fmt: skip

    def asked(self, temperature: float) -> list[Question]:
        """All questions; where a tier samples fewer, the first of each set."""
        most = self.size.num_warm if temperature else 0
        sets = dict.fromkeys(question.category for question in self.questions)
        by_set = ([q for q in self.questions if q.category == name] for name in sets)
        return [question for own in by_set for question in own[: most or None]]

    @cached_property
    def turns(self) -> dict[float, list[Record]]:
        """Multi-round thinking, by temperature."""
        named = dict(zip(tts.TEMPERATURES, (self.size.timed, self.size.timed_warm), strict=True))
        return {t: self.compare(MULTI_ROUND, t, self._all(names)) for t, names in named.items()}

    @property
    def drawn(self) -> list[Paradigm]:
        """How samples are drawn; the first way is replayed."""
        in_turn = GROWING if self.is_growing else BEST_OF_N
        if self.size.times_samples:
            return [in_turn, BATCHED]
        return [in_turn if self.is_growing else BATCHED]

    @cached_property
    def samples(self) -> list[Record]:
        """Best-of-N; where a tier does not time it, the baseline's samples alone."""
        names = list(self.methods) if self.size.times_samples else []
        return sum((self.compare(way, tts.TEMPERATURES[-1], names) for way in self.drawn), [])

    def _all(self, names: Sequence[str]) -> Sequence[str]:
        return names or list(self.methods)

    def decoded(self, records: Sequence[Record]) -> list[pd.DataFrame]:
        """Rows of what was timed: per set and overall, by turn, by source, and where time went."""
        by_temperature = [
            [one for one in records if (one.paradigm, one.temperature) == key]
            for key in dict.fromkeys((one.paradigm, one.temperature) for one in records)
        ]
        tables = [
            tts_rows.decode_rows(records, self.run.decode_rows),
            tts_rows.turn_rows(records, self.run.decode_rows),
            tts_rows.paired_differences(records, PAIRS),
            tts_rows.source_rows(records),
        ]
        for mine in by_temperature:
            tables += [self._gains(mine), tts_rows.round_rows(mine)]
            tables += [_rise(mine), _consistency(mine)] if mine[0].batch == 1 else []
        return tables

    def _gains(self, records: Sequence[Record]) -> pd.DataFrame:
        """SAM[EAGLE-3] against its parts, and a suffix automaton against a trained head."""
        pairs = ((WITH_SAM, (HEAD,)), (WITH_SAM, (HEAD, SAM)), (SAM, (HEAD,)))
        present = {record.method for record in records}
        found = [
            tts_rows.gains(records, method, others, " or ".join(others))
            for method, others in pairs
            if {method, *others} <= present
        ]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def fall_off(self) -> pd.DataFrame:
        """Rows of quantity "fall_off": what the higher temperature costs each method."""
        return tts_rows.changes(*self.turns.values(), "fall_off")

    # --- what is replayed

    def answers(self, paradigm: Paradigm, temperature: float) -> Sessions:
        """The baseline's answers; samples of a batch as if they had been drawn in turn."""
        is_samples = paradigm is not MULTI_ROUND
        records = self.samples if is_samples else self.turns[temperature]
        paradigm = self.drawn[0] if is_samples else paradigm
        said = tts.spoken(self.run.target, self.questions, paradigm, records)
        return tts.in_turn(said) if paradigm is BATCHED else said

    @cached_property
    def cases(self) -> dict[tuple[Paradigm, float], Sessions]:
        """What is replayed: both paradigms, the first at both temperatures."""
        keys = [(MULTI_ROUND, temperature) for temperature in tts.TEMPERATURES]
        keys.append((BEST_OF_N, tts.TEMPERATURES[-1]))
        return {key: self.answers(*key) for key in keys}

    def heads(self, paradigm: Paradigm, temperature: float) -> Heads | None:
        """What EAGLE-3's head has right at every place; None where the tier does not ask."""
        if HEAD not in self.methods or (paradigm.name, temperature) not in self.size.with_head:
            return None
        path = self.run.records / f"head_{paradigm.name}_{temperature:g}.json"
        if not path.is_file():
            head = self.methods[HEAD].make(False)
            sessions = self.cases[paradigm, temperature]
            found = tts.head_acceptance(self.run.target, head, sessions)
            pairs = [[list(one.items()) for one in session] for session in found]
            checkpoints.write_text(path, json.dumps(pairs))
        return [[dict(one) for one in session] for session in json.loads(path.read_text())]

    @cached_property
    def text_drafters(self) -> dict[str, tuple[TextDrafter, str]]:
        """Drafters that token ids tell all about, and how long each remembers."""
        ngrams = {name: m for name, m in self.methods.items() if m.category == "n-gram"}
        own = {
            name: (drafter, method.keeps)
            for name, method in ngrams.items()
            if isinstance(drafter := method.make(False), TextDrafter)
        }
        return own | {name: (make(), "question") for name, make in SETTINGS.items()}

    def replays(self, paradigm: Paradigm, temperature: float) -> dict[str, list[list[Replayed]]]:
        """Every drafter that can be replayed on the answers of one case."""
        sessions, heads = self.cases[paradigm, temperature], self.heads(paradigm, temperature)
        found = {
            name: tts.replay(sessions, drafter, keeps)
            for name, (drafter, keeps) in self.text_drafters.items()
        }
        if heads is None:
            return found
        found[HEAD] = tts.replay(sessions, ngram.PromptLookup(), "turn", heads, lambda _: False)
        for name in HYBRIDS:
            whole = self.methods[name].make(False)
            rule = hybrid.above(whole.threshold)
            found[name] = tts.replay(sessions, whole.text, "question", heads, rule)
        return found

    @cached_property
    def replayed(self) -> dict[tuple[Paradigm, float], dict[str, list[list[Replayed]]]]:
        return {key: self.replays(*key) for key in self.cases}

    def replay_tables(self) -> pd.DataFrame:
        """Rows of all replays: per set, by turn, what turns and temperature change, by answer."""
        tables = []
        for case in self.replayed.values():
            for name, found in case.items():
                tables.append(tts_rows.replay_rows(found, name))
                tables += _by_turn(found, name)
            records = self._records(case)
            tables += [_rise(records), _memory(records), tts_rows.generation_rows(records)]
        cold, warm = (self._records(self.replayed[MULTI_ROUND, t]) for t in tts.TEMPERATURES)
        tables.append(tts_rows.changes(cold, warm, "fall_off"))
        return pd.concat([one for one in tables if len(one)], ignore_index=True).assign(
            source=REPLAYED
        )

    def _records(self, case: Mapping[str, list[list[Replayed]]]) -> list[Record]:
        """The replays as records, and the answers that they are of, which the baseline gave."""
        ones = {name: [one for s in found for one in s] for name, found in case.items()}
        spoken = [one.spoken.record for one in next(iter(ones.values()))]
        return spoken + [one.as_record(name) for name, own in ones.items() for one in own]

    def checks(self) -> pd.DataFrame:
        """Rows of quantity "replay_check": replays of each text drafter's own decoded answers."""
        found = []
        for records in self.turns.values():
            for name in {r.method: 0 for r in records if r.method in self.text_drafters}:
                said = tts.spoken(self.run.target, self.questions, MULTI_ROUND, records, name)
                again = tts.replay(said, *self.text_drafters[name])
                found += [tts_rows.replay_check(again)] if again else []
        return pd.DataFrame(found)

    def thresholds(self, temperature: float = 0.0) -> pd.DataFrame:
        """Rows of quantity "threshold": both hybrids under other thresholds, and their oracles."""
        case = MULTI_ROUND, temperature
        sessions, heads = self.cases[case], self.heads(*case)
        if heads is None:
            return pd.DataFrame()
        tables = []
        for name in HYBRIDS:
            text = self.methods[name].make(False).text
            for threshold in THRESHOLDS:
                found = tts.replay(sessions, text, "question", heads, hybrid.above(threshold))
                tables.append(tts_rows.replay_rows(found, name, threshold=threshold))
            best = tts.oracle(sessions, text, heads)
            tables.append(tts_rows.replay_rows(best, f"{name}, oracle"))
        return pd.concat(tables, ignore_index=True).assign(quantity="threshold", source=REPLAYED)

    # --- the rest

    def drafting_cost(self) -> pd.DataFrame:
        """Rows of quantity "drafting_cost" on this machine."""
        dtype = str(self.run.target.dtype).removeprefix("torch.")
        return drafting_cost(num_rounds=self.size.num_cost_rounds, dtype=dtype)

    def repetition(self) -> pd.DataFrame:
        """Decode rows apart for answers that repeat themselves less, and more."""
        pool = [replace(record, prompts=OVERALL) for record in self.turns[0.0]]
        return rows.split_by_repetition(pool).assign(paradigm=MULTI_ROUND.name)

    def loaders(self) -> dict[str, Any]:
        """Drafters for the losslessness check, which decodes in another number format too."""
        names = [name for name in self._all(self.size.audited) if name in self.methods]
        return {name: partial(self._load, name) for name in names}

    def _load(self, name: str, target: Target) -> Drafter:
        return self._methods(target)[0][name].make(False)

    def audit(self) -> pd.DataFrame:
        """Is every method lossless? Asked on the prompt set of maths."""
        return self.run.audit(self.loaders(), sets=("maths",), num_prompts=self.size.num_audited)

    def accuracy(self) -> pd.DataFrame:
        """How often methods were right, beside how fast they were."""
        found = self.run.of("decode")
        found = found[found["prompts"] == OVERALL]
        return found.filter(
            ["paradigm", "temperature", "method", "num_prompts", "new_tokens", "accuracy",
             "accuracy_any", "speedup", "speedup_legacy", "tau", "tau_per_round",
             "tau_per_request"]
        )  # fmt: skip

    def export(self) -> list[Path]:
        """Spec-Bench's layout, a file per method, paradigm and temperature, and requests.jsonl."""
        records, folder = sum(self.turns.values(), []) + self.samples, self.run.records / "export"
        files = tts_export.export(records, folder, self.run.target.tokenizer.decode)
        return [*files, tts_export.write_requests(records, folder)]


def _rise(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "rise": what the last turn or sample has on the first."""
    last = max(max(one.turn, one.sample) for one in records)
    parts = ([one for one in records if max(one.turn, one.sample) == n] for n in (1, last))
    return tts_rows.changes(*parts, "rise")


def _memory(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "memory": what a store adds, in the last turn or sample, to the same drafter
    that forgets what came before.
    """
    last = max(max(one.turn, one.sample) for one in records)
    own = [one for one in records if max(one.turn, one.sample) == last]
    twins = {f"{name}, forgetting": name for name in ("SAM", "PIA", "SuffixDecoding")}
    forgetting = [replace(one, method=twins[one.method]) for one in own if one.method in twins]
    baseline = [one for one in own if one.method == AUTOREGRESSIVE]
    keeping = [one for one in own if one.method in twins.values()]
    return tts_rows.changes(baseline + forgetting, baseline + keeping, "memory")


def _consistency(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "consistency": how far tau and the cost of a round are from the speedup."""
    found = []
    finished = {one.method: 0 for one in records if one.error is None and one.target_passes}
    for method in [name for name in finished if name != AUTOREGRESSIVE]:
        measured, explained = tts_rows.consistency(records, method)
        found.append({"method": method, "value": explained / measured - 1})
    first = records[0]
    named = {"paradigm": first.paradigm, "temperature": first.temperature, "batch": first.batch}
    return pd.DataFrame(found).assign(quantity="consistency", prompts=OVERALL, **named)


def _by_turn(found: list[list[Replayed]], method: str) -> list[pd.DataFrame]:
    """Rows of quantity "replay_by_turn"."""
    return [
        tts_rows.replay_rows(
            [[session[place]] for session in found], method, quantity="replay_by_turn",
            turn=found[0][place].spoken.record.turn, sample=found[0][place].spoken.record.sample,
        )
        for place in range(len(found[0]))
    ]  # fmt: skip
