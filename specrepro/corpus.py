"""The training corpus: prompts answered by the target itself, and its features over them.

The committed corpus holds the answers and the ids of the prompts they answer, no third-party text.
Half of the answers are greedy, half sampled at temperature 1; a second pass over the prompts swaps
the halves, further ones sample anew. Features (three taps and the final state of every token) are
derived data, kept in bfloat16: computed once per corpus and target, so that an epoch of training
does not run the target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from specrepro import checkpoints, commands, draft_training, prompts, target_model
from specrepro.decoding import Autoregressive, decode, most_probable
from specrepro.target_model import Scores, Target, pad
from specrepro.tree_verify import Verdict

COMMITTED = Path(__file__).parent.parent / "corpus" / "smollm2"
ANSWERS = "answers.parquet"
OWNER = "target.json"  # beside the parts: whose answers they are
# pairs of batches alternate between them, so each of two processes has both
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt answered by the target."""

    prompt_id: str
    prompt_tokens: int  # length of the prompt under the target's template
    temperature: float
    seed: int
    tokens: list[int]
    prompt_hash: str = ""  # of the prompt's token ids; empty where it was not kept

    @property
    def num_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Features:
    """The frozen target's view of n consecutive tokens."""

    taps: Tensor  # (n, 3H)
    hidden: Tensor  # (n, H) final state
    choices: Tensor  # (n,) most probable next token


@dataclass(slots=True)
class Batch:
    """Whole sequences with the frozen target's view of them, padded on the right."""

    tokens: Tensor  # (b, n)
    is_answer: Tensor  # (b, n) bool: the target's own words, end of turn included
    choices: Tensor  # (b, n) the target's most probable next token at each position
    taps: Tensor  # (b, n, 3H)
    hidden: Tensor  # (b, n, H) final state

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On another device, features in another floating type."""
        tensors = (getattr(self, field.name).to(device) for field in fields(self))
        return Batch(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))


def generate(
    target: Target,
    questions: Sequence[prompts.Prompt],
    folder: Path,
    *,
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    num_passes: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    keep_features: bool = True,
) -> Path:
    """Answer `questions` in batches into `folder`/part-<rank>; a second call goes on there.

    Two batches are greedy, the next two sampled at temperature 1, and so on; each of `num_ranks`
    processes takes every num_ranks-th batch. The second pass over the questions samples where the
    first was greedy and the other way round; later ones sample again. An answer depends on its
    prompt, the pass, `seed` and the batches, never on which process gives it. The features that the
    target computes while answering are kept beside the answers, so training need not run it again.
    Without `keep_features` training has the target compute them (`LiveFeatures`), and a sampled
    answer also depends on the others of its batch, as large batches on a GPU need it.
    """
    _claim(folder, target)
    part = Part(folder / f"part-{rank}", target.hidden_size)
    if part.reopen() and part.has_features != keep_features:
        begun = "with" if part.has_features else "without"
        raise ValueError(f"{folder} was begun {begun} features; go on alike or name another folder")
    done = {_key(a.prompt_id, a.temperature, a.seed) for a in _all_answers(folder)}
    batches = list(_batches(target, questions, max_prompt_tokens, batch_size))
    tasks = [(n, i) for n in range(num_passes) for i in range(len(batches))][rank::num_ranks]
    began, num_tokens = time.perf_counter(), 0
    with tqdm(total=len(tasks), desc=f"corpus, process {rank}", unit="batch") as bar:
        for num_pass, place in tasks:
            temperature = _temperature(num_pass, place)
            seeds = {name: _seed_of(name, seed + num_pass) for name in batches[place]}
            keys = {name: _key(name, temperature, own) for name, own in seeds.items()}
            waiting = {
                name: tokens for name, tokens in batches[place].items() if keys[name] not in done
            }
            if waiting:
                options = temperature, seeds, max_new_tokens, keep_features
                num_tokens += _answer(target, part, waiting, *options)
                bar.set_postfix(tokens_per_second=round(num_tokens / (time.perf_counter() - began)))
            bar.update()
    return part.folder


def _claim(folder: Path, target: Target) -> None:
    """Note whose answers and features a folder holds; raise ValueError where it is another's."""
    _refuse_another(folder, target)
    named = {"target": target_model.target_name(target), "weights": target.fingerprint}
    checkpoints.write_text(folder / OWNER, json.dumps(named) + "\n")


def _refuse_another(folder: Path, target: Target) -> None:
    path = folder / OWNER
    theirs = json.loads(path.read_text()) if path.is_file() else {"weights": target.fingerprint}
    if theirs["weights"] != target.fingerprint:
        raise ValueError(
            f"{folder} holds answers of {theirs['target']}, whose weights are not those of"
            f" {target.name}; name another folder, or remove it"
        )


def _key(prompt_id: str, temperature: float, seed: int) -> tuple[str, int | None]:
    """A prompt has one greedy answer, and one sampled answer for each seed."""
    return prompt_id, seed if temperature else None


def _temperature(num_pass: int, place: int) -> float:
    """What batch `place` of a pass is answered at."""
    return TEMPERATURES[(place // 2 + num_pass) % 2] if num_pass < 2 else TEMPERATURES[1]


def _batches(
    target: Target, questions: Sequence[prompts.Prompt], max_prompt_tokens: int, batch_size: int
) -> Iterator[dict[str, list[int]]]:
    """Batches of prompts of like length by id; any first part of them is a fair sample."""
    encoded = [(question.id, prompts.encode(target.tokenizer, question)) for question in questions]
    encoded = [pair for pair in encoded if len(pair[1]) <= max_prompt_tokens]
    span = 8 * batch_size
    for start in range(0, len(encoded), span):
        window = sorted(encoded[start : start + span], key=lambda pair: len(pair[1]))
        for first in range(0, len(window), batch_size):
            yield dict(window[first : first + batch_size])


def _answer(
    target: Target,
    part: Part,
    batch: dict[str, list[int]],
    temperature: float,
    seeds: dict[str, int],
    max_new_tokens: int,
    keep_features: bool,
) -> int:
    """Answer one batch of prompts by id, keep what comes of it, and return how many tokens did."""
    recorder = FeatureRecorder() if keep_features else Autoregressive()
    seed = [seeds[name] for name in batch] if keep_features else None
    if seed is None:  # the draws are those of the whole batch
        torch.manual_seed(seeds[next(iter(batch))])
    generations = decode(
        target, recorder, list(batch.values()), max_new_tokens, temperature, seed=seed
    )
    answers = [
        Answer(name, len(ids), temperature, seeds[name], generation.tokens, _hash_of_ids(ids))
        for (name, ids), generation in zip(batch.items(), generations, strict=True)
    ]
    lengths = [answer.num_tokens for answer in answers]
    part.append(answers, recorder.features(lengths) if keep_features else ())
    return sum(len(answer.tokens) for answer in answers)


class FeatureRecorder(Autoregressive):
    """Decodes one token a pass and remembers what the target computed on the way."""

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        super().begin(prompts, lengths, roots, scores)
        self.rows = torch.arange(len(roots), device=roots.device)
        self.lengths, self.prefill = lengths, scores
        self.passes: list[tuple[Tensor, Features]] = []

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        super().observe(verdict, scores)
        one = Features(scores.taps[:, 0], scores.hidden[:, 0], most_probable(scores.logits[:, 0]))
        self.passes.append((self.rows, one))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.rows = self.rows[rows]

    def features(self, num_tokens: list[int]) -> list[Features]:
        """Features of each sequence's `num_tokens` tokens; zero at the last, never read one."""
        found = []
        last_choice = most_probable(self.prefill.logits[:, 0])
        for row, total in enumerate(num_tokens):
            n = int(self.lengths[row])
            whole = Features(
                self.prefill.taps.new_zeros(total, self.prefill.taps.shape[-1]),
                self.prefill.hidden.new_zeros(total, self.prefill.hidden.shape[-1]),
                torch.zeros(total, dtype=torch.long),
            )
            whole.taps[:n] = self.prefill.taps[row, :n]
            whole.hidden[:n] = self.prefill.hidden[row, :n]
            whole.choices[n - 1] = last_choice[row]
            found.append(whole)
        for step, (rows, one) in enumerate(self.passes):
            for place, row in enumerate(rows.tolist()):
                at = int(self.lengths[row]) + step
                whole = found[row]
                whole.taps[at], whole.hidden[at] = one.taps[place], one.hidden[place]
                whole.choices[at] = one.choices[place]
        return found


def _seed_of(prompt_id: str, seed: int) -> int:
    """A seed of each prompt's own, the same in whatever batch or process it is answered."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:6], "big")


def _hash_of_ids(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).hexdigest()[:16]


class Part:
    """Answers and features as one process appends them: answers.jsonl and raw bits, in one order.

    Features are written first, so after an interruption they are cut back to the answers there are.
    A part has them for all of its answers or for none.
    """

    def __init__(self, folder: Path, hidden_size: int):
        self.folder, self.hidden_size = folder, hidden_size
        folder.mkdir(parents=True, exist_ok=True)
        self.answers_path = folder / "answers.jsonl"
        self.columns = {
            "taps": (3 * hidden_size, np.uint16),
            "hidden": (hidden_size, np.uint16),
            "choices": (1, np.int32),
        }

    def reopen(self) -> list[Answer]:
        """The whole answers there are; what an interruption left unfinished is cut off."""
        checkpoints.cut_torn_line(self.answers_path)
        answers = self.answers()
        num_tokens = sum(answer.num_tokens for answer in answers)
        for name, (width, dtype) in self.columns.items() if self.has_features else ():
            path, size = self.folder / name, num_tokens * width * np.dtype(dtype).itemsize
            if path.stat().st_size < size:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes and its answers want {size}: it was"
                    f" not copied or written whole; copy it again, or remove {self.folder}"
                )
            _cut(path, size)
        return answers

    @property
    def has_features(self) -> bool:
        path = self.folder / "taps"
        return path.is_file() and path.stat().st_size > 0

    def answers(self) -> list[Answer]:
        """In the order of the features; a last line still being written is left out."""
        if not self.answers_path.exists():
            return []
        lines = self.answers_path.read_text().split("\n")[:-1]
        return [Answer(**json.loads(line)) for line in lines]

    def append(self, answers: Sequence[Answer], features: Sequence[Features] = ()) -> None:
        """Add whole sequences."""
        for name in self.columns if features else ():
            with (self.folder / name).open("ab") as file:
                for one in features:
                    file.write(_bits(getattr(one, name)).tobytes())
        with self.answers_path.open("a") as file:
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)

    def read(self, name: str, start: int, num_tokens: int) -> np.ndarray:
        """`num_tokens` rows of one column of features from row `start` on, (tokens, width).

        In one read: faults of a memory map come page by page, which a slow disk makes ten times
        slower.
        """
        width, dtype = self.columns[name]
        size = width * np.dtype(dtype).itemsize
        flat = np.fromfile(self.folder / name, dtype, num_tokens * width, offset=start * size)
        return flat.reshape(num_tokens, width)


def _all_answers(folder: Path) -> list[Answer]:
    return [answer for path in sorted(folder.glob("part-*")) for answer in Part(path, 0).answers()]


def _cut(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.truncate(size)


def _bits(x: Tensor) -> np.ndarray:
    """bfloat16 as its raw bits; integers as int32."""
    if not x.is_floating_point():
        return x.int().cpu().numpy()
    return x.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def _from_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def pack(
    folder: Path, destination: Path, about: dict[str, object], tokenizer: object | None = None
) -> Path:
    """Gather the answers of `folder`/part-* into `destination`/answers.parquet, with a card.

    The card has their hash and counts, and what `about` says. Given the `tokenizer` that they were
    answered under, prompt hashes that an older version did not keep are filled in.
    """
    answers = _all_answers(folder)
    if not answers:
        raise ValueError(_no_answers(folder))
    if tokenizer is not None:
        ids = prompt_ids(tokenizer, answers)
        answers = [replace(a, prompt_hash=_hash_of_ids(ids[a.prompt_id])) for a in answers]
    frame = pd.DataFrame([asdict(answer) for answer in answers]).sort_values(
        ["prompt_id", "seed"], ignore_index=True
    )
    frame["tokens"] = frame["tokens"].map(lambda tokens: np.asarray(tokens, dtype=np.uint32))
    destination.mkdir(parents=True, exist_ok=True)
    # the smallest of what was tried: a fifth below zstd as pandas sets it
    options = {"compression": "brotli", "compression_level": 11, "use_dictionary": False}
    frame.to_parquet(destination / ANSWERS, index=False, **options)
    corpus = load(destination)
    card = {
        "hash": corpus.hash,
        "num_answers": len(answers),
        "num_tokens": corpus.num_tokens,
    } | about
    checkpoints.write_text(destination / "card.json", json.dumps(card, indent=2) + "\n")
    return destination


def _no_answers(folder: Path) -> str:
    return f"no answers in {folder}; generate some first: python -m specrepro.corpus {folder}"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Answers of the target, ordered by prompt id and seed."""

    answers: list[Answer]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def hash(self) -> str:
        """sha256 over prompt ids, temperatures and tokens: what training depends on."""
        digest = hashlib.sha256()
        for answer in self.answers:
            digest.update(f"{answer.prompt_id} {answer.temperature} ".encode())
            digest.update(np.asarray(answer.tokens, dtype="<u4").tobytes())
        return digest.hexdigest()

    def first(self, num_answers: int | None) -> Corpus:
        """A fair sample of the answers, as `_order` has them."""
        ranked = sorted(self.answers, key=_order)
        return Corpus(ranked[:num_answers])

    def without(self, other: Corpus) -> Corpus:
        """The answers that `other` does not have, by prompt, temperature and seed."""
        theirs = {_key(a.prompt_id, a.temperature, a.seed) for a in other.answers}
        return Corpus(
            [a for a in self.answers if _key(a.prompt_id, a.temperature, a.seed) not in theirs]
        )


def _order(answer: Answer) -> tuple[bytes, int]:
    """Prompts in an order drawn by hash, the answers of one side by side.

    By another hash than prompts are answered in: where only the first of those were sampled too,
    each share of the corpus has its share of sampled answers.
    """
    return hashlib.sha256(f"share {answer.prompt_id}".encode()).digest(), answer.seed


def has_answers(folder: Path) -> bool:
    return (folder / ANSWERS).is_file()


def load(folder: Path) -> Corpus:
    """The packed corpus of a folder; a ValueError names what is missing."""
    path = folder / ANSWERS
    if not path.is_file():
        raise ValueError(
            f"no corpus at {folder}: {ANSWERS} is missing; make one with --from-scratch"
        )
    rows = pd.read_parquet(path).to_dict("records")
    return Corpus([Answer(**row | {"tokens": row["tokens"].tolist()}) for row in rows])


def most_frequent_tokens(answers: Sequence[Answer], vocab_size: int, num_tokens: int) -> Tensor:
    """(num_tokens,) ascending ids of the commonest tokens; unused low ids fill up."""
    tokens = torch.tensor([token for answer in answers for token in answer.tokens])
    counts = torch.bincount(tokens.long(), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:num_tokens].sort().values


class Sequences(ABC):
    """Answers in a fair order, and their features by `batch`, wherever these come from."""

    answers: list[Answer]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_answer_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def hash(self) -> str:
        """As of a corpus, in whatever order the answers stand."""
        ordered = sorted(self.answers, key=lambda answer: (answer.prompt_id, answer.seed))
        return Corpus(ordered).hash

    @abstractmethod
    def batch(self, ids: Sequence[int], prompt_ids: dict[str, list[int]]) -> Batch:
        """Sequences `ids`, given the token ids of their prompts."""


class LiveFeatures(Sequences):
    """Sequences whose features the target computes each time they are asked for.

    On a GPU that takes less time than a disk does, and no room on one.
    """

    def __init__(self, target: Target, answers: Sequence[Answer]):
        self.target, self.answers = target, sorted(answers, key=_order)

    @torch.inference_mode(False)
    @torch.no_grad()
    def batch(self, ids: Sequence[int], prompt_ids: dict[str, list[int]]) -> Batch:
        """Sequences `ids`, given the token ids of their prompts."""
        answers = [self.answers[i] for i in ids]
        tokens, lengths = pad(
            [prompt_ids[a.prompt_id] + a.tokens for a in answers], self.target.device
        )
        starts = torch.tensor([a.prompt_tokens for a in answers], device=tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        is_token = places < lengths[:, None]
        taps, hidden = self.target.features(tokens)
        choices = most_probable(self.target.logits(hidden)).where(is_token, 0)
        features = (x.where(is_token[..., None], 0) for x in (taps, hidden))
        return Batch(tokens, is_token & (places >= starts[:, None]), choices, *features)


def features_in(folder: Path, target: Target, max_sequences: int | None = None) -> Sequences:
    """The sequences of a folder: those of its parts, or of a packed corpus.

    Features are read where they were kept, and computed when they are asked for where they were
    not. A ValueError where there is no answer.
    """
    if has_answers(folder):
        return LiveFeatures(target, load(folder).first(max_sequences).answers)
    _refuse_another(folder, target)
    if has_features(folder):
        return FeatureCache(folder, target.hidden_size, max_sequences)
    if not (answers := _all_answers(folder)):
        raise ValueError(_no_answers(folder))
    return LiveFeatures(target, Corpus(answers).first(max_sequences).answers)


def has_features(folder: Path) -> bool:
    """Whether the target's features were kept beside the answers."""
    return any(Part(path, 0).has_features for path in folder.glob("part-*"))


class FeatureCache(Sequences):
    """Sequences with the target's features, from the parts that generation or `recompute` wrote."""

    def __init__(self, folder: Path, hidden_size: int, max_sequences: int | None = None):
        self._places: list[tuple[Part, int, Answer]] = []
        for path in sorted(folder.glob("part-*")):
            part = Part(path, hidden_size)
            answers = part.answers()
            starts = np.cumsum([0] + [answer.num_tokens for answer in answers])
            self._places += [
                (part, int(start), answer) for start, answer in zip(starts, answers, strict=False)
            ]
        if not self._places:
            raise ValueError(_no_answers(folder))
        self._places.sort(key=lambda place: _order(place[2]))
        self._places = self._places[:max_sequences]
        self.answers = [answer for _, _, answer in self._places]

    def batch(self, ids: Sequence[int], prompt_ids: dict[str, list[int]]) -> Batch:
        """Sequences `ids`, given the token ids of their prompts."""
        parts = [self._one(*self._places[i], prompt_ids) for i in ids]
        columns = zip(*parts, strict=True)
        return Batch(*(nn.utils.rnn.pad_sequence(column, batch_first=True) for column in columns))

    def _one(
        self, part: Part, start: int, answer: Answer, prompt_ids: dict[str, list[int]]
    ) -> tuple[Tensor, ...]:
        taps, hidden, choices = (
            part.read(name, start, answer.num_tokens) for name in ("taps", "hidden", "choices")
        )
        prompt = prompt_ids[answer.prompt_id]
        tokens = torch.tensor(prompt + answer.tokens)
        is_answer = torch.arange(len(tokens)) >= len(prompt)
        choices = torch.from_numpy(choices[:, 0].astype(np.int64))
        return tokens, is_answer, choices, _from_bits(taps), _from_bits(hidden)


def prompt_ids(tokenizer: object, answers: Sequence[Answer]) -> dict[str, list[int]]:
    """Token ids of each answer's prompt, rebuilt from the prompt's id.

    Raises ValueError for a prompt that is not there, and for one whose length or hash shows that it
    was answered under another chat template.
    """
    questions = {question.id: question for question in prompts.training_prompts()}
    if unknown := [answer.prompt_id for answer in answers if answer.prompt_id not in questions]:
        raise ValueError(
            f"the corpus answers prompt {unknown[0]!r}, which is not among the training prompts"
        )
    ids = {
        answer.prompt_id: prompts.encode(tokenizer, questions[answer.prompt_id])
        for answer in answers
    }
    for answer in answers:
        own = ids[answer.prompt_id]
        if len(own) != answer.prompt_tokens or answer.prompt_hash not in ("", _hash_of_ids(own)):
            raise ValueError(
                f"prompt {answer.prompt_id!r} had {answer.prompt_tokens} tokens when it was"
                f" answered and has {len(own)} now, not the same: another chat template or"
                " tokenizer; restore it or answer the prompts again under this one"
            )
    return ids


@torch.inference_mode()
def recompute(
    target: Target, answers: Sequence[Answer], folder: Path, batch_tokens: int = 8192, rank: int = 0
) -> Path:
    """Run the target over answers whose features no part has, into `folder`/part-<rank>.

    Goes on where it stopped. Of several processes each takes answers of its own.
    """
    _claim(folder, target)
    part = Part(folder / f"part-{rank}", target.hidden_size)
    if part.reopen() and not part.has_features:
        raise ValueError(f"{folder} was begun without features; go on alike or name another folder")
    done = {_key(a.prompt_id, a.temperature, a.seed) for a in _all_answers(folder)}
    _check_room(folder, sum(answer.num_tokens for answer in answers) * (8 * target.hidden_size + 4))
    ids = prompt_ids(target.tokenizer, answers)
    waiting = [a for a in answers if _key(a.prompt_id, a.temperature, a.seed) not in done]
    waiting.sort(key=lambda answer: answer.num_tokens)
    groups = _groups([answer.num_tokens for answer in waiting], batch_tokens)
    for group in tqdm(groups, desc="target features", unit="batch"):
        chosen = [waiting[place] for place in group]
        tokens, lengths = pad(
            [ids[answer.prompt_id] + answer.tokens for answer in chosen], target.device
        )
        taps, hidden = target.features(tokens)
        part.append(
            chosen,
            [_one_of(target, taps[i, :n], hidden[i, :n]) for i, n in enumerate(lengths.tolist())],
        )
    return folder


def _one_of(target: Target, taps: Tensor, hidden: Tensor) -> Features:
    return Features(taps, hidden, most_probable(target.logits(hidden)))


def shuffled_batches(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of like length, at most `batch_tokens` padded tokens; seed and epoch order them."""
    rng = np.random.default_rng((seed, epoch))
    jittered = np.asarray(lengths) * rng.uniform(0.9, 1.1, len(lengths))
    order = np.argsort(jittered)
    groups = _groups([lengths[i] for i in order], batch_tokens)
    batches = [[int(order[place]) for place in group] for group in groups]
    rng.shuffle(batches)
    return batches


def num_batches(answers: Sequence[Answer], batch_tokens: int, epochs: float) -> int:
    """How many batches so many epochs take."""
    lengths = [answer.num_tokens for answer in answers]
    return round(epochs * len(shuffled_batches(lengths, batch_tokens, 0, 0)))


def batch_order(
    answers: Sequence[Answer], batch_tokens: int, seed: int, num_batches: int
) -> list[list[int]]:
    """The first `num_batches` batches of as many epochs as they take."""
    lengths = [answer.num_tokens for answer in answers]
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        epoch = len(batches)  # any number that differs from epoch to epoch
        batches += shuffled_batches(lengths, batch_tokens, seed, epoch)
    return batches[:num_batches]


def _groups(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Consecutive places whose padded size stays within `batch_tokens`; at least one a group."""
    groups: list[list[int]] = [[]]
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if groups[-1] and longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = length
        groups[-1].append(place)
    return groups if lengths else []


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()):
        raise OSError(
            f"the features of this corpus take {num_bytes / 1e9:.1f} GB"
            f" but {folder} has {free / 1e9:.1f} GB free;"
            " make room, take fewer answers, or begin in a folder of a larger disk"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specrepro.corpus", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where part-<rank> goes; a second call goes on there"
    )
    parser.add_argument("--target", default="smollm2", help="smollm2, a Hub id or a folder")
    parser.add_argument("--rank", type=int, help="of this process; torchrun's, or 0, if left out")
    parser.add_argument("--num-ranks", type=int, help="of processes; torchrun's, or 1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-prompt-tokens", type=int, default=256, help="skip longer prompts")
    parser.add_argument("--passes", type=int, default=1, help="answers of each prompt")
    parser.add_argument("--sources", nargs="+", choices=prompts.SOURCES, default=prompts.SOURCES,
                        help="of prompts")  # fmt: skip
    parser.add_argument("--answers-only", action="store_true",
                        help="keep no features: on a GPU, which computes them while it trains, and"
                        " answers large batches faster")  # fmt: skip
    parser.add_argument("--committed", dest="packed", action="store_const", const=COMMITTED,
                        help="compute the features of the committed answers alone")  # fmt: skip
    parser.add_argument("--packed", type=Path, metavar="FOLDER",
                        help="likewise of those that a folder has in one file")  # fmt: skip
    parser.add_argument("--without", type=Path, help="less those of this packed corpus: what a"
                        " head was trained on")  # fmt: skip
    parser.add_argument("--share", type=float, default=1.0, help="of these answers")
    parser.add_argument("--pack", type=Path, metavar="DESTINATION",
                        help="gather the folder's answers in one file with a card, as"
                        " corpus/smollm2 is, and answer nothing")  # fmt: skip
    return parser


def _pack_as_told(options: argparse.Namespace) -> None:
    target = target_model.load(options.target)
    told = ("max_new_tokens", "max_prompt_tokens", "sources")
    about = {"target": target_model.target_name(target)} | {n: getattr(options, n) for n in told}
    print(pack(options.folder, options.pack, about, target.tokenizer))


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.corpus`: generate answers, one process of several.

    Or, with `--committed` or `--packed`, features of answers that there are, which takes minutes
    where answering takes hours; or, with `--pack`, one file of the answers of a folder.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share is {options.share}; give a part of the answers, above 0")
    if options.pack is not None:
        _pack_as_told(options)
        return
    joined = draft_training.join_processes()
    given = options.rank, options.num_ranks
    rank, num_ranks = (
        own if own is not None else of for own, of in zip(given, joined, strict=True)
    )
    if not 0 <= rank < num_ranks:
        parser.error(f"--rank is {rank} of {num_ranks} processes; they count from 0")
    if options.packed is not None:
        answers = load(options.packed)
        if options.without is not None:
            answers = answers.without(load(options.without))
        chosen = answers.first(round(options.share * len(answers.answers))).answers
        options.folder.mkdir(parents=True, exist_ok=True)
        own = chosen[rank::num_ranks]
        recompute(target_model.load(options.target), own, options.folder, rank=rank)
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    generate(
        target_model.load(options.target),
        list(prompts.training_prompts(options.sources)),
        options.folder,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        num_passes=options.passes,
        batch_size=options.batch_size,
        rank=rank,
        num_ranks=num_ranks,
        keep_features=not options.answers_only,
    )


if __name__ == "__main__":
    commands.run(main)
