// matmul.cpp: picks the kernels for this CPU; the ones that run anywhere are here, those for wide registers in matmul_wide.cpp.
#include "cover.h"
#include "matmul_wide.h"

namespace fkv {
namespace {

// For CPUs with at most 16 vector registers' worth of room: tiles of one row of x.
template <class Stored>
FKV_INLINE void narrow_tasks(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  if (!plan.direct) return panel_tasks<Stored, 1>(job, plan, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) direct_unit<Stored, kTile, 1>(job, unit);
}
FKV_VECTOR void narrow_f32(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  narrow_tasks<StoredF32>(job, plan, begin, end);
}
FKV_VECTOR void narrow_bf16(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  narrow_tasks<StoredBf16>(job, plan, begin, end);
}
FKV_VECTOR void narrow_f16(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  narrow_tasks<StoredF16>(job, plan, begin, end);
}
constexpr Tasks kNarrow[] = {narrow_f32, narrow_bf16, narrow_f16};

}  // namespace

void matmul(Context& context, const Matmul& job) {
  Plan plan = plan_of(job, 1, kTile);
  Tasks tasks = kNarrow[job.dtype];
#ifdef FKV_HAS_WIDE
  if (wide_registers()) {
    plan = wide_plan(job);
    tasks = wide_tasks(job.dtype);
  }
#endif
  // A share of work is worth handing to another thread from about 2^17 multiply-adds on.
  const int64_t task_cost = plan.unit_rows * plan.block_rows * job.padded;
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / task_cost);
  context.parallel(plan.units * plan.blocks, grain, [&](int64_t begin, int64_t end) { tasks(job, plan, begin, end); });
}

}  // namespace fkv
