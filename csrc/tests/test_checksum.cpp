// CRC-32C: the check value, both implementations at every length and alignment that the streams treat differently, single flipped bits.
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "overspill/checksum.hpp"

using overspill::crc32c;
using overspill::crc32c_portable;

int main() {
  CHECK(crc32c("123456789", 9) == 0xE3069283U);  // RFC 3720, appendix B.4
  CHECK(crc32c("", 0) == 0 && crc32c_portable("", 0) == 0);
  const std::vector<unsigned char> zeros(32, 0);
  CHECK(crc32c(zeros.data(), zeros.size()) == 0x8A9136AAU);  // the same appendix

  std::mt19937 generator(1);
  std::vector<unsigned char> data(3 * 3072 + 64);
  for (auto& byte : data) byte = static_cast<unsigned char>(generator());
  for (std::size_t start = 0; start < 9; ++start) {
    for (const std::size_t size : {1, 7, 8, 9, 1023, 1024, 3071, 3072, 3073, 3080, 6144, 9216, 9217}) {
      CHECK(crc32c(data.data() + start, size) == crc32c_portable(data.data() + start, size));
    }
  }
  const std::uint32_t right = crc32c(data.data(), 4000);
  for (std::size_t bit = 0; bit < 8 * 4000; bit += 61) {
    data[bit / 8] ^= static_cast<unsigned char>(1U << (bit % 8));
    CHECK(crc32c(data.data(), 4000) != right);
    data[bit / 8] ^= static_cast<unsigned char>(1U << (bit % 8));
  }
  return overspill::testing::finish("checksum");
}
