#!/usr/bin/env python3
"""Writes a model directory with random bf16 weights of a named shape: what a daemon is timed with
where no trained model of that size is at hand. The tokenizer is the demo model's, so most ids have
no text; requests give and take token ids.

  make_random_model.py --shape qwen2.5-7b --tokenizer deploy/models/demo --out /tmp/qwen2.5-7b

Needs torch and safetensors. Runs on the GPU where there is one: 15 GB take half a minute.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

SHAPES = {
    "0.5b": dict(layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, mlp=4864, vocab=151936),
    "qwen2.5-7b": dict(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944,
                       vocab=152064),
}
SHARD_LAYERS = 4


def config_of(shape):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": shape["vocab"],
        "bos_token_id": 0,
        "eos_token_id": shape["vocab"] - 1,
        "torch_dtype": "bfloat16",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    def matrix(rows, columns):
        # Of a size that keeps activations near 1.
        values = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        values.normal_(0.0, columns ** -0.5, generator=generator)
        return values.cpu()

    def ones(size):
        return torch.ones(size, dtype=torch.bfloat16)

    weight_map = {}

    def save(name, tensors):
        save_file(tensors, arguments.out / name)
        weight_map.update({tensor: name for tensor in tensors})

    hidden, mlp = shape["hidden"], shape["mlp"]
    query, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    shards = (shape["layers"] + SHARD_LAYERS - 1) // SHARD_LAYERS
    for shard in range(shards):
        tensors = {}
        for layer in range(shard * SHARD_LAYERS, min((shard + 1) * SHARD_LAYERS, shape["layers"])):
            at = f"model.layers.{layer}."
            tensors[at + "input_layernorm.weight"] = ones(hidden)
            tensors[at + "post_attention_layernorm.weight"] = ones(hidden)
            for name, rows in (("q", query), ("k", kv), ("v", kv)):
                tensors[at + f"self_attn.{name}_proj.weight"] = matrix(rows, hidden)
                tensors[at + f"self_attn.{name}_proj.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
            tensors[at + "self_attn.o_proj.weight"] = matrix(hidden, query)
            tensors[at + "mlp.gate_proj.weight"] = matrix(mlp, hidden)
            tensors[at + "mlp.up_proj.weight"] = matrix(mlp, hidden)
            tensors[at + "mlp.down_proj.weight"] = matrix(hidden, mlp)
        save(f"model-{shard + 1:05d}-of-{shards + 1:05d}.safetensors", tensors)
    save(f"model-{shards + 1:05d}-of-{shards + 1:05d}.safetensors", {
        "model.embed_tokens.weight": matrix(shape["vocab"], hidden),
        "model.norm.weight": ones(hidden),
        "lm_head.weight": matrix(shape["vocab"], hidden),
    })
    (arguments.out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))
    (arguments.out / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / name, arguments.out)


if __name__ == "__main__":
    main()
