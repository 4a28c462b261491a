#include "runtime/operation.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {

bool native_is_forced() {
  const char* value = std::getenv("FORCE_NATIVE_RUNTIME");
  if (value == nullptr) return false;
  std::string word = value;
  std::transform(word.begin(), word.end(), word.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return word == "true" || word == "yes" || word == "ok" || word == "1";
}

OperationImpl::OperationImpl(std::string name, OperationMetadata metadata)
    : name_(std::move(name)), metadata_(std::move(metadata)) {
  require(metadata_.context != nullptr, ExitCode::usage,
          "{}: metadata without a context; resolve_metadata() makes it", name_);
  const auto at = metadata_.operation_configs.find(name_);
  if (at != metadata_.operation_configs.end()) tuning_ = at->second;
}

OperationOutput OperationImpl::operator()(const AttentionInputs& inputs,
                                          const AttentionOptions& options) {
  if (native_is_forced()) return forward_native(inputs, options);
  const std::string& backend = metadata_.backend;
  if (backend == "cpu") return forward_cpu(inputs, options);
  if (backend == "gpu") return forward_gpu(inputs, options);
  if (backend == "cuda" || backend == "cudnn") return forward_cuda(inputs, options);
  if (backend == "rocm") return forward_rocm(inputs, options);
  throw Error(ExitCode::usage,
              fmt::format("{}: unknown backend '{}'; known are cpu, gpu, cuda, cudnn, rocm", name_,
                          backend));
}

OperationOutput OperationImpl::forward_cpu(const AttentionInputs& inputs,
                                           const AttentionOptions& options) {
  return forward_native(inputs, options);
}

OperationOutput OperationImpl::forward_gpu(const AttentionInputs& inputs,
                                           const AttentionOptions& options) {
  return forward_native(inputs, options);
}

OperationOutput OperationImpl::forward_cuda(const AttentionInputs& inputs,
                                            const AttentionOptions& options) {
  return forward_gpu(inputs, options);
}

OperationOutput OperationImpl::forward_rocm(const AttentionInputs& inputs,
                                            const AttentionOptions& options) {
  return forward_gpu(inputs, options);
}

OperationGradients OperationImpl::backward(const AttentionInputs& /*inputs*/,
                                           const AttentionOptions& /*options*/,
                                           const OperationOutput& /*output*/,
                                           const DistributedTensor& /*grad_output*/) {
  throw Error(ExitCode::usage, name_ + ": this operation has no backward pass");
}

}  // namespace annulus
