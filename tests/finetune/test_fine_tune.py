import pytest
import torch
from torch import nn

from unfused.finetune import FineTune, LinearProbe
from unfused.nn.audio_model import AudioNTT


def small() -> AudioNTT:
    return AudioNTT(n_mels=16, width=4, dim=8)


class Louder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 100


def test_hard_and_one_hot_labels_give_the_same_loss():
    model, x, y = FineTune(small(), 3).eval(), torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 2, 1, 0])
    hard, soft = model(x, y), model(x, nn.functional.one_hot(y, 3).float())
    torch.testing.assert_close(hard.loss, soft.loss)
    assert hard.logits.shape == (6, 3) and model(x).loss is None


def test_label_smoothing_is_cross_entropy_with_smoothed_targets():
    x, y = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 2, 1, 0])
    model = FineTune(small(), 3, label_smoothing=0.3).eval()
    smooth = nn.functional.one_hot(y, 3) * 0.7 + 0.1
    expected = -(smooth * model(x).logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model(x, y).loss, expected)


def test_augments_in_training_only():
    model, x = FineTune(small(), 2, augment=Louder(), dropout=0.0), torch.randn(4, 1, 16, 16)
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean().item()))
    model.train()(x), model.eval()(x)
    assert seen[0] > 50 > seen[1]


@pytest.mark.parametrize("kind", [FineTune, LinearProbe])
def test_learns_and_the_probe_leaves_its_encoder_alone(kind):
    torch.manual_seed(0)
    x = torch.randn(64, 1, 16, 16)
    y = (torch.arange(64) % 2).long()
    x[y == 1, :, :8] += 4.0
    model = kind(small(), 2, dropout=0.0).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1 if kind is LinearProbe else 0.02
    )
    first = model(x, y).loss.item()
    for _ in range(40):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    assert model(x, y).loss.item() < 0.9 * first
    same = all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())
    assert same == (kind is LinearProbe)  # weights and batch-norm statistics


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes=1"):
        FineTune(small(), 1)
