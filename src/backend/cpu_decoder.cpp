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

// What steps do. All matrices meet quantized activations, unless they are of F32, F16 or BF16.
// clang-format off
enum CpuDecoder::StageNumber : uint8_t {
    embed, norm_for_attention, qkv, rotate, attention, merge, add_attention, attention_aside,
    attention_later, norm_for_ffn, gate_up, gate_and_up, up_alone, activation, add_ffn, ffn_aside,
    ffn_later, experts_of, picks, expert_inputs, expert_ff, expert_activation, expert_outputs,
    picks_added, norm_wanted, logits_of,
};
const CpuDecoder::Stage CpuDecoder::stages_[] = {
    // x = embedding[token] * scale; cos, sin of position * frequency
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::embed_and_find_angles},
    // y = quantized(norm(x))
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_for_attention},
    // q = Wq y + bq; k = Wk y + bk; v = Wv y + bv
    {&CpuDecoder::count_qkv, &CpuDecoder::work_embd, &CpuDecoder::multiply_qkv_and_bias},
    // q = rope(q) * attention_scale; k = rope(k); k and v to the row's page
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::rotate_scale_store},
    // a = softmax(q . keys) values, segment by segment
    {&CpuDecoder::count_attention, &CpuDecoder::work_attention, &CpuDecoder::attend, true},
    // a = quantized(segments of a, merged where rows were split)
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::merge_and_quantize},
    // x += Wo a + bo
    {&CpuDecoder::count_output, &CpuDecoder::work_output, &CpuDecoder::project_attention_and_add},
    // z = Wo a + bo
    {&CpuDecoder::count_output, &CpuDecoder::work_output, &CpuDecoder::project_attention},
    // x += norm(z) * residual_scale
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_add_attention},
    // y = quantized(norm(x))
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_for_ffn},
    // h = quantized(silu(Wgate y) * (Wup y))
    {&CpuDecoder::count_ff, &CpuDecoder::work_gate_up, &CpuDecoder::gate_up_and_quantize},
    // h = Wgate y + bgate; u = Wup y + bup
    {&CpuDecoder::count_gate_and_up, &CpuDecoder::work_embd, &CpuDecoder::multiply_gate_and_up},
    // h = Wup y + bup
    {&CpuDecoder::count_ff, &CpuDecoder::work_embd, &CpuDecoder::multiply_up},
    // h = quantized(act(h) * u), or quantized(act(h))
    {&CpuDecoder::count_rows, &CpuDecoder::work_activate, &CpuDecoder::activate_and_quantize},
    // x += Wdown h + bdown
    {&CpuDecoder::count_down, &CpuDecoder::work_down, &CpuDecoder::project_ffn_and_add},
    // z = Wdown h + bdown
    {&CpuDecoder::count_down, &CpuDecoder::work_down, &CpuDecoder::project_ffn},
    // x += norm(z) * residual_scale
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_add_ffn},
    // r = Wrouter y + b
    {&CpuDecoder::count_experts, &CpuDecoder::work_embd, &CpuDecoder::route},
    // the experts that each row uses, and their weights
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::pick_experts},
    // quantized(y of the rows that use an expert)
    {&CpuDecoder::count_groups, &CpuDecoder::work_group, &CpuDecoder::gather_and_quantize, true},
    // gate and up of each expert times these, plus biases
    {&CpuDecoder::count_expert_ff, &CpuDecoder::work_expert_ff, &CpuDecoder::multiply_expert_ff},
    // h = quantized(act(gate) * up)
    {&CpuDecoder::count_groups, &CpuDecoder::work_group, &CpuDecoder::activate_experts, true},
    // o = down of each expert times h, plus bias
    {&CpuDecoder::count_expert_embd, &CpuDecoder::work_expert_embd, &CpuDecoder::project_experts},
    // x += sum of weight * o, or z =
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::add_picked},
    // y = quantized(norm(x)); from here on all rows want logits
    {&CpuDecoder::count_rows, &CpuDecoder::work_row, &CpuDecoder::norm_and_quantize_wanted},
    // logits = Woutput y * logit_scale; whether they are finite
    {&CpuDecoder::count_vocab, &CpuDecoder::work_logits, &CpuDecoder::multiply_logits_and_check},
};
// clang-format on

uint32_t CpuDecoder::step_kinds() { return 2 * static_cast<uint32_t>(std::size(stages_)); }

// ---- The program -----------------------------------------------------------------------------

void CpuDecoder::write_program() {
    add_step(embed, 0, embeds);
    for (uint32_t i = 0; i < weights_.layers.size(); ++i) add_layer(i);
    add_step(norm_wanted);
    add_step(logits_of);
}

void CpuDecoder::add_layer(uint32_t number) {
    const CpuLayer& layer = weights_.layers[number];
    const LayerSpec& spec = *layer.spec;
    const bool is_last = number + 1 == weights_.layers.size();
    add_step(norm_for_attention, number);
    add_step(qkv, number);
    add_step(rotate, number, is_last ? keeps_wanted : 0);
    add_step(attention, number);
    add_step(merge, number);
    const bool later = layer.adds_attention_later(*spec_);
    add_step(later ? attention_aside : add_attention, number);
    if (later && !spec.parallel) add_step(attention_later, number);
    add_step(norm_for_ffn, number);
    if (layer.has_experts()) add_experts(number);
    const bool ffn_is_later = layer.adds_ffn_later(*spec_);
    if (spec.n_ff) {
        if (!layer.gates_in_kernel()) add_step(spec.gated ? gate_and_up : up_alone, number);
        add_step(layer.gates_in_kernel() ? gate_up : activation, number);
        add_step(ffn_is_later ? ffn_aside : add_ffn, number);
    }
    if (ffn_is_later) add_step(ffn_later, number);
    if (spec.parallel) add_step(attention_later, number);
    program_.back().flags |= ends_layer;
}

void CpuDecoder::add_experts(uint32_t number) {
    add_step(experts_of, number);
    add_step(picks, number, groups_picks);
    add_step(expert_inputs, number);
    add_step(expert_ff, number);
    add_step(expert_activation, number);
    add_step(expert_outputs, number);
    add_step(picks_added, number);
}

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
    write_program();
    Carver carver{reinterpret_cast<uintptr_t>(scratch_memory_.data())};
    scratch_.place(carver, sizes_, spec.n_embd, spec.n_vocab);
    product_times_.resize(parts() * kWeightTypes);
    bad_rows_ = std::vector<std::atomic<bool>>(options.max_logit_rows);
    if (auto bytes = gguf.tensor_bytes(*tensors.model[TensorRole::token_embd].tensor);
        weights_.mapped && !bytes)
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
    if (row.position >= cpu_positions(options_) ||
        (spec_->position_embd && row.position >= spec_->n_context))
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

bool CpuDecoder::done() const { return step_ == program_.size(); }

void CpuDecoder::start_batch() {
    rows_ = batch_;
    step_ = unit_ = 0;
    plan_attention();
}

void CpuDecoder::run_slice(CpuMachine& machine) {
    VALAR_ASSERT(!done());
    const Stage& stage = stages_[step().stage];
    CpuStep work{};
    work.units = (this->*stage.units)();
    work.work = (this->*stage.work)();
    work.kind = 2 * uint32_t{step().stage} + (rows_.size() >= kManyRows);
    work.claims = stage.uneven                 ? CpuClaims::one_unit
                  : rows_.size() >= kClaimRows ? CpuClaims::few_units
                                               : CpuClaims::shares;
    work.job = run_job;
    work.context = this;
    unit_ = machine.run(work, unit_);
    if (unit_ == work.units) finish_step();
}

void CpuDecoder::run_job(void* context, uint32_t first, uint32_t last, uint32_t part) {
    CpuDecoder* self = static_cast<CpuDecoder*>(context);
    (self->*stages_[self->step().stage].job)(first, last, part);
}

void CpuDecoder::finish_step() {
    if (step().flags & keeps_wanted) keep_wanted_rows();
    if (step().flags & groups_picks) group_picks();
    unit_ = 0;
    if (rows_.empty()) step_ = static_cast<uint32_t>(program_.size());  // nobody asks for the rest
    else ++step_;
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
    std::string where = "the output matrix";
    while (step().stage != norm_wanted) {
        const Step done = step();
        do run_slice(machine);
        while (unit_ != 0);
        if (!(done.flags & (embeds | ends_layer)) || residual_is_finite()) continue;
        where = done.flags & embeds ? "the token embedding"
                                    : format("layer %u (blk.%u)", done.layer, done.layer);
        break;
    }
    step_ = static_cast<uint32_t>(program_.size());
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
