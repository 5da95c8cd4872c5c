"""Freezing the layers that fine-tuning would hardly change (Telly) costs no quality of code search and a quarter of the time.

The paper: UniXcoder, 12 layers, MRR equal up to 8 frozen ones. Here: docstring-to-function search in the standard library,
docstring taken out of the function, with the lab's masked LM of 4 layers that has read docstrings alone (the card's MiniLM
cannot be had offline). Trained on 1,500 documented functions of modules that the LM knows, tested on held-out ones, 500
candidates. Full fine-tuning, LoRA and every number of frozen layers get the same three epochs, of which validation takes
the best, and the same three learning rates; three seeds, one for the numbers of layers that the curve does not choose.

Holds if (i) the similarity of pretrained and fine-tuned layers falls with depth, the top two falling lowest, on the mean
curve, and (ii) freezing as many layers as the curve of training inputs says (those below the first under 0.9) keeps the MRR
within 1 % of full fine-tuning's at 75 % of the seconds an epoch (of CPU, one thread) or less. Refuted otherwise.
"""

from __future__ import annotations

import ast
import copy
import io
import keyword
import math
import platform
import time
import tokenize
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from unfused.adapters.telly import choose_depth, freeze_bottom, layer_probe, layer_similarity
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.text import (
    AREAS,
    LENGTH,
    docstrings,
    encode,
    held_out,
    masked_lm,
    stdlib_source,
    tokenizer,
)
from unfused.claims.lab.tuning import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RULE = (
    "the mean similarity curve does not fall with depth with the top two layers lowest, or freezing as the curve says gives "
    "less than 99 % of full fine-tuning's MRR or takes more than 75 % of its seconds an epoch"
)
LRS = (3e-4, 1e-3, 3e-3)
ARMS: tuple[tuple[str, str | None], ...] = (("full fine-tuning", None), ("LoRA r = 8", "lora"))
EPOCHS, BATCH, TEMPERATURE = 3, 32, 0.05
KINDS = ("identifier", "keyword", "operator", "number", "string")


def claim(lab: Lab) -> Verdict:
    seeds = list(lab.seeds)[:3]
    layers = masked_lm(lab).config.num_hidden_layers
    found: dict[str, list[dict[str, Any]]] = {}

    def tune(name: str, how: int | str | None, seed: int) -> dict[str, Any]:
        grid = [_run(lab, how, lr, seed) for lr in lab.pick(smoke=LRS[1:2], desk=LRS)]
        lab.log(f"seed {seed}, {name}: MRR " + " ".join(f"{row['mrr']:.3f}" for row in grid))
        return max(grid, key=lambda row: row["valid"])

    for name, how in lab.pick(smoke=ARMS[:1], desk=ARMS):
        found[name] = [tune(name, how, seed) for seed in seeds]
    curves = np.array([row["curve"] for row in found["full fine-tuning"]])  # (seeds, layers + 1)
    depths = [choose_depth(curve) for curve in curves]
    chosen = [tune(f"K = {depth}", depth, seed) for depth, seed in zip(depths, seeds, strict=True)]
    every = {f"K = {k}": [tune(f"K = {k}", k, seeds[0])] for k in range(lab.pick(smoke=0, desk=layers))}
    curve = curves.mean(0)
    falls = bool((np.diff(curve) <= 0.005).all()) and set(np.argsort(curve)[:2]) == {layers - 1, layers}

    def of(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
        return [row[key] for row in rows]

    def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
        return round(float(np.mean(of(rows, key))), 3)

    base = found["full fine-tuning"]
    quality = float(np.mean(of(chosen, "mrr")) / np.mean(of(base, "mrr")))
    cost = float(np.mean(of(chosen, "epoch_seconds")) / np.mean(of(base, "epoch_seconds")))
    return lab.verdict(
        metric="MRR",
        method=of(chosen, "mrr"),
        baselines={name: of(rows, "mrr") for name, rows in found.items()},
        rule=RULE,
        holds=falls and quality >= 0.99 and cost <= 0.75,
        world="code search in the standard library, masked LM of 4 layers",
        name="Telly, K by the curve",
        ablations={
            f"What it costs ({len(seeds)} seeds; K = 0 to {layers - 1}: one)": {
                name: {
                    "MRR": mean(rows, "mrr"),
                    "CPU seconds an epoch": mean(rows, "epoch_seconds"),
                    "CPU seconds to the best epoch": mean(rows, "best_seconds"),
                    "share of weights trained": mean(rows, "share"),
                }
                for name, rows in {**found, "K by the curve": chosen, **every}.items()
            },
            "Similarity after full fine-tuning": {
                f"layer {i}" if i else "embeddings": {
                    f"seed {s}": round(float(curves[s, i]), 3) for s in range(len(curves))
                }
                for i in range(layers + 1)
            },
            "Probes of the pretrained model (held-out accuracy; weight in the mixture)": _probes(lab),
        },
        notes=[
            f"K by the curve: {', '.join(map(str, depths))} of {layers}",
            f"{quality:.3f} of full fine-tuning's MRR at {cost:.2f} of its seconds an epoch",
            f"the curve {'falls' if falls else 'does not fall'} with depth, the top two layers lowest",
        ],
    )


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(lab: Lab, how: int | str | None, lr: float, seed: int) -> dict[str, Any]:
    """Train with K frozen layers, all (None) or LoRA: MRR of test and best validation, seconds, the curve of full tuning."""
    sizes = lab.pick(smoke=(32, 32, 32), desk=(1500, 250, 500))
    params = {"how": how, "lr": lr, "seed": seed, "sizes": sizes, "epochs": EPOCHS}

    def compute() -> dict[str, Any]:
        data = _pairs(lab)
        order = torch.randperm(len(data["known"]["labels"]), generator=torch.Generator().manual_seed(seed))
        train, valid = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
        parts = {"train": _rows(data["known"], train), "valid": _rows(data["known"], valid)}
        test = torch.randperm(len(data["new"]["labels"]), generator=torch.Generator().manual_seed(0))[
            : sizes[2]
        ]
        parts["test"] = _rows(data["new"], test)
        pretrained = masked_lm(lab).bert
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = _train(_prepare(copy.deepcopy(pretrained), how), parts, lr, seed)
        if how is None:
            side = {
                "input_ids": parts["train"]["code_ids"][:256],
                "attention_mask": parts["train"]["code_mask"][:256],
            }
            found["curve"] = layer_similarity(pretrained, model, side).values.tolist()
        return found

    return lab.cached("telly", params, compute, uses=(masked_lm, freeze_bottom))


def _prepare(model: nn.Module, how: int | str | None) -> nn.Module:
    if how == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))  # type: ignore[arg-type]
    if how is not None:
        freeze_bottom(model, int(how))
    return model


def _train(
    model: nn.Module, parts: dict[str, Batch], lr: float, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """In-batch negatives both ways in one; Adam, linear to 0, clip 1, the best epoch by validation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    count = len(parts["train"]["labels"])
    total = EPOCHS * math.ceil(count / BATCH)
    optimizer = torch.optim.Adam(trained, lr=lr, eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    generator = torch.Generator().manual_seed(seed)
    seconds, best, epochs = 0.0, {"valid": -1.0}, []
    state: dict[str, torch.Tensor] = {}
    for _ in range(EPOCHS):
        start = time.process_time()
        model.train()
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            queries, codes = _embed(model, _rows(parts["train"], rows))
            loss = F.cross_entropy(queries @ codes.T / TEMPERATURE, torch.arange(len(rows)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        epochs.append(time.process_time() - start)
        seconds += epochs[-1]
        if (score := _mrr(model, parts["valid"])) > best["valid"]:
            best = {"valid": score, "best_seconds": seconds}
            state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    found = {"mrr": _mrr(model, parts["test"]), "epoch_seconds": float(np.median(epochs)), "share": share}
    return model, {**best, **found}


def _embed(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit means of the last layer, (N, dim) each."""
    ids = torch.cat([batch["query_ids"], batch["code_ids"]])
    mask = torch.cat([batch["query_mask"], batch["code_mask"]])
    states = model(input_ids=ids, attention_mask=mask)[0]
    weights = mask[..., None].to(states)
    queries, codes = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1).chunk(2)
    return queries, codes


@torch.no_grad()
def _mrr(model: nn.Module, part: Batch) -> float:
    model.eval()
    pieces = [_embed(model, _rows(part, rows)) for rows in torch.arange(len(part["labels"])).split(64)]
    queries, codes = (torch.cat(side) for side in zip(*pieces, strict=True))
    scores = queries @ codes.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((1 / ranks).mean())


def _rows(part: Batch, rows: torch.Tensor) -> Batch:
    return {name: column[rows] for name, column in part.items()}


# -- functions of the standard library -------------------------------------------------------------------------------------


def _pairs(lab: Lab) -> dict[str, Batch]:
    """`known` modules and `new` ones: queries, functions, and the functions' complexity (1 to 5, 0 for more) as labels."""

    def read() -> dict[str, Batch]:
        words, found, new = tokenizer(lab), {}, held_out()
        known = [name for name in docstrings(lab) if name not in new]
        few = {"known": ["statistics", "random"], "new": ["_pydecimal"]}
        for side, modules in lab.pick(smoke=few, desk={"known": known, "new": new}).items():
            functions: dict[str, tuple[str, int]] = {}
            for start in range(
                0, len(modules), 10
            ):  # parsed piece by piece: a tree is much larger than its source
                for text, code, complexity in _functions(stdlib_source(modules[start : start + 10])):
                    functions.setdefault(text, (code, complexity))
            queries, sources = (
                encode(words, texts) for texts in (list(functions), [c for c, _ in functions.values()])
            )
            found[side] = {
                "query_ids": queries["input_ids"],
                "query_mask": queries["attention_mask"],
                "code_ids": sources["input_ids"],
                "code_mask": sources["attention_mask"],
                "labels": torch.tensor([c if c <= 5 else 0 for _, c in functions.values()]),
            }
        return found

    params = {"python": platform.python_version(), "whole": lab.scale != "smoke"}
    return lab.cached("telly-pairs", params, read, uses=(stdlib_source,))


def _functions(source: str) -> Iterator[tuple[str, str, int]]:
    """First paragraph of the docstring, code without it, cyclomatic complexity: of functions of three lines and more."""
    branches = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.AsyncFor, ast.comprehension)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        node.body = node.body[1:] if text else node.body
        if len(text.split()) < 3 or not node.body:
            continue
        code = ast.unparse(node)
        if code.count("\n") >= 2:
            inside = list(ast.walk(node))
            complexity = 1 + sum(isinstance(n, branches) for n in inside)
            complexity += sum(len(n.values) - 1 for n in inside if isinstance(n, ast.BoolOp))
            yield text, code, complexity


def _probes(lab: Lab) -> dict[str, dict[str, Any]]:
    """What the layers of the pretrained model know of tokens' kinds (lexical) and functions' complexity (structural)."""
    count = lab.pick(smoke=24, desk=300)

    def compute() -> dict[str, dict[str, Any]]:
        pairs = _pairs(lab)["known"]
        sample = torch.randperm(len(pairs["labels"]), generator=torch.Generator().manual_seed(0))[: 4 * count]
        chosen = _rows(pairs, sample)
        area = lab.pick(smoke="numbers", desk="network")
        codes = [code for _, code, _ in _functions(stdlib_source(AREAS[area][0]))][:count]
        structure = {
            "input_ids": chosen["code_ids"],
            "attention_mask": chosen["code_mask"],
            "labels": chosen["labels"],
        }
        data = {"token": _token_kinds(tokenizer(lab), codes), "sequence": structure}
        steps, model = lab.pick(smoke=5, desk=300), masked_lm(lab).bert
        probes = {
            name: layer_probe(model, data[kind], kind, steps=steps)
            for name, kind in (("lexical", "token"), ("structural", "sequence"))
        }
        table: dict[str, dict[str, Any]] = {}
        for name, probe in probes.items():
            for layer, (value, weight) in enumerate(zip(probe.values, probe.weights, strict=True)):
                row = table.setdefault(f"layer {layer}" if layer else "embeddings", {})
                row |= {name: round(float(value), 3), f"{name} weight": round(float(weight), 3)}
            table.setdefault("mixture", {})[name] = round(probe.weighted, 3)
        return table

    return lab.cached("telly-probes", {"count": count}, compute, uses=(layer_probe, masked_lm))


def _token_kinds(words: PreTrainedTokenizerFast, codes: Sequence[str]) -> Batch:
    """Sources as (N, LENGTH) token ids, each labelled with the kind of the Python token that it is part of."""
    ids = torch.full((len(codes), LENGTH), words.pad_token_id)
    labels = torch.full((len(codes), LENGTH), -100)
    kinds = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string"}
    for i, code in enumerate(codes):
        row, tags = [words.cls_token_id], [-100]
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            kind = kinds.get(token.type)
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "identifier"
            if kind:
                pieces = words(" " + token.string, add_special_tokens=False)["input_ids"]
                row += pieces
                tags += [KINDS.index(kind)] * len(pieces)
        ids[i, : len(row)], labels[i, : len(tags)] = torch.tensor(row[:LENGTH]), torch.tensor(tags[:LENGTH])
    return {"input_ids": ids, "attention_mask": (ids != words.pad_token_id).long(), "labels": labels}
