// Claims about the host update from C++: threads, tails, padding, errors, and callers in parallel. What its numbers are is
// tested from Python against the plain form; here the sanitizers look at memory and threads.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "overspill/update.hpp"

using namespace overspill;

namespace {

const Rule kRules[] = {Rule::adamw, Rule::sgd, Rule::sgd_momentum, Rule::sgd_nesterov, Rule::lion};
const StateFormat kFormats[] = {StateFormat::fp32, StateFormat::bf16, StateFormat::int8};
const Dtype kDtypes[] = {Dtype::bfloat16, Dtype::float16, Dtype::float32};
const UpdateScalars kScalars = {0.5f, 0.999f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-3f, 10.0f, 1e-8f, 0.9f, 0.01f};

// A chunk whose arrays are exactly as long as they must be, so that a sanitizer sees every step outside.
struct Chunk {
  Rule rule;
  StateFormat format;
  Dtype dtype;
  std::int64_t length;
  std::vector<std::uint8_t> parameter, gradient, master, moments[2], exponents[2];

  Chunk(Rule rule_, StateFormat format_, Dtype dtype_, std::int64_t length_)
      : rule(rule_), format(format_), dtype(dtype_), length(length_) {
    const auto n = static_cast<std::size_t>(length);
    const std::size_t moment = format == StateFormat::fp32 ? 4 : format == StateFormat::bf16 ? 2 : 1;
    parameter.resize(n * static_cast<std::size_t>(dtype_bytes(dtype)));
    gradient.resize(n * 4);
    if (format == StateFormat::fp32 && dtype != Dtype::float32) master.resize(n * (dtype == Dtype::bfloat16 ? 2 : 4));
    for (int which = 0; which < num_moments(rule); ++which) {
      moments[which].resize(n * moment);
      if (format == StateFormat::int8) exponents[which].resize((n + 255) / 256);
    }
    for (std::size_t i = 0; i < n; ++i) {
      const float value = 0.001f * (static_cast<float>(i % 211) - 105.0f);
      std::memcpy(gradient.data() + 4 * i, &value, 4);
    }
  }

  ChunkArrays arrays() {
    ChunkArrays result{rule, format, dtype, Dtype::float32, length, parameter.data(), gradient.data(), nullptr, {}, {}};
    if (!master.empty()) result.master = master.data();
    for (int which = 0; which < 2; ++which) {
      result.moments[which] = moments[which].data();
      result.exponents[which] = exponents[which].data();
    }
    return result;
  }

  bool operator==(const Chunk& other) const {
    return parameter == other.parameter && master == other.master && moments[0] == other.moments[0] && moments[1] == other.moments[1] &&
           exponents[0] == other.exponents[0] && exponents[1] == other.exponents[1];
  }
};

GradientStats update_all(Chunk& chunk, int num_threads, const std::string& isa = "", bool with_stats = true) {
  const UpdateRange range{0, chunk.length, 0x0123456789abcdefULL, 512, 0};
  return update_ranges(chunk.arrays(), &range, 1, &kScalars, 1, num_threads, isa, with_stats);
}

bool has_layout(StateFormat format, Dtype dtype) { return format == StateFormat::fp32 || dtype != Dtype::float16; }

// Whether `call` throws std::invalid_argument with `words` in its message.
template <class Call>
bool refuses(const char* words, Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (std::strstr(error.what(), words) != nullptr) return true;
    std::printf("unexpected message: %s\n", error.what());
  }
  return false;
}

void test_every_variant_thread_count_and_tail_gives_the_same_bytes() {
  for (const Rule rule : kRules) {
    for (const StateFormat format : kFormats) {
      for (const Dtype dtype : kDtypes) {
        if (!has_layout(format, dtype)) continue;
        for (const std::int64_t length : {1, 255, 257, 32768 + 513}) {
          Chunk expected(rule, format, dtype, length);
          const GradientStats stats = update_all(expected, 1, "baseline");
          for (const std::string& isa : supported_isas()) {
            for (const int threads : {1, 3}) {
              Chunk found(rule, format, dtype, length);
              const GradientStats same = update_all(found, threads, isa);
              CHECK(found == expected);
              CHECK(same.sum_of_squares == stats.sum_of_squares && same.num_non_finite == 0);
            }
          }
        }
      }
    }
  }
}

void test_elements_in_no_range_are_left_alone() {
  for (const StateFormat format : kFormats) {
    Chunk chunk(Rule::adamw, format, Dtype::bfloat16, 1024), before(Rule::adamw, format, Dtype::bfloat16, 1024);
    const UpdateRange ranges[] = {{256, 100, 1, 0, 0}, {512, 256, 2, 0, 0}};
    update_ranges(chunk.arrays(), ranges, 2, &kScalars, 1, 2, "", true);
    for (std::size_t i = 0; i < 1024; ++i) {
      const bool is_inside = (i >= 256 && i < 356) || (i >= 512 && i < 768);
      if (!is_inside) CHECK(std::memcmp(chunk.parameter.data() + 2 * i, before.parameter.data() + 2 * i, 2) == 0);
    }
    CHECK(!(chunk == before));
  }
}

void test_non_finite_gradients_are_counted_in_every_piece() {
  Chunk chunk(Rule::sgd, StateFormat::fp32, Dtype::float32, 70000);
  const float bad[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::nanf("")};
  const std::size_t places[] = {0, 32767, 32768, 69999};
  for (std::size_t i = 0; i < 4; ++i) std::memcpy(chunk.gradient.data() + 4 * places[i], &bad[i % 3], 4);
  CHECK(update_all(chunk, 3).num_non_finite == 4);
  CHECK(update_all(chunk, 3, "", false).num_non_finite == 0);
}

void test_cutting_and_fetching_change_no_byte() {
  for (const StateFormat format : kFormats) {
    Chunk expected(Rule::adamw, format, Dtype::bfloat16, 70001);
    update_all(expected, 1);
    for (const UpdateTuning& tuning : {UpdateTuning{256, 0, true}, UpdateTuning{1024, 256, false}, UpdateTuning{65536, 65536, true}}) {
      Chunk found(Rule::adamw, format, Dtype::bfloat16, 70001);
      const UpdateRange range{0, 70001, 0x0123456789abcdefULL, 512, 0};
      update_ranges(found.arrays(), &range, 1, &kScalars, 1, 3, "", true, tuning);
      CHECK(found == expected);
    }
    const UpdateRange range{0, 70001, 0, 0, 0};
    const auto call = [&](const UpdateTuning& tuning) { update_ranges(expected.arrays(), &range, 1, &kScalars, 1, 3, "", true, tuning); };
    CHECK(refuses("piece_elements must be a positive multiple of 256, got 100", [&] { call({100, 0, true}); }));
    CHECK(refuses("prefetch_elements must be a multiple of 256 or 0, got 100", [&] { call({256, 100, true}); }));
  }
}

// With bf16 gradients the narrow formats go through loops of their own (fused.hpp), which must not show: not in whole blocks,
// not in tails, and not around infinities, NaNs, squares that overflow fp32 and squares that vanish in it.
void compare_fused_with_staged(Rule rule, StateFormat format, std::uint16_t special, const std::string& isa) {
  const std::int64_t length = 2048 + 700;
  Chunk staged(rule, format, Dtype::bfloat16, length);
  std::vector<std::uint16_t> halves(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < halves.size(); ++i) {
    halves[i] = i % 300 == 7 ? special : static_cast<std::uint16_t>(0x3a00 + i % 500 + (i % 3 == 0 ? 0x8000 : 0));
    const std::uint32_t bits = static_cast<std::uint32_t>(halves[i]) << 16;
    std::memcpy(staged.gradient.data() + 4 * i, &bits, 4);
  }
  Chunk fused = staged;
  const UpdateRange range{0, length, 0x0123456789abcdefULL, 512, 0};
  for (int step = 0; step < 3; ++step) {
    const GradientStats expected = update_all(staged, 2, isa);
    ChunkArrays arrays = fused.arrays();
    arrays.gradient = halves.data();
    arrays.gradient_dtype = Dtype::bfloat16;
    const GradientStats found = update_ranges(arrays, &range, 1, &kScalars, 1, 2, isa, step != 1);
    CHECK(fused == staged);
    if (step == 1) continue;  // without the look
    CHECK(found.num_non_finite == expected.num_non_finite);
    CHECK(std::memcmp(&found.sum_of_squares, &expected.sum_of_squares, 8) == 0 || std::isnan(found.sum_of_squares));
    CHECK(std::isfinite(found.sum_of_squares) == (special != 0x7f80 && special != 0xffc1));
  }
}

void test_loops_of_their_own_equal_the_stages() {
  for (const Rule rule : kRules) {
    for (const StateFormat format : {StateFormat::bf16, StateFormat::int8}) {
      for (const std::uint16_t special : {0x0000, 0x7f80, 0xffc1, 0x7f00, 0x0080, 0x8000}) {
        for (const std::string& isa : supported_isas()) compare_fused_with_staged(rule, format, special, isa);
      }
    }
  }
}

void test_callers_in_parallel_take_turns() {
  Chunk expected(Rule::adamw, StateFormat::int8, Dtype::bfloat16, 100000);
  for (int step = 0; step < 3; ++step) update_all(expected, 1);
  std::vector<Chunk> chunks(4, Chunk(Rule::adamw, StateFormat::int8, Dtype::bfloat16, 100000));
  std::vector<std::thread> threads;
  for (Chunk& chunk : chunks) {
    threads.emplace_back([&chunk] {
      for (int step = 0; step < 3; ++step) update_all(chunk, 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Chunk& chunk : chunks) CHECK(chunk == expected);
}

void test_started_updates_give_the_same_bytes_in_order_beside_callers() {
  Chunk expected(Rule::adamw, StateFormat::int8, Dtype::bfloat16, 100000);
  GradientStats stats;
  for (int step = 0; step < 2; ++step) stats = update_all(expected, 1);
  std::vector<Chunk> chunks(6, Chunk(Rule::adamw, StateFormat::int8, Dtype::bfloat16, 100000));
  Chunk called = chunks[0];
  std::vector<std::shared_ptr<StartedUpdate>> started;
  std::thread caller([&called] {
    for (int step = 0; step < 2; ++step) update_all(called, 3);
  });
  for (int step = 0; step < 2; ++step) {
    for (Chunk& chunk : chunks) {
      UpdateRange range{0, chunk.length, 0x0123456789abcdefULL, 512, 0};
      UpdateScalars scalars = kScalars;
      started.push_back(start_update_ranges(chunk.arrays(), &range, 1, &scalars, 1, 2, "", true));
      range = {0, 1, 0, 0, 7};  // both were copied
      scalars = {};
    }
    while (!started.back()->wait_for(0.01)) continue;
  }
  caller.join();
  double before_s = 0;
  for (const auto& update : started) {
    CHECK(update->is_done() && update->wait_for(0) && !update->is_of_parent());
    CHECK(before_s <= update->began_s() && update->began_s() < update->ended_s());
    before_s = update->ended_s();
  }
  CHECK(started.back()->stats().sum_of_squares == stats.sum_of_squares);
  for (const Chunk& chunk : chunks) CHECK(chunk == expected);
  CHECK(called == expected);
}

void test_wrong_arguments_are_refused_and_nothing_is_written() {
  Chunk chunk(Rule::adamw, StateFormat::int8, Dtype::bfloat16, 1024);
  const Chunk before = chunk;
  const ChunkArrays good = chunk.arrays();
  const UpdateRange whole{0, 1024, 0, 0, 0};
  const auto call = [&](const ChunkArrays& arrays, std::vector<UpdateRange> ranges, const std::string& isa = "") {
    try {
      start_update_ranges(arrays, ranges.data(), ranges.size(), &kScalars, 1, 1, isa, true)->wait_for(10);
      CHECK(!"started");
    } catch (const std::invalid_argument&) {
    }
    update_ranges(arrays, ranges.data(), ranges.size(), &kScalars, 1, 1, isa, true);
  };
  ChunkArrays arrays = good;
  arrays.parameter = nullptr;
  CHECK(refuses("parameter is null", [&] { call(arrays, {whole}); }));
  arrays = good;
  arrays.parameter = chunk.parameter.data() + 1;
  CHECK(refuses("no multiple of its element size 2 B", [&] { call(arrays, {whole}); }));
  arrays = good;
  arrays.moments[1] = arrays.moments[0];
  CHECK(refuses("first moment and second moment overlap", [&] { call(arrays, {whole}); }) ||
        refuses("second moment and first moment overlap", [&] { call(arrays, {whole}); }));
  arrays = good;
  arrays.master = chunk.gradient.data();
  CHECK(refuses("its own master", [&] { call(arrays, {whole}); }));
  arrays = good;
  arrays.parameter_dtype = Dtype::float16;
  CHECK(refuses("float16 parameters have only the state format fp32", [&] { call(arrays, {whole}); }));
  CHECK(refuses("multiple of 256", [&] { call(good, {{1, 5, 0, 0, 0}}); }));
  CHECK(refuses("end within the chunk's 1024 elements", [&] { call(good, {{768, 257, 0, 0, 0}}); }));
  CHECK(refuses("end within", [&] { call(good, {{-256, 5, 0, 0, 0}}); }));
  CHECK(refuses("start at or after 512", [&] { call(good, {{0, 300, 0, 0, 0}, {256, 5, 0, 0, 0}}); }));
  CHECK(refuses("wants scalars 1, only 1", [&] { call(good, {{0, 5, 0, 0, 1}}); }));
  CHECK(refuses("cannot run here", [&] { call(good, {whole}, "sse9"); }));
  CHECK(refuses("rule 'adam' is unknown", [] { parse_rule("adam"); }));
  CHECK(refuses("state format 'fp8' is unknown", [] { parse_state_format("fp8"); }));
  CHECK(refuses("dtype 'float64' has no update", [] { parse_dtype("float64"); }));
  CHECK(chunk == before);
}

void test_nothing_to_do_is_no_work() {
  Chunk chunk(Rule::lion, StateFormat::bf16, Dtype::float32, 0);
  const GradientStats stats = update_ranges(chunk.arrays(), nullptr, 0, nullptr, 0, 2, "", true);
  CHECK(start_update_ranges(chunk.arrays(), nullptr, 0, nullptr, 0, 2, "", true)->wait_for(10));
  CHECK(stats.num_non_finite == 0 && stats.sum_of_squares == 0);
  scale_in_place(nullptr, 0, 1.0f, 0.0f, 1, 1, "");
  CHECK(all_finite(nullptr, Dtype::float32, 0, 1, ""));
}

void test_all_finite_finds_one_bad_element_at_any_place_and_reads_nothing_beyond() {
  for (const std::string& isa : supported_isas()) {
    for (const std::size_t length : {std::size_t{1}, std::size_t{31}, std::size_t{33000}}) {
      std::vector<std::uint16_t> values(length, 0x7f7f);
      CHECK(all_finite(values.data(), Dtype::bfloat16, static_cast<std::int64_t>(length), 2, isa));
      for (const std::size_t place : {std::size_t{0}, length / 2, length - 1}) {
        values[place] = 0xff81;
        CHECK(!all_finite(values.data(), Dtype::bfloat16, static_cast<std::int64_t>(length), 2, isa));
        values[place] = 0x7f7f;
      }
    }
  }
}

void test_scale_in_place_reaches_every_element_once() {
  std::vector<float> values(100003, 1.0f);
  scale_in_place(values.data(), static_cast<std::int64_t>(values.size()), 2.0f, 1.0f, 1, 3, "");
  for (const float value : values) CHECK(value == 3.0f);
  values.resize(7 * 14000, 3.0f);
  scale_in_place(values.data(), 7 * 14000, 2.0f, 1.0f, 7, 3, "");
  for (const float value : values) CHECK(value == 7.0f);
  CHECK(refuses("7 equal arrays", [&] { scale_in_place(values.data(), 50, 1.0f, 0.0f, 7, 1, ""); }));
}

}  // namespace

int main() {
  test_every_variant_thread_count_and_tail_gives_the_same_bytes();
  test_elements_in_no_range_are_left_alone();
  test_non_finite_gradients_are_counted_in_every_piece();
  test_cutting_and_fetching_change_no_byte();
  test_loops_of_their_own_equal_the_stages();
  test_callers_in_parallel_take_turns();
  test_started_updates_give_the_same_bytes_in_order_beside_callers();
  test_wrong_arguments_are_refused_and_nothing_is_written();
  test_nothing_to_do_is_no_work();
  test_all_finite_finds_one_bad_element_at_any_place_and_reads_nothing_beyond();
  test_scale_in_place_reaches_every_element_once();
  return overspill::testing::finish("update");
}
