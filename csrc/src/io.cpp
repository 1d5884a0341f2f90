#include "overspill/io.hpp"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "clock.hpp"
#include "io_bounce.hpp"
#include "overspill/checksum.hpp"

namespace overspill {
namespace {

// Calls in a row that may move less than one page before the part fails; direct I/O can only resume at a page. Chosen.
constexpr int kMostStalls = 8;

bool is_full(int error) { return error == ENOSPC || error == EDQUOT; }

void require(bool is_right, const std::string& message) {
  if (!is_right) throw std::invalid_argument(message);
}

}  // namespace

bool IoTransfer::wait_for(double seconds) {
  if (is_done()) return true;
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.variable.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return is_done(); });
}

IoEngine::IoEngine(IoOptions options) : options_(std::move(options)), pid_(static_cast<long>(getpid())) {
  validate_options();
  std::vector<std::function<void()>> servers;
  for (int index = 0; index < options_.num_threads; ++index) {
    servers.push_back(options_.backend == "io_uring" ? make_ring_server() : [this] { serve_threads(); });
  }
  sigset_t all, previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);  // inherited by the new threads: signals are for the threads of Python
  try {
    for (auto& server : servers) {
      threads_.emplace_back(std::move(server));
      pthread_setname_np(threads_.back().native_handle(), "overspill-io");
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    close();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

IoEngine::~IoEngine() { close(); }

void IoEngine::validate_options() const {
  require(!options_.files.empty(), "an I/O engine has at least 1 file");
  require(options_.alignment >= 1, "the alignment is at least 1 B, got " + std::to_string(options_.alignment));
  require(options_.part_bytes > 0 && options_.part_bytes % options_.alignment == 0,
          "parts of " + std::to_string(options_.part_bytes) + " B are no multiple of the alignment " + std::to_string(options_.alignment));
  require(
      options_.files.size() == 1 || (options_.stripe_bytes > 0 && options_.stripe_bytes % options_.alignment == 0),
      "stripes of " + std::to_string(options_.stripe_bytes) + " B are no multiple of the alignment " + std::to_string(options_.alignment));
  require(options_.num_threads >= 1, "an I/O engine has at least 1 thread, got " + std::to_string(options_.num_threads));
  require(options_.backend == "threads" || options_.backend == "io_uring",
          "I/O backend '" + options_.backend + "' is not known; choose threads or io_uring");
}

std::pair<std::int64_t, std::int64_t> IoEngine::locate(std::int64_t address) const {
  const auto num_files = static_cast<std::int64_t>(options_.files.size());
  if (num_files == 1) return {0, options_.files[0].base + address};
  const std::int64_t stripe = address / options_.stripe_bytes;
  const std::int64_t file = stripe % num_files;
  return {file, options_.files[static_cast<std::size_t>(file)].base + stripe / num_files * options_.stripe_bytes +
                    address % options_.stripe_bytes};
}

void IoEngine::cut(IoTransfer& transfer, std::int64_t address) const {
  const std::int64_t alignment = options_.alignment, end = address + transfer.num_bytes_;
  for (std::int64_t at = address; at < end;) {
    std::int64_t stop = 0;
    const bool is_edge = at % alignment != 0 || end - at < alignment;
    if (is_edge) {
      stop = std::min(end, (at / alignment + 1) * alignment);
    } else {
      stop = std::min(end / alignment * alignment, at + options_.part_bytes);
      if (options_.files.size() > 1) stop = std::min(stop, (at / options_.stripe_bytes + 1) * options_.stripe_bytes);
    }
    const auto [file, offset] = locate(at);
    transfer.parts_.push_back({file, offset, at - address, stop - at, is_edge});
    at = stop;
  }
}

std::shared_ptr<IoTransfer> IoEngine::submit(bool is_write, std::int64_t address, void* data, std::int64_t num_bytes,
                                             std::int64_t block_bytes, const std::vector<std::uint32_t>* expected) {
  require(address >= 0 && num_bytes >= 0 && block_bytes >= 0, "a transfer has no negative address or length");
  require(pid_ == static_cast<long>(getpid()), "the I/O engine is of the process that was forked; open files anew in its child");
  auto transfer = std::make_shared<IoTransfer>();
  transfer->is_write_ = is_write;
  transfer->data_ = static_cast<char*>(data);
  transfer->num_bytes_ = num_bytes;
  transfer->block_bytes_ = block_bytes;
  if (block_bytes > 0) {
    const std::int64_t num_blocks = (num_bytes + block_bytes - 1) / block_bytes;
    transfer->checksums_.resize(static_cast<std::size_t>(num_blocks));
    if (expected != nullptr) {
      require(expected->size() == transfer->checksums_.size(),
              std::to_string(num_blocks) + " blocks are read, " + std::to_string(expected->size()) + " checksums are expected");
      transfer->expected_ = *expected;
      transfer->has_expected_ = true;
    }
    if (!is_write) {
      transfer->missing_bytes_ = std::make_unique<std::atomic<std::int64_t>[]>(static_cast<std::size_t>(num_blocks));
      for (std::int64_t block = 0; block < num_blocks; ++block) {
        transfer->missing_bytes_[static_cast<std::size_t>(block)] = std::min(block_bytes, num_bytes - block * block_bytes);
      }
    }
  }
  cut(*transfer, address);
  transfer->num_left_ = static_cast<std::int64_t>(transfer->parts_.size());
  if (transfer->parts_.empty()) {
    transfer->is_done_ = true;
    return transfer;
  }
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    require(!is_closing_, "the I/O engine is closed");
    queue_.push_back(transfer);
  }
  wake_.variable.notify_one();  // who takes a part wakes the next one: the caller pays for one wake-up, not for all
  return transfer;
}

bool IoEngine::cancel(const std::shared_ptr<IoTransfer>& transfer) {
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    const auto found = std::find(queue_.begin(), queue_.end(), transfer);
    if (found == queue_.end() || transfer->next_part_ > 0) return false;
    queue_.erase(found);
  }
  const std::lock_guard<std::mutex> lock(transfer->mutex_);
  transfer->is_cancelled_ = true;
  transfer->is_done_.store(true, std::memory_order_release);
  transfer->ended_.variable.notify_all();
  return true;
}

void IoEngine::close() {
  if (pid_ != static_cast<long>(getpid())) {  // a fork's copy: its threads are the parent's, and so may be its locks
    for (std::thread& thread : threads_) thread.detach();
    threads_.clear();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    is_closing_ = true;
  }
  wake_.variable.notify_all();
  const std::lock_guard<std::mutex> lock(close_mutex_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

std::optional<IoEngine::Task> IoEngine::take(bool may_wait) {
  std::unique_lock<std::mutex> lock(queue_mutex_);
  if (may_wait) wake_.variable.wait(lock, [this] { return !queue_.empty() || is_closing_; });
  if (queue_.empty()) return std::nullopt;
  Task task{queue_.front(), queue_.front()->next_part_++};
  if (task.transfer->next_part_ == task.transfer->parts_.size()) queue_.pop_front();
  const bool has_more = !queue_.empty();
  lock.unlock();
  if (has_more) wake_.variable.notify_one();
  return task;
}

void IoEngine::serve_threads() {
  Bounce bounce(options_.alignment);
  while (const std::optional<Task> task = take(true)) run_part(*task, bounce);
}

void IoEngine::run_part(const Task& task, Bounce& bounce) {
  IoTransfer& transfer = *task.transfer;
  const Part& part = transfer.parts_[task.part];
  std::optional<IoFailure> failure;
  if (!transfer.has_failed_.load(std::memory_order_relaxed)) {
    if (transfer.is_write_) add_checksums_before_write(transfer, part);
    failure = move_part(transfer, part, bounce);
    if (!failure && !transfer.is_write_) add_checksums_after_read(transfer, part);
  }
  end_part(transfer, failure);
}

void IoEngine::end_part(IoTransfer& transfer, std::optional<IoFailure> failure) {
  if (failure) {
    const std::lock_guard<std::mutex> lock(transfer.mutex_);
    if (!transfer.failure_) transfer.failure_ = *failure;
    transfer.has_failed_.store(true, std::memory_order_relaxed);
  }
  if (transfer.num_left_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::lock_guard<std::mutex> lock(transfer.mutex_);
  transfer.ended_s_ = now_s();
  transfer.is_done_.store(true, std::memory_order_release);
  transfer.ended_.variable.notify_all();  // under the lock: whoever waits may drop the transfer as soon as it is done
}

bool IoEngine::is_direct(const IoTransfer& transfer, const Part& part) const {
  return !part.is_edge &&
         reinterpret_cast<std::uintptr_t>(transfer.data_ + part.start) % static_cast<std::uintptr_t>(options_.alignment) == 0;
}

std::optional<IoFailure> IoEngine::move_part(const IoTransfer& transfer, const Part& part, Bounce& bounce) {
  char* const data = transfer.data_ + part.start;
  if (is_direct(transfer, part)) return move_all(transfer.is_write_, part.file, part.offset, data, part.num_bytes);
  const std::int64_t first = part.offset / options_.alignment * options_.alignment;
  const std::int64_t inside = part.offset - first;
  const std::int64_t num_bytes = (inside + part.num_bytes + options_.alignment - 1) / options_.alignment * options_.alignment;
  char* const pages = bounce.room_for(num_bytes);
  const auto size = static_cast<std::size_t>(part.num_bytes);
  if (pages == nullptr) return IoFailure{part.file, part.offset, part.num_bytes, 0, ENOMEM};
  copied_bytes_ += part.num_bytes;
  if (!transfer.is_write_) {
    std::optional<IoFailure> failure = move_all(false, part.file, first, pages, num_bytes);
    if (!failure) std::memcpy(data, pages + inside, size);
    return failure;
  }
  if (!part.is_edge) {
    std::memcpy(pages, data, size);
    return move_all(true, part.file, first, pages, num_bytes);
  }
  const std::lock_guard<std::mutex> lock(edge_mutex_);
  std::optional<IoFailure> failure = move_all(false, part.file, first, pages, num_bytes);
  if (failure) return failure;
  std::memcpy(pages + inside, data, size);
  return move_all(true, part.file, first, pages, num_bytes);
}

ssize_t IoEngine::call(bool is_write, std::int64_t file, std::int64_t offset, char* data, std::int64_t num_bytes) {
  const int fd = options_.files[static_cast<std::size_t>(file)].fd;
  const auto size = static_cast<std::size_t>(num_bytes);
  if (options_.faults) {
    return faulty_transfer(options_.faults->next(is_write ? "pwritev" : "preadv"), is_write, fd, data, size, offset);
  }
  const ssize_t moved = is_write ? pwrite(fd, data, size, offset) : pread(fd, data, size, offset);
  return moved < 0 ? -errno : moved;
}

std::optional<IoFailure> IoEngine::move_all(bool is_write, std::int64_t file, std::int64_t offset, char* data, std::int64_t num_bytes) {
  IoProgress progress(num_bytes, options_.alignment, kMostStalls);
  double full_since_s = -1;
  while (!progress.is_whole()) {
    const double start_s = is_tracing_.load(std::memory_order_relaxed) ? now_s() : 0;
    const ssize_t moved = call(is_write, file, offset + progress.done(), data + progress.done(), num_bytes - progress.done());
    ++num_calls_;
    if (moved == -EINTR || moved == -EAGAIN) continue;
    if (moved < 0) {
      if (is_write && should_retry(file, static_cast<int>(-moved), full_since_s)) continue;
      return IoFailure{file, offset, num_bytes, progress.done(), static_cast<int>(-moved)};
    }
    if (full_since_s >= 0) {
      options_.on_full(file, 0, now_s() - full_since_s);
      full_since_s = -1;
    }
    note_span(start_s, moved, file, is_write);
    if (!progress.advance(moved)) return IoFailure{file, offset, num_bytes, progress.reached(), 0};
  }
  return std::nullopt;
}

bool IoEngine::should_retry(std::int64_t file, int error, double& full_since_s) {
  if (!is_full(error) || !options_.on_full) return false;
  const std::lock_guard<std::mutex> lock(full_mutex_);  // one message and one poll at a time, not one for each thread
  const bool is_first = full_since_s < 0;
  if (is_first) full_since_s = now_s();
  return options_.on_full(file, error, is_first ? 0 : now_s() - full_since_s);
}

void IoEngine::note_span(double start_s, std::int64_t num_bytes, std::int64_t file, bool is_write) {
  (is_write ? written_bytes_ : read_bytes_) += num_bytes;
  if (start_s <= 0) return;
  const double end_s = now_s();
  const std::lock_guard<std::mutex> lock(trace_mutex_);
  trace_.push_back({start_s, end_s, num_bytes, file, is_write});
}

// A block belongs to the part in which it begins; its memory is lent as a whole, so it may be read beyond the part.
void IoEngine::add_checksums_before_write(IoTransfer& transfer, const Part& part) {
  if (transfer.block_bytes_ == 0) return;
  const std::int64_t block_bytes = transfer.block_bytes_;
  for (std::int64_t block = (part.start + block_bytes - 1) / block_bytes; block * block_bytes < part.start + part.num_bytes; ++block) {
    checksum_block(transfer, block);
  }
}

// A block that is read in several parts is looked at by whoever brings its last byte.
void IoEngine::add_checksums_after_read(IoTransfer& transfer, const Part& part) {
  if (transfer.block_bytes_ == 0) return;
  const std::int64_t block_bytes = transfer.block_bytes_, end = part.start + part.num_bytes;
  for (std::int64_t block = part.start / block_bytes; block * block_bytes < end; ++block) {
    const std::int64_t bytes = std::min(end, (block + 1) * block_bytes) - std::max(part.start, block * block_bytes);
    if (transfer.missing_bytes_[static_cast<std::size_t>(block)].fetch_sub(bytes, std::memory_order_acq_rel) == bytes) {
      checksum_block(transfer, block);
    }
  }
}

void IoEngine::checksum_block(IoTransfer& transfer, std::int64_t block) {
  const std::int64_t start = block * transfer.block_bytes_;
  const auto size = static_cast<std::size_t>(std::min(transfer.block_bytes_, transfer.num_bytes_ - start));
  const auto index = static_cast<std::size_t>(block);
  const std::uint32_t found = crc32c(transfer.data_ + start, size);
  transfer.checksums_[index] = found;
  if (!transfer.has_expected_ || transfer.expected_[index] == found) return;
  const std::lock_guard<std::mutex> lock(transfer.mutex_);
  if (!transfer.mismatch_ || transfer.mismatch_->block > block) transfer.mismatch_ = IoMismatch{block, transfer.expected_[index], found};
}

IoCounters IoEngine::counters() const { return {read_bytes_, written_bytes_, copied_bytes_, num_calls_}; }

void IoEngine::start_trace() {
  const std::lock_guard<std::mutex> lock(trace_mutex_);
  trace_.clear();
  is_tracing_ = true;
}

std::vector<IoSpan> IoEngine::take_trace() {
  const std::lock_guard<std::mutex> lock(trace_mutex_);
  is_tracing_ = false;
  return std::move(trace_);
}

void IoEngine::register_memory(void* data, std::int64_t num_bytes) {
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  registered_.emplace_back(static_cast<char*>(data), num_bytes);
  num_registered_ = static_cast<std::int64_t>(registered_.size());
}

}  // namespace overspill
