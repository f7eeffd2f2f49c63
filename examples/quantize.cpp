// quantize: writes a model as one GGUF file, with smaller weights, packed for quick starts, or both.
//
//     quantize --model model.f16.gguf --type q4_k_m --out model.q4_k_m.gguf
//     quantize --model model.q4_0.gguf --packed --out model.packed.gguf
//     quantize --model folder/ --type q4_k_m --out model.q4_k_m.gguf
//
// A folder is what the hub has of a model: config.json, tokenizer.json and safetensors, in one file
// or in several with an index (hub_model.hpp says which). --type names the type of the matrices, or
// a mix: q4_k_m and q5_k_m are Q4_K and Q5_K, but Q6_K for the output matrix and, in the first and
// last eighth of the layers and every third between, for attn_v and ffn_down. --packed stores
// matrices in the order in which the kernels read them: such a file is not loaded but mapped, it
// starts at once and takes no memory of its own. Only valar reads it; keep the original.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"
#include "hub_model.hpp"
#include "k_quants.hpp"

#include <cctype>
#include <cmath>
#include <thread>

namespace {

using valar::Gguf;
using valar::GgufKey;
using valar::GgufWriter;
using valar::Result;
using valar::TensorInfo;
using valar::TensorType;

constexpr size_t kBlock = 32;

// ---- From 32 values to a block of a type -----------------------------------------------------

void store_half(float value, std::byte* out) {
    const uint16_t bits = valar::float_to_half(value);
    std::memcpy(out, &bits, sizeof bits);
}

float largest_magnitude(const float* x) {  // with its sign
    float most = 0;
    for (size_t i = 0; i < kBlock; ++i)
        if (std::fabs(x[i]) > std::fabs(most)) most = x[i];
    return most;
}

uint8_t code_of(float x, float most) {  // what is not a number counts as 0
    return static_cast<uint8_t>(x > 0 ? std::min(x, most) : 0.0f);
}

// Low halves of 16 bytes are columns 0..15, high halves 16..31.
void store_nibbles(const uint8_t* codes, std::byte* out) {
    for (size_t i = 0; i < kBlock / 2; ++i)
        out[i] = static_cast<std::byte>((codes[i] & 15) | (codes[i + kBlock / 2] & 15) << 4);
}

// Codes of 2 * half levels, half standing for 0; the largest value gets the code 0.
float symmetric_codes(const float* x, int half, uint8_t* codes) {
    const float d = largest_magnitude(x) / static_cast<float>(-half);
    const float inverse = d != 0 ? 1 / d : 0.0f, zero = static_cast<float>(half) + 0.5f;
    for (size_t i = 0; i < kBlock; ++i)
        codes[i] = code_of(x[i] * inverse + zero, static_cast<float>(2 * half - 1));
    return d;
}

void quantize_q4_0(const float* x, size_t, std::byte* out) {
    uint8_t codes[kBlock];
    store_half(symmetric_codes(x, 8, codes), out);
    store_nibbles(codes, out + 2);
}

// Codes 0 .. most from the least value to the largest; stores the scale and the least value.
void codes_from_least(const float* x, float most, uint8_t* codes, std::byte* out) {
    const float least = *std::min_element(x, x + kBlock);
    const float d = (*std::max_element(x, x + kBlock) - least) / most;
    const float inverse = d != 0 ? 1 / d : 0.0f;
    for (size_t i = 0; i < kBlock; ++i) codes[i] = code_of((x[i] - least) * inverse + 0.5f, most);
    store_half(d, out);
    store_half(least, out + 2);
}

void quantize_q4_1(const float* x, size_t, std::byte* out) {
    uint8_t codes[kBlock];
    codes_from_least(x, 15, codes, out);
    store_nibbles(codes, out + 4);
}

// The fifth bits of all codes in 4 bytes, then the lower four.
void store_five_bits(const uint8_t* codes, std::byte* out) {
    uint32_t high = 0;
    for (size_t i = 0; i < kBlock; ++i) high |= static_cast<uint32_t>(codes[i] >> 4) << i;
    std::memcpy(out, &high, sizeof high);
    store_nibbles(codes, out + 4);
}

void quantize_q5_1(const float* x, size_t, std::byte* out) {
    uint8_t codes[kBlock];
    codes_from_least(x, 31, codes, out);
    store_five_bits(codes, out + 4);
}

void quantize_q5_0(const float* x, size_t, std::byte* out) {
    uint8_t codes[kBlock];
    store_half(symmetric_codes(x, 16, codes), out);
    store_five_bits(codes, out + 2);
}

// The code of the value nearest to x; of two, the lower code.
uint8_t nearest_code(const float (&values)[16], float x) {
    size_t best = 0;
    for (size_t i = 1; i < 16; ++i)
        if (std::fabs(values[i] - x) < std::fabs(values[best] - x)) best = i;
    return static_cast<uint8_t>(best);
}

// Numbers of 4 bits, doubled, under a power of two that the largest magnitude chooses.
void quantize_mxfp4(const float* x, size_t, std::byte* out) {
    constexpr float doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const float most = std::fabs(largest_magnitude(x));
    const int exponent = most > 0 ? std::clamp(std::ilogb(most) - 2 + 127, 0, 254) : 0;
    float values[16];
    for (size_t i = 0; i < 16; ++i) values[i] = std::ldexp(doubled[i], exponent - 128);
    uint8_t codes[kBlock];
    for (size_t i = 0; i < kBlock; ++i) codes[i] = nearest_code(values, x[i]);
    out[0] = static_cast<std::byte>(exponent);
    store_nibbles(codes, out + 1);
}

// Sixteen values that lie closer near zero. Of fifteen scales around the one that gives the largest
// magnitude an end of the range, the one whose values are nearest, large ones counting more.
void quantize_iq4_nl(const float* x, size_t, std::byte* out) {
    constexpr float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};
    const float most = largest_magnitude(x);
    float best = 0, d = 0;
    for (int end = -134; most != 0 && end <= -120; ++end) {
        const float inverse = static_cast<float>(end) / most;
        float qx = 0, q2 = 0;  // weighted sums of value * x and of value^2
        for (size_t i = 0; i < kBlock; ++i) {
            const float value = values[nearest_code(values, x[i] * inverse)], weight = x[i] * x[i];
            qx += weight * value * x[i];
            q2 += weight * value * value;
        }
        if (q2 <= 0 || qx * qx <= best * q2) continue;
        best = qx * qx / q2;
        d = qx / q2;
    }
    const float inverse = d != 0 ? 1 / d : 0.0f;
    uint8_t codes[kBlock];
    for (size_t i = 0; i < kBlock; ++i) codes[i] = nearest_code(values, x[i] * inverse);
    store_half(d, out);
    store_nibbles(codes, out + 2);
}

void quantize_q8_0(const float* x, size_t, std::byte* out) {
    const float d = std::fabs(largest_magnitude(x)) / 127;
    const float inverse = d != 0 ? 1 / d : 0.0f;
    store_half(d, out);
    for (size_t i = 0; i < kBlock; ++i) {
        const float code = std::round(x[i] * inverse);
        out[2 + i] = static_cast<std::byte>(std::fabs(code) < 128 ? static_cast<int>(code) : 0);
    }
}

void store_f16(const float* x, size_t n, std::byte* out) {
    for (size_t i = 0; i < n; ++i) store_half(x[i], out + 2 * i);
}

void store_bf16(const float* x, size_t n, std::byte* out) {
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits += 0x7fff + (bits >> 16 & 1);  // to nearest even
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(out + 2 * i, &high, sizeof high);
    }
}

void store_f32(const float* x, size_t n, std::byte* out) { std::memcpy(out, x, n * sizeof(float)); }

/// How a type is made. `store` gets one block of values, or any number where a type has no blocks.
struct Target {
    TensorType type;
    void (*store)(const float* x, size_t n, std::byte* out);
    TensorType smaller_blocks;  // for rows that its blocks do not fill
};
constexpr Target targets[] = {
    {TensorType::f32, store_f32, TensorType::f32},
    {TensorType::f16, store_f16, TensorType::f16},
    {TensorType::bf16, store_bf16, TensorType::bf16},
    {TensorType::q8_0, quantize_q8_0, TensorType::f16},
    {TensorType::q5_1, quantize_q5_1, TensorType::f16},
    {TensorType::q5_0, quantize_q5_0, TensorType::f16},
    {TensorType::q4_1, quantize_q4_1, TensorType::f16},
    {TensorType::q4_0, quantize_q4_0, TensorType::f16},
    {TensorType::iq4_nl, quantize_iq4_nl, TensorType::f16},
    {TensorType::mxfp4, quantize_mxfp4, TensorType::f16},
    {TensorType::q4_k, example::quantize_q4_k, TensorType::q5_0},
    {TensorType::q5_k, example::quantize_q5_k, TensorType::q5_1},
    {TensorType::q6_k, example::quantize_q6_k, TensorType::q8_0},
};

const Target* find_target(TensorType type) {
    for (const Target& target : targets)
        if (type == target.type) return &target;
    return nullptr;
}

/// The target, or what stands in where its blocks do not fill rows of so many columns.
const Target* that_fits(const Target* target, uint64_t columns) {
    while (columns % valar::type_info(target->type)->block_size != 0)
        target = find_target(target->smaller_blocks);
    return target;
}

/// What --type may say. A mix gives more bits to what suffers most from few: the values of
/// attention, and the network's second matrix, in half of the layers.
struct Recipe {
    const char* name;
    TensorType type, output;  // of the output matrix unless --output-type says otherwise
    uint32_t file_type;       // of the key general.file_type
    TensorType more = type;   // of ffn_down and attn_v in some layers
    TensorType fused = type;  // of attn_qkv, in which the values of attention are a part
};
constexpr Recipe recipes[] = {
    {"f32", TensorType::f32, TensorType::f32, 0},
    {"f16", TensorType::f16, TensorType::f16, 1},
    {"bf16", TensorType::bf16, TensorType::bf16, 32},
    {"q8_0", TensorType::q8_0, TensorType::q8_0, 7},
    {"q6_k", TensorType::q6_k, TensorType::q6_k, 18},
    {"q5_k_m", TensorType::q5_k, TensorType::q6_k, 17, TensorType::q6_k, TensorType::q6_k},
    {"q5_1", TensorType::q5_1, TensorType::q8_0, 9},
    {"q5_0", TensorType::q5_0, TensorType::q8_0, 8},
    {"q4_k_m", TensorType::q4_k, TensorType::q6_k, 15, TensorType::q6_k, TensorType::q5_k},
    {"q4_1", TensorType::q4_1, TensorType::q8_0, 3},
    {"q4_0", TensorType::q4_0, TensorType::q8_0, 2},
    {"iq4_nl", TensorType::iq4_nl, TensorType::q8_0, 25},
    {"mxfp4", TensorType::mxfp4, TensorType::q8_0, 38},
};

std::string lower(std::string name) {
    for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return name;
}
const Recipe* find_recipe(const std::string& name) {
    for (const Recipe& recipe : recipes)
        if (lower(name) == recipe.name) return &recipe;
    return nullptr;
}
const Target* find_target(const std::string& name) {
    for (const Target& target : targets)
        if (lower(name) == lower(valar::type_info(target.type)->name)) return &target;
    return nullptr;
}

// ---- Tensors ---------------------------------------------------------------------------------

uint64_t row_bytes(TensorType type, uint64_t columns) {
    const valar::TypeInfo& info = *valar::type_info(type);
    return columns / info.block_size * info.block_bytes;
}

/// Where tensors come from: a GGUF file or a folder of the hub.
struct Origin {
    const Gguf* gguf = nullptr;
    const example::HubModel* folder = nullptr;
};

/// One tensor on its way from file to file. The writer asks for its rows when their turn comes.
struct Job {
    const Origin* from;
    TensorInfo source;
    size_t index;          // of the tensor in a folder
    const Target* target;  // null: the type stays
    std::vector<std::byte> rows = {};
    uint64_t* done = nullptr;  // bytes of all tensors, for the progress line
    uint64_t all = 0;
};

Result<std::vector<float>> read_values(const Job& job, uint64_t first, uint64_t count) {
    const TensorInfo& source = job.source;
    std::vector<float> values(static_cast<size_t>(count * source.dims[0]));
    if (job.from->folder) {
        if (auto done = job.from->folder->read_rows(job.index, first, values); !done)
            return done.error();
        return values;
    }
    const uint64_t bytes = row_bytes(source.type, source.dims[0]);
    std::vector<std::byte> rows(static_cast<size_t>(count * bytes));
    if (auto done = job.from->gguf->read_tensor(source, first * bytes, rows); !done)
        return done.error();
    if (auto done = valar::dequantize(source.type, rows, values); !done) return done.error();
    return values;
}

/// Values to blocks, by all threads of the machine.
void store_values(const Target& target, const std::vector<float>& values, std::byte* out) {
    const valar::TypeInfo& info = *valar::type_info(target.type);
    const size_t step = info.block_size > 1 ? info.block_size : 4096;
    const size_t steps = (values.size() + step - 1) / step;
    const size_t threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 64);
    const auto share = [&](size_t part) {
        for (size_t i = steps * part / threads; i < steps * (part + 1) / threads; ++i)
            target.store(values.data() + i * step, std::min(step, values.size() - i * step),
                         out + i * step / info.block_size * info.block_bytes);
    };
    std::vector<std::thread> helpers;
    for (size_t part = 1; part < threads && steps >= 64; ++part) helpers.emplace_back(share, part);
    share(0);
    for (std::thread& helper : helpers) helper.join();
    for (size_t part = helpers.size() + 1; part < threads; ++part) share(part);
}

/// Rows first .. first + count - 1 as the type that is asked for, not packed.
Result<void> make_rows(Job& job, uint64_t first, uint64_t count, std::byte* out) {
    if (!job.target) {
        const uint64_t bytes = row_bytes(job.source.type, job.source.dims[0]);
        return job.from->gguf->read_tensor(job.source, first * bytes,
                                           {out, static_cast<size_t>(count * bytes)});
    }
    auto values = read_values(job, first, count);
    if (!values) return values.error();
    store_values(*job.target, *values, out);
    return {};
}

Result<void> fill(void* context, const TensorInfo& tensor, uint64_t offset,
                  std::span<std::byte> out) {
    Job& job = *static_cast<Job*>(context);
    const uint64_t columns = tensor.dims[0], each = row_bytes(tensor.type, columns);
    Result<void> made;
    if (!tensor.packed) {
        made = make_rows(job, offset / each, out.size() / each, out.data());
    } else {
        const uint32_t cols = static_cast<uint32_t>(columns);
        const uint64_t tile = valar::packed_bytes(tensor.type, valar::packed_rows, cols);
        const uint64_t first = offset / tile * valar::packed_rows;
        const uint64_t count = std::min(out.size() / tile * valar::packed_rows,
                                        tensor.dims[1] - first);
        job.rows.resize(static_cast<size_t>(count * each));
        made = make_rows(job, first, count, job.rows.data());
        if (made) made = valar::pack_rows(tensor.type, cols, job.rows, out);
    }
    *job.done += out.size();
    if (example::is_terminal(stderr))
        std::fprintf(stderr, "\r%6llu of %llu MB written",
                     static_cast<unsigned long long>(*job.done >> 20),
                     static_cast<unsigned long long>(job.all >> 20));
    return made;
}

struct Wish {
    const Recipe* recipe = nullptr;  // null: types stay
    const Target* output = nullptr;  // of the output matrix; null: the recipe's
    bool packed = false;
};

/// What large products are made with; norms, biases, positions and the routers of experts stay.
bool is_matrix(const TensorInfo& tensor) {
    const auto has = [&](const char* word) { return tensor.name.find(word) != tensor.name.npos; };
    return tensor.n_dims >= 2 && tensor.dims[1] > 1 && valar::can_compute(tensor.type) &&
           tensor.name.ends_with(".weight") && !has("_norm") && !has("ffn_gate_inp") &&
           !has("position_embd");
}

/// The first and the last eighth of the layers, and of those between every third.
bool gets_more_bits(uint64_t layer, uint64_t layers) {
    const uint64_t eighth = layers / 8;
    return layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2;
}

TensorType wanted_type(const Wish& wish, const TensorInfo& tensor, bool is_output,
                       uint64_t layers) {
    if (is_output && wish.output) return wish.output->type;
    const Recipe& recipe = *wish.recipe;
    if (is_output) return recipe.output;
    if (!tensor.name.starts_with("blk.")) return recipe.type;
    const uint64_t layer = std::strtoull(std::string(tensor.name.substr(4)).c_str(), nullptr, 10);
    const auto has = [&](const char* word) { return tensor.name.find(word) != tensor.name.npos; };
    if (has(".attn_qkv.")) return recipe.fused;
    const bool matters = has(".attn_v.") || has(".ffn_down");
    return matters && gets_more_bits(layer, layers) ? recipe.more : recipe.type;
}

/// The tensors of the file that is made, in the order in which they lie in what it is made from.
void add_tensors(std::vector<Job>& jobs, const Wish& wish, uint64_t layers, GgufWriter& writer) {
    bool untied = false;
    for (const Job& job : jobs) untied |= job.source.name == "output.weight";
    for (Job& job : jobs) {  // the writer keeps their addresses
        const bool matrix = is_matrix(job.source);
        const bool output = job.source.name == (untied ? "output.weight" : "token_embd.weight");
        const Target* target = nullptr;
        if (matrix && (wish.recipe || (output && wish.output)))
            target = that_fits(find_target(wanted_type(wish, job.source, output, layers)),
                               job.source.dims[0]);
        if (job.from->folder && !target) target = find_target(job.source.type);
        const bool same = target && job.from->gguf && target->type == job.source.type;
        job.target = same ? nullptr : target;
        TensorInfo to = job.source;
        if (job.target) to.type = job.target->type;
        to.packed = matrix && wish.packed && to.n_dims == 2;
        writer.add_tensor(to, {fill, &job});
    }
}

/// All keys but those that speak of the old file.
void copy_keys(const Gguf& from, const Wish& wish, GgufWriter& writer) {
    for (const GgufKey& key : from.keys())
        if (key.name != "general.alignment" && !key.name.starts_with("split.") &&
            !(wish.recipe &&
              (key.name == "general.file_type" || key.name == "general.quantization_version")))
            writer.set(key);
}

std::vector<Job> jobs_of(const Origin& from) {
    std::vector<Job> jobs;
    if (from.gguf)
        for (const TensorInfo& tensor : from.gguf->tensors())
            jobs.push_back({&from, tensor, 0, {}});
    for (size_t i = 0; from.folder && i < from.folder->tensors().size(); ++i)
        jobs.push_back({&from, from.folder->info(i), i, {}});
    return jobs;
}

uint64_t count_layers(const std::vector<Job>& jobs) {
    uint64_t layers = 0;
    for (const Job& job : jobs)
        if (job.source.name.starts_with("blk."))
            layers = std::max<uint64_t>(
                layers,
                1 + std::strtoull(std::string(job.source.name.substr(4)).c_str(), nullptr, 10));
    return layers;
}

Result<uint64_t> write_model(std::vector<Job>& jobs, const Wish& wish, GgufWriter& writer,
                             const std::string& out) {
    add_tensors(jobs, wish, count_layers(jobs), writer);
    uint64_t done = 0, all = 0;
    for (const Job& job : jobs) {
        const TensorType type = job.target ? job.target->type : job.source.type;
        all += row_bytes(type, job.source.dims[0]) * job.source.dims[1] * job.source.dims[2];
    }
    for (Job& job : jobs) {
        job.done = &done;
        job.all = all;
    }
    auto written = writer.write(out);
    if (example::is_terminal(stderr)) std::fprintf(stderr, "\r%40s\r", "");
    if (!written) return written.error();
    return done;
}

int report(const std::string& out, const std::vector<Job>& jobs, uint64_t after) {
    uint64_t before = 0;
    for (const Job& job : jobs) before += job.source.bytes;
    std::printf("%s: %zu tensors, %.1f MB -> %.1f MB\n", out.c_str(), jobs.size(),
                static_cast<double>(before) * 1e-6, static_cast<double>(after) * 1e-6);
    return 0;
}

void set_type_keys(const Wish& wish, GgufWriter& writer) {
    if (!wish.recipe) return;
    writer.set("general.file_type", wish.recipe->file_type);
    writer.set<uint32_t>("general.quantization_version", 2);
}

int convert_folder(const std::string& model, const std::string& pre, const std::string& out,
                   const Wish& wish) {
    GgufWriter writer(wish.packed ? valar::packed_alignment : 32);
    example::DiskFolder files(model);
    auto folder = example::HubModel::open(files.files(), pre, writer);
    if (!folder) return example::fail(folder.error().message);
    set_type_keys(wish, writer);
    const Origin from{nullptr, &*folder};
    std::vector<Job> jobs = jobs_of(from);
    auto after = write_model(jobs, wish, writer, out);
    return after ? report(out, jobs, *after) : example::fail(after.error().message);
}

int convert_file(const std::string& model, const std::string& out, const Wish& wish) {
    auto gguf = Gguf::open(model);
    if (!gguf) return example::fail(gguf.error().message);
    for (const TensorInfo& tensor : gguf->tensors())
        if (tensor.packed)
            return example::fail(model + ": is packed already; start from the original file");
    GgufWriter writer(wish.packed ? valar::packed_alignment : 32);
    copy_keys(*gguf, wish, writer);
    set_type_keys(wish, writer);
    const Origin from{&*gguf, nullptr};
    std::vector<Job> jobs = jobs_of(from);
    auto after = write_model(jobs, wish, writer, out);
    return after ? report(out, jobs, *after) : example::fail(after.error().message);
}

}  // namespace

int main(int argc, char** argv) {
    std::string model, out, type, output_type, pre;
    Wish wish;
    example::Flags flags(
        "quantize",
        "Writes a model as one GGUF file, with smaller weights or packed for quick starts.");
    flags.add("model", "FILE|FOLDER", &model,
              "GGUF, or a folder of safetensors (default: what fetch_model.py brought)");
    flags.add("out", "FILE", &out, "where to; replaced only when all is written");
    flags.add(
        "type", "TYPE", &type,
        "of the matrices: f32 f16 bf16 q8_0 q6_k q5_k_m q5_1 q5_0 q4_k_m q4_1 q4_0 iq4_nl mxfp4");
    flags.add(
        "output-type", "TYPE", &output_type,
        "of the output matrix (default: q6_k with q4_k_m and q5_k_m, q8_0 with smaller ones)");
    flags.add("packed", &wish.packed,
              "as the kernels read them: mapped, not loaded; for valar only");
    flags.add("pre", "NAME", &pre,
              "of a folder: how its tokenizer splits text, where it is not known");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (model.empty()) model = example::cached_model();
    const bool is_folder = example::is_folder(model);
    if (out.empty()) return example::fail("quantize: --out FILE is missing (see --help)");
    if (out == model) return example::fail("quantize: --out is the model itself");
    if (type.empty() && !wish.packed && !is_folder)
        return example::fail("quantize: nothing to do: pass --type, --packed or both (see --help)");
    if (!type.empty()) wish.recipe = find_recipe(type);
    if (!output_type.empty()) wish.output = find_target(output_type);
    const std::string& wrong = !type.empty() && !wish.recipe ? type : output_type;
    if ((!type.empty() && !wish.recipe) || (!output_type.empty() && !wish.output))
        return example::fail("quantize: there is no type '" + wrong + "' to make (see --help)");
    return is_folder ? convert_folder(model, pre, out, wish) : convert_file(model, out, wish);
}
