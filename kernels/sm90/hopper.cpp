#include "kernels/sm90/hopper.hpp"

#include "kernels/cuda/check.hpp"

namespace annulus::kernels::sm90 {

std::string other_device() {
  int device = 0;
  int major = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9 ? "" : "the device is no Hopper GPU";
}

}  // namespace annulus::kernels::sm90
