// What a grammar is once it is compiled, and the builder that makes it from parts.
#pragma once

#include "grammar/dfa.hpp"
#include "tokenizer/tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// Sorted texts as a tree of their bytes; the children of node n are first[n] .. first[n + 1] - 1.
struct TextTrie {
    std::vector<uint32_t> first;
    std::vector<uint8_t> byte;
    std::vector<int32_t> label;                      // of the text that ends here, or -1
    std::vector<uint32_t> from, to;                  // its texts, in `order`
    std::vector<uint32_t> order;                     // labels, by text
    uint32_t child(uint32_t node, uint8_t b) const;  ///< 0: none
    static TextTrie build(
        std::span<const std::string> texts);  ///< labels are indices; no duplicates
};

/// A reference to a part of the grammar in the making.
using Part = uint32_t;
inline constexpr Part no_part = 0;  ///< matches nothing

/// A member of an object that the schema names; `key` is as it stands in the text, with its quotes
/// and colon. `value` no_part: must be absent.
struct ObjectMember {
    std::string key;
    Part value = no_part;
    bool required = false;
};
struct ObjectRules {
    std::vector<ObjectMember> members;  // in this order
    DfaPtr other;                       // keys between their quotes, in Spelling::json; null: none
    std::vector<Part> others = {};      // values, by the label of `other`
    uint32_t least = 0, most = unlimited;
    bool is_list = false;  // of keys alone, [ ] around them: strings that differ, as keys do
};
/// Items come in two kinds where some are counted (`contains`): those that count and the others.
struct ArrayItem {
    Part counted = no_part, other = no_part;
};
struct ArrayRules {
    std::vector<ArrayItem> first;
    ArrayItem rest;
    uint32_t least = 0, most = unlimited;
    uint32_t least_counted = 0, most_counted = unlimited;
};

/// White space between the tokens of JSON: none; at most one space after ',' and ':'; one space there.
enum class JsonSpace : uint8_t { none, optional, one };

class Grammar;
using GrammarPtr = std::shared_ptr<const Grammar>;

/// Makes grammars: parts of what is made before, by number. Equal parts are one.
/// Threads: one at a time.
class GrammarBuilder {
public:
    GrammarBuilder();
    Part bytes(std::string_view text);
    Part token(Token id);  ///< this token, whatever its bytes
    Part sequence(std::vector<Part> parts);
    Part choice(std::vector<Part> parts);
    Part repeat(Part part, uint32_t least, uint32_t most);
    Part optional(Part part) { return choice({part, bytes("")}); }
    Part texts(std::vector<std::string> texts);  ///< one of them
    /// A text of an automaton, `least` to `most` characters long.
    Part terminal(DfaPtr dfa, uint32_t least = 0, uint32_t most = unlimited);
    Part object(ObjectRules rules);
    Part array(ArrayRules rules);
    /// A rule is named before what it stands for is known, so that it may stand in itself.
    Part new_rule();
    void define(Part rule, Part meaning);

    /// Errors: invalid_request, code invalid_json_schema: nothing matches, left recursion, limits.
    Result<GrammarPtr> build(Result<Part> root);
    Budget& budget() { return budget_; }
    JsonSpace space = JsonSpace::optional;

private:
    friend class GrammarCompiler;
    enum class Kind : uint8_t {
        nothing,
        bytes,
        token,
        sequence,
        choice,
        repeat,
        texts,
        terminal,
        object,
        array,
        rule
    };
    struct Node {
        Kind kind = Kind::nothing;
        uint32_t a = 0, b = 0;
        std::string text = {};
        std::vector<Part> parts = {};
        std::vector<std::string> list = {};
        DfaPtr dfa = {};
        std::shared_ptr<const ObjectRules> object = {};
        std::shared_ptr<const ArrayRules> array = {};
    };
    Part add(Node node);
    std::vector<Node> nodes_;
    std::unordered_map<std::string, Part> known_;
    Budget budget_;
};

struct GrammarNode {
    enum class Kind : uint8_t {
        bytes,     // text[a, b)
        terminal,  // terminals[a]
        texts,     // tries[a]
        token,     // a
        split,     // edges[a, b)
        call,      // rule at a; b: height
        back,      // end of a rule
        repeat,    // repeats[a]: enters
        again,     // repeats[a]: between two
        object,    // objects[a]: enters
        members,   // objects[a]: between two members
        key,       // objects[a]: inside a key
        array,     // arrays[a]: enters
        items,     // arrays[a]: between two items
        end,
    };
    Kind kind;
    uint32_t next = 0, a = 0, b = 0;
};
struct TerminalNode {
    DfaPtr dfa;
    uint32_t least, most;
    bool counts() const { return least > 0 || most != unlimited; }
};
struct TextsNode {
    TextTrie trie;
};
struct RepeatNode {
    uint32_t body, least, most, height;
};
struct ObjectNode {
    struct Member {
        uint32_t value;   // node behind the key; 0: must be absent
        uint32_t height;  // of the value
        bool required;
    };
    std::vector<Member> members;
    std::vector<uint32_t> next_required;  // from each index on; members.size(): none
    std::vector<uint32_t> required_from;  // how many are required from each index on
    std::vector<uint32_t> possible;       // how many may come from each index on
    TextTrie keys;
    DfaPtr other;
    std::vector<std::pair<uint32_t, uint32_t>> others;  // value node, height; by label
    // Texts from a state of `other` on, at most `unlimited`; shared by objects with the same keys.
    std::shared_ptr<const std::vector<uint32_t>> words;
    std::vector<uint32_t> taken;  // of these the declared ones, from a node of `keys` on
    bool endless = true;          // all of them are unlimited
    uint32_t others_height = 0;
    uint32_t least, most, first_key, next_key, height;
    bool counts() const { return least > 0 || most != unlimited; }
};
struct ArrayNode {
    struct Item {
        uint32_t counted, other;  // nodes; 0: not possible
        uint32_t counted_height, other_height;
    };
    std::vector<Item> first;
    Item rest;
    uint32_t least, most, least_counted, most_counted, separator, height;
    const Item& item(uint32_t i) const { return i < first.size() ? first[i] : rest; }
};

/// What states and masks run on. Threads: immutable.
class Grammar {
public:
    std::vector<GrammarNode> nodes;
    std::string text;
    std::vector<uint32_t> edges;
    std::vector<TerminalNode> terminals;
    std::vector<TextsNode> tries;
    std::vector<RepeatNode> repeats;
    std::vector<ObjectNode> objects;
    std::vector<ArrayNode> arrays;
    uint32_t root = 0;
    size_t bytes() const;  ///< about
};

/// How deep calls, containers and repeats may stand in each other; a JSON value of it is read by
/// Json::parse.
inline constexpr uint32_t grammar_depth_limit = 250;

}  // namespace detail
}  // namespace v1
}  // namespace valar
