// The CPU backend: one set of bits, however the work is cut up.
#include <doctest/doctest.h>

#include "backend/cpu_trials.hpp"
#include "digest_internal.hpp"
#include "kernels/layout.hpp"
#include "run_model.hpp"
#include "sample.hpp"
#include "tiny_model.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <string>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

using namespace run_model;

namespace {

// THE digest: logits of tiny models of every weight type, of all positions; f16 cache, one plane.
// It changes only with detail::kNumerics.
constexpr std::string_view kLogitsSha256 =
    "af839c998935b3b7c3b4c9696cec767fb155ad2c9c2ecbb233034d0ed5591c39";
constexpr std::string_view kLogitsSha256_f32 =
    "898b05c3dc010110828391271aa1312c178a9a4f8a8b89d817e7ab6a64fb8001";
constexpr std::string_view kLogitsSha256_fine =
    "5dc10a2f8bcede576984145001ee4626e1a8d0c76a9dc22545d5efe7faba8409";
constexpr std::string_view kLogitsSha256_fine_q8_0 =
    "0c051d2f17663c492ab6874ae6e010bb5f0a6153b0fecce1b925338b537a5575";
constexpr std::string_view kLogitsSha256_fine_f32 =
    "174dd6b2c4c814dc3ff13ed3578803666144d13eb0b95ec1fc8c04fef05b4b5e";

// The same of one weight type each, whatever the table of kernels. A type that is new gets a row
// here and changes none of those above.
struct TypeDigest {
    TensorType type;
    std::string_view sha256;
};
constexpr TypeDigest type_digests[] = {
    {TensorType::q8_0, "4be34f1b88a0e11d35ae8d63b5449f9b53a248341d56367d733df0fba19ee5d3"},
    {TensorType::q4_k, "60ebf160ab6d43277966f17addb4dc72df29efd5acfb56454c906126e0248b39"},
    {TensorType::q6_k, "99123b75aac6f354b9a93d0360fcd30f53121980615f3298bfbb631998b8ffd6"},
    {TensorType::q4_1, "cec138b2b88b4b0165971ffdf75b588fc503b9f7180851744ab65ea040a4151f"},
    {TensorType::q5_k, "a4734edbf88c0d65c2e919715558857ab2ece980a22fd78614da8a71ca75707a"},
    {TensorType::q4_0, "065add12ec1ef198108a7ee4586942d677202c22006030a5852e8c560a003380"},
    {TensorType::q5_0, "0a712076cc9f3d5d90408daf911bea5ef73e4aa07a053143726eff0971515c80"},
    {TensorType::f16, "17e5eaca1fd57e38b77c50a06a7f6f6babfaac500272da462f657ef24b0caecb"},
    {TensorType::bf16, "1644260d7ec3d493e8e3d2ec7eee2534fabf5303d1686d5088e856eb23d6461e"},
    {TensorType::f32, "fe15d701690812c10e79724cf4d53c48bd050d5813f91e276f871a72a9d4aa02"},
    {TensorType::q5_1, "14f3df025e20cb206214889f9b7b6843a9a4848083cce3be45ae2c1f2f0da09e"},
    {TensorType::iq4_nl, "4929421f568ee681c2a8c0079346d67ba7ef01e90e2e6f5e4bf3bb97c5a73361"},
    {TensorType::mxfp4, "df5652d8cbbbd3cc5ea301b19ec5baca1c0fdf25f65fdb753b3abad833552824"},
    {TensorType::nvfp4, "ffe49c1993545c123b90381943031b34bdf9fbf2f8637dfb21ff8bb7929a225d"},
    {TensorType::q2_k, "471348a9ebac319127064448c5c65cdb05730b84c33aadff801edc2d56869513"},
    {TensorType::q3_k, "8b1f58ff6a51bf6857a9a61f8e9b8877894ff21745fdcef5c950e3cb0892c562"},
    {TensorType::iq4_xs, "a93d63146ecabb546e729b59c459178d9aaac9cb65b4afece98bc508e8ffc05a"},
    {TensorType::iq3_s, "fdbd96292f1958228d80e46b5225c4d33ec15046264ba5e1ad2eb72686d6957c"},
    {TensorType::iq3_xxs, "0175e77862114350e219a11d66e07e092146de1a87a6b0d2d80cfe3d433e1148"},
    {TensorType::iq2_s, "d9ca6399d89fbb69ab3aa35a6a5363bae6916414f200de0da35034bcccfb5771"},
    {TensorType::iq2_xs, "8e11123d652c66576a154f590a358d825f3681bc215dd339af424378c4d5f1c7"},
    {TensorType::iq2_xxs, "50aa5e5d3a83e365db1237cbda3e81bc50f106f49ea81ed77f93e69855654cdd"},
    {TensorType::iq1_s, "1c1157577836b6273d818b0805c10ee1e1b32e6fcc25a938bd4eb6707d28592d"},
    {TensorType::iq1_m, "2ca5eaf7ef5119193e311c490367f456f466aec8ed6456f794d2ae9ee7653f49"},
    {TensorType::tq1_0, "f47a34613566f6cddf44c31693c25a39556a9ead509c87727dd3e55725492a19"},
    {TensorType::tq2_0, "0c4dcce046c71e8c206bf3cbb519fc98052027dfdf90323dd93c09997ab8a808"},
};

// How a prompt is computed; nothing of this may show.
struct Way {
    size_t piece = 1000;
    uint64_t pause_ns = 0;
    bool backwards = false;  // pages in another order
    bool flush_to_zero = false;
    BackendOptions options = {};
    const detail::Kernels* kernels = nullptr;
};

std::vector<Token> prompt(size_t length, uint32_t salt = 11) {
    std::vector<Token> ids(length);
    for (size_t i = 0; i < length; ++i) ids[i] = static_cast<Token>((i * 37 + salt) % 299);
    return ids;
}

struct FlushToZero {
#if defined(__SSE__)
    unsigned saved = _mm_getcsr();
    explicit FlushToZero(bool on) {
        if (on) _mm_setcsr(saved | 0x8040);
    }
    ~FlushToZero() { _mm_setcsr(saved); }
#else
    explicit FlushToZero(bool) {}
    ~FlushToZero() {}
#endif
};

Model open_tiny(const std::vector<std::byte>& bytes, const BackendOptions& options,
                const detail::Kernels* kernels = nullptr) {
    auto model = Model::open(Gguf::from_bytes(bytes), options, kernels);
    INFO((model ? "" : model.error().message));
    REQUIRE(model);
    return std::move(*model);
}

BackendOptions small(BackendOptions options = {}) {
    options.kv_pages = 512 / options.page_tokens;
    options.max_batch_rows = options.max_logit_rows = 300;
    if (options.threads < 0) options.threads = 0;
    return options;
}

// Logits of all positions, row after row.
std::vector<float> all_logits(Model& model, const std::vector<Token>& ids, const Way& way) {
    const uint32_t page_tokens = way.options.page_tokens;
    const auto pages = page_list(0, 512 / page_tokens, way.backwards);
    std::vector<float> out;
    for (size_t i = 0; i < ids.size(); i += way.piece) {
        const std::span<const Token> part(ids.data() + i, std::min(way.piece, ids.size() - i));
        REQUIRE(model.run(make_rows(part, static_cast<uint32_t>(i), pages, true), way.pause_ns));
        for (uint32_t row = 0; row < part.size(); ++row) {
            const auto logits = model.logits(row);
            out.insert(out.end(), logits.begin(), logits.end());
        }
    }
    return out;
}

std::vector<float> logits_of(const std::vector<std::byte>& bytes, size_t length, const Way& way) {
    const FlushToZero flush(way.flush_to_zero);
    Model model = open_tiny(bytes, small(way.options), way.kernels);
    return all_logits(model, prompt(length), way);
}

// A model with all types, biases and an output matrix of its own; long enough for two segments.
const std::vector<std::byte>& mixed_model() {
    static const auto bytes = tiny::model(
        {.architecture = "qwen2", .types = tiny::all_types(), .tied = false, .rope_factors = true});
    return bytes;
}

std::string hash_of(const std::vector<float>& logits) {
    return detail::sha256(logits.data(), logits.size() * sizeof(float)).hex();
}

// One model a type, and the mixed one.
std::string hash_all_types(const Way& way) {
    detail::Sha256 hash;
    const auto add = [&](const std::vector<float>& logits) {
        hash.update(logits.data(), logits.size() * sizeof(float));
    };
    for (const TensorType type : tiny::all_types())
        add(logits_of(tiny::model({.types = {type}}), 20, way));
    add(logits_of(mixed_model(), 280, way));
    return hash.finish().hex();
}

const std::string& mixed_hash() {
    static const std::string hash = hash_of(logits_of(mixed_model(), 280, {}));
    return hash;
}

void check_way(const Way& way) {
    CHECK(hash_of(logits_of(mixed_model(), 280, way)) == mixed_hash());
}

// A host's job system: a thread a job, the last one first.
void host_parallel_for(void* context, uint32_t count, void (*job)(void*, uint32_t),
                       void* argument) {
    std::vector<std::thread> threads;
    for (uint32_t i = count; i-- > 0;) threads.emplace_back(job, argument, i);
    for (std::thread& thread : threads) thread.join();
    ++*static_cast<int*>(context);
}

}  // namespace

TEST_CASE("logits: one SHA-256 for every kernel table") {
    for (const detail::Kernels* kernels : detail::available_kernels()) {
        CAPTURE(std::string(kernels->name));
        Way way;
        way.kernels = kernels;
        if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256);
    }
}

TEST_CASE("logits: one SHA-256 for every weight type") {
    for (const detail::PackedLayout& layout : detail::packed_layouts) {
        const auto has = [&](const TypeDigest& row) { return row.type == layout.type; };
        CAPTURE(std::string(type_info(layout.type)->name));
        CHECK(std::count_if(std::begin(type_digests), std::end(type_digests), has) == 1);
    }
    for (const TypeDigest& row : type_digests)
        for (const detail::Kernels* kernels : detail::available_kernels()) {
            CAPTURE(std::string(type_info(row.type)->name));
            CAPTURE(std::string(kernels->name));
            Way way;
            way.kernels = kernels;
            if (!in_sample()) continue;
            CHECK(hash_of(logits_of(tiny::model({.types = {row.type}}), 20, way)) == row.sha256);
        }
}

TEST_CASE("logits: kv_type and precision are the options that change bits") {
    Way way;
    way.options.kv_type = KvType::f32;
    if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256_f32);
    way.options.precision = Precision::fine;
    if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256_fine_f32);
    way.options.kv_type = KvType::f16;
    if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256_fine);
    way.options.kv_type = KvType::q8_0;
    if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256_fine_q8_0);
}

TEST_CASE("logits: keys and values in q8_0, one SHA-256 however they are computed") {
    Way way;
    way.options.kv_type = KvType::q8_0;
    const auto digest = [&] { return hash_of(logits_of(mixed_model(), 280, way)); };
    const std::string whole = digest();
    CHECK(whole != mixed_hash());
    for (const detail::Kernels* kernels : detail::available_kernels()) {
        way.kernels = kernels;
        CHECK(digest() == whole);
    }
    way.kernels = nullptr;
    for (const size_t piece : {1u, 7u, 64u}) {
        way.piece = piece;
        way.options.threads = 2;
        way.options.page_tokens = piece == 64 ? 64 : 16;
        way.backwards = !way.backwards;
        CHECK(digest() == whole);
    }
}

TEST_CASE("logits: threads") {
    for (const int threads : {1, 2, 4}) {
        CAPTURE(threads);
        Way way;
        way.options.threads = threads;
        check_way(way);
        way.piece = 1;
        check_way(way);
    }
}

TEST_CASE("logits: weights read in place") {
    Way way;
    way.options.weights = Weights::mapped;
    for (const size_t piece : {size_t{1000}, size_t{1}}) {
        way.piece = piece;
        if (in_sample()) CHECK(hash_all_types(way) == kLogitsSha256);
    }
    way.options.threads = 2;
    check_way(way);
}

TEST_CASE("logits: weights that the file holds packed") {
    const std::vector<std::byte> bytes = tiny::packed_copy(mixed_model());
    auto memory = detail::Buffer::allocate(bytes.size() + 64, "a model");
    REQUIRE(memory);
    GgufReader reader;
    reader.size = bytes.size();
    reader.context = const_cast<std::byte*>(bytes.data());
    reader.read = [](void* context, uint64_t offset, void* dst, size_t size) {
        std::memcpy(dst, static_cast<const std::byte*>(context) + offset, size);
        return true;
    };
    const auto check = [&](Result<Gguf> gguf, Weights weights, bool in_place) {
        Way way;
        way.options = small();
        way.options.weights = weights;
        auto model = Model::open(std::move(gguf), way.options);
        REQUIRE(model);
        CHECK(hash_of(all_logits(*model, prompt(280), way)) == mixed_hash());
        const auto plan = detail::plan_cpu_backend(*model->gguf, *model->spec, model->tensors,
                                                   way.options);
        CHECK((plan->mapped > bytes.size() / 2) == in_place);
        CHECK((plan->weights > bytes.size() / 2) != in_place);
    };
    for (const Weights weights : {Weights::packed, Weights::mapped})
        for (const size_t offset :
             {size_t{0}, size_t{32}}) {  // the second is not where the kernels can read it
            std::byte* at = memory->data() + offset;
            std::memcpy(at, bytes.data(), bytes.size());
            check(Gguf::from_bytes({at, bytes.size()}), weights, offset == 0);
        }
    check(Gguf::from_reader(reader), Weights::packed, false);
}

// A file made before a change of the layout must not be taken for one made after it.
TEST_CASE("packed layouts change only with packed_version") {
    const std::vector<std::byte> bytes = tiny::packed_copy(mixed_model());
    CHECK(detail::packed_version == 1);
    CHECK(detail::sha256(bytes.data(), bytes.size()).hex() ==
          "cc625ee61168ed02bf1fe0aea3b8d9cb76dcbb9e5335f9e8a325e557e50e12da");
}

TEST_CASE("logits: layers with a window") {
    const auto bytes = [](uint32_t window, uint32_t full_every = 0) {
        return tiny::model(
            {.types = {TensorType::q8_0}, .window = window, .full_every = full_every});
    };
    const auto all = [&](const std::vector<std::byte>& model) { return logits_of(model, 280, {}); };
    const std::vector<float> unlimited = all(bytes(0));
    const auto changed_from = [&](const std::vector<float>& logits) {  // the first position
        const size_t vocab = logits.size() / 280;
        const auto at = std::mismatch(logits.begin(), logits.end(), unlimited.begin()).first;
        return static_cast<size_t>(at - logits.begin()) / vocab;
    };
    CHECK(all(bytes(280)) == unlimited);
    CHECK(changed_from(all(bytes(279))) == 279);
    CHECK(changed_from(all(bytes(20))) == 20);
    CHECK(changed_from(all(bytes(1))) == 1);
    CHECK(all(bytes(20, 2)) != all(bytes(20)));
    CHECK(all(bytes(20, 1)) == unlimited);

    // However it is computed, and whatever lies in pages that no window reaches.
    const auto windowed = bytes(20);
    const std::string expected = hash_of(all(windowed));
    for (const detail::Kernels* kernels : detail::available_kernels())
        for (const size_t piece : {1u, 7u, 300u})
            for (const KvType kv_type : {KvType::f16, KvType::q8_0}) {
                CAPTURE(kernels->name);
                CAPTURE(piece);
                Way way;
                way.kernels = kernels;
                way.piece = piece;
                way.options.kv_type = kv_type;
                way.options.threads = piece == 7 ? 2 : 0;
                if (!in_sample()) continue;
                const std::string hash = hash_of(logits_of(windowed, 280, way));
                if (kv_type == KvType::f16) CHECK(hash == expected);
                Model model = open_tiny(windowed, small(way.options), kernels);
                std::vector<uint32_t> pages = page_list(0, 32);
                const auto ids = prompt(280);
                std::vector<float> logits;
                for (uint32_t i = 0; i < 280; i += static_cast<uint32_t>(piece)) {
                    const uint32_t page = (std::max(i, 19u) - 19) / 16;
                    std::fill(pages.begin(), pages.begin() + page, UINT32_MAX);
                    const auto part = std::span(ids).subspan(i, std::min<size_t>(piece, 280 - i));
                    REQUIRE(model.run(make_rows({part.begin(), part.end()}, i, pages, true)));
                    for (uint32_t row = 0; row < part.size(); ++row)
                        logits.insert(logits.end(), model.logits(row).begin(),
                                      model.logits(row).end());
                }
                CHECK(hash_of(logits) == hash);
            }

    // One layer: a token outside the window is never looked at, the last one inside is.
    const auto one = tiny::model({.n_layers = 1, .window = 20});
    Model model = open_tiny(one, small());
    const auto pages = page_list(0, 32);
    const auto last = [&](size_t changed) {
        auto ids = prompt(60);
        if (changed < 60) ids[changed] = (ids[changed] + 1) % 299;
        REQUIRE(model.run(make_rows(ids, 0, pages, true)));
        return std::vector<float>(model.logits(59).begin(), model.logits(59).end());
    };
    CHECK(last(39) == last(60));
    CHECK(last(40) != last(60));
}

TEST_CASE("logits: the host's job system") {
    int joins = 0;
    Way way;
    way.options.threads = 2;
    way.options.parallel_for = {host_parallel_for, &joins};
    check_way(way);
    CHECK(joins > 0);
}

TEST_CASE("logits: the prompt in pieces, paused between stages") {
    for (const size_t piece : {1u, 3u, 7u, 64u}) {
        CAPTURE(piece);
        Way way;
        way.piece = piece;
        check_way(way);
        way.options.threads = 1;
        way.pause_ns = 1;
        check_way(way);
    }
}

TEST_CASE("logits: pages") {
    for (const uint32_t page_tokens : {16u, 64u, 256u}) {
        CAPTURE(page_tokens);
        Way way;
        way.piece = 100;
        way.options.page_tokens = page_tokens;
        check_way(way);
        way.backwards = true;
        check_way(way);
    }
}

TEST_CASE("logits: flush to zero set by the caller") {
    Way way;
    way.flush_to_zero = true;
    way.options.threads = 1;
    check_way(way);
}

TEST_CASE("logits: rows that do not want them change nothing") {
    Model model = open_tiny(mixed_model(), small());
    const auto pages = page_list(0, 32);
    const auto ids = prompt(50);
    const auto expected = all_logits(model, ids, {});
    auto rows = make_rows(ids, 0, pages, false);
    rows[7].logits = rows[49].logits = true;
    REQUIRE(model.run(rows));
    const size_t n = model.spec->n_vocab;
    CHECK(std::equal(expected.begin() + static_cast<ptrdiff_t>(7 * n),
                     expected.begin() + static_cast<ptrdiff_t>(8 * n), model.logits(0).begin()));
    CHECK(std::equal(expected.begin() + static_cast<ptrdiff_t>(49 * n), expected.end(),
                     model.logits(1).begin()));
}

TEST_CASE("logits: sequences mixed in batches equal each alone") {
    for (const int threads : {0, 1}) {
        BackendOptions options;
        options.threads = threads;
        Model model = open_tiny(mixed_model(), small(options));
        const size_t lengths[] = {40, 33, 21}, n = model.spec->n_vocab;
        std::vector<float> alone[3], together[3];
        std::vector<uint32_t> pages[3];
        for (uint32_t i = 0; i < 3; ++i) {
            pages[i] = page_list(i * 8, 8);
            for (size_t at = 0; at < lengths[i]; ++at) {
                const auto ids = prompt(lengths[i], i);
                REQUIRE(model.run(make_rows(std::span(ids).subspan(at, 1),
                                            static_cast<uint32_t>(at), pages[i], true)));
                const auto logits = model.logits(0);
                alone[i].insert(alone[i].end(), logits.begin(), logits.end());
            }
        }
        const uint32_t steps[] = {5, 1, 3};  // rows a batch, while there are any
        uint32_t done[3] = {};
        for (bool more = true; more;) {
            std::vector<BatchRow> batch;
            std::vector<uint32_t> owners;
            for (uint32_t i = 0; i < 3; ++i) {
                const auto ids = prompt(lengths[i], i);
                const uint32_t count = std::min(steps[i],
                                                static_cast<uint32_t>(lengths[i]) - done[i]);
                for (const auto& row :
                     make_rows(std::span(ids).subspan(done[i], count), done[i], pages[i], true)) {
                    batch.push_back(row);
                    owners.push_back(i);
                }
                done[i] += count;
            }
            more = !batch.empty();
            if (!more) break;
            REQUIRE(model.run(batch));
            for (uint32_t row = 0; row < batch.size(); ++row) {
                const auto logits = model.logits(row);
                together[owners[row]].insert(together[owners[row]].end(), logits.begin(),
                                             logits.end());
            }
        }
        for (uint32_t i = 0; i < 3; ++i) {
            CHECK(together[i].size() == lengths[i] * n);
            CHECK(hash_of(together[i]) == hash_of(alone[i]));
        }
    }
}

TEST_CASE("an embedding vector takes the place of a token") {
    const auto bytes = tiny::model();
    Model model = open_tiny(bytes, small());
    const auto pages = page_list(0, 4);
    const auto tensor = model.gguf->tensor_bytes(
        *model.tensors.model[detail::TensorRole::token_embd].tensor);
    std::vector<float> values(model.spec->n_embd);
    std::memcpy(values.data(), tensor->data() + 5 * values.size() * sizeof(float),
                values.size() * sizeof(float));
    BatchRow row{5, nullptr, 0, pages.data(), true};
    REQUIRE(model.run({&row, 1}));
    const std::vector<float> expected(model.logits(0).begin(), model.logits(0).end());
    row.token = -1;
    row.embedding = values.data();
    REQUIRE(model.run({&row, 1}));
    CHECK(std::equal(expected.begin(), expected.end(), model.logits(0).begin()));
}

TEST_CASE("pages: copied, exported and imported") {
    Model model = open_tiny(mixed_model(), small());
    const auto ids = prompt(40);
    const auto expected = hash_of(all_logits(model, ids, {}));
    const auto here = page_list(0, 4), there = page_list(10, 4), elsewhere = page_list(20, 4);
    std::vector<std::byte> bytes(model.backend->page_bytes(0));
    for (uint32_t i = 0; i < 3; ++i) {
        model.backend->copy_page(here[i], there[i]);
        model.backend->export_page(here[i], bytes.data());
        model.backend->import_page(elsewhere[i], bytes.data());
    }
    const auto last = std::span<const Token>(ids).subspan(39);
    REQUIRE(model.run(make_rows(last, 39, here, true)));
    const std::vector<float> original(model.logits(0).begin(), model.logits(0).end());
    for (const auto& pages : {there, elsewhere}) {
        REQUIRE(model.run(make_rows(last, 39, pages, true)));
        CHECK(std::equal(original.begin(), original.end(), model.logits(0).begin()));
    }
}

TEST_CASE("pages of their own for layers with windows") {
    const auto bytes = tiny::model({.types = {TensorType::q8_0},
                                    .n_layers = 5,
                                    .n_embd = 64,
                                    .n_ff = 64,
                                    .n_context = 2048,
                                    .window = 40,
                                    .full_every = 3});
    const auto ids = prompt(300);
    Model shared = open_tiny(bytes, small());
    const auto expected = hash_of(all_logits(shared, ids, {}));
    BackendOptions options = small();
    options.kv_pages = 19;
    options.window_pages = 6;  // of the window, of a batch of 32, at their ends
    Model apart = open_tiny(bytes, options);
    const size_t page = shared.backend->page_bytes(0) / 5;
    CHECK(apart.backend->page_bytes(18) == page);  // layer 2
    CHECK(apart.backend->page_bytes(19) == 4 * page);
    CHECK(plan_cpu_backend(*apart.gguf, *apart.spec, options)->kv == (19 + 4 * 6) * page);
    std::vector<uint32_t> full = page_list(0, 19, true), windowed(19, UINT32_MAX);
    std::vector<float> logits;
    for (uint32_t at = 0; at < 300; at += 30) {
        for (uint32_t i = 0; i < 19; ++i) {  // what is out of sight is not looked at
            const bool seen = (i + 1) * 16 > at - std::min(at, 39u) && i * 16 < at + 30;
            windowed[i] = seen ? 19 + i % 6 : UINT32_MAX;
        }
        auto rows = make_rows(std::span(ids).subspan(at, 30), at, full, true);
        for (BatchRow& row : rows) row.window_pages = windowed.data();
        REQUIRE(apart.run(rows));
        for (uint32_t i = 0; i < 30; ++i)
            logits.insert(logits.end(), apart.logits(i).begin(), apart.logits(i).end());
    }
    CHECK(hash_of(logits) == expected);
    // A page goes elsewhere, to one that holds what is out of sight, copied or as bytes.
    const std::vector<float> last(logits.end() - apart.spec->n_vocab, logits.end());
    const uint32_t from = windowed[17], to = 19 + (18 + 1) % 6;
    std::vector<std::byte> saved(4 * page);
    apart.backend->export_page(from, saved.data());
    windowed[17] = to;
    BatchRow row = make_rows(std::span(ids).last(1), 299, full, true)[0];
    row.window_pages = windowed.data();
    for (const bool as_bytes : {false, true}) {
        apart.backend->import_page(to, std::vector<std::byte>(4 * page).data());
        REQUIRE(apart.run({&row, 1}));
        CHECK_FALSE(std::equal(last.begin(), last.end(), apart.logits(0).begin()));
        if (as_bytes) apart.backend->import_page(to, saved.data());
        else apart.backend->copy_page(from, to);
        REQUIRE(apart.run({&row, 1}));
        CHECK(std::equal(last.begin(), last.end(), apart.logits(0).begin()));
    }
}

TEST_CASE("an abandoned batch counts as not computed") {
    Model model = open_tiny(mixed_model(), small());
    const auto pages = page_list(0, 32);
    const auto rows = make_rows(prompt(100, 3), 0, pages, true);
    REQUIRE(model.backend->begin(rows));
    auto done = model.backend->advance(1);
    REQUIRE(done);
    CHECK_FALSE(*done);
    model.backend->abandon();
    CHECK_FALSE(model.backend->advance(0));
    CHECK(hash_of(all_logits(model, prompt(280), {})) == mixed_hash());
}

TEST_CASE("loading in slices, from a mapped file's bytes or a reader") {
    const auto& bytes = mixed_model();
    GgufReader reader;
    reader.size = bytes.size();
    reader.context = const_cast<std::byte*>(bytes.data());
    reader.read = [](void* context, uint64_t offset, void* dst, size_t size) {
        std::memcpy(dst, static_cast<const std::byte*>(context) + offset, size);
        return true;
    };
    for (const bool read : {false, true}) {
        auto gguf = read ? Gguf::from_reader(reader) : Gguf::from_bytes(bytes);
        REQUIRE(gguf);
        auto spec = read_model_spec(*gguf);
        REQUIRE(spec);
        auto tensors = detail::bind_model_tensors(*gguf, *spec);
        REQUIRE(tensors);
        auto backend = detail::open_cpu_backend(*gguf, *spec, *tensors, small());
        REQUIRE(backend);
        const auto pages = page_list(0, 1);
        const BatchRow row{1, nullptr, 0, pages.data(), true};
        CHECK_FALSE((*backend)->begin({&row, 1}));
        int slices = 0;
        float last = 0;
        for (bool done = false; !done; ++slices) {
            float progress = 0;
            auto result = (*backend)->load(0, &progress);
            REQUIRE(result);
            done = *result;
            CHECK(progress > last);
            last = progress;
        }
        CHECK(slices > 10);
        CHECK(last == 1.0f);
        Model model;
        model.spec = std::make_unique<ModelSpec>(*spec);
        model.backend = std::move(*backend);
        CHECK(hash_of(all_logits(model, prompt(280), {})) == mixed_hash());
    }
}

TEST_CASE("a reader's weights cannot be read in place") {
    GgufReader reader;
    reader.size = mixed_model().size();
    reader.context = const_cast<std::byte*>(mixed_model().data());
    reader.read = [](void* context, uint64_t offset, void* dst, size_t size) {
        std::memcpy(dst, static_cast<const std::byte*>(context) + offset, size);
        return true;
    };
    BackendOptions options = small();
    options.weights = Weights::mapped;
    auto model = Model::open(Gguf::from_reader(reader), options, nullptr);
    REQUIRE_FALSE(model);
    CHECK(model.error().kind == ErrorKind::unsupported);
}

TEST_CASE("a reader that fails is an error") {
    const auto bytes = tiny::model();
    struct Source {
        const std::vector<std::byte>* bytes;
        bool broken = false;
    } source{&bytes};
    GgufReader reader;
    reader.size = bytes.size();
    reader.context = &source;
    reader.read = [](void* context, uint64_t offset, void* dst, size_t size) {
        const Source& from = *static_cast<Source*>(context);
        std::memcpy(dst, from.bytes->data() + offset, size);
        return !from.broken;
    };
    auto gguf = Gguf::from_reader(reader);
    REQUIRE(gguf);
    source.broken = true;
    const auto model = Model::open(std::move(gguf), small());
    CHECK_FALSE(model);
}

TEST_CASE("numbers that are not finite are an error that names the layer") {
    const struct {
        const char* tensor;
        const char* place;
    } cases[] = {
        {"blk.1.ffn_norm.weight", "layer 1 (blk.1)"},
        {"blk.0.attn_norm.weight", "layer 0 (blk.0)"},
        {"output_norm.weight", "the output matrix"},
        {"token_embd.weight", "the token embedding"},
    };
    for (const auto& [tensor, place] : cases) {
        auto bytes = tiny::model();
        const uint64_t offset = Gguf::from_bytes(bytes)->find_tensor(tensor)->offset;
        const float infinity = std::numeric_limits<float>::infinity();
        std::memcpy(bytes.data() + offset + 8, &infinity, sizeof infinity);
        Model model = open_tiny(bytes, small());
        const auto pages = page_list(0, 4);
        REQUIRE(model.run(make_rows(std::vector<Token>{0, 0, 5}, 0, pages, true)));
        const auto logits = model.backend->logits(0);
        REQUIRE_FALSE(logits);
        CAPTURE(logits.error().message);
        CHECK(logits.error().message.find(place) != std::string::npos);
        CHECK(logits.error().kind == ErrorKind::bad_data);
    }
}

TEST_CASE("a row whose numbers are not finite leaves the others of its batch alone") {
    auto bytes = tiny::model({.tied = false});
    const uint64_t offset = Gguf::from_bytes(bytes)->find_tensor("token_embd.weight")->offset;
    const float infinity = std::numeric_limits<float>::infinity();
    std::memcpy(bytes.data() + offset + size_t{256} * 7 * 4, &infinity,
                sizeof infinity);  // token 7's
    Model model = open_tiny(bytes, small());
    const auto left = page_list(0, 1), right = page_list(1, 1);
    const BatchRow good{5, nullptr, 0, left.data(), true}, bad{7, nullptr, 0, right.data(), true};
    REQUIRE(model.run({&good, 1}));
    const std::vector<float> alone(model.logits(0).begin(), model.logits(0).end());
    REQUIRE(alone.size() == model.spec->n_vocab);
    for (int bad_first : {0, 1}) {
        REQUIRE(model.run(bad_first ? std::vector{bad, good} : std::vector{good, bad}));
        const auto beside = model.logits(bad_first ? 1 : 0);
        CHECK(std::equal(alone.begin(), alone.end(), beside.begin(), beside.end()));
        const auto failed = model.backend->logits(bad_first ? 0 : 1);
        REQUIRE_FALSE(failed);
        CHECK(failed.error().message.find("the token embedding") != std::string::npos);
    }
    REQUIRE(model.run({&good, 1}));
    CHECK(model.logits(0).size() == alone.size());
}

TEST_CASE("what a batch must not ask") {
    const auto bytes = tiny::model();
    Model model = open_tiny(bytes, small());
    const auto pages = page_list(0, 32);
    const BatchRow good{1, nullptr, 0, pages.data(), true};
    CHECK_FALSE(model.backend->begin({}));
    CHECK_FALSE(model.backend->begin(std::vector<BatchRow>(301, good)));
    for (BatchRow bad : {BatchRow{-1, nullptr, 0, pages.data(), true},
                         BatchRow{299, nullptr, 0, pages.data(), true},
                         BatchRow{1, nullptr, 512, pages.data(), true}})
        CHECK_FALSE(model.backend->begin({&bad, 1}));
    BackendOptions options = small();
    options.max_logit_rows = 1;
    Model one = open_tiny(bytes, options);
    CHECK_FALSE(one.backend->begin(std::vector<BatchRow>(2, good)));
    CHECK(one.backend->begin({&good, 1}));
}

TEST_CASE("the memory plan") {
    const auto& bytes = mixed_model();
    auto gguf = Gguf::from_bytes(bytes);
    auto spec = read_model_spec(*gguf);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    REQUIRE(tensors);
    BackendOptions options = small();
    const auto plan = detail::plan_cpu_backend(*gguf, *spec, *tensors, options);
    REQUIRE(plan);
    auto backend = detail::open_cpu_backend(*gguf, *spec, *tensors, options);
    REQUIRE(backend);
    CHECK(plan->kv == options.kv_pages * (*backend)->page_bytes(0));
    CHECK((*backend)->page_bytes(0) ==
          2 * 2 * 16 * 2 * 2 * 64);  // layers, k and v, positions, f16, heads
    uint64_t file = 0;
    for (const TensorInfo& tensor : gguf->tensors()) file += tensor.bytes;
    CHECK(plan->weights >= file);
    CHECK(plan->weights < file + file / 4);
    options.weights = Weights::mapped;
    const auto mapped = detail::plan_cpu_backend(*gguf, *spec, *tensors, options);
    CHECK(plan->mapped == 0);
    CHECK(mapped->mapped < file);
    CHECK(mapped->mapped + mapped->weights > file - file / 100);
    CHECK(mapped->weights < plan->weights / 20);  // norms and biases
    CHECK(mapped->scratch < plan->scratch + (64 << 10));
    options.weights = Weights::packed;
    options.kv_type = KvType::f32;
    CHECK(detail::plan_cpu_backend(*gguf, *spec, *tensors, options)->kv == 2 * plan->kv);
    options.kv_type = KvType::q8_0;
    CHECK(detail::plan_cpu_backend(*gguf, *spec, *tensors, options)->kv == plan->kv / 32 * 17);
    options.max_batch_rows = 8;
    options.max_logit_rows = 1;
    CHECK(detail::plan_cpu_backend(*gguf, *spec, *tensors, options)->scratch < plan->scratch / 8);
}

TEST_CASE("the public way to a backend") {
    const auto& bytes = mixed_model();
    auto gguf = Gguf::from_bytes(bytes);
    auto spec = read_model_spec(*gguf);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    BackendOptions options = small();
    const auto plan = plan_cpu_backend(*gguf, *spec, options);
    REQUIRE(plan);
    CHECK(plan->total() == detail::plan_cpu_backend(*gguf, *spec, *tensors, options)->total());
    auto backend = open_cpu_backend(*gguf, *spec, options);
    REQUIRE(backend);
    REQUIRE(*(*backend)->load(UINT64_MAX, nullptr));
    const auto ids = prompt(8);
    const auto pages = page_list(0, 1);
    const auto rows = make_rows(ids, 0, pages, true);
    REQUIRE((*backend)->begin(rows));
    REQUIRE(*(*backend)->advance(0));
    Model model = open_tiny(bytes, options);
    const auto expected = all_logits(model, ids, {.options = options});
    const auto logits = (*backend)->logits(7);
    REQUIRE(logits);
    CHECK(std::equal(logits->begin(), logits->end(), expected.end() - spec->n_vocab));

    options.kv_pages = 0;
    CHECK(plan_cpu_backend(*gguf, *spec, options).error().param == "kv_pages");
    CHECK(open_cpu_backend(*gguf, *spec, options).error().param == "kv_pages");
    spec->layers.push_back(spec->layers[0]);  // the file has no such tensors
    for (const Error& error : {plan_cpu_backend(*gguf, *spec, small()).error(),
                               open_cpu_backend(*gguf, *spec, small()).error()})
        CHECK(error.message.find("blk.2.") != std::string::npos);
}

TEST_CASE("options out of range") {
    auto gguf = Gguf::from_bytes(mixed_model());
    auto spec = read_model_spec(*gguf);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    const auto refused = [&](auto change) {
        BackendOptions options = small();
        change(options);
        const auto plan = detail::plan_cpu_backend(*gguf, *spec, *tensors, options);
        return !plan && !detail::open_cpu_backend(*gguf, *spec, *tensors, options);
    };
    CHECK(refused([](BackendOptions& o) { o.page_tokens = 24; }));
    {  // heads of 24 values
        const auto bytes24 = tiny::model({.n_embd = 96, .n_ff = 96});
        auto other = Gguf::from_bytes(bytes24);
        REQUIRE(other);
        auto other_spec = read_model_spec(*other);
        auto other_tensors = detail::bind_model_tensors(*other, *other_spec);
        REQUIRE(other_tensors);
        BackendOptions options = small();
        CHECK(detail::plan_cpu_backend(*other, *other_spec, *other_tensors, options));
        options.kv_type = KvType::q8_0;
        const auto plan = detail::plan_cpu_backend(*other, *other_spec, *other_tensors, options);
        REQUIRE(!plan);
        CHECK(plan.error().param == "kv_type");
        CHECK(plan.error().message.find("have 24") != std::string::npos);
    }
    CHECK(refused([](BackendOptions& o) { o.page_tokens = 0; }));
    CHECK(refused([](BackendOptions& o) { o.kv_pages = 0; }));
    CHECK(refused([](BackendOptions& o) { o.window_pages = UINT32_MAX; }));
    CHECK(refused([](BackendOptions& o) { o.max_batch_rows = 0; }));
    CHECK(refused([](BackendOptions& o) { o.max_logit_rows = 0; }));
    CHECK(refused([](BackendOptions& o) { o.max_logit_rows = 301; }));
    CHECK(refused([](BackendOptions& o) { o.threads = -2; }));
    BackendOptions huge = small();
    huge.kv_pages = UINT32_MAX;
    huge.page_tokens = 4096;
    const auto opened = detail::open_cpu_backend(*gguf, *spec, *tensors, huge);
    REQUIRE_FALSE(opened);
    CHECK(opened.error().kind == ErrorKind::out_of_memory);
}

namespace {

// A machine on which one token takes `work_ns` on one thread, less on more of them until `most` use
// up the memory's bandwidth, and whose quota gives `quota` of a CPU in each period of 100 ms.
struct ThrottledMachine {
    double work_ns;
    uint32_t most;
    double quota = 1e9;
    bool one_core = false;  // others take all but one, for which threads then wait
    double now = 0, period_end = 0, used = 0;  // CPU time of the period

    double token(uint32_t threads) {
        const double start = now, period = 1e8;
        const double time = work_ns / std::min(threads, most);
        for (double left = one_core && threads > 1 ? work_ns * 1.3 : time; left > 0;) {
            if (now >= period_end) {
                period_end += period;
                used = 0;
            }
            const double run = std::min(
                {left, period_end - now, std::max(quota * period - used, 0.0) / threads});
            now += run;
            used += run * threads;
            left -= run;
            if (left > 0) now = period_end;
        }
        return now - start;
    }
};

}  // namespace

TEST_CASE("trials: as fast as before soon after a minute of throttling") {
    for (const double work_ns : {2e6, 16e6, 150e6})
        for (const uint32_t parts : {2u, 6u, 16u})
            for (const double quota : {0.05, 0.3, 0.5, 1.5, 1e9}) {  // the last: one core is left
                CAPTURE(work_ns);
                CAPTURE(parts);
                CAPTURE(quota);
                ThrottledMachine machine{work_ns, parts};
                detail::CpuTrials trials;
                trials.open(parts, 0);
                const auto run = [&](uint32_t tokens, double until) {
                    const double start = machine.now;
                    for (uint32_t i = 0; i < tokens && machine.now < until; ++i)
                        trials.add({.ns = static_cast<uint64_t>(machine.token(trials.parts()))});
                    return machine.now - start;
                };
                run(2000, 1e18);
                const double before = run(300, 1e18);
                machine.quota = quota;
                machine.one_core = quota == 1e9;
                run(UINT32_MAX, machine.now + 60e9);
                machine.quota = 1e9;
                machine.one_core = false;
                run(200, 1e18);
                CHECK(run(300, 1e18) < before * 1.03);
            }
}

TEST_CASE("trials: each weight type gets the faster prefetch distance in a few tokens") {
    constexpr size_t near = 0, far = detail::kPrefetchAhead;
    detail::CpuTrials trials;
    trials.open(1, -1);
    // Faster without; faster with; no difference; not in the model.
    const double with[] = {1.25, 0.9, 1.0, 0}, without[] = {1.0, 1.0, 1.0, 0};
    const auto cost = [&](uint32_t token) {
        detail::BatchCost batch{.ns = 1000};
        for (uint32_t type = 0; type < 4 && trials.times_types(); ++type)
            batch.type_ns[type] = (trials.ahead(type) == far ? with : without)[type] *
                                  (token % 7 == 3 ? 1.5 : 1.0);  // now and then somebody disturbs
        return batch;
    };
    uint32_t token = 0;
    for (; token < 24; ++token) trials.add(cost(token));
    uint32_t right = 0;
    for (; token < 2000; ++token) {
        trials.add(cost(token));
        right += trials.ahead(0) == near && trials.ahead(1) == far;
    }
    CHECK(right > 1976 * 97 / 100);
    trials.open(1, 64);
    CHECK(trials.ahead(0) == 64);
    for (token = 0; token < 100; ++token) trials.add(cost(token));
    CHECK(trials.ahead(0) == 64);
}
