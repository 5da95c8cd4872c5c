"""Everything that PEFT promises of a tuner, for every tuner of ours, on every architecture that it says it can do.

A method's own file `cases/NAME.py` says which those are, and with which error it refuses what it cannot do; see `CASES`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from unfused.catalog import methods
from unfused.nn.tuner import TunerModel
from unfused.train.peft import RegularizedTrainer

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"adapter_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load(HERE / "tiny.py")
CASES: dict[str, dict[str, Any]] = {
    path.stem: load(path).CASE for path in sorted((HERE / "cases").glob("*.py"))
}
PAIRS = [
    pytest.param(name, kind, id=f"{name}-{kind}") for name, case in CASES.items() for kind in case["kinds"]
]
FIRST = [
    pytest.param(name, case["kinds"][-1 if case["kinds"][0] == "plain" else 0], id=name)
    for name, case in CASES.items()
]
pytestmark = pytest.mark.filterwarnings("ignore")


def model_and_batch(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if kind == "unet":
        pytest.importorskip("diffusers", reason="the tiny U-Net is diffusers'")
    return tiny.make_model(kind), tiny.make_batch(kind)


def config_of(name: str, kind: str, head: bool = True, **options: Any) -> Any:
    if head and kind in tiny.HEADS:
        options["modules_to_save"] = tiny.HEADS[kind]
    return CASES[name]["config"](kind, **options)


def prepare(name: str, kind: str, model: nn.Module) -> nn.Module:
    if CASES[name].get("prepare"):
        CASES[name]["prepare"](model, [tiny.make_batch(kind, seed) for seed in (1, 2)])
    return model


def adapt(name: str, kind: str, base: nn.Module, adapter: str = "default", **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return prepare(
        name, kind, get_peft_model(base, config_of(name, kind, **options), adapter_name=adapter)
    ).eval()


def shake(model: nn.Module, seed: int = 0, size: float = 0.05) -> nn.Module:
    """Move everything trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def train(model: nn.Module, kind: str, steps: int = 5) -> list[float]:
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.0), []
    model.train()
    for key, module in model.named_modules():  # PEFT leaves running statistics of the base to the user
        if isinstance(module, nn.BatchNorm2d) and "unfused_" not in key:
            module.eval()
    for step in range(steps):
        loss = tiny.loss_of(model, tiny.make_batch(kind, step))
        if isinstance(getattr(model, "base_model", None), TunerModel):
            loss = loss + model.base_model.regularization_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def refusal(name: str, item: str) -> Any:
    """`with refusal(...)`: the error that the case announces for an item, or nothing."""
    expected = CASES[name].get("errors", {}).get(item, "")
    return (
        pytest.raises((ValueError, NotImplementedError, TypeError), match=expected)
        if expected
        else contextlib.nullcontext()
    )


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_tuner_has_a_case():
    tuners = {m.module.rpartition(".")[2] for m in methods() if "\nregister(" in source(m.module)}
    assert tuners == {name.partition("-")[0] for name in CASES}  # NAME-VARIANT.py: another config of a tuner


def source(module: str) -> str:
    return (HERE.parents[1] / "src" / Path(*module.split("."))).with_suffix(".py").read_text()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_starts_as_the_base_model(name, kind):
    options = CASES[name].get("identity_options", {})
    if options is None:
        pytest.skip("the case says that it does not start as the base model")
    base, batch = model_and_batch(kind)
    with torch.no_grad():
        before = tiny.output(base, batch)
        assert same(tiny.output(adapt(name, kind, base, **options), batch), before)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_training_moves_the_adapter_alone(name, kind):
    base, batch = model_and_batch(kind)
    with torch.no_grad():
        before = tiny.output(base, batch)
    parameters = dict(base.named_parameters())
    values = {key: value.detach().clone() for key, value in parameters.items()}
    model = adapt(name, kind, base)
    prefix, heads = model.base_model.prefix, tiny.HEADS.get(kind, [])
    trainable = {
        key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad
    }
    assert trainable and all(prefix in key or ".modules_to_save." in key for key in trainable)
    assert all(torch.isfinite(torch.tensor(train(model, kind))))
    assert all(torch.equal(parameters[key], value) for key, value in values.items()), "a base weight moved"
    now = dict(model.named_parameters())
    assert any(prefix in key and not torch.equal(now[key], value) for key, value in trainable.items())
    assert not heads or any(".modules_to_save." in key for key in trainable)
    with torch.no_grad(), model.disable_adapter():
        assert same(tiny.output(model, batch), before)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_saved_and_loaded(name, kind, tmp_path):
    base, batch = model_and_batch(kind)
    model = shake(adapt(name, kind, base))
    with torch.no_grad():
        expected = tiny.output(model, batch)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    heads = tiny.HEADS.get(kind, [])
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        prefix = CASES[name].get("saved_as", model.base_model.prefix)
        assert prefix in key or any(f".{head}." in key for head in heads), key
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny.make_model(kind), tmp_path, low_cpu_mem_usage=low_memory)
        assert not any(p.requires_grad for p in again.parameters())
        with torch.no_grad():
            assert same(tiny.output(again, batch), expected)
    again = PeftModel.from_pretrained(tiny.make_model(kind), tmp_path, is_trainable=True)
    with torch.no_grad():
        assert same(tiny.output(again.eval(), batch), expected)
    train(again, kind, steps=2)
    with torch.no_grad():
        assert not same(tiny.output(again, batch), expected, 1e-7)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_several_adapters(name, kind, tmp_path):
    base, batch = model_and_batch(kind)
    model = shake(adapt(name, kind, base, head=False))
    with torch.no_grad():
        first = tiny.output(model, batch)
        with refusal(name, "several"):
            model.add_adapter("other", config_of(name, kind, head=False))
        if CASES[name].get("errors", {}).get("several"):
            return
        model.eval()
        assert same(tiny.output(model, batch), first)
        model.set_adapter("other")
        prepare(name, kind, model).eval()
        shake(model, seed=1)
        second = tiny.output(model, batch)
        assert not same(first, second)
        model.set_adapter("default")
        assert same(tiny.output(model, batch), first)
        expected = CASES[name].get("compose", True)
        with contextlib.nullcontext() if expected is True else pytest.raises(ValueError, match=expected):
            model.base_model.set_adapter(["default", "other"])
            both = tiny.output(model, batch)
            assert not same(both, first) and not same(both, second)
        model.base_model.set_adapter(["other"])
        assert same(tiny.output(model, batch), second)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert "other" not in model.peft_config and not any(".other" in key for key in model.state_dict())
        assert same(tiny.output(model, batch), first)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_merged(name, kind):
    base, batch = model_and_batch(kind)
    kind_of_base, before = type(base), weights(base)
    model, case = shake(adapt(name, kind, base, **CASES[name].get("merge_options", {}))), CASES[name]
    with torch.no_grad():
        expected = tiny.output(model, batch)
        if case["merge"]:
            for merge in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(ValueError, match=case["merge"]):
                    merge()
            assert same(tiny.output(model, batch), expected)
            return
        model.merge_adapter()
        assert same(tiny.output(model, batch), expected, case.get("tolerance", 1e-5))
        model.unmerge_adapter()
        now = {
            key.replace(".base_layer", "").removeprefix("base_model.model."): v
            for key, v in model.state_dict().items()
        }
        heads = tiny.HEADS.get(kind, [])
        assert all(torch.equal(now[key], v) for key, v in before.items() if key.split(".")[0] not in heads)
        assert same(tiny.output(model, batch), expected)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is kind_of_base
        assert same(tiny.output(merged, batch), expected, case.get("tolerance", 1e-5))
        assert not any("unfused_" in key for key in merged.state_dict())


@pytest.mark.parametrize(("name", "kind"), FIRST)
def test_merge_refuses_broken_weights(name, kind):
    if CASES[name]["merge"]:
        pytest.skip("cannot be merged")
    base, _ = model_and_batch(kind)
    model = adapt(name, kind, base)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if model.base_model.prefix in key and parameter.requires_grad:
                parameter.fill_(float("nan"))
    if CASES[name].get("merge_of_nan", True):
        with pytest.raises(ValueError, match="NaN"):
            model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(("name", "kind"), FIRST)
@pytest.mark.parametrize("way", ["bf16 base", "bf16 autocast"])
def test_half_precision(name, kind, way):
    base, batch = model_and_batch(kind)
    if way == "bf16 base":
        base = base.to(torch.bfloat16)
        batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    model = shake(adapt(name, kind, base)) if way == "bf16 autocast" else shake(bf16(name, kind, base))
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16 autocast"):
        loss = tiny.loss_of(model, batch)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and loss.isfinite()


def bf16(name: str, kind: str, base: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(base, config_of(name, kind))
    if CASES[name].get("prepare"):
        batches = [
            {
                k: v.to(torch.bfloat16) if v.is_floating_point() else v
                for k, v in tiny.make_batch(kind, seed).items()
            }
            for seed in (1, 2)
        ]
        CASES[name]["prepare"](model, batches)
    return model


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p.values[1] in tiny.TRANSFORMERS])
def test_add_adapter_of_transformers(name, kind):
    base, batch = model_and_batch(kind)
    with torch.no_grad():
        before = tiny.output(base, batch)
        with refusal(name, "add_adapter"):
            base.add_adapter(config_of(name, kind, head=False), adapter_name="mine")
        if CASES[name].get("errors", {}).get("add_adapter"):
            return
        base.eval()
        shake(base)
        assert not same(tiny.output(base, batch), before)
        base.disable_adapters()
        assert same(tiny.output(base, batch), before)


@pytest.mark.parametrize(("name", "kind"), FIRST)
@pytest.mark.parametrize("damage", ["shape", "missing", "extra", "nan"])
def test_hostile_file(name, kind, damage, tmp_path):
    base, batch = model_and_batch(kind)
    model = shake(adapt(name, kind, base, head=False))
    with torch.no_grad():
        expected = tiny.output(model, batch)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    floats = [key for key in sorted(state) if state[key].is_floating_point() and state[key].numel() > 1]
    if damage == "nan" and not floats:
        pytest.skip("no number in this file could be NaN")
    key = floats[0] if damage == "nan" else sorted(state)[0]
    if damage == "shape":
        state[key] = torch.cat([state[key].reshape(-1), state[key].reshape(-1), state[key].reshape(-1)[:1]])
    elif damage == "missing":
        del state[key]
    elif damage == "extra":
        state[key.replace(".unfused_", ".elsewhere.unfused_", 1)] = state[key].clone()
    else:
        state[key] = state[key].clone().fill_(float("nan"))
    save_file(state, file)
    fresh = tiny.make_model(kind)
    before = weights(fresh)
    trainable = [p.requires_grad for p in fresh.parameters()]
    with pytest.raises(ValueError, match="adapter file"):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert [p.requires_grad for p in fresh.parameters()] == trainable
    if not CASES[name].get("errors", {}).get("several") and "saved_as" not in CASES[name]:
        with pytest.raises(ValueError, match="adapter file"):
            model.load_adapter(tmp_path, "bad")
        assert list(model.peft_config) == ["default"]
        with torch.no_grad():
            assert same(tiny.output(model, batch), expected)


@pytest.mark.parametrize(("name", "kind"), FIRST)
def test_unknown_field_is_named(name, kind, tmp_path):
    base, _ = model_and_batch(kind)
    adapt(name, kind, base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(tiny.make_model(kind), tmp_path)
    assert any("from_the_future" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("name", "kind"), [p for p in PAIRS if p.values[1] in ("bert", "gpt2", "llama", "vit")]
)
def test_gradient_checkpointing(name, kind):
    grads = []
    for checkpointing in (False, True):
        base, batch = model_and_batch(kind)
        model = shake(adapt(name, kind, base))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with refusal(name, "gradient_checkpointing") if checkpointing else contextlib.nullcontext():
            loss = tiny.loss_of(model, batch)
            if CASES[name].get("regularized", True):
                loss = loss + model.base_model.regularization_loss()
            loss.backward()
            grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    if len(grads) == 2:
        assert grads[0].keys() == grads[1].keys()
        assert all(same(grads[1][key], value) for key, value in grads[0].items())


@pytest.mark.parametrize(("name", "kind"), FIRST)
def test_trainer(name, kind, tmp_path):
    if kind in ("unet", "clip"):
        pytest.skip("the tiny model has no loss of its own")
    from transformers import TrainingArguments

    base, _ = model_and_batch(kind)
    model = adapt(name, kind, base)
    batch = tiny.make_batch(kind, items=16)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    before = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    RegularizedTrainer(model, args, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[k], v) for k, v in before.items())
    assert list(tmp_path.glob("checkpoint-*/adapter_model.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_refuses_what_it_cannot_do(name):
    for kind, message in CASES[name].get("refuses", {}).items():
        base, _ = model_and_batch(kind)
        before = weights(base)
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config_of(name, kind))
        assert base.state_dict().keys() == before.keys(), f"{kind}: refused after it changed the model"


def test_everything_reloads_in_a_process_that_knows_only_unfused_and_peft(tmp_path):
    for name, case in CASES.items():
        kind = next((k for k in case["kinds"] if k in tiny.TRANSFORMERS), None)
        if kind is None:
            continue
        base, batch = model_and_batch(kind)
        base.save_pretrained(tmp_path / name / "base")
        model = shake(adapt(name, kind, base))
        model.save_pretrained(tmp_path / name / "adapter")
        with torch.no_grad():
            save_file(
                {"expected": tiny.output(model, batch).contiguous()}, tmp_path / name / "expected.safetensors"
            )
        (tmp_path / name / "kind.txt").write_text(kind)
    script = f"""
        import importlib.util, sys
        from pathlib import Path
        import unfused
        import peft
        import torch, transformers
        from safetensors.torch import load_file
        spec = importlib.util.spec_from_file_location("tiny", {str(HERE / "tiny.py")!r})
        tiny = importlib.util.module_from_spec(spec); spec.loader.exec_module(tiny)
        for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
            kind = (folder / "kind.txt").read_text()
            base = type(tiny.make_model(kind)).from_pretrained(folder / "base").eval()
            model = peft.PeftModel.from_pretrained(base, folder / "adapter")
            with torch.no_grad():
                found = tiny.output(model, tiny.make_batch(kind))
            error = (found - load_file(folder / "expected.safetensors")["expected"]).abs().max().item()
            print("RESULT", folder.name, error)
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    errors = dict(re.findall(r"RESULT (\S+) (\S+)", run.stdout))
    assert errors and all(float(error) < 1e-4 for error in errors.values()), errors


def test_two_processes_train_the_same_adapter(tmp_path):
    """Every tuner under DDP (gloo): both processes end with the same weights."""
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, os, sys
            from pathlib import Path
            import torch, torch.distributed as dist
            from torch.nn.parallel import DistributedDataParallel
            sys.path.insert(0, {str(HERE.parents[1] / "src")!r})
            spec = importlib.util.spec_from_file_location("conformance", {str(HERE / "test_conformance.py")!r})
            suite = importlib.util.module_from_spec(spec); spec.loader.exec_module(suite)
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
            rank = dist.get_rank()
            for name, case in suite.CASES.items():
                if case.get("errors", {{}}).get("ddp"):
                    continue
                kind = next((k for k in case["kinds"] if k not in ("plain", "clip", "unet")), None)
                if kind is None:
                    continue
                model = suite.adapt(name, kind, suite.tiny.make_model(kind))
                wrapped = DistributedDataParallel(model, find_unused_parameters=True)
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
                model.train()
                model.base_model.begin_training(2)
                for step in range(2):
                    loss = suite.tiny.loss_of(wrapped, suite.tiny.make_batch(kind, 2 * step + rank))
                    optimizer.zero_grad(); (loss + 0 * model.base_model.regularization_loss()).backward(); optimizer.step()
                    for parameter in model.base_model.update_and_allocate(step + 1):
                        optimizer.state.pop(parameter, None)
                mine = torch.cat([p.detach().reshape(-1).float() for p in model.parameters() if p.requires_grad])
                theirs = [torch.zeros_like(mine) for _ in range(2)]
                dist.all_gather(theirs, mine)
                if rank == 0:
                    print("RESULT", name, (theirs[0] - theirs[1]).abs().max().item(), flush=True)
            """
        )
    )
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    differences = dict(re.findall(r"RESULT (\S+) (\S+)", run.stdout))
    assert differences and all(float(d) == 0 for d in differences.values()), differences
