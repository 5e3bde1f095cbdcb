// Tokens times a matrix that is stored in panels:
//
//   y[m, p J + j] = sum over i of x[m, i] w[p, i, j]
//
// x is [M, I], w [P, I, J], y [M, P J], and J is kWidth. A panel is read once, in the
// order in which it lies: a block of it stays in the first cache while all tokens meet
// it, some at a time, and their sums wait for the next one. What registers hold of it
// are whole vectors of outputs, so no sum goes across lanes. x is copied into blocks,
// too: as it lies, the same inputs of all tokens could fall on few lines of the cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "lanes.h"
#include "share.h"

constexpr int kWidth = 32;  // as in panels.py

// Inputs of a block: 8 KB of weights.
constexpr int64_t kBlock = 64;

constexpr int kLine = 16;  // floats of a line of the caches
static_assert(kWidth <= 2 * kLine);  // a line for each input is enough for two tiles

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

// Adds to a panel's outputs of M tokens what a block of inputs gives: x [M, kBlock], w
// and sums [M, kWidth] begin where it does. With each input goes a fetch of `step`
// floats of the next block, from `next` on: a part of it with every tile of this one, so
// that the memory is never idle. A block of one tile only is not kept in the caches.
template <int M>
void Tile(const float* x, const float* w, int64_t inputs, float* sums,
          const float* next, int64_t step) {
  constexpr int N = kVectors;
  Vector own[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) own[m][n] = Load(sums + m * kWidth + n * kLanes);
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < inputs; ++i, w += kWidth, next += step) {
    if (step == kWidth) {
      for (int j = 0; j < kWidth; j += kLine) __builtin_prefetch(next + j, 0, 0);
    } else {
      __builtin_prefetch(next, 0, 2);
    }
    Vector weights[N];
    for (int n = 0; n < N; ++n) weights[n] = Load(w + n * kLanes);
    for (int m = 0; m < M; ++m) {
      const Vector x_m = All(x[m * kBlock + i]);
      for (int n = 0; n < N; ++n) own[m][n] = MultiplyAdd(weights[n], x_m, own[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) Store(sums + m * kWidth + n * kLanes, own[m][n]);
  }
}

using TileOf = void (*)(const float*, const float*, int64_t, float*, const float*,
                        int64_t);
constexpr TileOf kTileOf[] = {Tile<1>, Tile<2>, Tile<3>, Tile<4>,
                              Tile<5>, Tile<6>, Tile<7>, Tile<8>};
static_assert(kTokens <= std::size(kTileOf));

// A panel's outputs of all tokens. x is in blocks, [I / kBlock, M, kBlock].
inline void Panel(const Product& p, int64_t panel) {
  const float* w = p.w + panel * p.inputs * kWidth;
  const int64_t tiles = (p.tokens + kTokens - 1) / kTokens, step = kWidth / tiles;
  static thread_local std::vector<float> sums;
  sums.assign(p.tokens * kWidth, 0);
  for (int64_t i = 0; i < p.inputs; i += kBlock) {
    const int64_t inputs = std::min(kBlock, p.inputs - i);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * kTokens;
      const TileOf run = kTileOf[std::min<int64_t>(kTokens, p.tokens - m) - 1];
      const float* next = w + (i + inputs + tile * kBlock / tiles) * kWidth;
      run(p.x + i * p.tokens + m * kBlock, w + i * kWidth, inputs,
          sums.data() + m * kWidth, next, step);
    }
  }
  for (int64_t m = 0; m < p.tokens; ++m) {
    float* y = p.y + (m * p.panels + panel) * kWidth;
    std::copy_n(sums.data() + m * kWidth, kWidth, y);
  }
}

inline void Multiply(xla::ffi::ThreadPool pool, Product p) {
  static thread_local std::vector<float> blocks;  // x as Panel takes it
  if (p.tokens > 1) {
    blocks.resize((p.inputs + kBlock - 1) / kBlock * kBlock * p.tokens);
    for (int64_t i = 0; i < p.inputs; i += kBlock) {
      for (int64_t m = 0; m < p.tokens; ++m) {
        std::copy_n(p.x + m * p.inputs + i, std::min(kBlock, p.inputs - i),
                    blocks.data() + i * p.tokens + m * kBlock);
      }
    }
    p.x = blocks.data();
  }
  const int64_t bytes = 4 * kWidth * p.inputs;  // of a panel
  const int64_t part = std::max<int64_t>(1, kPartBytes / bytes);
  const int64_t work = bytes * p.panels * ((p.tokens + kManyTokens - 1) / kManyTokens);
  Share(pool, work / kShareBytes, (p.panels + part - 1) / part, [=](int64_t now) {
    const int64_t end = std::min((now + 1) * part, p.panels);
    for (int64_t panel = now * part; panel < end; ++panel) Panel(p, panel);
  });
}
