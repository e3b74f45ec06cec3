"""Writes engine/unicode_data_tables.inc: where the `tokenizers` library's Unicode differs from ours.

The `tokenizers` library carries three Unicode versions of its own: a recent one in its regular
expressions, a recent one in its case mapping, and an old one in its normalisation. PCRE2 and
utf8proc carry whatever the distribution has. This script asks the library about every code point
and compares with the system's libpcre2-8 and libutf8proc:

  kNewCharacters          code points with a general category that PCRE2 does not know yet
  kInertInNormalization   code points that the library's normalisation leaves alone (unassigned in
                          its version) although utf8proc decomposes, reorders or strips them
  kOnceMarks              code points that are no marks any more, but still are to the library
  kLowercase              lowercase mappings that utf8proc does not have

Adding a code point to a class that has it already changes nothing, so the tables stay right when
the system's libraries grow newer, as long as they cover what is newer there too; hence the last
list below, of Unicode 16 characters that compose or carry a combining class.

    python3 tests/golden/make_unicode_data.py > engine/unicode_data_tables.inc
    (needs: pip install tokenizers==0.23.3; libpcre2-8 10.42, libutf8proc 2.8)
"""

import ctypes

from tokenizers import Regex, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(1, 0x110000) if not 0xD800 <= c <= 0xDFFF]
ALL = "".join(map(chr, CODE_POINTS))
CATEGORIES = ["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No",
              "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So"]
# Unicode 16 characters that utf8proc 2.10 and later decompose, compose or reorder.
UNICODE_16 = [(0x0897, 0x0897), (0x105C9, 0x105C9), (0x105E4, 0x105E4), (0x10D69, 0x10D6D),
              (0x10EFC, 0x10EFC), (0x11383, 0x11383), (0x11385, 0x11385), (0x1138E, 0x1138E),
              (0x11391, 0x11391), (0x113B8, 0x113E2), (0x1611E, 0x1612F), (0x16D63, 0x16D6A),
              (0x1CCD6, 0x1CCF9), (0x1E5EE, 0x1E5EF)]


def library_category(category):
    """The code points that the library's regular expressions hold to be of this category."""
    split = pre_tokenizers.Split(Regex(r"\p{%s}" % category), "removed")
    kept = set()
    for _, (begin, end) in split.pre_tokenize_str(ALL):
        kept.update(range(begin, end))
    return {CODE_POINTS[i] for i in range(len(CODE_POINTS)) if i not in kept}


class Pcre2:
    UTF_UCP = 0x00080000 | 0x00020000

    def __init__(self):
        self.lib = ctypes.CDLL("libpcre2-8.so.0")
        self.lib.pcre2_compile_8.restype = ctypes.c_void_p
        self.lib.pcre2_match_data_create_8.restype = ctypes.c_void_p
        self.data = ctypes.c_void_p(self.lib.pcre2_match_data_create_8(4, None))

    def category(self, category):
        error, offset = ctypes.c_int(), ctypes.c_size_t()
        pattern = (r"\p{%s}" % category).encode()
        code = self.lib.pcre2_compile_8(pattern, ctypes.c_size_t(len(pattern)),
                                        ctypes.c_uint32(self.UTF_UCP), ctypes.byref(error),
                                        ctypes.byref(offset), None)
        assert code, (pattern, error.value)
        found = set()
        for c in CODE_POINTS:
            text = chr(c).encode()
            if self.lib.pcre2_match_8(ctypes.c_void_p(code), text, ctypes.c_size_t(len(text)),
                                      ctypes.c_size_t(0), ctypes.c_uint32(0), self.data,
                                      None) > 0:
                found.add(c)
        return found


class Utf8proc:
    def __init__(self):
        self.lib = ctypes.CDLL("libutf8proc.so.2")
        self.libc = ctypes.CDLL(None)
        self.lib.utf8proc_tolower.restype = ctypes.c_int32
        self.lib.utf8proc_category.restype = ctypes.c_int

    def normalize(self, form, text):
        function = getattr(self.lib, "utf8proc_" + form)
        function.restype = ctypes.c_void_p
        address = function(ctypes.c_char_p(text.encode()))
        result = ctypes.string_at(address).decode()
        self.libc.free(ctypes.c_void_p(address))
        return result

    def is_mark(self, c):
        return self.lib.utf8proc_category(c) in (6, 7, 8)


def ranges(code_points):
    result = []
    for c in sorted(code_points):
        if result and result[-1][1] == c - 1:
            result[-1][1] = c
        else:
            result.append([c, c])
    return result


def print_rows(rows):
    line = "   "
    for row in rows:
        if len(line) + len(row) + 2 > 100:
            print(line)
            line = "   "
        line += " " + row + ","
    if line.strip():
        print(line)


def new_characters():
    pcre2 = Pcre2()
    rows = []
    for category in CATEGORIES:
        for begin, end in ranges(library_category(category) - pcre2.category(category)):
            rows.append((begin, end, category))
    return sorted(rows)


def inert_in_normalization():
    utf8proc = Utf8proc()
    inert = set()
    for form in ["NFC", "NFD", "NFKC", "NFKD"]:
        library = getattr(normalizers, form)()
        for c in CODE_POINTS:
            context = ["a" + chr(c) + "\u0301\u0327", "\u0301" + chr(c) + "\u0323", chr(c),
                       utf8proc.normalize("NFD", chr(c))]
            if any(library.normalize_str(s) != utf8proc.normalize(form, s) for s in context):
                inert.add(c)
    strip = normalizers.StripAccents()
    for c in CODE_POINTS:
        if utf8proc.is_mark(c) and strip.normalize_str("a" + chr(c)) != "a":
            inert.add(c)
    for begin, end in UNICODE_16:
        inert.update(range(begin, end + 1))
    return ranges(inert)


def once_marks():
    utf8proc = Utf8proc()
    strip = normalizers.StripAccents()
    return ranges(c for c in CODE_POINTS
                  if not utf8proc.is_mark(c) and strip.normalize_str("a" + chr(c)) == "a")


def lowercase():
    utf8proc = Utf8proc()
    library = normalizers.Lowercase()
    rows = []
    for c in CODE_POINTS:
        lower = library.normalize_str(chr(c))
        if lower != chr(utf8proc.lib.utf8proc_tolower(c)) and len(lower) == 1:
            rows.append((c, ord(lower)))
    return rows


def main():
    print("// Made by tests/golden/make_unicode_data.py; see there what these are.")
    print("\nconstexpr NewCharacterRange kNewCharacters[] = {")
    print_rows(['{0x%X, 0x%X, "%s"}' % row for row in new_characters()])
    print("};\n\nconstexpr CodePointRange kInertInNormalization[] = {")
    print_rows(["{0x%X, 0x%X}" % tuple(row) for row in inert_in_normalization()])
    print("};\n\nconstexpr CodePointRange kOnceMarks[] = {")
    print_rows(["{0x%X, 0x%X}" % tuple(row) for row in once_marks()])
    print("};\n\nconstexpr CaseMapping kLowercase[] = {")
    print_rows(["{0x%X, 0x%X}" % row for row in lowercase()])
    print("};")


if __name__ == "__main__":
    main()
