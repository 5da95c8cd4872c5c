"""The label family as methods of a run: classifiers on the frozen features of the teacher or of `--encoder`.

Where the encoder reads texts too (CLIP, CLAP, a sentence model), the names of the classes are features in the same space, and
some of these need no label at all. Each arm is `(bench, draw, folder) -> Outcome` as in `arms`; its estimator is kept, and
`unfused predict` uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unfused.workflow.arms import Bench, Draw, Outcome, _expand

__all__ = ["ARMS", "check_methods"]


def zero_shot(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """The nearest class name: no training, no label."""
    from unfused.label.gda_clip import GDAClassifier

    text, scale = _class_names(bench)
    names = np.arange(len(bench.classes))
    return _kept(bench, GDAClassifier(text, classes=names, alpha=0.0, logit_scale=scale).fit(_pool(bench)))


def gda(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Gaussians of the labelled items, weighed against the class names where there are any; without labels by EM."""
    from unfused.label.gda_clip import GDAClassifier

    X, rows = _features(bench), np.flatnonzero(draw.visible)
    if not _has_names(bench):
        return _kept(bench, GDAClassifier().fit(X[rows], draw.labels[rows]))
    text, scale = _class_names(bench)
    classifier = GDAClassifier(text, classes=np.arange(len(bench.classes)), logit_scale=scale)
    fitted = classifier.fit(X[rows], draw.labels[rows]) if len(rows) else classifier.fit(_pool(bench))
    return _kept(bench, fitted, {"alpha": float(fitted.alpha_)})


def tfup(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """A cache of the pool's surest and most central items votes with the class names, or with the classes' means."""
    from unfused.label.tfup import TFUPClassifier

    text, scale = _prototypes(bench, draw)
    classifier = TFUPClassifier(text, classes=np.arange(len(text)), logit_scale=scale)
    return _kept(bench, classifier.fit(_pool(bench)))


def tfup_t(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """The same with two small adapters trained on the cache's own labels."""
    from unfused.label.tfup import TFUPClassifier, TFUPTClassifier

    text, scale = _prototypes(bench, draw)
    classifier = TFUPTClassifier(
        text,
        classes=np.arange(len(text)),
        tfup=TFUPClassifier(logit_scale=scale),
        random_state=draw.seed,
    )
    return _kept(bench, classifier.fit(_pool(bench)))


def ogen(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """A small adapter on the features, held back from forgetting what it never saw."""
    from unfused.label.ogen import OGENClassifier

    X, rows = _features(bench), np.flatnonzero(draw.visible)
    text, scale = _prototypes(bench, draw)
    classifier = OGENClassifier(text, classes=np.arange(len(text)), logit_scale=scale, random_state=draw.seed)
    return _kept(bench, classifier.fit(X[rows], draw.labels[rows]))


def latent_label_shift(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Classes found by how the groups' shares of them differ; the labels only say what each is called."""
    from scipy.optimize import linear_sum_assignment

    from unfused.label.latent_label_shift import DDFA

    X, domains = _features(bench), np.asarray(bench.groups)
    pool, rows = np.flatnonzero(bench.pool), np.flatnonzero(draw.visible)
    found = DDFA(n_classes=len(bench.classes), random_state=draw.seed).fit(X[pool], domains=domains[pool])
    known = np.isin(domains, found.domains_)  # a group that is held out may be any
    probabilities = np.empty((len(X), len(bench.classes)), np.float32)
    for some, where in ((known, domains[known]), (~known, None)):
        if some.any():
            probabilities[some] = found.predict_proba(X[some], where)
    votes = np.zeros((len(bench.classes),) * 2)  # labelled class x found class
    np.add.at(votes, draw.labels[rows], probabilities[rows])
    columns = linear_sum_assignment(-votes)[1]  # of each class, in order
    order = np.argsort(columns).tolist()  # which class each found one is
    return Outcome(probabilities[:, columns], estimator=found, columns=order)


def prompted(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """LiST: a masked language model asked by a cloze, self-trained on the pool."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, PrinterCallback, TrainingArguments

    from unfused.label.lite_prompted_self_training import ListConfig, ListTrainer, PromptTemplate
    from unfused.nn.zero_shot import log_softmax

    assert bench.foreign is not None
    teacher, texts = bench.foreign.teacher, bench.corpus.raw
    try:
        model = AutoModelForMaskedLM.from_pretrained(teacher, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"method='list' needs a masked language model as encoder: {_line(error)}") from error
    spoken: dict[Any, str] = {name: name.replace("_", " ") for name in bench.classes}
    rows, pool = np.flatnonzero(draw.visible).tolist(), np.flatnonzero(bench.pool & ~draw.visible).tolist()
    epochs = max(1, -(-4 * bench.steps["fine_tune"] // len(rows)))  # batches of 4
    trainer = ListTrainer(
        model,
        TrainingArguments(
            str(folder / "list"),
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=100,
            save_total_limit=1,
            seed=draw.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        template=PromptTemplate("{text} It was {mask}.", verbalizer=spoken),
        processing_class=tokenizer,
        train_dataset=[{"text": texts[row], "label": bench.classes[draw.labels[row]]} for row in rows],
        unlabeled_dataset=[{"text": texts[row]} for row in pool],
        peft_config=ListConfig(),
        sessions=2 if pool else 0,
        update_teacher_steps=bench.steps["distil"] // 2,
        teacher_epochs=epochs,
        finetune_epochs=epochs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    logits = np.asarray(trainer.predict(texts).predictions, np.float64)  # type: ignore[arg-type]
    probabilities = np.exp(log_softmax(logits)).astype(np.float32)
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    return Outcome(probabilities, parameters=sum(trained))


ARMS: dict[str, Callable[[Bench, Draw, Path], Outcome]] = {
    "zero-shot": zero_shot,
    "gda-clip": gda,
    "tfup": tfup,
    "tfup-t": tfup_t,
    "ogen": ogen,
    "latent-label-shift": latent_label_shift,
    "list": prompted,
}
_WITHOUT_LABELS = ("zero-shot", "gda-clip", "tfup", "tfup-t")  # where the encoder reads class names


def check_methods(
    methods: Sequence[str], foreign: Any, modality: str, groups: Any, num_classes: int, labelled: bool
) -> None:
    """A ValueError for the first method that this run has not got what it needs for.

    Parameters
    ----------
    methods : sequence of str
        With those of `arms` too.
    foreign : Foreign or None
    modality : str
    groups : ndarray or None
        Names of groups that the pool has items of.
    num_classes : int
    labelled : bool
        Whether any label is visible.
    """
    names = foreign is not None and foreign.reads_texts
    free = ", ".join(_WITHOUT_LABELS)
    for method in methods:
        if not labelled and not (names and method in _WITHOUT_LABELS):
            if not names:
                raise ValueError(
                    "classes without labels need an encoder that reads texts too: give encoder, a CLIP for pictures, say"
                )
            raise ValueError(f"method={method!r} needs labels; with class names alone there are {free}")
        if method == "zero-shot" and not names:
            raise ValueError(
                "method='zero-shot' needs an encoder that reads the names of the classes, such as CLIP: give encoder"
            )
        if method == "latent-label-shift":
            found = 0 if groups is None else len(set(groups))
            if found < num_classes:
                raise ValueError(
                    f"method='latent-label-shift' tells {num_classes} classes by how groups differ, and needs at least as many "
                    f"groups: there are {found}; name them with group"
                )
        if method == "list" and (modality != "text" or foreign is None):
            raise ValueError(
                "method='list' is for texts, with a masked language model as encoder: give encoder"
            )


def _features(bench: Bench) -> np.ndarray:
    """Of all items, in the space of the class names where there is one."""
    if bench.foreign is None or bench.modality.name != "audio":
        return bench.features
    if "shared" not in bench.cache:  # what is clustered of recordings is not CLAP's projection
        bench.cache["shared"] = bench.foreign.shared_features()
    return bench.cache["shared"]


def _pool(bench: Bench) -> np.ndarray:
    return _features(bench)[bench.pool]


def _has_names(bench: Bench) -> bool:
    return bench.foreign is not None and bench.foreign.reads_texts


def _class_names(bench: Bench) -> tuple[np.ndarray, float]:
    assert bench.foreign is not None
    if "names" not in bench.cache:
        bench.cache["names"] = bench.foreign.class_features(bench.classes, bench.templates)
    return bench.cache["names"]


def _prototypes(bench: Bench, draw: Draw) -> tuple[np.ndarray, float]:
    """Class names, or the unit means of the labelled items in their place."""
    from unfused.nn.zero_shot import unit_rows

    if _has_names(bench):
        return _class_names(bench)
    rows = np.flatnonzero(draw.visible)
    members = np.eye(len(bench.classes))[draw.labels[rows]]
    return unit_rows(members.T @ unit_rows(np.asarray(_features(bench)[rows], np.float64))), 100.0


def _kept(bench: Bench, estimator: Any, details: dict[str, Any] | None = None) -> Outcome:
    probabilities = _expand(estimator, _features(bench), len(bench.classes))
    return Outcome(
        probabilities, estimator=estimator, columns=estimator.classes_.tolist(), details=details or {}
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
