// tokenizer_dump MODEL TEXTS: the ids of each text, a line each. TEXTS holds, per text, its length
// as 8 little-endian bytes, then its bytes. With --template all of a text counts as the chat
// template's; with --special a text has what its model puts at its ends. Used by tokenizer_check.py.
#include <cstdio>
#include <cstring>

#include "base/internal.hpp"
#include "tokenizer/internal.hpp"

int main(int argc, char** argv) {
    if (argc < 3)
        return std::fputs("usage: tokenizer_dump MODEL TEXTS [--template|--special]\n", stderr), 2;
    auto fail = [](const valar::Error& error) {
        std::fprintf(stderr, "%s\n", error.message.c_str());
        return 1;
    };
    auto file = valar::Gguf::open(argv[1]);
    if (!file) return fail(file.error());
    auto tokenizer = valar::Tokenizer::open(*file);
    if (!tokenizer) return fail(tokenizer.error());
    auto texts = valar::detail::read_file(argv[2], uint64_t{1} << 30);
    if (!texts) return fail(texts.error());
    const bool is_template = argc > 3 && std::strcmp(argv[3], "--template") == 0;
    const bool special = argc > 3 && std::strcmp(argv[3], "--special") == 0;
    for (size_t at = 0; at + 8 <= texts->size();) {
        uint64_t size = 0;
        std::memcpy(&size, texts->data() + at, 8);
        const std::string text = texts->substr(at + 8, size_t(size));
        at += 8 + size_t(size);
        auto ids = is_template ? tokenizer->encode(valar::detail::MarkedText{text, {}})
                               : tokenizer->encode(text, special && tokenizer->add_bos(),
                                                   special && tokenizer->add_eos());
        if (!ids) return fail(ids.error());
        for (valar::Token id : *ids) std::printf("%d ", int(id));
        std::putchar('\n');
    }
    return 0;
}
