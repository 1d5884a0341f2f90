#include "worker_pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <thread>
#include <vector>

namespace overspill {
namespace {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// Rule 5. Chosen, not tuned: 20 us is less than a core loses by going to sleep and waking up on a virtual machine.
constexpr std::chrono::microseconds kLookingTime{20};

// Rule 6. Chosen: at 5 a thread beside two that update on two cores was put aside half as long as at 0, at 10 a quarter; but
// other processes come before ours too.
constexpr int kNicer = 5;

void lower_priority() {
#if defined(__linux__)
  setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNicer);  // of this thread alone
#endif
}

template <class Condition>
void look_for(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + kLookingTime;
  while (!condition() && std::chrono::steady_clock::now() < until) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace

struct WorkerPool::Job {
  // A run of tasks, in a cache line of its own.
  struct alignas(64) Run {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };

  const std::function<void(std::int64_t)>& task;
  int num_seats;  // pool threads that may still join; guarded by mutex_
  std::vector<Run> runs;
  std::atomic<std::size_t> num_joined{0};

  Job(const std::function<void(std::int64_t)>& task_, std::int64_t num_tasks, int num_helpers, std::size_t num_runs)
      : task(task_), num_seats(num_helpers), runs(num_runs) {
    const auto n = static_cast<std::int64_t>(num_runs);
    for (std::int64_t i = 0; i < n; ++i) {
      runs[static_cast<std::size_t>(i)].next = num_tasks / n * i + std::min(i, num_tasks % n);
      runs[static_cast<std::size_t>(i)].end = num_tasks / n * (i + 1) + std::min(i + 1, num_tasks % n);
    }
  }

  void work() {
    const DefaultFloatEnvironment environment;
    const std::size_t seat = num_joined++;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      Run& run = runs[(seat + i) % runs.size()];
      for (std::int64_t index = run.next++; index < run.end; index = run.next++) task(index);
    }
  }
};

WorkerPool::WorkerPool() : pid_(static_cast<long>(getpid())) {}

WorkerPool& WorkerPool::instance() {
  static std::atomic<WorkerPool*> current{nullptr};
  WorkerPool* pool = current.load(std::memory_order_acquire);
  while (pool == nullptr || pool->pid_ != static_cast<long>(getpid())) {
    WorkerPool* fresh = new WorkerPool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;  // a forked parent's pool is left behind, rule 1
    delete fresh;
  }
  return *pool;
}

void WorkerPool::start_workers(std::size_t count) {
  sigset_t all, previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);  // inherited by the new threads
  try {
    for (; num_workers_ < count; ++num_workers_) std::thread([this] { serve(); }).detach();
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

void WorkerPool::serve() {
  bool has_given_way = false;
  std::unique_lock<std::mutex> lock(mutex_);
  const auto has_seat = [this] { return job_ != nullptr && job_->num_seats > 0; };
  for (;;) {
    if (!has_seat()) {
      const std::uint64_t seen = num_jobs_;
      lock.unlock();
      look_for([&] { return num_jobs_ != seen; });
      lock.lock();
      wake_.wait(lock, has_seat);
    }
    Job* job = job_;
    --job->num_seats;
    ++num_active_;
    lock.unlock();
    if (gives_way_ && !has_given_way) {
      lower_priority();
      has_given_way = true;
    }
    job->work();
    lock.lock();
    if (--num_active_ == 0) idle_.notify_one();
  }
}

void WorkerPool::run(std::int64_t num_tasks, int num_threads, const std::function<void(std::int64_t)>& task, Split split) {
  const int num_helpers = std::max(static_cast<int>(std::min<std::int64_t>(num_threads, num_tasks)) - 1, 0);
  Job job(task, num_tasks, num_helpers, split == Split::contiguous ? static_cast<std::size_t>(num_helpers) + 1 : 1);
  if (num_helpers == 0) {
    job.work();
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  start_workers(static_cast<std::size_t>(num_helpers));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    ++num_jobs_;
  }
  wake_.notify_all();
  job.work();
  std::unique_lock<std::mutex> lock(mutex_);
  job_ = nullptr;  // nobody joins from here on; `job` lives on this stack, so wait for those who did
  lock.unlock();
  look_for([this] { return num_active_ == 0; });
  lock.lock();
  idle_.wait(lock, [this] { return num_active_ == 0; });
}

}  // namespace overspill
