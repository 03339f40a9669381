// dense.h: what the chain hands to the matmul kernels.
#pragma once
#include "twin.h"

namespace fkv {

// One phase after its prologue: y = epilogue(W · x).
struct Matmul {
  const void* weight;  // [n_out][k] of dtype, row-major
  const void* bias;    // [n_out] of dtype, or null
  const float* x;      // [n_rows][padded], zeros beyond k
  float* y;            // [n_rows] rows, y_stride floats apart
  int64_t y_stride;
  int64_t n_rows, n_out, k, padded;
  int32_t dtype, epilogue;
};

// Every sum: lane j of 16 takes k = j mod 16 in ascending order (fused multiply-add where the CPU has it), then the
// lane tree. Neither n_rows nor the split over threads changes that, so a row has the same bits alone and in any batch.
void matmul(Context& context, const Matmul& job);

}  // namespace fkv
