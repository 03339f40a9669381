// retrieve.cuh: one KV head of one row in the fused retrieval, by the blocks of a cluster: all of them do the same work but for scoring
// and copying, which they share; block 0 writes what all have worked out.
#pragma once
#include "digest.cuh"
#include "early.cuh"
#include "recall.cuh"
#include "rope.cuh"
#include "select.cuh"
#include "token.cuh"

namespace fkv {

// Of digests, what a launch sends for before it knows which heads it scores: a third of an H100's L2.
constexpr int32_t kSentBytes = 16 << 20;
constexpr int32_t kMostSlots = 256;  // of a head whose tables every block holds

struct ServiceLayout {
  ScoreLayout scores;
  int32_t keys;     // uint64_t [kMostKeys]
  int32_t slots;    // int32_t, five of kMostSlots
  int32_t bytes;
};

inline ServiceLayout lay_out_service(const fkv_cache& cache, int32_t blocks) {
  const ScoreLayout scores = lay_out_scores(cache, blocks, blocks * kListPitch * 8);
  const int32_t keys = scores.bytes, slots = keys + kMostKeys * 8;
  return {scores, keys, slots, slots + 5 * kMostSlots * 4};
}

struct ServiceMemory : ScoreMemory {
  int32_t* slots;
  uint64_t* keys;
  uint64_t* lists;    // [blocks][kListPitch], over q and columns
  uint64_t* best;     // [kMostListed], over raw, as the two that follow
  fkv_miss* misses;   // [kMostListed]
  int32_t* pages;     // [kMostListed]
  Route* routes;      // [kMostListed], over keys
  Turn* turns;        // [d / 2], over keys
  float* key;         // K [d], over keys

  __device__ __forceinline__ ServiceMemory(char* shared, const ServiceLayout& layout)
      : ScoreMemory(shared, layout.scores),
        slots(reinterpret_cast<int32_t*>(shared + layout.slots)),
        keys(reinterpret_cast<uint64_t*>(shared + layout.keys)),
        lists(reinterpret_cast<uint64_t*>(shared)),
        best(reinterpret_cast<uint64_t*>(raw)),
        misses(reinterpret_cast<fkv_miss*>(best + kMostListed)),
        pages(reinterpret_cast<int32_t*>(misses + kMostListed)),
        routes(reinterpret_cast<Route*>(keys)),
        turns(reinterpret_cast<Turn*>(keys)),
        key(reinterpret_cast<float*>(turns + kMaxHeadDim / 2)) {}
};
static_assert(kMostListed * sizeof(Route) <= kMostKeys * 8 && kMaxHeadDim * 8 <= kMostKeys * 8);
static_assert(kMostListed * (8 + sizeof(fkv_miss) + 4) <= kRawFloats * 4);
static_assert(kMostSlots <= kServeThreads);  // a thread takes a slot

// What is missing, where it is listed.
struct Missing {
  const fkv_miss* list;
  int32_t n;
};

// What is read again and again, in shared memory: a barrier of the cluster empties the nearest cache.
struct Copies {
  fkv_row row;
  fkv_lane lane;
  // From where they lie; a barrier follows before they are read.
  __device__ void take(const fkv_row& from_row, const fkv_lane& from_lane) {
    constexpr int32_t kRowWords = sizeof(fkv_row) / 4, kLaneWords = sizeof(fkv_lane) / 4;
    static_assert(kRowWords <= kWarp && kWarp + kLaneWords <= kServeThreads);
    const int32_t i = threadIdx.x, j = i - kWarp;
    if (i < kRowWords) reinterpret_cast<int32_t*>(&row)[i] = reinterpret_cast<const int32_t*>(&from_row)[i];
    if (j >= 0 && j < kLaneWords) reinterpret_cast<int32_t*>(&lane)[j] = reinterpret_cast<const int32_t*>(&from_lane)[j];
  }
};

struct Service {
  const fkv_cache& cache;
  const fkv_retrieve_params& params;
  const fkv_row& row;    // copies, as the lane
  const fkv_lane& lane;
  int32_t row_index, head;
  const Peers& peers;
  char* shared;
  const ServiceLayout& layout;

  template <class T>
  __device__ __forceinline__ bool prepare(const ServiceMemory& memory, const Before& before, float tau) const;
  template <class T>
  __device__ __forceinline__ void serve(const ServiceMemory& memory, Query query, TileWalk walk, bool met) const;
  __device__ __forceinline__ Missing place(const ServiceMemory& memory, int32_t n_selected, int32_t ahead, bool counted) const;
  __device__ __forceinline__ void bring(const ServiceMemory& memory, const Missing& missing) const;
  __device__ __forceinline__ void count_stall(uint64_t start) const;
};

// Which block of a cluster takes K and V to their page.
__device__ __forceinline__ bool appends(const Peers& peers) { return peers.rank == (peers.size > 1 ? 1 : 0); }

// QK-norm, RoPE, K and V into the window, the check. Every block turns the group's q for itself (memory.q); block 0 writes it and the
// flag, the next one K and V. In place, so block 0 waits until all have read; the others have arrived only. before: of query head `warp`.
template <class T>
__device__ __forceinline__ bool Service::prepare(const ServiceMemory& memory, const Before& before, float tau) const {
  __shared__ float cosines[kMaxGroup];
  const int32_t d = cache.head_dim, group = cache.n_q_heads / cache.n_kv_heads, warp = threadIdx.x / kWarp, layer = params.layer;
  const bool compared = compares(row, &lane);
  float* const q_there = const_cast<float*>(group_query(cache, params.qkv, row_index, head));
  float* const key_there = const_cast<float*>(kv_of(cache, params.qkv, row_index, head, 0));
  for (int32_t h = warp; h < group + appends(peers); h += kServeWarps) {
    float* const x = h < group ? memory.q + h * d : memory.key;
    turn_head(x, h < group ? q_there + h * d : key_there, params.rope, h < group ? params.rope.q_norm : params.rope.k_norm, memory.turns);
    if (h >= group || !compared) continue;
    __syncwarp();
    const float value =
        cosine(x, h < kServeWarps ? before : take_before(group_query_before(cache, lane, layer, head) + h * d, d), d);
    if (threadIdx.x % kWarp == 0) cosines[h] = value;
  }
  __syncthreads();
  peers.arrive();
  const bool flagged = flag_of(cache, row, &lane, cosines, tau, layer, head);
  if (appends(peers)) {
    take_query(key_there, memory.key, d);
    append_head<T>(cache, row, lane, memory.key, kv_of(cache, params.qkv, row_index, head, 1), layer, head);
  }
  if (peers.rank == 0) {
    if (threadIdx.x == 0) store_flag(cache, row, &lane, flagged, layer, row_index, head);
    peers.wait();
    take_query(q_there, memory.q, group * d);
  }
  return flagged;
}

// Slots, tables, miss list and counters of the selection memory.pages.
__device__ __forceinline__ Missing Service::place(const ServiceMemory& memory, int32_t n_selected, int32_t ahead, bool counted) const {
  const bool writes = peers.rank == 0;
  const int64_t list = miss_list(cache, row_index, head), table = lane_head(cache, params.layer, head);
  fkv_counters& counters = cache.counters[row_index];
  int32_t* const selected_slot = lane.selected_slot + table * lane.k;
  if (writes) {
    for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) lane.selected_page[table * lane.k + i] = memory.pages[i];
    if (threadIdx.x == 0) {
      lane.n_selected[table] = n_selected;
      if (counted) atomicAdd(&counters.selected, n_selected);
    }
  }
  if (lane.resident) {
    if (!writes) return {nullptr, 0};
    for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) selected_slot[i] = -1;
    if (threadIdx.x == 0) params.workspace.n_misses[list] = 0;
    return {nullptr, 0};
  }
  const int32_t length = target_length(row, params.stage);
  const Recalls recalls{cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages, memory.misses, length,
                        joining_page(lane, length, cache.page_size)};
  const Slots slots(memory.slots, lane, table, writes, true);
  int32_t rank = n_selected;
  const Placed placed = place_pages(recalls, slots, lane, selected_slot, memory.pages, n_selected, ahead,
                                    [&] { return index_of(memory.best[rank++]); });
  const int32_t n_missing = placed.absent + placed.fetched;
  if (writes) {
    for (int32_t i = threadIdx.x; i < n_missing; i += kServeThreads)
      params.workspace.misses[list * cache.max_slots + i] = memory.misses[i];
    if (threadIdx.x == 0) {
      params.workspace.n_misses[list] = n_missing;
      count_placed(counters, placed, n_selected, counted, params.stage);
    }
  }
  return {memory.misses, n_missing};
}

// The blocks share the head's misses piece by piece.
__device__ __forceinline__ void Service::bring(const ServiceMemory& memory, const Missing& missing) const {
  const Pieces pieces(cache);
  const Divisor page(pieces.all);
  const uint32_t threads = peers.size * kServeThreads;
  for (int32_t begin = 0; begin < missing.n; begin += kMostListed) {
    const int32_t n_routes = min(missing.n - begin, kMostListed);
    if (begin > 0) __syncthreads();
    for (int32_t i = threadIdx.x; i < n_routes; i += kServeThreads)
      memory.routes[i] = route_of(cache, lane, missing.list[begin + i], params.layer, head);
    __syncthreads();
    const uint32_t n = n_routes * pieces.all;
    for (uint32_t first = peers.rank * kServeThreads + threadIdx.x; first < n; first += kPieceLoads * threads) {
      uint4 data[kPieceLoads];
      uint4* to[kPieceLoads];
#pragma unroll
      for (int j = 0; j < kPieceLoads; ++j) {
        const uint32_t piece = first + j * threads;
        if (piece >= n) break;
        const uint32_t entry = page.quotient(piece);
        const Route& route = memory.routes[entry];
        const Spot spot = pieces.spot(piece - entry * pieces.all);
        to[j] = spot.in(route.to);
        data[j] = *spot.in(route.from);
      }
#pragma unroll
      for (int j = 0; j < kPieceLoads; ++j) {
        if (first + j * threads >= n) break;
        *to[j] = data[j];
      }
    }
  }
}

// Estimate, select and gather. `met`: this block has waited for the first barrier.
template <class T>
__device__ __forceinline__ void Service::serve(const ServiceMemory& memory, Query query, TileWalk walk, bool met) const {
  const int32_t layer = params.layer, stage = params.stage, group = cache.n_q_heads / cache.n_kv_heads;
  const int32_t n = n_candidates(lane, target_length(row, stage), cache.page_size), n_selected = min(n, lane.k);
  const int32_t ahead = ranks_ahead(row, lane, n, stage), ranks = n_selected + ahead;
  const int64_t list = miss_list(cache, row_index, head);
  require(lane.resident || (lane.k <= lane.n_slots && lane.n_slots <= cache.max_slots));
  const bool scores = n > lane.k;
  const Share share(peers, n);
  const bool listed = ranks <= kMostListed && (lane.resident || lane.n_slots <= kMostSlots) &&
                      (!scores || (share.pages() <= kRawFloats && lists_ranks(share.pages(), ranks)));
  const bool counted = counts_selection(cache, layer, row_index, head, stage);
  if (scores && (query == Query::previous || !params.prepare)) {
    const float* const q =
        query == Query::previous ? group_query_before(cache, lane, layer, head) : group_query(cache, params.qkv, row_index, head);
    take_query(memory.q, q, group * cache.head_dim);
  }
  if (scores) {
    const Scored scored = scored_head(cache, params.workspace, row, lane, query, layer, row_index, head, stage);
    __syncthreads();
    const RawPlanes raw(memory, cache, scored, share);
    score_share<T>(memory, raw, cache, scored, share, walk);
    if (!met) peers.wait();
    exchange_tallies(memory, cache, group, peers);
    float* const out = params.workspace.scores + list * cache.max_pages;
    pool_share(memory, raw, cache, scored, share, [&](int32_t i, int32_t page, float score) {
      if (listed) memory.raw[i] = score;
      else out[page] = score;
    });
    __syncthreads();
    if (listed) list_best(memory.lists, memory.keys, ranks, n, share, peers, [&](int32_t i) { return memory.raw[i]; });
    peers.sync();
    if (listed) {
      merge_lists(memory.best, memory.keys, memory.lists, ranks, peers);
      __syncthreads();
      for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) {
        const int32_t own = index_of(memory.best[i]);
        int32_t place = 0;
#pragma unroll 8
        for (int32_t j = 0; j < n_selected; ++j) place += index_of(memory.best[j]) < own;
        memory.pages[place] = lane.sink_pages + own;
      }
      __syncthreads();
    }
  } else {
    if (!met) peers.wait();
    for (int32_t i = threadIdx.x; i < n_selected && listed; i += kServeThreads) memory.pages[i] = lane.sink_pages + i;
    peers.sync();
  }
  Missing missing;
  if (listed) {
    missing = place(memory, n_selected, ahead, counted);
  } else {
    if (peers.rank == 0) {
      select_head(reinterpret_cast<int32_t*>(shared), layout.bytes / 20, cache, params.workspace, row, lane, layer, stage, row_index, head);
    }
    peers.sync();
    missing = {params.workspace.misses + list * cache.max_slots, params.workspace.n_misses[list]};
  }
  bring(memory, missing);
}

// The time in which some block served: what this one adds to the latest end, or to its own start where that lies behind it.
__device__ __forceinline__ void Service::count_stall(uint64_t start) const {
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint64_t end = clock_ns();
  auto* const stall = reinterpret_cast<unsigned long long*>(params.stall);
  const uint64_t last = atomicMax(stall + 1, static_cast<unsigned long long>(end)), from = last > start ? last : start;
  if (end > from) atomicAdd(stall, static_cast<unsigned long long>(end - from));
}

// The head's slots, into shared memory, and all of them in the order in which they would be replaced. Every block has them before block
// 0 changes them: a barrier of the cluster lies between.
__device__ __forceinline__ void take_slots(const Slots& slots) {
  slots.take();
  __syncthreads();
  order_victims(slots, true);
}

// Everything: reads are sent off as early as what they depend on is there, since each takes longer than what is computed between them.
// Up to take_over() they are of what no dense chain writes: all but q, K and V.
template <class T>
__device__ __forceinline__ void run_service(const fkv_cache& cache, const fkv_retrieve_params& params, const ServiceLayout& layout,
                                            char* shared) {
  __shared__ Copies copies;
  const Peers peers;
  const int32_t head = blockIdx.y, row_index = blockIdx.z, layer = params.layer, stage = params.stage;
  const ServiceMemory memory(shared, layout);
  const fkv_row& row_there = cache.rows[row_index];
  const int32_t sequence = row_there.sequence;
  int32_t* const n_misses = params.workspace.n_misses + miss_list(cache, row_index, head);
  if (sequence < 0) {
    take_over();
    if (peers.rank != 0 || threadIdx.x != 0) return;
    *n_misses = 0;
    if (params.prepare) store_flag(cache, row_there, nullptr, false, layer, row_index, head);
    return;
  }
  const fkv_lane& lane_there = cache.lanes[sequence];
  copies.take(row_there, lane_there);
  const bool stored = stage != FKV_FIRST && !params.prepare && flags_of(cache, layer, row_index)[head] != 0;
  Before before{};
  float tau = 0.0f;
  if (params.prepare) {
    if (compares(row_there, &lane_there)) {
      const int32_t h = min(static_cast<int32_t>(threadIdx.x) / kWarp, cache.n_q_heads / cache.n_kv_heads - 1);
      before = take_before(group_query_before(cache, lane_there, layer, head) + h * cache.head_dim, cache.head_dim);
      tau = lane_there.tau[layer];
    }
    make_turns(memory.turns, params.rope, params.rope.positions[row_index], kServeThreads - 1 - threadIdx.x, kServeThreads);
  }
  __syncthreads();
  const Service service{cache, params, copies.row, copies.lane, row_index, head, peers, shared, layout};
  const int32_t n = n_candidates(copies.lane, target_length(copies.row, stage), cache.page_size);
  const bool may_serve = selects(copies.lane) && (params.prepare || serves(cache, copies.row, copies.lane, stored, stage) != Query::none);
  const bool walks = may_serve && n > copies.lane.k;
  TileWalk walk;
  if (walks) {
    const Scored scored = scored_head(cache, params.workspace, copies.row, copies.lane, Query::previous, layer, row_index, head, stage);
    const Share share(peers, n);
    walk = TileWalk(scored, share);
    if (params.prepare && (copies.row.speculation != FKV_SPECULATE_NONE || copies.row.correction != FKV_CORRECT_OFF))
      send_for_digests(cache, scored, share, kSentBytes / static_cast<int32_t>(gridDim.x * gridDim.y * gridDim.z));
  }
  if (may_serve && !copies.lane.resident && copies.lane.n_slots <= kMostSlots)
    take_slots(Slots(memory.slots, copies.lane, lane_head(cache, layer, head), false, false));
  if (walks) walk.resolve(cache);
  take_over();
  const bool flagged = params.prepare ? service.prepare<T>(memory, before, tau) : stored;
  const Query query = serves(cache, copies.row, copies.lane, flagged, stage);
  if (query != Query::none) {
    const bool stalls = params.stall != nullptr && stage == FKV_NOW;
    const uint64_t start = stalls ? clock_ns() : 0;
    if (!params.prepare) peers.arrive();
    service.serve<T>(memory, query, walk, params.prepare && peers.rank == 0);
    if (stalls) service.count_stall(start);
  } else if (peers.rank == 0 && threadIdx.x == 0) {
    *n_misses = 0;
  }
  if (params.finish && peers.rank == peers.size - 1 && completes_page(cache, copies.row))
    finish_head<T>(cache, copies.row, copies.lane, params.digest_kind, layer, head);
}

}  // namespace fkv
