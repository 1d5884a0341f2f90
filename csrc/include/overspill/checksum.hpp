// CRC-32C (Castagnoli; RFC 3720, appendix B.4): what every block of a record on a drive is held against.
//
// Why this one: it finds every single flipped bit and every burst up to 32 bits, and x86 has an instruction for it. One instruction
// stream waits 3 cycles for each 8 bytes, so three streams run side by side and are joined by one multiplication modulo the polynomial.
// Without SSE4.2 a table does 8 bytes at a time; both give the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace overspill {

// CRC-32C of `num_bytes` at `data`. Of "123456789" it is 0xE3069283.
std::uint32_t crc32c(const void* data, std::size_t num_bytes);

// The same without the instruction: the plain implementation that the fast one is tested against.
std::uint32_t crc32c_portable(const void* data, std::size_t num_bytes);

}  // namespace overspill
