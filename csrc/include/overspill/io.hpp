// The I/O engine: copies between memory and one or several files, done by threads that stay. Knows neither Python nor torch.
//
// A **transfer** is one contiguous range of the engine's address space and the memory that it is copied from or to. It is cut into
// **parts**, at the page boundaries of the files, so that several threads, and several drives, work on it at the same time:
//
//   file     |....####|########|########|##......|        #: bytes of the transfer    |: multiples of the alignment
//   parts     edge     whole pages ...   edge
//
// **Stripes.** With several files, addresses are dealt out in turn: stripe number i is in file i modulo the number of files. A part never
// crosses a stripe. With one file, address and offset are the same (plus the file's base).
//
// **Blocks** are what has a checksum (CRC-32C): `block_bytes` of the transfer, counted from its first byte; the last is as long as it is.
// They are computed by the thread that moves them, before a block is written and as soon as it has been read, so a byte that is in a
// core's cache anyway is looked at there.
//
// Rules:
// 1. `submit` lends the memory to the engine until the transfer has ended; it starts at once. Transfers in flight may touch the same
//    bytes only if all of them read.
// 2. A part whose memory, offset and length are multiples of the alignment moves directly. Others go through a thread's own aligned
//    memory; writing an edge reads its page, changes the bytes and writes it back, under one lock for the whole engine, so transfers of
//    disjoint bytes are independent even in one page.
// 3. Every completion is looked at. A part is repeated until all its bytes have moved; no bytes without an error is an error.
// 4. A transfer ends when its last part has ended, also after a failure: before that, some thread may still touch the memory. The first
//    failure is the transfer's; parts that have not begun by then are skipped.
// 5. Parts begin in the order of submission; with one thread that runs calls (not io_uring) they also end in it.
//    After a fork the child's copies of an engine and of its transfers have no threads: they can be dropped, and nothing else.
// 6. A transfer of which no part has begun can be cancelled: nothing was moved and nothing will be. Afterwards it cannot.
// 7. A write that finds the file system full asks `on_full`, on the thread that moves it, and is tried again if that says so; from the
//    byte that it had come to. Nothing else is called back.
//
// Costs: the threads, and for each of them the memory of one part once something unaligned has moved.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "overspill/faults.hpp"

namespace overspill {

// A condition variable that is never destroyed: glibc's destructor waits for everybody who waits, and in the child of a fork those are the
// parent's threads, which never leave (rule 5). Nothing is lost by it, on Linux it holds no resource; whoever waits here holds the owner,
// or is joined before the owner goes.
union ForkableCondition {
  ForkableCondition() : variable() {}
  ~ForkableCondition() {}
  std::condition_variable variable;
};

struct IoFile {
  int fd;
  std::int64_t base = 0;  // offset in the file of its address 0
};

// Where a part failed. `error` 0: the call moved nothing and gave no errno, as at the end of a file.
struct IoFailure {
  std::int64_t file;
  std::int64_t offset;  // in the file
  std::int64_t wanted_bytes;
  std::int64_t done_bytes;
  int error;
};

// The first block whose checksum is not the expected one.
struct IoMismatch {
  std::int64_t block;
  std::uint32_t expected;
  std::uint32_t found;
};

// One part's time on the drive, of CLOCK_MONOTONIC.
struct IoSpan {
  double start_s;
  double end_s;
  std::int64_t num_bytes;  // moved, rests of pages included
  std::int64_t file;
  bool is_write;
};

struct IoOptions {
  std::vector<IoFile> files;
  std::int64_t stripe_bytes = 0;  // no effect with one file
  std::int64_t alignment = 1;     // 1: through the page cache, nothing needs to be aligned
  std::int64_t part_bytes = 1 << 20;
  int num_threads = 4;
  std::string backend = "threads";  // or "io_uring"
  std::shared_ptr<FaultTable> faults;
  // (file, errno, seconds since the first failure) -> whether to try again; errno 0 says that the write succeeded after waiting.
  std::function<bool(std::int64_t, int, double)> on_full;
};

class IoTransfer {
 public:
  bool is_done() const { return is_done_.load(std::memory_order_acquire); }
  // True when the transfer has ended; false after `seconds`. Any thread, any number of times.
  bool wait_for(double seconds);

  // Of a transfer that has ended:
  const std::optional<IoFailure>& failure() const { return failure_; }
  const std::optional<IoMismatch>& mismatch() const { return mismatch_; }
  bool is_cancelled() const { return is_cancelled_; }
  // On the steady clock, which is Python's `time.perf_counter` on Linux; 0 of one that was cancelled.
  double ended_s() const { return ended_s_; }
  // One for each block if they were asked for; of a failed transfer meaningless.
  const std::vector<std::uint32_t>& checksums() const { return checksums_; }

 private:
  friend class IoEngine;
  struct Part {
    std::int64_t file;
    std::int64_t offset;  // in the file
    std::int64_t start;   // in the memory
    std::int64_t num_bytes;
    bool is_edge;
  };

  bool is_write_ = false;
  char* data_ = nullptr;
  std::int64_t num_bytes_ = 0;
  std::int64_t block_bytes_ = 0;  // 0: no checksums
  bool has_expected_ = false;
  std::vector<Part> parts_;
  std::size_t next_part_ = 0;  // guarded by the engine's queue
  std::vector<std::uint32_t> expected_, checksums_;
  std::unique_ptr<std::atomic<std::int64_t>[]> missing_bytes_;  // of each block of a read
  std::atomic<std::int64_t> num_left_{0};
  std::atomic<bool> has_failed_{false};
  std::atomic<bool> is_done_{false};
  bool is_cancelled_ = false;
  double ended_s_ = 0;
  std::mutex mutex_;
  ForkableCondition ended_;
  std::optional<IoFailure> failure_;
  std::optional<IoMismatch> mismatch_;
};

struct IoCounters {
  std::int64_t read_bytes;     // moved, rests of pages included
  std::int64_t written_bytes;  // the same
  std::int64_t copied_bytes;   // of both, what went through a thread's own memory
  std::int64_t num_calls;
};

class IoEngine {
 public:
  // Throws std::invalid_argument on options that make no sense, std::system_error when a thread or a ring cannot be had.
  explicit IoEngine(IoOptions options);
  ~IoEngine();
  IoEngine(const IoEngine&) = delete;
  IoEngine& operator=(const IoEngine&) = delete;

  // Start copying `num_bytes` at `address`. With `block_bytes` > 0 the transfer ends with the checksums of its blocks; with `expected`
  // too (one for each block), reads are held against them.
  std::shared_ptr<IoTransfer> submit(bool is_write, std::int64_t address, void* data, std::int64_t num_bytes, std::int64_t block_bytes = 0,
                                     const std::vector<std::uint32_t>* expected = nullptr);
  // Whether the transfer was taken back (rule 6).
  bool cancel(const std::shared_ptr<IoTransfer>& transfer);
  // Finish everything that was submitted and end the threads. Closing again does nothing.
  void close();

  // (file, offset) of an address.
  std::pair<std::int64_t, std::int64_t> locate(std::int64_t address) const;
  IoCounters counters() const;
  void start_trace();
  // The parts since `start_trace`, in the order of their ends; stops tracing.
  std::vector<IoSpan> take_trace();
  // Let io_uring pin this memory once instead of at every transfer; no effect with threads. The memory outlives the engine.
  void register_memory(void* data, std::int64_t num_bytes);

 private:
  class Bounce;
  class Ring;
  friend class Ring;
  using Part = IoTransfer::Part;
  struct Task {
    std::shared_ptr<IoTransfer> transfer;
    std::size_t part = 0;
  };

  void validate_options() const;
  void cut(IoTransfer& transfer, std::int64_t address) const;
  std::optional<Task> take(bool may_wait);  // empty: nothing to do now, or (having waited) ever
  void serve_threads();
  std::function<void()> make_ring_server();  // what one thread of io_uring runs; csrc/src/io_uring.cpp
  void run_part(const Task& task, Bounce& bounce);
  std::optional<IoFailure> move_part(const IoTransfer& transfer, const Part& part, Bounce& bounce);
  std::optional<IoFailure> move_all(bool is_write, std::int64_t file, std::int64_t offset, char* data, std::int64_t num_bytes);
  ssize_t call(bool is_write, std::int64_t file, std::int64_t offset, char* data, std::int64_t num_bytes);
  bool is_direct(const IoTransfer& transfer, const Part& part) const;
  void add_checksums_before_write(IoTransfer& transfer, const Part& part);
  void add_checksums_after_read(IoTransfer& transfer, const Part& part);
  void checksum_block(IoTransfer& transfer, std::int64_t block);
  void end_part(IoTransfer& transfer, std::optional<IoFailure> failure);
  void note_span(double start_s, std::int64_t num_bytes, std::int64_t file, bool is_write);
  bool should_retry(std::int64_t file, int error, double& full_since_s);

  const IoOptions options_;
  std::mutex queue_mutex_;
  ForkableCondition wake_;
  std::deque<std::shared_ptr<IoTransfer>> queue_;
  bool is_closing_ = false;
  std::mutex close_mutex_;
  std::vector<std::thread> threads_;
  const long pid_;
  std::mutex edge_mutex_, full_mutex_;
  std::atomic<std::int64_t> read_bytes_{0}, written_bytes_{0}, copied_bytes_{0}, num_calls_{0};
  std::atomic<bool> is_tracing_{false};
  std::mutex trace_mutex_;
  std::vector<IoSpan> trace_;
  std::mutex memory_mutex_;
  std::vector<std::pair<char*, std::int64_t>> registered_;
  std::atomic<std::int64_t> num_registered_{0};
};

// Whether this kernel, and this container, let us make a ring.
bool has_io_uring();

}  // namespace overspill
