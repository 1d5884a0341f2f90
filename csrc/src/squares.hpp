// The sum of squares of a gradient, in groups of 256 elements, and its definition. Included by kernels.cpp only; see numbers.hpp.
//
// Within a group: 32 running sums in fp32, element i goes to sum i % 32; sums 2j and 2j + 1 are added, and the 16 that are
// left are halved (j and j + 8, then j + 4, ...). Groups are added in double. So each square passes at most 14 roundings:
// relative error below 14 * 2^-24 = 9e-7, for a thirtieth of the cost of widening every element to double.
// A group whose fp32 sum is not finite (an element that is not, or one above 2^64 / 16) or below 2^-90 (where squares may
// have lost bits to underflow) is summed again in double, element by element; only there are non-finite elements counted.
#pragma once

#include "lanes.hpp"
#include "overspill/update.hpp"

namespace overspill {
namespace {

constexpr float kSmallestGroupSum = 0x1p-90f;

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

// Adds the sixteen sums that are left of a group; false when the group must be summed exactly instead.
inline bool add_group(GradientStats& stats, const float* sums) {
  using Four = float __attribute__((vector_size(16)));
  const Four four = (load<Four>(sums) + load<Four>(sums + 8)) + (load<Four>(sums + 4) + load<Four>(sums + 12));
  const float sum = (four[0] + four[2]) + (four[1] + four[3]);
  if (!(sum - sum == 0) || sum < kSmallestGroupSum) return false;
  stats.sum_of_squares += static_cast<double>(sum);
  return true;
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
  if (!add_group(stats, halves)) add_group_exactly(stats, [values](i64 i) { return static_cast<double>(values[i]); }, n);
}

}  // namespace
}  // namespace overspill
