"""Intruder dimensions: finds leading directions of tuned weights that resemble none of the pretrained ones.

With `W0 = U0 S0 V0'` before tuning and `W = U S V'` after it, the left vector u_j (j <= k) is an intruder where

    s_j = max_i |u_j' u0_i| < eps        over ALL i, in the output space of the layer

and is scaled by `W' = W + (lam - 1) u_j (u_j' W)`; lam = 0 removes it, 1 changes nothing. Full fine-tuning bends the old
directions, LoRA of low rank adds new ones. One eps misleads: the curve of the count over eps is in the report. So does the
count without the size of the update, which shrinks too where intruders are scaled: compare with the control
`control="uniform"`, which shrinks all of `W - W0` to the same norm. And near-equal singular values mix freely: `rotation` is
each vector's energy in the span of base vectors whose singular value is within 10 % of its own.

`method="fast"` needs neither decomposition: a block Krylov space gives the k vectors, Lanczos bounds their agreement with all
base vectors at once (`_spectrum`); a similarity below eps may then be an upper bound, the verdict is the same.

Reference: LoRA vs Full Fine-tuning: An Illusion of Equivalence, NeurIPS 2025, arXiv:2410.21228.
Needs: checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unfused.data.checkpoint_io import ShardWriter
from unfused.data.files import atomic_write, printable
from unfused.diagnose._pairs import Pair, Weights, pairs
from unfused.diagnose._report import Report, axes
from unfused.diagnose._spectrum import align, align_exactly, top_singular

__all__ = ["IntruderReport", "MatrixIntruders", "intruder_dimensions", "scale_intruders"]

COMMAND = {
    "function": "diagnose_files",
    "arguments": {
        "base": {"type": "str", "help": "The pretrained model: folder, safetensors file or hub id."},
        "tuned": {"type": "strs", "help": "A tuned model or a LoRA adapter of it; may be repeated."},
        "k": {"type": "int", "default": 10, "help": "How many leading vectors of each matrix."},
        "eps": {"type": "float", "default": 0.5, "help": "Below this |cosine| a vector is an intruder."},
        "include": {"type": "strs", "default": [], "help": "Pattern of tensor names; by default all but embeddings, heads."},
        "method": {"type": "str", "default": "auto", "help": "auto, fast (same verdicts) or exact (full decompositions)."},
    },
}  # fmt: skip
EXACT_BELOW = 512  # there the full decomposition takes milliseconds
ADAPTER = "intruder_reduced"


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixIntruders:
    """What was found in one matrix.

    Attributes
    ----------
    name : str
    shape : (int, int)
        Out, in.
    n : int
        Number of intruders.
    indices : tuple of int
        Their ranks among the tuned singular values, from 0.
    similarities, singular_values, matches, rotation : tuple of float, k each
        Largest |cosine| with a base vector; the tuned singular value; the singular value of the base vector that is most
        alike (nan where the similarity is a bound); energy among base vectors of near-equal singular value.
    bounds : tuple of bool
        Where the similarity is an upper bound (`method="fast"`).
    energy : float
        The intruders' share of `|W|_F^2`.
    update_size : float
        `|W - W0|_F / |W0|_F`.
    effective_rank : float
        Of `W - W0`: `(sum s^2)^2 / sum s^4`.
    vectors : Tensor (out, k)
        The tuned left singular vectors; not in the JSON.
    """

    name: str
    shape: tuple[int, int]
    n: int
    indices: tuple[int, ...]
    similarities: tuple[float, ...]
    singular_values: tuple[float, ...]
    matches: tuple[float, ...]
    rotation: tuple[float, ...]
    bounds: tuple[bool, ...]
    energy: float
    update_size: float
    effective_rank: float
    vectors: torch.Tensor = dataclasses.field(repr=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True, eq=False)
class IntruderReport(Report):
    """The result of `intruder_dimensions`.

    Attributes
    ----------
    label : str
        Whose report it is, in the picture's legend.
    k, eps : int, float
    per_matrix : tuple of MatrixIntruders
    similarity_maps : dict of str to Tensor (q, q)
        `|U' U0|` of the matrices that were asked for; not in the JSON.
    """

    label: str
    k: int
    eps: float
    per_matrix: tuple[MatrixIntruders, ...]
    similarity_maps: Mapping[str, torch.Tensor] = dataclasses.field(
        repr=False, default_factory=dict, metadata={"json": False}
    )

    @property
    def total(self) -> int:
        """Intruders of all matrices."""
        return sum(row.n for row in self.per_matrix)

    @property
    def update_size(self) -> float:
        """Mean over matrices of `|W - W0|_F / |W0|_F`."""
        return sum(row.update_size for row in self.per_matrix) / len(self.per_matrix)

    def sweep(self, eps: Sequence[float] | None = None) -> tuple[list[float], list[int]]:
        """Number of intruders at each eps (by default 0, 0.01 .. 1)."""
        grid = [i / 100 for i in range(101)] if eps is None else [float(e) for e in eps]
        values = torch.tensor([s for row in self.per_matrix for s in row.similarities], dtype=torch.float64)
        return grid, [int((values < e).sum()) for e in grid]

    def headline(self) -> str:
        looked = sum(len(row.similarities) for row in self.per_matrix)
        where = sum(row.n > 0 for row in self.per_matrix)
        found = f"{self.total} of the {looked} leading directions are intruders (|cos| < {self.eps:g})"
        name = f"{self.label}: " if self.label else ""
        return f"{name}{found}, in {where} of {len(self.per_matrix)} matrices; updates of {self.update_size:.3g} of the weights"

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "matrix": row.name,
                "shape": f"{row.shape[0]} x {row.shape[1]}",
                "intruders": row.n,
                "ranks": ", ".join(str(i + 1) for i in row.indices),
                "lowest |cos|": min(row.similarities),
                "energy": row.energy,
                "their rotation": max((row.rotation[i] for i in row.indices), default=float("nan")),
                "update size": row.update_size,
                "effective rank": row.effective_rank,
            }
            for row in self.per_matrix
        ]

    def notes(self) -> list[str]:
        notes = [
            "The count depends on eps, on the learning rate and on the size of the update: compare models along the whole "
            "curve, and at equal score on the task. A vector with high rotation is a mixture of old ones, not a new direction."
        ]
        if bounded := sum(sum(row.bounds) for row in self.per_matrix):
            notes.append(
                f"{bounded} similarities below eps are upper bounds: left of eps the curve may be too low."
            )
        return notes

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        shown: dict[str, Callable[[Any], Any]] = {
            "Intruders over the threshold": self.plot,
            "Lowest |cos| of each rank's direction over all matrices, and the middle half of them": self._plot_ranks,
        }
        for name in self.similarity_maps:
            shown[f"|U'U0| of {name}: a diagonal means that the spectrum was kept"] = lambda ax, name=name: (  # type: ignore[misc]
                self.plot(ax, kind="similarity", matrix=name)
            )
        return shown

    def plot(self, ax: Any = None, kind: str = "count", matrix: str | None = None) -> Any:
        """The count over eps; or, of a matrix whose map was kept, `kind="similarity"`: `|U' U0|`.

        Reports of several models can be drawn on the same axes.
        """
        if kind == "count":
            ax = axes(ax)
            grid, counts = self.sweep()
            ax.plot(grid, counts, label=self.label or None)
            ax.axvline(self.eps, color="0.7", lw=0.8, zorder=0)
            ax.set(xlabel="threshold on the largest |cos| with a base vector", ylabel="intruders")
            if self.label:
                ax.legend(frameon=False)
            return ax
        if kind != "similarity":
            raise ValueError(f"kind={kind!r}: choose 'count' or 'similarity'")
        name = matrix or next(iter(self.similarity_maps), "")
        if name not in self.similarity_maps:
            raise ValueError(f"matrix={matrix!r}: name it in similarity_maps of intruder_dimensions")
        ax = axes(ax, 4.2, 4.0)
        ax.imshow(self.similarity_maps[name].numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xlabel="base vector", ylabel="tuned vector", title=name)
        return ax

    def _plot_ranks(self, ax: Any) -> Any:
        k = max(len(row.similarities) for row in self.per_matrix)
        ranks = [
            torch.tensor([r.similarities[j] for r in self.per_matrix if j < len(r.similarities)])
            for j in range(k)
        ]
        at = range(1, k + 1)
        low, high = ([float(v.quantile(q)) for v in ranks] for q in (0.25, 0.75))
        ax.fill_between(at, low, high, alpha=0.3, lw=0)
        ax.plot(at, [float(v.min()) for v in ranks], marker="o", ms=3)
        ax.axhline(self.eps, color="0.7", lw=0.8, zorder=0)
        ax.set(xlabel="rank of the tuned direction", ylabel="largest |cos|", ylim=(0, 1.02))
        return ax


@torch.no_grad()
def intruder_dimensions(
    base: Any,
    tuned: Any = None,
    k: int = 10,
    eps: float = 0.5,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    method: str = "auto",
    device: str | torch.device = "cpu",
    similarity_maps: Sequence[str] = (),
    label: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> IntruderReport:
    """Find the intruder dimensions of a tuned model; one matrix of each model is in memory at a time.

    Parameters
    ----------
    base, tuned : state dict, nn.Module, folder, safetensors file or hub id
        `tuned` can be the folder of a LoRA adapter. A PeftModel alone as `base` is compared with its adapter off and on.
    k : int, default=10
        How many leading directions; do not raise it for small matrices, whose bulk mixes.
    eps : float, default=0.5
        In (0, 1].
    include, exclude : sequence of str, optional
        Patterns of tensor names, `*` is anything. By default all matrices but embeddings, heads and poolers.
    method : {"auto", "exact", "fast"}
        "auto" is exact below 512 rows or columns.
    device : str or torch.device, default="cpu"
        Where the decompositions run.
    similarity_maps : sequence of str
        Patterns of the matrices whose whole `|U' U0|` is kept for the picture.
    label : str
        The model's name in pictures.
    progress : callable (name, matrices done, matrices), optional

    Raises
    ------
    ValueError
        For a tensor that is missing, of another shape or not finite, by name; for arguments out of range.

    Examples
    --------
    >>> torch.manual_seed(0)
    <torch...>
    >>> base = {"layer.weight": torch.diag(torch.arange(20.0, 0, -1))}
    >>> new = torch.nn.functional.normalize(torch.randn(20), dim=0)
    >>> tuned = {"layer.weight": base["layer.weight"] + 40 * torch.outer(new, new.flip(0))}
    >>> report = intruder_dimensions(base, tuned, k=3)
    >>> report.total, report.per_matrix[0].indices
    (1, (0,))
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: give a whole number of at least 1")
    if not 0 < eps <= 1:
        raise ValueError(f"eps={eps}: give a number in (0, 1]")
    if method not in ("auto", "exact", "fast"):
        raise ValueError(f"method={method!r}: choose 'auto', 'exact' or 'fast'")
    chosen, _, _ = pairs(base, tuned, include, exclude)
    maps: dict[str, torch.Tensor] = {}
    rows = []
    for done, pair in enumerate(chosen):
        if progress is not None:
            progress(pair.name, done, len(chosen))
        w0, w = (tensor.to(device) for tensor in pair.read())
        if any(fnmatch.fnmatchcase(pair.name, pattern) for pattern in similarity_maps):
            u0, u = (torch.linalg.svd(matrix, full_matrices=False).U for matrix in (w0, w))
            maps[pair.name] = (u.T @ u0).abs().cpu()
        rows.append(_examine(pair.name, w0, w, k, eps, method))
        del w0, w
    return IntruderReport(label, k, float(eps), tuple(rows), maps)


def _examine(
    name: str, w0: torch.Tensor, w: torch.Tensor, k: int, eps: float, method: str
) -> MatrixIntruders:
    k = min(k, *w.shape)
    if method == "exact" or (method == "auto" and min(w.shape) <= EXACT_BELOW):
        u, s, _ = torch.linalg.svd(w, full_matrices=False)
        vectors, singular = u[:, :k].clone(), s[:k]
        found = align_exactly(w0, vectors, singular)
    else:
        vectors, singular = top_singular(w, k)
        found = align(w0, vectors, singular, eps)
    # A matrix of zeros has no directions; what rounding leaves of one is none either.
    real = singular > singular[0] * max(w.shape) * torch.finfo(w.dtype).eps
    intruders = (found.similarity.cpu() < eps) & real.cpu()
    indices = tuple(intruders.nonzero().flatten().tolist())
    update = w - w0
    size, energy = float(update.norm()), float(w.norm()) ** 2
    gram = update.T @ update if w.shape[0] > w.shape[1] else update @ update.T
    fourth = float(gram.norm()) ** 2
    before = float(w0.norm())
    return MatrixIntruders(
        name=name,
        shape=(w.shape[0], w.shape[1]),
        n=len(indices),
        indices=indices,
        similarities=_floats(found.similarity),
        singular_values=_floats(singular),
        matches=_floats(found.match),
        rotation=_floats(found.rotation),
        bounds=tuple(found.bound.tolist()),
        energy=float(singular[list(indices)].double().square().sum()) / energy if energy else 0.0,
        update_size=size / before if before else (float("inf") if size else 0.0),
        effective_rank=size**4 / fourth if fourth else 0.0,
        vectors=vectors.cpu(),
    )


def _floats(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in tensor.tolist())


class _Scaled(Mapping[str, torch.Tensor]):
    """A tuned model's tensors with the report's matrices changed, each made when it is asked for."""

    def __init__(self, tuned: Weights, names: Sequence[str], change: Callable[[str], torch.Tensor]) -> None:
        self.tuned, self.names, self.change = tuned, frozenset(names), change

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.change(name) if name in self.names else self.tuned[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tuned)

    def __len__(self) -> int:
        return len(self.tuned)


@torch.no_grad()
def scale_intruders(
    base: Any,
    tuned: Any = None,
    report: IntruderReport | None = None,
    lam: float = 0.7,
    control: str | None = None,
    which: str = "all",
    rank: str = "grow",
    output: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Any:
    """Scale the intruders' components of the tuned weights by `lam`, or do a control of the same size.

    Parameters
    ----------
    base, tuned
        As for `intruder_dimensions`; what the report was made of.
    report : IntruderReport
    lam : float, default=0.7
        0 removes them, 1 changes nothing, above 1 amplifies.
    control : {None, "uniform", "others"}
        "uniform" shrinks each `W - W0` as a whole to the norm that scaling the intruders leaves it; "others" scales as many
        directions of the k that are no intruders.
    which : {"all", "top"}
        All intruders, or the first of each matrix.
    rank : {"grow", "keep"}
        Of a PeftModel's new adapter: r and one more for each intruder (exact), or cut back to r.
    output : path, optional
        Write the tuned checkpoint's tensors there, shard by shard, instead of giving them back; not for PeftModels.
    max_shard_bytes : int, default=5_000_000_000

    Returns
    -------
    dict of str to Tensor, the path `output`, or the PeftModel
        Tensors in the tuned model's types, unchanged ones shared with it. A PeftModel (given alone) gets and activates the
        adapter "intruder_reduced"; the old one is kept.

    Examples
    --------
    >>> base = {"w.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))}
    >>> tuned = {"w.weight": base["w.weight"] + 5 * torch.full((4, 4), 0.25)}
    >>> report = intruder_dimensions(base, tuned, k=1, eps=0.9)
    >>> gone = scale_intruders(base, tuned, report, lam=0.0)["w.weight"]
    >>> bool(torch.linalg.svdvals(gone)[-1] < 1e-5)
    True
    """
    if report is None:
        raise ValueError("report is None: give what intruder_dimensions found")
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam={lam}: give a number of at least 0 (1 changes nothing)")
    for name, value, choices in (
        ("control", control, (None, "uniform", "others")),
        ("which", which, ("all", "top")),
        ("rank", rank, ("grow", "keep")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, choices))}")
    chosen, _, second = pairs(base, tuned, [row.name for row in report.per_matrix])
    found = {row.name: row for row in report.per_matrix}
    moves = {pair.name: (pair, _directions(found[pair.name], control, which)) for pair in chosen}
    if tuned is None:
        if output is not None:
            raise ValueError("output is for checkpoints: save the PeftModel with save_pretrained")
        return _scale_adapter(base, second, moves, lam, control, rank)

    def changed(name: str) -> torch.Tensor:
        pair, directions = moves[name]
        return _new_weight(pair, directions, lam, control).to(second[name].dtype)

    scaled = _Scaled(
        second, [name for name, (_, directions) in moves.items() if directions.shape[1]], changed
    )
    if output is None:
        return dict(scaled)
    return _write(scaled, output, max_shard_bytes)


def _directions(row: MatrixIntruders, control: str | None, which: str) -> torch.Tensor:
    """The vectors (out, n) to scale."""
    indices = list(row.indices)
    if which == "top":
        indices = indices[:1]
    if control == "others":
        indices = [j for j in range(row.vectors.shape[1]) if j not in row.indices][: len(indices)]
    return row.vectors[:, indices]


def _new_weight(pair: Pair, directions: torch.Tensor, lam: float, control: str | None) -> torch.Tensor:
    """As the model stores it."""
    w0, w = pair.read()
    new = _scaled(w0, w, directions, lam, control)
    return new.T.contiguous() if pair.sources[1].transposed(pair.name) else new


def _scaled(
    w0: torch.Tensor, w: torch.Tensor, directions: torch.Tensor, lam: float, control: str | None
) -> torch.Tensor:
    u = directions.to(w)
    new = w + (lam - 1) * u @ (u.T @ w)
    if control == "uniform" and (size := float((w - w0).norm())):
        return w0 + (w - w0) * (float((new - w0).norm()) / size)
    return new


def _scale_adapter(
    model: Any,
    weights: Weights,
    moves: Mapping[str, tuple[Pair, torch.Tensor]],
    lam: float,
    control: str | None,
    rank: str,
) -> Any:
    """`W' - W0 = s B A + (lam - 1) U (U' W)` is a product of factors of r + n columns: no square matrix is decomposed."""
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    old = weights.tensors.adapter  # type: ignore[attr-defined]
    config = copy.deepcopy(model.peft_config[old])
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias:
        raise ValueError(
            f"adapter {old!r} is no plain LoRA: scale the intruders of the merged model's state dict"
        )
    if ADAPTER in model.peft_config:
        raise ValueError(
            f"the model has an adapter {ADAPTER!r} already: delete it with delete_adapter({ADAPTER!r})"
        )
    state = get_peft_model_state_dict(model, adapter_name=old)
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for name, (pair, directions) in moves.items():
        module = name.removesuffix(".weight")
        a_key, b_key = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
        if not directions.shape[1] or a_key not in state:
            continue
        scaling = weights.tensors.layers[name].scaling[old]  # type: ignore[attr-defined]
        a, b = state[a_key].detach().float().cpu(), scaling * state[b_key].detach().float().cpu()
        w0, w = (matrix.float() for matrix in pair.read())
        left = torch.cat([b, (lam - 1) * directions.float()], 1)
        right = torch.cat([a, directions.float().T @ w])
        if control == "uniform":
            left, right = b * (float((left @ right).norm()) / max(float((w - w0).norm()), 1e-30)), a
        size = min(left.shape[1] if rank == "grow" else b.shape[1], *w.shape)
        q, upper = torch.linalg.qr(left)
        p, lower = torch.linalg.qr(right.T)
        x, s, y = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        root = s[:size].sqrt()
        state[b_key] = (q @ x[:, :size] * root).contiguous()
        state[a_key] = (root[:, None] * (y[:size] @ p.T)).contiguous()
        exactly = f"^{re.escape(module)}"
        ranks[exactly], alphas[exactly] = size, size**0.5 if config.use_rslora else size  # a scaling of 1
    config.rank_pattern = {**ranks, **(config.rank_pattern or {})}  # the first that fits counts
    config.alpha_pattern = {**alphas, **(config.alpha_pattern or {})}
    config.init_lora_weights, config.inference_mode = True, True
    model.add_adapter(ADAPTER, config)
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    model.set_adapter(ADAPTER)
    return model


def _write(tensors: _Scaled, output: str | os.PathLike[str], max_shard_bytes: int) -> Path:
    """Shards first; what makes the folder load (config, tokenizer) last."""
    folder = Path(output)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output={os.fspath(output)!r} is not empty: give a new folder")
    layout = {name: (tensors.tuned.dtype(name), tensors.tuned.shape(name)) for name in tensors}
    writer = ShardWriter(folder, layout, max_shard_bytes)
    for shard in writer.pending():
        with writer.open(shard) as stream:
            for name in shard.tensors:
                stream.write(tensors[name])
    writer.finish()
    source = tensors.tuned.folder
    for pattern in ("*.json", "*.txt", "*.model", "*.jinja") if source is not None else ():
        for file in sorted(Path(source).glob(pattern)):  # type: ignore[arg-type]
            if not file.name.endswith(".index.json"):
                with atomic_write(folder / file.name, "wb") as copy_of:
                    copy_of.write(file.read_bytes())
    return folder


def diagnose_files(
    base: str, tuned: Sequence[str], k: int, eps: float, include: Sequence[str], method: str, progress: Any
) -> list[IntruderReport]:
    """What the command does."""
    return [
        intruder_dimensions(
            base, one, k, eps, list(include) or None, method=method, label=printable(os.path.basename(os.path.normpath(one))),
            progress=progress,
        )
        for one in tuned
    ]  # fmt: skip
