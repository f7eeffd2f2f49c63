// ---- Words ------------------------------------------------------------------------------------
//
// One word has one meaning in this section:
//   row           an output row of a weight matrix: the weights whose sum of products is one number
//   column        an input vector that meets a matrix; the backend has one for a token of a batch
//   tile          16 rows of a matrix, packed so that a lane of a vector register is a row
//   pair          two tiles that one kernel call multiplies, so that two streams come from memory
//   block         32 neighbouring values of a row or of a column that share a scale
//   super-block   8 blocks of a k-quant, under scales of their own
//   header        the scales of a super-block, before its first block
//   code          the unsigned integer of a weight; weight = code - bias of its type
//   bias          of a type: what is taken from a code; of a model: what a product gets added (4)
//   plane         a column's values as blocks of int8; precision = fine has a second for the rest
//   plane group   eight planes that lie beside each other, block after block
//   quad          four neighbouring weights of a row in a packed tile: their codes fill one word
//   lane          an element of a vector register
//   panel         a tile whose codes were unpacked to signed bytes, to serve many columns
//   shape         how many columns one kernel call takes
//   chunk         the blocks (or floats) that stay in a near cache while all columns meet them
//   batch         the columns of a task that meet a pair of tiles one after the other
//   head          of attention only: head_dim values of a query, a key or a value
//   query         one query head at one position; several share the keys of one key/value head
//   position      of a token in its sequence; it has one key and one value a key/value head
//   key group     16 neighbouring positions, whose keys lie side by side (their values beside them)
//   segment       256 absolute positions: the unit in which attention is computed and then merged
//   page          the backend's unit of memory for keys and values: some key groups (>>backend)
//   slot          a position's place in its key group
//   part          one of the shares into which the team divides a job, one a thread
//
// ---- The numeric definition, numerics = 1 ----------------------------------------------------
//
// All arithmetic is binary32 unless "double" is said. "a + b", "a * b", "a / b", "sqrt" round once,
// to nearest even. fma(a, b, c) is a * b + c rounded once. Sums are sequences: the order below is
// the order of operations. Nothing else may be fused or reordered.
//
//  1. Activation blocks. A vector x of n values (n a multiple of 32) that meets quantized weights
//     is cut into blocks of 32. Of a block: amax = max |x_i|. If amax < 2^-100: d = 0, all h_i = 0.
//     If an x_i is not finite: d is not a number, all h_i = 0 (so it shows in the logits, an
//     error). Else d = amax / 127, inv = 127 / amax, h_i = the integer nearest to the exact product
//     x_i * inv (ties to even), clamped to -127..127. (precision = fast: this one plane.)
//     precision = fine adds a second plane: r_i = fma(-d, h_i, x_i), d2 = d / 254, inv2 = inv *
//     254, l_i = the integer nearest to the exact product r_i * inv2 (ties to even), clamped to
//     -127..127; d = 0 or no number gives d2 = d, l_i = 0. A plane is a vector of blocks of its
//     own, (d, h) or (d2, l). Of a block also: hsum = sum of h_i (exact integer), s = d *
//     float(hsum); of the second plane with d2 and l_i.
//  2. Dot product of a row of quantized weights and one plane: acc = 0, then block after block, in
//     ascending order, with w_i the integers of the row's block and dw, m its scales (binary16 made
//     binary32, exact):
//       Q4_0 (w = nibble - 8), Q5_0 (w = 5 bits - 16), Q8_0 (w = int8), IQ4_NL (w = the value that
//       the nibble stands for), MXFP4 (likewise; its scale is 2^(e - 128)):
//           acc = fma(float(sum w_i h_i), dw * d, acc)
//       Q4_1 (w = nibble), Q5_1 (w = 5 bits):
//           acc = fma(float(sum w_i h_i), dw * d, acc); acc = fma(m, s, acc)
//       Q4_K (w = nibble), Q5_K (w = 5 bits): a block is one of the eight sub-blocks of 32, dw = D
//           * sc, m = -(Dmin * mn), with D, Dmin the super-block's scales and sc, mn the
//           sub-block's 6-bit integers (both products are exact, m may be -0); then as Q4_1.
//       Q6_K (w = 6 bits - 32): a block is two sub-blocks of 16 with int8 scales sc0, sc1; dw = D:
//           S = sc0 * sum w_i h_i (first 16) + sc1 * sum w_i h_i (last 16) (exact integer, below
//             2^24)
//           acc = fma(float(S), dw * d, acc)
//       Q3_K, IQ4_XS, IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S, IQ1_M, TQ1_0, TQ2_0: as Q6_K.
//           w is an integer of at most 8 bits that the codes stand for (kernels/weight_types.hpp);
//           sc0, sc1: Q3_K 6 bits - 32; IQ4_XS sc0 = sc1 = 6 bits - 32; IQ1 to IQ3 2 s + 1, s being
//           the 3 or 4 bits of the file; TQ 1. D is the super-block's scale; of IQ3_XXS a quarter,
//           of IQ2 and IQ1 an eighth of it.
//       Q2_K (w = 2 bits): S and dw as Q6_K, sc0 and sc1 of 4 bits; besides 4-bit minimums mn0, mn1:
//           acc = fma(float(S), dw * d, acc); M = mn0 * (sum of the first 16 h_i) + mn1 * (of the
//             last 16); acc = fma(float(M), -Dmin * d, acc)
//       NVFP4 (w as MXFP4): two halves with scales d0, d1, each half of the file's number (E4M3):
//           S = fma(float(sum w_i h_i of the first), d0, float(sum w_i h_i of the last) * d1)
//           acc = fma(S, d, acc)
//     Two planes: y = acc of plane one + acc of plane two.
//     The output matrix (logits) always uses two planes, whatever the precision.
//  3. F32, F16 and BF16 rows meet the unquantized x: acc = 0; acc = fma(w_k, x_k, acc) for
//     ascending k.
//  4. A bias is added to the finished sum: y + b. A residual: x + y.
//  5. Sum along a vector ("16 lanes"): lane j adds the elements i = j, j + 16, j + 32 ... in that
//     order, starting from 0; then lane j (j < 8) = lane j + lane j+8; j < 4: + lane j+4; j < 2: +
//     lane j+2; lane 0 + lane 1 is the sum. Elements past the end add nothing.
//  6. RMS norm: ss = 16-lane sum where adding an element is lane = fma(x_i, x_i, lane);
//     scale = 1 / sqrt(ss / float(n) + eps); y_i = (x_i * scale) * w_i.
//  7. exp(x), x in binary32: x < -87 gives 0; x > 88 counts as 88. k = the integer nearest to the
//     exact product x * log2e (ties to even; log2e = 0x1.715476p+0f); r = fma(-k, ln2_hi, x);
//     r = fma(-k, ln2_lo, r) (ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f); p = c6;
//     p = fma(p, r, c5) ... down to c0 = 1 (c1 = 1); the result is p * 2^k (exact; k in -126..127).
//     exp(0) = 1. c2 = 0x1.fffffcp-2f, c3 = 0x1.555492p-3f, c4 = 0x1.5558bp-5f, c5 =
//     0x1.123994p-7f, c6 = 0x1.6a4e0cp-10f (least maximal relative error on +-ln(2)/2: 3.1e-9
//     before rounding).
//  8. silu(x) = x / (1 + exp(-x)). Feed-forward: h_i = silu(gate_i) * up_i.
//  9. Rope. Frequencies, in double: f_i = exp2(-(2 i / n_rot) * log2(base)) for pair i (one
//     quotient, its sign changed, one product), times or divided by what the model's scaling says
//     (each one double operation, rounded); angle = position as double * f_i (rounded); its cos and
//     sin in double (12), rounded to binary32: c, s.
//     A pair (a, b), elements (2i, 2i+1) for "norm" rope and (i, i + n_rot/2) for "neox":
//       t = b * s;  a' = fma(a, c, -t);    t = b * c;  b' = fma(a, s, t).
// 10. Attention, for one query head and one position. q' = rope(q) * (1 / sqrt(head_dim)) (the
//     factor is a binary32 number of the model: attention_scale; one multiplication an element).
//     Keys and values are stored as binary16 (rounded to nearest even, too large is infinity),
//     binary32, or (q8_0) in blocks of 32 neighbours of a head as d * h, with h of one plane as in 1
//     and its d rounded to binary16; the product is exact and not a number where d is not (kv_type).
//     Keys are stored rotated. Visible to a position are itself and those before it; where the
//     layer has a window of n, the last n of these. Positions are cut into segments of 256 absolute
//     positions (0..255, 256..511, ...). In a segment, over its visible positions j in ascending
//     order:
//       score_j: acc = 0; acc = fma(q'_e, k_j,e, acc) for ascending e
//       m = max score_j (a zero is +0);  p_j = exp(score_j - m)
//       l = 16-lane sum of p_j, lane = j mod 16 by absolute position, adding is lane + p_j; tree as
//         in 5
//       o_e = 0; o_e = fma(p_j, v_j,e, o_e) for ascending j
//     Segments are merged in ascending order: the first one gives (M, L, O) = (m, l, o); for each
//     next,
//       M' = max(M, m); a = exp(M - M'); b = exp(m - M'); L = fma(l, b, L * a);
//       O_e = fma(o_e, b, O_e * a); M = M'.
//     Result: O_e * (1 / L). A segment without visible positions is skipped.
// 11. An embedding row is dequantized: d * w for types without minimum (those with sub-scales: (D *
//     sc) * w, D * sc exact), fma(dw, w, m) with a minimum (Q4_K, Q5_K: dw, m as in 2; Q2_K: dw = D *
//     sc, m = -(Dmin * mn)); F16, BF16, F32: the value.
//     Where the model scales it (embedding_scale), each value is multiplied once.
// 12. rope_math: functions in double, from + - * / that round once each, never fused. nearest(x) is
//     the nearest integer, ties to even. 1/n! and 1/n are one quotient (n! is exact).
//       exp2(x): x < -1022 gives 0, x >= 1023 infinity. k = nearest(x); t = (x - k) *
//         0x1.62e42fefa39efp-1; p = 1/13!; p = p * t + 1/n! for n = 12 down to 0; the result is p *
//         2^k (exact).
//       log2(x), x > 0 (0 gives -infinity, less no number): x = m * 2^e with 1 <= m < 2; where
//         m > 0x1.6a09e667f3bcdp+0: m = m / 2, e = e + 1. u = (m - 1) / (m + 1); z = u * u; p =
//         1/23; p = p * z + 1/n for n = 21, 19 .. 1; the result is e + (u * p) *
//         0x1.71547652b82fep+1.
//       log(x) = log2(x) * 0x1.62e42fefa39efp-1.
//       sin, cos (x), |x| < 2^30: k = nearest(x * 0x1.45f306dc9c883p-1);
//         r = ((x - k * 0x1.921fb544p+0) - k * 0x1.0b4611a6p-34) - k * 0x1.3198a2ep-69; z = r * r;
//         S = 1/17!; S = S * z - 1/15!; S = S * z + 1/13!; .. (signs alternate) .. + 1; S = r * S;
//         C = 1/16!; C = C * z - 1/14!; C = C * z + 1/12!; .. + 1;
//         (sin, cos) = (S, C), (C, -S), (-S, -C), (-C, S) for k mod 4 = 0, 1, 2, 3.
//       (Within 1e-15 relative, sin and cos 1e-15 absolute to |x| = 2^20.)
// 13. A forward pass. x = the token's embedding row (11). In each layer: y = rms_norm(x); q, k, v =
//     the matrix products with y (1 to 3), each plus its bias where there is one (4); rope of q and
//     k (9); attention (10); x = x + attn_output matrix times it; y = rms_norm(x); gate
//     and up = products with y; h as in 8; x = x + ffn_down matrix times h. Logits: the output
//     matrix (the embedding where there is none) times rms_norm(x); where the model scales them
//     (logit_scale), each is multiplied once. base and the factors of rope are binary32 numbers of
//     the model (of two lists of factors the second where the sequence, up to the token whose logits
//     are computed, is longer than the first one reaches: then for all of its tokens);
//     attention_scale, where the model says nothing, is 1 / sqrt(float(head_dim)).
// 14. Layer norm: mean = 16-lane sum of x_i, / float(n); d_i = x_i - mean; ss = 16-lane sum where
//     adding an element is lane = fma(d_i, d_i, lane); scale = 1 / sqrt(ss / float(n) + eps);
//     y_i = (d_i * scale) * w_i, plus its bias where there is one.
// 15. Soft cap of x: u = x / cap; t = 1 - 2 / (exp(u + u) + 1); cap * t. Scores are capped before
//     their maximum is taken, logits after their scale.
// 16. Activations other than silu:
//       gelu_tanh(x): z = x * fma(x * x, 0x1.2444f2p-4f, 0x1.988454p+0f); x / (1 + exp(-z)).
//       gelu(x): a = |x| * 0x1.6a09e6p-1f; t = 1 / fma(0x1.4f740ap-2f, a, 1);
//         p = c5; p = fma(p, t, c4) .. fma(p, t, c1); e = ((t * p) * exp(-(a * a))) * 0.5;
//         x * (x < 0 ? e : 1 - e). (Abramowitz and Stegun,
//         7.1.26: c1 = 0.254829592, c2 = -0.284496736, c3 = 1.421413741, c4 = -1.453152027,
//         c5 = 1.061405429, p = 0.3275911, rounded to binary32.)
//       relu_squared(x): r = x > 0 ? x : 0; r * r.
//       silu_clamped, of gate and up: g = min(gate, 7), u = up clamped to -7..7;
//         h = (u + 1) * (g / (1 + exp(-(g * 1.702)))).
//       xielu(x), x > 0: (positive * x) * x + linear * x; else with e = exp(min(x, most)) - 1:
//         (e - x) * negative + linear * x; the four are binary32 numbers of the model.
//     Where a bias or another activation is there, gate and up are finished products, each plus its
//     bias, and h_i = activation(gate_i) * up_i; not gated: h_i = activation(up_i).
// 17. Further options of a layer, in this order: queries and keys are normed (6, each head by itself,
//     or all of a row) before rope, or after it. A sink of a head is merged last, like a segment of
//     (m, l, o) = (sink, 1, 0). What is added to x: the product, plus its bias, normed (6), times
//     residual_scale; where there is neither norm nor scale, x + product, plus the bias. In a parallel
//     layer feed-forward reads the layer's input; x + feed-forward, then + attention. Rope by YaRN:
//     r = (i - ramp_begin) / (ramp_end - ramp_begin), clamped to 0..1; f_i = f_i * scale * r + f_i *
//     (1 - r), in double; cosine and sine times magnitude, in double. Where the model has a
//     temperature, attention_scale * (1 + temperature * log(1 + floor(p / length))), in double, takes
//     attention_scale's place. A learned position's row is added to the embedding's.
// 18. Experts. r = router's products with y (1 to 3), plus its bias. Softmax: m = max r; p_i = exp(r_i
//     - m); p_i / (16-lane sum of p). Sigmoid: p_i = 1 / (1 + exp(-r_i)). Compared is p_i, plus a bias
//     where there is one; equal ones go to the lower index. Of groups the two best sums of each count,
//     (best + second). Picked are the best, in order of rank; weights w = p; normalized: w / (sum in
//     order of rank, from 0); times scale where it is not 1. o = expert's network of y (each product
//     plus its bias); s = w_1 * o_1; s = fma(w_r, o_r, s) for the next ranks. x + s, then the shared
//     network's output; gated: its h times 1 / (1 + exp(-(g . y))), g . y as in 3.
// ----------------------------------------------------------------------------------------------
#pragma once

#include "base/internal.hpp"
#include "gguf.hpp"
#include "gguf_internal.hpp"
#include "kernels/kernels.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr int kNumerics = 1;                 ///< version of the numeric definition
inline constexpr uint32_t kTileRows = packed_rows;  ///< of a packed tile: a lane is a row
inline constexpr uint32_t kActivationBlock = 32;
inline constexpr uint32_t kSegment = 256;  ///< positions of an attention segment
inline constexpr uint32_t kKeyGroup = 16;  ///< keys stored side by side
inline constexpr size_t kPrefetchAhead =
    4096;  ///< bytes; the best distance where prefetching helps

/// A block of one activation plane (definition, 1).
struct ActivationBlock {
    float d;         ///< scale
    float s;         ///< d * float(sum of all q)
    int32_t sum[2];  ///< sums of q[0..15] and q[16..31]
    int8_t q[32];    ///< -127..127
};
static_assert(sizeof(ActivationBlock) == 48);

/// Columns' blocks, `count` planes of n / 32 blocks each (a column's two planes are neighbours),
/// lie in plane groups of eight: in a group block after block, in a block plane beside plane. One
/// group that is not full is narrower; of several the last is padded.
struct ActivationLayout {
    static constexpr uint32_t kGroup = 8;
    uint32_t count;
    size_t blocks;
    size_t step() const { return count < kGroup ? count : kGroup; }  ///< from a block to the next
    size_t at(uint32_t plane) const { return plane / kGroup * kGroup * blocks + plane % kGroup; }
    size_t size() const { return (count + step() - 1) / step() * step() * blocks; }
};

/// A weight matrix in tiles of 16 rows: tile after tile; inside a tile block after block of 32
/// columns, each with its scales beside it (layouts: implementation part, "packed layouts"). F32,
/// F16, BF16: (column, 16 rows). The last tile's missing rows are zero weights.
struct PackedMatrix {
    TensorType type = TensorType::f32;
    uint32_t rows = 0;
    uint32_t cols = 0;
    const std::byte* data = nullptr;  ///< 64-byte aligned; borrowed
    uint32_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

bool kernel_type_supported(TensorType type);
uint64_t packed_tile_bytes(TensorType type, uint32_t cols);  ///< a multiple of 64
/// Packs tiles first_tile .. last_tile - 1. `source` holds the matrix's rows in GGUF layout from
/// row first_tile * 16 on; `out` is where tile `first_tile` goes.
void pack_tiles(TensorType type, uint32_t rows, uint32_t cols, const std::byte* source,
                uint32_t first_tile, uint32_t last_tile, std::byte* out);
/// One row of a packed matrix as binary32 (definition, 11).
void dequantize_row(const PackedMatrix& matrix, uint32_t row, float* out);

/// Vectors x (columns, x_stride) of n values each to planes (definition, 1):
/// out[block * step + column * planes + plane].
struct QuantizeTask {
    const float* x;
    size_t x_stride;
    uint32_t columns;
    uint32_t planes;
    size_t n;
    size_t step;
    ActivationBlock* out;
};

/// weights * x for the rows of tiles first_tile .. last_tile - 1 (rows past the matrix's end are
/// not written), all columns, and what becomes of it while it is in the nearest cache.
struct MatmulTask {
    const PackedMatrix* weights;
    uint32_t first_tile;
    uint32_t last_tile;
    uint32_t columns;
    uint32_t planes;                ///< 1 or 2, quantized weights
    const ActivationBlock* blocks;  ///< ActivationLayout {columns * planes, cols / 32}
    const float* x;                 ///< (columns, x_stride), F32 F16 BF16 weights
    size_t x_stride;
    float* y;  ///< [column * y_stride + row]
    size_t y_stride;
    bool add = false;  ///< y += weights * x: a residual
    /// Not null, of the shape of `weights`: silu(weights * x) * (up * x) instead (definition, 8).
    const PackedMatrix* up = nullptr;
    /// Not null: to planes (definition, 1) instead of y, ActivationLayout {columns * planes,
    /// out_blocks}, blocks of 32 rows; first_tile is even, the rows are a multiple of 32.
    ActivationBlock* out = nullptr;
    size_t out_blocks = 0;
    /// Bytes of weights to prefetch ahead of their use by one or two columns (planes); 0: none, the
    /// CPU's own prefetcher is quicker on some. More columns have a distance of their own.
    size_t ahead = kPrefetchAhead;
};

/// Bytes of the keys, and as many of the values, of one head at kKeyGroup neighbouring positions. In
/// memory: keys (head_dim, 16), values (16, head_dim). Of q8_0 these are int8, behind them binary16
/// scales: keys (head_dim / 32, 16), values (16, head_dim / 32).
size_t kv_group_bytes(KvType type, uint32_t head_dim);

/// One segment of attention for queries that share a key/value head (definition, 10).
struct AttentionTask {
    KvType kv_type;  ///< f16 or f32
    uint32_t head_dim;
    uint32_t queries;
    const float* q;  ///< (queries, q_stride), rotated and scaled
    size_t q_stride;
    const uint16_t* begin;      ///< (queries) first visible position, within the segment: 0..256
    const uint16_t* end;        ///< (queries) one past the last; begin == end: none visible
    const void* const* keys;    ///< (16) key groups: (head_dim, 16) elements each;
    const void* const* values;  ///< (16) and (16, head_dim); null where nobody looks
    float* max;                 ///< (queries) outputs; queries that see nothing are left alone
    float* sum;                 ///< (queries)
    float* out;                 ///< (queries, out_stride)
    size_t out_stride;
    float soft_cap = 0;  ///< of scores (definition, 15); 0: none
};

/// The table of kernels of one instruction set. All pointers are filled. Alignment of float and
/// block arrays: 16 bytes unless said.
struct Kernels {
    const char* name;  ///< "scalar", "avx2", ...: what VALAR_ISA names
    void (*quantize)(const QuantizeTask& task);
    void (*matmul)(const MatmulTask& task);
    void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);
    /// In place over heads (n_heads, head_dim); cos_sin (n_rot / 2, 2) of this position.
    void (*rope)(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
                 const float* cos_sin);
    void (*scale)(float* x, float factor, size_t n);  ///< x_i *= factor
    void (*add)(float* x, const float* y, size_t n);  ///< x_i += y_i
    /// x_i = fma(factor, y_i, x_i)
    void (*add_scaled)(float* x, float factor, const float* y, size_t n);
    void (*exp)(float* x, size_t n);                           ///< x_i = e^x_i (definition, 7)
    void (*silu_mul)(float* gate, const float* up, size_t n);  ///< gate_i = silu(gate_i) * up_i
    /// Stores one position's key and value of one kv head into its key group, at slot 0..15.
    void (*store_kv)(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
                     void* key_group, void* value_group);
    /// A key group in q8_0, keys and values, as binary32, in the same order.
    void (*expand_kv)(const void* key_group, const void* value_group, uint32_t head_dim,
                      float* keys, float* values);
    void (*attention)(const AttentionTask& task);
    /// Merges a segment (m, l, o) into the state (M, L, O), n values; definition, 10.
    void (*attention_merge)(float* max, float* sum, float* out, float m, float l, const float* o,
                            size_t n);
    bool prefetches = false;  ///< whether matmul heeds MatmulTask::ahead
};

/// Operations that few models have: one code for all instruction sets (definition, 14 to 17).
void layer_norm(const float* x, const float* weight, const float* bias, float eps, size_t n,
                float* y);
/// Up may be null.
void activate(const Kernels& kernels, Activation activation, const ActivationSpec& spec, float* x,
              const float* up, size_t n);
void apply_soft_cap(float* x, float cap, size_t n);  ///< cap 0: x stays as it is
/// A score that takes weight and gives nothing, merged into the state of a query.
void add_sink(float* max, float* sum, float* out, float score, size_t n);

/// The tables that this build and this CPU have, best last; [0] is the scalar reference.
std::span<const Kernels* const> available_kernels();
/// The best table, or the one that the environment's VALAR_ISA names; unknown or unusable: an
/// Error.
Result<const Kernels*> choose_kernels();
/// The prefetch distance that the environment's VALAR_PREFETCH says, in bytes; -1: nothing. Error: no
/// number, or too large a one.
Result<int64_t> forced_prefetch();
/// Why this table is slower than this machine could be, for the log; empty where it is not.
std::string why_slow(const Kernels& table);

/// Scalar building blocks of the definition, for other sections (bit-exact everywhere).
using v1::exact_exp;
using v1::exact_exp2;
using v1::exact_fma;
using v1::exact_log2;
using v1::exact_sincos;
double exact_log(double x);  ///< exact_log2(x) * ln 2, for log-probabilities

/// Floating-point control of this thread set to the default (nearest even, no flush to zero, no
/// traps) while the object lives: hosts set flush-to-zero.
class FloatState {
public:
    FloatState();
    ~FloatState();
    FloatState(const FloatState&) = delete;
    FloatState& operator=(const FloatState&) = delete;

private:
    [[maybe_unused]] uint64_t saved_;
};

/// The worker team: `helpers` threads beside the caller, or the host's job system.
/// `run` is one fork-join: job(context, part, parts) once for every part; parts is parts(), the helpers
/// and one, or fewer if the last begin() said so. Between begin() and end() the helpers that take part
/// spin for the next stage (then sleep); outside they sleep, so an idle engine costs nothing. Threads:
/// one caller at a time. Every job runs under FloatState.
class Team {
public:
    static Result<std::unique_ptr<Team>> create(int helpers, const ParallelFor& parallel_for = {});
    ~Team();
    uint32_t parts() const;
    void begin();
    void begin(uint32_t parts);
    void end();
    void run(void (*job)(void* context, uint32_t part, uint32_t parts), void* context);

private:
    struct State;
    explicit Team(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
