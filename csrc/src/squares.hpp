// The sum of squares of a gradient, in groups of 256 elements, and its definition. Included by kernels.cpp only; see numbers.hpp.
//
// Within a group: 32 running sums in fp32, element i goes to sum i % 32; sums 2j and 2j + 1 are added, and the 16 that are
// left are halved (j and j + 8, then j + 4, ...). Groups are added in double. So each square passes at most 14 roundings:
// relative error below 14 * 2^-24 = 9e-7, for a thirtieth of the cost of widening every element to double.
// A group whose fp32 sum is not finite (an element that is not, or one above 2^64 / 16) or below 2^-90 (where squares may
// have lost bits to underflow) is summed again in double, element by element; only there are non-finite elements counted.
//
// A square of a bf16 gradient enters its sum unrounded, by one instruction: that is the look at the gradient in a loop that
// has it in registers anyway. Squares of fp16 are exact in fp32, those of fp32 are rounded before they are added.
#pragma once

#include "lanes.hpp"
#include "overspill/update.hpp"

namespace overspill {
namespace {

constexpr float kSmallestGroupSum = 0x1p-90f;

// Elements 0, 2, 4, ... and 1, 3, 5, ... of 16-bit numbers, see lanes.hpp.
struct Pair {
  Floats even, odd;
};

inline Pair widen_pair(const u16* halves) {
  const Words both = load<Words>(halves);
  return {float_of(both << 16), float_of(both & kOddHalf)};
}

// A group of n elements (n <= 256) in the order of memory; `widen(i)` is element i. The slow and exact one.
template <class Widen>
void add_group_exactly(GradientStats& stats, Widen widen, i64 n) {
  double sum = 0;
  for (i64 i = 0; i < n; ++i) {
    const double value = widen(i);
    stats.num_non_finite += value - value == 0 ? 0 : 1;
    sum += value * value;
  }
  stats.sum_of_squares += sum;
}

using Four = float __attribute__((vector_size(16)));

// The sixteen sums that are left of a group, halved twice, and the rest of the way.
inline Four halved_twice(const float* sums) {
  return (load<Four>(sums) + load<Four>(sums + 8)) + (load<Four>(sums + 4) + load<Four>(sums + 12));
}
inline float halved(Four four) { return (four[0] + four[2]) + (four[1] + four[3]); }

inline bool is_exact_enough(float sum) { return sum - sum == 0 && sum >= kSmallestGroupSum; }

// The running sums of one group of bf16 elements, whole rows.
struct Squares {
  Pair running[kPairs] = {};

  void add(int pair, Pair g) {
    running[pair].even = multiply_add(g.even, g.even, running[pair].even);
    running[pair].odd = multiply_add(g.odd, g.odd, running[pair].odd);
  }

  Four left() const {
    alignas(64) float sums[kRow / 2];
    for (int k = 0; k < kPairs; ++k) store(sums + k * kLanes, running[k].even + running[k].odd);
    return halved_twice(sums);
  }
};

// Neighbouring groups of bf16 elements, all of 256 but the last: what is left of them is gathered, and later all are halved to
// one sum each, looked at and added, which one by one takes twice the instructions. The loops that fill it call nothing.
struct SquaresOfGroups {
  static constexpr int kMost = 32;

  alignas(16) float fours[kMost][4];
  const u16* gradient = nullptr;  // of the first group
  i64 num_elements = 0;
  int count = 0;

  // `of` are the n elements that were added, with zeros after them. They are read again where fp32 was not exact enough.
  inline __attribute__((always_inline)) void add(const Squares& squares, const u16* of, i64 n) {
    store(fours[count], squares.left());
    if (count == 0) gradient = of;
    num_elements += n;
    ++count;
  }

  void move_to(GradientStats& stats) {
    alignas(64) float sums[kMost];
    u32 bad = 0;
    for (int g = 0; g < count; ++g) sums[g] = halved(load<Four>(fours[g]));
    for (int g = 0; g < count; ++g) bad |= is_exact_enough(sums[g]) ? 0u : 1u;
    for (int g = 0; g < count; ++g) {
      if (__builtin_expect(bad != 0, 0) && !is_exact_enough(sums[g])) {
        const i64 start = g * kStateBlockElements, left = num_elements - start;
        const u16* const group = gradient + start;
        const auto widen = [group](i64 i) { return static_cast<double>(widen_bfloat16(group[i])); };
        add_group_exactly(stats, widen, left < kStateBlockElements ? left : kStateBlockElements);
      } else {
        stats.sum_of_squares += static_cast<double>(sums[g]);
      }
    }
    num_elements = count = 0;
  }
};

void add_bfloat16_squares(SquaresOfGroups& groups, const u16* halves, i64 n) {
  Squares squares;
  const i64 whole = n / kRow * kRow;
  for (i64 row = 0; row < whole; row += kRow) {
    for (int k = 0; k < kPairs; ++k) squares.add(k, widen_pair(halves + row + 2 * kLanes * k));
  }
  if (whole < n) {
    u16 padded[kRow] = {};
    for (i64 i = whole; i < n; ++i) padded[i - whole] = halves[i];
    for (int k = 0; k < kPairs; ++k) squares.add(k, widen_pair(padded + 2 * kLanes * k));
  }
  groups.add(squares, halves, n);
}

void add_squares(GradientStats& stats, const float* values, i64 n) {
  alignas(64) float sums[kRow] = {}, halves[kRow / 2], padded[kRow] = {};
  Floats running[kRow / kLanes] = {};
  for (i64 i = 0; i < n; i += kRow) {
    const float* row = values + i;
    if (n - i < kRow) {
      for (i64 k = i; k < n; ++k) padded[k - i] = values[k];
      row = padded;
    }
    for (int k = 0; k < kRow / kLanes; ++k) {
      const Floats value = load<Floats>(row + k * kLanes);
      running[k] += value * value;
    }
  }
  for (int k = 0; k < kRow / kLanes; ++k) store(sums + k * kLanes, running[k]);
  for (int j = 0; j < kRow / 2; ++j) halves[j] = sums[2 * j] + sums[2 * j + 1];
  const float sum = halved(halved_twice(halves));
  if (is_exact_enough(sum)) {
    stats.sum_of_squares += static_cast<double>(sum);
  } else {
    add_group_exactly(stats, [values](i64 i) { return static_cast<double>(values[i]); }, n);
  }
}

}  // namespace
}  // namespace overspill
