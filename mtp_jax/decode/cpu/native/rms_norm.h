// Root-mean-square norm of M tokens (arXiv:1910.07467, equation 4):
//
//   y[m, d] = x[m, d] / sqrt(mean over d of x[m, d]^2 + eps) * scale[d]

#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

inline void Normalize(const float* x, const float* scale, float* y, int64_t tokens,
                      int64_t width, float eps) {
  for (int64_t m = 0; m < tokens; ++m, x += width, y += width) {
    const float mean_square = Dot(x, x, width) / width;
    const float inverse = 1 / std::sqrt(mean_square + eps);
    for (int64_t d = 0; d < width; ++d) y[d] = x[d] * inverse * scale[d];
  }
}
