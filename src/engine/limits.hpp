#pragma once

#include <cstddef>
#include <cstdint>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint32_t kPageKinds = 2;  // a model has pages of one or two
inline constexpr uint32_t kMaxRunning = 1024;
inline constexpr uint32_t kMaxStepTokens = 32768;
inline constexpr uint32_t kMaxDraft = 15;   // with the row before them a tile of columns
inline constexpr uint32_t kFirstDraft = 5;  // six columns are cheap to multiply
inline constexpr uint32_t kLeastDraft = 2;
inline constexpr uint32_t kMinMatch = 3;          // tokens that must have stood together before
inline constexpr uint32_t kMaxMatch = 8;          // that make a better match no longer
inline constexpr uint32_t kMaxForcedBytes = 128;  // looked ahead in a grammar
inline constexpr uint32_t kLeastForcedBytes = 2;
inline constexpr uint32_t kMostHalves = 3;         // tokens a character that is begun may yet need
inline constexpr uint32_t kDraftCredit = 64;       // a row wasted for so many that are not
inline constexpr uint32_t kMinPromptRows = 16;     // of a batch, however small the budget
inline constexpr uint64_t kMixedNs = 100'000'000;  // of a batch with prompts beside answers
inline constexpr uint64_t kLookNs = 10'000'000;    // between two looks at cancels
inline constexpr uint64_t kIdleNs = 1'000'000'000;
inline constexpr uint64_t kNoLimit = UINT64_MAX;

}  // namespace detail
}  // namespace v1
}  // namespace valar
