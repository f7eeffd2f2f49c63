#pragma once

#include "backend/cpu_layout.hpp"
#include "backend/cpu_machine.hpp"
#include "backend/cpu_trials.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// Whether each of n numbers is finite.
bool all_finite(const float* x, size_t n);

// Fills the weights from the file, slice by slice.
class CpuLoader {
public:
    void open(const Gguf& gguf, const CpuWeights& weights, std::span<std::byte> staging,
              uint32_t parts);
    bool done() const { return item_ == weights_->items.size(); }
    // 0 to 1
    float progress() const {
        return static_cast<float>(static_cast<double>(loaded_bytes_) /
                                  static_cast<double>(bytes_to_load_));
    }
    Result<void> load(uint64_t budget_us, Team& team);

private:
    struct PackJob {
        const LoadItem* item;
        const std::byte* source;  // of tile `first`
        uint32_t first, last;
    };
    Result<void> load_item_slice(Team& team);
    static void pack_part(void* context, uint32_t part, uint32_t parts);

    const Gguf* gguf_ = nullptr;
    const CpuWeights* weights_ = nullptr;
    std::span<std::byte> staging_;
    uint64_t parts_ = 1;
    size_t item_ = 0;  // the next to load, and its next tile
    uint32_t tile_ = 0;
    uint64_t loaded_bytes_ = 0, bytes_to_load_ = 0;
};

// The forward pass: weights, scratch arrays and the stages that a batch goes through. A stage's unit
// is a row, a pair of tiles of a matrix or an AttentionUnit of one key head.
class CpuDecoder {
public:
    Result<void> open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                      const BackendOptions& options, const Kernels& kernels);
    const CpuWeights& weights() const { return weights_; }
    uint32_t parts() const { return static_cast<uint32_t>(sizes_.parts); }
    std::span<std::byte> staging() const {
        return {scratch_memory_.data(), scratch_memory_.size()};
    }
    static uint32_t step_kinds();

    Result<void> begin(std::span<const BatchRow> rows);
    void abandon() { batch_ = rows_ = {}; }
    std::span<const BatchRow> batch() const { return batch_; }  // in work; empty: none
    bool has_few_rows() const;  // then its speed depends on what CpuTrials tries
    void set_prefetch(const CpuTrials& trials);
    BatchCost add_times(BatchCost cost) const;  // of products, by the type of their weights
    bool done() const;
    void run_slice(CpuMachine& machine);  // a part of the stage that is next
    void check_logits(CpuMachine& machine);
    Result<std::span<const float>> logits(uint32_t i) const;

    std::byte* kv_page(const CpuLayer& in, uint32_t page) const {
        VALAR_ASSERT(in.has_page(page));
        return kv_.data() + in.kv_offset + (page - in.first_page) * in.kv_page_bytes();
    }
    size_t page_bytes(uint32_t page) const {
        return static_cast<size_t>(page_bytes_[page >= options_.kv_pages]);
    }

private:
    // What a step does: `job` does units first .. last - 1.
    struct Stage {
        uint64_t (CpuDecoder::*units)() const;
        uint64_t (CpuDecoder::*work)() const;  // products of a unit, about
        void (CpuDecoder::*job)(uint32_t first, uint32_t last, uint32_t part);
        bool uneven = false;  // units are claimed one by one
    };
    static const Stage stages_[];
    enum StageNumber : uint8_t;
    enum StepFlag : uint8_t { keeps_wanted = 1, embeds = 2, ends_layer = 4, groups_picks = 8 };
    // The program of the model: what is done, one step after the other.
    struct Step {
        StageNumber stage;
        uint8_t flags;
        uint32_t layer;
    };
    void add_step(StageNumber stage, uint32_t layer = 0, uint8_t flags = 0) {
        program_.push_back({stage, flags, layer});
    }
    void write_program();
    void add_layer(uint32_t number);
    void add_experts(uint32_t number);
    const Step& step() const { return program_[step_]; }

    const CpuLayer& layer() const {
        VALAR_ASSERT(step_ < program_.size());
        return weights_.layers[step().layer];
    }
    uint32_t row_count() const { return static_cast<uint32_t>(rows_.size()); }
    bool splits_rows() const { return row_count() <= sizes_.split_rows; }  // attention's schedule

    Result<void> allocate(const MemoryPlan& plan);
    Result<void> check_row(const BatchRow& row) const;
    void start_batch();
    static void run_job(void* context, uint32_t first, uint32_t last, uint32_t part);
    void finish_step();
    void keep_wanted_rows();
    Error locate_bad_numbers(CpuMachine& machine);
    bool residual_is_finite() const;

    // Of a row, the pages that this layer's keys and values go to.
    const uint32_t* pages(const BatchRow& row) const {
        return layer().first_page ? row.window_pages : row.pages;
    }
    const CpuMatrix& matrix(TensorRole role) const { return layer().matrix(role); }
    uint64_t count_rows() const { return row_count(); }
    uint64_t count_qkv() const {
        return matrix(TensorRole::q).units() + matrix(TensorRole::k).units() +
               matrix(TensorRole::v).units();
    }
    uint64_t count_attention() const { return uint64_t{unit_count_} * layer().spec->n_kv_heads; }
    uint64_t count_output() const { return matrix(TensorRole::attn_output).units(); }
    uint64_t count_down() const { return matrix(TensorRole::down).units(); }
    uint64_t count_ff() const { return matrix(TensorRole::up).units(); }
    uint64_t count_gate_and_up() const { return matrix(TensorRole::gate).units() + count_ff(); }
    uint64_t count_vocab() const { return weights_.model.matrix(TensorRole::output).units(); }
    uint64_t work_row() const { return uint64_t{spec_->n_embd} * 8; }
    uint64_t work_unit(uint64_t columns) const {
        return kUnitTiles * kTileRows * columns * rows_.size() * sizes_.planes;
    }
    uint64_t work_embd() const { return work_unit(spec_->n_embd); }
    uint64_t work_attention() const;
    uint64_t work_output() const { return work_unit(matrix(TensorRole::attn_output).cols); }
    uint64_t work_gate_up() const { return 2 * work_unit(spec_->n_embd); }
    uint64_t work_activate() const { return uint64_t{layer().spec->n_ff} * 32; }
    uint64_t work_down() const { return work_unit(matrix(TensorRole::down).cols); }
    uint64_t count_experts() const { return matrix(TensorRole::router).units(); }
    uint64_t count_groups() const { return group_count_; }
    uint64_t count_expert_ff() const {
        return uint64_t{group_count_} * layer().gates[0].units() *
               (layer().gates_experts_in_kernel() ? 1 : 2);
    }
    uint64_t count_expert_embd() const { return uint64_t{group_count_} * layer().downs[0].units(); }
    uint64_t work_group() const { return work_row() * rows_.size(); }
    uint64_t work_expert(uint64_t columns) const {
        return work_unit(columns) * layer().spec->experts.used / std::max(group_count_, 1u);
    }
    uint64_t work_expert_ff() const {
        return work_expert(spec_->n_embd) * (layer().gates_experts_in_kernel() ? 2 : 1);
    }
    uint64_t work_expert_embd() const { return work_expert(layer().downs[0].cols); }
    uint64_t work_logits() const {
        return kUnitTiles * kTileRows * 2 * uint64_t{spec_->n_embd} * row_count();
    }

    // Two schedules of attention (cpu_attention.cpp).
    void plan_attention();
    void plan_whole_rows();
    void plan_split_rows();
    struct SegmentKeys {
        const void *keys[kSegment / kKeyGroup], *values[kSegment / kKeyGroup];
    };
    struct SegmentResult {
        float max, sum;
        const float* out;
    };
    struct AttentionState {
        float *max, *sum, *out;
    };
    AttentionTask attention_task(const AttentionUnit& unit, uint32_t kv_head,
                                 const QueryScratch& scratch, const SegmentKeys& found) const;
    void find_keys(const AttentionUnit& unit, uint32_t kv_head, uint32_t segment,
                   const QueryScratch& scratch, SegmentKeys& found) const;
    void find_visible(const AttentionUnit& unit, uint32_t segment,
                      const QueryScratch& scratch) const;
    void attend_whole_rows(const AttentionUnit& unit, uint32_t kv_head,
                           const QueryScratch& scratch);
    void attend_split_row(const AttentionUnit& unit, uint32_t kv_head, const QueryScratch& scratch);
    float* query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const;
    void merge_segment(uint32_t position, uint32_t segment, const SegmentResult& from,
                       const AttentionState& to) const;
    void merge_split_row(uint32_t row);

    void finish_query(uint32_t head, float max, float sum, float* out) const;

    // The stages, in the order of stages_ (cpu_stages.cpp).
    void embed_and_find_angles(uint32_t first, uint32_t last, uint32_t part);
    void norm_and_quantize_for_attention(uint32_t first, uint32_t last, uint32_t part);
    void multiply_qkv_and_bias(uint32_t first, uint32_t last, uint32_t part);
    void rotate_scale_store(uint32_t first, uint32_t last, uint32_t part);
    void attend(uint32_t first, uint32_t last, uint32_t part);
    void merge_and_quantize(uint32_t first, uint32_t last, uint32_t part);
    void project_attention_and_add(uint32_t first, uint32_t last, uint32_t part);
    void project_attention(uint32_t first, uint32_t last, uint32_t part);
    void norm_and_add_attention(uint32_t first, uint32_t last, uint32_t part);
    void norm_and_quantize_for_ffn(uint32_t first, uint32_t last, uint32_t part);
    void gate_up_and_quantize(uint32_t first, uint32_t last, uint32_t part);
    void multiply_gate_and_up(uint32_t first, uint32_t last, uint32_t part);
    void multiply_up(uint32_t first, uint32_t last, uint32_t part);
    void activate_and_quantize(uint32_t first, uint32_t last, uint32_t part);
    void project_ffn_and_add(uint32_t first, uint32_t last, uint32_t part);
    void project_ffn(uint32_t first, uint32_t last, uint32_t part);
    void norm_and_add_ffn(uint32_t first, uint32_t last, uint32_t part);
    void route(uint32_t first, uint32_t last, uint32_t part);
    void pick_experts(uint32_t first, uint32_t last, uint32_t part);
    void gather_and_quantize(uint32_t first, uint32_t last, uint32_t part);
    void multiply_expert_ff(uint32_t first, uint32_t last, uint32_t part);
    void activate_experts(uint32_t first, uint32_t last, uint32_t part);
    void project_experts(uint32_t first, uint32_t last, uint32_t part);
    void add_picked(uint32_t first, uint32_t last, uint32_t part);
    void norm_and_quantize_wanted(uint32_t first, uint32_t last, uint32_t part);
    void multiply_logits_and_check(uint32_t first, uint32_t last, uint32_t part);

    void pick(uint32_t row);
    void group_picks();
    void weigh_shared(uint32_t row, float* h) const;
    ActivationBlock* group_blocks(const ExpertGroup& group, size_t columns) const;
    void quantize_expert(const ExpertGroup& group, const float* x, size_t columns);
    struct ExpertProduct {
        const ExpertGroup& group;
        const CpuMatrix& weights;
        const CpuMatrix* up;  // may be null, as bias may
        const float *bias, *x;
        float* y;
    };
    void multiply_expert(const ExpertProduct& product, uint32_t first, uint32_t last,
                         uint32_t part);
    void embed_row(const BatchRow& row, float* x, uint32_t part);
    void read_row(const CpuMatrix& matrix, uint32_t number, float* out, uint32_t part);
    void find_angles(const BatchRow& row, float* cos_sin) const;
    void norm(const float* x, const float* weight, const float* bias, float* y) const;
    void norm_and_quantize(uint32_t first, uint32_t last, const CpuTensors& in, TensorRole weight,
                           TensorRole bias, uint64_t planes);
    void norm_heads(float* q, float* k) const;
    float query_scale(uint32_t position) const;
    void norm_and_add(uint32_t first, uint32_t last, TensorRole weight);
    struct Product {
        const CpuMatrix* matrix;
        const float* bias;
        float* y;
    };
    void multiply_several(std::span<const Product> products, uint32_t first, uint32_t last,
                          uint32_t part);
    void add_bias(const MatmulTask& task, const float* bias) const;
    PackedMatrix pack_mapped(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                             std::byte* packed);
    std::byte* mapped_units(uint32_t part) const {
        return scratch_.mapped_units + part * sizes_.mapped_units;
    }
    MatmulTask product_of(const CpuMatrix& matrix, uint32_t first, uint32_t last, const float* x,
                          float* y) const;
    void multiply(const CpuMatrix& matrix, MatmulTask task, uint32_t part,
                  const CpuMatrix* up = nullptr);
    void multiply_packed(MatmulTask task, uint32_t part);
    void project(TensorRole weights, TensorRole bias, const ActivationBlock* blocks, const float* x,
                 float* to, uint32_t first, uint32_t last, uint32_t part);
    uint32_t group_end(uint32_t row, uint32_t last, uint64_t planes) const;
    void quantize_group(const float* x, uint32_t n, uint64_t planes, uint32_t first, uint32_t last,
                        ActivationBlock* out) const;

    const Gguf* gguf_ = nullptr;
    const ModelSpec* spec_ = nullptr;
    BackendOptions options_;
    const Kernels* kernels_ = nullptr;
    CpuWeights weights_;
    std::vector<RopeTable> ropes_;
    CpuSizes sizes_{};
    CpuScratch scratch_{};
    PageBytes page_bytes_{};
    Buffer weights_memory_, kv_, scratch_memory_;

    std::span<const BatchRow> batch_;  // in work; empty: none
    std::span<const BatchRow> rows_;   // of it that are still computed
    std::vector<Step> program_;
    uint32_t step_ = 0, unit_ = 0;  // what is next, and its next unit
    uint32_t unit_count_ = 0, wanted_count_ = 0, group_count_ = 0;
    struct ProductTime {
        uint64_t ns = 0, work = 0;
    };
    bool times_types_ = false;
    size_t ahead_[kWeightTypes] = {};          // prefetch distances
    std::vector<ProductTime> product_times_;   // (parts, kWeightTypes) of this batch
    std::vector<std::atomic<bool>> bad_rows_;  // (max_logit_rows) have numbers not finite
    Error bad_numbers_;                        // where the first of them came from
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
