// The loops over elements, compiled once per instruction set (kernels.cpp), and the table through which they are called.
#pragma once

#include <cstdint>

#include "overspill/update.hpp"

namespace overspill {

// Updates elements [start, end) of the range.
using UpdateKernel = void (*)(const AdamWRange& range, const AdamWScalars& scalars, std::int64_t start, std::int64_t end);
// True when elements [start, end) are finite.
using FiniteKernel = bool (*)(const void* data, std::int64_t start, std::int64_t end);

struct Kernels {
  const char* name;
  UpdateKernel update[3][3];  // by parameter dtype, then gradient dtype
  FiniteKernel all_finite[3];
};

extern const Kernels kernels_baseline;
#ifdef OVERSPILL_X86_VARIANTS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace overspill
