// What the SSD tier needs from the core: checksums of blocks, the I/O engine, and faults on purpose.
//
// Objects: `IoEngine` submits, `IoTransfer` is waited for, `FaultTable` counts calls. Waiting releases the GIL and looks for signals
// (Ctrl-C) every tenth of a second. Worker threads touch Python in one case only: a full file system, which asks `on_full`.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "overspill/checksum.hpp"
#include "overspill/io.hpp"

using namespace nb::literals;

namespace {

using overspill::FaultTable;
using overspill::IoEngine;
using overspill::IoTransfer;

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

// (kind, call index, number of calls, delay in seconds, bytes that a short call moves)
using PlainFault = std::tuple<std::string, std::int64_t, std::int64_t, double, std::int64_t>;

void make_fault_table(FaultTable* place, const std::vector<PlainFault>& plain) {
  std::vector<overspill::Fault> faults;
  for (const auto& [kind, call_index, num_calls, delay_s, moved_bytes] : plain) {
    faults.push_back({overspill::parse_fault_kind(kind), call_index, num_calls, delay_s, moved_bytes});
  }
  new (place) FaultTable(std::move(faults));
}

void make_engine(IoEngine* place, const std::vector<std::pair<int, std::int64_t>>& files, std::int64_t stripe_bytes, std::int64_t alignment,
                 std::int64_t part_bytes, int num_threads, const std::string& backend, std::shared_ptr<FaultTable> faults,
                 nb::object on_full) {
  overspill::IoOptions options;
  for (const auto& [fd, base] : files) options.files.push_back({fd, base});
  options.stripe_bytes = stripe_bytes;
  options.alignment = alignment;
  options.part_bytes = part_bytes;
  options.num_threads = num_threads;
  options.backend = backend;
  options.faults = std::move(faults);
  if (!on_full.is_none()) {
    // Shared and not owned: the last reference goes where the GIL is held, in the deleter.
    std::shared_ptr<nb::object> held(new nb::object(std::move(on_full)), [](nb::object* object) {
      const nb::gil_scoped_acquire gil;
      delete object;
    });
    options.on_full = [held](std::int64_t file, int error, double waited_s) {
      const nb::gil_scoped_acquire gil;
      try {
        return nb::cast<bool>((*held)(file, error, waited_s));
      } catch (nb::python_error& raised) {
        raised.discard_as_unraisable("a full file system's policy");
        return false;
      }
    };
  }
  const WithoutGil unlocked;
  new (place) IoEngine(std::move(options));
}

std::shared_ptr<IoTransfer> submit(IoEngine& engine, bool is_write, std::int64_t address, std::uintptr_t data, std::int64_t num_bytes,
                                   std::int64_t block_bytes, const std::optional<std::vector<std::uint32_t>>& expected) {
  return engine.submit(is_write, address, pointer<void>(data), num_bytes, block_bytes, expected ? &*expected : nullptr);
}

using PlainFailure = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, int>;
using PlainMismatch = std::tuple<std::int64_t, std::uint32_t, std::uint32_t>;

std::optional<PlainFailure> failure_of(const IoTransfer& transfer) {
  if (!transfer.is_done() || !transfer.failure()) return std::nullopt;
  const overspill::IoFailure& failure = *transfer.failure();
  return PlainFailure(failure.file, failure.offset, failure.wanted_bytes, failure.done_bytes, failure.error);
}

std::optional<PlainMismatch> mismatch_of(const IoTransfer& transfer) {
  if (!transfer.is_done() || !transfer.mismatch()) return std::nullopt;
  return PlainMismatch(transfer.mismatch()->block, transfer.mismatch()->expected, transfer.mismatch()->found);
}

std::vector<std::tuple<double, double, std::int64_t, bool, std::int64_t>> take_trace(IoEngine& engine) {
  std::vector<std::tuple<double, double, std::int64_t, bool, std::int64_t>> spans;
  for (const overspill::IoSpan& span : engine.take_trace()) {
    spans.emplace_back(span.start_s, span.end_s, span.num_bytes, span.is_write, span.file);
  }
  return spans;
}

std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t> counters(const IoEngine& engine) {
  const overspill::IoCounters now = engine.counters();
  return {now.read_bytes, now.written_bytes, now.copied_bytes, now.num_calls};
}

void register_memory(IoEngine& engine, std::uintptr_t data, std::int64_t num_bytes) {
  engine.register_memory(pointer<void>(data), num_bytes);
}

}  // namespace

void bind_storage(nb::module_& module) {
  module.def("crc32c_blocks", &crc32c_blocks, Unlocked(), "data"_a, "num_bytes"_a, nb::kw_only(), "block_bytes"_a, "portable"_a = false);
  module.def("has_io_uring", &overspill::has_io_uring);

  nb::class_<FaultTable>(module, "FaultTable")
      .def("__init__", &make_fault_table, "faults"_a)
      .def(
          "next",
          [](FaultTable& table, const std::string& operation) {
            const overspill::Fault fault = table.next(operation);
            return PlainFault(overspill::fault_kind_name(fault.kind), fault.call_index, fault.num_calls, fault.delay_s, fault.moved_bytes);
          },
          "operation"_a)
      .def_prop_ro("log", &FaultTable::log);

  nb::class_<IoTransfer>(module, "IoTransfer")
      .def_prop_ro("is_done", &IoTransfer::is_done)
      .def("wait", &wait_for_end<IoTransfer>)
      .def_prop_ro("failure", &failure_of)
      .def_prop_ro("mismatch", &mismatch_of)
      .def_prop_ro("is_cancelled", [](const IoTransfer& transfer) { return transfer.is_done() && transfer.is_cancelled(); })
      .def_prop_ro("ended_s", [](const IoTransfer& transfer) { return transfer.is_done() ? transfer.ended_s() : 0; })
      .def_prop_ro("checksums", [](const IoTransfer& transfer) {
        if (!transfer.is_done()) throw std::runtime_error("a transfer has checksums when it has ended");
        return transfer.checksums();
      });

  nb::class_<IoEngine>(module, "IoEngine")
      .def("__init__", &make_engine, nb::kw_only(), "files"_a, "stripe_bytes"_a = 0, "alignment"_a, "part_bytes"_a, "num_threads"_a,
           "backend"_a = "threads", "faults"_a = nb::none(), "on_full"_a = nb::none())
      .def("submit", &submit, "is_write"_a, "address"_a, "data"_a, "num_bytes"_a, "block_bytes"_a = 0, "expected"_a = nb::none())
      .def("cancel", &IoEngine::cancel, Unlocked(), "transfer"_a)
      .def("close", &IoEngine::close, Unlocked())
      .def("locate", &IoEngine::locate, "address"_a)
      .def_prop_ro("counters", &counters)
      .def("start_trace", &IoEngine::start_trace)
      .def("take_trace", &take_trace)
      .def("register_memory", &register_memory, "data"_a, "num_bytes"_a);
}
