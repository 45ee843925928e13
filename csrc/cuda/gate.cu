// gate on CUDA: a warp per row, a lane per row where rows are short, one read of the logits.
//
// Who owns what. A block owns a tile of rows, whose size depends on the shape only; its warps take the tile's rows in
// turn. Rows of the common case stay in registers, of a warp (gate_fast.cuh) or of one lane (gate_lanes.cuh); the
// others go the general way (gate_general.cuh). Selection is exact (gate_select.cuh): K extractions, or from K = 16 on
// a radix selection.
//
// Determinism: every sum has a fixed order. score_sum is summed by warp over its rows, by block over its warps, then by
// a second kernel over tiles; no float is ever added by an atomic. Only demand, an integer, is.
//
// Choice compares the logits themselves where the score is monotone and there is no bias, and so agrees with the CPU
// bit for bit; otherwise it compares scores, which agree to a few ulp. Arithmetic is float32; float64 is for the CPU.
// Bytes: logits once, outputs once, and with statistics 4 E per tile, written and read.
#include <algorithm>

#include "cuda/gate_general.cuh"
#include "cuda/gate_lanes.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int64_t kMaxTiles = 1024;
constexpr int kSumThreads = 1024;

// kWarpRows: rows that a warp has in flight. Of one row, kPerLane > 0: it takes the way of gate_fast.cuh first, with so
// many logits a lane. Of 32: they take that of gate_lanes.cuh.
template <class T, int kPerLane, int kWarpRows>
__global__ void __launch_bounds__(kGateThreads, kWarpRows > 1 ? 2 : 1)
    gate_kernel(const __grid_constant__ GateCall call) {
  const RowMemory& m = call.memory;
  const int warp = warp_index();
  // Demand is counted by the block where its memory is shared, and added up once per block.
  const int num_counts = m.in_shared ? call.num_experts : 0;
  int* const demand = m.in_shared ? reinterpret_cast<int*>(block_memory(m)) : call.a.demand;
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_counts; e += static_cast<int>(blockDim.x)) demand[e] = 0;
  __syncthreads();

  const auto sums_of = [&](int w) { return warp_memory(m, w + 1) - call.num_experts; };
  unsigned tile = blockIdx.x;
  do {
    const unsigned begin = tile * call.rows_per_tile;
    const unsigned end = min(begin + call.rows_per_tile, call.num_tokens);
    if (call.tile_sums != nullptr) {
      for (int e = own_lane(); e < call.num_experts; e += kWarp) sums_of(warp)[e] = 0.0f;
      __syncwarp();  // not every way of a row has the columns lie by lanes alike
    }
    const unsigned step = static_cast<unsigned>(m.num_warps) * kWarpRows;
    for (unsigned t = begin + static_cast<unsigned>(warp) * kWarpRows; t < end; t += step) {
      unsigned left = 1;  // bit i: row t + i goes the general way
      if constexpr (kWarpRows > 1) {
        left = choose_by_lanes<T, kPerLane>(call.fast, t, end, demand,
                                            call.tile_sums != nullptr ? sums_of(warp) : nullptr);
      } else if constexpr (kPerLane > 0) {
        FastRow<T, kPerLane> fast(call.fast, demand);
        if (fast.choose(t, m)) {
          if (call.fast.has_more) fast.write_more(t, call.tile_sums != nullptr ? sums_of(warp) : nullptr);
          continue;
        }
      }
      for (; left != 0; left &= left - 1) {
        const unsigned row = t + static_cast<unsigned>(__ffs(static_cast<int>(left)) - 1);
        GeneralRow<T>(call, warp_memory(m, warp), demand).run(row);  // made here: other rows do not pay for it
      }
    }
    if (call.tile_sums == nullptr) continue;  // to the condition below
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < call.num_experts; e += static_cast<int>(blockDim.x)) {
      float sum = 0.0f;
      for (int w = 0; w < m.num_warps; ++w) sum += sums_of(w)[e];
      call.tile_sums[int64_t{tile} * call.num_experts + e] = sum;
    }
    __syncthreads();
  } while ((tile += gridDim.x) < call.num_tiles);
  if (num_counts == 0) return;
  __syncthreads();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_counts; e += static_cast<int>(blockDim.x))
    if (demand[e] != 0) atomicAdd(call.a.demand + e, demand[e]);
}

// score_sum[e] = tile_sums[0][e] + tile_sums[1][e] + ..., 32 runs of tiles side by side, then the runs in order.
__global__ void __launch_bounds__(kSumThreads)
    sum_tiles_kernel(const float* tile_sums, int64_t num_tiles, int64_t num_experts, float* score_sum) {
  __shared__ float runs[kSumThreads / kWarp][kWarp + 1];
  const int run = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t e = int64_t{blockIdx.x} * kWarp + lane_index();
  const int64_t run_tiles = (num_tiles + kSumThreads / kWarp - 1) / (kSumThreads / kWarp);
  const int64_t past = (run + 1) * run_tiles;
  const int64_t end = past < num_tiles ? past : num_tiles;
  float sum = 0.0f;
  for (int64_t tile = run * run_tiles; e < num_experts && tile < end; ++tile) sum += tile_sums[tile * num_experts + e];
  runs[run][lane_index()] = sum;
  __syncthreads();
  if (run != 0 || e >= num_experts) return;
  float total = 0.0f;
  for (int r = 0; r < kSumThreads / kWarp; ++r) total += runs[r][lane_index()];
  score_sum[e] = total;
}

GateCall call_of(const GateArgs& a) {
  const GateShape& shape = a.shape;
  GateCall call{};
  call.a = a;
  call.num_columns = static_cast<int>(shape.num_experts + shape.num_null);
  call.num_experts = static_cast<int>(shape.num_experts);
  call.num_groups = static_cast<int>(shape.num_groups);
  call.group_size = static_cast<int>(shape.num_experts / shape.num_groups);
  call.top_k = static_cast<int>(shape.top_k);
  const bool is_grouped = shape.score == Score::kSoftmax && shape.softmax_over_group;
  call.logit_keys = shape.score != Score::kRelu && !is_grouped && a.bias.data == nullptr;
  call.counts_groups = a.max_per_group < shape.top_k && shape.num_null == 0;
  call.is_ranked = shape.top_k >= kRadixK && !call.counts_groups;
  call.has_top_p = a.top_p_per_token.data != nullptr || a.top_p < INFINITY;
  call.has_threshold = a.threshold_per_token.data != nullptr || a.threshold > -INFINITY;
  const bool sums_groups = a.topk_groups < shape.num_groups && a.group_score == GroupScore::kTop2Sum;
  call.fast = {a.logits.data,
               a.logits.stride_row,
               a.logits.stride_col,
               static_cast<float*>(a.weights),
               a.experts,
               static_cast<float*>(a.logsumexp),
               static_cast<float*>(a.scores),
               call.num_columns,
               call.top_k,
               shape.score,
               shape.normalize,
               a.logsumexp != nullptr || a.scores != nullptr,
               static_cast<float>(shape.scale),
               LogitLoads::kElements};
  call.noisy_scores =
      a.noise.data != nullptr && (!call.logit_keys || call.has_top_p || call.has_threshold || sums_groups);
  return call;
}

// How rows of a call are taken: the template arguments of gate_kernel. It follows from what is computed, never from the
// layout of the logits or from which results are asked for beside the weights, so these change no bit.
struct Way {
  int per_lane, warp_rows;
};
Way way_of(const GateCall& call) {
  constexpr Way kGeneral{0, 1};
  const GateArgs& a = call.a;
  const bool is_plain = call.logit_keys && a.mask.data == nullptr && a.noise.data == nullptr &&
                        a.k_per_token.data == nullptr && !call.has_top_p && !call.has_threshold;
  const bool is_free = a.topk_groups == a.shape.num_groups && a.max_per_group >= a.shape.top_k;
  if (!is_plain || !is_free || a.shape.num_null > 0) return kGeneral;
  if (call.num_columns <= kLanesMostColumns && a.shape.score != Score::kSqrtSoftplus)
    return {call.num_columns <= kLanesMostColumns / 2 ? kLanesMostColumns / 2 : kLanesMostColumns, kWarp};
  const int per_lane = call.num_columns <= 2 * kWarp ? 2 : call.num_columns <= 4 * kWarp ? 4 : 8;
  return call.num_columns > per_lane * kWarp || call.top_k > kFastMostK ? kGeneral : Way{per_lane, 1};
}

template <class T>
LogitLoads loads_of(const GateCall& call, const Way& way) {
  const Strided<void>& logits = call.a.logits;
  const int64_t most = way.per_lane * static_cast<int64_t>(sizeof(T)), bytes = std::min(most, kWideBytes);
  if (way.per_lane == 0 || logits.stride_col != 1 ||
      !are_multiples(bytes, {logits.data}, {logits.stride_row, call.num_columns}, sizeof(T)))
    return LogitLoads::kElements;
  return call.num_columns == way.per_lane * kWarp ? LogitLoads::kAllPacks : LogitLoads::kPacks;
}

template <class T>
CudaStatus launch_gate(const GateCall& call, const Way& way, const CudaQueue& queue) {
  const auto launch = [&](auto kernel) { return launch_rows<GateCall>(kernel, call, call.memory, queue); };
  switch (way.per_lane * way.warp_rows) {
    case 2: return launch(gate_kernel<T, 2, 1>);
    case 4: return launch(gate_kernel<T, 4, 1>);
    case 8: return launch(gate_kernel<T, 8, 1>);
    case 8 * kWarp: return launch(gate_kernel<T, 8, kWarp>);
    case 16 * kWarp: return launch(gate_kernel<T, 16, kWarp>);
    default: return launch(gate_kernel<T, 0, 1>);
  }
}

template <class T>
CudaStatus gate_as(const GateArgs& a, const CudaQueue& queue) {
  const int64_t num_tokens = a.shape.num_tokens;
  GateCall call = call_of(a);
  const size_t demand_bytes = call.num_experts * sizeof(int32_t);
  CudaStatus status = status_of(cudaMemsetAsync(a.demand, 0, demand_bytes, queue.stream));
  if (status.code != 0) return status;
  if (num_tokens == 0) {
    if (a.score_sum == nullptr) return {};
    return status_of(cudaMemsetAsync(a.score_sum, 0, call.num_experts * sizeof(float), queue.stream));
  }
  call.num_tokens = static_cast<unsigned>(num_tokens);
  const Way way = way_of(call);
  call.fast.loads = loads_of<T>(call, way);
  const int64_t block_rows = kGateWarps * way.warp_rows;
  call.rows_per_tile = static_cast<unsigned>(ceil_div(ceil_div(num_tokens, kMaxTiles), block_rows) * block_rows);
  call.num_tiles = static_cast<unsigned>(ceil_div(num_tokens, call.rows_per_tile));
  if (a.score_sum != nullptr) {
    call.tile_sums = queue.scratch_of<float>(int64_t{call.num_tiles} * call.num_experts);
  }
  call.memory = plan_rows(call.row_words(), ceil_div(call.num_experts, 4) * 4, call.num_tiles, queue);
  status = launch_gate<T>(call, way, queue);
  if (status.code != 0 || a.score_sum == nullptr) return status;
  sum_tiles_kernel<<<num_blocks(call.num_experts, kWarp), kSumThreads, 0, queue.stream>>>(
      call.tile_sums, call.num_tiles, call.num_experts, static_cast<float*>(a.score_sum));
  return launched();
}

}  // namespace

CudaStatus gate(const GateArgs& a, const CudaQueue& queue) {
  switch (a.dtype) {
    case DType::kFloat32: return gate_as<float>(a, queue);
    case DType::kBFloat16: return gate_as<BFloat16>(a, queue);
    case DType::kFloat16: return gate_as<Float16>(a, queue);
    default: return not_supported("logits must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
