// The host update: one pass of an optimizer over memory, on raw pointers. Knows neither Python nor torch.
//
// The rules are written down in src/overspill/spec/update_rule.py as lists of singly rounded fp32 operations, the state
// formats in src/overspill/spec/state_formats.py, the rounding bits in src/overspill/rng.py; this is the fast implementation
// of them, src/overspill/optim/reference.py is the plain one, and tests hold them bit for bit together.
//
// Rules:
// 1. Every fp32 operation of a rule rounds once: the core is compiled with -ffp-contract=off, and no reciprocal or square root
//    is approximated. So every instruction set, every thread count and every split of the elements gives the same bits.
// 2. Denormals are kept: each thread computes under the default floating-point environment, whatever the caller has set.
// 3. A NaN result is stored as the one quiet NaN 0x7fc00000 (fp16: 0x7e00). CPUs disagree on the NaN that 0 * inf makes,
//    and some NaNs would round to -0 in the high half of a split master.
// 4. The caller owns all memory, before, during and after. The arrays of one call do not overlap (checked), and nobody else
//    touches them until the call returns, or the update that it has started has ended: not another one either, for updates that are
//    started one after the other overlap at their ends. Addresses are multiples of the element's size, nothing more.
// 5. Stochastic rounding takes its bits from (key, element of the tensor) alone, so it obeys rule 1 as well.
//
// Cost: reads and writes each array once: with bf16 parameters and gradients, AdamW moves 26 bytes an element in format
// fp32, 14 in bf16, 10 in int8. Nothing is allocated in proportion to the elements but one record a piece of 8 Ki of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

enum class Dtype { bfloat16, float16, float32 };
enum class Rule { adamw, sgd, sgd_momentum, sgd_nesterov, lion };
enum class StateFormat { fp32, bf16, int8 };

// Elements that share one exponent in format int8.
constexpr std::int64_t kStateBlockElements = 256;

std::int64_t dtype_bytes(Dtype dtype);

// Names as Python writes them; anything else throws std::invalid_argument with the choices.
Dtype parse_dtype(const std::string& name);
Rule parse_rule(const std::string& name);
StateFormat parse_state_format(const std::string& name);

// How many moments a rule keeps: AdamW 2, Lion and SGD with momentum 1, plain SGD none.
int num_moments(Rule rule);

// The fp32 scalars of one step; spec/update_rule.py says how each is computed and rounded. Those that a rule does not name
// have no effect. Python passes them as packed floats in this order.
struct UpdateScalars {
  float gradient_scale;
  float decay;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;
  float bias_correction2_factor;
  float eps;
  float momentum;
  float weight_decay;
};

// The arrays of one chunk. What the format and the parameter's dtype imply:
//   format fp32, bfloat16   master: int16 remainders; master bits = (parameter bits << 16) + remainder
//   format fp32, float16    master: fp32 master weights; the parameter is the master rounded to nearest even
//   float32                 master: null; the parameter is its own master
//   bf16 or int8, bfloat16  master: null; the parameter is rounded stochastically
//   bf16 or int8, float16   refused
// moments[k] is float, 16-bit or 8-bit by the format; exponents[k] (int8 only) has one byte for each block of 256 elements.
struct ChunkArrays {
  Rule rule;
  StateFormat format;
  Dtype parameter_dtype;
  Dtype gradient_dtype;
  std::int64_t num_elements;
  void* parameter;
  const void* gradient;
  void* master;
  void* moments[2];
  std::uint8_t* exponents[2];
};

// A part of one tensor inside the chunk. Python passes these as packed records of 32 bytes.
struct UpdateRange {
  std::int64_t start;  // element of the chunk; in format int8 a multiple of 256
  std::int64_t num_elements;
  std::uint64_t key;            // of the tensor and the step, for stochastic rounding
  std::uint32_t first_element;  // of the tensor (modulo 2^32, the key has the rest), at `start`; narrow formats: fast at multiples of 256
  std::uint32_t scalars;        // which of the scalars given
};

// What a pass saw of the gradient, before scaling.
struct GradientStats {
  std::int64_t num_non_finite = 0;
  // Within 1e-6 of it: groups of 256 elements in fp32 (src/squares.hpp), their sums in double, in an order that ranges fix and
  // threads and instruction sets do not change. A chunk cut elsewhere may differ in those last bits: good for reports, not
  // for clipping (src/overspill/optim/gradient_checks.py defines that norm). Never infinite when all elements are finite.
  double sum_of_squares = 0;
};

// How the work of a call is cut and fetched. Has no effect on what is stored; sums of squares depend on piece_elements in
// their last bits. For measurements (benchmarks/update/variants.py); everybody else leaves it alone.
struct UpdateTuning {
  // Elements of one task: with bf16 parameters in format fp32 112 KiB of arrays, and some 290 tasks in a 32 MiB chunk, so that
  // 16 threads end within 6 % of each other. A multiple of 256. Chosen, not tuned.
  std::int64_t piece_elements = 8 * 1024;
  // How far ahead of its block a thread asks for memory; a multiple of 256, 0 for not at all. Chosen, not tuned.
  std::int64_t prefetch_elements = 1024;
  // Each thread a run of neighbouring pieces (DRAM pages and TLB entries are used up before the next), not the next free piece.
  bool is_contiguous = true;
};

// Updates all ranges in place; elements in no range are left alone. num_threads 0 means default_num_threads(); isa "" means
// the best one of supported_isas(). Without with_stats the gradient is not looked at, and zeros are returned.
// Throws std::invalid_argument on null, misaligned or overlapping arrays, on ranges outside the chunk, out of order or
// overlapping, and on unknown names; nothing is written then.
GradientStats update_ranges(const ChunkArrays& arrays, const UpdateRange* ranges, std::size_t num_ranges, const UpdateScalars* scalars,
                            std::size_t num_scalars, int num_threads, const std::string& isa, bool with_stats,
                            const UpdateTuning& tuning = {});

// An update that threads of the core make, after those that were started before it; they go from one to the next without a pause, and
// end in order. Dropping it does not end it: whoever drops it before keeps the arrays until it has ended.
class StartedUpdate {
 public:
  virtual ~StartedUpdate() = default;
  virtual bool is_done() const = 0;
  // True when it has ended; false after `seconds`. Any thread, any number of times.
  // Throws std::runtime_error in a child that was forked since: nobody makes it there.
  virtual bool wait_for(double seconds) = 0;
  // Whether this is such a child.
  virtual bool is_of_parent() const = 0;
  // When it has ended: from when to when it was made, by the clock that is Python's `time.perf_counter` on Linux. Of updates that
  // follow one another no two overlap.
  virtual double began_s() const = 0;
  virtual double ended_s() const = 0;
  virtual GradientStats stats() const = 0;
};

// `update_ranges` that returns at once; `ranges` and `scalars` have been copied then. Throws what that throws, and nothing afterwards.
std::shared_ptr<StartedUpdate> start_update_ranges(const ChunkArrays& arrays, const UpdateRange* ranges, std::size_t num_ranges,
                                                   const UpdateScalars* scalars, std::size_t num_scalars, int num_threads,
                                                   const std::string& isa, bool with_stats, const UpdateTuning& tuning = {});

// True when no element is an infinity or a NaN; stops reading soon after the first one that is.
bool all_finite(const void* data, Dtype dtype, std::int64_t num_elements, int num_threads, const std::string& isa);

// data[i] = data[i] * factor + summand, in place: the least that an update of as many bytes could cost. For measurements.
// num_arrays > 1 goes through that many equal parts of the data in step, 256 elements of each in turn, as an update goes
// through its arrays. Throws std::invalid_argument when the parts are not equal.
void scale_in_place(float* data, std::int64_t num_elements, float factor, float summand, int num_arrays, int num_threads,
                    const std::string& isa);

// Names of the compiled variants that this CPU can run, best first; "baseline" is always the last.
std::vector<std::string> supported_isas();

// From the next call on, the threads that help a caller run at a lower priority than all others of this process, for good:
// another thread that wants a core gets it at once, and not behind a time slice of theirs. Linux; elsewhere nothing changes.
void let_helpers_give_way();

// CPUs that this process may run on (its affinity mask, not the machine's count).
int default_num_threads();

}  // namespace overspill
