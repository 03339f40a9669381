// matmul_wide.h: the matmul kernels for 32 registers of 64 bytes (x86-64-v4).
#pragma once
#include "cover.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FKV_HAS_WIDE 1

namespace fkv {

bool wide_registers();
Plan wide_plan(const Matmul& job);
Tasks wide_tasks(int32_t dtype);

}  // namespace fkv
#endif
