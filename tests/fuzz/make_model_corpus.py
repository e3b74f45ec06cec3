#!/usr/bin/env python3
"""Writes the seed files of safetensors_fuzz, gguf_fuzz and model_config_fuzz. Needs only Python.

    tests/fuzz/make_model_corpus.py
"""

import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"


def safetensors(tensors, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, dtype, shape, content in tensors:
        header[name] = dict(dtype=dtype, shape=shape,
                            data_offsets=[len(data), len(data) + len(content)])
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


# Value types of GGUF: number and struct code.
KINDS = dict(u8=(0, "B"), i8=(1, "b"), u16=(2, "H"), i16=(3, "h"), u32=(4, "I"), i32=(5, "i"),
             f32=(6, "f"), bool=(7, "?"), u64=(10, "Q"), i64=(11, "q"), f64=(12, "d"))


def value(kind, content):
    """(type number, bytes) of a value; kinds in brackets are arrays."""
    if kind == "string":
        return 8, string(content)
    if kind.startswith("["):
        parts = [value(kind[1:-1], item) for item in content]
        number = parts[0][0]
        return 9, struct.pack("<IQ", number, len(parts)) + b"".join(raw for _, raw in parts)
    number, code = KINDS[kind]
    return number, struct.pack("<" + code, content)


def gguf(metadata, tensors, version=3, alignment=32):
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, kind, content in metadata:
        number, raw = value(kind, content)
        head += string(key) + struct.pack("<I", number) + raw
    data = b""
    for name, dims, kind, content in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += content
    return head + b"\0" * (-len(head) % alignment) + data


def block_bytes(dims, kind):
    elements, size = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 30: (1, 2)}[kind]
    count = 1
    for dim in dims:
        count *= dim
    return bytes(i * 7 % 60 for i in range(count // elements * size))


def tiny_llama(arch, kind):
    """A whole model: 1 layer, width 64, one head of 64, inner width 32, 4 tokens."""
    metadata = [
        ("general.architecture", "string", arch), (f"{arch}.block_count", "u32", 1),
        (f"{arch}.context_length", "u32", 256), (f"{arch}.embedding_length", "u32", 64),
        (f"{arch}.feed_forward_length", "u32", 32), (f"{arch}.attention.head_count", "u32", 1),
        (f"{arch}.attention.head_count_kv", "u32", 1), (f"{arch}.rope.freq_base", "f32", 10000.0),
        (f"{arch}.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        (f"{arch}.rope.scaling.type", "string", "yarn"), (f"{arch}.rope.scaling.factor", "f32", 4.0),
        ("tokenizer.ggml.model", "string", "gpt2"),
        ("tokenizer.ggml.tokens", "[string]", ["a", "b", "ab", "<e>"]),
        ("tokenizer.ggml.token_type", "[i32]", [1, 1, 1, 3]),
        ("tokenizer.ggml.scores", "[f32]", [0.0, 0.0, 0.0, 0.0]),
        ("tokenizer.ggml.merges", "[string]", ["a b"]), ("tokenizer.ggml.eos_token_id", "u32", 3),
    ]
    shapes = [("token_embd.weight", [64, 4], kind), ("output_norm.weight", [64], 0),
              ("blk.0.attn_norm.weight", [64], 0), ("blk.0.ffn_norm.weight", [64], 0),
              ("blk.0.attn_q.weight", [64, 64], kind), ("blk.0.attn_k.weight", [64, 64], kind),
              ("blk.0.attn_v.weight", [64, 64], kind), ("blk.0.attn_output.weight", [64, 64], kind),
              ("blk.0.ffn_gate.weight", [64, 32], kind), ("blk.0.ffn_up.weight", [64, 32], kind),
              ("blk.0.ffn_down.weight", [32, 64], kind)]
    if arch == "qwen3":
        shapes += [("blk.0.attn_q_norm.weight", [64], 0), ("blk.0.attn_k_norm.weight", [64], 0)]
    return gguf(metadata, [(n, d, k, block_bytes(d, k)) for n, d, k in shapes])


def config(**fields):
    return {**dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=100,
                   hidden_size=128, intermediate_size=64, num_hidden_layers=2,
                   num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                   rms_norm_eps=1e-5, rope_theta=10000.0, eos_token_id=2, hidden_act="silu"),
            **fields}


def configs():
    yield "llama3", config(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                             high_freq_factor=4.0,
                                             original_max_position_embeddings=64)), None
    yield "yarn5", config(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e6,
                                               beta_fast=16, attention_factor=1.1),
                          attention_bias=True, mlp_bias=True, tie_word_embeddings=True), None
    yield "qwen2", config(architectures=["Qwen2ForCausalLM"], model_type="qwen2",
                          sliding_window=64, use_sliding_window=False, max_window_layers=1,
                          rope_scaling=dict(type="linear", factor=2.0)), dict(
                              eos_token_id=[2, 3], temperature=0.7, top_p=0.8, top_k=20)
    yield "mistral", config(architectures=["MistralForCausalLM"], model_type="mistral",
                            sliding_window=None, head_dim=64), dict(do_sample=True)


def write(target, name, content):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main():
    write("safetensors_fuzz", "two", safetensors(
        [("a.weight", "F32", [2, 3], bytes(24)), ("b", "BF16", [4], b"abcdefgh")],
        dict(format="pt")))
    write("safetensors_fuzz", "scalars", safetensors(
        [("s", "F16", [], b"xy"), ("empty", "F32", [0, 3], b""), ("c", "F32", [1], b"abcd")]))
    write("safetensors_fuzz", "none", safetensors([]))
    write("gguf_fuzz", "llama_q4_0", tiny_llama("llama", 2))
    write("gguf_fuzz", "qwen3_q8_0", tiny_llama("qwen3", 8))
    write("gguf_fuzz", "kinds", gguf(
        [(f"key.{kind}", kind, 1) for kind in KINDS] + [
            ("nested", "[[u16]]", [[1, 2], [3]]), ("strings", "[string]", ["", "x"]),
            ("general.alignment", "u32", 64)],
        [("t", [3, 2], 1, bytes(12)), ("u", [32], 3, bytes(20))], version=2, alignment=64))
    for name, fields, generation in configs():
        text = json.dumps(fields).encode()
        if generation:
            text += b"\0" + json.dumps(generation).encode()
        write("model_config_fuzz", name, text)


if __name__ == "__main__":
    main()
