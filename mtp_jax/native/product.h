// Tokens times a matrix that is stored in panels:
//
//   y[m, p J + j] = sum over i of x[m, i] w[p, i, j]
//
// x is [M, I], w [P, I, J], y [M, P J], and J is kWidth. A panel is read in the order in
// which it lies, and what a tile holds of it are whole vectors of outputs: up to eight
// tokens meet a weight for one reading of it, and no sum goes across lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "lanes.h"
#include "share.h"

constexpr int kWidth = 32;  // as in panels.py

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
    for (int n = 0; n < N; ++n) weights[n] = Load(w + n * kLanes);
    for (int j = 0; j < N * kLanes; j += kLine / 4) {
      __builtin_prefetch(w + j + kAhead / 4, 0, 0);
    }
    for (int m = 0; m < M; ++m) {
      const Vector x_m = All(x[m * p.inputs + i]);
      for (int n = 0; n < N; ++n) sums[m][n] = MultiplyAdd(weights[n], x_m, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      Store(y + m * p.panels * kWidth + n * kLanes, sums[m][n]);
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

inline void Multiply(xla::ffi::ThreadPool pool, const Product& p) {
  const int64_t block =
      std::max<int64_t>(1, kBlockBytes / (4 * kWidth) / p.inputs);  // panels
  const int64_t bytes = 4 * kWidth * p.panels * p.inputs * ((p.tokens + kMost - 1) / kMost);
  Share(pool, bytes / kShareBytes, (p.panels + block - 1) / block, [=](int64_t now) {
    const int64_t end = std::min((now + 1) * block, p.panels);
    for (int64_t panel = now * block; panel < end; ++panel) {
      const float* w = p.w + panel * p.inputs * kWidth;
      for (int64_t m = 0; m < p.tokens; m += kMost) {
        const PanelOf run = kPanelOf[std::min(kMost, p.tokens - m) - 1];
        run(p, p.x + m * p.inputs, w, p.y + (m * p.panels + panel) * kWidth);
      }
    }
  });
}
