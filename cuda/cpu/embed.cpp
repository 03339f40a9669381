// embed.cpp: token ids to rows of the embedding table.
#include <algorithm>

#include "../checks_dense.h"
#include "math.h"
#include "twin.h"

namespace fkv {
namespace {

FKV_VECTOR void widen_row(float* out, const void* table, int64_t first, int64_t n, int32_t dtype) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vec(out + i, load_vec(table, first + i, dtype));
  if (i < n) store_vec_tail(out + i, load_vec_tail(table, first + i, dtype, n - i), n - i);
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_embed(float* out, const int32_t* tokens, const void* table, int32_t dtype, int32_t hidden,
                             int32_t vocab, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = fkv::check_embed(out, tokens, table, dtype, hidden, vocab, n_rows, stream)) return status;
  return fkv::launch(stream, "fkv_embed", [=](fkv::Context& context) {
    context.parallel(n_rows, std::max(1, (1 << 15) / hidden), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = tokens[row];
        if (token >= 0 && token < vocab)
          fkv::widen_row(out + row * hidden, table, token * hidden, hidden, dtype);
        else
          std::fill_n(out + row * hidden, hidden, 0.0f);
      }
    });
  });
}
