from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from unfused.adapters import UniPtConfig
from unfused.adapters.unipt import ConvNetwork, PooledNetwork, SequenceNetwork, TokenBatchNorm
from unfused.data.hidden_states import States

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore")


def bert(kind=hf.BertModel, **options):
    torch.manual_seed(0)
    return kind(
        hf.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **SIZES, **options)
    ).eval()


def llama(kind=hf.LlamaForCausalLM):
    torch.manual_seed(0)
    return kind(
        hf.LlamaConfig(vocab_size=30, max_position_embeddings=16, num_key_value_heads=2, **SIZES)
    ).eval()


def clip(eos=29):
    torch.manual_seed(0)
    config = hf.CLIPConfig(
        text_config={"vocab_size": 30, "max_position_embeddings": 16, "eos_token_id": eos, **SIZES},
        vision_config={"image_size": 8, "patch_size": 4, **SIZES},
        projection_dim=8,
    )
    return hf.CLIPModel(config).eval()


def resnet(sizes=(8, 12, 16)):
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=list(sizes),
        depths=[1] * len(sizes),
        layer_type="basic",
        num_labels=3,
    )
    return hf.ResNetForImageClassification(config).eval()


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, UniPtConfig(**options)).eval()


def network(model, kind=SequenceNetwork):
    return next(module for module in model.modules() if isinstance(module, kind))


def tokens(items=2, length=5, seed=0):
    return torch.randint(1, 28, (items, length), generator=torch.Generator().manual_seed(seed))


# -- the mathematics, in numpy and one sample, layer and token at a time -------------------------------------------------


def array(x):
    return x.detach().double().numpy()


def linear(layer, x):
    return x @ array(layer.weight).T + array(layer.bias)


def layer_norm(layer, x):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return y * array(layer.weight) + array(layer.bias)


def l1(row):
    return row / max(np.abs(row).sum(), 1e-6)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_sequence(net, hidden, mask, wide=False):
    """One sample: hidden states (N, d) of each layer, mask (N,)."""
    z = [layer_norm(down[1], linear(down[0], array(h))) for down, h in zip(net.down, hidden, strict=True)]
    anchor, keys, mask = z[-1], z[:-1], array(mask)
    found, confidence = [], []
    for one in keys:
        f = np.zeros_like(one)
        for n in range(len(one)):
            scores = np.array([anchor[n] @ one[k] * mask[k] for k in range(len(one))])
            weights = l1(np.maximum(scores, 0))
            weights[n] += 1  # the identity
            f[n] = sum(weights[k] * one[k] for k in range(len(one)))
        found.append(f)
        mean_a, mean_z = ((x * mask[:, None]).sum(0) / mask.sum() for x in (anchor, one))
        confidence.append(linear(net.gate, mean_a * mean_z)[0])
    mixed = sum(c * f for c, f in zip(softmax(np.array(confidence)), found, strict=True))
    if wide:
        inner = linear(net.mix[2], np.maximum(linear(net.mix[0], mixed), 0))
        return linear(net.up, anchor + layer_norm(net.mix[3], inner))
    out = anchor + layer_norm(net.mix[1], linear(net.mix[0], mixed))
    return linear(net.up[1], np.maximum(out, 0))


@pytest.mark.parametrize("wide", [False, True])
def test_sequence_form(wide):
    torch.manual_seed(0)
    net = SequenceNetwork([12] * 4, 6, 10, wide, nn.LayerNorm)
    hidden = [torch.randn(3, 5, 12) for _ in range(4)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    out = net(States(hidden, mask))
    assert out.shape == (3, 5, 10)
    for b in range(3):
        want = naive_sequence(net, [h[b] for h in hidden], mask[b], wide)
        assert np.allclose(array(out[b]), want, atol=1e-5)


def test_a_row_without_agreement_is_rescued_by_the_identity():
    net = SequenceNetwork([2, 2], 2, 2, False, nn.LayerNorm)
    z = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    from unfused.adapters.unipt import _attend

    assert torch.equal(_attend(-z, z, torch.ones(1, 1, 1, 2)), torch.zeros_like(z))
    assert net(States([torch.randn(1, 2, 2)] * 2)).isfinite().all()


def test_pooled_form():
    torch.manual_seed(0)
    net = PooledNetwork([12] * 3, 4, 8)
    hidden, h = [torch.randn(2, 5, 12) for _ in range(3)], torch.randn(2, 8)
    mask, at = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), torch.tensor([4, 2])
    out = net(States(hidden, mask, h, at))
    for b in range(2):
        z = [linear(down, np.maximum(array(x[b]), 0)) for down, x in zip(net.down, hidden, strict=True)]
        anchor, found, confidence = linear(net.anchor, np.maximum(array(h[b]), 0)), [], []
        for one in z:
            weights = l1(np.maximum(one @ anchor * array(mask[b]), 0))
            found.append(weights @ one + one[at[b]])
            confidence.append(linear(net.gate, anchor * (one[: mask[b].sum()]).mean(0))[0])
        mixed = sum(c * f for c, f in zip(softmax(np.array(confidence)), found, strict=True))
        assert np.allclose(array(out[b]), array(h[b]) + linear(net.up, np.maximum(mixed, 0)), atol=1e-5)


def test_conv_form():
    torch.manual_seed(0)
    net = ConvNetwork([3, 4, 6], 4, 8).eval()
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)]
    pooled = []
    for x, guide, q in zip(maps, net.guides, (4, 2), strict=False):
        g = F.interpolate(F.relu(guide(maps[-1])), scale_factor=q, mode="nearest")
        cells = F.unfold((g * x).sum(1, keepdim=True), q, stride=q).relu()  # (B, q q, cells)
        weights = cells / cells.sum(1, keepdim=True).clamp_min(1e-6)
        weights = F.fold(weights, x.shape[-2:], q, stride=q) + 1 / q**2
        pooled.append(F.avg_pool2d(weights * x, q, divisor_override=1))
    found = net.mixer(States([x.flatten(2).mT for x in (*pooled, maps[-1])])).mT.unflatten(2, (2, 2))
    assert torch.allclose(net(States(maps)), found, atol=1e-5)
    uneven = net(States([torch.randn(2, 3, 7, 9), torch.randn(2, 4, 4, 5), torch.randn(2, 6, 2, 3)]))
    assert uneven.shape == (2, 8, 2, 3)
    norm = TokenBatchNorm(4)  # a batch norm over items and positions, as behind a 1x1 convolution
    x = torch.randn(3, 5, 4)
    assert torch.allclose(norm(x), F.batch_norm(x.mT, None, None, training=True).mT, atol=1e-5)


# -- in a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_it_reads_the_hidden_states_that_transformers_gives(kind):
    torch.manual_seed(0)
    if kind == "bert":
        base, batch = bert(), {"input_ids": tokens(), "attention_mask": torch.ones(2, 5).long()}
    elif kind == "vit":
        base = hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **SIZES)).eval()
        batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        base = hf.GPT2Model(hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2)).eval()
        batch = {"input_ids": tokens()}
    with torch.no_grad():
        plain = base(**batch, output_hidden_states=True)
        hidden = [*plain.hidden_states[:-1], plain.last_hidden_state]
        model = adapt(base)
        out = model(**batch).last_hidden_state
        expected = network(model)(States(hidden, batch.get("attention_mask")), causal=kind == "gpt2")
    assert len(hidden) == 4 and torch.allclose(out, expected, atol=1e-5)


def test_the_pooler_and_the_head_see_the_adapted_states():
    model = adapt(bert(hf.BertForSequenceClassification), modules_to_save=["classifier"])
    out = model(input_ids=tokens(), labels=torch.tensor([0, 2]))
    out.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("unfused_unipt_net" in n for n in trained) and any("classifier" in n for n in trained)
    assert all("unfused_unipt_net" in n or "modules_to_save" in n for n in trained)


def test_padding_changes_nothing():
    model, ids = adapt(bert()), tokens()
    with torch.no_grad():
        short = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        padded = F.pad(ids, (0, 3))
        long = model(input_ids=padded, attention_mask=(padded > 0).long()).last_hidden_state
    assert torch.allclose(short, long[:, :5], atol=1e-5)


@pytest.mark.parametrize("kind", [hf.GPT2LMHeadModel, hf.LlamaForCausalLM])
def test_a_causal_model_stays_causal(kind):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)
    base = llama() if kind is hf.LlamaForCausalLM else kind(config).eval()
    model, ids = adapt(base), tokens(1, 6)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for end in (1, 3, 5):
            assert torch.allclose(model(input_ids=ids[:, :end]).logits, whole[:, :end], atol=1e-5)
        padded = F.pad(ids, (2, 0))
        left = model(
            input_ids=padded,
            attention_mask=(padded > 0).long(),
            position_ids=torch.arange(8)[None].sub(2).clamp(0),
        )
        assert torch.allclose(left.logits[:, 2:], whole, atol=1e-4)
        greedy = model.generate(
            input_ids=ids, max_new_tokens=2, do_sample=False, use_cache=False, pad_token_id=0
        )
        first = whole[0, -1].argmax()
        second = model(input_ids=torch.cat([ids, first.view(1, 1)], 1)).logits[0, -1].argmax()
    assert greedy[0, 6:].tolist() == [first, second]
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, use_cache=True, pad_token_id=0)


@pytest.mark.parametrize("eos", [29, 2])
def test_clip_asks_for_the_token_that_clip_pools(eos):
    base = clip(eos)
    model = adapt(base, form="pooled", reduction_factor=1)
    layer = base.text_projection
    seen = []
    layer.keep = seen.append
    ids = torch.tensor([[1, 5, 29, 0, 0], [1, 5, 6, 7, 29]])
    with torch.no_grad():
        base.get_text_features(input_ids=ids)
        layer.keep = None
        assert seen[0].summary.tolist() == [2, 4] and len(seen[0].hidden) == 4
        last = base.text_model.final_layer_norm(seen[0].hidden[-1])[torch.arange(2), seen[0].summary]
        assert torch.allclose(layer.get_base_layer()(last), seen[0].anchor, atol=1e-5)
        batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
        with model.disable_adapter():
            plain = model(**batch)
        out = model(**batch)
    for one in ("text_embeds", "image_embeds"):
        assert not torch.equal(getattr(out, one), getattr(plain, one))
    assert {layer.site.name for layer in model.base_model._layers()} == {
        "text_projection",
        "visual_projection",
    }
    one = adapt(clip(), form="pooled", target_modules=["visual_projection"])
    assert [layer.site.name for layer in one.base_model._layers()] == ["visual_projection"]


# -- no backward, no training of the backbone ------------------------------------------------------------------------------


def saved_bytes(model, batch):
    """What autograd keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(seen.values())


def test_nothing_of_the_backbone_is_kept_for_a_backward_pass():
    sizes = {**SIZES, "num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256}
    config = hf.BertConfig(vocab_size=30, max_position_embeddings=64, num_labels=3, **sizes)
    batch = {"input_ids": tokens(8, 64), "labels": torch.zeros(8).long()}
    model = get_peft_model(
        hf.BertForSequenceClassification(config), UniPtConfig(modules_to_save=["classifier"])
    ).train()
    model.enable_input_require_grads()  # what gradient checkpointing asks for
    backbone = model.get_base_model().bert
    calls = []
    for part in (backbone.embeddings, *backbone.encoder.layer):
        part = getattr(part, "base_layer", part)
        part.register_forward_hook(lambda m, a, out: calls.append((m.training, out.requires_grad)))
    ours = saved_bytes(model, batch)
    assert calls[1:] == [(False, False)] * 6
    targets = LoraConfig(target_modules=["query", "value"], r=8, modules_to_save=["classifier"])
    lora = saved_bytes(get_peft_model(hf.BertForSequenceClassification(config), targets).train(), batch)
    hidden = 7 * 8 * 64 * 64 * 4  # the states themselves
    assert hidden < ours < 0.4 * lora


def test_backbone_stays_in_eval_mode():
    model = adapt(resnet(), form="conv", modules_to_save=["classifier"]).train()
    norms = [m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    own = network(model, TokenBatchNorm)
    mean = own.running_mean.clone()
    model(pixel_values=torch.randn(4, 1, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(torch.equal(m.running_mean, was) for m, was in zip(norms, before, strict=True))
    assert own.training and not torch.equal(own.running_mean, mean)
    dropping = adapt(bert(hidden_dropout_prob=0.5)).train()
    ids = tokens()
    assert torch.equal(dropping(input_ids=ids).last_hidden_state, dropping(input_ids=ids).last_hidden_state)


# -- kept hidden states ----------------------------------------------------------------------------------------------------


def collate(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_states_give_the_same_features(dtype, tmp_path):
    model = adapt(bert())
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    states = model.cache(rows, tmp_path, batch_size=3, collate_fn=collate, dtype=dtype)
    assert (
        len(states) == 4 and states.about.items() >= {"site": "encoder.layer.2", "form": "sequence"}.items()
    )
    assert len({p.stat().st_size for p in states.folder.glob("layer-*.bin")}) == 1
    with torch.no_grad():
        found, batch = model.forward_cached(states, [3, 0])
        want = model(**collate([rows[3], rows[0]])).last_hidden_state
    assert batch.mask.sum(1).tolist() == [2, 3] and found.shape == want.shape
    real = batch.mask
    assert torch.allclose(found[real], want[real], atol=1e-5 if dtype == "float32" else 2e-2)


def test_cached_embeddings_and_maps():
    model = adapt(resnet(), form="conv")
    images = [{"pixel_values": torch.randn(1, 32, 32), "labels": i} for i in range(3)]
    with torch.no_grad():
        found, _ = model.forward_cached(model.cache(images, batch_size=2), [2, 1])
        pixels = torch.stack([images[2]["pixel_values"], images[1]["pixel_values"]])
        want = model.get_base_model().resnet(pixels).last_hidden_state
    assert torch.allclose(found, want, atol=1e-5)
    model = adapt(clip(), form="pooled")
    pairs = [
        {"input_ids": [0, 1, 5, 29, 3], "attention_mask": [0, 1, 1, 1, 1]},
        {"input_ids": [1, 5, 6, 7, 29], "attention_mask": [1] * 5},
    ]
    pairs = [{**pair, "pixel_values": torch.randn(3, 8, 8)} for pair in pairs]
    both = model.cache(pairs)
    assert set(both) == {"text_projection", "visual_projection"}
    with torch.no_grad():
        batch = hf.default_data_collator(pairs)
        want = model.get_base_model().get_text_features(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        found, kept = model.forward_cached(both["text_projection"], [0, 1])
    assert kept.summary.tolist() == [2, 4]  # padding before the text is not counted
    assert torch.allclose(found, want.pooler_output, atol=1e-5)


def test_training_on_cached_states():
    model, rows = adapt(bert()), tokens(40, 6)
    labels = (rows[:, 0] > 14).long()
    states = model.cache([{"input_ids": row} for row in rows])
    base = [p.clone() for p in model.get_base_model().embeddings.parameters()]
    model.get_base_model().embeddings.register_forward_hook(lambda *a: pytest.fail("the backbone ran"))
    losses = model.fit_cached(states, labels, nn.Linear(16, 2), epochs=25, lr=1e-2, batch_size=20)
    assert len(losses) == 25 and losses[-1] < 0.3 * losses[0]
    assert all(
        torch.equal(a, b) for a, b in zip(base, model.get_base_model().embeddings.parameters(), strict=True)
    )
    per_token = model.fit_cached(states, rows % 2, nn.Linear(16, 2), epochs=3, lr=1e-2, pooling=None)
    assert per_token[-1] < per_token[0]
    assert model.fit_cached(states, labels, nn.Linear(16, 2), epochs=1, pooling="last")
    one, two = (copy.deepcopy(model) for _ in range(2))
    head = nn.Linear(16, 2)
    heads = copy.deepcopy(head), copy.deepcopy(head)
    assert one.fit_cached(states, labels, heads[0], epochs=2, seed=3) == two.fit_cached(
        states, labels, heads[1], epochs=2, seed=3
    )
    with pytest.raises(ValueError, match="2 for 40 items"):
        model.fit_cached(states, labels[:2], head)
    with pytest.raises(ValueError, match="pooling='max'"):
        model.fit_cached(states, labels, head, pooling="max")
    with pytest.raises(ValueError, match="the active UniPT adapter sits on layernorm"):
        adapt(hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **SIZES))).forward_cached(states, [0])


def test_states_of_another_backbone_are_refused():
    model = adapt(bert())
    states = model.cache([{"input_ids": [1, 2]}])
    model.forward_cached(states, [0])
    again = model.cache([{"input_ids": [1, 2]}])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "unfused_unipt" in n).add_(1.0)
    model.forward_cached(again, [0])  # the adapter's own weights may change
    third = model.cache([{"input_ids": [1, 2]}])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "unfused_unipt" not in n).add_(1.0)
    with pytest.raises(ValueError, match="backbone with other weights: run `cache` again"):
        model.forward_cached(third, [0])


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "graph"}, "form='graph'"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"output_size": 0}, "output_size=0"),
        ({"form": "conv", "wide": True}, "wide=True"),
        ({"form": "pooled", "output_size": 8}, "they have one size"),
        ({"layers_to_transform": 1}, "reads every layer"),
    ],
)
def test_what_a_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        UniPtConfig(**options)


def test_what_a_model_refuses():
    with pytest.raises(ValueError, match="does not divide the output size 16"):
        adapt(bert(), reduction_factor=3)
    with pytest.raises(ValueError, match="a CNN wants form='conv'"):
        adapt(resnet())
    with pytest.raises(ValueError, match="no list of stages"):
        adapt(bert(), form="conv")
    with pytest.raises(ValueError, match="no pooler"):
        adapt(llama(), form="pooled")
    with pytest.raises(ValueError, match=r"goes on encoder\.layer\.2, not on"):
        adapt(bert(), target_modules=["encoder.layer.1"])
    model = adapt(bert())
    with pytest.raises(ValueError, match="has adapters of form 'sequence' already"):
        model.add_adapter("other", UniPtConfig(form="pooled", target_modules=["encoder.layer.2"]))
    with pytest.raises(ValueError, match="UniPT takes"):
        model(input_ids=tokens(), attention_mask=torch.ones(2, 1, 5, 5))
    with model.disable_adapter(), pytest.raises(ValueError, match="no UniPT adapter is active"):
        model.cache([{"input_ids": [1]}])


def test_another_output_size_and_unload():
    with pytest.raises(ValueError, match="output_size=6: the model's pooler takes 16"):
        adapt(bert(), output_size=6)
    model = adapt(bert(functools.partial(hf.BertModel, add_pooling_layer=False)), output_size=6)
    assert model(input_ids=tokens()).last_hidden_state.shape == (2, 5, 6)
    base = bert()
    with torch.no_grad():
        expected = base(input_ids=tokens()).last_hidden_state
        plain = adapt(base).unload()
        assert torch.equal(plain(input_ids=tokens()).last_hidden_state, expected)
    assert not plain._forward_pre_hooks and plain.train().encoder.layer[0].training
