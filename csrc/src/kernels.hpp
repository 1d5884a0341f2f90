// The loops over elements, compiled once per instruction set (kernels.cpp), and the table through which they are called.
#pragma once

#include <cstdint>

#include "overspill/update.hpp"

namespace overspill {

// Elements [start, end) of the chunk, which belong to one range; `start` is a multiple of 256 after the range's own start.
struct Piece {
  std::int64_t start;
  std::int64_t end;
  std::uint64_t key;
  std::uint32_t first_element;     // of the tensor, at `start`
  std::int64_t prefetch_elements;  // fetch each array this far ahead of the block in work; 0 leaves it to the hardware
};

using UpdateKernel = void (*)(const ChunkArrays& arrays, const UpdateScalars& scalars, const Piece& piece, GradientStats* stats);
// True when elements [start, end) are finite.
using FiniteKernel = bool (*)(const void* data, std::int64_t start, std::int64_t end);
using ScaleKernel = void (*)(float* data, float factor, float summand, std::int64_t start, std::int64_t end);

struct Kernels {
  const char* name;
  UpdateKernel update;  // stats may be null
  FiniteKernel all_finite[3];
  ScaleKernel scale;
};

extern const Kernels kernels_baseline;
#ifdef OVERSPILL_X86_VARIANTS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace overspill
