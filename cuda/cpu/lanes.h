// lanes.h: vectors of the width that the CPU's registers have. GCC keeps a vector that is wider than a register in
// memory, which costs a hot loop an order of magnitude; so the loops that prefill and decode attention spend their time
// in are templates over the width, and each width's instance is compiled for the instruction set that has it. `B` is a
// vector's bytes.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "math.h"
#include "twin.h"

// The instances: FKV_TARGET_64 and FKV_TARGET_32 mark a function of that width, widest_lanes() names the one to call.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FKV_TARGET_64 __attribute__((target("arch=x86-64-v4")))
#define FKV_TARGET_32 __attribute__((target("arch=x86-64-v3")))
#else
#define FKV_TARGET_64
#define FKV_TARGET_32
#endif

namespace fkv {

inline int widest_lanes() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const int bytes = __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
  return bytes;
#else
  return 16;
#endif
}

// Floats, integers and stored halves of one width. (Named one by one: GCC forgets the attribute of a type that depends
// on B.)
template <int B>
struct LaneTypes;
template <>
struct LaneTypes<64> {
  typedef vec F;
  typedef veci I;
  typedef vecu U;
  typedef vech H;
};
template <>
struct LaneTypes<32> {
  typedef vec8 F;
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));
};
template <>
struct LaneTypes<16> {
  typedef vec4 F;
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint16_t H __attribute__((vector_size(8)));
};

template <int B>
struct Lanes : LaneTypes<B> {
  typedef typename LaneTypes<B>::F F;
  static constexpr int n = B / 4;

  static FKV_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static FKV_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
};

// How K and V are stored: `load` reads n values from any address, `load_half` n/2 followed by zeros (the end of a row).
template <int B>
struct RowsF32 {
  typedef float Element;
  static FKV_INLINE typename Lanes<B>::F load(const float* p) { return Lanes<B>::load(p); }
  static FKV_INLINE typename Lanes<B>::F load_half(const float* p) {
    typename Lanes<B>::F v{};
    std::memcpy(&v, p, sizeof v / 2);
    return v;
  }
};
template <int B>
struct RowsBf16 {
  typedef uint16_t Element;
  typedef typename Lanes<B>::H H;
  static FKV_INLINE typename Lanes<B>::F widen(H bits) {
    // The compiler widens sixteen halves by pieces; interleaving them with zeros is one instruction.
    if constexpr (B == 64) {
      return reinterpret_cast<vec>(__builtin_shufflevector(H{}, bits, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                                           7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                                           15, 31));
    } else {
      return reinterpret_cast<typename Lanes<B>::F>(__builtin_convertvector(bits, typename Lanes<B>::U) << 16);
    }
  }
  static FKV_INLINE typename Lanes<B>::F load(const uint16_t* p) {
    H bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static FKV_INLINE typename Lanes<B>::F load_half(const uint16_t* p) {
    H bits{};
    std::memcpy(&bits, p, sizeof bits / 2);
    return widen(bits);
  }
};
template <int B>
struct RowsF16 {
  typedef uint16_t Element;
  typedef typename Lanes<B>::H H;
  typedef typename Lanes<B>::U U;
  typedef typename Lanes<B>::F F;
  static FKV_INLINE F widen(H bits) {  // as widen_f16 of math.h
    const U half = __builtin_convertvector(bits, U);
    const U sign = (half & 0x8000u) << 16, shifted = (half & 0x7fffu) << 13;
    const U normal = shifted + (shifted >= 0x0f800000u ? U{} + 0x70000000u : U{} + 0x38000000u);
    const F subnormal = reinterpret_cast<F>(shifted + 0x38800000u) - 6.103515625e-05f;  // 2^-14
    return reinterpret_cast<F>((shifted < 0x00800000u ? reinterpret_cast<U>(subnormal) : normal) | sign);
  }
  static FKV_INLINE F load(const uint16_t* p) {
    H bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static FKV_INLINE F load_half(const uint16_t* p) {
    H bits{};
    std::memcpy(&bits, p, sizeof bits / 2);
    return widen(bits);
  }
};

// i with the lowest bits of an index below n in reverse.
constexpr int reversed(int i, int n) {
  int out = 0;
  for (; n > 1; n /= 2, i /= 2) out = 2 * out + i % 2;
  return out;
}

// a's and b's lanes in groups of Group: the even groups of both, plus the odd groups of both.
template <int B, int Group, int... K>
FKV_INLINE typename Lanes<B>::F fold(typename Lanes<B>::F a, typename Lanes<B>::F b, std::integer_sequence<int, K...>) {
  const typename Lanes<B>::I even = {K / Group * 2 * Group + K % Group...};
  const typename Lanes<B>::I odd = {K / Group * 2 * Group + K % Group + Group...};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Sums over the lanes of n vectors at once: lane i of the result is the sum of v[reversed(i, n)], in the tree of
// sum_lanes. Each stage folds two vectors into one, so that every addition works on all lanes.
template <int B, int Count = B / 4>
FKV_INLINE typename Lanes<B>::F sum_each(typename Lanes<B>::F* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i)
      v[i] = fold<B, Count / 2>(v[i], v[i + Count / 2], std::make_integer_sequence<int, B / 4>());
    return sum_each<B, Count / 2>(v);
  }
}

// Transposes n × n floats between rows of the given strides.
template <int B, int... K>
FKV_INLINE void transpose_by(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                             std::integer_sequence<int, K...>) {
  typedef Lanes<B> L;
  const typename L::I low = {(K % 2 * L::n + K / 2)...}, high = {(K % 2 * L::n + K / 2 + L::n / 2)...};
  typename L::F a[L::n], b[L::n];
#pragma GCC unroll 16
  for (int i = 0; i < L::n; ++i) a[i] = L::load(from + i * from_stride);
  // Perfect shuffles: each interleaves row i with row i + n/2, and log2(n) of them send element (i, j) to (j, i).
#pragma GCC unroll 4
  for (int width = 1; width < L::n; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L::n / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + L::n / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + L::n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L::n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L::n; ++i) L::store(to + i * to_stride, a[i]);
}
template <int B>
FKV_INLINE void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  transpose_by<B>(to, to_stride, from, from_stride, std::make_integer_sequence<int, B / 4>());
}

}  // namespace fkv
