"""Makes tests/golden/tokenizers: small tokenizers of every kind we support, and what the `tokenizers`
library makes of a corpus with them. All text is generated here (tokenizer_text.py).

    python3 tests/golden/make_tokenizers.py    (needs: pip install tokenizers==0.23.3)

texts.json: the corpus, as hexadecimal bytes, some of it not UTF-8.
NAME.tokenizer.json: one tokenizer.
NAME.cases.json: for each text the ids with special tokens added and recognised ("ids"), and with
neither ("plain"); then random sequences of ids ("sequences") with their text, special tokens kept
("kept") and skipped ("skipped").
"""

import json
import os
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from tokenizers.models import BPE

from compare_tokenizer import LLAMA3, QWEN2, TEKKEN, digits_and_bytes, split_and_bytes
from tokenizer_text import CODE, COMBINED, EMOJI, random_text, random_words

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HAND_MADE = [
    "", " ", "a", "\n", "  ", "Hello, world!", " leading", "trailing ", "don't DON'T we'Ll I'ſ",
    "tabs\tand\r\nlines\n\n\nmore   \n  indented\n", "1234567890 3.14159 ١٢٣ ⅷ ½ 一二三",
    "<|im_start|>user\nhi<|im_end|>", "<|im_start|> <|im_end|>  x", "x<|endoftext|>y",
    "a<mask> b <mask>c  <mask>  d", "two words two  words Two words", "wordword word-word xword word", "ONE One one", "<tool>x</tool>",
    "e\u0301 a\u0323\u0307 \u212b \u1100\u1161\u11a8 \ufb01 \u2460", "▁a ▁▁b▁ c▁", "<0x0A> <0x",
    "नमस्ते สวัสดี مرحبا שלום 你好世界 日本語カタカナ 한국어 ሰላም გამარჯობა", " ".join(EMOJI), "".join(COMBINED),
    "".join(CODE), " " * 40 + "x" + "\n" * 12, "a" * 200, "ab" * 60, "\x00\x01\x1f\x7f\x80\x9f",
    "\u200b\u200d\ufeff\u00ad\u180e\u3000\u2028\u2029\x85", "\U0010ffff\ue000\ufffd",
]
BROKEN = [b"\xff", b"a\xc3", b"\xe4\xbd", b"\xed\xa0\x80x", b"\xf0\x9f\x98", b"\xc0\xafz\xf8\x88",
          b"ok \xe4\xbd\xa0\xe5 \xf4\x90\x80\x80 end"]


def corpus():
    rng = random.Random(20250901)
    texts = [t.encode() for t in HAND_MADE] + BROKEN
    added = SPECIAL + ["<mask>", "<tool>"]
    texts += [random_text(rng, rng.choice([20, 60, 120]), added) for _ in range(32)]
    return texts


def training_text():
    rng = random.Random(7)
    lines = [random_words(rng, 12) for _ in range(1500)]
    lines += [random_text(rng, 60).decode(errors="replace") for _ in range(300)]
    return lines


def bytes_trainer(size=620, special=SPECIAL):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False,
                               initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def byte_level(pre_tokenizer, normalizer=None, ignore_merges=False):
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(training_text(), bytes_trainer())
    return tokenizer


def sentence_piece(normalizer, pre_tokenizer, decoder, byte_fallback=True, fuse_unk=True, size=700):
    special = ["<unk>", "<s>", "</s>"]
    alphabet = ["<0x%02X>" % b for b in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=fuse_unk, byte_fallback=byte_fallback))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    # Words as SentencePiece would learn them, whatever the tokenizer's own steps are.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + alphabet,
                                  show_progress=False, limit_alphabet=120)
    tokenizer.train_from_iterator(training_text(), trainer)
    config = json.loads(tokenizer.to_str())
    # The byte tokens belong to the vocabulary only; they are not looked for in text.
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(config))
    if pre_tokenizer is None:
        config["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(config))
    else:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def fallback_decoder():
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                              decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def with_added(tokenizer):
    tokenizer.add_tokens([
        AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("word", single_word=True, normalized=True),
        AddedToken("One", normalized=True),
        AddedToken("two words", normalized=True),
        AddedToken("<tool>", normalized=False),
        AddedToken("<tool>x", normalized=False)])
    return tokenizer


def template_and_byte_level(tokenizer):
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=[bos, "$A", SPECIAL[2]], pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, tokenizer.token_to_id(bos)),
                            (SPECIAL[2], tokenizer.token_to_id(SPECIAL[2]))])])
    return tokenizer


def splits():
    split = pre_tokenizers.Split
    return pre_tokenizers.Sequence([
        split("-", "removed"), split(",", "merged_with_previous"), split("(", "merged_with_next"),
        split(Regex(r"\s+"), "contiguous"), split(Regex(r"[a-z\u0430-\u044f]+"), "isolated"),
        split(Regex(r"\p{Lu}|\S\S?"), "isolated", invert=True),
        split(".", "merged_with_next", invert=True), pre_tokenizers.Digits(False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizers():
    split = pre_tokenizers.Split
    metaspace = pre_tokenizers.Metaspace
    yield "gpt2", byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    prefix = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    prefix.post_processor = processors.RobertaProcessing((SPECIAL[2], 2), (SPECIAL[1], 1))
    yield "gpt2_prefix", prefix
    yield "smollm", with_added(byte_level(digits_and_bytes()))
    yield "qwen2", with_added(byte_level(split_and_bytes(QWEN2), normalizers.NFC()))
    yield "llama3", template_and_byte_level(byte_level(split_and_bytes(LLAMA3),
                                                       ignore_merges=True))
    yield "tekken", byte_level(split_and_bytes(TEKKEN), ignore_merges=True)
    yield "compatibility", with_added(byte_level(
        split_and_bytes(QWEN2),
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(),
                              normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip()])))
    yield "replace", byte_level(
        split_and_bytes(QWEN2),
        normalizers.Sequence([normalizers.NFD(), normalizers.Replace(Regex(r"\p{N}{2,4}"), "#"),
                              normalizers.Replace("a", ""), normalizers.Strip(True, False)]))
    yield "splits", byte_level(splits())
    legacy = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    yield "llama2", sentence_piece(legacy, None, fallback_decoder())
    yield "llama2_added", with_added(sentence_piece(legacy, None, fallback_decoder()))
    yield "metaspace_first", with_added(sentence_piece(
        None, metaspace(prepend_scheme="first", split=False), fallback_decoder()))
    yield "metaspace_always", sentence_piece(
        normalizers.NFKC(), metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"), byte_fallback=False)
    yield "metaspace_never", sentence_piece(
        None, metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never"),
        byte_fallback=False, fuse_unk=False)
    yield "metaspace_digits", sentence_piece(
        None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), split(Regex(r"\s"), "removed"),
                                       metaspace(prepend_scheme="first")]),
        decoders.Sequence([decoders.Strip("▁", 0, 1), decoders.Replace("▁", "_")]))
    bare = sentence_piece(legacy, None, fallback_decoder())
    config = json.loads(bare.to_str())
    config["decoder"] = None
    yield "no_decoder", Tokenizer.from_str(json.dumps(config))


def cases(tokenizer, texts, seed):
    rng = random.Random(seed)
    result = {"ids": [], "plain": [], "sequences": [], "kept": [], "skipped": []}
    for data in texts:
        text = data.decode(errors="replace")
        tokenizer.encode_special_tokens = False
        result["ids"].append(tokenizer.encode(text).ids)
        tokenizer.encode_special_tokens = True
        result["plain"].append(tokenizer.encode(text, add_special_tokens=False).ids)
    tokenizer.encode_special_tokens = False
    sequences = [rng.choice(result["ids"])[:40] for _ in range(30)]
    for _ in range(30):
        size = tokenizer.get_vocab_size()
        sequences.append([rng.randrange(size + 2) for _ in range(rng.randrange(24))])
    sequences.append([i for i in sorted(tokenizer.get_added_tokens_decoder()) for _ in (1, 2)])
    for ids in sequences[:20]:
        if ids:
            del ids[rng.randrange(len(ids))]
    for ids in sequences:
        result["sequences"].append(ids)
        result["kept"].append(tokenizer.decode(ids, skip_special_tokens=False))
        result["skipped"].append(tokenizer.decode(ids, skip_special_tokens=True))
    return result


def main():
    os.makedirs(HERE, exist_ok=True)
    texts = corpus()

    def write(name, value):
        with open(os.path.join(HERE, name), "w") as file:
            json.dump(value, file, separators=(",", ":"), ensure_ascii=False)
            file.write("\n")

    write("texts.json", [t.hex() for t in texts])
    for seed, (name, tokenizer) in enumerate(tokenizers()):
        write(name + ".tokenizer.json", json.loads(tokenizer.to_str()))
        write(name + ".cases.json", cases(tokenizer, texts, seed))
        print(name, tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
