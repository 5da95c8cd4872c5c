"""A pair of models that can be run at any weights between them, and judged: what skill localization works on."""

from __future__ import annotations

import copy as copying
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unfused.diagnose import _region as regions
from unfused.nn.calibration import calibration_error, fit_temperature

__all__ = ["Params", "Task", "again", "state_of"]

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Params = dict[str, Tensor]


class Task:
    """A pair of models that can be run at any weights between them, and judged."""

    def __init__(
        self, base: Any, tuned: Any, loss_fn: Any, outputs_fn: Any, metric: Any, exclude: Any, copy: Any
    ) -> None:
        if metric not in ("accuracy", "f1") and not callable(metric):
            raise ValueError(f"metric={metric!r}: choose 'accuracy', 'f1', or give a function")
        for name, patterns in (("exclude", exclude), ("copy", copy)):
            if isinstance(patterns, str):
                raise TypeError(f"{name}={patterns!r}: give a list of patterns")
        skeleton = tuned if isinstance(tuned, nn.Module) else base
        if not isinstance(skeleton, nn.Module):
            raise TypeError("base and tuned are state dicts: give one of them as a model, which runs")
        self.loss_fn, self.outputs_fn, self.metric = loss_fn, outputs_fn, metric
        self.metric_name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        self.model = copying.deepcopy(skeleton).eval().requires_grad_(False)
        before, after = state_of(base), state_of(tuned)
        self.base: Params = {}
        self.change: Params = {}
        self.copied: Params = {}
        for name, parameter in self.model.named_parameters():
            if name not in after:
                raise ValueError(f"tuned lacks tensor {name!r}: is it of the same architecture as base?")
            new = after[name].detach().to(parameter)
            old = before[name].detach().to(parameter) if name in before else None
            for which, tensor in (("base", old), ("tuned", new)):
                if tensor is not None and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{which}: tensor {name!r} holds values that are not finite")
            head = matches(name, copy)
            if old is None or old.shape != new.shape:
                if not head:
                    what = (
                        "is missing in base" if old is None else f"has the shape {tuple(old.shape)} in base"
                    )
                    raise ValueError(
                        f"tensor {name!r} of shape {tuple(new.shape)} in tuned {what}: if it was new there, name it in copy"
                    )
                self.copied[name] = new
            elif head and not torch.equal(old, new):
                self.copied[name] = new
            else:
                self.base[name] = old
                if not head and not matches(name, exclude) and new.is_floating_point():
                    self.change[name] = new.float() - old.float()
        self.eligible = sum(d.numel() for d in self.change.values())
        if not any(bool(d.any()) for d in self.change.values()):
            raise ValueError(
                "base and tuned do not differ in any eligible tensor: there is no skill to localize"
            )
        self._after = after

    def with_mask(self, indices: regions.Indices) -> Params:
        """Parameters of the graft."""
        tuned = {name: self._after[name].detach().flatten()[where] for name, where in indices.items()}
        return regions.graft(self.base, indices, tuned, self.copied)

    def tuned_params(self) -> Params:
        return {n: self._after[n].detach().to(p) for n, p in self.model.named_parameters()}

    def between(self, weight: Mapping[str, Tensor] | float) -> Params:
        """`base + weight * d` in the model's types."""
        found = dict(self.base) | self.copied
        for name, d in self.change.items():
            w = weight if isinstance(weight, float) else weight[name]
            found[name] = (self.base[name].float() + w * d).to(self.base[name].dtype)
        return found

    def run(self, params: Params, batch: Any) -> Any:
        device = next(iter(params.values())).device
        inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        return torch.func.functional_call(self.model, params, kwargs=inputs)

    def gradient(self, params: Params, batches: Iterable[Any]) -> tuple[float, Params]:
        """Mean loss over batches and its gradient in the eligible tensors."""
        leaves = {name: params[name].detach().requires_grad_() for name in self.change}
        total, count = 0.0, 0
        sums: Params = {name: torch.zeros_like(d) for name, d in self.change.items()}
        for batch in batches:
            with torch.enable_grad():
                output = self.run(params | leaves, batch)
                loss = self.loss_fn(output, batch) if self.loss_fn else field_of(output, "loss")
            if loss is None:
                raise ValueError("the model gives no loss: put labels into the batches, or give loss_fn")
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.float()
            total, count = total + float(loss.detach()), count + 1
        if not count:
            raise ValueError("data gave no batch")
        return total / count, {name: tensor / count for name, tensor in sums.items()}

    @torch.no_grad()
    def predict(self, params: Params, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and labels (n,)."""
        found = []
        for batch in batches:
            output = self.run(params, batch)
            logits, labels = (self.outputs_fn or answers)(output, batch)
            found.append((logits.float().cpu(), labels.cpu()))
        if not found:
            raise ValueError("the validation or test data gave no batch")
        return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])

    def score(self, logits: Tensor, labels: Tensor) -> float:
        predicted = logits.argmax(1)
        if callable(self.metric):
            return float(self.metric(predicted, labels))
        if self.metric == "accuracy":
            return float((predicted == labels).double().mean())
        both = int(((predicted == 1) & (labels == 1)).sum())
        return 2 * both / max(1, int((predicted == 1).sum()) + int((labels == 1).sum()))

    def interpolated(self, val: Iterable[Any]) -> Params:
        """`base + a d` with the a that is best on validation data; of equal ones the lowest loss."""
        tried = []
        for alpha in ALPHAS:
            logits, labels = self.predict(self.between(alpha), val)
            tried.append((self.score(logits, labels), -mean_loss(logits, labels), alpha))
        return self.between(max(tried)[2])

    def table(
        self,
        arms: Mapping[str, tuple[int, Params]],
        val: Iterable[Any],
        test: Iterable[Any],
        ood: Mapping[str, Iterable[Any]],
        temper: bool,
    ) -> Iterator[dict[str, Any]]:
        reference = self.predict(arms["tuned"][1], test)[0]
        for arm, (entries, params) in arms.items():
            logits, labels = self.predict(params, test)
            shifted = {name: self.predict(params, batches) for name, batches in ood.items()}
            variants = {arm: 1.0}
            if temper and arm == "tuned":
                variants["tuned, temperature"] = fit_temperature(*self.predict(params, val))
            for name, temperature in variants.items():
                yield {
                    "arm": name,
                    "entries": entries,
                    self.metric_name: self.score(logits, labels),
                    "ece": calibration_error(logits / temperature, labels),
                    "loss": mean_loss(logits / temperature, labels),
                    "agreement": float((logits.argmax(1) == reference.argmax(1)).double().mean()),
                    **{what: self.score(*found) for what, found in shifted.items()},
                }


def state_of(source: Any) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        named: dict[str, Tensor] = dict(source.state_dict())
        # Tied weights have one name as parameters and several in the state.
        return named
    if not isinstance(source, Mapping):
        raise TypeError(f"a {type(source).__name__} holds no weights: give a model or a state dict")
    return dict(source)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def again(batches: Iterable[Any], name: str, limit: int | None = None) -> Any:
    """What can be gone through several times."""
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, limit))
    if isinstance(batches, Mapping):
        raise TypeError(f"{name} is a mapping: give a list of batches, or a DataLoader")
    return batches


def field_of(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def answers(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits, labels = field_of(output, "logits"), batch.get("labels")
    if logits is None or labels is None or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "the batches' labels are not one per row (or token) of the model's logits: give outputs_fn"
        )
    labels = labels.to(logits.device)
    counted = labels != -100
    return logits[counted], labels[counted]


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, labels))
