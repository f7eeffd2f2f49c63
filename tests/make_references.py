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
as raw binary32: of the ids (i * 37 + 11) % n_vocab for i = 0 .. 63.

--f32 FOLDER writes there each file with F32 matrices too, and NAME.txt, a listing of its keys and
of the tensors of the first layers.
"""

import argparse
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile
import traceback

import numpy as np
import torch
import transformers

VOCAB = 260
POSITIONS = 64

# What most of the classes call it: heads of a size that is not n_embd / heads, groups of 2.
USUAL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=5,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12,
             max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=259,
             tie_word_embeddings=False)
# Classes without a size of heads of their own.
PLAIN = {**{key: value for key, value in USUAL.items() if key != "head_dim"}}


def rope(theta=10000.0, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


LLAMA3 = rope(500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0,
            beta_slow=1.0)


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
    "llama-rope3": ("LlamaForCausalLM", {**USUAL, **LLAMA3}, {}),
    "llama-linear": ("LlamaForCausalLM", {**PLAIN, **rope(rope_type="linear", factor=4.0),
                                          "tie_word_embeddings": True}, {}),
    "llama-yarn": ("LlamaForCausalLM", {**USUAL, **rope(**YARN)}, {}),
    "mistral": ("MistralForCausalLM", {**USUAL, **rope(), "sliding_window": 24},
                {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {**PLAIN, **rope(1e6), "num_attention_heads": 2,
                                   "num_key_value_heads": 1}, {}),
    "qwen3": ("Qwen3ForCausalLM", {**USUAL, **rope(1e6)}, {}),
    "gemma": ("GemmaForCausalLM", {**USUAL, **rope(), "num_key_value_heads": 1,
                                   "hidden_activation": "gelu_pytorch_tanh",
                                   "tie_word_embeddings": True}, {}),
    "gemma2": ("Gemma2ForCausalLM", {**USUAL, **rope(), "sliding_window": 20,
                                     "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
                                     "final_logit_softcapping": 3.0,
                                     "tie_word_embeddings": True}, {}),
    "gemma3": ("Gemma3ForCausalLM", {
        **USUAL, "num_hidden_layers": 7, "sliding_window": 20, "query_pre_attn_scalar": 12,
        **layer_types("sssssfs"), "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}, {}),
    "phi3": ("Phi3ForCausalLM", {**PLAIN, **rope(original_max_position_embeddings=128),
                                 "original_max_position_embeddings": 128, "sliding_window": 24},
             {}),
    "phi3-short": ("Phi3ForCausalLM", {**PLAIN, **long_rope(4, 96)}, {}),
    "phi4-mini": ("Phi3ForCausalLM", {**PLAIN, "num_hidden_layers": 4,
                                      **long_rope(3, 16, partial_rotary_factor=0.75),
                                      "tie_word_embeddings": True}, {}),
    "phi2": ("PhiForCausalLM", {**PLAIN, "intermediate_size": 128, "num_hidden_layers": 4,
                                "num_key_value_heads": 4,
                                **rope(partial_rotary_factor=0.5)}, {}),
    "smollm3": ("SmolLM3ForCausalLM", {**PLAIN, **rope(2e6), "no_rope_layer_interval": 4,
                                       "use_sliding_window": False,
                                       "tie_word_embeddings": True}, {}),
    "olmo2": ("Olmo2ForCausalLM", {**PLAIN, **rope(500000.0)}, {}),
    "olmo3": ("Olmo3ForCausalLM", {**PLAIN, **layer_types("sssfs"), "sliding_window": 20,
                                   **rope(500000.0, **YARN)}, {}),
    "granite": ("GraniteForCausalLM", {**PLAIN, **rope(), "embedding_multiplier": 3.0,
                                       "residual_multiplier": 0.4, "logits_scaling": 2.5,
                                       "attention_multiplier": 0.21,
                                       "tie_word_embeddings": True}, {}),
    "glm4": ("Glm4ForCausalLM", {**USUAL, "attention_bias": True,
                                 **rope(partial_rotary_factor=0.5)}, {}),
}


def load_converter(folder):
    """llama.cpp's converter, whose tokenizer is answered as GPT-2's whatever the model."""
    sys.path[:0] = [str(folder / "gguf-py"), str(folder)]
    from conversion.base import TextModel

    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def save_tokenizer(folder):
    """Byte level: the 256 bytes, and four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>")
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
            continue
        embedding = value.shape[0] == VOCAB and not model.config.tie_word_embeddings
        size = 1.0 if embedding and "head" not in name else 1.3 / math.sqrt(value.shape[-1])
        value.copy_((size * noise).half().float())


def make_model(name, class_name, settings):
    cls = getattr(transformers, class_name)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = cls(config).eval().float()
    randomize(model, sum(name.encode()))
    return model


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
    single = model(input_ids=ids, use_cache=False).logits[0].double()
    model = model.double()
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    logits = model(input_ids=ids, use_cache=False).logits[0]
    assert logits.dtype == torch.float64 and logits.isfinite().all()
    assert (logits - single).abs().max() < 3e-5 * logits.abs().max(), (logits - single).abs().max()
    return logits.numpy().astype(np.float32)


def listing(path):
    import gguf

    reader = gguf.GGUFReader(path)
    lines = []
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
                            "tokenizer.ggml.merges")):
            continue
        lines.append(f"key {name} = {field.contents()!r} "
                     f"({', '.join(kind.name for kind in field.types)})")
    for tensor in reader.tensors:
        lines.append(f"tensor {tensor.name} {tensor.tensor_type.name} "
                     f"{'x'.join(str(int(n)) for n in tensor.shape)}")
    return lines


def make(name, out, f32):
    class_name, settings, extra = CASES[name]
    model = make_model(name, class_name, settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "tiny"
        model.save_pretrained(folder)
        save_tokenizer(folder)
        convert(folder, out / f"{name}.gguf", "MOSTLY_F16", extra)
        if f32:
            convert(folder, f32 / f"{name}.gguf", "ALL_F32", extra)
            (f32 / f"{name}.config.json").write_text((folder / "config.json").read_text())
    logits = float64_logits(model)
    (out / f"{name}.logits").write_bytes(logits.tobytes())
    top = np.sort(logits, axis=1)
    print(f"{name}: largest {np.abs(logits).max():.3f}, "
          f"{int((top[:, -1] - top[:, -2] > 1e-3).sum())} of {POSITIONS} clear, "
          f"{(out / f'{name}.gguf').stat().st_size} bytes")
    if f32:
        shutil.copy(out / f"{name}.logits", f32)
        (f32 / f"{name}.txt").write_text("\n".join(listing(f32 / f"{name}.gguf")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--f32", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
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
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
