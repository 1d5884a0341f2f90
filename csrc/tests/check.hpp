// The smallest test harness: CHECK counts and prints what failed; a test program returns finish() from main.
#pragma once

#include <cstdio>

namespace overspill::testing {

inline int num_failures = 0;

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, num_failures == 0 ? "passed" : "FAILED");
  return num_failures == 0 ? 0 : 1;
}

}  // namespace overspill::testing

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      ++overspill::testing::num_failures;                                       \
      std::printf("%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                           \
  } while (0)
