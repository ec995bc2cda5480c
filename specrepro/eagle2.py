"""EAGLE and EAGLE-2: a one-layer draft head taught to foretell the target's own features.

arXiv:2401.15077 (the head, a static draft tree) and arXiv:2406.16858 (a dynamic one).

Reproduced: EAGLE's head, its loss and the static tree of its release, EAGLE-2's dynamic tree; as
baselines, and as the first row of EAGLE-3's Table 2.
Not reproduced: the two papers' own tables.
What a feature is: the target's state after its last norm, which the language-model head reads; the
release takes the same. Drafting is EAGLE-3's but for what goes in and which head comes last.
Departs from the papers:
- supervised are the rows that decoding starts from and reads, as for EAGLE-3 here; the released
  trainer's mask lies one token later;
- the noise is EAGLE's U(-0.1, 0.1); the released trainer scales it by 512 / length;
- gradients are clipped by norm, as for every drafter here, not by value;
- rotary base 10000 for a new head, as for EAGLE-3's, whatever the target's;
- a smaller static tree is the beginning of the released one, in an order of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro import checkpoints, commands, corpus, draft_training, eagle3, recipes
from specrepro.draft_layer import DraftLayer, LayerConfig, sizes_of
from specrepro.draft_tree import DraftTree, Growth, keep_nodes
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Scores, Target

CHECKPOINT = recipes.COMMITTED / "eagle2"
# `mc_sim_7b_63` of the release's choices.py: the rank of each node among its siblings on the way
# down, one digit a level; the fewer steps down and aside, the earlier
RELEASED_TREE = (
    "0 1 00 2 01 10 000 3 02 11 20 001 010 100 0000 21 30 002 011 020 0001 00000 021 0002 00001"
).split()
EAGLE2_TREE = TreeConfig(depth=5, top_k=10, total_tokens=60)  # an 8B target's, six levels deep


@dataclass(frozen=True, slots=True)
class HeadConfig(LayerConfig):
    """Sizes of EAGLE's head."""

    bias: bool = True  # of `fc`; some released heads have none


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """EAGLE's loss and augmentation, with the paper's weights."""

    regression: float = 1.0  # weight of the smooth L1 distance between features
    classification: float = 0.1  # w_cls, of the cross-entropy with the target's distribution
    noise: float = 0.1  # features are read with noise from U(-noise, noise)


# --- the head


class DraftHead(nn.Module):
    """Everything that is trained; embedding and language-model head are the target's, frozen.

    Parameter names are those of the released checkpoints.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([DraftLayer(config, config.hidden_size)])

    @property
    def layer(self) -> DraftLayer:
        return self.layers[0]

    def draft_token_ids(self) -> Tensor:
        """The whole vocabulary (V,)."""
        return torch.arange(self.config.vocab_size, device=self.fc.weight.device)

    def read(self, seen: Scores | corpus.Batch) -> Tensor:
        """The target's final states (B, n, H)."""
        return seen.hidden

    def fuse(self, states: Tensor) -> Tensor:
        """The final states are the features."""
        return states

    def layer_input(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """`fc` of embedding and feature, un-normed, is the layer's input and its residual too."""
        x = self.fc(torch.cat([embeddings, features], -1))
        return x, x


# --- training


def uniform_noise(features: Tensor, half_width: float, seed: int) -> Tensor:
    """Noise from U(-half_width, half_width) in the shape of `features`."""
    rng = torch.Generator(features.device).manual_seed(seed)
    draws = torch.rand(features.shape, generator=rng, device=features.device)
    return ((2 * draws - 1) * half_width).to(features.dtype)


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy` by a few rows at a time; the gradient is formed while their logits exist."""

    CHUNK = 64

    @staticmethod
    def forward(ctx, states: Tensor, teacher: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Loss and agreement (M,), as in `cross_entropy`, with the gradient kept."""
        losses, agreement, gradients = [states.new_zeros((), dtype=torch.float)], [], []
        size = draft_training.chunk_size(_CrossEntropy.CHUNK, states.device)
        chunks = (x.split(size) for x in (states, teacher))
        for chunk, wanted in zip(*chunks, strict=True):
            p, leaf = logits(wanted).float().softmax(-1), chunk.detach().requires_grad_()
            with torch.enable_grad():
                scores = logits(leaf)
            log_q = scores.detach().float().log_softmax(-1)
            losses.append(-torch.dot(p.flatten(), log_q.flatten()))
            agreement.append((log_q.argmax(-1) == p.argmax(-1)).float())
            slope = log_q.exp_().sub_(p).to(scores.dtype)
            gradients += torch.autograd.grad(scores, leaf, slope)
        ctx.save_for_backward(torch.cat(gradients))
        agrees = torch.cat(agreement)
        ctx.mark_non_differentiable(agrees)
        return torch.stack(losses).sum(), agrees

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def cross_entropy(
    states: Tensor, teacher: Tensor, logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum over rows of -sum_v p(v) log q(v), and the top-1 agreement of each row (M,).

    q comes from `states` (M, H) and p from `teacher` (M, H) by the same frozen `logits`.
    """
    return _CrossEntropy.apply(states, teacher, logits)


class FeatureLoss:
    """L = L_reg + w_cls L_cls, EAGLE's, both means over the supervised rows.

    Row i reads the feature of token i and token i + 1, and foretells the feature of token i + 1:
    smooth L1 to that feature, cross-entropy of the two distributions that the target's head gives.
    """

    def __init__(self, head: DraftHead, target: Target, config: TrainingConfig):
        self.head, self.config, self.logits = head, config, target.logits
        self.embedding = target.model.get_input_embeddings().weight

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, its two parts, and the top-1 agreement."""
        rows, is_row = eagle3.rows_of_mask(eagle3.supervised_rows(batch.is_answer, step=0))
        # of the batch's own seed: a resumed run meets the noise of one that was never stopped
        noise = uniform_noise(batch.hidden, self.config.noise, int(batch.tokens.sum()))
        chain = eagle3.unroll(
            self.head, self.embedding, batch.tokens, batch.hidden + noise, rows, steps=1
        )
        foretold = next(chain)[is_row]
        features = eagle3.shift_left(batch.hidden, 1).take_along_dim(rows[:, :, None], 1)[is_row]
        num_rows = max(1, len(features))
        distance = F.smooth_l1_loss(foretold.float(), features.float(), reduction="none")
        regression = distance.mean(-1).sum() / num_rows
        classification, agrees = cross_entropy(foretold, features, self.logits)
        parts = {"regression": regression, "classification": classification / num_rows}
        loss = sum(getattr(self.config, name) * part for name, part in parts.items())
        metrics = {name: part.item() for name, part in parts.items()}
        return loss, metrics | {"agreement": agrees.sum().item() / num_rows}


# --- drafting


class StaticTree:
    """EAGLE's tree: the same shape in every round, whatever the head's scores.

    The first `total_tokens` - 1 nodes of the released table that lie no deeper than `depth` below
    the first level.
    """

    def __init__(self, depth: int = 4, total_tokens: int = 1 + len(RELEASED_TREE)):
        TreeConfig(depth, total_tokens=total_tokens)  # refuses what is no size of a tree
        paths = [path for path in RELEASED_TREE if len(path) <= depth + 1][: total_tokens - 1]
        self.depth, self.total_tokens = max(map(len, paths)) - 1, 1 + len(paths)
        self.top_k = 1 + max(int(path[-1]) for path in paths)
        inner = sorted({path[:-1] for path in paths})
        self.expanded: list[list[int]] = []  # by level, their places among its candidates
        self.kept, pool_size = [0], 1  # pool ids
        for level in range(self.depth + 1):
            frontier = [path for path in inner if len(path) == level]
            candidates = [f"{path}{rank}" for path in frontier for rank in range(self.top_k)]
            self.kept += [pool_size + candidates.index(p) for p in candidates if p in paths]
            self.expanded.append([n for n, path in enumerate(candidates) if path in inner])
            pool_size += len(candidates)

    @property
    def num_expanded(self) -> int:
        """Nodes that the head runs on."""
        return sum(map(len, self.expanded))

    def choose(self, level: int, scores: Tensor) -> Tensor:
        """(B, f) places to expand among a level's candidates."""
        return torch.tensor(self.expanded[level], device=scores.device).expand(len(scores), -1)

    def prune(self, growth: Growth) -> DraftTree:
        """The table's nodes of the pool."""
        tokens, parents, _ = growth.pool()
        return keep_nodes(
            tokens, parents, torch.tensor(self.kept, device=tokens.device).expand(len(tokens), -1)
        )


class Drafter(eagle3.Drafter):
    """EAGLE-3's drafter with another head, over the whole vocabulary of the target's."""

    def __init__(
        self, head: DraftHead, target: Target, tree: TreeConfig | StaticTree = EAGLE2_TREE
    ):
        super().__init__(head, target, tree)
        self.target_logits = target.logits

    @classmethod
    def load(
        cls, folder: Path | str, target: Target, tree: TreeConfig | StaticTree | None = None
    ) -> Drafter:
        """The drafter of a checkpoint folder, with its own tree unless another is given."""
        head, own_tree = load_head(folder)
        return cls(head, target, tree or own_tree)

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits by the target's own head."""
        return self.target_logits(features)


def load_head(folder: Path | str) -> tuple[DraftHead, TreeConfig]:
    """The head of a checkpoint folder, loaded strictly, and its dynamic tree (the paper's if it
    names none).

    Released files hold a copy of the target's embedding too, which is left out.
    """
    tensors, config = eagle3.load_parts(folder, "layers.0", "EAGLE")
    head = DraftHead(eagle3.read_config(HeadConfig, config, folder))
    checkpoints.load_strictly(head, tensors, folder, optional=["embed_tokens.weight"])
    return head, checkpoints.tree_of(config, EAGLE2_TREE, folder)


# --- the recipe


@dataclass(frozen=True, slots=True)
class Eagle2:
    """Train the head that EAGLE and EAGLE-2 draft with."""

    tree: TreeConfig = EAGLE2_TREE
    training: TrainingConfig = field(default_factory=TrainingConfig)

    name: ClassVar[str] = "eagle2"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Eagle2:
        """From a section of the overrides."""
        training = TrainingConfig(**settings.get("training", {}))
        return cls(TreeConfig(**settings["tree"]), training)

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> DraftHead:
        """An untrained head."""
        return DraftHead(HeadConfig(**sizes_of(target))).to(target.device)

    def loss(self, head: DraftHead, target: Target) -> FeatureLoss:
        """Regression to the target's features, and cross-entropy."""
        return FeatureLoss(head, target, self.training)

    def drafter(self, head: DraftHead, target: Target) -> Drafter:
        """The head with its dynamic tree."""
        return Drafter(head, target, self.tree)

    def save(self, head: DraftHead, folder: Path) -> Path:
        """The released layout without the embedding; config.json also names the tree."""
        return eagle3.save_head(head, folder, self.tree)


def drafters(
    checkpoint: Path | str = CHECKPOINT, **tree: int
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of both papers' drafters; `tree` overrides a checkpoint's sizes where not 0.

    EAGLE's static tree is as deep and as large as EAGLE-2's, where the released table goes so far.
    """
    changed = {name: value for name, value in tree.items() if value}

    def loader(
        shape: Callable[[TreeConfig], TreeConfig | StaticTree],
    ) -> Callable[[Target], Drafter]:
        def load(target: Target) -> Drafter:
            head, own = load_head(checkpoint)
            return Drafter(head, target, shape(replace(own, **changed)))

        return load

    return {
        "EAGLE": loader(lambda own: StaticTree(own.depth, own.total_tokens)),
        "EAGLE-2": loader(lambda own: own),
        "EAGLE chain": loader(eagle3.chain_like),
    }


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, Eagle2)
