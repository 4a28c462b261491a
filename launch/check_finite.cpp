#include "launch/check_finite.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "runtime/agreement.hpp"
#include "runtime/tensor.hpp"

namespace annulus::launch {
namespace {

// Rows of the first dimensions are looked at one by one, in f32.
constexpr std::int64_t kElementsAtOnce = std::int64_t{1} << 20;

std::vector<std::int64_t> global_index(const DistributedTensor& tensor, std::int64_t element) {
  const Shape& shape = tensor.local().shape;
  std::vector<std::int64_t> index(static_cast<std::size_t>(shape.rank()));
  for (int dim = shape.rank() - 1; dim >= 0; --dim) {
    index[static_cast<std::size_t>(dim)] =
        tensor.layout().global_index(tensor.rank(), dim, element % shape[dim]);
    element /= shape[dim];
  }
  return index;
}

void check_local(std::string_view tensor_name, const DistributedTensor& tensor,
                 bool minus_infinity) {
  const ConstTensorView local = tensor.local();
  const std::int64_t elements = local.shape.elements();
  const Tensor host = Tensor::copy_of(local, std::nullopt, Device::cpu);  // row-major
  const auto* bytes = static_cast<const std::byte*>(host.view().data);
  std::vector<float> values;
  for (std::int64_t begin = 0; begin < elements; begin += kElementsAtOnce) {
    const std::int64_t count = std::min(kElementsAtOnce, elements - begin);
    values.resize(static_cast<std::size_t>(count));
    const ConstTensorView part(bytes + begin * size_bytes(local.dtype), local.dtype, Shape{count});
    copy(part, {values.data(), DType::f32, Shape{count}});
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = values[static_cast<std::size_t>(i)];
      if (std::isfinite(value)) continue;
      if (minus_infinity && value == -std::numeric_limits<float>::infinity()) continue;
      throw Error(
          ExitCode::bad_data,
          fmt::format("{} is {} at [{}] on rank {}; finite numbers are expected", tensor_name,
                      value, fmt::join(global_index(tensor, begin + i), ", "), tensor.rank()));
    }
  }
}

}  // namespace

void check_finite(Context& context, std::string_view tensor_name, const DistributedTensor& tensor,
                  bool minus_infinity) {
  agree(context.world(), [&] {
    if (tensor) check_local(tensor_name, tensor, minus_infinity);
  });
}

}  // namespace annulus::launch
