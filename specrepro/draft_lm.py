"""Speculative sampling with a small language model of the target's vocabulary as the drafter.

arXiv:2211.17192 (speculative decoding) and arXiv:2302.01318 (speculative sampling); the row SpS of
EAGLE-3's Table 1.

Reproduced: a chain of the small model's most probable tokens, verified in one target pass.
Not reproduced: drafts sampled from the small model and accepted with min(1, p/q) at temperature
above 0. The loop hands a drafter neither its draws nor a place for its probabilities, so drafts are
greedy at every temperature and verification is the exact one that every drafter shares: the output
keeps its distribution, but tau above temperature 0 is another than the papers'. Never run on a GPU.
Departs from the papers:
- the small model is a two-layer Llama of the shape of vicuna-68m (narrower for the embedded target,
  see embedded.yaml), made for this target: its one table of words, for input and output, starts as
  the best approximation of the target's output head of that width, because a small corpus would
  teach few of them from nothing, and is then trained;
- it is distilled from the target's distribution over the target's own answers, as every drafter
  here, where the papers take a model that was trained without the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from specrepro import checkpoints, commands, corpus, recipes
from specrepro.decoding import most_probable
from specrepro.draft_training import soft_cross_entropy
from specrepro.draft_tree import DraftTree
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

CHECKPOINT = recipes.COMMITTED / "draft_lm"
NUM_DRAFTED = 4  # of each chain: gamma, or K; the papers choose it by measuring
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_tau(agreement: float, num_drafted: int) -> float:
    """Tokens a round where each drafted token is accepted alike (2211.17192, equation 1)."""
    return sum(agreement**n for n in range(num_drafted + 1))


def narrowed(words: Tensor, width: int) -> Tensor:
    """The table of words (V, width) whose inner products are closest to those of `words` (V, H)."""
    words = words.float()
    directions = torch.linalg.eigh(words.T @ words).eigenvectors
    return words @ directions[:, -width:]


# --- training


class TargetLogits:
    """The target's logits of states (M, H), computed for the rows that are asked for.

    Of a large vocabulary not all rows fit beside each other.
    """

    def __init__(self, target: Target, states: Tensor):
        self.target, self.states, self.dtype = target, states, states.dtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.target.logits(self.states[rows])


class Distillation:
    """Cross-entropy with the target's distribution: its KL divergence up to a constant."""

    def __init__(self, model: PreTrainedModel, target: Target, num_drafted: int):
        self.model, self.target, self.num_drafted = model, target, num_drafted

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """A mean over the rows whose next token is the answer's."""
        is_row = F.pad(batch.is_answer[:, 1:], (0, 1))
        output = self.model.get_decoder()(input_ids=batch.tokens, use_cache=False)
        states = output.last_hidden_state[is_row]
        teacher = TargetLogits(self.target, batch.hidden[is_row])
        rows = torch.arange(len(states), device=states.device)
        weight = self.model.get_output_embeddings().weight
        loss, agrees = soft_cross_entropy(states, weight, teacher, rows)
        agreement = agrees.sum().item() / max(1, len(rows))
        tau = expected_tau(agreement, self.num_drafted)
        return loss / max(1, len(rows)), {"agreement": agreement, "expected_tau": tau}


# --- drafting


class Drafter:
    """Drafts a chain with a causal language model that keeps a cache of its own.

    A key depends on the tokens before it alone, so those of accepted drafts stay.
    """

    def __init__(self, model: PreTrainedModel, target: Target, num_drafted: int = NUM_DRAFTED):
        if num_drafted < 1:
            raise ValueError(f"num_drafted is {num_drafted}; a chain drafts at least 1 token")
        self.model = Target(model.to(target.device, target.dtype), None, "draft model")
        if self.model.vocab_size != target.vocab_size:
            raise ValueError(
                f"this draft model has a vocabulary of {self.model.vocab_size} tokens, but"
                f" {target.name} has {target.vocab_size}; train one for this target or name the"
                " target it belongs to"
            )
        self.num_drafted = num_drafted

    @classmethod
    def load(cls, folder: Path | str, target: Target, num_drafted: int = 0) -> Drafter:
        """The drafter of a checkpoint folder; `num_drafted` overrides its own where not 0."""
        model, own = load_model(folder)
        return cls(model, target, num_drafted or own)

    @property
    def max_nodes(self) -> int:
        return self.num_drafted + 1

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        read = [prompt[:length] for prompt, length in zip(prompts, lengths.tolist(), strict=True)]
        self.cache, _ = self.model.prefill(read, prompts.shape[1] + 64)
        self.roots, self.pending = roots, (roots[:, None], torch.ones_like(roots))

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        self.model.reserve(self.cache, 2 + self.num_drafted)
        drafted = [self._next(*self.pending)]
        committed = self.cache.lengths
        while len(drafted) < self.num_drafted:
            drafted.append(self._next(drafted[-1][:, None], torch.ones_like(self.roots)))
        self.cache.lengths = committed
        return DraftTree.chain(torch.stack([self.roots, *drafted], 1))

    def _next(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Read `counts` (B,) of `tokens` (B, n) behind the cache; the tokens (B,) to follow."""
        scores = self.model.verify(self.cache, DraftTree.chain(tokens, counts))
        self.cache.lengths = self.cache.lengths + counts
        rows = torch.arange(len(tokens), device=tokens.device)
        return most_probable(scores.logits[rows, counts - 1])

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        """Keep the keys of what was accepted; the chain's last token has none yet."""
        num_kept = verdict.num_accepted.clamp_max(self.num_drafted - 1)
        counts = verdict.num_accepted + 1 - num_kept
        places = num_kept[:, None] + torch.arange(int(counts.max()), device=counts.device)
        unread = verdict.tokens.gather(1, places).clamp_min(0)
        self.cache.lengths = self.cache.lengths + num_kept
        self.roots, self.pending = verdict.bonus, (unread, counts)

    def select(self, rows: Tensor) -> None:
        self.cache, self.roots = self.cache.select(rows), self.roots[rows]
        self.pending = tuple(part[rows] for part in self.pending)


# --- checkpoints


def save_model(model: PreTrainedModel, folder: Path | str, num_drafted: int) -> Path:
    """Write the model as transformers reads it, bfloat16, with the length of chain to draft."""
    is_tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.bfloat16()
        for name, tensor in model.state_dict().items()
        if not (is_tied and name == HEAD)
    }
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return checkpoints.save(folder, tensors, config | {"specrepro_num_drafted": num_drafted})


def load_model(folder: Path | str) -> tuple[PreTrainedModel, int]:
    """The model of a checkpoint folder, loaded strictly, and the length of its chains."""
    tensors, config = checkpoints.load(folder)
    needed = ("model_type", "hidden_size", "num_hidden_layers", WORDS)
    missing = [name for name in needed if name not in config and name not in tensors]
    if missing:
        raise ValueError(
            f"checkpoint {folder} holds no language model: it lacks {', '.join(missing)};"
            " train one with --from-scratch or name another folder"
        )
    num_drafted = config.pop("specrepro_num_drafted", NUM_DRAFTED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tied = [HEAD] if model.config.tie_word_embeddings else []
    checkpoints.load_strictly(model, tensors, folder, optional=tied)
    return model, num_drafted


# --- the recipe


@dataclass(frozen=True, slots=True)
class DraftLM:
    """Distil a small language model to draft with."""

    hidden_size: int = 768  # the sizes of vicuna-68m, which drafts for Vicuna in Table 1's SpS
    intermediate_size: int = 3072
    num_hidden_layers: int = 2
    num_attention_heads: int = 12
    num_drafted: int = NUM_DRAFTED

    name: ClassVar[str] = "draft_lm"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> DraftLM:
        """From a section of the overrides."""
        return cls(**settings)

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> LlamaForCausalLM:
        """An untrained model with the target's words, narrowed to its own width."""
        if self.hidden_size > target.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size} but {target.name} has {target.hidden_size};"
                " a draft model is no wider than its target"
            )
        config = LlamaConfig(
            vocab_size=target.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=target.max_context,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).to(target.device)
        with torch.no_grad():
            words = narrowed(target.head.weight, self.hidden_size)
            model.get_input_embeddings().weight.copy_(words)
        return model

    def loss(self, model: LlamaForCausalLM, target: Target) -> Distillation:
        """Distillation over the answers."""
        return Distillation(model, target, self.num_drafted)

    def drafter(self, model: LlamaForCausalLM, target: Target) -> Drafter:
        """The model with the length of the chain it is to draft."""
        return Drafter(model, target, self.num_drafted)

    def save(self, model: LlamaForCausalLM, folder: Path) -> Path:
        """As transformers reads it; config.json also has the length of the chain."""
        return save_model(model, folder, self.num_drafted)


def drafters(
    checkpoint: Path | str = CHECKPOINT, num_drafted: int = 0
) -> dict[str, Callable[[Target], Drafter]]:
    """Loaders of this drafter; `num_drafted` overrides the checkpoint's where not 0."""
    return {"SpS": lambda target: Drafter.load(checkpoint, target, num_drafted)}


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, DraftLM)
