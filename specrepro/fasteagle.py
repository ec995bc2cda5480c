"""FastEagle: a cascade of layers that drafts every position in one pass.

Huang, Song, Zhao, Ren, arXiv:2509.20416.

Reproduced: the cascade on EAGLE-3's fused features and the next token's embedding, the target's
frozen head behind every layer, layer-wise supervision, the backbone tree, a draft cache that holds
committed tokens alone, lossless verification for siblings that are chosen or drawn.
Not reproduced: the paper's targets at any tier below `paper`, and any number of its tables.
Read at second hand: of the paper itself only the abstract could be read, its architecture in a
transcription that breaks off. The loss, its weights, the norms, N and k, the start of training, the
data and every cell of a table were not to be had. What stands for them is our choice, and a
setting each:
- soft cross-entropy with the target at every depth, weights falling by 0.8 a depth as EAGLE-3's
  fall by step, and no feature loss, which EAGLE-3 found to stand in the way of more data;
- one learned norm a layer in front of the frozen head, begun as the target's last norm, and one of
  the word's embedding, which EAGLE-3 norms too;
- seven layers, eight candidates a layer: as deep as EAGLE-3's tree, and about as many nodes; three
  layers for the embedded target, since four would pass 30 MB in bfloat16;
- random layers at first, or EAGLE-3's layer as far as its weights fit;
- at temperature > 0 siblings are the best of each distribution, verified like everyone's, or drawn
  from it and verified by recursive rejection (`SampledDrafter`).
Departs from the transcription:
- layer i is said to speak for position t + i; what it reads includes token t + 1, so here, as it
  must, it foretells token t + 1 + i;
- the head may be the target's rows of the most frequent words alone (`draft_vocab_size`), as
  EAGLE-3's is.
Extensions, for comparison: layers that share their weights, or all read the first input
(`wiring`); a tree grown best first, or shaped by CAST, over the same distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro import checkpoints, commands, corpus, decoding, eagle3, recipes
from specrepro.backbone import Backbone, BestFirst
from specrepro.cascade import (
    Cascade,
    CascadeConfig,
    FusedLayer,
    Rotary,
    frozen_head,
    start_from_eagle3,
    start_norms,
)
from specrepro.draft_layer import check_fits, sizes_of
from specrepro.draft_tree import DraftTree, Growth, Shape
from specrepro.eagle2 import cross_entropy
from specrepro.eagle3 import shift_left
from specrepro.packed_linear import pack
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import LARGEST_BELOW_ONE, Verdict, packed_attention, verify_sample

CHECKPOINT = recipes.COMMITTED / "fasteagle"


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Layer-wise supervision; the paper's own terms and weights could not be read."""

    decay: float = 0.8  # depth i weighs decay ** (i - 1), normalised; 1 weighs all alike
    supervision: str = "every"  # depth; or "last": the ablation that trains the deepest alone
    feature_weight: float = 0.0  # of the smooth L1 distance to the target's own states
    learns_norms: bool = True  # False keeps the target's last norm at every depth
    init: str = "random"  # or the folder of an EAGLE-3 head, whose layer every layer starts as

    def __post_init__(self) -> None:
        if self.supervision not in ("every", "last"):
            raise ValueError(f"unknown supervision {self.supervision!r}; choose every or last")
        if not self.decay > 0 or self.feature_weight < 0:
            raise ValueError(f"decay > 0 and feature_weight >= 0 needed, not {self}")


# --- the equations


def supervised_rows(is_answer: Tensor, depth: int) -> Tensor:
    """(b, n) bool: rows from which layer `depth` (from 1) is trained.

    Row i reads the states of token i and the token i + 1, and foretells token i + 1 + depth. All of
    these words must lie in the answer, as they do in decoding.
    """
    words = [shift_left(is_answer, ahead) for ahead in range(1, depth + 2)]
    return torch.stack(words).all(0)


def depth_weights(num_layers: int, config: TrainingConfig) -> list[float]:
    """w_i of the losses of all depths, which sum to 1."""
    if config.supervision == "last":
        return [0.0] * (num_layers - 1) + [1.0]
    raw = [config.decay**i for i in range(num_layers)]
    return [weight / sum(raw) for weight in raw]


# --- training


class LayerwiseLoss:
    """L = sum_i w_i (CE_i + beta L1_i), both means over the rows that depth i is trained at.

    CE_i is of the target's distribution of the word that layer i foretells with the layer's own, by
    one frozen head; L1_i the smooth distance between the states that the two come from. There is no
    token feedback, so one teacher-forced pass trains all depths.
    """

    def __init__(self, cascade: Cascade, target: Target, config: TrainingConfig):
        self.cascade, self.config = cascade, config
        self.weights = depth_weights(cascade.config.num_hidden_layers, config)
        self.embedding = target.model.get_input_embeddings().weight
        ids = cascade.draft_token_ids()
        self.logits = frozen_head(target, ids)
        self.is_spoken = torch.zeros(target.vocab_size, dtype=torch.bool, device=ids.device)
        self.is_spoken[ids] = True

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, each depth's top-1 agreement with the target, and what tau a chain would have.

        Rows whose likeliest word the cascade cannot speak are left out.
        """
        words = F.embedding(shift_left(batch.tokens, 1), self.embedding)
        total, agreement = torch.zeros((), device=batch.hidden.device), []
        for depth, states in enumerate(self.cascade(self.cascade.read(batch), words), 1):
            rows = supervised_rows(batch.is_answer, depth)
            rows &= self.is_spoken[shift_left(batch.choices, depth)]
            wanted = shift_left(batch.hidden, depth)[rows]
            loss, agrees = self._loss(states[rows], wanted)
            total = total + self.weights[depth - 1] * loss
            found = torch.zeros(rows.shape, device=rows.device)
            agreement.append(found.masked_scatter(rows, agrees))
        return total, _describe(agreement, batch.is_answer)

    def _loss(self, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of one depth: states (M, H) that are to be like the `wanted`; and who agrees (M,)."""
        num_rows = max(1, len(states))
        entropy, agrees = cross_entropy(states, wanted, self.logits)
        loss = entropy / num_rows
        if beta := self.config.feature_weight:
            apart = F.smooth_l1_loss(states.float(), wanted.float(), reduction="none")
            loss = loss + beta * apart.mean(-1).sum() / num_rows
        return loss, agrees


def _describe(agreement: Sequence[Tensor], is_answer: Tensor) -> dict[str, float]:
    """Top-1 agreement by depth, over all rows of the depth; and over rows of the first, a chain."""
    metrics = {}
    for depth, agrees in enumerate(agreement, 1):
        num_rows = max(1, int(supervised_rows(is_answer, depth).sum()))
        metrics[f"agreement_{depth}"] = agrees.sum().item() / num_rows
    num_starts = max(1, int(supervised_rows(is_answer, 1).sum()))
    chains = torch.stack(list(agreement)).cumprod(0).sum().item()
    return metrics | {"simulated_tau": 1 + chains / num_starts}


# --- drafting


class Drafter(eagle3.Drafter):
    """EAGLE-3's drafter with one change: all depths come from one pass over committed tokens.

    The pass that takes in what the last round accepted gives N distributions at its last row; the
    `tree` says which of their words become nodes. No drafted token is ever run through a layer, so
    the cache has nothing to roll back.
    """

    def __init__(self, cascade: Cascade, target: Target, tree: Shape | None = None):
        check_fits(cascade.config, target)
        N = cascade.config.num_hidden_layers
        self.head = cascade.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding = target.model.get_input_embeddings().weight
        self.token_ids = cascade.draft_token_ids()
        self.frozen_head = frozen_head(target, self.token_ids)
        self.fused = [FusedLayer(layer) for layer in self.head.layers]
        for module in (self.head.fc, self.head.mix):
            pack(module)
        self.tree = tree or Backbone(N)
        if self.tree.depth >= N:
            raise ValueError(
                f"a tree of {self.tree.depth + 1} levels needs as many layers, but the cascade has"
                f" {N}; choose at most {N} levels or train a longer one"
            )

    @classmethod
    def load(cls, folder: Path | str, target: Target, tree: Shape | None = None) -> Drafter:
        """The drafter of a checkpoint folder, with its own backbone unless a tree is given."""
        cascade, own = load_cascade(folder)
        return cls(cascade, target, tree or own)

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits by the target's own head."""
        return self.frozen_head(features)

    def _take_in(self, tokens: Tensor, states: Tensor, counts: Tensor) -> Tensor:
        """The one pass: keys of committed rows to the cache; the last row's states (B, N, H)."""
        num_rows, device = tokens.shape[1], tokens.device
        self._reserve(num_rows)
        positions = self.lengths[:, None] + torch.arange(num_rows, device=device)
        slots = torch.arange(self.longest + num_rows, device=device)
        # a row past a sequence's count computes something that is never read
        mask = slots <= positions[:, :, None]
        last = self._run(tokens, states, positions, mask, counts - 1)
        self.lengths = self.lengths + counts
        return last

    def _run(
        self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Tensor, last: Tensor
    ) -> Tensor:
        """All layers over rows at `positions` (B, n); what row `last` (B,) ends as (B, N, H)."""
        rotary = tuple(table[positions] for table in self.rotary)
        first = self.head.first_input(states, F.embedding(tokens, self.embedding))
        found = self.head.run(first, lambda i, x: self._attend(i, x, rotary, positions, mask))
        rows = torch.arange(len(tokens), device=tokens.device)
        normed = [norm(x[rows, last]) for norm, x in zip(self.head.norms, found, strict=True)]
        return torch.stack(normed, 1)

    def _attend(
        self, depth: int, x: Tensor, rotary: Rotary, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Layer `depth` (from 0) over rows x (B, n, H) whose keys go to `positions` (B, n)."""
        layer, cache = self.fused[depth % len(self.fused)], self.cache[2 * depth : 2 * depth + 2]
        q, k, v = layer.project(x, rotary)
        rows = torch.arange(len(x), device=x.device)[:, None]
        cache[:, rows, positions] = torch.stack([k, v])
        attended = packed_attention(q, *cache[:, :, : mask.shape[-1]], mask)
        return layer.finish(x, attended.flatten(2))

    def _grow(self, last: Tensor) -> DraftTree:
        """A tree over the words of every depth; no layer runs."""
        log_probs, tokens = self._children(last)  # (B, N, top_k)
        growth = Growth(self.roots)
        growth.branch(log_probs[:, :1], tokens[:, :1])
        for level, parents in islice(growth.descents(self.tree), last.shape[1] - 1):
            below, size = slice(level + 1, level + 2), (-1, parents.shape[1], -1)
            growth.branch(log_probs[:, below].expand(size), tokens[:, below].expand(size))
        return self.tree.prune(growth)

    def _allocate(self, batch: int, capacity: int) -> None:
        """An empty cache (2 N, batch, capacity, Hkv, D): keys and values of every layer."""
        c, like = self.head.config, self.head.fc.weight
        shape = (2 * c.num_hidden_layers, batch, capacity, c.num_key_value_heads, c.head_dim)
        self.cache = like.new_zeros(shape)
        table = self.head.layers[0].rotary(torch.arange(capacity, device=like.device))
        self.rotary = tuple(part.to(like.dtype) for part in table)


class SampledDrafter(Drafter):
    """Draws the siblings of the backbone from their distribution, without replacement.

    At temperature > 0 they are verified by recursive rejection, which takes account of how they
    were drawn: lossless, but not the autoregressive run of the same seed.
    """

    def __init__(
        self, cascade: Cascade, target: Target, tree: Backbone | None = None, seed: int = 0
    ):
        super().__init__(cascade, target, tree)
        self.seed = seed

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.draws = torch.Generator(roots.device).manual_seed(self.seed)
        super().begin(prompts, lengths, roots, scores)

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities and target ids (B, N, top_k) of words in the order they were drawn."""
        log_probs = self.logits(features).float().log_softmax(-1)
        times = torch.empty_like(log_probs).exponential_(generator=self.draws)
        drawn = (log_probs - times.log()).topk(self.tree.top_k, -1).indices
        self.log_probs = log_probs
        return log_probs.gather(-1, drawn), self.token_ids[drawn]

    def judge(
        self,
        tree: DraftTree,
        scores: Scores,
        sampling: decoding.Sampling,
        race_times: Tensor | None,
    ) -> Verdict:
        """What the target accepts; `race_times` (B, nodes, any) make the draws repeatable."""
        if not isinstance(self.tree, Backbone):
            raise ValueError(
                f"drawn siblings are verified on a backbone, where none is left out, not on"
                f" {type(self.tree).__name__}; draft with Drafter instead"
            )
        if sampling.is_greedy:
            return decoding.judge(tree, scores, sampling, race_times)
        target_probs = sampling.probs(scores.logits)
        uniforms, final = uniforms_of(tree, race_times, self.tree.top_k)
        return verify_sample(
            tree, target_probs, uniforms, final, mode="without_replacement",
            draft_probs=self._offered(tree, target_probs),
        )  # fmt: skip

    def _offered(self, tree: DraftTree, like: Tensor) -> Tensor:
        """(B, nodes, V) what the children of each node were drawn from, had it any."""
        depths = tree.depths().clamp_max(self.log_probs.shape[1] - 1)
        spoken = self.log_probs.exp().take_along_dim(depths[:, :, None], 1)
        return torch.zeros_like(like).index_copy_(-1, self.token_ids, spoken.to(like.dtype))


def uniforms_of(tree: DraftTree, race_times: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(B, N) an acceptance draw for each node and (B,) the last draw, from exponentials of a place.

    A node draws at its parent's place, one exponential a sibling; the last draw takes the next at
    the root's place. So no draw is used twice, in this round or another.
    """
    if race_times.shape[-1] <= top_k:
        raise ValueError(
            f"{top_k} siblings and a last draw need {top_k + 1} draws a place, but there are"
            f" {race_times.shape[-1]}; choose a smaller top_k"
        )
    parents = tree.parents.clamp_min(0)
    ranks = (tree.parents[:, :, None] == tree.parents[:, None]).tril(-1).sum(-1)
    # padding has siblings without end, and is never asked
    at = ranks.clamp_max(top_k - 1)[:, :, None]
    times = race_times.take_along_dim(parents[:, :, None], 1).gather(2, at)[..., 0]
    return _uniform(times), _uniform(race_times[:, 0, top_k])


def _uniform(times: Tensor) -> Tensor:
    """Exponentials as uniforms in [0, 1)."""
    return (-times).exp().clamp_max(LARGEST_BELOW_ONE)


# --- checkpoints


def save_cascade(cascade: Cascade, folder: Path | str, tree: Backbone) -> Path:
    """Write the cascade in bfloat16, with the backbone that it is to draft."""
    state = cascade.state_dict()
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    config = {"model_type": "fasteagle"} | asdict(cascade.config)
    return checkpoints.save(folder, tensors, config | {"specrepro_tree": asdict(tree)})


def load_cascade(folder: Path | str) -> tuple[Cascade, Backbone]:
    """The cascade of a checkpoint folder, loaded strictly, and its backbone."""
    tensors, config = checkpoints.load(folder)
    if "mix.weight" not in tensors:
        raise ValueError(
            f"checkpoint {folder} holds no FastEagle cascade: mix.weight is missing;"
            " train one with --from-scratch or name another folder"
        )
    cascade = Cascade(eagle3.read_config(CascadeConfig, config, folder))
    checkpoints.load_strictly(cascade, tensors, folder)
    return cascade, checkpoints.tree_of(config, Backbone(), folder)


# --- the recipe


@dataclass(frozen=True, slots=True)
class FastEagle:
    """Train a FastEagle cascade."""

    num_layers: int = 7
    draft_vocab_size: int = 0  # most frequent words to speak; 0 is the target's whole head
    top_k: int = 8  # candidates a depth
    wiring: str = "cascade"
    norms_word: bool = True  # before it is mixed with the features
    training: TrainingConfig = field(default_factory=TrainingConfig)

    name: ClassVar[str] = "fasteagle"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> FastEagle:
        """From a section of the overrides."""
        training = TrainingConfig(**settings.get("training", {}))
        return cls(**settings | {"training": training})

    @property
    def tree(self) -> Backbone:
        """What the cascade is to draft."""
        return Backbone(self.num_layers, self.top_k)

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> Cascade:
        """An untrained cascade, with the target's last norm at every depth."""
        config = CascadeConfig(
            **sizes_of(target), num_hidden_layers=self.num_layers, wiring=self.wiring,
            draft_vocab_size=min(self.draft_vocab_size, target.vocab_size),
            norms_word=self.norms_word,
        )  # fmt: skip
        cascade = Cascade(config).to(target.device)
        if config.is_reduced:
            ids = corpus.most_frequent_tokens(answers, config.vocab_size, config.draft_vocab_size)
            cascade.token_map.copy_(ids)
        start_norms(cascade, target)
        cascade.norms.requires_grad_(self.training.learns_norms)
        if self.training.init != "random":
            start_from_eagle3(cascade, eagle3.load_head(self.training.init)[0])
        return cascade

    def loss(self, cascade: Cascade, target: Target) -> LayerwiseLoss:
        """Layer-wise supervision on the target's features."""
        return LayerwiseLoss(cascade, target, self.training)

    def drafter(self, cascade: Cascade, target: Target) -> Drafter:
        """The cascade with its backbone."""
        return Drafter(cascade, target, self.tree)

    def save(self, cascade: Cascade, folder: Path) -> Path:
        """bfloat16; config.json also names the backbone."""
        return save_cascade(cascade, folder, self.tree)


def drafters(
    checkpoint: Path | str = CHECKPOINT, **tree: int
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of this paper's drafters; `tree` overrides the checkpoint's sizes where not 0."""
    changed = {name: value for name, value in tree.items() if value}

    def loader(
        kind: type[Drafter], shape: Callable[[Backbone], Shape]
    ) -> Callable[[Target], Drafter]:
        def load(target: Target) -> Drafter:
            cascade, own = load_cascade(checkpoint)
            return kind(cascade, target, shape(replace(own, **changed)))

        return load

    return {
        "FastEagle": loader(Drafter, lambda own: own),
        "FastEagle chain": loader(Drafter, lambda own: replace(own, top_k=1)),
        "FastEagle best-first": loader(Drafter, BestFirst.like),
        "FastEagle sampled": loader(SampledDrafter, lambda own: own),
    }


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, FastEagle)
