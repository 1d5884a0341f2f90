// The pool of the update: every task once, calls from several threads, denormals kept whatever the caller has set.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
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

// Every task of many jobs, some started and some run, from several threads; they end in the order in which each thread gave them.
void check_started_jobs_end_in_order_and_do_not_overlap() {
  WorkerPool& pool = WorkerPool::instance();
  std::vector<std::thread> givers;
  for (int giver = 0; giver < 3; ++giver) {
    givers.emplace_back([&pool, giver] {
      std::vector<std::shared_ptr<overspill::PoolJob>> jobs;
      std::vector<std::atomic<int>> counts(40);
      for (std::size_t number = 0; number < 40; ++number) {
        const auto num_tasks = static_cast<std::int64_t>(number % 7);
        const Split split = number % 2 == 0 ? Split::contiguous : Split::in_order;
        jobs.push_back(pool.start(num_tasks, 1 + giver, [&counts, number](std::int64_t) { ++counts[number]; }, split));
        if (number % 10 == 9) pool.run(5, 3, [](std::int64_t) {});
      }
      while (!pool.wait_for(*jobs.back(), 0.001)) continue;
      double before_s = 0;
      for (std::size_t number = 0; number < 40; ++number) {
        CHECK(jobs[number]->is_done() && counts[number] == static_cast<int>(number % 7));
        CHECK(before_s <= jobs[number]->began_s() && jobs[number]->began_s() <= jobs[number]->ended_s());
        before_s = jobs[number]->ended_s();
      }
    });
  }
  for (std::thread& giver : givers) giver.join();
}

// One thread is held up in the first job: the other takes the second meanwhile, which is told when the first one has ended.
void check_who_finds_no_task_left_begins_with_the_next_job() {
  WorkerPool& pool = WorkerPool::instance();
  std::atomic<int> num_done{0};
  const auto held_up = [&](std::int64_t index) {
    while (index == 0 && num_done < 5) std::this_thread::yield();
  };
  const auto first = pool.start(2, 2, held_up);
  const auto second = pool.start(5, 2, [&](std::int64_t) {
    CHECK(!first->is_done());
    ++num_done;
  });
  while (!pool.wait_for(*second, 0.01)) continue;
  CHECK(first->is_done() && second->began_s() == first->ended_s());
}

// A seat is one of all that are at work: two jobs that follow one another have no more threads together than each asks for.
void check_two_jobs_have_no_more_threads_than_one() {
  WorkerPool& pool = WorkerPool::instance();
  std::atomic<int> num_now{0}, most{0};
  const auto task = [&](std::int64_t) {
    const int now = ++num_now;
    for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    --num_now;
  };
  std::shared_ptr<overspill::PoolJob> last;
  for (int number = 0; number < 8; ++number) last = pool.start(5, 2, task);
  while (!pool.wait_for(*last, 0.01)) continue;
  CHECK(most <= 2);
}

// After a sleep that is longer than any thread looks for more.
void check_sleepers_are_woken_for_a_job_behind_one_with_fewer_seats() {
  WorkerPool& pool = WorkerPool::instance();
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::atomic<int> num_begun{0};
    const auto first = pool.start(3, 1, [](std::int64_t) { std::this_thread::sleep_for(std::chrono::microseconds(300)); });
    const auto second = pool.start(4, 4, [&](std::int64_t) {
      ++num_begun;
      while (num_begun < 4) std::this_thread::yield();  // one task a thread
    });
    while (!pool.wait_for(*second, 0.01)) continue;
  }
}

void check_a_forked_child_waits_for_no_job_of_its_parents() {
#if !defined(__SANITIZE_THREAD__)
  std::atomic<bool> may_end{false};
  WorkerPool& pool = WorkerPool::instance();
  const auto job = pool.start(1, 1, [&](std::int64_t) {
    while (!may_end) std::this_thread::yield();
  });
  const pid_t child = fork();
  if (child == 0) {
    try {
      pool.wait_for(*job, 1);
    } catch (const std::runtime_error&) {
      std::atomic<int> count{0};
      const auto own = WorkerPool::instance().start(9, 3, [&](std::int64_t) { ++count; });
      while (!WorkerPool::instance().wait_for(*own, 0.01)) continue;
      _exit(count == 9 && pool.is_of_parent() && !job->is_done() ? 0 : 1);
    }
    _exit(2);
  }
  may_end = true;
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  while (!pool.wait_for(*job, 0.01)) continue;
#endif
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
  check_started_jobs_end_in_order_and_do_not_overlap();
  check_who_finds_no_task_left_begins_with_the_next_job();
  check_two_jobs_have_no_more_threads_than_one();
  check_sleepers_are_woken_for_a_job_behind_one_with_fewer_seats();
  check_a_forked_child_waits_for_no_job_of_its_parents();
  check_a_forked_child_has_a_pool_of_its_own();
  check_helpers_give_way_and_callers_do_not();
  return overspill::testing::finish("worker pool");
}
