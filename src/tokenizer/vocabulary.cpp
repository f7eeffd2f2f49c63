// Reads a vocabulary from a model file.
#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/text.hpp"
#include "tokenizer/vocabulary.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// Reads tokenizer.ggml.* into a Vocabulary. Of equal pieces the lowest id is made from text.
// Merges that name no piece are refused; those of special tokens are skipped.
class VocabularyReader {
public:
    VocabularyReader(const Gguf& file, std::string_view chat_template,
                     std::span<const std::string_view> ends, Vocabulary& vocabulary)
        : file_(file), chat_template_(chat_template), ends_(ends), v_(vocabulary) {}
    Result<void> read() {
        for (auto step : {&VocabularyReader::read_model, &VocabularyReader::read_kinds,
                          &VocabularyReader::read_pieces, &VocabularyReader::read_ids,
                          &VocabularyReader::read_flags, &VocabularyReader::read_specials,
                          &VocabularyReader::read_strips, &VocabularyReader::build_index,
                          &VocabularyReader::read_ranks})
            if (auto result = (this->*step)(); !result) return result;
        return {};
    }

private:
    Error bad(const char* key, std::string_view what) const {
        return make_error(ErrorKind::bad_data,
                          join({file_.name(), ": tokenizer.ggml.", key, ": ", what}));
    }
    Error unsupported(const char* key, std::string_view value) const {
        return make_error(ErrorKind::unsupported,
                          join({file_.name(), ": tokenizer.ggml.", key, " = \"",
                                utf8_repair(value.substr(0, 64)), "\" is not supported"}));
    }
    bool is_sentencepiece() const {
        return v_.algorithm == Algorithm::sentence_bpe || v_.algorithm == Algorithm::unigram;
    }
    bool has_lattice() const {
        return v_.algorithm == Algorithm::unigram || v_.algorithm == Algorithm::word_piece;
    }
    bool has_printable_bytes() const { return v_.algorithm == Algorithm::byte_bpe; }

    Result<void> read_model() {
        auto model = file_.get_string("tokenizer.ggml.model");
        if (!model) return model.error();
        if (*model == "gpt2") return read_pre();
        for (const auto& [name, algorithm] : models) {
            if (*model != name) continue;
            v_.algorithm = algorithm;
            return read_normalizer();
        }
        return unsupported("model", *model);
    }
    static constexpr std::pair<std::string_view, Algorithm> models[] = {
        {"llama", Algorithm::sentence_bpe},
        {"t5", Algorithm::unigram},
        {"bert", Algorithm::word_piece},
        {"gemma4", Algorithm::spaced_bpe}};

    Result<void> read_pre() {
        std::string pre = "default";  // files of before there were names
        if (file_.find("tokenizer.ggml.pre")) {
            auto named = file_.get_string("tokenizer.ggml.pre");
            if (!named) return named.error();
            pre = *named;
        }
        if (has_name("gemma4 sarvam-moe granite-embed-multi-311m", pre))
            v_.algorithm = Algorithm::spaced_bpe;
        else v_.pre = find_pre_tokenizer(pre);
        if (!v_.pre && has_printable_bytes()) return unsupported("pre", pre);
        return {};
    }

    Result<void> read_normalizer() {
        auto trims = file_.get_bool("tokenizer.ggml.remove_extra_whitespaces", false);
        if (!trims) return trims.error();
        v_.sentence.remove_extra_spaces = *trims;
        auto lowers = file_.get_bool("tokenizer.ggml.normalizer.lowercase", true);
        if (!lowers) return lowers.error();
        auto strips = file_.get_bool("tokenizer.ggml.normalizer.strip_accents", *lowers);
        if (!strips) return strips.error();
        v_.bert = {*lowers, *strips};
        const GgufKey* map = file_.find("tokenizer.ggml.precompiled_charsmap");
        if (!map || map->count == 0) return {};
        auto numbers = file_.get_ints("tokenizer.ggml.precompiled_charsmap");
        if (!numbers) return numbers.error();
        if (numbers->size() > max_charsmap_bytes)
            return bad("precompiled_charsmap", format("%zu bytes", numbers->size()));
        std::string bytes;
        for (size_t i = 0; i < numbers->size(); ++i) bytes += char((*numbers)[i]);
        if (!v_.sentence.map.read(std::move(bytes)))
            return bad("precompiled_charsmap", "it is no map of characters");
        return {};
    }
    static constexpr size_t max_charsmap_bytes = size_t{1} << 24;

    Result<void> read_kinds() {
        auto tokens = file_.get_strings("tokenizer.ggml.tokens");
        if (!tokens) return tokens.error();
        if (tokens->size() == 0 || tokens->size() > Tokenizer::max_vocabulary)
            return bad("tokens", format("%zu tokens", tokens->size()));
        v_.kinds.assign(tokens->size(), TokenKind::normal);
        if (!file_.find("tokenizer.ggml.token_type")) return {};
        auto types = file_.get_ints("tokenizer.ggml.token_type");
        if (!types) return types.error();
        if (types->size() != tokens->size())
            return bad("token_type",
                       format("%zu types for %zu tokens", types->size(), tokens->size()));
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const int64_t type = (*types)[id];
            if (type < 0 || type > 6)
                return bad("token_type", format("token %zu has type %lld", id, (long long)type));
            v_.kinds[id] = type == 0 ? TokenKind::normal : TokenKind(type);
        }
        return {};
    }

    Result<void> read_pieces() {
        auto tokens = file_.get_strings("tokenizer.ggml.tokens");
        if (!tokens) return tokens.error();
        v_.bytes.fill(no_token);
        v_.pieces.reserve(tokens->size(), tokens->size() * 8);
        size_t id = 0;
        for (std::string_view text : *tokens) {
            const std::string piece = piece_bytes(text, v_.kinds[id]);
            if (piece.size() > Tokenizer::max_piece_bytes)
                return bad("tokens", format("token %zu has %zu bytes", id, piece.size()));
            if (v_.kinds[id] == TokenKind::byte && piece.size() != 1)
                return bad("tokens", format("token %zu is a byte, but not spelled <0xXX>", id));
            v_.pieces.add(piece);
            ++id;
        }
        return {};
    }

    // The bytes that a token stands for. Special tokens are spelled as they are.
    std::string piece_bytes(std::string_view text, TokenKind kind) const {
        if (kind == TokenKind::byte) return byte_spelled(text);
        if (kind == TokenKind::control || kind == TokenKind::unknown) return std::string(text);
        if (v_.algorithm == Algorithm::word_piece)  // only the start of a word is marked
            return join(
                {with_spaces(text.substr(0, 3)), text.substr(std::min(text.size(), size_t{3}))});
        if (!has_printable_bytes()) return with_spaces(text);
        return kind == TokenKind::user_defined ? std::string(text) : from_printable(text);
    }
    static std::string byte_spelled(std::string_view text) {  // <0x0A>
        auto digit = [&](size_t at) { return std::string_view("0123456789ABCDEF").find(text[at]); };
        if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return {};
        if (digit(3) > 15 || digit(4) > 15) return {};
        return std::string(1, char(digit(3) * 16 + digit(4)));
    }
    // GPT-2 writes a byte as a printable character: itself where it is one in Latin-1, else
    // U+0100 and following in order. A piece with any other character is spelled as it is.
    static std::string from_printable(std::string_view text) {
        std::string bytes;
        for (size_t at = 0; at < text.size();) {
            const char32_t c = utf8_next(text, &at);
            const bool itself = (c > 0x20 && c < 0x7F) || (c > 0xA0 && c < 0x100 && c != 0xAD);
            if (itself) bytes += char(c);
            else if (c >= 0x100 && c <= 0x120) bytes += char(c - 0x100);        // 00..20
            else if (c > 0x120 && c <= 0x142) bytes += char(c - 0x121 + 0x7F);  // 7F..A0
            else if (c == 0x143) bytes += '\xAD';
            else return std::string(text);
        }
        return bytes;
    }

    Result<void> read_id(const char* key, Token* id) {
        const std::string name = join({"tokenizer.ggml.", key});
        if (!file_.find(name)) return {};
        auto value = file_.get_uint(name);
        if (!value) return value.error();
        if (*value >= v_.kinds.size())
            return bad(key,
                       format("%llu, of %zu tokens", (unsigned long long)*value, v_.kinds.size()));
        *id = Token(*value);
        return {};
    }

    Result<void> read_ids() {
        Token turn = no_token, message = no_token;
        const std::pair<const char*, Token*> ids[] = {{"bos_token_id", &v_.bos},
                                                      {"eos_token_id", &v_.eos},
                                                      {"eot_token_id", &turn},
                                                      {"eom_token_id", &message},
                                                      {"unknown_token_id", &v_.unknown}};
        for (auto [key, id] : ids)
            if (auto result = read_id(key, id); !result) return result;
        for (auto [key, id] : {std::pair("cls_token_id", &v_.bos), {"seperator_token_id", &v_.eos}})
            if (*id == no_token)
                if (auto result = read_id(key, id); !result) return result;
        for (Token id : {v_.bos, v_.eos, turn, message})  // files call some of them normal
            if (id != no_token && v_.pieces[size_t(id)].size() > 1)
                v_.kinds[size_t(id)] = TokenKind::control;
        mark_ends({v_.eos, turn, message});
        const auto unknown = std::find(v_.kinds.begin(), v_.kinds.end(), TokenKind::unknown);
        if (v_.unknown == no_token && !has_printable_bytes() && unknown != v_.kinds.end() &&
            !file_.find("tokenizer.ggml.unknown_token_id"))
            v_.unknown = Token(unknown - v_.kinds.begin());
        if (v_.unknown != no_token && v_.algorithm == Algorithm::word_piece)
            v_.kinds[size_t(v_.unknown)] = TokenKind::unknown;  // files call it control
        if (v_.unknown != no_token &&
            (v_.kinds[size_t(v_.unknown)] == TokenKind::control || v_.ends[size_t(v_.unknown)]))
            v_.unknown = no_token;  // text must not make it
        return {};
    }

    void mark_ends(std::initializer_list<Token> ends) {
        v_.ends = std::vector<bool>(v_.kinds.size());
        for (Token id : ends)
            if (id != no_token) v_.ends[size_t(id)] = true;
        for (size_t id = 0; id < v_.kinds.size(); ++id)
            if (v_.kinds[id] == TokenKind::control || v_.kinds[id] == TokenKind::user_defined)
                for (std::string_view spelling : ends_)
                    if (v_.pieces[id] == spelling) v_.ends[id] = true;
    }

    Result<void> read_flags() {
        const bool plain = is_sentencepiece() || v_.algorithm == Algorithm::word_piece;
        const bool unigram = v_.algorithm == Algorithm::unigram;
        bool& prefix = v_.sentence.add_space_prefix;
        v_.add_bos = v_.pre ? v_.pre->add_bos : !unigram;
        v_.add_eos = v_.pre ? v_.pre->add_eos : unigram || v_.algorithm == Algorithm::word_piece;
        prefix = plain;
        const std::pair<const char*, bool*> flags[] = {
            {"tokenizer.ggml.add_bos_token", &v_.add_bos},
            {"tokenizer.ggml.add_eos_token", &v_.add_eos},
            {"tokenizer.ggml.add_space_prefix", &prefix}};
        for (auto [key, flag] : flags) {
            auto value = file_.get_bool(key, *flag);
            if (!value) return value.error();
            *flag = *value;
        }
        prefix &= plain;
        v_.add_bos |= v_.algorithm == Algorithm::spaced_bpe;  // the first files of Gemma 4 deny it
        return {};
    }

    // Files do not tell which special tokens take the white space beside them: their makers do.
    // A row holds where its file names all that the row names.
    struct StripRow {
        std::string_view architectures, models, tokens;  // names; no tokens: all special ones
        std::string_view except;
        bool left, right;
    };
    static constexpr StripRow strip_rows[] = {
        {"phi3", "llama", {}, "<unk> <s> <|endoftext|>", false, true},
        {"jina-bert-v2 jina-bert-v3 nomic-bert-moe", "gpt2 t5", "<mask>", {}, true, false},
        {"modern-bert", "gpt2", "[MASK]", {}, true, false}};
    Result<void> read_strips() {
        auto architecture = file_.get_string("general.architecture");
        auto model = file_.get_string("tokenizer.ggml.model");
        for (const StripRow& row : strip_rows) {
            if (!architecture || !has_name(row.architectures, *architecture)) continue;
            if (!model || !has_name(row.models, *model)) continue;
            v_.strips_left.resize(v_.kinds.size());
            v_.strips_right.resize(v_.kinds.size());
            for (size_t id = 0; id < v_.kinds.size(); ++id) {
                const bool named = row.tokens.empty() || has_name(row.tokens, v_.pieces[id]);
                if (v_.from_text[id] || !named || has_name(row.except, v_.pieces[id])) continue;
                v_.strips_left[id] = row.left;
                v_.strips_right[id] = row.right;
            }
        }
        return {};
    }

    // Which tokens are recognised by their spelling, and where; what is left, merging may make.
    Result<void> read_specials() {
        const std::vector<std::string_view> templates = chat_templates();
        v_.from_text = std::vector<bool>(v_.kinds.size());
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const std::string_view piece = v_.pieces[id];
            const TokenKind kind = v_.kinds[id];
            const bool control = kind == TokenKind::control;
            const bool user = kind == TokenKind::user_defined;
            const bool guarded = control || (user && stands_in(templates, piece));
            v_.from_text[id] = kind == TokenKind::normal || (user && !guarded) ||
                               (v_.algorithm == Algorithm::sentence_bpe &&
                                kind == TokenKind::unused);
            if (v_.from_text[id] && has_lattice()) v_.lattice.add(piece, Token(id), false);
            if (v_.from_text[id]) v_.longest = std::max(v_.longest, piece.size());
            if (user && !guarded && is_sentencepiece()) v_.whole.add(piece, Token(id), false);
            else if (control || user) v_.specials.add(spelling(piece), Token(id), guarded);
        }
        v_.specials.build();
        v_.whole.build();
        v_.lattice.build();
        return {};
    }
    // How the text must spell a special token: Gemma 4's are looked for before spaces are replaced.
    std::string_view spelling(std::string_view piece) {
        if (v_.algorithm == Algorithm::word_piece && piece.size() > 1 && piece[0] == ' ')
            return piece.substr(1);
        if (v_.algorithm != Algorithm::spaced_bpe || piece.find(' ') == std::string_view::npos)
            return piece;
        std::string& marked = v_.spellings.emplace_back();
        for (char c : piece) marked += c == ' ' ? "\xE2\x96\x81" : std::string(1, c);
        return marked;
    }
    std::vector<std::string_view> chat_templates() const {
        std::vector<std::string_view> templates = {chat_template_};
        for (const GgufKey& key : file_.keys())
            if (key.name.substr(0, 23) == "tokenizer.chat_template" && !key.is_array)
                if (auto text = file_.get_string(key.name)) templates.push_back(*text);
        return templates;
    }
    static bool stands_in(const std::vector<std::string_view>& templates, std::string_view piece) {
        if (piece.find_first_not_of(" \t\r\n") == std::string_view::npos) return false;
        return std::any_of(templates.begin(), templates.end(), [&](std::string_view text) {
            return text.find(piece) != std::string_view::npos;
        });
    }

    // Pieces that text can make come first, so that no special token hides one of them.
    Result<void> build_index() {
        v_.pieces.start_index();
        for (const bool from_text : {true, false})
            for (size_t id = 0; id < v_.kinds.size(); ++id)
                if (v_.from_text[id] == from_text && !v_.pieces[id].empty())
                    v_.pieces.insert(Token(id));
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const bool single = has_printable_bytes()
                                    ? v_.from_text[id] && v_.pieces[id].size() == 1
                                    : v_.kinds[id] == TokenKind::byte;
            Token& token = v_.bytes[single ? uint8_t(v_.pieces[id][0]) : 0];
            if (single && token == no_token) token = Token(id);
        }
        return {};
    }

    Result<void> read_ranks() {
        if (v_.algorithm == Algorithm::word_piece) return {};
        return is_sentencepiece() ? read_scores() : read_merges();
    }

    Result<void> read_scores() {
        auto scores = file_.get_floats("tokenizer.ggml.scores");
        if (!scores) return scores.error();
        if (scores->size() != v_.kinds.size())
            return bad("scores",
                       format("%zu scores for %zu tokens", scores->size(), v_.kinds.size()));
        for (size_t id = 0; id < scores->size(); ++id)
            if (!std::isfinite(float((*scores)[id])))
                return bad("scores", format("token %zu has no finite score", id));
        if (v_.algorithm == Algorithm::unigram) rate_pieces(*scores);
        else rank_pieces(*scores);
        return {};
    }

    // A user-defined piece is better than others of its bytes, and the more so the longer it is.
    void rate_pieces(const GgufNumbers<double>& scores) {
        float lowest = FLT_MAX;
        for (size_t id = 0; id < scores.size(); ++id) {
            v_.scores.push_back(float(scores[id]));
            if (v_.kinds[id] == TokenKind::normal) lowest = std::min(lowest, v_.scores[id]);
        }
        v_.unknown_score = lowest - 10;
        for (size_t id = 0; id < scores.size(); ++id) {
            if (v_.kinds[id] != TokenKind::user_defined) continue;
            const std::string_view piece = v_.pieces[id];
            const auto spaces = std::count(piece.begin(), piece.end(), ' ');  // of three bytes
            v_.scores[id] = 0.1f * float(piece.size() + 2 * size_t(spaces)) - 0.1f;
        }
    }

    void rank_pieces(const GgufNumbers<double>& scores) {
        std::vector<std::pair<double, Token>> order(scores.size());
        for (size_t id = 0; id < order.size(); ++id) order[id] = {-scores[id], Token(id)};
        std::sort(order.begin(), order.end());
        v_.ranks.resize(order.size());
        for (size_t i = 0; i < order.size(); ++i) {
            const bool tie = i > 0 && order[i].first == order[i - 1].first;
            v_.ranks[size_t(order[i].second)] = tie ? v_.ranks[size_t(order[i - 1].second)]
                                                    : uint32_t(i);
        }
    }

    Result<void> read_merges() {
        auto merges = file_.get_strings("tokenizer.ggml.merges");
        if (!merges) return merges.error();
        if (merges->size() > Tokenizer::max_vocabulary)
            return bad("merges", format("%zu merges", merges->size()));
        v_.pairs.reserve(merges->size());
        uint32_t rank = 0;
        for (std::string_view merge : *merges) {
            const size_t space = merge.find(' ', 1);
            if (space == std::string_view::npos)
                return bad("merges", format("merge %u is not a pair of pieces", rank));
            const auto bytes = has_printable_bytes() ? from_printable : with_spaces;
            const std::string left = bytes(merge.substr(0, space));
            const std::string right = bytes(merge.substr(space + 1));
            const Token ids[] = {v_.pieces.find(left), v_.pieces.find(right),
                                 v_.pieces.find(left + right)};
            bool usable = true;
            for (Token id : ids) {
                if (id == no_token)
                    return bad("merges", format("merge %u names a piece that is no token", rank));
                usable = usable && v_.from_text[size_t(id)];
            }
            if (usable) v_.pairs.insert(ids[0], ids[1], {rank, ids[2]});
            ++rank;
        }
        return {};
    }

    const Gguf& file_;
    std::string_view chat_template_;
    std::span<const std::string_view> ends_;
    Vocabulary& v_;
};

}  // namespace

Result<void> read_vocabulary(const Gguf& file, std::string_view chat_template,
                             std::span<const std::string_view> ends, Vocabulary& vocabulary) {
    return VocabularyReader(file, chat_template, ends, vocabulary).read();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
