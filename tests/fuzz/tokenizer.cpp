// Any vocabulary opens or is refused; any text becomes tokens, and the tokens become it again.
// Input: a mode byte, flags, then tokens (kind, length, spelling), merges (two indices), and the
// text with the places where request and template take turns.
#include "template/families.hpp"
#include "tokenizer/internal.hpp"
#include "unicode_internal.hpp"

#include <cstdint>
#include <cstdlib>

namespace {

void require(bool condition) {
    if (!condition) std::abort();
}

struct Bytes {
    const uint8_t* at;
    const uint8_t* end;
    uint8_t byte() { return at < end ? *at++ : uint8_t(0); }
    std::string text(size_t size) {
        size = std::min(size, size_t(end - at));
        at += size;
        return {reinterpret_cast<const char*>(at) - size, size};
    }
};

std::string printable(std::string_view bytes) {
    std::string out;
    for (char c : bytes) {
        const unsigned b = uint8_t(c);
        const bool itself = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
        const char32_t shown = itself ? b : b <= 0x20 ? 0x100 + b : b == 0xAD ? 0x143 : 0xA2 + b;
        valar::detail::utf8_append(out, shown);
    }
    return out;
}

struct Pieces {
    std::vector<std::string> tokens, merges;
    std::vector<int32_t> types;
    std::vector<float> scores;
    void add(std::string token, int32_t type, float score = 0) {
        tokens.push_back(std::move(token));
        types.push_back(type);
        scores.push_back(score);
    }
};

// `sound`: all bytes have tokens and nothing breaks a rule, so that opening must succeed.
Pieces read_vocabulary(Bytes& in, bool sentences, bool sound) {
    Pieces vocabulary;
    for (int byte = 0; sound && byte < 256; ++byte)
        if (sentences) vocabulary.add(valar::detail::format("<0x%02X>", byte), 6);
        else vocabulary.add(printable(std::string(1, char(byte))), 1);
    std::vector<std::string> pieces;
    for (int byte = 0; byte < 256; ++byte) pieces.emplace_back(1, char(byte));
    for (int i = in.byte() % 32; i > 0; --i) {
        const uint8_t head = in.byte();
        const int32_t type = sound ? (head & 8    ? 3
                                      : sentences ? int32_t("\1\4\5\1"[head & 3])
                                                  : 4)
                                   : head % 9 - 1;
        const float score = float(head >> 4) - 20;
        std::string spelling = in.text(in.byte() % 24);
        if (sound && spelling.size() < 2) spelling += "<>";
        const bool space = spelling[0] == '_' && sentences;
        vocabulary.add(space ? "\xE2\x96\x81" + spelling.substr(1) : spelling, type, score);
    }
    for (int i = in.byte() % 32; i > 0 && !sentences; --i) {
        const std::string left = pieces[in.byte() % pieces.size()];
        const std::string right = pieces[255 - in.byte() % std::min<size_t>(256, pieces.size())];
        if (left.size() + right.size() > 200) continue;
        if (sound || in.byte() % 8) vocabulary.add(printable(left + right), 1);
        vocabulary.merges.push_back(printable(left) + " " + printable(right));
        pieces.push_back(left + right);
        std::swap(pieces[255 - size_t(i)], pieces.back());
    }
    return vocabulary;
}

std::vector<std::byte> write_file(const Pieces& vocabulary, Bytes& in, bool sentences,
                                  std::string_view pre, bool sound) {
    const uint8_t flags = in.byte();
    valar::GgufWriter writer;
    const char* sentence_model = flags & 8 ? "t5" : "llama";
    if (!sound && flags & 64) sentence_model = "bert";
    const char* byte_model = !sound && flags & 8 ? "gemma4" : "gpt2";
    writer.set_string("tokenizer.ggml.model", sentences ? sentence_model : byte_model);
    if (!sound && flags & 16) {  // a map of characters
        std::vector<uint8_t> map(in.byte() % 64);
        for (uint8_t& byte : map) byte = in.byte();
        if (map.size() > 4) map[0] = uint8_t(map.size() / 2 & ~3u), map[1] = map[2] = map[3] = 0;
        if (!map.empty()) map.back() = 0;
        writer.set_array<uint8_t>("tokenizer.ggml.precompiled_charsmap", map);
        writer.set("tokenizer.ggml.remove_extra_whitespaces", bool(flags & 32));
    }
    writer.set_string("tokenizer.ggml.pre", pre);
    auto views = [](const std::vector<std::string>& texts) {
        return std::vector<std::string_view>(texts.begin(), texts.end());
    };
    writer.set_strings("tokenizer.ggml.tokens", views(vocabulary.tokens));
    writer.set_strings("tokenizer.ggml.merges", views(vocabulary.merges));
    if (sound || !(flags & 1))
        writer.set_array<int32_t>("tokenizer.ggml.token_type", vocabulary.types);
    writer.set_array<float>("tokenizer.ggml.scores", vocabulary.scores);
    writer.set("tokenizer.ggml.add_space_prefix", bool(flags & 2));
    writer.set("tokenizer.ggml.normalizer.lowercase", bool(flags & 32));
    writer.set_string("general.architecture", flags & 128 ? "phi3" : "llama");
    const uint32_t first = sound ? 256 : 0;
    for (const char* key : {"bos_token_id", "eos_token_id", "unknown_token_id"})
        if (const uint32_t id = first + in.byte() % 40; id < vocabulary.tokens.size() || !sound)
            if (flags & 4) writer.set(std::string("tokenizer.ggml.") + key, id);
    writer.set_string("tokenizer.chat_template", in.text(in.byte() % 32));
    auto bytes = writer.to_bytes();
    require(bytes.ok());
    return *bytes;
}

valar::detail::MarkedText read_text(Bytes& in) {
    valar::detail::MarkedText text;
    const uint8_t repeat = in.byte();
    for (bool request = in.byte() & 1; in.at < in.end; request = !request) {
        const std::string part = in.text(in.byte() % 64 + 1u);
        const size_t begin = text.text.size();
        for (int i = repeat & 1 ? repeat % 80 : 0; i >= 0; --i) text.text += part;
        if (request) text.from_request.push_back({begin, text.text.size()});
    }
    return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace valar;
    using namespace valar::detail;
    static constexpr std::string_view pres[] = {
        "gpt-2",       "smollm",   "llama-bpe", "qwen2",     "gpt-4o",         "deepseek-llm",
        "deepseek-v3", "falcon",   "qwen35",    "default",   "deepseek-coder", "tekken",
        "kimi-k2",     "tiny_aya", "afmoe",     "superbpe",  "exaone-moe",     "jais-2",
        "youtu",       "spark2_5", "bloom",     "chameleon", "other"};
    Bytes in{data, data + size};
    const uint8_t mode = in.byte();
    const bool sentences = mode % 5 == 4, sound = mode & 0x80;
    const std::string_view pre = pres[mode % 0x40 % (std::size(pres) - sound)];
    const Pieces vocabulary = read_vocabulary(in, sentences, sound);
    const auto bytes = write_file(vocabulary, in, sentences, pre, sound);
    auto file = Gguf::from_bytes(bytes);
    require(file.ok());
    auto tokenizer = Tokenizer::open(*file, {}, family_end_tokens());
    require(tokenizer.ok() || !sound);
    if (!tokenizer) return 0;

    const MarkedText text = read_text(in);
    auto whole = tokenizer->encode(text, mode & 0x40);
    auto request = tokenizer->encode(text.text);
    require(whole.ok() && request.ok());
    const ByteRange all{0, text.text.size()};
    require(*tokenizer->encode(MarkedText{text.text, {all}}) == *request);
    for (Token token : *request) require(tokenizer->kind(token) != TokenKind::control);

    std::string raw;
    for (Token token : *request) raw += tokenizer->piece(token);
    if (sound && !sentences) {
        bool same = raw == text.text || pre == "qwen2" || pre == "qwen35";
        require(same && detail::nfc(raw) == detail::nfc(text.text));
    }
    const bool spaced = raw.size() == text.text.size() + 1;  // the prefix
    if (sound && sentences && text.text.find("\xE2\x96\x81") == std::string::npos)
        require(spaced ? raw == " " + text.text : raw == text.text);

    Detokenizer stream(*tokenizer);
    std::string shown;
    for (Token token : *whole) {
        const std::string_view ready = stream.push(token);
        require(detail::utf8_valid(ready));
        shown += ready;
        (void)tokenizer->is_end(token);
        require(token >= 0 && size_t(token) < tokenizer->size());
    }
    require(detail::utf8_valid(stream.flush()));
    for (const std::string& token : vocabulary.tokens) (void)tokenizer->find(token).has_value();
    return 0;
}
