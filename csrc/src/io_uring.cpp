// The engine's second way to move parts: io_uring, by raw system calls (no liburing), one ring for each thread.
//
// A thread keeps up to kDepth direct parts in flight and sleeps in one system call until any of them has ended; parts that need a copy
// (edges, unaligned memory) are moved in place, as by the other implementation. Faults are drawn when a call is submitted; a call that
// has one is made in place. Files are not registered: a part is so large that looking its file up costs nothing.
//
// This file is all there is of it: without it, `make_ring_server` and `has_io_uring` in io.hpp go, and the name in validate_options.
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "clock.hpp"
#include "io_bounce.hpp"
#include "overspill/io.hpp"

#if defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#define OVERSPILL_HAS_IO_URING 1
#endif
#endif

namespace overspill {

#ifdef OVERSPILL_HAS_IO_URING

namespace {

// Parts in flight of one thread. Chosen, not tuned: 8 MiB on the drive a thread with parts of 1 MiB.
constexpr unsigned kDepth = 8;
constexpr int kMostStalls = 8;                                        // as in io.cpp
constexpr std::int64_t kMostRegisteredBytes = std::int64_t{1} << 30;  // the kernel's bound on one registered range

int setup_ring(unsigned entries, io_uring_params* params) { return static_cast<int>(syscall(SYS_io_uring_setup, entries, params)); }

template <class T>
T* at(void* memory, std::uint32_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
}

}  // namespace

class IoEngine::Ring {
 public:
  explicit Ring(IoEngine& engine) : engine_(engine), bounce_(engine.options_.alignment) {
    io_uring_params params{};
    fd_ = setup_ring(kDepth, &params);
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "io_uring is not to be had here; use backend threads");
    sizes_[0] = std::max<std::size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                      params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sizes_[1] = params.sq_entries * sizeof(io_uring_sqe);
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0) fail("this kernel's io_uring is too old; use backend threads", ENOSYS);
    rings_ = mmap(nullptr, sizes_[0], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, IORING_OFF_SQ_RING);
    if (rings_ == MAP_FAILED) fail("a ring of io_uring cannot be mapped", errno);
    entries_ = mmap(nullptr, sizes_[1], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, IORING_OFF_SQES);
    if (entries_ == MAP_FAILED) fail("a ring of io_uring cannot be mapped", errno);
    sq_tail_ = at<unsigned>(rings_, params.sq_off.tail);
    sq_mask_ = *at<unsigned>(rings_, params.sq_off.ring_mask);
    sq_array_ = at<unsigned>(rings_, params.sq_off.array);
    cq_head_ = at<unsigned>(rings_, params.cq_off.head);
    cq_tail_ = at<unsigned>(rings_, params.cq_off.tail);
    cq_mask_ = *at<unsigned>(rings_, params.cq_off.ring_mask);
    completions_ = at<io_uring_cqe>(rings_, params.cq_off.cqes);
  }

  ~Ring() { release(); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void serve() {
    for (;;) {
      if (num_in_flight_ == 0) register_new_memory();
      while (num_in_flight_ < kDepth) {
        const bool may_wait = num_in_flight_ == 0;
        std::optional<Task> task = engine_.take(may_wait);
        if (!task && may_wait) return;
        if (!task) break;
        start(std::move(*task));
      }
      if (num_in_flight_ == 0) continue;
      enter();
      reap();
    }
  }

 private:
  struct Slot {
    Task task;
    std::optional<IoProgress> progress;
    double start_s = 0;
    double full_since_s = -1;

    IoTransfer& transfer() const { return *task.transfer; }
    const Part& part() const { return task.transfer->parts_[task.part]; }
    char* data() const { return transfer().data_ + part().start + progress->done(); }
    std::int64_t offset() const { return part().offset + progress->done(); }
    std::int64_t num_bytes() const { return part().num_bytes - progress->done(); }
  };

  [[noreturn]] void fail(const char* what, int error) {
    release();
    throw std::system_error(error, std::generic_category(), what);
  }

  void release() {
    if (entries_ != nullptr && entries_ != MAP_FAILED) munmap(entries_, sizes_[1]);
    if (rings_ != nullptr && rings_ != MAP_FAILED) munmap(rings_, sizes_[0]);
    if (fd_ >= 0) ::close(fd_);
    entries_ = rings_ = nullptr;
    fd_ = -1;
  }

  // Pins ranges that were registered since the last look; every ring has to. What is not pinned is moved all the same.
  void register_new_memory() {
    if (engine_.num_registered_ == num_known_) return;
    std::vector<iovec> ranges;
    {
      const std::lock_guard<std::mutex> lock(engine_.memory_mutex_);
      for (const auto& [data, size] : engine_.registered_) {
        for (std::int64_t start = 0; start < size; start += kMostRegisteredBytes) {
          ranges.push_back({data + start, static_cast<std::size_t>(std::min(kMostRegisteredBytes, size - start))});
        }
      }
      num_known_ = static_cast<std::int64_t>(engine_.registered_.size());
    }
    if (!fixed_.empty()) syscall(SYS_io_uring_register, fd_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    fixed_.clear();
    if (syscall(SYS_io_uring_register, fd_, IORING_REGISTER_BUFFERS, ranges.data(), ranges.size()) == 0) fixed_ = std::move(ranges);
  }

  void start(Task task) {
    IoTransfer& transfer = *task.transfer;
    const Part& part = transfer.parts_[task.part];
    if (transfer.has_failed_.load(std::memory_order_relaxed) || !engine_.is_direct(transfer, part)) {
      engine_.run_part(task, bounce_);
      return;
    }
    if (transfer.is_write_) engine_.add_checksums_before_write(transfer, part);
    std::size_t index = 0;
    while (slots_[index].task.transfer != nullptr) ++index;
    Slot& slot = slots_[index];
    slot.progress.emplace(part.num_bytes, engine_.options_.alignment, kMostStalls);
    slot.full_since_s = -1;
    slot.task = std::move(task);
    ++num_in_flight_;
    advance(index);
  }

  // Make or submit the slot's next call; several, where faults make them in place.
  void advance(std::size_t index) {
    Slot& slot = slots_[index];
    for (;;) {
      const bool is_write = slot.transfer().is_write_;
      slot.start_s = engine_.is_tracing_.load(std::memory_order_relaxed) ? now_s() : 0;
      ++engine_.num_calls_;
      const Fault fault = engine_.options_.faults ? engine_.options_.faults->next(is_write ? "pwritev" : "preadv") : Fault{};
      if (fault.kind == FaultKind::none) break;
      const int fd = engine_.options_.files[static_cast<std::size_t>(slot.part().file)].fd;
      if (!handle(index, faulty_transfer(fault, is_write, fd, slot.data(), static_cast<std::size_t>(slot.num_bytes()), slot.offset()))) {
        return;
      }
    }
    submit(index);
  }

  void submit(std::size_t index) {
    const Slot& slot = slots_[index];
    const unsigned tail = *sq_tail_;
    const unsigned place = tail & sq_mask_;
    io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_)[place];
    std::memset(&entry, 0, sizeof entry);
    entry.fd = engine_.options_.files[static_cast<std::size_t>(slot.part().file)].fd;
    entry.off = static_cast<std::uint64_t>(slot.offset());
    entry.addr = reinterpret_cast<std::uint64_t>(slot.data());
    entry.len = static_cast<std::uint32_t>(slot.num_bytes());
    entry.user_data = index;
    const std::optional<std::size_t> fixed = find_fixed(slot.data(), slot.num_bytes());
    const bool is_write = slot.transfer().is_write_;
    if (fixed) {
      entry.opcode = is_write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
      entry.buf_index = static_cast<std::uint16_t>(*fixed);
    } else {
      entry.opcode = is_write ? IORING_OP_WRITE : IORING_OP_READ;
    }
    sq_array_[place] = place;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++num_to_submit_;
  }

  std::optional<std::size_t> find_fixed(const char* data, std::int64_t num_bytes) const {
    for (std::size_t index = 0; index < fixed_.size(); ++index) {
      const char* const start = static_cast<const char*>(fixed_[index].iov_base);
      if (data >= start && data + num_bytes <= start + fixed_[index].iov_len) return index;
    }
    return std::nullopt;
  }

  void enter() {
    while (true) {
      const auto taken = syscall(SYS_io_uring_enter, fd_, num_to_submit_, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
      if (taken >= 0) {
        num_to_submit_ -= static_cast<unsigned>(taken);
        return;
      }
      if (errno == EAGAIN || errno == EBUSY) {
        usleep(100);  // the kernel is out of requests; those in flight will free some
      } else if (errno != EINTR) {
        std::terminate();  // the ring itself is broken: parts in flight would never end
      }
    }
  }

  void reap() {
    unsigned head = *cq_head_;
    for (; head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); ++head) {
      const io_uring_cqe completion = completions_[head & cq_mask_];
      __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
      const auto index = static_cast<std::size_t>(completion.user_data);
      if (handle(index, completion.res)) advance(index);
    }
  }

  // What a call's result means for its part; true: it goes on with another call.
  bool handle(std::size_t index, ssize_t moved) {
    Slot& slot = slots_[index];
    IoTransfer& transfer = slot.transfer();
    const Part part = slot.part();
    if (moved == -EINTR || moved == -EAGAIN) return true;
    std::optional<IoFailure> failure;
    if (moved < 0) {
      const int error = static_cast<int>(-moved);
      if (transfer.is_write_ && engine_.should_retry(part.file, error, slot.full_since_s)) return true;
      failure = IoFailure{part.file, part.offset, part.num_bytes, slot.progress->done(), error};
    } else {
      if (slot.full_since_s >= 0) engine_.options_.on_full(part.file, 0, now_s() - slot.full_since_s);
      slot.full_since_s = -1;
      engine_.note_span(slot.start_s, moved, part.file, transfer.is_write_);
      if (!slot.progress->advance(moved)) {
        failure = IoFailure{part.file, part.offset, part.num_bytes, slot.progress->reached(), 0};
      } else if (!slot.progress->is_whole()) {
        return true;
      }
    }
    if (!failure && !transfer.is_write_) engine_.add_checksums_after_read(transfer, part);
    const std::shared_ptr<IoTransfer> held = std::move(slot.task.transfer);
    --num_in_flight_;
    engine_.end_part(*held, failure);
    return false;
  }

  IoEngine& engine_;
  Bounce bounce_;
  int fd_ = -1;
  void* rings_ = nullptr;
  void* entries_ = nullptr;
  std::size_t sizes_[2] = {0, 0};
  unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0, num_to_submit_ = 0, num_in_flight_ = 0;
  io_uring_cqe* completions_ = nullptr;
  std::vector<iovec> fixed_;
  std::int64_t num_known_ = 0;
  Slot slots_[kDepth];
};

std::function<void()> IoEngine::make_ring_server() {
  auto ring = std::make_shared<Ring>(*this);
  return [ring] { ring->serve(); };
}

bool has_io_uring() {
  io_uring_params params{};
  const int fd = setup_ring(1, &params);
  if (fd < 0) return false;
  ::close(fd);
  return (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
}

#else

std::function<void()> IoEngine::make_ring_server() {
  throw std::system_error(ENOSYS, std::generic_category(), "this build has no io_uring; use backend threads");
}

bool has_io_uring() { return false; }

#endif

}  // namespace overspill
