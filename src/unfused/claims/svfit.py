"""Trained singular values (SVFit) reach LoRA's accuracy with a sixteenth of its trained numbers.

The paper: ahead of LoRA on language, images and text-to-image with 16 times fewer trained parameters. Here all singular
values of query and value against LoRA r=8 on the same matrices (16 times as many numbers), on two worlds: a tiny ViT of digits
and ten labels a class of digits turned, negative and over a background; a tiny BERT of the standard library's docstrings and
100 sentences for each of its eight areas (three seeds). Smaller ranks of both, bias tuning, (IA)^3, VeRA and the same number
of values in *random* orthonormal directions complete the curve of accuracy over trained numbers.

Refuted if the random directions are as good (the 95 % interval of the paired gain over them reaches 0), or if LoRA r=8 is
ahead of every rank of SVFit by more than the standard deviation of the seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import IA3Config, VeraConfig, get_peft_model
from torch import nn

from unfused.adapters import SvFitConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab import tuning as t
from unfused.claims.lab.text import areas_world
from unfused.claims.lab.vision import digits_world

RULE = (
    "the 95 % interval of the paired gain over random orthonormal directions reaches 0, or LoRA r=8 is ahead of every "
    "rank of SVFit by more than the standard deviation of the seeds"
)
QUERY_VALUE = ["query", "value", "q_proj", "v_proj"]
LINEARS = r".*(attention|mlp|layer).*(query|key|value|_proj|fc1|fc2|dense)"


def claim(lab: Lab) -> list[Verdict]:
    digits, areas = digits_world(lab, "shifted"), areas_world(lab)
    verdicts = [_verdict(lab, digits, "tiny ViT, shifted digits, 10 labels a class", 64, lab.seeds)]
    if lab.scale != "smoke":
        name = "tiny BERT, areas of the standard library, 100 labels a class"
        verdicts.append(_verdict(lab, areas, name, 128, lab.seeds[:3]))
    return verdicts


def _verdict(lab: Lab, world: t.TuningWorld, name: str, width: int, seeds: Sequence[int]) -> Verdict:
    ranks = lab.pick(smoke=[width], desk=[width // 8, width // 2, width])
    arms = {f"SVFit r={r}": svfit(r) for r in ranks}
    arms[f"random directions r={width}"] = t.Arm(functools.partial(random_directions, r=width))
    arms |= {f"LoRA r={r}": t.lora(r) for r in lab.pick(smoke=[8], desk=[1, 8])}
    if lab.scale != "smoke":
        arms |= {"biases": t.bias_only, "linear probe": t.linear_probe}
    if len(seeds) > 3:
        arms |= {
            "full fine-tuning": t.full,
            "SVFit, all linears": t.adapter(SvFitConfig(target_modules=LINEARS, energy=1.0)),
            "(IA)^3": t.adapter(
                IA3Config(target_modules=[*QUERY_VALUE, "k_proj", "key"], feedforward_modules=[])
            ),
            "VeRA": t.adapter(VeraConfig(r=width, target_modules=QUERY_VALUE)),
        }
    found = t.select(
        t.measure(lab, world, arms, seeds, steps=lab.pick(smoke=2, desk=150)),
    )
    accuracy = {arm: [row["test"] for row in rows] for arm, rows in found.items()}
    ours, random = f"SVFit r={width}", f"random directions r={width}"
    gain = lab.paired(accuracy[ours], accuracy[random])
    spread = float(np.std(accuracy["LoRA r=8"], ddof=1))
    behind = {r: np.mean(accuracy["LoRA r=8"]) - np.mean(accuracy[f"SVFit r={r}"]) for r in ranks}
    curve: dict[str, dict[str, Any]] = {
        arm: {
            "trained numbers": int(rows[0]["parameters"]),
            "accuracy": float(np.mean(accuracy[arm])),
            "learning rates": ", ".join(f"{row['lr']:g}" for row in rows),
        }
        for arm, rows in sorted(found.items(), key=lambda item: item[1][0]["parameters"])
    }
    return lab.verdict(
        metric="accuracy",
        method=accuracy[ours],
        baselines={arm: values for arm, values in accuracy.items() if arm != ours},
        rule=RULE,
        holds=bool(gain.interval and gain.interval[0] > 0 and min(behind.values()) <= spread),
        world=name,
        name=ours,
        ablations={"Accuracy over trained numbers, without the head": curve},
        notes=[
            f"over random directions by {gain}",
            f"LoRA r=8 is ahead by {min(behind.values()):+.3f} of the best rank, its standard deviation is {spread:.3f}",
        ],
    )


def svfit(r: int) -> t.Arm:
    return t.adapter(SvFitConfig(r=r, target_modules=QUERY_VALUE))


def random_directions(model: nn.Module, r: int) -> nn.Module:
    """SVFit's layers with directions of no meaning."""
    config = SvFitConfig(r=r, target_modules=QUERY_VALUE, modules_to_save=t.head_names(model))
    model = get_peft_model(model, config)  # type: ignore[arg-type]
    for layer in model.modules():
        for basis in getattr(layer, "unfused_svfit_basis", {}).values():
            for name in ("u", "v"):
                tensor = getattr(basis, name)
                flat = torch.empty_like(tensor[0] if name == "u" else tensor[0].T)
                nn.init.orthogonal_(flat)
                setattr(basis, name, (flat if name == "u" else flat.T.contiguous())[None])
    return model
