#ifndef RESA_TESTS_SUPPORT_TEST_TOKENIZERS_H_
#define RESA_TESTS_SUPPORT_TEST_TOKENIZERS_H_

// The small tokenizers of tests/golden/tokenizers, made by make_tokenizers.py.

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/tokenizer.h"

namespace resa::testing {

// All there are, sorted: "gpt2", "llama2", ... Never empty: the test ends when there are none.
std::vector<std::string> TestTokenizerNames();

// The text of NAME.tokenizer.json, or of another file beside it. The test ends without it.
std::string ReadTokenizerFile(const std::string& file_name);

std::unique_ptr<const engine::Tokenizer> LoadTestTokenizer(const std::string& name);

// Valid UTF-8 of random characters from everywhere in Unicode, ASCII and spaces more often.
std::string RandomText(std::mt19937_64& rng, size_t characters);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_TEST_TOKENIZERS_H_
