// AdamW on bf16 parameters and gradients with narrow moments in one loop: the divider, which the root and the quotient keep
// busy, then hides the unpacking, the random bits and the packing, which as loops of their own come on top (docs/log.md).
// Bit for bit what the stages of kernels.cpp compute. Included by kernels.cpp only; see numbers.hpp, and lanes.hpp for rows.
//
// Whole blocks of 256 elements only. In format int8 a block's codes need its largest magnitude first, so the loop computes
// block k and encodes block k - 1, row by row, from buffers in the first-level cache.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "prefetch.hpp"
#include "rules.hpp"
#include "squares.hpp"

namespace overspill {
namespace {

constexpr i64 kBlockRows = kStateBlockElements / kRow;
#define OVERSPILL_INLINE inline __attribute__((always_inline))
constexpr u32 kOddHalf = 0xffff0000u;

struct Pair {
  Floats even, odd;
};

struct WordPair {
  Words even, odd;
};

inline Pair widen_pair(const u16* halves) {
  const Words both = load<Words>(halves);
  return {float_of(both << 16), float_of(both & kOddHalf)};
}

// Rounds stochastically; `random` has 16 bits for each element.
inline void narrow_pair(u16* halves, Pair wide, WordPair random) {
  const Words even = (bits_of(wide.even) + random.even) >> 16;
  store(halves, select_bits(kOddHalf, bits_of(wide.odd) + random.odd, even));
}

// Elements 0, 2, 4, ...
inline Words even_numbers() {
  Words numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = 2u * static_cast<u32>(i);
  return numbers;
}

struct Squares {
  Pair running[kPairs] = {};

  void add(int pair, Pair g) {
    running[pair].even += g.even * g.even;
    running[pair].odd += g.odd * g.odd;
  }

  void add_to(GradientStats& stats, const u16* gradient) const {
    alignas(64) float sums[kRow / 2];
    for (int k = 0; k < kPairs; ++k) store(sums + k * kLanes, running[k].even + running[k].odd);
    if (add_group(stats, sums)) return;
    add_group_exactly(stats, [gradient](i64 i) { return static_cast<double>(widen_bfloat16(gradient[i])); }, kStateBlockElements);
  }
};

// m or v that is a NaN makes p one, so one comparison for two vectors finds the rare rows where rule 3 of update.hpp has work.
inline void adamw_pair(Pair& p, Pair g, Pair& m, Pair& v, const UpdateScalars& s) {
  adamw_element(p.even, g.even, m.even, v.even, s);
  adamw_element(p.odd, g.odd, m.odd, v.odd, s);
  if (__builtin_expect(has_nan(p.even, p.odd), 0)) {
    for (Pair* pair : {&p, &m, &v}) *pair = {canonical(pair->even), canonical(pair->odd)};
  }
}

// -- moments in bf16 ---------------------------------------------------------------------------------------------------

template <bool with_stats>
void adamw_bfloat16(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, GradientStats* stats) {
  const UpdateScalars s = scalars;
  u16* const parameter = static_cast<u16*>(arrays.parameter);
  const u16* const gradient = static_cast<const u16*>(arrays.gradient);
  u16 *const first = static_cast<u16*>(arrays.moments[0]), *const second = static_cast<u16*>(arrays.moments[1]);
  const RoundingWords random(piece.key);
  const Words one = kept(all_lanes(1u));
  Words element = even_numbers() + piece.first_element;
  for (i64 start = piece.start; start < piece.end; start += kStateBlockElements) {
    Squares squares;
    prefetch_block(arrays, start, piece.prefetch_elements);
    for (i64 row = start; row < start + kStateBlockElements; row += kRow) {
      for (int k = 0; k < kPairs; ++k) {
        const i64 at = row + 2 * kLanes * k;
        const Pair g = widen_pair(gradient + at);
        if (with_stats) squares.add(k, g);
        Pair p = widen_pair(parameter + at), m = widen_pair(first + at), v = widen_pair(second + at);
        adamw_pair(p, g, m, v, s);
        const WordPair words = {random.of(element), random.of(element + one)};
        element += 2u * kLanes;
        narrow_pair(parameter + at, p, {words.even & 0xffffu, words.odd & 0xffffu});
        narrow_pair(first + at, m, {words.even >> 16, words.odd >> 16});
        narrow_pair(second + at, v, {second_word(words.even) >> 16, second_word(words.odd) >> 16});
      }
    }
    if (with_stats) squares.add_to(*stats, gradient + start);
  }
}

// -- moments in 8-bit codes --------------------------------------------------------------------------------------------

// What reading a block's codes needs. With b = (E - T) << 23, a normal code is the float of (code << 20) + b. A denormal one
// gets the exponent of the smallest normal code, 2^(b + 1), which is subtracted again: exact. A broken block reads NaN.
struct Decoder {
  u32 code_bits, base;
  Floats denormal;

  template <u32 exponent_bits>
  static Decoder of(u32 stored) {
    using Format = Code<exponent_bits>;
    if (stored == Format::broken) return {0, 0x7fc00000u, all_lanes(float_of(0x7fc00000u))};
    const u32 base = ((stored < Format::smallest ? Format::smallest : stored) - Format::top) << 23;
    return {Format::top << 23 | 0x700000u, base, all_lanes(float_of(base + (1u << 23)))};
  }

  // `code` is shifted so that its mantissa starts at bit 20; other bits may be anything.
  Floats magnitude(Words code) const {
    const Words bits = code & code_bits;
    const Words wide = bits + base;
    return bits < (1u << 23) ? float_of(wide + (1u << 23)) - denormal : float_of(wide);
  }
};

// What encoding a block needs: Code::encode without its last shift, so that the code is in bits 20 to 27.
template <u32 exponent_bits>
struct Encoder {
  using Format = Code<exponent_bits>;
  Floats last_places;
  Ints base;

  explicit Encoder(u32 exponent)
      : last_places(all_lanes(Format::last_places(exponent))), base(reinterpret_cast<Ints>(all_lanes((exponent - Format::top) << 23))) {}

  // Both readings of a magnitude, as a denormal and as a normal code, are never above the right one, and the denormal one is
  // cut off where normal codes begin: the right one is the larger.
  Words encode(Words magnitude, Words random) const {
    const Floats scaled = float_of(magnitude) * last_places;
    const Floats limit = all_lanes(Format::kSmallestNormal);
    const Ints denormal = __builtin_convertvector(smaller(scaled, limit), Ints);
    return reinterpret_cast<Words>(larger(denormal, reinterpret_cast<Ints>(magnitude) - base)) + (random >> 12);
  }
};

inline Words sign_in_code(Words magnitude_code, Words bits) { return select_bits(0x08000000u, bits >> 4, magnitude_code); }

inline void store_codes(u8* codes, Words even, Words odd) { store_halves(codes, select_bits(0xffu, even >> 20, odd >> 12)); }

inline Words at_least_one(Words code, Words bits) {
  const Ints raised = larger(reinterpret_cast<Ints>(code), reinterpret_cast<Ints>(all_lanes(1u << 20)));
  return bits == 0u ? code : reinterpret_cast<Words>(raised);
}

// A block between its two passes: rows in pairs, and what its codes will be scaled by.
struct WaitingBlock {
  Pair first[kBlockRows * kPairs], second[kBlockRows * kPairs];
  WordPair words[kBlockRows * kPairs];
  u32 exponents[2];
};

struct BlockInput {
  Decoder first, second;
  i64 start;
  Words element;  // numbers of the next pair's even elements in the tensor
};

template <bool with_stats>
struct AdamwInt8 {
  // By value, and every function inline: what a store may change is loaded again after each.
  const ChunkArrays arrays;
  const UpdateScalars s;
  const Piece piece;
  GradientStats* const stats;
  const RoundingWords random;
  const Words one = kept(all_lanes(1u));

  u8* codes(int which) const { return static_cast<u8*>(arrays.moments[which]); }

  // Updates one row and leaves its moments, as they are before narrowing, in `waiting`.
  OVERSPILL_INLINE void compute(BlockInput& in, i64 row, WaitingBlock& waiting, Ints (&largest)[2], Squares& squares) const {
    for (int k = 0; k < kPairs; ++k) {
      const i64 offset = row * kRow + 2 * kLanes * k, at = in.start + offset;
      u16* const parameter = static_cast<u16*>(arrays.parameter) + at;
      const Pair g = widen_pair(static_cast<const u16*>(arrays.gradient) + at);
      if (with_stats) squares.add(k, g);
      const Words first = widen_halves(codes(0) + at);
      const Words second = widen_halves(codes(1) + at);
      Pair p = widen_pair(parameter);
      Pair m = {float_of(select_bits(0x80000000u, first << 24, bits_of(in.first.magnitude(first << 20)))),
                float_of(select_bits(0x80000000u, first << 16, bits_of(in.first.magnitude(first << 12))))};
      Pair v = {in.second.magnitude(second << 20), in.second.magnitude(second << 12)};
      adamw_pair(p, g, m, v, s);
      const WordPair words = {random.of(in.element), random.of(in.element + one)};
      in.element += 2u * kLanes;
      narrow_pair(parameter, p, {words.even & 0xffffu, words.odd & 0xffffu});
      const Words even = bits_of(m.even) & 0x7fffffffu, odd = bits_of(m.odd) & 0x7fffffffu;
      largest[0] = larger(largest[0], larger(reinterpret_cast<Ints>(even), reinterpret_cast<Ints>(odd)));
      largest[1] = larger(largest[1], larger(reinterpret_cast<Ints>(v.even), reinterpret_cast<Ints>(v.odd)));
      const i64 slot = row * kPairs + k;
      waiting.first[slot] = m;
      waiting.second[slot] = v;
      waiting.words[slot] = words;
    }
  }

  OVERSPILL_INLINE void encode(const WaitingBlock& waiting, const Encoder<4>& signed_code, const Encoder<5>& unsigned_code, i64 start,
                               i64 row) const {
    for (int k = 0; k < kPairs; ++k) {
      const i64 at = start + row * kRow + 2 * kLanes * k, slot = row * kPairs + k;
      const WordPair words = waiting.words[slot];
      const Words even = bits_of(waiting.first[slot].even), odd = bits_of(waiting.first[slot].odd);
      store_codes(codes(0) + at, sign_in_code(signed_code.encode(even & 0x7fffffffu, words.even), even),
                  sign_in_code(signed_code.encode(odd & 0x7fffffffu, words.odd), odd));
      const Words even2 = bits_of(waiting.second[slot].even), odd2 = bits_of(waiting.second[slot].odd);  // no signs: is_fused
      store_codes(codes(1) + at, at_least_one(unsigned_code.encode(even2, second_word(words.even)), even2),
                  at_least_one(unsigned_code.encode(odd2, second_word(words.odd)), odd2));
    }
  }

  OVERSPILL_INLINE BlockInput open(i64 start) const {
    const i64 block = start / kStateBlockElements;
    prefetch_block(arrays, start, piece.prefetch_elements);
    return {Decoder::of<4>(arrays.exponents[0][block]), Decoder::of<5>(arrays.exponents[1][block]), start,
            even_numbers() + (piece.first_element + static_cast<u32>(start - piece.start))};
  }

  OVERSPILL_INLINE void close(const BlockInput& in, WaitingBlock& waiting, const Ints (&largest)[2], const Squares& squares) const {
    waiting.exponents[0] = Code<4>::block_exponent(largest_lane(largest[0]));
    waiting.exponents[1] = Code<5>::block_exponent(largest_lane(largest[1]));
    for (int which = 0; which < 2; ++which) {
      arrays.exponents[which][in.start / kStateBlockElements] = static_cast<u8>(waiting.exponents[which]);
    }
    if (with_stats) squares.add_to(*stats, static_cast<const u16*>(arrays.gradient) + in.start);
  }

  OVERSPILL_INLINE void clear_broken(const WaitingBlock& waiting, i64 start) const {
    for (int which = 0; which < 2; ++which) {
      if (waiting.exponents[which] == Code<4>::broken) __builtin_memset(codes(which) + start, 0, kStateBlockElements);
    }
  }

  OVERSPILL_INLINE void run() const {
    if (piece.start == piece.end) return;
    WaitingBlock waiting[2];
    for (i64 start = piece.start; start <= piece.end; start += kStateBlockElements) {
      const bool has_block = start<piece.end, has_waiting = start> piece.start;
      const i64 number = (start - piece.start) / kStateBlockElements, before = start - kStateBlockElements;
      WaitingBlock &now = waiting[number & 1], &last = waiting[(number & 1) ^ 1];
      BlockInput in = has_block ? open(start) : BlockInput{};
      const Encoder<4> signed_code(has_waiting ? last.exponents[0] : Code<4>::smallest);
      const Encoder<5> unsigned_code(has_waiting ? last.exponents[1] : Code<5>::smallest);
      Ints largest[2] = {};
      Squares squares;
      if (has_block && has_waiting) {
        for (i64 row = 0; row < kBlockRows; ++row) {
          encode(last, signed_code, unsigned_code, before, row);
          compute(in, row, now, largest, squares);
        }
      } else if (has_block) {
        for (i64 row = 0; row < kBlockRows; ++row) compute(in, row, now, largest, squares);
      } else {
        for (i64 row = 0; row < kBlockRows; ++row) encode(last, signed_code, unsigned_code, before, row);
      }
      if (has_waiting) clear_broken(last, before);
      if (has_block) close(in, now, largest, squares);
    }
  }
};

// Whether the loops of this file know the arrays and the rule; whole blocks only. With beta2 and 1 - beta2 not below +0 no
// second moment has a sign.
inline bool is_fused(const ChunkArrays& arrays, const UpdateScalars& scalars) {
  constexpr u32 infinity = 0x7f800000u;
  if (bits_of(scalars.beta2) > infinity || bits_of(scalars.one_minus_beta2) > infinity) return false;
  return arrays.rule == Rule::adamw && arrays.format != StateFormat::fp32 && arrays.parameter_dtype == Dtype::bfloat16 &&
         arrays.gradient_dtype == Dtype::bfloat16;
}

// All of a piece of whole blocks.
template <bool with_stats>
void update_fused(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, GradientStats* stats) {
  if (arrays.format == StateFormat::bf16) return adamw_bfloat16<with_stats>(arrays, scalars, piece, stats);
  AdamwInt8<with_stats>{arrays, scalars, piece, stats, RoundingWords(piece.key)}.run();
}

}  // namespace
}  // namespace overspill
