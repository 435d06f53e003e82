"""One-byte codes of features: value = code · scale, with one float32 scale for each row (all along the last axis).

scale = max(|row|, 2⁻⁹⁶) / top, where top is 448 for e4m3 and 127 for int8, and code = round(value · (top / max|row|)),
to nearest, ties to even. The floor keeps a row of zeros from dividing by zero. e4m3 is FP8 of Micikevicius et al.,
"FP8 Formats for Deep Learning" (arXiv 2209.05433): four exponent bits with bias 7, three mantissa bits, no infinities.

Codes are made and read with integer arithmetic alone, and so they are the same bits on every device and architecture,
those without instructions for FP8 included. A value that is not finite makes its row's scale not finite, and with it
everything that is read from that row: nothing broken is hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
TOP = {"e4m3": 448.0, "int8": 127.0}
FLOOR = 2.0**-96


def code_of(dtype: torch.dtype) -> str:
    """The name of the code that a tensor of this dtype holds, "" if it holds plain numbers."""
    return next((name for name, coded in DTYPES.items() if coded == dtype), "")


def raw(codes: Tensor) -> Tensor:
    """The codes as a dtype that kernels take on every architecture."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def encode_reference(values: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """Codes like `values`, and their scales [..., 1 less axis], from the definition."""
    wide = values.float()
    largest = wide.abs().amax(-1)
    largest = torch.where(largest < FLOOR, FLOOR, largest)
    # as a tensor: divisions by and of a number are products with a reciprocal on some devices, and round twice
    top = torch.full_like(largest, TOP[code])
    steps = (wide * (top / largest).unsqueeze(-1)).clamp(-TOP[code], TOP[code])
    if code == "int8":
        steps = steps.round().nan_to_num()
    return steps.to(DTYPES[code]), largest / top


def decode_reference(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of codes [..., D] and scales [...]."""
    return codes.float() * scales.unsqueeze(-1)


@triton.jit
def largest_magnitude(values):
    """max|value| along axis 1 of float32 values; NaN where there is one, as the bits of NaN are the largest."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def encode_e4m3(value):
    """uint8 codes of float32 values, clamped to ±448 and rounded to nearest even. NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.minimum(magnitude, 0x43E00000)  # 448
    # normal numbers, 2^-6 and up: round the 20 bits that go, then move the exponent's bias from 127 to 7
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # below, codes count multiples of 2^-9, which is the spacing of float32 at 2^14
    shifted = clamped.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """float32 values of uint8 codes, exactly."""
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    # the code's exponent and mantissa in the places of float32's, and 2^120 for the difference of their biases
    value = (((bits & 0x80) << 24) | (magnitude << 20)).to(
        tl.float32, bitcast=True
    ) * 1329227995784915872903807060280344576.0
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def encode_int8(value):
    """int8 codes of float32 values, clamped to ±127 and rounded to nearest even."""
    clamped = tl.minimum(tl.maximum(value, -127.0), 127.0)
    # adding 1.5 · 2^23 leaves the rounded integer in the lowest bits
    return ((clamped + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def encode(value, CODE: tl.constexpr):
    if CODE == "e4m3":
        return encode_e4m3(value)
    else:
        return encode_int8(value)


@triton.jit
def decode(code, CODE: tl.constexpr):
    """float32 values of what is stored: codes without their scales, or plain numbers."""
    if CODE == "e4m3":
        return decode_e4m3(code)
    else:
        return code.to(tl.float32)
