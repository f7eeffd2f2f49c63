// What is known of the families of chat templates.
#pragma once

#include <span>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// How the families spell the tokens that end a turn: files often name only one of them, or none.
inline std::span<const std::string_view> family_end_tokens() {
    static constexpr std::string_view spellings[] = {
        // clang-format off
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>",
        "<|end|>", "<|return|>", "<|call|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<turn|>",
        "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|end_of_role|>", "<end_of_utterance>",
        "<|user|>", "<|observation|>", "<EOT>", "</s>", "<eos>", "[EOS]",
        "<\xEF\xBD\x9C" "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"};
    // clang-format on
    return spellings;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
