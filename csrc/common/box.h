// Operators as torch's stable ABI calls them: what TORCH_BOX does, for functions of our Tensor, whose results move out.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/check.h"

#ifdef FASTMOE_ROUTE_PTXVM
extern "C" void ptxvm_returns(AtenTensorHandle result);  // tools/ptxvm/runtime/torch_tensors.cpp
#endif

namespace fastmoe_route {

// An argument, taken from torch: tensors are ours from here on.
template <class T>
T unbox(StableIValue value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle.has_value() ? OptionalTensor(std::in_place, *handle) : std::nullopt;
  } else {
    return torch::stable::detail::to<T>(value);
  }
}

// A result, given to torch.
template <class T>
StableIValue box(T value) {
  if constexpr (std::is_same_v<T, Tensor>) {
#ifdef FASTMOE_ROUTE_PTXVM
    ptxvm_returns(value.get());
#endif
    return torch::stable::detail::from(value.release());
  } else {
    return torch::stable::detail::from(value);
  }
}

// What becomes of the results: their number, and their way to the stack.
template <class T>
struct Results {
  static constexpr uint64_t kCount = 1;
  static void store(StableIValue* stack, T&& result) { stack[0] = box(std::move(result)); }
};
template <>
struct Results<void> {
  static constexpr uint64_t kCount = 0;
};
template <class... T>
struct Results<std::tuple<T...>> {
  static constexpr uint64_t kCount = sizeof...(T);
  static void store(StableIValue* stack, std::tuple<T...>&& results) {
    std::apply([&](T&... each) { ((*stack++ = box(std::move(each))), ...); }, results);
  }
};

template <auto kFunction, class Result, class... Parameters, size_t... I>
void call(Result (*)(Parameters...), std::index_sequence<I...>, StableIValue* stack) {
  std::tuple<std::decay_t<Parameters>...> arguments{unbox<std::decay_t<Parameters>>(stack[I])...};
  if constexpr (std::is_void_v<Result>) kFunction(static_cast<Parameters&&>(std::get<I>(arguments))...);
  else Results<Result>::store(stack, kFunction(static_cast<Parameters&&>(std::get<I>(arguments))...));
}

template <auto kFunction, class Result, class... Parameters>
void checked_call(Result (*function)(Parameters...), StableIValue* stack, uint64_t num_arguments,
                  uint64_t num_results) {
  check(num_arguments == sizeof...(Parameters) && num_results == Results<Result>::kCount,
        "an operator must have the arguments and results of its function, got ", num_arguments, " and ", num_results);
  call<kFunction>(function, std::index_sequence_for<Parameters...>(), stack);
}

// What m.impl takes for kFunction.
template <auto kFunction>
void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  checked_call<kFunction>(kFunction, stack, num_arguments, num_results);
}

}  // namespace fastmoe_route
