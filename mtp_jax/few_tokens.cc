// A few tokens times a matrix, for XLA on CPUs:
//
//   y[m, o] = sum over i of x[m, i] w[o, i]
//
// x is [M, I], w [O, I], y [M, O], all float32, M at most 8. Reading w is what this
// should cost, so a weight is read once, into a register, and meets all tokens there,
// while the rows that come next are asked for. The tokens should fit in a first-level
// cache, as they do up to a thousand inputs.

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

// Loads and stores of it need no alignment.
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

// Of w, what one thread takes at once: this many rows, or more if they are short.
constexpr int64_t kBlockRows = 64, kBlockBytes = 64 << 10;

struct Product {
  const float* x;
  const float* w;
  float* y;
  int64_t outputs, inputs;
};

// R outputs of M tokens.
template <int M, int R>
void Tile(const Product& p, int64_t o) {
  const float* rows = p.w + o * p.inputs;
  const float* next = rows + R * p.inputs;  // the next R rows, in one stream
  Vector sums[R][M] = {};
  int64_t i = 0;
  for (; i + kLanes <= p.inputs; i += kLanes) {
    Vector x[M];
    for (int m = 0; m < M; ++m) {
      x[m] = *reinterpret_cast<const Vector*>(p.x + m * p.inputs + i);
    }
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next + i * R + r * kLanes);
      const Vector w = *reinterpret_cast<const Vector*>(rows + r * p.inputs + i);
      for (int m = 0; m < M; ++m) sums[r][m] += w * x[m];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[r][m][lane];
      for (int64_t j = i; j < p.inputs; ++j) {
        sum += rows[r * p.inputs + j] * p.x[m * p.inputs + j];
      }
      p.y[m * p.outputs + o + r] = sum;
    }
  }
}

// The outputs [begin, end) of M tokens.
template <int M>
void Rows(const Product& p, int64_t begin, int64_t end) {
  // Half of the registers hold sums.
  constexpr int R = kRegisters / (M <= 4 ? 8 : 16);
  int64_t o = begin;
  for (; o + R <= end; o += R) Tile<M, R>(p, o);
  for (; o < end; ++o) Tile<M, 1>(p, o);
}

using RowsOf = void (*)(const Product&, int64_t, int64_t);
constexpr RowsOf kRowsOf[] = {Rows<1>, Rows<2>, Rows<3>, Rows<4>,
                              Rows<5>, Rows<6>, Rows<7>, Rows<8>};
constexpr int64_t kMostTokens = std::size(kRowsOf);

// Blocks of rows, for whichever thread is free.
struct Work {
  const Product product;
  const RowsOf rows;
  const int64_t block_rows, blocks;
  std::atomic<int64_t> taken{0}, done{0};

  Work(const Product& p, RowsOf rows)
      : product(p),
        rows(rows),
        block_rows(std::max(kBlockRows, kBlockBytes / 4 / p.inputs)),
        blocks((p.outputs + block_rows - 1) / block_rows) {}

  void Do() {
    for (int64_t block; (block = taken++) < blocks; ++done) {
      const int64_t begin = block * block_rows;
      rows(product, begin, std::min(begin + block_rows, product.outputs));
    }
  }
};

ffi::Error FewTokens(ffi::ThreadPool threads, ffi::BufferR2<ffi::F32> x,
                     ffi::BufferR2<ffi::F32> w, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t tokens = x.dimensions()[0];
  const int64_t inputs = x.dimensions()[1], outputs = w.dimensions()[0];
  if (tokens < 1 || tokens > kMostTokens || inputs < 1 || w.dimensions()[1] != inputs ||
      y->dimensions()[0] != tokens || y->dimensions()[1] != outputs) {
    return ffi::Error::InvalidArgument("x [M, I], w [O, I] and y [M, O], M at most 8");
  }
  const Product product{x.typed_data(), w.typed_data(), y->typed_data(), outputs,
                        inputs};
  // A thread that comes late finds no block left, so it must own what it looks at.
  const auto work = std::make_shared<Work>(product, kRowsOf[tokens - 1]);
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), work->blocks) - 1;
  for (int64_t i = 0; i < helpers; ++i) threads.Schedule([work] { work->Do(); });
  work->Do();
  while (work->done < work->blocks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_few_tokens, FewTokens,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
