// The host update and the check for finite values: addresses as integers, lengths in elements, names as strings, tables of
// plain records (UpdateRange, UpdateScalars) as bytes or as the address of an array.
#include "overspill/update.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"

using namespace nb::literals;

namespace {

static_assert(sizeof(overspill::UpdateRange) == 32, "optim/native.py packs ranges of 32 bytes");

constexpr overspill::UpdateTuning kTuning;

using PlainStats = std::pair<std::int64_t, double>;

PlainStats plain(const overspill::GradientStats& stats) { return {stats.num_non_finite, stats.sum_of_squares}; }

// What an update is called with.
struct Call {
  overspill::ChunkArrays arrays;
  const overspill::UpdateRange* ranges;
  std::size_t num_ranges;
  std::vector<overspill::UpdateScalars> scalars;
  int num_threads;
  std::string isa;
  bool with_stats;
  overspill::UpdateTuning tuning;

  template <class Function>
  auto to(Function function) const {
    return function(arrays, ranges, num_ranges, scalars.data(), scalars.size(), num_threads, isa, with_stats, tuning);
  }
};

Call make_call(const std::string& rule, const std::string& state_format, const std::string& parameter_dtype,
               const std::string& gradient_dtype, std::int64_t num_elements, std::uintptr_t parameter, std::uintptr_t gradient,
               std::uintptr_t master, const std::array<std::uintptr_t, 2>& moments, const std::array<std::uintptr_t, 2>& exponents,
               std::uintptr_t ranges, std::size_t num_ranges, const std::vector<std::array<float, 11>>& scalars, int num_threads,
               const std::string& isa, bool with_stats, std::int64_t piece_elements, std::int64_t prefetch_elements, bool is_contiguous) {
  static_assert(sizeof(std::array<float, 11>) == sizeof(overspill::UpdateScalars), "optim/native.py passes every scalar");
  const overspill::ChunkArrays arrays{overspill::parse_rule(rule),
                                      overspill::parse_state_format(state_format),
                                      overspill::parse_dtype(parameter_dtype),
                                      overspill::parse_dtype(gradient_dtype),
                                      num_elements,
                                      pointer<void>(parameter),
                                      pointer<const void>(gradient),
                                      pointer<void>(master),
                                      {pointer<void>(moments[0]), pointer<void>(moments[1])},
                                      {pointer<std::uint8_t>(exponents[0]), pointer<std::uint8_t>(exponents[1])}};
  std::vector<overspill::UpdateScalars> sets;
  for (const auto& [scale, decay, beta1, rest1, beta2, rest2, step, correction, eps, momentum, weight_decay] : scalars) {
    sets.push_back({scale, decay, beta1, rest1, beta2, rest2, step, correction, eps, momentum, weight_decay});
  }
  return {arrays,     pointer<const overspill::UpdateRange>(ranges),     num_ranges, std::move(sets), num_threads, isa,
          with_stats, {piece_elements, prefetch_elements, is_contiguous}};
}

// An update that the core's threads make, and the objects whose memory that is: held until it is seen to have ended.
class StartedUpdate {
 public:
  StartedUpdate(nb::object memory, const Call& call) : memory_(std::move(memory)), update_(call.to(overspill::start_update_ranges)) {}
  // Whoever drops it waits: threads of the core need no interpreter. In a forked child nobody writes to its copy of the memory.
  ~StartedUpdate() {
    while (!update_->is_of_parent() && !update_->wait_for(1)) continue;
  }
  StartedUpdate(const StartedUpdate&) = delete;
  StartedUpdate& operator=(const StartedUpdate&) = delete;

  bool is_done() const { return update_->is_done(); }
  void wait() {
    wait_for_end(*update_);
    const nb::object released = std::move(memory_);  // not reset: what goes may give the GIL to another thread that waits here
  }
  double began_s() const { return is_done() ? update_->began_s() : 0; }
  double ended_s() const { return is_done() ? update_->ended_s() : 0; }
  PlainStats stats() const {
    if (!is_done()) throw std::runtime_error("an update has seen its gradient when it has ended");
    return plain(update_->stats());
  }

 private:
  nb::object memory_;
  const std::shared_ptr<overspill::StartedUpdate> update_;
};

// Functions of Python that take what `make` does, and call the core with it.
template <class... Arguments>
auto updating(Call (*make)(Arguments...)) {
  return [make](Arguments... arguments) { return plain(make(arguments...).to(overspill::update_ranges)); };
}

template <class... Arguments>
auto starting(Call (*make)(Arguments...)) {
  return
      [make](nb::object memory, Arguments... arguments) { return std::make_shared<StartedUpdate>(std::move(memory), make(arguments...)); };
}

template <class Function, class... Extra>
void def_update(nb::module_& module, const char* name, Function function, const Extra&... extra) {
  module.def(name, function, extra..., nb::kw_only(), "rule"_a, "state_format"_a, "parameter_dtype"_a, "gradient_dtype"_a, "num_elements"_a,
             "parameter"_a, "gradient"_a, "master"_a, "moments"_a, "exponents"_a, "ranges"_a, "num_ranges"_a, "scalars"_a,
             "num_threads"_a = 0, "isa"_a = "", "with_stats"_a = true, "piece_elements"_a = kTuning.piece_elements,
             "prefetch_elements"_a = kTuning.prefetch_elements, "is_contiguous"_a = kTuning.is_contiguous);
}

bool all_finite(std::uintptr_t data, const std::string& dtype, std::int64_t num_elements, int num_threads, const std::string& isa) {
  return overspill::all_finite(pointer<const void>(data), overspill::parse_dtype(dtype), num_elements, num_threads, isa);
}

void scale_in_place(std::uintptr_t data, std::int64_t num_elements, float factor, float summand, int num_arrays, int num_threads,
                    const std::string& isa) {
  overspill::scale_in_place(pointer<float>(data), num_elements, factor, summand, num_arrays, num_threads, isa);
}

}  // namespace

void bind_update(nb::module_& module) {
  def_update(module, "update_ranges", updating(make_call), Unlocked());
  def_update(module, "start_update_ranges", starting(make_call), "memory"_a);
  nb::class_<StartedUpdate>(module, "StartedUpdate")
      .def_prop_ro("is_done", &StartedUpdate::is_done)
      .def("wait", &StartedUpdate::wait)
      .def_prop_ro("began_s", &StartedUpdate::began_s)
      .def_prop_ro("ended_s", &StartedUpdate::ended_s)
      .def_prop_ro("stats", &StartedUpdate::stats);
  module.def("all_finite", &all_finite, Unlocked(), "data"_a, nb::kw_only(), "dtype"_a, "num_elements"_a, "num_threads"_a = 0,
             "isa"_a = "");
  module.def("scale_in_place", &scale_in_place, Unlocked(), "data"_a, nb::kw_only(), "num_elements"_a, "factor"_a, "summand"_a,
             "num_arrays"_a = 1, "num_threads"_a = 0, "isa"_a = "");
  module.def("let_helpers_give_way", &overspill::let_helpers_give_way);
  module.def("supported_isas", &overspill::supported_isas);
}
