// inspect: says what a model file is, whether it runs here or not.
//
//     inspect model.gguf
//     inspect model.gguf --json
//     inspect model.gguf --tokenize "Hello, world"
//     inspect model.gguf --render request.json
//
// A report is made as JSON, part by part; what cannot be made (an architecture that is not known,
// a tensor that does not fit) becomes a note, and the rest is there all the same. The table is made
// from that JSON. --render shows the prompt that a request of POST /v1/responses becomes, piece by
// piece, and of each piece whether the chat template wrote it or the request: control tokens are
// recognised in the template's pieces only.
#ifdef VALAR_LINKED  // where a library brings the implementation: its parts have what programs lack
#include "api_internal.hpp"
#include "engine/engine.hpp"
#include "server/server.hpp"
#include "template/families.hpp"
#include "template/internal.hpp"
#else
#define VALAR_IMPLEMENTATION
#include "valar.hpp"
#endif

#include "common.hpp"

#include <ctime>
#include <map>

namespace {

using valar::Gguf;
using valar::GgufKey;
using valar::GgufType;
using valar::Json;
using valar::Result;
using valar::TensorInfo;
using valar::detail::MarkedText;

constexpr size_t kMostKeys = 2000;     // of those that a hostile file may have
constexpr size_t kMostSpecial = 8192;  // tokens
constexpr size_t kMostNumbers = 64;    // of an array that is shown whole

// ---- The spec: the only functions that know its fields ---------------------------------------

Json describe_spec(const valar::ModelSpec& spec) {
    return Json::object()
        .set("vocabulary", spec.n_vocab)
        .set("width", spec.n_embd)
        .set("layers", spec.layers.size())
        .set("context", spec.n_context)
        .set("norm_eps", spec.norm_eps)
        .set("embedding_scale", spec.embedding_scale)
        .set("logit_scale", spec.logit_scale)
        .set("rope_factors", spec.rope_factors.size())
        .set("other_rope_factors_after",
             spec.rope_long_factors.empty() ? Json() : Json(spec.n_rope_context))
        .set("tied_output", spec.tied_output);
}

/// What a layer does beyond LLaMA's, in words: layers that differ in it are not folded into one row.
std::string options_of(const valar::LayerSpec& layer) {
    static constexpr const char* activations[] = {"silu",         "gelu",         "gelu_tanh",
                                                  "relu_squared", "silu_clamped", "xielu"};
    static constexpr const char* qk_norms[] = {"", "head", "row", "own"};
    const valar::ExpertSpec& experts = layer.experts;
    std::string out;
    const auto add = [&](bool there, const std::string& words) {
        if (there) out += (out.empty() ? "" : ", ") + words;
    };
    const auto number = [](float value) {
        char text[32];
        std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
        return std::string(text);
    };
    add(experts.count != 0, std::to_string(experts.used) + " of " + std::to_string(experts.count) +
                                " experts of " + std::to_string(experts.n_ff));
    add(layer.activation != valar::Activation::silu || !layer.gated,
        std::string(activations[static_cast<size_t>(layer.activation)]) +
            (layer.gated ? "" : " without a gate"));
    add(layer.qk_norm != valar::QkNorm::none, std::string("q/k norm ") +
                                                  qk_norms[static_cast<size_t>(layer.qk_norm)] +
                                                  (layer.qk_norm_after_rope ? " after rope" : ""));
    add(!layer.attn_norm, "no norm before attention");
    add(!layer.ffn_norm && !layer.parallel, "no norm before feed-forward");
    add(layer.post_attn_norm, "norm after attention");
    add(layer.post_ffn_norm, "norm after feed-forward");
    add(layer.parallel, "parallel");
    add(layer.output_bias, "output bias");
    add(layer.ffn_bias, "feed-forward bias");
    add(layer.sinks, "sinks");
    add(layer.soft_cap != 0, "soft cap " + number(layer.soft_cap));
    add(layer.temperature != 0, "temperature " + number(layer.temperature));
    add(layer.rope.yarn, "YaRN");
    add(layer.rope.magnitude != 1, "rope magnitude " + number(layer.rope.magnitude));
    return out;
}

Json describe_layer(const valar::LayerSpec& layer) {
    return Json::object()
        .set("heads", layer.n_heads)
        .set("kv_heads", layer.n_kv_heads)
        .set("head_dim", layer.head_dim)
        .set("ff", layer.n_ff)
        .set("window", layer.window)
        .set("qkv_bias", layer.qkv_bias)
        .set("attention_scale", layer.attention_scale)
        .set("rope", layer.rope.kind == valar::RopeKind::neox ? "neox" : "norm")
        .set("rope_dims", layer.rope.dims)
        .set("rope_base", layer.rope.base)
        .set("rope_scale", layer.rope.scale)
        .set("options", options_of(layer));
}

// ---- Equal things of many layers in one row --------------------------------------------------

/// "0-4, 6-10"; files have their tensors in any order.
std::string ranges_of(std::vector<uint64_t> numbers) {
    std::sort(numbers.begin(), numbers.end());
    std::string out;
    for (size_t i = 0, end = 0; i < numbers.size(); i = end) {
        for (end = i + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
        out += (out.empty() ? "" : ", ") + std::to_string(numbers[i]);
        if (end - i > 1) out += "-" + std::to_string(numbers[end - 1]);
    }
    return out;
}

/// Rows as they come; of those that are equal there is one.
class Folded {
public:
    void add(const Json& row, uint64_t number) {
        const std::string text = row.write();
        const auto [at, is_new] = places_.emplace(text, rows_.size());
        if (is_new) rows_.push_back({row, {}});
        rows_[at->second].numbers.push_back(number);
    }
    Json rows(const char* numbers_name) const {
        Json out = Json::array();
        for (const Row& row : rows_) {
            Json made = Json::object().set(numbers_name, ranges_of(row.numbers));
            made.set("count", row.numbers.size());
            for (const valar::JsonMember& member : row.row.members())
                made.set(member.key, member.value);
            out.push(std::move(made));
        }
        return out;
    }

private:
    struct Row {
        Json row;
        std::vector<uint64_t> numbers;
    };
    std::map<std::string, size_t> places_;
    std::vector<Row> rows_;
};

// ---- Metadata and tensors --------------------------------------------------------------------

/// Empty where there is none, or something that is no text.
std::string_view text_of(const Gguf& gguf, std::string_view key) {
    const auto text = gguf.get_string(key, "");
    return text ? *text : std::string_view();
}

Json number_of(const GgufKey& key, size_t i) {
    const std::byte* data = key.data.data();
    if (key.type == GgufType::f32 || key.type == GgufType::f64)
        return valar::GgufNumbers<double>(data, key.count, key.type)[i];
    if (key.type == GgufType::u64)
        return valar::GgufNumbers<uint64_t>(data, key.count, key.type)[i];
    const int64_t number = valar::GgufNumbers<int64_t>(data, key.count, key.type)[i];
    return key.type == GgufType::boolean ? Json(number != 0) : Json(number);
}

Json value_of(const Gguf& gguf, const GgufKey& key) {
    if (!key.is_array && key.type == GgufType::string) return Json(text_of(gguf, key.name));
    if (!key.is_array) return number_of(key, 0);
    const bool numbers = key.type != GgufType::string;
    if (!numbers || key.count > kMostNumbers)
        return Json(std::to_string(key.count) + (numbers ? " numbers" : " strings"));
    Json out = Json::array();
    for (size_t i = 0; i < key.count; ++i) out.push(number_of(key, i));
    return out;
}

Json describe_keys(const Gguf& gguf) {
    Json out = Json::object();
    for (const GgufKey& key : gguf.keys())
        if (out.size() < kMostKeys && key.name != "tokenizer.chat_template")
            out.set(key.name, value_of(gguf, key));
    return out;
}

uint64_t values_of(const TensorInfo& tensor) {
    return tensor.dims[0] * tensor.dims[1] * tensor.dims[2] * tensor.dims[3];
}

const char* type_name(const TensorInfo& tensor) { return valar::type_info(tensor.type)->name; }

Json describe_types(const Gguf& gguf) {
    struct Sum {
        uint64_t tensors = 0, values = 0, bytes = 0;
    };
    std::map<std::string, Sum> sums;
    for (const TensorInfo& tensor : gguf.tensors()) {
        Sum& sum = sums[type_name(tensor) + std::string(tensor.packed ? " packed" : "")];
        sum.tensors += 1;
        sum.values += values_of(tensor);
        sum.bytes += tensor.bytes;
    }
    Json out = Json::array();
    for (const auto& [name, sum] : sums)
        out.push(
            Json::object()
                .set("type", name)
                .set("tensors", sum.tensors)
                .set("values", sum.values)
                .set("bytes", sum.bytes)
                .set("bits_per_value", 8.0 * static_cast<double>(sum.bytes) /
                                           static_cast<double>(std::max<uint64_t>(sum.values, 1))));
    return out;
}

/// The number in "blk.7.attn_q.weight"; the name then has a star there.
std::optional<uint64_t> take_layer(std::string& name) {
    if (!name.starts_with("blk.")) return std::nullopt;
    const size_t end = name.find('.', 4);
    int64_t layer = 0;
    if (end == name.npos || !example::read_value(name.substr(4, end - 4), &layer) || layer < 0)
        return std::nullopt;
    name.replace(4, end - 4, "*");
    return static_cast<uint64_t>(layer);
}

Json describe_tensors(const Gguf& gguf) {
    Folded layers, others;
    for (const TensorInfo& tensor : gguf.tensors()) {
        std::string name(tensor.name);
        const std::optional<uint64_t> layer = take_layer(name);
        std::string shape = std::to_string(tensor.dims[0]);
        for (uint32_t i = 1; i < tensor.n_dims; ++i)
            shape += " x " + std::to_string(tensor.dims[i]);
        const Json row = Json::object()
                             .set("name", name)
                             .set("type", type_name(tensor))
                             .set("packed", tensor.packed)
                             .set("shape", shape)
                             .set("bytes_each", tensor.bytes);
        layer ? layers.add(row, *layer) : others.add(row, 0);
    }
    Json out = others.rows("layers");
    for (Json& row : out.items()) row.set("layers", "");
    const Json of_layers = layers.rows("layers");
    for (const Json& row : of_layers.items()) out.push(row);
    return out;
}

// ---- Words -----------------------------------------------------------------------------------

constexpr const char* kKindNames[] = {"?",      "normal", "unknown", "control", "user_defined",
                                      "unused", "byte"};

const char* kind_name(int64_t kind) {
    return kind >= 1 && kind < static_cast<int64_t>(std::size(kKindNames)) ? kKindNames[kind] : "?";
}

struct Words {
    std::optional<valar::Tokenizer> tokenizer;
    std::optional<valar::detail::ChatTemplate> chat_template;
};

/// As the engine opens them; what cannot be opened becomes a note.
Words open_words(const Gguf& gguf, const std::string& own_template, Json& notes) {
    Words out;
    std::string source = own_template.empty()
                             ? std::string(text_of(gguf, "tokenizer.chat_template"))
                             : own_template;
    const auto read_tokenizer = [&] {
        auto read = valar::Tokenizer::open(gguf, source, valar::detail::family_end_tokens());
        if (read) out.tokenizer = *read;
        else notes.push(read.error().message);
    };
    const auto* known = valar::detail::known_template(source);
    if (known) source = known->source;
    read_tokenizer();
    if (source.empty() && out.tokenizer) {
        known = valar::detail::fallback_template(
            text_of(gguf, "general.architecture"),
            [&](std::string_view token) { return out.tokenizer->find(token).has_value(); });
        if (!known) notes.push("the model has no chat template, and no tokens of a known one");
        else source = known->source;
        if (known) read_tokenizer();
    }
    if (source.empty()) return out;
    auto parsed = valar::detail::ChatTemplate::open(source);
    if (parsed) out.chat_template = *parsed;
    else notes.push(parsed.error().message);
    return out;
}

/// What the keys tokenizer.ggml.X_token_id call a token: "bos", "eos" ...
std::map<uint64_t, std::string> token_roles(const Gguf& gguf) {
    constexpr std::string_view prefix = "tokenizer.ggml.", suffix = "_token_id";
    std::map<uint64_t, std::string> out;
    for (const GgufKey& key : gguf.keys()) {
        if (!key.name.starts_with(prefix) || !key.name.ends_with(suffix)) continue;
        const auto id = gguf.get_uint(key.name);
        if (!id) continue;
        std::string& roles = out[*id];
        roles += roles.empty() ? "" : ", ";
        roles += key.name.substr(prefix.size(), key.name.size() - prefix.size() - suffix.size());
    }
    return out;
}

/// From the file's own lists, so that vocabularies show that no tokenizer here can read.
Json describe_tokenizer(const Gguf& gguf, const Words& words) {
    const auto pieces = gguf.get_strings("tokenizer.ggml.tokens");
    if (!pieces) return nullptr;
    const auto kinds = gguf.get_ints("tokenizer.ggml.token_type");
    std::map<uint64_t, std::string> roles = token_roles(gguf);
    std::map<std::string, uint64_t> counts;
    Json special = Json::array();
    uint64_t id = 0;
    for (std::string_view piece : *pieces) {
        const int64_t kind = kinds && id < kinds->size() ? (*kinds)[id] : 1;
        counts[kind_name(kind)] += 1;
        const auto role = roles.find(id);
        const bool end = words.tokenizer && words.tokenizer->is_end(static_cast<int32_t>(id));
        if ((kind == 3 || kind == 4 || end || role != roles.end()) && special.size() < kMostSpecial)
            special.push(Json::object()
                             .set("id", id)
                             .set("text", piece)
                             .set("kind", kind_name(kind))
                             .set("role", role == roles.end() ? "" : role->second)
                             .set("ends_answer", end));
        ++id;
    }
    Json by_kind = Json::object();
    for (const auto& [name, count] : counts) by_kind.set(name, count);
    return Json::object()
        .set("model", text_of(gguf, "tokenizer.ggml.model"))
        .set("pre", text_of(gguf, "tokenizer.ggml.pre"))
        .set("size", pieces->size())
        .set("add_bos", words.tokenizer ? Json(words.tokenizer->add_bos()) : Json())
        .set("add_eos", words.tokenizer ? Json(words.tokenizer->add_eos()) : Json())
        .set("kinds", std::move(by_kind))
        .set("special", std::move(special));
}

Json describe_template(const Gguf& gguf, const Words& words) {
    const std::string_view own = text_of(gguf, "tokenizer.chat_template");
    const std::string text = words.chat_template ? words.chat_template->source() : std::string(own);
    return Json::object()
        .set("from", text.empty()  ? "nowhere"
                     : text == own ? "the file"
                                   : "elsewhere")
        .set("bytes", text.size())
        .set("names_tools", text.find("tools") != text.npos)
        .set("names_thinking", text.find("think") != text.npos)
        .set("text", text);
}

// ---- The report ------------------------------------------------------------------------------

/// Bytes for the context asked for, else for some that the model may have.
Json describe_memory(valar::EngineOptions options, uint32_t trained, Json& notes) {
    std::vector<uint32_t> contexts;
    for (const uint32_t context : {2048u, 8192u, 32768u})
        if (context < trained) contexts.push_back(context);
    contexts.push_back(trained);
    if (options.context_tokens) contexts = {options.context_tokens};
    options.max_running = 1;
    Json out = Json::array();
    for (const uint32_t context : contexts) {
        options.context_tokens = context;
        const auto plan = valar::Engine::memory_plan(options);
        if (!plan) {
            notes.push(plan.error().message);
            break;
        }
        out.push(Json::object()
                     .set("context", context)
                     .set("weights", plan->weights)
                     .set("keys_and_values", plan->kv)
                     .set("scratch", plan->scratch)
                     .set("total", plan->total())
                     .set("mapped", plan->mapped));
    }
    return out;
}

void add_spec(const Gguf& gguf, const valar::EngineOptions& options, Json& report, Json& notes) {
    report.set("spec", nullptr).set("layers", Json::array()).set("memory", Json::array());
    const auto spec = valar::read_model_spec(gguf);
    if (!spec) {
        notes.push(spec.error().message);
        return;
    }
    Folded layers;
    for (size_t i = 0; i < spec->layers.size(); ++i) layers.add(describe_layer(spec->layers[i]), i);
    report.set("spec", describe_spec(*spec)).set("layers", layers.rows("layers"));
    const uint32_t trained = static_cast<uint32_t>(report["spec"]["context"].as_uint());
    report.set("memory", describe_memory(options, trained, notes));
}

Json make_report(const Gguf& gguf, const valar::EngineOptions& options, const Words& words,
                 Json notes) {
    uint64_t bytes = 0;
    for (const TensorInfo& tensor : gguf.tensors()) bytes += tensor.bytes;
    Json report = Json::object();
    report.set("file", gguf.name())
        .set("gguf_version", gguf.version())
        .set("architecture", text_of(gguf, "general.architecture"))
        .set("name", text_of(gguf, "general.name"))
        .set("tensor_count", gguf.tensors().size())
        .set("tensor_bytes", bytes);
    add_spec(gguf, options, report, notes);
    report.set("runs", notes.empty())
        .set("notes", std::move(notes))
        .set("metadata", describe_keys(gguf))
        .set("types", describe_types(gguf))
        .set("tensors", describe_tensors(gguf))
        .set("tokenizer", describe_tokenizer(gguf, words))
        .set("chat_template", describe_template(gguf, words));
    return report;
}

// ---- As a table ------------------------------------------------------------------------------

/// One line, whatever the file says: control characters escaped, too long ones cut.
std::string cell(const Json& value) {
    constexpr size_t most = 72;
    char number[32];
    if (value.is_null()) return "-";
    if (value.is_bool()) return value.as_bool() ? "yes" : "no";
    if (value.is_real()) {
        std::snprintf(number, sizeof number, "%.6g", value.as_double());
        return number;
    }
    std::string text = value.write();
    if (value.is_string()) text = text.substr(1, text.size() - 2);
    if (text.size() <= most) return text;
    size_t cut = most;
    while (cut > 0 && (text[cut] & 0xc0) == 0x80) --cut;  // not within a character
    return text.substr(0, cut) + "...";
}

void print_members(const char* title, const Json& object) {
    if (object.empty()) return;
    std::printf("\n%s\n", title);
    for (const valar::JsonMember& member : object.members())
        std::printf("  %-34s %s\n", cell(Json(member.key)).c_str(), cell(member.value).c_str());
}

/// Rows of the same members; numbers to the right.
void print_rows(const char* title, const Json& rows, size_t most = SIZE_MAX) {
    if (rows.empty()) return;
    const std::span<const Json> shown = rows.items().first(std::min(most, rows.size()));
    const std::span<const valar::JsonMember> first = shown[0].members();
    std::vector<size_t> widths;
    for (const valar::JsonMember& column : first) {
        widths.push_back(column.key.size());
        for (const Json& row : shown)
            widths.back() = std::max(widths.back(), cell(row[column.key]).size());
    }
    std::printf("\n%s\n", title);
    for (size_t i = 0; i <= shown.size(); ++i) {  // the names of the columns before the first row
        std::string line;
        for (size_t k = 0; k < first.size(); ++k) {
            const std::string text = i == 0 ? first[k].key : cell(shown[i - 1][first[k].key]);
            const std::string space(widths[k] - text.size(), ' ');
            line += "  " + (first[k].value.is_number() ? space + text : text + space);
        }
        std::printf("%s\n", line.substr(0, line.find_last_not_of(' ') + 1).c_str());
    }
    if (rows.size() > most) std::printf("  and %zu more (--json)\n", rows.size() - most);
}

/// Those that a file names or that end an answer, then the others.
Json by_importance(const Json& special) {
    Json out = Json::array();
    for (const bool named : {true, false})
        for (const Json& token : special.items())
            if ((!token["role"].as_string().empty() || token["ends_answer"].as_bool()) == named)
                out.push(token);
    return out;
}

void print_table(const Json& report) {
    std::printf("%s: %s, %s, GGUF %s, %s tensors of %.1f MB\n", cell(report["file"]).c_str(),
                cell(report["architecture"]).c_str(), cell(report["name"]).c_str(),
                cell(report["gguf_version"]).c_str(), cell(report["tensor_count"]).c_str(),
                report["tensor_bytes"].as_double() * 1e-6);
    for (const Json& note : report["notes"].items())
        std::printf("does not run here: %s\n", std::string(note.as_string()).c_str());
    print_members("metadata", report["metadata"]);
    print_members("spec", report["spec"]);
    print_rows("layers, equal ones in one row", report["layers"]);
    print_rows("weights by type", report["types"]);
    print_rows("tensors, equal ones of several layers in one row", report["tensors"]);
    print_rows("memory in bytes, for one conversation that fills the context", report["memory"]);
    Json tokenizer = report["tokenizer"], chat_template = report["chat_template"];
    print_rows("special tokens", by_importance(tokenizer["special"]), 24);
    tokenizer.erase("special");
    chat_template.erase("text");
    print_members("tokenizer", tokenizer);
    print_members("chat template (--template prints it)", chat_template);
}

// ---- Text to tokens, request to prompt -------------------------------------------------------

Result<Json> tokenize(const valar::Tokenizer& tokenizer, const std::string& text) {
    const auto tokens = tokenizer.encode(text, tokenizer.add_bos(), tokenizer.add_eos());
    if (!tokens) return tokens.error();
    Json out = Json::array();
    for (const valar::Token token : *tokens)
        out.push(Json::object()
                     .set("id", token)
                     .set("piece", tokenizer.piece(token))
                     .set("kind", kind_name(static_cast<int64_t>(tokenizer.kind(token)))));
    return out;
}

/// The pieces of a prompt in order, each with who wrote it.
Json pieces_of(const MarkedText& prompt) {
    Json out = Json::array();
    const std::string_view text = prompt.text;
    size_t at = 0;
    const auto add = [&](const char* from, size_t end) {
        if (end > at)
            out.push(Json::object().set("from", from).set("text", text.substr(at, end - at)));
        at = end;
    };
    for (const valar::detail::ByteRange& range : prompt.from_request) {
        add("template", range.begin);
        add("request", range.end);
    }
    add("template", text.size());
    return out;
}

Result<MarkedText> render(const Words& words, const valar::Request& request) {
    const auto spelling = [&](std::optional<valar::Token> token) {
        return token ? words.tokenizer->piece(*token) : std::string_view();
    };
    const auto input = valar::detail::chat_input(
        request, *words.chat_template, spelling(words.tokenizer->bos()),
        spelling(words.tokenizer->eos()), static_cast<int64_t>(std::time(nullptr)));
    return words.chat_template->render(input);
}

Result<Json> render_file(const Words& words, const std::string& path) {
    const auto text = example::read_text(path);
    if (!text) return text.error();
    auto body = Json::parse(*text);
    if (!body) return body.error();
    if (body->is_object() && !body->find("model")) body->set("model", "model");
    const auto request = valar::detail::parse_response_request(*body);
    if (!request) return request.error();
    const auto prompt = render(words, *request);
    if (!prompt) return prompt.error();
    const auto tokens = words.tokenizer->encode(*prompt, words.tokenizer->add_bos());
    if (!tokens) return tokens.error();
    return Json::object().set("tokens", tokens->size()).set("pieces", pieces_of(*prompt));
}

void print_pieces(const Json& prompt) {
    for (const Json& piece : prompt["pieces"].items())
        std::printf("%-8s %s\n", cell(piece["from"]).c_str(), piece["text"].write().c_str());
    std::printf("%s tokens\n", cell(prompt["tokens"]).c_str());
}

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    options.precision = valar::Precision::fine;  // as the other examples compute
    bool as_json = false, show_template = false;
    std::string text, request, template_path;
    example::Flags flags("inspect", "Says what a GGUF file is, whether it runs here or not.");
    flags.add_word("FILE", &options.model_path);
    flags.add("json", &as_json, "all of it as JSON");
    flags.add("tokenize", "TEXT", &text, "the tokens of this text, as if a request had brought it");
    flags.add("render", "FILE", &request,
              "the prompt that this request (JSON, as POST /v1/responses takes it) becomes");
    flags.add("template", &show_template, "the chat template alone");
    flags.add("chat-template", "FILE", &template_path, "Jinja, in place of the model's own");
    flags.add("ctx", "TOKENS", &options.context_tokens, "memory for this context",
              "context_tokens");
    flags.add("weights", "packed|mapped", &options.weights, "memory with these (default: packed)");
    flags.add("kv-type", "f16|f32|q8_0", &options.kv_type, "memory with these (default: f16)");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (options.model_path.empty()) options.model_path = example::cached_model();
    if (!template_path.empty()) {
        auto source = example::read_text(template_path);
        if (!source) return example::fail(source.error().message);
        options.chat_template = *source;
    }
    const auto gguf = Gguf::open(options.model_path);
    if (!gguf) return example::fail(gguf.error().message);
    if (flags.given("ctx"))
        if (const auto plan = valar::Engine::memory_plan(options);
            !plan && plan.error().param == "context_tokens")
            return flags.fail(plan.error());
    Json notes = Json::array();
    const Words words = open_words(*gguf, options.chat_template, notes);
    if (flags.given("tokenize") || flags.given("render")) {
        if (!words.tokenizer || (flags.given("render") && !words.chat_template))
            return example::fail(std::string(notes[0].as_string()));
        const auto made = flags.given("render") ? render_file(words, request)
                                                : tokenize(*words.tokenizer, text);
        if (!made) return example::fail(made.error().message);
        if (as_json) std::printf("%s\n", made->write(valar::json_pretty).c_str());
        else if (flags.given("render")) print_pieces(*made);
        else print_rows("tokens", *made);
        return 0;
    }
    const Json report = make_report(*gguf, options, words, std::move(notes));
    if (show_template) example::print(report["chat_template"]["text"].as_string());
    else if (as_json) std::printf("%s\n", report.write(valar::json_pretty).c_str());
    else print_table(report);
    return 0;
}
