/// \file
/// `torch::autocast` for the backing device's type.
///
/// libtorch's autocast kernels cast the tensors of their own device's type only
/// (ATen/autocast_mode.h, `is_autocast_eligible`), and their tables of ops and policies
/// are not to be had. So each op that has such a kernel gets one of ours, at a key above
/// autograd that every lazy tensor carries: while the user's autocast is on, it hands
/// libtorch's kernel *proxies*, tensors which say that they are on the backing device, and
/// whose ops run on the lazy tensors that they stand for.
///
/// The two keys are those that libtorch keeps for modes that nobody has switched on.
#include <ATen/Operators.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "lazy_backend/device.h"
#include "lazy_backend/storage.h"

namespace reprise {
namespace {

constexpr auto kProxyKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

/// Some device's autocast is on in this thread.
bool any_enabled() {
  const auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  return !excluded.has(c10::DispatchKey::AutocastCPU) || !excluded.has(c10::DispatchKey::AutocastCUDA);
}

/// The keys that come after ours.
c10::DispatchKeySet below(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kAutocastKey);
}

class Proxy final : public c10::TensorImpl {
 public:
  Proxy(at::Tensor lazy, c10::Device device)
      : c10::TensorImpl(c10::DispatchKeySet(kProxyKey), lazy.dtype(), device),
        lazy_(std::move(lazy)) {
    set_sizes_and_strides(lazy_.sizes(), lazy_.strides(), lazy_.storage_offset());
    set_storage_access_should_throw();
    // So that libtorch keeps what it casts of a weight.
    if (is_weight(lazy_)) set_requires_grad(true);
  }
  const at::Tensor& lazy() const { return lazy_; }
  static bool is_weight(const at::Tensor& lazy) {
    return lazy.requires_grad() && lazy.is_leaf() && !lazy.is_view() &&
           lazy.scalar_type() == at::kFloat;
  }

 private:
  const at::Tensor lazy_;
};

/// Weights get the same proxy again, for libtorch knows what it has cast by its address.
/// Emptied by the first op that finds autocast off.
using Weights = std::unordered_map<c10::TensorImpl*, at::Tensor>;
thread_local std::unique_ptr<Weights> weights;
/// libtorch's kernels are at work, and have switched autocast off for the ops they call.
thread_local bool casting = false;

void forget_weights() {
  if (C10_UNLIKELY(weights != nullptr) && !casting) weights.reset();
}

at::Tensor proxy_of(const at::Tensor& tensor) {
  if (!is_lazy(tensor)) return tensor;
  const c10::Device device = backing_device_of(tensor.device().index());
  if (!Proxy::is_weight(tensor)) return at::Tensor(c10::make_intrusive<Proxy>(tensor, device));
  if (!weights) weights = std::make_unique<Weights>();
  at::Tensor& proxy = (*weights)[tensor.unsafeGetTensorImpl()];
  if (!proxy.defined()) proxy = at::Tensor(c10::make_intrusive<Proxy>(tensor, device));
  return proxy;
}

at::Tensor lazy_of(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.key_set().has(kProxyKey)) return tensor;
  return static_cast<const Proxy*>(tensor.unsafeGetTensorImpl())->lazy();
}

/// Replaces the last `count` values of the stack, and what is in their lists.
template <class Change>
void change_tensors(torch::jit::Stack& stack, size_t count, const Change& change) {
  for (size_t k = stack.size() - count; k < stack.size(); ++k) {
    c10::IValue& value = stack[k];
    if (value.isTensor()) {
      value = change(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const c10::IValue& item : value.toListRef()) list.push_back(change(item.toTensor()));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const c10::IValue& item : value.toListRef()) {
        list.push_back(item.isNone() ? std::nullopt : std::optional(change(item.toTensor())));
      }
      value = std::move(list);
    }
  }
}

/// An op on proxies: libtorch's cast, or the op itself with what was cast.
void call_on_lazy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  change_tensors(*stack, op.schema().arguments().size(), lazy_of);
  op.callBoxed(stack);
  change_tensors(*stack, op.schema().returns().size(), proxy_of);
}

void autocast_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                    torch::jit::Stack* stack) {
  const bool cuda = backing_device_of(0).is_cuda();
  const auto key = cuda ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  if (c10::impl::tls_is_dispatch_key_excluded(key) || !op.hasKernelForDispatchKey(key)) {
    if (!any_enabled()) forget_weights();
    op.redispatchBoxed(below(keys), stack);
    return;
  }
  struct Casting {
    const bool outer = std::exchange(casting, true);
    ~Casting() { casting = outer; }
  } guard;
  change_tensors(*stack, op.schema().arguments().size(), proxy_of);
  op.redispatchBoxed(c10::DispatchKeySet(key), stack);
  change_tensors(*stack, op.schema().returns().size(), lazy_of);
}

/// The same at an op's own types, for while autocast is off.
template <class Op, class Schema>
struct Autocast;
template <class Op, class Return, class... Args>
struct Autocast<Op, Return(Args...)> {
  static Return call(c10::DispatchKeySet keys, Args... args) {
    if (C10_LIKELY(!any_enabled())) {
      forget_weights();
      return Op::redispatch(below(keys), std::forward<Args>(args)...);
    }
    static const auto boxed = c10::BoxedKernel::makeFromFunction<&autocast_boxed>();
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    return c10::impl::BoxedKernelWrapper<Return(Args...)>::call(boxed, op, keys,
                                                                std::forward<Args>(args)...);
  }
};

bool has_autocast_kernel(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::AutocastCPU) ||
         op.hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA);
}

// Those that programs call in their steps; the others are boxed.
#define REPRISE_TYPED(V)                                                                       \
  V(conv1d) V(conv2d) V(conv3d) V(_convolution) V(convolution) V(conv_transpose1d)             \
  V(conv_transpose2d_input) V(conv_transpose3d_input) V(prelu) V(addmm) V(addmv) V(addr)       \
  V(matmul) V(einsum) V(mm) V(mv) V(linear) V(addbmm) V(baddbmm) V(bmm)                        \
  V(scaled_dot_product_attention) V(lstm_cell) V(gru_cell) V(acos) V(asin) V(cosh) V(erfinv)   \
  V(exp) V(expm1) V(log) V(log10) V(log2) V(log1p) V(reciprocal) V(rsqrt) V(sinh) V(tan)       \
  V(pow_Tensor_Scalar) V(pow_Tensor_Tensor) V(pow_Scalar) V(softplus) V(layer_norm)            \
  V(native_layer_norm) V(group_norm) V(cosine_similarity) V(nll_loss) V(nll_loss2d)            \
  V(kl_div) V(l1_loss) V(smooth_l1_loss) V(huber_loss) V(mse_loss) V(soft_margin_loss)         \
  V(binary_cross_entropy) V(binary_cross_entropy_with_logits) V(cross_entropy_loss) V(cdist)   \
  V(logsumexp) V(prod) V(prod_dim_int) V(softmax_int) V(log_softmax_int) V(cumprod) V(cumsum)  \
  V(linalg_vector_norm) V(sum) V(sum_dim_IntList) V(norm_Scalar) V(norm_ScalarOpt_dim)         \
  V(addcdiv) V(addcmul) V(atan2) V(cross) V(dot) V(grid_sampler) V(grid_sampler_2d)            \
  V(index_put) V(scatter_add) V(cat) V(stack) V(index_copy) V(avg_pool3d) V(max_pool3d)        \
  V(adaptive_avg_pool3d) V(reflection_pad1d) V(reflection_pad2d) V(replication_pad2d)          \
  V(trace) V(view_as_complex) V(polar) V(upsample_nearest2d) V(upsample_bilinear2d)

/// Runs when the library is loaded, after libtorch has registered its kernels.
struct Registration {
  Registration() {
    std::unordered_set<std::string> typed;
#define REPRISE_ADD(name) add<at::_ops::name>(typed);
    REPRISE_TYPED(REPRISE_ADD)
#undef REPRISE_ADD
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
      const auto op = dispatcher.findOp(name);
      if (!op || !op->hasSchema() || !has_autocast_kernel(*op)) continue;
      if (typed.contains(c10::toString(name))) continue;
      impl(name, torch::CppFunction::makeFromBoxedFunction<&autocast_boxed>());
    }
  }

 private:
  template <class Op>
  void add(std::unordered_set<std::string>& typed) {
    const c10::OperatorName name(Op::name, Op::overload_name);
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (!op || !has_autocast_kernel(*op)) return;
    impl(name, torch::CppFunction::makeFromUnboxedFunction(
                   &Autocast<Op, typename Op::schema>::call));
    typed.insert(c10::toString(name));
  }
  void impl(const c10::OperatorName& name, torch::CppFunction&& kernel) {
    const size_t colons = name.name.find("::");
    std::string full = name.name.substr(colons + 2);
    if (!name.overload_name.empty()) full += "." + name.overload_name;
    torch::Library*& library = libraries_[name.name.substr(0, colons)];
    if (library == nullptr) {  // for as long as the process lives
      library = new torch::Library(torch::Library::IMPL, name.name.substr(0, colons),
                                   kAutocastKey, __FILE__, __LINE__);
    }
    library->impl(full.c_str(), std::move(kernel));
  }
  std::map<std::string, torch::Library*> libraries_;
};
const Registration registration;

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {  // kAutocastKey
  m.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {  // kProxyKey
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_on_lazy>());
}

}  // namespace
}  // namespace reprise
