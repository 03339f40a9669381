// capture.cu: captures and the graphs that come of them. CUDA records; what the ABI refuses during a capture is refused here first, so
// that the text says what was done, and a capture that was broken can only be ended.
#include <algorithm>

#include "runtime.cuh"

namespace fkv {

int32_t refuse_while_capturing(fkv_device* device, const char* call) {
  const std::lock_guard<std::mutex> issue(device->issue);
  return break_own_captures(device->captures, call);
}

cudaError_t end_capture(fkv_device* device, const std::shared_ptr<Capture>& capture, cudaGraph_t* graph) {
  const cudaError_t error = cudaStreamEndCapture(capture->origin->handle, graph);
  for (fkv_stream* stream : capture->streams) stream->leave();
  capture->streams.clear();
  capture->ended = true;
  device->captures.erase(std::find(device->captures.begin(), device->captures.end(), capture));
  return error;
}

namespace {

// The one node of the capture behind which the stream's next operation comes; null where there are several, or no capture.
cudaGraphNode_t node_ahead(const fkv_stream* stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t n = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream->handle, &capturing, nullptr, nullptr, &nodes, &edges, &n);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && capturing == cudaStreamCaptureStatusActive && n == 1 ? nodes[0] : nullptr;
}

}  // namespace

bool begins_early(fkv_stream* stream, unsigned behind) {
  const Captured latest = stream->latest;
  if (stream->device->plain || stream->device->properties.major < 9 || latest.node == nullptr) return false;
  return (behind >> static_cast<int>(latest.kind) & 1u) != 0 && node_ahead(stream) == latest.node;
}

void remember_launch(fkv_stream* stream, Kind kind) {
  const std::lock_guard<std::mutex> issue(stream->device->issue);
  if (stream->capture) stream->latest = {node_ahead(stream), kind};
}

}  // namespace fkv

fkv_graph::~fkv_graph() {
  cudaGraphExecDestroy(handle);  // launches in flight run to their end
  cudaGetLastError();
  magic = 0;
}

using namespace fkv;

int32_t fkv_capture_begin(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    fkv_device* device = stream->device;
    if (const int32_t status = ready(device, "fkv_capture_begin")) return status;
    const std::lock_guard<std::mutex> issue(device->issue);
    if (stream->capture) return break_capture(*stream->capture, "fkv_capture_begin on a stream that captures already");
    auto capture = std::make_shared<Capture>();
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    capture->streams = {stream};
    const cudaError_t error = cudaStreamBeginCapture(stream->own, cudaStreamCaptureModeThreadLocal);
    if (const int32_t status = status_of(device, error, "fkv_capture_begin")) return status;
    device->captures.push_back(capture);
    stream->enter(capture);
    return FKV_OK;
  });
}

int32_t fkv_capture_end(fkv_graph** graph, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(graph != nullptr, FKV_BAD_ARGUMENT, "graph: null");
    *graph = nullptr;
    if (const int32_t status = check(stream)) return status;
    fkv_device* device = stream->device;
    if (const int32_t status = ready(device, "fkv_capture_end")) return status;
    const std::lock_guard<std::mutex> issue(device->issue);
    const std::shared_ptr<Capture> capture = stream->capture;
    FKV_REQUIRE(capture != nullptr, FKV_CAPTURE, "fkv_capture_end: the stream does not capture");
    if (capture->origin != stream) {
      return break_capture(*capture, "fkv_capture_end on another stream than the one that the capture began on");
    }
    if (capture->thread != std::this_thread::get_id()) {
      return break_capture(*capture, "fkv_capture_end on another thread than the one that began the capture");
    }
    cudaGraph_t captured = nullptr;
    const cudaError_t error = end_capture(device, capture, &captured);
    const auto drop = [](cudaGraph_t unused) { cudaGraphDestroy(unused); };
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(drop)> owned(captured, drop);
    if (!capture->broken.empty()) {
      cudaGetLastError();
      return fail(FKV_CAPTURE, "the capture was broken by %s; its graph is dropped", capture->broken.c_str());
    }
    if (error == cudaErrorStreamCaptureUnjoined) {
      cudaGetLastError();
      return fail(FKV_CAPTURE,
                  "unjoined fork: nothing on the capture's stream comes after the last operation of another stream in it; record an "
                  "event behind that and wait for it before fkv_capture_end. The graph is dropped");
    }
    if (const int32_t status = status_of(device, error, "fkv_capture_end")) return status;
    cudaGraphExec_t executable = nullptr;
    if (const int32_t status = status_of(device, cudaGraphInstantiate(&executable, captured, 0), "fkv_capture_end")) return status;
    auto made = std::make_unique<fkv_graph>(device, executable);
    *graph = made.get();
    device->graphs.emplace(*graph, std::move(made));
    return FKV_OK;
  });
}

int32_t fkv_graph_launch(fkv_graph* graph, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(graph)) return status;
    if (const int32_t status = check(stream)) return status;
    FKV_REQUIRE(graph->device == stream->device, FKV_BAD_ARGUMENT, "graph and stream belong to different devices");
    if (const int32_t status = ready(stream->device, "fkv_graph_launch")) return status;
    const std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return break_capture(*stream->capture, "fkv_graph_launch on a capturing stream");
    return status_of(stream->device, cudaGraphLaunch(graph->handle, stream->handle), "fkv_graph_launch");
  });
}

int32_t fkv_graph_destroy(fkv_graph* graph) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(graph)) return status;
    fkv_device* device = graph->device;
    const std::lock_guard<std::mutex> issue(device->issue);
    device->graphs.erase(graph);
    return FKV_OK;
  });
}
