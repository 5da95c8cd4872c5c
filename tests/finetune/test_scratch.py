import torch

from unfused.finetune import FineTune, scratch
from unfused.nn.audio_model import AudioNTT


def small() -> AudioNTT:
    return AudioNTT(n_mels=16, width=4, dim=8)


def test_scratch_is_seeded_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = scratch(small, 3, seed=1), scratch(small, 3, seed=1), scratch(small, 3, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.encoder.blocks[0][0].weight, other.encoder.blocks[0][0].weight)


def test_options_reach_the_objective():
    objective = scratch(small, 3, dropout=0.1, label_smoothing=0.2)
    assert isinstance(objective, FineTune)
    assert (objective.dropout.p, objective.label_smoothing, objective.head.out_features) == (0.1, 0.2, 3)
