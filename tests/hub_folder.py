"""Tiny folders as the hub has them, of the standard library alone: for quantize_check.py."""
import json
import os
import random
import struct


def bf16(value):
    """Rounded down to what BF16 can hold."""
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", value))[0]
                                           & 0xFFFF0000))[0]


def e4m3(code):
    exponent, fraction = code >> 3 & 15, code & 7
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0 ** -9
    return -size if code >> 7 else size


def pack(dtype, values):
    if dtype == "F32":
        return struct.pack(f"<{len(values)}f", *values)
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return bytes(values)


def write_safetensors(path, tensors):
    """tensors: {name: (dtype, shape, values)}"""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, values) in tensors.items():
        packed = pack(dtype, values)
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260,
          "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "bos_token_id": 257, "eos_token_id": 258}
SHAPES = {"self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64],
          "self_attn.o_proj": [64, 64], "mlp.gate_proj": [96, 64], "mlp.up_proj": [96, 64],
          "mlp.down_proj": [64, 96], "input_layernorm": [64], "post_attention_layernorm": [64]}


def llama_tensors(seed=1):
    """Values that F32 and BF16 hold alike."""
    rng = random.Random(seed)
    shapes = {"model.embed_tokens": [260, 64], "model.norm": [64], "lm_head": [260, 64]}
    for layer in range(2):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()})
    out = {}
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        out[name + ".weight"] = ("F32", shape, [bf16(rng.gauss(0, 0.2)) for _ in range(count)])
    return out


def with_dtype(tensors, dtype):
    return {name: (dtype, shape, values) for name, (_, shape, values) in tensors.items()}


def with_fp8(tensors, seed=2):
    """The projections as F8 with a scale for 128 x 128 values; and what they stand for in F32."""
    rng = random.Random(seed)
    small, plain = dict(tensors), dict(tensors)
    for name, (_, shape, _) in tensors.items():
        if "_proj" not in name:
            continue
        codes = [code for code in (rng.randrange(256) for _ in range(shape[0] * shape[1] * 2))
                 if code & 127 != 127][:shape[0] * shape[1]]
        scale = 2.0 ** -rng.randrange(9, 12)
        small[name] = ("F8_E4M3", shape, codes)
        small[name + "_scale_inv"] = ("F32", [1, 1], [scale])
        plain[name] = ("F32", shape, [e4m3(code) * scale for code in codes])
    return small, plain


def byte_level_tokenizer():
    shown = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    shown += [chr(256 + i) for i in range(256 - len(shown))]
    added = [{"id": 257 + i, "content": text, "special": True, "normalized": False}
             for i, text in enumerate(["<s>", "</s>"])]
    return {"added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "decoder": {"type": "ByteLevel"},
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate([*shown, "th"])},
                      "merges": [["t", "h"]]}}


def spaced_tokenizer(unigram=False):
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "t", "\u2581t"]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True,
             "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": ["\u2581 t"]}
    if unigram:
        model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True,
                 "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]}
    return {"added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
            "pre_tokenizer": None, "model": model}


def write_folder(path, tensors, config=CONFIG, tokenizer=None, shards=1):
    os.makedirs(path)

    def put(name, value):
        with open(os.path.join(path, name), "w", encoding="utf-8") as file:
            json.dump(value, file)

    put("config.json", config)
    put("tokenizer.json", tokenizer or byte_level_tokenizer())
    put("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"},
                                  "chat_template": "{{ messages[0].content }}"})
    if shards == 1:
        write_safetensors(os.path.join(path, "model.safetensors"), tensors)
        return
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, shard in enumerate(names):
        write_safetensors(os.path.join(path, shard), dict(list(tensors.items())[i::shards]))
    put("model.safetensors.index.json", {"weight_map": {
        tensor: names[i % shards] for i, tensor in enumerate(tensors)}})
