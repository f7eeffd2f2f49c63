// >>grammar
// A mask is a walk through the tree of all pieces with a set of configurations. What of it does not
// depend on the stack is found once: of an automaton's state (inside strings, numbers, patterns) the
// tokens that stay in the automaton, and what the others have behind it. So inside an automaton only
// these rests are walked, each once, however many tokens end in it. A whole mask is kept for when the
// same state comes again, as it does from token to token of a text.
#include "prologue.hpp"

#include "grammar/mask.hpp"

#include "grammar/regex.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
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

constexpr size_t kKnownMasks = 64;

bool has_byte(const std::array<uint64_t, 4>& bytes, uint8_t b) {
    return bytes[b >> 6] >> (b & 63) & 1;
}
bool begins_char(char c) { return (uint8_t(c) & 0xC0) != 0x80; }
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
    std::vector<uint32_t> path;
    const auto open = [&](uint8_t b) {
        byte.push_back(b);
        end.push_back(0);
        first.push_back(uint32_t(tokens.size()));
        classes.push_back(0);
        deepest.push_back(0);
        depth.push_back(uint32_t(path.size()));
    };
    std::vector<uint64_t> behind;
    open(0);
    path.push_back(0);
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
            open(uint8_t(t.text[i]));
            path.push_back(uint32_t(byte.size() - 1));
        }
        behind.assign(t.text.size() + 1, 0);
        for (size_t i = t.text.size(); i-- > 0;) {
            size_t next = i;
            const uint64_t own = next_class(t.text, &next);
            behind[i] = own | behind[next];
        }
        for (size_t d = 0; d <= t.text.size(); ++d) {
            classes[path[d]] |= behind[d];
            deepest[path[d]] = std::max(deepest[path[d]], uint32_t(t.text.size() - d));
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
    for (const Token token : trie_.tokens) {
        const std::string_view text = piece(token);
        chars_.push_back(uint32_t(std::count_if(text.begin(), text.end(), begins_char)));
    }
}

// ---- Slices --------------------------------------------------------------------------------------

size_t MaskMaker::Slice::bytes() const {
    size_t sum = sizeof *this + dfa->bytes() + mask.size() * 8 +
                 (inside.size() + need_begin.size()) * 4;
    for (const auto& [label, trie] : rests) sum += trie.byte.size() * 25 + trie.tokens.size() * 12;
    return sum;
}

const MaskMaker::Slice& MaskMaker::slice(const DfaPtr& dfa, uint32_t state, Use use,
                                         const Bytes& follow) {
    uint64_t hash = dfa->hash ^ uint64_t(use);
    for (const uint64_t v : {uint64_t{state}, follow[0], follow[1], follow[2], follow[3]})
        hash = (hash ^ v ^ hash >> 29) * 0x9E3779B97F4A7C15u;
    std::unique_ptr<Slice>& known = slices_[hash];
    if (known && known->state == state && known->use == use && known->follow == follow &&
        (known->dfa == dfa || known->dfa->is_same(*dfa))) {
        known->dfa = dfa;  // the next one to ask has it, too: no table is compared again
        return *known;
    }
    if (known) slice_bytes_ -= known->bytes();
    auto made = std::make_unique<Slice>();
    made->dfa = dfa, made->state = state, made->use = use, made->follow = follow;
    make_slice(*made);
    slice_bytes_ += made->bytes();
    if (slice_bytes_ <= most_bytes) return *(known = std::move(made));
    slices_.clear();
    slice_bytes_ = made->bytes();
    return *(slices_[hash] = std::move(made));
}

// A walk through all pieces with the automaton alone. Where it has accepted and cannot go on, the
// rest of the piece is what others must take.
void MaskMaker::make_slice(Slice& out) const {
    const PieceTrie& trie = trie_->trie_;
    const Dfa& dfa = *out.dfa;
    const bool counted = out.use == Use::counted;
    std::vector<uint32_t> states(trie.deepest[0] + 1u, out.state), chars(states.size(), 0),
        begun(states.size(), 0);                       // by depth; ended, and of the bytes alone
    std::vector<uint32_t> needs_ahead;                 // by characters
    std::vector<std::pair<uint32_t, uint32_t>> taken;  // stretches of the trie's tokens
    std::vector<uint32_t> needs(counted ? trie.tokens.size() : 0, unlimited);
    std::vector<std::vector<PieceTrie::Text>> rests;
    const auto leave = [&](uint32_t node, uint32_t depth) {
        const size_t label = size_t(dfa.label[states[depth]]);
        if (rests.size() <= label) rests.resize(label + 1);
        for (uint32_t i = trie.first[node]; i < trie.first[trie.end[node]]; ++i) {
            const Token token = trie.tokens[i];
            const std::string_view rest = trie_->piece(token).substr(depth);
            if (out.use == Use::key && std::count(rest.begin(), rest.end(), '"') > 2)
                out.tried.push_back(token);
            else rests[label].push_back({rest, token, chars[depth], depth});
        }
    };
    uint32_t alive = 1;  // where a stretch of nodes that are taken begins
    const auto take_until = [&](uint32_t node) {
        if (trie.first[alive] < trie.first[node])
            taken.push_back({trie.first[alive], trie.first[node]});
    };
    for (uint32_t n = 1; n < trie.end[0];) {
        const uint32_t depth = trie.depth[n];
        const uint32_t from = states[depth - 1], state = dfa.step(from, trie.byte[n]);
        if (state == Dfa::dead) {
            if (dfa.label[from] >= 0 && has_byte(out.follow, trie.byte[n])) leave(n, depth - 1);
            take_until(n);
            alive = n = trie.end[n];
            continue;
        }
        states[depth] = state;
        const bool all = dfa.takes(state, trie.classes[n], trie.deepest[n]);
        const uint32_t next = all ? trie.end[n] : n + 1;
        if (counted) {
            chars[depth] = chars[depth - 1] + dfa.boundary[state];
            begun[depth] = begun[depth - 1] + begins_char(char(trie.byte[n]));
            needs_ahead.clear();
            uint32_t at = state;
            for (uint32_t c = 0; c <= (all ? trie.deepest[n] : 0); ++c, at = dfa.ahead[at])
                needs_ahead.push_back(chars[depth] + c + dfa.shortest[at]);
            for (uint32_t i = trie.first[n]; i < trie.first[next]; ++i)
                needs[i] = needs_ahead[trie_->chars_[i] - begun[depth]];
        }
        n = next;
    }
    take_until(trie.end[0]);
    for (size_t label = 0; label < rests.size(); ++label) {
        if (rests[label].empty()) continue;
        out.rests.emplace_back(int32_t(label), PieceTrie());
        out.rests.back().second.build(std::move(rests[label]));
    }
    keep_inside(out, taken, needs);
}

void MaskMaker::keep_inside(Slice& out, std::span<const std::pair<uint32_t, uint32_t>> taken,
                            std::span<const uint32_t> needs) const {
    const std::vector<Token>& tokens = trie_->trie_.tokens;
    size_t count = 0;
    for (const auto& [from, to] : taken) count += to - from;
    if (count > trie_->words()) out.mask.assign(trie_->words(), 0);
    if (out.mask.empty() || out.use == Use::counted) out.inside.reserve(count);
    for (const auto& [from, to] : taken)
        for (uint32_t i = from; i < to; ++i) {
            const size_t token = size_t(tokens[i]);
            if (!out.mask.empty()) out.mask[token / 64] |= uint64_t{1} << (token % 64);
            if (out.inside.capacity()) out.inside.push_back(Token(i));
        }
    if (out.use == Use::counted) {  // a counting sort
        for (const Token i : out.inside) {
            const size_t need = needs[size_t(i)];
            if (out.need_begin.size() < need + 2) out.need_begin.resize(need + 2);
            ++out.need_begin[need + 1];
        }
        std::partial_sum(out.need_begin.begin(), out.need_begin.end(), out.need_begin.begin());
        std::vector<uint32_t> next = out.need_begin;
        std::vector<Token> sorted(out.inside.size());
        for (const Token i : out.inside) sorted[next[needs[size_t(i)]]++] = i;
        out.inside = std::move(sorted);
    }
    for (Token& i : out.inside) i = tokens[size_t(i)];
}

// The tokens that stay inside and need at most so many characters.
void MaskMaker::add_inside(const Slice& slice, uint32_t most) {
    const bool all = slice.use != Use::counted || size_t(most) + 1 >= slice.need_begin.size();
    const size_t to = all ? slice.inside.size() : slice.need_begin[size_t(most) + 1];
    const auto add = [&](const std::vector<uint64_t>& mask) {
        for (size_t i = 0; i < mask_.size(); ++i) mask_[i] |= mask[i];
    };
    if (all && !slice.mask.empty()) return add(slice.mask);
    if (slice.mask.empty() || to < slice.inside.size() / 2) {
        for (size_t i = 0; i < to; ++i) allow(slice.inside[i]);
        return;
    }
    some_ = slice.mask;
    for (size_t i = to; i < slice.inside.size(); ++i)
        some_[size_t(slice.inside[i]) / 64] &= ~(uint64_t{1} << (slice.inside[i] % 64));
    add(some_);
}

// False: what may follow begins with what may also stay, or the bounds need the whole walk.
bool MaskMaker::fill_from_slice(const GrammarConfig& config) {
    const Grammar& grammar = walk_.grammar();
    const GrammarNode& node = grammar.nodes[config.node];
    const auto mark = walk_.mark();
    Use use = Use::plain;
    Bytes follow = {};
    DfaPtr dfa;
    low_ = 0, high_ = unlimited;
    if (node.kind == GrammarNode::Kind::key) {
        const ObjectNode& object = grammar.objects[node.a];
        if (!config.count || !object.endless) return false;
        use = Use::key;
        dfa = object.other;
        follow['"' >> 6] = uint64_t{1} << ('"' & 63);
    } else if (node.kind == GrammarNode::Kind::terminal) {
        const TerminalNode& terminal = grammar.terminals[node.a];
        dfa = terminal.dfa;
        if (terminal.counts()) {
            use = Use::counted;
            low_ = terminal.least > config.count ? terminal.least - config.count : 0;
            if (low_ && !dfa->endless) return false;
            if (terminal.most != unlimited) high_ = terminal.most - config.count;
            // Most often no token reaches the bound.
            const uint64_t reach = uint64_t{trie_->trie_.deepest[0]} + dfa->farthest;
            if (!low_ && high_ >= reach) use = Use::plain, high_ = unlimited;
        }
        walk_.allowed(walk_.after(config, 0), follow);
        walk_.back_to(mark);
    } else {
        return false;
    }
    for (size_t i = 0; i < follow.size(); ++i)
        if (follow[i] & dfa->beyond[i]) return false;
    const Slice& found = slice(dfa, config.sub, use, follow);
    add_inside(found, high_);
    if (use == Use::key) key_ = &config;
    for (const auto& [label, rests] : found.rests) {
        const Set set = walk_.after(config, label);
        if (key_ && !set.empty()) take_texts(rests, 0, rests.first[2]);  // the quote alone
        walk_all(rests, key_ ? 1 : 0, set);
        walk_.back_to(mark);
    }
    for (const Token token : found.tried) {
        Set set = walk_.add({&config, 1});
        for (const char c : trie_->piece(token))
            if (!set.empty()) set = walk_.step(walk_.expand(set), uint8_t(c));
        if (!set.empty()) allow(token);
        walk_.back_to(mark);
    }
    key_ = nullptr;
    return true;
}

// ---- The walk ------------------------------------------------------------------------------------

// What nearly every schema needs is made before the first token waits for it.
MaskMaker::MaskMaker(TokenTriePtr trie) : trie_(std::move(trie)), known_(kKnownMasks) {
    Bytes quote = {};
    quote['"' >> 6] = uint64_t{1} << ('"' & 63);
    for (const Use use : {Use::plain, Use::counted})
        (void)slice(any_string_dfa(), Dfa::start, use, quote);
}

void MaskMaker::allow(Token token) {
    if (token >= 0 && size_t(token) < trie_->vocabulary())
        mask_[size_t(token) / 64] |= uint64_t{1} << (token % 64);
}

bool MaskMaker::accept(GrammarState& state, Token token) {
    if (state.accept_token(token, trie_->piece(token), walk_)) return true;
    const auto ends = trie_->ends();
    return std::find(ends.begin(), ends.end(), token) != ends.end() && state.may_end(walk_);
}

bool MaskMaker::takes_all(const GrammarState& state, std::span<const Token> tokens) {
    tried_ = state;
    const bool all = std::all_of(tokens.begin(), tokens.end(), [&](Token token) {
        return tried_.accept_token(token, trie_->piece(token), walk_);
    });
    tried_.grammar_.reset();
    return all;
}

std::string_view MaskMaker::forced(const GrammarState& state, size_t most) {
    state.forced_bytes(forced_, most, walk_);
    return forced_;
}

std::span<const uint64_t> MaskMaker::fill(const GrammarState& state) {
    uint64_t hash = 0;
    const auto add = [&](uint32_t v) {
        hash = (hash ^ v) * 0x9E3779B97F4A7C15u, hash ^= hash >> 32;
    };
    for (const auto& c : state.configs_) add(c.node), add(c.sub), add(c.count), add(c.stack);
    for (const auto& c : state.cells_) add(c.parent), add(c.node), add(c.value), add(c.extra);
    Known& known = known_[static_cast<size_t>(hash % known_.size())];
    const auto same = [](const auto& a, const auto& b) {
        return a.size() == b.size() &&
               (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
    };
    if (known.grammar.lock() != state.grammar_ || !same(known.configs, state.configs_) ||
        !same(known.cells, state.cells_)) {
        known.mask.assign(trie_->words(), 0);
        mask_ = known.mask;
        make(state);
        known.grammar = state.grammar_;
        known.configs = state.configs_;
        known.cells = state.cells_;
    }
    return known.mask;
}

void MaskMaker::make(const GrammarState& state) {
    walk_.begin(*state.grammar_, state.cells_);
    const auto mark = walk_.mark();
    const Set set = walk_.expand(walk_.add(state.configs_));
    for (uint32_t i = set.begin; i < set.end; ++i) {
        const GrammarNode& node = walk_.grammar().nodes[walk_.pool[i].node];
        if (node.kind == GrammarNode::Kind::token) allow(Token(node.a));
        if (node.kind == GrammarNode::Kind::end)
            for (const Token end : trie_->ends()) allow(end);
    }
    walk_.back_to(mark);
    others_.clear();
    for (const GrammarConfig& config : state.configs_)
        if (!fill_from_slice(config)) others_.push_back(config);
    if (!others_.empty()) walk_all(trie_->trie_, 0, walk_.expand(walk_.add(others_)));
}

void MaskMaker::walk_all(const PieceTrie& trie, uint32_t node, Set set) {
    Bytes bytes = {~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}};
    if (trie.end[node] - node > 64) walk_.allowed(set, bytes);
    const auto mark = walk_.mark();
    for (uint32_t c = node + 1; c < trie.end[node]; c = trie.end[c]) {
        const uint8_t b = trie.byte[c];
        if (!has_byte(bytes, b)) continue;
        const Set next = walk_.step(set, b);
        if (!next.empty()) {
            const bool leaf = trie.end[c] == c + 1;
            const bool whole = leaf || takes_all(trie, c, next);
            take_texts(trie, trie.first[c], whole ? trie.first[trie.end[c]] : trie.first[c + 1]);
            if (!whole) walk_all(trie, c, walk_.expand(next));
        }
        walk_.back_to(mark);
    }
}

// Whether one of the ways stays where it is with all that follows the node.
bool MaskMaker::takes_all(const PieceTrie& trie, uint32_t node, Set set) const {
    for (uint32_t i = set.begin; i < set.end; ++i) {
        const GrammarConfig& config = walk_.pool[i];
        const GrammarNode& at = walk_.grammar().nodes[config.node];
        if (at.kind == GrammarNode::Kind::key) {
            const ObjectNode& object = walk_.grammar().objects[at.a];
            if (config.count == 0 || !object.endless) continue;
            if (object.other->takes(config.sub, trie.classes[node], trie.deepest[node]))
                return true;
        } else if (at.kind == GrammarNode::Kind::terminal) {
            const TerminalNode& terminal = walk_.grammar().terminals[at.a];
            const Dfa& dfa = *terminal.dfa;
            if (!terminal.counts()) {
                if (dfa.takes(config.sub, trie.classes[node], trie.deepest[node])) return true;
            } else if (dfa.loops(config.sub, trie.classes[node])) {
                const uint32_t room = terminal.most == unlimited
                                          ? unlimited
                                          : terminal.most - config.count - dfa.shortest[config.sub];
                if (trie.deepest[node] <= room) return true;
            }
        }
    }
    return false;
}

void MaskMaker::take_texts(const PieceTrie& trie, uint32_t from, uint32_t to) {
    const bool all = &trie == &trie_->trie_ || (!key_ && low_ == 0 && high_ == unlimited);
    for (uint32_t i = from; i < to; ++i)
        if (all || (trie.chars[i] >= low_ && trie.chars[i] <= high_ &&
                    (!key_ || walk_.may_be_key(
                                  *key_, trie_->piece(trie.tokens[i]).substr(0, trie.bytes[i])))))
            allow(trie.tokens[i]);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
