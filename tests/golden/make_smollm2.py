#!/usr/bin/env python3
"""Makes tests/golden/smollm2.json: what Hugging Face transformers computes, in float32, for the
model that deploy/models/fetch_smollm2.sh fetches. The weights are those of the GGUF file, decoded
by the gguf package and rounded to bf16, as resad loads them; the tokenizer is built with the
tokenizers library from the vocabulary in the file and SmolLM2's published pre-tokenizer.

    python3 -m venv .venv && .venv/bin/pip install torch transformers tokenizers gguf jinja2
    .venv/bin/python tests/golden/make_smollm2.py $(deploy/models/fetch_smollm2.sh)

For each prompt:
  text           what is tokenized: plain text, or a chat rendered with the file's own template
  messages       the chat, where it is one
  ids            token ids of text
  top            at some positions of ids: [[id, logprob], ...], the 5 likeliest next tokens
  greedy         ids that greedy decoding emits after the prompt, until EOS or 48
  greedy_text    the same as text
  logprobs       of the greedy tokens
  margins        at each greedy token: its logit less the second best
"""

import argparse
import json
import pathlib

import gguf
import jinja2
import numpy as np
import tokenizers
import torch
import transformers

GREEDY = 48
TOP = 5
PROMPTS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one short sentence."},
     {"role": "user", "content": "Name the four seasons of the year."}],
    [{"role": "user", "content": "Hello! What is 2 + 2?"},
     {"role": "assistant", "content": "2 + 2 is 4."},
     {"role": "user", "content": "Repeat exactly: red, green, blue, red, green, blue."}],
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. "
    "The days of the week are Monday,",
    "Äpfel, naïve café, 数学と物理 🙂 — 3.14159 …\n\tdef f(x):\n\t\treturn x ** 2\n\nprint(f(",
]


def build_tokenizer(fields):
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    model = tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == 3])
    return tokenizer


HF_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, rest, kind = name.split(".")
    return f"model.layers.{layer}.{HF_NAMES[rest]}.{kind}"


def halves(rows, heads):
    """Interleaved rotary pairs back to the two halves of each head."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def build_model(reader):
    field = lambda key: reader.fields[f"llama.{key}"].contents()
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=field("vocab_size"), hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"), num_hidden_layers=field("block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"), tie_word_embeddings=True,
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if ".attn_q." in tensor.name:
            values = halves(values, heads)
        if ".attn_k." in tensor.name:
            values = halves(values, kv_heads)
        weight = torch.from_numpy(np.ascontiguousarray(values))
        state[hf_name(tensor.name)] = weight.bfloat16().float() if weight.dim() == 2 else weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def run(model, ids, eos):
    with torch.no_grad():
        tokens, past, fed = [], None, torch.tensor([ids])
        while len(tokens) < GREEDY and (not tokens or tokens[-1] != eos):
            step = model(fed, past_key_values=past, use_cache=True)
            past, fed = step.past_key_values, step.logits[:, -1:].argmax(-1)
            tokens.append(int(fed))
        logits = model(torch.tensor([ids + tokens[:-1]])).logits[0]
    deciding = logits[len(ids) - 1:]
    best = torch.topk(deciding, 2)
    assert best.indices[:, 0].tolist() == tokens, "a cache and one pass disagree"
    logprobs = torch.log_softmax(logits.double(), -1)
    n = len(ids)
    top = {}
    for position in sorted({0, n // 3, 2 * n // 3, n - 1}):
        likeliest = torch.topk(logprobs[position], TOP)
        top[position] = [[int(i), round(float(p), 6)]
                         for p, i in zip(likeliest.values, likeliest.indices)]
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    chosen = logprobs[n - 1:].gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return dict(top=top, greedy=tokens, logprobs=[round(p, 6) for p in chosen],
                margins=[round(m, 4) for m in margins])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "smollm2.json")
    arguments = parser.parse_args()
    reader = gguf.GGUFReader(arguments.model)
    tokenizer = build_tokenizer(reader.fields)
    template = jinja2.Environment().from_string(
        reader.fields["tokenizer.chat_template"].contents())
    eos = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    model = build_model(reader)
    goldens = []
    for prompt in PROMPTS:
        golden = {}
        if isinstance(prompt, str):
            golden["text"] = prompt
        else:
            golden["messages"] = prompt
            golden["text"] = template.render(messages=prompt, add_generation_prompt=True)
        golden["ids"] = tokenizer.encode(golden["text"], add_special_tokens=False).ids
        golden |= run(model, golden["ids"], eos)
        golden["greedy_text"] = tokenizer.decode(golden["greedy"], skip_special_tokens=True)
        goldens.append(golden)
        print(f"{len(golden['ids'])} tokens, least margin {min(golden['margins']):.3f}: "
              f"{golden['greedy_text']!r}", flush=True)
    result = dict(transformers=transformers.__version__, tokenizers=tokenizers.__version__,
                  eos=eos, prompts=goldens)
    arguments.out.write_text(json.dumps(result, ensure_ascii=True, indent=None) + "\n")


if __name__ == "__main__":
    main()
