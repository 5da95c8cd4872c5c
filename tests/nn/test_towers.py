from __future__ import annotations

from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from unfused.nn.blocks import transformer_blocks
from unfused.nn.towers import final_norms, find_tower

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PICTURE = {"image_size": 8, "patch_size": 4, **SIZES}
SPEECH = {
    "conv_dim": (8,),
    "conv_stride": (4,),
    "conv_kernel": (8,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def test_towers():
    found = {
        "vit": find_tower(ViTForImageClassification(ViTConfig(**PICTURE))),
        "ast": find_tower(ASTForAudioClassification(ASTConfig(max_length=16, num_mel_bins=16, **SIZES))),
        "clip": find_tower(
            CLIPModel(CLIPConfig(text_config={"vocab_size": 9, **SIZES}, vision_config=PICTURE))
        ),
    }
    assert [tower.class_tokens for tower in found.values()] == [1, 2, 1]
    assert (found["vit"].embeddings, found["vit"].norm) == ("vit.embeddings", "vit.layernorm")
    assert found["ast"].norm == "audio_spectrogram_transformer.layernorm"
    assert found["clip"].norm == "vision_model.post_layernorm"
    assert [block.name for block in found["clip"].blocks] == ["vision_model.encoder.layers.0"]
    assert find_tower(BertModel(BertConfig(vocab_size=9, **SIZES))) is None
    assert find_tower(LlamaModel(LlamaConfig(vocab_size=9, **SIZES))) is None


def test_final_norms():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9, n_positions=8))
    clip = CLIPModel(CLIPConfig(text_config={"vocab_size": 9, **SIZES}, vision_config=PICTURE))
    for model, names in (
        (gpt2, ["transformer.ln_f"]),
        (LlamaModel(LlamaConfig(vocab_size=9, **SIZES)), ["norm"]),
        (clip, ["text_model.final_layer_norm", "vision_model.post_layernorm"]),
        (Wav2Vec2Model(Wav2Vec2Config(**SPEECH, **SIZES)), ["encoder.layer_norm"]),
        (BertModel(BertConfig(vocab_size=9, **SIZES)), []),
    ):
        assert final_norms(model, transformer_blocks(model)) == names
