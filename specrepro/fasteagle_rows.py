"""FastEagle's rows: what records, drafting times and a cascade's guesses add up to.

Intervals are 95 % by bootstrap over prompts, but for ratios of drafting times, which say what they
are where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro import cost_model, eagle3, rows
from specrepro.cascade import Cascade, frozen_head
from specrepro.cost_table import CostTable
from specrepro.draft_layer import LayerConfig
from specrepro.eagle3 import shift_left
from specrepro.fasteagle import supervised_rows
from specrepro.measure import Record
from specrepro.target_model import Target

Text = tuple[list[int], list[int]]  # a prompt and its answer
# tokens (1, n) and taps (1, n, 3H) -> by depth, the best words (n, k) of every row
Guesses = Callable[[Tensor, Tensor], list[Tensor]]


# --- against EAGLE-3, on the same prompts


def against(records: Sequence[Record], method: str, versus: str) -> pd.DataFrame:
    """Rows "tau_ratio" and "latency_saved" by temperature, over all prompt sets together.

    What is saved is the share of `versus`' seconds for a token, prefill included.
    """
    found = []
    for temperature in sorted({record.temperature for record in records}):
        mine = [r for r in records if r.temperature == temperature and r.error is None]
        sums = _sums_by_prompt(mine, (method, versus), _counts)
        if not len(sums):
            continue
        common = {"method": method, "versus": versus, "temperature": temperature, "batch": 1}
        common |= {"num_prompts": len(sums), "prompts": "all"}
        draws = rows.bootstrap(sums)
        for quantity, ratio in (("tau_ratio", _tau_ratio), ("latency_saved", _latency_saved)):
            low, high = rows.interval(ratio(draws))
            value = float(ratio(sums.sum(0)[None])[0])
            row = {"quantity": quantity, "value": value, "value_low": low, "value_high": high}
            found.append(common | row)
    return pd.DataFrame(found)


def _counts(record: Record) -> np.ndarray:
    """(4,) emitted, passes, tokens and seconds."""
    counts = sum(record.emitted), record.target_passes, record.new_tokens, record.seconds
    return np.array(counts, dtype=float)


def _sums_by_prompt(
    records: Sequence[Record], methods: tuple[str, str], count: Callable[[Record], np.ndarray]
) -> np.ndarray:
    """(prompts, 8): four sums of one method, then of the other.

    Prompts that one of the two did not finish are left out.
    """
    sums: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for record in (r for r in records if r.method in methods and r.target_passes):
        own = sums.setdefault((record.prompts, record.unit), {})
        own[record.method] = own.get(record.method, 0) + count(record)
    whole = [own for own in sums.values() if set(own) == set(methods)]
    return np.array([np.concatenate([own[name] for name in methods]) for own in whole])


def _tau_ratio(sums: np.ndarray) -> np.ndarray:
    return (sums[:, 0] / sums[:, 1]) / (sums[:, 4] / sums[:, 5])


def _latency_saved(sums: np.ndarray) -> np.ndarray:
    return 1 - (sums[:, 3] / sums[:, 2]) / (sums[:, 7] / sums[:, 6])


# --- what drafting costs


def drafting_ratios(found: pd.DataFrame, method: str, versus: str) -> pd.DataFrame:
    """Rows "drafting_ratio", by number of levels from two on, and one "level_cost_ratio".

    Of rows "drafter_cost" with `num_levels`. A ratio's ends pair the 10 % quantile of one method
    with the 90 % quantile of the other; those of the slope's are what it is without one level.
    """
    ours, theirs = (
        found[found["method"] == name].set_index("num_levels").sort_index()
        for name in (method, versus)
    )
    common = {"method": method, "versus": versus, "batch": 1}
    levels = [n for n in ours.index if n in theirs.index]
    made = [
        common
        | {
            "quantity": "drafting_ratio",
            "num_levels": n,
            "value": ours.loc[n, "value"] / theirs.loc[n, "value"],
            "value_low": ours.loc[n, "value_low"] / theirs.loc[n, "value_high"],
            "value_high": ours.loc[n, "value_high"] / theirs.loc[n, "value_low"],
            "ends": "10 % of one's repeats over 90 % of the other's, and the other way round",
        }
        for n in levels
        if n > 1
    ]
    if len(levels) > 2:
        curves = [one.loc[levels, "value"].to_numpy(dtype=float) for one in (ours, theirs)]
        made.append(common | _slope_ratio(np.array(levels, dtype=float), *curves))
    return pd.DataFrame(made)


def rounds_of_both(
    records: Sequence[Record], method: str, versus: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows "compiled_round" by part of a round, and one "drafting_ratio" of the two methods.

    Its ends pair the end of one method's interval with the other end of the other's.
    """
    parts = rows.round_parts([r for r in records if r.method in (method, versus)])
    draft = parts[parts["part"] == "draft"].set_index("method")
    ours, theirs = draft.loc[method], draft.loc[versus]
    ratio = {
        "quantity": "drafting_ratio", "method": method, "versus": versus, "batch": 1,
        "value": ours["value"] / theirs["value"],
        "value_low": ours["value_low"] / theirs["value_high"],
        "value_high": ours["value_high"] / theirs["value_low"],
        "ends": "of one interval over those of the other",
    }  # fmt: skip
    return parts.assign(quantity="compiled_round"), pd.DataFrame([ratio])


def _slope_ratio(levels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict[str, object]:
    """Milliseconds of one more level over those of the other method."""

    def ratio(kept: np.ndarray) -> float:
        slopes = [np.polyfit(levels[kept], curve[kept], 1)[0] for curve in (ours, theirs)]
        return float(slopes[0] / slopes[1])

    everything = np.arange(len(levels))
    without_one = [ratio(np.delete(everything, place)) for place in everything]
    row = {"quantity": "level_cost_ratio", "value": ratio(everything)}
    ends = {"value_low": min(without_one), "value_high": max(without_one)}
    return row | ends | {"ends": "leaving out one level each"}


def cache_bytes_per_token(config: LayerConfig, dtype: torch.dtype) -> int:
    """Keys and values that a drafter keeps of a committed token: of every layer it has."""
    num_layers = getattr(config, "num_hidden_layers", 1)
    return 2 * num_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


# --- on a GPU that is not here

CONTEXT = 512  # tokens before the first round; modelled costs hardly depend on it


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafting a tree takes: EAGLE-3's levels by their width, or a cascade's one pass."""

    widths: tuple[int, ...] = ()
    cascade: int = 0  # layers


def on_cards(
    records: Sequence[Record], drafting: Mapping[str, Drafting], method: str, versus: str
) -> pd.DataFrame:
    """Recorded greedy rounds at the costs of four cards and an 8B target: modelled, never timed.

    Rows by card of "modelled_speedup" of both methods; "modelled_gain", how much faster `method`
    is than `versus`; and "break_even_ms", what every level of `versus` would have to cost above
    its floor, in launches and in choosing words, for the two to be equally fast.
    """
    mine = [record for record in records if not record.temperature and record.error is None]
    common = {"versus": versus, "temperature": 0.0, "batch": 1, "prompts": "all"}
    tables = []
    for name, card in cost_model.CARDS.items():
        costs = {
            one: cost_model.table(name, batches=(1,), cascade=way.cascade)
            for one, way in drafting.items()
        }
        charge = partial(_charge, costs=costs, drafting=drafting)
        sums = _sums_by_prompt(mine, (method, versus), charge)
        found = pd.DataFrame(_estimates(sums, method, versus)).assign(**common)
        tables.append(found.assign(machine=f"{card.name} (modelled)", num_prompts=len(sums)))
    return pd.concat(tables, ignore_index=True).assign(source="modelled")


def _charge(
    record: Record, costs: Mapping[str, CostTable], drafting: Mapping[str, Drafting]
) -> np.ndarray:
    """(4,) tokens, milliseconds, those of autoregressive decoding, levels drafted in turn."""
    own, widths = costs[record.method], drafting[record.method].widths
    milliseconds, plain, context, num_rows = 0.0, 0.0, CONTEXT, 1
    for num_emitted, num_drafted in zip(record.emitted, record.drafted, strict=True):
        milliseconds += own.round(1, context, num_rows, widths, num_drafted + 1)
        plain += num_emitted * own.cost("target", 1, context, 1)
        context, num_rows = context + num_emitted, num_emitted
    num_levels = len(widths) * len(record.drafted)
    return np.array([sum(record.emitted), milliseconds, plain, num_levels])


def _estimates(sums: np.ndarray, method: str, versus: str) -> list[dict[str, object]]:
    """Rows from sums (prompts, 8) of what `_charge` gives for the two."""
    total, draws = (x.reshape(-1, 2, 4) for x in (sums.sum(0), rows.bootstrap(sums)))
    wanted = {
        ("modelled_speedup", method): lambda sums: sums[:, 0, 2] / sums[:, 0, 1],
        ("modelled_speedup", versus): lambda sums: sums[:, 1, 2] / sums[:, 1, 1],
        ("modelled_gain", method): _gain,
        ("break_even_ms", method): _break_even,
    }
    found = []
    for (quantity, name), estimate in wanted.items():
        low, high = rows.interval(estimate(draws))
        row = {"quantity": quantity, "method": name, "value": estimate(total)[0]}
        found.append(row | {"value_low": low, "value_high": high})
    return found


def _gain(sums: np.ndarray) -> np.ndarray:
    rates = sums[:, :, 0] / sums[:, :, 1]
    return rates[:, 0] / rates[:, 1] - 1


def _break_even(sums: np.ndarray) -> np.ndarray:
    """Milliseconds for which (theirs + levels x) / their tokens = ours / our tokens."""
    ours, theirs = sums[:, 0], sums[:, 1]
    return (ours[:, 1] * theirs[:, 0] / ours[:, 0] - theirs[:, 1]) / theirs[:, 3]


# --- how often the guesses are right


def guesses_of_cascade(made: Cascade, target: Target, top_k: int) -> Guesses:
    """What a cascade says of each place, without a word of the places between."""
    made = made.to(target.device, target.dtype).eval()
    ids, embedding = made.draft_token_ids(), target.model.get_input_embeddings().weight
    head = frozen_head(target, ids)

    def guesses(tokens: Tensor, taps: Tensor) -> list[Tensor]:
        states = made(taps, F.embedding(shift_left(tokens, 1), embedding))
        return [ids[head(one[0]).float().topk(top_k).indices] for one in states]

    return guesses


def guesses_of_eagle3(
    head: eagle3.DraftHead, target: Target, top_k: int, num_levels: int
) -> Guesses:
    """What EAGLE-3's head says on its own features, the true words of the places between given."""
    head = head.to(target.device, target.dtype).eval()
    ids, embedding = head.draft_token_ids(), eagle3.embedding_of(head, target)

    def guesses(tokens: Tensor, taps: Tensor) -> list[Tensor]:
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        features = head.fuse(taps)
        chain = eagle3.unroll(head, embedding, tokens, features, places, num_levels)
        return [ids[head.logits(one[0]).float().topk(top_k).indices] for one in chain]

    return guesses


@torch.inference_mode()
def accuracy_by_depth(
    guesses: Guesses, target: Target, texts: Sequence[Text], top_ks: Sequence[int]
) -> pd.DataFrame:
    """Rows "accuracy_by_depth": how often the answer's word is among the `top_ks` best guesses.

    Depth i is asked at every place from which all words up to it are the answer's.
    """
    units = np.stack([_hits(guesses, target, *text, top_ks) for text in texts])
    found = []
    for depth in range(units.shape[1]):
        for place, top_k in enumerate(top_ks):
            sums = units[:, depth, [place, -1]]
            hits, asked = sums.sum(0)
            if not asked:
                continue
            draws = rows.bootstrap(sums)
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high = rows.interval(draws[:, 0] / draws[:, 1])
            row = {"quantity": "accuracy_by_depth", "depth": depth + 1, "top_k": top_k}
            row |= {"value": hits / asked, "value_low": low, "value_high": high}
            found.append(row | {"num_prompts": len(texts), "temperature": 0.0})
    return pd.DataFrame(found)


def _hits(
    guesses: Guesses, target: Target, prompt: list[int], answer: list[int], top_ks: Sequence[int]
) -> np.ndarray:
    """(depths, len(top_ks) + 1) places where a guess was right, and last how many were asked."""
    tokens = torch.tensor([prompt + answer], device=target.device)
    is_answer = torch.arange(tokens.shape[1], device=tokens.device)[None] >= len(prompt)
    counts = []
    for depth, words in enumerate(guesses(tokens, target.features(tokens)[0]), 1):
        asked = supervised_rows(is_answer, depth)[0]
        is_right = words == shift_left(tokens, depth + 1)[0, :, None]
        hits = [int(is_right[asked, :k].any(-1).sum()) for k in top_ks]
        counts.append([*hits, int(asked.sum())])
    return np.array(counts, dtype=float)
