// >>grammar
// A set of configurations reads one byte at a time. What needs no byte (choices, calls, ends of
// rules) is gone through at once, so that every configuration kept waits for a byte, a token or the
// end; only the end of a terminal is left for `expand`, since it is asked for at few places.
#include "prologue.hpp"

#include "grammar/state.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
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

constexpr uint32_t kMostConfigs = 2'000;
constexpr uint32_t kMostOpened = 100'000;
constexpr uint64_t kHashSeed = 1469598103934665603u;

uint64_t mix(uint64_t hash, uint8_t byte) { return (hash ^ byte) * 1099511628211u; }
uint64_t hash_in(const GrammarCell& cell) { return uint64_t(cell.extra) << 32 | cell.value; }

void allow(std::array<uint64_t, 4>& bytes, uint8_t b) { bytes[b >> 6] |= uint64_t{1} << (b & 63); }

bool is_alive(const TerminalNode& terminal, uint32_t state, uint32_t count) {
    const Dfa& dfa = *terminal.dfa;
    if (dfa.shortest[state] == unlimited) return false;
    if (terminal.most != unlimited && uint64_t(count) + dfa.shortest[state] > terminal.most)
        return false;
    return dfa.longest[state] == unlimited ||
           uint64_t(count) + dfa.longest[state] >= terminal.least;
}
bool may_leave(const TerminalNode& terminal, const GrammarConfig& c) {
    return terminal.dfa->label[c.sub] >= 0 && c.count >= terminal.least;
}

}  // namespace

uint32_t GrammarWalk::push(uint32_t parent, uint32_t node, uint32_t value, uint32_t extra,
                           uint32_t depth) {
    cells.push_back({parent, node, value, extra, depth});
    return uint32_t(cells.size() - 1);
}

bool GrammarWalk::same_stack(uint32_t a, uint32_t b) const {
    while (a != b) {
        const GrammarCell &x = cells[a], &y = cells[b];
        if (!a || !b || x.node != y.node || x.value != y.value || x.extra != y.extra ||
            x.depth != y.depth)
            return false;
        a = x.parent, b = y.parent;
    }
    return true;
}

void GrammarWalk::put(GrammarConfig config) {
    for (size_t i = set_begin_; i < pool.size(); ++i) {
        const GrammarConfig& c = pool[i];
        if (c.node == config.node && c.sub == config.sub && c.count == config.count &&
            same_stack(c.stack, config.stack))
            return;
    }
    if (pool.size() - set_begin_ < kMostConfigs) pool.push_back(config);
}

void GrammarWalk::close(uint32_t node, uint32_t stack) {
    const size_t base = open_.size();
    open(node, stack);
    looped_.clear();
    for (uint32_t steps = 0; open_.size() > base && steps < kMostOpened; ++steps) {
        const auto [n, s] = open_.back();
        open_.pop_back();
        close_one(n, s);
    }
    open_.resize(base);
}

void GrammarWalk::close_one(uint32_t id, uint32_t stack) {
    const GrammarNode& node = grammar_->nodes[id];
    switch (node.kind) {
        case Kind::split:
            for (uint32_t e = node.b; e-- > node.a;) open(grammar_->edges[e], stack);
            return;
        case Kind::bytes:
        case Kind::token:
        case Kind::end: return put({id, 0, 0, stack});
        case Kind::texts:
            if (grammar_->tries[node.a].trie.from.size() > 1) put({id, 0, 0, stack});
            return;
        case Kind::terminal: return put({id, Dfa::start, 0, stack});
        case Kind::call:
            if (grammar_->nodes[node.next].kind == Kind::back) return open(node.a, stack);
            if (!fits(stack, node.b)) return;
            return open(node.a, push(stack, id, 0, 0, cells[stack].depth + 1));
        case Kind::back: {
            const GrammarCell cell = cells[stack];
            return open(grammar_->nodes[cell.node].next, cell.parent);
        }
        case Kind::repeat:
            if (!fits(stack, 1)) return;
            return open(node.next, push(stack, node.next, 0, 0, cells[stack].depth + 1));
        case Kind::again: return repeat_again(id, stack);
        case Kind::object:
            if (!fits(stack, grammar_->objects[node.a].height)) return;
            return open(node.next, push(stack, node.next, 0, 0, cells[stack].depth + 1));
        case Kind::members: return between_members(node, stack);
        case Kind::key: return begin_key(id, stack);
        case Kind::array: {
            const ArrayNode& array = grammar_->arrays[node.a];
            if (node.b) return (void)choose_item(array, stack, true);
            if (!fits(stack, array.height)) return;
            const uint32_t top = push(stack, node.next, 0, 0, cells[stack].depth + 1);
            if (array.least == 0 && array.least_counted == 0)
                open(grammar_->nodes[node.next].next, stack);
            return (void)choose_item(array, top, true);
        }
        case Kind::items: return between_items(id, stack);
    }
}

void GrammarWalk::repeat_again(uint32_t id, uint32_t stack) {
    for (const auto& [n, s] : looped_)
        if (n == id && same_stack(s, stack)) return;
    looped_.push_back({id, stack});
    const GrammarNode& node = grammar_->nodes[id];
    const RepeatNode& repeat = grammar_->repeats[node.a];
    const GrammarCell cell = cells[stack];
    if (cell.value >= repeat.least) open(node.next, cell.parent);
    if (cell.value >= repeat.most || !repeat.body || !fits(cell.parent, repeat.height)) return;
    const uint32_t most = repeat.most == unlimited ? repeat.least : repeat.most;
    const uint32_t value = std::min(cell.value + 1, most);
    open(repeat.body,
         value == cell.value ? stack : push(cell.parent, cell.node, value, 0, cell.depth));
}

// ---- Arrays --------------------------------------------------------------------------------------

bool GrammarWalk::choose_item(const ArrayNode& array, uint32_t stack, bool really) {
    const GrammarCell cell = cells[stack];
    if (cell.value >= array.most) return false;
    const ArrayNode::Item& item = array.item(cell.value);
    const uint32_t enough = array.most == unlimited
                                ? std::max(array.least, uint32_t(array.first.size()))
                                : unlimited;
    const uint32_t value = std::min(cell.value + 1, enough);
    bool any = false;
    const auto choose = [&](uint32_t node, uint32_t height, uint32_t counted) {
        if (!node || !fits(stack, height)) return;
        any = true;
        if (really) open(node, push(cell.parent, cell.node, value, counted, cell.depth));
    };
    uint64_t later = array.rest.counted ? uint64_t(array.most) : 0;  // places that may still count
    if (array.rest.counted && array.most != unlimited) later = array.most - cell.value - 1;
    else if (!array.rest.counted)
        for (size_t i = cell.value + 1u; i < array.first.size(); ++i)
            later += array.first[i].counted != 0;
    if (uint64_t(cell.extra) + later >= array.least_counted)
        choose(item.other, item.other_height, cell.extra);
    if (cell.extra < array.most_counted) {
        const uint32_t most = array.most_counted == unlimited ? array.least_counted : unlimited;
        choose(item.counted, item.counted_height, std::min(cell.extra + 1, most));
    }
    return any;
}

void GrammarWalk::between_items(uint32_t id, uint32_t stack) {
    const GrammarNode& node = grammar_->nodes[id];
    const ArrayNode& array = grammar_->arrays[node.a];
    const GrammarCell cell = cells[stack];
    if (cell.value >= array.least && cell.extra >= array.least_counted)
        open(node.next, cell.parent);
    if (choose_item(array, stack, false)) open(array.separator, stack);
}

// ---- Objects -------------------------------------------------------------------------------------
//
// The cell of an object holds the index of the first member that may still come and how many there
// were (one, where nothing counts them). Below it lie the keys that were not declared, each as the
// hash of its bytes: none may come twice. Above it lies the key that is being read.

bool GrammarWalk::may_be_member(const ObjectNode& object, const GrammarCell& cell,
                                uint32_t index) const {
    const ObjectNode::Member& m = object.members[index];
    if (!m.value || index < cell.value || index > object.next_required[cell.value]) return false;
    if (m.height == unlimited || cell.depth + m.height > grammar_depth_limit) return false;
    if (!object.counts()) return true;
    const uint64_t now = uint64_t(cell.extra) + 1;
    if (object.most != unlimited && now + object.required_from[index + 1] > object.most)
        return false;
    return object.other || now + object.possible[index + 1] >= object.least;
}

bool GrammarWalk::may_be_other(const ObjectNode& object, uint32_t stack) const {
    const GrammarCell& cell = cells[stack];
    if (!object.other || !fits(stack, object.others_height)) return false;
    if (object.next_required[cell.value] != object.members.size()) return false;
    if (object.most != unlimited && cell.extra >= object.most) return false;
    return (*object.words)[Dfa::start] == unlimited ||
           (*object.words)[Dfa::start] > used_below(stack, kHashSeed) + object.taken[0];
}

bool GrammarWalk::leads_to_member(const ObjectNode& object, const GrammarCell& cell,
                                  uint32_t trie_node) const {
    const TextTrie& keys = object.keys;
    for (uint32_t i = keys.from[trie_node]; i < keys.to[trie_node]; ++i)
        if (may_be_member(object, cell, keys.order[i])) return true;
    return false;
}

void GrammarWalk::between_members(const GrammarNode& node, uint32_t stack) {
    const ObjectNode& object = grammar_->objects[node.a];
    const GrammarCell cell = cells[stack];
    const uint32_t count = uint32_t(object.members.size());
    if (object.next_required[cell.value] == count &&
        (!object.counts() || cell.extra >= object.least)) {
        uint32_t below = cell.parent;
        while (below && grammar_->nodes[cells[below].node].kind == Kind::key)
            below = cells[below].parent;
        open(node.next, below);
    }
    bool more = may_be_other(object, stack);
    for (uint32_t i = cell.value; !more && i < count && i <= object.next_required[cell.value]; ++i)
        more = may_be_member(object, cell, i);
    if (more) open(cell.extra ? object.next_key : object.first_key, stack);
}

void GrammarWalk::begin_key(uint32_t id, uint32_t stack) {
    const ObjectNode& object = grammar_->objects[grammar_->nodes[id].a];
    if (!object.members.empty() && leads_to_member(object, cells[stack], 0)) put({id, 0, 0, stack});
    if (!may_be_other(object, stack)) return;
    const uint32_t top = push(stack, id, uint32_t(kHashSeed), uint32_t(kHashSeed >> 32),
                              cells[stack].depth);
    put({id, Dfa::start, 2, top});
}

void GrammarWalk::step_key(const GrammarConfig& config, uint8_t byte) {
    if (config.count) return step_other_key(config, byte);
    const ObjectNode& object = grammar_->objects[grammar_->nodes[config.node].a];
    const GrammarCell cell = cells[config.stack];
    const uint32_t child = object.keys.child(config.sub, byte);
    if (!child || !leads_to_member(object, cell, child)) return;
    const int32_t index = object.keys.label[child];
    if (index < 0) return put({config.node, child, 0, config.stack});
    const uint32_t count = object.counts() ? cell.extra + 1 : 1;
    close(object.members[size_t(index)].value,
          push(cell.parent, cell.node, uint32_t(index) + 1, count, cell.depth));
}

// How many cells below an object's have this hash: keys that begin so, where beginnings are kept.
uint32_t GrammarWalk::used_below(uint32_t object_cell, uint64_t hash) const {
    uint32_t count = 0;
    for (uint32_t c = cells[object_cell].parent;
         c && grammar_->nodes[cells[c].node].kind == Kind::key; c = cells[c].parent)
        count += hash_in(cells[c]) == hash;
    return count;
}

// count: 1, or 2 and the place in the tree of the declared keys.
void GrammarWalk::step_other_key(const GrammarConfig& config, uint8_t byte) {
    const ObjectNode& object = grammar_->objects[grammar_->nodes[config.node].a];
    const uint32_t below = object_of(config);
    const uint64_t hash = mix(hash_in(cells[config.stack]), byte);
    const uint32_t place = config.count >= 2 ? object.keys.child(config.count - 2, byte) : 0;
    const uint32_t state = object.other->step(config.sub, byte);
    if (byte == '"' && state == Dfa::dead && !place) end_other_key(config, below, hash);
    if (state == Dfa::dead || (*object.words)[state] == 0) return;
    if ((*object.words)[state] != unlimited) {
        const uint32_t declared = place ? object.taken[place] : 0;
        if ((*object.words)[state] <= used_below(below, hash) + declared) return;
    }
    const uint32_t parent = object.endless ? below : config.stack;
    const uint32_t top = push(parent, config.node, uint32_t(hash), uint32_t(hash >> 32),
                              cells[below].depth);
    put({config.node, state, place ? place + 2 : 1, top});
}

void GrammarWalk::end_other_key(const GrammarConfig& config, uint32_t object_cell, uint64_t hash) {
    const ObjectNode& object = grammar_->objects[grammar_->nodes[config.node].a];
    const int32_t label = object.other->label[config.sub];
    if (label >= 0 && !used_below(object_cell, hash)) open_other(config, object_cell, hash, label);
}

// What stands behind a key that was not declared.
void GrammarWalk::open_other(const GrammarConfig& config, uint32_t object_cell, uint64_t hash,
                             int32_t label) {
    const ObjectNode& object = grammar_->objects[grammar_->nodes[config.node].a];
    if (!object.others[size_t(label)].first) return;
    const GrammarCell cell = cells[object_cell];
    const auto keep = [&](uint32_t parent, uint64_t h) {
        return push(parent, config.node, uint32_t(h), uint32_t(h >> 32), cell.depth);
    };
    uint32_t below = cell.parent;
    for (uint32_t c = config.stack; !object.endless && c != object_cell; c = cells[c].parent)
        below = keep(below, hash_in(cells[c]));
    below = keep(below, hash);
    const uint32_t count = object.counts() ? cell.extra + 1 : 1;
    close(object.others[size_t(label)].first,
          push(below, cell.node, uint32_t(object.members.size()), count, cell.depth));
}

uint32_t GrammarWalk::object_of(const GrammarConfig& key) const {
    uint32_t below = key.stack;
    while (below && grammar_->nodes[cells[below].node].kind == Kind::key)
        below = cells[below].parent;
    return below;
}

bool GrammarWalk::may_be_key(const GrammarConfig& key, std::string_view rest) const {
    const ObjectNode& object = grammar_->objects[grammar_->nodes[key.node].a];
    uint64_t hash = hash_in(cells[key.stack]);
    uint32_t place = key.count >= 2 ? key.count - 2 : 0;
    bool declared = key.count >= 2;
    for (const char c : rest) {
        hash = mix(hash, uint8_t(c));
        if (declared) declared = (place = object.keys.child(place, uint8_t(c))) != 0;
    }
    if (declared && object.keys.child(place, '"')) return false;
    return !used_below(object_of(key), mix(hash, '"'));
}

// ---- Bytes ---------------------------------------------------------------------------------------

void GrammarWalk::step_terminal(const GrammarConfig& config, uint8_t byte) {
    const TerminalNode& terminal = grammar_->terminals[grammar_->nodes[config.node].a];
    const uint32_t state = terminal.dfa->step(config.sub, byte);
    if (state == Dfa::dead) return;
    uint32_t count = 0;
    if (terminal.counts()) {
        count = config.count + terminal.dfa->boundary[state];
        if (terminal.most == unlimited) count = std::min(count, terminal.least);
        if (!is_alive(terminal, state, count)) return;
    }
    put({config.node, state, count, config.stack});
}

void GrammarWalk::step_texts(const GrammarConfig& config, uint8_t byte) {
    const GrammarNode& node = grammar_->nodes[config.node];
    const TextTrie& trie = grammar_->tries[node.a].trie;
    const uint32_t child = trie.child(config.sub, byte);
    if (!child) return;
    if (trie.first[child] == trie.first[child + 1]) return close(node.next, config.stack);
    put({config.node, child, 0, config.stack});
}

void GrammarWalk::step_one(const GrammarConfig& config, uint8_t byte) {
    const GrammarNode& node = grammar_->nodes[config.node];
    switch (node.kind) {
        case Kind::bytes:
            if (uint8_t(grammar_->text[node.a + config.sub]) != byte) return;
            if (node.a + config.sub + 1 == node.b) return close(node.next, config.stack);
            return put({config.node, config.sub + 1, 0, config.stack});
        case Kind::terminal: return step_terminal(config, byte);
        case Kind::texts: return step_texts(config, byte);
        case Kind::key: return step_key(config, byte);
        default: return;
    }
}

void GrammarWalk::leave(const GrammarConfig& config) {
    const GrammarNode& node = grammar_->nodes[config.node];
    if (node.kind == Kind::texts) {
        if (grammar_->tries[node.a].trie.label[config.sub] >= 0) close(node.next, config.stack);
        return;
    }
    if (node.kind != Kind::terminal) return;
    if (may_leave(grammar_->terminals[node.a], config)) close(node.next, config.stack);
}

GrammarWalk::Set GrammarWalk::after(const GrammarConfig& config, int32_t label) {
    const GrammarNode& node = grammar_->nodes[config.node];
    set_begin_ = pool.size();
    if (node.kind == Kind::terminal) close(node.next, config.stack);
    else open_other(config, object_of(config), hash_in(cells[config.stack]), label);
    return expand({uint32_t(set_begin_), uint32_t(pool.size())});
}

GrammarWalk::Set GrammarWalk::start() {
    if (cells.empty()) cells.push_back({});
    set_begin_ = pool.size();
    close(grammar_->root, 0);
    return {uint32_t(set_begin_), uint32_t(pool.size())};
}

GrammarWalk::Set GrammarWalk::add(std::span<const GrammarConfig> configs) {
    const uint32_t begin = uint32_t(pool.size());
    pool.insert(pool.end(), configs.begin(), configs.end());
    return {begin, uint32_t(pool.size())};
}

GrammarWalk::Set GrammarWalk::expand(Set set) {
    set_begin_ = set.begin;
    for (uint32_t i = set.begin; i < pool.size(); ++i) {  // what is added may end, too
        const GrammarConfig config = pool[i];
        leave(config);
    }
    return {set.begin, uint32_t(pool.size())};
}

GrammarWalk::Set GrammarWalk::step(Set expanded, uint8_t byte) {
    set_begin_ = pool.size();
    for (uint32_t i = expanded.begin; i < expanded.end; ++i) {
        const GrammarConfig config = pool[i];
        step_one(config, byte);
    }
    return {uint32_t(set_begin_), uint32_t(pool.size())};
}

GrammarWalk::Set GrammarWalk::step_token(Set expanded, Token token) {
    set_begin_ = pool.size();
    for (uint32_t i = expanded.begin; i < expanded.end; ++i) {
        const GrammarConfig config = pool[i];
        const GrammarNode& node = grammar_->nodes[config.node];
        if (node.kind == Kind::token && node.a == uint32_t(token)) close(node.next, config.stack);
    }
    return {uint32_t(set_begin_), uint32_t(pool.size())};
}

bool GrammarWalk::may_end(Set expanded) const {
    for (uint32_t i = expanded.begin; i < expanded.end; ++i)
        if (grammar_->nodes[pool[i].node].kind == Kind::end) return true;
    return false;
}

void GrammarWalk::allowed(Set expanded, std::array<uint64_t, 4>& bytes) const {
    bytes = {};
    for (uint32_t i = expanded.begin; i < expanded.end; ++i) {
        const GrammarConfig& c = pool[i];
        const GrammarNode& node = grammar_->nodes[c.node];
        const TextTrie* trie = nullptr;
        const Dfa* dfa = nullptr;
        if (node.kind == Kind::bytes) allow(bytes, uint8_t(grammar_->text[node.a + c.sub]));
        else if (node.kind == Kind::texts) trie = &grammar_->tries[node.a].trie;
        else if (node.kind == Kind::terminal) dfa = grammar_->terminals[node.a].dfa.get();
        else if (node.kind == Kind::key && !c.count) trie = &grammar_->objects[node.a].keys;
        else if (node.kind == Kind::key)
            dfa = grammar_->objects[node.a].other.get(), allow(bytes, '"');
        if (trie)
            for (uint32_t n = trie->first[c.sub]; n < trie->first[c.sub + 1]; ++n)
                allow(bytes, trie->byte[n]);
        if (dfa)
            for (unsigned b = 0; b < 256; ++b)
                if (dfa->step(c.sub, uint8_t(b)) != Dfa::dead) allow(bytes, uint8_t(b));
    }
}

// ---- State ---------------------------------------------------------------------------------------

GrammarState::GrammarState(GrammarPtr grammar) : grammar_(std::move(grammar)) {
    GrammarWalk walk(*grammar_);
    const auto set = walk.start();
    take(walk, set);
}

// Keeps a set and, of the cells, those that it needs.
void GrammarState::take(GrammarWalk& walk, GrammarWalk::Set set) {
    configs_.assign(walk.pool.begin() + set.begin, walk.pool.begin() + set.end);
    std::vector<uint32_t>& place = walk.places;
    place.assign(walk.cells.size(), 0);
    for (const GrammarConfig& c : configs_)
        for (uint32_t s = c.stack; s && !place[s]; s = walk.cells[s].parent) place[s] = 1;
    cells_.assign(1, {});
    for (uint32_t s = 1; s < place.size(); ++s) {
        if (!place[s]) continue;
        place[s] = uint32_t(cells_.size());
        GrammarCell cell = walk.cells[s];
        cell.parent = place[cell.parent];  // a parent is always older
        cells_.push_back(cell);
    }
    for (GrammarConfig& c : configs_) c.stack = place[c.stack];
}

bool GrammarState::advance(std::string_view bytes, GrammarWalk& walk) {
    if (bytes.empty()) return true;
    walk.begin(*grammar_, cells_);
    auto set = walk.add(configs_);
    for (const char c : bytes) {
        set = walk.step(walk.expand(set), uint8_t(c));
        if (set.empty()) return false;
    }
    take(walk, set);
    return true;
}

bool GrammarState::accept_token(Token token, std::string_view piece, GrammarWalk& walk) {
    walk.begin(*grammar_, cells_);
    const auto begin = walk.expand(walk.add(configs_));
    const auto marked = walk.step_token(begin, token);
    if (marked.empty()) return !piece.empty() && advance(piece, walk);
    GrammarState by_number = *this;
    by_number.take(walk, marked);
    if (GrammarState by_bytes = *this; !piece.empty() && by_bytes.advance(piece, walk)) {
        // Both readings go on, side by side.
        const uint32_t shift = uint32_t(by_number.cells_.size()) - 1;
        for (size_t i = 1; i < by_bytes.cells_.size(); ++i) {
            GrammarCell cell = by_bytes.cells_[i];
            if (cell.parent) cell.parent += shift;
            by_number.cells_.push_back(cell);
        }
        for (GrammarConfig c : by_bytes.configs_) {
            if (c.stack) c.stack += shift;
            by_number.configs_.push_back(c);
        }
    }
    *this = std::move(by_number);
    return true;
}

bool GrammarState::may_end(GrammarWalk& walk) const {
    walk.begin(*grammar_, cells_);
    return walk.may_end(walk.expand(walk.add(configs_)));
}

void GrammarState::forced_bytes(std::string& out, size_t most, GrammarWalk& walk) const {
    out.clear();
    walk.begin(*grammar_, cells_);
    auto set = walk.add(configs_);
    while (out.size() < most) {
        set = walk.expand(set);
        int only = -1;
        for (uint32_t i = set.begin; i < set.end; ++i) {
            const auto kind = grammar_->nodes[walk.pool[i].node].kind;
            if (kind == GrammarNode::Kind::end || kind == GrammarNode::Kind::token) return;
        }
        std::array<uint64_t, 4> bytes;
        walk.allowed(set, bytes);
        GrammarWalk::Set next;
        for (unsigned b = 0; b < 256; ++b) {
            if (!(bytes[b >> 6] >> (b & 63) & 1)) continue;
            const auto mark = walk.mark();
            const auto tried = walk.step(set, uint8_t(b));
            if (tried.empty()) {
                walk.back_to(mark);
                continue;
            }
            if (only >= 0) return;
            only = int(b);
            next = tried;
        }
        if (only < 0) return;
        out += char(only);
        set = next;
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
