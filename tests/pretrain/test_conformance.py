"""What every objective of the family must do; a new one is found by itself.

A constructor argument or batch column with a new name needs a value in `ARGUMENTS` or `batch`.
"""

from __future__ import annotations

import inspect
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import unfused.pretrain as family

OBJECTIVES = [
    value
    for value in (getattr(family, name) for name in family.__all__)
    if inspect.isclass(value) and issubclass(value, nn.Module)
]
ARGUMENTS = {
    "num_clusters": 4,
    "num_items": 24,
    "dim": 4,
    "dims": (8, 8, 8),
    "queue_size": 16,
    "momentum": 0.9,
}
each_objective = pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)


@pytest.fixture
def make(encoder, noise):
    def build(kind, seed=0):
        torch.manual_seed(seed)
        known = ARGUMENTS | {"encoder": deepcopy(encoder), "augment": deepcopy(noise)}
        wanted = inspect.signature(kind).parameters
        missing = [p.name for p in wanted.values() if p.default is p.empty and p.name not in known]
        assert not missing, f"{kind.__name__} needs {missing}: give them a value in ARGUMENTS"
        objective = kind(**{name: value for name, value in known.items() if name in wanted})
        if hasattr(objective, "reassign"):
            objective.reassign(np.random.default_rng(0).normal(size=(24, 6)))
        return objective

    return build


@pytest.fixture
def batch(inputs):
    columns = {"input_values": inputs, "labels": torch.arange(24) % 4, "index": torch.arange(24)}

    def of(kind):
        return {
            name: value
            for name, value in columns.items()
            if name in inspect.signature(kind.forward).parameters
        }

    return of


def test_the_family_has_its_objectives():
    assert {"UnFuSeD", "DECAR", "DeLoResS", "DeLoResM", "SLICER", "Contrastive"} <= {
        k.__name__ for k in OBJECTIVES
    }


@each_objective
def test_forward_gives_a_loss_with_gradients_for_the_encoder(kind, make, batch):
    objective = make(kind)
    out = objective(**batch(kind))
    assert out.loss.shape == () and torch.isfinite(out.loss)
    assert all(term.shape == () and not term.requires_grad for term in out.terms.values())
    out["loss"].backward()
    assert isinstance(objective.encoder, nn.Module)
    assert all(p.grad is not None for p in objective.encoder.parameters())
    trained = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not trained, f"without gradient, which DDP refuses: {trained}"


@each_objective
def test_forward_names_its_columns(kind):
    # `**kwargs` would make the Trainer pass its own arguments, and keep columns it should drop.
    kinds = {p.kind for p in inspect.signature(kind.forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


@each_objective
def test_it_trains_under_a_plain_trainer(kind, make, inputs, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_values": x, "labels": n % 4, "index": n} for n, x in enumerate(inputs)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def train():
        objective = make(kind)
        before = deepcopy(objective.encoder.state_dict())
        result = Trainer(model=objective, args=arguments, train_dataset=rows).train()
        assert result.global_step == 3 and np.isfinite(result.training_loss)
        changed = [
            not torch.equal(a, b)
            for a, b in zip(before.values(), objective.encoder.state_dict().values(), strict=True)
        ]
        assert all(changed)
        return result.training_loss, objective.state_dict()

    (loss, state), (again, other) = train(), train()
    assert loss == again
    for name, value in state.items():
        assert torch.equal(value, other[name]), f"{name} differs under the same seed"


@each_objective
def test_its_state_is_all_in_the_state_dict(kind, make, batch):
    one, two = make(kind, seed=0), make(kind, seed=1)
    for _ in range(2):
        one(**batch(kind))
    two.load_state_dict(one.state_dict())
    losses = []
    for objective in (one, two):
        torch.manual_seed(0)
        losses.append([objective(**batch(kind)).loss.item() for _ in range(2)])
    assert losses[0] == losses[1]


@each_objective
def test_its_weights_fit_into_safetensors(kind, make, tmp_path):
    from safetensors.torch import load_file, save_file

    state = make(kind).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    addresses = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(addresses)) == len(addresses), "two names for one tensor"


@each_objective
def test_it_survives_bf16_autocast(kind, make, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = make(kind)(**batch(kind)).loss
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()


@each_objective
def test_its_docstring_is_complete(kind):
    from unfused.catalog import methods

    (method,) = [m for m in methods("pretrain") if m.module == kind.__module__]
    assert method.reference and method.needs
    for section in ("Parameters", "Attributes", "Examples"):
        assert f"    {section}\n" in kind.__doc__
