// The clock of everything that is told to Python with a time: `time.perf_counter` on Linux.
#pragma once

#include <time.h>

namespace overspill {

inline double now_s() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace overspill
