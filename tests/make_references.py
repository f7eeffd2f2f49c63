#!/usr/bin/env python3
"""Makes tests/data/references: tiny random models of every architecture, with the logits that the
model's own class computes for them in float64. By hand, not in CI:

    pip install torch transformers sentencepiece
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python   (unpack it)
    make_references.py .../vendor/llama.cpp tests/data/references [--f32 FOLDER] [NAME ...]

The class is that of PyPI's `transformers`, with random weights; norms and biases are moved away
from their starts, so that none of them can be forgotten. What `save_pretrained` writes goes through
llama.cpp's own converter, so the files are laid out as publishers lay them out. NAME.gguf has F16
matrices whose values are exact (a test widens them to F32), NAME.logits the logits of 64 positions
as raw binary32: of the ids (i * 37 + 11) % n_vocab for i = 0 .. 63, each as the last of its text.

--f32 FOLDER writes there each file with F32 matrices too. listing.txt gets the keys and tensors of
all files; what the classes compute is written down in README.md beside it.
"""

import argparse
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile
import traceback

import numpy as np
import safetensors.torch
import torch
import transformers

VOCAB = 260
POSITIONS = 64

# What most of the classes call it: heads of a size that is not n_embd / heads, groups of 2.
USUAL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=5,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12,
             max_position_embeddings=128, bos_token_id=257, eos_token_id=258, pad_token_id=259,
             tie_word_embeddings=False)
# Classes without a size of heads of their own.
PLAIN = {**{key: value for key, value in USUAL.items() if key != "head_dim"}}

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
FEW = dict(num_hidden_layers=3)  # layers, where experts make them large


def rope(theta=10000.0, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


LLAMA3 = rope(500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
# With a base of 1000 the ramp begins and ends between two whole numbers, in the middle of the head.
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=2.0,
            beta_slow=0.1)


def layer_types(pattern):
    return {"layer_types": [{"s": "sliding_attention", "f": "full_attention"}[c] for c in pattern]}


def long_rope(half, original, **more):
    return {"rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [1.0 + 0.9 * i for i in range(half)],
        "original_max_position_embeddings": original, **more},
        "original_max_position_embeddings": original}


# Name: (class, its configuration, what config.json needs beside it for the converter).
CASES = {
    "llama": ("LlamaForCausalLM", {**USUAL, **rope()}, {}),
    "llama-rope3": ("LlamaForCausalLM", {**USUAL, **FEW, **LLAMA3}, {}),
    "llama-linear": ("LlamaForCausalLM", {**PLAIN, **FEW, **rope(rope_type="linear", factor=4.0),
                                          "tie_word_embeddings": True}, {}),
    "llama-yarn": ("LlamaForCausalLM", {**USUAL, **FEW, **rope(1000.0, **YARN)}, {}),
    "mistral": ("MistralForCausalLM", {**USUAL, **rope(), "sliding_window": 24},
                {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {**PLAIN, **rope(1e6), "num_attention_heads": 2,
                                   "num_key_value_heads": 1}, {}),
    "qwen3": ("Qwen3ForCausalLM", {**USUAL, **FEW, **rope(1e6)}, {}),
    "gemma": ("GemmaForCausalLM", {**USUAL, **FEW, **rope(), "num_key_value_heads": 1,
                                   "hidden_activation": "gelu_pytorch_tanh",
                                   "tie_word_embeddings": True}, {}),
    "gemma2": ("Gemma2ForCausalLM", {**USUAL, **rope(), "sliding_window": 20,
                                     "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
                                     "final_logit_softcapping": 3.0,
                                     "tie_word_embeddings": True}, {}),
    # Which of them the 27B is, only the number of its layers says: its query scale is another.
    "gemma2-27b": ("Gemma2ForCausalLM", {
        **USUAL, **rope(), "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 46,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 20,
        "query_pre_attn_scalar": 8, "tie_word_embeddings": True}, {}),
    "gemma3": ("Gemma3ForCausalLM", {
        **USUAL, "num_hidden_layers": 7, "sliding_window": 20, "query_pre_attn_scalar": 12,
        **layer_types("sssssfs"), "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}, {}),
    "phi3": ("Phi3ForCausalLM", {**PLAIN, **rope(original_max_position_embeddings=128),
                                 "original_max_position_embeddings": 128, "sliding_window": 24},
             {}),
    "phi3-short": ("Phi3ForCausalLM", {**PLAIN, **FEW, **long_rope(4, 96)}, {}),
    "phi4-mini": ("Phi3ForCausalLM", {**PLAIN, "num_hidden_layers": 4,
                                      **long_rope(3, 16, partial_rotary_factor=0.75),
                                      "tie_word_embeddings": True}, {}),
    "phi2": ("PhiForCausalLM", {**PLAIN, **FEW, "intermediate_size": 128,
                                "num_key_value_heads": 4,
                                **rope(partial_rotary_factor=0.5)}, {}),
    "smollm3": ("SmolLM3ForCausalLM", {**PLAIN, **rope(2e6), "no_rope_layer_interval": 4,
                                       "use_sliding_window": False,
                                       "tie_word_embeddings": True}, {}),
    "olmo2": ("Olmo2ForCausalLM", {**PLAIN, **FEW, **rope(500000.0)}, {}),
    "olmo3": ("Olmo3ForCausalLM", {
        **PLAIN, **layer_types("sssfs"), "sliding_window": 20,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000.0, **YARN},
            "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"}}}, {}),
    "granite": ("GraniteForCausalLM", {**PLAIN, **FEW, **rope(), "embedding_multiplier": 3.0,
                                       "residual_multiplier": 0.4, "logits_scaling": 2.5,
                                       "attention_multiplier": 0.21,
                                       "tie_word_embeddings": True}, {}),
    "glm4": ("Glm4ForCausalLM", {**USUAL, **FEW, "attention_bias": True,
                                 **rope(partial_rotary_factor=0.5)}, {}),
    "exaone4": ("Exaone4ForCausalLM", {**PLAIN, **layer_types("sssfs"), "sliding_window": 20,
                                       "sliding_window_pattern": "LLLG", **LLAMA3}, {}),
    "exaone4-full": ("Exaone4ForCausalLM", {**PLAIN, "num_hidden_layers": 2, **rope(1e6),
                                            "sliding_window": None,
                                            "sliding_window_pattern": None,
                                            **layer_types("ff"),
                                            "tie_word_embeddings": True}, {}),
    "cohere2": ("Cohere2ForCausalLM", {**PLAIN, **rope(50000.0), **layer_types("sssfs"),
                                       "sliding_window": 20, "logit_scale": 0.25,
                                       "tie_word_embeddings": True}, {"rotary_pct": 1.0}),
    "command-r": ("CohereForCausalLM", {**PLAIN, **FEW, **rope(), "logit_scale": 0.25,
                                        "tie_word_embeddings": True}, {}),
    "command-r-plus": ("CohereForCausalLM", {**PLAIN, "num_hidden_layers": 2, **rope(),
                                             "logit_scale": 0.5, "use_qk_norm": True,
                                             "tie_word_embeddings": True}, {}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**USUAL, **FEW, **rope(500000.0),
                                         "tie_word_embeddings": True}, {}),
    "hunyuan-dense": ("HunYuanDenseV1ForCausalLM", {
        **USUAL, **FEW, **rope(rope_type="dynamic", alpha=1000.0, factor=1.0),
        "max_position_embeddings": 32768, "tie_word_embeddings": True}, {}),
    "seed_oss": ("SeedOssForCausalLM", {**USUAL, **FEW, **rope(1e7), "attention_bias": True,
                                        "attention_out_bias": False}, {}),
    "minicpm": ("GraniteForCausalLM", {
        **PLAIN, **FEW, **rope(), "embedding_multiplier": 5.0, "logits_scaling": 4.0,
        "residual_multiplier": 1.4 / 3 ** 0.5, "attention_multiplier": 8 ** -0.5,
        "tie_word_embeddings": True}, {}),
    "internlm2": ("LlamaForCausalLM", {**PLAIN, **FEW, **rope(1e6)}, {}),
    "stablelm": ("StableLmForCausalLM", {**PLAIN, **FEW, **rope(partial_rotary_factor=0.5),
                                         "use_qkv_bias": True}, {}),
    "stablelm-parallel": ("StableLmForCausalLM", {
        **PLAIN, "num_hidden_layers": 2, **rope(partial_rotary_factor=0.25),
        "use_parallel_residual": True, "qk_layernorm": True}, {}),
    "starcoder2": ("Starcoder2ForCausalLM", {**PLAIN, **FEW, **rope(1e6), "use_bias": True,
                                             "tie_word_embeddings": True}, {}),
    "nemotron": ("NemotronForCausalLM", {**PLAIN, **FEW, **rope(partial_rotary_factor=0.5)}, {}),
    "apertus": ("ApertusForCausalLM", {**PLAIN, **FEW, **LLAMA3}, {}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 32,
                                 "n_layer": 3, "n_head": 4, "bos_token_id": 257,
                                 "eos_token_id": 258}, {"n_ctx": 128}),
    "gptneox": ("GPTNeoXForCausalLM", {**PLAIN, **FEW, **rope(partial_rotary_factor=0.5)},
                {"rotary_pct": 0.5}),
    "gptneox-serial": ("GPTNeoXForCausalLM", {
        **PLAIN, "num_hidden_layers": 2, **rope(partial_rotary_factor=1.0),
        "use_parallel_residual": False}, {"rotary_pct": 1.0}),
    "falcon": ("FalconForCausalLM", {**PLAIN, **FEW, **rope(),
                                     "tie_word_embeddings": True}, {"num_kv_heads": 1}),
    "falcon-40b": ("FalconForCausalLM", {**PLAIN, "num_hidden_layers": 2, **rope(),
                                         "new_decoder_architecture": True, "num_kv_heads": 2,
                                         "tie_word_embeddings": False}, {}),
    "mistral3": ("Ministral3ForCausalLM", {
        **USUAL, **FEW, **rope(1000.0, **YARN, mscale=1.0, mscale_all_dim=1.0,
                               llama_4_scaling_beta=0.1, max_position_embeddings=128)}, {}),
    "mixtral": ("MixtralForCausalLM", {**USUAL, **FEW, **rope(1e6), "num_local_experts": 4,
                                       "intermediate_size": 20, "num_experts_per_tok": 2,
                                       "sliding_window": None}, {}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {
        **PLAIN, **FEW, **rope(1e6), "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
        "norm_topk_prob": False}, {}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**USUAL, **FEW, **rope(1e6), "num_experts": 8,
                                         "num_experts_per_tok": 3, "moe_intermediate_size": 12,
                                         "norm_topk_prob": True}, {}),
    "gpt-oss": ("GptOssForCausalLM", {
        **USUAL, **FEW, "num_hidden_layers": 4, "intermediate_size": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 20,
        **rope(1000.0, **{**YARN, "factor": 8.0}, truncate=False)}, {}),
    "granitemoe": ("GraniteMoeForCausalLM", {
        **PLAIN, **FEW, **rope(), "intermediate_size": 12, "num_local_experts": 6,
        "num_experts_per_tok": 3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
        "logits_scaling": 2.5, "attention_multiplier": 0.21, "tie_word_embeddings": True}, {}),
    "olmoe": ("OlmoeForCausalLM", {**PLAIN, **FEW, **rope(), "intermediate_size": 12,
                                   "num_experts": 6, "num_experts_per_tok": 3,
                                   "norm_topk_prob": False}, {}),
    "glm4moe": ("Glm4MoeForCausalLM", {
        **USUAL, **FEW, **rope(1e6, partial_rotary_factor=0.5), "attention_bias": True,
        "use_qk_norm": True, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True}, {"num_nextn_predict_layers": 1}),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM", {
        **PLAIN, **FEW, **rope(500000.0), "moe_num_experts": 6, "moe_k": 2,
        "moe_intermediate_size": 10, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_interval": 1, "tie_word_embeddings": True}, {}),
    "bailingmoe2": ("Glm4MoeForCausalLM", {
        **USUAL, **FEW, **rope(600000.0, partial_rotary_factor=0.5), "use_qk_norm": True,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True}, {}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {
        **USUAL, **FEW, **rope(5e6, partial_rotary_factor=0.5), "intermediate_size": 12,
        "num_local_experts": 6, "num_experts_per_tok": 2}, {"rotary_dim": 6}),
}


def as_minicpm(tensors, config):
    """MiniCPM's own class is not on PyPI; it is Granite's with other words for its scales."""
    config.update(architectures=["MiniCPMForCausalLM"], model_type="minicpm", scale_emb=5.0,
                  scale_depth=1.4, dim_model_base=8, rope_theta=10000.0)
    return tensors


def as_internlm2(tensors, config):
    """Llama's, but that the heads of a group lie together: its queries, its key, its value."""
    config.update(architectures=["InternLM2ForCausalLM"], model_type="internlm2", rope_theta=1e6)
    names = {"embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo",
             "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "lm_head": "output"}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"]
    out = {}
    for name, value in tensors.items():
        if ".q_proj" in name:
            parts = [value.reshape(groups, -1, width)]
            parts += [tensors[name.replace("q_proj", other)].reshape(groups, -1, width)
                      for other in ("k_proj", "v_proj")]
            name = name.replace("self_attn.q_proj", "attention.wqkv")
            value = torch.cat(parts, dim=1).reshape((heads + 2 * groups) * (width // heads), width)
        elif "k_proj" in name or "v_proj" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = value.contiguous()
    return out


def as_bailing(tensors, config):
    """Ling 2.0, whose own class is not on PyPI: GLM-4.5's with q, k and v in one matrix."""
    config.update(architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe",
                  num_experts=config["n_routed_experts"], num_shared_experts=1,
                  num_nextn_predict_layers=0, rope_theta=600000.0, partial_rotary_factor=0.5,
                  use_qk_norm=True)
    names = {"self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.query_layernorm",
             "self_attn.k_norm": "attention.key_layernorm", "embed_tokens": "word_embeddings",
             "gate.e_score_correction_bias": "gate.expert_bias"}
    out = {}
    for name, value in tensors.items():
        if ".q_proj" in name:
            value = torch.cat([value] + [tensors[name.replace("q_proj", other)]
                                         for other in ("k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attention.query_key_value")
        elif "k_proj" in name or "v_proj" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = value.contiguous()
    return out


def with_next_token_layer(tensors, config):
    """One more layer at the end, as published: it is of no use to who predicts a token only."""
    last, width = config["num_hidden_layers"], config["hidden_size"]
    config["num_nextn_predict_layers"] = 1
    out = dict(tensors)
    for name, value in tensors.items():
        if f"layers.{last - 1}." in name:
            out[name.replace(f"layers.{last - 1}.", f"layers.{last}.")] = value.clone()
    prefix = f"model.layers.{last}."
    out[prefix + "eh_proj.weight"] = torch.randn(width, 2 * width)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        out[prefix + norm + ".weight"] = torch.randn(width)
    return out


def with_stacked_norms(tensors, config):
    """One matrix for the norms of all heads, which the converter means to make and forgets."""
    out = {}
    for name, value in tensors.items():
        stem, found, _ = name.partition(".norms.")
        if not found:
            out[name] = value
        elif name.endswith(".norms.0.weight"):
            heads = range(sum(other.startswith(stem + ".norms.") for other in tensors))
            out[stem + ".weight"] = torch.stack([tensors[f"{stem}.norms.{i}.weight"]
                                                 for i in heads])
    return out


CHANGES = {"stablelm-parallel": with_stacked_norms, "minicpm": as_minicpm,
           "internlm2": as_internlm2, "bailingmoe2": as_bailing,
           "glm4moe": with_next_token_layer}


def load_converter(folder):
    """llama.cpp's converter, whose tokenizer is answered as GPT-2's whatever the model."""
    sys.path[:0] = [str(folder / "gguf-py"), str(folder)]
    from conversion.base import TextModel

    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def save_tokenizer(folder):
    """Byte level: the 256 bytes, a merge (there has to be one) and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="</s>")
    assert len(fast) == VOCAB
    fast.save_pretrained(folder)


@torch.no_grad()
def randomize(model, seed):
    """Matrices of such a size that attention and gates are neither flat nor hard, exact in F16."""
    torch.manual_seed(seed)
    named = list(model.named_parameters())
    named += [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, value in named:
        noise = torch.randn(value.shape)
        if value.dim() == 1:
            value.add_(0.25 * noise)
            if model.config.num_hidden_layers > 40 and "post_" in name:
                value.sub_(0.8)  # or rounding in one layer is large after that many
            continue
        embedding = value.shape[0] == VOCAB and not model.config.tie_word_embeddings
        size = 1.0 if embedding and "head" not in name else 1.3 / math.sqrt(value.shape[-1])
        if model.config.model_type == "gpt_oss" and name.endswith("gate_up_proj"):
            size *= 4  # so that both ends of the clamp are met
        value.copy_((size * noise).half().float())


def make_model(name, class_name, settings):
    cls = getattr(transformers, class_name)
    config = cls.config_class(**settings)
    for key in EPSILONS:
        if hasattr(config, key) and name != "olmoe":  # of which the converter writes 1e-5
            setattr(config, key, 2e-3)  # large enough that the logits show it
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = cls(config).eval().float()
    randomize(model, sum(name.encode()))
    return model


def change(folder, function):
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = function(tensors, config)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def convert(folder, out, file_type, extra):
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel, gguf

    hparams = ModelBase.load_hparams(folder, False)
    hparams.update(extra)
    cls = get_model_class(get_model_architecture(hparams, ModelType.TEXT), mmproj=False)
    for part in [kind for kind in subclasses(TextModel) if "set_vocab" in vars(kind)]:
        part.set_vocab = lambda self: self._set_vocab_gpt2()
    with torch.inference_mode():
        writer = cls(folder, getattr(gguf.LlamaFileType, file_type), out, hparams=hparams,
                     model_name="tiny")
        if "sliding_window" in extra:  # which the converter leaves out of a `llama`
            writer.gguf_writer.add_sliding_window(extra["sliding_window"])
        writer.write()


def subclasses(cls):
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


@torch.no_grad()
def float64_logits(model):
    """All that the class does in float32 for safety is done in float64 too."""
    ids = torch.tensor([[(i * 37 + 11) % VOCAB for i in range(POSITIONS)]])
    scaling = getattr(model.config, "rope_parameters", None) or {}
    short = (scaling["original_max_position_embeddings"]
             if scaling.get("rope_type") == "longrope" else POSITIONS)

    def run():
        out = model(input_ids=ids, use_cache=False).logits[0].clone()
        if short < POSITIONS:  # long rope: a text is turned by its length
            out[:short] = model(input_ids=ids[:, :short], use_cache=False).logits[0]
        return out

    single = run().double()
    model = model.double()
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    logits = run()
    assert logits.dtype == torch.float64 and logits.isfinite().all()
    assert (logits - single).abs().max() < 3e-5 * logits.abs().max(), (logits - single).abs().max()
    return logits.numpy().astype(np.float32)


def listing(path):
    """Keys with their values, and tensors with their shapes; of equal layers the first."""
    import gguf

    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.", "tokenizer.")):
            yield f"    {name} = {field.contents()!r}, {'/'.join(k.name for k in field.types)}"
    layers = {}
    for tensor in reader.tensors:
        shape = "x".join(str(int(n)) for n in tensor.shape)
        block, dot, rest = tensor.name.removeprefix("blk.").partition(".")
        if block.isdecimal():
            layers.setdefault(int(block), []).append(f"        {rest} {shape}")
        else:
            yield f"    {tensor.name} {shape}"
    for layer in sorted(layers):
        if layer == 0 or layers[layer] != layers[layer - 1]:
            yield f"    blk.{layer}."
            yield from layers[layer]


def write_listing(folder):
    lines = ["What make_references.py wrote: keys, and tensors as GGUF has their shapes (the row's",
             "length first). Layers that are as the one before are left out.", ""]
    for path in sorted(folder.glob("*.gguf")):
        lines += [path.stem, *listing(path), ""]
    (folder / "listing.txt").write_text("\n".join(lines))


def make(name, out, f32):
    class_name, settings, extra = CASES[name]
    model = make_model(name, class_name, settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "tiny"
        model.save_pretrained(folder)
        save_tokenizer(folder)
        if name in CHANGES:
            change(folder, CHANGES[name])
        convert(folder, out / f"{name}.gguf", "MOSTLY_F16", extra)
        if f32:
            convert(folder, f32 / f"{name}.gguf", "ALL_F32", extra)
    logits = float64_logits(model)
    (out / f"{name}.logits").write_bytes(logits.tobytes())
    top = np.sort(logits, axis=1)
    print(f"{name}: largest {np.abs(logits).max():.3f}, "
          f"{int((top[:, -1] - top[:, -2] > 1e-3).sum())} of {POSITIONS} clear, "
          f"{(out / f'{name}.gguf').stat().st_size} bytes")
    if f32:
        shutil.copy(out / f"{name}.logits", f32)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--f32", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_intermixed_args()
    load_converter(arguments.llama_cpp)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    failed = []
    for name in arguments.names or CASES:
        child = os.fork()  # what one changes in torch is gone with it
        if child == 0:
            try:
                make(name, arguments.out, arguments.f32)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
    write_listing(arguments.out)
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
