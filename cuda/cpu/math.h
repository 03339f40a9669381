// math.h: the sixteen-lane arithmetic that the twin's hot loops share: loads and stores of every storage type, the sum
// over lanes in one fixed tree, exp. All of it is inline, so that each FKV_VECTOR clone compiles it for its own
// instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "twin.h"

namespace fkv {

constexpr int64_t kLanes = 16;
typedef int32_t veci __attribute__((vector_size(64)));
typedef uint32_t vecu __attribute__((vector_size(64)));
typedef uint16_t vech __attribute__((vector_size(32)));

// n rounded up to whole vectors.
FKV_INLINE int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

FKV_INLINE vec vec_of(float value) { return value - vec{}; }
FKV_INLINE vec vec_from_bits(vecu bits) { return reinterpret_cast<vec>(bits); }

// Widen one vector of stored values exactly. Zeros, subnormals, infinities and NaN come out as the scalar conversions
// of twin.h give them; no f32 subnormal is ever an operand, which would cost an assist.
FKV_INLINE vec widen_bf16(vech bits) { return vec_from_bits(__builtin_convertvector(bits, vecu) << 16); }
FKV_INLINE vec widen_f16(vech bits) {
  const vecu half = __builtin_convertvector(bits, vecu);
  const vecu sign = (half & 0x8000u) << 16, shifted = (half & 0x7fffu) << 13;
  const vecu normal = shifted + (shifted >= 0x0f800000u ? vecu{} + 0x70000000u : vecu{} + 0x38000000u);
  const vec subnormal = vec_from_bits(shifted + 0x38800000u) - 6.103515625e-05f;  // 2^-14
  return vec_from_bits((shifted < 0x00800000u ? reinterpret_cast<vecu>(subnormal) : normal) | sign);
}

// How a storage type is read: sixteen values from any address, or the last n < 16 of a row followed by zeros.
struct StoredF32 {
  typedef float Element;
  static FKV_INLINE vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static FKV_INLINE vec load_tail(const float* p, int64_t n) {
    vec v{};
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof *p);
    return v;
  }
};
struct StoredBf16 {
  typedef uint16_t Element;
  static FKV_INLINE vec load(const uint16_t* p) {
    vech bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen_bf16(bits);
  }
  static FKV_INLINE vec load_tail(const uint16_t* p, int64_t n) {
    vech bits{};
    std::memcpy(&bits, p, static_cast<size_t>(n) * sizeof *p);
    return widen_bf16(bits);
  }
};
struct StoredF16 {
  typedef uint16_t Element;
  static FKV_INLINE vec load(const uint16_t* p) {
    vech bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen_f16(bits);
  }
  static FKV_INLINE vec load_tail(const uint16_t* p, int64_t n) {
    vech bits{};
    std::memcpy(&bits, p, static_cast<size_t>(n) * sizeof *p);
    return widen_f16(bits);
  }
};

// Sixteen values of `dtype` from element i on, where the type is only known at run time; i + 15 must exist.
FKV_INLINE vec load_vec(const void* p, int64_t i, int32_t dtype) {
  if (dtype == FKV_F32) return StoredF32::load(static_cast<const float*>(p) + i);
  const uint16_t* half = static_cast<const uint16_t*>(p) + i;
  return dtype == FKV_BF16 ? StoredBf16::load(half) : StoredF16::load(half);
}
// The same for the last n < 16 values of a row; the other lanes are zero and no byte past the row is read.
FKV_INLINE vec load_vec_tail(const void* p, int64_t i, int32_t dtype, int64_t n) {
  if (dtype == FKV_F32) return StoredF32::load_tail(static_cast<const float*>(p) + i, n);
  const uint16_t* half = static_cast<const uint16_t*>(p) + i;
  return dtype == FKV_BF16 ? StoredBf16::load_tail(half, n) : StoredF16::load_tail(half, n);
}
FKV_INLINE void store_vec(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
FKV_INLINE void store_vec_tail(float* p, vec v, int64_t n) { std::memcpy(p, &v, static_cast<size_t>(n) * sizeof *p); }
// Rounded to `dtype` as twin.h's scalar stores round.
FKV_INLINE void store_vec(void* p, int64_t i, int32_t dtype, vec v) {
  if (dtype == FKV_F32) return store_vec(static_cast<float*>(p) + i, v);
  uint16_t* half = static_cast<uint16_t*>(p) + i;
  if (dtype == FKV_BF16) {
    const vecu u = reinterpret_cast<vecu>(v);
    const vecu rounded = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vech bits = __builtin_convertvector(rounded, vech);
    std::memcpy(half, &bits, sizeof bits);
  } else {
    for (int64_t j = 0; j < kLanes; ++j) half[j] = f32_to_f16(v[j]);
  }
}

// Halves and quarters of a vector: the registers of narrower CPUs.
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

// Sum over the lanes, always in this tree: j and j + 8, then j + 4, j + 2, j + 1 (of a narrower vector, its last
// levels).
FKV_INLINE float sum_lanes(vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FKV_INLINE float sum_lanes(vec8 v) {
  vec4 half[2];
  std::memcpy(half, &v, sizeof v);
  return sum_lanes(half[0] + half[1]);
}
FKV_INLINE float sum_lanes(vec v) {
  vec8 half[2];
  std::memcpy(half, &v, sizeof v);
  return sum_lanes(half[0] + half[1]);
}
// Largest lane; which one where lanes hold NaN is not defined.
FKV_INLINE float max_lanes(vec4 v) {
  const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
  return even > odd ? even : odd;
}
FKV_INLINE float max_lanes(vec8 v) {
  vec4 half[2];
  std::memcpy(half, &v, sizeof v);
  return max_lanes(half[0] > half[1] ? half[0] : half[1]);
}
FKV_INLINE float max_lanes(vec v) {
  vec8 half[2];
  std::memcpy(half, &v, sizeof v);
  return max_lanes(half[0] > half[1] ? half[0] : half[1]);
}

// e^x to within 1 ulp; −inf gives 0, +inf and anything above 88.73 gives +inf, NaN stays NaN, small results are
// subnormal. x = n·ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor series up to r^7 (remainder 5e-9 of the result),
// then two exact multiplications by powers of two, because 2^n itself may lie outside the normal numbers.
template <class F>
FKV_INLINE F exp_lanes(F x) {
  typedef decltype(x < x) Whole;  // int32 lanes
  x = x < -104.0f ? F{} - 104.0f : x;
  x = x > 89.0f ? F{} + 89.0f : x;
  const float rounder = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer and leaves that in the low bits
  const F shifted = x * 1.44269504088896341f + rounder;
  const F n = shifted - rounder;
  F r = x - n * 0.693145751953125f;  // ln 2 in two parts, the first short enough for n times it to be exact
  r = r - n * 1.42860682030941723e-06f;
  F p = F{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Whole whole = reinterpret_cast<Whole>(shifted) - 0x4b400000;
  const Whole half = whole >> 1;
  return p * reinterpret_cast<F>((half + 127) << 23) * reinterpret_cast<F>((whole - half + 127) << 23);
}
FKV_INLINE vec exp_vec(vec x) { return exp_lanes(x); }

// RMSNorm of n values: out = x·(1/√(mean(x²) + eps))·weight; out may be x. Squares are summed per lane, then in the
// lane tree.
FKV_INLINE void rms_norm(float* out, const float* x, const void* weight, int32_t dtype, int64_t n, float eps) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  vec squares{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vec v = StoredF32::load(x + i);
    squares += v * v;
  }
  if (rest > 0) {
    const vec v = StoredF32::load_tail(x + whole, rest);
    squares += v * v;
  }
  const float factor = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += kLanes)
    store_vec(out + i, StoredF32::load(x + i) * factor * load_vec(weight, i, dtype));
  if (rest > 0)
    store_vec_tail(out + whole,
                   StoredF32::load_tail(x + whole, rest) * factor * load_vec_tail(weight, whole, dtype, rest), rest);
}

}  // namespace fkv
