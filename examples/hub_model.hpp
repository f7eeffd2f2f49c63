// hub_model: a folder of the hub (config.json, tokenizer.json, safetensors) as what a GGUF file has:
// keys by tables, and tensors whose values are read when they are asked for. Of a tensor of the file
// its parts say where in the folder its values lie, in any order that three steps can describe: so q
// and k are permuted, experts stacked and fused matrices taken apart without holding them.
#ifndef VALAR_EXAMPLES_HUB_MODEL_HPP
#define VALAR_EXAMPLES_HUB_MODEL_HPP

#include "hub_tokenizer.hpp"

namespace example {

// ---- Architectures: a row each -----------------------------------------------------------------

enum HubTrait : uint32_t {
    permutes = 1,          // rope turns neighbours here, halves there
    plus_one = 2,          // norms are stored without the 1 that is added
    tied = 4,              // there is no output matrix, whatever the files have
    says_windows = 8,      // GGUF has an entry a layer
    four_times = 16,       // the network is four times as wide as the row where nothing says so
    experts_as_wide = 32,  // intermediate_size is the experts'
};

struct HubConverter;

struct HubArchitecture {
    const char* classes;  // of `architectures`, with a space between two
    const char* name;     // in GGUF
    uint32_t traits = 0;
    double partial = 1;       // of a head rotates, where nothing says so
    uint32_t full_every = 0;  // of the layers sees all, where the windows are not said
    void (*more)(HubConverter&) = nullptr;
    const char* defaults = "{}";  // of config.json, where makers leave out what the class knows
};

/// Values of a tensor in a folder: row i of the part begins at `first` + the sum of digit * step over
/// the digits of i, of which the last counts fastest; its columns lie `column_step` apart.
struct HubPart {
    const SafeTensor* from = nullptr;
    const SafeTensor* scale = nullptr;  // of F8 values, or of blocks of MXFP4
    uint64_t first = 0;
    uint64_t counts[3] = {1, 1, 1}, steps[3] = {};
    uint64_t columns = 1, column_step = 1;
    uint64_t rows() const { return counts[0] * counts[1] * counts[2]; }
};

struct HubTensor {
    std::string name;
    valar::TensorType type = valar::TensorType::f32;
    std::vector<uint64_t> dims;  // as GGUF has them
    float add = 0;
    std::vector<HubPart> parts;
    std::vector<float> values;  // instead of parts
};

/// How the files' tensors become GGUF's.
enum class HubStep : uint8_t {
    plain,
    skip,
    rope,         // rows of q or k
    thirds,       // of each head its query, key and value: all queries, all keys, all values
    groups,       // of each key head its queries, itself and its value, likewise
    three,        // the same, taken apart into q, k and v
    turned,       // columns are rows
    halves,       // of each expert gate, then up
    interleaved,  // of each expert gate and up by turns, turned
    down,         // of each expert, turned
    head,         // one of several that become rows of one tensor
};

struct HubRow {
    const char* theirs;  // without the layer and the last word; '#' is a number
    const char* ours;
    HubStep step = HubStep::plain;
    const char* only = nullptr;  // these architectures, with a space between two
};

// clang-format off
inline constexpr HubRow hub_tensors[] = {  // of a model
    {"embed_tokens", "token_embd"}, {"wte", "token_embd"}, {"embed_in", "token_embd"},
    {"word_embeddings", "token_embd"}, {"tok_embeddings", "token_embd"},
    {"wpe", "position_embd"},
    {"norm", "output_norm"}, {"ln_f", "output_norm"}, {"final_layer_norm", "output_norm"},
    {"final_layernorm", "output_norm"},
    {"lm_head", "output"}, {"embed_out", "output"}, {"output", "output"},
    {"rotary_emb.inv_freq", "", HubStep::skip},
};
inline constexpr HubRow hub_layer_tensors[] = {
    {"self_attn.q_proj", "attn_q", HubStep::rope}, {"self_attn.k_proj", "attn_k", HubStep::rope},
    {"self_attn.v_proj", "attn_v"}, {"self_attn.o_proj", "attn_output"},
    {"self_attn.dense", "attn_output"}, {"attention.dense", "attn_output"},
    {"self_attention.dense", "attn_output"}, {"attention.wo", "attn_output"},
    {"attn.c_proj", "attn_output", HubStep::turned},
    {"self_attn.qkv_proj", "attn_qkv"},
    {"attention.query_key_value", "attn_qkv", HubStep::thirds, "gptneox"},
    {"attention.query_key_value", "attn_qkv"},
    {"self_attention.query_key_value", "attn_qkv", HubStep::groups},
    {"attention.wqkv", "attn_", HubStep::three},
    {"attn.c_attn", "attn_qkv", HubStep::turned},
    {"self_attn.q_norm", "attn_q_norm"}, {"self_attn.k_norm", "attn_k_norm"},
    {"self_attn.q_layernorm", "attn_q_norm"}, {"self_attn.k_layernorm", "attn_k_norm"},
    {"self_attn.query_layernorm", "attn_q_norm"}, {"self_attn.key_layernorm", "attn_k_norm"},
    {"attention.query_layernorm", "attn_q_norm"}, {"attention.key_layernorm", "attn_k_norm"},
    {"self_attn.q_layernorm.norms.#", "attn_q_norm", HubStep::head},
    {"self_attn.k_layernorm.norms.#", "attn_k_norm", HubStep::head},
    {"self_attn.sinks", "attn_sinks"},
    {"input_layernorm", "attn_norm"}, {"attention_layernorm", "attn_norm"},
    {"attention_norm", "attn_norm"}, {"ln_1", "attn_norm"},
    {"ln_attn", "attn_norm_2"}, {"ln_mlp", "attn_norm"},
    {"post_attention_layernorm", "post_attention_norm", HubStep::plain,
     "gemma2 gemma3 olmo2 exaone4 seed_oss gpt-oss glm4moe"},
    {"post_attention_layernorm", "ffn_norm"}, {"post_self_attn_layernorm", "post_attention_norm"},
    {"feedforward_layernorm", "ffn_norm"}, {"ffn_norm", "ffn_norm"}, {"ln_2", "ffn_norm"},
    {"pre_feedforward_layernorm", "ffn_norm"},
    {"post_feedforward_layernorm", "post_ffw_norm"}, {"post_mlp_layernorm", "post_ffw_norm"},
    {"mlp.gate_proj", "ffn_gate"}, {"mlp.up_proj", "ffn_up"}, {"mlp.down_proj", "ffn_down"},
    {"mlp.gate_up_proj", "ffn_up"},
    {"feed_forward.w1", "ffn_gate"}, {"feed_forward.w3", "ffn_up"}, {"feed_forward.w2", "ffn_down"},
    {"mlp.fc1", "ffn_up"}, {"mlp.fc2", "ffn_down"},
    {"mlp.dense_h_to_4h", "ffn_up"}, {"mlp.dense_4h_to_h", "ffn_down"},
    {"mlp.c_fc", "ffn_up", HubStep::turned, "gpt2"},
    {"mlp.c_proj", "ffn_down", HubStep::turned, "gpt2"},
    {"mlp.c_fc", "ffn_up"}, {"mlp.c_proj", "ffn_down"},
    {"mlp.gate", "ffn_gate_inp"}, {"mlp.router", "ffn_gate_inp"},
    {"block_sparse_moe.gate", "ffn_gate_inp"}, {"block_sparse_moe.router.layer", "ffn_gate_inp"},
    {"mlp.gate.e_score_correction_bias", "exp_probs_b.bias"},
    {"mlp.gate.expert_bias", "exp_probs_b.bias"},
    {"mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias"},
    {"block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"},
    {"mlp.experts.#.gate_proj", "ffn_gate_exps"}, {"mlp.experts.#.up_proj", "ffn_up_exps"},
    {"mlp.experts.#.down_proj", "ffn_down_exps"},
    {"block_sparse_moe.experts.#.w1", "ffn_gate_exps"},
    {"block_sparse_moe.experts.#.w3", "ffn_up_exps"},
    {"block_sparse_moe.experts.#.w2", "ffn_down_exps"},
    {"block_sparse_moe.input_linear", "", HubStep::halves},
    {"block_sparse_moe.output_linear", "ffn_down_exps"},
    {"mlp.experts.gate_up_proj", "", HubStep::interleaved, "gpt-oss"},
    {"mlp.experts.gate_up_proj_blocks", "", HubStep::interleaved},
    {"mlp.experts.gate_up_proj_bias", "", HubStep::interleaved},
    {"mlp.experts.down_proj", "ffn_down_exps", HubStep::down, "gpt-oss"},
    {"mlp.experts.down_proj_blocks", "ffn_down_exps", HubStep::down},
    {"mlp.experts.down_proj_bias", "ffn_down_exps.bias"},
    {"mlp.experts.gate_up_proj_scales", "", HubStep::skip},
    {"mlp.experts.down_proj_scales", "", HubStep::skip},
    {"mlp.experts.gate_up_proj", "", HubStep::halves}, {"mlp.experts.down_proj", "ffn_down_exps"},
    {"mlp.shared_expert.gate_proj", "ffn_gate_shexp"},
    {"mlp.shared_expert.up_proj", "ffn_up_shexp"},
    {"mlp.shared_expert.down_proj", "ffn_down_shexp"},
    {"mlp.shared_expert_gate", "ffn_gate_inp_shexp"},
    {"mlp.shared_experts.gate_proj", "ffn_gate_shexp"},
    {"mlp.shared_experts.up_proj", "ffn_up_shexp"},
    {"mlp.shared_experts.down_proj", "ffn_down_shexp"},
    {"eh_proj", "nextn.eh_proj"}, {"enorm", "nextn.enorm"}, {"hnorm", "nextn.hnorm"},
    {"shared_head.norm", "nextn.shared_head_norm"}, {"final_layernorm", "layer_output_norm"},
    {"shared_head.head", "nextn.shared_head_head"},
    {"embed_tokens", "nextn.embed_tokens"},
    // numbers of an activation that become keys; masks and angles that older files have
    {"mlp.act_fn.alpha_n", "", HubStep::skip}, {"mlp.act_fn.alpha_p", "", HubStep::skip},
    {"mlp.act_fn.beta", "", HubStep::skip}, {"mlp.act_fn.eps", "", HubStep::skip},
    {"self_attn.rotary_emb.inv_freq", "", HubStep::skip},
    {"attention.rotary_emb.inv_freq", "", HubStep::skip},
    {"attn", "", HubStep::skip, "gpt2"}, {"attn.masked_bias", "", HubStep::skip, "gpt2"},
    {"attention", "", HubStep::skip, "gptneox"},
    {"attention.masked_bias", "", HubStep::skip, "gptneox"},
};

/// Keys that say the same there and here: the first of `theirs` that is a number.
struct HubKey {
    const char* theirs;  // with a space between two
    const char* ours;
    char kind;  // u: a size, f: a number, b: true or false
};
inline constexpr HubKey hub_keys[] = {
    {"max_position_embeddings n_positions n_ctx", "context_length", 'u'},
    {"hidden_size n_embd", "embedding_length", 'u'},
    {"num_attention_heads n_head", "attention.head_count", 'u'},
    {"rms_norm_eps", "attention.layer_norm_rms_epsilon", 'f'},
    {"layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps", "attention.layer_norm_epsilon", 'f'},
    {"head_dim", "attention.key_length", 'u'},
    {"head_dim", "attention.value_length", 'u'},
    {"num_experts_per_tok num_experts_per_token moe_k", "expert_used_count", 'u'},
    {"n_group", "expert_group_count", 'u'},
    {"topk_group", "expert_group_used_count", 'u'},
    {"moe_intermediate_size", "expert_feed_forward_length", 'u'},
    {"n_shared_experts num_shared_experts moe_num_shared_experts", "expert_shared_count", 'u'},
    {"first_k_dense_replace moe_layer_start_index", "leading_dense_block_count", 'u'},
    {"moe_layer_interval", "interleave_moe_layer_step", 'u'},
    {"routed_scaling_factor", "expert_weights_scale", 'f'},
    {"norm_topk_prob", "expert_weights_norm", 'b'},
    {"num_nextn_predict_layers", "nextn_predict_layers", 'u'},
    {"attention_multiplier", "attention.scale", 'f'},
    {"embedding_multiplier scale_emb", "embedding_scale", 'f'},
    {"residual_multiplier", "residual_scale", 'f'},
    {"logits_scaling logit_scale", "logit_scale", 'f'},
    {"attn_logit_softcapping", "attn_logit_softcapping", 'f'},
    {"final_logit_softcapping", "final_logit_softcapping", 'f'},
    {"use_parallel_residual", "use_parallel_residual", 'b'},
    {"clip_qkv", "attention.clamp_kqv", 'f'},
};
// clang-format on

inline bool has_word(std::string_view words, std::string_view word) {
    for (size_t at = 0; at < words.size();) {
        const size_t end = std::min(words.find(' ', at), words.size());
        if (words.substr(at, end - at) == word) return true;
        at = end + 1;
    }
    return false;
}

// ---- From config.json to keys ------------------------------------------------------------------

struct HubConverter {
    Files files;
    Safetensors safetensors;
    Json config;  // of the text model, with what the whole says beside it
    const HubArchitecture* row = nullptr;
    valar::GgufWriter& writer;
    uint64_t layers = 0, width = 0, heads = 0, kv_heads = 0, head_dim = 0;
    std::vector<HubTensor> tensors = {};
    std::map<std::string, size_t> by_name = {};
    std::vector<std::string> written = {};
    std::optional<valar::Error> error = {};

    void fail(valar::Error reason) {
        if (!error) error = std::move(reason);
    }
    void fail_config(const std::string& what) { fail(bad_file("config.json", what)); }

    const Json& find(std::string_view names) const {
        static const Json none;
        for (size_t at = 0; at < names.size();) {
            const size_t end = std::min(names.find(' ', at), names.size());
            const Json& value = config[names.substr(at, end - at)];
            if (!value.is_null()) return value;
            at = end + 1;
        }
        return none;
    }
    uint64_t size(std::string_view names, uint64_t fallback) {
        const Json& value = find(names);
        const uint64_t number = value.is_null() ? fallback : value.as_uint(0);
        if (number < 1 || number > UINT32_MAX)
            fail_config(shown(names) + " is missing or not a size");
        return error ? 1 : number;
    }
    std::string key(const std::string& name) const { return std::string(row->name) + "." + name; }
    /// Of what is said twice the first counts: what a row of the table has `more` of.
    bool is_new(const std::string& name) {
        if (std::find(written.begin(), written.end(), name) != written.end()) return false;
        written.push_back(name);
        return true;
    }
    void set_size(const std::string& name, uint64_t value) {
        if (value > UINT32_MAX) fail_config("what becomes '" + key(name) + "' is too large");
        if (is_new(name)) writer.set(key(name), static_cast<uint32_t>(value));
    }
    void set_number(const std::string& name, double value) {
        if (is_new(name)) writer.set(key(name), static_cast<float>(value));
    }
    void set_text(const std::string& name, std::string_view value) {
        if (is_new(name)) writer.set_string(key(name), value);
    }

    /// Rope's numbers: in an object of their own, or one for each kind of layer, or beside the rest.
    const Json& rope() const {
        const Json& all = config["rope_parameters"].is_object() ? config["rope_parameters"]
                                                                : config["rope_scaling"];
        return all["full_attention"].is_object() ? all["full_attention"] : all;
    }
    double rope_number(const char* own, const char* beside, double fallback) const {
        const Json& value = rope()[own];
        return (value.is_number() ? value : find(beside)).as_double(fallback);
    }
    double rope_theta() const {
        return rope_number("rope_theta", "rope_theta rotary_emb_base", 10000);
    }
    uint64_t original_context() const {
        return static_cast<uint64_t>(std::clamp(
            rope_number("original_max_position_embeddings", "original_max_position_embeddings",
                        find("max_position_embeddings").as_double()),
            0.0, 1e9));
    }
    uint64_t rope_dims() const {
        const double part = rope_number("partial_rotary_factor",
                                        "partial_rotary_factor rotary_pct rope_pct rope_percent",
                                        row->partial);
        const uint64_t said = find("rotary_dim").as_uint();
        return said ? said
                    : static_cast<uint64_t>(static_cast<double>(head_dim) *
                                            std::clamp(part, 0.0, 1.0));
    }
    bool has_word_of(const char* words) const { return has_word(words, row->name); }

    void read_sizes() {
        layers = size("num_hidden_layers n_layer num_layers", 0);
        if (layers > valar::ModelSpec::max_layers) fail_config("'num_hidden_layers' is too large");
        width = size("hidden_size n_embd", 0);
        heads = size("num_attention_heads n_head", 0);
        kv_heads = size("num_kv_heads num_key_value_heads n_head_kv", heads);
        head_dim = size("head_dim", width / heads);
        if (has_word_of("gpt2 gptneox")) kv_heads = heads;
        if (has_word_of("falcon") && !config["new_decoder_architecture"].as_bool())
            kv_heads = config["multi_query"].as_bool(true) ? 1 : heads;
        if (error || heads % kv_heads == 0) return;
        fail_config("'num_key_value_heads' does not divide 'num_attention_heads'");
    }

    void write_keys() {
        for (const HubKey& line : hub_keys) {
            const Json& value = find(line.theirs);
            if (line.kind == 'u' && value.is_integer()) set_size(line.ours, value.as_uint());
            if (line.kind == 'f' && value.is_number() && value.as_double() != 0)
                set_number(line.ours, value.as_double());
            if (line.kind == 'b' && value.is_bool()) writer.set(key(line.ours), value.as_bool());
        }
        const uint64_t guesses = find("num_nextn_predict_layers").as_uint();
        if (guesses > valar::ModelSpec::max_layers)
            fail_config("'num_nextn_predict_layers' is too large");
        set_size("block_count", layers + (error ? 0 : guesses));
        set_size("attention.head_count_kv", kv_heads);
        set_size("feed_forward_length",
                 size("intermediate_size n_inner", row->traits & four_times ? 4 * width : 0));
        set_size("vocab_size", rows_of("token_embd.weight"));
        write_experts();
        write_windows();
        if (!has_word_of("gpt2")) write_rope();
    }

    void write_experts() {
        const Json& count = find("num_local_experts num_experts n_routed_experts moe_num_experts");
        if (count.as_uint() > 1) set_size("expert_count", count.as_uint());
        if (row->traits & experts_as_wide)
            set_size("expert_feed_forward_length", size("intermediate_size", 0));
        const std::string_view score = find("scoring_func score_function").as_string();
        const bool sigmoid = score == "sigmoid" || (score.empty() && has_word_of("glm4moe"));
        if (sigmoid || score == "softmax") set_size("expert_gating_func", sigmoid ? 2 : 1);
        const uint64_t shared =
            find("n_shared_experts num_shared_experts moe_num_shared_experts").as_uint();
        const uint64_t each = find("moe_intermediate_size").as_uint();
        const Json& all = find(
            "shared_expert_intermediate_size moe_shared_expert_intermediate_size");
        if (all.as_uint() > 0 || (shared > 0 && each > 0))
            set_size("expert_shared_feed_forward_length", all.as_uint(shared * each));
    }

    /// Which layers have the window, where it is not the rule of the architecture.
    void write_windows() {
        const uint64_t window = find("sliding_window").as_uint();
        const Json& used = find("use_sliding_window");
        if (has_word_of("phi3")) set_size("attention.sliding_window", window);
        if (window == 0 || (used.is_bool() && !used.as_bool()) || has_word_of("phi3")) return;
        if (has_word_of("qwen2 qwen3 qwen2moe qwen3moe")) {
            if (used.as_bool())
                fail_config("'use_sliding_window': layers with a window are not supported in " +
                            std::string(row->name));
            return;
        }
        set_size("attention.sliding_window", window);
        std::vector<bool> has(static_cast<size_t>(layers));
        const Json &types = find("layer_types"), &pattern = find("sliding_window_pattern");
        const std::string_view letters = pattern.as_string();
        bool usual = true;
        for (size_t i = 0; i < has.size(); ++i) {
            const uint64_t every = pattern.as_uint(row->full_every);
            const bool by_rule = row->full_every == 0 || (i + 1) % row->full_every != 0;
            if (types.is_array()) has[i] = types[i].as_string() == "sliding_attention";
            else if (!letters.empty()) has[i] = letters[i % letters.size()] == 'L';
            else has[i] = every == 0 || (i + 1) % every != 0;
            usual &= has[i] == by_rule;
        }
        if (usual && !(row->traits & says_windows)) return;
        std::vector<uint8_t> bytes(has.begin(), has.end());
        const std::span<const std::byte> data = std::as_bytes(std::span(bytes));
        writer.set(valar::GgufKey{key("attention.sliding_window_pattern"), valar::GgufType::boolean,
                                  true, bytes.size(), data});
    }

    void write_rope() {
        if (rope_dims() > valar::ModelSpec::max_width) return fail_config("the rope is too wide");
        if (rope_dims() > 0) set_size("rope.dimension_count", rope_dims());
        write_scaling();
        set_number("rope.freq_base", rope_theta());
        const Json& swa = config["rope_parameters"]["sliding_attention"]["rope_theta"];
        const double local = (swa.is_number() ? swa : find("rope_local_base_freq")).as_double();
        if (local > 0) set_number("rope.freq_base_swa", local);
    }
    void write_scaling() {
        const Json &type = rope()["rope_type"], &older = rope()["type"];
        const std::string_view kind = type.is_string() ? type.as_string() : older.as_string();
        static constexpr struct {
            const char* kinds;
            void (HubConverter::*write)();
        } scalings[] = {
            {"default none mrope", &HubConverter::write_no_scaling},
            {"linear", &HubConverter::write_linear},
            {"yarn", &HubConverter::write_yarn},
            {"llama3", &HubConverter::write_llama3},
            {"longrope su", &HubConverter::write_long_rope},
            {"dynamic xdrope", &HubConverter::write_dynamic},
        };
        if (kind.empty()) return write_no_scaling();
        for (const auto& [kinds, write] : scalings)
            if (has_word(kinds, kind)) return (this->*write)();
        fail_config("rope scaling " + shown(kind) + " is not supported");
    }
    void write_no_scaling() {
        if (has_word_of("phi3"))
            set_size("rope.scaling.original_context_length", original_context());
    }
    void write_linear() {
        set_text("rope.scaling.type", "linear");
        set_number("rope.scaling.factor", rope()["factor"].as_double(1));
    }
    void write_yarn() {
        set_text("rope.scaling.type", "yarn");
        const double factor = rope()["factor"].as_double(1);
        set_number("rope.scaling.factor", factor);
        set_size("rope.scaling.original_context_length", original_context());
        constexpr const char* names[][2] = {{"beta_fast", "yarn_beta_fast"},
                                            {"beta_slow", "yarn_beta_slow"},
                                            {"extrapolation_factor", "yarn_ext_factor"}};
        for (const auto& [theirs, ours] : names)
            if (rope()[theirs].is_number())
                set_number("rope.scaling." + std::string(ours), rope()[theirs].as_double());
        // of the magnitude: what is said, or what two multipliers leave of it
        const double one = rope()["mscale"].as_double(), all = rope()["mscale_all_dim"].as_double();
        const Json& said = rope()["attention_factor"];
        const double more = factor > 1 ? 0.1 * std::log(factor) : 0;
        if (has_word_of("mistral3")) set_number("rope.scaling.yarn_log_multiplier", all);
        else if (said.is_number()) set_number("rope.scaling.yarn_attn_factor", said.as_double());
        else if (one > 0 && all > 0)
            set_number("rope.scaling.yarn_attn_factor", (one * more + 1) / (all * more + 1));
        if (rope()["llama_4_scaling_beta"].is_number())
            set_number("attention.temperature_scale", rope()["llama_4_scaling_beta"].as_double());
    }
    /// Slow pairs are slowed by the factor, quick ones not, and those between in part.
    void write_llama3() {
        const double factor = rope()["factor"].as_double(8);
        const double low = rope()["low_freq_factor"].as_double(1);
        const double high = rope()["high_freq_factor"].as_double(4);
        const double context = rope()["original_max_position_embeddings"].as_double(8192);
        std::vector<float> factors;
        const uint64_t dims = rope_dims();
        for (uint64_t i = 0; i < dims / 2; ++i) {
            const double turn = std::pow(rope_theta(),
                                         -2.0 * static_cast<double>(i) / static_cast<double>(dims));
            const double turns = context * turn / 6.283185307179586;
            const double quick = std::clamp((turns - low) / (high - low), 0.0, 1.0);
            factors.push_back(static_cast<float>(1 / ((1 - quick) / factor + quick)));
        }
        add_values("rope_freqs.weight", std::move(factors));
    }
    void write_long_rope() {
        const uint64_t original = original_context();
        set_size("rope.scaling.original_context_length", original);
        for (const char* name : {"long", "short"}) {
            std::vector<float> factors;
            for (const Json& number : rope()[std::string(name) + "_factor"].items())
                factors.push_back(static_cast<float>(number.as_double()));
            if (factors.size() != rope_dims() / 2)
                return fail_config("'" + std::string(name) + "_factor' of the rope is not " +
                                   std::to_string(rope_dims() / 2) + " numbers");
            add_values("rope_factors_" + std::string(name) + ".weight", std::move(factors));
        }
        const double longer = find("max_position_embeddings").as_double() /
                              static_cast<double>(original);
        const double usual = longer > 1 ? std::sqrt(1 + std::log(longer) /
                                                            std::log(static_cast<double>(original)))
                                        : 1.0;
        set_number("rope.scaling.attn_factor", rope()["attention_factor"].as_double(usual));
    }
    /// HunYuan's: a larger base, once and for all.
    void write_dynamic() {
        const Json& alpha = rope()["alpha"];
        if (!has_word_of("hunyuan-dense") || !alpha.is_number())
            return fail_config("rope scaling 'dynamic' is not supported");
        const double dims = static_cast<double>(head_dim);
        set_number("rope.freq_base", rope_theta() * std::pow(alpha.as_double(), dims / (dims - 2)));
    }

    // ---- From names to tensors

    uint64_t rows_of(const std::string& name) const {
        const auto found = by_name.find(name);
        return found == by_name.end() ? 0 : tensors[found->second].dims.back();
    }
    void add_values(const std::string& name, std::vector<float> values) {
        if (values.empty()) return;
        HubTensor tensor{name, valar::TensorType::f32, {values.size()}, 0, {}, std::move(values)};
        by_name.emplace(name, tensors.size());
        tensors.push_back(std::move(tensor));
    }

    /// The type that holds the values as they are; vectors are F32.
    static valar::TensorType natural(const SafeTensor& from, size_t dims) {
        if (dims < 2) return valar::TensorType::f32;
        if (from.type->dtype == Dtype::f16) return valar::TensorType::f16;
        return from.type->dtype == Dtype::f32 ? valar::TensorType::f32 : valar::TensorType::bf16;
    }
    /// A new tensor, or one more part of one that is there, with the same shape of a part.
    void add_part(const std::string& name, std::vector<uint64_t> dims, HubPart part,
                  std::optional<uint64_t> number) {
        const auto [at, fresh] = by_name.emplace(name, tensors.size());
        if (fresh) {
            HubTensor tensor{name, natural(*part.from, dims.size()), dims, 0, {}, {}};
            const bool is_norm = name.ends_with("norm.weight") || name.ends_with("norm_2.weight");
            if (row->traits & plus_one && is_norm) tensor.add = 1;
            if (number) tensor.dims.push_back(0);
            tensors.push_back(std::move(tensor));
        }
        HubTensor& tensor = tensors[at->second];
        if (!fresh && !number)
            return fail(safetensors.bad(*part.from, "is the second that becomes " + name));
        if (number) {
            if (*number != tensor.parts.size())
                return fail(safetensors.bad(*part.from, "comes where number " +
                                                            std::to_string(tensor.parts.size()) +
                                                            " of " + name + " is missing"));
            if (!std::equal(dims.begin(), dims.end(), tensor.dims.begin(), tensor.dims.end() - 1))
                return fail(safetensors.bad(*part.from, "has another shape than its kin"));
            ++tensor.dims.back();
        }
        tensor.parts.push_back(part);
    }

    static std::vector<uint64_t> reversed(const std::vector<uint64_t>& shape) {
        std::vector<uint64_t> dims(shape.rbegin(), shape.rend());
        if (dims.empty()) dims.push_back(1);
        return dims;
    }
    HubPart whole(const SafeTensor& from) const {
        HubPart part;
        part.from = &from;
        part.columns = from.shape.empty() ? 1 : from.shape.back();
        part.counts[2] = part.columns ? from.count / part.columns : 0;
        part.steps[2] = part.columns;
        return part;
    }

    struct Place {  // of a tensor by its name
        const HubRow* row = nullptr;
        std::optional<uint64_t> number;
        std::string prefix, suffix;
    };
    static bool matches(std::string_view pattern, std::string_view name,
                        std::optional<uint64_t>& number) {
        const size_t hash = pattern.find('#');
        if (hash == pattern.npos) return pattern == name;
        if (!name.starts_with(pattern.substr(0, hash))) return false;
        name.remove_prefix(hash);
        pattern.remove_prefix(hash + 1);
        const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
        if (digits == 0 || digits > 6 || name.substr(digits) != pattern) return false;
        number = std::strtoull(std::string(name.substr(0, digits)).c_str(), nullptr, 10);
        return true;
    }
    /// "model.layers.7.self_attn.q_proj.weight": the layer 7, what the tables call it, the suffix.
    std::optional<Place> place_of(std::string_view name) const {
        Place place;
        for (const char* part : {"language_model.model.", "model.language_model.",
                                 "language_model.", "model.", "transformer.", "gpt_neox."})
            if (name.starts_with(part)) {
                name.remove_prefix(std::string_view(part).size());
                break;
            }
        for (const char* end : {".weight", ".bias"})
            if (name.ends_with(end)) {
                place.suffix = end;
                name.remove_suffix(place.suffix.size());
            }
        std::span<const HubRow> table = hub_tensors;
        for (const char* begin : {"layers.", "h."}) {
            const size_t dot = name.find('.', std::string_view(begin).size());
            std::optional<uint64_t> layer;
            const std::string pattern = std::string(begin) + "#";
            if (dot == name.npos || !matches(pattern, name.substr(0, dot), layer)) continue;
            place.prefix = "blk." + std::to_string(*layer) + ".";
            name.remove_prefix(dot + 1);
            table = hub_layer_tensors;
            break;
        }
        for (const HubRow& line : table)
            if ((!line.only || has_word(line.only, this->row->name)) &&
                matches(line.theirs, name, place.number)) {
                place.row = &line;
                return place;
            }
        return std::nullopt;
    }
    /// Parts of a model that sees or hears, which is not the model that speaks; scales, which are
    /// read with what they belong to.
    bool is_of_no_use(std::string_view name) const {
        for (const char* part :
             {"vision_tower.", "multi_modal_projector.", "model.vision_tower.",
              "model.multi_modal_projector.", "model.visual.", "visual.", "model.mtp_"})
            if (name.starts_with(part)) return true;
        for (const char* end : {".weight_scale_inv", ".weight_scale", ".input_scale",
                                ".activation_scale", ".k_scale", ".v_scale"})
            if (name.ends_with(end)) return true;
        const bool is_output = name == "lm_head.weight" || name == "language_model.lm_head.weight";
        return is_output && (row->traits & tied || find("tie_word_embeddings").as_bool());
    }

    void add_tensors() {
        std::vector<std::pair<const SafeTensor*, Place>> wanted;
        for (const auto& [name, tensor] : safetensors.tensors()) {
            if (is_of_no_use(name)) continue;
            auto place = place_of(name);
            if (!place)
                return fail(
                    safetensors.bad(tensor, "is not one that " + std::string(row->name) + " has"));
            if (place->row->step != HubStep::skip) wanted.emplace_back(&tensor, std::move(*place));
        }
        // experts come in the order of their numbers, not of their names
        std::stable_sort(wanted.begin(), wanted.end(), [](const auto& a, const auto& b) {
            return a.second.number.value_or(0) < b.second.number.value_or(0);
        });
        for (const auto& [tensor, place] : wanted) {
            add_tensor(*tensor, place);
            if (error) return;
        }
        for (HubTensor& tensor : tensors) check(tensor);
    }
    void check(HubTensor& tensor) {
        const auto has = [&](const char* word) {
            return tensor.name.find(word) != tensor.name.npos;
        };
        if (!tensor.name.ends_with(".weight") || has("_norm") || has("ffn_gate_inp"))
            tensor.type = valar::TensorType::f32;
        if (tensor.dims.size() > 4)
            return fail(safetensors.bad(*tensor.parts[0].from, "has more than four dimensions"));
        for (const HubPart& part : tensor.parts) {
            const Dtype dtype = part.from->type->dtype;
            if (dtype == Dtype::other || (dtype == Dtype::u8 && !part.scale))
                return fail(safetensors.bad(*part.from, std::string("has the type ") +
                                                            part.from->type->name +
                                                            ", which holds no weights"));
            if (part.from->count == 0) return fail(safetensors.bad(*part.from, "is empty"));
        }
    }

    void misfit(const SafeTensor& from) {
        fail(safetensors.bad(from, "has a shape that config.json does not fit"));
    }
    void add_tensor(const SafeTensor& from, const Place& place) {
        std::string name = place.prefix + place.row->ours;
        // what has no suffix there has one here
        if (name.find(".bias") == name.npos)
            name += place.suffix.empty() ? ".weight" : place.suffix;
        HubPart part = whole(from);
        part.scale = scale_of(from);
        std::vector<uint64_t> dims = reversed(from.shape);
        if (name.ends_with("exp_probs_b.bias")) dims = {from.count};
        const uint64_t rows = part.rows(), columns = part.columns;
        switch (place.row->step) {
            case HubStep::skip: return;
            case HubStep::plain:
            case HubStep::head: break;
            case HubStep::rope:
                if (!(row->traits & permutes)) break;
                if (permute(part, from, name.find("attn_q") != name.npos ? heads : kv_heads)) break;
                return misfit(from);
            case HubStep::thirds:
            case HubStep::groups:
            case HubStep::three: return add_fused(from, place, part);
            case HubStep::turned:
                if (from.shape.size() != 2) break;
                part.counts[2] = part.column_step = columns;
                part.columns = rows;
                part.steps[2] = 1;
                dims = {rows, columns};
                break;
            case HubStep::halves: return add_experts(from, place, part, false);
            case HubStep::interleaved: return add_experts(from, place, part, true);
            case HubStep::down: return add_down(from, name, part);
        }
        add_part(name, dims, part, place.number);
    }

    const SafeTensor* scale_of(const SafeTensor& from) const {
        const std::string& name = from.name;
        if (name.ends_with("_blocks"))
            return safetensors.find(name.substr(0, name.size() - 6) + "scales");
        if (from.type->dtype != Dtype::f8) return nullptr;
        for (const char* end : {"_scale_inv", "_scale"})
            if (const SafeTensor* found = safetensors.find(name + end)) return found;
        return nullptr;
    }

    /// Of each head the first half's rows become the even ones, the second half's the odd ones.
    bool permute(HubPart& part, const SafeTensor& from, uint64_t count) const {
        const bool is_vector = from.shape.size() == 1;
        const uint64_t rows = is_vector ? from.count : part.rows();
        if (from.shape.size() > 2 || rows % (2 * count) != 0) return false;
        const uint64_t half = rows / count / 2, step = is_vector ? 1 : part.columns;
        part.columns = is_vector ? 1 : part.columns;
        const uint64_t counts[] = {count, half, 2}, steps[] = {2 * half * step, step, half * step};
        std::copy(counts, counts + 3, part.counts);
        std::copy(steps, steps + 3, part.steps);
        return true;
    }

    /// Queries, keys and values that lie together by heads, or by the groups that share a key.
    void add_fused(const SafeTensor& from, const Place& place, const HubPart& all) {
        const bool is_vector = from.shape.size() == 1;
        const uint64_t rows = is_vector ? from.count : all.rows();
        const uint64_t groups = place.row->step == HubStep::thirds ? heads : kv_heads;
        const uint64_t queries = heads / groups, size = rows / (groups * (queries + 2));
        if (from.shape.size() > 2 || rows != groups * (queries + 2) * size || size % 2 != 0)
            return misfit(from);
        const bool apart = place.row->step == HubStep::three;
        const uint64_t step = is_vector ? 1 : all.columns, columns = is_vector ? 1 : all.columns;
        const std::string name = place.prefix + place.row->ours;
        HubTensor fused{
            name + place.suffix, natural(from, from.shape.size()), reversed(from.shape), 0, {}, {}};
        for (uint64_t which = 0; which < 3; ++which) {
            HubPart part = all;
            part.columns = columns;
            const uint64_t each = which == 0 ? queries : 1;
            part.first = step * size * (which == 0 ? 0 : queries + which - 1);
            const uint64_t counts[] = {groups, each, size};
            const uint64_t steps[] = {(queries + 2) * size * step, size * step, step};
            std::copy(counts, counts + 3, part.counts);
            std::copy(steps, steps + 3, part.steps);
            if (!apart) {
                fused.parts.push_back(part);
                continue;
            }
            if (which < 2 && row->traits & permutes) add_permuted(name, place, part, which, from);
            else add_part(name + "qkv"[which] + place.suffix, dims_of(part, from), part, {});
        }
        if (apart) return;
        if (!by_name.emplace(fused.name, tensors.size()).second)
            return fail(safetensors.bad(from, "is the second that becomes " + fused.name));
        tensors.push_back(std::move(fused));
    }
    static std::vector<uint64_t> dims_of(const HubPart& part, const SafeTensor& from) {
        if (from.shape.size() == 1) return {part.rows()};
        return {part.columns, part.rows()};
    }
    /// Three steps do not describe groups, heads, halves and turns: a part a group does.
    void add_permuted(const std::string& name, const Place& place, const HubPart& all,
                      uint64_t which, const SafeTensor& from) {
        HubTensor tensor{name + "qkv"[which] + place.suffix,
                         natural(from, from.shape.size()),
                         dims_of(all, from),
                         0,
                         {},
                         {}};
        const uint64_t step = all.steps[2], half = all.counts[2] / 2;
        for (uint64_t group = 0; group < all.counts[0]; ++group) {
            HubPart part = all;
            part.first += group * all.steps[0];
            const uint64_t counts[] = {all.counts[1], half, 2};
            const uint64_t steps[] = {all.steps[1], step, half * step};
            std::copy(counts, counts + 3, part.counts);
            std::copy(steps, steps + 3, part.steps);
            tensor.parts.push_back(part);
        }
        if (!by_name.emplace(tensor.name, tensors.size()).second)
            return fail(safetensors.bad(from, "is the second that becomes " + tensor.name));
        tensors.push_back(std::move(tensor));
    }

    /// What GPT-OSS has of experts: (experts, rows, groups, 16) bytes of MXFP4, (experts, columns,
    /// rows) values, or (experts, rows) biases.
    struct ExpertShape {
        uint64_t experts = 0, rows = 0, columns = 1;
        bool turned = false;
    };
    static ExpertShape expert_shape(const SafeTensor& from, bool turned) {
        const auto& shape = from.shape;
        if (from.name.ends_with("_blocks") && shape.size() == 4 && shape[3] == 16)
            return {shape[0], shape[1], 32 * shape[2], false};
        if (from.name.ends_with("_bias") && shape.size() == 2)
            return {shape[0], shape[1], 1, false};
        if (shape.size() == 3 && turned) return {shape[0], shape[2], shape[1], true};
        if (shape.size() == 3) return {shape[0], shape[1], shape[2], false};
        return {};
    }
    static HubPart expert_part(const HubPart& all, const ExpertShape& shape, uint64_t expert) {
        HubPart part = all;
        part.first = expert * shape.rows * shape.columns;
        part.counts[2] = shape.rows;
        part.steps[2] = shape.turned ? 1 : shape.columns;
        part.columns = shape.columns;
        part.column_step = shape.turned ? shape.rows : 1;
        return part;
    }
    void add_expert_tensor(const SafeTensor& from, HubTensor tensor) {
        if (!by_name.emplace(tensor.name, tensors.size()).second)
            return fail(safetensors.bad(from, "is the second that becomes " + tensor.name));
        tensors.push_back(std::move(tensor));
    }
    static HubTensor expert_tensor(const std::string& name, const SafeTensor& from,
                                   const ExpertShape& shape, uint64_t rows) {
        HubTensor tensor{name, natural(from, 3), {shape.columns, rows, shape.experts}, 0, {}, {}};
        if (name.ends_with(".bias")) {
            tensor.dims = {rows, shape.experts};
            tensor.type = valar::TensorType::f32;
        }
        return tensor;
    }
    void add_down(const SafeTensor& from, const std::string& name, const HubPart& all) {
        const ExpertShape shape = expert_shape(from, true);
        if (shape.experts == 0) return fail(safetensors.bad(from, "has not the shape of experts"));
        HubTensor tensor = expert_tensor(name, from, shape, shape.rows);
        for (uint64_t i = 0; i < shape.experts; ++i)
            tensor.parts.push_back(expert_part(all, shape, i));
        add_expert_tensor(from, std::move(tensor));
    }
    void add_experts(const SafeTensor& from, const Place& place, const HubPart& all,
                     bool interleaved) {
        const ExpertShape shape = expert_shape(from, interleaved);
        if (shape.experts == 0 || shape.rows % 2 != 0)
            return fail(safetensors.bad(from, "has not the shape of experts"));
        const uint64_t half = shape.rows / 2;
        const char* end = from.name.ends_with("_bias") ? ".bias" : ".weight";
        for (uint64_t which = 0; which < 2; ++which) {
            const char* own = which == 0 ? "ffn_gate_exps" : "ffn_up_exps";
            HubTensor tensor = expert_tensor(place.prefix + own + end, from, shape, half);
            for (uint64_t i = 0; i < shape.experts; ++i) {
                HubPart part = expert_part(all, shape, i);
                part.first += which * part.steps[2] * (interleaved ? 1 : half);
                part.steps[2] *= interleaved ? 2 : 1;
                part.counts[2] = half;
                tensor.parts.push_back(part);
            }
            add_expert_tensor(from, std::move(tensor));
        }
    }
};

// ---- What a row of the table cannot say ----------------------------------------------------------

inline void hub_apertus(HubConverter& in) {
    constexpr const char* names[] = {"alpha_n", "alpha_p", "beta", "eps"};
    for (const char* name : names) {
        std::vector<float> numbers(static_cast<size_t>(in.layers));
        for (size_t i = 0; i < numbers.size() && !in.error; ++i) {
            const std::string from = "model.layers." + std::to_string(i) + ".mlp.act_fn." + name;
            const SafeTensor* tensor = in.safetensors.find(from);
            if (!tensor)
                return in.fail(bad_file("safetensors", "tensor '" + from + "' is missing"));
            if (auto done = in.safetensors.read(*tensor, 0, {&numbers[i], 1}); !done)
                return in.fail(done.error());
        }
        in.writer.set_array<float>("xielu." + std::string(name), numbers);
    }
}
inline void hub_minicpm(HubConverter& in) {
    const double layers = static_cast<double>(in.layers);
    in.set_number("residual_scale", in.find("scale_depth").as_double(1.4) / std::sqrt(layers));
    in.set_number("logit_scale",
                  static_cast<double>(in.width) / in.find("dim_model_base").as_double(256));
}
inline void hub_falcon(HubConverter& in) {
    if (in.find("alibi").as_bool()) in.fail_config("'alibi' is not supported");
    in.set_text("tensor_data_layout", "jploski");
    in.set_size("feed_forward_length", in.size("ffn_hidden_size", 4 * in.width));
    if (in.find("max_position_embeddings").is_null()) in.set_size("context_length", 2048);
}
inline void hub_smollm3(HubConverter& in) {
    for (size_t i = 0; i < in.find("no_rope_layers").size(); ++i)
        if (in.find("no_rope_layers")[i].as_int() != ((i + 1) % 4 != 0))
            return in.fail_config("'no_rope_layers' are not every fourth");
}
inline void hub_no_scaling(HubConverter& in) { in.set_text("rope.scaling.type", "none"); }

// clang-format off
inline constexpr HubArchitecture hub_architectures[] = {
    {"LlamaForCausalLM LLaMAForCausalLM MistralForCausalLM MixtralForCausalLM", "llama", permutes},
    {"Ministral3ForCausalLM Mistral3ForConditionalGeneration", "mistral3", permutes},
    {"Qwen2ForCausalLM", "qwen2"},
    {"Qwen2MoeForCausalLM", "qwen2moe"},
    {"Qwen3ForCausalLM", "qwen3"},
    {"Qwen3MoeForCausalLM", "qwen3moe"},
    {"GemmaForCausalLM", "gemma", plus_one | tied},
    {"Gemma2ForCausalLM", "gemma2", plus_one | tied, 1, 2},
    {"Gemma3ForCausalLM Gemma3ForConditionalGeneration", "gemma3", plus_one | tied, 1, 6, nullptr,
     R"({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 131072, "rope_theta": 1000000.0})"},
    {"PhiForCausalLM", "phi2", four_times, 0.5},
    {"Phi3ForCausalLM", "phi3"},
    {"SmolLM3ForCausalLM", "smollm3", permutes, 1, 0, hub_smollm3},
    {"Olmo2ForCausalLM Olmo3ForCausalLM", "olmo2", says_windows, 1, 4},
    {"OlmoeForCausalLM", "olmoe"},
    {"GraniteForCausalLM", "granite", permutes},
    {"GraniteMoeForCausalLM", "granitemoe", permutes},
    {"Glm4ForCausalLM", "glm4", 0, 0.5},
    {"Glm4MoeForCausalLM", "glm4moe", 0, 0.5},
    {"Exaone4ForCausalLM", "exaone4", says_windows, 1, 4},
    {"CohereForCausalLM", "command-r", tied, 1, 0, hub_no_scaling},
    {"Cohere2ForCausalLM", "cohere2", tied, 1, 4, hub_no_scaling},
    {"Ernie4_5ForCausalLM Ernie4_5_ForCausalLM", "ernie4_5"},
    {"Ernie4_5_MoeForCausalLM", "ernie4_5-moe"},
    {"HunYuanDenseV1ForCausalLM", "hunyuan-dense"},
    {"SeedOssForCausalLM", "seed_oss"},
    {"MiniCPMForCausalLM", "minicpm", permutes, 1, 0, hub_minicpm},
    {"InternLM2ForCausalLM", "internlm2", permutes},
    {"StableLmForCausalLM StableLMEpochForCausalLM", "stablelm", 0, 0.25},
    {"Starcoder2ForCausalLM", "starcoder2"},
    {"NemotronForCausalLM", "nemotron", plus_one, 0.5},
    {"ApertusForCausalLM", "apertus", 0, 1, 0, hub_apertus},
    {"GPT2LMHeadModel", "gpt2", four_times | tied},
    {"GPTNeoXForCausalLM", "gptneox", 0, 0.25},
    {"FalconForCausalLM RWForCausalLM", "falcon", four_times, 1, 0, hub_falcon},
    {"GptOssForCausalLM", "gpt-oss", experts_as_wide, 1, 2},
    {"BailingMoeV2ForCausalLM", "bailingmoe2", 0, 0.5},
    {"MiniMaxM2ForCausalLM", "minimax-m2", experts_as_wide},
};
// clang-format on

// ---- The model -----------------------------------------------------------------------------------

class HubModel {
public:
    /// Writes the keys; the tensors are then read by read_rows. `pre`: how the tokenizer splits text,
    /// where its file does not tell.
    static Result<HubModel> open(Files files, const std::string& pre, valar::GgufWriter& writer) {
        auto config = files.json("config.json");
        if (!config) return config.error();
        if (config->size() > kMostSettings || (*config)["text_config"].size() > kMostSettings)
            return bad_file("config.json", "has too many settings");
        const std::string_view name = (*config)["architectures"][0].as_string();
        const HubArchitecture* row = find_row(name);
        if (!row) return unknown_class(name);
        Json merged = *Json::parse(row->defaults);
        const Json &whole = *config, &text = whole["text_config"];
        for (const Json* part : {&whole, &text})  // of a model that also sees
            for (const auto& [key, value] : part->members())
                if (!value.is_null() || !merged.contains(key)) merged.set(key, value);
        auto safetensors = Safetensors::open(files);
        if (!safetensors) return safetensors.error();
        HubConverter in{files, std::move(*safetensors), std::move(merged), row, writer};
        writer.set_string("general.architecture", row->name);
        writer.set_string("general.type", "model");
        in.read_sizes();
        if (!in.error) in.add_tensors();
        const size_t rows = static_cast<size_t>(in.rows_of("token_embd.weight"));
        if (rows == 0 || rows > valar::ModelSpec::max_vocab)
            in.fail(bad_file("safetensors", "there is no embedding of tokens"));
        if (!in.error && row->more) row->more(in);
        if (!in.error) in.write_keys();
        if (in.error) return *in.error;
        std::stable_sort(in.tensors.begin(), in.tensors.end(), [](const auto& a, const auto& b) {
            return layer_of(a.name) < layer_of(b.name);
        });
        if (auto done = write_tokenizer(files, in.config, rows, pre, writer); !done)
            return done.error();
        return HubModel(std::move(in.safetensors), std::move(in.tensors), block_rows(in.config));
    }

    const std::vector<HubTensor>& tensors() const { return tensors_; }
    /// As a GGUF file would have it without any change of type.
    valar::TensorInfo info(size_t index) const {
        const HubTensor& tensor = tensors_[index];
        valar::TensorInfo info;
        info.name = tensor.name;
        info.type = tensor.type;
        info.n_dims = static_cast<uint32_t>(tensor.dims.size());
        std::copy(tensor.dims.begin(), tensor.dims.end(), info.dims);
        info.bytes = valar::type_info(info.type)->block_bytes * info.dims[0] * info.dims[1] *
                     info.dims[2] * info.dims[3];
        return info;
    }
    /// Rows of all matrices one after another, from `first` on.
    Result<void> read_rows(size_t index, uint64_t first, std::span<float> out) const {
        const HubTensor& tensor = tensors_[index];
        if (!tensor.values.empty()) {
            std::copy_n(tensor.values.begin() + static_cast<ptrdiff_t>(first), out.size(),
                        out.begin());
            return {};
        }
        // a vector is one row here, of as many parts' rows as it has values
        const bool is_vector = tensor.parts[0].columns != tensor.dims[0];
        const uint64_t columns = tensor.dims[0];
        uint64_t at = is_vector ? first * columns : first;
        for (const HubPart& part : tensor.parts) {
            const uint64_t rows = part.rows();
            for (; at < rows && !out.empty();) {
                const uint64_t count = std::min(run_of(part, at), out.size() / part.columns);
                if (auto done = read_run(part, at, out.first(count * part.columns)); !done)
                    return done;
                out = add(out, count * part.columns, tensor.add);
                at += count;
            }
            at -= std::min(at, rows);
        }
        return {};
    }

private:
    HubModel(Safetensors safetensors, std::vector<HubTensor> tensors, uint64_t scale_rows)
        : safetensors_(std::move(safetensors)),
          tensors_(std::move(tensors)),
          scale_rows_(scale_rows) {}

    static uint64_t layer_of(const std::string& name) {  // 0: none, else from 1 on
        return name.starts_with("blk.") ? std::strtoull(name.c_str() + 4, nullptr, 10) + 1 : 0;
    }
    static const HubArchitecture* find_row(std::string_view name) {
        for (const HubArchitecture& row : hub_architectures)
            if (!name.empty() && has_word(row.classes, name)) return &row;
        return nullptr;
    }
    static valar::Error unknown_class(std::string_view name) {
        std::string all;
        for (const HubArchitecture& row : hub_architectures) {
            const std::string classes = row.classes;
            all += (all.empty() ? "" : ", ") + replaced(classes, " ", ", ");
        }
        return valar::Error{ErrorKind::unsupported, "config.json: 'architectures' " + shown(name) +
                                                        " is not supported; these are: " + all};
    }
    static uint64_t block_rows(const Json& config) {
        const uint64_t size = config["quantization_config"]["weight_block_size"][0].as_uint();
        return size ? size : 128;
    }
    static std::span<float> add(std::span<float> out, uint64_t count, float number) {
        for (size_t i = 0; number != 0 && i < count; ++i) out[i] += number;
        return out.subspan(static_cast<size_t>(count));
    }

    static uint64_t begin_of(const HubPart& part, uint64_t row) {
        const uint64_t last = row % part.counts[2], rest = row / part.counts[2];
        return part.first + last * part.steps[2] + rest % part.counts[1] * part.steps[1] +
               rest / part.counts[1] * part.steps[0];
    }
    /// Rows from this one on that lie behind one another.
    static uint64_t run_of(const HubPart& part, uint64_t row) {
        const bool dense = part.column_step == 1 && part.steps[2] == part.columns;
        return dense ? part.counts[2] - row % part.counts[2] : 1;
    }
    Result<void> read_run(const HubPart& part, uint64_t row, std::span<float> out) const {
        const uint64_t begin = begin_of(part, row);
        if (part.column_step != 1) return read_turned(part, begin, out);
        if (part.from->type->dtype == Dtype::u8) return read_blocks(part, begin, out);
        if (auto done = safetensors_.read(*part.from, begin, out); !done) return done;
        return part.scale ? scale(part, begin, out) : Result<void>();
    }

    /// Columns that lie apart: all that the part spans is read once and kept for its other rows.
    Result<void> read_turned(const HubPart& part, uint64_t begin, std::span<float> out) const {
        const uint64_t span = (part.columns - 1) * part.column_step + 1 +
                              (part.counts[2] - 1) * part.steps[2];
        if (turned_from_ != part.from || turned_first_ != part.first) {
            turned_.resize(static_cast<size_t>(span));
            if (auto done = safetensors_.read(*part.from, part.first, turned_); !done) return done;
            if (part.scale) return safetensors_.bad(*part.from, "is F8 and its columns are rows");
            turned_from_ = part.from;
            turned_first_ = part.first;
        }
        for (size_t i = 0; i < out.size(); ++i)
            out[i] = turned_[static_cast<size_t>(begin - part.first + i * part.column_step)];
        return {};
    }

    /// MXFP4: 32 values are 16 bytes, two values each, and the exponent of a power of two.
    Result<void> read_blocks(const HubPart& part, uint64_t begin, std::span<float> out) const {
        constexpr float sizes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        std::vector<float> bytes(out.size() / 2), exponents(out.size() / 32);
        if (auto done = safetensors_.read(*part.from, begin / 2, bytes); !done) return done;
        if (auto done = safetensors_.read(*part.scale, begin / 32, exponents); !done) return done;
        for (size_t i = 0; i < out.size(); ++i) {
            const int code = static_cast<int>(bytes[i / 2]) >> (i % 2 * 4) & 15;
            const float size = std::ldexp(sizes[code & 7],
                                          static_cast<int>(exponents[i / 32]) - 127);
            out[i] = code & 8 ? -size : size;
        }
        return {};
    }

    /// F8 values have a scale for all, for each row, or for blocks of rows and columns.
    Result<void> scale(const HubPart& part, uint64_t begin, std::span<float> out) const {
        const SafeTensor &from = *part.from, &of = *part.scale;
        if (scales_of_ != &of) {
            scales_.resize(static_cast<size_t>(of.count));
            if (auto done = safetensors_.read(of, 0, scales_); !done) return done;
            scales_of_ = &of;
        }
        const uint64_t columns = from.shape.back(), rows = from.count / columns;
        const uint64_t down = of.shape.empty() ? 1 : of.shape[0];
        const uint64_t across = of.shape.size() < 2 ? 1 : of.shape[1];
        const uint64_t tall = block_of(rows, down), wide = block_of(columns, across);
        if (from.shape.size() != 2 || of.shape.size() > 2 || tall == 0 || wide == 0)
            return safetensors_.bad(of, "does not fit the shape of what it scales");
        for (size_t i = 0; i < out.size(); ++i) {
            const uint64_t row = (begin + i) / columns, column = (begin + i) % columns;
            out[i] *= scales_[static_cast<size_t>(row / tall * across + column / wide)];
        }
        return {};
    }
    /// How many of n share one of `count` scales; 0: it cannot be.
    uint64_t block_of(uint64_t n, uint64_t count) const {
        if (count == 1) return n;
        if (count == n) return 1;
        return count == (n + scale_rows_ - 1) / scale_rows_ ? scale_rows_ : 0;
    }

    static constexpr size_t kMostSettings = 4096;

    Safetensors safetensors_;
    std::vector<HubTensor> tensors_;
    uint64_t scale_rows_;
    // what was read last of those that are read more than once
    mutable std::vector<float> turned_, scales_;
    mutable const SafeTensor *turned_from_ = nullptr, *scales_of_ = nullptr;
    mutable uint64_t turned_first_ = 0;
};

}  // namespace example

#endif  // VALAR_EXAMPLES_HUB_MODEL_HPP
