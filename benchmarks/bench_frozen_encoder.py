"""FrozenEncoder beside a bare batched loop over transformers, and its second call.

Run `python benchmarks/bench_frozen_encoder.py [--items N] [--rounds R]`. Models of usual size, random weights: a ViT-S/16 on
JPEG files of 640 x 480, a MiniLM (6 layers of 384) on sentences of 5 to 60 words. Both sides float32, same batches, same
threads, in turns; encoder and loop must agree. Each line ends in the aim and whether it was met.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unfused import label
from unfused.nn.encoders import image_processor

BATCH = 32


def line(name: str, figures: str, met: bool, aim: str) -> None:
    print(f"{name}: {figures} (aim {aim}: {'met' if met else 'NOT met'})", flush=True)


def pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        paths.append(folder / f"{index}.jpg")
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"w{word}" for word in rng.integers(0, 500, rng.integers(5, 61))) for _ in range(count)]


def image_loop() -> tuple[object, object, Callable[[list], np.ndarray]]:
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    model, processor = ViTModel(ViTConfig(**sizes)).eval(), image_processor(224, [0.5] * 3, [0.5] * 3)

    @torch.inference_mode()
    def loop(paths: list) -> np.ndarray:
        rows = []
        for start in range(0, len(paths), BATCH):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
            rows.append(model(**processor(images=images, return_tensors="pt")).last_hidden_state[:, 0])
        return torch.cat(rows).numpy()

    return model, processor, loop


def text_loop() -> tuple[object, object, Callable[[list], np.ndarray]]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *(f"w{index}" for index in range(500))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=128
    )
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(BertConfig(vocab_size=len(words), **sizes)).eval()

    @torch.inference_mode()
    def loop(texts: list) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
            weight = inputs["attention_mask"][..., None].float()
            rows.append((model(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1))
        return torch.cat(rows).numpy()

    return model, tokenizer, loop


def compare(name: str, items: list, made: tuple, rounds: int) -> None:
    model, processor, loop = made
    first, second, bare = [], [], []
    loop(items[:BATCH])
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            expected = loop(items)
            bare.append(time.perf_counter() - start)
            encoder = label.FrozenEncoder(
                model, processor=processor, batch_size=BATCH, bf16=False, cache_dir=folder
            )
            for spent in (first, second):
                start = time.perf_counter()
                found = encoder.transform(items)
                spent.append(time.perf_counter() - start)
                np.testing.assert_allclose(found, expected, atol=1e-3)
    speed, again = min(bare) / min(first), min(first) / min(second)
    figures = f"{len(items)} items, bare loop {min(bare):.2f} s, encoder {min(first):.2f} s"
    line(f"{name}, speed of the bare loop's", f"{figures}, {100 * speed:.0f} %", speed >= 0.9, ">= 90 %")
    line(f"{name}, second call", f"{1000 * min(second):.0f} ms, {again:.0f}x faster", again >= 20, ">= 20x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        compare("pictures", pictures(Path(folder), options.items), image_loop(), options.rounds)
    compare("texts", sentences(4 * options.items), text_loop(), options.rounds)


if __name__ == "__main__":
    main()
