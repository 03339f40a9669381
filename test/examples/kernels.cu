// Kernels of the examples' own. The build makes PTX of them where it finds nvcc.

// sum[i] = a[i] + b[i]
extern "C" __global__ void add(const float* a, const float* b, float* sum, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) sum[i] = a[i] + b[i];
}

// y[i] = scale·x[i], then `rounds` times y[i] = y[i]·y[i] − 1.5: something to do for as long as one likes.
extern "C" __global__ void iterate(float* y, const float* x, long long n, float scale, int rounds) {
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    float value = scale * x[i];
    for (int round = 0; round < rounds; ++round) value = value * value - 1.5f;
    y[i] = value;
  }
}
