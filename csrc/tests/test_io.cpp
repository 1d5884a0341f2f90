// The I/O engine by itself, on files in a temporary folder: both backends where the kernel permits, direct alignment and none, one file
// and three, faults at every call, cancelling, a full file system, closing with work in flight.
#include <errno.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "overspill/checksum.hpp"
#include "overspill/io.hpp"

using namespace overspill;

namespace {

constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kBlock = 64 * 1024;

// Page-aligned memory of `size` bytes that starts `shift` bytes after a page boundary.
class Memory {
 public:
  explicit Memory(std::int64_t size, std::int64_t shift = 0)
      : storage_(static_cast<char*>(std::aligned_alloc(kPage, static_cast<std::size_t>((size + shift + 2 * kPage) / kPage * kPage)))),
        shift_(shift),
        size_(static_cast<std::size_t>(size)) {
    std::memset(data(), 0x5A, size_);
  }
  ~Memory() { std::free(storage_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return storage_ + shift_; }
  std::size_t size() const { return size_; }
  void fill(unsigned seed) {
    std::mt19937 generator(seed);
    for (std::size_t at = 0; at < size_; ++at) data()[at] = static_cast<char>(generator());
  }
  bool equals(const Memory& other) const { return size_ == other.size_ && std::memcmp(data(), other.data(), size_) == 0; }

 private:
  char* storage_;
  std::int64_t shift_;
  std::size_t size_;
};

// Files without a name; direct where the file system lets us.
class Files {
 public:
  Files(int count, std::int64_t size) {
    const char* folder = std::getenv("TMPDIR");
    for (int index = 0; index < count; ++index) {
      std::string name = std::string(folder != nullptr ? folder : "/tmp") + "/overspill-test-XXXXXX";
      fds.push_back(mkstemp(name.data()));
      unlink(name.c_str());
      CHECK(fds.back() >= 0 && ftruncate(fds.back(), size) == 0);
      if (fcntl(fds.back(), F_SETFL, fcntl(fds.back(), F_GETFL) | O_DIRECT) != 0) std::printf("no direct I/O here\n");
    }
  }
  ~Files() {
    for (const int fd : fds) ::close(fd);
  }
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;
  std::vector<int> fds;
};

IoOptions options_for(const Files& files, const std::string& backend, int num_threads = 4) {
  IoOptions options;
  for (const int fd : files.fds) options.files.push_back({fd, 0});
  options.stripe_bytes = 4 * kPage;
  options.alignment = kPage;
  options.part_bytes = 8 * kPage;
  options.num_threads = num_threads;
  options.backend = backend;
  return options;
}

void wait(IoTransfer& transfer) {
  while (!transfer.wait_for(10)) std::printf("a transfer takes more than 10 s\n");
}

std::vector<std::uint32_t> checksums_of(const Memory& memory) {
  std::vector<std::uint32_t> checksums;
  for (std::size_t at = 0; at < memory.size(); at += kBlock) {
    checksums.push_back(crc32c(memory.data() + at, std::min<std::size_t>(kBlock, memory.size() - at)));
  }
  return checksums;
}

void check_round_trips(const std::string& backend, int num_files) {
  const Files files(num_files, 1 << 20);
  IoEngine engine(options_for(files, backend));
  unsigned seed = 1;
  for (const std::int64_t address : {std::int64_t{0}, std::int64_t{17}, kPage, 5 * kPage - 1}) {
    for (const std::int64_t size : {std::int64_t{1}, kPage - 1, kPage, kPage + 1, 3 * kBlock, 3 * kBlock + 77}) {
      for (const std::int64_t shift : {0, 1}) {
        Memory data(size, shift), back(size, 1 - shift);
        data.fill(seed++);
        const auto written = engine.submit(true, address, data.data(), size, kBlock);
        wait(*written);
        const std::vector<std::uint32_t> expected = checksums_of(data);
        CHECK(!written->failure() && written->checksums() == expected);
        const auto read = engine.submit(false, address, back.data(), size, kBlock, &expected);
        wait(*read);
        CHECK(!read->failure() && !read->mismatch() && read->checksums() == expected && back.equals(data));
        std::vector<std::uint32_t> wrong = expected;
        wrong.back() ^= 1;
        const auto held = engine.submit(false, address, back.data(), size, kBlock, &wrong);
        wait(*held);
        CHECK(!held->failure() && held->mismatch() && held->mismatch()->block == static_cast<std::int64_t>(expected.size()) - 1);
      }
    }
  }
}

void check_stripes_are_dealt_out_in_turn() {
  const Files files(3, 1 << 20);
  IoEngine engine(options_for(files, "threads"));
  for (std::int64_t stripe = 0; stripe < 9; ++stripe) {
    const auto [file, offset] = engine.locate(stripe * 4 * kPage + 5);
    CHECK(file == stripe % 3 && offset == stripe / 3 * 4 * kPage + 5);
  }
}

void check_disjoint_bytes_of_one_page(const std::string& backend) {
  const Files files(1, kPage);
  IoEngine engine(options_for(files, backend));
  Memory data(kPage), back(kPage);
  data.fill(3);
  std::vector<std::shared_ptr<IoTransfer>> transfers;
  for (std::int64_t at = 0; at < kPage; at += 16) transfers.push_back(engine.submit(true, at, data.data() + at, 16));
  for (const auto& transfer : transfers) wait(*transfer);
  wait(*engine.submit(false, 0, back.data(), kPage));
  CHECK(back.equals(data));
}

void check_many_callers(const std::string& backend) {
  const Files files(2, 8 << 20);
  IoEngine engine(options_for(files, backend));
  std::vector<std::thread> callers;
  std::atomic<int> num_wrong{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      const std::int64_t size = 3 * kBlock + 100 * caller, address = caller * (1 << 20);
      Memory data(size), back(size);
      for (unsigned round = 0; round < 10; ++round) {
        data.fill(round + 100 * static_cast<unsigned>(caller));
        const auto written = engine.submit(true, address, data.data(), size, kBlock);
        wait(*written);
        const auto read = engine.submit(false, address, back.data(), size, kBlock, &written->checksums());
        wait(*read);
        if (!back.equals(data) || read->mismatch()) ++num_wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(num_wrong == 0);
}

struct Outcome {
  std::optional<IoFailure> write_failure, read_failure;
  bool is_mismatch = false;
  bool is_equal = false;
  std::int64_t num_calls = 0;
};

// A write and a read of 5 parts, one of them an edge, with one fault.
Outcome run_with(const std::string& backend, const Fault& fault, std::function<bool(std::int64_t, int, double)> on_full = nullptr) {
  const Files files(1, 1 << 20);
  IoOptions options = options_for(files, backend, 1);
  options.faults = std::make_shared<FaultTable>(std::vector<Fault>{fault});
  options.on_full = std::move(on_full);
  const auto table = options.faults;
  IoEngine engine(options);
  const std::int64_t size = 33 * kPage + 50;
  Memory data(size), back(size);
  data.fill(9);
  Outcome outcome;
  const auto written = engine.submit(true, 0, data.data(), size, kBlock);
  wait(*written);
  outcome.write_failure = written->failure();
  const std::vector<std::uint32_t> expected = checksums_of(data);
  const auto read = engine.submit(false, 0, back.data(), size, kBlock, &expected);
  wait(*read);
  outcome.read_failure = read->failure();
  outcome.is_mismatch = read->mismatch().has_value();
  outcome.is_equal = back.equals(data);
  outcome.num_calls = table->num_calls();
  return outcome;
}

void check_faults(const std::string& backend) {
  const std::int64_t num_calls = run_with(backend, {}).num_calls;
  CHECK(num_calls == 6 + 1 + 6);  // five whole parts and the edge, which a write reads first
  for (std::int64_t call = 0; call < num_calls; ++call) {
    const Outcome failed = run_with(backend, {FaultKind::eio, call});
    const auto& failure = failed.write_failure ? failed.write_failure : failed.read_failure;
    CHECK(failure && failure->error == EIO && failure->done_bytes == 0);
    const Outcome delayed = run_with(backend, {FaultKind::delayed, call, 1, 0.001});
    CHECK(delayed.is_equal && !delayed.is_mismatch);
    const Outcome shortened = run_with(backend, {FaultKind::short_transfer, call, 3});
    CHECK(shortened.is_equal && !shortened.is_mismatch && !shortened.write_failure && !shortened.read_failure);
    const Outcome crooked = run_with(backend, {FaultKind::short_transfer, call, 3, 0, kPage + 512});
    CHECK(crooked.is_equal && !crooked.is_mismatch);
    for (const FaultKind kind : {FaultKind::torn, FaultKind::flipped}) {
      const Outcome wrong = run_with(backend, {kind, call});
      CHECK(!wrong.write_failure && !wrong.read_failure);
      CHECK(wrong.is_equal != wrong.is_mismatch);                                   // no wrong byte goes unseen, no right one is doubted
      CHECK(wrong.is_mismatch || call == 5 || call == 6 || call == num_calls - 1);  // an edge: it may be the rest of its page that is wrong
    }
  }
  for (const std::int64_t moved : {std::int64_t{0}, std::int64_t{1}}) {
    const Outcome stalled = run_with(backend, {FaultKind::short_transfer, 0, 1000, 0, moved});
    CHECK(stalled.write_failure && stalled.write_failure->error == 0 && stalled.write_failure->done_bytes == moved);
  }
}

void check_a_full_file_system(const std::string& backend) {
  std::vector<double> waits;
  int last_error = -1;
  const Outcome waited = run_with(backend, {FaultKind::enospc, 2, 3}, [&](std::int64_t, int error, double waited_s) {
    last_error = error;
    waits.push_back(waited_s);
    return true;
  });
  CHECK(waited.is_equal && !waited.write_failure && waits.size() == 4 && waits[0] == 0 && last_error == 0);
  const Outcome given_up = run_with(backend, {FaultKind::enospc, 2, 3}, [](std::int64_t, int, double) { return false; });
  CHECK(given_up.write_failure && given_up.write_failure->error == ENOSPC);
  CHECK(run_with(backend, {FaultKind::enospc, 2}).write_failure);
}

void check_the_end_of_a_file(const std::string& backend) {
  const Files files(1, 8 * kPage);
  IoEngine engine(options_for(files, backend));
  Memory back(32 * kPage);
  const auto read = engine.submit(false, 0, back.data(), 32 * kPage);
  wait(*read);
  CHECK(read->failure() && read->failure()->error == 0 && read->failure()->wanted_bytes == 8 * kPage);
}

void check_cancelling(const std::string& backend) {
  const Files files(1, 1 << 20);
  IoOptions options = options_for(files, backend, 1);
  options.faults = std::make_shared<FaultTable>(std::vector<Fault>{{FaultKind::delayed, 0, 1, 0.2}});
  IoEngine engine(options);
  Memory first(kPage), second(kPage), back(kPage);
  first.fill(1);
  second.fill(2);
  const auto slow = engine.submit(true, 0, first.data(), kPage);
  while (options.faults->num_calls() == 0) usleep(1000);
  const auto taken_back = engine.submit(true, 0, second.data(), kPage);
  CHECK(engine.cancel(taken_back) && taken_back->is_done() && taken_back->is_cancelled() && !engine.cancel(taken_back));
  CHECK(!engine.cancel(slow));
  wait(*slow);
  wait(*engine.submit(false, 0, back.data(), kPage));
  CHECK(back.equals(first));
}

void check_closing_finishes_what_was_submitted(const std::string& backend) {
  const Files files(1, 4 << 20);
  Memory data(4 << 20), back(4 << 20);
  data.fill(5);
  {
    IoEngine engine(options_for(files, backend));
    for (std::int64_t at = 0; at < (4 << 20); at += 1 << 18) engine.submit(true, at, data.data() + at, 1 << 18);  // none is held
    engine.close();
    engine.close();
    bool is_refused = false;
    try {
      engine.submit(true, 0, data.data(), kPage);
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
  IoEngine again(options_for(files, backend));
  wait(*again.submit(false, 0, back.data(), 4 << 20));
  CHECK(back.equals(data));
}

void check_traces_and_counters(const std::string& backend) {
  const Files files(1, 1 << 20);
  IoEngine engine(options_for(files, backend));
  Memory data(20 * kPage);
  engine.register_memory(data.data(), 20 * kPage);
  wait(*engine.submit(true, 0, data.data(), 20 * kPage));
  engine.start_trace();
  wait(*engine.submit(true, 0, data.data(), 20 * kPage));
  wait(*engine.submit(false, 10, data.data(), 20));
  std::int64_t written = 0;
  for (const IoSpan& span : engine.take_trace()) {
    CHECK(span.start_s > 0 && span.end_s >= span.start_s);
    if (span.is_write) written += span.num_bytes;
  }
  CHECK(written == 20 * kPage);
  const IoCounters counters = engine.counters();
  CHECK(counters.written_bytes == 40 * kPage && counters.read_bytes == kPage && counters.copied_bytes == 20);
}

void check_a_kill_in_mid_write() {
  const Files files(1, 1 << 20);
#if !defined(__SANITIZE_THREAD__)  // its run-time does not follow a fork
  const pid_t child = fork();
  if (child == 0) {
    IoOptions options = options_for(files, "threads", 1);
    options.faults = std::make_shared<FaultTable>(std::vector<Fault>{{FaultKind::killed, 1}});
    IoEngine engine(options);
    Memory data(16 * kPage);
    wait(*engine.submit(true, 0, data.data(), 16 * kPage));
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  IoEngine engine(options_for(files, "threads"));
  Memory back(16 * kPage);
  wait(*engine.submit(false, 0, back.data(), 16 * kPage));
  CHECK(back.data()[12 * kPage - 1] == 0x5A && back.data()[12 * kPage] == 0);  // a part and a half
#endif
}

void check_a_forked_child_drops_its_copies(const std::string& backend) {
#if !defined(__SANITIZE_THREAD__)  // its run-time does not follow a fork of a process with threads
  const Files files(1, 1 << 20);
  Memory data(4 * kPage);
  IoOptions options = options_for(files, backend);
  options.faults = std::make_shared<FaultTable>(std::vector<Fault>{{FaultKind::delayed, 0, 1, 0.3}});
  auto engine = std::make_unique<IoEngine>(options);
  auto transfer = engine->submit(true, 0, data.data(), 4 * kPage);
  std::thread waiter([&transfer] { transfer->wait_for(5); });
  usleep(50'000);  // all threads wait: for work, for the delay, for the transfer
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    bool is_refused = false;
    try {
      engine->submit(true, 0, data.data(), kPage);
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    engine.reset();
    transfer->~IoTransfer();  // its last reference is a parent's thread's
    _exit(is_refused ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  waiter.join();
  wait(*transfer);
#endif
}

void check_wrong_options_are_refused() {
  const Files files(2, 1 << 20);
  IoOptions wrong[] = {options_for(files, "threads"), options_for(files, "magic"), options_for(files, "threads", 0), IoOptions{}};
  wrong[0].stripe_bytes = 100;
  for (const IoOptions& options : wrong) {
    bool is_refused = false;
    try {
      IoEngine engine(options);
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
}

}  // namespace

int main() {
  std::vector<std::string> backends = {"threads"};
  if (has_io_uring()) backends.emplace_back("io_uring");
  for (const std::string& backend : backends) {
    check_round_trips(backend, 1);
    check_round_trips(backend, 3);
    check_disjoint_bytes_of_one_page(backend);
    check_many_callers(backend);
    check_faults(backend);
    check_a_full_file_system(backend);
    check_the_end_of_a_file(backend);
    check_cancelling(backend);
    check_closing_finishes_what_was_submitted(backend);
    check_traces_and_counters(backend);
    check_a_forked_child_drops_its_copies(backend);
  }
  check_stripes_are_dealt_out_in_turn();
  check_a_kill_in_mid_write();
  check_wrong_options_are_refused();
  return overspill::testing::finish("io");
}
