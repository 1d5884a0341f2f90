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
constexpr u32 kOddHalf = 0xffff0000u;

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Words = u32 __attribute__((vector_size(kVectorBytes)));
using Ints = i32 __attribute__((vector_size(kVectorBytes)));
using Quad = i32 __attribute__((vector_size(16)));
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

// What was stored is loaded again, and not taken out of a register by instructions that the vector ports execute.
template <class Array>
inline void in_memory(Array& array) {
  asm("" : "+m"(array));
}

inline Words bits_of(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats float_of(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Words all_lanes(u32 value) { return Words{} + value; }
inline Floats all_lanes(float value) { return value - Floats{}; }  // plus zero would lose the sign of a zero

// `value` as a float or in every lane, where code is written for both.
template <class Value>
inline Value filled(float value) {
  if constexpr (sizeof(Value) == sizeof(float)) {
    return value;
  } else {
    return all_lanes(value);
  }
}

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

inline Words exclusive_or(Words a, Words b, Words c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// Of two vectors without NaNs, and without signs in the result of the second.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Floats larger_magnitude(Floats a, Floats b) {
#if defined(__AVX512DQ__)
  return reinterpret_cast<Floats>(_mm512_maskz_range_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), 0x0b));
#else
  return larger(float_of(bits_of(a) & 0x7fffffffu), float_of(bits_of(b) & 0x7fffffffu));
#endif
}

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

// a * b + c, rounded once, of bf16 numbers a and b.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  // The product has 16 bits, so the sum in double is exact unless one of the two is below 2^-28 of the other; then both roundings
  // give that other one, which is an fp32 number.
  using Doubles = double __attribute__((vector_size(2 * kVectorBytes)));
  const Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  return __builtin_convertvector(product + __builtin_convertvector(c, Doubles), Floats);
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

// Through memory, four lanes at a time and then one by one: loads and scalar comparisons leave the vector ports alone, where GCC's
// own reduction takes 80 instructions.
inline u32 largest_lane(Ints values) {
  alignas(kVectorBytes) i32 lanes[kLanes];
  alignas(16) i32 left[4];
  store(lanes, values);
  in_memory(lanes);
  Quad largest = load<Quad>(lanes);
  for (int i = 4; i < kLanes; i += 4) {
    const Quad quad = load<Quad>(lanes + i);
    largest = largest > quad ? largest : quad;
  }
  store(left, largest);
  in_memory(left);
  const i32 a = left[0] > left[1] ? left[0] : left[1], b = left[2] > left[3] ? left[2] : left[3];
  return static_cast<u32>(a > b ? a : b);
}

// Where the compiler takes four instructions for one.

// `b` where either is a NaN.
inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_min_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return a < b ? a : b;
#endif
}

inline Words widen_halves(const void* from) {
  const Halves halves = load<Halves>(from);
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

// The low half of each lane.
inline void store_halves(void* to, Words words) {
#if defined(__AVX512F__)
  store(to, _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(words)));
#else
  store(to, __builtin_convertvector(words, Halves));
#endif
}

// A value that the compiler keeps in a register or on the stack, and does not build again in every round.
inline Words kept(Words value) {
#if defined(__SSE2__)
  asm("" : "+x"(value));
#endif
  return value;
}

struct WordPair {
  Words even, odd;
};

inline Words lane_numbers() {
  Words numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<u32>(i);
  return numbers;
}

// `rounding_word` of numbers.hpp for a block of 256 elements whose first number is a multiple of 256. They differ in the low eight
// bits alone, so x ^ (x >> 16) is an element's place in the block, exclusive or with what all share. The place of its pair of
// vectors and its place in there have no bit in common: that is a sum of one term for each, and so is the first product, one
// addition in the loop. The second half of the key is joined with its shifted self once for all.
struct RoundingWords {
  static constexpr u32 kPair = 2 * kLanes, kBlockPairs = 256 / kPair, kFactor = 0x7feb352du;

  struct Block {
    WordPair in_pair;
    alignas(kVectorBytes) u32 of_pair[kBlockPairs < kLanes ? kLanes : kBlockPairs];
  };

  u32 low;
  Words high, second_factor = kept(all_lanes(0x846ca68bu));

  explicit RoundingWords(u64 key)
      : low(static_cast<u32>(key)), high(kept(all_lanes(static_cast<u32>(key >> 32) ^ (static_cast<u32>(key >> 32) >> 15)))) {}

  inline __attribute__((always_inline)) void start(Block& block, u32 first_element) const {
    const u32 mixed = first_element ^ low, shared = mixed ^ (mixed >> 16);
    const u32 in_pair = shared & (kPair - 1u), of_pair = shared & ~(kPair - 1u);
    const Words lane = lane_numbers();
    block.in_pair.even = (2u * lane ^ in_pair) * kFactor;
    block.in_pair.odd = ((2u * lane + 1u) ^ in_pair) * kFactor;
    for (u32 first = 0; first < kBlockPairs; first += kLanes) {
      store(block.of_pair + first, (kPair * (lane + first) ^ of_pair) * kFactor);
    }
    in_memory(block.of_pair);
  }

  WordPair of(const Block& block, i64 pair) const {
    return {rest(block.in_pair.even + block.of_pair[pair]), rest(block.in_pair.odd + block.of_pair[pair])};
  }

  Words rest(Words x) const {
    x = exclusive_or(x, x >> 15, high);
    x *= second_factor;
    return x ^ (x >> 16);
  }
};

inline Words second_word(Words word) { return word * 0x9e3779b1u; }

}  // namespace
}  // namespace overspill
