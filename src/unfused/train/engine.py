"""One training engine on `transformers.Trainer`: any module that returns a loss, resumed to the same bits."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import operator
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from unfused.data.files import read_json
from unfused.train import checkpoint as ckpt
from unfused.train.data import EpochBatches, Sampler, collate
from unfused.train.memory import PeakMemory

__all__ = ["Engine", "FitResult", "Recipe", "fit", "supports_bf16"]

Progress = Callable[[int, int, float], Any]
RECORDS = 50  # lines in a run's history
EVALUATIONS = 10


def supports_bf16() -> bool:
    """Whether bf16 autocast pays here: a GPU with bf16, or a CPU with AVX-512 BF16 or AMX instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class FitResult:
    """What `fit` did.

    Attributes
    ----------
    history : list of dict
        About 50 records, each {"step", "loss", "learning_rate"} and the terms of the loss that the model
        reported, averaged over the steps since the record before; with `eval_fn`, its numbers where it was
        called.
    steps : int
    seconds : float
        Training time of all sittings.
    peak_mib : float
        Peak of the process's resident memory, in MiB.
    resumed_from : int or None
        Step at which this call took the run up; None if it began it, `steps` if the run was already finished.
    """

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    peak_mib: float
    resumed_from: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How to train: all that two equal runs have in common, beside model and data."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: str
    momentum: float
    schedule: str
    warmup: float
    seed: int
    bf16: bool
    max_grad_norm: float

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a finite number of at least 0")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r} must be 'adamw' or 'sgd'")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(map(repr, SCHEDULES))}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r} must be a fraction of the steps, in [0, 1)")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be a whole number in [0, 2**32)")

    def factor(self, step: int) -> float:
        """The learning rate's factor at a step, counted from 0: linear warm-up, then the schedule."""
        warm = self.warmup * self.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return SCHEDULES[self.schedule](min(1.0, (step - warm) / (self.steps - warm)))


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "one-cycle": _cosine,
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
WARMUP = {"one-cycle": 0.15}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All trainable parameters; matrices and kernels decay, biases and the scales of norms do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trainable if p.ndim > 1]
    rest = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Engine(Trainer):
    """A `transformers.Trainer` whose checkpoints are safetensors and JSON, atomic, timed and exact.

    `fit` builds one. Its checkpoints resume with `train(resume_from_checkpoint=PATH)`, in the middle of an
    epoch too, and the run ends with the bits of an uninterrupted one.
    """

    model: nn.Module  # type: ignore[assignment]
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        recipe: Recipe,
        *,
        groups: list[dict[str, Any]],
        output_dir: Path | None = None,
        save_seconds: float = 20.0,
        fingerprint: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        eval_fn: Callable[[nn.Module], Mapping[str, float]] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.recipe, self.groups, self.sampler = recipe, groups, sampler
        self.folder, self.save_seconds, self.fingerprint = output_dir, save_seconds, dict(fingerprint or {})
        self.progress, self.eval_fn = progress, eval_fn
        self.history: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self._recent: list[dict[str, Any]] = []  # losses and terms on the device, not looked at yet
        self._window: list[dict[str, float]] = []  # the same as numbers, since the last record
        self._resume_rng: str | None = None
        args = TrainingArguments(
            # Nothing is written there by the Trainer itself, but it makes the folder.
            output_dir=str(output_dir or tempfile.gettempdir()),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.lr,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            seed=recipe.seed,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs are used through `accelerate launch`, not through DataParallel
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=data,
            callbacks=[_AfterStep(self), *callbacks],
        )
        self.remove_callback(transformers.PrinterCallback)
        # One batch is one step: no item counts across accumulated batches, and no argument for them.
        self.model_accepts_loss_kwargs = False
        if output_dir and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "checkpoints of a sharded model (FSDP, DeepSpeed) are not supported: leave output_dir out "
                "and save the weights after training, or launch with DDP"
            )

    # ---- data, optimizer, schedule

    def get_train_dataloader(self) -> DataLoader:
        # Not `accelerator.prepare`d: that reads one batch ahead, so that noise drawn by the data set could
        # not be resumed, and would shard the batches, which are sharded already.
        batches = EpochBatches(
            len(self.train_dataset),
            self.recipe.batch_size,
            self.recipe.seed,
            self.sampler,
            self.args.process_index,
            self.args.world_size,
        )
        # Its own generator: a loader draws a number when iteration starts, and must not touch the global one.
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self._resume_rng is not None:
            state = load_file(Path(self._resume_rng) / "rng.safetensors")
            mine = f"{self.args.process_index}."
            ckpt.set_rng_state({k[len(mine) :]: v for k, v in state.items() if k.startswith(mine)})
            self._resume_rng = None
        return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            lr, decay = self.recipe.lr, self.recipe.weight_decay
            if self.recipe.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(
                    self.groups, lr, momentum=self.recipe.momentum, weight_decay=decay, fused=True
                )
            else:
                self.optimizer = torch.optim.AdamW(self.groups, lr, weight_decay=decay, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self._bare_optimizer, self.recipe.factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    # ---- a step

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        self._started = self._last_progress = self._saved = time.monotonic()
        self._save_cost = 0.0
        # Before a checkpoint is loaded, which then overwrites what the hook sets up.
        if callable(hook := getattr(self.model, "on_train_begin", None)):
            hook(self.recipe.steps)
        if self.args.world_size > 1:  # each process its own noise
            transformers.set_seed((self.recipe.seed + self.args.process_index) % 2**32)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            outputs = model(**inputs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, torch.Tensor):
            name, kind = type(self.model).__name__, type(outputs).__name__
            raise TypeError(
                f"{name}.forward must return a ModelOutput or dict with a tensor `loss`, got {kind}"
            )
        loss = loss.float()
        terms = outputs.get("terms") if isinstance(outputs, Mapping) else getattr(outputs, "terms", None)
        self._recent.append(
            {name: torch.as_tensor(v).detach() for name, v in {**(terms or {}), "loss": loss}.items()}
        )
        return (loss, outputs) if return_outputs else loss

    # The Trainer computes these two at every step; nobody reads them.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def after_step(self) -> None:
        step, steps, now = self.state.global_step, self.recipe.steps, time.monotonic()
        if callable(hook := getattr(self.model, "on_step_end", None)):
            hook()
        record = step % max(1, steps // RECORDS) == 0 or step == steps
        if record:
            self.history.append(self._record(step))
            self.log(dict(self.history[-1]))  # for callbacks that listen
        if self.eval_fn and (step % max(1, steps // EVALUATIONS) == 0 or step == steps):
            self._evaluate_now(step)
        if self.progress and (step == steps or now - self._last_progress > 0.5):
            self._look()
            losses = [values["loss"] for values in self._window]
            loss = sum(losses) / len(losses) if losses else self.history[-1]["loss"]
            self.progress(step, steps, loss)
            self._last_progress = now
        if self.folder and step < steps and self._save_is_due(now, record):
            self._save_checkpoint(self.model, None)

    def _record(self, step: int) -> dict[str, Any]:
        self._look()
        names = list(dict.fromkeys(name for values in self._window for name in values))
        means = {}
        for name in names:
            values = [v[name] for v in self._window if name in v]
            means[name] = sum(values) / len(values)
        if self.args.world_size > 1:
            mean = torch.tensor(means["loss"], device=self.args.device)
            means["loss"] = self.accelerator.reduce(mean, "mean").item()
        self._window.clear()
        rate = self.lr_scheduler.base_lrs[0] * self.recipe.factor(step - 1)
        return {"step": step, "loss": means.pop("loss"), "learning_rate": rate, **means}

    def _look(self) -> None:
        """Fetch the losses of the last steps from the device at once; stop at one that is not a number."""
        if not self._recent:
            return
        flat = [
            v.reshape(()).to(self.args.device, torch.float32) for row in self._recent for v in row.values()
        ]
        fetched = iter(torch.stack(flat).tolist())
        first = self.state.global_step - len(self._recent) + 1
        for step, row in enumerate(self._recent, first):
            values = {name: next(fetched) for name in row}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss is {values['loss']} at step {step} of {self.recipe.steps}: check the data for "
                    f"NaN and infinity, lower lr (now {self.recipe.lr}) or set max_grad_norm"
                )
            self._window.append({name: value for name, value in values.items() if math.isfinite(value)})
        self._recent.clear()

    def _evaluate_now(self, step: int) -> None:
        assert self.eval_fn is not None
        self.model.eval()
        # Not inference_mode: what a model caches there could not be used in training afterwards.
        with ckpt.preserved_rng(), torch.no_grad():
            found = {name: float(value) for name, value in self.eval_fn(self.model).items()}
        self.model.train()
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1].update({k: v if math.isfinite(v) else None for k, v in found.items()})

    # ---- checkpoints

    def _save_is_due(self, now: float, record: bool) -> bool:
        # At most a twentieth of the time goes into saving.
        due = now - self._saved >= (self.save_seconds and max(self.save_seconds, 20 * self._save_cost))
        if self.args.world_size == 1:
            return due
        # The clocks of processes differ: the first one decides, where they all wait for each other anyway.
        return record and bool(broadcast(torch.tensor(int(due), device=self.args.device)).item())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.folder is None:
            raise ValueError("this Engine has no output_dir to save to")
        start = time.monotonic()
        self._look()
        rng = ckpt.rng_state()
        if self.args.world_size > 1:
            device = self.args.device
            gathered = {k: self.accelerator.gather(v[None].to(device)).cpu() for k, v in rng.items()}
        else:
            gathered = {k: v[None] for k, v in rng.items()}
        if self.args.should_save:
            with ckpt.atomic_folder(self.folder / f"{ckpt.PREFIX}{self.state.global_step}") as folder:
                ckpt.save_module(folder / "model.safetensors", self.model)
                tensors, rest = ckpt.pack_optimizer(self._bare_optimizer)
                ckpt.save_tensors(folder / "optimizer.safetensors", tensors)
                ckpt.save_tensors(
                    folder / "rng.safetensors",
                    {f"{rank}.{k}": v for k, rows in gathered.items() for rank, v in enumerate(rows)},
                )
                self.state.save_to_json(str(folder / "trainer_state.json"))
                ckpt.seal(
                    folder,
                    {
                        "fingerprint": self.fingerprint,
                        "optimizer": rest,
                        "scheduler": self.lr_scheduler.state_dict(),
                        "history": self.history,
                        "window": self._window,
                        "seconds": self.seconds_before + time.monotonic() - self._started,
                    },
                )
            ckpt.keep_newest(self.folder, 2)
        self.accelerator.wait_for_everyone()
        self._saved = time.monotonic()
        self._save_cost = self._saved - start

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        ckpt.load_module(Path(resume_from_checkpoint) / "model.safetensors", model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        run = read_json(Path(checkpoint) / "run.json")
        tensors = load_file(Path(checkpoint) / "optimizer.safetensors")
        ckpt.unpack_optimizer(self._bare_optimizer, tensors, run["optimizer"])
        self.lr_scheduler.load_state_dict(run["scheduler"])
        self.history, self._window = run["history"], run["window"]
        self.seconds_before = run["seconds"]
        self._resume_rng = checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: `get_batch_samples` restores it, before the first batch is read and not after."""


class _AfterStep(TrainerCallback):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.engine.after_step()


class _EpochLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    steps: int,
    output_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.02,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    schedule: str = "one-cycle",
    warmup: float | None = None,
    seed: int = 0,
    bf16: bool | None = None,
    max_grad_norm: float | None = None,
    param_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    sampler: Sampler | None = None,
    save_seconds: float = 20.0,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    eval_fn: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> FitResult:
    """Train a module in place; with `output_dir`, killed at any moment and called again, to the same bits.

    Parameters
    ----------
    model : nn.Module
        `model(**batch)` returns a `ModelOutput` or dict with a scalar `loss`, and optionally `terms`, a dict
        of the numbers that make it up. Optional hooks: `on_train_begin(steps)` before the first step (and
        before a checkpoint is loaded), `on_step_end()` after each optimizer step. All state that training
        changes must be in parameters or persistent buffers made in `__init__`, all noise from the global
        generators. It is left in eval mode.
    data : Dataset
        Map-style, of dicts whose keys `forward` takes, e.g. an `ArrayDataset`. With a `__getitems__(indices)`
        that returns a ready batch, batches are fetched in one call.
    steps : int
        Optimizer steps.
    output_dir : path, optional
        Receives checkpoints while training and at the end `model.safetensors`, `history.json` and
        `done.json`. The same call on it resumes, or if the run is finished loads the weights and returns at
        once. What a call with other arguments, parameter shapes or data length left there is discarded with a
        warning that names the difference.
    batch_size : int, default=64
        Over all processes. Each epoch is a new permutation; its rest of less than a batch is dropped.
    lr, weight_decay : float, default=2e-3, 0.02
        Biases and norms are not decayed.
    optimizer : {"adamw", "sgd"}, default="adamw"
    momentum : float, default=0.9
        Of SGD.
    schedule : {"one-cycle", "cosine", "linear", "constant"}, default="one-cycle"
        After the warm-up: cosine to zero (the first two), linear to zero, or constant.
    warmup : float, optional
        Fraction of the steps over which the rate rises linearly. Default: 0.15 for "one-cycle", else 0.
    seed : int, default=0
        Of the order of the data and of the noise. The global generators are left as they were found.
    bf16 : bool, optional
        bfloat16 autocast; weights and loss stay float32. Default: where it pays, see `supports_bf16`.
    max_grad_norm : float, optional
        Clip the gradient's norm; default: no clipping.
    param_groups : callable (model) -> list of dict, optional
        Parameter groups as torch's optimizers take them ("params", optionally "lr", "weight_decay", ...).
    sampler : callable (epoch, generator) -> (m,) int64 tensor, optional
        The rows of an epoch in their order, drawn with `generator`; default: a random permutation of all.
    save_seconds : float, default=20
        Time between checkpoints, stretched where saving takes over a twentieth of it; 0: after each step.
    fingerprint : mapping of JSON values, optional
        What else identifies the run, such as a digest of its inputs: other values discard an earlier run.
    progress : callable (step, steps, loss), optional
        Called about twice a second, e.g. a task of `StageProgress`.
    callbacks : iterable of transformers.TrainerCallback
    eval_fn : callable (model) -> mapping of numbers, optional
        Called ten times, in eval mode without gradients; its numbers go into the history. Training does not
        notice.

    Returns
    -------
    FitResult

    Raises
    ------
    FloatingPointError
        When the loss is not finite; the message names the step.
    unfused.data.files.DiskFull
        When a checkpoint cannot be written; the one before it is intact.
    RuntimeError
        When another process trains into `output_dir`.

    Examples
    --------
    >>> class Line(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.zeros(()))
    ...
    ...     def forward(self, x, y):
    ...         return {"loss": ((self.weight * x - y) ** 2).mean()}
    >>> from unfused.train import ArrayDataset
    >>> x = torch.linspace(-1, 1, 64)
    >>> model = Line()
    >>> result = fit(model, ArrayDataset(x=x, y=3 * x), steps=200, lr=0.1, bf16=False)
    >>> round(model.weight.item(), 1), result.history[-1]["step"]
    (3.0, 200)
    """
    steps, batch_size, seed = map(_whole, (steps, batch_size, seed))
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        lr=float(lr),
        weight_decay=float(weight_decay),
        optimizer=optimizer,
        momentum=float(momentum),
        schedule=schedule,
        warmup=WARMUP.get(schedule, 0.0) if warmup is None else warmup,
        seed=seed,
        bf16=supports_bf16() if bf16 is None else bf16,
        max_grad_norm=float(max_grad_norm or 0),
    )
    if len(data) == 0:  # type: ignore[arg-type]
        raise ValueError("data is empty: there is nothing to train on")
    groups = param_groups(model) if param_groups else parameter_groups(model, weight_decay)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(p.requires_grad for group in groups for p in group["params"]):
        raise ValueError("the model has no parameter with requires_grad=True to train")
    identity = _identity(recipe, model, data, groups, fingerprint)
    folder = Path(output_dir) if output_dir is not None else None
    if folder and (done := ckpt.read_final(folder)) and done["fingerprint"] == identity:
        ckpt.load_module(folder / "model.safetensors", model)
        if int(os.environ.get("RANK", 0)) == 0:
            ckpt.remove_leftovers(folder)
        model.eval()
        return FitResult(done["history"], steps, done["seconds"], done["peak_mib"], steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_traceless(model))
        stack.enter_context(ckpt.preserved_rng())
        memory = stack.enter_context(PeakMemory())
        engine = Engine(
            model,
            data,
            recipe,
            groups=groups,
            output_dir=folder,
            save_seconds=save_seconds,
            fingerprint=identity,
            progress=progress,
            callbacks=callbacks,
            eval_fn=eval_fn,
            sampler=sampler,
        )
        start = None
        if folder:
            if engine.args.should_save:
                stack.enter_context(_sole_writer(folder))
                _discard_unusable(folder, identity)
            engine.accelerator.wait_for_everyone()
            start = next(iter(ckpt.checkpoints(folder)), None)
        engine.train(resume_from_checkpoint=str(start) if start else None)
        seconds = engine.seconds_before + time.monotonic() - engine._started
        memory.read()
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise FloatingPointError(f"weights are not finite after step {steps}: lower lr (now {lr})")
        if folder and engine.args.should_save:
            done = {"fingerprint": identity, "seconds": seconds, "peak_mib": memory.mib}
            ckpt.write_final(folder, model, engine.history, done)
        engine.accelerator.wait_for_everyone()
    model.eval()
    resumed = int(start.name[len(ckpt.PREFIX) :]) if start else None
    return FitResult(engine.history, steps, seconds, memory.mib, resumed)


def _whole(number: Any) -> Any:
    """NumPy's integers as Python's, which JSON can hold."""
    return operator.index(number) if isinstance(number, numbers.Integral) else number


def _identity(
    recipe: Recipe,
    model: nn.Module,
    data: Dataset,
    groups: list[dict[str, Any]],
    fingerprint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be taken up, as JSON values."""
    settings = [
        {"parameters": len(g["params"]), **{k: v for k, v in g.items() if k != "params"}} for g in groups
    ]
    identity = {
        **asdict(recipe),
        "rows": len(data),  # type: ignore[arg-type]
        "model": {
            name: [str(t.dtype), *t.shape]
            for name, t in model.state_dict().items()
            if isinstance(t, torch.Tensor)
        },
        "groups": settings,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "fingerprint": dict(fingerprint or {}),
    }
    return json.loads(json.dumps(identity, default=lambda number: number.item()))


def _discard_unusable(folder: Path, identity: Mapping[str, Any]) -> None:
    """Leave in `folder` only checkpoints that this run can take up."""
    ckpt.remove_leftovers(folder)
    names: list[str] = []
    found: list[tuple[Path, dict[str, Any] | None]] = [
        (p, ckpt.read_sealed(p)) for p in ckpt.checkpoints(folder)
    ]
    if (folder / "done.json").exists():
        found.append((folder / "done.json", ckpt.read_final(folder)))
    for path, run in found:
        if run is None:
            names.append(f"{path.name} is damaged")
        elif differs := ckpt.differences(run["fingerprint"], identity):
            more = [f"and {len(differs) - 3} more differences"] if len(differs) > 3 else []
            names.append(f"{path.name} is of another run ({'; '.join(differs[:3] + more)})")
        else:
            continue
        ckpt.remove(path)
        if path.name == "done.json":
            for name in ("model.safetensors", "history.json"):
                (folder / name).unlink(missing_ok=True)
    if names:
        warnings.warn(f"not resumed but discarded in {folder}: {', '.join(names)}", stacklevel=3)


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself: no file is left, and the kernel drops it with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is training into {folder}: wait for it or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _traceless(model: nn.Module) -> Iterator[None]:
    """Put back what the Trainer changes beside the weights: the library's log level, `config.use_cache`."""
    level, config = transformers.logging.get_verbosity(), getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if config is not None and use_cache is None:
            config.__dict__.pop("use_cache", None)
        elif config is not None:
            config.use_cache = use_cache
