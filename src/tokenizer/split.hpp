// How a text falls into the words within which byte-level BPE merges.
#pragma once

#include <cstddef>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

// What becomes of the text between special tokens, by tokenizer.ggml.pre.
struct PreTokenizer {
    std::string_view name;
    // Where the word that begins at `at` ends.
    size_t (*word_end)(std::string_view text, size_t at);
    bool compose;      // NFC before anything else
    bool whole_words;  // a word that is a token is taken without merging
    bool add_bos;      // unless the file says otherwise
};

/// The row of that name, or null.
const PreTokenizer* find_pre_tokenizer(std::string_view name);

}  // namespace detail
}  // namespace v1
}  // namespace valar
