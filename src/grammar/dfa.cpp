// >>grammar
#include "prologue.hpp"

#include "grammar/dfa.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
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

Error budget_error() {
    return make_error(
        ErrorKind::invalid_request,
        "the grammar is too large: more than 200,000 states, or too much work to compile",
        "invalid_json_schema");
}

const std::array<uint8_t, 256>& token_classes() {
    static const std::array<uint8_t, 256> classes = [] {
        std::array<uint8_t, 256> out = {};
        uint8_t next = 8;  // 0 to 7: letters, digits, controls
        for (unsigned b = 0; b < 256; ++b) {
            const auto between = [&](char low, char high) {
                return b >= uint8_t(low) && b <= uint8_t(high);
            };
            if (b >= 0x80) out[b] = class_broken;
            else if (b == '\t' || b == '\n' || b == '\r') out[b] = next++;
            else if (b < 0x20 || b == 0x7F) out[b] = 0;
            else if (b == '0') out[b] = 1;
            else if (between('1', '9')) out[b] = 2;
            else if (between('A', 'F')) out[b] = 3;
            else if (between('G', 'Z')) out[b] = 4;
            else if (between('a', 'f')) out[b] = 5;
            else if (between('g', 'z')) out[b] = 6;
            else out[b] = next++;
        }
        return out;
    }();
    return classes;
}

int32_t Dfa::match(std::string_view text) const {
    uint32_t state = start;
    for (const char c : text) {
        if (state == dead || states() <= start) return -1;
        state = step(state, uint8_t(c));
    }
    return state == dead || states() <= start ? -1 : label[state];
}

bool Dfa::is_same(const Dfa& other) const {
    return hash == other.hash && classes == other.classes && next == other.next &&
           label == other.label && boundary == other.boundary;
}

void ByteClasses::set(Machine& machine) const {
    uint32_t id = 0;
    for (unsigned b = 0; b < 256; ++b) {
        if (b && cut_[b]) ++id;
        machine.classes[b] = uint8_t(id);
    }
    machine.class_count = id + 1;
}

namespace {

struct KeyHash {
    size_t operator()(const Machine::Key& key) const {
        uint64_t hash = 1469598103934665603u;
        for (const uint32_t v : key) hash = (hash ^ v) * 1099511628211u;
        return size_t(hash ^ hash >> 29);
    }
};

// Breadth first from the first state; then what cannot reach an end is cut off.
class DfaMaker {
public:
    DfaMaker(Machine& machine, Budget& budget) : machine_(machine), budget_(budget) {}
    Result<DfaPtr> make() {
        dfa_ = std::make_shared<Dfa>();
        dfa_->classes = machine_.classes;
        dfa_->class_count = machine_.class_count;
        for (unsigned b = 256; b-- > 0;) sample_[machine_.classes[b]] = uint8_t(b);
        dfa_->next.assign(dfa_->class_count, Dfa::dead);
        keys_.push_back(nullptr);
        if (!state_of(machine_.first())) return budget_error();
        Machine::Key to;
        for (uint32_t from = Dfa::start; from < keys_.size(); ++from)
            for (uint32_t c = 0; c < dfa_->class_count; ++c) {
                if (!budget_.take(1)) return budget_error();
                to.clear();
                uint32_t state = Dfa::dead;
                if (machine_.step(*keys_[from], sample_[c], to) && !(state = state_of(to)))
                    return budget_error();
                dfa_->next[size_t(from) * dfa_->class_count + c] = state;
            }
        finish();
        return DfaPtr(dfa_);
    }

private:
    uint32_t state_of(const Machine::Key& key) {
        const auto [at, is_new] = ids_.try_emplace(key, uint32_t(keys_.size()));
        if (is_new) {
            const uint64_t bytes = uint64_t(dfa_->class_count) * 4 + key.size() * 4 + 120;
            if (!budget_.states || budget_.bytes < bytes || !budget_.take(1 + key.size() / 4))
                return 0;
            --budget_.states;
            budget_.bytes -= bytes;
            keys_.push_back(&at->first);
            dfa_->next.resize(dfa_->next.size() + dfa_->class_count, Dfa::dead);
        }
        return at->second;
    }
    void finish() {
        const size_t count = keys_.size();
        dfa_->label.assign(count, -1);
        dfa_->boundary.assign(count, 1);
        for (size_t s = Dfa::start; s < count; ++s) {
            dfa_->boundary[s] = machine_.boundary(*keys_[s]);
            dfa_->label[s] = dfa_->boundary[s] ? machine_.label(*keys_[s]) : -1;
        }
        find_distances();
        drop_dead_ends();
        find_longest();
        find_runs();
        describe();
    }
    // States that lead to no end; the first one stays.
    void drop_dead_ends() {
        Dfa& dfa = *dfa_;
        std::vector<uint32_t> place(dfa.states(), Dfa::dead);
        uint32_t count = Dfa::start;
        for (uint32_t s = Dfa::start; s < dfa.states(); ++s)
            if (s == Dfa::start || dfa.shortest[s] != unlimited) place[s] = count++;
        for (uint32_t s = Dfa::start; s < dfa.states(); ++s) {
            if (place[s] == Dfa::dead) continue;
            for (uint32_t c = 0; c < dfa.class_count; ++c) {
                const uint32_t to = dfa.next[size_t(s) * dfa.class_count + c];
                dfa.next[size_t(place[s]) * dfa.class_count + c] = dfa.shortest[to] == unlimited
                                                                       ? Dfa::dead
                                                                       : place[to];
            }
        }
        const auto move = [&](auto& list) {
            for (uint32_t s = Dfa::start; s < place.size(); ++s)
                if (place[s] != Dfa::dead) list[place[s]] = list[s];
            list.resize(count);
        };
        move(dfa.label), move(dfa.boundary), move(dfa.shortest);
        dfa.next.resize(size_t(count) * dfa.class_count);
    }
    void describe() {
        Dfa& dfa = *dfa_;
        uint64_t hash = dfa.class_count;
        const auto mix = [&](uint64_t v) { hash = (hash ^ v) * 1099511628211u; };
        for (const uint8_t c : dfa.classes) mix(c);
        for (const uint32_t to : dfa.next) mix(to);
        for (const int32_t label : dfa.label) mix(uint32_t(label));
        dfa.hash = hash ^ hash >> 29;
        for (uint32_t s = Dfa::start; s < dfa.states(); ++s) {
            dfa.endless &= dfa.longest[s] == unlimited;
            if (dfa.shortest[s] != unlimited)
                dfa.farthest = std::max(dfa.farthest, dfa.shortest[s]);
            for (unsigned b = 0; dfa.label[s] >= 0 && b < 256; ++b)
                if (dfa.step(s, uint8_t(b)) != Dfa::dead)
                    dfa.beyond[b >> 6] |= uint64_t{1} << (b & 63);
        }
    }
    // Characters to the nearest end, backwards over the transitions: 0-1 breadth first.
    void find_distances() {
        const size_t count = keys_.size();
        std::vector<uint32_t> begin(count + 1), from(dfa_->next.size());
        for (const uint32_t to : dfa_->next) ++begin[to];
        uint32_t sum = 0;
        for (uint32_t& b : begin) sum += std::exchange(b, sum);
        std::vector<uint32_t> at(begin.begin(), begin.end());
        for (size_t i = 0; i < dfa_->next.size(); ++i)
            from[at[dfa_->next[i]]++] = uint32_t(i / dfa_->class_count);
        dfa_->shortest.assign(count, unlimited);
        std::vector<uint32_t> level, next_level;
        for (uint32_t s = Dfa::start; s < count; ++s)
            if (dfa_->label[s] >= 0) dfa_->shortest[s] = 0, level.push_back(s);
        for (uint32_t distance = 0; !level.empty(); ++distance, level.swap(next_level)) {
            next_level.clear();
            for (size_t i = 0; i < level.size(); ++i) {
                const uint32_t s = level[i];
                if (dfa_->shortest[s] != distance) continue;
                const uint32_t d = distance + (dfa_->boundary[s] ? 1 : 0);
                for (uint32_t e = begin[s]; e < begin[s + 1]; ++e) {
                    if (from[e] == Dfa::dead || dfa_->shortest[from[e]] <= d) continue;
                    dfa_->shortest[from[e]] = d;
                    (d == distance ? level : next_level).push_back(from[e]);
                }
            }
        }
    }
    // The farthest end, by depth first; a cycle makes it unlimited. `even`: no length between the
    // two is missing, which the sets of lengths of small automata tell.
    void find_longest() {
        const size_t count = dfa_->states();
        dfa_->longest.assign(count, 0);
        std::vector<uint32_t> degree(count), order;
        const uint32_t width = dfa_->class_count;
        std::vector<std::vector<uint32_t>> from(count);
        for (uint32_t s = Dfa::start; s < count; ++s)
            for (uint32_t c = 0; c < width; ++c) {
                const uint32_t to = dfa_->next[size_t(s) * width + c];
                if (to != Dfa::dead && (from[to].empty() || from[to].back() != s))
                    from[to].push_back(s), ++degree[s];
            }
        for (uint32_t s = Dfa::start; s < count; ++s)
            if (!degree[s]) order.push_back(s);
        for (size_t i = 0; i < order.size(); ++i)
            for (const uint32_t f : from[order[i]]) {
                dfa_->longest[f] = std::max(
                    dfa_->longest[f], dfa_->longest[order[i]] + (dfa_->boundary[order[i]] ? 1 : 0));
                if (!--degree[f]) order.push_back(f);
            }
        for (uint32_t s = Dfa::start; s < count; ++s)
            if (degree[s]) dfa_->longest[s] = unlimited;
        find_even();
    }
    // From every state to every length between: enough that each state has a successor one shorter
    // in both, or that an endless one loops by single characters.
    void find_even() {
        const uint32_t width = dfa_->class_count;
        for (uint32_t s = Dfa::start; s < dfa_->states() && dfa_->even; ++s) {
            if (dfa_->shortest[s] == unlimited) continue;
            if (dfa_->shortest[s] == dfa_->longest[s]) continue;
            // The lengths of the successors, each an interval, must leave no gap.
            std::vector<std::pair<uint64_t, uint64_t>> spans;
            if (dfa_->label[s] >= 0) spans.push_back({0, 0});
            for (uint32_t c = 0; c < width; ++c) {
                const uint32_t to = dfa_->next[size_t(s) * width + c];
                if (to == Dfa::dead) continue;
                const uint64_t one = dfa_->boundary[to] ? 1 : 0;
                const uint64_t last = dfa_->longest[to] == unlimited ? uint64_t(unlimited)
                                                                     : dfa_->longest[to] + one;
                spans.push_back({dfa_->shortest[to] + one, last});
            }
            std::sort(spans.begin(), spans.end());
            uint64_t reached = spans.empty() ? 0 : spans[0].second;
            for (const auto& [low, high] : spans) {
                if (low > reached + 1) dfa_->even = false;
                reached = std::max(reached, high);
            }
        }
    }
    void find_runs() {
        Dfa& dfa = *dfa_;
        dfa.ahead.assign(dfa.states(), Dfa::dead);
        dfa.run.assign(dfa.states(), 0);
        std::vector<uint8_t> parts[class_multibyte];  // of each token class, each once
        for (unsigned b = 0; b < 0x80; ++b) {
            auto& list = parts[token_classes()[b]];
            if (std::find(list.begin(), list.end(), dfa.classes[b]) == list.end())
                list.push_back(dfa.classes[b]);
        }
        for (uint32_t s = Dfa::start; s < dfa.states(); ++s)
            if (dfa.boundary[s]) find_run(s, parts);
    }
    // Where all bytes of each token class lead, and of these places the one of most classes.
    void find_run(uint32_t s, std::span<const std::vector<uint8_t>> parts) {
        Dfa& dfa = *dfa_;
        std::array<uint32_t, class_multibyte> to = {};
        std::vector<std::pair<uint32_t, uint32_t>>& counts = targets_;
        counts.clear();
        const uint32_t* const row = &dfa.next[size_t(s) * dfa.class_count];
        for (size_t c = 0; c < parts.size(); ++c) {
            if (parts[c].empty()) continue;
            to[c] = row[parts[c][0]];
            for (const uint8_t part : parts[c])
                if (row[part] != to[c]) to[c] = Dfa::dead;
            if (to[c] == Dfa::dead || !dfa.boundary[to[c]]) continue;
            auto at = std::find_if(counts.begin(), counts.end(),
                                   [&](const auto& one) { return one.first == to[c]; });
            if (at == counts.end()) at = counts.insert(at, {to[c], 0});
            at->second += to[c] == s ? class_multibyte : 1;
        }
        if (counts.empty()) return;
        const auto most = std::max_element(
            counts.begin(), counts.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
        dfa.ahead[s] = most->first;
        for (size_t c = 0; c < parts.size(); ++c)
            if (!parts[c].empty() && to[c] == dfa.ahead[s]) dfa.run[s] |= uint64_t{1} << c;
        if (all_multibyte(s, dfa.ahead[s])) dfa.run[s] |= uint64_t{1} << class_multibyte;
    }
    // All well-formed code points lead there. Bytes of one class need one try.
    bool all_multibyte(uint32_t s, uint32_t there) const {
        const auto all = [&](uint32_t from, unsigned low, unsigned high, const auto& then) {
            uint32_t last = UINT32_MAX;
            for (unsigned b = low; b <= high; ++b) {
                if (dfa_->classes[b] == last) continue;
                last = dfa_->classes[b];
                const uint32_t to = dfa_->step(from, uint8_t(b));
                if (to == Dfa::dead || !then(to)) return false;
            }
            return true;
        };
        const auto back = [&](uint32_t to) { return to == there; };
        const auto one = [&](uint32_t from) { return all(from, 0x80, 0xBF, back); };
        const auto two = [&](uint32_t from) { return all(from, 0x80, 0xBF, one); };
        return all(s, 0xC2, 0xDF, one) &&
               all(s, 0xE0, 0xE0, [&](uint32_t t) { return all(t, 0xA0, 0xBF, one); }) &&
               all(s, 0xE1, 0xEC, two) &&
               all(s, 0xED, 0xED, [&](uint32_t t) { return all(t, 0x80, 0x9F, one); }) &&
               all(s, 0xEE, 0xEF, two) &&
               all(s, 0xF0, 0xF0, [&](uint32_t t) { return all(t, 0x90, 0xBF, two); }) &&
               all(s, 0xF1, 0xF3, [&](uint32_t t) { return all(t, 0x80, 0xBF, two); }) &&
               all(s, 0xF4, 0xF4, [&](uint32_t t) { return all(t, 0x80, 0x8F, two); });
    }

    Machine& machine_;
    Budget& budget_;
    std::shared_ptr<Dfa> dfa_;
    std::array<uint8_t, 256> sample_ = {};
    std::unordered_map<Machine::Key, uint32_t, KeyHash> ids_;
    std::vector<const Machine::Key*> keys_;
    std::vector<std::pair<uint32_t, uint32_t>> targets_;
};

// Several automata side by side: the first must live, the others may die.
class Product : public Machine {
public:
    Product(const DfaPtr& first, std::span<const DfaPtr> others) {
        parts_.push_back(first);
        parts_.insert(parts_.end(), others.begin(), others.end());
        ByteClasses cuts;
        for (const DfaPtr& part : parts_) cuts.add(*part);
        cuts.set(*this);
    }
    Key first() override {
        Key key;
        for (const DfaPtr& part : parts_)
            key.push_back(part->states() > Dfa::start ? Dfa::start : Dfa::dead);
        return key;
    }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        for (size_t i = 0; i < parts_.size(); ++i)
            to.push_back(from[i] == Dfa::dead ? Dfa::dead : parts_[i]->step(from[i], byte));
        return to[0] != Dfa::dead;
    }
    bool boundary(const Key& key) override {
        return key[0] == Dfa::dead || parts_[0]->boundary[key[0]];
    }
    bool accepts(const Key& key, size_t i) const {
        return key[i] != Dfa::dead && parts_[i]->label[key[i]] >= 0;
    }

protected:
    std::vector<DfaPtr> parts_;
};

class Intersection : public Product {
public:
    using Product::Product;
    bool step(const Key& from, uint8_t byte, Key& to) override {
        return Product::step(from, byte, to) && to[1] != Dfa::dead;
    }
    int32_t label(const Key& key) override {
        return accepts(key, 0) && accepts(key, 1) ? parts_[0]->label[key[0]] : -1;
    }
};
class Union : public Product {
public:
    using Product::Product;
    bool step(const Key& from, uint8_t byte, Key& to) override {
        return Product::step(from, byte, to) || to[1] != Dfa::dead;
    }
    int32_t label(const Key& key) override { return accepts(key, 0) || accepts(key, 1) ? 0 : -1; }
    bool boundary(const Key& key) override {
        const size_t alive = key[0] == Dfa::dead;
        return parts_[alive]->boundary[key[alive]];
    }
};
class Difference : public Product {
public:
    using Product::Product;
    int32_t label(const Key& key) override {
        return accepts(key, 0) && !accepts(key, 1) ? parts_[0]->label[key[0]] : -1;
    }
};
class Kept : public Product {
public:
    Kept(const DfaPtr& dfa, const std::vector<bool>& kept) : Product(dfa, {}), kept_(kept) {}
    int32_t label(const Key& key) override {
        const int32_t label = parts_[0]->label[key[0]];
        return label >= 0 && kept_[size_t(label)] ? label : -1;
    }

private:
    const std::vector<bool>& kept_;
};
class Labelled : public Product {
public:
    using Product::Product;
    int32_t label(const Key& key) override {
        if (!accepts(key, 0)) return -1;
        int32_t bits = 0;
        for (size_t i = 1; i < parts_.size(); ++i) bits |= accepts(key, i) ? 1 << (i - 1) : 0;
        return bits;
    }
};

// One of some texts, sorted: the key is the stretch of them that begins as the input did, and how
// much was read.
class Texts : public Machine {
public:
    explicit Texts(std::span<const std::string> texts) : texts_(texts.begin(), texts.end()) {
        std::sort(texts_.begin(), texts_.end());
        ByteClasses cuts;
        for (const std::string& text : texts_)
            for (const char c : text) cuts.add(uint8_t(c), uint8_t(c));
        cuts.set(*this);
    }
    Key first() override { return {0, uint32_t(texts_.size()), 0}; }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        uint32_t low = from[0], high = from[1];
        const auto fits = [&](uint32_t i) {
            return texts_[i].size() > from[2] && uint8_t(texts_[i][from[2]]) == byte;
        };
        while (low < high && !fits(low)) ++low;
        uint32_t end = low;
        while (end < high && fits(end)) ++end;
        to = {low, end, from[2] + 1};
        return low < end;
    }
    int32_t label(const Key& key) override {
        return key[0] < key[1] && texts_[key[0]].size() == key[2] ? 0 : -1;
    }

private:
    std::vector<std::string> texts_;
};

class Counted : public Product {
public:
    Counted(const DfaPtr& dfa, uint32_t least, uint32_t most)
        : Product(dfa, {}), least_(least), most_(most) {}
    Key first() override { return {Dfa::start, 0}; }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        const uint32_t state = parts_[0]->step(from[0], byte);
        if (state == Dfa::dead) return false;
        uint32_t count = from[1] + parts_[0]->boundary[state];
        if (most_ == unlimited) count = std::min(count, least_);
        to = {state, count};
        return count <= most_;
    }
    int32_t label(const Key& key) override {
        return key[1] >= least_ ? parts_[0]->label[key[0]] : -1;
    }

private:
    uint32_t least_, most_;
};

}  // namespace

Result<DfaPtr> make_dfa(Machine& machine, Budget& budget) {
    return DfaMaker(machine, budget).make();
}
Result<DfaPtr> intersect(const DfaPtr& a, const DfaPtr& b, Budget& budget) {
    if (a->empty() || b->empty()) return a->empty() ? a : b;
    Intersection machine(a, {&b, 1});
    return make_dfa(machine, budget);
}
Result<DfaPtr> unite(const DfaPtr& a, const DfaPtr& b, Budget& budget) {
    if (a->empty() || b->empty()) return a->empty() ? b : a;
    Union machine(a, {&b, 1});
    return make_dfa(machine, budget);
}
Result<DfaPtr> subtract(const DfaPtr& a, const DfaPtr& b, Budget& budget) {
    if (a->empty() || b->empty()) return a;
    Difference machine(a, {&b, 1});
    return make_dfa(machine, budget);
}
Result<DfaPtr> label_by(const DfaPtr& all, std::span<const DfaPtr> parts, Budget& budget) {
    if (all->empty()) return all;
    Labelled machine(all, parts);
    return make_dfa(machine, budget);
}
Result<DfaPtr> keep_labels(const DfaPtr& a, const std::vector<bool>& kept, Budget& budget) {
    if (std::all_of(a->label.begin(), a->label.end(),
                    [&](int32_t label) { return label < 0 || kept[size_t(label)]; }))
        return a;
    Kept machine(a, kept);
    return make_dfa(machine, budget);
}
Result<DfaPtr> texts_dfa(std::span<const std::string> texts, Budget& budget) {
    Texts machine(texts);
    return make_dfa(machine, budget);
}
Result<DfaPtr> limit_length(const DfaPtr& a, uint32_t least, uint32_t most, Budget& budget) {
    if (a->empty()) return a;
    Counted machine(a, least, most);
    return make_dfa(machine, budget);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
