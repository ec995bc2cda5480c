"""The training corpus: prompts answered by the target itself, kept as token ids, and the target's features over them.

The committed corpus holds the answers and the ids of the prompts they answer, no third-party text. Half of the answers
are greedy, half sampled at temperature 1. Features (three taps and the final state of every token) are derived data:
computed once per corpus and target into memory-mapped files, so that an epoch of training does not run the target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from specrepro import prompts, target_model
from specrepro.decoding import decode_autoregressively
from specrepro.target_model import Target

TEMPERATURES = (0.0, 1.0)  # batches of answers alternate between them


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt answered by the target."""

    prompt_id: str
    temperature: float
    seed: int
    tokens: list[int]


def generate(
    target: Target,
    questions: Sequence[prompts.Prompt],
    folder: Path,
    *,
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 384,
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    max_seconds: float = float("inf"),
) -> Path:
    """Answer `questions` in batches, appending to `folder`/answers-<rank>.jsonl; a second call goes on where it stopped.

    Batches alternate between greedy and temperature 1; each of `num_ranks` processes takes every num_ranks-th batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"answers-{rank}.jsonl"
    done = {answer.prompt_id for answer in _reopen(path)}
    batches = list(_batches(target, questions, max_prompt_tokens, batch_size))[rank::num_ranks]
    began, num_tokens = time.perf_counter(), 0
    with path.open("a") as file, tqdm(total=len(batches), desc=f"corpus, process {rank}", unit="batch") as bar:
        for number, (ids, encoded) in enumerate(batches):
            if not done.issuperset(ids):
                answers = _answer(target, ids, encoded, TEMPERATURES[number % 2], seed, max_new_tokens)
                file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)
                file.flush()
                num_tokens += sum(len(answer.tokens) for answer in answers)
                bar.set_postfix(tokens_per_second=round(num_tokens / (time.perf_counter() - began)))
            bar.update()
            if time.perf_counter() - began > max_seconds:
                break
    return path


def _batches(
    target: Target, questions: Sequence[prompts.Prompt], max_prompt_tokens: int, batch_size: int
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Batches of prompts of like length, in an order that makes any first part of them a fair sample."""
    encoded = [(question.id, prompts.encode(target.tokenizer, question)) for question in questions]
    encoded = [pair for pair in encoded if len(pair[1]) <= max_prompt_tokens]
    span = 8 * batch_size
    for start in range(0, len(encoded), span):
        window = sorted(encoded[start : start + span], key=lambda pair: len(pair[1]))
        for first in range(0, len(window), batch_size):
            ids, tokens = zip(*window[first : first + batch_size], strict=True)
            yield list(ids), list(tokens)


def _answer(
    target: Target, ids: list[str], encoded: list[list[int]], temperature: float, seed: int, max_new_tokens: int
) -> list[Answer]:
    seeds = [_seed_of(prompt_id, seed) for prompt_id in ids]
    generations = decode_autoregressively(
        target, encoded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seeds
    )
    return [
        Answer(prompt_id, temperature, own_seed, generation.tokens)
        for prompt_id, own_seed, generation in zip(ids, seeds, generations, strict=True)
    ]


def _seed_of(prompt_id: str, seed: int) -> int:
    """A seed of each prompt's own, the same in whatever batch or process it is answered."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:6], "big")


def _reopen(path: Path) -> list[Answer]:
    """The answers there are, once a last line torn by an interruption has been cut off."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(whole.rfind(b"\n") + 1)
    return read_answers(path)


def read_answers(path: Path) -> list[Answer]:
    """The answers of one jsonl file; a last line torn by an interruption is dropped."""
    lines = path.read_text().split("\n")
    return [Answer(**json.loads(line)) for line in lines[:-1] if line]


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.corpus`: generate answers, one process of several."""
    parser = argparse.ArgumentParser(prog="python -m specrepro.corpus", description=__doc__)
    parser.add_argument("folder", type=Path, help="where answers-<rank>.jsonl goes; a second call goes on there")
    parser.add_argument("--target", default="smollm2", help="smollm2, a Hub id or a folder")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(max(1, torch.get_num_threads() // options.num_ranks))
    generate(
        target_model.load(options.target), list(prompts.training_prompts()), options.folder,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, rank=options.rank, num_ranks=options.num_ranks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
