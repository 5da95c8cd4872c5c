"""LiST: prompted self-training of small linear adapters, each pseudo-label weighted by what it does for the few true ones.

A masked language model answers a cloze ("x It was [MASK]."), its scores of one word a class are the logits. Stages:
    teacher          cross-entropy on the labelled set L
    sessions 1..T    the teacher is the model so far; the student begins anew from the pretrained model, and learns
      self-training  L_u = sum_i w_i KL(teacher_i || student_i) on unlabelled batches, sum w = 1: w uniform over what the
                     teacher is sure of for the first 60 % of the steps, after that w_i = relu(a_i) / sum_j relu(a_j) with
                     a_i = < grad CE(labelled batch), grad KL_i >, the gain of a look-ahead step
      fine-tuning    cross-entropy on L
and the model after the last session is the result: few labels leave none to choose a model by. What is trained is `h + U V h`
behind the dense layers of attention and feed-forward blocks, merged afterwards into W + U V W, b + U V b, and the head.

The card's closed form is used without its learning rate, which cancels in w, and in forward mode (`unfused.nn.meta_weights`).
One frozen backbone serves teacher and student: they differ in the trained parameters alone.

Reference: LiST: Lite Prompted Self-training Makes Parameter-Efficient Few-shot Learners, NAACL Findings 2022, arXiv:2110.06274.
Needs: few labels, unlabelled data, a masked language model, gradients.
Slug: list
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from unfused.data.files import atomic_write, read_json, write_json
from unfused.label._list_adapter import ListConfig, ListModel
from unfused.nn.meta_weights import call_with, meta_weights, soft_losses
from unfused.nn.peft_register import register
from unfused.nn.prompt_template import PromptTemplate, logits_at

__all__ = ["ListConfig", "ListModel", "ListTrainer", "PromptTemplate", "meta_weights"]

register("list", ListConfig, ListModel)

TEACHER, SELF, FINE = "teacher", "self-training", "fine-tuning"


class ListTrainer(Trainer):
    """A `transformers.Trainer` whose `train` runs LiST's stages; `predict` and `evaluate` use the cloze.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A masked language model.
    args : TrainingArguments, optional
        Learning rate, decay, schedule, precision, logging, saving of every stage; batch sizes and lengths come from the
        arguments below. By default the paper's: 1e-4, linear, no decay.
    template : PromptTemplate
    processing_class : PreTrainedTokenizerBase
        The model's tokenizer.
    train_dataset : dataset or list of mapping
        Labelled rows: the template's fields and `label_column`, one of the verbalizer's labels.
    unlabeled_dataset : dataset or list of mapping or str
        Rows with the template's fields; a label, where there is one, is not looked at.
    peft_config : PeftConfig, optional
        Such as `ListConfig()`. Without, what requires a gradient in `model` is trained.
    sessions : int, default=6
        0 is prompt-based fine-tuning without self-training.
    teacher_epochs, finetune_epochs : float, default=50
        On the labelled set, before the sessions and at the end of each.
    update_teacher_steps : int, default=1000
        Self-training steps of a session.
    meta_warmup : float, default=0.6
        Share of them with uniform weights; 1 is plain self-training.
    reinit_student : bool, default=True
        False lets a student go on from its teacher.
    threshold : float, default=0
        While weights are uniform, examples of a lower top probability have none.
    temperature : float, default=1
        Below 1 sharpens the soft labels.
    labeled_batch_size, meta_batch_size, unlabeled_batch_size : int, default=4, 4, 16
    teacher_learning_rate : float, optional
        By default that of `args`. The paper's script has 5e-6, which moves adapters that begin as the identity hardly at
        all on a small model.
    max_length : int, default=128
        Tokens.
    label_column : str, default="label"
    **kwargs
        Of `Trainer`: `eval_dataset`, `compute_metrics` (by default accuracy), `callbacks`. Not `optimizers`: every
        stage has its own.

    Attributes
    ----------
    history_ : list of dict
        Of every stage: `stage`, `session`, mean `loss`, and of self-training `zero_weights`, the share of examples that
        meta weights left out, and `skipped`, the share of meta steps in which no example helped.

    Notes
    -----
    Unless `args.save_strategy` is "no", `train(resume_from_checkpoint=True)` goes on at the stage, and the checkpoint in it, at
    which a killed run stopped. A student that begins anew takes the adapter's first weights of this run. Under DDP each process
    weights its own part of a batch; under FSDP teacher and look-ahead do not work, as no process has all parameters.

    Raises
    ------
    ValueError
        For no labelled or no unlabelled rows, an unknown label, a tokenizer without a mask or verbalizer words that are no
        token of it, and arguments out of range.

    Examples
    --------
    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, PrinterCallback
    >>> words = {w: i for i, w in enumerate("[PAD] [MASK] [UNK] it was good bad fine film poor".split())}
    >>> tokens = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    >>> tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> trainer = ListTrainer(
    ...     BertForMaskedLM(BertConfig(vocab_size=10, **sizes)),
    ...     TrainingArguments(tempfile.mkdtemp(), save_strategy="no", use_cpu=True, disable_tqdm=True),
    ...     template=PromptTemplate("{text} it was {mask}", verbalizer={"neg": "bad", "pos": "good"}),
    ...     processing_class=PreTrainedTokenizerFast(tokenizer_object=tokens, **special),
    ...     train_dataset=[{"text": "fine film", "label": "pos"}, {"text": "poor film", "label": "neg"}],
    ...     unlabeled_dataset=["film", "fine", "poor"],
    ...     peft_config=ListConfig(r=2),
    ...     sessions=1,
    ...     teacher_epochs=1,
    ...     update_teacher_steps=3,
    ...     finetune_epochs=1,
    ... )
    >>> trainer.remove_callback(PrinterCallback)
    >>> _ = trainer.train()
    >>> [stage["stage"] for stage in trainer.history_]
    ['teacher', 'self-training', 'fine-tuning']
    >>> trainer.predict(["a film"]).predictions.shape
    (1, 2)
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        template: PromptTemplate,
        processing_class: Any,
        train_dataset: Any,
        unlabeled_dataset: Any = (),
        peft_config: Any = None,
        sessions: int = 6,
        teacher_epochs: float = 50,
        finetune_epochs: float = 50,
        update_teacher_steps: int = 1000,
        meta_warmup: float = 0.6,
        reinit_student: bool = True,
        threshold: float = 0.0,
        temperature: float = 1.0,
        labeled_batch_size: int = 4,
        meta_batch_size: int = 4,
        unlabeled_batch_size: int = 16,
        teacher_learning_rate: float | None = None,
        max_length: int = 128,
        label_column: str = "label",
        **kwargs: Any,
    ) -> None:
        _check(sessions >= 0, f"sessions={sessions}: it cannot be negative")
        _check(0 <= meta_warmup <= 1, f"meta_warmup={meta_warmup}: it is a share of the steps, 0 to 1")
        _check(temperature > 0, f"temperature={temperature}: it must be positive")
        _check(0 <= threshold < 1, f"threshold={threshold}: it is a probability below 1")
        _check("optimizers" not in kwargs, "optimizers: every stage makes its own; set them by args")
        _check(len(train_dataset) > 0, "train_dataset is empty: LiST needs a few labelled rows")
        _check(
            not sessions or len(unlabeled_dataset) > 0,
            "unlabeled_dataset is empty: give unlabelled rows, or sessions=0",
        )
        self.token_ids = template.token_ids(processing_class)
        self.template, self.unlabeled_dataset, self.labeled_dataset = (
            template,
            unlabeled_dataset,
            train_dataset,
        )
        self.sessions, self.meta_warmup, self.reinit_student = sessions, meta_warmup, reinit_student
        self.threshold, self.temperature = threshold, temperature
        self.update_teacher_steps = update_teacher_steps
        self.epochs = {TEACHER: teacher_epochs, FINE: finetune_epochs}
        self.batch_sizes = {
            TEACHER: labeled_batch_size,
            FINE: labeled_batch_size,
            SELF: unlabeled_batch_size,
            "meta": meta_batch_size,
        }
        self.collate_labeled = template.collator(processing_class, max_length, label_column)
        self.collate_unlabeled: Any = template.collator(processing_class, max_length, None)
        first = [train_dataset[i] for i in range(len(train_dataset))]
        _check(
            "labels" in self.collate_labeled(first),
            f"train_dataset has no column {label_column!r}: name the labels' by label_column",
        )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        args = TrainingArguments("list-output", learning_rate=1e-4) if args is None else copy.copy(args)
        args.remove_unused_columns, args.label_names = False, ["labels"]
        kwargs.setdefault("compute_metrics", _accuracy)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=self.collate_labeled,
            train_dataset=train_dataset,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.folder = Path(str(args.output_dir))
        self.rates = {TEACHER: teacher_learning_rate or args.learning_rate}
        self.student_rate = args.learning_rate
        self.teacher: dict[str, Tensor] = {}
        self.stage = TEACHER
        self.history_: list[dict[str, Any]] = []

    # -- stages ----------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """All stages. `resume_from_checkpoint=True` goes on where `args.output_dir` says that a run stopped."""
        stages = [(TEACHER, 0)] + [(stage, t + 1) for t in range(self.sessions) for stage in (SELF, FINE)]
        if resume_from_checkpoint not in (None, False, True):
            raise ValueError(
                "resume_from_checkpoint: give True; stages and checkpoints are found in args.output_dir"
            )
        saving, begin = self.args.save_strategy != "no", 0
        self.history_ = []
        initial = self._trained()
        if resume_from_checkpoint and (self.folder / "stage.json").is_file():
            record = read_json(self.folder / "stage.json")
            begin, self.history_ = record["next"], record["history"]
            initial = self._read("initial.safetensors")
            self._put(self._read(record["weights"]))
        elif saving:
            self._write("initial.safetensors", initial)
        steps, loss, metrics = 0, 0.0, {}
        for number, (stage, session) in enumerate(stages):
            if number < begin:
                continue
            if stage == SELF:
                self.teacher = self._trained()
                if self.reinit_student:
                    self._put(initial)
            done = self._run(
                number, stage, session, bool(resume_from_checkpoint) and number == begin, ignore_keys_for_eval
            )
            if done is not None:
                steps, loss, metrics = steps + done.global_step, done.training_loss, done.metrics
            if saving and self.is_world_process_zero():
                weights = f"stage-{number % 2}.safetensors"
                self._write(weights, self._trained())
                record = {"next": number + 1, "weights": weights, "history": self.history_}
                write_json(self.folder / "stage.json", record)
        self.teacher = {}
        return TrainOutput(steps, loss, metrics)

    def _run(self, number: int, stage: str, session: int, resume: bool, ignored: list[str] | None) -> Any:
        length = self.update_teacher_steps if stage == SELF else self.epochs[stage]
        if length <= 0:
            return None
        set_seed(self.args.seed + number)
        self.stage, self.number, self.counts = stage, number, [0, 0, 0, 0]
        self.args.output_dir = str(self.folder / f"stage-{number:02d}-{stage}")
        self.args.max_steps = int(length) if stage == SELF else -1
        self.args.num_train_epochs = 1 if stage == SELF else length
        self.args.learning_rate = self.rates.get(stage, self.student_rate)
        self.args.per_device_train_batch_size = self.batch_sizes[stage]
        self._train_batch_size = self.args.train_batch_size
        self.train_dataset = self.unlabeled_dataset if stage == SELF else self.labeled_dataset
        self.data_collator = self.collate_unlabeled if stage == SELF else self.collate_labeled
        self.optimizer, self.lr_scheduler = None, None
        self.model_wrapped: Any = self.model
        try:
            there = resume and Path(self.args.output_dir).is_dir()
            checkpoint = get_last_checkpoint(self.args.output_dir) if there else None
            done = super().train(checkpoint, ignore_keys_for_eval=ignored)
        finally:
            self.args.output_dir, self.data_collator = str(self.folder), self.collate_labeled
        row = {"stage": stage, "session": session, "loss": done.training_loss}
        if stage == SELF:
            examples, zeros, batches, skipped = self.counts
            row |= {"zero_weights": zeros / max(examples, 1), "skipped": skipped / max(batches, 1)}
        self.history_.append(row)
        return done

    # -- losses ----------------------------------------------------------------------------------------------------------

    def cloze(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of the classes, (N, C)."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "mask_position")}
        return logits_at(model, inputs, batch["mask_position"])[:, self.token_ids].float()

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.stage == SELF and model.training and "labels" not in inputs:
            return (inputs["weights"] * soft_losses(self.cloze(model, inputs["batch"]), inputs["soft"])).sum()
        logits = self.cloze(model, inputs)
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.stage != SELF:
            return super().training_step(model, inputs, *args, **kwargs)
        batch = self._prepare_inputs(inputs)
        soft = self._soft_labels(batch)
        weights = self._weights(batch, soft)
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        if alone and not weights.any():  # without gradients the optimiser moves nothing, by momentum neither
            return weights.new_zeros(())
        return super().training_step(
            model, {"batch": batch, "soft": soft, "weights": weights}, *args, **kwargs
        )

    @torch.no_grad()
    def _soft_labels(self, batch: Mapping[str, Any]) -> Tensor:
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self.compute_loss_context_manager():
            logits = call_with(model, self.teacher, self.cloze, batch)
        return (logits / self.temperature).softmax(-1)

    def _weights(self, batch: Mapping[str, Any], soft: Tensor) -> Tensor:
        if self.state.global_step < self.meta_warmup * self.update_teacher_steps:
            sure = (soft.amax(-1) > self.threshold).float()
            return sure / sure.sum().clamp_min(1)
        seed = (self.args.seed * 1000 + self.number) * 1_000_000 + self.state.global_step
        draw = torch.Generator().manual_seed(seed + 997 * self.args.process_index)
        rows = torch.randperm(len(self.labeled_dataset), generator=draw)[: self.batch_sizes["meta"]]
        labeled = self._prepare_inputs(self.collate_labeled([self.labeled_dataset[i] for i in rows.tolist()]))
        model = self.accelerator.unwrap_model(self.model)
        weights = meta_weights(model, batch, soft, labeled, self.cloze)  # type: ignore[arg-type]
        zeros = int((weights == 0).sum())
        found = (len(weights), zeros, 1, int(zeros == len(weights)))
        self.counts = [a + b for a, b in zip(self.counts, found, strict=True)]
        return weights

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self.cloze(model, inputs)
        labels = inputs.get("labels")
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    # -- trained parameters --------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters().items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters().items():
            p.copy_(values[name])

    def _write(self, name: str, values: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name, "wb") as file:
            file.write(save({key: value.cpu().contiguous() for key, value in values.items()}))

    def _read(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        values, wanted = load_file(self.folder / name), self._parameters()
        if values.keys() != wanted.keys() or any(values[k].shape != p.shape for k, p in wanted.items()):
            raise ValueError(
                f"{self.folder / name} holds other parameters than this model trains: start afresh"
            )
        return values


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
