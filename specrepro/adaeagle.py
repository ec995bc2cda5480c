"""AdaEAGLE: predict how many tokens are worth drafting.

Situo Zhang, Hankun Wang, Da Ma, Zichen Zhu, Lu Chen, Kunyao Lan, Kai Yu, arXiv:2412.18910.

Reproduced: the lightweight draft length predictor, its asymmetric loss and its labels
(`draft_labels`), the classification variant (Table 4), the threshold rule DDD, AdaEAGLE-DDD, fixed
lengths, the oracle; chains only, as in the paper, on EAGLE's head, which regresses features.
Not reproduced: the paper's GPU and its Vicuna target at any tier below `paper`.
Index of a label: the last token whose state is known lies one before the bonus token. So the
predictor reads token i and its state, token i + 1 plays the bonus token, and the label counts the
drafted tokens that are right from i + 2 on.
Departs from the paper:
- labels are counted where training reads the text, since a draft that is right so far has the very
  features that the text gives; they are remembered from epoch to epoch;
- a row whose draft is right to the end of an answer that was cut has no label;
- hidden width, activation, optimiser, lambda and both k_max are not in the paper: `AdaEagle` says
  which were taken;
- sampling is allowed, which the paper leaves to future work, and so is any batch size: rows of a
  batch draft different lengths;
- the head of EAGLE-3 serves as a second base.
The length never changes the output: the target verifies a chain of any length as any other tree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro import checkpoints, commands, corpus, eagle2, eagle3, recipes
from specrepro.draft_labels import NO_LABEL, Labels
from specrepro.draft_tree import DraftTree, Growth, take_shape
from specrepro.packed_linear import pack
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

CHECKPOINT = recipes.COMMITTED / "adaeagle"
BASES = {"EAGLE": eagle2, "EAGLE-3": eagle3}  # whose head drafts the chain
MOST = 10  # k_max
DDD_THRESHOLD = -0.6  # natural logarithm of a chain's probability (the best of Table 5, with -0.8)


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Sizes of the predictor."""

    hidden_size: int  # of the target
    width: int
    num_outputs: int = 1  # one length, or the logits of so many classes

    @property
    def is_classifier(self) -> bool:
        return self.num_outputs > 1


# --- the equations


def asymmetric_l1(predicted: Tensor, lengths: Tensor, penalty: float) -> Tensor:
    """lambda |k' - k| where k' < k, else |k' - k|, of each row.

    A draft that is too short costs another pass of the target, one that is too long a few passes of
    the head. The constant that fits best is the lambda / (1 + lambda) quantile of the lengths.
    """
    excess = predicted - lengths
    return torch.where(excess < 0, -penalty * excess, excess)


def quantile_of(penalty: float) -> float:
    """Which quantile of the lengths a penalty asks for."""
    return penalty / (1 + penalty)


def break_even(draft: float, verify: float, token: float) -> float:
    """The probability of acceptance from which one more drafted token pays.

    It costs a pass of the head, `draft`, and what one more token adds to the target's pass,
    `verify`; a token is worth the time that it takes to emit one, `token`. All in one unit.
    """
    return (draft + verify) / token


def break_even_penalty(draft: float, verify: float, token: float) -> float:
    """The lambda whose quantile is the longest draft that pays at its last token.

    That length is reached with the probability of `break_even`, so it is that upper quantile.
    """
    probability = break_even(draft, verify, token)
    return max(0.0, 1 - probability) / probability


def chain_lengths(wanted: Tensor, scores: Tensor, threshold: float | None) -> Tensor:
    """(B,) tokens to keep of drafted chains with log probabilities `scores` (B, k), of all tokens
    up to each.

    As many as are `wanted` (B,); under a threshold at least as many as DDD drafts, which goes on
    until the chain's log probability is below it, and so drafts one token always.
    """
    if threshold is None:
        return wanted.clamp_max(scores.shape[1])
    by_confidence = 1 + (scores[:, :-1] >= threshold).sum(1)
    return torch.maximum(wanted.clamp_max(scores.shape[1]), by_confidence)


def lengths_of(outputs: Tensor, most: int) -> Tensor:
    """(...) whole lengths from 0 to `most`, of the predictor's outputs (..., 1 or classes)."""
    if outputs.shape[-1] > 1:
        return outputs.argmax(-1).clamp_max(most)
    return outputs[..., 0].float().round().clamp(0, most).long()


# --- the predictor


class Predictor(nn.Module):
    """Three layers, the last two residual, and a linear map."""

    def __init__(self, config: PredictorConfig):
        super().__init__()
        self.config = config
        self.first = nn.Linear(2 * config.hidden_size, config.width)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))
        self.last = nn.Linear(config.width, config.num_outputs)

    def forward(self, states: Tensor) -> Tensor:
        """(..., outputs) of [embedding; state] (..., 2H)."""
        x = F.silu(self.first(states))
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.last(x)


def inputs_of(tokens: Tensor, hidden: Tensor, embedding: Tensor) -> Tensor:
    """(..., 2H): the word's embedding, and its state after the target's last norm."""
    return torch.cat([F.embedding(tokens, embedding), hidden], -1)


# --- training


class LengthLoss:
    """The mean over labelled rows of the asymmetric L1 loss, or of the classes' cross-entropy."""

    def __init__(self, predictor: Predictor, target: Target, labels: Labels, penalty: float):
        self.predictor, self.labels, self.penalty = predictor, labels, penalty
        self.embedding = target.model.get_input_embeddings().weight

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss; mean length predicted and true; how often the draft would be too short."""
        labels = self.labels(batch)
        is_row = labels != NO_LABEL
        states = inputs_of(batch.tokens[is_row], batch.hidden[is_row], self.embedding)
        outputs, lengths = self.predictor(states).float(), labels[is_row]
        num_rows = max(1, len(lengths))
        chosen = lengths_of(outputs.detach(), self.labels.most)
        counts = {"predicted": chosen, "length": lengths, "too_short": chosen < lengths}
        metrics = {name: x.sum().item() / num_rows for name, x in counts.items()}
        return self._each(outputs, lengths).sum() / num_rows, metrics

    def _each(self, outputs: Tensor, lengths: Tensor) -> Tensor:
        if self.predictor.config.is_classifier:
            return F.cross_entropy(outputs, lengths, reduction="none")
        return asymmetric_l1(outputs[..., 0], lengths, self.penalty)


# --- lengths


class Lengths(Protocol):
    """Says how many tokens to draft for each sequence; lives as long as one call of `decode`."""

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        """Start new sequences, as a drafter does."""

    def wanted(self) -> Tensor:
        """(B,) for the round that comes."""

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        """Learn what was accepted."""

    def select(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` alone."""


class Fixed:
    """The same number in every round; 0 leaves it to DDD."""

    def __init__(self, number: int):
        self.number = number

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.counts = torch.full_like(roots, self.number)

    def wanted(self) -> Tensor:
        return self.counts

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        self.counts = self.counts[rows]


class Known:
    """What somebody found out before, for each prompt by place of its answer: the oracle's."""

    def __init__(self, lengths: Mapping[tuple[int, ...], Sequence[int]]):
        self.known = lengths

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        asked = zip(prompts.tolist(), lengths.tolist(), strict=True)
        self.rows = [self.known[tuple(prompt[:n])] for prompt, n in asked]
        self.places = torch.zeros_like(roots)

    def wanted(self) -> Tensor:
        pairs = zip(self.rows, self.places.tolist(), strict=True)
        found = [row[place] if place < len(row) else 0 for row, place in pairs]
        return torch.tensor(found, device=self.places.device)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.places = self.places + verdict.num_accepted + 1

    def select(self, rows: Tensor) -> None:
        self.rows, self.places = [self.rows[row] for row in rows.tolist()], self.places[rows]


class Predicted:
    """What the predictor makes of the last token whose state is known."""

    def __init__(self, predictor: Predictor, target: Target, most: int = MOST):
        check_fits(predictor.config, target)
        self.predictor = predictor.to(target.device, target.dtype).eval().requires_grad_(False)
        pack(self.predictor)
        self.embedding, self.most = target.model.get_input_embeddings().weight, most

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        rows, last = torch.arange(len(roots), device=roots.device), lengths - 1
        self.roots = roots
        self.states = inputs_of(prompts[rows, last], scores.hidden[rows, last], self.embedding)

    @torch.inference_mode()
    def wanted(self) -> Tensor:
        return lengths_of(self.predictor(self.states), self.most)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        rows, last = torch.arange(len(self.roots), device=self.roots.device), verdict.num_accepted
        on_path = torch.cat([self.roots[:, None], verdict.tokens], 1)  # words of the path's nodes
        hidden = scores.hidden[rows, verdict.path[rows, last]]
        self.states = inputs_of(on_path[rows, last], hidden, self.embedding)
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.roots, self.states = self.roots[rows], self.states[rows]


def check_fits(config: PredictorConfig, target: Target) -> None:
    """Raise a ValueError where the predictor reads states of another size."""
    if config.hidden_size != target.hidden_size:
        raise ValueError(
            f"this predictor was made for a target with hidden size {config.hidden_size}, but"
            f" {target.name} has {target.hidden_size}; train one for this target or name the target"
            " it belongs to"
        )


# --- drafting


class Chain:
    """The shape of chains of at most `most` tokens, whose rows end where each wants to."""

    top_k = 1

    def __init__(self, most: int = MOST, threshold: float | None = None):
        if most < 1:
            raise ValueError(f"the longest chain has {most} tokens; it must have at least 1")
        self.most, self.threshold = most, threshold
        self.depth = self.num_expanded = most - 1
        self.total_tokens = most + 1

    def start(self, wanted: Tensor) -> bool:
        """Take the lengths (B,) wanted of this round; whether there is anything to draft."""
        self.wanted = wanted.clamp(0, self.most)
        return self.threshold is not None or bool(self.wanted.any())

    def choose(self, level: int, scores: Tensor) -> Tensor | None:
        """Go on while some row is shorter than it wants, or as sure as the threshold."""
        goes_on = self.wanted > level + 1
        if self.threshold is not None:
            goes_on = goes_on | (scores[:, 0] >= self.threshold)
        return torch.zeros_like(self.wanted)[:, None] if goes_on.any() else None

    def prune(self, growth: Growth) -> DraftTree:
        """Cut every row at its own length."""
        tokens, _, scores = growth.pool()
        lengths = 1 + chain_lengths(self.wanted, scores[:, 1:], self.threshold)
        return DraftTree.chain(tokens[:, : int(lengths.max())], lengths)


class Drafter:
    """A head that drafts chains, each round as long as `lengths` and a threshold say.

    Where nothing is wanted the head does not run: it takes the tokens in when it drafts again.
    """

    def __init__(
        self,
        head: eagle3.Drafter,  # one that asks its `tree` for the shape of what it drafts
        lengths: Lengths,
        most: int = MOST,
        threshold: float | None = None,
    ):
        self.head, self.lengths, self.chain = head, lengths, Chain(most, threshold)
        take_shape(head, self.chain)

    @property
    def max_nodes(self) -> int:
        return self.chain.total_tokens

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.roots = roots
        self.head.begin(prompts, lengths, roots, scores)
        self.lengths.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        if not self.chain.start(self.lengths.wanted()):
            return DraftTree.root_only(self.roots)
        return self.head.propose()

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.roots = verdict.bonus
        self.head.observe(verdict, scores)
        self.lengths.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self.roots = self.roots[rows]
        self.head.select(rows)
        self.lengths.select(rows)


# --- checkpoints and the recipe


@dataclass(frozen=True, slots=True)
class AdaEagle:
    """Train the predictor of draft lengths for a head that is trained already.

    Take its last state (`evaluations=1`): the longest drafts have the highest tau, not the best.
    """

    base: str = "EAGLE"  # whose head drafts
    head: str = ""  # folder of that head; empty is the committed one
    penalty: float = 4.0  # lambda; the paper only says that it is above 1
    is_classifier: bool = False  # Table 4's variant: k_max + 1 classes, no penalty
    most: int = MOST  # k_max of labels and of decoding
    width: int = 0  # of the hidden layers; 0 is the target's hidden size

    name: ClassVar[str] = "adaeagle"

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ValueError(f"unknown base {self.base!r}; choose one of {', '.join(BASES)}")
        if self.penalty <= 0 or self.most < 1:
            raise ValueError(f"penalty > 0 and most >= 1 needed, not {self}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> AdaEagle:
        """From a section of the overrides."""
        return cls(**settings)

    @property
    def head_folder(self) -> Path:
        return Path(self.head) if self.head else BASES[self.base].CHECKPOINT

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> Predictor:
        """An untrained predictor."""
        num_outputs = self.most + 1 if self.is_classifier else 1
        width = self.width or target.hidden_size
        return Predictor(PredictorConfig(target.hidden_size, width, num_outputs)).to(target.device)

    def loss(self, predictor: Predictor, target: Target) -> LengthLoss:
        """The asymmetric L1 loss on what this head has right."""
        labels = _labels(self.base, self.head_folder, target, self.most)
        return LengthLoss(predictor, target, labels, self.penalty)

    def drafter(self, predictor: Predictor, target: Target) -> Drafter:
        """The predictor at work."""
        return Drafter(self.load_head(target), Predicted(predictor, target, self.most), self.most)

    def load_head(self, target: Target) -> eagle3.Drafter:
        """The head, drafting chains."""
        return BASES[self.base].Drafter.load(self.head_folder, target, Chain(self.most))

    @property
    def origin(self) -> dict[str, Any]:
        """What a predictor was trained for, and the head that its labels came from."""
        own = {"base": self.base, "most": self.most, "penalty": self.penalty}
        own |= {"is_classifier": self.is_classifier}
        return own | {"head": checkpoints.digest(self.head_folder)}

    def save(self, predictor: Predictor, folder: Path) -> Path:
        """Weights in float32, sizes, and the origin."""
        config = {"model_type": self.name} | asdict(predictor.config) | self.origin
        tensors = {name: tensor.float() for name, tensor in predictor.state_dict().items()}
        return checkpoints.save(folder, tensors, config)


@lru_cache(maxsize=1)  # predictors of one head, trained one after another, share its drafts
def _labels(base: str, folder: Path, target: Target, most: int) -> Labels:
    return Labels(BASES[base].load_head(folder)[0], target, most)


def load_predictor(folder: Path | str) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of a checkpoint folder, loaded strictly, and its config."""
    tensors, config = checkpoints.load(folder)
    if config.get("model_type") != AdaEagle.name:
        raise ValueError(
            f"checkpoint {folder} holds no draft length predictor but a"
            f" {config.get('model_type')!r}; train one with --from-scratch or name another folder"
        )
    sizes = ("hidden_size", "width", "num_outputs")
    predictor = Predictor(PredictorConfig(**{name: config[name] for name in sizes}))
    checkpoints.load_strictly(predictor, tensors, folder)
    return predictor, config


def load(
    target: Target,
    checkpoint: Path | str = CHECKPOINT,
    head: Path | str = "",
    threshold: float | None = None,
) -> Drafter:
    """AdaEAGLE, or with a threshold AdaEAGLE-DDD; refused on another head than the labels'."""
    predictor, config = load_predictor(checkpoint)
    method = AdaEagle(config["base"], str(head), most=config["most"])
    if (own := checkpoints.digest(method.head_folder)) != config["head"]:
        raise ValueError(
            f"the predictor of {checkpoint} was trained on drafts of head {config['head'][:12]},"
            f" but {method.head_folder} is {own[:12]}; name that head or train the predictor again"
        )
    lengths = Predicted(predictor, target, method.most)
    return Drafter(method.load_head(target), lengths, method.most, threshold)


def fixed(
    target: Target,
    number: int,
    base: str = "EAGLE",
    head: Path | str = "",
    most: int = 0,
    threshold: float | None = None,
) -> Drafter:
    """The base with `number` tokens in every round; with number 0, `most` and a threshold, DDD."""
    method = AdaEagle(base, str(head), most=most or number)
    return Drafter(method.load_head(target), Fixed(number), method.most, threshold)


def drafters(
    checkpoint: Path | str = CHECKPOINT,
    head: Path | str = "",
    base: str = "EAGLE",
    threshold: float = DDD_THRESHOLD,
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of this paper's drafters; `base` is DDD's, the predictor knows its own."""
    return {
        "AdaEAGLE": lambda target: load(target, checkpoint, head),
        "AdaEAGLE-DDD": lambda target: load(target, checkpoint, head, threshold),
        "DDD": lambda target: fixed(target, 0, base, head, MOST, threshold),
    }


DRAFTERS = drafters()


if __name__ == "__main__":
    defaults = ["--evaluations", "1", "--epochs", "5"]
    commands.run(recipes.main, AdaEagle, [*defaults, *sys.argv[1:]])
