// quantize: writes a model file again, with smaller weights, packed for quick starts, or both.
//
//     quantize --model model.f16.gguf --type q4_0 --out model.q4_0.gguf
//     quantize --model model.q4_0.gguf --packed --out model.packed.gguf
//
// --type rounds each weight to the nearest that the type has (the plain scheme of the format's
// reference; models whose makers offer Q4_K or Q6_K files are better taken from there). --packed
// stores matrices in the order in which the kernels read them: such a file is not loaded but mapped,
// it starts at once and takes no memory of its own. Only valar reads it; keep the original.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <cctype>
#include <cmath>

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

void quantize_q4_0(const float* x, std::byte* out) {
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

void quantize_q4_1(const float* x, std::byte* out) {
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

void quantize_q5_1(const float* x, std::byte* out) {
    uint8_t codes[kBlock];
    codes_from_least(x, 31, codes, out);
    store_five_bits(codes, out + 4);
}

void quantize_q5_0(const float* x, std::byte* out) {
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
void quantize_mxfp4(const float* x, std::byte* out) {
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
void quantize_iq4_nl(const float* x, std::byte* out) {
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

void quantize_q8_0(const float* x, std::byte* out) {
    const float d = std::fabs(largest_magnitude(x)) / 127;
    const float inverse = d != 0 ? 1 / d : 0.0f;
    store_half(d, out);
    for (size_t i = 0; i < kBlock; ++i) {
        const float code = std::round(x[i] * inverse);
        out[2 + i] = static_cast<std::byte>(std::fabs(code) < 128 ? static_cast<int>(code) : 0);
    }
}

void store_f16(const float* x, std::byte* out) {
    for (size_t i = 0; i < kBlock; ++i) store_half(x[i], out + 2 * i);
}

void store_bf16(const float* x, std::byte* out) {
    for (size_t i = 0; i < kBlock; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits += 0x7fff + (bits >> 16 & 1);  // to nearest even
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(out + 2 * i, &high, sizeof high);
    }
}

void store_f32(const float* x, std::byte* out) { std::memcpy(out, x, kBlock * sizeof(float)); }

struct Target {
    TensorType type;
    uint32_t file_type;                             // of the key general.file_type
    void (*store)(const float* x, std::byte* out);  // kBlock values
};
constexpr Target targets[] = {
    {TensorType::f32, 0, store_f32},           {TensorType::f16, 1, store_f16},
    {TensorType::bf16, 32, store_bf16},        {TensorType::q8_0, 7, quantize_q8_0},
    {TensorType::q5_0, 8, quantize_q5_0},      {TensorType::q4_1, 3, quantize_q4_1},
    {TensorType::q4_0, 2, quantize_q4_0},      {TensorType::q5_1, 9, quantize_q5_1},
    {TensorType::iq4_nl, 25, quantize_iq4_nl}, {TensorType::mxfp4, 38, quantize_mxfp4},
};

const Target* find_target(std::string name) {
    for (char& c : name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    for (const Target& target : targets)
        if (name == valar::type_info(target.type)->name) return &target;
    return nullptr;
}

// ---- Tensors ---------------------------------------------------------------------------------

uint64_t row_bytes(TensorType type, uint64_t columns) {
    const valar::TypeInfo& info = *valar::type_info(type);
    return columns / info.block_size * info.block_bytes;
}

/// One tensor on its way from file to file. The writer asks for its rows when their turn comes.
struct Job {
    const Gguf* from;
    const TensorInfo* source;
    const Target* target;  // null: the type stays
    std::vector<std::byte> rows = {};
    uint64_t* done = nullptr;  // bytes of all tensors, for the progress line
};

/// Rows first .. first + count - 1 as the type that is asked for, not packed.
Result<void> make_rows(Job& job, uint64_t first, uint64_t count, std::byte* out) {
    const TensorInfo& source = *job.source;
    const uint64_t columns = source.dims[0], from_bytes = row_bytes(source.type, columns);
    const auto read = [&](std::byte* to) {
        return job.from->read_tensor(source, first * from_bytes,
                                     {to, static_cast<size_t>(count * from_bytes)});
    };
    if (!job.target) return read(out);
    std::vector<std::byte> rows(static_cast<size_t>(count * from_bytes));
    if (auto done = read(rows.data()); !done) return done;
    std::vector<float> values(static_cast<size_t>(count * columns));
    if (auto done = valar::dequantize(source.type, rows, values); !done) return done;
    const uint64_t block = row_bytes(job.target->type, kBlock);
    for (size_t i = 0; i < values.size() / kBlock; ++i)
        job.target->store(values.data() + i * kBlock, out + i * block);
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
        std::fprintf(stderr, "\r%6llu MB written",
                     static_cast<unsigned long long>(*job.done >> 20));
    return made;
}

struct Wish {
    const Target* type = nullptr;    // null: as it is
    const Target* output = nullptr;  // of the output matrix
    bool packed = false;
};

bool is_output(const Gguf& from, const TensorInfo& tensor) {
    const char* name = from.find_tensor("output.weight") ? "output.weight" : "token_embd.weight";
    return tensor.name == name;
}

/// What large products are made with; norms, biases and the routers of experts stay as they are.
bool is_matrix(const TensorInfo& tensor) {
    const auto has = [&](const char* word) { return tensor.name.find(word) != tensor.name.npos; };
    return tensor.n_dims >= 2 && tensor.dims[1] > 1 && valar::can_compute(tensor.type) &&
           tensor.name.ends_with(".weight") && !has("_norm") && !has("ffn_gate_inp");
}

void add_tensors(const Gguf& from, const Wish& wish, std::vector<Job>& jobs, GgufWriter& writer) {
    jobs.reserve(from.tensors().size());  // the writer keeps their addresses
    for (const TensorInfo& tensor : from.tensors()) {
        const bool matrix = is_matrix(tensor);
        const Target* target = is_output(from, tensor) ? wish.output : wish.type;
        const bool fits = matrix && target && tensor.dims[0] % kBlock == 0;
        jobs.push_back({&from, &tensor, fits && target->type != tensor.type ? target : nullptr});
        TensorInfo to = tensor;
        if (jobs.back().target) to.type = target->type;
        to.packed = matrix && wish.packed && tensor.n_dims == 2;
        writer.add_tensor(to, {fill, &jobs.back()});
    }
}

/// All keys but those that speak of the old file.
void copy_keys(const Gguf& from, const Wish& wish, GgufWriter& writer) {
    for (const GgufKey& key : from.keys())
        if (key.name != "general.alignment" && !key.name.starts_with("split.") &&
            !(wish.type &&
              (key.name == "general.file_type" || key.name == "general.quantization_version")))
            writer.set(key);
    if (!wish.type) return;
    writer.set("general.file_type", wish.type->file_type);
    writer.set<uint32_t>("general.quantization_version", 2);
}

}  // namespace

int main(int argc, char** argv) {
    std::string model, out, type, output_type;
    Wish wish;
    example::Flags flags(
        "quantize", "Writes a model file again, with smaller weights or packed for quick starts.");
    flags.add("model", "FILE", &model, "a GGUF file (default: what fetch_model.py brought)");
    flags.add("out", "FILE", &out, "where to; replaced only when all is written");
    flags.add("type", "TYPE", &type,
              "of the matrices: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl mxfp4");
    flags.add("output-type", "TYPE", &output_type,
              "of the output matrix (default: q8_0 with a smaller --type)");
    flags.add("packed", &wish.packed,
              "as the kernels read them: mapped, not loaded; for valar only");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (model.empty()) model = example::cached_model();
    if (out.empty()) return example::fail("quantize: --out FILE is missing (see --help)");
    if (out == model) return example::fail("quantize: --out is the model itself");
    if (type.empty() && !wish.packed)
        return example::fail("quantize: nothing to do: pass --type, --packed or both (see --help)");
    const Target* smaller = find_target(type);
    if (output_type.empty())
        output_type = smaller && valar::type_info(smaller->type)->block_size > 1 ? "q8_0" : type;
    const struct {
        const std::string& name;
        const Target*& to;
    } types[] = {{type, wish.type}, {output_type, wish.output}};
    for (const auto& [name, to] : types)
        if (!name.empty() && !(to = find_target(name)))
            return example::fail("quantize: there is no type '" + name + "' to make (see --help)");

    auto from = Gguf::open(model);
    if (!from) return example::fail(from.error().message);
    for (const TensorInfo& tensor : from->tensors())
        if (tensor.packed)
            return example::fail(model + ": is packed already; start from the original file");
    GgufWriter writer(wish.packed ? valar::packed_alignment : 32);
    copy_keys(*from, wish, writer);
    std::vector<Job> jobs;
    add_tensors(*from, wish, jobs, writer);
    uint64_t before = 0, after = 0;
    for (Job& job : jobs) {
        before += job.source->bytes;
        job.done = &after;
    }
    auto written = writer.write(out);
    if (example::is_terminal(stderr)) std::fprintf(stderr, "\r%24s\r", "");
    if (!written) return example::fail(written.error().message);
    std::printf("%s: %zu tensors, %.1f MB -> %.1f MB\n", out.c_str(), jobs.size(),
                static_cast<double>(before) * 1e-6, static_cast<double>(after) * 1e-6);
    return 0;
}
