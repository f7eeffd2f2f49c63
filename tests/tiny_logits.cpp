// Logits for scripts, from the CPU backend.
//
//     tiny_logits --sha256                           of the tiny models' logits: every weight type, both
//                                                    precisions and kv types, prompts in several pieces
//     tiny_logits --sha256 5                         of every fifth of these rounds, for slow machines
//     tiny_logits --isas                             the kernel tables of this machine
//     tiny_logits MODEL OUT fast|fine f16|f32|q8_0 ID...  of every position, raw binary32, to OUT
#include "digest_internal.hpp"
#include "run_model.hpp"
#include "tiny_model.hpp"

namespace {

using namespace valar;

[[noreturn]] void die(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

// The logits of all positions, row after row; the prompt in batches of `piece`.
std::vector<float> all_logits(Result<Gguf> file, const std::vector<Token>& ids, Precision precision,
                              KvType kv_type, size_t piece, int helpers) {
    BackendOptions options;
    options.precision = precision;
    options.kv_type = kv_type;
    options.kv_pages = uint32_t(ids.size() / 16 + 1);
#if defined(__wasi__)
    helpers = 0;  // no threads to be had
#endif
    options.threads = helpers;
    options.max_logit_rows = options.max_batch_rows;
    auto model = run_model::Model::open(std::move(file), options);
    if (!model) die(model.error().message);
    const auto pages = run_model::page_list(0, options.kv_pages, true);
    std::vector<float> logits;
    for (size_t i = 0; i < ids.size(); i += piece) {
        const std::span<const Token> part(ids.data() + i, std::min(piece, ids.size() - i));
        auto rows = run_model::make_rows(part, uint32_t(i), pages, true);
        for (BatchRow& row : rows) row.long_rope = ids.size() > model->spec->n_rope_context;
        if (auto ran = model->run(rows); !ran) die(ran.error().message);
        for (uint32_t row = 0; row < rows.size(); ++row) {
            const auto values = model->logits(row);
            logits.insert(logits.end(), values.begin(), values.end());
        }
    }
    return logits;
}

int print_sha256(int every) {
    detail::Sha256 hash;
    std::vector<Token> ids(280);  // crosses a segment of attention
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = Token((i * 37 + 11) % 299);
    int round = 0;
    for (const std::string_view architecture : {"llama", "qwen2"}) {
        for (const Precision precision : {Precision::fast, Precision::fine}) {
            for (const KvType kv_type : {KvType::f16, KvType::f32, KvType::q8_0}) {
                const int at = round++;
                if (at % every) continue;
                tiny::Options options;
                options.architecture = architecture;
                options.types = tiny::all_types();
                const auto bytes = tiny::model(options);
                const size_t pieces[] = {280, 1, 7, 64};  // no bit may depend on these two
                const auto logits = all_logits(Gguf::from_bytes(bytes), ids, precision, kv_type,
                                               pieces[at % 4], at % 3);
                hash.update({reinterpret_cast<const char*>(logits.data()), logits.size() * 4});
            }
        }
    }
    std::printf("%s\n", hash.finish().hex().c_str());
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string first = argc > 1 ? argv[1] : "";
    if (first == "--sha256") return print_sha256(argc > 2 ? std::max(std::atoi(argv[2]), 1) : 1);
    if (first == "--isas") {
        for (const detail::Kernels* table : detail::available_kernels()) std::puts(table->name);
        return 0;
    }
    if (argc < 6)
        die("usage: tiny_logits --sha256 | --isas | MODEL OUT fast|fine f16|f32|q8_0 ID...");
    std::vector<Token> ids;
    for (int i = 5; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
    const std::string precision = argv[3], kv = argv[4];
    const auto logits = all_logits(Gguf::open(first), ids,
                                   precision == "fine" ? Precision::fine : Precision::fast,
                                   kv == "f32"    ? KvType::f32
                                   : kv == "q8_0" ? KvType::q8_0
                                                  : KvType::f16,
                                   64, 1);
    std::FILE* file = std::fopen(argv[2], "wb");
    const bool written = file &&
                         std::fwrite(logits.data(), 4, logits.size(), file) == logits.size();
    if (!file || std::fclose(file) != 0 || !written)
        die(std::string(argv[2]) + ": cannot be written");
    return 0;
}
