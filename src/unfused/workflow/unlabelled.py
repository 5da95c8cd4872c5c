"""Stages 2 to 4 of a run: what is learned from the pool without a single label, shared by all draws."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unfused.data.files import read_json
from unfused.workflow.arms import Bench, PoolDataset, predict_clips
from unfused.workflow.modality import Corpus, Inputs, Modality
from unfused.workflow.settings import TEACHERS

CLUSTER_ARRAYS = ("ids", "centroids", "features", "distances")


def mask_digest(mask: np.ndarray) -> str:
    return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=8).hexdigest()


# --- windows ---------------------------------------------------------------------------------------------


def write_windows(modality: Modality, corpus: Corpus, pool: np.ndarray, folder: Path) -> dict[str, Any]:
    """Cut and normalise; the model's inputs lie in one memory-mapped file."""
    inputs = modality.inputs(corpus, pool, folder)
    np.save(folder / "clip.npy", inputs.clip)
    return {"windows": len(inputs.clip), "normaliser": inputs.normaliser}


def open_windows(modality: Modality, pool: np.ndarray, folder: Path) -> Inputs:
    modality.attach(folder, pool)
    values = np.load(folder / "inputs.npy", mmap_mode="c")  # copy-on-write: torch wants a writable array
    return Inputs(values, np.load(folder / "clip.npy"), read_json(folder / "done.json")["normaliser"])


# --- 2 pretrain ------------------------------------------------------------------------------------------


def pretrain(bench: Bench, teacher: str, folder: Path) -> dict[str, Any]:
    """Train the teacher on the pool (or check a given one) and keep its clip features."""
    from unfused.nn.encoders import embed_all
    from unfused.train.checkpoint import save_module

    if teacher not in TEACHERS:
        assert bench.foreign is not None
        features, parameters = bench.foreign.features()
        np.save(folder / "features.npy", features)
        return {"parameters": parameters, "dim": features.shape[1]}
    torch.manual_seed(bench.seed)
    encoder = bench.modality.encoder()
    info: dict[str, Any] = {"parameters": sum(p.numel() for p in encoder.parameters())}
    if teacher != "random":
        result = _train_teacher(bench, teacher, encoder, folder / "train")
        info |= {"peak_mib": result.peak_mib, "history": result.history}
    features = bench.inputs.pool(embed_all(encoder, bench.inputs.values), len(bench.corpus))
    np.save(folder / "features.npy", features)
    save_module(folder / "encoder.safetensors", encoder)
    return info | {"dim": features.shape[1]}


def _train_teacher(bench: Bench, teacher: str, encoder: Any, folder: Path) -> Any:
    rows = bench.inputs.of(bench.pool)
    augment, size = bench.augment(), min(128, len(rows))
    recipe: dict[str, Any] = {"steps": bench.steps["pretrain"], "seed": bench.seed, "batch_size": size}
    columns: dict[str, Any] = {}
    objective: torch.nn.Module
    if teacher == "contrastive":
        from unfused.pretrain.contrastive import Contrastive

        objective = Contrastive(encoder, augment)
    elif teacher == "delores-s":
        from unfused.pretrain.delores_s import DeLoResS

        objective = DeLoResS(encoder, augment)
    elif teacher == "delores-m":
        from unfused.pretrain.delores_m import DeLoResM

        objective = DeLoResM(encoder, augment, queue_size=_queue_size(len(rows), size))
    elif teacher == "slicer":
        from unfused.pretrain.slicer import SLICER

        objective = SLICER(encoder, augment, queue_size=_queue_size(len(rows), size))
    else:
        from unfused.pretrain.decar import DECAR, Reassign

        objective = DECAR(encoder, len(rows), min(512, max(2, len(rows) // 7)), augment, bench.seed)
        columns["index"] = np.arange(len(rows))
        recipe |= {"callbacks": [Reassign(objective)], "sampler": objective.draw, "batch_size": min(64, size)}
        recipe |= {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-5, "schedule": "constant"}
    data = PoolDataset(bench.inputs.values, rows, **columns)
    return bench.fit(objective, data, output_dir=folder, **recipe)


def _queue_size(items: int, batch: int) -> int:
    """At most half of the pool, in whole batches: the queue must not hold the query's own earlier view as a negative."""
    return max(1, min(65536, items // 2) // batch) * batch


def attach_teacher(bench: Bench, teacher: str, folder: Path) -> None:
    bench.features = np.load(folder / "features.npy")
    if teacher in TEACHERS:

        def load() -> Any:
            from unfused.train.checkpoint import load_module

            encoder = bench.modality.encoder()
            load_module(folder / "encoder.safetensors", encoder)
            return encoder

        bench.teacher = load


# --- 3 cluster -------------------------------------------------------------------------------------------


def cluster(bench: Bench, clusters: str, folder: Path) -> dict[str, Any]:
    """PCA-whitening and k-means of the pool's features, per group where groups are named."""
    from unfused.pretrain.unfused import cluster_features

    pool = np.flatnonzero(bench.pool)
    groups = None if bench.groups is None else bench.groups[pool]
    info: dict[str, Any] = {}
    if clusters == "auto":
        count, table = _agreed_number(bench, pool, groups)
        info["agreement"] = table
    else:
        count = int(clusters)
        if count >= len(pool):
            raise ValueError(
                f"clusters={count}: the pool has {len(pool)} clips; give a smaller number or 'auto'"
            )
    found = cluster_features(bench.features[pool], count, groups=groups, seed=bench.seed)
    for name in CLUSTER_ARRAYS:
        np.save(folder / f"{name}.npy", getattr(found, name))
    return info | {"clusters": int(count), "sizes": found.sizes.tolist()}


def _agreed_number(
    bench: Bench, pool: np.ndarray, groups: np.ndarray | None
) -> tuple[int, list[dict[str, float]]]:
    """The number of clusters on which two varied copies of the pool agree best."""
    from unfused.nn.encoders import embed_all
    from unfused.pretrain.unfused import choose_num_clusters

    rows = bench.inputs.of(bench.pool)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, 4000).astype(int))]
    clips, index = np.unique(bench.inputs.clip[rows], return_inverse=True)
    candidates = [k for k in (16, 24, 32, 48, 64) if 2 * k <= len(clips) // 5]
    if not candidates:  # a small pool: clusters of about five
        return max(2, len(pool) // 5), []
    if (
        bench.teacher is None
    ):  # a foreign encoder has no inputs of ours to vary: its features are split in two halves
        half = np.random.default_rng(bench.seed).permutation(bench.features.shape[1])
        copies = [bench.features[clips][:, part] for part in np.array_split(half, 2)]
    else:
        encoder, augment = bench.teacher(), bench.augment()
        copies = []
        for copy in range(2):
            torch.manual_seed(bench.seed + copy)
            blocks = []
            for start in range(0, len(rows), 256):
                with torch.inference_mode():
                    varied = augment(torch.from_numpy(bench.inputs.values[rows[start : start + 256]]))
                blocks.append(embed_all(encoder, varied))
            embedded = np.concatenate(blocks)
            sums = np.zeros((len(clips), embedded.shape[1]), np.float32)
            np.add.at(sums, index, embedded)
            copies.append(sums / np.bincount(index)[:, None])
    named = None if bench.groups is None else bench.groups[clips]
    first, second = copies
    count, table = choose_num_clusters(first, second, candidates, groups=named, seed=bench.seed)
    return count, table


def open_clusters(folder: Path) -> Any:
    from unfused.pretrain.unfused import Clusters

    return Clusters(**{name: np.load(folder / f"{name}.npy") for name in CLUSTER_ARRAYS})


# --- 4 distil (the paper's, from cluster ids alone) ------------------------------------------------------


def distil(bench: Bench, folder: Path) -> dict[str, Any]:
    """A freshly initialised student learns the cluster ids, its deepest classifier teaching the shallow ones."""
    from unfused.pretrain.unfused import UnFuSeD
    from unfused.train.checkpoint import save_module

    clusters = bench.cache["clusters"]
    torch.manual_seed(bench.seed + 1)
    count = len(clusters.centroids)
    objective = UnFuSeD(bench.modality.encoder(), count, augment=bench.augment())
    rows = bench.inputs.of(bench.pool)
    position = np.cumsum(bench.pool) - 1  # clip -> row among the pool's clips
    ids = clusters.labels()[position[bench.inputs.clip[rows]]]
    data = PoolDataset(bench.inputs.values, rows, labels=torch.from_numpy(ids))
    result = bench.fit(
        objective, data, output_dir=folder / "train", steps=bench.steps["distil"], seed=bench.seed
    )
    save_module(folder / "encoder.safetensors", objective.encoder)
    probabilities = predict_clips(bench, objective.encoder, objective.classifier)
    np.save(folder / "probabilities.npy", probabilities)
    return {
        "parameters": sum(p.numel() for p in objective.parameters()),
        "peak_mib": result.peak_mib,
        "history": result.history,
    }


def attach_student(bench: Bench, folder: Path) -> None:
    def load() -> Any:
        from unfused.train.checkpoint import load_module

        encoder = bench.modality.encoder()
        load_module(folder / "encoder.safetensors", encoder)
        return encoder

    bench.literal_student = load
    bench.cache["student_probabilities"] = np.load(folder / "probabilities.npy")
