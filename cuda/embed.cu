// embed.cu: token ids to rows of the embedding table.
//
// floor: n_rows·hidden·(bytes + 4) B at HBM speed: the launch decides → 2 us on an H100.
#include "checks_dense.h"
#include "common.cuh"

namespace fkv {
namespace {

constexpr int kEmbedThreads = 256, kEmbedValues = kEmbedThreads * 8;  // of a row, a block

// Block (row, part of the row). `vectors`: rows of the table and of out are aligned to 16 bytes, hidden a multiple of 8.
template <class T>
__global__ void __launch_bounds__(kEmbedThreads)
    embed(float* out, const int32_t* tokens, const T* table, int32_t hidden, int32_t vocab, bool vectors) {
  const int32_t token = tokens[blockIdx.x];
  const bool known = token >= 0 && token < vocab;
  const T* from = table + (known ? static_cast<int64_t>(token) * hidden : 0);
  float* to = out + static_cast<int64_t>(blockIdx.x) * hidden;
  for (int64_t at = static_cast<int64_t>(blockIdx.y) * kEmbedValues + threadIdx.x * 8; at < hidden;
       at += static_cast<int64_t>(gridDim.y) * kEmbedValues) {
    if (vectors) {
      store8(to + at, known ? load8(from + at) : Eight{});
    } else {
      for (int64_t i = at; i < at + 8 && i < hidden; ++i) to[i] = known ? to_f32(from[i]) : 0.0f;
    }
  }
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_embed(float* out, const int32_t* tokens, const void* table, int32_t dtype, int32_t hidden,
                             int32_t vocab, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = fkv::check_embed(out, tokens, table, dtype, hidden, vocab, n_rows, stream)) return status;
  if (const int32_t status = fkv::ready(stream, "fkv_embed")) return status;
  const bool vectors = reinterpret_cast<uintptr_t>(out) % 16 == 0 && reinterpret_cast<uintptr_t>(table) % 16 == 0 &&
                       hidden % 8 == 0;
  const int64_t parts = fkv::divide_up(hidden, fkv::kEmbedValues);
  const dim3 blocks(static_cast<unsigned>(n_rows), static_cast<unsigned>(parts < 65535 ? parts : 65535));
  return fkv::with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    fkv::embed<T><<<blocks, fkv::kEmbedThreads, 0, stream->handle>>>(out, tokens, static_cast<const T*>(table), hidden,
                                                                     vocab, vectors);
    return fkv::launched(stream, "fkv_embed");
  });
}
