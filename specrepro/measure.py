"""One ruler: every method decodes the same prompts under the same clock, and leaves a record.

`compare` interleaves methods prompt by prompt (A B A B) with the baseline always among them,
appends a `Record` per prompt as it goes, and skips what the file already holds: that is all there
is to resuming. Tokens are counted from ids, the stop token included, the same for both baselines:
one token a pass through our own loop, and plain `transformers.generate`. `pass_cost` and
`drafter_cost` time the two halves of a round alone.

A failed prompt is a record with its error, never a zero. What records add up to is in
`rows.py`; whether the methods are lossless is asked in `losslessness.py`.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from specrepro import checkpoints, provenance
from specrepro.decoding import Autoregressive, Clock, Drafter, Generation, Sampling, decode
from specrepro.draft_tree import DraftTree
from specrepro.packed_linear import unpacked
from specrepro.target_model import ATTENTION, Target, target_name

AUTOREGRESSIVE = "Autoregressive"
GENERATE = "transformers.generate"
WARM_UP_TOKENS = 16
# method, batch, greedy or not and threads of what has run on a target before
_WARM: WeakKeyDictionary[Target, set[tuple[str, int, bool, int]]] = WeakKeyDictionary()
# what one prompt can cause; anything else is our own mistake and stops the run
DECODING_ERRORS = (ValueError, RuntimeError, IndexError)

Question = tuple[str, Sequence[int]]  # a prompt's id and its token ids
Methods = Mapping[str, "Callable[[], Drafter] | Drafter"]
Decoder = Callable[[list[list[int]], list[int], int], list[Generation]]


@dataclass(slots=True, kw_only=True)
class Record:
    """One prompt decoded once by one method; a batch's times are shared out equally."""

    method: str
    prompts: str  # the prompt set
    prompt_id: str
    temperature: float
    seed: int  # of the run; `sequence_seed` gives the prompt's own
    batch: int  # sequences decoded together
    repeat: int
    group: str  # id of the first prompt of the batch
    max_new_tokens: int
    top_p: float
    top_k: int
    target: str
    dtype: str
    load: float | None = None  # the machine's load average over the last minute
    commit: str = ""  # of the code that decoded
    when: str = ""
    new_tokens: int | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: float | None = None  # prefill included
    prefill_seconds: float | None = None
    target_passes: int | None = None  # after prefill
    accepted: list[int] = field(default_factory=list)  # per round
    drafted: list[int] = field(default_factory=list)  # nodes per round, the root not counted
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why nothing was decoded
    # of one generation among several that answer the same question
    paradigm: str = ""
    session: str = ""  # the question's id: what a drafter remembers of it is forgotten afterwards
    turn: int = 1
    sample: int = 1
    sources: list[str] = field(default_factory=list)  # of each round's draft, where it is known
    forced: list[int] = field(default_factory=list)  # places of tokens that were not chosen
    score: float | None = None  # of the answer, 1 where it is right; empty where nobody knows

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two records the same measurement."""
        place = (self.prompts, self.prompt_id, self.temperature, self.seed)
        return (self.method, *place, self.batch, self.repeat)

    @property
    def unit(self) -> str:
        """What was measured independently of the rest: a session, or what was decoded together."""
        return self.session or self.group

    @property
    def emitted(self) -> list[int]:
        """Tokens of each round, the last one cut where the sequence ended."""
        rounds = [num_accepted + 1 for num_accepted in self.accepted]
        if rounds:
            rounds[-1] = len(self.tokens) - 1 - sum(rounds[:-1])
        return rounds


@dataclass(frozen=True, slots=True)
class _Setting:
    """What every record of one call of `compare` has in common."""

    prompts: str
    temperature: float
    seed: int
    batch: int
    max_new_tokens: int
    top_p: float
    top_k: int
    target: str
    dtype: str

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One method's go at one batch of prompts."""

    method: str
    repeat: int
    group: list[Question]

    def records(self, setting: _Setting) -> list[Record]:
        """The records this turn will fill, still empty."""
        common = asdict(setting) | {"method": self.method, "repeat": self.repeat}
        common["group"] = self.group[0][0]
        return [Record(prompt_id=prompt_id, **common) for prompt_id, _ in self.group]


def append_record(path: str | Path, *records: Record) -> None:
    """Append records to a jsonl file in one write; a line torn by an interruption is cut off."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.cut_torn_line(path)
    with path.open("ab") as file:
        lines = [json.dumps(asdict(record), allow_nan=False) + "\n" for record in records]
        file.write("".join(lines).encode())


def read_records(path: str | Path) -> list[Record]:
    """Every whole line of a record file, none where there is no file; a torn last line is left."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, place: str) -> Record:
    try:
        return Record(**json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"{place} is not a record ({error}); delete the line or the file"
        ) from None


def sequence_seed(seed: int, prompt_id: str) -> int:
    """A prompt's own seed: the same for every method, whatever the batch and the order."""
    return zlib.crc32(f"{seed}/{prompt_id}".encode())


def compare(
    target: Target,
    methods: Methods,
    questions: Sequence[Question],
    *,
    prompts: str,
    path: str | Path,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    batch: int = 1,
    repeats: int = 1,
    seed: int = 0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[Record]:
    """Decode every question by every method, interleaved, and return this call's records.

    `methods` maps the name that tables use to a drafter or to a function that makes one;
    "Autoregressive" is always measured, and "transformers.generate" (any value) is the second
    baseline. What `path` holds is not measured again; records of another setting are refused.
    """
    name, dtype = target_name(target), dtype_name(target)
    setting = _Setting(prompts, temperature, seed, batch, max_new_tokens, top_p, top_k, name, dtype)
    methods = {AUTOREGRESSIVE: Autoregressive()} | dict(methods)
    turns = _turns(list(methods), questions, batch, repeats)
    wanted = [record for turn in turns for record in turn.records(setting)]
    held = held_records(Path(path), wanted)
    left = [turn for turn in turns if any(r.key not in held for r in turn.records(setting))]
    decoders = _warm_decoders(target, methods, left, setting)
    title = f"{setting.prompts}, T = {setting.temperature:g}"
    for turn in with_progress(left, held, title):
        taken = _take(turn, decoders[turn.method], setting)
        missing = [record for record in taken if record.key not in held]
        append_record(path, *missing)
        held |= {record.key: record for record in missing}
    return [held[record.key] for record in wanted]


def _turns(
    methods: list[str], questions: Sequence[Question], batch: int, repeats: int
) -> list[_Turn]:
    if batch < 1 or repeats < 1:
        raise ValueError(f"batch is {batch} and repeats {repeats}; both must be at least 1")
    if len({prompt_id for prompt_id, _ in questions}) < len(questions):
        raise ValueError("two questions share an id, so their records could not be told apart")
    groups = [list(questions[i : i + batch]) for i in range(0, len(questions), batch)]
    return [
        _Turn(method, repeat, group)
        for place, group in enumerate(groups)
        for repeat in range(repeats)
        for method in rotated(methods, place + repeat)  # none is always the first at a prompt
    ]


def rotated(methods: list[str], places: int) -> list[str]:
    """The methods, begun `places` later: another is the first at each prompt."""
    places %= len(methods)
    return methods[places:] + methods[:places]


def held_records(path: Path, wanted: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    """The records in the file that this call asks for, by key."""
    mine = {record.key: record for record in wanted}
    held = {record.key: record for record in read_records(path) if record.key in mine}
    for key, record in held.items():
        for name in ("max_new_tokens", "top_p", "top_k", "target", "dtype"):
            old, new = getattr(record, name), getattr(mine[key], name)
            if old != new:
                raise ValueError(
                    f"{path} holds records with {name} {old}, but this run has {new};"
                    " choose another file or remove this one"
                )
    return held


def _warm_decoders(
    target: Target, methods: Methods, left: list[_Turn], setting: _Setting
) -> dict[str, Decoder]:
    """A decoder per method that has turns left, each run untimed once in this process."""
    first = {turn.method: turn for turn in reversed(left)}
    decoders = {
        method: _decoder(target, method, methods[method], setting.sampling)
        for method in methods
        if method in first
    }
    warm = _WARM.setdefault(target, set())
    for method, decoder in decoders.items():
        like = method, setting.batch, setting.sampling.is_greedy, torch.get_num_threads()
        if like in warm:
            continue
        prompt_ids, seeds = _inputs(first[method], setting)
        try:
            decoder(prompt_ids, seeds, min(WARM_UP_TOKENS, setting.max_new_tokens))
            warm.add(like)
        except DECODING_ERRORS:
            continue  # the timed turn fails the same way, and its record says so
    return decoders


def _decoder(target: Target, method: str, entry: Any, sampling: Sampling) -> Decoder:
    if method == GENERATE:
        return lambda prompts, seeds, num: generate(target, prompts, num, sampling, seeds)
    drafter = as_drafter(entry)
    options = asdict(sampling)
    return lambda prompts, seeds, num: decode(target, drafter, prompts, num, seed=seeds, **options)


def as_drafter(entry: Any) -> Drafter:
    """A drafter as given, or made by the function or class given."""
    # a class has the methods of a drafter but is not one yet
    return entry() if isinstance(entry, type) or not hasattr(entry, "propose") else entry


def _inputs(turn: _Turn, setting: _Setting) -> tuple[list[list[int]], list[int]]:
    seeds = [sequence_seed(setting.seed, prompt_id) for prompt_id, _ in turn.group]
    return [list(token_ids) for _, token_ids in turn.group], seeds


def _take(turn: _Turn, decoder: Decoder, setting: _Setting) -> list[Record]:
    """Decode one batch; an error that its prompts caused becomes the record of each of them."""
    records = turn.records(setting)
    try:
        generations = decoder(*_inputs(turn, setting), setting.max_new_tokens)
    except DECODING_ERRORS as error:
        for record in records:
            record.error = f"{type(error).__name__}: {error}"
        return records
    for record, generation in zip(records, generations, strict=True):
        fill(record, generation, share=1 / len(records))
    return records


def fill(record: Record, generation: Generation, share: float = 1.0) -> None:
    """Put what was decoded into a record; of a batch, `share` of its time."""
    record.tokens, record.new_tokens = generation.tokens, len(generation.tokens)
    record.accepted, record.drafted = generation.accepted, generation.drafted
    record.target_passes, record.forced = generation.num_passes, generation.forced
    record.seconds = generation.seconds * share
    record.prefill_seconds = generation.prefill_seconds * share
    parts = generation.seconds_by_part
    record.seconds_by_part = {part: seconds * share for part, seconds in parts.items()}
    record.load = os.getloadavg()[0]
    record.commit, record.when = provenance.commit(), provenance.now()


def with_progress(left: list[Any], held: Mapping[Any, Record], title: str) -> Iterator[Any]:
    """Yield what is left to take under a bar with the time left and each method's tau so far."""
    is_warned = False
    with tqdm(left, desc=title, unit="run", disable=not left) as bar:
        for turn in bar:
            yield turn
            bar.set_postfix_str(_running_tau(turn.method, held.values()))
            note = None if is_warned else load_average_warning()
            if note:
                warnings.warn(note, RuntimeWarning, stacklevel=3)
                is_warned = True


def _running_tau(method: str, records: Iterable[Record]) -> str:
    mine = [record for record in records if record.method == method and record.target_passes]
    if not mine:
        return ""
    emitted = sum(record.new_tokens - 1 for record in mine)
    return f"{method} tau {emitted / sum(record.target_passes for record in mine):.2f}"


def load_average_warning() -> str | None:
    """A note where more is running on this machine than our own threads account for."""
    load = os.getloadavg()[0]
    own = 1 if torch.cuda.is_available() else torch.get_num_threads()
    if load <= own + 0.5:
        return None
    return (
        f"the load average is {load:.1f} while this process has {own} threads: something else is"
        " using the machine, and times measured now are not to be trusted"
    )


class _FirstToken:
    """A stopping criterion that never stops: it notes when the first token was there."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: object) -> Tensor:
        if self.seconds is None:
            self.seconds = self.clock.elapsed()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_transformers(target: Target) -> Iterator[None]:
    """The model with its usual layers, and without the habits of its generation config."""
    own = target.model.generation_config
    target.model.set_attn_implementation("sdpa")
    # generate() fills what a call leaves open from here: a repetition penalty, say
    target.model.generation_config = GenerationConfig()
    try:
        with unpacked(target.model):
            yield
    finally:
        target.model.generation_config = own
        target.model.set_attn_implementation(ATTENTION)


def generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Generation]:
    """Plain `transformers.generate` under our clock and token count; a batch is padded on the left.

    Sampled runs take their draws from torch's generator, seeded with the first of `seeds`, so they
    follow the same distribution as our own but do not repeat its tokens.
    """
    room = target.max_context - max(map(len, prompts))
    if room < 1:
        raise ValueError(f"no room behind a prompt in the {target.max_context} tokens of context")
    inputs = _left_padded(prompts, target.device)
    config = _generation_config(target, min(max_new_tokens, room), sampling or Sampling())
    devices = [target.device] if target.device.type == "cuda" else []
    with _plain_transformers(target), torch.random.fork_rng(devices):
        torch.manual_seed(seeds[0])
        clock = Clock(target.device)
        first = _FirstToken(clock)
        output = target.model.generate(
            **inputs, generation_config=config, stopping_criteria=[first]
        )
        seconds = clock.elapsed()
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    rows = [_up_to_stop(row, target.stop_ids.tolist()) for row in new]
    return [_one_a_pass(row, seconds, first.seconds) for row in rows]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    token_ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    named = {"input_ids": token_ids, "attention_mask": mask}
    return {name: torch.tensor(rows, device=device) for name, rows in named.items()}


def _generation_config(target: Target, num_tokens: int, sampling: Sampling) -> GenerationConfig:
    stop_ids = target.stop_ids.tolist() or None
    drawn = {} if sampling.is_greedy else asdict(sampling)
    return GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=not sampling.is_greedy,
        use_cache=True,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        **drawn,
    )


def _up_to_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens up to and including the first stop token; what follows it is padding."""
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _one_a_pass(tokens: list[int], seconds: float, prefill_seconds: float) -> Generation:
    rounds = [0] * (len(tokens) - 1)
    return Generation(tokens, rounds, list(rounds), seconds, prefill_seconds)


def pass_cost(
    target: Target,
    num_tokens: Sequence[int] = (1, 2, 4, 8, 16, 24, 32, 48, 64),
    prefix: int = 256,
    repeats: int = 20,
    batch: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Milliseconds of a target pass over trees of each size behind `prefix` tokens.

    `value` is the median of `repeats`, `value_low` and `value_high` the 10 and 90 % quantiles; the
    sizes take turns, so that a disturbance falls on all of them.
    """
    if prefix < 1 or prefix + max(num_tokens) > target.max_context:
        raise ValueError(
            f"prefix is {prefix} with passes of {max(num_tokens)} tokens, but the context of"
            f" {target_name(target)} holds {target.max_context}"
        )
    draws = torch.Generator().manual_seed(seed)
    shape = (batch, prefix + max(num_tokens))
    tokens = torch.randint(target.vocab_size, shape, generator=draws).to(target.device)
    cache, _ = target.prefill(tokens[:, :prefix].tolist(), prefix + max(num_tokens))
    clock, times = Clock(target.device), {num: [] for num in num_tokens}
    for repeat in range(repeats + 1):  # the first one warms up
        for num, measured in times.items():
            began = clock.elapsed()
            target.verify(cache, DraftTree.chain(tokens[:, prefix : prefix + num]))
            if repeat:
                measured.append(1e3 * (clock.elapsed() - began))
    common = {"quantity": "pass_cost", "method": "target", "batch": batch, "prefix": prefix}
    rows = [common | {"num_tokens": num} | _quantiles(ms) for num, ms in times.items()]
    return pd.DataFrame(rows)


def _quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(milliseconds, (0.1, 0.5, 0.9)).tolist()
    return {"value": median, "value_low": low, "value_high": high, "repeats": len(milliseconds)}


class _Timed:
    """A drafter that notes the time of each round's drafting: proposing and observing."""

    def __init__(self, drafter: Drafter, device: torch.device):
        self.drafter, self.max_nodes, self.clock = drafter, drafter.max_nodes, Clock(device)
        self.milliseconds: list[float] = []
        self.num_nodes: list[int] = []

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, taps: Tensor) -> None:
        self.drafter.begin(prompts, lengths, roots, taps)

    def propose(self) -> DraftTree:
        began = self.clock.elapsed()
        tree = self.drafter.propose()
        self.milliseconds.append(1e3 * (self.clock.elapsed() - began))
        self.num_nodes.append(int(tree.num_nodes.max()))
        return tree

    def observe(self, verdict: Any, taps: Tensor) -> None:
        began = self.clock.elapsed()
        self.drafter.observe(verdict, taps)
        self.milliseconds[-1] += 1e3 * (self.clock.elapsed() - began)

    def select(self, rows: Tensor) -> None:
        self.drafter.select(rows)


def drafter_cost(
    target: Target,
    method: str,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    repeats: int = 20,
    temperature: float = 0.0,
) -> pd.DataFrame:
    """Milliseconds to draft one tree, in real rounds behind a real prompt, as one row.

    What a drafter does with the verdict counts too, since some do their work there.
    """
    if target.max_context - len(prompt_ids) < 2:
        raise ValueError(f"{len(prompt_ids)} prompt tokens leave no room for a round; use fewer")
    decode(target, drafter, prompt_ids, WARM_UP_TOKENS, temperature, ignore_stop=True)
    timed = _Timed(drafter, target.device)
    while len(timed.milliseconds) < repeats:
        decode(target, timed, prompt_ids, repeats + 1, temperature, ignore_stop=True)
    row = {"quantity": "drafter_cost", "method": method, "batch": 1, "temperature": temperature}
    row |= {"num_tokens": float(np.mean(timed.num_nodes)), "prefix": len(prompt_ids)}
    return pd.DataFrame([row | _quantiles(timed.milliseconds)])


def dtype_name(target: Target) -> str:
    return str(target.dtype).removeprefix("torch.")
