"""A parallel network on all hidden states beats a ladder side network at a fraction of LoRA's memory.

The paper: on 18 data sets ahead of Ladder Side-Tuning, at its memory. Here: a tiny BERT pretrained on docstrings (the card's
MiniLM needs a download) and three tasks on modules it has not seen: the type of each token of a line of code, the area that a
sentence of a docstring comes from, and the function that a docstring belongs to, among 200. Every arm picks its learning
rate from three by validation (full fine-tuning from lower ones); the frozen ones train on kept hidden states.

Refuted unless, on the mean of tasks and seeds, UniPT is at least LST, and 0.5 points above a learned mix of the layers, and
the tensors that one of its training steps saves for backward take at most 40 % of the bytes that LoRA's take.
"""

from __future__ import annotations

import ast
import functools
import io
import keyword
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from unfused.adapters.unipt import UniPtConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.text import AREAS, encode, masked_lm, stdlib_areas, stdlib_source, tokenizer
from unfused.claims.lab.tuning import Batch, Task, select
from unfused.data.hidden_states import HiddenStates, States

LENGTH, WIDTH, LAYERS = 32, 128, 5
LRS, LOW_LRS = (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)
TYPES = ("keyword", "name", "operator", "number", "string", "comment")
RULE = (
    "on the mean of tasks and seeds UniPT is below LST or less than 0.5 points above the scalar mix, or a step saves more "
    "than 40 % of LoRA's bytes for backward"
)

Features = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Part of the task, rows -> features (B, N, D) and mask (B, N)."""


def claim(lab: Lab) -> Verdict:
    seeds, steps = lab.seeds[: lab.pick(smoke=1, desk=3)], lab.pick(smoke=2, desk=200)
    arms = ["UniPT", "UniPT, r=4", "LST", "scalar mix", "last layer", "LoRA r=8 on q, v", "full fine-tuning"]
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    sizes: dict[str, dict[str, Any]] = {}
    for name in lab.pick(smoke=["token types", "functions"], desk=["token types", "areas", "functions"]):
        grid: dict[str, dict[float, list[dict[str, float]]]] = {
            arm: {lr: [] for lr in _rates(lab, arm)} for arm in arms
        }
        for seed in seeds:
            work = _Work(lab, name, seed)
            for arm, rates in grid.items():
                for lr in rates:
                    params = {"task": name, "arm": arm, "lr": lr, "seed": seed, "steps": steps}

                    def unit(work: _Work = work, arm: str = arm, lr: float = lr) -> dict[str, float]:
                        return _unit(work, arm, lr, steps)

                    rates[lr].append(lab.cached("unipt", params, unit, uses=[masked_lm, UniPtConfig]))
                lab.log(
                    f"{name}, seed {seed}, {arm}: "
                    + ", ".join(f"{r[-1]['valid']:.3f}" for r in rates.values())
                )
        for arm, rows in select(grid).items():
            found[arm][name] = [100 * row["test"] for row in rows]
            sizes.setdefault(arm, {"trained numbers, head apart": int(rows[0]["parameters"])})
            sizes[arm][f"rates, {name}"] = ", ".join(f"{row['lr']:g}" for row in rows)
    memory = lab.cached("unipt-saved-bytes", {}, lambda: {arm: _saved_bytes(lab, arm) for arm in arms})
    for arm in arms:
        sizes[arm]["saved for backward, of LoRA's"] = f"{memory[arm] / memory['LoRA r=8 on q, v']:.0%}"
    ours = found["UniPT"]
    gain = {arm: lab.paired(ours, found[arm]).mean for arm in arms}
    share = memory["UniPT"] / memory["LoRA r=8 on q, v"]
    return lab.verdict(
        world="three tasks on the standard library",
        name="UniPT",
        metric="accuracy, of functions mean reciprocal rank, %",
        method=ours,
        baselines={arm: found[arm] for arm in arms[1:]},
        rule=RULE,
        holds=gain["LST"] >= 0 and gain["scalar mix"] >= 0.5 and share <= 0.4,
        over="seeds",
        ablations={"Cost and rate": sizes},
        notes=[
            "backbone: the lab's masked language model (4 blocks, width 128) in MiniLM's place",
            f"{steps} steps of 16 items (pairs), {LENGTH} tokens; three seeds, as the card says",
            "UniPT with r=4 is as large as LST",
        ],
    )


def _rates(lab: Lab, arm: str) -> Sequence[float]:
    rates = LOW_LRS if arm == "full fine-tuning" else LRS
    return rates[1:2] if lab.scale == "smoke" else rates


# -- arms ----------------------------------------------------------------------------------------------------------------


class Lst(nn.Module):
    """A ladder of small transformer blocks; a gate mixes each layer's narrowed states into it."""

    def __init__(self, reduction: int = 8) -> None:
        super().__init__()
        width = WIDTH // reduction
        self.down = nn.ModuleList(nn.Linear(WIDTH, width) for _ in range(LAYERS))
        self.gates = nn.Parameter(torch.zeros(LAYERS - 1))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS - 1)
        )
        self.up = nn.Linear(width, WIDTH)

    def forward(self, states: States) -> torch.Tensor:
        first, *rest = [down(h) for down, h in zip(self.down, states.hidden, strict=True)]
        pad = None if states.mask is None else ~states.mask.bool()
        ladder = first
        for gate, h, block in zip(self.gates.sigmoid(), rest, self.blocks, strict=True):
            ladder = block(gate * h + (1 - gate) * ladder, src_key_padding_mask=pad)
        return self.up(ladder)


class ScalarMix(nn.Module):
    """Layers weighted by a softmax, the same for every token, times a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.scale = nn.Parameter(torch.zeros(LAYERS)), nn.Parameter(torch.ones(()))

    def forward(self, states: States) -> torch.Tensor:
        return self.scale * torch.einsum("l,lbnd->bnd", self.weights.softmax(0), torch.stack(states.hidden))


class LastLayer(nn.Module):
    def forward(self, states: States) -> torch.Tensor:
        return states.hidden[-1]


BESIDE: dict[str, type[nn.Module]] = {"LST": Lst, "scalar mix": ScalarMix, "last layer": LastLayer}


def _tuned(lab: Lab, arm: str) -> nn.Module:
    """BERT with what the arm trains."""
    bert: Any = masked_lm(lab).bert
    if arm.startswith("UniPT"):
        return get_peft_model(bert, UniPtConfig(reduction_factor=4 if arm.endswith("4") else 2))
    if arm.startswith("LoRA"):
        return get_peft_model(bert, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    return bert.requires_grad_(arm == "full fine-tuning")


class _Work:
    """A task, its hidden states, made when they are needed."""

    def __init__(self, lab: Lab, name: str, seed: int) -> None:
        self.lab, self.name, self.seed = lab, name, seed

    @functools.cached_property
    def task(self) -> Task:
        make = {"token types": _token_types, "areas": _areas, "functions": _functions}[self.name]
        return make(self.lab, self.seed)

    @functools.cached_property
    def folder(self) -> Any:
        return tempfile.TemporaryDirectory(prefix="unfused-claim-")

    @functools.cached_property
    def states(self) -> Mapping[str, HiddenStates]:
        model: Any = _tuned(self.lab, "UniPT")
        found = {}
        for part in ("train", "valid", "test"):
            batch = getattr(self.task, part)
            rows = [
                {"input_ids": ids, "attention_mask": mask}
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            found[part] = model.cache(rows, Path(self.folder.name) / part, batch_size=64)
        return found


def _unit(work: _Work, arm: str, lr: float, steps: int) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        trained: Any = BESIDE[arm]() if arm in BESIDE else _tuned(work.lab, arm)

        def features(part: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if arm.startswith("UniPT"):
                x, states = trained.forward_cached(work.states[part], rows)
            elif arm in BESIDE:
                states = work.states[part].batch(rows)
                x = trained(states)
            else:
                batch = getattr(work.task, part)
                mask = batch["attention_mask"][rows]
                return trained(
                    input_ids=batch["input_ids"][rows], attention_mask=mask
                ).last_hidden_state, mask.bool()
            return x, states.mask

        head = nn.Linear(WIDTH, work.task.num_labels or WIDTH)
        weights = [p for module in (trained, head) for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        trained.train()
        for rows in _batches(_items(work.task, "train"), steps, work.seed):
            loss = _loss(work.task, "train", rows, features, head)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
        trained.eval()
        size = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        with torch.inference_mode():
            scores = {part: _score(work.task, part, features, head) for part in ("valid", "test")}
    return {**scores, "parameters": size}


def _batches(items: int, steps: int, seed: int, size: int = 16) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(items, generator=generator) for _ in range(-(-steps * size // items))])
    return iter(order[: steps * size].split(size))


# -- tasks -----------------------------------------------------------------------------------------------------------------


def _items(task: Task, part: str) -> int:
    rows = len(getattr(task, part)["input_ids"])
    return rows if task.num_labels else rows // 2  # docstrings, then functions


def _mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _outputs(
    task: Task, part: str, rows: torch.Tensor, features: Features, head: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and what they should be: of tokens, of sentences, or of docstrings (rows) for functions (columns)."""
    labels = getattr(task, part).get("labels")
    if labels is None:
        x, mask = features(part, torch.cat([rows, rows + _items(task, part)]))
        asked, code = F.normalize(head(_mean(x, mask)), dim=-1).chunk(2)
        return 20 * asked @ code.mT, torch.arange(len(rows))
    x, mask = features(part, rows)
    if labels.ndim == 1:
        return head(_mean(x, mask)), labels[rows]
    return head(x)[mask], labels[rows][:, : x.shape[1]][mask]


def _loss(task: Task, part: str, rows: torch.Tensor, features: Features, head: nn.Module) -> torch.Tensor:
    scores, wanted = _outputs(task, part, rows, features, head)
    loss = F.cross_entropy(scores, wanted)
    return loss if task.num_labels else (loss + F.cross_entropy(scores.mT, wanted)) / 2


def _score(task: Task, part: str, features: Features, head: nn.Module) -> float:
    """Accuracy; of functions the mean reciprocal rank."""
    everything = torch.arange(_items(task, part))
    if not task.num_labels:
        scores, wanted = _outputs(task, part, everything, features, head)
        ranks = (scores >= scores.gather(1, wanted[:, None])).sum(1)
        return float((1 / ranks).mean())
    right = [
        (scores.argmax(-1) == wanted)[wanted >= 0].float()
        for rows in everything.split(256)
        for scores, wanted in [_outputs(task, part, rows, features, head)]
    ]
    return float(torch.cat(right).mean())


def _modules(lab: Lab, side: int) -> list[str]:
    names = sorted(name for sides in AREAS.values() for name in sides[side])
    return names[-2:] if lab.scale == "smoke" else names


def _split(
    lab: Lab, seed: int, known: Sequence[Any], new: Sequence[Any], sizes: Sequence[int]
) -> list[list[Any]]:
    """Items to train on and to validate, by seed, and always the same to test."""
    train, valid, test = sizes if lab.scale != "smoke" else (8, 4, 4)
    order = np.random.default_rng(seed).permutation(len(known))[: train + valid]
    other = np.random.default_rng(0).permutation(len(new))[:test]
    return [[known[i] for i in order[:train]], [known[i] for i in order[train:]], [new[i] for i in other]]


def _token_types(lab: Lab, seed: int) -> Task:
    words = tokenizer(lab)
    parts = []
    known, new = (_lines(stdlib_source(_modules(lab, side))) for side in (0, 1))
    for items in _split(lab, seed, known, new, (1500, 300, 500)):
        batch = encode(words, [line for line, _ in items], LENGTH)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        offsets = words([line for line, _ in items], add_special_tokens=False, return_offsets_mapping=True)
        for row, (spans, (_, kinds)) in enumerate(zip(offsets["offset_mapping"], items, strict=True)):
            found = [kinds[end - 1] for _, end in spans[: LENGTH - 2]]
            batch["labels"][row, 1 : 1 + len(found)] = torch.tensor(found)
        parts.append(batch)
    train, valid, test = parts
    return Task(train, valid, test, len(TYPES))


def _lines(source: str) -> list[tuple[str, list[int]]]:
    """Lines with at least four tokens, and the type of each character, -100 for spaces."""
    text = source.split("\n")  # as the tokenizer counts lines
    kinds = [[-100] * len(line) for line in text]
    counts = [0] * len(text)
    types = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5, tokenize.OP: 2}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = types.get(token.type)
        if token.type == tokenize.NAME:
            kind = 0 if keyword.iskeyword(token.string) else 1
        if kind is None or token.start[0] != token.end[0]:
            continue
        row = token.start[0] - 1
        counts[row] += 1
        kinds[row][token.start[1] : token.end[1]] = [kind] * (token.end[1] - token.start[1])
    found: dict[str, list[int]] = {}
    for line, types_of_line, count in zip(text, kinds, counts, strict=True):
        start = len(line) - len(line.lstrip())
        if count >= 4:
            found.setdefault(line.strip(), types_of_line[start : start + len(line.strip())])
    return list(found.items())


def _areas(lab: Lab, seed: int) -> Task:
    task = stdlib_areas(lab, seed, lab.pick(smoke=8, desk=1200))

    def cut(batch: Batch) -> Batch:
        rows = slice(None) if lab.scale != "smoke" else slice(0, 8)
        return {name: x[rows, :LENGTH] if x.ndim == 2 else x[rows] for name, x in batch.items()}

    return Task(cut(task.train), cut(task.valid), cut(task.test), task.num_labels)


def _functions(lab: Lab, seed: int) -> Task:
    words = tokenizer(lab)
    known, new = (_documented(stdlib_source(_modules(lab, side))) for side in (0, 1))
    parts = [
        encode(words, [text for column in zip(*items, strict=True) for text in column], LENGTH)
        for items in _split(lab, seed, known, new, (1000, 150, 200))
    ]
    train, valid, test = parts
    return Task(train, valid, test)


def _documented(source: str) -> list[tuple[str, str]]:
    """First paragraphs of docstrings, and the functions that they belong to, without name and docstring."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
            body = "; ".join(" ".join(ast.unparse(part).split()) for part in node.body[1:])
            arguments = ", ".join(a.arg for a in node.args.args if a.arg != "self")
            found.setdefault(" ".join(text.split("\n\n")[0].split()), f"({arguments}) {body}")
    return [(text, code) for text, code in found.items() if len(text.split()) >= 4]


# -- memory ----------------------------------------------------------------------------------------------------------------


def _saved_bytes(lab: Lab, arm: str) -> int:
    """Bytes that autograd keeps for the backward pass of one step of 16 sentences, parameters left out."""
    model: Any = _tuned(lab, arm).train()
    beside = BESIDE[arm]().train() if arm in BESIDE else None
    own = {
        p.untyped_storage().data_ptr() for module in (model, beside) if module for p in module.parameters()
    }
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(4, 2048, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    head, mask = nn.Linear(WIDTH, 8), torch.ones(16, LENGTH, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=beside is not None)
        x = beside(States(list(out.hidden_states), mask)) if beside else out.last_hidden_state
        F.cross_entropy(head(_mean(x, mask)), torch.zeros(16, dtype=torch.long)).backward()
    return sum(kept.values())
