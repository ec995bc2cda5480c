"""The frozen target: a transformers causal LM, unforked, scoring draft trees against its own cache.

The model stays the transformers object; only its attention function is ours, registered with
`AttentionInterface`, so a pass over a tree is the model's own forward with explicit positions.
Hidden-state taps are read on entry to the layers that EAGLE-3 names, in the same pass.

Not covered: encoder-decoder models, multimodal inputs, attention sinks, and models whose layers
keep a recurrent state instead of keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from specrepro import assets, paper_tier
from specrepro.draft_tree import DraftTree
from specrepro.packed_linear import pack
from specrepro.tree_verify import (
    PackedTree,
    Verdict,
    attention_mask,
    attention_takes_kernels,
    keep_accepted,
    packed_attention,
    store_tree,
    tree_attention,
)
from specrepro.tree_verify import pack as pack_tree
from specrepro.verify_checks import may_read_back, refuse_lengths

EMBEDDED = "smollm2"
ATTENTION = "specrepro_tree"


@dataclass(slots=True)
class KVCache:
    """Preallocated keys and values of every layer with a length per sequence."""

    slots: Tensor  # (layers, 2, B, S, Hkv, D)
    lengths: Tensor  # (B,) committed tokens

    @property
    def capacity(self) -> int:
        return self.slots.shape[3]

    def select(self, rows: Tensor) -> KVCache:
        """The sequences `rows` alone; in place, so only the rows that change place are copied."""
        is_moved = rows != torch.arange(len(rows), device=rows.device)
        self.slots[:, :, is_moved.nonzero()[:, 0]] = self.slots[:, :, rows[is_moved]]
        return KVCache(self.slots[:, :, : len(rows)], self.lengths[rows])


@dataclass(slots=True)
class Scores:
    """The target's view of each tree node."""

    logits: Tensor  # (B, N, V) next-token logits
    taps: Tensor  # (B, N, 3H) residual stream on entry to the low, middle and high tap layer
    hidden: Tensor  # (B, N, H) final state after the last norm


@dataclass(slots=True)
class _Pass:
    """What the layers need to know about the pass that they are in, and what they tell of it."""

    cache: KVCache | None
    tree: DraftTree
    masks: dict[int | None, Tensor]  # by sliding window
    is_prefill: bool
    packed: PackedTree | None = None  # the kernels take it in place of a mask
    taps: dict[int, Tensor] = field(default_factory=dict)  # residual stream by layer
    memory: Tensor | None = None  # all that the cache's storage holds, in one dimension
    layout: Tensor | None = None  # (2, 6) on the CPU: sizes and strides of the cache's slots in it

    def __post_init__(self) -> None:
        if self.cache is not None:
            slots = self.cache.slots
            size = slots.untyped_storage().nbytes() // slots.itemsize
            self.memory = slots.as_strided((size,), (1,), 0)
            self.layout = torch.tensor([slots.shape, slots.stride()])

    @classmethod
    def over_tree(cls, cache: KVCache, tree: DraftTree, windows: set[int | None]) -> _Pass:
        """Verify `tree` behind `cache`: what all layers share is checked and made here, once."""
        if may_read_back(cache.lengths):
            refuse_lengths(cache.lengths, tree.tokens.shape[1], cache.capacity)
        if attention_takes_kernels(cache.slots):
            return cls(cache, tree, {}, is_prefill=False, packed=pack_tree(tree))
        tree_pass = cls(cache, tree, {}, is_prefill=False)
        for window in windows:
            tree_pass.mask(window)
        return tree_pass

    def mask(self, window: int | None) -> Tensor | None:
        N = self.tree.tokens.shape[1]
        if self.is_prefill and (window is None or N <= window):
            return None
        if window not in self.masks:
            if self.is_prefill:
                self.masks[window] = _banded_causal(self.tree.tokens, window)
            else:
                self.masks[window] = attention_mask(
                    self.tree, self.cache.lengths, self._num_slots(), window
                )
        return self.masks[window]

    def tensors(self, window: int | None) -> tuple[Tensor | None, ...]:
        """What attention over the tree takes besides a layer's queries, keys and values."""
        tree, packed = self.tree, self.packed
        given = (self.memory, self.layout, self.cache.lengths, tree.tokens, tree.parents)
        if packed is None:
            return *given, self.mask(window), None, None, None
        return *given, None, packed.words, packed.depths, packed.num_nodes

    def _num_slots(self) -> int:
        """Slots that attention reads.

        Batched products on a CPU would first copy anything but the whole cache.
        """
        B, N = self.tree.tokens.shape
        if reads_every_slot(B, self.tree.tokens.device):
            return self.cache.capacity
        return int(self.cache.lengths.max()) + N


def reads_every_slot(batch: int, device: torch.device) -> bool:
    """Whether attention reads a cache up to its capacity, not up to its longest sequence."""
    return batch >= 4 and device.type == "cpu"


def _banded_causal(tokens: Tensor, window: int) -> Tensor:
    B, N = tokens.shape
    positions = torch.arange(N, device=tokens.device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < window)).expand(B, N, N)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_pass: _Pass | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: heads-first tensors in, (B, N, Hq, D) out."""
    keeps_window = sliding_window is None and getattr(module, "sliding_window", None)
    if tree_pass is None or s_aux is not None or keeps_window:
        raise ValueError(_unsupported(type(module).__name__, "attends in a way of its own"))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window = sliding_window or None
    options = (scaling, window, softcap)
    if not tree_pass.is_prefill:
        attend = _graph_node if torch.compiler.is_compiling() else _attend_over_tree
        return attend(q, k, v, *tree_pass.tensors(window), module.layer_idx, *options), None
    if tree_pass.cache is not None:
        store_tree(k, v, *tree_pass.cache.slots[module.layer_idx], tree_pass.cache.lengths)
    return packed_attention(q, k, v, tree_pass.mask(window), scaling, softcap), None


AttentionInterface.register(ATTENTION, _attend)


def _attend_over_tree(
    q: Tensor,  # (B, N, Hq, D)
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    layout: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    parents: Tensor,
    mask: Tensor | None,
    words: Tensor | None,
    depths: Tensor | None,
    num_nodes: Tensor | None,
    layer: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`tree_attention` in one layer, (B, N, Hq, D), of nothing but tensors and numbers."""
    tree, packed = DraftTree(tokens, parents), None
    if words is not None:
        packed = PackedTree(words, depths, num_nodes)
    options = {"scale": scale, "window": window, "softcap": softcap}
    return tree_attention(
        q,
        k,
        v,
        *memory.as_strided(*layout.tolist())[layer],
        lengths,
        tree,
        mask=mask,
        packed=packed,
        **options,
    ).contiguous()


# The node takes the whole cache, since Inductor forgets the offset of a view that a node writes to
# where sizes vary (pytorch/pytorch 198068), and its layout as data, which no graph depends on.
_graph_node = torch.library.custom_op(
    "specrepro::tree_attention", _attend_over_tree, mutates_args={"memory"}
)


@_graph_node.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


class Target:
    """A frozen causal LM with the three operations that a round needs: prefill, verify, keep."""

    def __init__(
        self, model: nn.Module, tokenizer: object | None, name: str, compile: bool = False
    ):
        """Take over `model`; raises ValueError where its layers are not plain attention layers.

        With `compile` passes over trees go through `torch.compile`, which first takes its time
        four times: for one node and for more, of one sequence and of more.
        """
        _require_attention_layers(model, name)
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.tree_decoder = (
            torch.compile(self.decoder, isolate_recompiles=True) if compile else self.decoder
        )
        self.windows = _windows(self.config)
        self.head = model.get_output_embeddings()
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.hidden_size, self.vocab_size = self.config.hidden_size, self.head.weight.shape[0]
        self.max_context = _max_context(self.config)
        self.stop_ids = torch.tensor(_stop_ids(model), dtype=torch.long, device=self.device)
        self.tap_layers = tap_layers(self.config.num_hidden_layers)
        for layer in set(self.tap_layers):
            _tap(self.decoder.layers[layer], layer)
        pack(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """What tells its weights from those of another target: a hash of some numbers of each.

        In bfloat16, so that it is the same in whatever format they were loaded.
        """
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            few = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
            digest.update(f"{name} {tuple(weight.shape)} ".encode())
            digest.update(few.bfloat16().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, drafts included."""
        num_layers, num_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden_size // num_heads
        num_kv_heads = getattr(self.config, "num_key_value_heads", None) or num_heads
        # heads before slots in memory: batched products over few rows take half the time on them
        shape = (num_layers, 2, batch, num_kv_heads, capacity, head_dim)
        slots = torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(3, 4)
        return KVCache(slots, torch.zeros(batch, dtype=torch.long, device=self.device))

    def reserve(self, cache: KVCache, num_tokens: int, spare: int = 64) -> None:
        """Give `cache` room for `num_tokens` more in every row, with `spare` when it must grow."""
        needed, before = int(cache.lengths.max()) + num_tokens, cache.slots
        if needed > cache.capacity:
            cache.slots = self.new_cache(before.shape[2], needed + spare).slots
            cache.slots[:, :, :, : before.shape[3]] = before

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Scores]:
        """Run the prompts into a new cache.

        Scores hold the last token's logits (B, 1, V) but taps and states of every token. Shorter
        prompts are padded on the right; what lies beyond their length is never read.
        """
        tokens, lengths = pad(prompts, self.device)
        cache = self.new_cache(len(prompts), capacity)
        hidden, taps = self._forward(_Pass(cache, DraftTree.chain(tokens), {}, is_prefill=True))
        cache.lengths = lengths
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1][:, None]
        return cache, Scores(self.logits(last), taps, hidden)

    @torch.inference_mode()
    def verify(self, cache: KVCache, tree: DraftTree) -> Scores:
        """Score every node of every tree in one pass; their keys wait in the cache for `keep`."""
        hidden, taps = self._forward(_Pass.over_tree(cache, tree, self.windows))
        return Scores(self.logits(hidden), taps, hidden)

    @torch.inference_mode()
    def keep(self, cache: KVCache, verdict: Verdict) -> None:
        """Commit the root and the accepted path; forget the rest of the tree."""
        cache.lengths = keep_accepted(cache.slots, verdict, cache.lengths)

    @torch.no_grad()  # not inference mode: training differentiates through what it returns
    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (B, N, 3H) and final states (B, N, H) of whole sequences (B, N), for training."""
        hidden, taps = self._forward(_Pass(None, DraftTree.chain(tokens), {}, is_prefill=True))
        return taps, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of final states (..., H), scaled and capped where the model does so."""
        return self.final_logits(self.head(hidden))

    def final_logits(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output, of any part of the vocabulary."""
        scale = _logit_scale(self.config)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if scale != 1:
            logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _forward(self, tree_pass: _Pass) -> tuple[Tensor, Tensor]:
        tree = tree_pass.tree
        if tree_pass.is_prefill:
            decoder = self.decoder
            positions = torch.arange(tree.tokens.shape[1], device=self.device)[None]
        else:
            decoder = self.tree_decoder
            positions = tree_pass.cache.lengths[:, None] + tree.depths()
            positions = positions.clamp_max(self.max_context - 1)  # what lies beyond is never kept
            if decoder is not self.decoder:
                _let_sizes_vary(tree_pass, positions)
        output = decoder(
            input_ids=tree.tokens, position_ids=positions, use_cache=False, tree_pass=tree_pass
        )
        taps = [tree_pass.taps[layer] for layer in self.tap_layers]
        return output.last_hidden_state, torch.cat(taps, -1)


def _require_attention_layers(model: nn.Module, name: str) -> None:
    """Recurrent layers keep a state that a rejected draft cannot be taken out of."""
    layers = getattr(model.get_decoder(), "layers", [])
    are_plain = [hasattr(layer, "self_attn") or hasattr(layer, "attention") for layer in layers]
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    is_covered = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    if not layers or not all(are_plain) or not is_covered:
        reason = f"is a {model.config.model_type} model, not a decoder of attention layers"
        raise ValueError(_unsupported(f"target {name!r}", reason))


def _unsupported(what: str, why: str) -> str:
    return f"{what} {why}; choose a causal language model such as Llama, Qwen, Mistral or Gemma"


def _logit_scale(config: PreTrainedConfig) -> float:
    """What Cohere multiplies logits by and Granite divides them by; 1 for the others."""
    return getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )


def _max_context(config: PreTrainedConfig) -> int:
    """How far a sequence may reach.

    With longrope that is the length up to which all passes turn keys by the same frequencies:
    beyond it one long sequence would change the scores of the others in its batch.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(longest, rope.get("original_max_position_embeddings") or longest)
    return longest


def tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose input EAGLE-3 fuses: hidden_states[2], [N // 2] and [N - 3]."""
    return min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)


def _tap(layer: nn.Module, index: int) -> None:
    """Let each pass note the hidden states on entry to `layer`."""

    def note(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, object]) -> None:
        if (tree_pass := options.get("tree_pass")) is not None:
            tree_pass.taps[index] = inputs[0]

    layer.register_forward_pre_hook(note, with_kwargs=True)


def _let_sizes_vary(tree_pass: _Pass, positions: Tensor) -> None:
    """Have `torch.compile` make one graph for all numbers of sequences, nodes and slots above 1."""
    tree, packed = tree_pass.tree, tree_pass.packed
    vary = [positions, tree.tokens, tree.parents, *tree_pass.masks.values()]
    vary += [tree_pass.cache.lengths, tree_pass.memory]
    vary += [packed.words, packed.depths, packed.num_nodes] if packed else []
    for tensor in vary:
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))


def _windows(config: PreTrainedConfig) -> set[int | None]:
    """The sliding windows of a model's layers; None is a layer that sees everything."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in kinds}


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, longest) and lengths (B,)."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


def _stop_ids(model: nn.Module) -> list[int]:
    eos = model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


def choose_dtype(dtype: str | torch.dtype, device: str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on CPUs with AMX or AVX-512 BF16 for it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if device != "cpu" or is_native else torch.float32
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(known)}")
    return known[dtype]


def load(
    name: str = EMBEDDED,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    compile: bool = False,
) -> Target:
    """Load `smollm2` (the embedded target), a Hub id or a local folder of a causal LM.

    `compile` sends passes over trees through `torch.compile`. Raises ValueError for a name, a model
    or a dtype that cannot serve, and for weights that are unreadable or not all there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(dtype, device)
    folder = str(assets.embedded_target()) if name == EMBEDDED else name
    _require_causal_config(folder, name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot read the weights of target {name!r}: {str(error).splitlines()[0]};"
            " download or save the model again"
        ) from None
    _require_attention_layers(model, name)
    _require_every_weight(report["missing_keys"], name)
    tokenizer = _load_tokenizer(folder)
    paper_tier.prepare(name, tokenizer)
    model = model.to(device).eval()
    expected = _few_scores(model)
    target = Target(model, tokenizer, name, compile)
    _require_scores(target, expected)
    return target


@torch.inference_mode()
def _few_scores(model: nn.Module, num_tokens: int = 8) -> Tensor:
    """(1, num_tokens, V) what the model itself makes of its first tokens."""
    return model(torch.arange(num_tokens, device=model.device)[None], use_cache=False).logits


def _require_scores(target: Target, expected: Tensor) -> None:
    """Raise ValueError where a pass over a prompt and one over a tree score otherwise than the
    model did, as where its logits are scaled in a way that is not known here.
    """
    num_tokens = expected.shape[1]
    tokens = torch.arange(num_tokens, device=target.device)
    cache, prompt = target.prefill([tokens[: num_tokens // 2].tolist()], num_tokens)
    with torch.compiler.set_stance("force_eager"):
        tree = target.verify(cache, DraftTree.chain(tokens[None, num_tokens // 2 :]))
    found = torch.cat([target.logits(prompt.hidden), tree.logits], 1).float()
    dtype = str(target.dtype).removeprefix("torch.")
    if not found.isfinite().all():
        raise ValueError(
            f"target {target.name!r} has no finite logits in {dtype}; load it in bfloat16 or"
            " float32"
        )
    error = (found - expected.float()).norm() / expected.float().norm()
    if error > (0.01 if target.dtype == torch.float32 else 0.1):
        reason = f"scores {error:.0%} otherwise here than in transformers ({dtype})"
        raise ValueError(_unsupported(f"target {target.name!r}", reason))


def target_name(target: Target) -> str:
    """A Hub id as it is, a folder by its last part: paths of one machine mean nothing elsewhere."""
    is_folder = Path(target.name).is_absolute() or Path(target.name).is_dir()
    return Path(target.name).name if is_folder else target.name


def _require_causal_config(folder: str, name: str) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no target {name!r}: it is neither {EMBEDDED!r}, nor a folder with a config.json,"
            f" nor a Hub id reachable from here ({str(error).splitlines()[0]})"
        ) from None
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or not is_causal:
        reason = f"is a {config.model_type} model, not a causal language model"
        raise ValueError(_unsupported(f"target {name!r}", reason))


def _require_every_weight(missing: Iterable[str], name: str, num_named: int = 8) -> None:
    """transformers draws `missing` weights at random; tied and ignored ones are not among them."""
    if names := sorted(missing):
        others = f" and {len(names) - num_named} more" if len(names) > num_named else ""
        raise ValueError(
            f"the weights of target {name!r} lack {', '.join(names[:num_named])}{others};"
            " download or save the model again"
        )


def _load_tokenizer(folder: str) -> object | None:
    has_tokenizer = not Path(folder).is_dir() or any(Path(folder).glob("tokenizer*"))
    return AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
