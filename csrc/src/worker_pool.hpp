// Threads that stay: starting 16 of them for every 32 MiB chunk would cost a good part of the chunk's own update.
//
// Rules:
// 1. One pool per process, made on first use and never destroyed: joining at exit could wait for threads that the
//    system has already ended. After a fork the child makes its own; threads do not survive a fork.
// 2. The calling thread works too. Calls from several threads take turns.
// 3. Tasks must not throw. Which thread runs which is not defined; `Split` says what they prefer, and nobody is idle while
//    a task is left.
// 4. Tasks run under the default floating-point environment (denormals kept, round to nearest), on the caller's thread as
//    on the others; the caller's own is restored afterwards. Pool threads take no signals.
// 5. A thread that has run out of tasks looks for the next call's for some 20 us before it sleeps: an update is a row of calls
//    of half a millisecond, and waking 15 sleepers costs a good part of one. Not longer, since I/O threads want the cores.
// 6. Pool threads can be told to give way. Callers do not: they hold locks that others wait for (Python's).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace overspill {

enum class Split {
  in_order,    // tasks are taken in order, by whoever is free
  contiguous,  // each thread starts with its own equal run of tasks, in order, and then helps the others with theirs
};

class WorkerPool {
 public:
  static WorkerPool& instance();

  // Runs task(0) .. task(num_tasks - 1) on at most num_threads threads and returns when all are done.
  // Throws std::system_error when a thread cannot be started; no task has run then.
  void run(std::int64_t num_tasks, int num_threads, const std::function<void(std::int64_t)>& task, Split split = Split::in_order);

  // Rule 6, from their next task on, and for good: a priority that was lowered cannot be raised again.
  void let_helpers_give_way() { gives_way_ = true; }

 private:
  struct Job;

  WorkerPool();
  void start_workers(std::size_t count);
  void serve();

  const long pid_;
  std::mutex turn_;   // held for a whole run(): callers take turns
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  std::atomic<int> num_active_{0};          // written under mutex_; read outside to look before sleeping
  std::atomic<std::uint64_t> num_jobs_{0};  // the same
  std::atomic<bool> gives_way_{false};
  std::size_t num_workers_ = 0;
};

}  // namespace overspill
