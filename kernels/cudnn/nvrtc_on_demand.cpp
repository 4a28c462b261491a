#include <cuda.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <nvrtc.h>

// The functions of the run-time compiler that the cuDNN frontend's headers refer to. Linking the
// library would cost every process 30 MiB, also those that never see a device; these load it when
// an engine is first compiled.
namespace {

void* library() {
  static void* const handle =
      dlopen(fmt::format("libnvrtc.so.{}", CUDA_VERSION / 1000).c_str(), RTLD_NOW | RTLD_LOCAL);
  return handle;
}

template <typename... Parameters, typename... Arguments>
nvrtcResult forward_to(const char* name, nvrtcResult (* /*type*/)(Parameters...),
                       Arguments... arguments) {
  using Function = nvrtcResult (*)(Parameters...);
  void* const symbol = library() == nullptr ? nullptr : dlsym(library(), name);
  if (symbol == nullptr) return NVRTC_ERROR_INTERNAL_ERROR;
  return reinterpret_cast<Function>(symbol)(arguments...);
}

}  // namespace

extern "C" {

[[gnu::visibility("hidden")]] nvrtcResult nvrtcCreateProgram(nvrtcProgram* program,
                                                             const char* source, const char* name,
                                                             int headers,
                                                             const char* const* contents,
                                                             const char* const* names) {
  return forward_to("nvrtcCreateProgram", nvrtcCreateProgram, program, source, name, headers,
                    contents, names);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  return forward_to("nvrtcDestroyProgram", nvrtcDestroyProgram, program);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int count,
                                                              const char* const* options) {
  return forward_to("nvrtcCompileProgram", nvrtcCompileProgram, program, count, options);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* bytes) {
  return forward_to("nvrtcGetCUBINSize", nvrtcGetCUBINSize, program, bytes);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* data) {
  return forward_to("nvrtcGetCUBIN", nvrtcGetCUBIN, program, data);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program,
                                                                 size_t* bytes) {
  return forward_to("nvrtcGetProgramLogSize", nvrtcGetProgramLogSize, program, bytes);
}

[[gnu::visibility("hidden")]] nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* log) {
  return forward_to("nvrtcGetProgramLog", nvrtcGetProgramLog, program, log);
}

}  // extern "C"
