// One pass over a piece of a chunk, in blocks of 256 elements that stay in the first-level cache.
//
// This file is compiled once per instruction set, each time with OVERSPILL_ISA naming the variant. A block goes through stages,
// each a plain loop that the compiler vectorises: widen the gradient, look at it, widen parameter and moments, apply the rule
// (rules.hpp), narrow and store. fp32 arrays are updated where they are, without a stage. So 3 gradient dtypes, 4 kinds of
// parameters, 4 of moments and 5 rules are 16 small loops instead of 240 large ones; the cost is some first-level traffic,
// which the square root and the division hide in part. bf16 parameters and gradients with narrow moments, where it was half of
// the time and more, have loops of their own (fused.hpp). (Roots and quotients from 14-bit approximations and exact residuals were
// slower than the plain instructions: docs/log.md.)
#include "kernels.hpp"

#include "fused.hpp"
#include "lanes.hpp"
#include "numbers.hpp"
#include "prefetch.hpp"
#include "rules.hpp"
#include "squares.hpp"

#ifndef OVERSPILL_ISA
#define OVERSPILL_ISA baseline
#endif
#define OVERSPILL_CONCAT2(a, b) a##b
#define OVERSPILL_CONCAT(a, b) OVERSPILL_CONCAT2(a, b)

namespace overspill {
namespace {

constexpr i64 kBlock = kStateBlockElements;

// -- the gradient ------------------------------------------------------------------------------------------------------

const float* widen_gradient(const ChunkArrays& arrays, i64 start, i64 n, float* __restrict staged) {
  if (arrays.gradient_dtype == Dtype::float32) return static_cast<const float*>(arrays.gradient) + start;
  const u16* __restrict halves = static_cast<const u16*>(arrays.gradient) + start;
  if (arrays.gradient_dtype == Dtype::bfloat16) {
    for (i64 i = 0; i < n; ++i) staged[i] = widen_bfloat16(halves[i]);
  } else {
    for (i64 i = 0; i < n; ++i) staged[i] = widen_float16(halves[i]);
  }
  return staged;
}

// -- random bits -------------------------------------------------------------------------------------------------------

void rounding_words(u32* __restrict words, const Piece& piece, u32 offset, i64 n) {
  const u32 first = piece.first_element + offset;
  const u32 low = static_cast<u32>(piece.key), high = static_cast<u32>(piece.key >> 32);
  for (u32 i = 0; i < static_cast<u32>(n); ++i) words[i] = rounding_word(first + i, low, high);
}

// -- the parameter -----------------------------------------------------------------------------------------------------

void join_master(float* __restrict p, const u16* __restrict parameter, const i16* __restrict remainder, i64 n) {
  for (i64 i = 0; i < n; ++i) p[i] = float_of((static_cast<u32>(parameter[i]) << 16) + static_cast<u32>(static_cast<i32>(remainder[i])));
}

void split_master(const float* __restrict p, u16* __restrict parameter, i16* __restrict remainder, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const u32 bits = bits_of(p[i]);
    parameter[i] = static_cast<u16>((bits + 0x8000u) >> 16);
    remainder[i] = static_cast<i16>(static_cast<u16>(bits));
  }
}

void widen_bfloat16s(float* __restrict wide, const u16* __restrict halves, i64 n) {
  for (i64 i = 0; i < n; ++i) wide[i] = widen_bfloat16(halves[i]);
}

void narrow_float16s(const float* __restrict wide, u16* __restrict halves, i64 n) {
  for (i64 i = 0; i < n; ++i) halves[i] = narrow_float16(wide[i]);
}

float* read_parameter(const ChunkArrays& arrays, i64 start, i64 n, float* staged) {
  if (arrays.parameter_dtype == Dtype::float32) return static_cast<float*>(arrays.parameter) + start;
  if (arrays.parameter_dtype == Dtype::float16) return static_cast<float*>(arrays.master) + start;
  const u16* parameter = static_cast<const u16*>(arrays.parameter) + start;
  if (arrays.format == StateFormat::fp32) {
    join_master(staged, parameter, static_cast<const i16*>(arrays.master) + start, n);
  } else {
    widen_bfloat16s(staged, parameter, n);
  }
  return staged;
}

void round_bfloat16s_low(const float* __restrict wide, const u32* __restrict words, u16* __restrict halves, i64 n) {
  for (i64 i = 0; i < n; ++i) halves[i] = narrow_bfloat16_stochastic(wide[i], words[i] & 0xffffu);
}

void write_parameter(const ChunkArrays& arrays, i64 start, i64 n, const float* p, const u32* words) {
  if (arrays.parameter_dtype == Dtype::float32) return;
  u16* parameter = static_cast<u16*>(arrays.parameter) + start;
  if (arrays.parameter_dtype == Dtype::float16) {
    narrow_float16s(p, parameter, n);
  } else if (arrays.format == StateFormat::fp32) {
    split_master(p, parameter, static_cast<i16*>(arrays.master) + start, n);
  } else {
    round_bfloat16s_low(p, words, parameter, n);
  }
}

// -- the moments -------------------------------------------------------------------------------------------------------

void decode_signed(float* __restrict wide, const u8* __restrict codes, u32 exponent, i64 n) {
  using Signed = Code<4>;
  for (i64 i = 0; i < n; ++i) {
    const u32 code = codes[i];
    wide[i] = float_of(bits_of(Signed::decode(code & 0x7fu, exponent)) | ((code & 0x80u) << 24));
  }
}

void decode_unsigned(float* __restrict wide, const u8* __restrict codes, u32 exponent, i64 n) {
  for (i64 i = 0; i < n; ++i) wide[i] = Code<5>::decode(codes[i], exponent);
}

u32 largest_magnitude(const float* __restrict wide, i64 n) {
  i32 largest = 0;
  for (i64 i = 0; i < n; ++i) {
    const i32 magnitude = static_cast<i32>(bits_of(wide[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<u32>(largest);
}

void encode_signed(const float* __restrict wide, const u32* __restrict words, u8* __restrict codes, u32 exponent, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const u32 bits = bits_of(wide[i]);
    codes[i] = static_cast<u8>(Code<4>::encode(bits & 0x7fffffffu, exponent, words[i] >> 12) | ((bits >> 24) & 0x80u));
  }
}

// A second moment that is not zero never becomes zero: the update would divide by eps alone.
void encode_unsigned(const float* __restrict wide, const u32* __restrict words, u8* __restrict codes, u32 exponent, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    const u32 bits = bits_of(wide[i]) & 0x7fffffffu;
    const u32 code = Code<5>::encode(bits, exponent, second_word(words[i]) >> 12);
    const u32 least = (bits + 0x7fffffffu) >> 31;  // 1 unless bits are 0; as a condition it would keep GCC from vector code
    codes[i] = static_cast<u8>(code | (code == 0u ? least : 0u));
  }
}

void round_bfloat16s_high(const float* __restrict wide, const u32* __restrict words, u16* __restrict halves, i64 n) {
  for (i64 i = 0; i < n; ++i) halves[i] = narrow_bfloat16_stochastic(wide[i], words[i] >> 16);
}

void round_bfloat16s_second(const float* __restrict wide, const u32* __restrict words, u16* __restrict halves, i64 n) {
  for (i64 i = 0; i < n; ++i) halves[i] = narrow_bfloat16_stochastic(wide[i], second_word(words[i]) >> 16);
}

float* read_moment(const ChunkArrays& arrays, int which, i64 start, i64 n, float* staged) {
  if (arrays.format == StateFormat::fp32) return static_cast<float*>(arrays.moments[which]) + start;
  if (arrays.format == StateFormat::bf16) {
    widen_bfloat16s(staged, static_cast<const u16*>(arrays.moments[which]) + start, n);
    return staged;
  }
  const u8* codes = static_cast<const u8*>(arrays.moments[which]) + start;
  const u32 stored = arrays.exponents[which][start / kBlock];
  if (stored == Code<4>::broken) {
    for (i64 i = 0; i < n; ++i) staged[i] = float_of(0x7fc00000u);
  } else if (which == 0) {
    decode_signed(staged, codes, stored < Code<4>::smallest ? Code<4>::smallest : stored, n);
  } else {
    decode_unsigned(staged, codes, stored < Code<5>::smallest ? Code<5>::smallest : stored, n);
  }
  return staged;
}

void write_moment(const ChunkArrays& arrays, int which, i64 start, i64 n, const float* wide, const u32* words) {
  if (arrays.format == StateFormat::fp32) return;
  if (arrays.format == StateFormat::bf16) {
    u16* halves = static_cast<u16*>(arrays.moments[which]) + start;
    if (which == 0) {
      round_bfloat16s_high(wide, words, halves, n);
    } else {
      round_bfloat16s_second(wide, words, halves, n);
    }
    return;
  }
  u8* codes = static_cast<u8*>(arrays.moments[which]) + start;
  const u32 largest = largest_magnitude(wide, n);
  const u32 exponent = which == 0 ? Code<4>::block_exponent(largest) : Code<5>::block_exponent(largest);
  arrays.exponents[which][start / kBlock] = static_cast<u8>(exponent);
  if (exponent == Code<4>::broken) {
    for (i64 i = 0; i < n; ++i) codes[i] = 0;
  } else if (which == 0) {
    encode_signed(wide, words, codes, exponent, n);
  } else {
    encode_unsigned(wide, words, codes, exponent, n);
  }
}

// -- the pass ----------------------------------------------------------------------------------------------------------

void apply_rule(Rule rule, float* p, const float* g, float* m, float* v, const UpdateScalars& scalars, i64 n) {
  switch (rule) {
    case Rule::adamw:
      return apply_rule<Rule::adamw>(p, g, m, v, scalars, n);
    case Rule::sgd:
      return apply_rule<Rule::sgd>(p, g, m, v, scalars, n);
    case Rule::sgd_momentum:
      return apply_rule<Rule::sgd_momentum>(p, g, m, v, scalars, n);
    case Rule::sgd_nesterov:
      return apply_rule<Rule::sgd_nesterov>(p, g, m, v, scalars, n);
    case Rule::lion:
      return apply_rule<Rule::lion>(p, g, m, v, scalars, n);
  }
}

// The general way, stage by stage: any rule, dtypes and format, and blocks that are cut short.
void update_staged(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, GradientStats* stats,
                   SquaresOfGroups& groups) {
  alignas(64) float gradient[kBlock], parameter[kBlock], first[kBlock], second[kBlock];
  alignas(64) u32 words[kBlock];
  const int moments = arrays.rule == Rule::adamw ? 2 : arrays.rule == Rule::sgd ? 0 : 1;
  const bool is_rounded = arrays.format != StateFormat::fp32;
  for (i64 start = piece.start; start < piece.end; start += kBlock) {
    const i64 n = piece.end - start < kBlock ? piece.end - start : kBlock;
    prefetch_block(arrays, start, piece.prefetch_elements);
    const float* g = widen_gradient(arrays, start, n, gradient);
    if (stats != nullptr && arrays.gradient_dtype == Dtype::bfloat16) {
      add_bfloat16_squares(groups, static_cast<const u16*>(arrays.gradient) + start, n);
    } else if (stats != nullptr) {
      add_squares(*stats, g, n);
    }
    float* p = read_parameter(arrays, start, n, parameter);
    float* m = moments > 0 ? read_moment(arrays, 0, start, n, first) : nullptr;
    float* v = moments > 1 ? read_moment(arrays, 1, start, n, second) : nullptr;
    apply_rule(arrays.rule, p, g, m, v, scalars, n);
    if (is_rounded) rounding_words(words, piece, static_cast<u32>(start - piece.start), n);
    write_parameter(arrays, start, n, p, words);
    if (moments > 0) write_moment(arrays, 0, start, n, m, words);
    if (moments > 1) write_moment(arrays, 1, start, n, v, words);
  }
}

// As many groups as `SquaresOfGroups` holds; whole blocks, if they can be, in loops of their own.
void update_part(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& part, GradientStats* stats) {
  SquaresOfGroups groups;
  Piece rest = part;
  if (is_fused(arrays, scalars, part)) {
    Piece whole = part;
    whole.end = part.start + (part.end - part.start) / kBlock * kBlock;
    if (stats != nullptr) {
      update_fused<true>(arrays, scalars, whole, groups);
    } else {
      update_fused<false>(arrays, scalars, whole, groups);
    }
    rest.start = whole.end;
    rest.first_element += static_cast<u32>(whole.end - whole.start);
  }
  update_staged(arrays, scalars, rest, stats, groups);
  if (stats != nullptr) groups.move_to(*stats);
}

void update(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, GradientStats* stats) {
  constexpr i64 most = SquaresOfGroups::kMost * kBlock;
  Piece part = piece;
  for (; part.start < piece.end; part.start = part.end) {
    part.end = piece.end - part.start < most ? piece.end : part.start + most;
    update_part(arrays, scalars, part, stats);
    part.first_element += static_cast<u32>(part.end - part.start);
  }
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

void scale(float* data, float factor, float summand, i64 start, i64 end) {
  for (i64 i = start; i < end; ++i) data[i] = data[i] * factor + summand;
}

}  // namespace

extern const Kernels OVERSPILL_CONCAT(kernels_, OVERSPILL_ISA);
#define OVERSPILL_TEXT2(a) #a
#define OVERSPILL_TEXT(a) OVERSPILL_TEXT2(a)
const Kernels OVERSPILL_CONCAT(kernels_, OVERSPILL_ISA) = {
    OVERSPILL_TEXT(OVERSPILL_ISA),
    update,
    {all_finite<u16, 0x7f80u>, all_finite<u16, 0x7c00u>, all_finite<u32, 0x7f800000u>},
    scale,
};

}  // namespace overspill
