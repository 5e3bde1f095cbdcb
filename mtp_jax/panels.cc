// Tokens times a matrix that is stored in panels, for XLA on CPUs:
//
//   y[m, p J + j] = sum over i of x[m, i] w[p, i, j]
//
// x is [M, I], w [P, I, J], y [M, P J], all float32, and J is kWidth. A panel is read in
// the order in which it lies, and what a tile holds of it are whole vectors of outputs:
// up to eight tokens meet a weight for one reading of it, and no sum goes across lanes.
// Every output is summed up over i in order, whatever M is and whoever does it, so a
// token gives the same bits among others as alone.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

constexpr int kWidth = 32;  // as in panels.py

// Loads and stores of it need no alignment.
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

// Weights are asked for so long before they are read, and not kept in the caches.
constexpr int64_t kAhead = 8 << 10, kLine = 64;  // bytes

// Of w, what one thread takes at once, or one panel.
constexpr int64_t kBlockBytes = 64 << 10;

// Of w, read once for every kMost tokens, what it takes to make it worth waking a thread.
constexpr int64_t kShareBytes = 256 << 10;

struct Product {
  const float* x;
  const float* w;
  float* y;
  int64_t tokens, inputs, panels;
};

// How many vectors of outputs M tokens take at once: half of the registers hold sums.
constexpr int Vectors(int m) {
  int n = kWidth / kLanes;
  while (n > 1 && n * m > kRegisters / 2) n /= 2;
  return n;
}

// Some outputs of M tokens: x, w and y begin where they do.
template <int M>
void Tile(const Product& p, const float* x, const float* w, float* y) {
  constexpr int N = Vectors(M);
  Vector sums[M][N] = {};
  for (int64_t i = 0; i < p.inputs; ++i, w += kWidth) {
    Vector weights[N];
    for (int n = 0; n < N; ++n) {
      weights[n] = *reinterpret_cast<const Vector*>(w + n * kLanes);
    }
    for (int j = 0; j < N * kLanes; j += kLine / 4) {
      __builtin_prefetch(w + j + kAhead / 4, 0, 0);
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[m][n] += weights[n] * x[m * p.inputs + i];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* to = y + m * p.panels * kWidth + n * kLanes;
      *reinterpret_cast<Vector*>(to) = sums[m][n];
    }
  }
}

// A panel's outputs of M tokens.
template <int M>
void Panel(const Product& p, const float* x, const float* w, float* y) {
  for (int j = 0; j < kWidth; j += Vectors(M) * kLanes) Tile<M>(p, x, w + j, y + j);
}

using PanelOf = void (*)(const Product&, const float*, const float*, float*);
constexpr PanelOf kPanelOf[] = {Panel<1>, Panel<2>, Panel<3>, Panel<4>,
                                Panel<5>, Panel<6>, Panel<7>, Panel<8>};
constexpr int64_t kMost = std::size(kPanelOf);  // tokens at once

// Blocks of panels, for whichever thread is free.
struct Work {
  const Product product;
  const int64_t block, blocks;  // panels of one; how many
  std::atomic<int64_t> taken{0}, done{0};

  explicit Work(const Product& p)
      : product(p),
        block(std::max<int64_t>(1, kBlockBytes / (4 * kWidth) / p.inputs)),
        blocks((p.panels + block - 1) / block) {}

  void Do() {
    const Product& p = product;
    for (int64_t now; (now = taken++) < blocks; ++done) {
      const int64_t end = std::min((now + 1) * block, p.panels);
      for (int64_t panel = now * block; panel < end; ++panel) {
        const float* w = p.w + panel * p.inputs * kWidth;
        for (int64_t m = 0; m < p.tokens; m += kMost) {
          const PanelOf run = kPanelOf[std::min(kMost, p.tokens - m) - 1];
          run(p, p.x + m * p.inputs, w, p.y + (m * p.panels + panel) * kWidth);
        }
      }
    }
  }
};

ffi::Error Multiply(ffi::ThreadPool threads, ffi::BufferR2<ffi::F32> x,
                    ffi::BufferR3<ffi::F32> w, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t panels = w.dimensions()[0];
  if (tokens < 1 || inputs < 1 || panels < 1 || w.dimensions()[1] != inputs ||
      w.dimensions()[2] != kWidth || y->dimensions()[0] != tokens ||
      y->dimensions()[1] != panels * kWidth) {
    return ffi::Error::InvalidArgument("x [M, I], w [P, I, J] and y [M, P J]");
  }
  const Product product{x.typed_data(), w.typed_data(), y->typed_data(), tokens, inputs,
                        panels};
  // A thread that comes late finds no block left, so it must own what it looks at.
  const auto work = std::make_shared<Work>(product);
  const int64_t bytes = 4 * kWidth * panels * inputs * ((tokens + kMost - 1) / kMost);
  const int64_t helpers =
      std::min({threads.num_threads(), work->blocks, bytes / kShareBytes}) - 1;
  for (int64_t i = 0; i < helpers; ++i) threads.Schedule([work] { work->Do(); });
  work->Do();
  while (work->done < work->blocks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_panels, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
