// What both ways of moving a part share: aligned memory of a thread's own, and how far a part has come.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdlib>

#include "overspill/io.hpp"

namespace overspill {

// Page-aligned memory that grows to what was asked for and stays.
class IoEngine::Bounce {
 public:
  explicit Bounce(std::int64_t alignment) : alignment_(alignment < kPage ? kPage : alignment) {}
  ~Bounce() { std::free(memory_); }
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;

  // Null when there is no memory.
  char* room_for(std::int64_t num_bytes) {
    if (num_bytes > size_) {
      std::free(memory_);
      size_ = (num_bytes + alignment_ - 1) / alignment_ * alignment_;
      memory_ = static_cast<char*>(std::aligned_alloc(static_cast<std::size_t>(alignment_), static_cast<std::size_t>(size_)));
      if (memory_ == nullptr) size_ = 0;
    }
    return memory_;
  }

 private:
  static constexpr std::int64_t kPage = 4096;
  const std::int64_t alignment_;
  char* memory_ = nullptr;
  std::int64_t size_ = 0;
};

// How much of a part has moved, and from where it goes on after a call that moved less (rule 3 of io.hpp).
class IoProgress {
 public:
  IoProgress(std::int64_t wanted, std::int64_t alignment, int most_stalls)
      : wanted_(wanted), alignment_(alignment), most_stalls_(most_stalls) {}

  bool is_whole() const { return done_ == wanted_; }
  std::int64_t done() const { return done_; }
  std::int64_t reached() const { return reached_; }

  // False when nothing moves any more: the part has failed.
  bool advance(std::int64_t moved) {
    const std::int64_t before = done_;
    reached_ = done_ + moved;
    done_ = reached_ == wanted_ ? reached_ : reached_ / alignment_ * alignment_;
    num_stalls_ = done_ == before ? num_stalls_ + 1 : 0;
    return moved != 0 && num_stalls_ <= most_stalls_;
  }

 private:
  const std::int64_t wanted_, alignment_;
  const int most_stalls_;
  std::int64_t done_ = 0, reached_ = 0;
  int num_stalls_ = 0;
};

}  // namespace overspill
