"""The numeric definition of valar.hpp (opening of >>kernels), in numpy, from its words alone.

Computes the logits of the tiny model at every position of a fixed prompt, and those of the models of
every architecture (data/references), and compares them bit by bit with those of the library. Nothing of
the library's code is used: the file is read by PyPI's gguf, the blocks are taken apart here, fma is
rounded once by way of rounding to odd in double. What an architecture is stands here once more, as
data/references/README.md says it.

Usage: numerics.py WRITE_TINY_MODEL TINY_LOGITS      (two programs of tests/)
"""
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, quants

F, D = np.float32, np.float64
PROMPT = 280  # positions: crosses a segment of 256
REFERENCES = pathlib.Path(__file__).parent / "data" / "references"
REFERENCE_PROMPT = 24  # more than their windows and the shorter of their original contexts

# Of these only the products are new: a few positions do.
LATER = ("Q5_1", "IQ4_NL", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS",
         "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0")


def prompt(n_vocab):
    return [(i * 37 + 11) % n_vocab for i in range(PROMPT)]


def fma(a, b, c):
    """a * b + c in binary32, rounded once: the product is exact in double; the sum is rounded to odd
    in double (Boldo and Melquiond, 2008), so that rounding it to binary32 rounds the exact value."""
    p, c = np.multiply(a, b, dtype=D), np.asarray(c, D)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    bits = s.view(np.int64) if s.ndim else np.array([s]).view(np.int64)[0]
    away = (error > 0) == (s > 0)
    fix = (error != 0) & ((bits & 1) == 0) & np.isfinite(s)
    odd = np.where(fix, np.where(away, bits + 1, bits - 1), bits)
    return np.asarray(odd, np.int64).view(D).astype(F)


def nearest_of_product(a, b):
    return np.rint(np.multiply(a, b, dtype=D))  # a * b is exact in double


def exp(x):  # definition, 7
    x = np.minimum(np.asarray(x, F), F(88))
    k = nearest_of_product(x, F(float.fromhex("0x1.715476p+0"))).astype(F)
    r = fma(-k, F(float.fromhex("0x1.62e4p-1")), x)
    r = fma(-k, F(float.fromhex("0x1.7f7d1cp-20")), r)
    p = np.full_like(x, float.fromhex("0x1.6a4e0cp-10"))
    for c in ("0x1.123994p-7", "0x1.5558bp-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0"):
        p = fma(p, r, F(float.fromhex(c)))
    return np.where(x < F(-87), F(0), np.ldexp(p, k.astype(np.int32)).astype(F))


def exp2(x):  # definition, 12; python's floats are doubles and never fused
    k = round(x)
    t, p = (x - k) * float.fromhex("0x1.62e42fefa39efp-1"), 1.0 / math.factorial(13)
    for n in range(12, -1, -1):
        p = p * t + 1.0 / math.factorial(n)
    return math.ldexp(p, k)


def log2(x):
    m, e = math.frexp(x)
    m, e = m * 2, e - 1
    if m > float.fromhex("0x1.6a09e667f3bcdp+0"):
        m, e = m / 2, e + 1
    u = (m - 1) / (m + 1)
    z, p = u * u, 1.0 / 23
    for n in range(21, 0, -2):
        p = p * z + 1.0 / n
    return e + (u * p) * float.fromhex("0x1.71547652b82fep+1")


def sincos(x):
    k = round(x * float.fromhex("0x1.45f306dc9c883p-1"))
    r = ((x - k * float.fromhex("0x1.921fb544p+0")) - k * float.fromhex("0x1.0b4611a6p-34")) \
        - k * float.fromhex("0x1.3198a2ep-69")
    z = r * r
    s = 1.0 / math.factorial(17)
    for n, sign in zip(range(15, 0, -2), (-1, 1) * 4):
        s = s * z + sign * (1.0 / math.factorial(n))
    s = r * s
    c = 1.0 / math.factorial(16)
    for n, sign in zip(range(14, -1, -2), (-1, 1) * 4):
        c = c * z + sign * (1.0 / math.factorial(n))
    return ((s, c), (c, -s), (-s, -c), (-c, s))[k % 4]


def half(raw):
    return np.ascontiguousarray(raw).view(np.float16).astype(F)[..., 0]


def nibbles(q):  # low halves first
    return np.concatenate([q & 15, q >> 4], -1).astype(np.int32)


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


def even_signs(seven):  # an eighth makes the number of signs even
    parity = np.unpackbits(seven.astype(np.uint8)[..., None], axis=-1).sum(-1).astype(np.int64) & 1
    return (seven | parity << 7).astype(np.uint8)


def eight_signs(rest):  # four times seven bits
    return even_signs(np.stack([rest >> s & 127 for s in (0, 7, 14, 21)], -1).astype(np.int64)) \
        .reshape(*rest.shape[:2], 32)


class Matrix:
    """Weights as the definition sees them: w (rows, blocks, 32), dw and m (rows, blocks), or f32."""

    def __init__(self, tensor, part=...):
        self.kind = tensor.tensor_type.name
        data = np.asarray(tensor.data)[part]
        rows = len(data) if len(tensor.shape) > 1 else 1
        self.scales = self.m = self.low = self.two = None
        if self.kind in ("F32", "F16"):
            self.f32 = data.reshape(rows, -1).astype(F)
            return
        raw = data.reshape(rows, -1).view(np.uint8)
        if self.kind == "BF16":
            self.f32 = (raw.view(np.uint16).astype(np.uint32) << 16).view(F)
            return
        self.f32 = None
        b = raw.reshape(rows, -1, GGML_QUANT_SIZES[tensor.tensor_type][1])
        getattr(self, "read_" + self.kind.lower())(b)

    def read_q4_0(self, b):
        self.dw, self.w = half(b[..., 0:2]), nibbles(b[..., 2:]) - 8

    def read_q4_1(self, b):
        self.dw, self.m, self.w = half(b[..., 0:2]), half(b[..., 2:4]), nibbles(b[..., 4:])

    def read_q5_0(self, b):
        high = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little").astype(np.int32)
        self.dw, self.w = half(b[..., 0:2]), (nibbles(b[..., 6:]) | high << 4) - 16

    def read_q5_1(self, b):
        high = np.unpackbits(b[..., 4:8], axis=-1, bitorder="little").astype(np.int32)
        self.dw, self.m, self.w = half(b[..., 0:2]), half(b[..., 2:4]), nibbles(b[..., 8:]) | high << 4

    def read_q8_0(self, b):
        self.dw, self.w = half(b[..., 0:2]), b[..., 2:].view(np.int8).astype(np.int32)

    def read_scales(self, b, low):
        """Dw * sc and -(Dmin * mn) of the eight sub-blocks; `low` (rows, supers, 8, 32)."""
        q = b[..., 4:16].astype(np.int32)
        sc = np.concatenate([q[..., 0:4] & 63, (q[..., 8:12] & 15) | (q[..., 0:4] >> 6 << 4)], -1)
        mn = np.concatenate([q[..., 4:8] & 63, (q[..., 8:12] >> 4) | (q[..., 4:8] >> 6 << 4)], -1)
        rows = len(b)
        self.dw = (half(b[..., 0:2])[..., None] * sc.astype(F)).reshape(rows, -1)
        self.m = (-(half(b[..., 2:4])[..., None] * mn.astype(F))).reshape(rows, -1)
        self.w = low.reshape(rows, -1, 32).astype(np.int32)

    def read_q4_k(self, b):
        q = b[..., 16:].reshape(*b.shape[:2], 4, 32)
        self.read_scales(b, np.stack([q & 15, q >> 4], 3))

    def read_q5_k(self, b):
        q, high = b[..., 48:].reshape(*b.shape[:2], 4, 32), b[..., 16:48]
        bits = np.stack([high >> s & 1 for s in range(8)], 2)
        low = np.stack([q & 15, q >> 4], 3).reshape(*b.shape[:2], 8, 32)
        self.read_scales(b, low | bits << 4)

    def read_q6_k(self, b):
        ql, qh = b[..., :128].reshape(*b.shape[:2], 2, 2, 32), b[..., 128:192].reshape(*b.shape[:2], 2, 32)
        low = np.concatenate([ql & 15, ql >> 4], 3)  # (.., half, quarter, 32)
        high = np.stack([qh >> s & 3 for s in (0, 2, 4, 6)], 3)
        rows = len(b)
        self.w = ((low | high << 4).astype(np.int32) - 32).reshape(rows, -1, 32)
        self.scales = b[..., 192:208].view(np.int8).astype(np.int32).reshape(rows, -1, 2)
        self.dw = np.repeat(half(b[..., 208:210]), 8, axis=1)

    def read_iq4_nl(self, b):
        self.dw, self.w = half(b[..., 0:2]), IQ4[nibbles(b[..., 2:])]

    def read_mxfp4(self, b):
        self.dw = np.ldexp(F(1), b[..., 0].astype(np.int32) - 128).astype(F)
        self.w = FP4[nibbles(b[..., 1:])]

    def read_nvfp4(self, b):
        e, f = b[..., :4] >> 3 & 15, (b[..., :4] & 7).astype(F)
        d = np.where(e == 0, f / F(1024), (F(1) + f / F(8)) * np.exp2(e.astype(F) - F(8))).astype(F)
        self.two = np.where(b[..., :4] == 127, F(0), d).reshape(len(b), -1, 2)
        self.w = FP4[nibbles(b[..., 4:].reshape(*b.shape[:2], 4, 8))].reshape(len(b), -1, 32)

    def under_sub_scales(self, d, unit, scales, w):
        """d (rows, supers), scales and w any shape in order."""
        rows = len(d)
        self.dw = np.repeat(d * F(unit), 8, axis=1)
        self.scales = scales.astype(np.int32).reshape(rows, -1, 2)
        self.w = w.astype(np.int32).reshape(rows, -1, 32)

    def read_q2_k(self, b):
        q = b[..., 16:80].reshape(*b.shape[:2], 2, 32)
        codes = np.stack([q >> s & 3 for s in (0, 2, 4, 6)], 3)
        self.under_sub_scales(half(b[..., 80:82]), 1, b[..., :16] & 15, codes)
        self.low = (b[..., :16] >> 4).astype(np.int32).reshape(len(b), -1, 2)
        self.m = np.repeat(-half(b[..., 82:84]), 8, axis=1)

    def read_q3_k(self, b):
        q = b[..., 32:96].reshape(*b.shape[:2], 2, 32)
        low = np.stack([q >> s & 3 for s in (0, 2, 4, 6)], 3).reshape(*b.shape[:2], 8, 32)
        high = np.stack([b[..., :32] >> s & 1 for s in range(8)], 2)
        bits, more = b[..., 96:104], b[..., 104:108]
        scales = np.concatenate([bits & 15, bits >> 4], -1).astype(np.int32)
        scales |= np.concatenate([more >> s & 3 for s in (0, 2, 4, 6)], -1).astype(np.int32) << 4
        self.under_sub_scales(half(b[..., 108:110]), 1, scales - 32, (low | high << 2).astype(np.int32) - 4)

    def read_iq4_xs(self, b):
        high = np.ascontiguousarray(b[..., 2:4]).view(np.uint16)
        low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).reshape(*b.shape[:2], 8)
        scales = (low | (high >> np.arange(0, 16, 2) & 3) << 4).astype(np.int32) - 32
        codes = nibbles(b[..., 8:].reshape(*b.shape[:2], 8, 16))
        self.under_sub_scales(half(b[..., 0:2]), 1, np.repeat(scales, 2, -1), IQ4[codes])

    def read_tq2_0(self, b):
        q = b[..., :64].reshape(*b.shape[:2], 2, 32)
        codes = np.stack([q >> s & 3 for s in (0, 2, 4, 6)], 3).astype(np.int32)
        self.under_sub_scales(half(b[..., 64:66]), 1, np.ones((*b.shape[:2], 16)), codes - 1)

    def read_tq1_0(self, b):
        def digits(bytes_, count):
            q = bytes_[..., None, :].astype(np.int32) * (3 ** np.arange(count))[:, None] & 255
            return (q * 3 >> 8).reshape(*b.shape[:2], -1)
        codes = np.concatenate([digits(b[..., :32], 5), digits(b[..., 32:48], 5), digits(b[..., 48:52], 4)], -1)
        self.under_sub_scales(half(b[..., 52:54]), 1, np.ones((*b.shape[:2], 16)), codes - 1)

    def by_grid(self, kind, d, unit, scales, entries, signs):
        """The code book is gguf's; entries (.., n), signs (.., 32) as bytes with eight signs each."""
        kind.init_grid()
        w = kind.grid[0, 0][entries].reshape(*signs.shape, 8)
        negative = np.unpackbits(signs[..., None], axis=-1, bitorder="little")
        self.under_sub_scales(d, unit, 2 * scales.astype(np.int32) + 1, np.where(negative, -w, w))

    def read_iq3_s(self, b):
        high = np.unpackbits(b[..., 66:74], axis=-1, bitorder="little").astype(np.int32)
        s = np.stack([b[..., 106:110] & 15, b[..., 106:110] >> 4], -1).reshape(*b.shape[:2], 8)
        self.by_grid(quants.IQ3_S, half(b[..., 0:2]), 1, np.repeat(s, 2, -1),
                     b[..., 2:66] | high << 8, b[..., 74:106])

    def read_iq3_xxs(self, b):
        rest = np.ascontiguousarray(b[..., 66:98]).view(np.uint32)
        self.by_grid(quants.IQ3_XXS, half(b[..., 0:2]), 0.25, np.repeat(rest >> 28, 2, -1),
                     b[..., 2:66].astype(np.int32), eight_signs(rest))

    def read_iq2_s(self, b):
        high = np.stack([b[..., 66:74] >> s & 3 for s in (0, 2, 4, 6)], -1).reshape(*b.shape[:2], 32)
        s = np.stack([b[..., 74:82] & 15, b[..., 74:82] >> 4], -1)
        self.by_grid(quants.IQ2_S, half(b[..., 0:2]), 0.125, s,
                     b[..., 2:34] | high.astype(np.int32) << 8, b[..., 34:66])

    def read_iq2_xs(self, b):
        entries = np.ascontiguousarray(b[..., 2:66]).view(np.uint16).astype(np.int32)
        s = np.stack([b[..., 66:74] & 15, b[..., 66:74] >> 4], -1)
        self.by_grid(quants.IQ2_XS, half(b[..., 0:2]), 0.125, s, entries & 511, even_signs(entries >> 9))

    def read_iq2_xxs(self, b):
        words = np.ascontiguousarray(b[..., 2:66]).view(np.uint32).reshape(*b.shape[:2], 8, 2)
        entries = np.ascontiguousarray(words[..., 0]).view(np.uint8).astype(np.int32)
        self.by_grid(quants.IQ2_XXS, half(b[..., 0:2]), 0.125, np.repeat(words[..., 1] >> 28, 2, -1),
                     entries, eight_signs(words[..., 1]))

    def with_eighths(self, d, scales, entries, negative):
        """IQ1: 8 * (-1, 0, 1) and +1, or -1 where `negative` (.., 32) says so."""
        quants.IQ1_S.init_grid()
        w = 8 * quants.IQ1_S.grid[0, 0][entries] + np.where(negative, -1, 1)[..., None]
        self.under_sub_scales(d, 0.125, 2 * scales.astype(np.int32) + 1, w)

    def read_iq1_s(self, b):
        rest = np.ascontiguousarray(b[..., 34:50]).view(np.uint16).astype(np.int32)
        high = np.stack([rest >> s & 7 for s in (0, 3, 6, 9)], -1).reshape(*b.shape[:2], 32)
        self.with_eighths(half(b[..., 0:2]), np.repeat(rest >> 12 & 7, 2, -1), b[..., 2:34] | high << 8,
                          np.repeat(rest >> 15, 4, -1))

    def read_iq1_m(self, b):
        q = np.ascontiguousarray(b[..., 48:56]).view(np.uint16).astype(np.int32)
        d = ((q >> 12) << np.arange(0, 16, 4)).sum(-1).astype(np.uint16).view(np.float16).astype(F)
        scales = np.stack([q >> s & 7 for s in (0, 3, 6, 9)], -1).reshape(*b.shape[:2], 16)
        high = np.stack([b[..., 32:48] & 15, b[..., 32:48] >> 4], -1).reshape(*b.shape[:2], 32).astype(np.int32)
        self.with_eighths(d, scales, b[..., :32] | (high & 7) << 8, high >> 3)

    def times(self, x, planes):
        """y (columns, rows) for x (columns, n)."""
        if self.f32 is not None:  # 3
            acc = np.zeros((len(x), len(self.f32)), F)
            for k in range(x.shape[1]):
                acc = fma(self.f32[:, k], x[:, k:k + 1], acc)
            return acc
        sums = [self.one_plane(plane) for plane in quantize(x, planes)]
        return sums[0] if planes == 1 else sums[0] + sums[1]

    def one_plane(self, plane):  # 2
        d, s, h = plane
        acc = np.zeros((len(d), len(self.w)), F)
        for b in range(self.w.shape[1]):
            products = self.w[None, :, b, :] * h[:, None, b, :]
            if self.two is not None:
                first, last = np.moveaxis(products.reshape(*products.shape[:2], 2, 16).sum(-1).astype(F), -1, 0)
                acc = fma(fma(first, self.two[None, :, b, 0], last * self.two[None, :, b, 1]), d[:, b, None], acc)
                continue
            if self.scales is not None:
                halves = products.reshape(*products.shape[:2], 2, 16).sum(-1)
                total = (halves * self.scales[None, :, b, :]).sum(-1)
            else:
                total = products.sum(-1)
            acc = fma(total.astype(F), self.dw[None, :, b] * d[:, b, None], acc)
            if self.low is not None:
                halves = h[:, b].reshape(len(d), 1, 2, 16).sum(-1)
                low = (halves * self.low[None, :, b, :]).sum(-1)
                acc = fma(low.astype(F), self.m[None, :, b] * d[:, b, None], acc)
            elif self.m is not None:
                acc = fma(self.m[None, :, b], s[:, b, None], acc)
        return acc

    def row(self, r):  # 11
        if self.f32 is not None:
            return self.f32[r]
        w = self.w[r].astype(F)
        if self.two is not None:
            return (np.repeat(self.two[r], 16, axis=1) * w).ravel()
        if self.scales is not None:
            scale = np.repeat(self.dw[r][:, None] * self.scales[r].astype(F), 16, axis=1)
            if self.low is not None:
                low = np.repeat(self.m[r][:, None] * self.low[r].astype(F), 16, axis=1)
                return fma(scale, w, low).ravel()
            return (scale * w).ravel()
        if self.m is not None:
            return fma(self.dw[r][:, None], w, self.m[r][:, None]).ravel()
        return (self.dw[r][:, None] * w).ravel()


def quantize(x, planes):  # 1
    x = x.reshape(len(x), -1, 32)
    amax = np.abs(x).max(-1)
    zero = amax < F(2.0 ** -100)
    safe = np.where(zero, F(1), amax)
    d, inv = np.where(zero, F(0), safe / F(127)), np.where(zero, F(0), F(127) / safe)
    h = np.clip(nearest_of_product(x, inv[..., None]), -127, 127).astype(np.int32)
    result = [(d, d * h.sum(-1).astype(F), h)]
    if planes == 2:
        r = fma(-d[..., None], h.astype(F), x)
        d2, inv2 = d / F(254), inv * F(254)
        low = np.clip(nearest_of_product(r, inv2[..., None]), -127, 127).astype(np.int32)
        result.append((d2, d2 * low.sum(-1).astype(F), low))
    return result


def tree(lanes):  # 5; lanes (.., 16)
    for n in (8, 4, 2, 1):
        lanes = lanes[..., :n] + lanes[..., n:2 * n]
    return lanes[..., 0]


def lane_sum(x, square):  # 5; of the last axis
    lanes = np.zeros((*x.shape[:-1], 16), F)
    for i in range(0, x.shape[-1], 16):
        part = x[..., i:i + 16]
        n = part.shape[-1]
        lanes[..., :n] = fma(part, part, lanes[..., :n]) if square else lanes[..., :n] + part
    return tree(lanes)


def rms_norm(x, weight, eps):  # 6
    scale = F(1) / np.sqrt(lane_sum(x, True) / F(x.shape[-1]) + eps)
    return (x * scale[..., None]) * weight


def layer_norm(x, weight, eps, bias=None):  # 14
    x = x - (lane_sum(x, False) / F(x.shape[-1]))[..., None]
    x = rms_norm(x, weight, eps)
    return x if bias is None else x + bias


def sigmoid(x):
    return F(1) / (F(1) + exp(-x))


def soft_cap(x, cap):  # 15
    if cap == 0:
        return x
    u = x / cap
    return cap * (F(1) - F(2) / (exp(u + u) + F(1)))


# ---- Activations: definition, 8 and 16 -------------------------------------------------------

def silu(x):
    return x / (F(1) + exp(-x))


def gelu_tanh(x):
    z = x * fma(x * x, F(float.fromhex("0x1.2444f2p-4")), F(float.fromhex("0x1.988454p+0")))
    return x / (F(1) + exp(-z))


def gelu(x):
    a = np.abs(x) * F(float.fromhex("0x1.6a09e6p-1"))
    t = F(1) / fma(F(float.fromhex("0x1.4f740ap-2")), a, F(1))
    p = np.full_like(x, F(1.061405429))
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = fma(p, t, F(c))
    e = ((t * p) * exp(-(a * a))) * F(0.5)
    return x * np.where(x < 0, e, F(1) - e)


def relu_squared(x):
    r = np.maximum(x, F(0))
    return r * r


def silu_clamped(gate, up):
    g, u = np.minimum(gate, F(7)), np.clip(up, F(-7), F(7))
    return (u + F(1)) * (g / (F(1) + exp(-(g * F(1.702)))))


def xielu(x, negative, positive, linear, most):
    bent = ((exp(np.minimum(x, most)) - F(1)) - x) * negative
    return np.where(x > 0, (positive * x) * x, bent) + linear * x


# ---- What a file is --------------------------------------------------------------------------

GELU_TANH = {"gemma", "gemma2", "gemma3", "phi2", "starcoder2", "gpt2"}
ACTIVATIONS = {"gptneox": gelu, "falcon": gelu, "nemotron": relu_squared, **{a: gelu_tanh for a in GELU_TANH}}
NEIGHBOURS = {"llama", "smollm3", "granite", "glm4", "cohere2", "command-r", "ernie4_5", "granitemoe",
              "ernie4_5-moe", "minicpm", "internlm2", "mistral3"}  # rope turns these, else halves
BY_LAYER = {"phi2", "cohere2", "command-r", "stablelm", "starcoder2", "nemotron", "gpt2", "gptneox", "falcon"}
PARALLEL = {"phi2", "cohere2", "command-r", "falcon"}
FULL_EVERY = {"gemma2": 2, "gemma3": 6, "exaone4": 4, "cohere2": 4, "gpt-oss": 2, "olmo2": 4}
FULL_UNROTATED = {"exaone4", "cohere2"}
POST_IS_FFN = {"seed_oss", "gpt-oss", "glm4moe"}  # post_attention_norm is the network's own
SIGMOID = {"glm4moe", "bailingmoe2", "minimax-m2"}  # where the file does not say so
WEIGHTS_AS_THEY_ARE = {"qwen2moe", "olmoe"}


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        self.fields = reader.fields
        self.arch = self.fields["general.architecture"].contents()
        self.by_layer = self.arch in BY_LAYER
        self.eps = F(self.number("attention.layer_norm_epsilon" if self.by_layer
                                 else "attention.layer_norm_rms_epsilon"))
        self.width = int(self.number("embedding_length"))
        self.context = int(self.number("context_length"))
        self.layers = int(self.number("block_count")) - int(self.number("nextn_predict_layers", 0))
        self.dim = int(self.number("attention.key_length", self.width // self.number("attention.head_count")))
        self.windows = self.read_windows()
        self.cache = {}

    def number(self, key, fallback=None):
        field = self.fields.get(f"{self.arch}.{key}")
        return fallback if field is None else field.contents()

    def read_windows(self):
        window = int(self.number("attention.sliding_window", 0))
        if window == 0 or window >= self.context:
            return [0] * self.layers
        pattern = self.number("attention.sliding_window_pattern", FULL_EVERY.get(self.arch, 0))
        if not isinstance(pattern, list):
            pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(self.layers)]
        return [window if has else 0 for has in pattern]

    def has(self, name):
        return name in self.tensors

    def matrix(self, name, part=...):
        key = name, str(part)
        if key not in self.cache:
            self.cache[key] = Matrix(self.tensors[name], part)
        return self.cache[key]

    def vector(self, name, part=...):
        return None if name not in self.tensors else self.matrix(name).f32[0][part]

    def norm(self, x, name):
        if not self.has(name + ".weight"):
            return x
        weight = self.vector(name + ".weight")
        if self.by_layer:
            return layer_norm(x, weight, self.eps, self.vector(name + ".bias"))
        return rms_norm(x, weight, self.eps)

    def embedding_scale(self):
        usual = {"minicpm": 12.0}.get(self.arch, 1.0)
        return F(np.sqrt(F(self.width))) if self.arch.startswith("gemma") else \
            F(self.number("embedding_scale", usual))

    def residual_scale(self):
        usual = F(1.4) / np.sqrt(F(self.layers)) if self.arch == "minicpm" else 1.0
        return F(self.number("residual_scale", usual))

    def logit_scale(self):
        scale = F(self.number("logit_scale", 1.0))
        return F(1) / scale if self.arch in ("granite", "granitemoe", "minicpm") else scale

    def attention_scale(self, heads, positions):
        """(positions), each a binary32 number"""
        usual = F(1) / np.sqrt(F(self.dim))
        if (self.arch, self.layers) in (("gemma2", 46), ("gemma3", 62)):
            usual = F(1) / np.sqrt(F(self.width // heads))
        scale = F(self.number("attention.scale", usual))
        temperature = float(F(self.number("attention.temperature_scale", 0.0)))
        if temperature == 0:
            return np.full(positions, scale)
        length = int(self.number("rope.scaling.original_context_length", self.context))
        return np.array([float(scale) * (1 + temperature * log(1.0 + p // length)) for p in range(positions)], D) \
            .astype(F)

    def bend(self, layer):  # of xielu
        n, p, linear, most = (float(self.fields["xielu." + key].contents()[layer])
                              for key in ("alpha_n", "alpha_p", "beta", "eps"))
        return F(linear + softplus(n)), F(softplus(p)), F(linear), F(most)


def log(x):  # 12
    return log2(x) * float.fromhex("0x1.62e42fefa39efp-1")


def softplus(x):
    return log(1 + exp2(x * 1.4426950408889634))


# ---- Rope: definition, 9 and 17 --------------------------------------------------------------

def rope_pairs(model, layer, n_rot, positions):
    """Angles by pair for one position, and the magnitude of cosine and sine."""
    window = model.windows[layer]
    base = F(model.number("rope.freq_base", 10000.0))
    if window:
        usual = 10000.0 if model.arch == "gemma3" else base
        base = F(model.number("rope.freq_base_swa", usual))
    base = float(base)
    pairs = [exp2(-(2.0 * i / n_rot) * log2(base)) for i in range(n_rot // 2)]
    magnitude = float(F(model.number("rope.scaling.attn_factor", 1.0)))
    kind = model.number("rope.scaling.type", "linear")
    plain = window and model.arch in ("gemma3", "olmo2")
    if plain and model.arch == "olmo2":
        magnitude = 1.0
    if not plain and kind in ("linear", "yarn"):
        scale = float(F(1) / F(model.number("rope.scaling.factor", 1.0)))
        if kind == "linear":
            pairs = [f * scale for f in pairs]
        else:
            pairs, magnitude = yarn(model, pairs, scale, base, n_rot, magnitude)
    original = int(model.number("rope.scaling.original_context_length", model.context))
    factors = None
    for name in ("rope_freqs.weight",
                 "rope_factors_long.weight" if positions > original else "rope_factors_short.weight"):
        factors = model.vector(name) if factors is None else factors
    if factors is not None:
        pairs = [f / float(factor) for f, factor in zip(pairs, factors)]
    return pairs, magnitude


def yarn(model, pairs, scale, base, n_rot, magnitude):
    factor = 1.0 / scale
    original = float(model.number("rope.scaling.original_context_length", model.context))

    def pair_of(turns):
        return n_rot * log(original / (turns * 6.283185307179586)) / (2 * log(base))

    begin = pair_of(float(F(model.number("rope.scaling.yarn_beta_fast", 32.0))))
    end = pair_of(float(F(model.number("rope.scaling.yarn_beta_slow", 1.0))))
    if model.arch != "gpt-oss":
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = F(max(begin, 0.0)), F(min(end, n_rot - 1.0))
    if begin == end:
        end = end + F(0.001)
    begin, end = float(begin), float(end)
    shares = [min(max((i - begin) / (end - begin), 0.0), 1.0) for i in range(len(pairs))]
    pairs = [(f * scale) * r + f * (1 - r) for f, r in zip(pairs, shares)]
    if model.number("rope.scaling.yarn_log_multiplier", 0.0) != 0:
        return pairs, magnitude
    own = model.number("rope.scaling.yarn_attn_factor")
    if own is not None:
        return pairs, float(F(own))
    return pairs, float(F(magnitude * (0.1 * log(factor) + 1 if factor > 1 else 1)))


def angles(model, layer, positions):
    """cos and sin (positions, pairs), or None where the layer does not rotate"""
    windows = any(model.windows)
    still = (model.arch == "gpt2" or (model.arch == "smollm3" and layer % 4 == 3)
             or (model.arch in FULL_UNROTATED and windows and not model.windows[layer]))
    if still:
        return None
    pairs, magnitude = rope_pairs(model, layer, int(model.number("rope.dimension_count", model.dim)), positions)
    turns = np.array([[sincos(float(p) * f) for f in pairs] for p in range(positions)], D)
    return tuple((turns[..., i] * magnitude).astype(F) for i in (1, 0))


def rope(x, cos, sin, neox):  # 9; x (positions, heads, head_dim)
    n = 2 * cos.shape[1]
    first, second = (slice(0, n // 2), slice(n // 2, n)) if neox else (slice(0, n, 2), slice(1, n, 2))
    a, b = x[..., first].copy(), x[..., second].copy()
    c, s = cos[:, None], sin[:, None]
    y = x.copy()
    y[..., first] = fma(a, c, -(b * s))
    y[..., second] = fma(a, s, b * c)
    return y


def attention(q, k, v, window, cap=0, sinks=None):  # 10; q (n, heads, dim) rotated, scaled; k, v (n, kv heads, dim)
    n, heads, dim = q.shape
    shared = np.arange(heads) * k.shape[1] // heads
    k, v = k[:, shared], v[:, shared]
    state = None
    for begin in range(0, n, 256):
        end = min(begin + 256, n)
        score = np.zeros((n, heads, end - begin), F)
        for e in range(dim):
            score = fma(q[:, :, e, None], k[begin:end, :, e].T[None], score)
        score = soft_cap(score, cap)
        back = np.arange(n)[:, None, None] - np.arange(begin, end)[None, None]
        visible = (back >= 0) & ((back < window) | (window == 0))
        seen = visible.any(-1)[:, 0]
        m = np.where(visible, score, F(-np.inf)).max(-1) + F(0)
        m[~seen] = 0
        p = np.where(visible, exp(np.where(visible, score - m[..., None], F(0))), F(0))
        lanes, out = np.zeros((n, heads, 16), F), np.zeros((n, heads, dim), F)
        for j in range(end - begin):
            lanes[:, :, j % 16] = lanes[:, :, j % 16] + p[:, :, j]
            rows = visible[:, 0, j]
            out[rows] = fma(p[rows, :, j, None], v[begin + j][None], out[rows])
        part = (m, tree(lanes), out)
        state = part if state is None else merge(state, part, seen, seen & ~ever)
        ever = seen if begin == 0 else ever | seen
    if sinks is not None:  # 17
        part = (np.tile(sinks, (n, 1)), np.ones((n, heads), F), np.zeros((n, heads, dim), F))
        state = merge(state, part, np.full(n, True), np.full(n, False))
    return state[2] * (F(1) / state[1])[..., None]


def merge(old, new, seen, first):
    (big_m, big_l, big_o), (m, l, o) = [[x.copy() for x in part] for part in (old, new)]
    top = np.maximum(big_m, m)
    a, b = exp(big_m - top), exp(m - top)
    total, out = fma(l, b, big_l * a), fma(o, b[..., None], big_o * a[..., None])
    big_m[seen], big_l[seen], big_o[seen] = top[seen], total[seen], out[seen]
    big_m[first], big_l[first], big_o[first] = m[first], l[first], o[first]
    return big_m, big_l, big_o


def stored(x, kv_type):  # 10; x (.., head_dim)
    if kv_type == "f32":
        return x
    if kv_type == "f16":
        return x.astype(np.float16).astype(F)
    (d, _, h), = quantize(x, 1)
    return (d.astype(np.float16).astype(F)[..., None] * h.astype(F)).reshape(x.shape)


class Layer:
    """One layer's computation; `planes` of activations where weights are quantized."""

    def __init__(self, model, number, planes):
        self.model, self.number, self.planes, self.name = model, number, planes, f"blk.{number}."

    def linear(self, y, what, fused=None, first=0, rows=None, expert=None):
        """Products and bias; of rows first .. of `fused` where the file has no `what`."""
        model, name, part = self.model, self.name + what, ...
        if not model.has(name + ".weight"):
            name, part = self.name + fused, slice(first, first + rows)
        elif fused == what:
            part = slice(first, first + rows)
        if expert is not None:
            part = expert
        y = model.matrix(name + ".weight", part).times(y, self.planes)
        if not model.has(name + ".bias"):
            return y
        bias = model.vector(name + ".bias") if expert is None else model.matrix(name + ".bias").f32[expert]
        return y + (bias if expert is not None else bias[part])

    def norm_heads(self, x, what):
        if not self.model.has(self.name + what):
            return x
        weight = self.model.matrix(self.name + what).f32
        if len(weight) > 1:
            return layer_norm(x, weight, self.model.eps)
        if weight.size == x.shape[-1]:
            return rms_norm(x, weight[0], self.model.eps)
        return rms_norm(x.reshape(len(x), -1), weight[0], self.model.eps).reshape(x.shape)

    def attend(self, y, turns, kv_type):
        model, dim, n = self.model, self.model.dim, len(y)
        heads = int(model.number("attention.head_count"))
        kv_heads = int(model.number("attention.head_count_kv", heads))
        q_rows, kv_rows = heads * dim, kv_heads * dim
        q, k, v = (self.linear(y, what, "attn_qkv", first, rows).reshape(n, -1, dim) for what, first, rows in
                   (("attn_q", 0, q_rows), ("attn_k", q_rows, kv_rows), ("attn_v", q_rows + kv_rows, kv_rows)))
        after = model.arch == "hunyuan-dense"  # norms after rope
        for rotates in (after, not after):
            if not rotates:
                q, k = self.norm_heads(q, "attn_q_norm.weight"), self.norm_heads(k, "attn_k_norm.weight")
            elif turns is not None:
                q, k = (rope(x, *turns, model.arch not in NEIGHBOURS) for x in (q, k))
        q = q * model.attention_scale(heads, n)[:, None, None]
        return attention(q, stored(k, kv_type), stored(v, kv_type), model.windows[self.number],
                         F(model.number("attn_logit_softcapping", 0.0)),
                         model.vector(self.name + "attn_sinks.weight")).reshape(n, -1)

    def activate(self, gate, up):
        arch = self.model.arch
        if arch == "gpt-oss":
            return silu_clamped(gate, up)
        if arch == "apertus":
            return xielu(up, *self.model.bend(self.number))
        act = ACTIVATIONS.get(arch, silu)
        return act(up) if gate is None else act(gate) * up

    def hidden(self, y, kind=""):
        """Between a network's matrices; the gate lies above up in some files, or there is none."""
        model, up = self.model, "ffn_up" + kind
        rows = int(model.tensors[self.name + up + ".weight"].shape[1])
        down = int(model.tensors[f"{self.name}ffn_down{kind}.weight"].shape[0])
        if rows == 2 * down:
            gate, value = (self.linear(y, up, up, first, down) for first in (0, down))
        else:
            gate = self.linear(y, "ffn_gate" + kind) if model.has(f"{self.name}ffn_gate{kind}.weight") else None
            value = self.linear(y, up)
        return self.activate(gate, value)

    def experts(self, y):  # 18
        model, name = self.model, self.name
        count, used = int(model.number("expert_count")), int(model.number("expert_used_count"))
        r = self.linear(y, "ffn_gate_inp")
        function = int(model.number("expert_gating_func", 2 if model.arch in SIGMOID else 1))
        if function == 2:
            p = sigmoid(r)
        else:
            p = exp(r - r.max(-1)[:, None])
            p = p / lane_sum(p, False)[:, None]
        bias = model.vector(name + "exp_probs_b.bias")
        score = p if bias is None else p + bias
        groups, open_ = int(model.number("expert_group_count", 1)), int(model.number("expert_group_used_count", 1))
        if open_ < groups:
            best = np.sort(score.reshape(len(y), groups, -1), -1)[..., ::-1]
            sums = best[..., 0] + best[..., 1]
            chosen = np.argsort(-sums, -1, kind="stable")[:, :open_]
            allowed = (np.arange(groups)[None, :, None] == chosen[:, None, :]).any(-1)
            score = np.where(np.repeat(allowed, count // groups, -1), score, F(-np.inf))
        picked = np.argsort(-score, -1, kind="stable")[:, :used]
        weights = np.take_along_axis(p, picked, -1)
        if function == 3 or model.number("expert_weights_norm", model.arch not in WEIGHTS_AS_THEY_ARE):
            total = np.zeros(len(y), F)
            for rank in range(used):
                total = total + weights[:, rank]
            weights = weights / total[:, None]
        weights = weights * F(model.number("expert_weights_scale", 1.0))
        out = np.zeros((len(y), used, model.width), F)
        for expert in range(count):
            rows, ranks = np.nonzero(picked == expert)
            if len(rows) == 0:
                continue
            gate, up = (self.linear(y[rows], what, expert=expert) for what in ("ffn_gate_exps", "ffn_up_exps"))
            out[rows, ranks] = self.linear(self.activate(gate, up), "ffn_down_exps", expert=expert)
        s = weights[:, :1] * out[:, 0]
        for rank in range(1, used):
            s = fma(weights[:, rank:rank + 1], out[:, rank], s)
        return s

    def feed_forward(self, y):
        """What is added to x, one after the other."""
        model, name, parts, kind = self.model, self.name, [], ""
        if model.has(name + "ffn_gate_inp.weight"):
            parts.append(self.experts(y))
            kind = "_shexp"
        if model.has(f"{name}ffn_up{kind}.weight"):
            h = self.hidden(y, kind)
            gate = model.vector(name + "ffn_gate_inp_shexp.weight")
            if gate is not None:
                g = np.zeros(len(y), F)
                for i in range(y.shape[1]):
                    g = fma(gate[i], y[:, i], g)
                h = h * sigmoid(g)[:, None]
            parts += self.parts_of(h, "ffn_down" + kind)
        return parts

    def parts_of(self, x, what):  # a product, and its bias
        bias = self.model.vector(f"{self.name}{what}.bias")
        product = self.model.matrix(f"{self.name}{what}.weight").times(x, self.planes)
        return [product] if bias is None else [product, bias]

    def run(self, x, turns, kv_type):  # 13, 17
        model, name = self.model, self.name
        two = model.has(name + "attn_norm_2.weight")
        post = name + "post_attention_norm" if model.arch not in POST_IS_FFN else name + "none"
        parallel = model.number("use_parallel_residual", model.arch in PARALLEL)
        y = model.norm(x, name + ("attn_norm_2" if two else "attn_norm"))
        attended = self.parts_of(self.attend(y, turns, kv_type), "attn_output")
        if not parallel:
            x = self.added(x, attended, post)
        ffn_norm = next((norm for norm in ("ffn_norm", "post_attention_norm" if model.arch in POST_IS_FFN else "")
                         if model.has(f"{name}{norm}.weight")), "attn_norm" if parallel else "none")
        y = model.norm(x, name + ("attn_norm" if two else ffn_norm))
        x = self.added(x, self.feed_forward(y), name + "post_ffw_norm")
        return self.added(x, attended, post, True) if parallel else x

    def added(self, x, parts, post, apart=False):
        model, scale = self.model, self.model.residual_scale()
        if not (apart or model.has(post + ".weight") or scale != 1):
            for part in parts:
                x = x + part
            return x
        z = parts[0]
        for part in parts[1:]:
            z = z + part
        return x + model.norm(z, post) * scale


def forward(model, ids, planes, kv_type):
    embedding = model.matrix("token_embd.weight")
    x = np.stack([embedding.row(i) for i in ids]) * model.embedding_scale()
    if model.has("position_embd.weight"):
        x = x + model.matrix("position_embd.weight").f32[:len(ids)]
    tables = {}
    for number in range(model.layers):
        kind = bool(model.windows[number]), number % 4 if model.arch == "smollm3" else 0
        if kind not in tables:
            tables[kind] = angles(model, number, len(ids))
        x = Layer(model, number, planes).run(x, tables[kind], kv_type)
    x = model.norm(x, "output_norm")
    logits = model.matrix("output.weight" if model.has("output.weight") else "token_embd.weight").times(x, 2)
    bias = model.vector("output.bias")
    logits = (logits if bias is None else logits + bias) * model.logit_scale()
    return soft_cap(logits, F(model.number("final_logit_softcapping", 0.0)))


def self_check():
    """fma against exact integers, on values where double rounding would show."""
    from fractions import Fraction
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(4000).astype(F) for _ in "ab")
    c = (random.standard_normal(4000) * 2.0 ** random.integers(-40, 40, 4000)).astype(F)
    for x, y, z, r in zip(a, b, c, fma(a, b, c)):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for other in (np.nextafter(r, F(np.inf)), np.nextafter(r, F(-np.inf))):
            assert abs(Fraction(float(r)) - exact) <= abs(Fraction(float(other)) - exact), (x, y, z)


def main():
    write_tiny_model, tiny_logits = sys.argv[1:3]
    self_check()
    np.seterr(all="ignore")
    cases = [("llama", "mixed", "fast", "f16"), ("llama", "mixed", "fine", "f32"),
             ("qwen2", "mixed", "fast", "f32"), ("llama", "mixed", "fast", "q8_0"),
             ("qwen2", "F32", "fast", "q8_0"), ("llama", "Q8_0 20", "fast", "f16"),
             ("qwen2", "F32 13 2", "fast", "q8_0")]  # with a window; every second layer without
    cases += [("llama", t, "fast", "f16") for t in
              ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", *LATER)]
    failed = 0

    def check(path, title, ids, precision, kv_type):
        subprocess.run([tiny_logits, path, dump, precision, kv_type, *map(str, ids)], check=True)
        theirs = np.fromfile(dump, F).reshape(len(ids), -1)
        ours = forward(Model(path), ids, 2 if precision == "fine" else 1, kv_type)
        differ = int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
        print(f"{title} {precision} {kv_type}: {ours.size} logits, {differ} differ", flush=True)
        return differ != 0

    with tempfile.TemporaryDirectory() as folder:
        path, dump = os.path.join(folder, "tiny.gguf"), os.path.join(folder, "logits")
        for arch, types, precision, kv_type in cases:
            subprocess.run([write_tiny_model, path, arch, *types.split()], check=True)
            ids = prompt(299)[:12 if types in LATER else PROMPT]
            failed += check(path, f"{arch} {types}", ids, precision, kv_type)
        references = sorted(REFERENCES.glob("*.gguf"))
        assert len(references) > 50, len(references)
        for reference in references:
            failed += check(str(reference), reference.stem, prompt(260)[:REFERENCE_PROMPT], "fast", "f32")
    print(f"{len(cases) + len(references) - failed} passed, {failed} failed")
    sys.exit(failed != 0)


main()
