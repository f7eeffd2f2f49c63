// >>tokenizer
// Owns: the vocabulary in memory, the splitters, the merge loop, the matcher of special tokens.
// Byte-level BPE: special tokens are cut out, the text between them goes through the splitter of
// its pre-tokenizer, and each word is merged pair by pair, lowest rank first (Sennrich 2016).
// SentencePiece BPE: no words; pairs are ranked by the score of the piece that they make.
// Pieces are kept as the bytes they stand for: neither the printable alphabet of GPT-2 nor the
// U+2581 of SentencePiece gets past `open`.
#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/text.hpp"
#include "tokenizer_internal.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr Token no_token = -1;
constexpr uint32_t no_rank = UINT32_MAX;
constexpr uint32_t no_symbol = UINT32_MAX;

uint64_t hash_piece(std::string_view piece) {
    constexpr uint64_t factor = 0x9E3779B97F4A7C15u;
    uint64_t hash = piece.size() * factor;
    auto mix = [&hash](uint64_t word) {
        hash = (hash ^ word) * factor;
        hash ^= hash >> 32;
    };
    size_t at = 0;
    uint64_t word = 0;
    for (; at + 8 <= piece.size(); at += 8) {
        std::memcpy(&word, piece.data() + at, 8);
        mix(word);
    }
    word = 0;
    for (; at < piece.size(); ++at) word = word << 8 | uint8_t(piece[at]);
    mix(word);
    return hash;
}

}  // namespace

// ---- tables of a vocabulary -----------------------------------------------------------------

// All pieces back to back, and a hash from the bytes of a piece to its id. Of equal pieces the
// first that is inserted is found.
class PieceTable {
public:
    void reserve(size_t count, size_t bytes) {
        starts_.reserve(count + 1);
        bytes_.reserve(bytes);
    }
    void add(std::string_view piece) {
        bytes_ += piece;
        starts_.push_back(bytes_.size());
    }
    size_t size() const { return starts_.size() - 1; }
    std::string_view operator[](size_t id) const {
        return {bytes_.data() + starts_[id], starts_[id + 1] - starts_[id]};
    }

    void start_index() { slots_.assign(std::bit_ceil(size() * 2 + 1), {}); }
    void insert(Token id) {
        const uint64_t hash = hash_piece((*this)[size_t(id)]);
        Slot& slot = slots_[slot_of((*this)[size_t(id)], hash)];
        if (slot.id == no_token) slot = {id, uint32_t(hash >> 32)};
    }
    Token find(std::string_view piece) const {
        return slots_[slot_of(piece, hash_piece(piece))].id;
    }

private:
    struct Slot {
        Token id = no_token;
        uint32_t tag = 0;  // spares most looks at the pieces of others
    };
    size_t slot_of(std::string_view piece, uint64_t hash) const {
        const size_t mask = slots_.size() - 1;
        size_t slot = size_t(hash) & mask;
        while (slots_[slot].id != no_token && (slots_[slot].tag != uint32_t(hash >> 32) ||
                                               (*this)[size_t(slots_[slot].id)] != piece))
            slot = (slot + 1) & mask;
        return slot;
    }
    std::string bytes_;
    std::vector<size_t> starts_ = {0};
    std::vector<Slot> slots_ = {{}};
};

// What a pair of neighbours becomes, and how urgent that is: a lower rank goes first.
struct Merge {
    uint32_t rank = no_rank;
    Token token = no_token;
};

// The merges of byte-level BPE, by the two ids.
class PairTable {
public:
    void reserve(size_t count) { slots_.assign(std::bit_ceil(count * 2 + 1), {}); }
    void insert(Token left, Token right, Merge merge) {
        Slot& slot = slots_[slot_of(left, right)];
        if (slot.merge.rank == no_rank) slot = {left, right, merge};
    }
    Merge find(Token left, Token right) const { return slots_[slot_of(left, right)].merge; }

private:
    struct Slot {
        Token left = no_token, right = no_token;
        Merge merge;
    };
    size_t slot_of(Token left, Token right) const {
        const size_t mask = slots_.size() - 1;
        const uint64_t key = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
        size_t slot = size_t((key * 0x9E3779B97F4A7C15u) >> 29) & mask;
        while (slots_[slot].merge.rank != no_rank &&
               (slots_[slot].left != left || slots_[slot].right != right))
            slot = (slot + 1) & mask;
        return slot;
    }
    std::vector<Slot> slots_ = {{}};
};

// Tokens that are recognised by their spelling: sorted, so that those that share a beginning
// are neighbours and a match narrows the range byte by byte.
class SpellingMatcher {
public:
    struct Match {
        Token token = no_token;
        size_t length = 0;  // 0: none
    };
    // The spelling is borrowed. A template_only token matches in bytes of the template alone.
    void add(std::string_view spelling, Token token, bool template_only) {
        if (!spelling.empty()) entries_.push_back({spelling, token, template_only});
    }
    void build() {
        sort_items(entries_,
                   [](const Entry& a, const Entry& b) { return a.spelling < b.spelling; });
        size_t at = 0;
        for (size_t byte = 0; byte < 256; ++byte) {
            first_[byte] = at;
            while (at < entries_.size() && uint8_t(entries_[at].spelling[0]) == byte) ++at;
        }
        first_[256] = at;
    }
    bool may_begin(char c) const { return first_[uint8_t(c)] != first_[uint8_t(c) + 1u]; }
    // The longest spelling at text[at]; bytes before template_end are the template's.
    Match longest(std::string_view text, size_t at, size_t template_end) const {
        Match match;
        auto low = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at])]);
        auto high = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at]) + 1u]);
        for (size_t length = 1; low != high; ++length) {
            for (; low != high && low->spelling.size() == length; ++low)
                if (match.length != length && (!low->template_only || at + length <= template_end))
                    match = {low->token, length};
            if (at + length >= text.size()) break;
            const uint8_t next = uint8_t(text[at + length]);
            low = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) < next;
            });
            high = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) == next;
            });
        }
        return match;
    }

private:
    struct Entry {
        std::string_view spelling;
        Token token;
        bool template_only;
    };
    std::vector<Entry> entries_;
    std::array<size_t, 257> first_ = {};
};

// What becomes of the text between special tokens, by tokenizer.ggml.pre.
struct PreTokenizer {
    std::string_view name;
    // Where the word that begins at `at` ends.
    size_t (*word_end)(std::string_view text, size_t at);
    bool compose;      // NFC before anything else
    bool whole_words;  // a word that is a token is taken without merging
    bool add_bos;      // unless the file says otherwise
};

namespace {

// ---- pre-tokenizers -------------------------------------------------------------------------

enum class SplitClass : uint8_t { end, other, letter, number, space, newline };

struct SplitChar {
    SplitClass what;
    size_t next;  // where the next character begins
};

SplitClass split_class(char32_t c) {
    if (c == '\r' || c == '\n') return SplitClass::newline;
    if (is_letter(c)) return SplitClass::letter;
    if (is_number(c)) return SplitClass::number;
    return is_whitespace(c) ? SplitClass::space : SplitClass::other;
}

SplitChar split_char(std::string_view text, size_t at) {
    if (at >= text.size()) return {SplitClass::end, at};
    const uint8_t c = uint8_t(text[at]);
    if (c < 0x80) {
        if (unsigned(c | 0x20) - 'a' < 26) return {SplitClass::letter, at + 1};
        if (unsigned(c) - '0' < 10) return {SplitClass::number, at + 1};
        if (c > ' ') return {SplitClass::other, at + 1};
    }
    const char32_t code_point = utf8_next(text, &at);
    return {split_class(code_point), at};
}

size_t run_end(std::string_view text, size_t at, SplitClass what, size_t most = SIZE_MAX) {
    SplitChar c = split_char(text, at);
    for (; c.what == what && most > 0; --most) c = split_char(text, at = c.next);
    return at;
}

// The length of the English contraction at the apostrophe text[0], or 0.
size_t contraction_length(std::string_view text, bool any_case) {
    if (any_case && text.substr(1, 2) == "\xC5\xBF") return 3;  // U+017F folds to s
    auto letter = [&](size_t at) {
        const char c = at < text.size() ? text[at] : '\0';
        return any_case && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
    };
    const char a = letter(1), b = letter(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// A run of white space: where it ends, where its last character begins, where the last line end
// in it ends (0: there is none), and what stands behind it.
struct SpaceRun {
    size_t end, last, line_end;
    SplitClass behind;
};

SpaceRun space_run(std::string_view text, size_t at) {
    SpaceRun run = {at, at, 0, SplitClass::end};
    SplitChar c = split_char(text, at);
    for (; c.what >= SplitClass::space; c = split_char(text, run.end)) {
        run.last = run.end;
        run.end = c.next;
        if (c.what == SplitClass::newline) run.line_end = run.end;
    }
    run.behind = c.what;
    return run;
}

// \s+(?!\S)|\s+ -- up to a word the run leaves its last character to that word.
size_t space_end(const SpaceRun& run, size_t at, SplitClass stop = SplitClass::end) {
    const bool whole = run.behind == SplitClass::end || run.behind == stop || run.last == at;
    return whole ? run.end : run.last;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// Characters of class `stop` are cut out first, one by one: what is around them does not see them.
size_t old_word_end(std::string_view text, size_t at, SplitClass stop) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), false)) return at + length;
    SplitChar c = split_char(text, at);
    if (text[at] == ' ') {
        const SplitChar next = split_char(text, c.next);
        const bool ends = next.what == SplitClass::end || next.what == stop;
        if (!ends && next.what < SplitClass::space) {
            at = c.next;
            c = next;
        }
    }
    if (c.what >= SplitClass::space) return space_end(space_run(text, at), at, stop);
    return c.what == stop ? c.next : run_end(text, at, c.what);
}

size_t gpt2_word_end(std::string_view text, size_t at) {
    return old_word_end(text, at, SplitClass::end);
}

size_t smollm_word_end(std::string_view text, size_t at) {
    return old_word_end(text, at, SplitClass::number);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
// ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
size_t modern_word_end(std::string_view text, size_t at, size_t digits) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), true)) return at + length;
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::letter) return run_end(text, at, SplitClass::letter);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, digits);
    if (next.what == SplitClass::letter && c.what != SplitClass::newline)
        return run_end(text, c.next, SplitClass::letter);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other)) {
        size_t end = run_end(text, c.next, SplitClass::other);
        while (end < text.size() && (text[end] == '\r' || text[end] == '\n')) ++end;
        return end;
    }
    const SpaceRun run = space_run(text, at);
    return run.line_end ? run.line_end : space_end(run, at);
}

size_t llama3_word_end(std::string_view text, size_t at) { return modern_word_end(text, at, 3); }
size_t qwen2_word_end(std::string_view text, size_t at) { return modern_word_end(text, at, 1); }

// A new pre-tokenizer is one more row and, if it splits as none of these does, a function.
constexpr PreTokenizer pre_tokenizers[] = {
    // clang-format off
    // name       word_end         compose  whole_words  add_bos
    {"gpt-2",     gpt2_word_end,   false,   false,       false},
    {"smollm",    smollm_word_end, false,   false,       false},
    {"llama-bpe", llama3_word_end, false,   true,        true},
    {"qwen2",     qwen2_word_end,  true,    false,       false},
    // clang-format on
};

// ---- merging --------------------------------------------------------------------------------

// A stretch of text that is one piece so far; those alive form a list. The pair that begins here
// has `rank` (no_rank: cannot merge) and would become `merged`.
struct MergeSymbol {
    uint32_t begin = 0;  // of its bytes
    uint32_t previous = no_symbol;
    uint32_t next = no_symbol;
    Token token = no_token;
    uint32_t rank = no_rank;
    Token merged = no_token;
};

struct LaterPlace {
    bool operator()(uint32_t a, uint32_t b) const { return a > b; }
};

// Pending merges: lowest rank first, then leftmost. The places of one rank nearly always come in
// ascending order, so a rank's list is read from front to back, and turns into a heap only when
// a place comes too early: ten million equal letters cost little more than copying them.
class MergeQueue {
public:
    void push(uint32_t rank, uint32_t place) {
        if (!list_ || rank != list_rank_) list_ = &lists_[list_rank_ = rank];
        std::vector<uint32_t>& places = list_->places;
        if (list_->empty()) add_rank(rank);
        else if (!list_->is_heap && place < places.back()) list_->make_heap();
        places.push_back(place);
        if (list_->is_heap) std::push_heap(places.begin(), places.end(), LaterPlace());
    }
    bool pop(uint32_t* rank, uint32_t* place) {
        if (ranks_.empty()) return false;
        *rank = ranks_.front();
        if (!list_ || *rank != list_rank_) list_ = &lists_[list_rank_ = *rank];
        *place = list_->take_first();
        if (list_->empty()) drop_lowest_rank();
        return true;
    }

private:
    struct List {
        std::vector<uint32_t> places;
        size_t first = 0;
        bool is_heap = false;
        bool empty() const { return first == places.size(); }
        void make_heap() {  // what is sorted is a heap already
            places.erase(places.begin(), places.begin() + ptrdiff_t(first));
            first = 0;
            is_heap = true;
        }
        uint32_t take_first() {
            if (!is_heap) return places[first++];
            std::pop_heap(places.begin(), places.end(), LaterPlace());
            const uint32_t place = places.back();
            places.pop_back();
            return place;
        }
    };
    void add_rank(uint32_t rank) {
        ranks_.push_back(rank);
        std::push_heap(ranks_.begin(), ranks_.end(), LaterPlace());
    }
    void drop_lowest_rank() {
        std::pop_heap(ranks_.begin(), ranks_.end(), LaterPlace());
        ranks_.pop_back();
        list_->places.clear();
        list_->first = 0;
        list_->is_heap = false;
    }
    std::unordered_map<uint32_t, List> lists_;
    std::vector<uint32_t> ranks_;  // a heap of those whose lists are not empty
    List* list_ = nullptr;         // of list_rank_, the last one used
    uint32_t list_rank_ = 0;
};

// Merges neighbours until no pair can merge. `pairs(symbols, left, right)` gives a pair's Merge.
template <class Pairs>
class MergeLoop {
public:
    MergeLoop(std::span<MergeSymbol> symbols, const Pairs& pairs)
        : symbols_(symbols), pairs_(pairs) {}
    void run() {
        if (symbols_.empty()) return;
        for (uint32_t at = 0; at < symbols_.size(); ++at) {
            symbols_[at].previous = at - 1;  // of the first: no_symbol
            symbols_[at].next = at + 1 < symbols_.size() ? at + 1 : no_symbol;
        }
        if (symbols_.size() <= short_word) run_short();
        else run_long();
    }

private:
    static constexpr size_t short_word = 32;  // up to here looking at every pair is faster
    void run_short() {
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        for (;;) {
            uint32_t best = 0;
            for (uint32_t at = 0; at != no_symbol; at = symbols_[at].next)
                if (symbols_[at].rank < symbols_[best].rank) best = at;
            if (symbols_[best].rank == no_rank) return;
            merge(best);
        }
    }
    void run_long() {
        queue_.emplace();
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        uint32_t rank = 0, at = 0;
        while (queue_->pop(&rank, &at))
            if (symbols_[at].rank == rank) merge(at);  // else it was overtaken
    }
    void merge(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        MergeSymbol& right = symbols_[left.next];
        left.token = left.merged;
        left.next = right.next;
        right.rank = no_rank;
        if (left.next != no_symbol) symbols_[left.next].previous = at;
        if (left.previous != no_symbol) rate(left.previous);
        rate(at);
    }
    void rate(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        Merge merge;
        if (left.next != no_symbol) merge = pairs_(left, symbols_[left.next]);
        left.rank = merge.rank;
        left.merged = merge.token;
        if (queue_ && merge.rank != no_rank) queue_->push(merge.rank, at);
    }
    std::span<MergeSymbol> symbols_;
    const Pairs& pairs_;
    std::optional<MergeQueue> queue_;
};

}  // namespace

// ---- the vocabulary -------------------------------------------------------------------------

struct Vocabulary {
    PieceTable pieces;
    std::vector<TokenKind> kinds;
    std::vector<bool> from_text;        // merging and whole words may make it
    std::vector<bool> ends;             // see is_end
    std::vector<uint32_t> ranks;        // SentencePiece: position of its score, highest first
    PairTable pairs;                    // byte-level
    std::array<Token, 256> bytes;       // the token of a single byte, or no_token
    SpellingMatcher specials;           // cut out of the text first
    SpellingMatcher whole;              // SentencePiece: user-defined tokens of any text
    const PreTokenizer* pre = nullptr;  // null: SentencePiece
    size_t longest = 0;                 // bytes of the longest piece that from_text marks
    Token bos = no_token, eos = no_token, unknown = no_token;
    bool add_bos = false, add_eos = false, add_space_prefix = false;
};

namespace {

std::string with_spaces(std::string_view text) {  // SentencePiece writes a space as U+2581
    std::string spaced;
    spaced.reserve(text.size());
    for (size_t at = 0; at < text.size(); ++at) {
        const bool mark = text.substr(at, 3) == "\xE2\x96\x81";
        spaced += mark ? ' ' : text[at];
        if (mark) at += 2;
    }
    return spaced;
}

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
                          &VocabularyReader::build_index, &VocabularyReader::read_ranks})
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
    bool is_sentencepiece() const { return v_.pre == nullptr; }

    Result<void> read_model() {
        auto model = file_.get_string("tokenizer.ggml.model");
        if (!model) return model.error();
        if (*model == "llama") return read_normalizer();
        if (*model != "gpt2") return unsupported("model", *model);
        auto pre = file_.get_string("tokenizer.ggml.pre");
        if (!pre) return pre.error();
        for (const PreTokenizer& row : pre_tokenizers)
            if (row.name == *pre) v_.pre = &row;
        if (!v_.pre) return unsupported("pre", *pre);
        return {};
    }

    Result<void> read_normalizer() const {  // of SentencePiece: the identity or nothing
        auto trims = file_.get_bool("tokenizer.ggml.remove_extra_whitespaces", false);
        if (!trims) return trims.error();
        if (*trims) return unsupported("remove_extra_whitespaces", "true");
        const GgufKey* map = file_.find("tokenizer.ggml.precompiled_charsmap");
        if (map && map->count > 0) return unsupported("precompiled_charsmap", "not empty");
        return {};
    }

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
        if (is_sentencepiece()) return with_spaces(text);
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
        for (Token id : {v_.bos, v_.eos, turn, message})  // files call some of them normal
            if (id != no_token && v_.pieces[size_t(id)].size() > 1)
                v_.kinds[size_t(id)] = TokenKind::control;
        mark_ends({v_.eos, turn, message});
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
        const bool plain = is_sentencepiece();
        v_.add_bos = plain || v_.pre->add_bos;
        v_.add_space_prefix = plain;
        const std::pair<const char*, bool*> flags[] = {
            {"tokenizer.ggml.add_bos_token", &v_.add_bos},
            {"tokenizer.ggml.add_eos_token", &v_.add_eos},
            {"tokenizer.ggml.add_space_prefix", &v_.add_space_prefix}};
        for (auto [key, flag] : flags) {
            auto value = file_.get_bool(key, *flag);
            if (!value) return value.error();
            *flag = *value;
        }
        v_.add_space_prefix &= plain;
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
                               (is_sentencepiece() && kind == TokenKind::unused);
            if (v_.from_text[id]) v_.longest = std::max(v_.longest, piece.size());
            if (user && !guarded && is_sentencepiece()) v_.whole.add(piece, Token(id), false);
            else if (control || user) v_.specials.add(piece, Token(id), guarded);
        }
        v_.specials.build();
        v_.whole.build();
        return {};
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
            const bool single = is_sentencepiece() ? v_.kinds[id] == TokenKind::byte
                                                   : v_.from_text[id] && v_.pieces[id].size() == 1;
            Token& token = v_.bytes[single ? uint8_t(v_.pieces[id][0]) : 0];
            if (single && token == no_token) token = Token(id);
        }
        return {};
    }

    Result<void> read_ranks() { return is_sentencepiece() ? read_scores() : read_merges(); }

    Result<void> read_scores() {
        auto scores = file_.get_floats("tokenizer.ggml.scores");
        if (!scores) return scores.error();
        if (scores->size() != v_.kinds.size())
            return bad("scores",
                       format("%zu scores for %zu tokens", scores->size(), v_.kinds.size()));
        std::vector<std::pair<double, Token>> order(scores->size());
        for (size_t id = 0; id < order.size(); ++id) {
            order[id] = {-(*scores)[id], Token(id)};
            if (!std::isfinite(order[id].first))
                return bad("scores", format("token %zu has no finite score", id));
        }
        std::sort(order.begin(), order.end());
        v_.ranks.resize(order.size());
        for (size_t i = 0; i < order.size(); ++i) {
            const bool tie = i > 0 && order[i].first == order[i - 1].first;
            v_.ranks[size_t(order[i].second)] = tie ? v_.ranks[size_t(order[i - 1].second)]
                                                    : uint32_t(i);
        }
        return {};
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
            const std::string left = from_printable(merge.substr(0, space));
            const std::string right = from_printable(merge.substr(space + 1));
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

// ---- encoding -------------------------------------------------------------------------------

// One text on its way to tokens.
class TextEncoder {
public:
    TextEncoder(const Vocabulary& vocabulary, size_t text_bytes) : v_(vocabulary) {
        if (v_.pre) cache_.resize(std::bit_ceil(std::clamp<size_t>(text_bytes / 16, 1, 4096)));
        tokens.reserve(text_bytes / 4 + 4);
    }
    std::vector<Token> tokens;

    // `request` says which bytes cannot belong to a template_only token.
    Result<void> encode(std::string_view text, std::span<const ByteRange> request) {
        return cut_out(v_.specials, text, request,
                       [this](std::string_view run) { return encode_run(run); });
    }

private:
    struct CachedWord {  // its tokens stand in `tokens`
        char text[22];
        uint8_t length = 0;
        uint8_t count = 0;
        uint32_t begin = 0;
    };

    // Appends the tokens of the spellings that the matcher finds; `encode_between` does the rest.
    template <class Between>
    Result<void> cut_out(const SpellingMatcher& matcher, std::string_view text,
                         std::span<const ByteRange> request, const Between& encode_between) {
        size_t begin = 0, range = 0;
        for (size_t at = 0; at < text.size();) {
            SpellingMatcher::Match match;
            if (matcher.may_begin(text[at])) {
                while (range < request.size() && request[range].end <= at) ++range;
                match = matcher.longest(
                    text, at, range < request.size() ? request[range].begin : text.size());
            }
            if (match.length == 0) {
                ++at;
                continue;
            }
            if (auto result = encode_between(text.substr(begin, at - begin)); !result)
                return result;
            tokens.push_back(match.token);
            begin = at += match.length;
        }
        return encode_between(text.substr(begin));
    }

    Result<void> encode_run(std::string_view text) {
        if (text.empty()) return {};
        if (!v_.pre) return encode_sentences(text);
        // no character before U+0300 (lead byte CC) is changed by NFC unless one after it is there
        const bool composed = !v_.pre->compose ||
                              std::none_of(text.begin(), text.end(),
                                           [](char c) { return uint8_t(c) >= 0xCC; });
        return composed ? encode_words(text) : encode_words(nfc(text));
    }

    Result<void> encode_words(std::string_view text) {
        for (size_t at = 0; at < text.size();) {
            const size_t end = v_.pre->word_end(text, at);
            if (auto result = encode_word(text.substr(at, end - at)); !result) return result;
            at = end;
        }
        return {};
    }

    Result<void> encode_word(std::string_view word) {
        if (word.size() > sizeof CachedWord::text) return merge_word(word);
        CachedWord& cached = cache_[size_t(hash_piece(word) >> 32) & (cache_.size() - 1)];
        if (std::string_view(cached.text, cached.length) == word) {
            for (uint32_t i = 0; i < cached.count; ++i)
                tokens.push_back(Token(tokens[cached.begin + i]));
            return {};
        }
        const size_t begin = tokens.size();
        auto result = merge_word(word);
        std::memcpy(cached.text, word.data(), word.size());
        cached.length = uint8_t(word.size());
        cached.begin = uint32_t(begin);
        cached.count = uint8_t(tokens.size() - begin);
        return result;
    }

    Result<void> merge_word(std::string_view word) {
        if (v_.pre->whole_words && word.size() <= v_.longest) {
            const Token token = v_.pieces.find(word);
            if (token != no_token && v_.from_text[size_t(token)]) {
                tokens.push_back(token);
                return {};
            }
        }
        auto symbols = symbols_for(word.size());
        if (!symbols) return symbols.error();
        size_t count = 0;
        for (char c : word) {  // a byte without a token is left out, as Hugging Face does
            const Token token = v_.bytes[uint8_t(c)];
            if (token != no_token) (*symbols)[count++].token = token;
            else if (v_.unknown != no_token) (*symbols)[count++].token = v_.unknown;
        }
        auto pairs = [this](const MergeSymbol& left, const MergeSymbol& right) {
            return v_.pairs.find(left.token, right.token);
        };
        MergeLoop(symbols->first(count), pairs).run();
        for (size_t at = 0; count && at != no_symbol; at = (*symbols)[at].next)
            tokens.push_back((*symbols)[at].token);
        return {};
    }

    Result<std::span<MergeSymbol>> symbols_for(size_t count) {
        if (count <= few_.size()) return std::span(few_).first(count);
        if (count * sizeof(MergeSymbol) > many_.size()) {
            auto buffer = Buffer::allocate(uint64_t(count) * sizeof(MergeSymbol), "tokenizer");
            if (!buffer) return buffer.error();
            many_ = std::move(*buffer);
        }
        return std::span(many_.as<MergeSymbol>(), count);
    }

    // SentencePiece: a space in front where the model wants it, then user-defined tokens are cut
    // out, then the rest is merged.
    Result<void> encode_sentences(std::string_view raw) {
        const std::string text = join({v_.add_space_prefix ? " " : "", with_spaces(raw)});
        return cut_out(v_.whole, text, {}, [this](std::string_view run) -> Result<void> {
            after_unknown_ = false;
            auto symbols = symbols_for(run.size());
            if (!symbols) return symbols.error();
            merge_sentence(run, *symbols, run.size());
            return {};
        });
    }

    // Merges `text` into pieces of at most `longest` bytes and appends them. `symbols` has room
    // for every byte. Recursion: each level is shorter, from max_piece_bytes on.
    void merge_sentence(std::string_view text, std::span<MergeSymbol> symbols, size_t longest) {
        size_t count = 0;
        for (size_t at = 0; at < text.size(); ++count) {
            symbols[count] = {.begin = uint32_t(at)};
            utf8_next(text, &at);
            symbols[count].token = piece_made(
                text.substr(symbols[count].begin, at - symbols[count].begin));
        }
        symbols = symbols.first(count);
        longest = std::min(longest, v_.longest);
        auto end_of = [&](const MergeSymbol& symbol) {
            return symbol.next == no_symbol ? text.size() : symbols[symbol.next].begin;
        };
        auto pairs = [&](const MergeSymbol& left, const MergeSymbol& right) -> Merge {
            const size_t length = end_of(right) - left.begin;
            if (length > longest) return {};
            const Token token = piece_made(text.substr(left.begin, length));
            return token == no_token ? Merge{} : Merge{v_.ranks[size_t(token)], token};
        };
        MergeLoop(symbols, pairs).run();
        for (uint32_t at = 0; count && at != no_symbol; at = symbols[at].next)
            add_piece(text.substr(symbols[at].begin, end_of(symbols[at]) - symbols[at].begin),
                      symbols[at].token);
    }

    Token piece_made(std::string_view piece) const {
        const Token token = v_.pieces.find(piece);
        return token != no_token && v_.from_text[size_t(token)] ? token : no_token;
    }

    void add_piece(std::string_view piece, Token token) {
        const bool unused = token != no_token && v_.kinds[size_t(token)] == TokenKind::unused;
        size_t first = 0;
        utf8_next(piece, &first);
        if (unused && first < piece.size()) {  // only a step: back to what it was merged from
            std::vector<MergeSymbol> symbols(piece.size());
            return merge_sentence(piece, symbols, piece.size() - 1);
        }
        if (unused || token == no_token) return add_unknown(piece);
        tokens.push_back(token);
        after_unknown_ = false;
    }

    // A character that is no piece: its bytes, or one unknown token for all that follow each other.
    void add_unknown(std::string_view bytes) {
        for (char c : bytes) {
            const Token byte = v_.bytes[uint8_t(c)];
            if (byte != no_token) tokens.push_back(byte);
            else if (v_.unknown != no_token && !after_unknown_) tokens.push_back(v_.unknown);
            after_unknown_ = byte == no_token;
        }
    }

    const Vocabulary& v_;
    std::vector<CachedWord> cache_;
    std::array<MergeSymbol, 64> few_;
    Buffer many_;
    bool after_unknown_ = false;
};

Result<void> check_ranges(size_t text_bytes, std::span<const ByteRange> ranges) {
    size_t at = 0;
    for (const ByteRange& range : ranges) {
        if (range.begin < at || range.end < range.begin || range.end > text_bytes)
            return make_error(ErrorKind::internal, "a prompt's byte ranges are out of order");
        at = range.end;
    }
    return {};
}

}  // namespace
}  // namespace detail

// ---- Tokenizer ------------------------------------------------------------------------------

Tokenizer::Tokenizer(std::shared_ptr<const detail::Vocabulary> vocabulary)
    : vocabulary_(std::move(vocabulary)) {}

Result<Tokenizer> Tokenizer::open(const Gguf& file, std::string_view chat_template,
                                  std::span<const std::string_view> ends) {
    auto vocabulary = std::make_shared<detail::Vocabulary>();
    if (auto result = detail::VocabularyReader(file, chat_template, ends, *vocabulary).read();
        !result)
        return result.error();
    return Tokenizer(std::move(vocabulary));
}

size_t Tokenizer::size() const { return vocabulary_->kinds.size(); }

std::string_view Tokenizer::piece(Token token) const {
    return size_t(token) < size() ? vocabulary_->pieces[size_t(token)] : std::string_view();
}

TokenKind Tokenizer::kind(Token token) const {
    return size_t(token) < size() ? vocabulary_->kinds[size_t(token)] : TokenKind::unused;
}

bool Tokenizer::is_end(Token token) const {
    return size_t(token) < size() && vocabulary_->ends[size_t(token)];
}

bool Tokenizer::add_bos() const { return vocabulary_->add_bos; }
bool Tokenizer::add_eos() const { return vocabulary_->add_eos; }

namespace detail {
namespace {
std::optional<Token> token_or_nothing(Token token) {
    return token == no_token ? std::nullopt : std::optional<Token>(token);
}
}  // namespace
}  // namespace detail

std::optional<Token> Tokenizer::bos() const { return detail::token_or_nothing(vocabulary_->bos); }
std::optional<Token> Tokenizer::eos() const { return detail::token_or_nothing(vocabulary_->eos); }

std::optional<Token> Tokenizer::find(std::string_view piece) const {
    return detail::token_or_nothing(vocabulary_->pieces.find(piece));
}

Result<std::vector<Token>> Tokenizer::encode(const detail::MarkedText& text, bool add_bos) const {
    return encode(text.text, text.from_request, add_bos);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text, bool add_bos) const {
    const detail::ByteRange everything{0, text.size()};
    return encode(text, {&everything, 1}, add_bos);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text,
                                             std::span<const detail::ByteRange> request,
                                             bool add_bos) const {
    if (text.size() > max_text_bytes)
        return detail::make_error(ErrorKind::too_large,
                                  detail::format("a text of %zu bytes", text.size()));
    if (auto result = detail::check_ranges(text.size(), request); !result) return result.error();
    detail::TextEncoder encoder(*vocabulary_, text.size());
    if (auto result = encoder.encode(text, request); !result) return result.error();
    std::vector<Token>& tokens = encoder.tokens;
    const auto bos = this->bos();
    if (add_bos && bos && (tokens.empty() || tokens[0] != *bos))
        tokens.insert(tokens.begin(), *bos);
    return std::move(tokens);
}

// ---- Detokenizer ----------------------------------------------------------------------------

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool at_start)
    : vocabulary_(tokenizer.vocabulary_), at_start_(at_start) {}

std::string_view Detokenizer::push(Token token) {
    ready_.clear();
    if (size_t(token) >= vocabulary_->kinds.size()) return ready_;
    const TokenKind kind = vocabulary_->kinds[size_t(token)];
    std::string_view piece = vocabulary_->pieces[size_t(token)];
    if (kind == TokenKind::control || kind == TokenKind::unknown || piece.empty()) return ready_;
    if (at_start_ && vocabulary_->add_space_prefix && piece[0] == ' ') piece.remove_prefix(1);
    at_start_ = false;
    held_ += piece;
    take_ready(held_.size() - detail::utf8_incomplete_suffix(held_));
    return ready_;
}

std::string_view Detokenizer::flush() {
    take_ready(held_.size());
    at_start_ = true;
    return ready_;
}

void Detokenizer::take_ready(size_t count) {
    ready_.assign(held_, 0, count);
    held_.erase(0, count);
    if (!detail::utf8_valid(ready_)) ready_ = detail::utf8_repair(ready_);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
