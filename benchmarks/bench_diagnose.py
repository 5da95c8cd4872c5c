"""Intruder detection beside full SVDs of all matrices, and separability of 50,000 points in less than their distances.

Run `python benchmarks/bench_diagnose.py [--threads N] [--layers 1] [--width 2048] [--points 50000]`. The matrices are those of
a Llama of 1 B (width 2048, 4 times that in the MLP, keys and values of a quarter), with a falling spectrum; one
tuned model is the base plus a little of everything, the other one plus LoRA of rank 8. All layers of a model cost the same, so
the ratio of one layer is that of the model; `--layers 16` is the whole. Both ways get the same float32 matrices, in turns, and
must agree on every intruder. The separability runs in a process of its own, whose peak of memory above that of
its inputs is compared with an n x n matrix of float32 distances.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from unfused.diagnose._spectrum import align_exactly
from unfused.diagnose.intruder_dimensions import intruder_dimensions

K, EPS = 10, 0.5
AIM = 3.0
CHILD = """
import resource, sys, time, torch
import numpy as np
n, threads = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
from unfused.diagnose.class_separability import class_separability
rng = np.random.default_rng(0)
Z = (0.3 * rng.standard_normal((n, 128)) + rng.standard_normal((200, 128))[rng.integers(200, size=n)]).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
found = class_separability(Z, max_samples=None)
seconds = time.perf_counter() - start
print(found.score, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def shapes(width: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (4 * width, width),
        "mlp.up_proj": (4 * width, width),
        "mlp.down_proj": (width, 4 * width),
    }


def weights(
    shape: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A base matrix whose singular values fall about as 1 / sqrt(i), and two tuned ones."""
    out, into = shape
    q = min(shape)
    left, right = torch.randn(out, q, generator=generator), torch.randn(q, into, generator=generator)
    base = left * torch.arange(1, q + 1) ** -0.5 @ right / (out * into) ** 0.5
    little = 1e-3 * torch.randn(shape, generator=generator) / max(shape) ** 0.5
    b, a = torch.randn(out, 8, generator=generator), torch.randn(8, into, generator=generator)
    size = torch.linspace(0.9, 0.35, 8)  # some of them among the ten leading directions
    return base, {"full": base + little, "LoRA": base + b * size @ a / (out * into) ** 0.5}


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def detection(layers: int, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    ours, peer = np.zeros(2), np.zeros(2)  # wall and processor seconds
    counts: dict[str, list[int]] = {"full": [], "LoRA": []}
    agree = True
    for layer in range(layers):
        for kind, shape in shapes(width).items():
            name = f"model.layers.{layer}.{kind}.weight"
            base, tuned = weights(shape, generator)
            for which, matrix in tuned.items():
                start = clocks()
                row = intruder_dimensions({name: base}, {name: matrix}, K, EPS, method="fast").per_matrix[0]
                ours += clocks() - start
                start = clocks()
                u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
                exact = align_exactly(base, u[:, :K], s[:K]).similarity  # decomposes the base as well
                peer += clocks() - start
                border = {j for j, value in enumerate(exact.tolist()) if abs(value - EPS) < 0.01}
                agree &= set(row.indices) ^ {j for j, v in enumerate(exact.tolist()) if v < EPS} <= border
                counts[which].append(row.n)
    found = ", ".join(f"{which} {sum(n)} intruders" for which, n in counts.items())
    same = "the same verdicts" if agree else "OTHER VERDICTS"
    print(
        f"intruders, {layers} layer(s) of width {width}, both models: ours {ours[0]:.1f} s ({ours[1]:.1f} of processor), full "
        f"SVDs {peer[0]:.1f} s ({peer[1]:.1f}): {peer[0] / ours[0]:.1f} times as fast, {peer[1] / ours[1]:.1f} processor time "
        f"(aim {AIM:g}), {same}; {found}"
    )
    return agree


def separability(points: int, threads: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(points), str(threads)], capture_output=True, text=True, check=True
    )
    score, seconds, kib = (float(word) for word in run.stdout.split())
    if sys.platform == "darwin":
        kib /= 1024
    full = points**2 * 4 / 2**20
    print(
        f"separability of {points:,} x 128 points: {score:.3f} in {seconds:.0f} s, {kib / 1024:,.0f} MiB above the inputs; "
        f"their distances are {full:,.0f} MiB: {full / max(kib / 1024, 1):.0f} times as much"
    )


def small(points: int = 4000) -> None:
    """Both ways of the tree at a size at which scipy has room."""
    from unfused.nn.spanning_tree import tree_edges

    Z = np.random.default_rng(0).standard_normal((points, 128))
    start = time.perf_counter()
    dense = tree_edges(Z)
    middle = time.perf_counter()
    sparse = tree_edges(Z, dense=2)
    end = time.perf_counter()
    print(
        f"tree of {points:,} points: scipy {middle - start:.1f} s, without the distances {end - middle:.1f} s, "
        f"largest difference {np.abs(dense - sparse).max():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--points", type=int, default=50_000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    agree = detection(given.layers, given.width)
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    small()
    separability(given.points, given.threads)
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
