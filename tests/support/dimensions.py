"""The published dimensions of the models that tests compute memory for."""

from dataclasses import replace

from entrypoints.checkpoint.layout import ModelConfig

CHATGLM3_6B = ModelConfig(  # 12.5 GB in 16 bits
    num_layers=28,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=13696,
    vocab_size=65024,
    context_length=8192,
    rms_norm_eps=1e-5,
    rope_ratio=1,
)
GLM4_9B = replace(  # GLM-4-9B-chat: 18.8 GB in 16 bits
    CHATGLM3_6B, num_layers=40, vocab_size=151552, context_length=131072, rms_norm_eps=1.5625e-7, rope_ratio=500
)
