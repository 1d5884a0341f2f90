// Threads that stay: starting 16 of them for every 32 MiB chunk would cost a good part of the chunk's own update.
//
// A **job** is a row of tasks.
//
// Rules:
// 1. One pool per process, made on first use and never destroyed: joining at exit could wait for threads that the
//    system has already ended. After a fork the child makes its own; threads do not survive a fork.
// 2. `run` waits for its job, and the calling thread works too; `start` returns at once, and threads of the pool do all. Jobs are begun
//    in the order in which they were given: one when every task of the one before is taken, by whoever finds none left there, so nobody
//    waits for the last tasks of a job. They end in that order, too: one that is done before an earlier one ends with it.
// 3. Tasks must not throw. Which thread runs which is not defined; `Split` says what they prefer, and nobody is idle while
//    a task is left. Tasks of two jobs that follow one another may run at the same time.
// 4. Tasks run under the default floating-point environment (denormals kept, round to nearest), on the caller's thread as
//    on the others; the caller's own is restored afterwards. Pool threads take no signals.
// 5. A thread that has run out of tasks looks for the next job's for some 20 us before it sleeps: an update is a row of jobs
//    of half a millisecond, and waking 15 sleepers costs a good part of one. Not longer, since I/O threads want the cores.
// 6. Pool threads can be told to give way. Callers do not: they hold locks that others wait for (Python's).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace overspill {

enum class Split {
  in_order,    // tasks are taken in order, by whoever is free
  contiguous,  // each thread starts with its own equal run of tasks, in order, and then helps the others with theirs
};

using Task = std::function<void(std::int64_t)>;

// Made by `WorkerPool`.
class PoolJob {
 public:
  bool is_done() const { return is_done_.load(std::memory_order_acquire); }
  // Of a job that has ended, on the clock of clock.hpp. No two jobs overlap here: one that was begun before another had ended counts
  // from that end.
  double began_s() const { return began_s_; }
  double ended_s() const { return ended_s_; }

 private:
  friend class WorkerPool;
  // A run of tasks, in a cache line of its own.
  struct alignas(64) Run {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };

  PoolJob(Task task, std::int64_t num_tasks, int num_seats, std::size_t num_runs);
  void work();

  const Task task_;
  const int num_seats_;  // most pool threads that may be at work when one joins
  std::vector<Run> runs_;
  std::atomic<std::size_t> num_joined_{0};
  int num_active_ = 0;         // threads at work on it; this and what follows is guarded by the pool's mutex
  bool is_exhausted_ = false;  // every task is taken
  double began_s_ = 0, ended_s_ = 0;
  std::atomic<bool> is_done_{false};  // written under the mutex, last of all
};

class WorkerPool {
 public:
  static WorkerPool& instance();

  // Runs task(0) .. task(num_tasks - 1) on at most num_threads threads and returns when all are done.
  // Throws std::system_error when a thread cannot be started; no task has run then.
  void run(std::int64_t num_tasks, int num_threads, const Task& task, Split split = Split::in_order);

  // The same, without the caller: what the task refers to must be there until the job has ended.
  std::shared_ptr<PoolJob> start(std::int64_t num_tasks, int num_threads, Task task, Split split = Split::in_order);

  // True when the job has ended; false after `seconds`. Any thread, any number of times.
  // Throws std::runtime_error in a child that was forked since the job was started: its threads are the parent's.
  bool wait_for(const PoolJob& job, double seconds);

  // Whether this is the pool of a process that has forked, of which this is the child.
  bool is_of_parent() const;

  // Rule 6, from their next task on, and for good: a priority that was lowered cannot be raised again.
  void let_helpers_give_way() { gives_way_ = true; }

 private:
  WorkerPool();
  void start_workers(std::size_t count);
  void serve();
  void push(std::shared_ptr<PoolJob> job);
  PoolJob* open_job() const;
  PoolJob* job_with_seat() const;
  void wake_workers();
  void join(PoolJob& job);
  void leave(PoolJob& job);

  const long pid_;
  std::mutex mutex_;                           // guards what follows
  std::condition_variable wake_;               // workers: there may be a seat
  std::condition_variable turn_;               // callers of `run`: another job is begun
  std::condition_variable ended_;              // whoever waits for a job
  std::deque<std::shared_ptr<PoolJob>> jobs_;  // not ended yet, in order
  int num_active_ = 0;                         // workers at work
  double last_ended_s_ = 0;
  std::atomic<std::uint64_t> num_jobs_{0};  // pushed so far; read outside to look before sleeping
  std::atomic<bool> gives_way_{false};
  std::size_t num_workers_ = 0;
};

}  // namespace overspill
