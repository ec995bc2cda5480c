"""What drafting without a model costs in time: milliseconds a round behind a long context.

`python -m specrepro.drafting_cost` prints a table for this machine, without a target. Two texts are
drafted for: answers of the committed corpus on end, and a tight loop, in which every draft is right
and as long as it can be. What is timed is what a round spends on a drafter, `propose` and
`observe`. Logits are random numbers in which a few tokens stand out, so that the trees made of them
fill up; four of them take turns, for no target's logits have been read before.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from specrepro import commands, corpus, ngram, recycling
from specrepro.decoding import Drafter
from specrepro.draft_tree import DraftTree
from specrepro.measure import load_average_warning
from specrepro.target_model import Scores, choose_dtype
from specrepro.tree_verify import verify_greedy

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "PLD": ngram.PromptLookup,
    "SAM": ngram.Sam,
    "SuffixDecoding": ngram.SuffixDecoding,
    "SuffixDecoding, with global tree": lambda: ngram.SuffixDecoding(carries=True),
    "PIA": ngram.Pia,
    "Recycling": recycling.TokenRecycling,
    "Lookahead": recycling.Lookahead,
}
LIMITS = {  # milliseconds
    "PLD": 0.3, "SAM": 0.3, "SuffixDecoding": 0.3, "SuffixDecoding, with global tree": 0.3,
    "Recycling": 2.0,
}  # fmt: skip
VOCAB_SIZE = 49152  # of the embedded target
LOOP = [311, 4711, 29, 1024, 77, 9000, 512, 3, 64]


def texts(num_tokens: int) -> dict[str, list[int]]:
    """A text of each kind: answers on end, and a loop of nine tokens."""
    answers = (token for one in corpus.load(corpus.COMMITTED).answers for token in one.tokens)
    loop = itertools.islice(itertools.cycle(LOOP), num_tokens)
    return {"answers": list(itertools.islice(answers, num_tokens)), "loop": list(loop)}


def milliseconds(
    drafter: Drafter,
    text: Sequence[int],
    context: int,
    logits: Iterable[Tensor],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Of each round, in which the target says `text` from the token `context` on."""
    ids, empty = torch.tensor([text]), torch.empty(1, 1, 0)
    logits = iter(logits)
    root = ids[:, context]
    first = Scores(next(logits)[:, :1], empty, empty)
    drafter.begin(ids[:, :context], torch.tensor([context]), root, first)
    place, found = context, []
    while len(found) < num_rounds and place + drafter.max_nodes < len(text):
        began = clock()
        tree = drafter.propose()
        proposed = clock()
        verdict = verify_greedy(tree, _said(tree, ids, place))
        scores = Scores(next(logits)[:, : tree.tokens.shape[1]], empty, empty)
        judged = clock()
        drafter.observe(verdict, scores)
        found.append(1e3 * (clock() - judged + proposed - began))
        place += int(verdict.num_accepted) + 1
    return found


def _said(tree: DraftTree, ids: Tensor, place: int) -> Tensor:
    """What the text says after every node of a tree whose root is its token `place`."""
    return ids[0, place + 1 + tree.depths()]


def drafting_cost(
    context: int = 4000,
    num_rounds: int = 200,
    dtype: str = "auto",
    drafters: dict[str, Callable[[], Drafter]] = DRAFTERS,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Rows of quantity "drafting_cost": median and 90 % quantile, and the limit there is."""
    chosen, rows = choose_dtype(dtype), []
    generator = torch.Generator().manual_seed(0)
    shape = (1, recycling.TokenRecycling().max_nodes, VOCAB_SIZE)
    pool = [torch.randn(shape, generator=generator) for _ in range(4)]
    for logits in pool:
        logits[..., LOOP] += 8
    pool = [logits.to(chosen) for logits in pool]
    for kind, text in texts(context + 80 * num_rounds).items():
        for method, make in drafters.items():
            logits = itertools.cycle(pool)
            found = milliseconds(make(), text, context, logits, num_rounds, clock)
            low, median, high = np.quantile(found, (0.1, 0.5, 0.9)).tolist()
            row = {"quantity": "drafting_cost", "method": method, "text": kind, "prefix": context}
            row |= {"value": median, "value_low": low, "value_high": high, "repeats": len(found)}
            row["ends"] = f"10 to 90 % of {len(found)} repeats"
            rows.append(row | {"limit": LIMITS.get(method)})
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; on a busy machine, say that it is worth nothing."""
    parser = argparse.ArgumentParser(prog="python -m specrepro.drafting_cost", description=__doc__)
    parser.add_argument("--context", type=int, default=4000, help="tokens before the first round")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--dtype", default="auto", help="of the logits")
    options = parser.parse_args(arguments)
    found = drafting_cost(options.context, options.rounds, options.dtype)
    print(found.drop(columns="quantity").round(3).to_string(index=False))
    if note := load_average_warning():
        print(note)


if __name__ == "__main__":
    commands.run(main)
