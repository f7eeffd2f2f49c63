// How a text falls into the words within which byte-level BPE merges.
#pragma once

#include <cstddef>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

// Where the stretch of `text` that begins at `at` ends. It sees nothing but `text`.
using SplitStep = size_t (*)(std::string_view text, size_t at);

// What becomes of the text between special tokens, by tokenizer.ggml.pre.
struct PreTokenizer {
    std::string_view names;  // with a space between two
    SplitStep steps[8];      // each cuts what the one before it made; up to the first null
    bool compose;            // NFC before anything else
    bool whole_words;        // a word that is a token is taken without merging
    bool add_bos;            // unless the file says otherwise
    bool add_eos = false;    // the same
};

/// Whether `name` is one of `names`, which have a space between two.
bool has_name(std::string_view names, std::string_view name);

/// The row that has this name, or null.
const PreTokenizer* find_pre_tokenizer(std::string_view name);

}  // namespace detail
}  // namespace v1
}  // namespace valar
