"""All tuners side by side on four tasks, into docs/adapters.md; costs come from `make bench` (docs/adapters-benchmark.json).

    python tools/compare_adapters.py [--worlds digits photos-5 photos-50 sounds] [--seeds 3] [--data DIR]

The tasks are the lab's: a tiny ViT pretrained on digits, then the same digits turned, negative, over a background; a tiny ViT
that knows which way up a photograph is, then CIFAR-10; a tiny AST of sounds, then ESC-10. Every arm has the same 150 steps and
its rate from the same four by validation: with each seed's own on digits and sounds, with the first seed's on photographs. The
sizes are a practitioner's first guess, not matched: the share of trained weights is in the table. What was found is kept in
docs/adapters-accuracy.json; worlds that are not asked for keep theirs, and a world whose data are not here is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn

from unfused import adapters
from unfused.claims.lab import Lab, estimate, photos, rates, spectrograms, tuning, vision
from unfused.claims.lab.worlds import Absent
from unfused.data.files import atomic_write

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Row:
    """A line of the table: how it is trained, its page, whether it merges, when to take it, its name in the benchmark."""

    arm: tuning.Arm
    page: str
    merges: str
    best: str
    cost: str = ""


def batches(task: tuning.Task, seed: int) -> list[dict[str, torch.Tensor]]:
    order = torch.randperm(len(task.train["labels"]), generator=torch.Generator().manual_seed(seed))
    return [{name: column[rows] for name, column in task.train.items()} for rows in order.split(32)]


def prepared(
    model: nn.Module, task: Any, *, lr: float, steps: int, seed: int, make: Callable[..., nn.Module]
) -> nn.Module:
    """Tuners that look at data before they are put on: `make(model, batches)` gives the model to train."""
    model = make(model, batches(task, seed))
    tuning.tune(model, task, lr=lr, steps=steps, seed=seed)
    return model


def looks_at_data(make: Callable[..., nn.Module]) -> tuning.Arm:
    return tuning.Arm(lambda model: model, train=functools.partial(prepared, make=make))


def spt(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> nn.Module:
    config = adapters.SptConfig(target_modules=LINEARS, budget=3000, r=4, modules_to_save=["classifier"])
    adapters.allocate_spt(model, config, data)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def corda(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig

    config = LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="corda",
        target_modules=["q_proj", "v_proj"],
        corda_config=CordaConfig(corda_method="ipm"),
        modules_to_save=["classifier"],
    )
    adapters.calibrate_corda(model, config, data)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def lottery(model: nn.Module, task: Any, *, lr: float, steps: int, seed: int) -> nn.Module:
    """LT-SFT: a third of the steps densely, the choice, the rest sparsely from the start."""
    import tempfile

    from transformers import TrainingArguments

    rows = [
        {name: column[i] for name, column in task.train.items()} for i in range(len(task.train["labels"]))
    ]
    tuned = get_peft_model(
        model, adapters.LtSftConfig(target_modules=LINEARS, density=0.03, modules_to_save=["classifier"])
    )  # type: ignore[arg-type]
    epochs = steps * 64 / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=min(64, len(rows)),
            learning_rate=lr,
            lr_scheduler_type="cosine",
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        adapters.LtSftTrainer(
            tuned, args, train_dataset=rows, dense_epochs=epochs / 3, sparse_epochs=epochs * 2 / 3
        ).train()
    return tuned


def mosa(model: nn.Module, task: Any, *, lr: float, steps: int, seed: int) -> nn.Module:
    from unfused.adapters.mosa import mosa_loss

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(task.train["labels"]), generator=draw)[:64]
        loss = mosa_loss(model, {name: column[rows] for name, column in task.train.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def dsee(model: nn.Module, task: Any, *, lr: float, steps: int, seed: int) -> nn.Module:
    """Half of the steps dense, half of the other weights pruned, the rest of the steps."""
    tuning.tune(model, task, lr=lr, steps=steps // 2, seed=seed)
    adapters.dsee_prune(model, amount=0.5)
    tuning.tune(model, task, lr=lr, steps=steps - steps // 2, seed=seed)
    return model


def telly(model: nn.Module) -> nn.Module:
    adapters.freeze_bottom(model, num_layers=2)
    return model


def rows() -> dict[str, Row]:
    a, arm = adapters, tuning.adapter
    fine = (1e-4, 3e-4, 1e-3, 3e-3)
    return {
        "linear probe": Row(tuning.linear_probe, "", "", "the least that can be done"),
        "full fine-tuning": Row(
            tuning.Arm(tuning.full.prepare, fine), "", "", "labels and memory are plenty"
        ),
        "LoRA r=4 on q, v (PEFT)": Row(tuning.lora(4), "", "yes", "the default to beat"),
        "SSF": Row(
            arm(a.SsfConfig()),
            "ssf",
            "yes",
            "features are right but shifted; nothing may be added at inference",
        ),
        "Houlsby adapter": Row(
            arm(a.BottleneckConfig.preset("houlsby", bottleneck_dim=8)),
            "unified-peft",
            "no",
            "the classic; many tasks on one base",
        ),
        "scaled parallel adapter": Row(
            arm(a.BottleneckConfig.preset("scaled_parallel", bottleneck_dim=8, scaling=2.0)),
            "unified-peft",
            "no",
            "a larger budget goes best into the FFN",
            "unified-peft/scaled parallel",
        ),
        "MAM adapter": Row(
            arm(a.MamConfig(prefix_length=8, bottleneck_dim=8, scaling=2.0, prefix_hidden=0)),
            "unified-peft",
            "no",
            "text generation with a budget of some per cent",
            "unified-peft/MAM",
        ),
        "Conformer adapter (AST)": Row(
            arm(a.AstAdapterConfig(block="conformer", reduction=8, kernel_size=9)),
            "ast-adapters",
            "no",
            "audio, tokens in time order",
        ),
        "MoSA": Row(
            tuning.Arm(arm(a.MosaConfig(bottleneck_dim=8, num_experts=4, scaling=1.0)).prepare, train=mosa),
            "mosa",
            "into a plain adapter",
            "an adapter is used anyway and steps are cheap",
        ),
        "LT-SFT": Row(
            tuning.Arm(lambda model: model, train=lottery),
            "composable-sft",
            "yes",
            "parts are to be added up: language + task",
        ),
        "SaRA": Row(
            arm(a.SaraConfig(target_modules=LINEARS, density=0.03)),
            "sara",
            "yes",
            "the model's prior must survive (diffusion)",
        ),
        "SPT": Row(looks_at_data(spt), "spt", "yes (LoRA parts)", "one fixed budget, tasks that differ"),
        "S2FT": Row(
            arm(a.S2ftConfig(ratio={"fc2": 0.06, "o_proj": 0.25})),
            "s2ft",
            "yes",
            "language models; memory of activations is the limit",
        ),
        "DSEE, half of the weights pruned": Row(
            tuning.Arm(
                arm(
                    a.DseeConfig(r=4, lora_alpha=8, num_sparse=64, target_modules=["q_proj", "v_proj"])
                ).prepare,
                train=dsee,
            ),
            "dsee",
            "yes",
            "the served model has to be sparse too",
        ),
        "mask tuning (AMT)": Row(
            arm(
                a.MaskTuningConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
                lrs=(3e-4, 6e-4, 1.5e-3, 3e-3),
            ),
            "mask-tuning",
            "yes",
            "CLIP with few shots; one bit a weight to store",
        ),
        "SVFit, all singular values of q, v": Row(
            arm(a.SvFitConfig(energy=1.0, target_modules=["q_proj", "v_proj"])),
            "svfit",
            "yes",
            "hundreds of numbers a task, no more",
        ),
        "CorDA (IPM), r=4": Row(
            looks_at_data(corda), "corda", "yes, as LoRA", "samples of what to learn or to keep are at hand"
        ),
        "LoRAMoE, 4 experts": Row(
            arm(
                a.LoraMoeConfig(
                    target_modules=["fc1", "fc2"], num_experts=4, r=2, lora_alpha=16, balance_weight=0.0
                )
            ),
            "loramoe",
            "no",
            "many instruction tasks and knowledge to keep",
        ),
        "HST": Row(
            arm(a.HstConfig(hidden_sizes=[8, 8, 16, 16], num_heads=[1, 1, 2, 2])),
            "hst",
            "no",
            "dense prediction from a plain ViT",
        ),
        "UniPT": Row(
            arm(a.UniPtConfig(reduction_factor=2)),
            "unipt",
            "no",
            "no memory for a backward pass, or cached features",
        ),
        "DVPT": Row(
            arm(a.DvptConfig(num_virtual_tokens=4, bottleneck_size=8, share_every=2)),
            "dvpt",
            "no",
            "medical pictures, half a per cent of weights",
        ),
        "Telly, bottom half frozen": Row(
            tuning.Arm(telly, fine),
            "telly",
            "nothing added",
            "fine-tuning is wanted, its time is not",
            "telly/Telly, K = 6",
        ),
    }


@dataclass(frozen=True)
class World:
    """A task, and how its grid is searched."""

    title: str
    make: Callable[[Lab], tuning.TuningWorld]
    measure: Callable[..., dict[str, list[dict[str, float]]]]


def by_each_seed(
    lab: Lab, world: Any, arms: Any, seeds: Any, steps: int
) -> dict[str, list[dict[str, float]]]:
    return tuning.select(tuning.measure(lab, world, arms, seeds, steps))


WORLDS = {
    "digits": World("shifted digits, 10 a class", vision.digits_world, by_each_seed),
    "photos-5": World(
        "CIFAR-10, 5 a class", lambda lab: photos.photos_world(lab, 5), rates.measure_at_first_seeds_rate
    ),
    "photos-50": World(
        "CIFAR-10, 50 a class", lambda lab: photos.photos_world(lab, 50), rates.measure_at_first_seeds_rate
    ),
    "sounds": World("ESC-10, 5 a class", spectrograms.events_world, by_each_seed),
}


def fits(world: tuning.TuningWorld, arm: tuning.Arm, name: str) -> bool:
    """Whether the tuner takes this backbone; it says itself why not."""
    try:
        arm.prepare(world.backbone(10))
    except (ValueError, TypeError, AttributeError) as reason:
        print(f"{world.name}: {name} is left out: {str(reason).splitlines()[0]}")
        return False
    return True


def table(found: dict[str, dict[str, Any]], costs: dict[str, Any]) -> str:
    shown = [name for name in WORLDS if name in found]
    titles = " | ".join(WORLDS[name].title for name in shown)
    lines = [
        f"| | trained | {titles} | step time / LoRA | memory / LoRA | merges | best used when |",
        "|---|---|" + "---|" * len(shown) + "---|---|---|---|",
    ]
    for name, row in rows().items():
        scores = [
            str(estimate(found[world][name]["accuracy"])) if name in found[world] else "" for world in shown
        ]
        share = next(found[world][name]["share"] for world in shown if name in found[world])
        cost = costs.get(row.cost or row.page, {})
        ratios = [f"{cost[key]:.2f}" if key in cost else "" for key in ("time", "memory")]
        title = f"[{name}](methods/{row.page}.md)" if row.page else name
        lines.append(f"| {' | '.join([title, f'{share:.2%}', *scores, *ratios, row.merges, row.best])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--data", help="folder with images/ and audio/; by default $UNFUSED_DATA or ../shared/data"
    )
    parser.add_argument("--scale", choices=("smoke", "desk"), default="desk")
    arguments = parser.parse_args()
    lab = Lab(
        arguments.scale,
        seeds=arguments.seeds,
        data_dir=arguments.data,
        slug="adapters",
        console=Console(width=160),
    )
    accuracies = DOCS / "adapters-accuracy.json"
    found = json.loads(accuracies.read_text()) if accuracies.exists() else {}
    for name in arguments.worlds:
        try:
            world = WORLDS[name].make(lab)
        except Absent as reason:
            print(f"{name} is left out: {reason}")
            continue
        arms = {arm: row.arm for arm, row in rows().items() if fits(world, row.arm, arm)}
        measured = WORLDS[name].measure(lab, world, arms, list(lab.seeds), lab.pick(smoke=3, desk=150))
        total = sum(p.numel() for p in world.backbone(10).parameters())
        found[name] = {
            arm: {
                "accuracy": [metrics["test"] for metrics in of_arm],
                "lr": [metrics["lr"] for metrics in of_arm],
                "share": of_arm[0]["parameters"] / total,
            }
            for arm, of_arm in measured.items()
        }
        for arm in sorted(measured, key=lambda arm: -np.mean(found[name][arm]["accuracy"])):
            print(
                f"{name:10} {np.mean(found[name][arm]['accuracy']):.3f} {found[name][arm]['share']:7.2%} {arm}"
            )
        if arguments.scale == "desk":
            write(found, accuracies)


def write(found: dict[str, dict[str, Any]], accuracies: Path) -> None:
    with atomic_write(accuracies) as file:
        json.dump(found, file, indent=1)
        file.write("\n")
    record, page = DOCS / "adapters-benchmark.json", DOCS / "adapters.md"
    costs = json.loads(record.read_text()) if record.exists() else {}
    before, rest = page.read_text().split("<!-- table:begin -->")
    after = rest.split("<!-- table:end -->")[1]
    with atomic_write(page) as file:
        file.write(f"{before}<!-- table:begin -->\n{table(found, costs)}\n<!-- table:end -->{after}")


if __name__ == "__main__":
    main()
