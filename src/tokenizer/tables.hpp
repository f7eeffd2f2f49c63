// The tables of a vocabulary: pieces by their bytes, merges by their halves, spellings of special tokens.
#pragma once

#include "base/internal.hpp"
#include "tokenizer/tokenizer.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr Token no_token = -1;
inline constexpr uint32_t no_rank = UINT32_MAX;

inline uint64_t hash_piece(std::string_view piece) {
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
        each(text, at, [&](const Entry& entry, size_t length) {
            if (match.length != length && (!entry.template_only || at + length <= template_end))
                match = {entry.token, length};
        });
        return match;
    }
    // Calls visit(entry, length) for every spelling at text[at], from short to long.
    template <class Visit>
    void each(std::string_view text, size_t at, const Visit& visit) const {
        auto low = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at])]);
        auto high = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at]) + 1u]);
        for (size_t length = 1; low != high; ++length) {
            for (; low != high && low->spelling.size() == length; ++low) visit(*low, length);
            if (at + length >= text.size()) break;
            const uint8_t next = uint8_t(text[at + length]);
            low = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) < next;
            });
            high = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) == next;
            });
        }
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

}  // namespace detail
}  // namespace v1
}  // namespace valar
