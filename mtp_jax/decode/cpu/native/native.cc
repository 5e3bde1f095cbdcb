// What of decoding is our own on a CPU, for XLA, all in float32.
//
// A token's results are the same, bit for bit, whatever other tokens there are, and
// whoever computes them: every sum has an order of its own.

#include "attention.h"
#include "product.h"
#include "rms_norm.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

template <size_t N>
using In = ffi::Buffer<ffi::F32, N>;
template <size_t N>
using Out = ffi::Result<In<N>>;
using Shape = ffi::Span<const int64_t>;

bool Is(Shape shape, std::initializer_list<int64_t> expected) {
  return std::equal(shape.begin(), shape.end(), expected.begin(), expected.end());
}

ffi::Error CallProduct(ffi::ThreadPool pool, In<2> x, In<3> w, Out<2> y) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t panels = w.dimensions()[0];
  if (tokens < 1 || inputs < 1 || panels < 1 ||
      !Is(w.dimensions(), {panels, inputs, kWidth}) ||
      !Is(y->dimensions(), {tokens, panels * kWidth})) {
    return ffi::Error::InvalidArgument("x [M, I], w [P, I, J] and y [M, P J]");
  }
  Multiply(pool, {x.typed_data(), w.typed_data(), y->typed_data(), tokens, inputs,
                  panels});
  return ffi::Error::Success();
}

ffi::Error CallNorm(In<2> x, In<1> scale, Out<2> y, float eps) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  if (!Is(scale.dimensions(), {width}) || !Is(y->dimensions(), {tokens, width})) {
    return ffi::Error::InvalidArgument("x and y [M, D], scale [D]");
  }
  Normalize(x.typed_data(), scale.typed_data(), y->typed_data(), tokens, width, eps);
  return ffi::Error::Success();
}

ffi::Error CallAttention(ffi::ThreadPool pool, In<4> q, In<4> k, In<4> v,
                         ffi::BufferR1<ffi::S32> start,
                         ffi::BufferR2<ffi::PRED> ancestors, Out<4> y,
                         int64_t window) {
  const Shape of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t batch = of_q[0], news = of_q[1], heads = of_q[2], width = of_q[3];
  const int64_t groups = of_k[1], slots = of_k[2];
  const bool is_tree = ancestors.element_count() > 0;
  if (groups < 1 || heads % groups || !Is(of_k, {batch, groups, slots, width}) ||
      !Is(v.dimensions(), {batch, groups, slots, width}) ||
      !Is(start.dimensions(), {batch}) ||
      (is_tree && !Is(ancestors.dimensions(), {news, news})) ||
      !Is(y->dimensions(), {batch, news, heads, width})) {
    return ffi::Error::InvalidArgument(
        "q and y [B, W, H, K], k and v [B, G, S, K], start [B], ancestors [W, W] or "
        "nothing");
  }
  Attend(pool, {q.typed_data(), k.typed_data(), v.typed_data(), start.typed_data(),
                is_tree ? reinterpret_cast<const uint8_t*>(ancestors.typed_data())
                        : nullptr,
                y->typed_data(), batch, news, heads, groups, slots, width, window});
  return ffi::Error::Success();
}

}  // namespace

extern "C" const int mtp_jax_width = kWidth;

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_product, CallProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In<2>>()
                                  .Arg<In<3>>()
                                  .Ret<In<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mtp_jax_rms_norm, CallNorm,
    ffi::Ffi::Bind().Arg<In<2>>().Arg<In<1>>().Ret<In<2>>().Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mtp_jax_attention, CallAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In<4>>()
                                  .Arg<In<4>>()
                                  .Arg<In<4>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::PRED>>()
                                  .Ret<In<4>>()
                                  .Attr<int64_t>("window"));
