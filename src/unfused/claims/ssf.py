"""Scaling and shifting the features of a frozen ViT beats tuning its biases, and costs nothing once merged.

The paper: SSF ahead of bias tuning, adapters and prompts, and even of full fine-tuning (VTAB-1k: 73.1 against 65.6). Here:
a tiny ViT pretrained on digits, and the same digits turned, negative, over a background, 10 labels a class
(`unfused.claims.lab.vision`). Every arm picks its learning rate from the same four on 4 validation images a class.

Refuted if the 95 % interval over seeds of the paired gain over bias tuning reaches 0, or if merging moves a logit by more
than 1e-5 of the largest or changes a prediction. LoRA and full fine-tuning are reported as measured: a cautious look before
had SSF behind both.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model

from unfused.adapters.ssf import SsfConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.tuning import (
    adapter,
    bias_only,
    full,
    layernorm_only,
    linear_probe,
    lora,
    measure,
    select,
    tune,
)
from unfused.claims.lab.vision import digits_backbone, digits_world, shifted_digits

RULE = (
    "the 95 % interval of the paired gain over bias tuning reaches 0, or merging moves a logit by more than 1e-5 of the "
    "largest or changes a prediction"
)


def claim(lab: Lab) -> Verdict:
    world, steps = digits_world(lab), lab.pick(smoke=3, desk=150)
    arms = {
        "SSF": adapter(SsfConfig()),
        "bias tuning": bias_only,
        "linear probe": linear_probe,
        "norms only": layernorm_only,
        "LoRA r=4 on q, v": lora(4),
        "LoRA r=5 on q, v (as many numbers)": lora(5),
        "full fine-tuning": full,
    }
    variants = {
        "from the identity": adapter(SsfConfig(init_weights="identity")),
        "scales alone": adapter(SsfConfig(shift=False)),
    }
    chosen = select(measure(lab, world, arms | variants, steps=steps))
    accuracies = {name: [row["test"] for row in rows] for name, rows in chosen.items()}
    merging = [_merged(lab, seed, steps) for seed in lab.seeds]
    ours = accuracies["SSF"]
    gain = lab.paired(ours, accuracies["bias tuning"])
    same = max(row["moved"] for row in merging) <= 1e-5 and not any(row["changed"] for row in merging)
    return lab.verdict(
        world="shifted digits, 10 labels a class",
        name="SSF",
        metric="accuracy",
        method=ours,
        baselines={name: accuracies[name] for name in arms if name != "SSF"},
        rule=RULE,
        holds=same and gain.interval is not None and gain.interval[0] > 0,
        ablations={
            "Variants of SSF": {name: accuracies[name] for name in variants},
            "Cost and rate": {
                name: {
                    "trained numbers, head apart": int(rows[0]["parameters"]),
                    "rates chosen": _rates(rows),
                }
                for name, rows in chosen.items()
            },
        },
        notes=[
            f"{steps} steps; full fine-tuning is ahead of SSF by {lab.paired(accuracies['full fine-tuning'], ours)}",
            f"merging moves logits by at most {max(row['moved'] for row in merging):.1e} of the largest and changes "
            f"{sum(row['changed'] for row in merging)} of {sum(row['predictions'] for row in merging)} predictions",
        ],
    )


def _rates(rows: list[dict[str, float]]) -> str:
    return ", ".join(f"{row['lr']:g}" for row in rows)


def _merged(lab: Lab, seed: int, steps: int) -> dict[str, Any]:
    """Logits of the test images before and after merging."""

    def compute() -> dict[str, Any]:
        task = shifted_digits(lab, seed)
        torch.manual_seed(seed)
        model = get_peft_model(digits_backbone(lab, 10), SsfConfig(modules_to_save=["classifier"]))
        tune(model, task, lr=1e-2, steps=steps, seed=seed)
        with torch.inference_mode():
            before = model(pixel_values=task.test["pixel_values"]).logits
            after = model.merge_and_unload()(pixel_values=task.test["pixel_values"]).logits
        return {
            "moved": float((after - before).abs().max() / before.abs().max()),
            "changed": int((before.argmax(-1) != after.argmax(-1)).sum()),
            "predictions": len(before),
        }

    return lab.cached("ssf-merging", {"seed": seed, "steps": steps}, compute)
