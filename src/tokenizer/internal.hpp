// What a rendered prompt is: text with provenance.
#pragma once

#include "tokenizer/tokenizer.hpp"

#include <cstddef>
#include <string>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// A half-open range of bytes.
struct ByteRange {
    size_t begin = 0;
    size_t end = 0;
};

/// A rendered prompt with provenance: `from_request` (ascending, disjoint, not touching) lists the
/// bytes that came from a request; all others came from the chat template. Control tokens are
/// recognised only in bytes of the template: no user text can forge one.
struct MarkedText {
    std::string text;
    std::vector<ByteRange> from_request;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
