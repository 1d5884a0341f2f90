// Number formats: fp32 to bf16, fp16 and the 8-bit codes of the moments, and back. Included by kernels.cpp only.
//
// Everything is internal to the including translation unit and uses no standard header with inline functions: the linker keeps
// one copy of an inline function, and the copy with AVX-512 in it must not be the one that an older CPU runs. Conversions are
// written with integers and exact fp32 operations, so that every instruction set computes the same thing in the same way.
#pragma once

#include <cstdint>

namespace overspill {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline u32 bits_of(float value) {
  u32 bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(u32 bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Rule 3 of update.hpp.
inline float canonical(float value) { return value != value ? float_of(0x7fc00000u) : value; }

inline float root(float value) { return __builtin_sqrtf(value); }

inline float widen_bfloat16(u16 half) { return float_of(static_cast<u32>(half) << 16); }

// Exact for every half: exponent and mantissa shifted into place and multiplied by 2^(127-15), which also normalises
// denormal halves; infinities and NaNs get the full exponent afterwards.
inline float widen_float16(u16 half) {
  const u32 magnitude = static_cast<u32>(half & 0x7fffu) << 13;
  const u32 scaled = bits_of(float_of(magnitude) * float_of((127u + 112u) << 23));
  const u32 wide = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : scaled;
  return float_of(wide | (static_cast<u32>(half & 0x8000u) << 16));
}

// Nearest half, ties to even; a NaN becomes 0x7e00.
inline u16 narrow_float16(float value) {
  const u32 bits = bits_of(value);
  const u32 magnitude = bits & 0x7fffffffu;
  // Normal result: rebias the exponent by 15 - 127 and round at bit 13; a carry into the exponent is right, up to infinity.
  const u32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal result: adding 0.5 makes the fp32 adder round at 2^-24, the last place of a denormal half.
  const u32 denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  u32 half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  const u32 with_sign = half | ((bits >> 16) & 0x8000u);
  return static_cast<u16>(magnitude > 0x7f800000u ? 0x7e00u : with_sign);
}

// Rounded up with the probability of what is cut off; `random` has 16 bits. Infinities and the quiet NaN stay what they are.
inline u16 narrow_bfloat16_stochastic(float value, u32 random) { return static_cast<u16>((bits_of(value) + random) >> 16); }

// The 8-bit codes (spec/state_formats.py says what they mean). `exponent_bits` is 4 with a sign, 5 without.
template <u32 exponent_bits>
struct Code {
  static constexpr u32 top = (1u << exponent_bits) - 1;  // exponent field of the block's largest magnitude
  static constexpr u32 smallest = top + 22;              // block exponents below this one are raised to it: last_places
  static constexpr u32 broken = 255;                     // block exponent of a block with a value that is not finite

  // The block's exponent from the largest magnitude's bits, such that rounding it up cannot overflow the code.
  static u32 block_exponent(u32 largest) {
    const u32 exponent = (largest + 0xfffffu) >> 23;
    return exponent >= broken ? broken : exponent < smallest ? smallest : exponent;
  }

  // `magnitude` are the bits of a finite value without its sign, `random` has 20 bits. Below the smallest normal code the value
  // is a whole number of 2^-20 of the last place: one exact multiplication, cut to an integer.
  static u32 encode(u32 magnitude, u32 exponent, u32 random) {
    const float scaled = float_of(magnitude) * last_places(exponent);
    const float bounded = scaled < kSmallestNormal ? scaled : kSmallestNormal;
    const u32 denormal = static_cast<u32>(static_cast<i32>(bounded));
    const u32 normal = magnitude - ((exponent - top) << 23);
    return ((scaled < kSmallestNormal ? denormal : normal) + random) >> 20;
  }

  static constexpr float kSmallestNormal = 8388608.0f;  // 2^23: code 8, in 2^-20 of its last place

  // What turns the smallest normal code's value, 2^(exponent - top + 1 - 127), into 2^23.
  static float last_places(u32 exponent) { return float_of((127u + 23u + 127u - 1u + top - exponent) << 23); }

  static float decode(u32 code, u32 exponent) {
    const float normal = float_of((code << 20) + ((exponent - top) << 23));
    const float denormal = static_cast<float>(static_cast<i32>(code)) * float_of((exponent - top - 2) << 23);
    return code >= 8u ? normal : denormal;
  }
};

// Random bits of one element: mixes its number in the tensor with the two halves of the key (src/overspill/rng.py).
inline u32 rounding_word(u32 element, u32 key_low, u32 key_high) {
  u32 x = element ^ key_low;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key_high;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// More bits from the same word, for the second moment.
inline u32 second_word(u32 word) { return word * 0x9e3779b1u; }

}  // namespace
}  // namespace overspill
