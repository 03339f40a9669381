// Kernels that tell how they were launched.

// out [7]: each argument's bits, those of 4 bytes sign- or zero-extended as C does.
extern "C" __global__ void arguments(unsigned long long* out, int i, unsigned u, long long l, unsigned long long w, float f, double d) {
  out[0] = reinterpret_cast<unsigned long long>(out);
  out[1] = static_cast<unsigned long long>(static_cast<long long>(i));
  out[2] = u;
  out[3] = static_cast<unsigned long long>(l);
  out[4] = w;
  out[5] = __float_as_uint(f);
  out[6] = static_cast<unsigned long long>(__double_as_longlong(d));
}

struct Odd {
  short a;
  char b[9];
};

// out [6]: integers of 1 and 2 bytes, sign- or zero-extended; at 48 bytes v, at 64 d, at 72 odd.
extern "C" __global__ void narrow(long long* out, signed char i, unsigned char u, short s, unsigned short w, unsigned short half, char last,
                                  float4 v, Odd odd, double d) {
  out[0] = i;
  out[1] = u;
  out[2] = s;
  out[3] = w;
  out[4] = half;
  out[5] = last;
  reinterpret_cast<float4*>(out)[3] = v;
  reinterpret_cast<double*>(out)[8] = d;
  reinterpret_cast<Odd*>(out + 9)[0] = odd;
}

// A struct as large as a launch of any chip takes beside a pointer. out [1]: the sum of its words.
struct Large {
  unsigned words[1020];
};
extern "C" __global__ void large(unsigned* out, Large all) {
  unsigned sum = 0;
  for (unsigned word : all.words) sum += word;
  *out = sum;
}

// out [6]: grid and block.
extern "C" __global__ void shape(int* out) {
  if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x + threadIdx.y + threadIdx.z != 0) return;
  out[0] = gridDim.x;
  out[1] = gridDim.y;
  out[2] = gridDim.z;
  out[3] = blockDim.x;
  out[4] = blockDim.y;
  out[5] = blockDim.z;
}

// *out = n(n − 1)/2, by way of n words of dynamic shared memory.
extern "C" __global__ void shared_sum(unsigned long long* out, int n) {
  extern __shared__ int words[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) words[i] = i;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long sum = 0;
  for (int i = 0; i < n; ++i) sum += words[i];
  *out = sum;
}

// out [blocks]: each block's rank in its cluster, where the architecture has clusters.
extern "C" __global__ void ranks(int* out) {
  int rank = -1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  if (threadIdx.x == 0) out[blockIdx.x] = rank;
}

extern "C" __global__ void nothing() {}

// Writes where nothing is.
extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }
