// The kernels over several shapes, for a sanitizer to watch: each with one thread and
// with four, which must give the same bits. Arrays are as large as they have to be, so
// that the first float beyond one is beyond its memory.
//
// An argument plants an error instead, which the sanitizer must find:
// out_of_bounds, misaligned, race.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "product.h"
#include "rms_norm.h"

namespace {

using Numbers = std::vector<float>;

std::mt19937 generator(0);

Numbers Draw(int64_t size) {
  std::normal_distribution<float> normal;
  Numbers numbers(size);
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

// Calls kernel(pool, y) with both pools; says whether both gave the same bits.
template <typename Kernel>
bool IsSame(const char* name, int64_t size, bool must_share, Kernel kernel) {
  static xla::ffi::Threads one(1), four(4);
  const int64_t before = four.scheduled;
  Numbers alone(size), together(size);
  kernel(xla::ffi::ThreadPool(one), alone.data());
  for (int repetition = 0; repetition < 3; ++repetition) {
    kernel(xla::ffi::ThreadPool(four), together.data());
    if (std::memcmp(alone.data(), together.data(), size * sizeof(float))) {
      std::printf("%s: other bits with four threads\n", name);
      return false;
    }
  }
  if (must_share && four.scheduled == before) {
    std::printf("%s: no thread was asked for help\n", name);
    return false;
  }
  return true;
}

bool Product(int64_t tokens, int64_t inputs, int64_t panels, bool must_share) {
  const Numbers x = Draw(tokens * inputs), w = Draw(panels * inputs * kWidth);
  return IsSame("product", tokens * panels * kWidth, must_share,
                [&](xla::ffi::ThreadPool pool, float* y) {
                  Multiply(pool, {x.data(), w.data(), y, tokens, inputs, panels});
                });
}

bool Norm(int64_t tokens, int64_t width) {
  const Numbers x = Draw(tokens * width), scale = Draw(width);
  return IsSame("norm", tokens * width, false, [&](xla::ffi::ThreadPool, float* y) {
    Normalize(x.data(), scale.data(), y, tokens, width, 1e-5f);
  });
}

bool Read(int64_t batch, int64_t news, int64_t heads, int64_t groups, int64_t slots,
          int64_t width, bool is_tree, bool must_share) {
  const Numbers q = Draw(batch * news * heads * width);
  const Numbers k = Draw(batch * groups * slots * width);
  const Numbers v = Draw(batch * groups * slots * width);
  std::vector<int32_t> start(batch);
  // The last row is at the end of the cache: some of its tokens are beyond it.
  for (int64_t b = 0; b < batch; ++b) start[b] = (slots - 1) * (b + 1) / batch;
  std::vector<uint8_t> ancestors(news * news);
  for (int64_t w = 0; w < news; ++w) {
    for (int64_t u = 0; u <= w; ++u) ancestors[w * news + u] = u == w || u % 2 == 0;
  }
  return IsSame("attention", q.size(), must_share,
                [&](xla::ffi::ThreadPool pool, float* y) {
                  Attend(pool, {q.data(), k.data(), v.data(), start.data(),
                                is_tree ? ancestors.data() : nullptr, y, batch, news,
                                heads, groups, slots, width});
                });
}

bool RunAll() {
  bool is_same = true;
  for (int64_t tokens : {1, 2, 3, 5, 8, 37}) {
    is_same &= Product(tokens, 1, 1, false);
    is_same &= Product(tokens, 47, 3, false);
    is_same &= Product(tokens, 320, 40, true);
    is_same &= Product(tokens, 1000, 24, true);
  }
  for (int64_t width : {1, 16, 48, 75}) {
    is_same &= Norm(1, width) && Norm(5, width);
  }
  for (bool is_tree : {false, true}) {
    is_same &= Read(1, 1, 1, 1, 1, 1, is_tree, false);
    is_same &= Read(2, 3, 4, 2, 40, 12, is_tree, false);
    is_same &= Read(1, 8, 2, 1, 600, 128, is_tree, true);
    is_same &= Read(3, 17, 16, 16, 100, 64, is_tree, true);
    is_same &= Read(2, 6, 6, 2, 33, 20, is_tree, false);
    is_same &= Read(1, 4, 5, 1, 70, 96, is_tree, false);
  }
  return is_same;
}

bool Plant(const std::string& error) {
  if (error == "out_of_bounds") {
    const Numbers x = Draw(3 * 50 - 1), w = Draw(50 * kWidth);
    Numbers y(3 * kWidth);
    xla::ffi::Threads threads(1);
    Multiply(xla::ffi::ThreadPool(threads), {x.data(), w.data(), y.data(), 3, 50, 1});
  } else if (error == "misaligned") {
    const Numbers x = Draw(3);
    const char* bytes = reinterpret_cast<const char*>(x.data()) + 1;
    std::printf("%f\n", Dot(reinterpret_cast<const float*>(bytes), x.data(), 2));
  } else if (error == "race") {
    xla::ffi::Threads threads(4);
    int64_t total = 0;
    for (int repetition = 0; repetition < 100; ++repetition) {
      Share(xla::ffi::ThreadPool(threads), 4, 1000, [&](int64_t i) { total += i; });
    }
    std::printf("%ld\n", static_cast<long>(total));
  } else {
    std::printf("no error of that name: %s\n", error.c_str());
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_well = argc > 1 ? Plant(argv[1]) : RunAll();
  if (is_well) std::printf("done\n");
  return is_well ? 0 : 1;
}
