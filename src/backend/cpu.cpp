// >>backend
// The CPU backend, top to bottom: loading, the batch as a machine of stages, the stages in the
// order in which they run. The formulas are in >>kernels.
#include "prologue.hpp"

#include "backend/cpu_layout.hpp"
#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint64_t kJoinWork = 1 << 16;   // products that are not worth a fork-join
constexpr uint64_t kClaimColumns = 8;     // from here on units are claimed, a few at a time
constexpr uint64_t kClaimUnits = 4;       // at most: units that share a read of the columns
constexpr uint64_t kSliceNs = 200'000;    // between two looks at the deadline
constexpr double kSlowestWorkNs = 0.2;    // a product, before it was measured
constexpr uint64_t kLoadBytes = 1 << 20;  // of the file, a thread, between two looks

// How many threads are fastest for a batch of few rows is found by trying: a few use up the
// memory's bandwidth, and where a model is small, or others want the cores, they wait for each
// other longer than they work. All of them at first; now and then half or twice as many are tried,
// which must be faster twice to be taken: a busy moment decides nothing. No bit depends on it.
class ThreadTrials {
public:
    void open(uint32_t parts) { most_ = fastest_ = parts; }
    uint32_t parts() const { return phase_ == Phase::other ? other() : fastest_; }
    /// A batch of one row took so long.
    void add(uint64_t ns) {
        if (most_ == 1) return;
        shortest_ns_ = count_++ ? std::min(shortest_ns_, ns) : ns;
        const bool hopeless = phase_ == Phase::other && ns > fastest_ns_ + fastest_ns_ / 4;
        if (count_ < (phase_ == Phase::rest ? pause_ : kBatches) && !hopeless) return;
        count_ = 0;
        if (phase_ == Phase::fastest) fastest_ns_ = shortest_ns_;
        if (phase_ == Phase::other) judge(shortest_ns_ + shortest_ns_ / 32 < fastest_ns_);
        else phase_ = phase_ == Phase::rest ? Phase::fastest : Phase::other;
    }

private:
    static constexpr uint32_t kBatches = 4, kShortPause = 8, kLongPause = 1024;
    enum class Phase { rest, fastest, other };

    uint32_t other() const {
        return fewer_ ? std::max(fastest_ / 2, 1u) : std::min(fastest_ * 2, most_);
    }
    void judge(bool faster) {
        if (faster && won_) fastest_ = other();
        pause_ = faster ? kShortPause : std::min(pause_ * 2, kLongPause);
        won_ = faster && !won_;
        if (!faster) fewer_ = !fewer_;
        if (other() == fastest_) fewer_ = !fewer_;
        phase_ = Phase::rest;
    }

    uint32_t most_ = 1, fastest_ = 1, count_ = 0, pause_ = kShortPause;
    uint64_t shortest_ns_ = 0, fastest_ns_ = 0;
    Phase phase_ = Phase::rest;
    bool fewer_ = true, won_ = false;
};

// By sixteen lanes, which compilers make vectors of.
bool all_finite(const float* x, size_t n) {
    constexpr uint32_t exponent = 0x7f800000u;  // all of it: infinite or no number
    const auto bad = [](float value) {
        return uint32_t{(std::bit_cast<uint32_t>(value) & exponent) == exponent};
    };
    uint32_t lanes[16] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; ++j) lanes[j] |= bad(x[i + j]);
    for (; i < n; ++i) lanes[0] |= bad(x[i]);
    return std::all_of(lanes, lanes + 16, [](uint32_t lane) { return lane == 0; });
}

class CpuBackend final : public Backend {
public:
    bool exact() const override { return true; }
    Result<bool> load(uint64_t budget_us, float* progress) override;
    Result<void> begin(std::span<const BatchRow> rows) override;
    Result<bool> advance(uint64_t deadline_ns) override;
    void abandon() override { batch_ = rows_ = {}; }
    Result<std::span<const float>> logits(uint32_t i) const override {
        if (bad_rows_[i].load(std::memory_order_relaxed)) return bad_numbers_;
        return std::span<const float>(scratch_.logits + size_t{i} * spec_->n_vocab, spec_->n_vocab);
    }
    void copy_page(uint32_t from, uint32_t to) override;
    size_t page_bytes() const override { return static_cast<size_t>(page_bytes_); }
    void export_page(uint32_t page, std::byte* out) const override;
    void import_page(uint32_t page, const std::byte* in) override;

    Result<void> open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                      const BackendOptions& options, const Kernels* kernels);

private:
    // A stage is cut into units: rows, pairs of tiles or attention units. `job` does units
    // first .. last - 1; it is called once for each thread's share, or, where `claimed`, for one
    // unit at a time.
    struct Stage {
        uint64_t (CpuBackend::*units)() const;
        uint64_t (CpuBackend::*work)() const;  // products of a unit, about
        void (CpuBackend::*job)(uint32_t first, uint32_t last, uint32_t part);
        bool claimed;
    };
    enum StageName : uint32_t {
        embed,
        first_of_layer,
        store_keys = 3,
        last_of_layer = 9,
        last_stage = 11
    };
    static const Stage stages_[last_stage + 1];
    struct Slice {
        CpuBackend* self;
        const Stage* stage;
        uint32_t first, last;
        uint32_t claim_units;                                  // 0: each thread does its share
        uint32_t share(uint64_t part, uint32_t parts) const {  // where it begins
            return first + static_cast<uint32_t>((last - first) * part / parts);
        }
    };
    // How far a thread's share is claimed: by itself, a few neighbouring units at a time (what it
    // reads next it has prefetched), and, once they are done with theirs, by the others.
    struct alignas(64) Claim {
        std::atomic<uint32_t> next;
    };
    struct PackJob {
        const LoadItem* item;
        const std::byte* source;  // of tile `first`
        uint32_t first, last;
    };

    const CpuLayer& layer() const { return weights_.layers[layer_]; }
    uint32_t row_count() const { return static_cast<uint32_t>(rows_.size()); }
    bool split_over_segments() const { return row_count() <= sizes_.split_rows; }
    std::byte* kv_page(const CpuLayer& in, uint32_t page) const {
        return kv_.data() + in.kv_offset + page * in.kv_page_bytes();
    }

    Result<void> load_item_slice();
    static void pack_part(void* context, uint32_t part, uint32_t parts);
    void plan_attention();
    void start_batch();
    void keep_wanted_rows();
    void run_slice();
    static void run_part(void* context, uint32_t part, uint32_t parts);
    Error locate_bad_numbers();
    bool residual_is_finite() const;

    uint64_t count_rows() const { return row_count(); }
    uint64_t count_qkv() const { return layer().q.units() + layer().k.units() + layer().v.units(); }
    uint64_t count_attention() const { return uint64_t{unit_count_} * layer().spec->n_kv_heads; }
    uint64_t count_embd() const { return layer().down.units(); }
    uint64_t count_ff() const { return layer().up.units(); }
    uint64_t count_wanted() const { return wanted_count_; }
    uint64_t count_vocab() const { return wanted_count_ ? weights_.output.units() : 0; }
    uint64_t work_row() const { return uint64_t{spec_->n_embd} * 8; }
    uint64_t work_unit(uint64_t columns) const {
        return kUnitTiles * kTileRows * columns * rows_.size() * sizes_.planes;
    }
    uint64_t work_qkv() const { return work_unit(spec_->n_embd); }
    uint64_t work_attention() const;
    uint64_t work_output() const { return work_unit(layer().attn_output.cols); }
    uint64_t work_gate_up() const { return 2 * work_unit(spec_->n_embd); }
    uint64_t work_down() const { return work_unit(layer().down.cols); }
    uint64_t work_logits() const {
        return kUnitTiles * kTileRows * 2 * uint64_t{spec_->n_embd} * wanted_count_;
    }

    void embed_rows(uint32_t first, uint32_t last, uint32_t part);
    void norm_rows(uint32_t first, uint32_t last, const float* weight);
    void norm_for_attention(uint32_t first, uint32_t last, uint32_t part);
    void multiply_qkv(uint32_t first, uint32_t last, uint32_t part);
    void rotate_and_store(uint32_t first, uint32_t last, uint32_t part);
    void attend_units(uint32_t first, uint32_t last, uint32_t part);
    void attend_unit(const AttentionUnit& unit, uint32_t kv_head, QueryScratch& scratch);
    struct SegmentResult {
        float max, sum;
        const float* out;
    };
    struct AttentionState {
        float *max, *sum, *out;
    };
    float* query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const;
    void merge_segment(uint32_t position, uint32_t segment, const SegmentResult& from,
                       const AttentionState& to);
    void merge_parts(uint32_t row);
    void finish_attention(uint32_t first, uint32_t last, uint32_t part);
    void project_attention(uint32_t first, uint32_t last, uint32_t part);
    void norm_for_ffn(uint32_t first, uint32_t last, uint32_t part);
    void multiply_gate_up(uint32_t first, uint32_t last, uint32_t part);
    void project_ffn(uint32_t first, uint32_t last, uint32_t part);
    void norm_wanted(uint32_t first, uint32_t last, uint32_t part);
    void multiply_logits(uint32_t first, uint32_t last, uint32_t part);
    PackedMatrix pack_mapped(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                             std::byte* packed);
    std::byte* mapped_units(uint32_t part) const {
        return scratch_.mapped_units + part * sizes_.mapped_units;
    }
    MatmulTask product_of(const CpuMatrix& matrix, uint32_t first, uint32_t last, const float* x,
                          float* y) const;
    void multiply(const CpuMatrix& matrix, MatmulTask task, uint32_t part,
                  const CpuMatrix* up = nullptr);
    void project(const CpuMatrix& matrix, const ActivationBlock* blocks, const float* x,
                 uint32_t first, uint32_t last, uint32_t part);
    uint32_t group_end(uint32_t row, uint32_t last, uint64_t planes) const;
    void quantize_group(const float* x, uint32_t n, uint64_t planes, uint32_t first, uint32_t last,
                        uint32_t rows);

    const Gguf* gguf_ = nullptr;
    const ModelSpec* spec_ = nullptr;
    BackendOptions options_;
    const Kernels* kernels_ = nullptr;
    std::unique_ptr<Team> team_;
    CpuWeights weights_;
    std::vector<RopeTable> ropes_;
    CpuSizes sizes_{};
    CpuScratch scratch_{};
    uint64_t page_bytes_ = 0;
    Buffer weights_memory_, kv_, scratch_memory_;

    size_t load_item_ = 0;  // the next to load, and its next tile
    uint32_t load_tile_ = 0;
    uint64_t loaded_bytes_ = 0, bytes_to_load_ = 0;

    std::span<const BatchRow> batch_;  // in work; empty: none
    std::span<const BatchRow> rows_;   // of it that are still computed
    uint32_t stage_ = 0, layer_ = 0;   // what is next, and its next unit
    uint32_t unit_ = 0;
    uint32_t unit_count_ = 0, wanted_count_ = 0;
    bool has_deadline_ = false;
    uint32_t parts_ = 1;     // threads that compute the batch
    uint64_t batch_ns_ = 0;  // spent on it
    ThreadTrials trials_;
    double ns_per_work_[last_stage + 1][2] = {};     // of a stage, in batches of few and many rows
    std::unique_ptr<Claim[]> claims_;                // (parts)
    std::unique_ptr<std::atomic<bool>[]> bad_rows_;  // (max_logit_rows) have numbers not finite
    Error bad_numbers_;                              // where the first of them came from
};

// In the order in which they run; from first_of_layer to last_of_layer once a layer.
const CpuBackend::Stage CpuBackend::stages_[] = {
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::embed_rows, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::norm_for_attention, false},
    {&CpuBackend::count_qkv, &CpuBackend::work_qkv, &CpuBackend::multiply_qkv, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::rotate_and_store, false},
    {&CpuBackend::count_attention, &CpuBackend::work_attention, &CpuBackend::attend_units, true},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::finish_attention, false},
    {&CpuBackend::count_embd, &CpuBackend::work_output, &CpuBackend::project_attention, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::norm_for_ffn, false},
    {&CpuBackend::count_ff, &CpuBackend::work_gate_up, &CpuBackend::multiply_gate_up, false},
    {&CpuBackend::count_embd, &CpuBackend::work_down, &CpuBackend::project_ffn, false},
    {&CpuBackend::count_wanted, &CpuBackend::work_row, &CpuBackend::norm_wanted, false},
    {&CpuBackend::count_vocab, &CpuBackend::work_logits, &CpuBackend::multiply_logits, false},
};

Result<void> CpuBackend::open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, const Kernels* kernels) {
    gguf_ = &gguf;
    spec_ = &spec;
    options_ = options;
    if (!kernels) {
        auto chosen = choose_kernels();
        if (!chosen) return chosen.error();
        kernels = *chosen;
    }
    kernels_ = kernels;
    auto layout = lay_out_cpu(gguf, spec, tensors, options, 0);
    if (!layout) return layout.error();
    const struct {
        Buffer* buffer;
        uint64_t bytes;
        const char* what;
    } wanted[] = {
        {&weights_memory_, layout->plan.weights, "weights"},
        {&kv_, layout->plan.kv, "keys and values (context)"},
        {&scratch_memory_, layout->plan.scratch, "scratch"},
    };
    for (const auto& [buffer, bytes, what] : wanted) {
        auto memory = Buffer::allocate(bytes, what, buffer == &weights_memory_, options.allocator);
        if (!memory) return memory.error();
        *buffer = std::move(*memory);
    }
    layout = lay_out_cpu(gguf, spec, tensors, options,
                         reinterpret_cast<uintptr_t>(weights_memory_.data()));
    weights_ = std::move(layout->weights);
    ropes_ = std::move(layout->ropes);
    sizes_ = layout->sizes;
    page_bytes_ = layout->page_bytes;
    Carver carver{reinterpret_cast<uintptr_t>(scratch_memory_.data())};
    scratch_.place(carver, sizes_, spec.n_embd, spec.n_vocab);
    bad_rows_ = std::make_unique<std::atomic<bool>[]>(options.max_logit_rows);
    claims_ = std::make_unique<Claim[]>(sizes_.parts);
    for (const LoadItem& item : weights_.items) bytes_to_load_ += item.tensor->bytes;
    if (auto there = gguf.tensor_bytes(*tensors.token_embd); weights_.mapped && !there)
        return there.error();
    auto team = Team::create(static_cast<int>(sizes_.parts) - 1, options.parallel_for,
                             options.parallel_for_host);
    if (!team) return team.error();
    team_ = std::move(*team);
    trials_.open(team_->parts());
    return {};
}

// ---- Loading ---------------------------------------------------------------------------------

Result<bool> CpuBackend::load(uint64_t budget_us, float* progress) {
    const uint64_t start = monotonic_ns();
    team_->begin();
    Result<void> good;
    while (good && load_item_ < weights_.items.size()) {
        good = load_item_slice();
        if ((monotonic_ns() - start) / 1000 >= budget_us) break;
    }
    team_->end();
    if (!good) return good.error();
    if (progress)
        *progress = static_cast<float>(static_cast<double>(loaded_bytes_) /
                                       static_cast<double>(bytes_to_load_));
    return load_item_ == weights_.items.size();
}

// As many tiles as the threads take at a time, or about as many bytes. What was read is released at
// once.
Result<void> CpuBackend::load_item_slice() {
    const LoadItem& item = weights_.items[load_item_];
    const TensorInfo& tensor = *item.tensor;
    const uint64_t tile_bytes = item.pack ? tensor.bytes / tensor.dims[1] * kTileRows : kLoadBytes;
    const uint32_t tiles = static_cast<uint32_t>((tensor.bytes + tile_bytes - 1) / tile_bytes);
    const uint64_t step = sizes_.parts * std::max<uint64_t>(1, kLoadBytes / tile_bytes);
    uint32_t last = static_cast<uint32_t>(std::min<uint64_t>(tiles, load_tile_ + step));
    const uint64_t offset = load_tile_ * tile_bytes;
    auto there = gguf_->tensor_bytes(tensor);
    const bool staged = item.pack && !there;  // a reader: by way of the scratch memory
    if (staged)
        last = static_cast<uint32_t>(
            std::min<uint64_t>(last, load_tile_ + scratch_memory_.size() / tile_bytes));
    const size_t bytes = static_cast<size_t>(std::min(tensor.bytes, last * tile_bytes) - offset);
    std::byte* const to = item.pack ? scratch_memory_.data() : item.out + offset;
    if (staged || !item.pack)
        if (auto read = gguf_->read_tensor(tensor, offset, {to, bytes}); !read) return read;
    if (item.pack) {
        PackJob job{&item, staged ? to : there->data() + offset, load_tile_, last};
        team_->run(pack_part, &job);
    }
    gguf_->release(tensor, offset, bytes);
    loaded_bytes_ += bytes;
    load_tile_ = last;
    if (last == tiles) {
        ++load_item_;
        load_tile_ = 0;
    }
    return {};
}

void CpuBackend::pack_part(void* context, uint32_t part, uint32_t parts) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const TensorInfo& tensor = *job.item->tensor;
    const uint32_t rows = static_cast<uint32_t>(tensor.dims[1]),
                   cols = static_cast<uint32_t>(tensor.dims[0]);
    const uint64_t count = job.last - job.first, row_bytes = tensor.bytes / rows;
    const uint32_t first = job.first + static_cast<uint32_t>(count * part / parts);
    const uint32_t last = job.first + static_cast<uint32_t>(count * (part + 1) / parts);
    if (first == last) return;
    pack_tiles(tensor.type, rows, cols, job.source + (first - job.first) * row_bytes * kTileRows,
               first, last, job.item->out + first * packed_tile_bytes(tensor.type, cols));
}

// ---- Pages -----------------------------------------------------------------------------------

void CpuBackend::copy_page(uint32_t from, uint32_t to) {
    for (const CpuLayer& in : weights_.layers)
        std::memcpy(kv_page(in, to), kv_page(in, from), in.kv_page_bytes());
}

void CpuBackend::export_page(uint32_t page, std::byte* out) const {
    for (const CpuLayer& in : weights_.layers) {
        std::memcpy(out, kv_page(in, page), in.kv_page_bytes());
        out += in.kv_page_bytes();
    }
}

void CpuBackend::import_page(uint32_t page, const std::byte* bytes) {
    for (const CpuLayer& in : weights_.layers) {
        std::memcpy(kv_page(in, page), bytes, in.kv_page_bytes());
        bytes += in.kv_page_bytes();
    }
}

// ---- A batch, stage after stage --------------------------------------------------------------

Result<void> CpuBackend::begin(std::span<const BatchRow> rows) {
    const auto refuse = [](std::string what) {
        return make_error(ErrorKind::internal, std::move(what));
    };
    if (load_item_ < weights_.items.size()) return refuse("batch: the model is not loaded yet");
    if (rows.empty() || rows.size() > options_.max_batch_rows)
        return refuse(
            format("batch: %zu rows are not in 1..%u", rows.size(), options_.max_batch_rows));
    uint32_t wanted = 0;
    for (const BatchRow& row : rows) {
        if (!row.embedding && (row.token < 0 || static_cast<uint32_t>(row.token) >= spec_->n_vocab))
            return refuse(format("batch: there is no token %d", row.token));
        if (row.position >= cpu_positions(options_))
            return refuse(format("batch: there is no position %u", row.position));
        if (!row.logits) continue;
        if (wanted == options_.max_logit_rows)
            return refuse(format("batch: more than %u rows want logits", wanted));
        scratch_.wanted[wanted++] = static_cast<uint32_t>(&row - rows.data());
    }
    batch_ = rows;
    wanted_count_ = wanted;
    parts_ = rows.size() < kClaimColumns ? trials_.parts() : team_->parts();
    batch_ns_ = 0;
    for (uint32_t i = 0; i < wanted; ++i) bad_rows_[i].store(false, std::memory_order_relaxed);
    start_batch();
    return {};
}

void CpuBackend::start_batch() {
    rows_ = batch_;
    stage_ = layer_ = unit_ = 0;
    plan_attention();
}

// Once the last layer has its keys and values only rows that want logits matter.
void CpuBackend::keep_wanted_rows() {
    const uint32_t count = wanted_count_;
    if (count == row_count()) return;
    const LayerSpec& spec = *layer().spec;
    const size_t embd = spec_->n_embd,
                 queries = size_t{spec.n_heads / spec.n_kv_heads} * spec.head_dim;
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t row = scratch_.wanted[i];
        scratch_.kept[i] = rows_[row];
        std::memmove(scratch_.x + i * embd, scratch_.x + row * embd, embd * sizeof(float));
    }
    for (uint32_t head = 0; head < spec.n_kv_heads; ++head)
        for (uint32_t i = 0; i < count; ++i)
            std::memmove(scratch_.turned + (head * count + i) * queries,
                         scratch_.turned + (head * rows_.size() + scratch_.wanted[i]) * queries,
                         queries * sizeof(float));
    rows_ = {scratch_.kept, count};
    plan_attention();
    if (count == 0) stage_ = last_stage;  // nobody asks what comes behind
}

Result<bool> CpuBackend::advance(uint64_t deadline_ns) {
    if (batch_.empty()) return make_error(ErrorKind::internal, "batch: none was begun");
    const FloatState float_state;
    const uint64_t start = monotonic_ns();
    has_deadline_ = deadline_ns != 0;
    team_->begin(parts_);
    do run_slice();
    while (stage_ <= last_stage && !(has_deadline_ && monotonic_ns() >= deadline_ns));
    const bool done = stage_ > last_stage;
    if (done && std::any_of(bad_rows_.get(), bad_rows_.get() + wanted_count_,
                            [](const std::atomic<bool>& bad) { return bad.load(); }))
        bad_numbers_ = locate_bad_numbers();
    team_->end();
    batch_ns_ += monotonic_ns() - start;
    if (done && batch_.size() == 1) trials_.add(batch_ns_);
    if (done) abandon();
    return done;
}

// All that is left of the stage, or, where there is a deadline, about kSliceNs of it.
void CpuBackend::run_slice() {
    const Stage& stage = stages_[stage_];
    const uint64_t units = (this->*stage.units)(), work = (this->*stage.work)();
    double& ns_per_work = ns_per_work_[stage_][rows_.size() >= kClaimColumns];
    if (ns_per_work == 0) ns_per_work = kSlowestWorkNs;
    uint64_t last = units;
    if (has_deadline_) {
        const double fits = static_cast<double>(kSliceNs) /
                            (ns_per_work * static_cast<double>((work + 1) * parts_));
        last = std::min(units, unit_ + parts_ * (1 + static_cast<uint64_t>(fits)));
    }
    const uint64_t start = has_deadline_ ? monotonic_ns() : 0;
    const uint64_t count = last - unit_;
    // Four claims a thread even out what the threads are held up by.
    const uint64_t few = std::clamp<uint64_t>(count / (4 * parts_), 1, kClaimUnits);
    const uint64_t claim_units = stage.claimed ? 1 : rows_.size() >= kClaimColumns ? few : 0;
    Slice slice{this, &stage, unit_, static_cast<uint32_t>(last),
                static_cast<uint32_t>(claim_units)};
    for (uint32_t part = 0; part < parts_; ++part)
        claims_[part].next.store(slice.share(part, parts_), std::memory_order_relaxed);
    if (parts_ == 1 || count == 1 || count * work < kJoinWork)
        (this->*stage.job)(slice.first, slice.last, 0);
    else team_->run(run_part, &slice);
    if (has_deadline_ && count * work >= kJoinWork)
        ns_per_work = static_cast<double>(monotonic_ns() - start + 1) /
                      static_cast<double>(count * work);
    unit_ = slice.last;
    if (last < units) return;
    unit_ = 0;
    if (stage_ == store_keys && layer_ + 1 == weights_.layers.size()) keep_wanted_rows();
    if (stage_ == last_of_layer && ++layer_ < weights_.layers.size()) stage_ = first_of_layer;
    else ++stage_;
    if (stage_ > last_of_layer) layer_ = 0;  // no layer's: any will do for what asks its sizes
}

void CpuBackend::run_part(void* context, uint32_t part, uint32_t parts) {
    Slice& slice = *static_cast<Slice*>(context);
    const auto job = slice.stage->job;
    const uint32_t n = slice.claim_units;
    if (n == 0) {
        const uint32_t first = slice.share(part, parts), last = slice.share(part + 1, parts);
        if (first < last) (slice.self->*job)(first, last, part);
        return;
    }
    for (uint32_t i = 0; i < parts; ++i) {
        const uint32_t of = (part + i) % parts, last = slice.share(of + 1, parts);
        std::atomic<uint32_t>& next = slice.self->claims_[of].next;
        for (uint32_t unit; (unit = next.fetch_add(n, std::memory_order_relaxed)) < last;)
            (slice.self->*job)(unit, std::min(unit + n, last), part);
    }
}

// Computes the batch again (it gives the same) and looks after every layer.
Error CpuBackend::locate_bad_numbers() {
    start_batch();
    has_deadline_ = false;
    std::string where = "the output matrix";
    while (stage_ <= last_of_layer) {
        const uint32_t stage = stage_, in = layer_;
        run_slice();
        if ((stage != embed && stage != last_of_layer) || residual_is_finite()) continue;
        where = stage == embed ? "the token embedding" : format("layer %u (blk.%u)", in, in);
        break;
    }
    stage_ = last_stage + 1;
    return make_error(ErrorKind::bad_data, gguf_->name() +
                                               ": the logits are not finite; the first number "
                                               "that is not came from " +
                                               where);
}

bool CpuBackend::residual_is_finite() const {
    return all_finite(scratch_.x, rows_.size() * spec_->n_embd);
}

// ---- The stages ------------------------------------------------------------------------------

// Where the group of rows whose planes lie side by side ends that `row` begins or is in.
uint32_t CpuBackend::group_end(uint32_t row, uint32_t last, uint64_t planes) const {
    const uint32_t rows = ActivationLayout::kGroup / static_cast<uint32_t>(planes);
    return std::min(last, (row / rows + 1) * rows);
}

// x, (last - first, n) of one group, to scratch_.blocks; of all there are `rows`.
void CpuBackend::quantize_group(const float* x, uint32_t n, uint64_t planes, uint32_t first,
                                uint32_t last, uint32_t rows) {
    if (n % kActivationBlock != 0) return;  // no matrix that meets x is quantized
    const uint32_t count = static_cast<uint32_t>(planes);
    const ActivationLayout layout{rows * count, n / kActivationBlock};
    kernels_->quantize(
        {x, n, last - first, count, n, layout.step(), scratch_.blocks + layout.at(first * count)});
}

void CpuBackend::embed_rows(uint32_t first, uint32_t last, uint32_t part) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first; row < last; ++row) {
        PackedMatrix matrix = weights_.token_embd;
        const BatchRow& from = rows_[row];
        float* x = scratch_.x + row * n;
        if (from.embedding) std::memcpy(x, from.embedding, n * sizeof(float));
        else {
            uint32_t token = static_cast<uint32_t>(from.token);
            if (!matrix.data) {
                const uint32_t tile = token / kTileRows;
                matrix = pack_mapped(weights_.token_embd, tile, tile + 1, mapped_units(part));
                token %= kTileRows;
            }
            dequantize_row(matrix, token, x);
        }
        if (!from.embedding && spec_->embedding_scale != 1)
            kernels_->scale(x, spec_->embedding_scale, n);
        float* cos_sin = scratch_.cos_sin + row * sizes_.rope_values;
        for (const RopeTable& rope : ropes_)
            for (const double frequency : rope.frequencies) {
                double sine, cosine;
                exact_sincos(static_cast<double>(from.position) * frequency, &sine, &cosine);
                *cos_sin++ = static_cast<float>(cosine);
                *cos_sin++ = static_cast<float>(sine);
            }
    }
}

void CpuBackend::norm_rows(uint32_t first, uint32_t last, const float* weight) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first, end; row < last; row = end) {
        end = group_end(row, last, sizes_.planes);
        for (uint32_t i = row; i < end; ++i)
            kernels_->rms_norm(scratch_.x + i * n, weight, spec_->norm_eps, n, scratch_.y + i * n);
        quantize_group(scratch_.y + row * n, spec_->n_embd, sizes_.planes, row, end, row_count());
    }
}

void CpuBackend::norm_for_attention(uint32_t first, uint32_t last, uint32_t) {
    norm_rows(first, last, layer().attn_norm);
}

// Tiles first .. last - 1 from the file's bytes.
PackedMatrix CpuBackend::pack_mapped(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                                     std::byte* packed) {
    const size_t row_bytes = static_cast<size_t>(matrix.tensor->bytes / matrix.rows);
    const std::byte* source = gguf_->tensor_bytes(*matrix.tensor)->data();
    const uint32_t row = first * kTileRows;
    pack_tiles(matrix.type, matrix.rows, matrix.cols, source + row * row_bytes, first, last,
               packed);
    return {matrix.type, std::min(last * kTileRows, matrix.rows) - row, matrix.cols, packed};
}

// y (rows, matrix.rows) = units first .. last - 1 of a matrix times every row of activations.
MatmulTask CpuBackend::product_of(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                                  const float* x, float* y) const {
    return {&matrix,
            first * kUnitTiles,
            std::min(last * kUnitTiles, matrix.tiles()),
            row_count(),
            static_cast<uint32_t>(sizes_.planes),
            scratch_.blocks,
            x,
            matrix.cols,
            y,
            matrix.rows};
}

// The task, gated by `up` where there is one; a mapped matrix is packed unit by unit.
void CpuBackend::multiply(const CpuMatrix& matrix, MatmulTask task, uint32_t part,
                          const CpuMatrix* up) {
    task.up = up;
    if (matrix.data && (!up || up->data)) return kernels_->matmul(task);
    const uint32_t end = task.last_tile;
    const MatmulTask whole = task;
    for (uint32_t tile = task.first_tile; tile < end; tile += kUnitTiles) {
        const uint32_t count = std::min(kUnitTiles, end - tile);
        const auto piece = [&](const CpuMatrix& of, std::byte* packed) {
            if (!of.data) return pack_mapped(of, tile, tile + count, packed);
            return PackedMatrix{of.type, std::min(count * kTileRows, of.rows - tile * kTileRows),
                                of.cols, of.data + tile * packed_tile_bytes(of.type, of.cols)};
        };
        const PackedMatrix weights = piece(matrix, mapped_units(part)),
                           gated_by = up ? piece(*up, mapped_units(part) + matrix.unit_bytes())
                                         : weights;
        task.weights = &weights;
        if (up) task.up = &gated_by;
        task.first_tile = 0;
        task.last_tile = count;
        if (whole.y) task.y = whole.y + tile * kTileRows;
        if (whole.out)
            task.out = whole.out +
                       tile / kUnitTiles *
                           ActivationLayout{task.columns * task.planes, task.out_blocks}.step();
        kernels_->matmul(task);
    }
}

void CpuBackend::multiply_qkv(uint32_t first, uint32_t last, uint32_t part) {
    const struct {
        const CpuMatrix* matrix;
        const float* bias;
        float* y;
    } three[] = {
        {&layer().q, layer().q_bias, scratch_.q},
        {&layer().k, layer().k_bias, scratch_.k},
        {&layer().v, layer().v_bias, scratch_.v},
    };
    uint32_t base = 0;
    for (const auto& [matrix, bias, y] : three) {
        const uint32_t end = base + matrix->units();
        const uint32_t from = std::max(first, base), to = std::min(last, end);
        if (from < to) {
            const MatmulTask task = product_of(*matrix, from - base, to - base, scratch_.y, y);
            multiply(*matrix, task, part);
            const size_t begin = task.first_tile * kTileRows,
                         count = std::min(task.last_tile * kTileRows, matrix->rows) - begin;
            for (size_t row = 0; bias && row < rows_.size(); ++row)
                kernels_->add(y + row * matrix->rows + begin, bias + begin, count);
        }
        base = end;
    }
}

void CpuBackend::rotate_and_store(uint32_t first, uint32_t last, uint32_t) {
    const LayerSpec& spec = *layer().spec;
    const RopeSpec& rope = spec.rope;
    const bool neox = rope.kind == RopeKind::neox;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const size_t n_q = size_t{spec.n_heads} * dim, n_kv = size_t{spec.n_kv_heads} * dim;
    size_t table = 0;
    for (uint32_t i = 0; i < layer().rope; ++i) table += ropes_[i].spec->dims;
    for (uint32_t row = first; row < last; ++row) {
        const float* cos_sin = scratch_.cos_sin + row * sizes_.rope_values + table;
        float *q = scratch_.q + row * n_q, *k = scratch_.k + row * n_kv;
        kernels_->rope(q, spec.n_heads, dim, rope.dims, neox, cos_sin);
        kernels_->rope(k, spec.n_kv_heads, dim, rope.dims, neox, cos_sin);
        kernels_->scale(q, spec.attention_scale, n_q);
        const uint32_t position = rows_[row].position, in_page = position % options_.page_tokens;
        std::byte* page = kv_page(layer(), rows_[row].pages[position / options_.page_tokens]);
        const size_t half = layer().kv_head_bytes / 2;
        const size_t group_at = in_page / kKeyGroup * (half * kKeyGroup / options_.page_tokens);
        for (uint32_t head = 0; head < spec.n_kv_heads; ++head) {
            std::memcpy(scratch_.turned + (size_t{head} * rows_.size() + row) * group * dim,
                        q + size_t{head} * group * dim, group * dim * sizeof(float));
            std::byte* keys = page + head * layer().kv_head_bytes + group_at;
            kernels_->store_kv(options_.kv_type, k + size_t{head} * dim,
                               scratch_.v + row * n_kv + size_t{head} * dim, dim,
                               in_page % kKeyGroup, keys, keys + half);
        }
    }
}

// Rows that are neighbours in their sequence attend together. A batch of few rows is cut by
// segments too, so that all threads have something to do; finish_attention() merges the parts.
void CpuBackend::plan_attention() {
    unit_count_ = 0;
    for (uint32_t row = row_count(), rows; row > 0; row -= rows) {  // the longest first
        const BatchRow& last = rows_[row - 1];
        const uint32_t segments = last.position / kSegment + 1;
        rows = 1;
        if (split_over_segments()) {
            for (uint32_t i = 0; i < segments; ++i)
                scratch_.units[unit_count_++] = {row - 1, 1, i, i + 1};
            continue;
        }
        while (rows < row && rows < kQueryRows && rows_[row - 1 - rows].pages == last.pages &&
               rows_[row - 1 - rows].position + rows == last.position)
            ++rows;
        scratch_.units[unit_count_++] = {row - rows, rows, 0, segments};
    }
}

uint64_t CpuBackend::work_attention() const {
    const AttentionUnit& unit = scratch_.units[0];
    const LayerSpec& spec = *layer().spec;
    const uint32_t seen = layer().first_seen(rows_[unit.row].position) / kSegment;
    const uint32_t segments = split_over_segments()
                                  ? 1
                                  : unit.last_segment - std::max(unit.first_segment, seen);
    return uint64_t{2 * kSegment} * unit.rows * segments * (spec.n_heads / spec.n_kv_heads) *
           spec.head_dim;
}

void CpuBackend::attend_units(uint32_t first, uint32_t last, uint32_t part) {
    const uint32_t kv_heads = layer().spec->n_kv_heads;
    for (uint32_t i = first; i < last; ++i)
        attend_unit(scratch_.units[i / kv_heads], i % kv_heads, scratch_.queries[part]);
}

void CpuBackend::attend_unit(const AttentionUnit& unit, uint32_t kv_head, QueryScratch& scratch) {
    const LayerSpec& spec = *layer().spec;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const uint32_t page_tokens = options_.page_tokens,
                   newest = rows_[unit.row + unit.rows - 1].position,
                   oldest = layer().first_seen(rows_[unit.row].position);
    const size_t half = layer().kv_head_bytes / 2, group_bytes = half * kKeyGroup / page_tokens;
    const void *keys[kSegment / kKeyGroup], *values[kSegment / kKeyGroup];
    AttentionTask task{};
    task.kv_type = options_.kv_type == KvType::q8_0 ? KvType::f32 : options_.kv_type;
    task.head_dim = dim;
    task.queries = unit.rows * group;
    task.q = scratch_.turned + (kv_head * rows_.size() + unit.row) * group * dim;
    task.q_stride = task.out_stride = dim;
    task.begin = scratch.begin;
    task.end = scratch.end;
    task.keys = keys;
    task.values = values;
    task.max = scratch.max;
    task.sum = scratch.sum;
    task.out = scratch.out;
    for (uint32_t segment = std::max(unit.first_segment, oldest / kSegment);
         segment < unit.last_segment; ++segment) {
        const uint32_t start = segment * kSegment;
        const auto within = [start](uint32_t position) {
            return static_cast<uint16_t>(std::clamp(position, start, start + kSegment) - start);
        };
        for (uint32_t i = 0; i < kSegment / kKeyGroup; ++i) {
            const uint32_t position = start + i * kKeyGroup;
            keys[i] = values[i] = nullptr;
            if (position > newest || position + kKeyGroup <= oldest) continue;
            const uint32_t page = rows_[unit.row].pages[position / page_tokens];
            const std::byte* at = kv_page(layer(), page) + kv_head * layer().kv_head_bytes +
                                  position % page_tokens / kKeyGroup * group_bytes;
            keys[i] = at;
            values[i] = at + half;
            if (options_.kv_type != KvType::q8_0) continue;
            float* const expanded = scratch.expanded + i * kKeyGroup * dim;
            kernels_->expand_kv(at, at + half, dim, expanded, expanded + kSegment * dim);
            keys[i] = expanded;
            values[i] = expanded + kSegment * dim;
        }
        for (uint32_t i = 0; i < task.queries; ++i) {
            const uint32_t position = rows_[unit.row + i / group].position;
            scratch.begin[i] = within(layer().first_seen(position));
            scratch.end[i] = within(position + 1);
        }
        if (split_over_segments()) {
            const size_t at = (unit.row * sizes_.segments + segment) * spec.n_heads +
                              kv_head * group;
            task.max = scratch_.part_max + at;
            task.sum = scratch_.part_sum + at;
            task.out = scratch_.part_out + at * dim;
        }
        kernels_->attention(task);
        if (split_over_segments()) continue;
        for (uint32_t i = 0; i < task.queries; ++i)
            if (scratch.begin[i] < scratch.end[i])
                merge_segment(
                    rows_[unit.row + i / group].position, segment,
                    {scratch.max[i], scratch.sum[i], task.out + size_t{i} * dim},
                    {scratch.total_max + i, scratch.total_sum + i, query_output(unit, kv_head, i)});
    }
    if (split_over_segments()) return;
    for (uint32_t i = 0; i < task.queries; ++i)
        kernels_->scale(query_output(unit, kv_head, i), 1 / scratch.total_sum[i], dim);
}

float* CpuBackend::query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const {
    const LayerSpec& spec = *layer().spec;
    const uint32_t group = spec.n_heads / spec.n_kv_heads;
    const size_t row = unit.row + query / group, head = kv_head * group + query % group;
    return scratch_.attended + (row * spec.n_heads + head) * spec.head_dim;
}

void CpuBackend::merge_segment(uint32_t position, uint32_t segment, const SegmentResult& from,
                               const AttentionState& to) {
    const size_t dim = layer().spec->head_dim;
    if (segment != layer().first_seen(position) / kSegment)
        return kernels_->attention_merge(to.max, to.sum, to.out, from.max, from.sum, from.out, dim);
    *to.max = from.max;
    *to.sum = from.sum;
    std::memcpy(to.out, from.out, dim * sizeof(float));
}

void CpuBackend::merge_parts(uint32_t row) {
    const LayerSpec& spec = *layer().spec;
    const size_t dim = spec.head_dim;
    for (uint32_t head = 0; head < spec.n_heads; ++head) {
        float max = 0, sum = 0,
              *out = scratch_.attended + (size_t{row} * spec.n_heads + head) * dim;
        const uint32_t position = rows_[row].position;
        for (uint32_t segment = layer().first_seen(position) / kSegment;
             segment <= position / kSegment; ++segment) {
            const size_t at = (row * sizes_.segments + segment) * spec.n_heads + head;
            merge_segment(
                position, segment,
                {scratch_.part_max[at], scratch_.part_sum[at], scratch_.part_out + at * dim},
                {&max, &sum, out});
        }
        kernels_->scale(out, 1 / sum, dim);
    }
}

void CpuBackend::finish_attention(uint32_t first, uint32_t last, uint32_t) {
    const uint32_t n = layer().spec->n_heads * layer().spec->head_dim;
    for (uint32_t row = first, end; row < last; row = end) {
        end = group_end(row, last, sizes_.planes);
        for (uint32_t i = row; i < end && split_over_segments(); ++i) merge_parts(i);
        quantize_group(scratch_.attended + size_t{row} * n, n, sizes_.planes, row, end,
                       row_count());
    }
}

// The residual stream += some units of a matrix times activations.
void CpuBackend::project(const CpuMatrix& matrix, const ActivationBlock* blocks, const float* x,
                         uint32_t first, uint32_t last, uint32_t part) {
    MatmulTask task = product_of(matrix, first, last, x, scratch_.x);
    task.blocks = blocks;
    task.add = true;
    multiply(matrix, task, part);
}

void CpuBackend::project_attention(uint32_t first, uint32_t last, uint32_t part) {
    project(layer().attn_output, scratch_.blocks, scratch_.attended, first, last, part);
}

void CpuBackend::norm_for_ffn(uint32_t first, uint32_t last, uint32_t) {
    norm_rows(first, last, layer().ffn_norm);
}

void CpuBackend::multiply_gate_up(uint32_t first, uint32_t last, uint32_t part) {
    MatmulTask task = product_of(layer().gate, first, last, scratch_.y, scratch_.h);
    if (layer().down.quantized()) task.out = scratch_.h_blocks;
    task.out_blocks = layer().down.cols / kActivationBlock;
    multiply(layer().gate, task, part, &layer().up);
}

void CpuBackend::project_ffn(uint32_t first, uint32_t last, uint32_t part) {
    project(layer().down, scratch_.h_blocks, scratch_.h, first, last, part);
}

// The output matrix always meets two planes.
void CpuBackend::norm_wanted(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = spec_->n_embd;
    for (uint32_t i = first, end; i < last; i = end) {
        end = group_end(i, last, 2);
        for (uint32_t j = i; j < end; ++j)
            kernels_->rms_norm(scratch_.x + j * n, weights_.output_norm, spec_->norm_eps, n,
                               scratch_.y + j * n);
        quantize_group(scratch_.y + i * n, spec_->n_embd, 2, i, end, wanted_count_);
    }
}

void CpuBackend::multiply_logits(uint32_t first, uint32_t last, uint32_t part) {
    const CpuMatrix& matrix = weights_.output;
    MatmulTask task = product_of(matrix, first, last, scratch_.y, scratch_.logits);
    task.columns = wanted_count_;
    task.planes = 2;
    multiply(matrix, task, part);
    const size_t begin = size_t{task.first_tile} * kTileRows,
                 end = std::min<size_t>(size_t{task.last_tile} * kTileRows, matrix.rows);
    for (uint32_t i = 0; i < wanted_count_; ++i) {
        float* logits = scratch_.logits + size_t{i} * matrix.rows;
        if (spec_->logit_scale != 1)
            kernels_->scale(logits + begin, spec_->logit_scale, end - begin);
        if (!all_finite(logits + begin, end - begin))
            bad_rows_[i].store(true, std::memory_order_relaxed);
    }
}

}  // namespace

Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const ModelTensors& tensors,
                                                  const BackendOptions& options,
                                                  const Kernels* kernels) {
    auto backend = std::make_unique<CpuBackend>();
    auto opened = backend->open(gguf, spec, tensors, options, kernels);
    if (!opened) return opened.error();
    return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
