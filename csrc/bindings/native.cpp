// The Python face of the core: addresses as integers, lengths in elements, names as strings.
//
// Every call releases the GIL while it computes; the caller keeps the memory alive until it returns.
// std::invalid_argument becomes ValueError, other exceptions RuntimeError. overspill/_native.pyi has the signatures.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "overspill/checksum.hpp"
#include "overspill/update.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void update_adamw(const std::string& parameter_dtype, const std::string& gradient_dtype, std::int64_t num_elements,
                  std::uintptr_t parameter, std::uintptr_t gradient, std::uintptr_t master, std::uintptr_t exp_avg,
                  std::uintptr_t exp_avg_sq, float gradient_scale, float decay, float one_minus_beta1, float beta2, float one_minus_beta2,
                  float step_size, float bias_correction2_sqrt, float eps, int num_threads, const std::string& isa) {
  const overspill::AdamWRange range{overspill::parse_dtype(parameter_dtype),
                                    overspill::parse_dtype(gradient_dtype),
                                    num_elements,
                                    pointer<void>(parameter),
                                    pointer<const void>(gradient),
                                    pointer<void>(master),
                                    pointer<float>(exp_avg),
                                    pointer<float>(exp_avg_sq)};
  const overspill::AdamWScalars scalars{gradient_scale,  decay,     one_minus_beta1,       beta2,
                                        one_minus_beta2, step_size, bias_correction2_sqrt, eps};
  overspill::update_adamw(range, scalars, num_threads, isa);
}

bool all_finite(std::uintptr_t data, const std::string& dtype, std::int64_t num_elements, int num_threads, const std::string& isa) {
  return overspill::all_finite(pointer<const void>(data), overspill::parse_dtype(dtype), num_elements, num_threads, isa);
}

std::vector<std::uint32_t> crc32c_blocks(std::uintptr_t data, std::size_t num_bytes, std::size_t block_bytes, bool portable) {
  if (block_bytes == 0) throw std::invalid_argument("a block has at least 1 byte");
  std::vector<std::uint32_t> checksums;
  checksums.reserve(num_bytes / block_bytes + 1);
  for (std::size_t start = 0; start < num_bytes; start += block_bytes) {
    const std::size_t size = std::min(block_bytes, num_bytes - start);
    const auto* block = pointer<const unsigned char>(data) + start;
    checksums.push_back(portable ? overspill::crc32c_portable(block, size) : overspill::crc32c(block, size));
  }
  return checksums;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "overspill's native core: the host update and checksums over raw memory.";
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  module.def("update_adamw", &update_adamw, Unlocked(), nb::kw_only(), "parameter_dtype"_a, "gradient_dtype"_a, "num_elements"_a,
             "parameter"_a, "gradient"_a, "master"_a, "exp_avg"_a, "exp_avg_sq"_a, "gradient_scale"_a, "decay"_a, "one_minus_beta1"_a,
             "beta2"_a, "one_minus_beta2"_a, "step_size"_a, "bias_correction2_sqrt"_a, "eps"_a, "num_threads"_a = 0, "isa"_a = "");
  module.def("all_finite", &all_finite, Unlocked(), "data"_a, nb::kw_only(), "dtype"_a, "num_elements"_a, "num_threads"_a = 0,
             "isa"_a = "");
  module.def("crc32c_blocks", &crc32c_blocks, Unlocked(), "data"_a, "num_bytes"_a, nb::kw_only(), "block_bytes"_a, "portable"_a = false);
  module.def("supported_isas", &overspill::supported_isas);
  module.def("default_num_threads", &overspill::default_num_threads);
}
