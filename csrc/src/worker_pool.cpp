#include "worker_pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

#include "clock.hpp"

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

PoolJob::PoolJob(Task task, std::int64_t num_tasks, int num_seats, std::size_t num_runs)
    : task_(std::move(task)), num_seats_(num_seats), runs_(num_runs) {
  const auto n = static_cast<std::int64_t>(num_runs);
  for (std::int64_t i = 0; i < n; ++i) {
    runs_[static_cast<std::size_t>(i)].next = num_tasks / n * i + std::min(i, num_tasks % n);
    runs_[static_cast<std::size_t>(i)].end = num_tasks / n * (i + 1) + std::min(i + 1, num_tasks % n);
  }
}

void PoolJob::work() {
  const DefaultFloatEnvironment environment;
  const std::size_t seat = num_joined_++;
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    Run& run = runs_[(seat + i) % runs_.size()];
    for (std::int64_t index = run.next++; index < run.end; index = run.next++) task_(index);
  }
}

WorkerPool::WorkerPool() : pid_(static_cast<long>(getpid())) {}

WorkerPool& WorkerPool::instance() {
  static std::atomic<WorkerPool*> current{nullptr};
  WorkerPool* pool = current.load(std::memory_order_acquire);
  while (pool == nullptr || pool->is_of_parent()) {
    WorkerPool* fresh = new WorkerPool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;  // a forked parent's pool is left behind, rule 1
    delete fresh;
  }
  return *pool;
}

bool WorkerPool::is_of_parent() const { return pid_ != static_cast<long>(getpid()); }

// With the mutex held.
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

// The first job that has tasks left, as far as is known.
PoolJob* WorkerPool::open_job() const {
  for (const auto& job : jobs_) {
    if (!job->is_exhausted_) return job.get();
  }
  return nullptr;
}

PoolJob* WorkerPool::job_with_seat() const {
  PoolJob* const job = open_job();
  return job != nullptr && num_active_ < job->num_seats_ ? job : nullptr;
}

// Where jobs follow one another without a gap all seats are taken, and this costs nothing.
void WorkerPool::wake_workers() {
  if (job_with_seat() != nullptr) wake_.notify_all();
}

void WorkerPool::push(std::shared_ptr<PoolJob> job) {
  jobs_.push_back(std::move(job));
  ++num_jobs_;
  wake_workers();
}

void WorkerPool::join(PoolJob& job) {
  if (job.began_s_ == 0) job.began_s_ = now_s();
  ++job.num_active_;
}

// A thread leaves a job when it has found no task left in it.
void WorkerPool::leave(PoolJob& job) {
  --job.num_active_;
  if (!job.is_exhausted_) {
    job.is_exhausted_ = true;
    wake_workers();
    turn_.notify_all();
  }
  while (!jobs_.empty() && jobs_.front()->is_exhausted_ && jobs_.front()->num_active_ == 0) {
    PoolJob& first = *jobs_.front();
    first.began_s_ = std::max(first.began_s_, last_ended_s_);
    first.ended_s_ = last_ended_s_ = now_s();
    first.is_done_.store(true, std::memory_order_release);
    jobs_.pop_front();
    ended_.notify_all();
  }
}

void WorkerPool::serve() {
  bool has_given_way = false;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (job_with_seat() == nullptr) {
      const std::uint64_t seen = num_jobs_;
      lock.unlock();
      look_for([&] { return num_jobs_ != seen; });
      lock.lock();
      wake_.wait(lock, [this] { return job_with_seat() != nullptr; });
    }
    PoolJob& job = *job_with_seat();
    join(job);
    ++num_active_;
    lock.unlock();
    if (gives_way_ && !has_given_way) {
      lower_priority();
      has_given_way = true;
    }
    job.work();
    lock.lock();
    leave(job);
    --num_active_;
  }
}

void WorkerPool::run(std::int64_t num_tasks, int num_threads, const Task& task, Split split) {
  const int num_helpers = std::max(static_cast<int>(std::min<std::int64_t>(num_threads, num_tasks)) - 1, 0);
  const std::size_t num_runs = split == Split::contiguous ? static_cast<std::size_t>(num_helpers) + 1 : 1;
  const std::shared_ptr<PoolJob> job(new PoolJob(std::cref(task), num_tasks, num_helpers, num_runs));
  if (num_helpers == 0) {
    job->work();
    return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  start_workers(static_cast<std::size_t>(num_helpers));
  push(job);
  turn_.wait(lock, [&] { return job->is_exhausted_ || open_job() == job.get(); });
  if (!job->is_exhausted_) {
    join(*job);
    lock.unlock();
    job->work();
    lock.lock();
    leave(*job);
  }
  lock.unlock();
  look_for([&] { return job->is_done(); });
  lock.lock();
  ended_.wait(lock, [&] { return job->is_done(); });
}

std::shared_ptr<PoolJob> WorkerPool::start(std::int64_t num_tasks, int num_threads, Task task, Split split) {
  const int num_seats = std::max(static_cast<int>(std::min<std::int64_t>(num_threads, num_tasks)), 1);
  const std::size_t num_runs = split == Split::contiguous ? static_cast<std::size_t>(num_seats) : 1;
  const std::shared_ptr<PoolJob> job(new PoolJob(std::move(task), num_tasks, num_seats, num_runs));
  const std::lock_guard<std::mutex> lock(mutex_);
  start_workers(static_cast<std::size_t>(num_seats));
  push(job);
  return job;
}

bool WorkerPool::wait_for(const PoolJob& job, double seconds) {
  if (job.is_done()) return true;
  if (is_of_parent()) throw std::runtime_error("this work was given to threads of the process that was forked");
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return job.is_done(); });
}

}  // namespace overspill
