// matmul_wide.cpp: tiles of 4 x 4 for CPUs with 32 registers of 64 bytes. The whole file is compiled for x86-64-v4 and reached only where
// the CPU has it: what it takes from headers is inlined, so none of that code can end up in another file's calls.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "dense.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4")
#include <immintrin.h>

#include "matmul_wide.h"

namespace fkv {
namespace {

// GCC 12 widens halves by pieces, so the one instruction that does it is named here (masked with all lanes on: the plain intrinsics
// warn of their own undefined operand).
struct WideBf16 : StoredBf16 {
  static FKV_INLINE vec load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return vec_from_bits(reinterpret_cast<vecu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
  }
};
struct WideF16 : StoredF16 {
  static FKV_INLINE vec load(const uint16_t* p) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

constexpr int64_t kMaxDirect = 4;     // more rows of x than this go by panels
constexpr int kUnitOfOneRow = 8;      // rows of W in flight where there is one row of x

template <class Stored>
FKV_INLINE void run(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  if (!plan.direct) return panel_tasks<Stored, 4>(job, plan, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (job.n_rows == 1) direct_unit<Stored, kUnitOfOneRow, 1>(job, unit);
    else if (job.n_rows == 2) direct_unit<Stored, kTile, 2>(job, unit);
    else if (job.n_rows == 3) direct_unit<Stored, kTile, 3>(job, unit);
    else direct_unit<Stored, kTile, 4>(job, unit);
  }
}
void run_f32(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) { run<StoredF32>(job, plan, begin, end); }
void run_bf16(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) { run<WideBf16>(job, plan, begin, end); }
void run_f16(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) { run<WideF16>(job, plan, begin, end); }
constexpr Tasks kTasks[] = {run_f32, run_bf16, run_f16};

}  // namespace

bool wide_registers() { return __builtin_cpu_supports("x86-64-v4"); }
Plan wide_plan(const Matmul& job) { return plan_of(job, kMaxDirect, kUnitOfOneRow); }
Tasks wide_tasks(int32_t dtype) { return kTasks[dtype]; }

}  // namespace fkv
#endif
