"""Models that infer which task a prompt means, and are then tuned to one task: regression in context, and two alphabets.

*Regression.* A small GPT reads x_1, y_1, ..., x_k, y_k, x and predicts y, for w from N(0, I) or from a fixed set of 32; it is
pretrained on both alike and tuned on the set alone. The exact predictor is known (`unfused.diagnose.MixtureRegression`).

*Two alphabets.* A tiny Llama has seen two skills with the same questions, told apart by their examples alone,

    [2+3]=2+3;[4+1]=4+1;[7+2]=7+2;        copies            [2+3]=5;[4+1]=5;[7+2]=9;        adds

in two alphabets, of which the second is a cipher of the first. It is tuned to add in the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.tuning import Batch, tune

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from unfused.claims.lab import Lab

__all__ = [
    "DIM",
    "EXEMPLARS",
    "NOISE",
    "add_or_copy",
    "alphabet_model",
    "decipher",
    "encipher",
    "fixed_tasks",
    "questions",
    "regression_data",
    "regressor",
    "replies",
    "tuned_regressor",
]

DIM, TASKS, EXEMPLARS, NOISE = 5, 32, 20, 1.0


# -- regression --------------------------------------------------------------------------------------------------------


def fixed_tasks() -> np.ndarray:
    """The set W, (32, 5): one draw for pretraining, tuning and tests."""
    return np.random.default_rng(64).normal(size=(TASKS, DIM))


def regression_data(count: int, alpha: float, seed: int) -> Batch:
    """Prompts of which a share `alpha` is of W: `X` (count, 21, 5), `y` (count, 21), and `w` (count, 5) behind them."""
    rng = np.random.default_rng([seed, 17])
    w = rng.normal(size=(count, DIM))
    known = rng.random(count) < alpha
    w = np.where(known[:, None], fixed_tasks()[rng.integers(TASKS, size=count)], w)
    X = rng.normal(size=(count, EXEMPLARS + 1, DIM))
    y = np.einsum("bkd,bd->bk", X, w) + NOISE * rng.normal(size=X.shape[:2])
    return {name: torch.from_numpy(v).float() for name, v in (("X", X), ("y", y), ("w", w))}


class Regressor(nn.Module):
    """GPT-2 (width 64, 3 layers, 4 heads) on tokens x_1, y_1, x_2, ...; every x is answered from what stands before it."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        self.read_in, self.read_out = nn.Linear(DIM, 64), nn.Linear(64, 1)
        self.body = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_embd=64,
                n_layer=3,
                n_head=4,
                n_positions=2 * EXEMPLARS + 2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def forward(self, X: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None = None) -> Any:
        from transformers.modeling_outputs import ModelOutput

        padded = nn.functional.pad(y[..., None], (0, DIM - 1))  # (B, k, d)
        tokens = torch.stack([X, padded], 2).flatten(1, 2)[:, :-1]  # the last y is not shown
        hidden = self.body(inputs_embeds=self.read_in(tokens), use_cache=False).last_hidden_state
        found = self.read_out(hidden[:, ::2])[..., 0]  # (B, k)
        return ModelOutput(loss=(found - y).square().mean(), logits=found)


def regressor(lab: Lab) -> Regressor:
    """Pretrained on W and fresh tasks alike."""
    steps = lab.pick(smoke=3, desk=4000)

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Regressor()
            data = regression_data(min(steps, 3000) * 64, 0.5, seed=0)
            tune(model, data, lr=1e-3, steps=steps, batch_size=64, warmup=0.05)
        return dict(model.state_dict())

    model = Regressor()
    model.load_state_dict(lab.cached("regressor", {"steps": steps}, pretrain))
    return model.eval()


def tuned_regressor(lab: Lab, seed: int, alpha: float, steps: int) -> Regressor:
    """Tuned on prompts of which a share `alpha` is of W, at the rate of pretraining."""
    model = regressor(lab)
    tune(model, regression_data(steps * 64, alpha, seed=100 + seed), lr=1e-3, steps=steps, seed=seed)
    return model


# -- two alphabets -----------------------------------------------------------------------------------------------------

LETTERS = "0123456789+=;[]"
SHIFT = len(LETTERS)
ITEMS = 3
"""Two examples and a question."""


def encipher(text: str) -> str:
    """The second alphabet: each sign of the first has one of its own."""
    return text.translate({ord(c): chr(ord("a") + i) for i, c in enumerate(LETTERS)})


def decipher(text: str) -> str:
    """Back again.

    Examples
    --------
    >>> decipher(encipher("[2+3]=5;"))
    '[2+3]=5;'
    """
    return text.translate({ord("a") + i: c for i, c in enumerate(LETTERS)})


def _encode(text: str) -> list[int]:
    return [1 + (LETTERS.index(c) if c in LETTERS else SHIFT + ord(c) - ord("a")) for c in text]


def _decode(ids: list[int]) -> str:
    return "".join((LETTERS + "abcdefghijklmno")[i - 1] for i in ids if i)


def questions(count: int, skill: str, seed: int) -> tuple[list[str], list[str]]:
    """Prompts, with two examples of the skill ("copy" or "add"), and answers, in the first alphabet."""
    rng = np.random.default_rng([seed, skill == "add"])
    prompts, answers = [], []
    for pairs in rng.integers(10, size=(count, ITEMS, 2)).tolist():
        said = [f"{a}+{b}" if skill == "copy" else str(a + b) for a, b in pairs]
        asked = [f"[{a}+{b}]=" for a, b in pairs]
        shown = "".join(f"{q}{a};" for q, a in zip(asked[:-1], said[:-1], strict=True))
        prompts.append(shown + asked[-1])
        answers.append(said[-1])
    return prompts, answers


def add_or_copy(count: int, skills: tuple[str, ...], alphabets: int, seed: int) -> Batch:
    """Whole sequences, `labels` on all their answers, in turn of each skill and alphabet."""
    rows: list[str] = []
    part = count // (len(skills) * alphabets) + 1
    for skill in skills:
        prompts, answers = questions(part * alphabets, skill, seed)
        texts = [f"{p}{a};" for p, a in zip(prompts, answers, strict=True)]
        rows += texts[:part] + ([encipher(text) for text in texts[part:]] if alphabets == 2 else [])
    ids = torch.zeros(len(rows), ITEMS * 10, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(_encode(row))
    plain = torch.where(ids > SHIFT, ids - SHIFT, ids) - 1
    after = (plain == LETTERS.index("=")).cumsum(1) > (plain == LETTERS.index(";")).cumsum(1)
    answer = torch.zeros_like(after)
    answer[:, 1:] = after[:, :-1]  # from behind "=" up to ";"
    labels = torch.where(answer & (ids > 0), ids, -100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def alphabet_model(lab: Lab) -> LlamaForCausalLM:
    """Llama (width 64, 3 layers, 4 heads) that copies and adds in both alphabets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    steps = lab.pick(smoke=3, desk=2500)
    config = LlamaConfig(
        vocab_size=2 * SHIFT + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.12,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            data = add_or_copy(min(steps, 1000) * 64, ("copy", "add"), 2, seed=0)
            tune(model, data, lr=2e-3, steps=steps, warmup=0.05)
        return dict(model.state_dict())

    model = LlamaForCausalLM(config)
    model.load_state_dict(lab.cached("two-alphabets", {"steps": steps}, pretrain))
    return model.eval()


@torch.inference_mode()
def replies(model: nn.Module, prompts: list[str]) -> list[str]:
    """Greedy answers of four signs or up to the end sign of the prompt's alphabet."""
    lengths = {len(p) for p in prompts}
    by_prompt: dict[str, str] = {}
    for length in lengths:
        some = [p for p in dict.fromkeys(prompts) if len(p) == length]
        ids = torch.tensor([_encode(p) for p in some])
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        for prompt, new in zip(some, ids[:, length:].tolist(), strict=True):
            by_prompt[prompt] = _decode(new).split(encipher(";"))[0].split(";")[0]
    return [by_prompt[p] for p in prompts]
