"""The numeric definition of valar.hpp (opening of >>kernels), in numpy, from its words alone.

Computes the logits of the tiny model at every position of a fixed prompt and compares them bit by bit
with those of the library. Nothing of the library's code is used: the file is read by PyPI's gguf, the
blocks are taken apart here, fma is rounded once by way of rounding to odd in double.

Usage: numerics.py WRITE_TINY_MODEL TINY_LOGITS      (two programs of tests/)
"""
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, quants

F, D = np.float32, np.float64
PROMPT = 280  # positions: crosses a segment of 256

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

    def __init__(self, tensor):
        self.kind = tensor.tensor_type.name
        data = np.asarray(tensor.data)
        rows = int(tensor.shape[1]) if len(tensor.shape) > 1 else 1
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


def rms_norm(x, weight, eps):  # 6
    lanes = np.zeros((len(x), 16), F)
    for i in range(0, x.shape[1], 16):
        part = x[:, i:i + 16]
        lanes[:, :part.shape[1]] = fma(part, part, lanes[:, :part.shape[1]])
    scale = F(1) / np.sqrt(tree(lanes) / F(x.shape[1]) + eps)
    return (x * scale[:, None]) * weight


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        self.fields = reader.fields
        self.arch = bytes(self.fields["general.architecture"].parts[-1]).decode()
        self.cache = {}

    def number(self, key, fallback=None):
        field = self.fields.get(f"{self.arch}.{key}")
        return fallback if field is None else field.parts[-1][0]

    def matrix(self, name):
        if name not in self.cache:
            self.cache[name] = Matrix(self.tensors[name])
        return self.cache[name]

    def vector(self, name):
        return None if name not in self.tensors else self.matrix(name).f32[0]


def rope(x, cos, sin, neox):  # 9; x (positions, heads, head_dim)
    n = 2 * cos.shape[1]
    first, second = (slice(0, n // 2), slice(n // 2, n)) if neox else (slice(0, n, 2), slice(1, n, 2))
    a, b = x[..., first].copy(), x[..., second].copy()
    c, s = cos[:, None], sin[:, None]
    y = x.copy()
    y[..., first] = fma(a, c, -(b * s))
    y[..., second] = fma(a, s, b * c)
    return y


def attention(q, k, v, window):  # 10; q (n, heads, dim) rotated, scaled; k, v (n, kv heads, dim)
    n, heads, dim = q.shape
    shared = np.arange(heads) * k.shape[1] // heads
    k, v = k[:, shared], v[:, shared]
    state = None
    for begin in range(0, n, 256):
        end = min(begin + 256, n)
        score = np.zeros((n, heads, end - begin), F)
        for e in range(dim):
            score = fma(q[:, :, e, None], k[begin:end, :, e].T[None], score)
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


def forward(model, ids, planes, kv_type):
    width, heads = int(model.number("embedding_length")), int(model.number("attention.head_count"))
    kv_heads = int(model.number("attention.head_count_kv", heads))
    dim = int(model.number("attention.key_length", width // heads))
    eps = F(model.number("attention.layer_norm_rms_epsilon"))
    n_rot = int(model.number("rope.dimension_count", dim))
    base = float(F(model.number("rope.freq_base", 10000.0)))
    factors = model.vector("rope_freqs.weight")
    pairs = [exp2(-(2.0 * i / n_rot) * log2(base)) for i in range(n_rot // 2)]
    if factors is not None:
        pairs = [f / float(factor) for f, factor in zip(pairs, factors)]
    angles = [[sincos(float(p) * f) for f in pairs] for p in range(len(ids))]
    sin, cos = (np.array([[pair[i] for pair in row] for row in angles], D).astype(F) for i in (0, 1))
    scale = F(1) / np.sqrt(F(dim))
    neox = model.arch == "qwen2"
    window = int(model.number("attention.sliding_window", 0))
    every = int(model.number("attention.sliding_window_pattern", 0))

    embedding = model.matrix("token_embd.weight")
    x = np.stack([embedding.row(i) for i in ids])
    for layer in range(int(model.number("block_count"))):
        name = f"blk.{layer}."

        def linear(what, y):
            bias = model.vector(name + what + ".bias")
            y = model.matrix(name + what + ".weight").times(y, planes)
            return y if bias is None else y + bias

        y = rms_norm(x, model.vector(name + "attn_norm.weight"), eps)
        q, k, v = (linear(w, y).reshape(len(ids), -1, dim) for w in ("attn_q", "attn_k", "attn_v"))
        q, k = rope(q, cos, sin, neox) * scale, rope(k, cos, sin, neox)
        full = every and (layer + 1) % every == 0
        y = attention(q, stored(k, kv_type), stored(v, kv_type), 0 if full else window)
        x = x + linear("attn_output", y.reshape(len(ids), -1))
        y = rms_norm(x, model.vector(name + "ffn_norm.weight"), eps)
        gate, up = linear("ffn_gate", y), linear("ffn_up", y)
        x = x + linear("ffn_down", (gate / (F(1) + exp(-gate))) * up)  # 8
    x = rms_norm(x, model.vector("output_norm.weight"), eps)
    output = "output.weight" if "output.weight" in model.tensors else "token_embd.weight"
    return model.matrix(output).times(x, 2)


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
    with tempfile.TemporaryDirectory() as folder:
        path, dump = os.path.join(folder, "tiny.gguf"), os.path.join(folder, "logits")
        for arch, types, precision, kv_type in cases:
            subprocess.run([write_tiny_model, path, arch, *types.split()], check=True)
            model = Model(path)
            ids = prompt(int(model.tensors["token_embd.weight"].shape[1]))[:12 if types in LATER else PROMPT]
            subprocess.run([tiny_logits, path, dump, precision, kv_type, *map(str, ids)], check=True)
            theirs = np.fromfile(dump, F).reshape(len(ids), -1)
            ours = forward(model, ids, 2 if precision == "fine" else 1, kv_type)
            differ = int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
            print(f"{arch} {types} {precision} {kv_type}: {ours.size} logits, {differ} differ")
            failed += differ != 0
    print(f"{len(cases) - failed} passed, {failed} failed")
    sys.exit(failed != 0)


main()
