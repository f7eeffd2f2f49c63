#pragma once

#include "digest_internal.hpp"
#include "engine/engine.hpp"
#include "grammar/grammar.hpp"
#include "model_internal.hpp"
#include "sampler_internal.hpp"
#include "template/internal.hpp"
#include "template/syntax.hpp"

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- A loaded model --------------------------------------------------------------------------

// A model file and what its keys and tensors say: all that memory_plan() needs.
struct ModelFile {
    Gguf gguf;
    ModelSpec spec;
    ModelTensors tensors;

    Result<void> open(const EngineOptions& options);
};

// What a model is but for its weights: file, tokenizer, template and names. Constant after open(),
// so engines and threads may share it.
class LoadedModel {
public:
    static Result<std::shared_ptr<const LoadedModel>> open(const EngineOptions& options);

    const ModelFile& file() const { return file_; }
    const ModelSpec& spec() const { return file_.spec; }
    const Tokenizer& tokenizer() const { return *tokenizer_; }
    const ChatTemplate& chat_template() const { return *chat_template_; }
    const Sampling& sampling() const { return sampling_; }  // where a request says nothing
    const ModelInfo& info() const { return info_; }
    bool is_called(const std::string& name) const;
    /// How it writes thoughts and calls.
    const std::shared_ptr<const AnswerSyntax>& answer_syntax() const { return answer_syntax_; }
    /// For its vocabulary; made when it is first asked for. Threads: only the one that steps uses it.
    std::shared_ptr<MaskMaker> masks() const;
    /// A hash of the weights' shapes and first rows, made when it is first asked for. Errors: the
    /// file cannot be read.
    Result<Hash256> fingerprint() const;

private:
    Result<void> read(const EngineOptions& options);
    Result<void> read_words(const EngineOptions& options);
    Result<void> read_tokenizer(std::string_view chat_template);
    Result<void> read_syntax(std::string_view tool_format);
    void name(const EngineOptions& options);

    ModelFile file_;
    std::optional<Tokenizer> tokenizer_;
    std::optional<ChatTemplate> chat_template_;
    std::shared_ptr<const AnswerSyntax> answer_syntax_;
    Sampling sampling_;
    ModelInfo info_;
    mutable std::mutex mutex_;  // guards what is made late
    mutable std::shared_ptr<MaskMaker> masks_;
    mutable std::optional<Hash256> fingerprint_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
