#include "lazy_backend/cuda_graph.h"

#ifdef REPRISE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>

#include "lazy_backend/input_places.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/session.h"
#include "reprise/options.h"
#endif

namespace reprise {

#ifdef REPRISE_WITH_CUDA
namespace {

/// Graphs that there are. Each keeps the memory of what it computes on the way.
std::atomic<int64_t> graphs{0};

/// What the graphs of a device share.
struct GraphDevice {
  explicit GraphDevice(c10::DeviceIndex index) {
    cudaStream_t stream = nullptr;
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    capture_stream.emplace(at::cuda::getStreamFromExternal(stream, index));
  }

  /// Nothing can be captured on the default stream, and nobody else works on this one. One
  /// capture at a time.
  std::optional<at::cuda::CUDAStream> capture_stream;
  std::mutex capturing;

  /// Where a graph ran last. On another stream they would run side by side, and all of them
  /// use the workspace that cuBLAS has for the stream of the captures.
  std::optional<at::cuda::CUDAStream> last_stream;
  std::mutex replaying;
};

GraphDevice& graph_device(c10::DeviceIndex index) {
  static std::mutex mutex;
  static auto* devices = new std::vector<std::unique_ptr<GraphDevice>>;
  const std::lock_guard lock(mutex);
  const auto k = static_cast<size_t>(index);
  if (devices->size() <= k) devices->resize(k + 1);
  if (!(*devices)[k]) (*devices)[k] = std::make_unique<GraphDevice>(index);
  return *(*devices)[k];
}

/// Launches on a GPU, captured. Not `at::cuda::CUDAGraph`: after a capture that fails, that one
/// leaves the random generators unusable (aten/src/ATen/cuda/CUDAGraph.cpp, torch 2.11). What
/// it does for them is not needed here: programs draw no random numbers.
class Graph {
 public:
  explicit Graph(c10::DeviceIndex index) : index_(index), pool_(at::cuda::graph_pool_handle()) {}
  ~Graph() {
    if (executable_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(executable_));
    if (graph_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphDestroy(graph_));
    if (has_pool_) c10::cuda::CUDACachingAllocator::releasePool(index_, pool_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  /// Runs `body` without any effect on the device. Its memory comes from a pool of the
  /// graph's own: in a common one, what a graph computes on the way could lie where a result
  /// of another one is held. Throws what `body` throws, and what cannot be captured.
  template <class Body>
  auto capture(const Body& body) {
    GraphDevice& device = graph_device(index_);
    const std::lock_guard one_at_a_time(device.capturing);
    const at::cuda::CUDAStream stream = *device.capture_stream;
    const c10::cuda::CUDAStreamGuard on_stream(stream);
    at::cuda::getCurrentCUDABlasHandle();  // takes its workspace for this stream outside the pool
    namespace allocator = c10::cuda::CUDACachingAllocator;
    allocator::beginAllocateToPool(index_, pool_, [raw = stream.stream()](cudaStream_t s) { return s == raw; });
    has_pool_ = true;
    std::exception_ptr error;
    decltype(body()) result;
    const cudaError_t begun = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    cudaError_t ended = begun;
    if (begun == cudaSuccess) {
      try {
        result = body();
      } catch (...) {
        error = std::current_exception();
      }
      ended = cudaStreamEndCapture(stream, &graph_);
    }
    allocator::endAllocateToPool(index_, pool_);
    if (ended != cudaSuccess) (void)cudaGetLastError();  // it is not the next call's
    if (error) std::rethrow_exception(error);
    TORCH_CHECK(ended == cudaSuccess && graph_ != nullptr, cudaGetErrorString(ended));
    return result;
  }

  size_t launches() const {
    size_t count = 0;
    C10_CUDA_CHECK(cudaGraphGetNodes(graph_, nullptr, &count));
    return count;
  }
  void instantiate() { C10_CUDA_CHECK(cudaGraphInstantiate(&executable_, graph_, 0)); }
  void launch(const at::cuda::CUDAStream& stream) const {
    C10_CUDA_CHECK(cudaGraphLaunch(executable_, stream));
  }

 private:
  c10::DeviceIndex index_;
  at::cuda::MempoolId_t pool_;
  bool has_pool_ = false;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

c10::SmallVector<const void*, 128> addresses_of(const std::vector<at::Tensor>& tensors) {
  c10::SmallVector<const void*, 128> addresses;
  for (const at::Tensor& tensor : tensors) {
    addresses.push_back(tensor.storage().data() == nullptr ? nullptr : tensor.const_data_ptr());
  }
  return addresses;
}

/// A graph of a program for inputs that lie as `places` says.
class GraphedProgram {
 public:
  GraphedProgram(c10::Device device, const std::vector<bool>& written) : device_(device), written_(written) {}
  ~GraphedProgram() { drop(); }
  GraphedProgram(const GraphedProgram&) = delete;
  GraphedProgram& operator=(const GraphedProgram&) = delete;

  InputPlaces places;
  uint64_t replays = 0;

  bool captured() const { return graph_ != nullptr; }
  /// Why there is no graph, and will be none; empty where there is one or may be.
  const std::string& reason() const { return reason_; }
  std::string about() const {
    if (!reason_.empty()) return "no CUDA graph: " + reason_;
    if (graph_ == nullptr) return "not yet a CUDA graph";
    return c10::str("a CUDA graph of ", launches_, " launches, replayed ", replays, "x; ", copied_.size(), " of ",
                    inputs_, " inputs are copied");
  }
  void give_up(std::string reason) { reason_ = std::move(reason); }

  void drop() {
    copied_.clear();
    copies_.clear();
    if (graph_ == nullptr) return;
    graph_.reset();
    outputs_.clear();
    --graphs;
  }

  bool capture(Runner& program, const std::vector<at::Tensor>& inputs) {
    if (!capturable(inputs)) return false;
    inputs_ = inputs.size();
    std::vector<at::Tensor> fixed = inputs;
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (!places.moves(k)) continue;
      fixed[k] = at::empty_strided(inputs[k].sizes(), inputs[k].strides(), inputs[k].options());
      copied_.push_back(k);
      copies_.push_back(fixed[k]);
    }
    auto graph = std::make_unique<Graph>(device_.index());
    std::vector<at::Tensor> outputs;
    try {
      outputs = graph->capture([&] { return program.run(std::move(fixed)); });
      launches_ = graph->launches();
      if (useful(inputs, outputs)) graph->instantiate();
    } catch (const std::exception& error) {
      const std::string message = error.what();
      give_up(message.substr(0, message.find('\n')));
    }
    if (!reason_.empty()) {
      drop();
      return false;
    }
    graph_ = std::move(graph);
    ++graphs;
    outputs_.clear();
    for (const at::Tensor& output : outputs) {
      Output kept;
      kept.memory = std::make_shared<c10::Storage>(output.storage());
      kept.geometry = Geometry(*output.unsafeGetTensorImpl());
      outputs_.push_back(std::move(kept));
    }
    metrics().cuda_graphs.add(1);
    return true;
  }

  /// Nothing where it cannot run now, and the program has to.
  std::optional<std::vector<at::Tensor>> replay(const std::vector<at::Tensor>& inputs) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    GraphDevice& device = graph_device(device_.index());
    const std::lock_guard one_at_a_time(device.replaying);
    if (Session::several() && C10_UNLIKELY(!may_run_beside_others(inputs))) return std::nullopt;
    if (C10_UNLIKELY(ran_on_ && *ran_on_ != stream)) {
      // Whoever holds a result may go on to read it there.
      const c10::cuda::CUDAStreamGuard guard(*ran_on_);
      for (Output& output : outputs_) move_away(output, *ran_on_);
    }
    ran_on_ = stream;
    if (C10_UNLIKELY(device.last_stream != stream)) {
      if (device.last_stream) device.last_stream->synchronize();
      device.last_stream = stream;
    }
    for (Output& output : outputs_) move_away(output, stream);
    copy_inputs(inputs, stream);
    graph_->launch(stream);
    ++replays;
    metrics().cuda_graph_replays.add(1);
    std::vector<at::Tensor> results;
    results.reserve(outputs_.size());
    for (Output& output : outputs_) results.push_back(give(output));
    return results;
  }

 private:
  /// Below, launching them costs no more than launching the graph.
  static constexpr size_t kFewLaunches = 4;
  static constexpr size_t kMostCopiedBytes = size_t{64} << 20;
  /// From so many on, one kernel that copies them all is faster to launch.
  static constexpr size_t kManyCopies = 6;

  /// Memory of the graph's that holds an output.
  struct Output {
    std::shared_ptr<c10::Storage> memory;
    c10::intrusive_ptr<c10::StorageImpl> given;  ///< to whoever called last
    Geometry geometry;
  };

  bool capturable(const std::vector<at::Tensor>& inputs) {
    size_t bytes = 0;
    for (size_t k = 0; k < inputs.size(); ++k) {
      const bool moves = places.moves(k);
      if (!inputs[k].is_cuda()) {
        give_up(c10::str("input ", k, " is on the host"));
      } else if (moves && written_[k]) {
        give_up(c10::str("input ", k, " is written, and is at another place each time"));
      } else if (moves && !inputs[k].is_non_overlapping_and_dense()) {
        give_up(c10::str("input ", k, " is at another place each time, and is no dense tensor"));
      } else {
        bytes += moves ? inputs[k].nbytes() : 0;
        continue;
      }
      return false;
    }
    if (bytes > kMostCopiedBytes) {
      give_up(c10::str(bytes >> 20, " MiB of its inputs are at another place each time"));
      return false;
    }
    if (graphs.load() >= options().most_cuda_graphs) {
      give_up(c10::str("there are ", graphs.load(), " graphs already"));
      return false;
    }
    return true;
  }

  /// Whether to go on with what was captured.
  bool useful(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs) {
    const size_t copies = copied_.size() < kManyCopies ? copied_.size() : kManyCopies;
    if (launches_ < kFewLaunches + copies) give_up(c10::str("it is ", launches_, " launches"));
    const auto is_one_of = [](const at::Tensor& tensor, const auto& begin, const auto& end) {
      return std::any_of(begin, end, [&](const at::Tensor& other) {
        return other.storage().data() != nullptr && other.storage().data() == tensor.storage().data();
      });
    };
    for (auto output = outputs.begin(); output != outputs.end(); ++output) {
      if (output->nbytes() == 0 && output->storage().data() == nullptr) continue;
      if (is_one_of(*output, inputs.begin(), inputs.end()) || is_one_of(*output, outputs.begin(), output)) {
        give_up("it returns memory that is not its own");
      }
    }
    return reason_.empty();
  }

  /// Whether no other thread can be in the middle of using what the graph writes: nobody holds a
  /// result, and no input was moved away since its address was looked at.
  bool may_run_beside_others(const std::vector<at::Tensor>& inputs) const {
    const bool held = std::any_of(outputs_.begin(), outputs_.end(), [](const Output& output) {
      return output.given && output.given.use_count() > 1;
    });
    return !held && places.fits(addresses_of(inputs));
  }

  void copy_inputs(const std::vector<at::Tensor>& inputs, const at::cuda::CUDAStream& stream) {
    if (copied_.size() >= kManyCopies) {
      std::vector<at::Tensor> sources;
      sources.reserve(copied_.size());
      for (const size_t k : copied_) sources.push_back(inputs[k]);
      at::_foreach_copy_(copies_, sources, /*non_blocking=*/true);
      return;
    }
    for (size_t each = 0; each < copied_.size(); ++each) {
      const at::Tensor& copy = copies_[each];
      if (copy.nbytes() == 0) continue;
      C10_CUDA_CHECK(cudaMemcpyAsync(copy.mutable_data_ptr(), inputs[copied_[each]].const_data_ptr(), copy.nbytes(),
                                     cudaMemcpyDeviceToDevice, stream));
    }
  }

  /// Where somebody holds what the graph gave last: that storage gets memory of its own.
  static void move_away(Output& output, const at::cuda::CUDAStream& stream) {
    if (!output.given) return;
    const void* memory = output.memory->data();
    const size_t nbytes = output.given->nbytes();
    // Where it was resized, it lies elsewhere already.
    const bool here = output.given->data() == memory;
    if (C10_LIKELY(output.given.use_count() == 1 && here && nbytes == output.memory->nbytes())) return;
    if (output.given.use_count() > 1 && here && nbytes > 0) {
      c10::DataPtr own = c10::cuda::CUDACachingAllocator::get()->allocate(nbytes);
      C10_CUDA_CHECK(cudaMemcpyAsync(own.get(), memory, nbytes, cudaMemcpyDeviceToDevice, stream));
      output.given->set_data_ptr_noswap(std::move(own));
    }
    output.given.reset();
  }

  static at::Tensor give(Output& output) {
    if (!output.given) {
      // The graph's memory lives as long as anybody shows it.
      auto* owner = new std::shared_ptr<c10::Storage>(output.memory);
      c10::DataPtr data(output.memory->mutable_data(), owner,
                        [](void* context) { delete static_cast<std::shared_ptr<c10::Storage>*>(context); },
                        output.memory->device());
      output.given = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), output.memory->nbytes(), std::move(data),
          c10::cuda::CUDACachingAllocator::get(), /*resizable=*/true);
    }
    return backing_tensor(c10::Storage(output.given), output.geometry);
  }

  const c10::Device device_;
  const std::vector<bool>& written_;
  std::string reason_;
  size_t launches_ = 0, inputs_ = 0;
  std::optional<at::cuda::CUDAStream> ran_on_;
  std::vector<size_t> copied_;       ///< inputs that move
  std::vector<at::Tensor> copies_;   ///< where the graph reads them
  std::vector<Output> outputs_;
  std::unique_ptr<Graph> graph_;
};

class GraphedRunner final : public Runner {
 public:
  GraphedRunner(std::shared_ptr<Runner> program, c10::Device device, std::vector<bool> written)
      : program_(std::move(program)), device_(device), written_(std::move(written)) {}

  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    const c10::cuda::CUDAGuard guard(device_);
    if (given_up_.load(std::memory_order_relaxed)) return program_->run(std::move(inputs));
    const std::unique_lock lock(mutex_, std::try_to_lock);
    const bool free = lock.owns_lock() && at::cuda::currentStreamCaptureStatusMayInitCtx() ==
                                              c10::cuda::CaptureStatus::None;
    if (!free) return program_->run(std::move(inputs));
    const auto addresses = addresses_of(inputs);
    GraphedProgram& graphed = graphed_at(addresses);
    if (graphed.captured()) {
      if (C10_LIKELY(graphed.places.fits(addresses))) return replayed(graphed, std::move(inputs));
      graphed.drop();
    }
    graphed.places.see(addresses);
    if (!graphed.places.settled() || !graphed.reason().empty()) return program_->run(std::move(inputs));
    if (++captures_ > kCaptures) {
      for (const auto& each : graphed_) each->drop();
      graphed.give_up("inputs keep moving");
      given_up_.store(true, std::memory_order_relaxed);
      return program_->run(std::move(inputs));
    }
    return graphed.capture(*program_, inputs) ? replayed(graphed, std::move(inputs)) : program_->run(std::move(inputs));
  }

  std::string about() const override {
    const std::lock_guard lock(mutex_);
    if (graphed_.empty()) return "not yet a CUDA graph";
    std::string text = graphed_.front()->about();
    if (graphed_.size() > 1) text += c10::str("; for inputs at ", graphed_.size() - 1, " other places: ");
    for (size_t k = 1; k < graphed_.size(); ++k) text += (k > 1 ? "; " : "") + graphed_[k]->about();
    return text;
  }

 private:
  /// Graphs for inputs at different places: of models that share a program.
  static constexpr size_t kMost = 4;
  /// In all, where inputs that lay still have moved after all.
  static constexpr int kCaptures = 16;

  std::vector<at::Tensor> replayed(GraphedProgram& graphed, std::vector<at::Tensor>&& inputs) {
    if (auto results = graphed.replay(inputs)) return std::move(*results);
    return program_->run(std::move(inputs));
  }

  GraphedProgram& graphed_at(InputPlaces::Addresses addresses) {
    const size_t k = user_at(graphed_, addresses, kMost,
                             [](const auto& each) -> const InputPlaces& { return each->places; });
    if (k == graphed_.size()) graphed_.push_back(std::make_unique<GraphedProgram>(device_, written_));
    std::rotate(graphed_.begin(), graphed_.begin() + static_cast<std::ptrdiff_t>(k),
                graphed_.begin() + static_cast<std::ptrdiff_t>(k) + 1);
    return *graphed_.front();
  }

  const std::shared_ptr<Runner> program_;
  const c10::Device device_;
  const std::vector<bool> written_;
  std::atomic<bool> given_up_{false};

  mutable std::mutex mutex_;  // what follows
  int captures_ = 0;
  std::vector<std::unique_ptr<GraphedProgram>> graphed_;  ///< the one used last first
};

}  // namespace

std::shared_ptr<Runner> with_cuda_graph(std::shared_ptr<Runner> program, c10::Device device,
                                        std::vector<bool> written) {
  if (!device.is_cuda() || !options().cuda_graphs) return program;
  return std::make_shared<GraphedRunner>(std::move(program), device, std::move(written));
}

#else

std::shared_ptr<Runner> with_cuda_graph(std::shared_ptr<Runner> program, c10::Device,
                                        std::vector<bool>) {
  return program;
}

#endif

}  // namespace reprise
