"""Writes the seeds of tokenizer_json_fuzz: one small tokenizer.json of each kind, by hand.

    python3 tests/fuzz/make_tokenizer_corpus.py
"""

import json
import os

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "corpus", "tokenizer_json_fuzz")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def added(token_id, content, **changes):
    token = {"id": token_id, "content": content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
    return {**token, **changes}


def vocabulary(tokens):
    vocab = {}
    for token in tokens:
        vocab.setdefault(token, len(vocab))
    return vocab


def byte_characters(data):
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in data]


def sequence(kind, members):
    return {"type": "Sequence", kind: members}


def byte_level():
    text = b"Helo wr1d,it's\r\n<|>_mend\xe4\xbd\xa0\xcc\x81\xef\xbf"
    vocab = vocabulary(["<s>", "<|im_end|>", *byte_characters(text), "He", "ll", "Hell", "Ġw"])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(0, "<s>"), added(1, "<|im_end|>", lstrip=True, rstrip=True),
                         added(len(vocab), "Hello", single_word=True, normalized=True,
                               special=False)],
        "normalizer": sequence("normalizers", [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\p{N}{2,3}"}, "content": "#"},
            {"type": "Strip", "strip_left": True, "strip_right": False}]),
        "pre_tokenizer": sequence("pretokenizers", [
            {"type": "Digits", "individual_digits": True},
            {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}]),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
                  "merges": [["H", "e"], ["l", "l"], ["He", "ll"], ["Ġ", "w"]]}}


def byte_fallback():
    vocab = vocabulary(["<unk>", "<s>", *["<0x%02X>" % b for b in range(256)], *"▁Helowrd", "▁w",
                        "He", "lo"])
    return {
        "version": "1.0", "added_tokens": [added(0, "<unk>"), added(1, "<s>")],
        "normalizer": sequence("normalizers", [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]),
        "pre_tokenizer": None, "post_processor": None,
        "decoder": sequence("decoders", [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]),
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": ["▁ w", "H e", "l o"]}}


def metaspace():
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    return {
        "version": "1.0", "added_tokens": [added(0, "<unk>")], "normalizer": {"type": "NFKC"},
        "pre_tokenizer": step,
        "post_processor": {"type": "RobertaProcessing", "sep": ["<unk>", 0], "cls": ["<unk>", 0],
                           "trim_offsets": True, "add_prefix_space": True},
        "decoder": step,
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": False,
                  "vocab": vocabulary(["<unk>", *"▁Helowrd", "▁w"]), "merges": ["▁ w"]}}


def main():
    os.makedirs(FOLDER, exist_ok=True)
    for make in (byte_level, byte_fallback, metaspace):
        text = json.dumps(make(), separators=(",", ":"), ensure_ascii=False)
        with open(os.path.join(FOLDER, make.__name__ + ".json"), "w") as file:
            file.write(text + "\0Hello wor1d")
    with open(os.path.join(FOLDER, "deep.json"), "w") as file:
        file.write('{"normalizer":' + '{"type":"Sequence","normalizers":[' * 40 + "]}" * 40 + "}")


if __name__ == "__main__":
    main()
