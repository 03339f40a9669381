// read.cu: the rate at which a device reads its memory: the floor of what is bound by it. Compiled when the bench runs.
// 16-byte loads, kInFlight of a thread's begun before one is used: the last is used first, by sums whose order is fixed. In each turn a
// thread reads kInFlight vectors `stride` apart, and a block's begin `own` apart from the next block's. n: a whole number of turns.

template <int kInFlight>
__device__ void read_memory(const float4* memory, unsigned long long n, unsigned long long own, unsigned long long stride, float* sum) {
  const unsigned long long turn = static_cast<unsigned long long>(gridDim.x) * blockDim.x * kInFlight;
  float4 seen{0, 0, 0, 0};
  for (unsigned long long i = blockIdx.x * own + threadIdx.x; i < n; i += turn) {
    float4 values[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) values[j] = __ldcs(&memory[i + j * stride]);
#pragma unroll
    for (int j = kInFlight - 1; j >= 0; --j)
      seen = {fmaf(seen.x, 0.5f, values[j].x), fmaf(seen.y, 0.5f, values[j].y), fmaf(seen.z, 0.5f, values[j].z),
              fmaf(seen.w, 0.5f, values[j].w)};
  }
  if (seen.x + seen.y + seen.z + seen.w == 12345.0f) *sum = seen.x;
}

#define READ(in_flight)                                                                                                        \
  extern "C" __global__ void read_memory_##in_flight(const float4* memory, unsigned long long n, unsigned long long own,       \
                                                     unsigned long long stride, float* sum) {                                  \
    read_memory<in_flight>(memory, n, own, stride, sum);                                                                       \
  }
READ(4)
READ(8)
READ(16)
