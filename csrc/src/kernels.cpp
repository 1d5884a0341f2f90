// The loops over elements, in plain C++ that the compiler vectorises.
//
// This file is compiled once per instruction set, each time with OVERSPILL_ISA naming the variant. Two things follow:
// 1. Everything here is internal to the translation unit, and no standard header with inline functions is used: the
//    linker keeps one copy of an inline function, and the copy with AVX-512 in it must not be the one an older CPU runs.
// 2. Conversions are written with integers and exact fp32 operations instead of conversion instructions, so that all
//    variants compute the same thing in the same way. The loops are bound by memory, the extra integer work is hidden.
#include "kernels.hpp"

#define OVERSPILL_CONCAT2(a, b) a##b
#define OVERSPILL_CONCAT(a, b) OVERSPILL_CONCAT2(a, b)

namespace overspill {
namespace {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i16 = std::int16_t;
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

struct BFloat16 {
  using Storage = u16;
  static float widen(u16 value) { return widen_bfloat16(value); }
};
struct Float16 {
  using Storage = u16;
  static float widen(u16 value) { return widen_float16(value); }
};
struct Float32 {
  using Storage = float;
  static float widen(float value) { return value; }
};

// The master's new value; exp_avg and exp_avg_sq are updated in place. Operation for operation spec/update_rule.py.
inline float step_element(float p, float g, float& exp_avg, float& exp_avg_sq, const AdamWScalars& s) {
  g = g * s.gradient_scale;
  p = p * s.decay;
  const float m = exp_avg + (g - exp_avg) * s.one_minus_beta1;
  const float v = exp_avg_sq * s.beta2 + (g * s.one_minus_beta2) * g;
  const float denom = __builtin_sqrtf(v) / s.bias_correction2_sqrt + s.eps;
  p = p - (s.step_size * m) / denom;
  exp_avg = canonical(m);
  exp_avg_sq = canonical(v);
  return canonical(p);
}

template <class Gradient>
void loop_bfloat16(u16* __restrict parameter, i16* __restrict remainder, const typename Gradient::Storage* __restrict gradient,
                   float* __restrict exp_avg, float* __restrict exp_avg_sq, const AdamWScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const u32 master = (static_cast<u32>(parameter[i]) << 16) + static_cast<u32>(static_cast<std::int32_t>(remainder[i]));
    float m = exp_avg[i], v = exp_avg_sq[i];
    const u32 bits = bits_of(step_element(float_of(master), Gradient::widen(gradient[i]), m, v, s));
    parameter[i] = static_cast<u16>((bits + 0x8000u) >> 16);
    remainder[i] = static_cast<i16>(static_cast<u16>(bits));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

template <class Gradient>
void loop_float16(u16* __restrict parameter, float* __restrict master, const typename Gradient::Storage* __restrict gradient,
                  float* __restrict exp_avg, float* __restrict exp_avg_sq, const AdamWScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float m = exp_avg[i], v = exp_avg_sq[i];
    const float p = step_element(master[i], Gradient::widen(gradient[i]), m, v, s);
    master[i] = p;
    parameter[i] = narrow_float16(p);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

template <class Gradient>
void loop_float32(float* __restrict parameter, const typename Gradient::Storage* __restrict gradient, float* __restrict exp_avg,
                  float* __restrict exp_avg_sq, const AdamWScalars s, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float m = exp_avg[i], v = exp_avg_sq[i];
    parameter[i] = step_element(parameter[i], Gradient::widen(gradient[i]), m, v, s);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

template <class Gradient>
void update_bfloat16(const AdamWRange& range, const AdamWScalars& scalars, i64 start, i64 end) {
  loop_bfloat16<Gradient>(static_cast<u16*>(range.parameter) + start, static_cast<i16*>(range.master) + start,
                          static_cast<const typename Gradient::Storage*>(range.gradient) + start, range.exp_avg + start,
                          range.exp_avg_sq + start, scalars, end - start);
}

template <class Gradient>
void update_float16(const AdamWRange& range, const AdamWScalars& scalars, i64 start, i64 end) {
  loop_float16<Gradient>(static_cast<u16*>(range.parameter) + start, static_cast<float*>(range.master) + start,
                         static_cast<const typename Gradient::Storage*>(range.gradient) + start, range.exp_avg + start,
                         range.exp_avg_sq + start, scalars, end - start);
}

template <class Gradient>
void update_float32(const AdamWRange& range, const AdamWScalars& scalars, i64 start, i64 end) {
  loop_float32<Gradient>(static_cast<float*>(range.parameter) + start,
                         static_cast<const typename Gradient::Storage*>(range.gradient) + start, range.exp_avg + start,
                         range.exp_avg_sq + start, scalars, end - start);
}

// A value is not finite when its exponent is all ones. No early exit inside: the caller exits between short pieces.
template <class Word, u32 exponent>
bool all_finite(const void* data, i64 start, i64 end) {
  const Word* words = static_cast<const Word*>(data);
  Word found = 0;
  for (i64 i = start; i < end; ++i) {
    found = static_cast<Word>(found | static_cast<Word>((words[i] & exponent) == exponent ? 1 : 0));
  }
  return found == 0;
}

}  // namespace

extern const Kernels OVERSPILL_CONCAT(kernels_, OVERSPILL_ISA);
#define OVERSPILL_TEXT2(a) #a
#define OVERSPILL_TEXT(a) OVERSPILL_TEXT2(a)
const Kernels OVERSPILL_CONCAT(kernels_, OVERSPILL_ISA) = {
    OVERSPILL_TEXT(OVERSPILL_ISA),
    {{update_bfloat16<BFloat16>, update_bfloat16<Float16>, update_bfloat16<Float32>},
     {update_float16<BFloat16>, update_float16<Float16>, update_float16<Float32>},
     {update_float32<BFloat16>, update_float32<Float16>, update_float32<Float32>}},
    {all_finite<u16, 0x7f80u>, all_finite<u16, 0x7c00u>, all_finite<u32, 0x7f800000u>},
};

}  // namespace overspill
