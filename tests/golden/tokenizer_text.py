"""Random text for tokenizer tests: every script, and all that goes wrong in text."""

# First and last code point of ranges to draw from; together they touch every block that has a
# script, and some that are unassigned.
SCRIPTS = [
    (0x21, 0x7E), (0x61, 0x7A), (0x41, 0x5A), (0xA1, 0xFF), (0x100, 0x17F), (0x180, 0x24F),
    (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x700, 0x74F), (0x780, 0x7BF), (0x7C0, 0x7FF), (0x800, 0x83F), (0x8A0, 0x8FF),
    (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F), (0xA80, 0xAFF), (0xB00, 0xB7F), (0xB80, 0xBFF),
    (0xC00, 0xC7F), (0xC80, 0xCFF), (0xD00, 0xD7F), (0xD80, 0xDFF), (0xE00, 0xE7F), (0xE80, 0xEFF),
    (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
    (0x13A0, 0x13FF), (0x1400, 0x167F), (0x1680, 0x169F), (0x16A0, 0x16FF), (0x1780, 0x17FF),
    (0x1800, 0x18AF), (0x1AB0, 0x1AFF), (0x1B00, 0x1B7F), (0x1C80, 0x1C8F), (0x1CD0, 0x1CFF),
    (0x1D00, 0x1DFF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x209F),
    (0x20A0, 0x20CF), (0x20D0, 0x20FF), (0x2100, 0x214F), (0x2150, 0x218F), (0x2190, 0x21FF),
    (0x2460, 0x24FF), (0x2500, 0x259F), (0x2600, 0x27BF), (0x2C60, 0x2C7F), (0x2DE0, 0x2DFF),
    (0x2E80, 0x2FDF), (0x3000, 0x303F), (0x3040, 0x309F), (0x30A0, 0x30FF), (0x3130, 0x318F),
    (0x3200, 0x33FF), (0x3400, 0x34FF), (0x4E00, 0x4FFF), (0x9F00, 0x9FFF), (0xA000, 0xA48F),
    (0xA640, 0xA69F), (0xA700, 0xA7FF), (0xA8E0, 0xA8FF), (0xAC00, 0xACFF), (0xD700, 0xD7FF),
    (0xF900, 0xFAFF), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F), (0xFE20, 0xFE2F), (0xFF00, 0xFFEF),
    (0x10000, 0x100FF), (0x10400, 0x1044F), (0x105C0, 0x105F3), (0x10D00, 0x10D8F),
    (0x11000, 0x1107F), (0x11380, 0x113E2), (0x11900, 0x1195F), (0x11DE0, 0x11DE9),
    (0x12000, 0x120FF), (0x13000, 0x130FF), (0x13430, 0x13455), (0x16EA0, 0x16ED3),
    (0x16FE0, 0x16FF1), (0x1B000, 0x1B12F), (0x1D100, 0x1D1FF), (0x1D400, 0x1D7FF),
    (0x1E000, 0x1E02F), (0x1E030, 0x1E06D), (0x1E4D0, 0x1E4F9), (0x1E900, 0x1E95F),
    (0x1F100, 0x1F1FF), (0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1FAFF),
    (0x1FB00, 0x1FBFF), (0x20000, 0x200FF), (0x2EBF0, 0x2EC5D), (0x2F800, 0x2FA1F),
    (0x31350, 0x313FF), (0xE0000, 0xE007F), (0xE0100, 0xE01EF), (0xF0000, 0xF00FF),
    (0x10FF00, 0x10FFFF),
]
SPACES = ["\t", "\n", "\v", "\f", "\r", " ", "\x85", "\xa0", "\u1680", "\u180e", "\u2000",
          "\u2003", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff",
          "\x1c", "\x1f", "▁"]
EMOJI = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇯🇵", "❤️", "☺︎", "🧑🏿‍🚀", "5️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
COMBINED = ["e\u0301", "\u0301", "a\u0323\u0307", "a\u0307\u0323", "\u1100\u1161\u11a8", "\u212b",
            "\u1e9b\u0323", "q\u0307\u0323\u0301", "\u0344", "\u0958", "\u0915\u093c", "ﬁ", "①",
            "İ", "ẞ", "\u0f73\u0f71", "\u09c7\u09be", "\u11935\u11930", "한글", "が", "か\u3099"]
CONTRACTIONS = ["'s", "'S", "'t", "'LL", "'ve", "'Re", "'m", "'d", "'ſ", "’s", "I'm", "we'Ve",
                "''s", "'st"]
CODE = ["def f(x):\n    return x**2  # note\n", "<div class=\"a\">&nbsp;</div>", "{\"k\": [1, 2]}",
        "if (a != b) { c->d += 0x1F; }", "\\u00e9\\n", "http://a.b/c?d=e&f=%20", "a_b-c.d", "#!/bin",
        "std::vector<int>{}", "=====", "-----\n", "...", "!!!???", "<|x|>", "<0x0A>", "$1,234.56"]
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be",
         "token", "attention", "sparse", "memory", "page", "block", "number", "between", "Hello",
         "World", "HTTP", "iPhone", "naïve", "café", "Straße", "мир", "слово", "καλημέρα", "世界",
         "你好", "日本語", "カタカナ", "ひらがな", "한국어", "नमस्ते", "สวัสดี", "مرحبا", "שלום",
         "გამარჯობა", "ሰላም", "xin", "chào", "việt"]


def random_words(rng, count):
    pieces = []
    for _ in range(count):
        word = rng.choice(WORDS)
        form = rng.random()
        word = word.capitalize() if form < 0.1 else word.upper() if form < 0.13 else word
        pieces.append(word + rng.choice(["", "", "", "", ",", ".", ".\n", "!", ":", ";", "'s"]))
    return " ".join(pieces)


def random_piece(rng, added):
    kind = rng.randrange(14)
    if kind == 0:
        return random_words(rng, rng.randrange(1, 12))
    if kind == 1:
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 9)))
    if kind == 2:
        return rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 3, 17, 70])
    if kind == 3:
        return "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 6)))
    if kind == 4:
        return rng.choice(EMOJI)
    if kind == 5:
        return rng.choice(COMBINED)
    if kind == 6:
        return rng.choice(WORDS) + rng.choice(CONTRACTIONS)
    if kind == 7:
        return str(rng.randrange(10 ** rng.randrange(1, 22)))
    if kind == 8:
        return rng.choice(CODE)
    if kind == 9:
        return rng.choice(["\r\n", "\n\n", "\r", "\n \n", " \r\n  ", "\n\n\n\n", "\t\t"])
    if kind == 10:
        return rng.choice(WORDS)[:1] * rng.choice([1, 5, 40, 300])
    if kind == 11:
        return "".join(chr(rng.randrange(32)) for _ in range(rng.randrange(1, 4)))
    if kind == 12 and added:
        token = rng.choice(added)
        return rng.choice([token, " " + token + "  ", token[:-1], token + token, "x" + token + "y"])
    return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))


def random_text(rng, bytes_wanted, added=()):
    """About so many bytes, now and then not quite UTF-8. `added`: tokens to weave in."""
    text = ""
    while len(text.encode()) < bytes_wanted:
        text += random_piece(rng, added)
        if rng.random() < 0.3:
            text += " "
    data = bytearray(text.encode())
    if rng.random() < 0.15:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)
