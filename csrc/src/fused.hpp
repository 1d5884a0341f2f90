// Every rule on bf16 parameters and gradients with narrow moments, or none, in one loop. In AdamW the divider, which the root
// and the quotient keep busy, then hides the unpacking, the random bits and the packing, which as loops of their own come on
// top; the other rules are bound by memory instead of by traffic between stages, and the look at the gradient, squares of
// vectors that are in registers anyway, is hidden as well (docs/log.md).
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

struct WordPair {
  Words even, odd;
};

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

// A moment that is a NaN makes p one (but in Lion, whose p takes another mean of the moment), so one comparison for two vectors
// finds the rare rows where rule 3 of update.hpp has work.
template <Rule rule>
inline void update_pair(Pair& p, Pair g, Pair& m, Pair& v, const UpdateScalars& s) {
  rule_element<rule>(p.even, g.even, m.even, v.even, s);
  rule_element<rule>(p.odd, g.odd, m.odd, v.odd, s);
  const bool is_broken = has_nan(p.even, p.odd) || (rule == Rule::lion && has_nan(m.even, m.odd));
  if (__builtin_expect(is_broken, 0)) {
    for (Pair* pair : {&p, &m, &v}) *pair = {canonical(pair->even), canonical(pair->odd)};
  }
}

// -- moments in bf16, or none ------------------------------------------------------------------------------------------

template <Rule rule, bool with_stats>
void update_bfloat16(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, SquaresOfGroups& groups) {
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
        Pair p = widen_pair(parameter + at), m = {}, v = {};
        if constexpr (kNumMoments<rule> > 0) m = widen_pair(first + at);
        if constexpr (kNumMoments<rule> > 1) v = widen_pair(second + at);
        update_pair<rule>(p, g, m, v, s);
        const WordPair words = {random.of(element), random.of(element + one)};
        element += 2u * kLanes;
        narrow_pair(parameter + at, p, {words.even & 0xffffu, words.odd & 0xffffu});
        if constexpr (kNumMoments<rule> > 0) narrow_pair(first + at, m, {words.even >> 16, words.odd >> 16});
        if constexpr (kNumMoments<rule> > 1) {
          narrow_pair(second + at, v, {second_word(words.even) >> 16, second_word(words.odd) >> 16});
        }
      }
    }
    if constexpr (with_stats) groups.add(squares, gradient + start, kStateBlockElements);
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
  Pair first[kBlockRows * kPairs], second[kBlockRows * kPairs];  // the second only where the rule has one
  WordPair words[kBlockRows * kPairs];
  u32 exponents[2];
};

struct BlockInput {
  Decoder first, second;
  i64 start;
  Words element;  // numbers of the next pair's even elements in the tensor
};

template <Rule rule, bool with_stats>
struct UpdateInt8 {
  static constexpr bool has_second = kNumMoments<rule> > 1;
  // By value, and every function inline: what a store may change is loaded again after each.
  const ChunkArrays arrays;
  const UpdateScalars s;
  const Piece piece;
  SquaresOfGroups& groups;
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
      Pair p = widen_pair(parameter), v = {};
      Pair m = {float_of(select_bits(0x80000000u, first << 24, bits_of(in.first.magnitude(first << 20)))),
                float_of(select_bits(0x80000000u, first << 16, bits_of(in.first.magnitude(first << 12))))};
      if constexpr (has_second) {
        const Words second = widen_halves(codes(1) + at);
        v = {in.second.magnitude(second << 20), in.second.magnitude(second << 12)};
      }
      update_pair<rule>(p, g, m, v, s);
      const WordPair words = {random.of(in.element), random.of(in.element + one)};
      in.element += 2u * kLanes;
      narrow_pair(parameter, p, {words.even & 0xffffu, words.odd & 0xffffu});
      const Words even = bits_of(m.even) & 0x7fffffffu, odd = bits_of(m.odd) & 0x7fffffffu;
      largest[0] = larger(largest[0], larger(reinterpret_cast<Ints>(even), reinterpret_cast<Ints>(odd)));
      const i64 slot = row * kPairs + k;
      waiting.first[slot] = m;
      if constexpr (has_second) {
        largest[1] = larger(largest[1], larger(reinterpret_cast<Ints>(v.even), reinterpret_cast<Ints>(v.odd)));
        waiting.second[slot] = v;
      }
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
      if constexpr (has_second) {  // without signs: is_fused
        const Words even2 = bits_of(waiting.second[slot].even), odd2 = bits_of(waiting.second[slot].odd);
        store_codes(codes(1) + at, at_least_one(unsigned_code.encode(even2, second_word(words.even)), even2),
                    at_least_one(unsigned_code.encode(odd2, second_word(words.odd)), odd2));
      }
    }
  }

  OVERSPILL_INLINE BlockInput open(i64 start) const {
    const i64 block = start / kStateBlockElements;
    prefetch_block(arrays, start, piece.prefetch_elements);
    const u32 second = has_second ? arrays.exponents[1][block] : 0u;
    return {Decoder::of<4>(arrays.exponents[0][block]), Decoder::of<5>(second), start,
            even_numbers() + (piece.first_element + static_cast<u32>(start - piece.start))};
  }

  OVERSPILL_INLINE void close(const BlockInput& in, WaitingBlock& waiting, const Ints (&largest)[2], const Squares& squares) const {
    waiting.exponents[0] = Code<4>::block_exponent(largest_lane(largest[0]));
    if constexpr (has_second) waiting.exponents[1] = Code<5>::block_exponent(largest_lane(largest[1]));
    for (int which = 0; which < kNumMoments<rule>; ++which) {
      arrays.exponents[which][in.start / kStateBlockElements] = static_cast<u8>(waiting.exponents[which]);
    }
    if constexpr (with_stats) groups.add(squares, static_cast<const u16*>(arrays.gradient) + in.start, kStateBlockElements);
  }

  OVERSPILL_INLINE void clear_broken(const WaitingBlock& waiting, i64 start) const {
    for (int which = 0; which < kNumMoments<rule>; ++which) {
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
      const Encoder<5> unsigned_code(has_second && has_waiting ? last.exponents[1] : Code<5>::smallest);
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

// Whether the loops of this file know the arrays; whole blocks only. With beta2 and 1 - beta2 not below +0 no second moment has
// a sign.
inline bool is_fused(const ChunkArrays& arrays, const UpdateScalars& scalars) {
  constexpr u32 infinity = 0x7f800000u;
  const bool has_sign = bits_of(scalars.beta2) > infinity || bits_of(scalars.one_minus_beta2) > infinity;
  if (arrays.rule == Rule::adamw && has_sign) return false;
  return arrays.format != StateFormat::fp32 && arrays.parameter_dtype == Dtype::bfloat16 && arrays.gradient_dtype == Dtype::bfloat16;
}

template <Rule rule, bool with_stats>
void update_fused(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, SquaresOfGroups& groups) {
  if constexpr (kNumMoments<rule> > 0) {
    if (arrays.format == StateFormat::int8) {
      return UpdateInt8<rule, with_stats>{arrays, scalars, piece, groups, RoundingWords(piece.key)}.run();
    }
  }
  update_bfloat16<rule, with_stats>(arrays, scalars, piece, groups);
}

// All of a piece of whole blocks; `groups` takes the squares, where they are wanted.
template <bool with_stats>
void update_fused(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, SquaresOfGroups& groups) {
  switch (arrays.rule) {
    case Rule::adamw:
      return update_fused<Rule::adamw, with_stats>(arrays, scalars, piece, groups);
    case Rule::sgd:
      return update_fused<Rule::sgd, with_stats>(arrays, scalars, piece, groups);
    case Rule::sgd_momentum:
      return update_fused<Rule::sgd_momentum, with_stats>(arrays, scalars, piece, groups);
    case Rule::sgd_nesterov:
      return update_fused<Rule::sgd_nesterov, with_stats>(arrays, scalars, piece, groups);
    case Rule::lion:
      return update_fused<Rule::lion, with_stats>(arrays, scalars, piece, groups);
  }
}

}  // namespace
}  // namespace overspill
