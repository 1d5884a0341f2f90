// What the binding files share: addresses come from Python as integers, and each file adds its functions to the one module.
//
// Every call that computes or waits releases the GIL; the caller keeps the memory alive until it returns.
// std::invalid_argument becomes ValueError, other exceptions RuntimeError. overspill/_native.pyi has the signatures.
#pragma once

#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

#include <cstdint>

namespace nb = nanobind;

// Without the GIL while it lives. A thread that comes back while the interpreter ends stays here until the process does, as from
// Python 3.14 on anyway: before, Python ends such a thread by unwinding it, which no function of C++ that may not throw survives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

using Unlocked = nb::call_guard<WithoutGil>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr double kSignalPeriod_s = 0.1;

// Block without the GIL until `work.wait_for` says that it has ended; what a signal's handler raises (Ctrl-C) ends the wait.
template <class Work>
void wait_for_end(Work& work) {
  while (!work.is_done()) {
    bool is_done = false;
    {
      const WithoutGil unlocked;
      is_done = work.wait_for(kSignalPeriod_s);
    }
    if (!is_done && PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

void bind_update(nb::module_& module);
void bind_storage(nb::module_& module);
