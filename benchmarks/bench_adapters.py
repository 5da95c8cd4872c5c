"""Step time and memory of every tuner beside full fine-tuning and PEFT's LoRA r=8 on the same targets.

Run `python benchmarks/bench_adapters.py`: BERT-base and ViT-B with random weights, batch 8, AdamW, everything in training
mode. All variants stand side by side and share the frozen weights; rounds go through all of them, so that what else the
machine does hits each; ratios are those of medians. Memory is counted, not sampled: parameters, optimiser state and the
highest sum of what a step allocates. "Saved" is what autograd keeps from forward for backward, parameters left out.

Aims: SSF, SVFit, SaRA and LT-SFT at most 1.1 of LoRA's step time; S2FT below 1 in time and in what it saves; UniPT at most
0.6 of LoRA's memory; merged models as fast as the base model.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from unfused.catalog import methods
from unfused.nn.blocks import transformer_blocks
from unfused.nn.tuner import TunerConfig, TunerModel

HEAD = {"modules_to_save": ["classifier"]}
AIMS = {  # slug: (column, bound)
    "ssf": [("time", 1.1)],
    "svfit": [("time", 1.1)],
    "sara": [("time", 1.1)],
    "composable-sft": [("time", 1.1)],
    "s2ft": [("time", 1.0), ("saved", 1.0)],
    "unipt": [("peak", 0.6)],
}
FIELDS = {  # where a method's paper is; those not named are for both
    "bert": ("composable-sft", "dsee", "loramoe", "s2ft", "telly", "unified-peft"),
    "vit": ("ast-adapters", "dvpt", "hst", "mask-tuning", "spt"),
}
DOCS = Path(__file__).parents[1] / "docs" / "adapters-benchmark.md"


@dataclass
class Variant:
    """One way to tune, and what was measured of it."""

    name: str
    slug: str
    model: nn.Module
    lora: str = ""  # name of the LoRA on the same targets
    optimizer: Any = None
    trained: int = 0
    times: list[float] = field(default_factory=list)
    merged: float | None = None  # forward of the merged model over the base model's
    peak: int = 0
    saved: int = 0

    @property
    def time(self) -> float:
        return statistics.median(self.times)


# -- models ------------------------------------------------------------------------------------------------------------


def make_base(kind: str) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(num_labels=4))
    return ViTForImageClassification(ViTConfig(num_labels=100))


def make_batch(kind: str, length: int, batch: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(batch) % 4
    if kind == "bert":
        return {"input_ids": torch.randint(1000, 30000, (batch, length), generator=draw), "labels": labels}
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=draw), "labels": labels}


def shared_copy(base: nn.Module) -> nn.Module:
    """A frozen model of its own around the same memory: two dozen adapters need that of one backbone."""
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, {**own, **{id(buffer): buffer for buffer in base.buffers()}})


# -- what is compared --------------------------------------------------------------------------------------------------


def recipes(
    slug: str, module: Any, batch: dict[str, torch.Tensor]
) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> function that puts the method on a model; by default every config of the module, as it comes."""

    def put(config: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, config)

    if slug == "unified-peft":
        presets = {"Pfeiffer": "pfeiffer", "scaled parallel": "scaled_parallel"}
        found = {
            name: put(module.BottleneckConfig.preset(preset, **HEAD)) for name, preset in presets.items()
        }
        return {**found, "MAM": put(module.MamConfig(**HEAD))}
    if slug == "dsee":  # how the support is found costs minutes and changes no step
        return {"DSEE": put(module.DseeConfig(sparse_support="magnitude", **HEAD))}
    if slug == "spt":

        def spt(model: nn.Module) -> nn.Module:
            config = module.SptConfig(**HEAD)
            module.allocate_spt(copy.deepcopy(model).requires_grad_(True), config, [batch], num_batches=1)
            return get_peft_model(model, config)

        return {"SPT-LoRA": spt}
    if slug == "telly":

        def telly(model: nn.Module, depth: int) -> nn.Module:
            tensors = dict(model.named_parameters())
            model = copy.deepcopy(model).requires_grad_(True)
            module.freeze_bottom(model, depth)
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = tensors[name].data  # shared again
            return model

        return {f"Telly, K = {depth}": functools.partial(telly, depth=depth) for depth in (6, 9)}
    if slug == "corda":  # PEFT's LoRA once it is initialised
        return {}
    configs = [getattr(module, name) for name in module.__all__ if name.endswith("Config")]
    return {c.__name__.removesuffix("Config"): put(c(**HEAD)) for c in configs if issubclass(c, TunerConfig)}


def variants(
    base: nn.Module, batch: dict[str, torch.Tensor], wanted: Callable[[str], bool]
) -> Iterator[Variant]:
    full = copy.deepcopy(base).requires_grad_(True)
    yield Variant("full fine-tuning", "", full)
    lora_of: dict[frozenset[str], str] = {}
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"classifier"}
    default = {part for block in transformer_blocks(base) for part in (block.query, block.value)}
    for method in methods("adapters"):
        if not wanted(method.slug):
            continue
        try:
            found = recipes(method.slug, importlib.import_module(method.module), batch)
        except Exception as reason:
            print(f"  {method.slug}: skipped, {_line(reason)}")
            continue
        for name, put in found.items():
            try:
                start = time.perf_counter()
                variant = Variant(name, method.slug, put(shared_copy(base)))
                print(f"  {name}: made in {time.perf_counter() - start:.1f} s", flush=True)
            except Exception as reason:  # a method for images alone, or a broken one: the others go on
                print(f"  {name}: left out, {_line(reason)}")
                continue
            names = set(getattr(getattr(variant.model, "base_model", None), "targeted_module_names", ()))
            targets = frozenset(names & linear) or frozenset(default)
            if targets not in lora_of:
                lora_of[targets] = f"LoRA r=8 on {_summary(targets, linear)}"
                config = LoraConfig(r=8, lora_alpha=16, target_modules=sorted(targets), **HEAD)  # type: ignore[arg-type]
                yield Variant(lora_of[targets], "", get_peft_model(shared_copy(base), config))  # type: ignore[arg-type]
            variant.lora = lora_of[targets]
            yield variant


def _summary(targets: frozenset[str], linear: set[str]) -> str:
    if targets == linear:
        return "all linear maps"
    inside = {re.sub(r"^.*\.\d+\.", "", name).replace("attention.self.", "") for name in targets}
    return ", ".join(sorted(name.removesuffix(".dense") for name in inside))


def _line(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0][:140]


# -- measuring ---------------------------------------------------------------------------------------------------------


def step(variant: Variant, batch: dict[str, torch.Tensor]) -> None:
    model = variant.model
    loss = model(**batch).loss
    if isinstance(getattr(model, "base_model", None), TunerModel):
        loss = loss + model.base_model.regularization_loss()
    loss.backward()
    variant.optimizer.step()
    variant.optimizer.zero_grad(set_to_none=True)


def measure_memory(variant: Variant, batch: dict[str, torch.Tensor]) -> None:
    """The first step, in which saved tensors are counted and allocations recorded; the optimiser has its state already."""
    for group in variant.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    variant.optimizer.step()
    variant.optimizer.zero_grad(set_to_none=True)
    states = [v for state in variant.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    tensors = [*variant.model.parameters(), *variant.model.buffers(), *states]
    resident = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    parameters = {p.untyped_storage().data_ptr() for p in variant.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:  # what is saved lives until backward: no address comes twice
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(variant, batch)
    now = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    variant.saved, variant.peak = sum(saved.values()), sum(resident.values()) + highest


def measure_merged(variant: Variant, base: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Forward of the merged model over the base model's, one sample; None where the method cannot merge."""
    tuner = getattr(variant.model, "base_model", None)
    if not isinstance(tuner, TunerModel) or tuner.not_mergeable:
        return
    try:
        merged = variant.model.merge_and_unload().eval()
    except ValueError:
        return
    one = {name: column[:1] for name, column in batch.items()}
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with torch.inference_mode():
        for turn in range(6):
            for which, model in enumerate((base.eval(), merged)):
                start = time.perf_counter()
                model(**one)
                if turn:  # the first warms up
                    seconds[which].append(time.perf_counter() - start)
    variant.merged = statistics.median(seconds[1]) / statistics.median(seconds[0])


def run(kind: str, length: int, options: argparse.Namespace) -> list[Variant]:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    base, batch = make_base(kind), make_batch(kind, length, options.batch)
    elsewhere = () if options.all else FIELDS["vit" if kind == "bert" else "bert"]
    found = []
    for variant in variants(
        base, batch, lambda s: s == options.method if options.method else s not in elsewhere
    ):
        chosen = [p for p in variant.model.train().parameters() if p.requires_grad]
        variant.trained = sum(p.numel() for p in chosen)
        variant.optimizer = torch.optim.AdamW(chosen, lr=1e-4)
        try:
            measure_memory(variant, batch)
        except Exception as reason:  # one method's failure must not cost the others their numbers
            traceback.print_exc(limit=3)
            print(f"  {variant.name}: failed, {_line(reason)}")
            continue
        found.append(variant)
    for _ in range(options.rounds):
        for variant in found:
            start = clock()
            step(variant, batch)
            variant.times.append(clock() - start)
    for variant in found:
        variant.optimizer = None
        measure_merged(variant, base, batch)
    gc.collect()
    return found


# -- reporting ---------------------------------------------------------------------------------------------------------


def table(found: list[Variant]) -> list[str]:
    """Markdown: ratios to LoRA on the same targets, and to full fine-tuning."""
    by_name = {variant.name: variant for variant in found}
    full = by_name["full fine-tuning"]
    heads = [
        "method",
        "trained",
        "time / LoRA",
        "time / full",
        "memory / LoRA",
        "memory / full",
        "saved / LoRA",
    ]
    heads += ["merged / base", "LoRA on"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for v in found:
        lora = by_name.get(v.lora, v if v.name.startswith("LoRA") else None)

        def over(key: str, other: Variant | None, v: Variant = v) -> str:
            return f"{getattr(v, key) / getattr(other, key):.2f}" if other and other is not v else ""

        cells = [
            v.name,
            f"{v.trained / 1e6:.2f} M",
            over("time", lora),
            over("time", full),
            over("peak", lora),
            over("peak", full),
            over("saved", lora),
            "" if v.merged is None else f"{v.merged:.2f}",
            v.lora.removeprefix("LoRA r=8 on "),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"Full fine-tuning: {full.time:.2f} s a step, {full.peak / 2**20:,.0f} MiB, {full.saved / 2**20:,.0f} MiB saved."
    )
    for v in found:
        for column, bound in AIMS.get(v.slug, ()):
            ratio = getattr(v, column) / getattr(by_name[v.lora], column)
            word = "met" if ratio <= bound else "MISSED"
            what = {"time": "step time", "saved": "bytes saved for backward", "peak": "memory"}[column]
            lines.append(f"- {v.name}: {what} {ratio:.2f} of LoRA's, aim {bound}: {word}")
    return lines


def ratios(found: list[Variant]) -> dict[str, dict[str, float]]:
    """Step time and memory over LoRA's on the same targets: by slug, or by slug/name where it has several."""
    by_name = {variant.name: variant for variant in found}
    several = {v.slug for v in found if sum(v.slug == other.slug for other in found) > 1}
    pairs = [(v, by_name[v.lora]) for v in found if v.slug and v.lora in by_name]
    return {
        f"{v.slug}/{v.name}" if v.slug in several else v.slug: {
            "time": v.time / lora.time,
            "memory": v.peak / lora.peak,
        }
        for v, lora in pairs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", help="only this slug")
    parser.add_argument(
        "--all", action="store_true", help="every method on both models, not on its paper's alone"
    )
    parser.add_argument("--kind", choices=["bert", "vit"], help="only this model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine")
    parser.add_argument("--long", action="store_true", help="BERT with 512 tokens as well")
    parser.add_argument("--write", action="store_true", help="write docs/adapters-benchmark.md")
    options = parser.parse_args()
    settings = [("bert", 128), *([("bert", 512)] if options.long else []), ("vit", 197)]
    where = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {options.clock} time, median of {options.rounds}"
    print(where)
    report = [
        "# Step time and memory of the tuners",
        "",
        *__doc__.splitlines()[2:],
        "",
        f"Measured with {where}.",
        "",
    ]
    costs: dict[str, dict[str, float]] = {}
    for kind, length in settings:
        if options.kind in (None, kind):
            title = f"{'BERT-base' if kind == 'bert' else 'ViT-B/16'}, batch {options.batch}, {length} tokens"
            print(f"\n{title}")
            found = run(kind, length, options)
            lines = table(found)
            costs |= ratios(found)
            print("\n".join(lines))
            report += [f"## {title}", "", *lines, ""]
    if options.write:
        DOCS.write_text("\n".join(report).rstrip() + "\n", encoding="utf-8")
        DOCS.with_suffix(".json").write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
        print(f"written to {DOCS}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
