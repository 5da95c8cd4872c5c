"""DDFA's factorise and adjust steps, and PBN's training step, beside what one would write by hand.

Run `python benchmarks/bench_ddfa_pbn.py [--points N] [--rounds N] [--threads N]`. Rounds alternate between the two, so that
what else the machine does hits both; ratios are of the medians of processor time.

- adjust: q(y|x) on the simplex for all points at once, against scipy's nnls a point at a time. Both results are compared.
- factorise: cells counted by one bincount and scikit-learn's coordinate descent, against a loop over points and the textbook's
  multiplicative updates, each start until it is within 1 % of the former's residual, or for 2,000 steps.
- PBN: even slices of one permutation an epoch and one pass of the encoder, against a DataLoader and a pass for each loss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from threadpoolctl import threadpool_limits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from unfused.label.latent_label_shift import _factorise, _shares, simplex_least_squares
from unfused.label.tabular_ncd import PBN

DOMAINS, CLASSES, CELLS, RESTARTS = 20, 10, 30, 10
COLUMNS, KNOWN = 64, 5


def mixtures(points: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f(x) (points, r) near mixtures D q, D = q(d|y) (r, k), and cells and domains of the points."""
    rng = np.random.default_rng(seed)
    D = rng.dirichlet(np.full(DOMAINS, 0.3), CLASSES).T
    q = rng.dirichlet(np.full(CLASSES, 0.1), points)
    f = (q @ D.T + 0.02 * rng.random((points, DOMAINS))).clip(0)
    f /= f.sum(1, keepdims=True)
    domains = (f.cumsum(1) < rng.random((points, 1))).sum(1).clip(max=DOMAINS - 1)
    return f, D, (q.argmax(1) * 3 + rng.integers(3, size=points)), domains


def adjust_by_point(f: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The same problem, row by row: min |D q - f 1'q|^2 + (1'q - 1)^2 over q >= 0, scaled to sum 1."""
    ones, target = np.ones((1, D.shape[1])), np.r_[np.zeros(len(D)), 1]
    found = np.array([nnls(np.vstack([D - row[:, None], ones]), target)[0] for row in f])
    return found / found.sum(1, keepdims=True)


def factorise_by_hand(cells: np.ndarray, domains: np.ndarray, enough: float) -> float:
    A = np.zeros((CELLS, DOMAINS))
    for c, d in zip(cells, domains, strict=True):
        A[c, d] += 1
    A /= A.sum(0)
    errors = []
    for restart in range(RESTARTS):
        rng = np.random.default_rng(restart)
        C, Q = rng.random((CELLS, CLASSES)), rng.random((CLASSES, DOMAINS))
        for step in range(1, 2001):
            Q *= (C.T @ A) / (C.T @ C @ Q + 1e-12)
            C *= (A @ Q.T) / (C @ Q @ Q.T + 1e-12)
            if step % 10 == 0 and np.linalg.norm(A - C @ Q) <= enough:
                break
        errors.append(float(np.linalg.norm(A - C @ Q)))
    return min(errors)


def train_by_hand(x: torch.Tensor, codes: torch.Tensor, epochs: int, model: PBN) -> None:
    net = model._network(COLUMNS, KNOWN).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=model.lr, weight_decay=model.weight_decay)
    loader = DataLoader(TensorDataset(x, codes), batch_size=model.batch_size, shuffle=True, drop_last=True)
    for _ in range(epochs):
        for batch, labels in loader:
            known = labels >= 0
            logits = net["classifier"](F.normalize(net["encoder"](batch[known])))
            loss = model.w * F.cross_entropy(logits, labels[known])
            rebuilt = net["decoder"](F.normalize(net["encoder"](batch)))
            loss = loss + (1 - model.w) * ((batch - rebuilt) ** 2).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()


def compare(rounds: int, **runs: Callable[[], Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Median processor seconds and the last result of each, after a round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=5_000, help="of PBN's table")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    f, D, cells, domains = mixtures(options.points)
    few = max(1, options.points // 25)  # by the point it is linear: a part is timed and scaled
    with threadpool_limits(options.threads):
        seconds, found = compare(
            options.rounds,
            ours=lambda: simplex_least_squares(f, D),
            by_hand=lambda: adjust_by_point(f[:few], D),
        )
        by_hand = seconds["by_hand"] * options.points / few
        gap = np.abs(found["ours"][:few] - found["by_hand"]).max()
        print(
            f"DDFA adjust, {options.points:,} points, {DOMAINS} domains, {CLASSES} classes: {seconds['ours']:.2f} s to "
            f"{by_hand:.2f} s, {by_hand / seconds['ours']:.1f}x, results differ by {gap:.1e} at most",
            flush=True,
        )

        def ours() -> float:
            return _factorise(
                _shares(cells, domains, CELLS, DOMAINS), CLASSES, RESTARTS, np.random.RandomState(0)
            )[2]

        enough = 1.01 * ours()
        seconds, found = compare(
            options.rounds, ours=ours, by_hand=lambda: factorise_by_hand(cells, domains, enough)
        )
        print(
            f"DDFA factorise, {CELLS} cells, {RESTARTS} starts: {seconds['ours']:.2f} s to {seconds['by_hand']:.2f} s, "
            f"{seconds['by_hand'] / seconds['ours']:.1f}x, residuals {found['ours']:.4f} and {found['by_hand']:.4f}",
            flush=True,
        )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.rows, COLUMNS)).astype(np.float32)
    codes = np.where(rng.random(options.rows) < 0.5, rng.integers(KNOWN, size=options.rows), -1)
    model = PBN(5, epochs=options.epochs, random_state=0)
    model.known_classes_ = np.arange(KNOWN)
    tensors = torch.from_numpy(x), torch.from_numpy(codes)
    seconds, _ = compare(
        options.rounds,
        ours=lambda: model._train(x, codes, 0),
        by_hand=lambda: train_by_hand(*tensors, options.epochs, model),
    )
    steps = {"ours": -(-options.rows // model.batch_size), "by_hand": options.rows // model.batch_size}
    each = {name: 1000 * seconds[name] / steps[name] / options.epochs for name in seconds}
    print(
        f"PBN training step, batches of {model.batch_size} x {COLUMNS}: {each['ours']:.2f} ms to {each['by_hand']:.2f} ms, "
        f"{each['by_hand'] / each['ours']:.1f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
