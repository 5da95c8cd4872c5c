"""Telly: what is frozen, what that saves, the similarity curve against numpy, the depth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from unfused.adapters import choose_depth, freeze_bottom, layer_similarity

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def bert(seed=0, cls=hf.BertForSequenceClassification, **options):
    torch.manual_seed(seed)
    return cls(hf.BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **SIZES, **options))


def batch(n=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(0, 30, (n, 9), generator=draw), torch.ones(n, 9, dtype=torch.long)
    mask[::2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % 3}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_depth_is_a_count():
    model = bert()
    report = freeze_bottom(model, 2)
    names = trained(model)
    assert {n.split(".layer.")[1][0] for n in names if ".layer." in n} == {"2"}
    assert not any("embeddings" in n for n in names)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= names
    assert report.num_layers == 2 and report.total_layers == 3
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = bert()
    freeze_bottom(zero, 0)
    assert {n.split(".layer.")[1][0] for n in trained(zero) if ".layer." in n} == {"0", "1", "2"}
    assert not any("embeddings" in n for n in trained(zero))


def test_frozen_part_stays_and_has_no_dropout():
    model = bert()
    freeze_bottom(model, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bottom = []
    model.bert.encoder.layer[1].register_forward_hook(lambda m, a, out: bottom.append(out))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(bottom[0], bottom[1]) and torch.equal(bottom[0], bottom[2])
    assert not bottom[0].requires_grad
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= trained(model)
    assert model.bert.encoder.layer[2].training and not model.bert.encoder.layer[1].training


def test_dropout_is_kept_on_request():
    model = bert()
    freeze_bottom(model, 2, eval_mode=False)
    model.train()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
    assert model.bert.encoder.layer[0].training


def test_nothing_is_saved_for_the_frozen_part_even_if_embeddings_output_requires_a_gradient():
    def saved(model):
        total = [0]
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(t):
            total[0] += t.numel() * (t.data_ptr() not in parameters)
            return t

        model.train()
        model.enable_input_require_grads()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch()).loss.backward()
        return total[0]

    whole, half = bert(), bert()
    freeze_bottom(half, 2)
    assert saved(half) < 0.5 * saved(whole)


def test_gradients_of_the_rest_are_those_of_the_whole_model():
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole, half = bert(**options), bert(**options)
    freeze_bottom(half, 2)
    half = copy.deepcopy(half)  # hooks hold no reference to the original
    for model in (whole, half):
        model(**batch()).loss.backward()
    other = dict(whole.named_parameters())
    for name, parameter in half.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other[name].grad)


def test_trainable_embeddings_get_gradients_through_frozen_layers():
    model = bert()
    freeze_bottom(model, 3, embeddings=False)
    model(**batch()).loss.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert not any(".layer." in n for n in trained(model))


def test_tied_output_is_frozen_and_said():
    model = bert(cls=hf.BertForMaskedLM)
    report = freeze_bottom(model, 1)
    assert report.tied == ["cls.predictions.decoder.weight"] and "tied" in str(report)
    assert not model.cls.predictions.decoder.weight.requires_grad


def test_other_architectures():
    small = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20}
    bart = hf.BartForConditionalGeneration(hf.BartConfig(max_position_embeddings=12, pad_token_id=1, **small))
    report = freeze_bottom(bart, 1)
    names = trained(bart)
    assert not any("embed" in n and n.startswith("model.encoder") for n in names)
    assert not any(n.startswith("model.encoder.layers.0") for n in names)
    assert any(n.startswith("model.encoder.layers.1") for n in names)
    assert any(n.startswith("model.decoder.layers.0") for n in names)
    assert "lm_head.weight" in report.tied

    gpt = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9, n_positions=4))
    assert freeze_bottom(gpt, 1).tied == ["lm_head.weight"]
    assert {n.split(".")[2] for n in trained(gpt) if ".h." in n} == {"1"}
    assert not any("wpe" in n or "wte" in n for n in trained(gpt)) and "transformer.ln_f.weight" in trained(
        gpt
    )

    clip = hf.CLIPModel(
        hf.CLIPConfig(
            text_config={"vocab_size": 40, "max_position_embeddings": 8, **SIZES},
            vision_config={"image_size": 8, "patch_size": 4, **SIZES},
            projection_dim=8,
        )
    )
    freeze_bottom(clip, 2, stack="vision_model.encoder.layers")
    frozen = {n for n, p in clip.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("vision_model.") for n in frozen)
    assert (
        "vision_model.embeddings.patch_embedding.weight" in frozen
        and "vision_model.pre_layrnorm.weight" in frozen
    )
    with pytest.raises(
        ValueError, match=r"stack='encoder': the model's stacks are text_model.encoder.layers, vision_m"
    ):
        freeze_bottom(clip, 1, stack="encoder")


def test_a_frozen_decoder_carries_gradients_to_the_encoder():
    small = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
    small |= {
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "vocab_size": 20,
        "dropout": 0,
    }
    grads = []
    for freeze in (False, True):
        torch.manual_seed(0)
        bart = hf.BartForConditionalGeneration(
            hf.BartConfig(max_position_embeddings=12, pad_token_id=1, **small)
        )
        if freeze:
            freeze_bottom(bart, 2, stack="model.decoder.layers")
        ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
        bart.eval()(input_ids=ids, labels=ids).loss.backward()
        grads.append(bart.model.encoder.layers[0].fc1.weight.grad)
    torch.testing.assert_close(*grads)


def test_errors():
    with pytest.raises(ValueError, match="Sequential, which has no transformer layers"):
        freeze_bottom(nn.Sequential(nn.Linear(2, 2)), 1)
    with pytest.raises(ValueError, match=r"num_layers=4: 'bert.encoder.layer' has 3 layers"):
        freeze_bottom(bert(), 4)
    with pytest.raises(ValueError, match="compare like with like"):
        short = hf.BertModel(hf.BertConfig(vocab_size=30, **{**SIZES, "num_hidden_layers": 2}))
        layer_similarity(bert(), short, batch())


# --- similarity --------------------------------------------------------------------------------------------------


def test_similarity_against_numpy():
    one, two = bert().eval(), bert(seed=1).eval()
    two.bert.embeddings.load_state_dict(one.bert.embeddings.state_dict())
    batches = [batch(6, 0), batch(5, 1)]
    curve = layer_similarity(one.train(), two, batches)
    assert one.training, "left as it was"
    one.eval()
    triangles = []
    for model in (one, two):
        pooled = []
        for b in batches:
            inputs = {k: v for k, v in b.items() if k != "labels"}
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states
            mask = b["attention_mask"].numpy()
            pooled.append(
                np.stack(
                    [np.stack([s[i].numpy()[mask[i] == 1].mean(0) for i in range(len(mask))]) for s in states]
                )
            )
        x = np.concatenate(pooled, 1)  # (layers + 1, N, dim)
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        upper = np.triu_indices(x.shape[1])
        triangles.append([(layer @ layer.T)[upper] for layer in x])
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*triangles, strict=True)]
    np.testing.assert_allclose(curve.values, expected, atol=1e-5)
    assert len(curve) == 4 and curve.values[0] == pytest.approx(1)
    assert "similarity" in curve.table() and curve.table().count("\n") == 4
    assert curve.plot().get_ylabel() == "similarity after fine-tuning"


def test_similarity_ignores_rotation_and_scale():
    """The card: it can miss a pure change of scale."""
    one = bert().eval()
    two = copy.deepcopy(one)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    two.bert.encoder.layer[2].register_forward_hook(lambda m, a, out: 3 * out @ rotation)
    np.testing.assert_allclose(layer_similarity(one, two, batch()).values, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("curve", "depth"),
    [
        ([1.0, 1, 1, 1, 1, 1, 1, 1, 0.96, 0.89, 0.80, 0.59, 0.37], 8),  # the paper's code search
        ([1.0, 1, 1, 1, 0.97, 0.95, 0.93, 0.91, 0.89, 0.84, 0.65, 0.50, 0.27], 7),  # clone detection
        ([1.0] * 12 + [0.92], 11),  # nothing changes: one layer is trained all the same
        ([1.0, 0.8, 0.95, 0.7], 0),  # the first that falls counts
        ([0.5, 0.4], 0),
    ],
)
def test_depth(curve, depth):
    assert choose_depth(curve) == depth


def test_depth_of_no_curve():
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        choose_depth([[1.0, 0.5]])
