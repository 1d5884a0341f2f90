// Every rule on bf16 parameters and gradients with narrow moments, or none, in one loop. In AdamW the divider, which the root
// and the quotient keep busy, then hides the unpacking, the random bits and the packing, which as loops of their own come on
// top; the other rules are bound by memory instead of by traffic between stages, and the look at the gradient, squares of
// vectors that are in registers anyway, is hidden as well (docs/log.md).
// Bit for bit what the stages of kernels.cpp compute. Included by kernels.cpp only; see numbers.hpp, and lanes.hpp for rows.
//
// Whole blocks of 256 elements only. In format int8 a block's codes need its largest magnitude first, so the loop computes
// block k and encodes block k - 1, two pairs of vectors at a time, from buffers in the first-level cache.
#pragma once

#include "codes.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "prefetch.hpp"
#include "rules.hpp"
#include "squares.hpp"

namespace overspill {
namespace {

constexpr i64 kBlockRows = kStateBlockElements / kRow, kBlockPairs = kBlockRows * kPairs;
#define OVERSPILL_INLINE inline __attribute__((always_inline))

// Rounds stochastically; `random` has 16 bits for each element.
inline void narrow_pair(u16* halves, Pair wide, WordPair random) {
  const Words even = (bits_of(wide.even) + random.even) >> 16;
  store(halves, select_bits(kOddHalf, bits_of(wide.odd) + random.odd, even));
}

// A moment that is a NaN makes p one (but in Lion, whose p takes another mean of the moment), so one comparison for two vectors
// finds the rare rows where rule 3 of update.hpp has work; true in these.
template <Rule rule>
inline bool update_pair(Pair& p, Pair g, Pair& m, Pair& v, const UpdateScalars& s) {
  rule_element<rule>(p.even, g.even, m.even, v.even, s);
  rule_element<rule>(p.odd, g.odd, m.odd, v.odd, s);
  const bool is_broken = has_nan(p.even, p.odd) || (rule == Rule::lion && has_nan(m.even, m.odd));
  if (__builtin_expect(is_broken, 0)) {
    for (Pair* pair : {&p, &m, &v}) *pair = {canonical(pair->even), canonical(pair->odd)};
  }
  return is_broken;
}

// -- moments in bf16, or none ------------------------------------------------------------------------------------------

template <Rule rule, bool with_stats>
void update_bfloat16(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, SquaresOfGroups& groups) {
  const UpdateScalars s = scalars;
  u16* const parameter = static_cast<u16*>(arrays.parameter);
  const u16* const gradient = static_cast<const u16*>(arrays.gradient);
  u16 *const first = static_cast<u16*>(arrays.moments[0]), *const second = static_cast<u16*>(arrays.moments[1]);
  const RoundingWords random(piece.key);
  RoundingWords::Block numbers;
  u32 element = piece.first_element;
  for (i64 start = piece.start; start < piece.end; start += kStateBlockElements) {
    Squares squares;
    prefetch_block(arrays, start, piece.prefetch_elements);
    random.start(numbers, element);
    element += static_cast<u32>(kStateBlockElements);
    for (i64 row = 0; row < kBlockRows; ++row) {
      for (int k = 0; k < kPairs; ++k) {
        const i64 pair = row * kPairs + k, at = start + pair * 2 * kLanes;
        const Pair g = widen_pair(gradient + at);
        if (with_stats) squares.add(k, g);
        Pair p = widen_pair(parameter + at), m = {}, v = {};
        if constexpr (kNumMoments<rule> > 0) m = widen_pair(first + at);
        if constexpr (kNumMoments<rule> > 1) v = widen_pair(second + at);
        update_pair<rule>(p, g, m, v, s);
        const WordPair words = random.of(numbers, pair);
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

// A block between its two passes: pairs of vectors, and what its codes will be scaled by.
struct WaitingBlock {
  Pair first[kBlockPairs], second[kBlockPairs];  // the second only where the rule has one
  WordPair words[kBlockPairs];
  u32 exponents[2];
};

struct BlockInput {
  CodeReader<4> first;
  CodeReader<5> second;
  i64 start;
  const RoundingWords::Block& numbers;
};

// What is known of a block's new moments: magnitudes, in each lane, and whether one is a NaN, which a magnitude may not show.
struct Largest {
  Floats magnitude[2] = {};
  bool is_nan[2] = {};
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

  u8* codes(int which) const { return static_cast<u8*>(arrays.moments[which]); }

  // Updates one pair of vectors and leaves its moments, as they are before narrowing, in `waiting`.
  OVERSPILL_INLINE void compute(const BlockInput& in, i64 pair, WaitingBlock& waiting, Largest& largest, Squares& squares) const {
    const i64 offset = pair * 2 * kLanes, at = in.start + offset;
    u16* const parameter = static_cast<u16*>(arrays.parameter) + at;
    const Pair g = widen_pair(static_cast<const u16*>(arrays.gradient) + at);
    if (with_stats) squares.add(static_cast<int>(pair % kPairs), g);
    Pair p = widen_pair(parameter), m = in.first.read(codes(0) + at), v = {};
    if constexpr (has_second) v = in.second.read(codes(1) + at);
    if (update_pair<rule>(p, g, m, v, s)) {
      largest.is_nan[0] |= has_nan(m.even, m.odd);
      largest.is_nan[1] |= has_nan(v.even, v.odd);
    }
    const WordPair words = random.of(in.numbers, pair);
    narrow_pair(parameter, p, {words.even & 0xffffu, words.odd & 0xffffu});
    largest.magnitude[0] = larger_magnitude(larger_magnitude(largest.magnitude[0], m.even), m.odd);
    waiting.first[pair] = m;
    if constexpr (has_second) {  // without signs: is_fused
      largest.magnitude[1] = larger(larger(largest.magnitude[1], v.even), v.odd);
      waiting.second[pair] = v;
    }
    waiting.words[pair].even = words.even;  // one by one: of both together GCC makes a copy on the stack first
    waiting.words[pair].odd = words.odd;
  }

  // Two pairs, `pair` and the next.
  OVERSPILL_INLINE void encode(const WaitingBlock& waiting, const CodeWriter<4>& first, const CodeWriter<5>& second, i64 start,
                               i64 pair) const {
    const i64 at = start + pair * 2 * kLanes;
    const WordPair words = waiting.words[pair], next = waiting.words[pair + 1];
    first.write(codes(0) + at, waiting.first[pair], words, waiting.first[pair + 1], next);
    if constexpr (has_second) {
      second.write(codes(1) + at, waiting.second[pair], {second_word(words.even), second_word(words.odd)}, waiting.second[pair + 1],
                   {second_word(next.even), second_word(next.odd)});
    }
  }

  OVERSPILL_INLINE BlockInput open(i64 start, RoundingWords::Block& numbers) const {
    const i64 block = start / kStateBlockElements;
    prefetch_block(arrays, start, piece.prefetch_elements);
    random.start(numbers, piece.first_element + static_cast<u32>(start - piece.start));
    const u32 second = has_second ? arrays.exponents[1][block] : 0u;
    return {CodeReader<4>(arrays.exponents[0][block]), CodeReader<5>(second), start, numbers};
  }

  OVERSPILL_INLINE void close(const BlockInput& in, WaitingBlock& waiting, const Largest& largest, const Squares& squares) const {
    waiting.exponents[0] = Code<4>::block_exponent(largest_lane(reinterpret_cast<Ints>(largest.magnitude[0])));
    if constexpr (has_second) {
      waiting.exponents[1] = Code<5>::block_exponent(largest_lane(reinterpret_cast<Ints>(largest.magnitude[1])));
    }
    for (int which = 0; which < kNumMoments<rule>; ++which) {
      if (largest.is_nan[which]) waiting.exponents[which] = Code<4>::broken;
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
    RoundingWords::Block numbers;
    for (i64 start = piece.start; start <= piece.end; start += kStateBlockElements) {
      const bool has_block = start<piece.end, has_waiting = start> piece.start;
      const i64 number = (start - piece.start) / kStateBlockElements, before = start - kStateBlockElements;
      WaitingBlock &now = waiting[number & 1], &last = waiting[(number & 1) ^ 1];
      const BlockInput in = has_block ? open(start, numbers) : BlockInput{{}, {}, start, numbers};
      const CodeWriter<4> first(has_waiting ? last.exponents[0] : Code<4>::smallest);
      const CodeWriter<5> second(has_second && has_waiting ? last.exponents[1] : Code<5>::smallest);
      Largest largest;
      Squares squares;
      if (has_block && has_waiting) {
        for (i64 pair = 0; pair < kBlockPairs; pair += 2) {
          compute(in, pair, now, largest, squares);
          compute(in, pair + 1, now, largest, squares);
          encode(last, first, second, before, pair);
        }
      } else if (has_block) {
        for (i64 pair = 0; pair < kBlockPairs; ++pair) compute(in, pair, now, largest, squares);
      } else {
        for (i64 pair = 0; pair < kBlockPairs; pair += 2) encode(last, first, second, before, pair);
      }
      if (has_waiting) clear_broken(last, before);
      if (has_block) close(in, now, largest, squares);
    }
  }
};

// Whether the loops of this file know the arrays; whole blocks only. With beta2 and 1 - beta2 not below +0 no second moment has
// a sign. Blocks start at a multiple of 256 elements of their tensor wherever chunks are cut at one (spec/tensors.py: always).
inline bool is_fused(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece) {
  if (piece.first_element % kStateBlockElements != 0) return false;
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
