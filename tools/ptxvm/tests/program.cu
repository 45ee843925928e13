// A program of its own, compiled by nvcc against the shared CUDA runtime and run against the stand-in: what host code
// may call, and what a wrong call gives. Prints "ok NAME" for every part that holds.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

__constant__ int factors[4];
__device__ int counter;

__global__ void scale(const int* in, int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = in[i] * factors[i % 4];
  if (i < n && in[i] > 90) atomicAdd(&counter, 1);
}
__global__ void __launch_bounds__(128) large_shared(int* out) {
  extern __shared__ int buffer[];
  buffer[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = buffer[127 - threadIdx.x];
}
__global__ void read_one(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x]; }

static void expect(bool holds, const char* name) { std::printf("%s %s\n", holds ? "ok" : "WRONG", name); }
static cudaError_t last() {
  cudaDeviceSynchronize();
  return cudaGetLastError();
}

int main() {
  constexpr int kCount = 100;
  std::vector<int> values(kCount), results(kCount, -1);
  for (int i = 0; i < kCount; ++i) values[i] = i;
  int *in = nullptr, *out = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&in), kCount * sizeof(int));
  cudaMalloc(reinterpret_cast<void**>(&out), kCount * sizeof(int));
  cudaMemcpy(in, values.data(), kCount * sizeof(int), cudaMemcpyHostToDevice);
  const int host_factors[4] = {1, 10, 100, 1000};
  cudaMemcpyToSymbol(factors, host_factors, sizeof host_factors);
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  scale<<<4, 32, 0, stream>>>(in, out, kCount);
  expect(last() == cudaSuccess, "launch");
  cudaMemcpyAsync(results.data(), out, kCount * sizeof(int), cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(stream);
  bool same = true;
  for (int i = 0; i < kCount; ++i) same = same && results[i] == i * host_factors[i % 4];
  expect(same, "values and constants");
  int counted = 0;
  cudaMemcpyFromSymbol(&counted, counter, sizeof counted);
  expect(counted == 9, "variables");

  scale<<<4, 32>>>(in, out, kCount + 1);
  expect(last() == cudaErrorLaunchFailure && cudaGetLastError() == cudaSuccess, "out of bounds is an error, once");
  scale<<<0, 32>>>(in, out, kCount);
  expect(last() == cudaErrorInvalidConfiguration, "an empty grid");
  large_shared<<<1, 256>>>(out);
  expect(last() == cudaErrorInvalidConfiguration, "more threads than the kernel is bounded to");
  large_shared<<<1, 100, 60 << 10>>>(out);
  expect(last() == cudaErrorInvalidValue, "much shared memory without asking");
  int* wide = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&wide), 128 * sizeof(int));
  cudaFuncSetAttribute(large_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 << 10);
  large_shared<<<1, 128, 60 << 10>>>(wide);
  expect(last() == cudaSuccess, "much shared memory after asking");

  int blocks = 0, sms = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale, 256, 0);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  expect(blocks == 8 && sms > 0, "occupancy");
  cudaFuncAttributes attributes;
  expect(cudaFuncGetAttributes(&attributes, large_shared) == cudaSuccess && attributes.maxThreadsPerBlock == 128,
         "attributes");

  cudaFree(in);
  read_one<<<1, 32>>>(in, out);
  const cudaError_t freed = cudaGetLastError();
  expect(freed == cudaErrorLaunchFailure, "use after free");
  std::printf("%s\n", cudaGetErrorString(freed));
  int* fresh = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&fresh), 32 * sizeof(int));
  read_one<<<1, 32>>>(fresh, out);
  expect(last() == cudaErrorLaunchFailure, "fresh memory is undefined");
  cudaMemset(fresh, 0, 32 * sizeof(int));
  read_one<<<1, 32>>>(fresh, out);
  expect(last() == cudaSuccess, "cleared memory is defined");
  expect(cudaMemset(fresh, 0, 33 * sizeof(int)) != cudaSuccess, "clearing too much");
  cudaGetLastError();
  expect(cudaMemcpy(results.data(), fresh, 33 * sizeof(int), cudaMemcpyDeviceToHost) != cudaSuccess &&
             cudaMemcpy(fresh + 1, results.data(), 32 * sizeof(int), cudaMemcpyHostToDevice) != cudaSuccess,
         "copying too much");
  cudaGetLastError();
  expect(cudaFree(fresh + 1) != cudaSuccess, "freeing what was not allocated");
  cudaGetLastError();

  std::vector<int> own(64, 7);
  cudaHostRegister(own.data(), 32 * sizeof(int), cudaHostRegisterDefault);
  read_one<<<1, 32>>>(own.data(), out);
  expect(last() == cudaSuccess, "registered memory");
  read_one<<<1, 64>>>(own.data(), out);
  expect(last() == cudaErrorLaunchFailure, "has exact bounds");
  cudaHostUnregister(own.data());
  return 0;
}
