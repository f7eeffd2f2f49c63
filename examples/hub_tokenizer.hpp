// hub_tokenizer: tokenizer.json, tokenizer_config.json and chat_template.jinja of a folder of the hub
// as the keys tokenizer.* of a GGUF file. Byte-level BPE, BPE and unigram with U+2581 for spaces.
#ifndef VALAR_EXAMPLES_HUB_TOKENIZER_HPP
#define VALAR_EXAMPLES_HUB_TOKENIZER_HPP

#include "safetensors.hpp"

#include <unordered_map>

namespace example {

// ---- How text is split before merging ---------------------------------------------------------

/// The pre-tokenizer of a tokenizer.json, a line a step, as GGUF calls it. A name may be followed by
/// the one for tokenizers that compose (NFC), and by the one for those that merge within words which
/// are tokens. A row with open end stands for all that begin so (the rest is a list of letters).
struct PreName {
    const char* steps;
    const char *name, *composing = name, *merging = name;
    bool open_end = false;
};
#define VALAR_HUB_ENDINGS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define VALAR_HUB_SPACES R"(\s*[\r\n]+|\s+(?!\S)|\s+)"
#define VALAR_HUB_WORDS R"([^\r\n\p{L}\p{N}]?\p{L}+)"
#define VALAR_HUB_MODERN(digits)                             \
    VALAR_HUB_ENDINGS "|" VALAR_HUB_WORDS R"(|\p{N})" digits \
                      R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|)" VALAR_HUB_SPACES
#define VALAR_HUB_TIKTOKEN(digits)                                    \
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N})" digits \
    R"(| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)"
#define VALAR_HUB_UPPER R"([\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
#define VALAR_HUB_LOWER R"([\p{Ll}\p{Lm}\p{Lo}\p{M}])"
#define VALAR_HUB_CASED(ending, digits)                                                        \
    R"([^\r\n\p{L}\p{N}]?)" VALAR_HUB_UPPER "*" VALAR_HUB_LOWER "+" ending                     \
    R"(|[^\r\n\p{L}\p{N}]?)" VALAR_HUB_UPPER "+" VALAR_HUB_LOWER "*" ending R"(|\p{N})" digits \
    R"(| ?[^\s\p{L}\p{N}]+[\r\n/]*|)" VALAR_HUB_SPACES
inline constexpr PreName pre_names[] = {
    {"words", "gpt-2", "mpt"},
    {"digit\nwords", "smollm", "command-r"},
    {VALAR_HUB_MODERN("{1,3}"), "llama-bpe"},
    {VALAR_HUB_TIKTOKEN("{1,3}"), "dbrx"},
    {VALAR_HUB_MODERN(""), "bailingmoe", "stablelm2", "qwen2"},
    {VALAR_HUB_TIKTOKEN(""), "bailingmoe"},
    {VALAR_HUB_ENDINGS
     R"(|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|)" VALAR_HUB_SPACES,
     "qwen35"},
    {VALAR_HUB_ENDINGS "|" VALAR_HUB_WORDS R"(|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|)" VALAR_HUB_SPACES,
     "seed-coder"},
    {VALAR_HUB_CASED(VALAR_HUB_ENDINGS "?", "{1,3}"), "gpt-4o", "gpt-4o", "minimax-m2"},
    {VALAR_HUB_CASED("", ""), "tekken"},
    {R"(\p{N}{1,3})"
     "\n" VALAR_HUB_MODERN("+"),
     "minicpm5"},
    {"punctuation\nwords\ndigits\n[0-9][0-9][0-9]", "falcon"},
    {R"([\r\n])"
     "\n"
     R"(\s?[A-Za-z)",
     "deepseek-llm", "deepseek-llm", "deepseek-llm", true},
    {R"([\r\n])"
     "\n"
     R"(\s?\p{L}+)",
     "deepseek-coder", "deepseek-coder", "deepseek-coder", true},
    {R"(\p{N}{1,3})"
     "\n[\xE4\xB8\x80-",
     "deepseek-v3", "deepseek-v3", "deepseek-v3", true},
};
#undef VALAR_HUB_CASED
#undef VALAR_HUB_LOWER
#undef VALAR_HUB_UPPER
#undef VALAR_HUB_TIKTOKEN
#undef VALAR_HUB_MODERN
#undef VALAR_HUB_WORDS
#undef VALAR_HUB_SPACES
#undef VALAR_HUB_ENDINGS

/// All parts of a normalizer, pre-tokenizer, decoder or post-processor, whether a sequence or one.
inline std::vector<const Json*> parts_of(const Json& whole) {
    std::vector<const Json*> out;
    for (const char* list : {"normalizers", "pretokenizers", "decoders", "processors"})
        for (const Json& part : whole[list].items()) out.push_back(&part);
    if (out.empty() && whole.is_object()) out.push_back(&whole);
    return out;
}
inline const Json* find_part(const Json& whole, std::string_view type) {
    for (const Json* part : parts_of(whole))
        if ((*part)["type"].as_string() == type) return part;
    return nullptr;
}

inline std::string split_steps(const Json& pre_tokenizer) {
    std::string out;
    for (const Json* part : parts_of(pre_tokenizer)) {
        const std::string_view type = (*part)["type"].as_string();
        std::string step(type);
        if (type == "Split") {
            const Json& pattern = (*part)["pattern"];
            step.clear();
            for (char c : pattern["Regex"].as_string(pattern["String"].as_string()))
                step += c == '\r' ? "\\r" : c == '\n' ? "\\n" : std::string(1, c);
        } else if (type == "ByteLevel") {
            if (!(*part)["use_regex"].as_bool(true)) continue;
            step = "words";
        } else if (type == "Digits") {
            step = (*part)["individual_digits"].as_bool() ? "digit" : "digits";
        } else if (type == "Punctuation") {
            step = "punctuation";
        }
        out += (out.empty() ? "" : "\n") + step;
    }
    return out;
}

inline const char* pre_name(const Json& tokenizer) {
    const std::string steps = split_steps(tokenizer["pre_tokenizer"]);
    for (const PreName& row : pre_names)
        if (row.open_end ? steps.starts_with(row.steps) : steps == row.steps) {
            const bool merges = !tokenizer["model"]["ignore_merges"].as_bool();
            if (merges && row.merging != row.name) return row.merging;
            return find_part(tokenizer["normalizer"], "NFC") ? row.composing : row.name;
        }
    return nullptr;
}

// ---- The vocabulary ---------------------------------------------------------------------------

enum TokenType : int32_t { normal = 1, unknown, control, user_defined, unused, byte };

struct Vocabulary {
    std::vector<std::string> tokens;
    std::vector<int32_t> types;
    std::vector<float> scores;
    std::unordered_map<std::string_view, uint32_t> ids;  // of tokens that are there
    std::vector<std::string> merges;

    explicit Vocabulary(size_t count) : tokens(count), types(count, unused), scores(count) {}
    bool put(uint64_t id, std::string_view text, TokenType type) {
        if (id >= tokens.size()) return false;
        tokens[static_cast<size_t>(id)] = text;
        types[static_cast<size_t>(id)] = type;
        return true;
    }
    void index() {
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (types[i] == unused) tokens[i] = "[PAD" + std::to_string(i) + "]";
            else ids.emplace(tokens[i], static_cast<uint32_t>(i));
        }
    }
    std::optional<uint32_t> find(std::string_view token) const {
        const auto found = ids.find(token);
        return found == ids.end() ? std::nullopt : std::optional<uint32_t>(found->second);
    }
};

inline std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
    std::string out;
    for (size_t at = 0; at < text.size();)
        if (text.substr(at, from.size()) == from) out += to, at += from.size();
        else out += text[at++];
    return out;
}

inline constexpr const char* kSpace = "\xE2\x96\x81";  // U+2581 stands for a space

/// Some makers leave it out that a token steers; its spelling tells.
inline bool steers(std::string_view token) {
    constexpr std::string_view ends[][2] = {
        {"<|", "|>"}, {"<\xEF\xBD\x9C", "\xEF\xBD\x9C>"}, {"<unused", ">"}};
    for (const auto& [begin, end] : ends)
        if (token.starts_with(begin) && token.ends_with(end)) return true;
    for (std::string_view known : {"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
        if (token == known) return true;
    return false;
}

struct TokenizerReader {
    Files files;
    const Json &config, &tokenizer;
    Json settings;  // tokenizer_config.json
    std::string pre;
    valar::GgufWriter& writer;
    Vocabulary vocabulary;

    valar::Error bad(const std::string& what) const { return bad_file("tokenizer.json", what); }

    Result<void> read() {
        const std::string_view type = tokenizer["model"]["type"].as_string();
        const bool unigram = type == "Unigram";
        const bool bytes = find_part(tokenizer["pre_tokenizer"], "ByteLevel") ||
                           find_part(tokenizer["decoder"], "ByteLevel");
        // the oldest files leave the type out
        if (!unigram && type != "BPE" && !(type.empty() && tokenizer["model"].contains("merges")))
            return bad("model " + shown(type) + " is not supported; these are: BPE, Unigram");
        if (!bytes && !marks_spaces())
            return bad("is neither byte-level nor writes spaces as U+2581");
        for (auto step : {unigram ? &TokenizerReader::read_scores : &TokenizerReader::read_pieces,
                          &TokenizerReader::read_added_tokens, &TokenizerReader::read_merges})
            if (auto done = (this->*step)(); !done) return done;
        if (bytes && !unigram) return write_byte_level();
        if (!unigram) rank_by_merges();
        write_spaced(unigram ? "t5" : "llama");
        return {};
    }

    bool marks_spaces() const {
        for (const char* part : {"normalizer", "pre_tokenizer"}) {
            if (find_part(tokenizer[part], "Metaspace")) return true;
            const Json* replace = find_part(tokenizer[part], "Replace");
            if (replace && (*replace)["content"].as_string() == kSpace) return true;
        }
        return false;
    }
    TokenType type_of(std::string_view piece) const {
        const bool is_byte = piece.size() == 6 && piece.starts_with("<0x") && piece[5] == '>';
        if (is_byte && tokenizer["model"]["byte_fallback"].as_bool()) return byte;
        return piece == tokenizer["model"]["unk_token"].as_string() && !piece.empty() ? unknown
                                                                                      : normal;
    }
    Result<void> beyond(const std::string& token) const {
        return bad("token " + shown(token) + " has an id beyond the " +
                   std::to_string(vocabulary.tokens.size()) + " rows of the embedding");
    }
    Result<void> read_pieces() {
        for (const auto& [piece, id] : tokenizer["model"]["vocab"].members())
            if (!vocabulary.put(id.as_uint(UINT64_MAX), piece, type_of(piece)))
                return beyond(piece);
        return {};
    }
    Result<void> read_scores() {
        const Json& model = tokenizer["model"];
        uint64_t id = 0;
        for (const Json& entry : model["vocab"].items()) {
            const std::string piece(entry[0].as_string());
            const TokenType type = id == model["unk_id"].as_uint(UINT64_MAX) ? unknown
                                                                             : type_of(piece);
            if (!vocabulary.put(id, piece, type)) return beyond(piece);
            vocabulary.scores[static_cast<size_t>(id++)] = static_cast<float>(entry[1].as_double());
        }
        return {};
    }
    Result<void> read_added_tokens() {
        for (const Json& token : tokenizer["added_tokens"].items()) {
            const std::string_view text = token["content"].as_string();
            const bool special = token["special"].as_bool() || steers(text);
            const uint64_t id = token["id"].as_uint(UINT64_MAX);
            if (special && id < vocabulary.types.size() &&
                vocabulary.types[static_cast<size_t>(id)] == unknown)
                continue;
            // those behind the embedding are of other parts of a model: images, sounds
            vocabulary.put(id, special ? std::string(text) : replaced(text, kSpace, " "),
                           special ? control : user_defined);
        }
        vocabulary.index();
        return {};
    }
    Result<void> read_merges() {
        for (const Json& merge : tokenizer["model"]["merges"].items()) {
            std::string text(merge.as_string());
            if (merge.size() == 2)
                text = replaced(merge[0].as_string(), " ", "\xC4\xA0") + " " +
                       replaced(merge[1].as_string(), " ", "\xC4\xA0");
            if (text.find(' ', 1) == text.npos)
                return bad("merge " + std::to_string(vocabulary.merges.size()) + " is no pair");
            vocabulary.merges.push_back(std::move(text));
        }
        return {};
    }
    /// SentencePiece merges by the score of what comes out: the earlier merge has the better one.
    void rank_by_merges() {
        const float worst = -static_cast<float>(vocabulary.merges.size()) - 1;
        std::fill(vocabulary.scores.begin(), vocabulary.scores.end(), worst);
        for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
            std::string piece = vocabulary.merges[i];
            piece.erase(piece.find(' ', 1), 1);
            const auto id = vocabulary.find(piece);
            if (id && vocabulary.scores[*id] == worst)
                vocabulary.scores[*id] = -static_cast<float>(i) - 1;
        }
    }

    Result<void> write_byte_level() {
        const char* name = pre.empty() ? pre_name(tokenizer) : pre.c_str();
        if (!name)
            return bad("splits text in a way that is not known here; name one with --pre: " +
                       shown(split_steps(tokenizer["pre_tokenizer"])));
        writer.set_string("tokenizer.ggml.model", "gpt2");
        writer.set_string("tokenizer.ggml.pre", name);
        write_tokens();
        const std::vector<std::string_view> merges(vocabulary.merges.begin(),
                                                   vocabulary.merges.end());
        writer.set_strings("tokenizer.ggml.merges", merges);
        return {};
    }
    void write_spaced(const char* model) {
        writer.set_string("tokenizer.ggml.model", model);
        writer.set_string("tokenizer.ggml.pre", "default");
        write_tokens();
        writer.set_array<float>("tokenizer.ggml.scores", vocabulary.scores);
        writer.set("tokenizer.ggml.add_space_prefix", prefixes_space());
        const Json& normalizer = tokenizer["normalizer"];
        if (const Json* map = find_part(normalizer, "Precompiled"))
            writer.set_array<uint8_t>("tokenizer.ggml.precompiled_charsmap",
                                      base64((*map)["precompiled_charsmap"].as_string()));
        for (const Json* part : parts_of(normalizer))
            if ((*part)["pattern"]["Regex"].as_string() == " {2,}")
                writer.set("tokenizer.ggml.remove_extra_whitespaces", true);
    }
    bool prefixes_space() const {
        if (find_part(tokenizer["normalizer"], "Prepend")) return true;
        const Json* spaces = find_part(tokenizer["pre_tokenizer"], "Metaspace");
        if (!spaces) return false;
        const std::string_view scheme = (*spaces)["prepend_scheme"].as_string();
        return scheme.empty() ? (*spaces)["add_prefix_space"].as_bool(true) : scheme != "never";
    }
    static std::vector<uint8_t> base64(std::string_view text) {
        constexpr std::string_view digits =
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        std::vector<uint8_t> out;
        uint32_t bits = 0;
        size_t count = 0;
        for (char c : text) {
            const size_t value = digits.find(c);
            if (value == digits.npos) break;
            bits = bits << 6 | static_cast<uint32_t>(value);
            if (++count % 4 == 1) continue;
            out.push_back(static_cast<uint8_t>(bits >> (6 - 2 * ((count - 1) % 4))));
        }
        return out;
    }
    void write_tokens() {
        const std::vector<std::string_view> views(vocabulary.tokens.begin(),
                                                  vocabulary.tokens.end());
        writer.set_strings("tokenizer.ggml.tokens", views);
        writer.set_array<int32_t>("tokenizer.ggml.token_type", vocabulary.types);
    }

    // ---- Special tokens and templates

    /// As tokenizer_config.json has them: a text, or an object with it.
    std::optional<uint32_t> special(const std::string& name) const {
        const Json& entry = settings[name + "_token"];
        const std::string_view text = entry.is_object() ? entry["content"].as_string()
                                                        : entry.as_string();
        if (!text.empty())
            if (const auto id = vocabulary.find(text)) return id;
        const Json& id = config[name + "_token_id"];
        const uint64_t number = (id.is_array() ? id[0] : id).as_uint(UINT64_MAX);
        if (number >= vocabulary.tokens.size()) return std::nullopt;
        return static_cast<uint32_t>(number);
    }
    Result<void> write_specials() {
        constexpr const char* names[][2] = {
            {"bos", "bos"}, {"eos", "eos"}, {"unk", "unknown"}, {"pad", "padding"}};
        for (const auto& [name, key] : names)
            if (const auto id = special(name))
                writer.set("tokenizer.ggml." + std::string(key) + "_token_id", *id);
        auto generation = files.json("generation_config.json", false);
        if (!generation) return generation.error();
        // an answer ends at any of several: GGUF has a key for one more
        const auto eos = special("eos");
        for (const Json& id : (*generation)["eos_token_id"].items()) {
            const uint64_t number = id.as_uint(UINT64_MAX);
            if (!eos || number == *eos || number >= vocabulary.tokens.size()) continue;
            writer.set("tokenizer.ggml.eot_token_id", static_cast<uint32_t>(number));
            break;
        }
        bool first = settings["add_bos_token"].as_bool(),
             last = settings["add_eos_token"].as_bool();
        if (const Json* rule = find_part(tokenizer["post_processor"], "TemplateProcessing")) {
            const auto single = (*rule)["single"].items();
            const auto is_special = [](const Json& part) { return part.contains("SpecialToken"); };
            first = !single.empty() && is_special(single.front());
            last = !single.empty() && is_special(single.back());
        }
        writer.set("tokenizer.ggml.add_bos_token", first);
        writer.set("tokenizer.ggml.add_eos_token", last);
        return {};
    }
    Result<void> write_templates() {
        auto text = files.text("chat_template.jinja", false);
        if (!text) return text.error();
        const Json& setting = settings["chat_template"];
        if (text->empty()) *text = setting.as_string();
        std::vector<std::string_view> names;
        for (const Json& entry : setting.items()) {
            const std::string_view name = entry["name"].as_string();
            if (name == "default" && text->empty()) *text = entry["template"].as_string();
            if (name.empty() || name.size() > 100 || name == "default") continue;
            if (std::find(names.begin(), names.end(), name) != names.end()) continue;
            names.push_back(name);
            writer.set_string("tokenizer.chat_template." + std::string(name),
                              entry["template"].as_string());
        }
        if (!names.empty()) writer.set_strings("tokenizer.chat_templates", names);
        if (!text->empty()) writer.set_string("tokenizer.chat_template", *text);
        return {};
    }
};

/// `rows`: of the embedding; a token has a row. `pre`: what the file does not need to say then.
inline Result<void> write_tokenizer(Files files, const Json& config, size_t rows,
                                    const std::string& pre, valar::GgufWriter& writer) {
    auto tokenizer = files.json("tokenizer.json");
    if (!tokenizer) return tokenizer.error();
    auto settings = files.json("tokenizer_config.json", false);
    if (!settings) return settings.error();
    TokenizerReader reader{files, config, *tokenizer, *settings, pre, writer, Vocabulary(rows)};
    for (auto step : {&TokenizerReader::read, &TokenizerReader::write_specials,
                      &TokenizerReader::write_templates})
        if (auto done = (reader.*step)(); !done) return done;
    return {};
}

}  // namespace example

#endif  // VALAR_EXAMPLES_HUB_TOKENIZER_HPP
