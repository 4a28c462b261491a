#pragma once

#include <string>

#include "runtime/attention_inputs.hpp"
#include "runtime/context.hpp"

namespace annulus {

/// What decides whether the kernels of a device can compute an attention at all.
struct BackendNeeds {
  DType dtype = DType::f32;
  AttentionShape shape = {};
  float scale = 1.0F;
  float soft_cap = 0.0F;
  float dropout = 0.0F;
  bool backward = false;
  /// What devices do not give: P itself, and the same bits for any number of ranks.
  bool weights = false;
  bool reproducible = false;
};

/// The backend of an attention for which nobody named one: "cuda" where every rank has a device
/// and a kernel there that serves it, else "cpu". The same on all ranks; collective.
std::string default_backend(Context& context, const BackendNeeds& needs);

}  // namespace annulus
