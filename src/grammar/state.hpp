// Where a text stands in its grammar.
#pragma once

#include "grammar/program.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// One of the ways to read the text so far: a node, how far it was read, and the stack below it.
struct GrammarConfig {
    uint32_t node = 0, sub = 0, count = 0, stack = 0;
};
/// The stack is a list of cells that ways share; cell 0 is its bottom.
struct GrammarCell {
    uint32_t parent = 0, node = 0, value = 0, extra = 0, depth = 0;
};

/// Steps from sets of configurations to sets of them. A set is a stretch of `pool`; it and the cells
/// that it needed are dropped by going back to a mark.
/// Threads: one at a time.
class GrammarWalk {
public:
    struct Set {
        uint32_t begin = 0, end = 0;
        bool empty() const { return begin == end; }
    };
    struct Mark {
        size_t pool, cells;
    };
    GrammarWalk() = default;
    explicit GrammarWalk(const Grammar& grammar) : grammar_(&grammar) {}
    void begin(const Grammar& grammar, const std::vector<GrammarCell>& stack) {
        grammar_ = &grammar;
        pool.clear();
        cells = stack;
    }
    std::vector<GrammarConfig> pool;
    std::vector<GrammarCell> cells;
    std::vector<uint32_t> places;  // for whoever moves cells

    Mark mark() const { return {pool.size(), cells.size()}; }
    void back_to(Mark mark) {
        pool.resize(mark.pool);
        cells.resize(mark.cells);
    }
    Set start();
    Set add(std::span<const GrammarConfig> configs);
    /// The set, and behind it what may follow where its terminals end. The set must stand at the
    /// end of the pool.
    Set expand(Set set);
    Set step(Set expanded, uint8_t byte);
    Set step_token(Set expanded, Token token);
    bool may_end(Set expanded) const;
    /// Bytes that some configuration of an expanded set may take; never one fewer.
    void allowed(Set expanded, std::array<uint64_t, 4>& bytes) const;
    const Grammar& grammar() const { return *grammar_; }
    /// What may follow where a terminal or a key that is not declared ends with this label, whatever
    /// was read of it: expanded.
    Set after(const GrammarConfig& config, int32_t label);
    /// Whether the key that goes on like this until its quote is one that the object has not yet.
    bool may_be_key(const GrammarConfig& key, std::string_view rest) const;

private:
    using Kind = GrammarNode::Kind;
    void put(GrammarConfig config);
    void close(uint32_t node, uint32_t stack);
    void close_one(uint32_t node, uint32_t stack);
    void open(uint32_t node, uint32_t stack) { open_.push_back({node, stack}); }
    uint32_t push(uint32_t parent, uint32_t node, uint32_t value, uint32_t extra, uint32_t depth);
    bool fits(uint32_t stack, uint32_t height) const {
        return height != unlimited && cells[stack].depth + height <= grammar_depth_limit;
    }
    bool same_stack(uint32_t a, uint32_t b) const;
    void leave(const GrammarConfig& config);
    void step_one(const GrammarConfig& config, uint8_t byte);
    void step_terminal(const GrammarConfig& config, uint8_t byte);
    void step_texts(const GrammarConfig& config, uint8_t byte);
    void step_key(const GrammarConfig& config, uint8_t byte);
    void step_other_key(const GrammarConfig& config, uint8_t byte);
    void end_other_key(const GrammarConfig& config, uint32_t object_cell, uint64_t hash);
    void open_other(const GrammarConfig& config, uint32_t object_cell, uint64_t hash,
                    int32_t label);
    uint32_t object_of(const GrammarConfig& key) const;
    void between_members(const GrammarNode& node, uint32_t stack);
    void begin_key(uint32_t node, uint32_t stack);
    bool may_be_member(const ObjectNode& object, const GrammarCell& cell, uint32_t index) const;
    bool may_be_other(const ObjectNode& object, uint32_t stack) const;
    bool leads_to_member(const ObjectNode& object, const GrammarCell& cell,
                         uint32_t trie_node) const;
    uint32_t used_below(uint32_t stack, uint64_t hash) const;
    void repeat_again(uint32_t node, uint32_t stack);
    void between_items(uint32_t node, uint32_t stack);
    bool choose_item(const ArrayNode& array, uint32_t stack, bool really);

    const Grammar* grammar_ = nullptr;
    std::vector<std::pair<uint32_t, uint32_t>> open_, looped_;
    size_t set_begin_ = 0;
};

/// A text's place in a grammar: small, copied to fork or speculate.
/// Threads: one at a time; copies are apart.
class GrammarState {
public:
    GrammarState() = default;
    explicit GrammarState(GrammarPtr grammar);
    const GrammarPtr& grammar() const { return grammar_; }
    bool active() const { return grammar_ != nullptr; }
    /// False: the grammar has no text that goes on so; the state stays as it was.
    bool advance(std::string_view bytes, GrammarWalk& scratch);
    bool advance(std::string_view bytes) {
        GrammarWalk walk;
        return advance(bytes, walk);
    }
    /// A token by its number (parts that are tokens), else by its bytes; empty bytes: by its number
    /// alone.
    bool accept_token(Token token, std::string_view piece, GrammarWalk& scratch);
    bool accept_token(Token token, std::string_view piece) {
        GrammarWalk walk;
        return accept_token(token, piece, walk);
    }
    bool may_end(GrammarWalk& scratch) const;
    bool may_end() const {
        GrammarWalk walk;
        return may_end(walk);
    }
    /// The bytes that every text has from here on, at most so many; nothing where the text may end
    /// or a token may stand.
    void forced_bytes(std::string& out, size_t most, GrammarWalk& scratch) const;
    std::string forced_bytes(size_t most = 1024) const {
        std::string out;
        GrammarWalk walk;
        forced_bytes(out, most, walk);
        return out;
    }

private:
    friend class MaskMaker;
    void take(GrammarWalk& walk, GrammarWalk::Set set);
    GrammarPtr grammar_;
    std::vector<GrammarConfig> configs_;
    std::vector<GrammarCell> cells_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
