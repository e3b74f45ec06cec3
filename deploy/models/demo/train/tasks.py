"""Tasks with checkable answers: what the demo model is trained on and evaluated with.

Everything is plain English built from a fixed list of words, and every word is one token, so the
generators work on arrays of token ids and `render` turns them into text. Two families:

recall   facts ("The code of the amber anchor is 48213."), some changed later ("is now"), filler
         sentences about the same things between them, then a question that names one or more facts;
         the answer repeats each named fact with its newest value.
ledger   numbered instructions ("017: take 004, add 358."), then a trace that writes, line by line,
         the referenced result, the addend and the new result. Sums keep their last three digits.

A *document* is one task: `<|bos|>`, then prompt and answer; `<|eos|>` closes each answer. `pack`
fills a training sequence with documents of random kind and size. `recall_sample` and
`ledger_sample` draw evaluation prompts; their random streams are disjoint from the training ones.

Needs numpy only. All randomness comes from the generator passed in.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ADJECTIVES = (
    "amber ancient azure black blue brass bright broken bronze brown calm clever coral crimson "
    "dark deep dusty early empty faded fallen fancy flat frozen gentle giant glass golden grand "
    "gray green happy heavy hidden hollow iron ivory large late little lonely marble misty "
    "narrow noble old orange painted pale plain proud purple quick quiet red round royal rusty "
    "sharp silent silver simple small steep white"
).split()
NOUNS = (
    "anchor apple arrow badge basket bell boat book bottle bridge bucket button candle carpet "
    "castle chain chair clock cloud coin crown cup desk door drum engine feather fence flag "
    "flower forest garden gate hammer harbor hat helmet horse island jacket kettle key ladder "
    "lamp lantern letter mill mirror mountain needle oven paper pencil pillow pipe plate ring "
    "river road rope shell ship spoon table"
).split()
ATTRIBUTES = "code price weight size".split()
VERBS = "stands rests waits leans sleeps shines hides hangs floats turns falls remains".split()
PREPOSITIONS = "near behind under above beside before".split()

_LINE_START = "The Question Answer Ledger Work Result".split()
_INNER = "of the is now steps take start with add has makes and".split()

# Token ids: the 256 bytes, ten digits with the space before them, whole words, special tokens.
_FIRST_SPACED_DIGIT = 256
_WORDS = _LINE_START + [
    " " + w for w in _INNER + ATTRIBUTES + VERBS + PREPOSITIONS + ADJECTIVES + NOUNS
]
_FIRST_WORD = _FIRST_SPACED_DIGIT + 10
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = (_FIRST_WORD + len(_WORDS) + i for i in range(len(SPECIAL_TOKENS)))
TOKEN_COUNT = PAD + 1

_ID = {word: _FIRST_WORD + i for i, word in enumerate(_WORDS)}
if len(_ID) != len(_WORDS):
    raise AssertionError("a word occurs in two lists")

# Invented names: a rare first letter, then vowels and consonants in turn, spelled in bytes.
_NAME_FIRST = np.frombuffer(b"jkqvwxyz", np.uint8)
_NAME_VOWEL = np.frombuffer(b"aeiou", np.uint8)
_NAME_CONSONANT = np.frombuffer(b"bdfgklmnprstvz", np.uint8)
_NAME_LETTERS = (4, 7)

_GAP = -1  # fills short rows of a matrix of token ids; `_flatten` drops it
_KEY_WIDTH = 1 + _NAME_LETTERS[1]
_DIGITS = 5
LEDGER_STEPS_MAX = 999

KINDS = ("single", "multi", "lookalike", "update", "names")


def _word_ids(words):
    return np.array([_ID[" " + w] for w in words], np.int64)


_ATTRIBUTE_IDS, _ADJECTIVE_IDS, _NOUN_IDS = (
    _word_ids(ATTRIBUTES),
    _word_ids(ADJECTIVES),
    _word_ids(NOUNS),
)
_VERB_IDS, _PREPOSITION_IDS = _word_ids(VERBS), _word_ids(PREPOSITIONS)


def _tokens(*parts):
    """Ids of words (looked up whole) and of other text (byte by byte)."""
    ids = []
    for part in parts:
        ids.extend([_ID[part]] if part in _ID else part.encode())
    return np.array(ids, np.int64)


_QUESTION, _ANSWER_LINE = _tokens("Question", ":"), _tokens("Answer", ":", "\n")
_FULL_STOP = _tokens(".", "\n")


def vocabulary():
    """Every token's bytes by id, special tokens last."""
    ordinary = [bytes([b]) for b in range(256)]
    ordinary += [b" %d" % d for d in range(10)]
    ordinary += [w.encode() for w in _WORDS]
    return ordinary + [s.encode() for s in SPECIAL_TOKENS]


def render(ids):
    """The text of token ids, special tokens written out."""
    table = vocabulary()
    return b"".join(table[i] for i in ids).decode()


def _flatten(rows):
    return rows[rows != _GAP]


def _number(values, digits, spaced):
    """Decimal digits as columns, most significant first; `spaced` puts a space before."""
    out = values[:, None] // 10 ** np.arange(digits - 1, -1, -1) % 10 + ord("0")
    if spaced:
        out[:, 0] += _FIRST_SPACED_DIGIT - ord("0")
    return out


def _columns(count, *columns):
    """Joins scalars, vectors of ids and matrices to a matrix of `count` rows."""
    parts = []
    for column in columns:
        column = np.asarray(column)
        if column.ndim < 2:
            column = np.broadcast_to(column.reshape(1, -1), (count, column.size))
        parts.append(column)
    return np.concatenate(parts, axis=1)


# --------------------------------------------------------------------------------------------------
# Recall


def _thing_keys(rng, count, crowd):
    """Distinct (attribute, "the adjective noun"); with `crowd`, from as few words as hold them."""
    attributes, adjectives, nouns = len(ATTRIBUTES), len(ADJECTIVES), len(NOUNS)
    if crowd:
        attributes = int(rng.integers(1, attributes + 1))
        need = count * 1.15 / attributes
        adjectives = int(min(adjectives, max(2, np.ceil(np.sqrt(need) * rng.uniform(0.8, 1.25)))))
        nouns = int(min(nouns, max(2, np.ceil(need / adjectives))))
        if attributes * adjectives * nouns < count:
            attributes, adjectives, nouns = len(ATTRIBUTES), len(ADJECTIVES), len(NOUNS)
    pick = rng.choice(attributes * adjectives * nouns, count, replace=False)
    attribute_pool = rng.permutation(_ATTRIBUTE_IDS)[:attributes]
    adjective_pool = rng.permutation(_ADJECTIVE_IDS)[:adjectives]
    noun_pool = rng.permutation(_NOUN_IDS)[:nouns]
    keys = np.full((count, _KEY_WIDTH), _GAP, np.int64)
    keys[:, 0] = _ID[" the"]
    keys[:, 1] = adjective_pool[pick // attributes % adjectives]
    keys[:, 2] = noun_pool[pick // (attributes * adjectives)]
    return attribute_pool[pick % attributes], keys


def _name_keys(rng, count):
    """Attributes and distinct invented names ("zoraki"), spelled in bytes after a space."""
    length = rng.integers(_NAME_LETTERS[0], _NAME_LETTERS[1] + 1, count)
    keys = np.empty((count, _KEY_WIDTH), np.int64)
    keys[:, 0] = ord(" ")
    keys[:, 1] = rng.choice(_NAME_FIRST, count)
    for i in range(2, _KEY_WIDTH):
        keys[:, i] = rng.choice(_NAME_VOWEL if i % 2 == 0 else _NAME_CONSONANT, count)
    keys[np.arange(_KEY_WIDTH) > length[:, None]] = _GAP
    order = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    keys = keys[order]
    return rng.choice(_ATTRIBUTE_IDS, len(keys)), keys


def _fact_rows(attributes, keys, values, changed):
    n = len(keys)
    now = np.where(changed, _ID[" now"], _GAP)[:, None]
    return _columns(
        n,
        _ID["The"],
        attributes[:, None],
        _ID[" of"],
        keys,
        _ID[" is"],
        now,
        _number(values, _DIGITS, spaced=True),
        _FULL_STOP,
    )


def _filler_rows(rng, tokens):
    """Sentences about things, of three lengths, `tokens` in all or a few less."""
    most = tokens // 6 + 1
    lengths = np.array([6, 10, 19])
    form = rng.integers(0, 3, most)
    form = form[: int(np.searchsorted(np.cumsum(lengths[form]), tokens, side="right"))]
    n = len(form)

    def thing(first):
        return [np.full(n, _ID[first]), rng.choice(_ADJECTIVE_IDS, n), rng.choice(_NOUN_IDS, n)]

    def clause(first):
        return (
            thing(first)
            + [rng.choice(_VERB_IDS, n), rng.choice(_PREPOSITION_IDS, n)]
            + thing(" the")
        )

    rows = np.stack(
        clause("The")
        + [np.full(n, _ID[" and"])]
        + clause(" the")
        + [np.full(n, t) for t in _FULL_STOP],
        axis=1,
    )
    rows[form == 0, 4:-2] = _GAP
    rows[form == 1, 8:-2] = _GAP
    return rows


def _interleave(rng, facts, filler):
    """Facts in order with filler rows at random places; also the row index of each fact."""
    total = len(facts) + len(filler)
    width = max(facts.shape[1], filler.shape[1])
    rows = np.full((total, width), _GAP, np.int64)
    is_filler = np.zeros(total, bool)
    is_filler[rng.permutation(total)[: len(filler)]] = True
    at = np.flatnonzero(~is_filler)
    rows[at, : facts.shape[1]] = facts
    rows[is_filler, : filler.shape[1]] = filler
    return rows, at


def recall_document(rng, size, kind, asked, rounds=1, filler_share=0.0, update_share=0.0):
    """Facts, filler and questions in at most `size` tokens, or None if that is too few.

    kind: one of KINDS ("names": invented names; "lookalike": few different words; else all words).
    asked: facts asked for in all; they are spread over `rounds` questions, the last at the end.
    filler_share: share of the facts' room that goes to filler.
    update_share: share of facts that change an earlier one.
    Returns parts, a list of (token ids, is_answer).
    """
    names = kind == "names"
    key_tokens = 1 + sum(_NAME_LETTERS) / 2 if names else 3  # on average
    key_tokens_max = _KEY_WIDTH if names else 3
    fact_tokens = 11 + key_tokens
    room = size - 1 - 8 * rounds - asked * (4 + key_tokens_max + 11 + key_tokens_max)
    count = int(room * (1.0 - filler_share) / (fact_tokens + update_share))
    if count < max(2, asked + int(count * update_share) + 1):
        return None
    changed = rng.random(count) < update_share
    changed[0] = False
    distinct = np.cumsum(~changed)
    attributes, keys = (
        _name_keys(rng, int(distinct[-1]))
        if names
        else _thing_keys(rng, int(distinct[-1]), kind == "lookalike")
    )
    key_of = np.where(changed, (rng.random(count) * distinct).astype(np.int64), distinct - 1)
    key_of = np.minimum(key_of, len(keys) - 1)  # equal invented names were dropped
    values = rng.integers(10 ** (_DIGITS - 1), 10**_DIGITS, count)
    facts = _fact_rows(attributes[key_of], keys[key_of], values, changed)
    used = int((facts != _GAP).sum())
    while used > room:  # longer names than average
        used -= int((facts[-1] != _GAP).sum())
        facts = facts[:-1]
    rows, at = _interleave(
        rng, facts, _filler_rows(rng, int(room - used) if filler_share > 0 else 0)
    )
    if len(facts) < 2:
        return None

    ends = np.append(
        np.sort(rng.integers(len(facts) // 2 + 1, len(facts) + 1, rounds - 1)), len(facts)
    )
    parts, row_begin, left = [(np.array([BOS]), False)], 0, asked
    for i, end in enumerate(ends):
        row_end = len(rows) if i == rounds - 1 else int(at[end - 1]) + 1
        share = max(1, left // (rounds - i))
        left -= share
        body = _flatten(rows[row_begin:row_end])
        question, answer = _question(
            rng, attributes, keys, key_of[:end], values[:end], changed[:end], share
        )
        parts += [(np.concatenate([body, question]), False), (answer, True)]
        row_begin = row_end
    return parts


def _question(rng, attributes, keys, key_of, values, changed, asked):
    """A question for `asked` facts at uniform depths, a third of them changed, and its answer."""
    newest = np.full(len(keys), -1)
    newest[key_of] = np.arange(len(key_of))  # the last assignment to an index stays
    order = rng.permutation(len(key_of))
    if changed.any():
        lead = rng.permutation(np.flatnonzero(changed))[: max(1, asked // 3)]
        order = np.concatenate([lead, order])
    wanted = key_of[order]
    wanted = wanted[np.sort(np.unique(wanted, return_index=True)[1])][:asked]
    wanted = rng.permutation(wanted)
    n = len(wanted)
    asks = _columns(n, _ID[" the"], attributes[wanted][:, None], _ID[" of"], keys[wanted], ord(","))
    asks[-1, -1] = ord("?")
    question = np.concatenate([_QUESTION, _flatten(asks), [ord("\n")], _ANSWER_LINE])
    answers = _fact_rows(
        attributes[wanted], keys[wanted], values[newest[wanted]], np.zeros(n, bool)
    )
    return question, np.append(_flatten(answers), EOS)


# --------------------------------------------------------------------------------------------------
# Ledger


def ledger_document(rng, steps):
    """A chain of `steps` sums: 15 tokens of prompt and 23 of trace a step. Returns parts."""
    if not 2 <= steps <= LEDGER_STEPS_MAX:
        raise ValueError(f"steps must lie in [2, {LEDGER_STEPS_MAX}], not {steps}")
    number = np.arange(1, steps + 1)
    source = (rng.random(steps) * (number - 1)).astype(np.int64) + 1  # a step before this one
    addend = rng.integers(0, 1000, steps)
    result = addend.copy()  # step 1 starts with its addend
    for i in range(1, steps):
        result[i] = (result[source[i] - 1] + addend[i]) % 1000

    def spaced(values):
        return _number(values, 3, spaced=True)

    first = _tokens("0", "0", "1", ":", " start", " with")
    index, n = _number(number[1:], 3, spaced=False), steps - 1
    instructions = _columns(
        n,
        index,
        ord(":"),
        _ID[" take"],
        spaced(source[1:]),
        ord(","),
        _ID[" add"],
        spaced(addend[1:]),
        _FULL_STOP,
    )
    trace = _columns(
        n,
        index,
        ord(":"),
        spaced(source[1:]),
        _ID[" has"],
        spaced(result[source[1:] - 1]),
        ord(","),
        _ID[" add"],
        spaced(addend[1:]),
        ord(","),
        _ID[" makes"],
        spaced(result[1:]),
        _FULL_STOP,
    )
    start = spaced(addend[:1]).ravel()
    prompt = np.concatenate(
        [
            [BOS],
            _tokens("Ledger", " of"),
            spaced(np.array([steps])).ravel(),
            _tokens(" steps"),
            _FULL_STOP,
            first,
            start,
            _FULL_STOP,
            instructions.ravel(),
            _tokens("Work", ":", "\n"),
        ]
    )
    answer = np.concatenate(
        [
            first,
            start,
            _tokens(",", " makes"),
            start,
            _FULL_STOP,
            trace.ravel(),
            _tokens("Result", ":"),
            spaced(result[-1:]).ravel(),
            _FULL_STOP,
            [EOS],
        ]
    )
    return [(prompt, False), (answer, True)]


# --------------------------------------------------------------------------------------------------
# Training sequences

LEDGER_TOKENS_PER_STEP = 38
LEDGER_TRAIN_STEPS_MAX = 300
LEDGER_SHARE = 0.3  # of the documents, while a sequence has none


def random_ledger(rng, size):
    """A ledger in at most `size` tokens. Returns parts, or None if `size` is too small."""
    steps = min((size - 9) // LEDGER_TOKENS_PER_STEP, LEDGER_TRAIN_STEPS_MAX)
    return ledger_document(rng, steps) if steps >= 2 else None


def random_recall(rng, size):
    """A recall document of random kind in at most `size` tokens. Returns parts, or None if that
    is too small."""
    kind = KINDS[rng.choice(len(KINDS), p=[0.05, 0.35, 0.25, 0.2, 0.15])]
    most = max(1, int(size * 0.5 / 20))
    fewest = max(1, most // 3) if rng.random() < 0.8 else 1  # many answers teach more
    asked = (
        1 if kind == "single" else int(np.exp(rng.uniform(np.log(fewest), np.log(most + 0.999))))
    )
    rounds = int(rng.integers(2, 6)) if asked >= 6 and rng.random() < 0.3 else 1
    filler_share = 0.0 if rng.random() < 0.3 else rng.uniform(0.02, 0.6)
    update_share = rng.uniform(0.02, 0.3) if kind == "update" else 0.0
    return recall_document(rng, size, kind, asked, rounds, filler_share, update_share)


def pack(rng, length):
    """Token ids and the answer mask of one training sequence.

    It is filled with documents of random size. At most one is a ledger: step numbers would be
    ambiguous between two.
    """
    tokens, answer = np.full(length, PAD, np.int64), np.zeros(length, bool)
    at, ledger_allowed = 0, True
    while length - at >= 64:
        left = length - at
        size = left if rng.random() < 0.4 else int(np.exp(rng.uniform(np.log(60), np.log(left))))
        ledger = ledger_allowed and rng.random() < LEDGER_SHARE
        parts = random_ledger(rng, size) if ledger else random_recall(rng, size)
        if parts is None:
            continue
        ledger_allowed = ledger_allowed and not ledger
        for ids, is_answer in parts:
            tokens[at : at + len(ids)] = ids
            answer[at : at + len(ids)] = is_answer
            at += len(ids)
    return tokens, answer


# --------------------------------------------------------------------------------------------------
# Evaluation

_EVALUATION_STREAM = 0x5E5A  # training seeds its generators with other sequences


@dataclasses.dataclass(frozen=True)
class Sample:
    """One evaluation prompt. `prompt` starts with <|bos|>; `answer` ends with <|eos|>."""

    task: str
    kind: str
    prompt: np.ndarray
    answer: np.ndarray


ASKED = {"single": 1, "multi": 8, "lookalike": 4, "update": 4, "names": 4}


def recall_sample(seed, index, length, kind=None):
    """A recall prompt of at most `length` tokens (mostly within a sentence of it).

    kind: one of KINDS; None takes them in turn.
    """
    kind = kind or KINDS[index % len(KINDS)]
    rng = np.random.default_rng([_EVALUATION_STREAM, 1, seed, index, length])
    asked = ASKED[kind]
    answer_room = asked * (11 + (_KEY_WIDTH if kind == "names" else 3)) + 1
    parts = recall_document(
        rng,
        length + answer_room,
        kind,
        asked,
        1,
        rng.uniform(0.1, 0.3),
        0.1 if kind == "update" else 0.0,
    )
    if parts is None:
        raise ValueError(
            f"a recall prompt of {length} tokens has no room for its facts; ask for at least 256"
        )
    return Sample("recall", kind, np.concatenate([ids for ids, _ in parts[:-1]]), parts[-1][0])


def ledger_sample(seed, index, steps):
    """A ledger prompt of `steps` steps."""
    rng = np.random.default_rng([_EVALUATION_STREAM, 2, seed, index, steps])
    parts = ledger_document(rng, steps)
    return Sample("ledger", "ledger", parts[0][0], parts[1][0])
