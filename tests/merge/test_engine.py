"""From disk to disk: the same as in memory, whatever the shards; resumed after a kill; everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import killing
import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import SHAPES, save, state

from unfused.data.checkpoint_io import open_checkpoint
from unfused.data.files import DiskFull
from unfused.merge import _engine, _plan, merge, merge_to_folder


def read(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def equal(found, want):
    assert set(found) == set(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- what comes out


@pytest.mark.parametrize("slug", ["breadcrumbs", "ties", "task-arithmetic", "dare", "linear"])
@pytest.mark.parametrize("size", [10**9, 200])
def test_folders_give_what_state_dicts_give(family, tmp_path, slug, size, monkeypatch):
    base, models, folders = family
    base_of = None if slug == "linear" else folders[0]
    want = merge(slug, None if slug == "linear" else base, models)
    monkeypatch.setattr(_plan.pieces, "__defaults__", (8,))  # pieces of a few entries
    out = merge_to_folder(slug, base_of, folders[1:], tmp_path / "out", max_shard_bytes=size)
    equal(read(out), want)
    assert (out / "model.safetensors.index.json").is_file() == (size == 200)
    assert (out / "generation_config.json").read_text() == '{"max_length": 7}'
    assert not list(tmp_path.glob(".*"))


def test_is_the_merge_in_plain_torch_exactly(family, tmp_path):
    base, models, folders = family
    out = read(merge_to_folder("task-arithmetic", folders[0], folders[1:], tmp_path / "out", scale=0.4))
    for name in SHAPES:
        total = models[0][name] - base[name]
        for model in models[1:]:
            total = total + (model[name] - base[name])
        assert torch.equal(out[name], base[name] + 0.4 * total)
    assert torch.equal(out["model.position_ids"], base["model.position_ids"])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(tmp_path, kind):
    models = [state(i, kind) for i in range(5)]
    folders = [save(tmp_path / str(i), m) for i, m in enumerate(models)]
    out = read(merge_to_folder("linear", None, folders, tmp_path / "out"))
    wide = read(merge_to_folder("linear", None, folders, tmp_path / "wide", dtype="float32"))
    for name in SHAPES:
        mean = sum(m[name].float() for m in models[1:]) + models[0][name].float()
        torch.testing.assert_close(wide[name], mean / 5)
        assert torch.equal(out[name], wide[name].to(kind))
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


def test_modules_state_dicts_and_folders_mix(family):
    base, models, folders = family
    net = torch.nn.Linear(2, 2)
    state_dict = {k: v.clone() for k, v in net.state_dict().items()}
    equal(merge("linear", None, [net, state_dict]), state_dict)
    equal(merge("ties", folders[0], [models[0], folders[2]]), merge("ties", base, models[:2]))


def test_heads_are_copied(family, tmp_path):
    base, models, folders = family
    for i, (folder, model) in enumerate(zip(folders[1:], models, strict=True)):
        shutil.rmtree(folder)
        save(folder, model | {"head.weight": torch.full((i + 2, 6), float(i))}, config={"head": i})
    out = merge_to_folder(
        "breadcrumbs", folders[0], folders[1:], tmp_path / "out", copy=["^head", r"fc\.bias"]
    )
    found = read(out)
    assert torch.equal(found["head.weight"], torch.zeros(2, 6))
    assert torch.equal(found["model.layers.0.fc.bias"], base["model.layers.0.fc.bias"])
    assert json.loads((out / "config.json").read_text())["head"] == 0  # the config that has the head


def test_tied_weights_stay_tied(family, tmp_path):
    base, models, folders = family
    twice = {**models[0], "lm_head.weight": models[0]["model.embed_tokens.weight"].clone()}
    shutil.rmtree(folders[1])
    save(folders[1], twice)
    out = merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out")
    equal(read(out), merge("ties", base, models))
    assert "tied to model.embed\\_tokens.weight" in (out / "README.md").read_text()


def test_the_card_lists_sources_method_parameters_and_hashes(family, tmp_path):
    _, _, folders = family
    out = merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out", keep=0.3, hashes="full")
    card = (out / "README.md").read_text()
    for folder in folders:
        assert folder.name in card and open_checkpoint(folder).fingerprint(full=True) in card
    for text in ("`ties`", "| keep | 0.3 |", "- merge", "SHA-256"):
        assert text in card
    recipe = json.loads((out / "merge.json").read_text())
    assert recipe["parameters"]["keep"] == 0.3 and len(recipe["models"]) == 3


def test_progress_counts_bytes(family, tmp_path):
    _, _, folders = family
    seen = []
    out = merge_to_folder(
        "linear", None, folders, tmp_path / "out", progress=lambda *now: seen.append(now), max_shard_bytes=300
    )
    total = sum(t.nbytes for t in read(out).values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_weights_found_on_whole_models(family, tmp_path):
    from unfused.merge._method import MergeMethod

    _, models, folders = family
    calls = []

    def look(base, given, *, best=0):
        calls.append([float(m["model.scale"]) for m in given])
        return [float(i == best) for i in range(len(given))]

    method = MergeMethod("look", look, "none", then="linear")
    out = merge_to_folder(method, None, folders[1:], tmp_path / "out", best=2)
    equal(read(out), models[2])
    equal(merge(method, None, models, best=1), models[1])
    assert len(calls) == 2 and "weights found: \\[0.0, 0.0, 1.0\\]" in (out / "README.md").read_text()


# ---- kills


def _slow_merge(folders, out):
    real = _engine._Merge.compute

    def slow(self, *given):
        import time

        time.sleep(0.004)
        return real(self, *given)

    _engine._Merge.compute = slow
    _plan.pieces.__defaults__ = (16,)
    merge_to_folder("breadcrumbs", folders[0], folders[1:], out, max_shard_bytes=200)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(family, tmp_path, tree):
    _, _, folders = family
    before = [tree(folder) for folder in folders]
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    forks = killing.Forks(["unfused.merge._engine", "unfused.merge.breadcrumbs", "unfused.merge.model_soups"])
    forks.run(_slow_merge, folders, whole)
    seconds = forks.run(_slow_merge, folders, tmp_path / "timed" / "out")
    hits = 0
    for delay in killing.random_delays(3, max(0.2, seconds * 0.9), seed=1):
        hits += forks.kill(_slow_merge, folders, out, delay=delay)
        assert not out.exists() or tree(out) == tree(whole)
    for events in (5, 13):  # and at chosen changes of files
        hits += forks.run_until_event(_slow_merge, folders, out, folder=out.parent, events=events)
        assert not out.exists() or tree(out) == tree(whole)
    forks.run(_slow_merge, folders, out)
    assert hits and tree(out) == tree(whole)
    assert not [p for p in out.parent.iterdir() if p != out]
    assert [tree(folder) for folder in folders] == before


def test_whole_shards_are_not_made_again(family, tmp_path, monkeypatch, tree):
    _, _, folders = family
    made = []
    real = _engine._Merge.compute

    def failing(self, item, *rest):
        made.append(item.name)
        if len(made) == 4:
            raise OSError(5, "a cable was pulled")
        return real(self, item, *rest)

    whole = merge_to_folder("ties", folders[0], folders[1:], tmp_path / "whole/out", max_shard_bytes=100)
    monkeypatch.setattr(_engine._Merge, "compute", failing)
    with pytest.raises(OSError, match="cable"):
        merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out", max_shard_bytes=100)
    first = made[:3]
    assert not (tmp_path / "out").exists()
    merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out", max_shard_bytes=100)
    assert not set(first[:2]) & set(made[4:])
    assert tree(tmp_path / "out") == tree(whole)


def test_another_merge_does_not_go_on_from_the_shards_of_the_first(family, tmp_path, monkeypatch, tree):
    _, _, folders = family
    real = _engine._Merge.compute

    def failing(self, item, *rest):
        if item.name == "model.norm.weight":
            raise OSError(5, "a cable was pulled")
        return real(self, item, *rest)

    options = {"max_shard_bytes": 100}
    whole = merge_to_folder("ties", folders[0], folders[1:], tmp_path / "whole/out", keep=0.5, **options)
    with monkeypatch.context() as patch:
        patch.setattr(_engine._Merge, "compute", failing)
        with pytest.raises(OSError, match="cable"):
            merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out", keep=0.2, **options)
    assert (tmp_path / ".out.merging").is_dir()
    merge_to_folder("ties", folders[0], folders[1:], tmp_path / "out", keep=0.5, **options)
    assert tree(tmp_path / "out") == tree(whole)


def test_a_full_disk_is_one_line_and_leaves_no_model(family, tmp_path, monkeypatch):
    _, _, folders = family
    from unfused.data import checkpoint_io

    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io._Stream, "write", full)
    with pytest.raises(DiskFull, match=r"no space left on .*: free some"):
        merge_to_folder("linear", None, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/*.tmp*"))


# ---- outputs that are in the way


def test_outputs(family, tmp_path, tree):
    _, _, folders = family
    before = [tree(folder) for folder in folders]
    with pytest.raises(ValueError, match="is the folder of an input: choose another"):
        merge_to_folder("ties", folders[0], folders[1:], folders[2])
    (tmp_path / "link").symlink_to(folders[0])
    with pytest.raises(ValueError, match="is the folder of an input"):
        merge_to_folder("ties", folders[0], folders[1:], tmp_path / "link")
    busy = tmp_path / "busy"
    busy.mkdir()
    merge_to_folder("linear", None, folders, busy)  # an empty folder is no one's
    content = tree(busy)
    merge_to_folder("linear", None, folders, busy)  # done before: nothing to do
    assert tree(busy) == content
    with pytest.raises(ValueError, match="holds the result of another merge"):
        merge_to_folder("linear", None, folders[1:], busy)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder"):
        merge_to_folder("linear", None, folders, tmp_path / "notes")
    assert tree(tmp_path / "notes") == {"diary.txt": b"dear diary"}
    assert [tree(folder) for folder in folders] == before
    assert not list(tmp_path.glob(".*"))


def test_two_processes_do_not_write_one_output(family, tmp_path):
    _, _, folders = family
    with _engine._stage(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process is merging to it"):
            merge_to_folder("linear", None, folders, tmp_path / "out")


# ---- inputs that are wrong


def spoil(family, name, tensor, which=2, config=None):
    _, models, folders = family
    shutil.rmtree(folders[which])
    changed = dict(models[which - 1])
    changed.pop(name, None)
    if tensor is not None:
        changed[name] = tensor
    save(folders[which], changed, config=config)
    return folders


FC = "model.layers.0.fc.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "line"),
    [
        (FC, None, rf"Y lacks tensor '{FC}', which .*B/model.safetensors has"),
        ("extra.weight", torch.ones(2), r"lacks tensor 'extra.weight', which .*Y/model.safetensors has"),
        (
            FC,
            torch.ones(8, 7),
            rf"tensor '{FC}' is \(8, 6\) in .*B/model.safetensors and \(8, 7\) in .*Y/model",
        ),
        (
            "model.embed_tokens.weight",
            torch.ones(21, 6),
            r"\(21, 6\) in .*: the vocabularies differ; vocab='base' or",
        ),
        (FC, torch.ones(8, 6, dtype=torch.int8), rf"Y/model.safetensors: tensor '{FC}' is torch.int8"),
        (FC, torch.ones(8, 6, dtype=torch.complex64), r"is torch.complex64: convert it to float32"),
        (FC, torch.full((8, 6), float("nan")), rf"Y/model.safetensors: tensor '{FC}' holds NaN"),
        (FC, torch.full((8, 6), float("inf")), rf"Y/model.safetensors: tensor '{FC}' holds infinities"),
    ],
)
@pytest.mark.parametrize("slug", ["task-arithmetic", "breadcrumbs"])
def test_wrong_tensors(family, tmp_path, slug, name, tensor, line, tree):
    folders = spoil(family, name, tensor)
    before = [tree(folder) for folder in folders]
    with pytest.raises(ValueError, match=line) as error:
        merge_to_folder(slug, folders[0], folders[1:], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and [tree(folder) for folder in folders] == before


def test_architectures_and_quantised_models(family, tmp_path):
    base, _, folders = family
    other = save(tmp_path / "other", {f"encoder.{i}.w": torch.ones(2) for i in range(9)})
    with pytest.raises(ValueError, match=r"share 0 of 17 tensors .*merge models of one architecture"):
        merge_to_folder("linear", None, [folders[0], other], tmp_path / "out")
    alien = save(tmp_path / "alien", base, config={"model_type": "alien"})
    with pytest.raises(ValueError, match=r"is 'tiny' and .*alien is 'alien' \(config.json\)"):
        merge_to_folder("linear", None, [folders[0], alien], tmp_path / "out")
    small = save(tmp_path / "small", base, config={"quantization_config": {"bits": 4}})
    with pytest.raises(ValueError, match=r"small is quantised \(config.json\)"):
        merge_to_folder("linear", None, [folders[0], small], tmp_path / "out")


def test_broken_files_are_found_before_anything_is_written(family, tmp_path):
    _, _, folders = family
    shard = sorted(folders[1].glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=rf"{shard.name}: tensor '.*' is cut: 2 bytes are missing"):
        merge_to_folder("linear", None, folders, tmp_path / "out")
    shard.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(ValueError, match=rf"{shard.name}: its header claims"):
        merge_to_folder("linear", None, folders, tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"index.json places tensor '.*' in {shard.name}, which is missing"):
        merge_to_folder("linear", None, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_mask_of_infinities_that_all_share_is_kept_and_integers_that_differ_are_told(tmp_path):
    mask = torch.tensor([[0.0, float("-inf")]])
    a = {"mask": mask, "w": torch.ones(2), "n": torch.tensor(3)}
    b = a | {"w": torch.zeros(2), "n": torch.tensor(4)}
    for slug in ("linear", "slerp"):
        out = merge_to_folder(
            slug, None, [save(tmp_path / f"{slug}{i}", t) for i, t in enumerate((a, b))], tmp_path / slug
        )
        found = read(out)
        assert torch.equal(found["mask"], mask) and found["n"] == 3
        assert "n (torch.int64) differs between the inputs" in (out / "README.md").read_text()


def test_too_large_for_the_type(tmp_path):
    folders = [save(tmp_path / n, {"w": torch.full((2,), 6e4)}) for n in "ab"]
    with pytest.raises(ValueError, match=r"'w' is too large for torch.float16: choose dtype='float32'"):
        merge_to_folder("linear", None, folders, tmp_path / "out", dtype="float16", normalize=False)
    with pytest.raises(ValueError, match="dtype='int8' must be one of float32"):
        merge("linear", None, folders, dtype="int8")


def test_copy_patterns_that_match_nothing(family):
    base, models, _ = family
    with pytest.raises(ValueError, match="copy='nothing' matches no tensor"):
        merge("ties", base, models, copy=["nothing"])
    with pytest.raises(ValueError, match="is not a regular expression"):
        merge("ties", base, models, copy=["("])


def test_an_input_that_shrinks_while_it_is_read(family, tmp_path, monkeypatch):
    _, _, folders = family
    real, path = _engine._resume, folders[3] / "model.safetensors"

    def cut(*given):
        os.truncate(path, path.stat().st_size - 30)
        real(*given)

    monkeypatch.setattr(_engine, "_resume", cut)
    with pytest.raises(ValueError, match=r"ends inside tensor '.*': it was cut while in use"):
        merge_to_folder("linear", None, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slug", ["ties", "slerp", "dare"])
def test_large_tensors_are_read_one_model_after_the_other(family, tmp_path, slug, monkeypatch):
    base, models, folders = family
    given = (None, models[:2]) if slug == "slerp" else (base, models)
    want = merge(slug, *given)
    monkeypatch.setattr(_engine, "LARGE", 4)
    paths = (None, folders[1:3]) if slug == "slerp" else (folders[0], folders[1:])
    equal(read(merge_to_folder(slug, *paths, tmp_path / "out")), want)
    spoil(family, FC, torch.full((8, 6), float("nan")))
    with pytest.raises(ValueError, match=rf"Y/model.safetensors: tensor '{FC}' holds NaN"):
        merge_to_folder(slug, *paths, tmp_path / "bad")
