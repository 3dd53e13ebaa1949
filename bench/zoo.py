"""The table of models: each at the size of a test, and those that are timed at a GPU's size.

The large ones are without dropout: what is timed is what was proved, and random masks differ.
"""

from functools import partial

import torch

from bench.families import (
    WIDTH,
    WORDS,
    Decode,
    Family,
    Size,
    Words,
    autoencoder,
    captioned,
    classified,
    encoder,
    images,
    mlp,
    noisy,
    of_classes,
    of_diffusers,
    of_text,
    of_transformers,
    resnet,
    resnet_50,
    spoken,
    tokens,
)

GPT2 = of_transformers("GPT2LMHeadModel", "GPT2Config")
LLAMA = of_transformers("LlamaForCausalLM", "LlamaConfig")
BERT = of_transformers("BertForMaskedLM", "BertConfig")
T5 = of_transformers("T5ForConditionalGeneration", "T5Config")
VIT = of_transformers("ViTForImageClassification", "ViTConfig")
WHISPER = of_transformers("WhisperForConditionalGeneration", "WhisperConfig")
CLIP = of_transformers("CLIPModel", "CLIPConfig")
UNET = of_diffusers("UNet2DConditionModel")
DIT = of_diffusers("DiTTransformer2DModel")
VAE = of_diffusers("AutoencoderKL")

SMALL_GPT2 = {
    "n_layer": 2, "n_embd": WIDTH, "n_head": 4, "vocab_size": WORDS, "n_positions": 32,
}  # fmt: skip
SMALL_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS, "pad_token_id": 0,
}  # fmt: skip
# 1.2 billion parameters
LARGE_LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL_BERT = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
LARGE_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL_IMAGE = {"image_size": 16, "patch_size": 4}
# said here, or the model finds it at its first call, and is compiled anew
LARGE_VIT = {"num_labels": 1000, "problem_type": "single_label_classification"}
SMALL_T5 = {
    "d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": WORDS,
    "decoder_start_token_id": 0,
}  # fmt: skip
LARGE_T5 = {
    "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
SMALL_WHISPER = {
    "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": WORDS, "max_source_positions": 32, "num_mel_bins": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
LARGE_WHISPER = {
    "d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
}  # fmt: skip
SMALL_CLIP = {
    "text_config": {**SMALL_BERT, "vocab_size": WORDS, "eos_token_id": 2, "bos_token_id": 1},
    "vision_config": {**SMALL_BERT, **SMALL_IMAGE},
}
SMALL_UNET = {
    "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4,
    "attention_head_dim": 4,
}  # fmt: skip
LARGE_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SMALL_VAE = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
LARGE_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SMALL_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8,
    "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "num_embeds_ada_norm": 10,
}  # fmt: skip
LARGE_DIT = {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 24}

FAMILIES = {
    "gpt2": Family(
        Size(GPT2(**SMALL_GPT2), of_text()),
        Size(GPT2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), of_text(8, 1024, 50257)),
    ),
    "llama": Family(
        Size(LLAMA(**SMALL_LLAMA), of_text()),
        Size(LLAMA(**LARGE_LLAMA), of_text(1, 2048, 128256)),
    ),
    "qwen3": Family(
        Size(of_transformers("Qwen3ForCausalLM", "Qwen3Config")(**SMALL_LLAMA), of_text())
    ),
    "gemma2": Family(
        Size(of_transformers("Gemma2ForCausalLM", "Gemma2Config")(**SMALL_LLAMA), of_text())
    ),
    "mixtral": Family(
        Size(of_transformers("MixtralForCausalLM", "MixtralConfig")(**SMALL_LLAMA), of_text())
    ),
    "swin": Family(
        Size(
            of_transformers("SwinModel", "SwinConfig")(
                image_size=16, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                window_size=2,
            ),
            images(2, 3, 16, 16),
        )
    ),
    "wav2vec2": Family(
        Size(
            of_transformers("Wav2Vec2Model", "Wav2Vec2Config")(
                conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3],
                num_feat_extract_layers=2, num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, **SMALL_BERT,
            ),
            images(2, 100),
        )
    ),
    "phi3": Family(
        Size(of_transformers("Phi3ForCausalLM", "Phi3Config")(**SMALL_LLAMA), of_text())
    ),
    "bert": Family(
        Size(BERT(vocab_size=WORDS, **SMALL_BERT), of_text()),
        Size(BERT(**LARGE_BERT), of_text(16, 512, 30522)),
    ),
    "t5": Family(
        Size(T5(**SMALL_T5), of_text()),
        Size(T5(**LARGE_T5), of_text(8, 512, 32128)),
    ),
    "t5, gated": Family(Size(T5(feed_forward_proj="gated-gelu", **SMALL_T5), of_text())),
    "vit": Family(
        Size(VIT(**SMALL_BERT, **SMALL_IMAGE), classified(2, 16, 2)),
        Size(VIT(**LARGE_VIT), classified(64, 224, 1000)),
    ),
    "whisper": Family(
        Size(WHISPER(**SMALL_WHISPER), spoken(2, 8, 64, 5, WORDS)),
        Size(WHISPER(**LARGE_WHISPER), spoken(4, 80, 3000, 128, 50257)),
    ),
    "clip": Family(
        Size(CLIP(**SMALL_CLIP), captioned(2, 7, WORDS, 16)),
        Size(CLIP(), captioned(64, 77, 49408, 224)),
    ),
    "unet": Family(
        Size(UNET(**SMALL_UNET), noisy(2, 8, 5, 16)),
        Size(UNET(**LARGE_UNET), noisy(2, 64, 77, 768)),
    ),
    "autoencoder of diffusion": Family(
        Size(VAE(**SMALL_VAE), images(1, 3, 8, 8)),
        Size(VAE(**LARGE_VAE), images(2, 3, 256, 256)),
    ),
    "dit": Family(
        Size(DIT(**SMALL_DIT), of_classes(2, 8)),
        Size(DIT(**LARGE_DIT), of_classes(16, 32)),
    ),
    "transformer": Family(
        Size(encoder, images(2, 6, WIDTH)),
        Size(partial(encoder, 768, 12, 3072, 12, dropout=0.0), images(16, 512, 768)),
    ),
    "lstm": Family(
        Size(Words, partial(tokens, 3, 7)),
        Size(partial(Words, 33278, 1024, 1024, dropout=0.0), partial(tokens, 64, 128, words=33278)),
    ),
    "resnet": Family(
        Size(resnet, images(2, 3, 12, 12)),
        Size(resnet_50, images(64, 3, 224, 224, layout=torch.channels_last)),
    ),
    "autoencoder": Family(
        Size(autoencoder, images(2, 3, 8, 8)),
        Size(partial(autoencoder, 64), images(64, 3, 128, 128)),
    ),
    "mlp": Family(
        Size(mlp, images(6, WIDTH)), Size(partial(mlp, 1024, 4096, 10), images(8192, 1024))
    ),
}  # fmt: skip

# For inference alone: one more token.
DECODE = Family(
    Size(partial(Decode, LLAMA(**SMALL_LLAMA), 2, 6), partial(tokens, 2, 1)),
    Size(partial(Decode, LLAMA(**LARGE_LLAMA), 8, 2048), partial(tokens, 8, 1, words=128256)),
)
