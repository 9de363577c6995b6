// All steps in one call against the definition, a step as it is written: forward in its budget, gradients by the change
// of a random function along a random direction; any team, any cut in time, kept or not: the same bits.
// And the body of the CUDA kernel, test_device.h.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include "latent_recurrence/problems.h"
#include "latent_recurrence/test_device.h"

using namespace mirasol::latent_recurrence;

namespace {

Team team_of(int64_t& threads) {
  return {&threads, [](void* self, int64_t items, void (*work)(void*, int64_t), void* argument) {
            mirasol::share(mirasol::OwnThreads{}, *static_cast<int64_t*>(self), items, 16,
                           [&](float*, int64_t begin, int64_t) { work(argument, begin); });
          }};
}

struct Space {  // aligned, full of NaN
  vector<float> memory;
  float* at;
  explicit Space(int64_t n) : memory(n + 16, NaN) {
    at = memory.data();
    while (reinterpret_cast<uintptr_t>(at) % 64) ++at;
  }
};

struct Ran {
  vector<float> results, kept;  // last memory and outputs
};

Ran forward(const Call& call, const Problem& s, int64_t threads, bool keep) {
  const int64_t size = s.batch * s.memory * s.c, out = s.batch * s.steps * s.read * s.c;
  Ran ran{vector<float>(size + out, NaN), vector<float>(keep ? size * s.steps : 0, NaN)};
  Space space(MIRASOL_CALL(latent_recurrence_forward_workspace, call));
  const Forward f{call, ran.results.data(), ran.results.data() + size, keep ? ran.kept.data() : nullptr};
  MIRASOL_CALL(latent_recurrence_forward, f, team_of(threads), space.at);
  return ran;
}

// Gradients, in the places of Arrays (those of the maxima are empty).
Floats backward(const Call& call, const Problem& s, int64_t threads, const vector<float>& cotangent,
                const vector<float>& kept) {
  Floats d;
  for (int64_t n : lengths(s)) d.emplace_back(n, NaN);
  d[1].clear(), d[4].clear();
  const auto blocks = blocks_at<float>(d, s);
  const size_t tables = d.size() - 4;
  const auto table = [&](size_t i) { return s.tables ? d[tables + i].data() : nullptr; };
  Space space(MIRASOL_CALL(latent_recurrence_backward_workspace, call));
  const Backward g{call, cotangent.data(), cotangent.data() + s.batch * s.memory * s.c, kept.data(), d[0].data(),
                   d[2].data(), d[3].data(), d[5].data(), d[6].data(), pool_at<float>(d, 7), pool_at<float>(d, 13),
                   blocks.data(), {d[tables - 2].data(), d[tables - 1].data()}, table(0), table(1), table(2), table(3)};
  MIRASOL_CALL(latent_recurrence_backward, g, team_of(threads), space.at);
  return d;
}

double dot(const vector<double>& x, const vector<float>& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// The largest of: what forward used of its budget; the error of a gradient along a direction, in parts of what float32
// may lose of a sum of so large terms.
double problem(const Problem& s) {
  const Arrays a = drawn(s);
  const Floats f = floats_of(a);
  const vector<Block> blocks = blocks_at<const float>(f, s);
  const Call call = call_of(s, f, blocks);
  const Ran ran = forward(call, s, 1, true);
  double worst = 0;
  if (JUDGED) {
    const vector<double> exact = Machine<double>{s, a}.run();
    const vector<float> plain = Machine<float>{s, a}.run();
    double unavoidable = 0;
    for (size_t i = 0; i < exact.size(); ++i) unavoidable = std::max(unavoidable, std::abs(plain[i] - exact[i]));
    worst = excess({ran.results.begin(), ran.results.end()}, exact, unavoidable, mirasol::Dtype::float32);
  }

  std::normal_distribution<float> normal;
  vector<float> cotangent(ran.results.size());
  for (float& v : cotangent) v = normal(generator);
  const Floats d = backward(call, s, 1, cotangent, ran.kept);
  for (int64_t threads : {2, 7}) {
    const Ran again = forward(call, s, threads, threads == 2);
    if (again.results != ran.results || (threads == 2 && again.kept != ran.kept)) return INFINITY;
    if (backward(call, s, threads, cotangent, ran.kept) != d) return INFINITY;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (d[i].empty() || !JUDGED) continue;
    constexpr double h = 1e-5;
    Arrays up = a, down = a;
    double along = 0, terms = 0;
    for (size_t j = 0; j < a[i].size(); ++j) {
      const double v = normal(generator);
      up[i][j] += h * v, down[i][j] -= h * v;
      along += d[i][j] * v, terms += d[i][j] * v * d[i][j] * v;
    }
    const double change = (dot(Machine<double>{s, up}.run(), cotangent) -
                           dot(Machine<double>{s, down}.run(), cotangent)) / (2 * h);
    double scale = 0;  // a gradient that is 0 comes from terms that are not
    for (float v : cotangent) scale += double(v) * v;
    const double error = std::abs(along - change) / (0x1p-12 * std::sqrt(terms) + 0x1p-16 * std::sqrt(scale));
    if (!(error <= 1)) std::printf("array %zu: along %g, change %g\n", i, along, change);
    worst = std::max(worst, std::isnan(error) ? INFINITY : error);
  }
  return worst;
}

}  // namespace

int main() {
  if (!mirasol::isa_granted()) return 77;
  vector<Problem> all{{1, 1, 1, 1, 16, 16, 16, 1, 1, false}, {2, 3, 6, 4, 48, 16, 32, 4, 1, true},
                    {1, 5, 3, 9, 32, 32, 48, 2, 2, false}, {3, 2, 17, 5, 112, 16, 16, 7, 1, true},
                    {1, 2, 40, 33, 96, 64, 32, 4, 2, true}, {5, 4, 2, 16, 32, 16, 64, 2, 3, false}};
  for (int i = 0; i < 12; ++i) {
    const int64_t heads = draw(1, 4);
    all.push_back({draw(1, 3), draw(1, 4), draw(1, 20), draw(1, 12), 16 * heads * draw(1, 2), 16 * draw(1, 3),
                   16 * draw(1, 3), heads, draw(1, 2), bool(draw(0, 1))});
  }
  double worst = 0;
  for (const Problem& s : all) {
    const double used = problem(s);
    if (!(used <= 1))
      std::printf("B %ld T %ld memory %ld read %ld c %ld hidden %ld mlp %ld heads %ld layers %ld tables %d: %g\n",
                  long(s.batch), long(s.steps), long(s.memory), long(s.read), long(s.c), long(s.hidden), long(s.mlp),
                  long(s.heads), long(s.layers), s.tables, used);
    worst = std::max(worst, used);
  }
  std::printf("latent_recurrence: %zu problems, at worst %.2f of the budget\n", all.size(), worst);
  if (mirasol::isa() != mirasol::Isa::base) return worst <= 1 ? EXIT_SUCCESS : EXIT_FAILURE;
  const DeviceReport device = device_body();  // it is the same for every instruction set
  std::printf("body of the CUDA kernel: %zu problems, at worst %.2f of the budget, %d failures\n", device.problems,
              device.worst, device.failures);
  return worst <= 1 && device.failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
