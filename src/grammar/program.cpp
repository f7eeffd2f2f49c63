// >>grammar
// Parts are turned into nodes from the end to the beginning: each is made for what follows it, so
// that only rules and what stands in several places need calls.
#include "prologue.hpp"

#include "grammar/program.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
size_t Grammar::bytes() const {
    const auto of = [](const auto& list) { return list.size() * sizeof list[0]; };
    const auto trie = [&](const TextTrie& t) {
        return of(t.first) + of(t.byte) + of(t.label) + of(t.from) + of(t.to) + of(t.order);
    };
    size_t sum = sizeof *this + of(nodes) + text.size() + of(edges) + of(terminals) + of(tries) +
                 of(repeats) + of(objects) + of(arrays);
    std::vector<const void*> seen;  // what several nodes share
    const auto is_new = [&](const void* shared) {
        const bool known = !shared || std::find(seen.begin(), seen.end(), shared) != seen.end();
        if (!known) seen.push_back(shared);
        return !known;
    };
    for (const TerminalNode& t : terminals) sum += is_new(t.dfa.get()) ? t.dfa->bytes() : 0;
    for (const TextsNode& texts : tries) sum += trie(texts.trie);
    for (const ObjectNode& o : objects) {
        sum += of(o.members) + of(o.next_required) + of(o.required_from) + of(o.possible) +
               trie(o.keys) + of(o.others) + of(o.taken);
        if (is_new(o.other.get())) sum += o.other->bytes();
        if (is_new(o.words.get())) sum += of(*o.words);
    }
    for (const ArrayNode& array : arrays) sum += of(array.first);
    return sum;
}

namespace {

constexpr size_t kMostParts = 200'000;

Error grammar_error(std::string_view why) {
    return make_error(ErrorKind::invalid_request, why, "invalid_json_schema");
}

void append_number(std::string& key, uint64_t value) {
    key.append(reinterpret_cast<const char*>(&value), sizeof value);
}
void append_text(std::string& key, std::string_view text) {
    append_number(key, text.size());
    key += text;
}

}  // namespace

uint32_t TextTrie::child(uint32_t node, uint8_t b) const {
    for (uint32_t c = first[node]; c < first[node + 1]; ++c)
        if (byte[c] >= b) return byte[c] == b ? c : 0;
    return 0;
}

TextTrie TextTrie::build(std::span<const std::string> texts) {
    TextTrie trie;
    trie.order.resize(texts.size());
    for (uint32_t i = 0; i < texts.size(); ++i) trie.order[i] = i;
    std::sort(trie.order.begin(), trie.order.end(),
              [&](uint32_t a, uint32_t b) { return texts[a] < texts[b]; });
    const auto add = [&](uint8_t b, uint32_t low, uint32_t high) {
        trie.byte.push_back(b);
        trie.from.push_back(low);
        trie.to.push_back(high);
        trie.label.push_back(-1);
    };
    std::vector<uint32_t> depth = {0};
    add(0, 0, uint32_t(texts.size()));
    for (uint32_t node = 0; node < trie.byte.size(); ++node) {
        trie.first.push_back(uint32_t(trie.byte.size()));
        uint32_t low = trie.from[node];
        const uint32_t high = trie.to[node], d = depth[node];
        if (low < high && texts[trie.order[low]].size() == d)
            trie.label[node] = int32_t(trie.order[low++]);
        while (low < high) {
            const char c = texts[trie.order[low]][d];
            uint32_t end = low;
            while (end < high && texts[trie.order[end]][d] == c) ++end;
            add(uint8_t(c), low, end);
            depth.push_back(d + 1);
            low = end;
        }
    }
    trie.first.push_back(uint32_t(trie.byte.size()));
    return trie;
}

GrammarBuilder::GrammarBuilder() { nodes_.push_back({}); }

Part GrammarBuilder::add(Node node) {
    if (node.kind == Kind::nothing || nodes_.size() >= kMostParts) return no_part;
    if (node.kind != Kind::rule && node.kind != Kind::object && node.kind != Kind::array) {
        std::string key(1, char(node.kind));
        append_number(key, node.a);
        append_number(key, node.b);
        append_text(key, node.text);
        append_number(key, node.parts.size());
        for (const Part part : node.parts) append_number(key, part);
        for (const std::string& text : node.list) append_text(key, text);
        append_number(key, reinterpret_cast<uintptr_t>(node.dfa.get()));
        const auto [at, is_new] = known_.try_emplace(std::move(key), Part(nodes_.size()));
        if (!is_new) return at->second;
    }
    nodes_.push_back(std::move(node));
    return Part(nodes_.size() - 1);
}

Part GrammarBuilder::bytes(std::string_view text) {
    return add({.kind = Kind::bytes, .text = std::string(text)});
}
Part GrammarBuilder::token(Token id) { return add({.kind = Kind::token, .a = uint32_t(id)}); }

Part GrammarBuilder::sequence(std::vector<Part> parts) {
    std::vector<Part> out;
    for (const Part part : parts) {
        const Node& node = nodes_[part];
        if (node.kind == Kind::nothing) return no_part;
        if (node.kind == Kind::bytes && !out.empty() && nodes_[out.back()].kind == Kind::bytes)
            out.back() = bytes(nodes_[out.back()].text + node.text);
        else if (node.kind != Kind::bytes || !node.text.empty()) out.push_back(part);
    }
    if (out.empty()) return bytes("");
    return out.size() == 1 ? out[0] : add({.kind = Kind::sequence, .parts = std::move(out)});
}

Part GrammarBuilder::choice(std::vector<Part> parts) {
    std::vector<Part> out;
    std::vector<std::string> fixed;  // plain texts are found by a tree
    const auto take = [&](Part part) {
        const Node& node = nodes_[part];
        if (node.kind == Kind::texts) fixed.insert(fixed.end(), node.list.begin(), node.list.end());
        else if (node.kind == Kind::bytes && !node.text.empty()) fixed.push_back(node.text);
        else if (part && std::find(out.begin(), out.end(), part) == out.end()) out.push_back(part);
    };
    for (const Part part : parts)
        if (nodes_[part].kind == Kind::choice)
            for (const Part inner : std::vector<Part>(nodes_[part].parts)) take(inner);
        else take(part);
    if (!fixed.empty()) out.push_back(texts(std::move(fixed)));
    if (out.empty()) return no_part;
    return out.size() == 1 ? out[0] : add({.kind = Kind::choice, .parts = std::move(out)});
}

Part GrammarBuilder::texts(std::vector<std::string> texts) {
    std::sort(texts.begin(), texts.end());
    texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
    if (texts.size() == 1) return bytes(texts[0]);
    if (texts.empty()) return no_part;
    return add({.kind = Kind::texts, .list = std::move(texts)});
}

Part GrammarBuilder::repeat(Part part, uint32_t least, uint32_t most) {
    if (most == 0) return bytes("");
    if (!part) return least ? no_part : bytes("");
    if (least == 1 && most == 1) return part;
    if (least == 0 && most == 1) return optional(part);
    return add({.kind = Kind::repeat, .a = least, .b = most, .parts = {part}});
}

Part GrammarBuilder::terminal(DfaPtr dfa, uint32_t least, uint32_t most) {
    if (dfa->empty() || least > most) return no_part;
    if (dfa->longest[Dfa::start] != unlimited) {
        if (dfa->longest[Dfa::start] < least) return no_part;
        if (dfa->longest[Dfa::start] <= most) most = unlimited;
    }
    if (most != unlimited && dfa->shortest[Dfa::start] > most) return no_part;
    if (least <= dfa->shortest[Dfa::start]) least = 0;
    if (least && most != unlimited && !dfa->even) {  // one bound alone is kept by the distances
        auto counted = limit_length(dfa, least, most, budget_);
        if (!counted || (*counted)->empty()) return no_part;
        dfa = std::move(*counted);
        least = 0, most = unlimited;
    }
    return add({.kind = Kind::terminal, .a = least, .b = most, .dfa = std::move(dfa)});
}

Part GrammarBuilder::object(ObjectRules rules) {
    return add(
        {.kind = Kind::object, .object = std::make_shared<const ObjectRules>(std::move(rules))});
}
Part GrammarBuilder::array(ArrayRules rules) {
    return add(
        {.kind = Kind::array, .array = std::make_shared<const ArrayRules>(std::move(rules))});
}
Part GrammarBuilder::new_rule() { return add({.kind = Kind::rule}); }
void GrammarBuilder::define(Part rule, Part meaning) {
    if (rule) nodes_[rule].parts = {meaning};
}

// ---- Parts to nodes ----------------------------------------------------------------------------

class GrammarCompiler {
public:
    explicit GrammarCompiler(GrammarBuilder& builder) : builder_(builder), parts_(builder.nodes_) {}

    Result<GrammarPtr> compile(Part root) {
        if (parts_.size() >= kMostParts || builder_.budget_.spent()) return budget_error();
        find_nullable();
        find_heights();
        if (failed_) return budget_error();
        if (height_[root] == unlimited) return grammar_error("nothing matches the grammar");
        if (height_[root] > grammar_depth_limit)
            return grammar_error("whatever matches the grammar nests too deep");
        if (recurses_left()) return grammar_error("a rule begins with itself (left recursion)");
        for (size_t p = 1; p < parts_.size(); ++p)
            if (parts_[p].kind == Kind::repeat && nullable_[parts_[p].parts[0]] &&
                parts_[p].b != unlimited)
                return grammar_error("what may be empty cannot be repeated a number of times");
        count_uses(root);
        grammar_ = std::make_shared<Grammar>();
        grammar_->nodes.push_back({GrammarNode::Kind::split});  // 0: nothing
        entries_.assign(parts_.size(), 0);
        const uint32_t end = add({GrammarNode::Kind::end});
        grammar_->root = emit(root, end);
        for (size_t i = 0; i < waiting_.size(); ++i) {
            const uint32_t back = add({GrammarNode::Kind::back});
            const uint32_t body = emit_body(waiting_[i], back);
            grammar_->edges[grammar_->nodes[entries_[waiting_[i]]].a] = body;
            if (grammar_->nodes.size() > kMostNodes) return budget_error();
        }
        if (failed_) return budget_error();
        return GrammarPtr(grammar_);
    }

private:
    using Kind = GrammarBuilder::Kind;
    using PartNode = GrammarBuilder::Node;
    static constexpr size_t kMostNodes = 400'000;

    uint32_t add(GrammarNode node) {
        grammar_->nodes.push_back(node);
        return uint32_t(grammar_->nodes.size() - 1);
    }
    uint32_t add_split(const std::vector<uint32_t>& targets) {
        const uint32_t first = uint32_t(grammar_->edges.size());
        grammar_->edges.insert(grammar_->edges.end(), targets.begin(), targets.end());
        return add({GrammarNode::Kind::split, 0, first, uint32_t(grammar_->edges.size())});
    }
    uint32_t add_bytes(std::string_view text, uint32_t next) {
        if (text.empty()) return next;
        const uint32_t first = uint32_t(grammar_->text.size());
        grammar_->text += text;
        return add({GrammarNode::Kind::bytes, next, first, uint32_t(grammar_->text.size())});
    }
    uint32_t add_space(uint32_t next) {
        if (builder_.space == JsonSpace::none) return next;
        const uint32_t one = add_bytes(" ", next);
        return builder_.space == JsonSpace::one ? one : add_split({next, one});
    }

    // Whether a part may match the empty text; least fixed point over the rules.
    void find_nullable() {
        nullable_.assign(parts_.size(), false);
        for (bool changed = true; changed;) {
            changed = false;
            for (size_t p = 1; p < parts_.size(); ++p)
                if (!nullable_[p] && is_nullable(parts_[p])) nullable_[p] = changed = true;
        }
    }
    bool is_nullable(const PartNode& node) const {
        const auto yes = [&](Part p) { return bool(nullable_[p]); };
        switch (node.kind) {
            case Kind::bytes: return node.text.empty();
            case Kind::sequence: return std::all_of(node.parts.begin(), node.parts.end(), yes);
            case Kind::choice:
            case Kind::rule: return std::any_of(node.parts.begin(), node.parts.end(), yes);
            case Kind::repeat: return node.a == 0 || yes(node.parts[0]);
            case Kind::terminal: return node.dfa->label[Dfa::start] >= 0 && node.a == 0;
            default: return false;
        }
    }
    // How many cells the shallowest match of a part needs; unlimited: nothing matches.
    void find_heights() {
        height_.assign(parts_.size(), unlimited);
        for (bool changed = true; changed;) {
            changed = false;
            for (size_t p = 1; p < parts_.size(); ++p) {
                const uint32_t found = height_of(parts_[p]);
                if (found < height_[p]) height_[p] = found, changed = true;
            }
        }
    }
    static uint32_t above(uint32_t height) { return height == unlimited ? unlimited : height + 1; }
    uint32_t height_of(const PartNode& node) const {
        uint32_t most = 0, least = unlimited;
        for (const Part p : node.parts) {
            most = std::max(most, called_height(p));
            least = std::min(least, called_height(p));
        }
        switch (node.kind) {
            case Kind::nothing: return unlimited;
            case Kind::bytes:
            case Kind::token:
            case Kind::texts:
            case Kind::terminal: return 0;
            case Kind::sequence: return most;
            case Kind::choice:
            case Kind::rule: return least;
            case Kind::repeat: return node.a ? above(most) : 0;
            case Kind::object: return object_height(*node.object);
            case Kind::array: return array_height(*node.array);
        }
        return unlimited;
    }
    // With the cell of a call, which only some of the parts become.
    uint32_t called_height(Part p) const {
        return is_big(parts_[p].kind) ? above(height_[p]) : height_[p];
    }
    static bool is_big(Kind kind) {
        return kind >= Kind::sequence && kind != Kind::texts && kind != Kind::terminal;
    }
    uint32_t object_height(const ObjectRules& rules) const {
        uint32_t most = 0;
        uint64_t required = 0, possible = 0;
        for (const ObjectMember& m : rules.members) {
            const uint32_t h = called_height(m.value);
            if (m.required && h == unlimited) return unlimited;
            if (m.required) most = std::max(most, h), ++required;
            possible += h != unlimited;
        }
        bool others = false;
        uint32_t other_height = unlimited;
        for (const Part p : rules.others) {
            others |= called_height(p) != unlimited;
            other_height = std::min(other_height, called_height(p));
        }
        others = others && rules.other;
        if (required > rules.most || (!others && possible < rules.least)) return unlimited;
        if (possible < rules.least && !has_others(rules, rules.least - possible)) return unlimited;
        if (required < rules.least) {  // some of the optional ones, or of the others
            std::vector<uint32_t> heights;
            for (const ObjectMember& m : rules.members)
                if (!m.required && called_height(m.value) != unlimited)
                    heights.push_back(called_height(m.value));
            std::sort(heights.begin(), heights.end());
            const uint64_t wanted = rules.least - required;
            if (others) most = std::max(most, other_height);
            else most = std::max(most, heights[size_t(wanted - 1)]);
        }
        return above(most);
    }
    uint32_t item_height(const ArrayItem& item) const {
        return std::min(called_height(item.counted), called_height(item.other));
    }
    uint32_t array_height(const ArrayRules& rules) const {
        uint32_t most = 0;
        const uint32_t needed = std::max(rules.least, rules.least_counted);
        if (needed > rules.most) return unlimited;
        for (uint32_t i = 0; i < needed && i <= rules.first.size(); ++i)
            most = std::max(most,
                            item_height(i < rules.first.size() ? rules.first[i] : rules.rest));
        if (rules.least_counted) most = std::max(most, counted_height(rules));
        return above(most);
    }
    uint32_t counted_height(const ArrayRules& rules) const {
        uint32_t least = called_height(rules.rest.counted);
        for (const ArrayItem& item : rules.first)
            least = std::min(least, called_height(item.counted));
        return least;
    }

    // Whether some part can come to itself without having read anything: the parts that may stand
    // first in others are taken away in the order of a topological sort; a cycle stays.
    template <class Visit>
    void each_first(const PartNode& node, const Visit& visit) const {
        if (node.kind == Kind::sequence) {
            for (const Part p : node.parts) {
                visit(p);
                if (!nullable_[p]) return;
            }
        } else if (node.kind == Kind::choice || node.kind == Kind::rule ||
                   node.kind == Kind::repeat) {
            for (const Part p : node.parts) visit(p);
        }
    }
    bool recurses_left() const {
        std::vector<uint32_t> incoming(parts_.size()), order;
        for (const PartNode& node : parts_) each_first(node, [&](Part p) { ++incoming[p]; });
        for (Part p = 0; p < parts_.size(); ++p)
            if (!incoming[p]) order.push_back(p);
        for (size_t i = 0; i < order.size(); ++i)
            each_first(parts_[order[i]], [&](Part p) {
                if (!--incoming[p]) order.push_back(p);
            });
        return order.size() < parts_.size();
    }
    void count_uses(Part root) {
        uses_.assign(parts_.size(), 0);
        std::vector<Part> open = {root};
        uses_[root] = 1;
        const auto use = [&](Part p) {
            if (uses_[p]++ == 0) open.push_back(p);
        };
        while (!open.empty()) {
            const PartNode& node = parts_[open.back()];
            open.pop_back();
            for (const Part p : node.parts) use(p);
            if (node.object) {
                for (const ObjectMember& m : node.object->members) use(m.value);
                for (const Part p : node.object->others) use(p);
            }
            if (node.array) {
                for (const ArrayItem& item : node.array->first) use(item.counted), use(item.other);
                use(node.array->rest.counted), use(node.array->rest.other);
            }
        }
    }

    uint32_t emit(Part p, uint32_t next) {
        if (height_[p] == unlimited) return 0;
        const Kind kind = parts_[p].kind;
        const bool apart = is_big(kind) && (uses_[p] > 1 || stack_.is_low());
        if (kind != Kind::rule && !apart) return emit_body(p, next);
        if (!entries_[p]) {
            entries_[p] = add_split({0});
            waiting_.push_back(p);
        }
        return add({GrammarNode::Kind::call, next, entries_[p], above(height_[p])});
    }
    uint32_t emit_body(Part p, uint32_t next) {
        const PartNode& node = parts_[p];
        switch (node.kind) {
            case Kind::nothing: return 0;
            case Kind::bytes: return add_bytes(node.text, next);
            case Kind::token: return add({GrammarNode::Kind::token, next, node.a});
            case Kind::rule: return emit(node.parts[0], next);
            case Kind::sequence:
                for (size_t i = node.parts.size(); i-- > 0;) next = emit(node.parts[i], next);
                return next;
            case Kind::choice: return emit_choice(node, next);
            case Kind::texts:
                grammar_->tries.push_back({TextTrie::build(node.list)});
                return add({GrammarNode::Kind::texts, next, uint32_t(grammar_->tries.size() - 1)});
            case Kind::terminal: return emit_terminal(node, next);
            case Kind::repeat: return emit_repeat(node, next);
            case Kind::object: return emit_object(*node.object, height_[p], next);
            case Kind::array: return emit_array(*node.array, height_[p], next);
        }
        return 0;
    }
    uint32_t emit_choice(const PartNode& node, uint32_t next) {
        std::vector<uint32_t> targets;
        for (const Part part : node.parts)
            if (height_[part] != unlimited) targets.push_back(emit(part, next));
        return targets.size() == 1 ? targets[0] : add_split(targets);
    }
    uint32_t emit_terminal(const PartNode& node, uint32_t next) {
        grammar_->terminals.push_back({node.dfa, node.a, node.b});
        return add({GrammarNode::Kind::terminal, next, uint32_t(grammar_->terminals.size() - 1)});
    }
    uint32_t emit_repeat(const PartNode& node, uint32_t next) {
        const uint32_t id = uint32_t(grammar_->repeats.size());
        const uint32_t least = nullable_[node.parts[0]] ? 0 : node.a;
        const uint32_t height = above(called_height(node.parts[0]));
        grammar_->repeats.push_back({0, least, node.b, height});
        const uint32_t again = add({GrammarNode::Kind::again, next, id});
        const uint32_t body = emit(node.parts[0], again);
        grammar_->repeats[id].body = body;
        return add({GrammarNode::Kind::repeat, again, id});
    }
    uint32_t emit_object(const ObjectRules& rules, uint32_t height, uint32_t next) {
        const uint32_t id = uint32_t(grammar_->objects.size());
        grammar_->objects.emplace_back();
        ObjectNode object;
        const char* const marks = rules.is_list ? "[]" : "{}";
        const uint32_t members = add({GrammarNode::Kind::members, add_bytes(marks + 1, next), id});
        const uint32_t key = add({GrammarNode::Kind::key, members, id});
        object.first_key = add_bytes("\"", key);
        object.next_key = add_bytes(",", add_space(object.first_key));
        object.least = rules.least, object.most = rules.most, object.height = height;
        std::vector<std::string> keys;
        for (const ObjectMember& m : rules.members) {
            keys.push_back(m.key.substr(1));
            const uint32_t value = height_[m.value] == unlimited
                                       ? 0
                                       : add_space(emit(m.value, members));
            object.members.push_back({value, called_height(m.value), m.required});
        }
        object.keys = TextTrie::build(keys);
        sum_members(object);
        add_others(object, rules, members);
        grammar_->objects[id] = std::move(object);
        return add_bytes({marks, 1}, add({GrammarNode::Kind::object, members, id}));
    }
    static void sum_members(ObjectNode& object) {
        const size_t count = object.members.size();
        object.next_required.assign(count + 1, uint32_t(count));
        object.required_from.assign(count + 1, 0);
        object.possible.assign(count + 1, 0);
        for (size_t i = count; i-- > 0;) {
            const ObjectNode::Member& m = object.members[i];
            object.next_required[i] = m.required ? uint32_t(i) : object.next_required[i + 1];
            object.required_from[i] = object.required_from[i + 1] + m.required;
            object.possible[i] = object.possible[i + 1] + (m.value != 0);
        }
    }
    void add_others(ObjectNode& object, const ObjectRules& rules, uint32_t members) {
        bool any = false;
        for (const Part part : rules.others) {
            const bool can = height_[part] != unlimited;
            const uint32_t value = !can            ? 0
                                   : rules.is_list ? members
                                                   : add_bytes(":", add_space(emit(part, members)));
            object.others.push_back({value, called_height(part)});
            if (can) object.others_height = std::max(object.others_height, called_height(part));
            any |= can;
        }
        if (!any || !rules.other) return;
        const OtherKeys& keys = keys_of(rules);
        if (keys.dfa->empty()) return;
        object.other = keys.dfa;
        object.words = keys.words;
        object.taken.assign(object.keys.from.size(), 0);
        for (uint32_t node = 0; node < object.keys.from.size(); ++node)
            for (uint32_t i = object.keys.from[node]; i < object.keys.to[node]; ++i)
                object.taken[node] += is_other(rules, rules.members[object.keys.order[i]]);
        object.endless = std::all_of(object.words->begin() + Dfa::start, object.words->end(),
                                     [](uint32_t count) { return count == unlimited; });
    }
    // The keys of an object that are not declared and can have a value, and how many of them there
    // are from each state on, as far as 32 bits count: those with a way to a cycle have no end.
    struct OtherKeys {
        DfaPtr dfa;
        std::shared_ptr<const std::vector<uint32_t>> words;
    };
    const OtherKeys& keys_of(const ObjectRules& rules) const {
        std::vector<bool> usable;
        for (const Part part : rules.others) usable.push_back(height_[part] != unlimited);
        OtherKeys& known = keys_[{rules.other.get(), usable}];
        if (known.dfa) return known;
        auto kept = keep_labels(rules.other, usable, builder_.budget_);
        failed_ = failed_ || !kept;
        known.dfa = kept ? *kept : rules.other;
        known.words = std::make_shared<const std::vector<uint32_t>>(count_words(*known.dfa));
        return known;
    }
    static std::vector<uint32_t> count_words(const Dfa& dfa) {
        std::vector<uint32_t> words(dfa.states(), 0), width(dfa.class_count, 0);
        for (const uint8_t c : dfa.classes) ++width[c];
        std::vector<std::pair<uint32_t, uint32_t>> by_length;
        for (uint32_t s = Dfa::start; s < dfa.states(); ++s)
            by_length.push_back({dfa.longest[s], s});
        std::sort(by_length.begin(), by_length.end());
        const auto sum_from = [&](uint32_t s) -> uint32_t {
            if (dfa.longest[s] == unlimited) return unlimited;
            uint64_t sum = dfa.label[s] >= 0;
            for (uint32_t c = 0; c < dfa.class_count; ++c)
                if (const uint32_t to = dfa.next[size_t(s) * dfa.class_count + c]; to != Dfa::dead)
                    sum += uint64_t(width[c]) * words[to];
            return uint32_t(std::min<uint64_t>(sum, unlimited));
        };
        // Within one character states are not ordered by length: repeated until nothing grows.
        for (bool grows = true; grows;) {
            grows = false;
            for (const auto& [length, s] : by_length) {
                const uint32_t sum = sum_from(s);
                grows |= sum != words[s];
                words[s] = sum;
            }
        }
        return words;
    }
    // Whether a declared key would be one of the others if it were not declared.
    bool is_other(const ObjectRules& rules, const ObjectMember& m) const {
        const int32_t label = rules.other->match(
            std::string_view(m.key).substr(1, m.key.size() - 3));
        return label >= 0 && height_[rules.others[size_t(label)]] != unlimited;
    }
    // Whether an object has so many keys that are not declared.
    bool has_others(const ObjectRules& rules, uint64_t wanted) const {
        uint64_t taken = 0;
        for (const ObjectMember& m : rules.members) taken += is_other(rules, m);
        return (*keys_of(rules).words)[Dfa::start] >= std::min<uint64_t>(wanted + taken, unlimited);
    }
    uint32_t emit_array(const ArrayRules& rules, uint32_t height, uint32_t next) {
        const uint32_t id = uint32_t(grammar_->arrays.size());
        grammar_->arrays.emplace_back();
        ArrayNode array;
        const uint32_t items = add({GrammarNode::Kind::items, add_bytes("]", next), id});
        array.least = rules.least, array.most = rules.most, array.height = height;
        array.least_counted = rules.least_counted, array.most_counted = rules.most_counted;
        const auto item = [&](const ArrayItem& of) {
            return ArrayNode::Item{emit(of.counted, items), emit(of.other, items),
                                   called_height(of.counted), called_height(of.other)};
        };
        for (const ArrayItem& of : rules.first) array.first.push_back(item(of));
        array.rest = item(rules.rest);
        for (uint32_t i = 0; i <= array.first.size(); ++i)
            if (!array.item(i).counted && !array.item(i).other) {
                array.most = std::min(array.most, i);
                break;
            }
        array.separator = add_bytes(",", add_space(add({GrammarNode::Kind::array, items, id, 1})));
        grammar_->arrays[id] = std::move(array);
        return add_bytes("[", add({GrammarNode::Kind::array, items, id}));
    }
    GrammarBuilder& builder_;
    const std::vector<PartNode>& parts_;
    std::shared_ptr<Grammar> grammar_;
    std::vector<bool> nullable_;
    std::vector<uint32_t> height_, uses_, entries_;
    mutable std::map<std::pair<const Dfa*, std::vector<bool>>, OtherKeys> keys_;
    mutable bool failed_ = false;
    std::vector<Part> waiting_;
    const StackLimit stack_ = {};  // where it ends, parts wait and are called
};

Result<GrammarPtr> GrammarBuilder::build(Result<Part> root) {
    if (!root) return std::move(root.error());
    return GrammarCompiler(*this).compile(*root);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
