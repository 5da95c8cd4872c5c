"""Sparse vectors of a task and of a language add up to a classifier for a language without labels (LT-SFT).

The paper: zero-shot transfer, ahead of stacked adapters (MAD-X), of random masks, and of dense differences, which interfere.
Here: BERT pretrained on nine sentences of English for each of a made-up language B (`unfused.claims.lab.languages`), 400
labelled English sentences of eight areas of the standard library, and none of B, in which the test is. Every arm has the
same two rates for languages, chosen by masked-LM loss on held-out text, and the same two for tasks, chosen by accuracy on
160 English sentences; K is 5 % of the entries in every sparse arm, and the adapters' size.

Refuted if the 95 % interval over seeds of the paired gain over the dense pair, over the pair with random masks, or over the
task alone (no language vector) reaches 0. Stacked adapters and full fine-tuning in sequence (masked LM on B, then the task)
are reported as measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from unfused.adapters.composable_sft import (
    LtSftConfig,
    from_state_dict_delta,
    lottery_ticket_select,
    to_state_dict_delta,
)
from unfused.adapters.unified_peft import BottleneckConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.languages import (
    bilingual_bert,
    bilingual_classifier,
    corpus,
    masked,
    transfer_task,
)
from unfused.claims.lab.tuning import Batch, count_trainable, tune
from unfused.nn.sparse_layer import sparse_deltas
from unfused.nn.tuner import tuner_layers

RULE = (
    "the 95 % interval of the paired gain over the dense pair, over the pair with random masks, or over the task alone "
    "reaches 0"
)
DENSITY = 0.05
LANGUAGE_RATES, TASK_RATES = (1e-3, 3e-3), (1.5e-3, 6e-3)

State = dict[str, torch.Tensor]


def claim(lab: Lab) -> Verdict:
    unseen = {language: _heldout(lab, language) for language in "ab"}
    untouched = {language: _loss(bilingual_bert(lab), unseen[language]) for language in "ab"}
    lab.log(f"masked-LM loss of the pretrained model: A {untouched['a']:.3f}, B {untouched['b']:.3f}")
    vectors = {
        kind: {language: _language(lab, kind, language) for language in "ab"}
        for kind in ("lottery", "random", "adapters")
    }
    per_seed = []
    for seed in lab.seeds:
        row = {
            "LT-SFT pair": _task(lab, "lottery", vectors["lottery"], seed, "sparse"),
            "random masks, pair": _task(lab, "random", vectors["random"], seed, "sparse"),
            "dense pair": _task(lab, "dense", vectors["lottery"], seed, "dense"),
            "stacked adapters": _task(lab, "adapters", vectors["adapters"], seed, "sparse"),
            "task alone": _task(lab, "lottery", {}, seed, "sparse"),
            "in sequence, full": _task(lab, "dense", {"a": vectors["lottery"]["b"]}, seed, "dense"),
        }
        per_seed.append(row)
        lab.log(f"seed {seed}: " + "; ".join(f"{name} {found['b']:.3f}" for name, found in row.items()))
    in_b = {name: [row[name]["b"] for row in per_seed] for name in per_seed[0]}
    ours = in_b["LT-SFT pair"]
    judged = [lab.paired(ours, in_b[name]) for name in ("dense pair", "random masks, pair", "task alone")]
    return lab.verdict(
        world="stdlib areas, English to a made-up language",
        name="LT-SFT",
        metric="accuracy in B, zero-shot",
        method=ours,
        baselines={name: in_b[name] for name in in_b if name != "LT-SFT pair"},
        rule=RULE,
        holds=all(gain.interval is not None and gain.interval[0] > 0 for gain in judged),
        ablations={
            "Accuracy in English": {name: [row[name]["a"] for row in per_seed] for name in per_seed[0]},
            "LT-SFT's vectors, other sums (accuracy in B)": {
                "task trained on English's vector, B's not added": [
                    row["LT-SFT pair"]["kept"] for row in per_seed
                ],
                "task trained without a language, B's added": [
                    _mismatched(lab, row["task alone"], vectors["lottery"]["b"], seed)
                    for row, seed in zip(per_seed, lab.seeds, strict=True)
                ],
            },
            "Masked-LM loss on held-out text": {
                "pretrained": {f"language {k.upper()}": round(untouched[k], 3) for k in "ab"},
            }
            | {
                kind: {f"language {k.upper()}": round(found[k]["loss"], 3) for k in "ab"}
                for kind, found in vectors.items()
            }
            | {
                "dense": {
                    f"language {k.upper()}": round(vectors["lottery"][k]["dense_loss"], 3) for k in "ab"
                }
            },
        },
        notes=[
            f"Vectors of languages are learned once ({_steps(lab)[0]} steps a phase) and shared by the seeds, which draw the "
            f"labels, the head and the order of the batches ({_steps(lab)[1]} steps a phase). The dense vectors are those of "
            "LT-SFT's first phase.",
            f"Entries: {per_seed[0]['LT-SFT pair']['parameters']:,} of each sparse vector, "
            f"{per_seed[0]['stacked adapters']['parameters']:,} of each adapter. MAD-X's invertible adapters are left out.",
            f"Composition: two orders of the sum differ by at most {_order_matters(lab, vectors['lottery']):.1e}; merging and "
            f"unmerging gives the base weights back {'bit for bit' if _unmerges(lab) else 'CHANGED'}.",
        ],
    )


def _steps(lab: Lab) -> tuple[int, int]:
    """Of a phase, for a language and for a task."""
    return lab.pick(smoke=1, desk=120), lab.pick(smoke=1, desk=50)


# -- languages ---------------------------------------------------------------------------------------------------------


def _language(lab: Lab, kind: str, language: str) -> dict[str, Any]:
    """The vectors of a language at the better rates: "sparse" (or an adapter's weights), "dense", and their losses."""
    steps = _steps(lab)[0]
    rates = LANGUAGE_RATES[:1] if lab.scale == "smoke" else LANGUAGE_RATES

    def unit(lr: float) -> Callable[[], dict[str, Any]]:
        return lambda: _learn_language(lab, kind, language, lr, steps)

    found = []
    for lr in rates:
        params = {"kind": kind, "language": language, "lr": lr, "steps": steps, "scale": lab.scale}
        found.append(lab.cached(f"lt-sft-language-{kind}-{language}", params, unit(lr)))
    best = min(found, key=lambda row: row["loss"])
    chosen = {"sparse": best["sparse"], "loss": best["loss"], "lr": best["lr"]}
    if kind == "lottery":
        dense = min(found, key=lambda row: row["dense_loss"])
        chosen |= {"dense": dense["dense"], "dense_loss": dense["dense_loss"]}
    lab.log(f"language {language}, {kind}: loss {chosen['loss']:.3f} at {chosen['lr']}")
    return chosen


def _learn_language(lab: Lab, kind: str, language: str, lr: float, steps: int) -> dict[str, Any]:
    rows, valid = corpus(lab)["ab".index(language)][300:], _heldout(lab, language)
    data = masked(lab, rows[: lab.pick(smoke=100, desk=None)], views=lab.pick(smoke=1, desk=2), seed=2)

    def train(model: nn.Module) -> None:
        tune(model, data, lr=lr, steps=steps, batch_size=lab.pick(smoke=4, desk=32), warmup=0.1)

    torch.manual_seed(0)
    bert = bilingual_bert(lab)
    if kind == "adapters":
        model: Any = get_peft_model(bert, _bottleneck())
        train(model)
        return {"sparse": get_peft_model_state_dict(model), "loss": _loss(model, valid), "lr": lr}
    model = get_peft_model(bert, LtSftConfig(density=DENSITY, l1_weight=0.1))
    dense: dict[str, Any] = {}
    if kind == "lottery":
        lottery_ticket_select(model, _recorded(train, dense, valid))
    train(model)
    return {"sparse": to_state_dict_delta(model), "loss": _loss(model, valid), "lr": lr, **dense}


def _heldout(lab: Lab, language: str) -> Batch:
    rows = corpus(lab)["ab".index(language)]
    return masked(lab, rows[: lab.pick(smoke=20, desk=300)], views=1, seed=1)


def _recorded(
    train: Callable[[nn.Module], Any], found: dict[str, Any], valid: Batch | None
) -> Callable[[nn.Module], None]:
    """The first phase, which is full fine-tuning: its dense difference is kept."""

    def run(model: nn.Module) -> None:
        train(model)
        found["dense"] = {}
        for name, (layer, _, _) in sparse_deltas(model, "default").items():
            part = name.rpartition(".")[2]
            found["dense"][name] = (getattr(layer.get_base_layer(), part) - layer.pretrained[part]).detach()
        if valid is not None:
            found["dense_loss"] = _loss(model, valid)

    return run


@torch.inference_mode()
def _loss(model: nn.Module, batch: Batch) -> float:
    return float(model.eval()(**batch).loss)


def _bottleneck(**options: Any) -> BottleneckConfig:
    return BottleneckConfig.preset("pfeiffer", bottleneck_dim=42, **options)  # as many numbers as K


# -- tasks -------------------------------------------------------------------------------------------------------------


def _task(lab: Lab, kind: str, vectors: dict[str, Any], seed: int, which: str) -> dict[str, Any]:
    """Train on English labels on top of `vectors["a"]`, judge in B with `vectors["b"]` in its place.

    Where there is no vector of B, that of A stays (training in sequence); where there is none at all, the task is alone.
    """
    steps = _steps(lab)[1]
    found = []
    for lr in TASK_RATES[1:2] if lab.scale == "smoke" else TASK_RATES:
        params = {
            "kind": kind,
            "which": which,
            "vectors": {language: [row["lr"], row["loss"]] for language, row in vectors.items()},
            "lr": lr,
            "seed": seed,
            "steps": steps,
            "scale": lab.scale,
        }

        def unit(lr: float = lr) -> dict[str, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                chosen = {language: row[which] for language, row in vectors.items()}
                return (_stacked if kind == "adapters" else _summed)(lab, kind, chosen, seed, lr, steps)

        found.append(lab.cached(f"lt-sft-task-{kind}", params, unit))
    return max(found, key=lambda row: row["valid"])


def _summed(
    lab: Lab, kind: str, vectors: dict[str, State], seed: int, lr: float, steps: int
) -> dict[str, Any]:
    """Vectors of any kind, as sums on the state dict."""
    task, test_b = transfer_task(lab, seed, lab.pick(smoke=40, desk=400))
    model: Any = bilingual_classifier(lab, task.num_labels)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(_add(start, vectors.get("a")))

    def train(model: nn.Module) -> None:
        tune(model, task, lr=lr, steps=steps, seed=seed, batch_size=lab.pick(smoke=4, desk=32))

    config = LtSftConfig(density=DENSITY, modules_to_save=["classifier"])
    model = get_peft_model(model, config)
    parameters = count_trainable(model)
    if kind == "dense":
        dense: dict[str, Any] = {}
        head: State = {}

        def run(model: nn.Module) -> None:
            train(model)
            head.update({f"classifier.{k}": v.clone() for k, v in _head(model).state_dict().items()})

        lottery_ticket_select(model, _recorded(run, dense, None))
        vector = {**dense["dense"], **head}
    else:
        if kind == "lottery":
            lottery_ticket_select(model, train)
        train(model)
        vector = to_state_dict_delta(model)
    judge = bilingual_classifier(lab, task.num_labels)
    judge.load_state_dict(_add(_add(start, vectors.get("a")), vector))
    result = {
        "valid": _accuracy(judge, task.valid),
        "a": _accuracy(judge, task.test),
        "kept": _accuracy(judge, test_b),
        "parameters": parameters,
        "vector": vector,
    }
    if "b" in vectors:
        judge.load_state_dict(_add(_add(start, vectors["b"]), vector))
    return result | {"b": _accuracy(judge, test_b)}


def _stacked(
    lab: Lab, kind: str, vectors: dict[str, State], seed: int, lr: float, steps: int
) -> dict[str, Any]:
    """A task's adapters after a language's; the language's are exchanged for the test."""
    task, test_b = transfer_task(lab, seed, lab.pick(smoke=40, desk=400))
    model: Any = get_peft_model(
        bilingual_classifier(lab, task.num_labels), _bottleneck(), adapter_name="language"
    )
    set_peft_model_state_dict(model, vectors["a"], adapter_name="language")
    model.add_adapter("task", _bottleneck(modules_to_save=["classifier"]))
    model.base_model.set_adapter(["language", "task"])
    for name, parameter in model.named_parameters():
        if ".language." in name:
            parameter.requires_grad_(False)
    parameters = count_trainable(model)
    tune(model, task, lr=lr, steps=steps, seed=seed, batch_size=lab.pick(smoke=4, desk=32))
    result = {
        "valid": _accuracy(model, task.valid),
        "a": _accuracy(model, task.test),
        "kept": _accuracy(model, test_b),
    }
    set_peft_model_state_dict(model, vectors["b"], adapter_name="language")
    return result | {"b": _accuracy(model, test_b), "parameters": parameters}


def _add(state: State, vector: State | None) -> State:
    """Sparse entries and dense differences are added; a head is put in its place."""
    if vector is None:
        return state
    sparse = {name: value for name, value in vector.items() if name.rpartition(".")[2] in ("index", "values")}
    new = from_state_dict_delta(state, sparse)
    for name, value in vector.items():
        if name not in sparse:
            new[name] = value if name.startswith("classifier") else new[name] + value
    return new


def _head(model: nn.Module) -> nn.Module:
    return next(m for name, m in model.named_modules() if name.endswith("classifier.modules_to_save.default"))


@torch.inference_mode()
def _accuracy(model: nn.Module, batch: Batch) -> float:
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    return float((model.eval()(**inputs).logits.argmax(-1) == batch["labels"]).float().mean())


def _mismatched(lab: Lab, alone: dict[str, Any], language: dict[str, Any], seed: int) -> float:
    task, test_b = transfer_task(lab, seed, lab.pick(smoke=40, desk=400))
    judge = bilingual_classifier(lab, task.num_labels)
    judge.load_state_dict(_add(_add(judge.state_dict(), language["sparse"]), alone["vector"]))
    return _accuracy(judge, test_b)


# -- checks ------------------------------------------------------------------------------------------------------------


def _order_matters(lab: Lab, vectors: dict[str, Any]) -> float:
    a, b = vectors["a"]["sparse"], vectors["b"]["sparse"]
    state = bilingual_bert(lab).state_dict()
    one, other = from_state_dict_delta(state, a, b), from_state_dict_delta(state, b, a)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _unmerges(lab: Lab) -> bool:
    base = bilingual_bert(lab)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model: Any = get_peft_model(base, LtSftConfig(density=DENSITY))
    for layer in tuner_layers(model):
        for p in layer.parameters():
            if p.requires_grad:
                p.data.normal_()
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.unload()
    return all(torch.equal(p, before[name]) for name, p in after.named_parameters())
