// Prefill and decode speed of a model file, one JSON line; compare.py runs it beside a peer.
//     speed MODEL THREADS PROMPT DECODE ROUNDS
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

namespace {

using namespace valar::detail;

[[noreturn]] void die(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

template <class T>
T checked(valar::Result<T> result) {
    if (!result) die(result.error().message);
    if constexpr (!std::is_void_v<T>) return std::move(*result);
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6) die("usage: speed MODEL THREADS PROMPT DECODE ROUNDS");
    const uint32_t n_prompt = uint32_t(std::atoi(argv[3])), n_decode = uint32_t(std::atoi(argv[4]));
    const int rounds = std::atoi(argv[5]);
    valar::BackendOptions options;
    options.threads = std::atoi(argv[2]) - 1;
    options.page_tokens = 16;
    options.kv_pages = (n_prompt + n_decode) / 16 + 1;

    const auto gguf = checked(valar::Gguf::open(argv[1]));
    const auto spec = checked(valar::read_model_spec(gguf));
    const auto tensors = checked(valar::bind_model_tensors(gguf, spec));
    const auto backend = checked(open_cpu_backend(gguf, spec, tensors, options));
    while (!checked(backend->load(UINT64_MAX, nullptr))) {}

    std::vector<uint32_t> pages(options.kv_pages);
    for (uint32_t i = 0; i < options.kv_pages; ++i) pages[i] = i;
    const auto run = [&](uint32_t first, uint32_t count) {
        std::vector<BatchRow> rows(count);
        for (uint32_t i = 0; i < count; ++i) {
            rows[i].token = valar::Token((uint64_t{first + i} * 37 + 11) % spec.n_vocab);
            rows[i].position = first + i;
            rows[i].pages = pages.data();
        }
        rows.back().logits = true;
        checked(backend->begin(rows));
        while (!checked(backend->advance(0))) {}
    };
    std::vector<double> prefill, decode;
    for (int round = 0; round < rounds; ++round) {
        uint64_t start = monotonic_ns();
        for (uint32_t i = 0; i < n_prompt; i += options.max_batch_rows)
            run(i, std::min(n_prompt - i, options.max_batch_rows));
        prefill.push_back(1e9 * n_prompt / double(monotonic_ns() - start));
        start = monotonic_ns();
        for (uint32_t i = 0; i < n_decode; ++i) run(n_prompt + i, 1);
        decode.push_back(1e9 * n_decode / double(monotonic_ns() - start));
    }
    std::printf("{\"prefill\": %.1f, \"decode\": %.1f, \"rounds\": %d}\n", median(prefill),
                median(decode), rounds);
}
