"""EAGLE-3: a one-layer draft head on fused target features, trained by testing itself.

arXiv:2503.01840.

Implemented: the head (section 3.1), training-time test (3.2), dynamic draft trees (EAGLE-2's,
appendix A), Table 1's measures at temperature 0 and 1; Table 2's ablations, acceptance by depth,
data scaling and throughput against batch size, by `eagle3_lab`.
Not reproduced here: the paper's targets and GPUs at any tier below `paper`; serving tables 3 to 5.
Departs from the paper:
- no second linear layer 2H -> H before the decoder layer: no released checkpoint has it, q, k and v
  absorb it;
- the head of Table 2's second row, which reads the final state alone, keeps a linear layer before
  the decoder layer, H -> H instead of 3H -> H;
- learning rates go down in a cosine, and training prompts and answers have at most 256 tokens each,
  of ShareGPT and the target's own (paper: of 2048, and UltraChat too);
- a batch is as many sequences of like length as fit, and its loss a mean over all of its places, so
  that long answers weigh more; the reference takes the mean of each sequence, one at a time;
- the loss mask is aligned with the row that decoding starts from (`reference_mask=True` restores
  the released trainer's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro import checkpoints, commands, corpus, recipes
from specrepro.draft_layer import (
    DraftLayer,
    LayerConfig,
    RMSNorm,
    check_fits,
    joined,
    rotate,
    sizes_of,
)
from specrepro.draft_training import soft_cross_entropy
from specrepro.draft_tree import DraftTree, Growth, keep_best
from specrepro.packed_linear import pack
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict, packed_attention

CHECKPOINT = recipes.COMMITTED / "eagle3"
RELEASED_FIELDS = {  # what the released config.json says of every head
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadConfig(LayerConfig):
    """Sizes of EAGLE-3's head, and what it reads of the target."""

    draft_vocab_size: int = 32000  # released Llama-3 heads
    target_hidden_size: int | None = None  # where it differs, the head has an embedding of its own
    features: str | None = None  # three taps fused; "final": the final state alone (Table 2)

    def __post_init__(self) -> None:
        if self.features not in (None, "final"):
            raise ValueError(
                f"unknown features {self.features!r}; choose final, or none for the fused taps"
            )

    @property
    def state_size(self) -> int:
        return self.target_hidden_size or self.hidden_size

    @property
    def has_own_embedding(self) -> bool:
        """As the released head of Llama-3.3-70B has: the target's is too wide for it."""
        return self.state_size != self.hidden_size


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Dynamic draft trees (appendix A: eight levels deep, 60 nodes for the 8B target)."""

    depth: int = 7  # expansions after the first level, so 8 levels
    top_k: int = 10  # nodes expanded per level and children kept per node
    total_tokens: int = 60  # nodes sent to the target, the root included

    def __post_init__(self) -> None:
        if self.depth < 0 or self.top_k < 1 or self.total_tokens < 2:
            raise ValueError(
                f"a draft tree needs depth >= 0, top_k >= 1 and total_tokens >= 2, not {self}"
            )

    @property
    def num_expanded(self) -> int:
        """Nodes that the head runs on."""
        return self.depth * self.top_k

    @property
    def num_pooled(self) -> int:
        """Nodes that there are to choose from, the root included: the most that such a tree has."""
        return 1 + self.top_k + self.num_expanded * self.top_k

    def choose(self, level: int, scores: Tensor) -> Tensor:
        """(B, top_k) places to expand among a level's candidates, given their `scores` (B, n)."""
        if level == 0:  # the root's own children, best first already
            return torch.arange(self.top_k, device=scores.device).expand_as(scores)
        return scores.topk(self.top_k, 1).indices

    def prune(self, growth: Growth) -> DraftTree:
        """Re-rank the whole pool (appendix A)."""
        return keep_best(*growth.pool(), self.total_tokens)[0]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Training-time test (section 3.2; what the paper does not state is the released trainer's)."""

    steps: int = 5  # unrolled steps (section 4, implementation); 1 is training without the test
    step_decay: float = 0.8  # weight of step j is 0.8 ** j (released trainer)
    reference_mask: bool = False  # the released trainer's, which misses the first answer row
    lm_head_init: str = "random"  # or "target": start from the target's own head

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.step_decay >= 0:
            raise ValueError(f"training wants steps >= 1 and step_decay >= 0, not {self}")


# --- the equations


def supervised_rows(is_answer: Tensor, step: int, reference_mask: bool = False) -> Tensor:
    """(b, n) bool: rows trained at this step, from the answer tokens `is_answer` (b, n).

    Row i at step j reads token i+1+j and predicts token i+2+j: both must lie in the answer. The
    reference mask asks it of token i+j instead, so it misses the row that decoding starts from and
    trains one that points past the end.
    """
    if reference_mask:
        return shift_left(is_answer, step)
    return shift_left(is_answer, step + 1) & shift_left(is_answer, step + 2)


def shift_left(x: Tensor, by: int) -> Tensor:
    """Drop the first `by` columns of x (b, n, ...) and pad zeros at the end."""
    shifted = torch.zeros_like(x)
    if by < x.shape[1]:
        shifted[:, : x.shape[1] - by] = x[:, by:]
    return shifted


def test_time_attention(
    q: Tensor,  # (b, m, Hq, D)  queries of step j at the trained rows
    first_k: Tensor,  # (b, n, Hkv, D)  step-0 keys of every row
    first_v: Tensor,
    own_k: Sequence[Tensor],  # steps 1..j, each (b, m, Hkv, D): keys of the very same rows
    own_v: Sequence[Tensor],
    rows: Tensor,  # (b, m)  which of the n rows the m are
) -> Tensor:
    """Attention of training-time test (Fig. 6): step-0 keys up to the row, its own of later steps.

    The causal block never shrinks with the step, and nothing else is visible: what a decode-time
    chain from row i sees.
    """
    b, m, Hq, D = q.shape
    n, Hkv = first_k.shape[1], first_k.shape[2]
    q = q.view(b, m, Hkv, Hq // Hkv, D) * D**-0.5
    scores = torch.einsum("bmhgd,bnhd->bhgmn", q, first_k).float()
    is_future = torch.arange(n, device=q.device) > rows[:, :, None]
    scores = scores.masked_fill(is_future[:, None, None], -torch.inf)
    own = [torch.einsum("bmhgd,bmhd->bhgm", q, k).float()[..., None] for k in own_k]
    weights = torch.cat([scores, *own], -1).softmax(-1).to(q.dtype)
    out = torch.einsum("bhgmn,bnhd->bmhgd", weights[..., :n], first_v)
    for step, v in enumerate(own_v):
        out = out + weights[..., n + step].permute(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return out.reshape(b, m, Hq, D)


# --- the head


class MixingLayer(DraftLayer):
    """The decoder layer of Fig. 5: embedding and feature in, feature out."""

    def __init__(self, config: HeadConfig):
        super().__init__(config, 2 * config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # on the embedding
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # on the feature

    def mixed_input(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(..., 2H): the normed embedding first, the normed feature second."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(features)], -1)


class DraftHead(nn.Module):
    """Everything that is trained; the embedding is the target's and stays frozen.

    Parameter names are those of the released checkpoints.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        if config.has_own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        H, num_states = config.hidden_size, 1 if config.features == "final" else 3
        self.fc = nn.Linear(num_states * config.state_size, H, bias=False)
        self.midlayer = MixingLayer(config)
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size != config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """Draft over the tokens `token_ids` (draft_vocab_size,), ascending; `d2t` holds offsets."""
        assert len(token_ids) == self.config.draft_vocab_size, "one target token per draft token"
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()[token_ids] = True

    def draft_token_ids(self) -> Tensor:
        """(draft_vocab_size,) target ids of the draft vocabulary."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
        return ids + self.d2t if hasattr(self, "d2t") else ids

    @property
    def layer(self) -> DraftLayer:
        return self.midlayer

    def read(self, seen: Scores | corpus.Batch) -> Tensor:
        """What the head takes of the target's states (B, n, ...), before `fuse`."""
        return seen.hidden if self.config.features == "final" else seen.taps

    def fuse(self, states: Tensor) -> Tensor:
        """Features (..., H) of what `read` took."""
        return self.fc(states)

    def layer_input(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the layer's projections, and its residual, which is the un-normed feature."""
        return self.midlayer.mixed_input(embeddings, features), features

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits over the draft vocabulary."""
        return self.lm_head(self.norm(features))


def embedding_of(head: nn.Module, target: Target) -> Tensor:
    """(V, H) the target's word embedding, unless the head has one of its own."""
    own = getattr(head, "embed_tokens", None)
    return (own or target.model.get_input_embeddings()).weight


def head_config(target: Target, draft_vocab_size: int, features: str | None = None) -> HeadConfig:
    """A head whose layer is shaped like one of the target's."""
    draft_vocab_size = min(draft_vocab_size, target.vocab_size)
    return HeadConfig(**sizes_of(target), draft_vocab_size=draft_vocab_size, features=features)


# --- training-time test


class TrainingTimeTest:
    """The loss of section 3.2: unroll the head on its own features, score every step."""

    def __init__(self, head: DraftHead, target: Target, config: TrainingConfig):
        self.head, self.config, self.final_logits = head, config, target.final_logits
        self.embedding = embedding_of(head, target)
        ids, bias = head.draft_token_ids(), target.head.bias
        self.teacher_weight = target.head.weight[ids]  # (Vd, H)
        self.teacher_bias = None if bias is None else bias[ids]
        self.is_drafted = torch.zeros(head.config.vocab_size, dtype=torch.bool, device=ids.device)
        self.is_drafted[ids] = True

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """Sum over steps of decay ** step times its loss, a mean over all rows, masked ones
        included.
        """
        masks = [
            supervised_rows(batch.is_answer, j, self.config.reference_mask)
            for j in range(self.config.steps)
        ]
        trained = torch.stack(masks).any(0)
        rows, is_row = rows_of_mask(trained)
        teacher, place = self._teacher(batch)
        features = self.head.fuse(self.head.read(batch))
        chain = unroll(self.head, self.embedding, batch.tokens, features, rows, self.config.steps)
        total, agreement = 0.0, []
        for step, features in enumerate(chain):
            is_scored = is_row & masks[step].gather(1, rows)
            seen = (rows + 1 + step).clamp_max(batch.tokens.shape[1] - 1)
            is_scored &= self.is_drafted[batch.choices.gather(1, seen)]
            states = self.head.norm(features[is_scored])
            loss, agrees = soft_cross_entropy(
                states, self.head.lm_head.weight, teacher, place.gather(1, seen)[is_scored]
            )
            total = total + self.config.step_decay**step * loss / batch.tokens.numel()
            agreement.append(
                torch.zeros_like(rows, dtype=torch.float).masked_scatter(is_scored, agrees)
            )
        return total, _describe(agreement, masks[0].gather(1, rows) & is_row)

    def _teacher(self, batch: corpus.Batch) -> tuple[Tensor, Tensor]:
        """Target logits (M, Vd) at every answer position, and where each position's are (b, n)."""
        is_read = batch.is_answer.clone()
        if self.config.reference_mask:  # which reads one position past the answer
            is_read[:, 1:] |= batch.is_answer[:, :-1]
        place = (is_read.flatten().cumsum(0) - 1).clamp_min(0).view_as(is_read)
        states = batch.hidden[is_read].to(self.teacher_weight.dtype)
        return self.final_logits(F.linear(states, self.teacher_weight, self.teacher_bias)), place


def unroll(
    head: nn.Module,
    embedding: Tensor,  # (V, H)
    tokens: Tensor,  # (b, n)
    features: Tensor,  # (b, n, H)  of the target's states, paired with the token after each
    rows: Tensor,  # (b, m)  which of the n rows are trained
    steps: int,
    path: Tensor | None = None,  # (b, m, steps)  words to follow from the rows, not the data's
) -> Iterator[Tensor]:
    """Features (b, m, H) of the trained rows by step; the words are the data's, or the `path`'s."""
    layer = head.layer
    following = F.embedding(shift_left(tokens, 1), embedding)
    x, residual = head.layer_input(following, features)
    everywhere = layer.rotary(torch.arange(x.shape[1], device=x.device))
    first_k, first_v = layer.keys_values(x, everywhere)
    x, residual = (t.take_along_dim(rows[:, :, None], 1) for t in (x, residual))
    own_k, own_v = [], []
    for step in range(steps):
        rotary = layer.rotary(rows + step)
        if step:
            data = shift_left(tokens, 1 + step).gather(1, rows)
            words = data if path is None else path[..., step - 1]
            x, residual = head.layer_input(F.embedding(words, embedding), features)
            k, v = layer.keys_values(x, rotary)
            own_k.append(k), own_v.append(v)
        attended = test_time_attention(
            layer.queries(x, rotary), first_k, first_v, own_k, own_v, rows
        )
        features = layer.finish(residual, attended.flatten(2))
        yield features


def rows_of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (b, m) where each row of `mask` (b, n) is True, padded with 0, and which are real."""
    counts = mask.sum(1)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : max(int(counts.max()), 1)]
    is_real = torch.arange(order.shape[1], device=mask.device) < counts[:, None]
    return order.masked_fill(~is_real, 0), is_real


def _describe(agreement: list[Tensor], is_start: Tensor) -> dict[str, float]:
    """Top-1 agreement by step and the tau of a greedy chain, over rows decoding starts from."""
    chain = torch.stack(agreement).cumprod(0)[:, is_start].mean(1)
    names = [f"agreement_{step}" for step in range(len(agreement))]
    means = [agrees[is_start].mean().item() for agrees in agreement]
    return dict(zip(names, means, strict=True)) | {"simulated_tau": 1 + chain.sum().item()}


# --- drafting


class Drafter:
    """Grows a draft tree level by level and keeps its most probable nodes, as EAGLE-2 does.

    Serves any head of one layer that goes on from its own features; `tree` says which candidates
    of a level to expand and which of all to keep.
    """

    def __init__(self, head: nn.Module, target: Target, tree: TreeConfig | None = None):
        check_fits(head.config, target)
        self.head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding = embedding_of(self.head, target)
        self.token_ids = head.draft_token_ids()
        self.tree = tree or TreeConfig()
        attention, mlp = head.layer.self_attn, head.layer.mlp
        # a few rows through two large products take less time than through five smaller ones
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        for module in (self.head, self.qkv, self.gate_up):
            pack(module)

    @classmethod
    def load(cls, folder: Path | str, target: Target, tree: TreeConfig | None = None) -> Drafter:
        """The drafter of a checkpoint folder, with its own tree unless another is given."""
        head, own_tree = load_head(folder)
        return cls(head, target, tree or own_tree)

    @property
    def max_nodes(self) -> int:
        return self.tree.total_tokens

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits over the draft vocabulary."""
        return self.head.logits(features)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        """Row i pairs the states of token i with the token after it, the last prompt token with the
        root.
        """
        B, n = prompts.shape
        following = torch.cat([prompts[:, 1:], roots[:, None]], 1)
        following[torch.arange(B, device=roots.device), lengths - 1] = roots
        self.roots, self.pending = roots, [(following, self.head.read(scores), lengths)]
        # rows in the draft cache, all from target features
        self.lengths = torch.zeros_like(lengths)
        self._allocate(B, n + 64)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        """Queue the verified states; drafted rows, made from the head's own, are forgotten.

        A round that another drafter drafted is observed alike, and `propose` left out.
        """
        rows = torch.arange(len(verdict.path), device=verdict.path.device)[:, None]
        verified = self.head.read(scores)[rows, verdict.path.clamp_min(0)]
        self.roots = verdict.bonus
        self.pending.append((verdict.tokens.clamp_min(0), verified, verdict.num_accepted + 1))

    def select(self, rows: Tensor) -> None:
        self.roots, self.lengths = self.roots[rows], self.lengths[rows]
        self.cache = self.cache[:, rows]
        self.pending = [tuple(part[rows] for part in one) for one in self.pending]

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        return self._grow(self._extend())

    def _extend(self) -> Tensor:
        """Take in what is pending; the last row's feature (B, H).

        Round by round, so that a head that sat out some draws the same bits as one that did not.
        """
        for rows in self.pending:
            last = self._take_in(*rows)
        self.pending = []
        return last

    def _take_in(self, tokens: Tensor, states: Tensor, counts: Tensor) -> Tensor:
        """Run rows through the head and keep their keys; the last row's feature (B, H)."""
        num_rows, device = tokens.shape[1], tokens.device
        self._reserve(num_rows)
        positions = self.lengths[:, None] + torch.arange(num_rows, device=device)
        slots = torch.arange(self.longest + num_rows, device=device)
        # a row past a sequence's count computes something that is never read
        mask = slots <= positions[:, :, None]
        out = self._layer(tokens, self.head.fuse(states), positions, positions, mask)
        self.lengths = self.lengths + counts
        return out[torch.arange(len(tokens), device=device), counts - 1]

    def _grow(self, last: Tensor) -> DraftTree:
        """Expand some nodes of each level, then keep some of the whole pool."""
        self._reserve(self.tree.num_expanded)
        growth, features = Growth(self.roots), last[:, None]
        growth.branch(*self._children(features))
        for level, came_from in growth.descents(self.tree):
            features = features.take_along_dim(came_from[:, :, None], 1)
            features = self._expand(growth.tokens, features, growth.ancestors, level)
            growth.branch(*self._children(features))
        return self.tree.prune(growth)

    def _expand(self, tokens: Tensor, features: Tensor, ancestors: Tensor, level: int) -> Tensor:
        """One more level: the frontier's features (B, f, H).

        Their keys go behind the longest sequence's, after those of the levels before.
        """
        f, num_slots = tokens.shape[1], self.longest + ancestors.shape[2]
        is_prefix = torch.arange(self.longest, device=tokens.device) < self.lengths[:, None]
        mask = torch.cat([is_prefix[:, None].expand(-1, f, -1), ancestors], -1)
        slots = torch.arange(num_slots - f, num_slots, device=tokens.device)
        positions = (self.lengths + level)[:, None]
        return self._layer(tokens, features, positions, slots.expand_as(tokens), mask)

    def _layer(
        self, tokens: Tensor, features: Tensor, positions: Tensor, slots: Tensor, mask: Tensor
    ) -> Tensor:
        """Features (B, f, H) of rows whose keys go to `slots` (B, f) and that see `mask`."""
        x, residual = self.head.layer_input(F.embedding(tokens, self.embedding), features)
        q, k, v = self._project(x, positions)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.cache[:, rows, slots] = torch.stack([k, v])
        attended = packed_attention(q, *self.cache[:, :, : mask.shape[-1]], mask)
        return self.head.layer.finish(residual, attended.flatten(2), self._mlp)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, f, Hq, D) and keys, and values (B, f, Hkv, D)."""
        c = self.head.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim))
        q_k, v = heads.tensor_split([-c.num_key_value_heads], -2)
        q_k = rotate(q_k, *(table[positions] for table in self.rotary))
        return *q_k.tensor_split([c.num_attention_heads], -2), v

    def _mlp(self, x: Tensor) -> Tensor:
        return self.head.layer.mlp.gated(*self.gate_up(x).chunk(2, -1))

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities at temperature 1 and target ids (B, n, top_k) of the best children."""
        log_probs = self.logits(features).float().log_softmax(-1)
        best = log_probs.topk(self.tree.top_k, -1)
        return best.values, self.token_ids[best.indices]

    def _allocate(self, batch: int, capacity: int) -> None:
        """An empty cache (2, batch, capacity, Hkv, D), and the rotary table of its positions."""
        c, like = self.head.config, self.qkv.weight
        self.cache = like.new_zeros(2, batch, capacity, c.num_key_value_heads, c.head_dim)
        table = self.head.layer.rotary(torch.arange(capacity, device=like.device))
        self.rotary = tuple(part.to(like.dtype) for part in table)

    def _reserve(self, num_slots: int) -> None:
        """Double the cache where `num_slots` more rows would not fit."""
        self.longest, before = int(self.lengths.max()), self.cache
        if (needed := self.longest + num_slots) > before.shape[2]:
            self._allocate(before.shape[1], max(needed, 2 * before.shape[2]))
            self.cache[:, :, : before.shape[2]] = before


# --- checkpoints


def save_head(head: nn.Module, folder: Path | str, tree: TreeConfig | None = None) -> Path:
    """Write the head in the released layout, bfloat16, with the `tree` it is to draft."""
    state = head.state_dict()
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    sizes = {name: value for name, value in asdict(head.config).items() if value is not None}
    config = RELEASED_FIELDS | sizes | ({"specrepro_tree": asdict(tree)} if tree else {})
    return checkpoints.save(folder, tensors, config)


def load_head(folder: Path | str) -> tuple[DraftHead, TreeConfig]:
    """The head of a checkpoint folder, loaded strictly, and its tree (the paper's if it names
    none).
    """
    tensors, config = load_parts(folder, "midlayer", "EAGLE-3")
    whole = {"draft_vocab_size": config.get("vocab_size")}
    head = DraftHead(read_config(HeadConfig, whole | config, folder))
    if "draft_vocab_size" in config and "d2t" not in tensors and hasattr(head, "d2t"):
        raise ValueError(f"checkpoint {folder} drafts over a reduced vocabulary but has no d2t")
    checkpoints.load_strictly(head, tensors, folder)
    if hasattr(head, "d2t"):
        checkpoints.require_one_vocabulary(head.d2t, head.t2d, folder)
    return head, checkpoints.tree_of(config, TreeConfig(), folder)


def load_parts(
    folder: Path | str, layer: str, paper: str
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and config of a checkpoint; a ValueError where it has no `layer`, so is not the
    `paper`'s.
    """
    tensors, config = checkpoints.load(folder)
    if not any(name.startswith(f"{layer}.") for name in tensors):
        raise ValueError(
            f"checkpoint {folder} is not an {paper} head: nothing in it is named {layer}.*;"
            f" its tensors are {', '.join(sorted(tensors)[:3])}, ..."
        )
    return tensors, config


def read_config(
    kind: type[LayerConfig], config: dict[str, object], folder: Path | str
) -> LayerConfig:
    """A head's sizes from a released config.json; what it leaves out is as in the released code."""
    names = {field.name for field in fields(kind)}
    checkpoints.require_plain(config, names, folder)
    known = {name: value for name, value in config.items() if name in names}
    derived = {"head_dim", "num_key_value_heads"}
    required = {field.name for field in fields(kind) if field.default is MISSING} - derived
    if missing := sorted(required - known.keys()):
        raise ValueError(f"config.json of checkpoint {folder} lacks {', '.join(missing)}")
    known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    return kind(**known)


# --- training


@dataclass(frozen=True, slots=True)
class Eagle3:
    """Train an EAGLE-3 head."""

    draft_vocab_size: int = 32000
    tree: TreeConfig = field(default_factory=TreeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    features: str | None = None  # "final": the final state alone, Table 2's second row

    name: ClassVar[str] = "eagle3"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Eagle3:
        """From a section of the overrides."""
        tree, training = TreeConfig(**settings["tree"]), TrainingConfig(**settings["training"])
        return cls(**settings | {"tree": tree, "training": training})

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> DraftHead:
        """An untrained head over the most frequent answer tokens."""
        config = head_config(target, self.draft_vocab_size, self.features)
        return new_head(target, answers, config, self.training.lm_head_init)

    def loss(self, head: DraftHead, target: Target) -> TrainingTimeTest:
        """Training-time test on the target's features."""
        return TrainingTimeTest(head, target, self.training)

    def drafter(self, head: DraftHead, target: Target) -> Drafter:
        """The head with the tree it is to draft."""
        return Drafter(head, target, self.tree)

    def save(self, head: DraftHead, folder: Path) -> Path:
        """The released layout; config.json also names the tree."""
        return save_head(head, folder, self.tree)


def new_head(
    target: Target, answers: Sequence[corpus.Answer], config: HeadConfig, lm_head_init: str
) -> DraftHead:
    """An untrained head over the most frequent answer tokens."""
    head = DraftHead(config).to(target.device)
    if hasattr(head, "d2t"):
        ids = corpus.most_frequent_tokens(answers, target.vocab_size, config.draft_vocab_size)
        head.set_vocabulary(ids.to(target.device))
    if lm_head_init == "target":
        with torch.no_grad():
            head.lm_head.weight.copy_(target.head.weight[head.draft_token_ids()])
            head.norm.weight.copy_(target.decoder.norm.weight)
    elif lm_head_init != "random":
        raise ValueError(f"unknown lm_head_init {lm_head_init!r}; choose random or target")
    return head


def chain_like(tree: TreeConfig) -> TreeConfig:
    """A chain as deep as `tree`, or long enough to see acceptance by depth."""
    depth = max(tree.depth, 4)
    return TreeConfig(depth, top_k=1, total_tokens=depth + 2)


def drafters(
    checkpoint: Path | str = CHECKPOINT, **tree: int
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of this paper's drafters; `tree` overrides a checkpoint's sizes where not 0."""
    changed = {name: value for name, value in tree.items() if value}

    def dynamic(target: Target) -> Drafter:
        head, own = load_head(checkpoint)
        return Drafter(head, target, replace(own, **changed))

    def chain(target: Target) -> Drafter:
        head, own = load_head(checkpoint)
        return Drafter(head, target, chain_like(replace(own, **changed)))

    return {"EAGLE-3": dynamic, "EAGLE-3 chain": chain}


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, Eagle3)
