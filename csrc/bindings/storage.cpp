// What the SSD tier needs from the core: checksums of blocks.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.hpp"
#include "overspill/checksum.hpp"

using namespace nb::literals;

namespace {

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

void bind_storage(nb::module_& module) {
  module.def("crc32c_blocks", &crc32c_blocks, Unlocked(), "data"_a, "num_bytes"_a, nb::kw_only(), "block_bytes"_a, "portable"_a = false);
}
