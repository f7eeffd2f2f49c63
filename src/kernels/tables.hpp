// The table of each instruction set, and what one lends to another.
#pragma once

#include "kernels/internal.hpp"

#include <cstddef>
#include <cstdint>

namespace valar {
inline namespace v1 {
namespace detail {

namespace scalar {
extern const Kernels kernels;
void quantize_block(const float* x, uint32_t planes, ActivationBlock* out);
void rotate(float& a, float& b, float c, float s);
void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group);
void expand_kv(const void* key_group, const void* value_group, uint32_t head_dim, float* keys,
               float* values);
float read_kv(KvType type, const void* group, size_t index);
}  // namespace scalar

namespace avx2 {
extern const Kernels kernels, vnni_kernels, evex_kernels;
void quantize_column(const float* x, size_t n, uint32_t planes, size_t step, ActivationBlock* out);
void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y);
void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin);
void scale(float* x, float factor, size_t n);
void add(float* x, const float* y, size_t n);
void exp_all(float* x, size_t n);
void add_scaled(float* x, float factor, const float* y, size_t n);
void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group);
void expand_kv(const void* key_group, const void* value_group, uint32_t head_dim, float* keys,
               float* values);
void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n);
}  // namespace avx2

namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace dotprod {
extern const Kernels kernels;
}
namespace i8mm {
extern const Kernels kernels;
}
namespace wasm {
extern const Kernels kernels;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
