/// \file
/// The unboxed entry: the ops that programs call most are compared with the
/// record at their own types, without a stack of `IValue`s.
///
/// `at::_ops::mul_Tensor` carries the op's name and its C++ signature, so one
/// template serves all, and one table lists them. What does not match goes to
/// the boxed entry.
#include <ATen/Operators.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <torch/library.h>

#include "lazy_backend/capture.h"
#include "lazy_backend/match.h"
#include "lazy_backend/op_policy.h"
#include "lazy_backend/passing.h"
#include "lazy_backend/session.h"

namespace reprise {
namespace {

template <class Op, class Schema>
struct HotOp;

template <class Op, class Return, class... Args>
struct HotOp<Op, Return(Args...)> {
  static Return call(Args... args) {
    Session& session = Session::current();
    bool passes = false;
    {
      const std::lock_guard<SessionLock> guard(session.lock());
      if (const Node* cursor = session.hot_cursor(); C10_LIKELY(cursor != nullptr)) {
        const auto hash = [&] {
          CallHash all;
          (all.add(args), ...);
          return all;
        };
        for (Candidates each(cursor, hash); Node* child = each.get(); each.next()) {
          if (child->step->op != handle() || !matches(session.segment(), *child->step, args...)) {
            continue;
          }
          // The results are of this segment, which `advance` may close.
          struct Advance {
            Session& session;
            Node* node;
            ~Advance() noexcept(false) { session.advance(node); }
          } advance{session, child};
          return results<Return>(session, child->step->results, args...);
        }
      } else {
        passes = session.passes();
      }
    }
    // An op that returns nothing writes lists, whose results `Passing` does not know.
    if constexpr (!std::is_void_v<Return>) {
      if (passes) {
        Passing passing;
        std::tuple<Passed<Args>...> passed{Passed<Args>(passing, args)...};  // in this order
        if (C10_LIKELY(passing.possible())) return pass(passing, passed, args...);
      }
    }
    static const auto boxed = c10::BoxedKernel::makeFromFunction<&capture_boxed>();
    return c10::impl::BoxedKernelWrapper<Return(Args...)>::call(
        boxed, handle(), c10::DispatchKeySet(), std::forward<Args>(args)...);
  }

 private:
  static Return pass(Passing& passing, std::tuple<Passed<Args>...>& passed, Args&... args) {
    const auto run = [&]() -> Return {
      const BelowUserModes below;
      const c10::DispatchKeySet keys = passing.keys();
      return std::apply(
          [keys](auto&... each) -> Return {
            if (C10_LIKELY(!keys.empty())) return Op::redispatch(keys, each.get()...);
            return Op::call(each.get()...);
          },
          passed);
    };
    if constexpr (std::is_same_v<Return, at::Tensor&>) {
      run();
      return mutable_tensor(args...);
    } else {
      return passing.wrapped(run());
    }
  }

  static const c10::OperatorHandle& handle() {
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    return op;
  }

  static bool matches(Segment& segment, const Step& step, const Args&... args) {
    const uint32_t size = segment.size();
    const size_t scalars = segment.scalars.size();
    const Arg* recorded = step.args.data();
    Matcher matcher(segment);
    if (C10_LIKELY((matcher.match(*recorded++, args) && ...))) {
      if (C10_UNLIKELY(step.randomness != Randomness::kNone)) segment.draw_random(step, size, scalars);
      return true;
    }
    segment.rollback(size);
    segment.scalars.resize(scalars);
    return false;
  }

  static c10::DispatchKeySet keys_of(int32_t index, const Args&... args) {
    c10::DispatchKeySet keys;
    int32_t k = 0;
    const auto look = [&](const auto& arg) {
      if constexpr (std::is_same_v<std::decay_t<decltype(arg)>, at::Tensor>) {
        if (k == index) keys = arg.key_set();
      }
      ++k;
    };
    (look(args), ...);
    return keys;
  }

  static at::Tensor tensor(Session& session, const Result& result, const Args&... args) {
    switch (result.kind) {
      case Result::Kind::kNew:
        return session.segment().make_new(result);
      case Result::Kind::kAlias:
        return session.segment().make_alias(result, keys_of(result.arg, args...));
      default:
        return at::Tensor();
    }
  }

  /// The argument that an in-place or `out` op returns again.
  template <class First, class... Rest>
  static at::Tensor& mutable_tensor(First& first, Rest&... rest) {
    if constexpr (std::is_same_v<First, at::Tensor>) {
      return first;
    } else {
      return mutable_tensor(rest...);
    }
  }

  template <class R>
  static R results(Session& session, const std::vector<Result>& recorded, Args&... args) {
    if constexpr (std::is_void_v<R>) {
      return;
    } else if constexpr (std::is_same_v<R, at::Tensor&>) {
      return mutable_tensor(args...);
    } else if constexpr (std::is_same_v<R, at::Tensor>) {
      return tensor(session, recorded[0], args...);
    } else if constexpr (std::is_same_v<R, std::vector<at::Tensor>>) {
      std::vector<at::Tensor> list;
      list.reserve(recorded[0].list->size());
      for (const Result& item : *recorded[0].list) list.push_back(tensor(session, item, args...));
      return list;
    } else {
      return tuple<R>(session, recorded, std::make_index_sequence<std::tuple_size_v<R>>(),
                      args...);
    }
  }
  template <class R, size_t... K>
  static R tuple(Session& session, const std::vector<Result>& recorded,
                 std::index_sequence<K...>, const Args&... args) {
    return R{tensor(session, recorded[K], args...)...};  // braces: in this order
  }
};

/// Returns true where the op was taken.
template <class Op>
void add(torch::Library& library, std::vector<std::string>& names) {
  const auto op = c10::Dispatcher::singleton().findOp({Op::name, Op::overload_name});
  // A composite op is captured in the pieces of which its gradient is made.
  if (!op || op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) return;
  // Results are all that this entry makes; versions are counted by the boxed one.
  if (policy_of(*op).counts_versions) return;
  std::string name = std::string(Op::name).substr(6);
  if (Op::overload_name[0] != '\0') name += std::string(".") + Op::overload_name;
  library.impl(name.c_str(), torch::CppFunction::makeFromUnboxedFunction(
                                 &HotOp<Op, typename Op::schema>::call));
  names.push_back(std::move(name));
}

// The ops worth an entry of their own: what models, autograd and optimizers call.
#define REPRISE_HOT_OPS(V)                                                                     \
  V(add_Tensor) V(add__Tensor) V(add_Scalar) V(add__Scalar)                                    \
  V(sub_Tensor) V(sub__Tensor) V(sub_Scalar) V(sub__Scalar) V(rsub_Scalar) V(rsub_Tensor)      \
  V(mul_Tensor) V(mul__Tensor) V(mul_Scalar) V(mul__Scalar)                                    \
  V(div_Tensor) V(div__Tensor) V(div_Scalar) V(div__Scalar) V(div_Tensor_mode)                 \
  V(remainder_Scalar) V(remainder_Tensor) V(fmod_Scalar) V(fmod_Tensor)                        \
  V(pow_Tensor_Scalar) V(pow_Tensor_Tensor) V(pow_Scalar) V(pow__Scalar)                       \
  V(addcmul) V(addcmul_) V(addcdiv) V(addcdiv_) V(lerp_Scalar) V(lerp__Scalar)                 \
  V(lerp_Tensor) V(lerp__Tensor) V(neg) V(neg_) V(abs) V(abs_) V(sign) V(sgn)                  \
  V(exp) V(exp_) V(expm1) V(log) V(log_) V(log2) V(log10) V(log1p) V(sqrt) V(sqrt_) V(rsqrt)   \
  V(reciprocal) V(reciprocal_) V(sin) V(cos) V(tan) V(asin) V(acos) V(atan) V(atan2)           \
  V(sinh) V(cosh) V(tanh) V(tanh_) V(erf) V(erfc) V(erfinv) V(floor) V(ceil) V(round)          \
  V(trunc) V(frac) V(sigmoid) V(sigmoid_) V(sigmoid_backward) V(tanh_backward) V(relu)         \
  V(relu_) V(threshold) V(threshold_backward) V(leaky_relu) V(leaky_relu_)                     \
  V(leaky_relu_backward) V(gelu) V(gelu_backward) V(silu) V(silu_) V(silu_backward)            \
  V(elu) V(elu_backward) V(hardtanh) V(hardtanh_) V(hardtanh_backward) V(hardswish)            \
  V(hardswish_backward) V(hardsigmoid) V(hardsigmoid_backward) V(softplus)                     \
  V(softplus_backward) V(mish) V(log_sigmoid_forward) V(log_sigmoid_backward)                  \
  V(clamp) V(clamp_) V(clamp_min) V(clamp_min_) V(clamp_max) V(clamp_max_) V(clamp_Tensor)     \
  V(maximum) V(minimum) V(eq_Scalar) V(eq_Tensor) V(ne_Scalar) V(ne_Tensor) V(lt_Scalar)       \
  V(lt_Tensor) V(le_Scalar) V(le_Tensor) V(gt_Scalar) V(gt_Tensor) V(ge_Scalar) V(ge_Tensor)   \
  V(logical_and) V(logical_or) V(logical_not) V(bitwise_and_Tensor) V(bitwise_or_Tensor)       \
  V(bitwise_not) V(isnan) V(where_self) V(masked_fill_Scalar) V(masked_fill_Tensor)            \
  V(masked_fill__Scalar) V(masked_fill__Tensor) V(fill_Scalar) V(fill__Scalar)                 \
  V(fill__Tensor) V(zero_) V(copy_) V(clone) V(_to_copy) V(mm) V(bmm) V(addmm) V(addmm_)       \
  V(baddbmm) V(baddbmm_) V(mv) V(dot) V(addmv) V(addr) V(ger) V(convolution)                   \
  V(convolution_backward) V(native_batch_norm) V(native_batch_norm_backward)                   \
  V(native_layer_norm) V(native_layer_norm_backward) V(native_group_norm)                      \
  V(native_group_norm_backward) V(max_pool2d_with_indices)                                     \
  V(max_pool2d_with_indices_backward) V(avg_pool2d) V(avg_pool2d_backward)                     \
  V(_adaptive_avg_pool2d) V(_adaptive_avg_pool2d_backward) V(upsample_nearest2d)               \
  V(upsample_nearest2d_backward) V(upsample_bilinear2d) V(_softmax)                            \
  V(_softmax_backward_data) V(_log_softmax) V(_log_softmax_backward_data)                      \
  V(nll_loss_forward) V(nll_loss_backward) V(nll_loss2d_forward) V(nll_loss2d_backward)        \
  V(mse_loss) V(mse_loss_backward) V(smooth_l1_loss) V(smooth_l1_loss_backward)                \
  V(huber_loss) V(huber_loss_backward) V(binary_cross_entropy)                                 \
  V(binary_cross_entropy_backward) V(binary_cross_entropy_with_logits) V(embedding)            \
  V(embedding_dense_backward) V(_scaled_dot_product_flash_attention_for_cpu)                   \
  V(_scaled_dot_product_flash_attention_for_cpu_backward) V(sum) V(sum_dim_IntList)            \
  V(mean) V(mean_dim) V(prod) V(prod_dim_int) V(var_correction) V(var_mean_correction)         \
  V(std_correction) V(amax) V(amin) V(max) V(min) V(max_dim) V(min_dim) V(argmax) V(argmin)    \
  V(logsumexp) V(norm_ScalarOpt_dim) V(norm_Scalar) V(linalg_vector_norm) V(cumsum)            \
  V(cumprod) V(sort) V(topk) V(any) V(any_dim) V(all) V(all_dim) V(view) V(_unsafe_view)       \
  V(_reshape_alias) V(t) V(transpose_int) V(permute) V(expand) V(squeeze) V(squeeze_dim)       \
  V(squeeze_dims) V(unsqueeze) V(select_int) V(slice_Tensor) V(split_Tensor)                   \
  V(split_with_sizes) V(unbind_int) V(unfold) V(diagonal) V(alias) V(detach) V(as_strided)     \
  V(view_dtype) V(view_as_real) V(view_as_complex) V(_conj) V(select_backward)                 \
  V(slice_backward) V(cat) V(stack) V(repeat) V(flip) V(roll) V(tril) V(triu)                  \
  V(index_Tensor) V(index_put_) V(_index_put_impl_) V(index_select) V(index_add_)              \
  V(index_copy_) V(index_fill__int_Scalar) V(gather) V(scatter_src) V(scatter_value)           \
  V(scatter__src) V(scatter__value) V(scatter_add) V(scatter_add_) V(new_zeros)                \
  V(new_empty) V(new_empty_strided) V(new_full) V(new_ones) V(empty_like) V(zeros_like)        \
  V(ones_like) V(full_like) V(constant_pad_nd) V(reflection_pad2d) V(replication_pad2d)        \
  V(uniform_) V(normal_) V(bernoulli__float) V(rand_like) V(randn_like) V(glu)                 \
  V(_prelu_kernel) V(im2col) V(col2im) V(grid_sampler_2d) V(nan_to_num) V(outer) V(cross)      \
  V(linalg_cross) V(_cdist_forward) V(polar) V(complex) V(real) V(imag) V(native_dropout)      \
  V(native_dropout_backward) V(_foreach_add_List) V(_foreach_add__List)                        \
  V(_foreach_mul_Scalar) V(_foreach_mul__Scalar) V(_foreach_add__Scalar)                       \
  V(_foreach_addcmul__Scalar) V(_foreach_addcdiv__Scalar) V(_foreach_sqrt)                     \
  V(_foreach_lerp__Scalar) V(_foreach_zero_)

}  // namespace

std::vector<std::string> register_hot_ops() {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten",
                                            c10::DispatchKey::Lazy, __FILE__, __LINE__);
  std::vector<std::string> names;
#define REPRISE_ADD(op) add<at::_ops::op>(*library, names);
  REPRISE_HOT_OPS(REPRISE_ADD)
#undef REPRISE_ADD
  return names;
}

}  // namespace reprise
