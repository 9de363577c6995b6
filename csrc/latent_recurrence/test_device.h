#pragma once
// The body of the CUDA kernel on the host: every thread of every block in turn, phase after phase, with the strides and
// indices that the GPU has, against the definition in double.  Threads and blocks also run in other orders: where a
// meeting is missing, or two threads write one number, the results differ.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include "latent_recurrence/plan.h"
#include "latent_recurrence/problems.h"

namespace mirasol::latent_recurrence {

struct DeviceProblem {
  std::string name;
  Problem s;
  int blocks, threads;
  double sharp = 1;  // factor of logits; its square is that of their biases
  double empty = 0;  // share of the input's states that are of nothing
};

// Blocks of a GPU, one after the other.
struct OnHost {  // a crew
  int number, count, threads;
  float* shared;
  const vector<int>* order;
  template <class F>
  void each(F f) const {
    for (const int thread : *order) f(thread);
  }
};

struct HostGrid {
  vector<OnHost> crews;
  vector<int> order;
  int64_t persistent;  // floats of shared memory that are more than one phase's
  int64_t floats;
  template <class F>
  void phase(F f) {
    for (const int number : order) {
      std::fill(crews[number].shared + persistent, crews[number].shared + floats, NaN);
      f(crews[number]);
    }
  }
};

constexpr int64_t GUARD = 8;

struct OnDevice {
  vector<float> results, kept;  // last memory and outputs
};

inline OnDevice on_host(const DeviceProblem& p, const Call& call, bool keep, const std::string& order) {
  const int64_t slots = p.s.batch * p.s.memory * p.s.c, out = p.s.batch * p.s.steps * p.s.read * p.s.c;
  OnDevice r{vector<float>(slots + out, NaN), vector<float>(keep ? p.s.steps * slots : 0, NaN)};
  vector<float> scratch(cuda::scratch_floats(call), NaN);
  const Forward f{call, r.results.data(), r.results.data() + slots, keep ? r.kept.data() : nullptr};
  const cuda::Arguments a = cuda::arguments_of(f, scratch.data());
  const auto ordered = [&](int n) {
    vector<int> numbers(n);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == "descending") std::reverse(numbers.begin(), numbers.end());
    if (order == "shuffled") std::shuffle(numbers.begin(), numbers.end(), generator);
    return numbers;
  };
  const cuda::Shared shared(nullptr, a.s, p.blocks, p.threads);
  const vector<int> threads = ordered(p.threads);
  vector<vector<float>> memory(p.blocks, vector<float>(shared.floats + GUARD, NaN));
  HostGrid grid{{}, ordered(p.blocks), 2 * p.s.batch * p.s.memory * shared.width, shared.floats};
  for (int i = 0; i < p.blocks; ++i) grid.crews.push_back({i, p.blocks, p.threads, memory[i].data(), &threads});
  cuda::run_steps(grid, a);
  for (const vector<float>& one : memory)
    for (int64_t i = 0; i < GUARD; ++i)
      if (!std::isnan(one[shared.floats + i])) r.results[0] = NaN;  // somebody wrote past the end
  return r;
}

inline vector<DeviceProblem> device_problems() {
  vector<DeviceProblem> all = {
      // batch, steps, memory, read, c, hidden, mlp, heads, layers, tables; blocks, threads
      {"small", {2, 3, 6, 4, 24, 8, 32, 4, 1, true}, 5, 64},
      {"one block, one group of lanes", {1, 2, 3, 2, 8, 5, 7, 2, 2, true}, 1, 32},
      {"more blocks than channels", {1, 2, 5, 3, 8, 4, 12, 2, 1, true}, 13, 64},
      {"odd sizes, no tables", {3, 3, 5, 3, 15, 7, 9, 3, 1, false}, 4, 96},
      {"one of everything", {1, 1, 1, 1, 1, 1, 1, 1, 1, true}, 3, 32},
      {"more read tokens than rows", {2, 2, 9, 19, 32, 8, 40, 4, 1, true}, 7, 128},
      {"more memory than columns", {1, 2, 70, 3, 16, 8, 16, 2, 1, true}, 6, 64},
      {"memory smaller than read", {2, 2, 2, 9, 16, 8, 16, 2, 1, true}, 6, 64},
      {"sharp", {1, 3, 8, 4, 32, 16, 32, 4, 1, true}, 9, 64, 30},
      {"empty inputs", {1, 3, 8, 4, 32, 16, 32, 4, 1, true}, 9, 64, 1, 0.6},
      {"long", {1, 24, 6, 4, 32, 8, 32, 4, 1, true}, 5, 64},
      {"two layers", {1, 2, 24, 16, 96, 16, 100, 4, 2, true}, 20, 512},
      {"long sums", {1, 1, 4, 2, 500, 70, 700, 2, 1, true}, 9, 64},
      {"long sums, few outputs", {1, 1, 3, 2, 1104, 8, 1100, 2, 1, true}, 140, 512},
      {"as on an H100", {1, 2, 64, 8, 512, 64, 512, 8, 1, true}, 132, cuda::THREADS},
  };
  for (int i = 0; i < 30; ++i) {
    const int64_t heads = draw(1, 4);
    const Problem s{draw(1, 3),  draw(1, 4),  draw(1, 20), draw(1, 12), heads * draw(1, 12),
                    draw(1, 20), draw(1, 70), heads,       draw(1, 2),  draw(0, 1) == 1};
    all.push_back({"drawn " + std::to_string(i), s, int(draw(1, 24)), int(32 * draw(1, 5)), double(draw(1, 4)),
                   draw(0, 1) * 0.3});
  }
  return all;
}

inline Arrays drawn(const DeviceProblem& p) {
  Arrays a = drawn(p.s);
  for (const size_t out : {11, 17}) {
    for (double& x : a[out]) x = float(x * p.sharp);
    for (double& x : a[out + 1]) x = float(x * p.sharp * p.sharp);
  }
  for (const size_t state : {1, 4})
    for (size_t i = 0; i < a[state].size(); ++i)
      if (std::bernoulli_distribution(p.empty)(generator)) {
        a[state][i] = -INFINITY, a[state + 1][i] = 0;
        std::fill_n(a[state + 2].begin() + i * p.s.c, p.s.c, 0);
      }
  return a;
}

struct DeviceReport {
  size_t problems = 0;
  int failures = 0;
  double worst = 0;
  void expect(bool fine, const std::string& who, const std::string& what) {
    if (fine) return;
    ++failures;
    std::printf("FAILED on the device's side, %s: %s\n", who.c_str(), what.c_str());
  }
};

inline void device_problem(const DeviceProblem& p, DeviceReport& report) {
  const Arrays a = drawn(p);
  const Floats f = floats_of(a);
  const vector<Block> blocks = blocks_at<const float>(f, p.s);
  const Call call = call_of(p.s, f, blocks);
  const OnDevice got = on_host(p, call, true, "ascending");
  if (JUDGED) {
    vector<double> exact_kept;
    const vector<double> exact = Machine<double>{p.s, a}.run(&exact_kept);
    double unavoidable = 0;
    for (const int64_t turn : {int64_t(0), p.s.c / 3, 2 * p.s.c / 3}) {
      const vector<float> plain = Machine<float>{p.s, a, turn}.run();
      for (size_t i = 0; i < exact.size(); ++i) unavoidable = std::max(unavoidable, std::abs(plain[i] - exact[i]));
    }
    const auto used = [&](const vector<float>& x, const vector<double>& right, const char* what) {
      const double part = excess({x.begin(), x.end()}, right, unavoidable, Dtype::float32);
      report.expect(part <= 1, p.name, std::string(what) + ": error is " + std::to_string(part) + " of its budget");
      report.worst = std::max(report.worst, part);
    };
    used(got.results, exact, "results"), used(got.kept, exact_kept, "kept");
  }
  for (const char* const order : {"descending", "shuffled"}) {
    const OnDevice other = on_host(p, call, false, order);
    report.expect(got.results == other.results, p.name,
                  std::string("the order of threads and blocks changes the result: ") + order);
  }
  ++report.problems;
}

// Multiprocessors and bytes of shared memory of an H100 and an A100.
inline void device_refusals(DeviceReport& report) {
  const auto taken = [](const Problem& s, int64_t blocks = 132, int64_t bytes = 232448) {
    const Floats nothing(7 + 12 + 16 * s.layers + 2 + 4);
    return !cuda::refusal(call_of(s, nothing, {}), blocks, bytes);
  };
  const Problem usual{1, 8, 64, 8, 512, 64, 512, 8, 1, true};
  report.expect(taken(usual) && taken(usual, 108, 166912), "refusal", "the usual size is refused");
  report.expect(taken({8, 8, 96, 32, 768, 64, 3072, 12, 2, true}), "refusal", "a large size is refused");
  report.expect(!taken({1, 8, 64, 8, 512, 64, 512, 8, cuda::MAX_LAYERS + 1, true}), "refusal", "many layers are taken");
  report.expect(!taken({1, 8, 4096, 8, 512, 64, 512, 8, 1, true}), "refusal", "a large memory is taken");
  report.expect(!taken({1 << 24, 8, 1, 1, 1, 1, 1, 1, 1, true}), "refusal", "a large batch is taken");
}

inline DeviceReport device_body() {
  DeviceReport report;
  for (const DeviceProblem& p : device_problems()) device_problem(p, report);
  device_refusals(report);
  return report;
}

}  // namespace mirasol::latent_recurrence
