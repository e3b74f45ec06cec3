#!/usr/bin/env python3
"""Makes the golden models of tests/golden/models: tiny random models of every architecture and
rope scaling that resad loads, with the logits and greedy tokens that Hugging Face transformers
computes for them in float32.

    python3 -m venv .venv && .venv/bin/pip install torch transformers safetensors gguf numpy
    .venv/bin/python tests/golden/make_models.py

Seeds are fixed: the same versions of torch and transformers write the same bytes. Weights are
rounded to bf16 before anything is computed, so that storing them as bf16 loses nothing.

Each model directory holds what a download would (config.json, *.safetensors, ...) or model.gguf,
and golden.json:
  prompt         token ids; long enough to cross the regions of the scaling
  logit_rows     positions of the prompt whose logits are in logits.f32
  greedy         tokens that greedy decoding emits after the prompt
  min_margin     least difference between the best and the second logit over those tokens
logits.f32 is [len(logit_rows), vocab_size], little endian. GGUF models also have dequantised.f32,
the first `count` elements of every tensor listed in golden.json, as the gguf package decodes them.
"""

import argparse
import json
import pathlib
import shutil

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 320
GREEDY = 40
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def case(name, family, *, heads, kv_heads, head_dim, hidden, inner, prompt, layers=2, tie=False,
         scaling=None, theta=10000.0, dtype="bf16", spelling=5, max_position=256, shards=1,
         extra=None):
    return dict(locals())


CASES = [
    case("qwen2_tied_group7", "qwen2", heads=7, kv_heads=1, head_dim=64, hidden=64, inner=96,
         prompt=97, tie=True, theta=1e6, spelling=4),
    case("qwen2_yarn_group3_sharded", "qwen2", heads=6, kv_heads=2, head_dim=64, hidden=64,
         inner=96, prompt=210, scaling=YARN, spelling=4, max_position=64, shards=3),
    case("qwen3_group2_d128", "qwen3", heads=4, kv_heads=2, head_dim=128, hidden=64, inner=96,
         prompt=83, tie=True, theta=1e6, layers=2),
    case("qwen3_bias_yarn_group5", "qwen3", heads=5, kv_heads=1, head_dim=64, hidden=96, inner=64,
         prompt=150, scaling={**YARN, "attention_factor": 1.2, "beta_fast": 16.0},
         extra={"attention_bias": True}),
    case("llama_llama3_group4", "llama", heads=4, kv_heads=1, head_dim=64, hidden=64, inner=96,
         prompt=220, scaling=LLAMA3, theta=50000.0),
    case("llama_linear_biases_group1_f32", "llama", heads=2, kv_heads=2, head_dim=64, hidden=64,
         inner=64, prompt=120, scaling={"type": "linear", "factor": 4.0}, spelling=4, dtype="f32",
         extra={"attention_bias": True, "mlp_bias": True}),
    case("llama_group16_tied", "llama", heads=16, kv_heads=1, head_dim=64, hidden=64, inner=96,
         prompt=65, tie=True, layers=1, spelling=4),
    case("mistral_group3_d128_f16", "mistral", heads=3, kv_heads=1, head_dim=128, hidden=96,
         inner=64, prompt=130, dtype="f16", layers=2, extra={"sliding_window": None}),
]

# One tiny model per family, stored in every tensor type.
GGUF_LLAMA = dict(heads=4, kv_heads=2, head_dim=64, hidden=64, inner=96, layers=1, prompt=90)
GGUF_CASES = [
    case(f"gguf_llama_{kind.lower()}", "llama", dtype=kind, tie=kind in ("Q4_0", "F16"),
         **GGUF_LLAMA)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
] + [
    case("gguf_llama_rope_freqs_q8_0", "llama", dtype="Q8_0", scaling=LLAMA3,
         **{**GGUF_LLAMA, "prompt": 220}),
    case("gguf_qwen2_yarn_q8_0", "qwen2", dtype="Q8_0", scaling=YARN, max_position=64,
         **{**GGUF_LLAMA, "heads": 3, "kv_heads": 1, "prompt": 210}),
    case("gguf_qwen3_d128_bf16", "qwen3", dtype="BF16", tie=True,
         **{**GGUF_LLAMA, "heads": 2, "kv_heads": 1, "head_dim": 128}),
]

CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}


def rope_parameters(c):
    scaling = dict(c["scaling"] or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    return {**scaling, "rope_theta": c["theta"]}


def make_config(c, **overrides):
    config_class, _ = CLASSES[c["family"]]
    return config_class(**{
        **dict(vocab_size=VOCAB, hidden_size=c["hidden"], intermediate_size=c["inner"],
               num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
               num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"],
               max_position_embeddings=c["max_position"], rms_norm_eps=1e-5,
               tie_word_embeddings=c["tie"], rope_parameters=rope_parameters(c),
               bos_token_id=1, eos_token_id=2, pad_token_id=None, attn_implementation="eager"),
        **(c["extra"] or {}), **overrides})


def make_model(c, seed):
    """Random weights with enough spread that attention, norms and biases all matter: scores of a
    few units, norms away from 1, biases away from 0."""
    model = CLASSES[c["family"]][1](make_config(c)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name == "model.norm.weight" and c["tie"]:
                value = noise  # Of either sign, or the model would repeat its last token for ever.
            elif name.endswith("norm.weight"):
                value = 1.0 + 0.2 * noise
            elif name.endswith(".bias"):
                value = 0.3 * noise
            elif "embed_tokens" in name:
                value = (0.4 if c["tie"] else 1.0) * noise
            else:
                gain = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 3.0}.get(name.split(".")[-2], 1.0)
                value = gain * noise / weight.shape[1] ** 0.5
            value = value.bfloat16()
            if c["dtype"] == "f16":
                value = value.half().bfloat16()  # f16 has no bf16's small values.
            weight.copy_(value.float())
    return model


def run_golden(model, prompt):
    """Logits of the whole prompt, greedy tokens, and the least margin between best and second.

    The tokens come from decoding with a cache; one pass over everything then has to agree."""
    with torch.no_grad():
        tokens, past, ids = [], None, torch.tensor([prompt])
        for _ in range(GREEDY):
            step = model(ids, past_key_values=past, use_cache=True)
            past, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0]
        deciding = torch.topk(logits[len(prompt) - 1:], 2)
        agrees = deciding.indices[:, 0].tolist() == tokens
        margin = float((deciding.values[:, 0] - deciding.values[:, 1]).min()) if agrees else 0.0
    return logits[:len(prompt)], tokens, margin


def check_scaling_matters(c, model, logits, prompt):
    """A golden that another rotary embedding would also meet proves nothing."""
    if c["scaling"] is None:
        return None
    plain = CLASSES[c["family"]][1](make_config(
        c, rope_parameters={"rope_type": "default", "rope_theta": c["theta"]})).float().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = float((plain(torch.tensor([prompt])).logits[0] - logits).abs().max())
    assert difference > 0.5, (c["name"], difference)
    return difference


def find_model(c, seed, build=lambda model: model):
    """The first seed whose greedy tokens are decided by a margin well above any rounding."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, VOCAB, (c["prompt"],), generator=generator).tolist()
    for attempt in range(200):
        model = build(make_model(c, seed * 1000 + attempt))
        logits, greedy, margin = run_golden(model, prompt)
        if margin > 0.05 and len(set(greedy)) > GREEDY // 4:
            check_scaling_matters(c, model, logits, prompt)
            return model, prompt, logits, greedy, margin
    raise SystemExit(f"{c['name']}: no seed gives decided tokens")


def write_golden(directory, prompt, logits, greedy, margin, extra=None):
    n = len(prompt)
    rows = sorted({0, 1, 15, 16, 31, n // 3, n // 2, n - 2, n - 1})
    logits[rows].numpy().astype("<f4").tofile(directory / "logits.f32")
    golden = dict(prompt=prompt, logit_rows=rows, greedy=greedy, min_margin=round(margin, 4),
                  transformers=transformers.__version__, torch=torch.__version__, **(extra or {}))
    (directory / "golden.json").write_text(json.dumps(golden) + "\n")


def old_spelling(config):
    """config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    return config


def write_hugging_face(c, directory, seed):
    model, prompt, logits, greedy, margin = find_model(c, seed)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[c["dtype"]]
    if c["dtype"] == "f16":
        for name, weight in model.state_dict().items():
            assert torch.equal(weight.half().bfloat16(), weight.bfloat16()), name
    stored = model.to(dtype)
    if c["shards"] > 1:
        size = sum(p.numel() for p in model.parameters()) * 2 // c["shards"] + 1
        stored.save_pretrained(directory, max_shard_size=size)
        assert (directory / "model.safetensors.index.json").exists()
    else:
        stored.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if c["spelling"] == 4:
        config = old_spelling(config)
    path.write_text(json.dumps(config, indent=1) + "\n")
    write_golden(directory, prompt, logits, greedy, margin)


# ---- GGUF ----------------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    base, kind = name.rsplit(".", 1)
    if base.startswith("model.layers."):
        _, _, layer, rest = base.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[base]}.{kind}"


def interleave(rows, heads):
    """Rows of q or k in the order of interleaved rotary pairs, as llama files hold them."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def quantise(array, kind):
    """Stored bytes of a matrix, and the values that they decode to."""
    kind = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(array, kind)
    return raw, kind, gguf.quants.dequantize(raw, kind).reshape(array.shape)


def gguf_tensors(c, model):
    """(name, raw, type, values as decoded) of every tensor; the model takes the decoded values,
    matrices rounded to bf16 as resad does."""
    stored = []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            array = weight.numpy().astype(np.float32)
            heads = {"q_proj": c["heads"], "k_proj": c["kv_heads"]}.get(name.split(".")[-2])
            permuted = heads if c["family"] == "llama" else None
            if permuted:
                array = interleave(array, permuted)
            raw, kind, values = quantise(array, c["dtype"] if weight.dim() == 2 else "F32")
            stored.append((gguf_name(name), raw, kind, values))
            back = torch.from_numpy(np.ascontiguousarray(values))
            if permuted:
                back = back.reshape(permuted, -1, 2, *back.shape[1:]).swapaxes(1, 2)
                back = back.reshape(weight.shape)
            weight.copy_(back.bfloat16().float() if weight.dim() == 2 else back)
    return stored


def write_metadata(writer, c):
    arch = c["family"]
    writer.add_context_length(c["max_position"])
    writer.add_embedding_length(c["hidden"])
    writer.add_block_count(c["layers"])
    writer.add_feed_forward_length(c["inner"])
    writer.add_head_count(c["heads"])
    writer.add_head_count_kv(c["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(c["theta"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    if arch == "llama":
        writer.add_rope_dimension_count(c["head_dim"])
        writer.add_vocab_size(VOCAB)
    if c["scaling"] is YARN:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(YARN["factor"])
        writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
    # Every kind of value once, also kinds that nothing reads: they must be skipped correctly.
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64",
                 "float64"):
        getattr(writer, f"add_{kind}")(f"golden.{kind}", 7)
    writer.add_bool("golden.bool", True)
    writer.add_array("golden.bools", [True, False])
    writer.add_array("golden.floats", [0.5, 1.5])
    writer.add_array("golden.nested", [[1, 2], [3]])
    # A byte-level vocabulary: 3 control tokens, 256 bytes, and merges of pairs of letters.
    characters = list(byte_characters())
    pairs = [(a, b) for a in "etaoinsh" for b in "etaoinsh"][:VOCAB - 3 - 256]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if arch != "llama" else "smollm")
    writer.add_token_list(["<pad>", "<s>", "</s>"] + characters + [a + b for a, b in pairs])
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def byte_characters():
    """The printable stand-ins of the 256 bytes in GPT-2's byte-level alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte) if byte in printable else chr(next(others))


def rope_divisors(c):
    """What a converter stores as rope_freqs.weight for llama3 scaling: plain / scaled frequency."""
    plain = make_config(c, rope_parameters={"rope_type": "default", "rope_theta": c["theta"]})
    del plain
    inverse = c["theta"] ** (-np.arange(0, c["head_dim"], 2, dtype=np.float64) / c["head_dim"])
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        make_config(c), torch.device("cpu"))
    return (inverse / scaled.double().numpy()).astype(np.float32)


def write_gguf(c, directory, seed):
    state = {}

    def store(model):
        state["tensors"] = gguf_tensors(c, model)
        return model

    _, prompt, logits, greedy, margin = find_model(c, seed, store)
    writer = gguf.GGUFWriter(directory / "model.gguf", c["family"])
    write_metadata(writer, c)
    listed, values = [], []
    if c["scaling"] is LLAMA3:
        state["tensors"].append(("rope_freqs.weight", rope_divisors(c),
                                 gguf.GGMLQuantizationType.F32, rope_divisors(c)))
    for name, raw, kind, decoded in state["tensors"]:
        writer.add_tensor(name, raw, raw_dtype=kind)
        first = decoded.reshape(-1)[:128].astype("<f4")
        listed.append(dict(name=name, count=len(first)))
        values.append(first)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.concatenate(values).tofile(directory / "dequantised.f32")
    write_golden(directory, prompt, logits, greedy, margin, dict(dequantised=listed))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "models")
    parser.add_argument("--only", help="make the cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for number, c in enumerate(CASES + GGUF_CASES):
        if arguments.only and arguments.only not in c["name"]:
            continue
        directory = arguments.out / c["name"]
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write = write_gguf if c in GGUF_CASES else write_hugging_face
        write(c, directory, seed=number + 1)
        size = sum(f.stat().st_size for f in directory.iterdir())
        margin = json.loads((directory / "golden.json").read_text())["min_margin"]
        print(f"{c['name']}: {size / 1024:.0f} KiB, least margin {margin}", flush=True)


if __name__ == "__main__":
    main()
