"""Training only the smallest weights of a diffusion model learns a style and forgets less than LoRA does (SaRA).

The paper: at equal numbers of trained weights, ahead of LoRA, LT-SFT and full fine-tuning in a score that joins the fit to a
style and the prior kept. Here: a denoiser of digits of all classes, and 20 bold digits of the classes 0 to 4
(`unfused.claims.lab.diffusion`). Fit is the share of the distance to unseen bold digits that has gone, prior the share of
drawings of 5 to 9 that a classifier of both styles can read. Single points of such a trade-off say little, since a rate or a
few steps more move along it; so each arm gets the same three rates and two lengths, and is judged by the area under
what can be reached with them (for each fit, the best prior at it or more).

Refuted if the 95 % interval over seeds of the paired gain in this area over a random mask of the same size, over LoRA, or
over full fine-tuning reaches 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unfused.adapters.composable_sft import LtSftConfig
from unfused.adapters.sara import SaraConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.diffusion import denoiser, draw, frechet, quality, reader, style_world
from unfused.claims.lab.instruction import frontier_area
from unfused.claims.lab.tuning import Arm, adapter, full, lora, measure
from unfused.claims.lab.vision import digit_parts, pixel_values
from unfused.nn.select import select_global
from unfused.nn.sparse_layer import sparse_deltas

RULE = (
    "the 95 % interval over seeds of the paired gain in area over a random mask of the same size, over LoRA, or over full "
    "fine-tuning reaches 0"
)
DENSITY = 0.15
RATES, LENGTHS = (3e-4, 1e-3, 3e-3), (100, 300)
RANK = 14  # as many numbers as 15 %


def claim(lab: Lab) -> Verdict:
    world, recipe = style_world(lab), {"batch_size": 32}
    count = round(DENSITY * sum(p.numel() for p in denoiser(lab).parameters()))
    random = LtSftConfig(num_entries=count)

    def sara(**options: Any) -> Arm:
        return adapter(SaraConfig(density=DENSITY, **options), lrs=RATES, recipe=recipe)

    arms = {
        "SaRA": sara(),
        "random mask": adapter(random, lrs=RATES, recipe=recipe),
        "LoRA": lora(RANK, ["fc1", "fc2"], lrs=RATES, recipe=recipe),
        "full fine-tuning": Arm(full.prepare, lrs=RATES, recipe=recipe),
        "largest weights": Arm(functools.partial(_largest, config=random), lrs=RATES, recipe=recipe),
    }
    variants = {
        "without the nuclear norm": sara(nuclear_weight=0.0),
        "without the second selection": sara(reselect_at=None),
    }
    found: dict[str, list[list[dict[str, float]]]] = {}  # arm -> seed -> points
    for steps in LENGTHS if lab.scale != "smoke" else (2,):
        for name, by_rate in measure(lab, world, arms | variants, steps=steps).items():
            points = found.setdefault(name, [[] for _ in lab.seeds])
            for rate, rows in by_rate.items():
                for seed, row in enumerate(rows):
                    points[seed].append({**row, "rate": rate, "steps": steps})
    areas = {
        name: [frontier_area([(p["fit"], p["prior"]) for p in points]) for points in seeds]
        for name, seeds in found.items()
    }
    ours = areas["SaRA"]
    judged = [lab.paired(ours, areas[name]) for name in ("random mask", "LoRA", "full fine-tuning")]
    before = quality(denoiser(lab), world.task(0), reader(lab), count=lab.pick(smoke=10, desk=60))
    return lab.verdict(
        world="bold digits from 20 examples",
        name="SaRA",
        metric="area of the trade-off of fit and prior",
        method=ours,
        baselines={name: areas[name] for name in arms if name != "SaRA"},
        rule=RULE,
        holds=all(gain.interval is not None and gain.interval[0] > 0 for gain in judged),
        ablations={
            "Variants of SaRA (area)": {name: areas[name] for name in variants},
            "The point with the best product of fit and prior (mean over seeds)": {
                name: _best_product(seeds) for name, seeds in found.items()
            },
            "Pretrained weights set to 0 (all classes)": _zeroed(lab),
        },
        notes=[
            f"{len(RATES)} rates, {LENGTHS} steps of 32, AdamW without decay, cosine; {count:,} of "
            f"{round(count / DENSITY):,} weights trained. The pretrained model can be read in {before['prior']:.1%} of its "
            "drawings of 5 to 9.",
        ],
    )


def _largest(model: nn.Module, config: LtSftConfig) -> nn.Module:
    adapted = adapter(config).prepare(model)
    found = sparse_deltas(adapted, "default")
    scores = {name: original.detach().abs() for name, (_, _, original) in found.items()}
    chosen = select_global(scores, sum(len(delta.index) for _, delta, _ in found.values()))
    for name, (_, delta, _) in found.items():
        delta.resize_(chosen[name])
    return adapted


def _best_product(seeds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    best = [max(points, key=lambda p: p["fit"] * p["prior"]) for points in seeds]
    means = {
        key: round(sum(p[key] for p in best) / len(best), 3)
        for key in ("fit", "prior", "diversity", "distance")
    }
    return means | {"trained": int(best[0]["parameters"]), "rates": " ".join(f"{p['rate']:g}" for p in best)}


@torch.no_grad()
def _zeroed(lab: Lab) -> dict[str, dict[str, float]]:
    """The motivation: do the smallest weights matter? Distance to clean digits' features, and what can be read."""
    judge, count = reader(lab), lab.pick(smoke=10, desk=60)
    wanted = judge.features(pixel_values(digit_parts(lab)["test"][0]))
    labels = torch.arange(10).repeat_interleave(count)
    rows = {}
    for share in (0.0, 0.1, 0.2, 0.3):
        for which in ("smallest", "random") if share else ("none",):
            model = denoiser(lab)
            sizes = torch.cat([p.abs().flatten() for p in model.parameters()])
            scores = (
                sizes
                if which == "smallest"
                else torch.rand(len(sizes), generator=torch.Generator().manual_seed(0))
            )
            cut = scores < scores.kthvalue(max(1, round(share * len(scores)))).values
            for p, part in zip(
                model.parameters(), cut.split([p.numel() for p in model.parameters()]), strict=True
            ):
                p.masked_fill_(part.view(p.shape), 0.0)
            features = judge.features(draw(model, labels).view(-1, 1, 8, 8))
            rows[f"{share:.0%} {which}" if share else "none"] = {
                "distance": round(frechet(features, wanted), 2),
                "readable": round(float((judge.last(features).argmax(1) == labels).float().mean()), 3),
            }
    return rows
