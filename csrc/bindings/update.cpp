// The host update and the check for finite values: addresses as integers, lengths in elements, names as strings.
#include "overspill/update.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>

#include "bindings.hpp"

using namespace nb::literals;

namespace {

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

}  // namespace

void bind_update(nb::module_& module) {
  module.def("update_adamw", &update_adamw, Unlocked(), nb::kw_only(), "parameter_dtype"_a, "gradient_dtype"_a, "num_elements"_a,
             "parameter"_a, "gradient"_a, "master"_a, "exp_avg"_a, "exp_avg_sq"_a, "gradient_scale"_a, "decay"_a, "one_minus_beta1"_a,
             "beta2"_a, "one_minus_beta2"_a, "step_size"_a, "bias_correction2_sqrt"_a, "eps"_a, "num_threads"_a = 0, "isa"_a = "");
  module.def("all_finite", &all_finite, Unlocked(), "data"_a, nb::kw_only(), "dtype"_a, "num_elements"_a, "num_threads"_a = 0,
             "isa"_a = "");
  module.def("supported_isas", &overspill::supported_isas);
  module.def("default_num_threads", &overspill::default_num_threads);
}
