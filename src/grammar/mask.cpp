// >>grammar
// A mask is a walk through the tree of all pieces with a set of configurations. Two things keep it
// short. A state that loops on every class of bytes below a node takes the whole subtree. And where a
// state loops on most of what text is made of (inside strings), the tokens that stay in it are known
// beforehand: only what may follow such characters is walked, each such rest once, however many
// tokens end in it.
#include "prologue.hpp"

#include "grammar/mask.hpp"

#include "grammar/regex.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
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

constexpr size_t kMostSlices = 32;
constexpr uint32_t kShortChars = 16;
constexpr uint64_t kLetters = 0x78;  // token classes 3 to 6

uint64_t bit(uint32_t token_class) { return uint64_t{1} << token_class; }

// The class of the character at text[*at]; moves behind it.
uint64_t next_class(std::string_view text, size_t* at) {
    const uint8_t b = uint8_t(text[*at]);
    if (b < 0x80) return ++*at, bit(token_classes()[b]);
    size_t behind = *at;
    const bool broken = utf8_next(text, &behind) == bad_utf8;
    *at = broken ? *at + 1 : behind;
    return bit(broken ? class_broken : class_multibyte);
}

}  // namespace

void PieceTrie::build(std::vector<Text> texts) {
    std::sort(texts.begin(), texts.end(), [](const Text& a, const Text& b) {
        if (const int order = a.text.compare(b.text)) return order < 0;
        return a.chars != b.chars ? a.chars < b.chars : a.token < b.token;
    });
    const auto open = [&](uint8_t b) {
        byte.push_back(b);
        end.push_back(0);
        first.push_back(uint32_t(tokens.size()));
        classes.push_back(0);
        deepest.push_back(0);
    };
    std::vector<uint32_t> path = {0};
    std::vector<uint64_t> behind;
    open(0);
    std::string_view before;
    for (const Text& t : texts) {
        size_t common = 0;
        const size_t most = std::min(before.size(), t.text.size());
        while (common < most && before[common] == t.text[common]) ++common;
        while (path.size() > common + 1) {
            end[path.back()] = uint32_t(byte.size());
            path.pop_back();
        }
        for (size_t i = common; i < t.text.size(); ++i) {
            path.push_back(uint32_t(byte.size()));
            open(uint8_t(t.text[i]));
        }
        behind.assign(t.text.size() + 1, 0);
        for (size_t i = t.text.size(); i-- > 0;) {
            size_t next = i;
            const uint64_t own = next_class(t.text, &next);
            behind[i] = own | behind[next];
        }
        for (size_t d = 0; d <= t.text.size(); ++d) {
            classes[path[d]] |= behind[d];
            deepest[path[d]] = std::max(deepest[path[d]], uint16_t(t.text.size() - d));
        }
        tokens.push_back(t.token);
        chars.push_back(t.chars);
        bytes.push_back(t.bytes);
        before = t.text;
    }
    for (const uint32_t node : path) end[node] = uint32_t(byte.size());
    first.push_back(uint32_t(tokens.size()));
}

std::string_view TokenTrie::piece(Token token) const {
    if (token < 0 || size_t(token) >= vocabulary_) return {};
    const uint32_t begin = begin_[size_t(token)];
    return std::string_view(text_).substr(begin, begin_[size_t(token) + 1] - begin);
}

std::shared_ptr<const TokenTrie> TokenTrie::build(const Tokenizer& tokenizer) {
    std::vector<std::string> pieces(tokenizer.size());
    std::vector<Token> ends;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const Token token = Token(i);
        const TokenKind kind = tokenizer.kind(token);
        if (tokenizer.is_end(token)) ends.push_back(token);
        else if (kind == TokenKind::normal || kind == TokenKind::user_defined ||
                 kind == TokenKind::byte)
            pieces[i] = tokenizer.piece(token);
    }
    return build(pieces, std::move(ends));
}

std::shared_ptr<const TokenTrie> TokenTrie::build(std::span<const std::string> pieces,
                                                  std::vector<Token> ends) {
    const auto trie = std::make_shared<TokenTrie>();
    trie->vocabulary_ = pieces.size();
    for (const std::string& piece : pieces) {
        trie->begin_.push_back(uint32_t(trie->text_.size()));
        trie->text_ += piece;
    }
    trie->begin_.push_back(uint32_t(trie->text_.size()));
    trie->finish(std::move(ends));
    return trie;
}

void TokenTrie::finish(std::vector<Token> ends) {
    ends_ = std::move(ends);
    std::vector<PieceTrie::Text> texts;
    for (size_t i = 0; i < vocabulary_; ++i)
        if (const auto text = piece(Token(i)); !text.empty())
            texts.push_back({text, Token(i), 0, 0});
    trie_.build(std::move(texts));
    slices_.push_back(make_slice(any_string_dfa()->loops[Dfa::start], true));
}

TokenTrie::SlicePtr TokenTrie::make_slice(uint64_t loops, bool with_short) const {
    const auto out = std::make_shared<Slice>();
    out->loops = loops;
    out->mask.assign(words(), 0);
    std::vector<std::vector<Token>> lists;
    std::vector<PieceTrie::Text> rests;
    for (size_t i = 0; i < vocabulary_; ++i) {
        const std::string_view text = piece(Token(i));
        if (text.empty()) continue;
        size_t at = 0, before = 0;
        uint16_t count = 0;
        while (at < text.size()) {
            before = at;
            if (!(next_class(text, &at) & loops)) {
                rests.push_back({text.substr(before), Token(i), count, uint16_t(before)});
                break;
            }
            ++count;
            before = at;
        }
        if (before < text.size()) {
            if (out->rest_chars.size() <= count) out->rest_chars.resize(count + 1u);
            out->rest_chars[count] = true;
            continue;
        }
        out->mask[i / 64] |= uint64_t{1} << (i % 64);
        if (lists.size() <= count) lists.resize(count + 1u);
        lists[count].push_back(Token(i));
    }
    for (const auto& list : lists) {
        out->chars_begin.push_back(uint32_t(out->by_chars.size()));
        out->by_chars.insert(out->by_chars.end(), list.begin(), list.end());
    }
    out->chars_begin.push_back(uint32_t(out->by_chars.size()));
    out->rests.build(std::move(rests));
    for (uint32_t most = 0; with_short && most <= kShortChars; ++most) {
        std::vector<uint64_t> mask = most ? out->short_masks.back()
                                          : std::vector<uint64_t>(words(), 0);
        for (const Token t : most < lists.size() ? lists[most] : std::vector<Token>())
            mask[size_t(t) / 64] |= uint64_t{1} << (t % 64);
        out->short_masks.push_back(std::move(mask));
    }
    return out;
}

TokenTrie::SlicePtr TokenTrie::slice(uint64_t loops) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const SlicePtr& slice : slices_)
        if (slice->loops == loops) return slice;
    return nullptr;
}

void TokenTrie::prepare(const Grammar& grammar) const {
    const auto look = [&](const Dfa& dfa) {
        for (const uint64_t loops : dfa.loops) {
            if (!(loops & kLetters) || slice(loops)) continue;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (slices_.size() >= kMostSlices) return;
            }
            SlicePtr made = make_slice(loops, false);
            const std::lock_guard<std::mutex> lock(mutex_);
            slices_.push_back(std::move(made));
        }
    };
    for (const TerminalNode& terminal : grammar.terminals) look(*terminal.dfa);
    for (const ObjectNode& object : grammar.objects)
        if (object.other) look(*object.other);
}

class MaskMaker {
public:
    MaskMaker(const TokenTrie& trie, const GrammarState& state, std::span<uint64_t> mask)
        : trie_(trie), state_(state), mask_(mask), walk_(*state.grammar_) {
        walk_.cells = state.cells_;
    }
    void fill() {
        std::fill(mask_.begin(), mask_.end(), 0);
        std::vector<GrammarConfig> others;
        for (const GrammarConfig& config : state_.configs_)
            if (!fill_from_slice(config)) others.push_back(config);
        const auto set = walk_.expand(walk_.add(state_.configs_));
        if (walk_.may_end(set))
            for (const Token end : trie_.ends()) allow(end);
        for (uint32_t i = set.begin; i < set.end; ++i) {
            const GrammarNode& node = walk_.grammar().nodes[walk_.pool[i].node];
            if (node.kind == GrammarNode::Kind::token) allow(Token(node.a));
        }
        if (!others.empty()) walk_all(trie_.trie_, 0, walk_.expand(walk_.add(others)));
    }

private:
    using Set = GrammarWalk::Set;
    void allow(Token token) {
        if (token >= 0 && size_t(token) < trie_.vocabulary())
            mask_[size_t(token) / 64] |= uint64_t{1} << (token % 64);
    }
    struct Loop {
        uint64_t classes = 0;
        uint32_t most = unlimited;  // characters that it may take
    };
    Loop loop_of(const GrammarConfig& config) const {
        const GrammarNode& node = walk_.grammar().nodes[config.node];
        if (node.kind == GrammarNode::Kind::key) {
            const ObjectNode& object = walk_.grammar().objects[node.a];
            if (config.count != 1 && config.count != 2) return {};  // 2: at its begin
            return object.endless ? Loop{object.other->loops[config.sub]} : Loop{};
        }
        if (node.kind != GrammarNode::Kind::terminal) return {};
        const TerminalNode& terminal = walk_.grammar().terminals[node.a];
        const uint64_t loops = terminal.dfa->loops[config.sub];
        if (!loops || terminal.most == unlimited) return {loops};
        return {loops, terminal.most - config.count - terminal.dfa->shortest[config.sub]};
    }

    // ---- Slices
    bool fill_from_slice(const GrammarConfig& config) {
        const Loop loop = loop_of(config);
        if (!(loop.classes & kLetters)) return false;
        slice_ = trie_.slice(loop.classes);
        if (!slice_) return false;
        const auto mark = walk_.mark();
        const auto set = walk_.expand(walk_.add({config}));
        std::array<uint64_t, 4> bytes;
        walk_.allowed({set.begin + 1, set.end}, bytes);
        bool apart = true;  // what may follow begins with nothing that may also stay
        for (unsigned b = 0; b < 0x80; ++b)
            apart &= !(bytes[b >> 6] >> (b & 63) & 1) || !(loop.classes & bit(token_classes()[b]));
        apart &= !(bytes[2] | bytes[3]) ||
                 !(loop.classes & (bit(class_multibyte) | bit(class_broken)));
        walk_.back_to(mark);
        if (!apart) return false;
        add_short(loop.most);
        key_ = walk_.grammar().nodes[config.node].kind == GrammarNode::Kind::key ? &config
                                                                                 : nullptr;
        walk_rests(config, loop);
        key_ = nullptr;
        low_ = 0, high_ = UINT32_MAX;
        return true;
    }
    // The tokens of the slice that have at most so many characters.
    void add_short(uint32_t most) {
        const uint32_t longest = uint32_t(slice_->chars_begin.size()) - 2;
        if (slice_->by_chars.empty()) return;
        if (most >= longest) return add_mask(slice_->mask);
        uint32_t from = 0;
        if (!slice_->short_masks.empty()) {
            const uint32_t whole = std::min(most, kShortChars);
            add_mask(slice_->short_masks[whole]);
            from = slice_->chars_begin[std::min(whole, longest) + 1];
        }
        const uint32_t to = slice_->chars_begin[most + 1];
        for (uint32_t i = from; i < to; ++i) allow(slice_->by_chars[i]);
    }
    void add_mask(const std::vector<uint64_t>& mask) {
        for (size_t i = 0; i < mask_.size(); ++i) mask_[i] |= mask[i];
    }
    // Where characters are counted, what may follow depends on how many stand before it: those with
    // which no bound comes near go together.
    void walk_rests(const GrammarConfig& config, const Loop& loop) {
        const GrammarNode& node = walk_.grammar().nodes[config.node];
        const bool counts = node.kind == GrammarNode::Kind::terminal &&
                            walk_.grammar().terminals[node.a].counts();
        if (!counts) return walk_rest(config, 0, UINT32_MAX);
        const TerminalNode& terminal = walk_.grammar().terminals[node.a];
        const uint32_t deepest = slice_->rests.deepest[0];
        const uint32_t least = terminal.least > config.count ? terminal.least - config.count : 0;
        const uint32_t free = loop.most == unlimited ? unlimited
                              : loop.most > deepest  ? loop.most - deepest
                                                     : 0;
        if (least <= free && free) walk_rest(config, least, free);
        for (uint32_t n = 0; n < slice_->rest_chars.size() && n <= loop.most; ++n)
            if (slice_->rest_chars[n] && (n < least || n > free || !free)) walk_rest(config, n, n);
    }
    void walk_rest(GrammarConfig config, uint32_t low, uint32_t high) {
        const GrammarNode& node = walk_.grammar().nodes[config.node];
        if (node.kind == GrammarNode::Kind::terminal) {
            const TerminalNode& terminal = walk_.grammar().terminals[node.a];
            if (terminal.counts()) config.count += low;
            if (terminal.most == unlimited) config.count = std::min(config.count, terminal.least);
        }
        low_ = low, high_ = high;
        const auto mark = walk_.mark();
        walk_all(slice_->rests, 0, walk_.expand(walk_.add({config})));
        walk_.back_to(mark);
    }

    // ---- The walk
    void walk_all(const PieceTrie& trie, uint32_t node, Set set) {
        std::array<uint64_t, 4> bytes = {~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}};
        if (trie.end[node] - node > 64) walk_.allowed(set, bytes);
        const auto mark = walk_.mark();
        for (uint32_t c = node + 1; c < trie.end[node]; c = trie.end[c]) {
            const uint8_t b = trie.byte[c];
            if (!(bytes[b >> 6] >> (b & 63) & 1)) continue;
            auto next = walk_.step(set, b);
            if (!next.empty()) {
                const bool leaf = trie.end[c] == c + 1;
                const bool whole = leaf || takes_all(trie, c, next);
                take_texts(trie, trie.first[c],
                           whole ? trie.first[trie.end[c]] : trie.first[c + 1]);
                if (!whole) walk_all(trie, c, walk_.expand(next));
            }
            walk_.back_to(mark);
        }
    }
    bool takes_all(const PieceTrie& trie, uint32_t node, Set set) const {
        for (uint32_t i = set.begin; i < set.end; ++i) {
            const GrammarConfig& config = walk_.pool[i];
            const Loop loop = loop_of(config);
            if (loop.classes && !(trie.classes[node] & ~loop.classes) &&
                trie.deepest[node] <= loop.most)
                return true;
        }
        return false;
    }
    void take_texts(const PieceTrie& trie, uint32_t from, uint32_t to) {
        const bool main = &trie == &trie_.trie_;
        for (uint32_t i = from; i < to; ++i)
            if (main || (trie.chars[i] >= low_ && trie.chars[i] <= high_ &&
                         (!key_ || key_is_new(trie.tokens[i], trie.bytes[i]))))
                allow(trie.tokens[i]);
    }
    // The keys of one object differ: of a token that ends a key, the bytes before the quote are
    // looked at once more, since the walk began behind them.
    bool key_is_new(Token token, uint32_t bytes) const {
        const std::string_view text = trie_.piece(token);
        if (text[bytes] != '"') return true;
        GrammarWalk check(walk_.grammar());
        check.cells = state_.cells_;
        auto set = check.add({*key_});
        for (uint32_t i = 0; i <= bytes && !set.empty(); ++i)
            set = check.step(check.expand(set), uint8_t(text[i]));
        return !set.empty();
    }

    const TokenTrie& trie_;
    const GrammarState& state_;
    std::span<uint64_t> mask_;
    GrammarWalk walk_;
    TokenTrie::SlicePtr slice_;
    const GrammarConfig* key_ = nullptr;
    uint32_t low_ = 0, high_ = UINT32_MAX;
};

void fill_mask(const TokenTrie& trie, const GrammarState& state, std::span<uint64_t> mask) {
    MaskMaker(trie, state, mask).fill();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
