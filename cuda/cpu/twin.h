// twin.h: what the twin's files share. The twin runs the ABI of freekv.h on a CPU with the semantics of a GPU: streams are threads,
// work is deferred, device memory is a place of its own, and what CUDA refuses is refused.
//
// With a schedule seed nothing runs until the host blocks or asks (…_sync, fkv_event_query): then one operation at a time runs, picked
// among the streams' ready heads by a seeded generator that also starves streams, so that a missing wait shows as a wrong value.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

#include "../checks.h"
#include "../frames.h"
#include "../freekv.h"

namespace fkv {

// What running work may use.
class Context {
 public:
  virtual ~Context() = default;
  // Calls body(begin, end) over disjoint ranges that cover 0..n, on several threads; returns when all are done. The split depends on
  // timing, so body's results must not. `grain`: the least worth handing out.
  virtual void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) = 0;
  // Waits until the simulated link has moved `bytes` (one direction at a time shares the rate; the two directions are independent).
  virtual void link(uint64_t bytes, bool to_device) = 0;
  virtual uint64_t clock_ns() const = 0;
};
using Work = std::function<void(Context&)>;

// Defers `work` on the stream, or records it as a graph node while the stream captures. `name` appears in errors. `work` must own copies
// of all parameters; an exception it throws makes the device fail.
int32_t launch(fkv_stream* stream, const char* name, Work work);

// Marks a function whose hot loops deserve vectors: compiled for three x86-64 levels, chosen when the library loads. Callees must be
// FKV_INLINE; a lambda inside is not cloned, so call a marked function from it instead. Write 16 lanes with `vec`.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FKV_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FKV_VECTOR
#endif
typedef float vec __attribute__((vector_size(64)));

FKV_INLINE float bf16_to_f32(uint16_t bits) {
  uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Round to nearest even; NaN stays NaN.
FKV_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FKV_INLINE float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  uint32_t u;
  float f;
  if (rest >= 0x7c00u) {
    u = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else {
    u = rest << 13;  // exponent bias is mended by the multiplication, which also handles subnormals exactly
    std::memcpy(&f, &u, 4);
    f *= 5.192296858534828e33f;  // 2^112
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  std::memcpy(&f, &u, 4);
  return f;
}
FKV_INLINE uint16_t f32_to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (u < 0x38800000u) {  // subnormal: let the FPU round at the right bit
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    uint32_t v;
    std::memcpy(&v, &a, 4);
    return static_cast<uint16_t>(sign | (v - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
}
FKV_INLINE float load(const void* p, int64_t i, int32_t dtype) {
  if (dtype == FKV_F32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return dtype == FKV_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}
FKV_INLINE void store(void* p, int64_t i, int32_t dtype, float value) {
  if (dtype == FKV_F32) static_cast<float*>(p)[i] = value;
  else static_cast<uint16_t*>(p)[i] = dtype == FKV_BF16 ? f32_to_bf16(value) : f32_to_f16(value);
}

}  // namespace fkv
