// Threads that stay: starting 16 of them for every 32 MiB chunk would cost a good part of the chunk's own update.
//
// Rules:
// 1. One pool per process, made on first use and never destroyed: joining at exit could wait for threads that the
//    system has already ended. After a fork the child makes its own; threads do not survive a fork.
// 2. The calling thread works too. Calls from several threads take turns.
// 3. Tasks must not throw. They are taken in order, by whoever is free; which thread runs which is not defined.
// 4. Tasks run under the default floating-point environment (denormals kept, round to nearest), on the caller's thread as
//    on the others; the caller's own is restored afterwards. Pool threads take no signals.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace overspill {

class WorkerPool {
 public:
  static WorkerPool& instance();

  // Runs task(0) .. task(num_tasks - 1) on at most num_threads threads and returns when all are done.
  // Throws std::system_error when a thread cannot be started; no task has run then.
  void run(std::int64_t num_tasks, int num_threads, const std::function<void(std::int64_t)>& task);

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
  int num_active_ = 0;
  std::size_t num_workers_ = 0;
};

}  // namespace overspill
