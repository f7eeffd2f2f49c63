#!/usr/bin/env python3
"""Dequantized values of every weight type are those of PyPI's `gguf`, bit for bit.

usage: weights_check.py DEQUANTIZE_BLOCKS

For each type that both know: 1,000 blocks of random bytes whose scales are finite numbers, through
valar::dequantize (tests/dequantize_blocks.cpp) and through gguf.quants.dequantize.
"""

import subprocess
import sys

import gguf
import numpy as np
from gguf import quants

BLOCKS = 1000
# Where a block has binary16 scales; the others' scales are finite whatever their bytes are.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0],
    "IQ3_S": [0], "IQ3_XXS": [0], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0], "IQ1_S": [0],
    "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "IQ1_M": [], "NVFP4": [],
}


def random_blocks(kind, random):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (BLOCKS, size), np.uint8)
    for at in HALVES[kind.name]:
        infinite = blocks[:, at + 1] & 0x7c == 0x7c
        blocks[infinite, at + 1] ^= 0x40
    if kind.name == "IQ1_M":  # its scale's upper bits
        blocks[:, 55] &= 0xbf
    return blocks


def main():
    program = sys.argv[1]
    known = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    missing = set(HALVES) - set(known)
    assert not missing, missing
    np.seterr(all="ignore")
    for name in (name for name in HALVES if name in known):
        kind = gguf.GGMLQuantizationType[name]
        blocks = random_blocks(kind, np.random.default_rng(1))
        result = subprocess.run([program, name], input=blocks.tobytes(), check=True,
                                capture_output=True).stdout
        ours = np.frombuffer(result, np.uint32)
        theirs = quants.dequantize(blocks, kind).astype(np.float32).ravel().view(np.uint32)
        differ = int((ours != theirs).sum()) if len(ours) == len(theirs) else len(theirs)
        print(f"{name}: {len(theirs)} values, {differ} differ")
        assert not differ


main()
