// Tokens times a matrix that is stored in panels:
//
//   y[m, p J + j] = sum over i of x[m, i] w[p, i, j]
//
// x is [M, I], w [P, I, J], y [M, P J], and J is kWidth. A panel is read once, in the
// order in which it lies: a block of it stays in the first cache while all tokens meet
// it, some at a time, and their sums wait in y for the next one. What registers hold of
// it are whole vectors of outputs, so no sum goes across lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "lanes.h"
#include "share.h"

constexpr int kWidth = 32;  // as in panels.py

// Inputs of a block: 8 KB of weights.
constexpr int64_t kBlock = 64;

constexpr int64_t kLine = 16;  // floats of a line of the caches
static_assert(kWidth <= 2 * kLine);

// Of w, what one thread takes at once, or one panel.
constexpr int64_t kPartBytes = 64 << 10;

// Of w, what it takes to make it worth waking a thread for up to kManyTokens.
constexpr int64_t kShareBytes = 256 << 10, kManyTokens = 8;

struct Product {
  const float* x;
  const float* w;
  float* y;
  int64_t tokens, inputs, panels;
};

// Vectors of a panel's outputs; tokens whose sums of them take half of the registers.
constexpr int kVectors = kWidth / kLanes, kTokens = kRegisters / 2 / kVectors;

// Adds to a panel's outputs of M tokens what the inputs from `i` to `end` give: x and y
// begin with the first of the tokens. With each input goes a fetch of `step` floats of
// the next block, from `next` on: a part of it with every tile of this one, so that the
// memory is never idle. A block is not kept in the other caches.
template <int M>
void Tile(const Product& p, const float* x, const float* w, int64_t i, int64_t end,
          float* y, const float* next, int64_t step) {
  constexpr int N = kVectors;
  const int64_t stride = p.panels * kWidth;
  Vector sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = Load(y + m * stride + n * kLanes);
  }
#pragma GCC unroll 2
  for (; i < end; ++i, next += step) {
    const float* row = w + i * kWidth;
    __builtin_prefetch(next, 0, 0);
    if (step > kLine) __builtin_prefetch(next + kLine, 0, 0);
    Vector weights[N];
    for (int n = 0; n < N; ++n) weights[n] = Load(row + n * kLanes);
    for (int m = 0; m < M; ++m) {
      const Vector x_m = All(x[m * p.inputs + i]);
      for (int n = 0; n < N; ++n) sums[m][n] = MultiplyAdd(weights[n], x_m, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) Store(y + m * stride + n * kLanes, sums[m][n]);
  }
}

using TileOf = void (*)(const Product&, const float*, const float*, int64_t, int64_t,
                        float*, const float*, int64_t);
constexpr TileOf kTileOf[] = {Tile<1>, Tile<2>, Tile<3>, Tile<4>,
                              Tile<5>, Tile<6>, Tile<7>, Tile<8>};
static_assert(kTokens <= std::size(kTileOf));

inline void Panel(const Product& p, int64_t panel) {
  const float* w = p.w + panel * p.inputs * kWidth;
  float* y = p.y + panel * kWidth;
  const int64_t tiles = (p.tokens + kTokens - 1) / kTokens, step = kWidth / tiles;
  for (int64_t m = 0; m < p.tokens; ++m) {
    std::fill_n(y + m * p.panels * kWidth, kWidth, 0.0f);
  }
  for (int64_t i = 0; i < p.inputs; i += kBlock) {
    const int64_t end = std::min(i + kBlock, p.inputs);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * kTokens;
      const TileOf run = kTileOf[std::min<int64_t>(kTokens, p.tokens - m) - 1];
      const float* next = w + (end + tile * kBlock / tiles) * kWidth;
      run(p, p.x + m * p.inputs, w, i, end, y + m * p.panels * kWidth, next, step);
    }
  }
}

inline void Multiply(xla::ffi::ThreadPool pool, const Product& p) {
  const int64_t bytes = 4 * kWidth * p.inputs;  // of a panel
  const int64_t part = std::max<int64_t>(1, kPartBytes / bytes);
  const int64_t work = bytes * p.panels * ((p.tokens + kManyTokens - 1) / kManyTokens);
  Share(pool, work / kShareBytes, (p.panels + part - 1) / part, [=](int64_t now) {
    const int64_t end = std::min((now + 1) * part, p.panels);
    for (int64_t panel = now * part; panel < end; ++panel) Panel(p, panel);
  });
}
