"""How a drafter's checkpoint is made: a corpus, a method, a run of training, a card.

Every trained drafter takes this road: the committed corpus, or one that the target answers first;
features of the frozen target; the loop of `draft_training`; the state with the highest tau on
held-out prompts; a checkpoint with a card that says all this. A paper brings a `Method`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from specrepro import checkpoints, corpus, draft_training, prompts
from specrepro.decoding import Drafter, decode
from specrepro.packed_linear import unpack
from specrepro.target_model import EMBEDDED, Target, choose_dtype, target_name
from specrepro.target_model import load as load_target
from specrepro.training_cards import card_of

COMMITTED = Path(__file__).parent.parent / "checkpoints"
OVERRIDES = Path(__file__).parent / "embedded.yaml"


class Method(Protocol):
    """What a paper brings to be trained; a frozen dataclass of its settings, the paper's values."""

    name: str  # of its checkpoint folder and of its section among the overrides

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Method:
        """The method with the `settings` that a YAML section overrides."""

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> nn.Module:
        """What is trained, as it begins."""

    def loss(self, module: nn.Module, target: Target) -> draft_training.Loss:
        """Loss of a `corpus.Batch`, and what to log."""

    def drafter(self, module: nn.Module, target: Target) -> Drafter:
        """The module at work."""

    def save(self, module: nn.Module, folder: Path) -> object:
        """Write the checkpoint."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything but the corpus that makes a checkpoint."""

    method: Method
    loop: draft_training.LoopConfig = field(default_factory=draft_training.LoopConfig)
    batch_tokens: int = 4096  # of each process
    epochs: float = 2.0

    @classmethod
    def of(cls, method: type[Method], target: Target) -> Recipe:
        """The overrides for the embedded target, the paper's own settings for every other.

        A method may bring a `LOOP` where the optimisation is not EAGLE-3's.
        """
        if target.name != EMBEDDED:
            return cls(method(), getattr(method, "LOOP", draft_training.LoopConfig()))
        own = yaml.safe_load(OVERRIDES.read_text())[method.name]
        loop = draft_training.LoopConfig(**own.pop("loop"))
        sizes = {name: own.pop(name) for name in ("batch_tokens", "epochs")}
        return cls(method.of(own), loop, **sizes)


def train(
    recipe: Recipe,
    target: Target,
    features: corpus.Sequences,
    folder: Path,
    *,
    start: Path | None = None,
    score: Callable[[nn.Module], float] | None = None,
    resume: bool = False,
) -> nn.Module:
    """Train the recipe's module on cached target features for `recipe.loop.total_steps`.

    It begins anew, or from the checkpoint `start`. `score` (tau on held-out prompts) picks the best
    state, unless `loop.keeps_last`. Under torchrun each process takes its own batches and gradients
    are averaged.
    """
    loop = recipe.loop
    rank, num_ranks = draft_training.join_processes()
    torch.manual_seed(loop.seed)
    module = recipe.method.new_module(target, features.answers)
    if start is not None:
        tied = getattr(module, "_tied_weights_keys", None) or ()
        checkpoints.load_strictly(module, checkpoints.load(start)[0], start, optional=tied)
    loss = recipe.method.loss(module, target)
    prompt_ids = corpus.prompt_ids(target.tokenizer, features.answers)
    batches = corpus.batch_order(
        features.answers, recipe.batch_tokens, loop.seed, loop.total_steps * num_ranks
    )

    def batch_at(step: int) -> corpus.Batch:
        batch = features.batch(batches[step * num_ranks + rank], prompt_ids)
        return batch.to(target.device, target.dtype)

    def loss_of(batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        is_half = target.dtype != torch.float32
        with torch.autocast(target.device.type, torch.bfloat16, enabled=is_half):
            return loss(batch)

    identity = {
        "target": target.fingerprint, "corpus": features.hash, "method": asdict(recipe.method),
        "batch_tokens": recipe.batch_tokens, "processes": num_ranks, "start": _digest(start),
    }  # fmt: skip
    ahead = _Ahead(batch_at, loop.total_steps)
    return draft_training.train(
        module, ahead, loss_of, loop, folder, score=score, resume=resume, identity=identity
    )


class _Ahead:
    """Reads the next step's batch from the disk while this one is trained on."""

    def __init__(self, batch_at: Callable[[int], corpus.Batch], num_steps: int):
        self.batch_at, self.num_steps = batch_at, num_steps
        self.reader = ThreadPoolExecutor(1)
        self.next: tuple[int, Future[corpus.Batch]] | None = None

    def __call__(self, step: int) -> corpus.Batch:
        is_read = self.next is not None and self.next[0] == step
        batch = self.next[1] if is_read else self.reader.submit(self.batch_at, step)
        if step + 1 < self.num_steps:
            self.next = step + 1, self.reader.submit(self.batch_at, step + 1)
        return batch.result()


def make_checkpoint(
    recipe: Recipe,
    target: Target,
    corpus_folder: Path,
    work: Path,
    destination: Path,
    *,
    start: Path | None = None,
    evaluations: int = 4,
    score: Callable[[nn.Module], float] | None = None,
    num_answers: int | None = None,
    resume: bool = False,
) -> Path:
    """Train on the corpus's features for `recipe.epochs` and write the checkpoint with its card.

    `num_answers` takes a fair sample of the corpus. The head begins anew, or from the checkpoint
    `start`, whose card is then part of its own. The state with the highest held-out tau of
    `evaluations` looks is the one that is kept, unless `score` takes the place of that tau, or the
    recipe's loop keeps the last.
    """
    began = time.perf_counter()
    features = corpus.features_in(corpus_folder, target, num_answers)
    _, num_ranks = draft_training.join_processes()
    steps = corpus.num_batches(features.answers, recipe.batch_tokens, recipe.epochs) // num_ranks
    every = max(1, steps // evaluations)
    loop = replace(recipe.loop, total_steps=max(1, steps), evaluate_every=every)
    recipe, questions = replace(recipe, loop=loop), held_out_questions(target)
    module = train(
        recipe, target, features, work, start=start, resume=resume,
        score=score or (lambda module: held_out_tau(recipe.method, module, target, questions)),
    )  # fmt: skip
    if draft_training.is_first_process():
        recipe.method.save(module, destination)
        minutes = round((time.perf_counter() - began) / 60, 1)
        card = _card(recipe, target, features, work, len(questions))
        card |= {"processes": num_ranks, "minutes_of_the_last_stretch": minutes}
        if start is not None:
            card["start"] = {"sha256": _digest(start)} | card_of(start)
        checkpoints.write_text(destination / "card.json", json.dumps(card, indent=2) + "\n")
    return destination


def _digest(folder: Path | None) -> str | None:
    return None if folder is None else checkpoints.digest(folder)


def _card(
    recipe: Recipe,
    target: Target,
    features: corpus.Sequences,
    work: Path,
    num_questions: int,
) -> dict[str, Any]:
    return {
        "target": target_name(target),
        "corpus": features.hash,
        "answer_tokens": features.num_answer_tokens,
        "recipe": asdict(recipe),
        # of the tree it was taken with; where the best of some looks is kept, it flatters
        "held_out_tau": round(draft_training.kept_score(work, recipe.loop.keeps_last), 3),
        "held_out_tau_by_step": draft_training.scores(work),
        "held_out_prompts": num_questions,
        "command": _command(recipe.method.name),
    }


def _command(name: str) -> str:
    """The module that was started, with its arguments; the method's own where that is not ours."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_ours = spec is not None and spec.name.startswith("specrepro.")
    module = spec.name if is_ours else f"specrepro.{name}"
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def held_out_questions(target: Target) -> list[list[int]]:
    """Token ids of the prompts that choose among states."""
    return [prompts.encode(target.tokenizer, question) for question in prompts.to_choose_by()]


def held_out_tau(
    method: Method, module: nn.Module, target: Target, questions: Sequence[Sequence[int]]
) -> float:
    """tau of greedily decoding 48 tokens of each question: all tokens over all target passes."""
    drafter = method.drafter(copy.deepcopy(module), target)
    runs = decode(target, drafter, questions, max_new_tokens=48)
    return sum(len(run.tokens) - 1 for run in runs) / max(1, sum(run.num_passes for run in runs))


def obtain_checkpoint(
    method: type[Method],
    target: Target,
    checkpoint: str = "",
    *,
    from_scratch: bool = False,
    work: Path | None = None,
    recipe: Recipe | None = None,
    num_answers: int | None = None,
) -> Path:
    """The checkpoint to draft with: the folder named, the committed one, or one trained here.

    A target without a committed corpus answers the training prompts itself first. Goes on where it
    was interrupted.
    """
    if not from_scratch:
        return Path(checkpoint or COMMITTED / method.name)
    work, recipe = work or Path("runs") / method.name, recipe or Recipe.of(method, target)
    features = features_of(target, work.parent / "features", num_answers)
    return make_checkpoint(
        recipe, target, features, work / "training", work / "checkpoint",
        num_answers=num_answers, resume=True,
    )  # fmt: skip


def features_of(target: Target, folder: Path, num_answers: int | None = None) -> Path:
    """The corpus of one target with its features, below the `folder` that all papers share.

    The committed corpus where there is one for the target, else its own answers to the training
    prompts. Goes on where it was interrupted.
    """
    features = folder / Path(target.name).name
    if target.name == EMBEDDED and corpus.has_answers(corpus.COMMITTED):
        corpus.recompute(target, corpus.load(corpus.COMMITTED).first(num_answers).answers, features)
    else:
        questions = list(itertools.islice(prompts.training_prompts(), num_answers))
        is_fast = target.device.type == "cuda"  # computes features sooner than a disk has them
        corpus.generate(target, questions, features, keep_features=not is_fast)
    return features


def variant(
    method: type[Method],
    target: Target,
    features: Path,
    work: Path,
    settings: Mapping[str, object] | None = None,
    *,
    share: float = 1.0,
    epochs: float = 1.0,
    num_answers: int | None = None,
    batch_tokens: int | None = None,
    evaluations: int = 1,
) -> Path:
    """A checkpoint of the method with some `settings` changed, for comparison with others alike.

    It begins anew and trains `epochs` over a fair `share` of the corpus (of its `num_answers`); its
    last state is kept, whatever was seen at `evaluations` looks.
    Goes on where it was interrupted; `work` is a folder of its own.
    """
    recipe = changed(Recipe.of(method, target), settings or {})
    loop = replace(recipe.loop, keeps_last=True)  # a best look is more than its last step has
    recipe = replace(
        recipe, loop=loop, epochs=epochs, batch_tokens=batch_tokens or recipe.batch_tokens
    )
    total = len(corpus.features_in(features, target, num_answers))
    return make_checkpoint(
        recipe, target, features, work / "training", work / "checkpoint",
        num_answers=max(1, round(share * total)), evaluations=evaluations, resume=True,
    )  # fmt: skip


def changed(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    """The recipe with settings of its method changed, by name as in `with_setting`."""
    for name, value in settings.items():
        recipe = replace(recipe, method=with_setting(recipe.method, name, value))
    return recipe


def with_setting(config: Any, name: str, value: object) -> Any:
    """A frozen dataclass with the field `name` changed; dots lead into nested ones."""
    first, _, rest = name.partition(".")
    if first not in (known := [one.name for one in fields(config)]):
        raise ValueError(f"no setting {first!r}; choose {', '.join(known)}")
    before = getattr(config, first)
    if not rest and before is not None and not isinstance(value, _alike(before)):
        kind = type(before).__name__
        raise ValueError(f"{first} is {before!r}, a {kind}, and cannot be {value!r}")
    inner = with_setting(before, rest, value) if rest else value
    return replace(config, **{first: inner})


def _alike(value: object) -> tuple[type, ...] | type:
    """What may take the place of a setting's value."""
    if isinstance(value, bool):
        return bool
    return (int, float) if isinstance(value, float) else type(value)


def load_sharded(name: str, dtype: str = "auto") -> Target:
    """The target with its decoder layers spread over all processes (`draft_training.shard`).

    Every process reads the whole model into its main memory first.
    """
    if draft_training.join_processes()[1] == 1:
        raise ValueError(
            "a target is spread over processes: start several with torchrun --nproc-per-node N"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():  # named, since other threads of this process have device 0
        device = torch.device("cuda", torch.cuda.current_device())
    target = load_target(name, choose_dtype(dtype, device.type), "cpu")
    target.fingerprint  # noqa: B018  taken, and kept, while its weights are whole
    unpack(target.model)  # copies of the weights, which would stay whole
    draft_training.shard(target.decoder.layers, device.type)
    target.model.to(device)
    target.device, target.stop_ids = device, target.stop_ids.to(device)
    return target


def _positive(text: str) -> float:
    """A number of the command line, above 0."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _count(text: str) -> int:
    """A whole number of the command line, 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE of the command line, the value as YAML reads it."""
    name, is_there, value = text.partition("=")
    if not (name and is_there and value):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, yaml.safe_load(value)


def main(method: type[Method], arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.<paper> <corpus> <destination>`, alone or under torchrun."""
    parser = argparse.ArgumentParser(
        prog=f"python -m specrepro.{method.name}", description=method.__doc__
    )
    parser.add_argument(
        "corpus",
        type=Path,
        help="folder of part-*, from python -m specrepro.corpus, or a packed one: corpus/smollm2",
    )
    parser.add_argument("destination", type=Path, help="where the checkpoint goes")
    parser.add_argument("--target", default=EMBEDDED, help="smollm2, a Hub id or a folder")
    parser.add_argument("--shard-target", action="store_true",
                        help="under torchrun: spread its layers over the devices")  # fmt: skip
    parser.add_argument(
        "--work", type=Path, help="training state and log; runs/<paper> if left out"
    )
    parser.add_argument("--from-checkpoint", type=Path, help="folder of weights to begin from")
    parser.add_argument("--learning-rate", type=_positive, help="the recipe's if left out")
    parser.add_argument("--evaluations", type=_count, default=4, help="looks at held-out tau")
    parser.add_argument(
        "--epochs", type=_positive, help="over the corpus; the recipe's if left out"
    )
    parser.add_argument("--batch-tokens", type=_count, help="of each process; the recipe's if left"
                        " out: a GPU takes more in the same time")  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=0, help="of each process; 0 leaves it to torch"
    )
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the method, such as training.steps=1")  # fmt: skip
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    draft_training.join_processes()
    target = (load_sharded if options.shard_target else load_target)(options.target)
    recipe = changed(Recipe.of(method, target), dict(options.set))
    rate = options.learning_rate or recipe.loop.learning_rate
    recipe = replace(
        recipe,
        loop=replace(recipe.loop, learning_rate=rate),
        epochs=options.epochs or recipe.epochs,
        batch_tokens=options.batch_tokens or recipe.batch_tokens,
    )
    if options.shard_target and not corpus.has_features(options.corpus):
        raise ValueError(
            f"{options.corpus} has no features, and layers that are spread over devices cannot"
            " compute them while they train: make them first, python -m specrepro.corpus"
        )
    work = options.work or Path("runs") / method.name
    make_checkpoint(
        recipe, target, options.corpus, work, options.destination, start=options.from_checkpoint,
        evaluations=options.evaluations, resume=options.resume,
    )  # fmt: skip
