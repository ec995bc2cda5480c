"""Sessions: all that a method says in answer to one question, in turns or samples.

`compare` runs every method on every question, interleaved, and appends records a session at a time;
what is on record is not measured again. The rules of the benchmark that uses it are in `tts`.

What a drafter remembers is decided by the session, here the question, never by comparing prompts:
- "turn": nothing outlives a generation;
- "question": the turns and samples of one question, and no longer;
- "run": all questions of one call of `compare`. What was learnt is kept in a file beside the
  records, so that a run that goes on has learnt what an uninterrupted one has.

A generation that fails is a record with its error and no numbers; a turn after it is not tried.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from specrepro import measure, prompts
from specrepro.decoding import Autoregressive, Drafter, Generation, Thinking, decode
from specrepro.draft_tree import DraftTree
from specrepro.measure import AUTOREGRESSIVE, DECODING_ERRORS, WARM_UP_TOKENS, Record
from specrepro.reasoning import Question, final_answer
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

LIVES = ("turn", "question", "run")


@dataclass(frozen=True, slots=True)
class Paradigm:
    """How often a question is answered: in turns that see the one before, or in samples."""

    name: str  # as rows call it
    num_turns: int = 1
    num_samples: int = 1
    is_batched: bool = False  # samples are decoded together, drafters sharing one store
    growing_prompt: bool = False  # the reference's slip: sample j sees j + 1 copies of the question

    def __post_init__(self) -> None:
        if min(self.num_turns, self.num_samples) < 1 or self.num_turns > 1 < self.num_samples:
            raise ValueError(f"a paradigm has several turns or several samples, not {self}")
        if self.is_batched and self.growing_prompt:
            raise ValueError("the prompt grows from sample to sample only where they take turns")

    @property
    def num_generations(self) -> int:
        return max(self.num_turns, self.num_samples)


@dataclass(frozen=True, slots=True)
class Method:
    """A drafter as the benchmark runs it."""

    category: str  # model-based, training-based, n-gram or hybrid
    keeps: str  # how long what it learnt lives: one of LIVES
    make: Callable[[bool], Drafter]  # of samples that share a store, where they are batched

    def __post_init__(self) -> None:
        if self.keeps not in LIVES:
            raise ValueError(f"keeps is {self.keeps!r}; choose {', '.join(LIVES)}")


@dataclass(frozen=True, slots=True)
class _Setting:
    """What every record of one call of `compare` has in common."""

    paradigm: Paradigm
    temperature: float
    seed: int
    max_new_tokens: int
    top_p: float
    top_k: int
    target: str
    dtype: str

    def common(self) -> dict[str, Any]:
        named = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "paradigm"}
        return named | {"paradigm": self.paradigm.name}


@dataclass(frozen=True, slots=True)
class _Session:
    """All that one method says in answer to one question."""

    method: str
    repeat: int
    question: Question

    def records(self, setting: _Setting) -> list[Record]:
        """The records this session will fill, still empty, in the order of turns or samples."""
        paradigm, session = setting.paradigm, self.question.id
        num, common = paradigm.num_generations, setting.common()
        common |= {"method": self.method, "repeat": self.repeat, "session": session}
        common |= {"prompts": self.question.category, "batch": num if paradigm.is_batched else 1}
        ids = [f"{session}, {paradigm.name} {n + 1} of {num}" for n in range(num)]
        numbered = "turn" if paradigm.num_turns > 1 else "sample"
        return [
            Record(
                prompt_id=name, group=ids[0] if paradigm.is_batched else name,
                **common, **{numbered: n + 1},
            )
            for n, name in enumerate(ids)
        ]  # fmt: skip


def compare(
    target: Target,
    methods: Mapping[str, Method],
    questions: Sequence[Question],
    paradigm: Paradigm,
    *,
    path: str | Path,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    thinking: Thinking | None = None,
    repeats: int = 1,
    seed: int = 0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[Record]:
    """Answer every question by every method and the baseline, session by session, interleaved.

    Records are appended to `path` a session at a time; what it holds is not measured again. Raises
    ValueError for samples at temperature 0, which would all be the same, and for records of another
    setting.
    """
    if paradigm.num_samples > 1 and temperature == 0:
        raise ValueError("samples of one question at temperature 0 are all the same; choose 0.6")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError("two questions share an id, so their records could not be told apart")
    names = measure.target_name(target), measure.dtype_name(target)
    setting = _Setting(paradigm, temperature, seed, max_new_tokens, top_p, top_k, *names)
    baseline = {AUTOREGRESSIVE: Method("baseline", "turn", lambda shares: Autoregressive())}
    methods = baseline | dict(methods)
    sessions = [
        _Session(method, repeat, question)
        for place, question in enumerate(questions)
        for repeat in range(repeats)
        for method in measure.rotated(list(methods), place + repeat)
    ]
    wanted = [record for session in sessions for record in session.records(setting)]
    held = measure.held_records(Path(path), wanted)
    left = [s for s in sessions if any(r.key not in held for r in s.records(setting))]
    runner = _Runner(target, methods, setting, thinking, Path(path).parent / "learnt")
    runner.warm_up(left)
    title = f"{paradigm.name}, T = {temperature:g}"
    for session in measure.with_progress(left, held, title):
        taken = runner.take(session, _before(session, sessions))
        missing = [record for record in taken if record.key not in held]
        measure.append_record(path, *missing)
        held |= {record.key: record for record in missing}
    return [held[record.key] for record in wanted]


def _before(session: _Session, sessions: Sequence[_Session]) -> _Session | None:
    """The session that the same method had last, in the same repeat."""
    own = [s for s in sessions if (s.method, s.repeat) == (session.method, session.repeat)]
    place = own.index(session)
    return own[place - 1] if place else None


class _Runner:
    """Takes sessions: a drafter per method, and what each of them remembers."""

    def __init__(
        self,
        target: Target,
        methods: Mapping[str, Method],
        setting: _Setting,
        thinking: Thinking | None,
        folder: Path,
    ):
        self.target, self.methods, self.setting = target, methods, setting
        self.thinking, self.memory = thinking, _Memory(folder, setting)
        self.drafters: dict[str, Drafter] = {}

    def warm_up(self, left: Sequence[_Session]) -> None:
        """Make the drafter of every method that has sessions left, and run each once untimed."""
        first = {session.method: session for session in reversed(left)}
        is_batched = self.setting.paradigm.is_batched
        for name, method in self.methods.items():
            if name not in first:
                continue
            drafter = self.drafters[name] = method.make(is_batched)
            if method.keeps == "run" and not hasattr(drafter, "restore"):
                raise ValueError(f"{name} cannot hand over what it learnt, so it cannot keep a run")
            try:
                prompt = self._prompt(first[name].question, 1, 1, None)
                asked = [prompt] * (self.setting.paradigm.num_samples if is_batched else 1)
                seeds = list(range(len(asked)))
                self._decode(drafter, asked, seeds, min(WARM_UP_TOKENS, self._most))
            except DECODING_ERRORS:
                pass  # the timed session fails the same way, and its record says so

    def take(self, session: _Session, before: _Session | None) -> list[Record]:
        """Run a session; what fails becomes the record's error."""
        method, drafter = self.methods[session.method], self.drafters[session.method]
        if method.keeps == "question":
            drafter.reset()
        if method.keeps == "run":
            drafter.restore(self.memory.recall(session, before))
        records = session.records(self.setting)
        take = self._together if self.setting.paradigm.is_batched else self._one_by_one
        take(session.question, drafter, records)
        if method.keeps == "run":
            self.memory.keep(session, drafter.state())
        return records

    def _together(self, question: Question, drafter: Drafter, records: list[Record]) -> None:
        """All samples in one batch; its time is shared out equally."""
        try:
            prompts_ids = [self._prompt(question, 1, r.sample, None) for r in records]
            found, sources = self._decode(drafter, prompts_ids, self._seeds(question, records))
        except DECODING_ERRORS as error:
            for record in records:
                record.error = f"{type(error).__name__}: {error}"
            return
        for record, generation, own in zip(records, found, sources, strict=True):
            self._fill(record, question, generation, own, 1 / len(records))

    def _one_by_one(self, question: Question, drafter: Drafter, records: list[Record]) -> None:
        """A generation after the other; a turn that failed has none after it."""
        previous: Record | None = None
        for record in records:
            if record.turn > 1 and previous.error is not None:
                record.error = f"turn {previous.turn} failed"
                continue
            try:
                ids = self._prompt(question, record.turn, record.sample, previous)
                seeds = self._seeds(question, [record])
                (generation,), (sources,) = self._decode(drafter, [ids], seeds)
            except DECODING_ERRORS as error:
                record.error = f"{type(error).__name__}: {error}"
            else:
                self._fill(record, question, generation, sources)
            previous = record

    @property
    def _most(self) -> int:
        return self.setting.max_new_tokens

    def _prompt(
        self, question: Question, turn: int, sample: int, previous: Record | None
    ) -> list[int]:
        said = previous.tokens if turn > 1 else None
        return prompt_ids(self.target, question, self.setting.paradigm, self._most, sample, said)

    def _seeds(self, question: Question, records: Sequence[Record]) -> list[int]:
        """A seed of each generation's own, the same for every method."""
        names = [f"{question.id}/{record.turn}/{record.sample}" for record in records]
        return [measure.sequence_seed(self.setting.seed, name) for name in names]

    def _decode(
        self,
        drafter: Drafter,
        asked: list[list[int]],
        seeds: list[int],
        most: int | None = None,
    ) -> tuple[list[Generation], list[list[str]]]:
        """What was said, and what each round drafted from."""
        noted, setting = NotedSources(drafter), self.setting
        found = decode(
            self.target, noted, asked, most or self._most, setting.temperature, setting.top_p,
            setting.top_k, seed=seeds, thinking=self.thinking,
        )  # fmt: skip
        return found, noted.by_sequence

    def _fill(
        self,
        record: Record,
        question: Question,
        generation: Generation,
        sources: list[str],
        share: float = 1.0,
    ) -> None:
        measure.fill(record, generation, share)
        record.sources = sources
        record.score = question.score(self._judged_text(generation.tokens))

    def _judged_text(self, tokens: Sequence[int]) -> str:
        """All of an answer, but for what was only thought."""
        if self.thinking is not None:
            return final_answer(self.target.tokenizer, tokens)
        return self.target.tokenizer.decode(tokens, skip_special_tokens=True)


def prompt_ids(
    target: Target,
    question: Question,
    paradigm: Paradigm,
    max_new_tokens: int,
    sample: int = 1,
    said: Sequence[int] | None = None,
) -> list[int]:
    """What the target reads before a sample, or before the turn that follows the one that `said`.

    Raises ValueError where it leaves no room for the answer.
    """
    if said is None:
        prompt = question.first_prompt(sample if paradigm.growing_prompt else 1)
    else:
        prompt = question.next_prompt(final_answer(target.tokenizer, said))
    return prompts.encode(target.tokenizer, prompt, target.max_context - max_new_tokens)


class NotedSources:
    """A drafter, and the source of each round's draft by sequence; nothing where it names none."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    @property
    def max_nodes(self) -> int:
        return self.drafter.max_nodes

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.rows: list[int] = list(range(len(roots)))
        self.by_sequence: list[list[str]] = [[] for _ in self.rows]
        self.drafter.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        tree = self.drafter.propose()
        for row, source in zip(self.rows, getattr(self.drafter, "sources", ()), strict=False):
            self.by_sequence[row].append(source)
        return tree

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.drafter.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]
        self.drafter.select(rows)


class _Memory:
    """What methods have learnt in a run, by method and repeat, in files beside the records.

    Written before the records of the session that taught it, so a run that goes on after any
    interruption finds the state that its next session began with; the last two are kept.
    """

    def __init__(self, folder: Path, setting: _Setting):
        self.folder, self.setting = folder, setting
        self.states: dict[tuple[str, int], dict[str, Tensor]] = {}

    def recall(self, session: _Session, before: _Session | None) -> dict[str, Tensor]:
        """What was known after the session `before`; nothing at the start of a run."""
        key = session.method, session.repeat
        if key in self.states or before is None:
            return self.states.get(key, {})
        path = self._path(before)
        if not path.is_file():
            warnings.warn(
                f"what {session.method} learnt up to {before.question.id} is not at {path}; it"
                " starts with nothing, and its later records are not those of one whole run",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip
            return {}
        return load_file(path)

    def keep(self, session: _Session, state: dict[str, Tensor]) -> None:
        key, path = (session.method, session.repeat), self._path(session)
        self.states[key] = state
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, unfinished)
        os.replace(unfinished, path)
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
        for old in kept[:-2]:
            old.unlink()

    def _path(self, session: _Session) -> Path:
        run, question = f"{session.method} {session.repeat} {self.setting}", session.question.id
        names = [f"{zlib.crc32(text.encode()):08x}" for text in (run, question)]
        return self.folder / names[0] / f"{names[1]}.safetensors"
