"""Device functions that two or more kernels use."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dsa_kernels.arch import is_interpreting

INTERPRET = tl.constexpr(is_interpreting())


@triton.jit
def dot(a, b, acc=None):
    """a [M, K] @ b [K, N] in fp32, plus acc; fp32 operands are not rounded to TF32.

    Triton 3.9's interpreter multiplies the bit patterns of bf16, so operands are widened there.
    """
    if INTERPRET:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
        product = product if acc is None else acc + product
    else:
        product = tl.dot(a, b, acc, input_precision="ieee")
    return product


@triton.jit
def load_block(entry, mask, num_blocks):
    """Physical blocks, int64, from these places of a block table; where mask is not, block 0.

    Clamped, as in the references: a table's garbage leads to a wrong page, not out of bounds.
    """
    block = tl.load(entry, mask=mask, other=0)
    return tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to the nearest, then to even; Triton 3.9's interpreter truncates to bf16."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def decode_e4m3(code, HAS_E4M3: tl.constexpr):
    """uint8 codes of float8_e4m3fn -> fp32, exactly, NaN included."""
    if HAS_E4M3:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = e4m3_to_fp16(code).to(tl.float32) * 256.0
    return value


@triton.jit
def e4m3_to_fp16(code):
    """uint8 codes of float8_e4m3fn -> fp16 of the values times 2^-8, exactly, NaN included.

    Where a chip has no e4m3 Triton refuses the type. Its bits, moved seven to the left, are that
    fp16, subnormals too.
    """
    # Sign extension puts the sign into bits 14 and 15 after the shift; 14 is fp16's top exponent.
    bits = (code.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
    bits = tl.where((code & 0x7F) == 0x7F, 0x7E00, bits).to(tl.int16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def quantise_e4m3(x, FLOOR: tl.constexpr):
    """x [rows, n] fp32 -> e4m3 codes [rows, n] uint8, and each row's power-of-two scale [rows].

    The scale is the least 2^e >= amax / 448, at least 2^(FLOOR - 127). By integers: 448 is
    1.75 * 2^8, so e is amax's own exponent less 8, and one more where its fraction passes 0.75.
    """
    amax = tl.max(tl.abs(x), 1).to(tl.uint32, bitcast=True)
    exponent = tl.maximum(((amax + 0x1FFFFF) >> 23).to(tl.int32) - 8, FLOOR)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return encode_e4m3(x * inverse[:, None]), scale


@triton.jit
def encode_e4m3(x):
    """fp32 -> codes of float8_e4m3fn, to the nearest, of two the even, at most 448; NaN is kept."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Drop 20 of 23 fraction bits; the carry may reach the exponent, whose bias is 120 less.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is the last bit of an fp32 near 2^14.
    subnormal = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - (141 << 23)
    code = tl.minimum(tl.where(magnitude < 121 << 23, subnormal, normal), 0x7E)
    code = tl.where(magnitude >= 0x7F800000, 0x7F, code)
    return (code | (bits >> 31 << 7)).to(tl.uint8)
