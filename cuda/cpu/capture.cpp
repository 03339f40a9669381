// capture.cpp: turns what is issued to a stream, and to streams that fork from it, into a graph.
#include <algorithm>

#include "runtime.h"

namespace fkv {

int32_t refuse_while_capturing(fkv_device* device, const char* call) {
  std::lock_guard<std::mutex> issue(device->issue);
  return break_own_captures(device->captures, call);
}

void add_frontier(fkv_stream* stream, const std::vector<int>& nodes) {
  for (const int node : nodes) {
    if (std::find(stream->frontier.begin(), stream->frontier.end(), node) == stream->frontier.end()) {
      stream->frontier.push_back(node);
    }
  }
}

void end_capture(fkv_device* device, const std::shared_ptr<Capture>& capture) {
  for (fkv_stream* stream : capture->streams) {
    stream->capture.reset();
    stream->frontier.clear();
    stream->lane = 0;
  }
  capture->streams.clear();
  capture->ended = true;
  device->captures.erase(std::find(device->captures.begin(), device->captures.end(), capture));
}

namespace {

// Index of a node that the last ones do not come after, directly or not; −1: there is none.
int unjoined_node(const std::vector<GraphNode>& nodes, const std::vector<int>& last) {
  std::vector<bool> reached(nodes.size());
  std::vector<int> todo = last;
  while (!todo.empty()) {
    const int node = todo.back();
    todo.pop_back();
    if (reached[node]) continue;
    reached[node] = true;
    todo.insert(todo.end(), nodes[node].after.begin(), nodes[node].after.end());
  }
  const auto found = std::find(reached.begin(), reached.end(), false);
  return found == reached.end() ? -1 : static_cast<int>(found - reached.begin());
}

}  // namespace

}  // namespace fkv

using namespace fkv;

int32_t fkv_capture_begin(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = stream->device->check_failure()) return status;
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return break_capture(*stream->capture, "fkv_capture_begin on a stream that captures already");
    auto capture = std::make_shared<Capture>();
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    capture->streams = {stream};
    stream->device->captures.push_back(capture);
    stream->capture = std::move(capture);
    stream->lane = 0;
    stream->frontier.clear();
    return FKV_OK;
  });
}

int32_t fkv_capture_end(fkv_graph** graph, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(graph != nullptr, FKV_BAD_ARGUMENT, "graph: null");
    *graph = nullptr;
    if (const int32_t status = check(stream)) return status;
    fkv_device* device = stream->device;
    std::lock_guard<std::mutex> issue(device->issue);
    const std::shared_ptr<Capture> capture = stream->capture;
    FKV_REQUIRE(capture != nullptr, FKV_CAPTURE, "fkv_capture_end: the stream does not capture");
    if (capture->origin != stream) {
      return break_capture(*capture, "fkv_capture_end on another stream than the one that the capture began on");
    }
    if (capture->thread != std::this_thread::get_id()) {
      return break_capture(*capture, "fkv_capture_end on another thread than the one that began the capture");
    }
    std::vector<GraphNode> nodes = std::move(capture->nodes);
    const std::vector<int> last = std::move(stream->frontier);
    end_capture(device, capture);
    FKV_REQUIRE(capture->broken.empty(), FKV_CAPTURE, "the capture was broken by %s; its graph is dropped",
                capture->broken.c_str());
    const int unjoined = unjoined_node(nodes, last);
    FKV_REQUIRE(unjoined < 0, FKV_CAPTURE,
                "unjoined fork: nothing on the capture's stream comes after operation %d, %s; record an event "
                "behind it and wait for that before fkv_capture_end. The graph is dropped",
                unjoined, nodes[unjoined].name);
    auto made = std::make_unique<fkv_graph>(device, std::make_shared<GraphBody>(std::move(nodes)));
    *graph = made.get();
    device->graphs.emplace(*graph, std::move(made));
    return FKV_OK;
  });
}
