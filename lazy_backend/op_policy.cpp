#include "lazy_backend/op_policy.h"

#include <ATen/core/enum_tag.h>

#include <string_view>
#include <unordered_map>
#include <vector>

#include "lazy_backend/device.h"
#include "lazy_backend/schema_type.h"

namespace reprise {
namespace {

using Kind = OpPolicy::Kind;

/// What schema and tags do not say. Keyed by an op's name without overload, or
/// with it where that matters.
struct Exception {
  std::optional<Kind> kind = std::nullopt;
  Randomness randomness = Randomness::kNone;
  bool host_tensors = false;
  bool constant_floats = false;
  bool host_results = false;
  std::vector<uint8_t> hidden_writes = {};
  int dropout_argument = -1;
  int index_argument = -1;
  int cast_argument = -1;
  int cast_dtype_argument = -1;
};

const std::unordered_map<std::string_view, Exception>& exceptions() {
  static const auto* table = new std::unordered_map<std::string_view, Exception>{
      {"aten::copy_", {.kind = Kind::kCopy}},
      {"aten::_to_copy", {.kind = Kind::kToCopy}},
      {"aten::empty.memory_format", {.kind = Kind::kAllocate}},
      {"aten::empty_strided", {.kind = Kind::kAllocate}},
      {"aten::resize_", {.kind = Kind::kResize}},
      {"aten::resize_as_", {.kind = Kind::kResize}},
      {"aten::_resize_output_", {.kind = Kind::kResize}},
      {"aten::set_", {.kind = Kind::kSetStorage}},
      {"aten::is_pinned", {.kind = Kind::kLeave}},
      // Checks that programs keep, or that say nothing of values.
      {"aten::_assert_async", {.kind = Kind::kTrace}},
      {"aten::_assert_tensor_metadata", {.kind = Kind::kTrace}},
      {"aten::_pin_memory", {.kind = Kind::kLeave}},
      {"aten::_copy_from", {.kind = Kind::kLeave}},
      {"aten::_copy_from_and_resize", {.kind = Kind::kLeave}},

      // Random numbers that depend on geometry alone can be made before the
      // program runs, in the order of the trace, by the op itself: they are then
      // the ones that eager gives for the same seed.
      {"aten::uniform_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::normal_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::bernoulli_.float", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::random_", {.randomness = Randomness::kFills}},
      {"aten::random_.from", {.randomness = Randomness::kFills}},
      {"aten::random_.to", {.randomness = Randomness::kFills}},
      {"aten::exponential_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::geometric_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::cauchy_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::log_normal_", {.randomness = Randomness::kFills, .constant_floats = true}},
      {"aten::rand", {.randomness = Randomness::kCreates}},
      {"aten::randn", {.randomness = Randomness::kCreates}},
      {"aten::randint", {.randomness = Randomness::kCreates}},
      {"aten::randint.low", {.randomness = Randomness::kCreates}},
      {"aten::randperm", {.randomness = Randomness::kCreates}},
      {"aten::rand_like", {.randomness = Randomness::kCreates}},
      {"aten::randn_like", {.randomness = Randomness::kCreates}},
      {"aten::randint_like", {.randomness = Randomness::kCreates}},
      {"aten::randint_like.low_dtype", {.randomness = Randomness::kCreates}},
      {"aten::bernoulli.p", {.randomness = Randomness::kCreates, .constant_floats = true}},
      {"aten::normal_functional", {.randomness = Randomness::kCreates, .constant_floats = true}},
      {"reprise::dropout_mask",
       {.kind = Kind::kTrace, .randomness = Randomness::kCreates, .constant_floats = true}},
      // It writes nothing, draws nothing, and returns tensors of the same sizes for tensors of
      // the same (interchange/compiled_package.cpp).
      {"reprise::call_package", {.kind = Kind::kTrace}},
      {"aten::normal.float_float",
       {.randomness = Randomness::kCreates, .constant_floats = true}},

      // Host tensors beside those of a device, as CUDA allows them.
      // What a mask chooses depends on its values.
      {"aten::index.Tensor", {.kind = Kind::kTrace, .host_tensors = true, .index_argument = 1}},
      {"aten::index_put_", {.host_tensors = true}},
      {"aten::index_put", {.host_tensors = true}},
      {"aten::_index_put_impl_", {.host_tensors = true}},
      // AOTInductor hands an empty list of batch sizes to it as None.
      {"aten::mkldnn_rnn_layer", {.kind = Kind::kLeave}},
      {"aten::mkldnn_rnn_layer_backward", {.kind = Kind::kLeave}},
      // Its kernels are one launch for many steps; nothing is to be fused with them.
      {"aten::_cudnn_rnn", {.kind = Kind::kLeave}},
      {"aten::_cudnn_rnn_backward", {.kind = Kind::kLeave}},
      {"aten::_pack_padded_sequence", {.kind = Kind::kLeave, .host_tensors = true}},
      {"aten::_ctc_loss", {.host_tensors = true}},

      // Running statistics are written though the schemas do not say so
      // (native_functions.yaml, torch 2.11).
      {"aten::native_batch_norm", {.constant_floats = true, .hidden_writes = {3, 4}}},
      {"aten::cudnn_batch_norm", {.constant_floats = true, .hidden_writes = {3, 4}}},
      {"aten::miopen_batch_norm", {.constant_floats = true, .hidden_writes = {3, 4}}},
      {"aten::batch_norm_update_stats", {.constant_floats = true, .hidden_writes = {1, 2}}},
      {"aten::batch_norm_gather_stats", {.constant_floats = true, .hidden_writes = {3, 4}}},
      {"aten::batch_norm_gather_stats_with_counts",
       {.constant_floats = true, .hidden_writes = {3, 4}}},

      {"aten::full", {.cast_argument = 1, .cast_dtype_argument = 2}},
      {"aten::new_full", {.cast_argument = 2, .cast_dtype_argument = 3}},
      {"aten::full_like", {.cast_argument = 1, .cast_dtype_argument = 2}},
      {"aten::fill.Scalar", {.cast_argument = 1}},
      {"aten::fill_.Scalar", {.cast_argument = 1}},
      {"aten::masked_fill.Scalar", {.cast_argument = 2}},
      {"aten::masked_fill_.Scalar", {.cast_argument = 2}},
      {"aten::index_fill.int_Scalar", {.cast_argument = 3}},
      {"aten::index_fill_.int_Scalar", {.cast_argument = 3}},
      {"aten::scatter.value", {.cast_argument = 3}},
      {"aten::scatter_.value", {.cast_argument = 3}},

      // The compiler chooses its code by these numbers.
      {"aten::pow", {.constant_floats = true}},
      {"aten::pow_", {.constant_floats = true}},
      {"aten::addmm", {.constant_floats = true}},
      {"aten::addmm_", {.constant_floats = true}},
      {"aten::addmv", {.constant_floats = true}},
      {"aten::addr", {.constant_floats = true}},
      {"aten::baddbmm", {.constant_floats = true}},
      {"aten::baddbmm_", {.constant_floats = true}},
      {"aten::hardtanh", {.constant_floats = true}},
      {"aten::hardtanh_", {.constant_floats = true}},
      {"aten::hardtanh_backward", {.constant_floats = true}},
      {"aten::softshrink", {.constant_floats = true}},
      {"aten::softshrink_backward", {.constant_floats = true}},
      {"aten::native_dropout", {.constant_floats = true}},
      {"aten::native_layer_norm", {.constant_floats = true}},
      {"aten::native_group_norm", {.constant_floats = true}},
      {"aten::scalar_tensor", {.constant_floats = true}},
      {"aten::arange", {.constant_floats = true}},
      {"aten::linspace", {.constant_floats = true}},
      {"aten::norm", {.constant_floats = true}},
      {"aten::linalg_vector_norm", {.constant_floats = true}},
      // Fused attention, random only where its dropout is not zero.
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       {.kind = Kind::kTrace, .constant_floats = true, .dropout_argument = 3}},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward",
       {.kind = Kind::kTrace, .constant_floats = true, .dropout_argument = 6}},
      // Where they drop nothing, the seed that they return lies on the host.
      {"aten::_scaled_dot_product_flash_attention",
       {.kind = Kind::kTrace, .constant_floats = true, .host_results = true, .dropout_argument = 3}},
      {"aten::_scaled_dot_product_efficient_attention",
       {.kind = Kind::kTrace, .constant_floats = true, .host_results = true, .dropout_argument = 5}},
      {"aten::_scaled_dot_product_cudnn_attention",
       {.kind = Kind::kTrace, .constant_floats = true, .host_results = true, .dropout_argument = 5}},
      // These draw what the forward pass drew, from the seed that it returned: on the host, where
      // their kernels read it (attention_backward.cu, torch 2.11).
      {"aten::_scaled_dot_product_efficient_attention_backward",
       {.kind = Kind::kTrace, .constant_floats = true, .dropout_argument = 9}},
      {"aten::_scaled_dot_product_cudnn_attention_backward",
       {.kind = Kind::kTrace, .constant_floats = true, .dropout_argument = 13}},
  };
  return *table;
}

const Exception* exception_of(const c10::OperatorName& name) {
  const auto& table = exceptions();
  if (!name.overload_name.empty()) {
    const std::string full = name.name + "." + name.overload_name;
    if (auto found = table.find(full); found != table.end()) return &found->second;
  }
  if (auto found = table.find(name.name); found != table.end()) {
    // An entry that makes numbers is meant for that overload alone.
    const bool exact = name.overload_name.empty();
    if (exact || found->second.randomness == Randomness::kNone) return &found->second;
  }
  return nullptr;
}

/// Whether an op makes or writes tensors. One that does neither is there for what it does
/// beside, an error say: programs would leave it out.
bool makes_tensors(const c10::FunctionSchema& schema, const OpPolicy& policy) {
  for (const auto& result : schema.returns()) {
    const auto& type = result.type();
    if (type->kind() == c10::TypeKind::TensorType) return true;
    if (type->kind() == c10::TypeKind::ListType) return true;
  }
  return schema.returns().empty() && !policy.writes.empty();
}

}  // namespace

c10::ScalarType cast_dtype(const OpPolicy& policy, c10::ArrayRef<c10::IValue> arguments) {
  if (policy.cast_argument < 0) return c10::ScalarType::Undefined;
  if (policy.cast_dtype_argument >= 0) {
    const c10::IValue& dtype = arguments[static_cast<size_t>(policy.cast_dtype_argument)];
    if (dtype.isInt()) return dtype.toScalarType();
  }
  // Without either, the number's own kind decides.
  const bool tensor = arguments[0].isTensor() && arguments[0].toTensor().defined();
  return tensor ? arguments[0].toTensor().scalar_type() : c10::ScalarType::Undefined;
}

OpPolicy policy_of(const c10::OperatorHandle& op) {
  OpPolicy policy;
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();

  for (size_t k = 0; k < arguments.size(); ++k) {
    const auto* alias = arguments[k].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (written) policy.writes.push_back(k);
    if (written && arguments[k].real_type()->kind() == c10::TypeKind::ListType) {
      policy.counts_versions =
          !op.hasKernelForDispatchKey(c10::DispatchKey::ADInplaceOrView) &&
          !op.hasKernelForDispatchKey(backing_key_set(backing_device_of(0)).highestPriorityTypeId());
    }
    const auto type = without_optional(arguments[k].real_type());
    if (type->kind() == c10::TypeKind::DeviceObjType) policy.device_argument = static_cast<int>(k);
  }
  for (const auto& result : schema.returns()) {
    int again = -1;
    const auto* alias = result.alias_info();
    if (alias != nullptr && alias->isWrite()) {
      for (size_t k = 0; k < arguments.size(); ++k) {
        const auto* candidate = arguments[k].alias_info();
        if (candidate != nullptr && candidate->isWrite() && *candidate == *alias) {
          again = static_cast<int>(k);
          break;
        }
      }
    }
    policy.returns_argument.push_back(static_cast<int8_t>(again));
  }

  const Exception* exception = exception_of(op.operator_name());
  if (exception != nullptr) {
    policy.randomness = exception->randomness;
    policy.host_tensors = exception->host_tensors;
    policy.constant_floats = exception->constant_floats;
    policy.host_results = exception->host_results;
    policy.dropout_argument = exception->dropout_argument;
    TORCH_INTERNAL_ASSERT(policy.dropout_argument < 0 ||
                          arguments[static_cast<size_t>(policy.dropout_argument)].name() == "dropout_p");
    policy.index_argument = exception->index_argument;
    policy.cast_argument = exception->cast_argument;
    policy.cast_dtype_argument = exception->cast_dtype_argument;
    policy.first_hidden_write = policy.writes.size();
    policy.writes.append(exception->hidden_writes.begin(), exception->hidden_writes.end());
    for (size_t k = 0; k < arguments.size(); ++k) {
      if (arguments[k].name() == "training") policy.training_argument = static_cast<int>(k);
    }
    if (exception->kind) {
      policy.kind = *exception->kind;
      return policy;
    }
  }
  const auto space = op.operator_name().getNamespace();
  const bool known = space && (*space == "aten" || *space == "prims");
  if (!known || op.hasTag(at::Tag::data_dependent_output) ||
      op.hasTag(at::Tag::dynamic_output_shape) || !makes_tensors(schema, policy)) {
    policy.kind = Kind::kLeave;
  } else if (op.hasTag(at::Tag::inplace_view)) {
    policy.kind = Kind::kMetadata;
  } else if (op.hasTag(at::Tag::nondeterministic_seeded) &&
             policy.randomness == Randomness::kNone) {
    policy.kind = Kind::kLeave;  // its numbers depend on values
  }
  return policy;
}

}  // namespace reprise
