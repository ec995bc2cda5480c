"""Medusa-1: heads on the frozen target that each guess one token further ahead.

arXiv:2401.10774; a baseline of EAGLE-3's Table 1.

Reproduced: the heads (section 2.1.1), their loss (2.2.1), the sparse tree released for these heads.
Not reproduced: Medusa-2, which changes the target; typical acceptance, which is lossy (verification
here is the exact one that every drafter shares); self-distillation of answers by the paper's own
script, since the corpus is the target's words already; building a tree for the heads at hand.
Never run on a GPU.
Departs from the paper:
- the tree is one table, released for the heads of Vicuna-13B, whatever the target: its order is
  taken to be of falling usefulness, so a smaller tree is its beginning;
- heads may guess over the most frequent tokens alone (`draft_vocab_size`), because one whole
  language-model head each would not fit beside the embedded target; rows whose token is not among
  them are left out of the loss;
- optimiser and schedule are those of every drafter here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro import checkpoints, commands, corpus, recipes
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.packed_linear import pack
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

CHECKPOINT = recipes.COMMITTED / "medusa"
IGNORED = -100  # a label that the loss leaves out
# `vicuna_13b_stage1` of the release's medusa_choices.py: the rank of each head's guess on the way
# down, one digit a head; a path comes after the one it prolongs
RELEASED_TREE = (
    "0 00 1 01 2 10 000 02 3 03 4 20 04 001 05 5 11 010 6 06 002 7 30 8 07 08 100 003 40 12 9 09"
    " 21 020 004 13 011 005 50 030 0000 006 60 14 200 012 31 040 101 22 007 15 70 008 80 050 009"
    " 021 110 013 41 23 16"
).split()
TOTAL_TOKENS = 1 + len(RELEASED_TREE)  # nodes sent to the target, the root included


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Sizes of the heads."""

    hidden_size: int
    vocab_size: int  # of the target
    draft_vocab_size: int
    num_heads: int
    num_layers: int = 1  # residual blocks of each head


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), the identity until it is trained (section 2.1.1; the release adds b)."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Heads(nn.ModuleList):
    """Head k (from 1) reads the state that token t + 1 is chosen from and guesses token t + 1 + k.

    That state is the target's after its last norm, `Scores.hidden`. Parameter names are those of
    the release's medusa_lm_head.pt.
    """

    def __init__(self, config: HeadsConfig):
        super().__init__(_head(config) for _ in range(config.num_heads))
        self.config = config
        if config.draft_vocab_size != config.vocab_size:
            self.register_buffer(
                "token_map", torch.zeros(config.draft_vocab_size, dtype=torch.long)
            )

    def draft_token_ids(self) -> Tensor:
        """(draft_vocab_size,) target ids of the draft vocabulary."""
        if hasattr(self, "token_map"):
            return self.token_map
        return torch.arange(self.config.vocab_size, device=self[0][-1].weight.device)


def _head(config: HeadsConfig) -> nn.Sequential:
    blocks = (ResidualBlock(config.hidden_size) for _ in range(config.num_layers))
    return nn.Sequential(
        *blocks, nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
    )


# --- training


def labels_ahead(ids: Tensor, is_answer: Tensor, ahead: int) -> Tensor:
    """(b, n): of `ids` (b, n) the one `ahead` places on where it is the answer's, else IGNORED."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-ahead] = ids[:, ahead:].where(is_answer[:, ahead:], IGNORED)
    return labels


class HeadsLoss:
    """Equation 1: the cross-entropy of each head with the very words of the answer.

    Head k weighs decay ** k; its loss is a mean over the rows whose label it can guess.
    """

    def __init__(self, heads: Heads, decay: float):
        self.heads, self.decay = heads, decay
        ids = heads.draft_token_ids()
        self.draft_ids = ids.new_full((heads.config.vocab_size,), IGNORED)
        self.draft_ids[ids] = torch.arange(len(ids), device=ids.device)

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and each head's top-1 accuracy over the same rows."""
        total, metrics = torch.zeros((), device=batch.hidden.device), {}
        for k, head in enumerate(self.heads, 1):
            labels = labels_ahead(self.draft_ids[batch.tokens], batch.is_answer, k + 1)
            is_row = labels != IGNORED
            logits, labels = head(batch.hidden[is_row]).float(), labels[is_row]
            num_rows = max(1, len(labels))
            loss = F.cross_entropy(logits, labels, reduction="sum") / num_rows
            total = total + self.decay**k * loss
            metrics[f"accuracy_{k}"] = (logits.argmax(-1) == labels).sum().item() / num_rows
        return total, metrics


# --- drafting


def tree_paths(num_heads: int, total_tokens: int) -> list[tuple[int, ...]]:
    """The first `total_tokens` - 1 paths of the released tree that so many heads can fill."""
    if not 2 <= total_tokens <= TOTAL_TOKENS:
        raise ValueError(
            f"total_tokens is {total_tokens}; the released tree has {TOTAL_TOKENS} nodes, the root"
            f" included: choose 2 to {TOTAL_TOKENS}"
        )
    paths = [tuple(map(int, path)) for path in RELEASED_TREE if len(path) <= num_heads]
    return paths[: total_tokens - 1]


class Drafter:
    """Fills one static tree with each head's best guesses; a guess knows nothing of its parent.

    All it keeps is the state of the last accepted token: there is no draft cache.
    """

    def __init__(self, heads: Heads, target: Target, total_tokens: int = TOTAL_TOKENS):
        check_fits(heads.config, target)
        self.heads = heads.to(target.device, target.dtype).eval().requires_grad_(False)
        pack(self.heads)
        self.token_ids = heads.draft_token_ids()
        paths = tree_paths(heads.config.num_heads, total_tokens)
        place = {(): 0} | {path: node for node, path in enumerate(paths, 1)}
        parents = [ROOT, *(place[path[:-1]] for path in paths)]
        self.parents = torch.tensor(parents, device=target.device)
        self.head_of = torch.tensor([len(path) - 1 for path in paths], device=target.device)
        self.rank_of = torch.tensor([path[-1] for path in paths], device=target.device)
        self.depth, self.width = max(map(len, paths)), max(map(max, paths)) + 1

    @classmethod
    def load(cls, folder: Path | str, target: Target, total_tokens: int = 0) -> Drafter:
        """The drafter of a checkpoint folder; `total_tokens` overrides its own where not 0."""
        heads, own = load_heads(folder)
        return cls(heads, target, total_tokens or own)

    @property
    def max_nodes(self) -> int:
        return len(self.parents)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        rows = torch.arange(len(roots), device=roots.device)
        self.roots, self.states = roots, scores.hidden[rows, lengths - 1]

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        heads = list(self.heads)[: self.depth]
        ranked = [head(self.states).float().topk(self.width).indices for head in heads]
        guesses = torch.stack(ranked, 1)[:, self.head_of, self.rank_of]
        tokens = torch.cat([self.roots[:, None], self.token_ids[guesses]], 1)
        return DraftTree(tokens, self.parents.repeat(len(tokens), 1))

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        rows = torch.arange(len(verdict.path), device=verdict.path.device)
        last = verdict.path[rows, verdict.num_accepted]
        self.roots, self.states = verdict.bonus, scores.hidden[rows, last]

    def select(self, rows: Tensor) -> None:
        self.roots, self.states = self.roots[rows], self.states[rows]


def check_fits(config: HeadsConfig, target: Target) -> None:
    """Raise a ValueError where the heads were made for a target of another size or vocabulary."""
    own, needed = (
        f"hidden size {sizes.hidden_size} and vocabulary {sizes.vocab_size}"
        for sizes in (config, target)
    )
    if own != needed:
        raise ValueError(
            f"these Medusa heads were made for a target with {own}, but {target.name} has {needed};"
            " train heads for this target or name the target they belong to"
        )


# --- checkpoints


def save_heads(heads: Heads, folder: Path | str, total_tokens: int) -> Path:
    """Write the heads under the release's names, bfloat16, with the size of tree they are to fill.

    A reduced vocabulary is `token_map`, the name that vLLM reads.
    """
    state, c = heads.state_dict(), heads.config
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    config = {
        "model_type": "medusa", "medusa_num_heads": c.num_heads, "medusa_num_layers": c.num_layers,
        "hidden_size": c.hidden_size, "vocab_size": c.vocab_size,
        "specrepro_tree": {"total_tokens": total_tokens},
    }  # fmt: skip
    return checkpoints.save(folder, tensors, config)


def load_heads(folder: Path | str) -> tuple[Heads, int]:
    """The heads of a checkpoint folder, loaded strictly, and the nodes of their tree.

    The tensors say how many heads and layers there are: released configs are wrong about it.
    """
    tensors, config = checkpoints.load(folder)
    num_layers = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in tensors)
    last = f"0.{max(1, num_layers)}.weight"
    if last not in tensors:
        raise ValueError(
            f"checkpoint {folder} holds no Medusa heads: {last} is missing;"
            " train them with --from-scratch or name another folder"
        )
    draft_vocab_size, hidden_size = tensors[last].shape
    num_heads = sum(name.endswith(".0.linear.weight") for name in tensors)
    vocab_size = config.get("vocab_size", draft_vocab_size)
    heads = Heads(HeadsConfig(hidden_size, vocab_size, draft_vocab_size, num_heads, num_layers))
    checkpoints.load_strictly(heads, tensors, folder)
    return heads, config.get("specrepro_tree", {}).get("total_tokens", TOTAL_TOKENS)


# --- the recipe


@dataclass(frozen=True, slots=True)
class Medusa:
    """Train Medusa-1 heads."""

    num_heads: int = 5  # the paper's, and its training configurations'
    num_layers: int = 1  # residual blocks of each head (section 2.1.1)
    draft_vocab_size: int = 0  # most frequent tokens to guess among; 0 is the paper's, all of them
    decay: float = 0.8  # head k weighs 0.8 ** k (section 2.2.1)
    total_tokens: int = TOTAL_TOKENS

    name: ClassVar[str] = "medusa"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Medusa:
        """From a section of the overrides."""
        return cls(**settings)

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> Heads:
        """Untrained heads: each guesses what the target's own head says next."""
        draft_vocab_size = min(self.draft_vocab_size or target.vocab_size, target.vocab_size)
        heads = Heads(
            HeadsConfig(
                target.hidden_size, target.vocab_size, draft_vocab_size,
                self.num_heads, self.num_layers,
            )
        ).to(target.device)  # fmt: skip
        if hasattr(heads, "token_map"):
            heads.token_map.copy_(
                corpus.most_frequent_tokens(answers, target.vocab_size, draft_vocab_size)
            )
        with torch.no_grad():
            for head in heads:
                head[-1].weight.copy_(target.head.weight[heads.draft_token_ids()])
        return heads

    def loss(self, heads: Heads, target: Target) -> HeadsLoss:
        """Cross-entropy with the answers' words."""
        return HeadsLoss(heads, self.decay)

    def drafter(self, heads: Heads, target: Target) -> Drafter:
        """The heads with the tree they are to fill."""
        return Drafter(heads, target, self.total_tokens)

    def save(self, heads: Heads, folder: Path) -> Path:
        """The release's names as safetensors; config.json also has the size of the tree."""
        return save_heads(heads, folder, self.total_tokens)


def drafters(
    checkpoint: Path | str = CHECKPOINT, total_tokens: int = 0
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of this paper's drafter; `total_tokens` overrides the checkpoint's where not 0."""
    return {"Medusa": lambda target: Drafter.load(checkpoint, target, total_tokens)}


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, Medusa)
