// Vectors of this processor, and sums in an order of their own.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

// N floats; loads and stores of them need no alignment.
template <int N>
struct Floats {
  typedef float Type __attribute__((vector_size(4 * N), aligned(4), may_alias));
};
using Vector = Floats<kLanes>::Type;

inline Vector Load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline void Store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

// v, for several uses: compilers may otherwise load it anew for each.
inline Vector InRegister(Vector v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

inline Vector All(float x) { return x - Vector{}; }

// a b + c: rounded once where the processor can, and so said, because compilers choose
// between the two by what surrounds a sum. They are told not to (-ffp-contract=off).
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The lanes of v, halves on halves.
template <int N = kLanes>
float Total(typename Floats<N>::Type v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typename Floats<N / 2>::Type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return Total<N / 2>(low + high);
  }
}

// The sum of x[i] y[i]: by lanes, then their total, then what fills no vector.
inline float Dot(const float* x, const float* y, int64_t size) {
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sums = MultiplyAdd(Load(x + i), Load(y + i), sums);
  }
  float total = Total(sums);
  for (; i < size; ++i) total += x[i] * y[i];
  return total;
}
