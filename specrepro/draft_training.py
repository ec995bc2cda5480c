"""The loop that every trained drafter shares: schedule, checkpoint, resume, several processes.

A drafter brings its module, a loss over a batch and its batches; the loop brings the rest. A run is
a function of its seed: stopped and resumed, it ends in the same state as a run that was never
stopped. Under `torchrun` every process takes its share of each batch and gradients are averaged;
the drafter is whole on every device, and the target's layers need not be (`shard`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from specrepro import checkpoints

STATE, BEST, LOG = "training_state.safetensors", "best.safetensors", "log.jsonl"


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Optimisation; rate, betas and clipping are EAGLE-3's (section 4), warm-up and cosine ours.

    The released trainer warms up for 12,000 of 800,000 steps and goes down in a straight line.
    """

    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5  # gradient norm
    warmup_steps: int = 100
    total_steps: int = 1000
    final_fraction: float = 0.05  # of the learning rate, at the end of the cosine
    save_seconds: float = 300.0
    evaluate_every: int = 0  # steps between evaluations; 0 evaluates at the end alone
    keeps_last: bool = False  # state, whatever its score: heads compared after equal steps
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step `step`: linear warm-up, then a cosine down to `final_fraction`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


Loss = Callable[[object], tuple[Tensor, dict[str, float]]]  # batch -> loss, what to log
Batches = Callable[[int], object]  # step -> this process's share of the batch


def train(
    module: nn.Module,
    batch_at: Batches,
    loss_of: Loss,
    config: LoopConfig,
    folder: Path,
    *,
    score: Callable[[nn.Module], float] | None = None,
    resume: bool = False,
    identity: dict[str, object] | None = None,
) -> nn.Module:
    """Train `module` for `config.total_steps`, and return it in the state of the highest `score`,
    or in its last one if `config.keeps_last`.

    Without `resume` an earlier run's state and log in `folder` are removed first. `score` measures
    the drafter as it will be used (tau on held-out prompts), since the loss goes on falling after
    tau has peaked. `identity` says what else the run depends on (corpus hash, sizes): a resumed run
    must have the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(module, config, folder, dict(identity or {}) | {"loop": asdict(config)})
    first_step = run.restore() if resume else 0
    if first_step == 0:
        run.clear()
    run.write_identity()
    bar = tqdm(
        range(first_step, config.total_steps),
        initial=first_step,
        total=config.total_steps,
        desc=folder.name,
    )
    for step in bar:
        metrics = _step(module, run.optimizer, batch_at(step), loss_of, config, step)
        run.log(step, metrics)
        bar.set_postfix({name: round(value, 3) for name, value in metrics.items()}, refresh=False)
        run.finish_step(step, score)
    wait_for_all()
    run.restore_best()
    return module


def _step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: object,
    loss_of: Loss,
    config: LoopConfig,
    step: int,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    loss, metrics = loss_of(batch)
    loss.backward()
    average_gradients(module)
    norm = nn.utils.clip_grad_norm_(
        [p for p in module.parameters() if p.requires_grad], config.clip
    )
    if not norm.isfinite():  # an average, so every process stops here
        raise ValueError(
            f"training diverged: at step {step} the loss is {loss.item():.3g} and the gradient norm"
            f" {norm.item()}. What was saved before is whole; choose a lower learning rate, or"
            " bfloat16 or float32 where the target is in float16"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_over_processes({"loss": loss.item(), "gradient_norm": norm.item()} | metrics)


def average_gradients(module: nn.Module) -> None:
    """Mean of the gradients over all processes; nothing where there is one."""
    if _num_processes() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def mean_over_processes(numbers: dict[str, float]) -> dict[str, float]:
    """Mean of each number over all processes, which have the same ones."""
    if _num_processes() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, (values / _num_processes()).tolist(), strict=True))


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, each with a GPU of its own where there are any;
    (0, 1) otherwise.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    return dist.get_rank(), dist.get_world_size()


def shard(layers: Iterable[nn.Module], device_type: str) -> None:
    """Spread the parameters of a frozen target's `layers` over the devices of all processes.

    For targets that fit no single device. Training on cached features never runs these layers: it
    reads the word embedding and the language-model head, which stay whole on every device, as does
    the drafter. What runs them is the scoring of held-out prompts, where each layer is gathered
    while it computes: so every process must run the same passes, and scores alike. Answering
    prompts one part a process cannot be done on layers spread like this.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Return when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def scores(folder: Path) -> dict[int, float]:
    """Every score in a run's log, by the step it was taken after."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return {line["step"] + 1: line["score"] for line in lines if "score" in line}


def kept_score(folder: Path, keeps_last: bool = False) -> float:
    """The highest score that a run's log holds, or its last: that of the state it returned."""
    found = list(scores(folder).values()) or [math.nan]
    return found[-1] if keeps_last else max(found)


class _SoftCrossEntropy(torch.autograd.Function):
    """`soft_cross_entropy` without ever holding all logits.

    Rows are taken in chunks that stay in the processor's cache, or fill a GPU; the gradient is
    formed while the logits are there.
    """

    CHUNK = 256

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, teacher: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss, and agreement (M,), as in `soft_cross_entropy`, with the gradients kept."""
        narrow = weight.to(teacher.dtype)
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        loss = states.new_zeros((), dtype=torch.float32)
        agrees = torch.empty(len(states), device=states.device)
        size = chunk_size(_SoftCrossEntropy.CHUNK, states.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            chunk = states[part].to(narrow.dtype)
            log_q = (chunk @ narrow.T).float().log_softmax(-1)
            p = teacher[rows[part]].float().softmax(-1)
            loss -= torch.dot(p.flatten(), log_q.flatten())
            agrees[part] = (log_q.argmax(-1) == p.argmax(-1)).float()
            grad_logits = log_q.exp_().sub_(p).to(narrow.dtype)
            grad_states[part] = (grad_logits @ narrow).to(states.dtype)
            grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(agrees)
        return loss, agrees

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_weight = ctx.saved_tensors
        for_states = grad_states * grad.to(grad_states.dtype)
        return for_states, (grad_weight * grad).to(ctx.weight_dtype), None, None


def chunk_size(rows_on_cpu: int, device: torch.device) -> int:
    """How many rows' logits to hold at once: what fits a processor's cache leaves a GPU idle."""
    return rows_on_cpu if device.type == "cpu" else 32 * rows_on_cpu


def soft_cross_entropy(
    states: Tensor, weight: Tensor, teacher: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over rows of -sum_v p(v) log q(v), and the top-1 agreement of each row (M,).

    q comes from `states` (M, H) by a head `weight` (V, H), p from `teacher` logits (any, V); `rows`
    (M,) says which teacher row belongs to each state.
    """
    return _SoftCrossEntropy.apply(states, weight, teacher, rows)


def _differences(then: object, now: object, name: str = "") -> str:
    """Where two identities differ, each place by its dotted name."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return "" if then == now else f"{name} was {then!r} and is {now!r}"
    keys = sorted(then.keys() | now.keys())
    found = (_differences(then.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return "; ".join(filter(None, found))


class _Run:
    """What a training run leaves in its folder."""

    def __init__(
        self, module: nn.Module, config: LoopConfig, folder: Path, identity: dict[str, object]
    ):
        self.module, self.config, self.folder = module, config, folder
        self.identity = json.loads(json.dumps(identity))  # as it will read when it comes back
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters,
            config.learning_rate,
            config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.best, self.saved_at = -math.inf, time.monotonic()
        self.is_first = is_first_process()

    def clear(self) -> None:
        """Remove what another run left here: nothing of it is to be resumed or restored."""
        if self.is_first:
            for name in (STATE, BEST, LOG):
                (self.folder / name).unlink(missing_ok=True)

    def write_identity(self) -> None:
        if self.is_first:
            checkpoints.write_text(
                self.folder / "identity.json", json.dumps(self.identity, indent=2) + "\n"
            )

    def restore(self) -> int:
        """Load the saved state and return the step to go on with; 0 where there is none."""
        path = self.folder / STATE
        if not path.is_file():
            return 0
        saved = json.loads((self.folder / "identity.json").read_text())
        if differences := _differences(saved, self.identity):
            raise ValueError(
                f"cannot resume {self.folder}: {differences}. Drop --resume or restore the setting"
            )
        tensors = checkpoints.load_tensors(path)
        self.best = tensors.pop("best").item()
        step = int(tensors.pop("step"))
        self._set_tensors(tensors)
        self._cut_log(step)
        return step

    def _cut_log(self, step: int) -> None:
        path = self.folder / LOG
        if path.is_file():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            lines = [line for line in whole if json.loads(line)["step"] < step]
            checkpoints.write_text(path, "".join(line + "\n" for line in lines))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"module.{name}": p for name, p in self.module.named_parameters() if p.requires_grad
        }
        for name, p in self.module.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                if f"module.{name}" in tensors:
                    p.copy_(tensors[f"module.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.step.{name}" in tensors:
                    self.optimizer.state[p] = {
                        key: tensors[f"optimizer.{key}.{name}"].to(p.device) for key in keys
                    }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.is_first:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")

    def finish_step(self, step: int, score: Callable[[nn.Module], float] | None) -> None:
        """Evaluate and save where it is time to."""
        is_last = step + 1 == self.config.total_steps
        every = self.config.evaluate_every
        if score is not None and (is_last or (every and (step + 1) % every == 0)):
            # by every process, since a target spread over them runs in all or none
            self._keep_if_best(step, score(self.module))
        if self.is_first and (
            is_last or time.monotonic() - self.saved_at > self.config.save_seconds
        ):
            self.save(step + 1)

    def save(self, next_step: int) -> None:
        scalars = {
            "step": torch.tensor(next_step),
            "best": torch.tensor(self.best, dtype=torch.float64),
        }
        checkpoints.save_tensors(self.folder / STATE, self._tensors() | scalars)
        self.saved_at = time.monotonic()

    def _keep_if_best(self, step: int, score: float) -> None:
        self.log(step, {"score": score})
        if self.is_first and score > self.best and not self.config.keeps_last:
            self.best = score
            checkpoints.save_tensors(self.folder / BEST, dict(self.module.named_parameters()))

    def restore_best(self) -> None:
        path = self.folder / BEST
        if path.is_file():
            best = checkpoints.load_tensors(path)
            with torch.no_grad():
                for name, p in self.module.named_parameters():
                    p.copy_(best[name])
