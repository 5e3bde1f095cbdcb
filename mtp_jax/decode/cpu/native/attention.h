// New tokens read the cache, and of themselves those that they come after:
//
//   y[b, w, h] = sum over s of p[s] v[b, g, s],   g = h / (H / G)
//   p = softmax over s of q[b, w, h] . k[b, g, s] / sqrt(K)
//
// q and y are [B, W, H, K], k and v [B, G, S, K]. The w-th new token is in slot
// start[b] + w. It sees the slots before start[b] and its ancestors, itself among them:
// ancestors is [W, W]; without it the new tokens are a chain.
//
// With a window it sees of these only the last so many. What comes before them weighs
// nothing, which changes no sum, and where no query of a tile sees it, it is not read.
//
// What is seen is numbered from 0 on, without gaps, and all sums depend on these
// numbers only. A node of a tree has as many ancestors as a chain has tokens before it,
// so it gives what it would in a chain.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "share.h"

struct Attention {
  const float* q;
  const float* k;
  const float* v;
  const int32_t* start;
  const uint8_t* ancestors;  // or null
  float* y;
  int64_t batch, news, heads, groups, slots, width;
  int64_t window;  // positions that a token sees at most, itself the last; 0: all
};

// Queries of a group that are taken together, so that they meet a key for one reading.
constexpr int kQueries = 4;

// Products of a number with a number that make it worth waking a thread.
constexpr int64_t kShareProducts = 256 << 10;

// e^x for x <= 0, 0 below e^-87: 2^n times a polynomial in x - n log 2, by Cody and
// Waite with the coefficients of Cephes' expf; within 2 units in the last place.
inline Vector Exp(Vector x) {
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
  const Ints is_zero = x < -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: adding it leaves whole numbers
  const Vector shifted = MultiplyAdd(x, All(1.44269504f), All(kRound));
  const Vector n = shifted - kRound;
  const Vector high = MultiplyAdd(n, All(-0.693359375f), x);
  const Vector r = MultiplyAdd(n, All(2.12194440e-4f), high);
  Vector p = All(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                            1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) {
    p = MultiplyAdd(p, r, All(coefficient));
  }
  // n is in the lowest bits of `shifted`; it goes to the exponent.
  return (Vector)(((Ints)p + ((Ints)shifted << 23)) & ~is_zero);
}

// Scores of `count` keys, from k on, by M queries; a row of `scores` for each of them.
template <int M>
void Score(const Attention& a, const float* q, const float* k, int64_t count,
           float* scores, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, k += a.width) {
    for (int m = 0; m < M; ++m) {
      scores[m * stride + i] = Dot(q + m * a.width, k, a.width);
    }
  }
}

// Adds `count` values, from v on, by their weights, to what M queries read.
template <int M>
void Gather(const Attention& a, const float* weights, int64_t stride, const float* v,
            int64_t count, float* read) {
  constexpr int N = std::min(8, kRegisters / 2 / M);
  const auto some = [&](auto vectors, int64_t d) {
    constexpr int n_vectors = decltype(vectors)::value;
    Vector sums[M][n_vectors];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < n_vectors; ++n) {
        sums[m][n] = Load(read + m * a.width + d + n * kLanes);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int n = 0; n < n_vectors; ++n) {
        const Vector value = Load(v + i * a.width + d + n * kLanes);
        for (int m = 0; m < M; ++m) {
          sums[m][n] = MultiplyAdd(value, All(weights[m * stride + i]), sums[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < n_vectors; ++n) {
        Store(read + m * a.width + d + n * kLanes, sums[m][n]);
      }
    }
  };
  int64_t d = 0;
  for (; d + N * kLanes <= a.width; d += N * kLanes) {
    some(std::integral_constant<int, N>(), d);
  }
  for (; d + kLanes <= a.width; d += kLanes) some(std::integral_constant<int, 1>(), d);
  for (int m = 0; m < M; ++m) {
    for (int64_t e = d; e < a.width; ++e) {
      float sum = read[m * a.width + e];
      for (int64_t i = 0; i < count; ++i) {
        sum += v[i * a.width + e] * weights[m * stride + i];
      }
      read[m * a.width + e] = sum;
    }
  }
}

// The slots that a new token sees after those that its tile shares.
template <typename Each>
void EachOwn(const Attention& a, int64_t w, int64_t start, int64_t shared, Each each) {
  const int64_t end = std::min(start + (a.ancestors ? a.news : w + 1), a.slots);
  for (int64_t s = shared; s < end; ++s) {
    if (!a.ancestors || a.ancestors[w * a.news + s - start]) each(s);
  }
}

// The number of slots that new token w sees, but for a window.
inline int64_t Seen(const Attention& a, int64_t w, int64_t start) {
  if (!a.ancestors) return start + w + 1;
  return start + std::count(a.ancestors + w * a.news, a.ancestors + (w + 1) * a.news, 1);
}

// What M queries of a group read: those from `row` on, of W H / G, by new tokens.
template <int M>
void Queries(const Attention& a, int64_t b, int64_t g, int64_t row) {
  const int64_t per_group = a.heads / a.groups, start = std::max(a.start[b], 0);
  const int64_t shared =
      std::min(a.ancestors ? start : start + row / per_group + 1, a.slots);
  const int64_t most = std::min(start + a.news, a.slots);
  const int64_t stride = (most + kLanes - 1) / kLanes * kLanes;
  static thread_local std::vector<float> room;
  room.resize(M * (2 * a.width + stride));
  float *q = room.data(), *read = q + M * a.width, *scores = read + M * a.width;
  const float* k = a.k + (b * a.groups + g) * a.slots * a.width;
  const float* v = a.v + (b * a.groups + g) * a.slots * a.width;
  const auto offset = [&](int m) {
    const int64_t w = (row + m) / per_group, h = g * per_group + (row + m) % per_group;
    return ((b * a.news + w) * a.heads + h) * a.width;
  };

  // What each of them sees first, and the first of that.
  int64_t firsts[M] = {}, first = 0;
  if (a.window) {
    first = shared;
    for (int m = 0; m < M; ++m) {
      const int64_t seen = Seen(a, (row + m) / per_group, start);
      firsts[m] = std::clamp<int64_t>(seen - a.window, 0, stride);
      first = std::min(first, firsts[m]);
    }
  }

  const float scale = 1 / std::sqrt(static_cast<float>(a.width));
  for (int m = 0; m < M; ++m) {
    for (int64_t d = 0; d < a.width; ++d) {
      q[m * a.width + d] = a.q[offset(m) + d] * scale;
      read[m * a.width + d] = 0;
    }
  }
  Score<M>(a, q, k + first * a.width, shared - first, scores + first, stride);
  float totals[M];
  for (int m = 0; m < M; ++m) {
    float* own = scores + m * stride;
    int64_t seen = shared;
    EachOwn(a, (row + m) / per_group, start, shared, [&](int64_t s) {
      Score<1>(a, q + m * a.width, k + s * a.width, 1, own + seen++, 0);
    });
    const float lowest = -std::numeric_limits<float>::infinity();
    std::fill(own + seen, own + stride, lowest);
    std::fill(own, own + firsts[m], lowest);
    Vector tops = lowest - Vector{};
    for (int64_t i = 0; i < stride; i += kLanes) {
      tops = Load(own + i) > tops ? Load(own + i) : tops;
    }
    float top = lowest;
    for (int j = 0; j < kLanes; ++j) top = std::max(top, tops[j]);
    Vector sums = {};
    for (int64_t i = 0; i < stride; i += kLanes) {
      const Vector weights = Exp(Load(own + i) - top);
      Store(own + i, weights);
      sums += weights;
    }
    totals[m] = Total(sums);
  }
  Gather<M>(a, scores + first, stride, v + first * a.width, shared - first, read);
  for (int m = 0; m < M; ++m) {
    const float* weight = scores + m * stride + shared;
    EachOwn(a, (row + m) / per_group, start, shared, [&](int64_t s) {
      Gather<1>(a, weight++, 0, v + s * a.width, 1, read + m * a.width);
    });
    for (int64_t d = 0; d < a.width; ++d) {
      a.y[offset(m) + d] = read[m * a.width + d] / totals[m];
    }
  }
}

inline void Attend(xla::ffi::ThreadPool pool, const Attention& a) {
  using QueriesOf = void (*)(const Attention&, int64_t, int64_t, int64_t);
  constexpr QueriesOf kQueriesOf[] = {Queries<1>, Queries<2>, Queries<3>, Queries<4>};
  static_assert(std::size(kQueriesOf) == kQueries);
  const int64_t rows = a.news * (a.heads / a.groups);
  const int64_t tiles = (rows + kQueries - 1) / kQueries;
  int64_t products = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    products += 2 * a.heads * a.news * (a.start[b] + a.news) * a.width;
  }
  // Groups first: while there are enough, no two threads read the same keys at once.
  const int64_t groups = a.batch * a.groups;
  Share(pool, products / kShareProducts, groups * tiles, [=](int64_t now) {
    const int64_t row = now / groups * kQueries, bg = now % groups;
    const QueriesOf run = kQueriesOf[std::min<int64_t>(kQueries, rows - row) - 1];
    run(a, bg / a.groups, bg % a.groups, row);
  });
}
