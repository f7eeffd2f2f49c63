// Deterministic automata over bytes: what terminals of a grammar are.
#pragma once

#include "base/internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint32_t unlimited = UINT32_MAX;

/// What one grammar may cost to compile, so that hostile ones end soon.
struct Budget {
    uint32_t states = 200'000;   ///< of all automata together
    uint64_t work = 1'500'000;   ///< transitions computed; 250 ms are never reached
    uint64_t bytes = 24u << 20;  ///< of tables
    bool take(uint64_t amount) {
        if (work < amount) return work = 0, false;
        work -= amount;
        return true;
    }
    bool spent() const { return work == 0; }
    /// At most so much of it, for what there is another way without; `give_back` what is left.
    Budget part(const Budget& most) {
        const Budget out = {std::min(states, most.states), std::min(work, most.work),
                            std::min(bytes, most.bytes)};
        states -= out.states, work -= out.work, bytes -= out.bytes;
        return out;
    }
    void give_back(const Budget& rest) {
        states += rest.states, work += rest.work, bytes += rest.bytes;
    }
};
Error budget_error();  ///< invalid_request, code invalid_json_schema

/// Bytes fall into classes so that what a whole subtree of a vocabulary holds fits 64 bits: a state
/// that all characters of these classes lead to one other takes any of them.
inline constexpr uint32_t class_multibyte = 62;   ///< a whole code point of two to four bytes
inline constexpr uint32_t class_broken = 63;      ///< a byte that is part of none
const std::array<uint8_t, 256>& token_classes();  ///< of ASCII; above it class_broken

/// Immutable after it was made. State 0 is the dead one, 1 the first; every other state leads to an
/// accepting one. Characters are counted where `boundary` says that one has ended.
struct Dfa {
    static constexpr uint32_t dead = 0, start = 1;
    std::array<uint8_t, 256> classes = {};
    uint32_t class_count = 1;
    std::vector<uint32_t> next;           // (states, class_count)
    std::vector<int32_t> label;           // -1: does not accept here
    std::vector<uint8_t> boundary;        // no character is unfinished here
    std::vector<uint32_t> shortest;       // characters to the nearest end
    std::vector<uint32_t> longest;        // to the farthest; unlimited
    std::vector<uint32_t> ahead;          // where most classes lead: to itself if one does
    std::vector<uint64_t> run;            // token classes of which every character leads there
    uint32_t farthest = 0;                // the most characters to a nearest end
    std::array<uint64_t, 4> beyond = {};  // bytes that may follow what is accepted already
    bool endless = true;                  // from every state there are texts of any length
    uint64_t hash = 0;                    // of the tables
    bool even = true;  // every number of characters between the two has an end, too
    size_t states() const { return label.size(); }
    size_t bytes() const {
        return sizeof *this + next.size() * sizeof next[0] +
               states() * (sizeof label[0] + sizeof boundary[0] + sizeof shortest[0] +
                           sizeof longest[0] + sizeof ahead[0] + sizeof run[0]);
    }
    bool loops(uint32_t state, uint64_t token_classes) const {
        return ahead[state] == state && !(token_classes & ~run[state]);
    }
    /// Whether the state takes any text of at most so many characters of these classes.
    bool takes(uint32_t state, uint64_t token_classes, uint32_t chars) const {
        for (; chars > 0 && !(token_classes & ~run[state]); --chars) {
            if (ahead[state] == state) return true;
            state = ahead[state];
        }
        return chars == 0;
    }
    bool empty() const { return states() <= start || shortest[start] == unlimited; }
    uint32_t step(uint32_t state, uint8_t byte) const {
        return next[size_t(state) * class_count + classes[byte]];
    }
    int32_t match(std::string_view text) const;  ///< the label at its end, or -1
    bool is_same(const Dfa& other) const;
};
using DfaPtr = std::shared_ptr<const Dfa>;

/// An automaton as rules: its states are lists of numbers, found as they are needed.
class Machine {
public:
    using Key = std::vector<uint32_t>;
    virtual ~Machine() = default;
    virtual Key first() = 0;
    virtual bool step(const Key& from, uint8_t byte, Key& to) = 0;  ///< false: dead
    virtual int32_t label(const Key& key) = 0;
    virtual bool boundary(const Key&) { return true; }
    std::array<uint8_t, 256> classes = {};  ///< bytes that are never told apart
    uint32_t class_count = 1;
};
/// Where byte ranges begin and end; gives classes.
class ByteClasses {
public:
    void add(uint8_t low, uint8_t high) {
        cut_[low] = true;
        cut_[high + 1u] = true;
    }
    void add(const Dfa& dfa) {
        for (unsigned b = 1; b < 256; ++b)
            if (dfa.classes[b] != dfa.classes[b - 1]) cut_[b] = true;
    }
    void set(Machine& machine) const;

private:
    std::array<bool, 257> cut_ = {};
};
Result<DfaPtr> make_dfa(Machine& machine, Budget& budget);

/// Both; `label` is that of the first.
Result<DfaPtr> intersect(const DfaPtr& a, const DfaPtr& b, Budget& budget);
/// What one of the two accepts.
Result<DfaPtr> unite(const DfaPtr& a, const DfaPtr& b, Budget& budget);
/// What the first accepts and the second does not.
Result<DfaPtr> subtract(const DfaPtr& a, const DfaPtr& b, Budget& budget);
/// The texts of `all`; the label has bit i set where `parts[i]` accepts.
Result<DfaPtr> label_by(const DfaPtr& all, std::span<const DfaPtr> parts, Budget& budget);
/// What has one of these labels.
Result<DfaPtr> keep_labels(const DfaPtr& a, const std::vector<bool>& kept, Budget& budget);
/// One of these texts.
Result<DfaPtr> texts_dfa(std::span<const std::string> texts, Budget& budget);
/// Lengths in characters become part of the automaton.
Result<DfaPtr> limit_length(const DfaPtr& a, uint32_t least, uint32_t most, Budget& budget);

}  // namespace detail
}  // namespace v1
}  // namespace valar
