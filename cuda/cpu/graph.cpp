// graph.cpp: replays a captured graph. Each captured stream is a lane with a thread of its own, so branches overlap as
// they do on a device; a lane waits for another lane's node only where an event or a fork made an edge.
#include <algorithm>

#include "runtime.h"

namespace fkv {

GraphBody::GraphBody(std::vector<GraphNode> captured) : nodes(std::move(captured)), done_at(nodes.size()) {
  std::vector<int> lane_of(1, 0);  // captured lane → its place here, where lanes without nodes are left out
  lanes.resize(1);                 // the first stays: it is the launching stream's own
  for (size_t i = 0; i < nodes.size(); ++i) {
    GraphNode& node = nodes[i];
    if (static_cast<size_t>(node.lane) >= lane_of.size()) lane_of.resize(node.lane + 1, -1);
    int& lane = lane_of[node.lane];
    if (lane < 0) {
      lane = static_cast<int>(lanes.size());
      lanes.emplace_back();
    }
    node.lane = lane;
    lanes[lane].push_back(static_cast<int>(i));
    for (const int before : node.after) {
      if (nodes[before].lane != node.lane) nodes[before].crosses = true;
    }
  }
}

bool GraphBody::ready(int node, uint64_t replay_number) const {
  return std::all_of(nodes[node].after.begin(), nodes[node].after.end(),
                     [&](int before) { return done_at[before].load() == replay_number; });
}

namespace {

void replay_lane(fkv_device* device, GraphBody& graph, int lane) {
  const uint64_t number = graph.replay.load();
  for (const int i : graph.lanes[lane]) {
    const GraphNode& node = graph.nodes[i];
    graph.progress.wait([&] { return graph.ready(i, number); }, kSpinNs);
    device->run(node.name, node.work);
    graph.done_at[i].store(number);
    if (node.crosses) graph.progress.notify();
  }
}

}  // namespace

void replay(fkv_stream* stream, const std::shared_ptr<GraphBody>& graph) {
  if (graph->nodes.empty()) return;
  std::lock_guard<std::mutex> running(graph->running);
  auto& helpers = stream->lane_threads;
  while (helpers.size() + 1 < graph->lanes.size()) helpers.push_back(std::make_unique<LaneThread>(stream->device));
  graph->replay.fetch_add(1);
  graph->lanes_running.store(static_cast<int>(graph->lanes.size()) - 1);
  for (size_t lane = 1; lane < graph->lanes.size(); ++lane) helpers[lane - 1]->start(graph, static_cast<int>(lane));
  replay_lane(stream->device, *graph, 0);
  graph->progress.wait([&] { return graph->lanes_running.load() == 0; }, kSpinNs);
}

LaneThread::LaneThread(fkv_device* device) : device_(device), thread_(start_thread([this] { run(); })) {}

LaneThread::~LaneThread() {
  stopping_.store(true);
  arrived_.notify();
  thread_.join();
}

void LaneThread::start(std::shared_ptr<GraphBody> graph, int lane) {
  graph_ = std::move(graph);
  lane_ = lane;
  started_.store(true);
  arrived_.notify();
}

void LaneThread::run() {
  for (;;) {
    arrived_.wait([this] { return started_.load() || stopping_.load(); }, kSpinNs);
    if (!started_.load()) return;
    const std::shared_ptr<GraphBody> graph = std::move(graph_);
    started_.store(false);
    replay_lane(device_, *graph, lane_);
    graph->lanes_running.fetch_sub(1);
    graph->progress.notify();
  }
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_graph_launch(fkv_graph* graph, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(graph)) return status;
    if (const int32_t status = check(stream)) return status;
    FKV_REQUIRE(graph->device == stream->device, FKV_BAD_ARGUMENT, "graph and stream belong to different devices");
    if (const int32_t status = stream->device->check_failure()) return status;
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return break_capture(*stream->capture, "fkv_graph_launch on a capturing stream");
    enqueue(stream, {Op::Kind::kGraph, "", {}, {}, graph->body});
    return FKV_OK;
  });
}

int32_t fkv_graph_destroy(fkv_graph* graph) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(graph)) return status;
    fkv_device* device = graph->device;
    std::lock_guard<std::mutex> issue(device->issue);
    device->graphs.erase(graph);  // launches in progress hold the body
    return FKV_OK;
  });
}
