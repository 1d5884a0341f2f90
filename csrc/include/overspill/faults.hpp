// Faults on purpose: a table of which system call shall fail, stop half-way, lie, or end the process.
//
// Every read, write and flush of an I/O engine asks the table first; so do the calls that Python makes itself (renames, manifests),
// so that one counter numbers them all. src/overspill/tiers/faults.py says what each kind means to a test, and is the only user.
//
// Rules:
// 1. Calls are numbered from 0 in the order in which they ask. An engine with one thread asks in the same order in every run.
// 2. A table without faults only counts. An engine without a table asks nobody: production pays one test of a pointer a call.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace overspill {

enum class FaultKind : std::uint8_t { none, eio, enospc, short_transfer, torn, delayed, flipped, killed };

// "eio", "enospc", "short", "torn", "delayed", "flipped", "killed"; anything else throws std::invalid_argument.
FaultKind parse_fault_kind(const std::string& name);
const char* fault_kind_name(FaultKind kind);

struct Fault {
  FaultKind kind = FaultKind::none;
  std::int64_t call_index = 0;
  std::int64_t num_calls = 1;
  double delay_s = 0.0;           // of a delayed call
  std::int64_t moved_bytes = -1;  // of a short call: what it says it moved; -1: half, in whole pages
};

class FaultTable {
 public:
  explicit FaultTable(std::vector<Fault> faults) : faults_(std::move(faults)) {}

  // Counts one call and returns what shall happen to it.
  Fault next(const std::string& operation);
  // The operation of every call so far.
  std::vector<std::string> log() const;
  std::int64_t num_calls() const;

 private:
  const std::vector<Fault> faults_;
  mutable std::mutex mutex_;
  std::vector<std::string> log_;
};

// pread or pwrite under a fault that `next` returned; a failure is -errno. Memory and length are as the call without the fault wants.
ssize_t faulty_transfer(const Fault& fault, bool is_write, int fd, char* data, std::size_t num_bytes, std::int64_t offset);

}  // namespace overspill
