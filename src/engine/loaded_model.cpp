// >>engine
// In this order: a loaded model; the sizes that follow from it; from a request to tokens; guesses;
// pages and the prefix cache; the desk, where requests arrive; answers; the scheduler: admission,
// the batch, its results; the handles; conversations.
#include "prologue.hpp"

#include "api_internal.hpp"
#include "backend/internal.hpp"
#include "base/text.hpp"
#include "engine/loaded_model.hpp"
#include "engine/plan.hpp"
#include "template/families.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// The file's own recommendation, as far as it is there.
Result<Sampling> read_sampling(const Gguf& gguf) {
    Sampling out;
    const struct {
        const char* key;
        double* value;
        double high;
    } keys[] = {
        {"general.sampling.temp", &out.temperature, 2},
        {"general.sampling.top_p", &out.top_p, 1},
        {"general.sampling.min_p", &out.min_p, 1},
    };
    for (const auto& [key, value, high] : keys) {
        auto found = gguf.get_float(key, *value);
        if (!found) return found.error();
        if (!(*found >= 0 && *found <= high))
            return make_error(
                ErrorKind::bad_data,
                gguf.name() + format(": key '%s' is %g, not in 0..%g", key, *found, high));
        *value = *found;
    }
    auto top_k = gguf.get_uint("general.sampling.top_k", 0);
    if (!top_k) return top_k.error();
    out.top_k = static_cast<uint32_t>(std::min<uint64_t>(*top_k, UINT32_MAX));
    return out;
}

// A name of several words as a word that stands in a URL or a shell: "My Model 8k" is my-model-8k.
std::string one_word(const std::string& name) {
    std::string word;
    for (const char c : name)
        if (c != ' ' && !(c >= '\t' && c <= '\r')) word += c;
        else if (!word.empty() && word.back() != '-') word += '-';
    while (word.ends_with('-')) word.pop_back();
    return word == name ? name : ascii_lower(word);
}

std::string choose_model_id(const EngineOptions& options, const ModelSpec& spec) {
    if (!options.model_id.empty()) return utf8_repair(options.model_id);
    if (std::string name = one_word(spec.name); !name.empty() && utf8_valid(name)) return name;
    std::string name = options.model_path.substr(options.model_path.find_last_of("/\\") + 1);
    if (name.ends_with(".gguf")) name.resize(name.size() - 5);
    name = one_word(name);
    return name.empty() ? "model" : utf8_repair(name);
}

Result<Gguf> open_model_file(const EngineOptions& options) {
    if (!options.model_bytes.empty()) return Gguf::from_bytes(options.model_bytes);
    if (options.model_reader.read) return Gguf::from_reader(options.model_reader);
    if (options.model_path.empty())
        return make_error(ErrorKind::invalid_request, "model_path: missing", {}, "model_path");
    return Gguf::open(options.model_path);
}

}  // namespace

Result<void> ModelFile::open(const EngineOptions& options) {
    auto opened = open_model_file(options);
    if (!opened) return opened.error();
    gguf = std::move(*opened);
    auto read = read_model_spec(gguf);
    if (!read) return read.error();
    spec = std::move(*read);
    auto bound = bind_model_tensors(gguf, spec);
    if (!bound) return bound.error();
    tensors = std::move(*bound);
    return {};
}

Result<std::shared_ptr<const LoadedModel>> LoadedModel::open(const EngineOptions& options) {
    auto model = std::make_shared<LoadedModel>();
    if (auto read = model->read(options); !read) return read.error();
    return std::shared_ptr<const LoadedModel>(std::move(model));
}

Result<void> LoadedModel::read(const EngineOptions& options) {
    if (auto opened = file_.open(options); !opened) return opened;
    if (auto words = read_words(options); !words) return words;
    auto defaults = read_sampling(file_.gguf);
    if (!defaults) return defaults.error();
    sampling_ = *defaults;
    name(options);
    return {};
}

namespace {

std::string template_names() {
    std::string names;
    for (const KnownTemplate& known : known_templates())
        names += (names.empty() ? " " : ", ") + std::string(known.name);
    return names;
}

}  // namespace

Result<void> LoadedModel::read_tokenizer(std::string_view chat_template) {
    auto words = Tokenizer::open(file_.gguf, chat_template, family_end_tokens());
    if (!words) return words.error();
    tokenizer_ = std::move(*words);
    return {};
}

Result<void> LoadedModel::read_words(const EngineOptions& options) {
    auto source = file_.gguf.get_string("tokenizer.chat_template", "");
    if (!source) return source.error();
    std::string text = options.chat_template.empty() ? std::string(*source) : options.chat_template;
    if (const KnownTemplate* known = known_template(text)) text = known->source;
    else if (!options.chat_template.empty() && text.find('{') == text.npos)
        return make_error(
            ErrorKind::invalid_request,
            "chat_template: '" + printable(text, 40) +
                "' is neither a template nor the name of a known one:" + template_names(),
            {}, "chat_template");
    if (auto words = read_tokenizer(text); !words) return words;
    if (text.empty()) {
        const KnownTemplate* known = fallback_template(
            spec().architecture, [&](std::string_view token) { return !!tokenizer_->find(token); });
        if (!known)
            return make_error(ErrorKind::unsupported,
                              "the model has no chat template (tokenizer.chat_template), and no "
                              "tokens of a known one; chat_template may be one of" +
                                  template_names());
        text = known->source;
        if (auto words = read_tokenizer(text); !words) return words;  // its words end turns
    }
    auto parsed = ChatTemplate::open(std::move(text));
    if (!parsed) return parsed.error();
    chat_template_ = std::move(*parsed);
    return read_syntax(options.tool_format);
}

Result<void> LoadedModel::read_syntax(std::string_view tool_format) {
    auto syntax = find_answer_syntax(*chat_template_, SpecialTokens(*tokenizer_), tool_format);
    if (!syntax) return syntax.error();
    answer_syntax_ = std::make_shared<const AnswerSyntax>(std::move(*syntax));
    return {};
}

void LoadedModel::name(const EngineOptions& options) {
    info_.id = choose_model_id(options, spec());
    info_.aliases = options.aliases;
    info_.created = unix_time_ms() / 1000;
    info_.context_tokens = choose_context(options, file_);
    info_.windows = options.windows;
    info_.tools = chat_template_->shape().tools;
    info_.thinking = answer_syntax_->has_thought();
}

bool LoadedModel::is_called(const std::string& name) const {
    const auto& aliases = info_.aliases;
    return name == info_.id || std::find(aliases.begin(), aliases.end(), name) != aliases.end();
}

std::shared_ptr<MaskMaker> LoadedModel::masks() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!masks_) masks_ = std::make_shared<MaskMaker>(TokenTrie::build(*tokenizer_));
    return masks_;
}

Result<Hash256> LoadedModel::fingerprint() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!fingerprint_) {
        auto hash = model_fingerprint(file_.gguf);
        if (!hash) return hash.error();
        fingerprint_ = *hash;
    }
    return *fingerprint_;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
