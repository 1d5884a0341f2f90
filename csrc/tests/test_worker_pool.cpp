// The pool of the update: every task once, calls from several threads, denormals kept whatever the caller has set.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "worker_pool.hpp"

using overspill::Split;
using overspill::WorkerPool;

namespace {

void check_every_task_runs_once(int num_threads, std::int64_t num_tasks, Split split) {
  std::vector<std::atomic<int>> counts(static_cast<std::size_t>(num_tasks));
  WorkerPool::instance().run(num_tasks, num_threads, [&](std::int64_t task) { ++counts[static_cast<std::size_t>(task)]; }, split);
  for (const auto& count : counts) CHECK(count == 1);
}

// The first task waits for all others, its own thread's later ones included: they end only if another thread takes them.
void check_a_run_that_is_stuck_is_taken_over() {
  std::atomic<int> num_done{0};
  const auto task = [&](std::int64_t index) {
    while (index == 0 && num_done < 19) std::this_thread::yield();
    ++num_done;
  };
  WorkerPool::instance().run(20, 2, task, Split::contiguous);
  CHECK(num_done == 20);
}

void check_calls_from_several_threads_take_turns() {
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&sum] {
      for (int round = 0; round < 50; ++round) {
        std::vector<std::int64_t> squares(17);
        WorkerPool::instance().run(17, 3, [&](std::int64_t task) { squares[static_cast<std::size_t>(task)] = task * task; });
        for (const std::int64_t square : squares) sum += square;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 50 * 1496);
}

void check_a_forked_child_has_a_pool_of_its_own() {
#if !defined(__SANITIZE_THREAD__)  // its run-time does not follow a fork of a process with threads
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> count{0};
    WorkerPool::instance().run(9, 3, [&](std::int64_t) { ++count; });
    _exit(count == 9 ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
}

// Only threads of the pool, and only once they are told; a caller's own priority stays. Lowered for good, so this comes last.
void check_helpers_give_way_and_callers_do_not() {
#if defined(__linux__)
  const auto niceness_of_all = [] {
    std::vector<std::atomic<int>> found(3);
    std::atomic<int> num_begun{0};
    const auto task = [&](std::int64_t index) {
      ++num_begun;
      while (num_begun < 3) std::this_thread::yield();  // one task a thread
      found[static_cast<std::size_t>(index)] = getpriority(PRIO_PROCESS, 0);
    };
    WorkerPool::instance().run(3, 3, task);
    return std::vector<int>(found.begin(), found.end());
  };
  const int own = getpriority(PRIO_PROCESS, 0);
  for (const int niceness : niceness_of_all()) CHECK(niceness == own);
  WorkerPool::instance().let_helpers_give_way();
  int num_lowered = 0;
  for (const int niceness : niceness_of_all()) num_lowered += niceness > own;
  CHECK(num_lowered == 2);
  CHECK(getpriority(PRIO_PROCESS, 0) == own);
#endif
}

}  // namespace

int main() {
  for (const int num_threads : {1, 2, 5}) {
    for (const std::int64_t num_tasks : {0, 1, 2, 100}) {
      check_every_task_runs_once(num_threads, num_tasks, Split::in_order);
      check_every_task_runs_once(num_threads, num_tasks, Split::contiguous);
    }
  }
  check_a_run_that_is_stuck_is_taken_over();
  check_calls_from_several_threads_take_turns();
  check_a_forked_child_has_a_pool_of_its_own();
  check_helpers_give_way_and_callers_do_not();
  return overspill::testing::finish("worker pool");
}
