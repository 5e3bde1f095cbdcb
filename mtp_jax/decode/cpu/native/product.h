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

// Inputs of a block: up to 8 KB of weights.
constexpr int64_t kBlock = 64;

// Vectors of a panel's outputs, and tokens of a tile: their sums, the weights and an
// input are all in registers.
constexpr int kVectors = kRegisters == 16 ? 3 : 32 / kLanes;
constexpr int kTokens = kRegisters == 16 ? 4 : 16 / kVectors;
static_assert(kTokens * kVectors + kVectors + 1 <= kRegisters);

constexpr int kWidth = kVectors * kLanes;
constexpr int kLine = 16;  // floats of a line of the caches
static_assert(kWidth <= 2 * kLine);  // for each input, two are fetched at most

// Up to which a product is only reading.
constexpr int64_t kFewTokens = 2;

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

// Adds to a panel's outputs of M tokens what a block of inputs gives: x [M, kBlock], w
// and sums [M, kWidth] begin where it does. If it is to fetch, with each input goes a
// request for `step` floats of the next block, from `next` on.
template <int M, bool kFetch>
void Tile(const float* x, const float* w, int64_t inputs, float* sums,
          const float* next, int64_t step) {
  constexpr int N = kVectors;
  Vector own[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) own[m][n] = Load(sums + m * kWidth + n * kLanes);
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < inputs; ++i, w += kWidth, next += step) {
    if (kFetch) __builtin_prefetch(next, 0, 2);
    if (kFetch && step > kLine) __builtin_prefetch(next + kLine, 0, 2);
    Vector weights[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) weights[n] = InRegister(Load(w + n * kLanes));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector x_m = All(x[m * kBlock + i]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) own[m][n] = MultiplyAdd(weights[n], x_m, own[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) Store(sums + m * kWidth + n * kLanes, own[m][n]);
  }
}

using TileOf = void (*)(const float*, const float*, int64_t, float*, const float*,
                        int64_t);
constexpr TileOf kTileOf[][8] = {
    {Tile<1, false>, Tile<2, false>, Tile<3, false>, Tile<4, false>,
     Tile<5, false>, Tile<6, false>, Tile<7, false>, Tile<8, false>},
    {Tile<1, true>, Tile<2, true>, Tile<3, true>, Tile<4, true>,
     Tile<5, true>, Tile<6, true>, Tile<7, true>, Tile<8, true>}};
static_assert(kTokens <= std::size(kTileOf[0]));

// A panel's outputs of all tokens. x is in blocks, [I / kBlock, M, kBlock].
inline void Panel(const Product& p, int64_t panel) {
  const float* w = p.w + panel * p.inputs * kWidth;
  const int64_t tiles = (p.tokens + kTokens - 1) / kTokens;
  // Processors fetch ahead well while they only read. With the arithmetic of more
  // tokens between, the memory would be idle: the first half of the tiles asks for the
  // next block, and the second again, for what was dropped of it. With very many tokens
  // the arithmetic is all that counts, and little is asked for.
  const bool fetch = p.tokens > kFewTokens;
  const int64_t rounds = std::min<int64_t>(tiles, 2), step = rounds * kWidth / tiles;
  static thread_local std::vector<float> sums;
  sums.assign(p.tokens * kWidth, 0);
  for (int64_t i = 0; i < p.inputs; i += kBlock) {
    const int64_t inputs = std::min(kBlock, p.inputs - i);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * kTokens;
      const int64_t ahead = inputs + rounds * tile * kBlock / tiles % kBlock;
      const TileOf run = kTileOf[fetch][std::min<int64_t>(kTokens, p.tokens - m) - 1];
      run(p.x + i * p.tokens + m * kBlock, w + i * kWidth, inputs,
          sums.data() + m * kWidth, w + (i + ahead) * kWidth, step);
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
