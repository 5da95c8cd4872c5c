"""The worlds of implicit tasks: what is drawn, the cipher, labels on answers alone, what a model may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab import implicit_tasks as tasks


def test_regression_data():
    data = tasks.regression_data(400, 0.5, seed=3)
    assert data["X"].shape == (400, 21, 5) and data["y"].shape == (400, 21)
    distance = np.linalg.norm(data["w"].numpy()[:, None] - tasks.fixed_tasks(), axis=-1).min(1)
    assert 0.4 < (distance < 1e-5).mean() < 0.6
    noise = data["y"] - torch.einsum("bkd,bd->bk", data["X"], data["w"])
    assert abs(float(noise.std()) - tasks.NOISE) < 0.05
    assert torch.equal(data["y"], tasks.regression_data(400, 0.5, seed=3)["y"])


def test_an_answer_depends_on_what_stands_before_it_alone():
    model, data = tasks.regressor(Lab("smoke")), tasks.regression_data(2, 0.0, seed=0)
    with torch.no_grad():
        before = model(data["X"], data["y"]).logits
        data["y"][:, 7] += 5
        after = model(data["X"], data["y"]).logits
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5) and not torch.allclose(
        before[:, 8], after[:, 8]
    )


@pytest.mark.parametrize("skill", ["copy", "add"])
def test_questions_and_cipher(skill):
    prompts, answers = tasks.questions(20, skill, seed=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        a, b = prompt[prompt.rindex("[") + 1 : -2].split("+")
        assert answer == (f"{a}+{b}" if skill == "copy" else str(int(a) + int(b)))
        assert tasks.decipher(tasks.encipher(prompt)) == prompt
        assert not set(tasks.encipher(prompt)) & set(prompt)


def test_labels_are_answers_in_both_alphabets():
    batch = tasks.add_or_copy(8, ("copy", "add"), 2, seed=0)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        text = tasks.decipher(tasks._decode(ids))
        said = tasks.decipher(tasks._decode([i for i in labels if i > 0]))
        assert said == "".join(part.split("=")[1] + ";" for part in text.split(";")[:-1])
    plain = tasks.add_or_copy(8, ("add",), 1, seed=0)["input_ids"]
    assert plain.max() <= len(tasks.LETTERS) < batch["input_ids"].max()


def test_replies_end_at_the_end_sign():
    class Fixed(torch.nn.Module):
        """Says 1 2 ; whatever comes, in the alphabet of the prompt."""

        def forward(self, input_ids, use_cache=False):
            said = [tasks._encode(c)[0] for c in "12;;"]
            place = input_ids.shape[1] - self.length
            shift = torch.where(input_ids[:, 0] > len(tasks.LETTERS), len(tasks.LETTERS), 0)
            logits = torch.nn.functional.one_hot(said[place] + shift, 31).float()[:, None]
            return type("Out", (), {"logits": logits})

    model = Fixed()
    prompt = "[1+2]="
    model.length = len(prompt)
    assert tasks.replies(model, [prompt, tasks.encipher(prompt)]) == ["12", tasks.encipher("12")]
