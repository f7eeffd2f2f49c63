// What is known of the families of chat templates.
#pragma once

#include <algorithm>
#include <cstddef>
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
        "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|tool_response>", "<|eot|>", "<|eom|>",
        "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|end_of_role|>",
        "<end_of_utterance>",
        "<|user|>", "<|observation|>", "<EOT>", "</s>", "<eos>", "[EOS]",
        "<\xEF\xBD\x9C" "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"};
    // clang-format on
    return spellings;
}

/// A template by its name. A model without one gets the first whose tokens its vocabulary has and
/// whose architecture is its own; those of "-" are there to be asked for.
struct KnownTemplate {
    std::string_view name;
    std::string_view architecture;  // empty: any
    std::string_view tokens;        // with a space between them
    std::string_view source;
};

inline std::span<const KnownTemplate> known_templates() {
    static constexpr KnownTemplate templates[] = {
        {"chatml", "", "<|im_start|> <|im_end|>",
         "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"},
        {"llama3", "", "<|start_header_id|> <|end_header_id|> <|eot_id|>",
         "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
         "\n\n{{ m.content|trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
         "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"},
        {"gemma", "", "<start_of_turn> <end_of_turn>",
         "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
         "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content|trim }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"},
        {"phi3", "phi3", "<|user|> <|assistant|> <|end|>",
         "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"},
        {"granite", "", "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
         "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
         "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}"
         "<|start_of_role|>assistant<|end_of_role|>{% endif %}"},
        {"command-r", "", "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|>",
         "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ '<|CHATBOT_TOKEN|>' if "
         "m.role == 'assistant' else '<|SYSTEM_TOKEN|>' if m.role == 'system' else "
         "'<|USER_TOKEN|>' }}{{ m.content|trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
         "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"},
        {"glm4", "", "[gMASK] <sop> <|user|> <|assistant|>",
         "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"},
        {"deepseek", "",
         "<\xEF\xBD\x9CUser\xEF\xBD\x9C> <\xEF\xBD\x9C"
         "Assistant\xEF\xBD\x9C>",
         "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' "
         "%}<\xEF\xBD\x9CUser\xEF\xBD\x9C>"
         "{{ m.content }}{% elif m.role == 'assistant' %}<\xEF\xBD\x9C"
         "Assistant\xEF\xBD\x9C>"
         "{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<\xEF\xBD\x9C"
         "Assistant\xEF\xBD\x9C>{% endif %}"},
        {"mistral", "", "[INST] [/INST]",
         "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
         "[/INST]{% elif m.role == 'assistant' %} {{ m.content|trim }}{{ eos_token }}{% else %}"
         "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
         "{% endfor %}"},
        {"phi2", "phi2", "",
         "{% for m in messages %}{% if m.role == 'user' %}Instruct: {{ m.content }}\n"
         "{% elif m.role == 'assistant' %}Output: {{ m.content }}\n{% else %}{{ m.content }}\n"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}Output:{% endif %}"},
        {"falcon", "falcon", "",
         "{% for m in messages %}{{ {'user': 'User: ', 'assistant': 'Falcon: '}[m.role] or '' }}"
         "{{ m.content|trim }}\n{% endfor %}{% if add_generation_prompt %}Falcon:{% endif %}"},
        {"llama2", "-", "",
         "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>\n"
         "{{ m.content|trim }}\n<</SYS>>\n\n{% elif m.role == 'user' %}{% if loop.previtem is "
         "undefined or loop.previtem.role != 'system' %}{{ bos_token }}[INST] {% endif %}"
         "{{ m.content|trim }} [/INST]{% else %} {{ m.content|trim }} {{ eos_token }}{% endif %}"
         "{% endfor %}"},
        {"zephyr", "-", "",
         "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"},
        {"vicuna", "-", "",
         "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content|trim "
         "}}\n"
         "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content|trim }}{{ eos_token }}\n{% else "
         "%}"
         "{{ m.content|trim }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:"
         "{% endif %}"},
        {"alpaca", "-", "",
         "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content|trim "
         "}}\n\n"
         "{% elif m.role == 'assistant' %}### Response:\n{{ m.content|trim }}{{ eos_token }}\n\n"
         "{% else %}{{ m.content|trim }}\n\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}### Response:\n{% endif %}"},
        {"plain", "-", "",
         "{% for m in messages %}{{ m.role|capitalize }}: {{ m.content|trim }}\n{% endfor %}"
         "{% if add_generation_prompt %}Assistant:{% endif %}"},
    };
    return templates;
}

inline const KnownTemplate* known_template(std::string_view name) {
    for (const KnownTemplate& known : known_templates())
        if (known.name == name) return &known;
    return nullptr;
}

/// For a model without a template, or null. `has(token)`: whether its vocabulary has this one.
template <class Has>
const KnownTemplate* fallback_template(std::string_view architecture, Has has) {
    const auto has_all = [&](std::string_view tokens) {
        while (!tokens.empty()) {
            const size_t end = std::min(tokens.find(' '), tokens.size());
            if (!has(tokens.substr(0, end))) return false;
            tokens.remove_prefix(std::min(end + 1, tokens.size()));
        }
        return true;
    };
    for (const KnownTemplate& known : known_templates())
        if ((known.architecture.empty() || known.architecture == architecture) &&
            has_all(known.tokens))
            return &known;
    return nullptr;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
