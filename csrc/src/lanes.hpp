// Vectors as wide as the instruction set that this file is compiled for, in the compiler's own vector types: + - * / & | ^ << >>
// and comparisons work element by element and round as the scalar ones do. Included by kernels.cpp only; see numbers.hpp.
//
// A row is 32 elements in a row of memory, kPairs pairs of vectors. In a pair of 16-bit arrays the first vector holds the
// even elements and the second the odd ones: a 32-bit word of memory is one element of each, so widening is a shift or a
// mask and narrowing two of them, where keeping the order of memory costs two shuffles a vector. Nothing that is stored
// depends on which lane computed it.
#pragma once

#include "numbers.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace overspill {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kRow = 32;
constexpr int kPairs = kRow / (2 * kLanes);

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Words = u32 __attribute__((vector_size(kVectorBytes)));
using Ints = i32 __attribute__((vector_size(kVectorBytes)));
using Halves = u16 __attribute__((vector_size(kVectorBytes / 2)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

inline Words bits_of(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats float_of(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Words all_lanes(u32 value) { return Words{} + value; }
inline Floats all_lanes(float value) { return Floats{} + value; }
inline Floats canonical(Floats value) { return value != value ? float_of(all_lanes(0x7fc00000u)) : value; }

// Bits of `one` where the mask is 1, of `other` where it is 0.
inline Words select_bits(u32 mask, Words one, Words other) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(all_lanes(mask)), reinterpret_cast<__m512i>(one),
                                                           reinterpret_cast<__m512i>(other), 0xca));
#else
  return (one & mask) | (other & ~mask);
#endif
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

inline Floats root(Floats value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_sqrt_ps(reinterpret_cast<__m128>(value)));
#else
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

// Whether any lane of either is a NaN.
inline bool has_nan(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b))) != 0;
#else
  i32 found = 0;
  for (int i = 0; i < kLanes; ++i) found |= a[i] != a[i] || b[i] != b[i] ? 1 : 0;
  return found != 0;
#endif
}

inline u32 largest_lane(Ints values) {
  i32 largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = values[i] > largest ? values[i] : largest;
  return static_cast<u32>(largest);
}

inline Words rounding_word(Words element, u32 key_low, u32 key_high) {
  Words x = element ^ key_low;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key_high;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

inline Words second_word(Words word) { return word * 0x9e3779b1u; }

}  // namespace
}  // namespace overspill
