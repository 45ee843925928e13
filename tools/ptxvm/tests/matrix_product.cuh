// 16 x 16 times 16 x 8 with ldmatrix and mma, right (controls.cu) and with two registers exchanged (planted.cu).
#pragma once

#include <cuda_bf16.h>

template <bool kIsWrong>
__device__ inline void matrix_product_of_a_warp(const int* in, int* out) {
  __shared__ __align__(16) __nv_bfloat16 a[16][24];
  __shared__ __align__(16) __nv_bfloat16 b[8][24];
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 256; i += 32) a[i / 16][i % 16] = __float2bfloat16(static_cast<float>(in[i % 128] % 9 - i / 100));
  for (int i = t; i < 128; i += 32) b[i / 16][i % 16] = __float2bfloat16(static_cast<float>(in[i] % 7 - 3));
  __syncwarp();
  const auto address = [](const void* from) { return static_cast<unsigned>(__cvta_generic_to_shared(from)); };
  unsigned fa[4], fb[2];
  float c[4] = {0, 0, 0, 0};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
               : "r"(address(&a[t % 16][t / 16 * 8])));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fb[0]), "=r"(fb[1])
               : "r"(address(&b[t % 8][t / 8 % 2 * 8])));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(fa[0]), "r"(fa[kIsWrong ? 2 : 1]), "r"(fa[kIsWrong ? 1 : 2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  for (int i = 0; i < 4; ++i) out[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = static_cast<int>(c[i]);
}
