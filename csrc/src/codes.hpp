// Vectors of moments to and from the 8-bit codes of format int8, element for element `Code` of numbers.hpp. Included by
// kernels.cpp only; see numbers.hpp, and lanes.hpp for pairs.
//
// With b = (E - T) << 23, E a block's exponent and T its code's, y = float of (code << 20) + b is the value of a normal code. That
// of a denormal one lies below M, the smallest normal value, and is 2 y - M, which is exact. The other way round, a magnitude x
// below M is taken to y = (x + M) / 2, cut to a float: its last place is 2^-20 of a code's. One reading is always on the same side
// of the other: y < 2 y - M above M, x > (x + M) / 2 there. So the right one is the smaller, or the larger, without a condition.
//
// AVX-512 cuts by rounding one operation towards zero, and computes on 16-bit words, two elements a lane, where it can: the two
// ports that take 512-bit instructions are what bounds format int8 (docs/log.md counts them).
#pragma once

#include "lanes.hpp"
#include "numbers.hpp"
#include "squares.hpp"

namespace overspill {
namespace {

template <u32 exponent_bits>
inline u32 code_base(u32 stored) {
  using Format = Code<exponent_bits>;
  return ((stored < Format::smallest ? Format::smallest : stored) - Format::top) << 23;
}

#if defined(__AVX512BW__) && defined(__AVX512DQ__)

inline __m512i words_of_16(u32 value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// A code's value has at most three bits after its first: it is a bf16 number, code << 4 above b >> 16 if normal; of the eight
// denormal codes a table has what must be added instead of b >> 16. A broken block reads NaN.
template <u32 exponent_bits>
struct CodeReader {
  static constexpr bool has_sign = exponent_bits == 4;
  __m512i base, table, factor;

  CodeReader() = default;
  explicit CodeReader(u32 stored) {
    if (stored == Code<exponent_bits>::broken) {
      base = table = words_of_16(0x7fc0u);
      factor = _mm512_setzero_si512();
      return;
    }
    const __m512i above_base = _mm512_castsi128_si512(_mm_setr_epi16(0, -256 - 16, -128 - 32, -64 - 48, -64, 32 - 80, 64 - 96, 96 - 112));
    base = words_of_16(code_base<exponent_bits>(stored) >> 16);
    table = _mm512_maskz_add_epi16(0xfe, base, above_base);
    factor = words_of_16(16);
  }

  Pair read(const u8* codes) const {
    const __m256i bytes = load<__m256i>(codes);
    const __m512i raw = has_sign ? _mm512_maskz_cvtepi8_epi16(~0u, bytes) : _mm512_maskz_cvtepu8_epi16(~0u, bytes);
    const __mmask32 is_denormal = _mm512_testn_epi16_mask(raw, words_of_16(has_sign ? 0x78u : 0xf8u));
    __m512i placed = _mm512_mullo_epi16(raw, factor);
    if (has_sign) placed = _mm512_and_si512(placed, words_of_16(0x87f0u));
    const __m512i halves = _mm512_add_epi16(placed, _mm512_mask_permutexvar_epi16(base, is_denormal, raw, table));
    const Words both = reinterpret_cast<Words>(halves);
    return {float_of(both << 16), float_of(both & kOddHalf)};
  }
};

// Rounds at the lowest place of a code, as narrow_pair at that of a bf16 number, and finds the codes in what is left of 16 bits.
template <u32 exponent_bits>
struct CodeWriter {
  static constexpr bool has_sign = exponent_bits == 4;
  Words base;  // of M / 2
  __m512i base16;

  explicit CodeWriter(u32 exponent)
      : base(all_lanes((exponent - Code<exponent_bits>::top) << 23)), base16(words_of_16((exponent - Code<exponent_bits>::top) << 7)) {}

  Words rounded(Floats x, Words random) const {
    const Words least = has_sign ? select_bits(0x80000000u, bits_of(x), base) : base;
    const __m512 y = _mm512_fmadd_round_ps(reinterpret_cast<__m512>(x), _mm512_set1_ps(0.5f), reinterpret_cast<__m512>(least),
                                           _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m512 right;
    if (has_sign) {
      right = _mm512_maskz_range_ps(0xffff, y, reinterpret_cast<__m512>(x), 0x07);  // the larger magnitude, with its sign
    } else {
      // A second moment that is not zero never becomes zero: at least code 1 before it is rounded.
      const __mmask16 is_positive = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x));
      right = _mm512_maskz_max_ps(0xffff, y, reinterpret_cast<__m512>(x));
      right = _mm512_mask_max_ps(right, is_positive, right, reinterpret_cast<__m512>(base + (1u << 20)));
    }
    return reinterpret_cast<Words>(right) + (random >> 12);
  }

  // Words below 256.
  __m512i coded(Pair values, WordPair random) const {
    const Words halves = select_bits(kOddHalf, rounded(values.odd, random.odd), rounded(values.even, random.even) >> 16);
    __m512i code = _mm512_sub_epi16(reinterpret_cast<__m512i>(halves), base16);  // code << 4, its sign in bit 15
    // The sign to bit 11: the first of these is the smaller without one, the second with one.
    if (has_sign) code = _mm512_min_epu16(code, _mm512_sub_epi16(code, words_of_16(0x7800u)));
    return _mm512_srli_epi16(code, 4);
  }

  // Of two neighbouring pairs of vectors. Packing works in each quarter by itself, eight codes of one and of the other.
  void write(u8* codes, Pair values, WordPair random, Pair next, WordPair next_random) const {
    const __m512i quarters = _mm512_packus_epi16(coded(values, random), coded(next, next_random));
    store(codes, _mm512_maskz_permutexvar_epi64(0xff, _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), quarters));
  }
};

#else

template <u32 exponent_bits>
struct CodeReader {
  static constexpr bool has_sign = exponent_bits == 4;
  u32 code_bits, base;
  Floats smallest_normal;

  CodeReader() = default;
  explicit CodeReader(u32 stored) {
    const bool is_broken = stored == Code<exponent_bits>::broken;
    code_bits = is_broken ? 0u : has_sign ? 0x07f00000u : 0x0ff00000u;
    base = is_broken ? 0x7fc00000u : code_base<exponent_bits>(stored);
    smallest_normal = all_lanes(float_of(base + (1u << 23)));
  }

  // `code` is shifted so that its mantissa starts at bit 20; other bits may be anything.
  Floats magnitude(Words code) const {
    const Floats y = float_of((code & code_bits) + base);
    return smaller(y, y + y - smallest_normal);
  }

  Pair read(const u8* codes) const {
    const Words both = widen_halves(codes);
    const Pair values = {magnitude(both << 20), magnitude(both << 12)};
    if (!has_sign) return values;
    return {float_of(select_bits(0x80000000u, both << 24, bits_of(values.even))),
            float_of(select_bits(0x80000000u, both << 16, bits_of(values.odd)))};
  }
};

// Code::encode without its last shift, so that the code is in bits 20 to 27.
template <u32 exponent_bits>
struct CodeWriter {
  using Format = Code<exponent_bits>;
  static constexpr bool has_sign = exponent_bits == 4;
  Floats last_places;
  Ints base;

  explicit CodeWriter(u32 exponent)
      : last_places(all_lanes(Format::last_places(exponent))), base(reinterpret_cast<Ints>(all_lanes((exponent - Format::top) << 23))) {}

  Words rounded(Words bits, Words random) const {
    const Words magnitude = has_sign ? bits & 0x7fffffffu : bits;
    const Floats scaled = float_of(magnitude) * last_places;
    const Floats limit = all_lanes(Format::kSmallestNormal);
    const Ints denormal = __builtin_convertvector(smaller(scaled, limit), Ints);
    const Words code = reinterpret_cast<Words>(larger(denormal, reinterpret_cast<Ints>(magnitude) - base)) + (random >> 12);
    if (has_sign) return select_bits(0x08000000u, bits >> 4, code);
    // A second moment that is not zero never becomes zero.
    const Words raised = reinterpret_cast<Words>(larger(reinterpret_cast<Ints>(code), reinterpret_cast<Ints>(all_lanes(1u << 20))));
    return bits == 0u ? code : raised;
  }

  void write_pair(u8* codes, Pair values, WordPair random) const {
    const Words even = rounded(bits_of(values.even), random.even), odd = rounded(bits_of(values.odd), random.odd);
    store_halves(codes, select_bits(0xffu, even >> 20, odd >> 12));
  }

  void write(u8* codes, Pair values, WordPair random, Pair next, WordPair next_random) const {
    write_pair(codes, values, random);
    write_pair(codes + 2 * kLanes, next, next_random);
  }
};

#endif

}  // namespace
}  // namespace overspill
