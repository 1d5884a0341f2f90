#include "overspill/faults.hpp"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

namespace overspill {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::array<const char*, 8> kNames = {"none", "eio", "enospc", "short", "torn", "delayed", "flipped", "killed"};

// About half, in whole pages where there is more than one (direct I/O moves nothing else).
std::size_t half_of(std::size_t num_bytes) { return num_bytes >= 2 * kPage ? num_bytes / 2 / kPage * kPage : num_bytes / 2; }

// What a short call moves: all of a single page, which cannot be cut, and never nothing.
std::size_t shorter_than(std::size_t num_bytes) {
  return num_bytes == 1 || num_bytes == kPage ? num_bytes : std::max<std::size_t>(1, half_of(num_bytes));
}

ssize_t plain_transfer(bool is_write, int fd, char* data, std::size_t num_bytes, std::int64_t offset) {
  const ssize_t moved = is_write ? pwrite(fd, data, num_bytes, offset) : pread(fd, data, num_bytes, offset);
  return moved < 0 ? -errno : moved;
}

struct Freed {
  void operator()(char* memory) const { std::free(memory); }
};

ssize_t write_flipped(int fd, const char* data, std::size_t num_bytes, std::int64_t offset) {
  const std::size_t room = (num_bytes + kPage - 1) / kPage * kPage;
  const std::unique_ptr<char, Freed> wrong(static_cast<char*>(std::aligned_alloc(kPage, room)));
  if (!wrong) return -ENOMEM;
  std::memcpy(wrong.get(), data, num_bytes);
  wrong.get()[num_bytes / 2] ^= 0x10;
  return plain_transfer(true, fd, wrong.get(), num_bytes, offset);
}

ssize_t short_transfer(const Fault& fault, bool is_write, int fd, char* data, std::size_t num_bytes, std::int64_t offset) {
  if (fault.moved_bytes < 0) return plain_transfer(is_write, fd, data, shorter_than(num_bytes), offset);
  const auto claimed = std::min(static_cast<std::size_t>(fault.moved_bytes), num_bytes);
  if (claimed == 0) return 0;
  const ssize_t moved = plain_transfer(is_write, fd, data, std::min(num_bytes, (claimed + kPage - 1) / kPage * kPage), offset);
  return std::min(moved, static_cast<ssize_t>(claimed));
}

}  // namespace

FaultKind parse_fault_kind(const std::string& name) {
  for (std::size_t index = 1; index < kNames.size(); ++index) {
    if (name == kNames[index]) return static_cast<FaultKind>(index);
  }
  throw std::invalid_argument("'" + name + "' is not a kind of fault");
}

const char* fault_kind_name(FaultKind kind) { return kNames[static_cast<std::size_t>(kind)]; }

Fault FaultTable::next(const std::string& operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto index = static_cast<std::int64_t>(log_.size());
  log_.push_back(operation);
  for (const Fault& fault : faults_) {
    if (fault.call_index <= index && index - fault.call_index < fault.num_calls) return fault;
  }
  return {};
}

std::vector<std::string> FaultTable::log() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return log_;
}

std::int64_t FaultTable::num_calls() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::int64_t>(log_.size());
}

ssize_t faulty_transfer(const Fault& fault, bool is_write, int fd, char* data, std::size_t num_bytes, std::int64_t offset) {
  const std::size_t half = half_of(num_bytes);
  switch (fault.kind) {
    case FaultKind::eio:
      return -EIO;
    case FaultKind::enospc:
      return is_write ? -ENOSPC : plain_transfer(is_write, fd, data, num_bytes, offset);
    case FaultKind::short_transfer:
      return short_transfer(fault, is_write, fd, data, num_bytes, offset);
    case FaultKind::delayed:
      std::this_thread::sleep_for(std::chrono::duration<double>(fault.delay_s));
      return plain_transfer(is_write, fd, data, num_bytes, offset);
    case FaultKind::torn:
    case FaultKind::killed: {
      const ssize_t moved = plain_transfer(is_write, fd, data, is_write || fault.kind == FaultKind::killed ? half : num_bytes, offset);
      if (fault.kind == FaultKind::killed) kill(getpid(), SIGKILL);
      if (is_write || moved < 0) return moved < 0 ? moved : static_cast<ssize_t>(num_bytes);
      std::memset(data + half, 0, num_bytes - half);
      return moved;
    }
    case FaultKind::flipped: {
      if (is_write) return write_flipped(fd, data, num_bytes, offset);
      const ssize_t moved = plain_transfer(is_write, fd, data, num_bytes, offset);
      if (moved > 0) data[moved / 2] ^= 0x10;
      return moved;
    }
    case FaultKind::none:
      break;
  }
  return plain_transfer(is_write, fd, data, num_bytes, offset);
}

}  // namespace overspill
