// >>backend
// The decoder: the table of its stages, and a batch's way through them. The stages themselves are in
// cpu_stages.cpp and cpu_attention.cpp.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr size_t kFewRows = 8;    // below: memory is what a batch waits for
constexpr size_t kClaimRows = 8;  // from here on units are claimed, a few at a time
constexpr size_t kManyRows = 8;   // from here on a product is timed apart: it costs less

}  // namespace

// By sixteen lanes, which compilers make vectors of.
bool all_finite(const float* x, size_t n) {
    constexpr uint32_t exponent = 0x7f800000u;  // all of it: infinite or no number
    const auto bad = [](float value) {
        return uint32_t{(bit_cast<uint32_t>(value) & exponent) == exponent};
    };
    uint32_t lanes[16] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; ++j) lanes[j] |= bad(x[i + j]);
    for (; i < n; ++i) lanes[0] |= bad(x[i]);
    return std::all_of(lanes, lanes + 16, [](uint32_t lane) { return lane == 0; });
}

// In the order in which they run; from begins_layer to ends_layer once a layer. All matrices meet
// quantized activations, unless they are of F32, F16 or BF16.
const CpuDecoder::Stage CpuDecoder::stages_[] = {
    // x = embedding[token] * embedding_scale; cos, sin of position * frequency
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::embed_and_find_angles, embeds},
    // y = quantized(rms_norm(x) * attn_norm)
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_for_attention,
     begins_layer},
    // q = Wq y + bq; k = Wk y + bk; v = Wv y + bv
    {&CpuDecoder::count_qkv, &CpuDecoder::work_qkv, &CpuDecoder::multiply_qkv_and_bias, 0},
    // q = rope(q) * attention_scale; k = rope(k); k and v to the row's page
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::rotate_scale_store, stores_keys},
    // a = softmax(q . keys) values, segment by segment
    {&CpuDecoder::count_attention, &CpuDecoder::work_attention, &CpuDecoder::attend, uneven_units},
    // a = quantized(segments of a, merged where rows were split)
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::merge_and_quantize, 0},
    // x += Wo a
    {&CpuDecoder::count_embd, &CpuDecoder::work_output, &CpuDecoder::project_attention_and_add, 0},
    // y = quantized(rms_norm(x) * ffn_norm)
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_for_ffn, 0},
    // h = quantized(silu(Wgate y) * (Wup y))
    {&CpuDecoder::count_ff, &CpuDecoder::work_gate_up, &CpuDecoder::gate_up_and_quantize, 0},
    // x += Wdown h
    {&CpuDecoder::count_embd, &CpuDecoder::work_down, &CpuDecoder::project_ffn_and_add, ends_layer},
    // y = quantized(rms_norm(x) * output_norm); from here on all rows want logits
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_wanted, 0},
    // logits = Woutput y * logit_scale; whether they are finite
    {&CpuDecoder::count_vocab, &CpuDecoder::work_logits, &CpuDecoder::multiply_logits_and_check, 0},
};

uint32_t CpuDecoder::stage_count() { return static_cast<uint32_t>(std::size(stages_)); }

uint32_t CpuDecoder::stage_with(StageFlag flag) {
    uint32_t stage = 0;
    while (!(stages_[stage].flags & flag)) ++stage;
    return stage;
}

uint32_t CpuDecoder::step_kinds() { return 2 * stage_count(); }

Result<void> CpuDecoder::open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, const Kernels& kernels) {
    gguf_ = &gguf;
    spec_ = &spec;
    options_ = options;
    kernels_ = &kernels;
    auto layout = lay_out_cpu(gguf, spec, tensors, options, 0);
    if (!layout) return layout.error();
    if (auto done = allocate(layout->plan); !done) return done;
    layout = lay_out_cpu(gguf, spec, tensors, options,
                         reinterpret_cast<uintptr_t>(weights_memory_.data()));
    weights_ = std::move(layout->weights);
    ropes_ = std::move(layout->ropes);
    sizes_ = layout->sizes;
    page_bytes_ = layout->page_bytes;
    Carver carver{reinterpret_cast<uintptr_t>(scratch_memory_.data())};
    scratch_.place(carver, sizes_, spec.n_embd, spec.n_vocab);
    product_times_.resize(parts() * kWeightTypes);
    bad_rows_ = std::vector<std::atomic<bool>>(options.max_logit_rows);
    if (auto bytes = gguf.tensor_bytes(*tensors.token_embd); weights_.mapped && !bytes)
        return bytes.error();
    return {};
}

Result<void> CpuDecoder::allocate(const MemoryPlan& plan) {
    const struct {
        Buffer* buffer;
        uint64_t bytes;
        const char* what;
    } wanted[] = {
        {&weights_memory_, plan.weights, "weights"},
        {&kv_, plan.kv, "keys and values (context)"},
        {&scratch_memory_, plan.scratch, "scratch"},
    };
    for (const auto& [buffer, bytes, what] : wanted) {
        auto memory = Buffer::allocate(bytes, what, buffer == &weights_memory_, options_.allocator);
        if (!memory) return memory.error();
        *buffer = std::move(*memory);
    }
    return {};
}

// ---- A batch, stage after stage --------------------------------------------------------------

Result<void> CpuDecoder::begin(std::span<const BatchRow> rows) {
    const auto refuse = [](std::string what) {
        return make_error(ErrorKind::internal, std::move(what));
    };
    if (rows.empty() || rows.size() > options_.max_batch_rows)
        return refuse(
            format("batch: %zu rows are not in 1..%u", rows.size(), options_.max_batch_rows));
    uint32_t wanted = 0;
    for (const BatchRow& row : rows) {
        if (auto good = check_row(row); !good) return good;
        if (!row.logits) continue;
        if (wanted == options_.max_logit_rows)
            return refuse(format("batch: more than %u rows want logits", wanted));
        scratch_.wanted[wanted++] = static_cast<uint32_t>(&row - rows.data());
    }
    batch_ = rows;
    wanted_count_ = wanted;
    for (uint32_t i = 0; i < wanted; ++i) bad_rows_[i].store(false, std::memory_order_relaxed);
    start_batch();
    return {};
}

Result<void> CpuDecoder::check_row(const BatchRow& row) const {
    if (!row.embedding && (row.token < 0 || static_cast<uint32_t>(row.token) >= spec_->n_vocab))
        return make_error(ErrorKind::internal, format("batch: there is no token %d", row.token));
    if (row.position >= cpu_positions(options_))
        return make_error(ErrorKind::internal,
                          format("batch: there is no position %u", row.position));
    return {};
}

bool CpuDecoder::has_few_rows() const { return batch_.size() < kFewRows; }

void CpuDecoder::set_prefetch(const CpuTrials& trials) {
    for (uint32_t type = 0; type < kWeightTypes; ++type) ahead_[type] = trials.ahead(type);
    times_types_ = trials.times_types() && batch_.size() == 1;
    if (times_types_) std::fill(product_times_.begin(), product_times_.end(), ProductTime{});
}

BatchCost CpuDecoder::add_times(BatchCost cost) const {
    for (uint32_t type = 0; times_types_ && type < kWeightTypes; ++type) {
        ProductTime sum;
        for (uint32_t part = 0; part < parts(); ++part) {
            const ProductTime& time = product_times_[part * kWeightTypes + type];
            sum.ns += time.ns;
            sum.work += time.work;
        }
        if (sum.work)
            cost.type_ns[type] = static_cast<double>(sum.ns) / static_cast<double>(sum.work);
    }
    return cost;
}

bool CpuDecoder::done() const { return stage_ == stage_count(); }

void CpuDecoder::start_batch() {
    rows_ = batch_;
    stage_ = layer_ = unit_ = 0;
    plan_attention();
}

void CpuDecoder::run_slice(CpuMachine& machine) {
    VALAR_ASSERT(!done());
    const Stage& stage = stages_[stage_];
    CpuStep step{};
    step.units = (this->*stage.units)();
    step.work = (this->*stage.work)();
    step.kind = 2 * stage_ + (rows_.size() >= kManyRows);
    step.claims = stage.flags & uneven_units   ? CpuClaims::one_unit
                  : rows_.size() >= kClaimRows ? CpuClaims::few_units
                                               : CpuClaims::shares;
    step.job = run_job;
    step.context = this;
    unit_ = machine.run(step, unit_);
    if (unit_ == step.units) finish_stage();
}

void CpuDecoder::run_job(void* context, uint32_t first, uint32_t last, uint32_t part) {
    CpuDecoder* self = static_cast<CpuDecoder*>(context);
    (self->*stages_[self->stage_].job)(first, last, part);
}

// The only place that knows which stage comes next.
void CpuDecoder::finish_stage() {
    const uint32_t flags = stages_[stage_].flags;
    unit_ = 0;
    if (flags & stores_keys && in_last_layer()) {
        keep_wanted_rows();
        if (rows_.empty()) {  // nobody asks for what would come next
            stage_ = stage_count();
            return;
        }
    }
    if (flags & ends_layer && !in_last_layer()) {
        ++layer_;
        stage_ = stage_with(begins_layer);
    } else {
        ++stage_;
    }
}

// Once the last layer has its keys and values only rows that want logits matter.
void CpuDecoder::keep_wanted_rows() {
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
}

// Where logits are not finite, finds out where that began.
void CpuDecoder::check_logits(CpuMachine& machine) {
    if (std::any_of(bad_rows_.begin(), bad_rows_.begin() + wanted_count_,
                    [](const std::atomic<bool>& bad) { return bad.load(); }))
        bad_numbers_ = locate_bad_numbers(machine);
}

// Computes the batch once more, which gives the same numbers, and looks at them after every layer.
Error CpuDecoder::locate_bad_numbers(CpuMachine& machine) {
    start_batch();
    machine.forget_deadline();
    const uint32_t last = stage_with(ends_layer);
    std::string where = "the output matrix";
    while (stage_ <= last) {
        const uint32_t flags = stages_[stage_].flags, in = layer_;
        run_slice(machine);
        if (!(flags & (embeds | ends_layer)) || residual_is_finite()) continue;
        where = flags & embeds ? "the token embedding" : format("layer %u (blk.%u)", in, in);
        break;
    }
    stage_ = stage_count();
    return make_error(ErrorKind::bad_data, gguf_->name() +
                                               ": the logits are not finite; the first number "
                                               "that is not came from " +
                                               where);
}

bool CpuDecoder::residual_is_finite() const {
    return all_finite(scratch_.x, rows_.size() * spec_->n_embd);
}

Result<std::span<const float>> CpuDecoder::logits(uint32_t i) const {
    VALAR_ASSERT(i < wanted_count_);
    if (bad_rows_[i].load(std::memory_order_relaxed)) return bad_numbers_;
    return std::span<const float>(scratch_.logits + size_t{i} * spec_->n_vocab, spec_->n_vocab);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
