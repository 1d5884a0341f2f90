// Asks for an update's arrays ahead of their use. Included by kernels.cpp only; see numbers.hpp.
//
// A block takes some 300 ns of root and quotient, during which nothing new is asked of memory: the hardware prefetcher, which
// follows a few lines ahead of up to seven arrays and stops at 4 KiB pages, does not fill that gap.
#pragma once

#include "numbers.hpp"
#include "overspill/update.hpp"

namespace overspill {
namespace {

// Always inline: GCC takes a function that only prefetches for one without effects, and drops its calls.
inline __attribute__((always_inline)) void prefetch_lines(const void* data, i64 first_byte, i64 num_bytes) {
  const char* const at = static_cast<const char*>(data) + first_byte;
  for (i64 line = 0; line < num_bytes; line += 64) __builtin_prefetch(at + line, 1);
}

// The block `ahead` elements after the one at `start`, where it lies within the chunk.
inline __attribute__((always_inline)) void prefetch_block(const ChunkArrays& arrays, i64 start, i64 ahead) {
  const i64 first = start + ahead, n = kStateBlockElements;
  if (ahead == 0 || first + n > arrays.num_elements) return;
  const i64 parameter = arrays.parameter_dtype == Dtype::float32 ? 4 : 2, gradient = arrays.gradient_dtype == Dtype::float32 ? 4 : 2;
  const i64 moment = arrays.format == StateFormat::fp32 ? 4 : arrays.format == StateFormat::bf16 ? 2 : 1;
  const i64 master = arrays.parameter_dtype == Dtype::bfloat16 ? 2 : 4;
  prefetch_lines(arrays.gradient, first * gradient, n * gradient);
  prefetch_lines(arrays.parameter, first * parameter, n * parameter);
  if (arrays.master != nullptr) prefetch_lines(arrays.master, first * master, n * master);
  const int moments = arrays.rule == Rule::adamw ? 2 : arrays.rule == Rule::sgd ? 0 : 1;
  for (int which = 0; which < moments; ++which) prefetch_lines(arrays.moments[which], first * moment, n * moment);
}

}  // namespace
}  // namespace overspill
