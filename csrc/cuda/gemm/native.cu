// The arrays of native.h: a thread a group. Bytes: 8 read and 60 written a group, and the zeros.
#include "cuda/gemm/native.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Group e: d = a[first row of e or all] b[of e]; what differs between the two products is said by the steps.
struct ArraysCall {
  NativeArrays arrays;
  RowGroups groups;
  bool rows_are_inner;  // a group's rows are K, not M
  int32_t m, n, k;      // the sizes that do not depend on the group
  const char *a, *b;
  char* d;
  int64_t a_row_bytes, b_row_bytes, d_row_bytes;  // for each row before the group
  int64_t b_group_bytes, d_group_bytes;           // for each group before it
  int64_t a_stride, b_stride, d_stride;
};

__global__ void __launch_bounds__(kThreads) native_arrays_kernel(const __grid_constant__ ArraysCall call) {
  const NativeArrays& to = call.arrays;
  each_of_grid(to.num_groups, [&](int64_t e) {
    const int64_t begin = call.groups.bounds[e];
    const int32_t rows = static_cast<int32_t>(call.groups.bounds[e + 1] - begin);
    to.shapes[3 * e] = !call.rows_are_inner ? rows : rows > 0 ? call.m : 0;
    to.shapes[3 * e + 1] = call.n;
    to.shapes[3 * e + 2] = call.rows_are_inner ? rows : call.k;
    to.a[e] = call.a + begin * call.a_row_bytes;
    to.b[e] = call.b + begin * call.b_row_bytes + e * call.b_group_bytes;
    to.d[e] = call.d + begin * call.d_row_bytes + e * call.d_group_bytes;
    to.a_strides[e] = call.a_stride;
    to.b_strides[e] = call.b_stride;
    to.d_strides[e] = call.d_stride;
  });
}

// Zeros in units of 16 bytes: behind the last group's rows, or in the results of groups without rows.
__global__ void __launch_bounds__(kThreads)
    zero_rest_kernel(RowGroups groups, uint4* d, int64_t row_units, int64_t num_rows) {
  const int64_t end = num_rows * row_units;
  int64_t i = groups.bounds[groups.num_groups] * row_units + grid_thread();
  for (; i < end; i += grid_threads()) d[i] = uint4{};
}
// Column y of the grid takes a part of every group's result: a few empty experts would else be a block's work each.
__global__ void __launch_bounds__(kThreads) zero_empty_kernel(RowGroups groups, uint4* d, int64_t group_units) {
  const int64_t first = int64_t{blockIdx.y} * kThreads + threadIdx.x, step = int64_t{gridDim.y} * kThreads;
  for (int64_t e = blockIdx.x; e < groups.num_groups; e += gridDim.x) {
    if (groups.bounds[e] != groups.bounds[e + 1]) continue;
    for (int64_t i = first; i < group_units; i += step) d[e * group_units + i] = uint4{};
  }
}

CudaStatus fill(ArraysCall call, const CudaQueue& queue, NativeArrays* arrays) {
  const int64_t groups = call.groups.num_groups;
  arrays->shapes = queue.scratch_of<int32_t>(3 * groups);
  arrays->a = queue.scratch_of<const void*>(groups);
  arrays->b = queue.scratch_of<const void*>(groups);
  arrays->d = queue.scratch_of<void*>(groups);
  arrays->a_strides = queue.scratch_of<int64_t>(groups);
  arrays->b_strides = queue.scratch_of<int64_t>(groups);
  arrays->d_strides = queue.scratch_of<int64_t>(groups);
  arrays->num_groups = static_cast<int>(groups);
  call.arrays = *arrays;
  native_arrays_kernel<<<num_blocks(groups, kThreads), kThreads, 0, queue.stream>>>(call);
  return launched();
}

constexpr unsigned kZeroBlocks = 256, kZeroParts = 8;

}  // namespace

CudaStatus native_arrays(const RowsProduct& p, const CudaQueue& queue, NativeArrays* arrays) {
  const int64_t size = element_size(p.dtype);
  ArraysCall call{};
  call.groups = p.groups;
  call.n = static_cast<int32_t>(p.out);
  call.k = static_cast<int32_t>(p.in);
  call.a = static_cast<const char*>(p.a);
  call.b = static_cast<const char*>(p.b);
  call.d = static_cast<char*>(p.d);
  call.a_row_bytes = p.a_stride * size;
  call.b_group_bytes = p.b_group_stride * size;
  call.d_row_bytes = p.out * size;
  call.a_stride = p.a_stride;
  call.b_stride = p.b_stride;
  call.d_stride = p.out;
  const CudaStatus status = fill(call, queue, arrays);
  if (status.code != 0) return status;
  zero_rest_kernel<<<kZeroBlocks, kThreads, 0, queue.stream>>>(p.groups, static_cast<uint4*>(p.d), p.out * size / 16,
                                                               p.num_rows);
  return launched();
}

CudaStatus native_arrays(const GroupsProduct& p, const CudaQueue& queue, NativeArrays* arrays) {
  const int64_t size = element_size(p.dtype);
  ArraysCall call{};
  call.groups = p.groups;
  call.rows_are_inner = true;
  call.m = static_cast<int32_t>(p.m);
  call.n = static_cast<int32_t>(p.n);
  call.a = static_cast<const char*>(p.a);
  call.b = static_cast<const char*>(p.b);
  call.d = static_cast<char*>(p.d);
  call.a_row_bytes = p.a_stride * size;
  call.b_row_bytes = p.b_stride * size;
  call.d_group_bytes = p.m * p.n * size;
  call.a_stride = p.a_stride;
  call.b_stride = p.b_stride;
  call.d_stride = p.n;
  const CudaStatus status = fill(call, queue, arrays);
  if (status.code != 0) return status;
  zero_empty_kernel<<<dim3(kZeroBlocks, kZeroParts), kThreads, 0, queue.stream>>>(p.groups, static_cast<uint4*>(p.d),
                                                                                  p.m * p.n * size / 16);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
