"""Prompts that the target writes itself (Magpie, arXiv 2406.08464).

A chat model that is given its template up to where a user's words begin goes on with a question.
Such prompts are the second source of the training corpus: they never run out, and their words are
the target's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from specrepro import checkpoints, commands, prompts, target_model
from specrepro.decoding import Autoregressive, decode
from specrepro.target_model import Target

TEMPERATURE = 0.8  # at 1 a small target's questions make little sense
_MARK = "WHERE THE WORDS BEGIN"


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the chat template up to where the user's words begin.

    Raises ValueError for a tokenizer without a template, or whose template shows no user's words.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the target has no chat template, so it cannot tell where a user begins;"
            " train on the ShareGPT prompts alone"
        )
    messages = [{"role": "user", "content": _MARK}]
    before, mark, _ = tokenizer.apply_chat_template(messages, tokenize=False).partition(_MARK)
    if not mark:
        raise ValueError("the chat template does not show the user's words as they are")
    return tokenizer(before, add_special_tokens=False)["input_ids"]


def write(
    target: Target,
    num_prompts: int,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 256,
    max_new_tokens: int = 128,
) -> Iterator[list[prompts.Prompt]]:
    """Prompts `first` to `num_prompts` in batches, sampled at `TEMPERATURE`.

    Those that did not end, or that no user would say (`prompts.is_plain_request`), are left out.
    """
    begin = opening(target.tokenizer)
    for start in range(first, num_prompts, batch_size):
        numbers = range(start, min(start + batch_size, num_prompts))
        runs = decode(
            target, Autoregressive(), [begin] * len(numbers), max_new_tokens=max_new_tokens,
            temperature=TEMPERATURE, seed=[seed * 1_000_003 + number for number in numbers],
        )  # fmt: skip
        texts = [_request(target, run.tokens) for run in runs]
        yield [
            prompts.written_by_target(f"{seed}/{number}", text)
            for number, text in zip(numbers, texts, strict=True)
            if prompts.is_plain_request(text)
        ]


def _request(target: Target, tokens: list[int]) -> str:
    """The user's words; nothing where they did not end."""
    has_ended = tokens[-1] in target.stop_ids
    return target.tokenizer.decode(tokens[:-1]).strip() if has_ended else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.magpie <file>`: prompts by one seed; a second call goes on."""
    parser = argparse.ArgumentParser(prog="python -m specrepro.magpie", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON lines of prompts to append to")
    parser.add_argument("--target", default=target_model.EMBEDDED, help="a Hub id or a folder")
    parser.add_argument("--num-prompts", type=int, default=5000, help="tried; about 80 % are kept")
    parser.add_argument("--seed", type=int, default=0, help="another one writes other prompts")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="of this process; 0 takes all cores")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    target = target_model.load(options.target)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    size, first = options.batch_size, _next_number(options.file, options.seed)
    batches = write(target, options.num_prompts, seed=options.seed, first=first, batch_size=size)
    total = -(-max(0, options.num_prompts - first) // size)
    for batch in tqdm(batches, total=total, desc="prompts", unit="batch"):
        with options.file.open("a", encoding="utf-8") as file:
            file.write("".join(map(prompts.to_line, batch)))


def _next_number(path: Path, seed: int) -> int:
    """The number to go on with, after the last that is in the file; a torn line is cut off."""
    if not path.exists():
        return 0
    checkpoints.cut_torn_line(path)
    names = [one.id.split("/")[1:] for one in prompts.read(path)]
    return 1 + max((int(number) for own, number in names if int(own) == seed), default=-1)


if __name__ == "__main__":
    commands.run(main)
