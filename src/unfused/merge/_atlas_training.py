"""The loops that learn aTLAS's coefficients: few-shot, addition, negation, test-time adaptation, and without gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.merge._atlas_model import TaskVectorModel
from unfused.merge._compose import check_batches, split_batch

Evaluate = Callable[[TaskVectorModel], float]
Augment = Callable[[Tensor, torch.Generator], Tensor]
OBJECTIVES = ("ufm", "entropy", "pseudo-labels")


@dataclass(frozen=True)
class LearnedScaling:
    """How the coefficients were learned; they themselves are in the `TaskVectorModel`.

    Attributes
    ----------
    losses : tuple of float
        Mean loss of each epoch.
    scores : tuple of float
        What `evaluate` gave before the first epoch and after each; empty without it.
    epoch : int
        Which epoch's coefficients were kept; 0 is the start.
    select : {"best", "last"}
    """

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    epoch: int
    select: str


def learn(
    composed: TaskVectorModel,
    epoch: Callable[[], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    *,
    epochs: int,
    lr: float,
    steps: int,
    schedule: str = "cosine",
    weight_decay: float = 0.1,
    clip: float = 1.0,
    penalty: float = 0.0,
    penalty_norm: int = 1,
    evaluate: Callable[[], float] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LearnedScaling:
    """AdamW on the coefficients alone, gradients clipped; with `evaluate` the best epoch is kept, the start among them.

    `epoch()` gives the batches of one pass, `steps` of them; `stop()` after an epoch ends the run without that epoch.
    """
    if epochs < 1 or not lr > 0:
        raise ValueError(f"epochs={epochs}, lr={lr}: at least one epoch and a positive rate")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r}: choose 'cosine' or 'constant'")
    if penalty_norm not in (1, 2):
        raise ValueError(f"penalty_norm={penalty_norm}: choose 1 or 2")
    optimizer = torch.optim.AdamW([composed.values], lr=lr, weight_decay=weight_decay)
    whole = max(1, epochs * steps)
    rate = (
        (lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / whole))))
        if schedule == "cosine"
        else (lambda step: 1.0)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    scores = [] if evaluate is None else [evaluate()]
    kept, best = composed.values.detach().clone(), 0
    for number in range(1, epochs + 1):
        total, seen = 0.0, 0
        for batch in epoch():
            value = loss(batch)
            if penalty:
                value = value + penalty * composed.penalty(penalty_norm)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_([composed.values], clip)
            optimizer.step()
            scheduler.step()
            total, seen = total + float(value.detach()), seen + 1
        if not seen:
            raise ValueError("batches is empty: give data to learn from")
        losses.append(total / seen)
        if not bool(composed.values.isfinite().all()):
            raise ValueError(f"lr={lr}: the coefficients are not finite any more in epoch {number}; lower it")
        if stop is not None and stop():
            break
        if evaluate is None:
            kept, best = composed.values.detach().clone(), number
        else:
            scores.append(evaluate())
            if scores[-1] > max(scores[:-1]):
                kept, best = composed.values.detach().clone(), number
    with torch.no_grad():
        composed.values.copy_(kept)
    return LearnedScaling(tuple(losses), tuple(scores), best, "last" if evaluate is None else "best")


def learn_few_shot(
    composed: TaskVectorModel,
    batches: Iterable[Any],
    evaluate: Evaluate | None = None,
    augment: Augment | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    min_batches: int = 10,
    seed: int = 0,
    **options: Any,
) -> LearnedScaling:
    """Coefficients by cross-entropy on a few labelled samples (stage 3, and 5 for the partitioned model).

    Parameters
    ----------
    composed : TaskVectorModel
        Without the target's own vector, which would be a leak. Learning goes on from its coefficients.
    batches : iterable of dict or of (inputs, labels)
        A DataLoader or a list, in the paper of 128; read again until an epoch has `min_batches`.
    evaluate : callable (TaskVectorModel) -> float, optional
        On validation data: the best epoch is kept, the start among them. Without it, the last.
    augment : callable (inputs, generator) -> inputs, optional
        For pictures `crop_and_flip`.
    epochs, lr, min_batches : int, float, int
    seed : int
        Of `augment`.
    **options
        `schedule` ("cosine" or "constant"), `weight_decay` (0.1), `clip` (1.0), `penalty` (0) and `penalty_norm` (1 or 2).
    """
    generator = torch.Generator().manual_seed(seed)
    sized = _Repeated(batches, min_batches)

    def loss(batch: Any) -> Tensor:
        args, kwargs, labels = _labelled(batch, composed)
        args, kwargs = _augmented(args, kwargs, augment, generator)
        return F.cross_entropy(composed(*args, **kwargs).float(), labels)

    return learn(
        composed,
        lambda: iter(sized),
        loss,
        epochs=epochs,
        lr=lr,
        steps=sized.steps,
        evaluate=_bound(evaluate, composed),
        **options,
    )


def learn_addition(
    composed: TaskVectorModel,
    tasks: Mapping[str, Iterable[Any]],
    heads: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    evaluate: Evaluate | None = None,
    epochs: int = 20,
    lr: float = 1e-3,
    schedule: str = "constant",
    **options: Any,
) -> LearnedScaling:
    """One model for several tasks: the plain sum of their cross-entropies on validation data (stage 2).

    Parameters
    ----------
    composed : TaskVectorModel
        Its output is what the heads take.
    tasks : mapping of str to iterable of dict or of (inputs, labels)
        Validation data of each task, in the paper 128 / number of tasks to a batch. An epoch ends with the smallest.
    heads : mapping of str to callable (output) -> logits, optional
        Frozen. By default the output is the logits of all tasks.
    evaluate : callable (TaskVectorModel) -> float, optional
        The mean normalised validation accuracy, see `normalized_accuracy`; the best epoch is kept.
    epochs, lr, schedule, **options
        As for `learn_few_shot`.
    """
    for name, batches in tasks.items():
        check_batches(batches, f"tasks[{name!r}]")
    if heads is not None and (lacking := sorted(set(tasks) - set(heads))):
        raise ValueError(f"heads lack {lacking[0]!r}")
    names = list(tasks)

    def loss(rows: Sequence[Any]) -> Tensor:
        weights = composed.weights()  # once for all tasks
        parts = []
        for name, batch in zip(names, rows, strict=True):
            args, kwargs, labels = _labelled(batch, composed)
            out = composed.run(weights, *args, **kwargs)
            parts.append(F.cross_entropy((out if heads is None else heads[name](out)).float(), labels))
        return torch.stack(parts).sum()

    return learn(
        composed,
        lambda: zip(*tasks.values(), strict=False),
        loss,
        epochs=epochs,
        lr=lr,
        steps=min(_count(batches) for batches in tasks.values()),
        schedule=schedule,
        evaluate=_bound(evaluate, composed),
        **options,
    )


def learn_negation(
    composed: TaskVectorModel,
    target: Iterable[Any],
    control: Iterable[Any],
    target_head: Callable[[Tensor], Tensor] | None = None,
    control_head: Callable[[Tensor], Tensor] | None = None,
    floor: float = 0.95,
    epochs: int = 10,
    lr: float = 1e-3,
    schedule: str = "constant",
    **options: Any,
) -> LearnedScaling:
    """Unlearn a task with its own vector: ascent on the target, descent on the control set (stage 1).

    Ends when the accuracy on the control set falls below `floor` times the start's; of the epochs before, the one with the
    lowest target accuracy is kept.

    Parameters
    ----------
    composed : TaskVectorModel
        With the target's task vector.
    target, control : iterable of dict or of (inputs, labels)
        An epoch is one pass over the target; the control set is read round and round.
    target_head, control_head : callable (output) -> logits, optional
    floor : float, default=0.95
    epochs, lr, schedule, **options
        As for `learn_few_shot`; the paper's rates are 2 to 10 times 1e-3.
    """
    check_batches(target, "target")
    check_batches(control, "control")
    endless = _cycle(control)

    def logits(out: Tensor, head: Callable[[Tensor], Tensor] | None) -> Tensor:
        return (out if head is None else head(out)).float()

    def loss(pair: tuple[Any, Any]) -> Tensor:
        weights = composed.weights()
        parts = []
        for batch, head in zip(pair, (target_head, control_head), strict=True):
            args, kwargs, labels = _labelled(batch, composed)
            parts.append(F.cross_entropy(logits(composed.run(weights, *args, **kwargs), head), labels))
        return parts[1] - parts[0]

    start = accuracy(composed, control, control_head)
    return learn(
        composed,
        lambda: zip(target, endless, strict=False),
        loss,
        epochs=epochs,
        lr=lr,
        steps=_count(target),
        schedule=schedule,
        evaluate=lambda: -accuracy(composed, target, target_head),
        stop=lambda: accuracy(composed, control, control_head) < floor * start,
        **options,
    )


def trusted_samples(probabilities: Tensor, per_class: int | None = None) -> Tensor:
    """Indices of the samples whose zero-shot label is trusted: for each class the k with its largest probability.

    Parameters
    ----------
    probabilities : Tensor of shape (N, C)
    per_class : int, optional
        k; by default N / C / 10, at least 1 and at most 100.

    Examples
    --------
    >>> trusted_samples(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), per_class=1).tolist()
    [0, 2]
    """
    n, classes = probabilities.shape
    k = min(n, max(1, min(n // classes // 10, 100)) if per_class is None else per_class)
    return probabilities.topk(k, dim=0).indices.flatten().unique()


def learn_unlabelled(
    composed: TaskVectorModel,
    inputs: Tensor | Mapping[str, Tensor],
    objective: str = "ufm",
    strong: Augment | None = None,
    threshold: float = 0.99,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 128,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    **options: Any,
) -> LearnedScaling:
    """Test-time adaptation without labels (stage 4): unsupervised FixMatch, or entropy, or fixed pseudo-labels.

    "ufm": the samples of which the base is surest (`trusted_samples`) keep the base's labels; of the others those count whose
    confidence on the plain view is above the threshold now, with the label that it gives. Cross-entropy on the strong view.
    Three quarters of a batch are unlabelled (one pass is an epoch), a quarter trusted ones, round and round.
    "pseudo-labels": every sample keeps the base's label; what the paper's released script does in fact.

    Parameters
    ----------
    composed : TaskVectorModel
    inputs : Tensor (N, ...) or mapping of str to Tensor
        The target's samples, all of them.
    objective : {"ufm", "entropy", "pseudo-labels"}, default="ufm"
    strong : callable (inputs, generator) -> inputs, optional
        The strong view; for pictures `crop_and_flip`. Without it both views are one.
    threshold : float, default=0.99
    epochs, lr, batch_size : int, float, int
    evaluate : callable (TaskVectorModel) -> float, optional
        Without it the last epoch is kept, the honest choice: there are no labels here. The paper's script chooses by
        labelled validation data.
    seed : int
    **options
        As for `learn_few_shot`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: a probability")
    data = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    data.pop("labels", None)
    n = len(next(iter(data.values())))
    if not n:
        raise ValueError("inputs is empty: give the target's samples")
    device = composed.values.device
    generator = torch.Generator().manual_seed(seed)

    def rows(chosen: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = {name: value[chosen].to(device) for name, value in data.items()}
        return ((batch[""],), {}) if "" in batch else ((), batch)

    def predict(weights: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        args, kwargs = rows(chosen)
        with torch.no_grad():
            return composed.run(weights, *args, **kwargs).float().softmax(-1)

    start = {name: value.detach() for name, value in composed.weights().items()}
    zero_shot = torch.cat([predict(start, some) for some in torch.arange(n).split(batch_size)])
    fixed = zero_shot.argmax(-1)
    trusted = trusted_samples(zero_shot).cpu()
    fresh, held = batch_size - batch_size // 4, batch_size // 4
    if objective != "ufm":
        fresh = batch_size
    endless = _shuffled(trusted, generator)

    def epoch() -> Iterator[tuple[Tensor, int]]:
        for some in torch.randperm(n, generator=generator).split(max(1, fresh)):
            more = (
                torch.stack(list(itertools.islice(endless, held)))
                if objective == "ufm" and held
                else some[:0]
            )
            yield torch.cat([some, more]), len(some)

    def loss(batch: tuple[Tensor, int]) -> Tensor:
        chosen, new = batch
        weights = composed.weights()
        args, kwargs = _augmented(*rows(chosen), strong, generator)
        out = composed.run(weights, *args, **kwargs).float()
        if objective == "entropy":
            log_p = out.log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1).mean()
        labels, counted = fixed[chosen.to(device)], torch.ones(len(chosen), device=device)
        if objective == "ufm":
            now = predict({name: value.detach() for name, value in weights.items()}, chosen[:new]).max(-1)
            sure = torch.isin(chosen[:new], trusted).to(device)
            labels = labels.clone()
            labels[:new] = torch.where(sure, labels[:new], now.indices)
            counted[:new] = (sure | (now.values > threshold)).float()
        each = F.cross_entropy(out, labels, reduction="none")
        return (each * counted).sum() / counted.sum().clamp_min(1)

    return learn(
        composed,
        epoch,
        loss,
        epochs=epochs,
        lr=lr,
        steps=math.ceil(n / max(1, fresh)),
        evaluate=_bound(evaluate, composed),
        **options,
    )


@torch.no_grad()
def search_without_gradients(
    composed: TaskVectorModel,
    objective: Callable[[TaskVectorModel], float],
    evaluations: int = 200,
    bound: float = 1.5,
    penalty: float = 0.05,
) -> float:
    """Coefficients by scipy's COBYQA on `objective + penalty mean |lambda|`: for black boxes, weaker than gradients.

    Parameters
    ----------
    composed : TaskVectorModel
        With at most 100 coefficients: `per="model"`.
    objective : callable (TaskVectorModel) -> float
        To be made small: a loss on the shots.
    evaluations : int, default=200
    bound : float, default=1.5
        Of each coefficient's size.
    penalty : float, default=0.05

    Returns
    -------
    float
        The objective at what was found (or at the start, where nothing was better).
    """
    from scipy.optimize import minimize

    size = composed.values.numel()
    if size > 100:
        raise ValueError(
            f"composed has {size} coefficients: a search needs at most 100; take per='model' or gradients"
        )

    def value(x: Any) -> float:
        composed.values.copy_(torch.as_tensor(x, dtype=torch.float32).view_as(composed.values))
        return objective(composed) + penalty * float(composed.values.abs().mean())

    start = composed.values.detach().reshape(-1).cpu().double().numpy()
    first = value(start)
    found = minimize(
        value, start, method="COBYQA", bounds=[(-bound, bound)] * size, options={"maxfev": evaluations}
    )
    value(found.x if found.fun <= first else start)
    return float(objective(composed))


@torch.no_grad()
def accuracy(
    composed: TaskVectorModel, batches: Iterable[Any], head: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Share of right answers on labelled batches."""
    weights = composed.weights()
    right = seen = 0
    for batch in batches:
        args, kwargs, labels = _labelled(batch, composed)
        out = composed.run(weights, *args, **kwargs)
        out = out if head is None else head(out)
        right, seen = right + int((out.argmax(-1) == labels).sum()), seen + len(labels)
    if not seen:
        raise ValueError("batches is empty: give data to judge by")
    return right / seen


def normalized_accuracy(
    composed: TaskVectorModel,
    tasks: Mapping[str, Iterable[Any]],
    reference: Mapping[str, float],
    heads: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> float:
    """Mean over tasks of accuracy over the accuracy of the task's own fine-tuning."""
    found = [
        accuracy(composed, batches, None if heads is None else heads[name]) / reference[name]
        for name, batches in tasks.items()
    ]
    return sum(found) / len(found)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of half to all of each picture's area, aspect 3/4 to 4/3, resized back; mirrored half of the time.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
    generator : torch.Generator
        On the CPU.
    """
    n = len(images)
    area, turn = 0.5 + 0.5 * torch.rand(n, generator=generator), 2 * torch.rand(n, generator=generator) - 1
    aspect = (turn * math.log(4 / 3)).exp()
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x = (1 - wide) * (2 * torch.rand(n, generator=generator) - 1)
    y = (1 - high) * (2 * torch.rand(n, generator=generator) - 1)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([wide * mirror, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


# -- helpers -----------------------------------------------------------------------------------------------------------


class _Repeated:
    """Batches read again until there are enough of them."""

    def __init__(self, batches: Iterable[Any], least: int) -> None:
        check_batches(batches)
        self.batches = batches
        count = _count(batches)
        if not count:
            raise ValueError("batches is empty: give data to learn from")
        self.times = max(1, math.ceil(least / count))
        self.steps = self.times * count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.batches


def _count(batches: Iterable[Any]) -> int:
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("control is empty: give data to keep up")


def _shuffled(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)]


def _labelled(batch: Any, composed: TaskVectorModel) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    args, kwargs, labels = split_batch(batch, composed.values.device)
    if labels is None:
        raise ValueError("batches: a batch has no labels; give dicts with 'labels' or (inputs, labels)")
    return args, kwargs, labels


def _augmented(
    args: tuple[Any, ...], kwargs: dict[str, Any], augment: Augment | None, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if augment is None:
        return args, kwargs
    if args:
        return (augment(args[0], generator), *args[1:]), kwargs
    name = "pixel_values" if "pixel_values" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: augment(kwargs[name], generator)}


def _bound(evaluate: Evaluate | None, composed: TaskVectorModel) -> Callable[[], float] | None:
    if evaluate is None:
        return None

    def value() -> float:
        with torch.no_grad():
            return float(evaluate(composed))

    return value
