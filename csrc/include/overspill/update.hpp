// The host update: one pass of AdamW over memory, on raw pointers. Knows neither Python nor torch.
//
// The rule is written down in src/overspill/spec/update_rule.py as a list of singly rounded fp32 operations; this is the
// fast implementation of it, src/overspill/optim/reference.py is the plain one, and tests hold them bit for bit together.
//
// Rules:
// 1. Every fp32 operation rounds once: the core is compiled with -ffp-contract=off, and no reciprocal or square root is
//    approximated. So every instruction set, every thread count and every split of the range gives the same bits.
// 2. Denormals are kept: each thread computes under the default floating-point environment, whatever the caller has set.
// 3. A NaN result is stored as the one quiet NaN 0x7fc00000 (fp16: 0x7e00). CPUs disagree on the NaN that 0 * inf makes,
//    and some NaNs would round to -0 in the high half of a split master.
// 4. The caller owns all memory, before, during and after. The arrays of one call do not overlap (checked), and nobody else
//    touches them until the call returns. Addresses are multiples of the element's size, nothing more.
//
// Cost: reads and writes each array once: with bf16 parameters and gradients 26 bytes an element.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace overspill {

enum class Dtype { bfloat16, float16, float32 };

std::int64_t dtype_bytes(Dtype dtype);

// "bfloat16", "float16", "float32"; anything else throws std::invalid_argument.
Dtype parse_dtype(const std::string& name);

// The fp32 scalars of one step; spec/update_rule.py says how each is computed and rounded.
struct AdamWScalars {
  float gradient_scale;
  float decay;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;
  float bias_correction2_sqrt;
  float eps;
};

// One range of elements. What the parameter's dtype implies for `master`:
//   bfloat16  int16 remainders; master bits = (parameter bits << 16) + remainder
//   float16   fp32 master weights; the parameter is the master rounded to nearest even
//   float32   null; the parameter is its own master
struct AdamWRange {
  Dtype parameter_dtype;
  Dtype gradient_dtype;
  std::int64_t num_elements;
  void* parameter;
  const void* gradient;
  void* master;
  float* exp_avg;
  float* exp_avg_sq;
};

// Update `range` in place. num_threads 0 means default_num_threads(); isa "" means the best one of supported_isas().
// Throws std::invalid_argument on null, misaligned or overlapping arrays and on unknown names; nothing is written then.
void update_adamw(const AdamWRange& range, const AdamWScalars& scalars, int num_threads, const std::string& isa);

// True when no element is an infinity or a NaN; stops reading soon after the first one that is.
bool all_finite(const void* data, Dtype dtype, std::int64_t num_elements, int num_threads, const std::string& isa);

// Names of the compiled variants that this CPU can run, best first; "baseline" is always the last.
std::vector<std::string> supported_isas();

// CPUs that this process may run on (its affinity mask, not the machine's count).
int default_num_threads();

}  // namespace overspill
