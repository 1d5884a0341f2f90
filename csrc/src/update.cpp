#include "overspill/update.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels.hpp"
#include "worker_pool.hpp"

namespace overspill {
namespace {

// Elements one thread takes at a time: with bf16 parameters 448 KiB of arrays, which fits a core's second-level cache and
// leaves 70 pieces in a 32 MiB chunk to share out. Chosen, not tuned.
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
  if (__builtin_cpu_supports("avx2")) found.push_back(&kernels_avx2);
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
};

void validate_arrays(std::vector<Array> arrays, std::int64_t num_elements) {
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
    const auto length = static_cast<std::uintptr_t>(num_elements * arrays[i].element_bytes);
    if (next - start < length) {
      throw std::invalid_argument(std::string(arrays[i].name) + " and " + arrays[i + 1].name + " overlap: " + std::to_string(length) +
                                  " B at address " + std::to_string(start) + ", the next starts " + std::to_string(next - start) +
                                  " B further");
    }
  }
}

void validate_range(const AdamWRange& range) {
  std::vector<Array> arrays = {{"parameter", range.parameter, dtype_bytes(range.parameter_dtype)},
                               {"gradient", range.gradient, dtype_bytes(range.gradient_dtype)},
                               {"exp_avg", range.exp_avg, 4},
                               {"exp_avg_sq", range.exp_avg_sq, 4}};
  if (range.parameter_dtype == Dtype::bfloat16) arrays.push_back({"remainder", range.master, 2});
  if (range.parameter_dtype == Dtype::float16) arrays.push_back({"master", range.master, 4});
  if (range.parameter_dtype == Dtype::float32 && range.master != nullptr) {
    throw std::invalid_argument("a float32 parameter is its own master, but a separate master was given");
  }
  validate_arrays(std::move(arrays), range.num_elements);
}

void validate_length(std::int64_t num_elements) {
  if (num_elements < 0) throw std::invalid_argument("num_elements must not be negative, got " + std::to_string(num_elements));
}

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

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.emplace_back(kernels->name);
  return names;
}

void update_adamw(const AdamWRange& range, const AdamWScalars& scalars, int num_threads, const std::string& isa) {
  validate_length(range.num_elements);
  const Kernels& kernels = kernels_for(isa);
  const int threads = threads_for(num_threads);
  if (range.num_elements == 0) return;
  validate_range(range);
  const UpdateKernel kernel = kernels.update[static_cast<int>(range.parameter_dtype)][static_cast<int>(range.gradient_dtype)];
  const std::int64_t num_pieces = (range.num_elements + kPieceElements - 1) / kPieceElements;
  WorkerPool::instance().run(num_pieces, threads, [&](std::int64_t piece) {
    const std::int64_t start = piece * kPieceElements;
    kernel(range, scalars, start, std::min(start + kPieceElements, range.num_elements));
  });
}

bool all_finite(const void* data, Dtype dtype, std::int64_t num_elements, int num_threads, const std::string& isa) {
  validate_length(num_elements);
  const Kernels& kernels = kernels_for(isa);
  const int threads = threads_for(num_threads);
  if (num_elements == 0) return true;
  validate_arrays({{"data", data, dtype_bytes(dtype)}}, num_elements);
  const FiniteKernel kernel = kernels.all_finite[static_cast<int>(dtype)];
  const std::int64_t num_pieces = (num_elements + kPieceElements - 1) / kPieceElements;
  std::atomic<bool> finite{true};
  WorkerPool::instance().run(num_pieces, threads, [&](std::int64_t piece) {
    if (!finite.load(std::memory_order_relaxed)) return;
    const std::int64_t start = piece * kPieceElements;
    if (!kernel(data, start, std::min(start + kPieceElements, num_elements))) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace overspill
