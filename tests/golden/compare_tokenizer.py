"""Compares our tokenizer with the `tokenizers` library, live, over random text.

    python3 tests/golden/compare_tokenizer.py TOOL MODEL [--seed N] [--seconds S]
        [--template FILE ...]

TOOL is the binary tokenizer_tool; MODEL a GGUF file, or a directory with a tokenizer.json. For a GGUF
file the library's tokenizer is put together from its vocabulary here, the way the model's own
tokenizer.json is. Each round encodes a random text with both, with and without special tokens in it,
decodes random ids with both, and decodes incrementally with ours. Then random chats are rendered with
the model's chat template, and with those in the files given, by Jinja and by us. Stops at the first
difference, printing the seed and the text. (needs: pip install tokenizers gguf numpy jinja2)
"""

import argparse
import json
import os
import random
import re
import struct
import subprocess
import sys
import time

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import processors
from tokenizers.models import BPE

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from tokenizer_text import random_text  # noqa: E402

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTROL, UNKNOWN, USER_DEFINED, NORMAL = 3, 2, 4, 1


def split_and_bytes(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_and_bytes():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])


BYTE_LEVEL = {  # tokenizer.ggml.pre: pre-tokenizer, normalizer, ignore_merges, add BOS
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), None, False, False),
    "smollm": (digits_and_bytes, None, False, False),
    "starcoder": (digits_and_bytes, None, False, False),
    "qwen2": (lambda: split_and_bytes(QWEN2), normalizers.NFC, False, False),
    "llama-bpe": (lambda: split_and_bytes(LLAMA3), None, True, True),
    "tekken": (lambda: split_and_bytes(TEKKEN), None, True, True),
}


def merges_from_scores(tokens, scores, types):
    """All ways to put a token together from two, by falling score: SentencePiece's BPE."""
    ids = {t: i for i, t in enumerate(tokens) if types[i] == NORMAL}
    merges = []
    for token, i in ids.items():
        local = [(token[:k], token[k:]) for k in range(1, len(token))
                 if token[:k] in ids and token[k:] in ids]
        local.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(scores[i], len(left), len(right), left, right) for left, right in local]
    merges.sort(key=lambda m: m[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in merges]


def tokenizer_of_gguf(path):
    import gguf
    reader = gguf.GGUFReader(path)

    def get(key, default=None):
        field = reader.fields.get("tokenizer.ggml." + key)
        return default if field is None else field.contents()

    tokens = get("tokens")
    types = get("token_type", [NORMAL] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if get("model") == "gpt2":
        make, normalizer, ignore_merges, add_bos = BYTE_LEVEL[get("pre")]
        merges = [tuple(m.split(" ")) for m in get("merges")]
        tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = make()
        if normalizer is not None:
            tokenizer.normalizer = normalizer()
        tokenizer.decoder = decoders.ByteLevel()
    else:
        add_bos = True
        tokenizer = Tokenizer(BPE(vocab, merges_from_scores(tokens, get("scores"), types),
                                  unk_token=tokens[get("unknown_token_id")], fuse_unk=True,
                                  byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                     normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "),
                                               decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
    special = [t for t, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False)
                          for t, kind in zip(tokens, types) if kind == USER_DEFINED])
    if get("add_bos_token", add_bos):
        bos = tokens[get("bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, get("bos_token_id"))])
    template = reader.fields.get("tokenizer.chat_template")
    return tokenizer, [get("bos_token_id"), get("eos_token_id"),
                       *([] if template is None else [template.contents()])]


class Tool:
    def __init__(self, binary, model):
        self.process = subprocess.Popen([binary, model], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def ask(self, operation, flags, count, payload):
        self.process.stdin.write(operation + struct.pack("<II", flags, count) + payload)
        self.process.stdin.flush()

    def read(self, width):
        (count,) = struct.unpack("<I", self.process.stdout.read(4))
        if count == 0xFFFFFFFF:
            (length,) = struct.unpack("<I", self.process.stdout.read(4))
            raise RuntimeError(self.process.stdout.read(length).decode())
        return count, self.process.stdout.read(count * width)

    def encode(self, data, add_special, parse_special):
        self.ask(b"e", add_special | parse_special << 1, len(data), data)
        count, raw = self.read(4)
        return list(struct.unpack("<%di" % count, raw))

    def decode(self, ids, skip_special, operation=b"d"):
        self.ask(operation, int(skip_special), len(ids), struct.pack("<%di" % len(ids), *ids))
        return self.read(1)[1].decode()  # Strict: what comes back must be valid UTF-8.

    def chat(self, template, messages, add_generation_prompt):
        data = json.dumps({"template": template, "messages": messages}).encode()
        self.ask(b"c", int(add_generation_prompt), len(data), data)
        count, raw = self.read(4)
        return list(struct.unpack("<%di" % count, raw))


def check(what, seed, text, ours, theirs):
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
              min(len(ours), len(theirs)))
    print(f"{what}: seed {seed}: differ at {at}\n  input {text!r}\n"
          f"  ours    {ours[max(at - 3, 0):at + 5]!r}\n  library {theirs[max(at - 3, 0):at + 5]!r}")
    sys.exit(1)


def has_long_byte_run(library, ids):
    """Whether a run of byte tokens is longer than our incremental detokenizer waits for its end."""
    run = 0
    for i in ids:
        run = run + 1 if re.fullmatch("<0x..>", library.id_to_token(i) or "") else 0
        if run >= 256:
            return True
    return False


def compare(tool, library, seed):
    rng = random.Random(seed)
    special = [t.content for t in library.get_added_tokens_decoder().values()]
    data = random_text(rng, rng.choice([8, 30, 120, 600]), rng.sample(special, min(len(special), 4)))
    text = data.decode(errors="replace")
    for parse_special in (True, False):
        library.encode_special_tokens = not parse_special
        for add_special in (True, False):
            check(f"encode, parse_special={parse_special}, add_special={add_special}", seed, data,
                  tool.encode(data, add_special, parse_special),
                  library.encode(text, add_special_tokens=add_special).ids)
    ids = library.encode(text, add_special_tokens=False).ids
    size = library.get_vocab_size()
    noise = [rng.randrange(size + 3) for _ in range(rng.randrange(40))]
    broken = ids[:]
    for _ in range(rng.randrange(4)):
        if broken:
            del broken[rng.randrange(len(broken))]
    for sequence in (ids, broken, noise):
        for skip in (True, False):
            theirs = library.decode(sequence, skip_special_tokens=skip)
            check("decode", seed, sequence, tool.decode(sequence, skip), theirs)
            if not has_long_byte_run(library, sequence):
                check("decode incrementally", seed, sequence, tool.decode(sequence, skip, b"s"),
                      theirs)
    return len(data)


def random_chat(rng):
    def text(size):
        return random_text(rng, size).decode(errors="replace")

    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text(40)})
    for i in range(rng.randrange(1, 5)):
        content = text(60)
        if i % 2 and rng.random() < 0.4:
            content = rng.choice(["<think>\n%s\n</think>\n\n%s" % (content, text(20)), "a</think>b"])
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
    return messages


def compare_chats(tool, library, template, bos, eos, seed, rounds):
    """Chats as Jinja renders them, encoded by the library, against ours; refused by both or none."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    library.encode_special_tokens = False
    rendered = 0
    for i in range(seed, seed + rounds):
        rng = random.Random(i)
        messages, prompt = random_chat(rng), rng.random() < 0.5
        try:
            text = compiled.render(messages=messages, add_generation_prompt=prompt, bos_token=bos,
                                   eos_token=eos)
            theirs = library.encode(text, add_special_tokens=False).ids
        except jinja2.exceptions.TemplateError:
            text, theirs = "", "refused"
        try:
            ours = tool.chat(template, messages, prompt)
        except RuntimeError as error:
            if "none of those" in str(error):
                raise
            ours = "refused"
        check("chat", i, text, ours, theirs)
        rendered += theirs != "refused"
    print(f"{rounds} chats, {rendered} of them rendered: identical")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--template", action="append", default=[])
    args = parser.parse_args()
    templates = [open(path).read() for path in args.template]
    bos = eos = ""
    if os.path.isdir(args.model):
        library = Tokenizer.from_file(os.path.join(args.model, "tokenizer.json"))
    else:
        library, own = tokenizer_of_gguf(args.model)
        bos, eos = (library.id_to_token(i) if i is not None else "" for i in own[:2])
        templates += own[2:]
    tool = Tool(args.tool, args.model)
    begin = time.monotonic()
    total = rounds = 0
    while time.monotonic() - begin < args.seconds:
        total += compare(tool, library, args.seed + rounds)
        rounds += 1
    print(f"{args.model}: {rounds} texts, {total} bytes: identical (seeds {args.seed} to "
          f"{args.seed + rounds - 1})")
    for template in templates:
        compare_chats(tool, library, template, bos, eos, args.seed, 500)


if __name__ == "__main__":
    main()
