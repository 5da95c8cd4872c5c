"""CGE: writes texts that a fine-tuned language model finds likely and its base does not, to show what the tuning data held.

No data and no prompt are needed, only both models. From BOS, with p_ft and p_pre the tuned and the pretrained model, every
token is scored

    s(x) = log p_ft(x) - gamma log p_pre(x),    -inf where p_ft(x) < alpha max_v p_ft(v),

and texts are drawn by beam sampling: running score + s over all beams and tokens, 2 x beams drawn without replacement from the
softmax, the best kept; EOS is a token like any other. *Static* exploration repeats this. *Iterative* exploration takes a
gradient step of a copy of the base on each text, so that what has been shown is no longer new and the next text is another.
`rank_by_ratio` on samples of the tuned model is the plain baseline, and scores documents that exist.

At BOS the mask decides what can appear at all: a domain that makes up 5 % of the data begins with a token of small probability.
`alpha_first` is alpha for the first tokens; a warning tells where fewer than five may begin a text.

Reference: What's New in My Data? Novelty Exploration via Contrastive Generation, ICLR 2025, arXiv:2410.14765.
Needs: the pretrained model, gradients.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor

from unfused.diagnose._language_model import (
    NextToken,
    adapter_off,
    load_pair,
    padded,
    start_token,
    token_logprobs,
)
from unfused.diagnose._report import Report, axes

__all__ = [
    "ContrastiveLogitsProcessor",
    "NovelText",
    "NoveltyReport",
    "explore_novelty",
    "rank_by_ratio",
    "sample_texts",
]

COMMAND = {
    "function": "explore_models",
    "arguments": {
        "base": {"type": "str", "help": "Pretrained causal language model: folder or hub id."},
        "tuned": {"type": "str", "help": "The fine-tuned one, or a folder with a PEFT adapter."},
        "n": {"type": "int", "default": 100, "help": "Texts."},
        "static": {"type": "bool", "default": False, "help": "Leave the base as it is."},
        "alpha": {"type": "float", "default": 0.1, "help": "Plausibility: share of the likeliest token."},
        "alpha_first": {"type": "float", "default": None, "help": "The same for a text's first token."},
        "gamma": {"type": "float", "default": 1.0, "help": "Weight of the base."},
        "num_beams": {"type": "int", "default": 4, "help": "Beams."},
        "max_length": {"type": "int", "default": 256, "help": "Tokens of a text."},
        "lr": {"type": "float", "default": 5e-5, "help": "Of the base's steps."},
        "update": {"type": "str", "default": "full", "help": "full, lora (less memory) or unlearn."},
        "groups": {"type": "int", "default": 8, "help": "Clusters of the texts; 0 for none."},
        "device": {"type": "str", "default": "cpu", "help": "cpu, cuda, ..."},
        "seed": {"type": "int", "default": 0, "help": "Of everything random."},
    },
}

FEW = 5
UPDATES = ("full", "lora", "unlearn")


class ContrastiveLogitsProcessor(LogitsProcessor):
    """`log p_ft - gamma log p_base` under the plausibility mask, for `generate` of any causal model, beams included.

    The base keeps keys and values of its own, which follow the rows wherever beams move them.

    Parameters
    ----------
    base : nn.Module or callable (ids) -> Tensor
        The model to contrast with, or a function of ids (rows, length) that gives its next tokens' log-probabilities.
    alpha : float, default=0.1
        Tokens below this share of the tuned model's likeliest are out. At 0 tokens that only look good because the base calls
        them impossible are let in.
    gamma : float, default=1.0
    alpha_first : float, optional
        In place of alpha for the first tokens.
    first_tokens : int, default=1
    prompt_length : int, default=1
        Tokens before the first that is generated.
    floor : tuple, optional
        ("top_p", p) or ("top_k", k): the base's log-probabilities below the smallest of its likeliest tokens are raised to it.

    Examples
    --------
    >>> base = lambda ids: torch.tensor([[0.5, 0.49, 0.01]]).log()
    >>> contrast = ContrastiveLogitsProcessor(base, alpha=0.1)
    >>> tuned = torch.tensor([[0.48, 0.04, 0.48]]).log()
    >>> contrast(torch.zeros(1, 1, dtype=torch.long), tuned).round(decimals=2)
    tensor([[-0.0400,    -inf,  3.8700]])
    """

    def __init__(
        self,
        base: nn.Module | Callable[[torch.Tensor], torch.Tensor],
        alpha: float = 0.1,
        gamma: float = 1.0,
        *,
        alpha_first: float | None = None,
        first_tokens: int = 1,
        prompt_length: int = 1,
        floor: tuple[str, float] | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("alpha_first", alpha_first)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: between 0 and 1")
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma={gamma}: a number of at least 0")
        if floor is not None and floor[0] not in ("top_p", "top_k"):
            raise ValueError(f"floor={floor!r}: give ('top_p', p) or ('top_k', k)")
        self.base = NextToken(base) if isinstance(base, nn.Module) else base
        self.alpha, self.gamma, self.alpha_first = alpha, gamma, alpha_first
        self.first_tokens, self.prompt_length, self.floor = first_tokens, prompt_length, floor
        self.begin = 0
        """How many tokens the mask left at the first position, at last."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tuned = scores.float().log_softmax(-1)
        base = self.base(input_ids).to(tuned.device)
        common = min(tuned.shape[-1], base.shape[-1])  # embeddings may have been resized
        found = torch.full_like(tuned, -math.inf)
        tuned, base = tuned[:, :common], self._raised(base[:, :common])
        made = input_ids.shape[1] - self.prompt_length
        first = self.alpha_first is not None and made < self.first_tokens
        alpha = self.alpha_first if first and self.alpha_first is not None else self.alpha
        allowed = tuned >= tuned.amax(-1, keepdim=True) + (math.log(alpha) if alpha > 0 else -math.inf)
        if made == 0:
            self.begin = int(allowed.sum(-1).min())
        contrast = (tuned - self.gamma * base).masked_fill(~allowed | tuned.isneginf(), -math.inf)
        # where the base is certain that a token cannot be, and no floor is set, the largest finite number
        found[:, :common] = contrast.nan_to_num(nan=-math.inf, posinf=1e4, neginf=-math.inf)
        return found  # type: ignore[return-value]

    def _raised(self, base: torch.Tensor) -> torch.Tensor:
        if self.floor is None:
            return base
        kind, amount = self.floor
        ordered = base.sort(-1, descending=True).values
        if kind == "top_k":
            kept = torch.full_like(base[:, :1], max(1, min(int(amount), base.shape[-1])), dtype=torch.long)
        else:
            before = ordered.exp().cumsum(-1) - ordered.exp()
            kept = (before < amount).sum(-1, keepdim=True).clamp_min(1)
        return torch.maximum(base, ordered.gather(1, kept - 1))


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NovelText:
    """One text.

    Attributes
    ----------
    text : str
        Up to the first EOS.
    step : int
        When it was written, from 0.
    tokens : tuple of int
        All that was generated, BOS left out; the base learned from all of it.
    counted : int
        How many of these are the text, its EOS included.
    logp_ft, logp_pre, logp_base : float
        Of the text under the tuned, the pretrained, and the base as it was when the text was written.
    ratio_per_token : float
        `(logp_ft - logp_pre) / counted`.
    group : str
        "" where none was asked for.
    """

    text: str
    step: int
    tokens: tuple[int, ...]
    counted: int
    logp_ft: float
    logp_pre: float
    logp_base: float
    ratio_per_token: float
    group: str = ""


@dataclass(frozen=True, eq=False)
class NoveltyReport(Report):
    """Texts that show what fine-tuning brought.

    Attributes
    ----------
    texts : tuple of NovelText
        In the order in which they were found.
    base_loss : tuple of float
        Loss of the base, per token, on its own samples from before, first without a step and then after each; empty where
        it took none.
    stopped : str
        Why there are fewer texts than asked for; else "".
    first_tokens : int or None
        How many tokens may begin a text.
    """

    texts: tuple[NovelText, ...]
    base_loss: tuple[float, ...] = ()
    stopped: str = ""
    first_tokens: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def groups(self) -> dict[str, int]:
        """Group -> texts in it, in the order of discovery."""
        found: dict[str, int] = {}
        for text in self.texts:
            found[text.group] = found.get(text.group, 0) + 1
        return found

    def discovered(self) -> list[int]:
        """How many distinct groups were seen up to each text."""
        seen: set[str] = set()
        return [len(seen := seen | {text.group}) for text in self.texts]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "step": t.step,
                "group": t.group,
                "ratio per token": t.ratio_per_token,
                "log p tuned": t.logp_ft,
                "log p pretrained": t.logp_pre,
                "tokens": t.counted,
                "text": t.text,
            }
            for t in self.texts
        ]

    def headline(self) -> str:
        if not self.texts:
            return "No text was found."
        ratio = float(np.mean([t.ratio_per_token for t in self.texts]))
        found = self.groups()
        kinds = f" in {len(found)} groups" if len(found) > 1 else ""
        return f"{len(self.texts)} texts{kinds}, on average {ratio:.2f} nats a token likelier to the tuned model."

    def notes(self) -> list[str]:
        said = [
            "Generated text is evidence, not quotation: it may be made up, mix several domains in one text, or repeat private "
            "training data word by word. Treat it as you would the data."
        ]
        if self.first_tokens is not None and self.first_tokens < FEW:
            said.append(
                f"Only {self.first_tokens} tokens may begin a text: what begins otherwise cannot appear. Lower alpha_first."
            )
        return [*said, *([self.stopped] if self.stopped else [])]

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "Distinct groups among the texts so far": self.plot,
            "How much likelier each text is to the tuned model": lambda ax: self.plot(ax, part="ratio"),
        }

    def plot(self, ax: Any = None, part: str = "discovery") -> Any:
        """`part`: "discovery", distinct groups by texts, or "ratio", nats a token by step."""
        if part not in ("discovery", "ratio"):
            raise ValueError(f"part={part!r}: choose 'discovery' or 'ratio'")
        ax = axes(ax)
        if part == "discovery":
            ax.step(range(1, len(self.texts) + 1), self.discovered(), where="post")
            ax.set(xlabel="texts", ylabel="groups found", ylim=(0, None))
        else:
            for group in self.groups():
                some = [t for t in self.texts if t.group == group]
                ax.plot([t.step for t in some], [t.ratio_per_token for t in some], "o", ms=4, label=group)
            ax.set(xlabel="step", ylabel="log ratio per token")
            if 1 < len(self.groups()) <= 12:
                ax.legend(fontsize="small")
        return ax


# -- generating --------------------------------------------------------------------------------------------------------


def explore_novelty(
    finetuned: nn.Module,
    pretrained: nn.Module | None,
    tokenizer: Any,
    *,
    n: int = 100,
    iterative: bool = True,
    alpha: float = 0.1,
    gamma: float = 1.0,
    alpha_first: float | None = None,
    first_tokens: int = 1,
    floor: tuple[str, float] | None = None,
    num_beams: int = 4,
    max_length: int = 256,
    temperature: float = 1.0,
    lr: float = 5e-5,
    update: str = "full",
    max_drift: float | None = 0.1,
    candidates: Sequence[str] | None = None,
    groups: Callable[[str], str] | int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> NoveltyReport:
    """Texts by contrastive generation. Neither model is changed.

    Parameters
    ----------
    finetuned : nn.Module
        Causal language model of transformers, or a PEFT model.
    pretrained : nn.Module or None
        With the same tokenizer. None: `finetuned` with its adapter off.
    tokenizer : PreTrainedTokenizer
        Both models' own.
    n : int, default=100
        Texts.
    iterative : bool, default=True
        A step of AdamW (constant rate, no decay, norm clipped at 1) on each text.
    alpha, gamma, alpha_first, first_tokens, floor
        See `ContrastiveLogitsProcessor`.
    num_beams : int, default=4
        1 is plain sampling.
    max_length : int, default=256
        Tokens of each text, BOS left out.
    temperature : float, default=1.0
        Of the contrastive scores.
    lr : float, default=5e-5
        Too small is static; too large, and the base forgets what is ordinary, which then looks new.
    update : {"full", "lora", "unlearn"}, default="full"
        What takes the step: a copy of the base; a LoRA on it that is thrown away and shares its weights; or, upwards, a copy
        of the tuned model, which unlearns the text.
    max_drift : float, optional, default=0.1
        Stop when the base's loss on its own samples from the start has risen by this share. None: go on.
    candidates : sequence of str, optional
        Pick the one of the largest ratio per token at each step instead of generating; each once.
    groups : callable (text) -> str, or int, optional
        Label of a text; or how many clusters of the tuned model's mean last hidden states to make.
    batch_size : int, default=16
        Texts that static exploration writes together, and rows of a scoring pass.
    seed : int, default=0

    Returns
    -------
    NoveltyReport

    Raises
    ------
    ValueError
        For numbers out of range, no BOS and no EOS, no candidates.
    TypeError
        If `pretrained` is None and there is no adapter.
    """
    for name, value in (
        ("n", n),
        ("num_beams", num_beams),
        ("max_length", max_length),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if update not in UPDATES:
        raise ValueError(f"update={update!r}: choose one of {', '.join(UPDATES)}")
    if not temperature > 0 or not lr >= 0:
        raise ValueError(f"temperature={temperature}, lr={lr}: above 0, and at least 0")
    if candidates is not None and not len(candidates):
        raise ValueError("candidates is empty: give texts to pick from, or leave it out")
    start = start_token(tokenizer)
    device = next(finetuned.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with contextlib.ExitStack() as exits:
        exits.enter_context(_in_eval(finetuned, pretrained))
        exits.enter_context(torch.random.fork_rng(_cuda(device)))
        torch.manual_seed(seed)  # dropout of the steps
        learner = exits.enter_context(_Learner(finetuned, pretrained, update if iterative else "none", lr))
        contrast = ContrastiveLogitsProcessor(
            lambda ids: learner.base_next(ids),
            alpha,
            gamma,
            alpha_first=alpha_first,
            first_tokens=first_tokens,
            floor=floor,
        )
        own: list[list[int]] = []
        if iterative and update != "unlearn":
            learner.fresh_caches()
            ids = torch.full((8, 1), start, device=device)
            own = _beam_sample(learner.base_next, None, ids, 1, min(64, max_length), 1.0, generator).tolist()
        losses = [_loss(learner.base_logprobs(own))] if own else []
        pool = None if candidates is None else _Pool(tokenizer, candidates, start, max_length)
        texts: list[NovelText] = []
        rows: list[list[int]]
        stopped = ""
        while len(texts) < n and not stopped:
            if pool is not None:
                if not pool.rows:
                    stopped = f"All {len(candidates or ())} candidates have been picked."
                    break
                rows = [pool.take(learner, batch_size)]
            else:
                count = 1 if iterative else min(batch_size, n - len(texts))
                learner.fresh_caches()
                ids = torch.full((count, 1), start, device=device)
                rows = _beam_sample(
                    learner.tuned_next, contrast, ids, num_beams, max_length, temperature, generator
                ).tolist()
            texts += _recorded(rows, len(texts), learner, tokenizer, batch_size)
            if iterative:
                learner.step(rows[0])
                if own:
                    losses.append(_loss(learner.base_logprobs(own)))
                    if max_drift is not None and losses[-1] > (1 + max_drift) * losses[0] and len(texts) < n:
                        stopped = (
                            f"Stopped after {len(texts)} of {n} texts: the base's loss on its own samples rose from "
                            f"{losses[0]:.3f} to {losses[-1]:.3f}; lower lr, or raise max_drift."
                        )
        texts = _grouped(texts, groups, finetuned, start, batch_size, seed)
    begin = contrast.begin if pool is None else None
    if begin is not None and begin < FEW:
        warnings.warn(
            f"alpha={alpha if alpha_first is None else alpha_first} leaves {begin} tokens that may begin a text: what begins "
            "otherwise cannot appear; lower alpha_first",
            stacklevel=2,
        )
    settings = {
        "iterative": iterative,
        "alpha": alpha,
        "alpha_first": alpha_first,
        "gamma": gamma,
        "num_beams": num_beams,
        "max_length": max_length,
        "lr": lr,
        "update": update if iterative else None,
        "seed": seed,
    }
    return NoveltyReport(tuple(texts), tuple(losses), stopped, begin, settings)


def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    n: int,
    *,
    max_length: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[int]]:
    """Plain samples from BOS, as ids (BOS left out), for `rank_by_ratio`."""
    device = next(model.parameters()).device
    generator, start = torch.Generator(device).manual_seed(seed), start_token(tokenizer)
    found: list[list[int]] = []
    with _in_eval(model, None):
        while len(found) < n:
            ids = torch.full((min(batch_size, n - len(found)), 1), start, device=device)
            rows = _beam_sample(NextToken(model), None, ids, 1, max_length, 1.0, generator)
            found += rows[:, 1:].tolist()
    return found


def rank_by_ratio(
    texts: Sequence[str] | Sequence[Sequence[int]],
    finetuned: nn.Module,
    pretrained: nn.Module | None,
    tokenizer: Any,
    *,
    groups: Callable[[str], str] | int | None = None,
    max_length: int = 2048,
    batch_size: int = 16,
    seed: int = 0,
) -> NoveltyReport:
    """Texts, or rows of ids without BOS, by the log ratio per token of tuned to pretrained model, largest first."""
    if not len(texts):
        raise ValueError("texts is empty: give documents or samples to rank")
    start = start_token(tokenizer)
    with _in_eval(finetuned, pretrained), _Learner(finetuned, pretrained, "none", 0.0) as learner:
        rows = [
            [start, *(tokenizer(t, add_special_tokens=False)["input_ids"] if isinstance(t, str) else t)][
                : max_length + 1
            ]
            for t in texts
        ]
        found = sorted(_recorded(rows, 0, learner, tokenizer, batch_size), key=lambda t: -t.ratio_per_token)
        found = _grouped(found, groups, finetuned, start, batch_size, seed)
    return NoveltyReport(tuple(found))


def _beam_sample(
    next_token: Callable[[torch.Tensor], torch.Tensor],
    process: LogitsProcessor | None,
    ids: torch.Tensor,
    beams: int,
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """From starts (B, 1), the best row of each after `length` tokens, (B, 1 + length).

    Drawing without replacement from a softmax is taking the largest of scores plus Gumbel noise.
    """
    batch = len(ids)
    total = torch.zeros(batch, 1, device=ids.device)  # (B, beams so far)
    for _ in range(length):
        scores = next_token(ids).to(ids.device)
        if process is not None:
            scores = process(ids, scores)  # type: ignore[arg-type]
        scores = (total[..., None] + scores.view(batch, -1, scores.shape[-1]) / temperature).flatten(1)
        width = scores.shape[1] // total.shape[1]
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device)
        noisy = scores - (-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        drawn = noisy.topk(min(beams if beams == 1 else 2 * beams, scores.shape[1])).indices
        best = scores.gather(1, drawn).topk(min(beams, drawn.shape[1]))
        chosen = drawn.gather(1, best.indices)  # (B, beams), best first
        rows = chosen // width + total.shape[1] * torch.arange(batch, device=ids.device)[:, None]
        ids = torch.cat([ids[rows.flatten()], (chosen % width).view(-1, 1)], 1)
        total = best.values
    return ids.view(batch, -1, ids.shape[1])[:, 0]


def _recorded(
    rows: Sequence[Sequence[int]], step: int, learner: _Learner, tokenizer: Any, batch_size: int
) -> list[NovelText]:
    eos, cut = tokenizer.eos_token_id, []
    for row in rows:
        end = row.index(eos, 1) + 1 if eos in row[1:] else len(row)
        cut.append(list(row[:end]))
    tuned = learner.first_logprobs(cut, batch_size)
    before = learner.pretrained_logprobs(cut, batch_size)
    now = learner.base_logprobs(cut, batch_size) if learner.moved else before
    found = []
    for i, (row, short) in enumerate(zip(rows, cut, strict=True)):
        counted = len(short) - 1
        said = short[1:-1] if eos is not None and short[-1] == eos else short[1:]
        ft, pre, base = (float(values[i].double().sum()) for values in (tuned, before, now))
        text = tokenizer.decode(said)
        found.append(
            NovelText(text, step + i, tuple(row[1:]), counted, ft, pre, base, (ft - pre) / max(1, counted))
        )
    return found


def _grouped(
    texts: list[NovelText],
    groups: Callable[[str], str] | int | None,
    model: nn.Module,
    start: int,
    batch_size: int,
    seed: int,
) -> list[NovelText]:
    if not groups or not texts:
        return texts
    if callable(groups):
        labels = [str(groups(t.text)) for t in texts]
    else:
        from unfused.nn.kmeans import kmeans

        rows = [[start, *t.tokens[: t.counted]] for t in texts]
        ids = kmeans(_embeddings(model, rows, batch_size), min(int(groups), len(texts)), seed=seed)[1]
        order = {g: i + 1 for i, g in enumerate(dict.fromkeys(ids.tolist()))}  # in the order of discovery
        labels = [f"group {order[g]}" for g in ids.tolist()]
    return [NovelText(**{**vars(t), "group": label}) for t, label in zip(texts, labels, strict=True)]


@torch.inference_mode()
def _embeddings(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """Means of the last hidden states, unit length: (N, d)."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        ids, mask = (t.to(device) for t in padded(rows[start : start + batch_size]))
        hidden = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[-1]
        weight = mask[..., None].float()
        mean = (hidden.float() * weight).sum(1) / weight.sum(1)
        found.append(nn.functional.normalize(mean, dim=-1).cpu())
    return torch.cat(found).numpy()


class _Pool:
    """Candidates, each picked once."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int, length: int) -> None:
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self.rows = [[start, *row[:length]] for row in ids if len(row)]
        self.tuned: list[float] | None = None

    def take(self, learner: _Learner, batch_size: int) -> list[int]:
        if self.tuned is None or learner.unlearns:
            self.tuned = [float(v.mean()) for v in learner.tuned_logprobs(self.rows, batch_size)]
        base = [float(v.mean()) for v in learner.base_logprobs(self.rows, batch_size)]
        best = int(np.argmax(np.subtract(self.tuned, base)))
        del self.tuned[best]
        return self.rows.pop(best)


# -- the pair ----------------------------------------------------------------------------------------------------------


class _Learner:
    """The pair: the tuned model, the pretrained one, and the one that takes the steps.

    "full" copies the base. "lora" wraps modules of its own around the same parameters. "unlearn" copies the tuned model and
    leaves the base.
    """

    def __init__(self, finetuned: nn.Module, pretrained: nn.Module | None, update: str, lr: float) -> None:
        if pretrained is None:
            with adapter_off(finetuned):
                pass
        self.first, self.unlearns, self.moved = finetuned, update == "unlearn", False
        self.pretrained: nn.Module = finetuned if pretrained is None else pretrained
        self.off: Callable[[], Any] = contextlib.nullcontext
        if pretrained is None:
            self.off = lambda: adapter_off(finetuned)
        self.tuned, self.base, self.base_off = finetuned, self.pretrained, self.off
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self.trained: nn.Module | None = None
        if update == "unlearn":
            self.tuned = self.trained = copy.deepcopy(finetuned).requires_grad_(True)
        elif update == "full":
            self.base = copy.deepcopy(self.pretrained)
            if pretrained is None:
                self.base = self.base.unload()  # type: ignore[operator]
            self.trained = self.base.requires_grad_(True)
            self.base_off = contextlib.nullcontext
        elif update == "lora":
            self.base = self.trained = self._with_lora(pretrained is None)
            self.base_off = contextlib.nullcontext
        if self.trained is not None:
            parameters = [p for p in self.trained.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
            self.trained.eval()
        self.fresh_caches()

    def _with_lora(self, peft: bool) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        self._flags = [(p, p.requires_grad) for p in self.pretrained.parameters()]
        shared: dict[int, Any] = {id(p): p for p, _ in self._flags}
        shared |= {id(b): b for b in self.pretrained.buffers()}
        twin = copy.deepcopy(self.pretrained, shared)  # its own modules, the same weights
        if peft:
            twin = twin.unload()  # type: ignore[operator]
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        return get_peft_model(twin, config)  # type: ignore[arg-type]

    def __enter__(self) -> _Learner:
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def fresh_caches(self) -> None:
        self.tuned_next = NextToken(self.tuned)
        self.base_next = NextToken(self.base, self.base_off)

    def tuned_logprobs(self, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[torch.Tensor]:
        return token_logprobs(self.tuned, rows, batch_size)

    def first_logprobs(self, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[torch.Tensor]:
        return token_logprobs(self.first, rows, batch_size)

    def pretrained_logprobs(self, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[torch.Tensor]:
        with self.off():
            return token_logprobs(self.pretrained, rows, batch_size)

    def base_logprobs(self, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[torch.Tensor]:
        with self.base_off():
            return token_logprobs(self.base, rows, batch_size)

    def step(self, row: Sequence[int]) -> None:
        """One step on all tokens of a text: down on the base, up on the tuned model."""
        model = self.trained
        assert model is not None
        ids = torch.tensor([list(row)], device=next(model.parameters()).device)
        model.train()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:])
        (-loss if self.unlearns else loss).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        model.eval()
        self.moved = not self.unlearns


def _loss(logprobs: list[torch.Tensor]) -> float:
    return -float(torch.cat(logprobs).double().mean())


@contextlib.contextmanager
def _in_eval(*models: nn.Module | None) -> Iterator[None]:
    states = [(m, m.training) for model in models if model is not None for m in model.modules()]
    for module, _ in states:
        module.training = False
    try:
        yield
    finally:
        for module, training in states:
            module.training = training


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def explore_models(
    base: str,
    tuned: str,
    n: int = 100,
    static: bool = False,
    groups: int = 8,
    device: str = "cpu",
    **settings: Any,
) -> NoveltyReport:
    """`unfused diagnose cge`."""
    pretrained, finetuned, tokenizer = load_pair(base, tuned, device)
    return explore_novelty(
        finetuned, pretrained, tokenizer, n=n, iterative=not static, groups=groups or None, **settings
    )
