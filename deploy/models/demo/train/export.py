"""Writes the demo model as a Hugging Face directory: config, bf16 weights, tokenizer, defaults."""

from __future__ import annotations

import json
import pathlib

import torch

import model
import tasks

CONTEXT_LENGTH = 32768


def padded_vocabulary():
    """Rows of the embedding: the token count, padded to a multiple of 64."""
    return (tasks.TOKEN_COUNT + 63) // 64 * 64


def round_to_bf16(net):
    """Leaves in `net` what the file holds."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.bfloat16().float())


def weights(net):
    """The tensors under the names that transformers' LlamaForCausalLM gives them."""

    def plain(t):
        return t.detach().bfloat16().cpu().contiguous()

    out = {
        "model.embed_tokens.weight": plain(net.embedding),
        "lm_head.weight": plain(net.head),
        "model.norm.weight": plain(net.norms[-1]),
    }
    for i in range(net.shape.layers):
        gate, up, down = net.mlp[3 * i : 3 * i + 3]
        out |= {
            f"model.layers.{i}.{name}.weight": plain(t)
            for name, t in {
                "input_layernorm": net.norms[2 * i],
                "post_attention_layernorm": net.norms[2 * i + 1],
                "self_attn.q_proj": net.qo[2 * i],
                "self_attn.o_proj": net.qo[2 * i + 1].t(),
                "self_attn.k_proj": net.kv[2 * i],
                "self_attn.v_proj": net.kv[2 * i + 1],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": down.t(),
            }.items()
        }
    return out


def config(shape: model.Shape):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": model.HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.NORM_EPSILON,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocabulary,
        "bos_token_id": tasks.BOS,
        "eos_token_id": tasks.EOS,
        "pad_token_id": tasks.PAD,
        "torch_dtype": "bfloat16",
    }


def _byte_characters():
    """The printable character that byte-level BPE files write for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def tokenizer():
    """Byte-level BPE. Whole words are taken as they are (ignore_merges); the only merges join a
    space and a digit."""
    characters = _byte_characters()
    vocabulary = ["".join(characters[b] for b in token) for token in tasks.vocabulary()]
    special = [
        {
            "id": i,
            "content": tasks.vocabulary()[i].decode(),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in (tasks.BOS, tasks.EOS, tasks.PAD)
    ]
    ordinary = vocabulary[: tasks.BOS]
    bos = special[0]["content"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tasks.BOS], "tokens": [bos]}},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(ordinary)},
            "merges": [f"{characters[ord(' ')]} {d}" for d in range(10)],
        },
    }


def tokenizer_config():
    names = [tasks.vocabulary()[i].decode() for i in (tasks.BOS, tasks.EOS, tasks.PAD)]
    return {
        "added_tokens_decoder": {
            str(i): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, name in zip((tasks.BOS, tasks.EOS, tasks.PAD), names)
        },
        "bos_token": names[0],
        "clean_up_tokenization_spaces": False,
        "eos_token": names[1],
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": names[2],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def generation_config():
    return {
        "bos_token_id": tasks.BOS,
        "do_sample": False,
        "eos_token_id": tasks.EOS,
        "pad_token_id": tasks.PAD,
    }


def write_tokenizer(directory: pathlib.Path):
    for name, content in (
        ("tokenizer", tokenizer()),
        ("tokenizer_config", tokenizer_config()),
        ("generation_config", generation_config()),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def write(net, directory: pathlib.Path):
    from safetensors.torch import save_file

    save_file(weights(net), str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(net.shape), indent=2) + "\n")
    write_tokenizer(directory)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Writes the tokenizer files alone.")
    parser.add_argument("directory", type=pathlib.Path)
    write_tokenizer(parser.parse_args().directory)
