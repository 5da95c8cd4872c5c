"""Merging sharded checkpoints: seconds and peak resident memory beside mergekit's, and beside the floor of reading and writing.

Run `python benchmarks/bench_merge.py [--gb 0.05] [--models 8] [--threads 2] [--rounds 2] [--mergekit PYTHON] [--folder DIR]`;
the issue's size is `--gb 2`. The checkpoints are Llama-shaped, bf16, in shards of a quarter of a model, every model the base
plus noise. mergekit is not a dependency: install it into a virtual environment of its own (`python -m venv M && M/bin/pip
install mergekit`) and name its interpreter, or set MERGEKIT_PYTHON; without it its columns are left out. Both read the same
YAML and run as fresh processes in turns with the same threads on the same disk; ours with `unfused merge --config`, mergekit
with `mergekit-yaml --lazy-unpickle` (its inputs are safetensors, which it reads lazily anyway). Ratios are of the best rounds.
Memory is the process's peak resident set, imports included; of mergekit it contains the pages of files that it maps. The floor
reads all input bytes in blocks and writes as many as a model has, with fsync, from the same state of the page cache.

Where results differ: mergekit computes in bf16 unless `--compute float32` has it do as we do, in float32, and round once; among
equal entries it keeps others than we do (bf16 weights have many), and tensors of fewer entries than 1/gamma lose their change.

Aims: at least twice as fast, at most half the memory, equal within the rounding of bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from unfused.data.checkpoint_io import ShardWriter, open_checkpoint

BLOCK = 1 << 22
METHODS = {
    "linear": {"weight": 0.125},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
    "breadcrumbs": {"weight": 0.3, "density": 0.15, "gamma": 0.01},
}


def shapes(nbytes: int) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Tensors of a Llama of about `nbytes` in bf16, and its config."""
    hidden = 256 if nbytes < 1 << 28 else 2048
    inner, vocab, heads = hidden * 11 // 4, 16 * hidden, 8
    layer = {
        **{f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"},
        **{f"self_attn.{n}_proj.weight": (hidden // 2, hidden) for n in "kv"},
        **{f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    per_layer = sum(torch.Size(s).numel() for s in layer.values())
    layers = max(1, round((nbytes / 2 - 2 * vocab * hidden) / per_layer))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    found |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    return found, config


def make(folder: Path, nbytes: int, seed: int) -> None:
    """The base (seed 0) or the base plus noise; the base's values are drawn again rather than read."""
    layout, config = shapes(nbytes)
    if (folder / "config.json").is_file():
        return
    writer = ShardWriter(folder, {n: (torch.bfloat16, s) for n, s in layout.items()}, max(1, nbytes // 4))
    for shard in writer.pending():
        with writer.open(shard) as stream:
            for name in shard.tensors:
                place = list(layout).index(name)
                base = torch.randn(layout[name], generator=torch.Generator().manual_seed(place)) * 0.02
                if seed:
                    noise = torch.Generator().manual_seed(1000 * seed + place)
                    base += torch.randn(layout[name], generator=noise) * 0.002
                stream.write(base.bfloat16())
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config))


def recipe(method: str, folder: Path, count: int, compute: str) -> Path:
    lines = [f"merge_method: {method}", f"dtype: {compute}", "out_dtype: bfloat16"]
    if method != "linear":
        lines.append(f"base_model: {folder / 'base'}")
    lines.append("models:")
    for i in range(count):
        lines += [f"  - model: {folder / f'model-{i}'}", f"    parameters: {json.dumps(METHODS[method])}"]
    path = folder / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(command: list[str], out: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak resident MB of a process."""
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss / 1e3


def floor(inputs: list[Path], out: Path) -> float:
    """Seconds to read all inputs and write one model."""
    start = time.perf_counter()
    for folder in inputs:
        for file in folder.glob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(BLOCK):
                    pass
    left = sum(file.stat().st_size for file in inputs[0].glob("*.safetensors"))
    with open(out, "wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(bytes(min(BLOCK, left)))
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def difference(one: Path, two: Path, base: Path) -> tuple[float, float]:
    """Largest difference in steps of bf16 at the size of value or base, and the share that differs by more than one."""
    worst, off, total = 0.0, 0, 0
    with open_checkpoint(one) as a, open_checkpoint(two) as b, open_checkpoint(base) as c:
        for name in a:
            x, y = a[name].float(), b[name].float()
            step = (
                torch.maximum(torch.maximum(x.abs(), y.abs()), c[name].float().abs())
                .clamp_min(2.0**-20)
                .log2()
                .floor()
                .exp2()
                * 2.0**-7
            )
            steps = (x - y).abs() / step
            worst = max(worst, float(steps.max()))
            off += int((steps > 1.01).sum())
            total += x.numel()
    return worst, off / total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=0.05, help="of one checkpoint")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=METHODS, help="methods")
    parser.add_argument(
        "--compute",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="mergekit's `dtype`, in which it computes",
    )
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT_PYTHON"), help="its interpreter")
    parser.add_argument("--folder", help="where the checkpoints are made, and stay; else a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as temporary:
        run(options, Path(options.folder or temporary))


def run(options: argparse.Namespace, folder: Path) -> None:
    nbytes = int(options.gb * 1e9)
    inputs = [folder / "base", *(folder / f"model-{i}" for i in range(options.models))]
    for seed, path in enumerate(inputs):
        path.mkdir(parents=True, exist_ok=True)
        make(path, nbytes, seed)
    size = sum(file.stat().st_size for file in inputs[0].glob("*.safetensors")) / 1e9
    print(
        f"{options.models} models of {size:.2f} GB, bf16, {options.threads} threads, best of {options.rounds}"
    )
    kit = options.mergekit
    if not kit:
        print("mergekit: not named (--mergekit PYTHON or MERGEKIT_PYTHON); its columns are left out")
    floors = {"linear": inputs[1:], "others": inputs}
    fastest = {
        name: min(floor(paths, folder / "floor") for _ in range(options.rounds))
        for name, paths in floors.items()
    }
    header = f"{'method':16} {'floor s':>8} {'ours s':>8} {'ours MB':>8}"
    print(
        header
        + (f" {'kit s':>8} {'kit MB':>8} {'faster':>7} {'memory':>7} {'steps':>6} {'off':>7}" if kit else "")
    )
    for method in options.only or METHODS:
        path = recipe(method, folder, options.models, options.compute)
        ours, theirs = folder / "out-ours", folder / "out-kit"
        command = [
            sys.executable,
            "-m",
            "unfused.cli.main",
            "merge",
            "--config",
            str(path),
            "--out",
            str(ours),
            "-q",
        ]
        command += ["--threads", str(options.threads), "--shard-size", str(max(1, nbytes // 4))]
        other = [str(Path(kit).parent / "mergekit-yaml"), str(path), str(theirs)] if kit else []
        other += ["--lazy-unpickle", "--no-copy-tokenizer", "--out-shard-size", str(max(1, nbytes // 4))]
        mine, kits = [], []
        for _ in range(options.rounds):
            mine.append(timed(command, ours, options.threads))
            if kit:
                kits.append(timed(other, theirs, options.threads))
        seconds, memory = min(s for s, _ in mine), max(m for _, m in mine)
        line = f"{method:16} {fastest.get(method, fastest['others']):8.2f} {seconds:8.2f} {memory:8.0f}"
        if kit:
            their_seconds, their_memory = min(s for s, _ in kits), max(m for _, m in kits)
            worst, off = difference(ours, theirs, inputs[0])
            line += f" {their_seconds:8.2f} {their_memory:8.0f} {their_seconds / seconds:6.1f}x"
            line += f" {memory / their_memory:6.0%} {worst:6.1f} {off:7.1e}"
        print(line, flush=True)
        shutil.rmtree(ours)
        shutil.rmtree(theirs, ignore_errors=True)


if __name__ == "__main__":
    main()
