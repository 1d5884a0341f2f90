#include "overspill/update.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels.hpp"
#include "worker_pool.hpp"

namespace overspill {
namespace {

// Elements one thread takes at a time where nothing is updated in several arrays.
constexpr std::int64_t kPieceElements = 32 * 1024;

int cpu_count(const cpu_set_t& set) { return CPU_COUNT(&set); }

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> found;
#ifdef OVERSPILL_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

const Kernels& kernels_for(const std::string& isa) {
  static const std::vector<const Kernels*> runnable = runnable_kernels();
  if (isa.empty()) return *runnable.front();
  std::string names;
  for (const Kernels* kernels : runnable) {
    if (isa == kernels->name) return *kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set '" + isa + "' cannot run here; choose one of " + names);
}

int threads_for(int num_threads) {
  if (num_threads < 0)
    throw std::invalid_argument("num_threads must be 0 (all CPUs of this process) or more, got " + std::to_string(num_threads));
  return num_threads == 0 ? default_num_threads() : num_threads;
}

struct Array {
  const char* name;
  const void* data;
  std::int64_t element_bytes;
  std::int64_t num_elements;
};

void validate_arrays(std::vector<Array> arrays) {
  for (const Array& array : arrays) {
    const auto address = reinterpret_cast<std::uintptr_t>(array.data);
    if (array.data == nullptr) throw std::invalid_argument(std::string(array.name) + " is null");
    if (address % static_cast<std::uintptr_t>(array.element_bytes) != 0) {
      throw std::invalid_argument(std::string(array.name) + " starts at address " + std::to_string(address) +
                                  ", which is no multiple of its element size " + std::to_string(array.element_bytes) + " B");
    }
  }
  std::sort(arrays.begin(), arrays.end(), [](const Array& a, const Array& b) { return std::less<const void*>()(a.data, b.data); });
  for (std::size_t i = 0; i + 1 < arrays.size(); ++i) {
    const auto start = reinterpret_cast<std::uintptr_t>(arrays[i].data);
    const auto next = reinterpret_cast<std::uintptr_t>(arrays[i + 1].data);
    const auto length = static_cast<std::uintptr_t>(arrays[i].num_elements * arrays[i].element_bytes);
    if (next - start < length) {
      throw std::invalid_argument(std::string(arrays[i].name) + " and " + arrays[i + 1].name + " overlap: " + std::to_string(length) +
                                  " B at address " + std::to_string(start) + ", the next starts " + std::to_string(next - start) +
                                  " B further");
    }
  }
}

std::int64_t num_blocks(std::int64_t num_elements) { return (num_elements + kStateBlockElements - 1) / kStateBlockElements; }

void validate_chunk(const ChunkArrays& chunk) {
  const std::int64_t n = chunk.num_elements;
  std::vector<Array> arrays = {{"parameter", chunk.parameter, dtype_bytes(chunk.parameter_dtype), n},
                               {"gradient", chunk.gradient, dtype_bytes(chunk.gradient_dtype), n}};
  if (chunk.parameter_dtype == Dtype::float16 && chunk.format != StateFormat::fp32) {
    throw std::invalid_argument("float16 parameters have only the state format fp32; use it, or bfloat16 parameters");
  }
  const bool has_master = chunk.format == StateFormat::fp32 && chunk.parameter_dtype != Dtype::float32;
  if (has_master) {
    const bool is_split = chunk.parameter_dtype == Dtype::bfloat16;
    arrays.push_back({is_split ? "remainder" : "master", chunk.master, is_split ? 2 : 4, n});
  } else if (chunk.master != nullptr) {
    throw std::invalid_argument("the parameter is its own master in this state format, but a separate master was given");
  }
  const std::int64_t moment_bytes = chunk.format == StateFormat::fp32 ? 4 : chunk.format == StateFormat::bf16 ? 2 : 1;
  const char* const names[2][2] = {{"first moment", "exponents of the first moment"}, {"second moment", "exponents of the second moment"}};
  for (int which = 0; which < num_moments(chunk.rule); ++which) {
    arrays.push_back({names[which][0], chunk.moments[which], moment_bytes, n});
    if (chunk.format == StateFormat::int8) arrays.push_back({names[which][1], chunk.exponents[which], 1, num_blocks(n)});
  }
  validate_arrays(std::move(arrays));
}

void validate_ranges(const ChunkArrays& chunk, const UpdateRange* ranges, std::size_t num_ranges, std::size_t num_scalars) {
  std::int64_t end = 0;
  for (std::size_t i = 0; i < num_ranges; ++i) {
    const UpdateRange& range = ranges[i];
    const std::string where =
        "range " + std::to_string(i) + " (start " + std::to_string(range.start) + ", " + std::to_string(range.num_elements) + " elements)";
    if (range.num_elements < 0 || range.start < end || range.start > chunk.num_elements ||
        range.num_elements > chunk.num_elements - range.start) {
      throw std::invalid_argument(where + " must start at or after " + std::to_string(end) + " and end within the chunk's " +
                                  std::to_string(chunk.num_elements) + " elements");
    }
    if (chunk.format == StateFormat::int8 && range.start % kStateBlockElements != 0) {
      throw std::invalid_argument(where + " must start at a multiple of " + std::to_string(kStateBlockElements) +
                                  " in format int8, whose blocks share an exponent");
    }
    if (range.scalars >= num_scalars) {
      throw std::invalid_argument(where + " wants scalars " + std::to_string(range.scalars) + ", only " + std::to_string(num_scalars) +
                                  " were given");
    }
    end = range.start + range.num_elements;
    if (chunk.format == StateFormat::int8) end = num_blocks(end) * kStateBlockElements;
  }
}

void validate_tuning(const UpdateTuning& tuning) {
  if (tuning.piece_elements <= 0 || tuning.piece_elements % kStateBlockElements != 0) {
    throw std::invalid_argument("piece_elements must be a positive multiple of " + std::to_string(kStateBlockElements) + ", got " +
                                std::to_string(tuning.piece_elements));
  }
  if (tuning.prefetch_elements < 0 || tuning.prefetch_elements % kStateBlockElements != 0) {
    throw std::invalid_argument("prefetch_elements must be a multiple of " + std::to_string(kStateBlockElements) + " or 0, got " +
                                std::to_string(tuning.prefetch_elements));
  }
}

std::int64_t num_pieces(std::int64_t num_elements) { return (num_elements + kPieceElements - 1) / kPieceElements; }

void validate_length(std::int64_t num_elements) {
  if (num_elements < 0) throw std::invalid_argument("num_elements must not be negative, got " + std::to_string(num_elements));
}

// A call that was found right, cut into pieces; it has copies of all but the arrays. The pieces are gone when the last one has run.
class PreparedUpdate {
 public:
  PreparedUpdate(const ChunkArrays& arrays, const UpdateRange* ranges, std::size_t num_ranges, const UpdateScalars* scalars,
                 std::size_t num_scalars, int num_threads_, const std::string& isa, bool with_stats, const UpdateTuning& tuning)
      : num_threads(threads_for(num_threads_)),
        split(tuning.is_contiguous ? Split::contiguous : Split::in_order),
        arrays_(arrays),
        scalars_(scalars, scalars + num_scalars),
        kernels_(kernels_for(isa)),
        with_stats_(with_stats) {
    validate_length(arrays.num_elements);
    validate_tuning(tuning);
    validate_ranges(arrays, ranges, num_ranges, num_scalars);
    if (arrays.num_elements == 0) return;
    validate_chunk(arrays);
    const std::int64_t piece_elements = tuning.piece_elements;
    work_.reserve(num_ranges + static_cast<std::size_t>(arrays.num_elements / piece_elements));
    for (const UpdateRange* range = ranges; range != ranges + num_ranges; ++range) {
      for (std::int64_t done = 0; done < range->num_elements; done += piece_elements) {
        const std::int64_t start = range->start + done;
        const std::int64_t end = range->start + std::min(done + piece_elements, range->num_elements);
        work_.push_back({{start, end, range->key, range->first_element + static_cast<std::uint32_t>(done), tuning.prefetch_elements},
                         range->scalars,
                         {}});
      }
    }
    num_left_ = num_pieces();
  }

  std::int64_t num_pieces() const { return static_cast<std::int64_t>(work_.size()); }

  // Any thread, once for each piece.
  void run(std::int64_t index) {
    Work& item = work_[static_cast<std::size_t>(index)];
    GradientStats stats;  // here and not in `work_`: neighbours there share cache lines
    kernels_.update(arrays_, scalars_[item.scalars], item.piece, with_stats_ ? &stats : nullptr);
    item.stats = stats;
    if (num_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) sum_up();
  }

  // When all have run.
  GradientStats stats() const { return total_; }

  const int num_threads;
  const Split split;

 private:
  struct Work {
    Piece piece;
    std::uint32_t scalars;
    GradientStats stats;
  };

  void sum_up() {
    for (const Work& item : work_) {
      total_.num_non_finite += item.stats.num_non_finite;
      total_.sum_of_squares += item.stats.sum_of_squares;
    }
    work_ = std::vector<Work>();
  }

  const ChunkArrays arrays_;
  const std::vector<UpdateScalars> scalars_;
  const Kernels& kernels_;
  const bool with_stats_;
  std::vector<Work> work_;
  std::atomic<std::int64_t> num_left_{0};
  GradientStats total_;
};

class PoolUpdate : public StartedUpdate {
 public:
  explicit PoolUpdate(std::shared_ptr<PreparedUpdate> update)
      : update_(std::move(update)),
        job_(pool_.start(
            update_->num_pieces(), update_->num_threads, [update = update_](std::int64_t index) { update->run(index); }, update_->split)) {}

  bool is_done() const override { return job_->is_done(); }
  bool wait_for(double seconds) override { return pool_.wait_for(*job_, seconds); }
  bool is_of_parent() const override { return pool_.is_of_parent(); }
  double began_s() const override { return job_->began_s(); }
  double ended_s() const override { return job_->ended_s(); }
  GradientStats stats() const override { return update_->stats(); }

 private:
  WorkerPool& pool_ = WorkerPool::instance();
  const std::shared_ptr<PreparedUpdate> update_;
  const std::shared_ptr<PoolJob> job_;
};

}  // namespace

std::int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

Dtype parse_dtype(const std::string& name) {
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  if (name == "float32") return Dtype::float32;
  throw std::invalid_argument("dtype '" + name + "' has no update; choose one of bfloat16, float16, float32");
}

int default_num_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Fails with EINVAL on machines of more CPUs than cpu_set_t holds (1024); the machine's count is the answer left.
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, cpu_count(set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int num_moments(Rule rule) { return rule == Rule::adamw ? 2 : rule == Rule::sgd ? 0 : 1; }

Rule parse_rule(const std::string& name) {
  if (name == "adamw") return Rule::adamw;
  if (name == "sgd") return Rule::sgd;
  if (name == "sgd_momentum") return Rule::sgd_momentum;
  if (name == "sgd_nesterov") return Rule::sgd_nesterov;
  if (name == "lion") return Rule::lion;
  throw std::invalid_argument("rule '" + name + "' is unknown; choose one of adamw, sgd, sgd_momentum, sgd_nesterov, lion");
}

StateFormat parse_state_format(const std::string& name) {
  if (name == "fp32") return StateFormat::fp32;
  if (name == "bf16") return StateFormat::bf16;
  if (name == "int8") return StateFormat::int8;
  throw std::invalid_argument("state format '" + name + "' is unknown; choose one of fp32, bf16, int8");
}

void let_helpers_give_way() { WorkerPool::instance().let_helpers_give_way(); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.emplace_back(kernels->name);
  return names;
}

GradientStats update_ranges(const ChunkArrays& arrays, const UpdateRange* ranges, std::size_t num_ranges, const UpdateScalars* scalars,
                            std::size_t num_scalars, int num_threads, const std::string& isa, bool with_stats, const UpdateTuning& tuning) {
  PreparedUpdate update(arrays, ranges, num_ranges, scalars, num_scalars, num_threads, isa, with_stats, tuning);
  WorkerPool::instance().run(update.num_pieces(), update.num_threads, [&](std::int64_t index) { update.run(index); }, update.split);
  return update.stats();
}

std::shared_ptr<StartedUpdate> start_update_ranges(const ChunkArrays& arrays, const UpdateRange* ranges, std::size_t num_ranges,
                                                   const UpdateScalars* scalars, std::size_t num_scalars, int num_threads,
                                                   const std::string& isa, bool with_stats, const UpdateTuning& tuning) {
  return std::make_shared<PoolUpdate>(
      std::make_shared<PreparedUpdate>(arrays, ranges, num_ranges, scalars, num_scalars, num_threads, isa, with_stats, tuning));
}

bool all_finite(const void* data, Dtype dtype, std::int64_t num_elements, int num_threads, const std::string& isa) {
  validate_length(num_elements);
  const Kernels& kernels = kernels_for(isa);
  const int threads = threads_for(num_threads);
  if (num_elements == 0) return true;
  validate_arrays({{"data", data, dtype_bytes(dtype), num_elements}});
  const FiniteKernel kernel = kernels.all_finite[static_cast<int>(dtype)];
  std::atomic<bool> finite{true};
  WorkerPool::instance().run(num_pieces(num_elements), threads, [&](std::int64_t piece) {
    if (!finite.load(std::memory_order_relaxed)) return;
    const std::int64_t start = piece * kPieceElements;
    if (!kernel(data, start, std::min(start + kPieceElements, num_elements))) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

void scale_in_place(float* data, std::int64_t num_elements, float factor, float summand, int num_arrays, int num_threads,
                    const std::string& isa) {
  validate_length(num_elements);
  if (num_arrays < 1 || num_elements % num_arrays != 0) {
    throw std::invalid_argument(std::to_string(num_elements) + " elements are not " + std::to_string(num_arrays) +
                                " equal arrays; give a positive number that divides them");
  }
  const Kernels& kernels = kernels_for(isa);
  const int threads = threads_for(num_threads);
  if (num_elements == 0) return;
  validate_arrays({{"data", data, 4, num_elements}});
  const std::int64_t length = num_elements / num_arrays, block = num_arrays == 1 ? kPieceElements : kStateBlockElements;
  const auto scale_piece = [&](std::int64_t piece) {
    const std::int64_t end = std::min((piece + 1) * kPieceElements, length);
    for (std::int64_t start = piece * kPieceElements; start < end; start += block) {
      for (int i = 0; i < num_arrays; ++i) kernels.scale(data + i * length, factor, summand, start, std::min(start + block, end));
    }
  };
  WorkerPool::instance().run(num_pieces(length), threads, scale_piece, Split::contiguous);
}

}  // namespace overspill
