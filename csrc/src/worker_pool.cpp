#include "worker_pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <thread>

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

}  // namespace

struct WorkerPool::Job {
  const std::function<void(std::int64_t)>& task;
  const std::int64_t num_tasks;
  int num_seats;  // pool threads that may still join; guarded by mutex_
  std::atomic<std::int64_t> next{0};

  void work() {
    const DefaultFloatEnvironment environment;
    for (std::int64_t index = next++; index < num_tasks; index = next++) task(index);
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
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return job_ != nullptr && job_->num_seats > 0; });
    Job* job = job_;
    --job->num_seats;
    ++num_active_;
    lock.unlock();
    job->work();
    lock.lock();
    if (--num_active_ == 0) idle_.notify_one();
  }
}

void WorkerPool::run(std::int64_t num_tasks, int num_threads, const std::function<void(std::int64_t)>& task) {
  const int num_helpers = static_cast<int>(std::min<std::int64_t>(num_threads, num_tasks)) - 1;
  Job job{task, num_tasks, std::max(num_helpers, 0)};
  if (num_helpers <= 0) {
    job.work();
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  start_workers(static_cast<std::size_t>(num_helpers));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
  }
  wake_.notify_all();
  job.work();
  std::unique_lock<std::mutex> lock(mutex_);
  job_ = nullptr;  // nobody joins from here on; `job` lives on this stack, so wait for those who did
  idle_.wait(lock, [this] { return num_active_ == 0; });
}

}  // namespace overspill
