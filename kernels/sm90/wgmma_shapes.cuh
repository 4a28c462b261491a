#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

/// One m64nNk16 multiplication for each N in use. Inline assembly can name neither a count of
/// operands nor a list of them by template, so the operand lists are spelled by macros that end
/// with this file.
namespace annulus::kernels::sm90 {

/// shared: D (+)= A·Bᵀ, both K-major in shared memory.
/// registers: D (+)= A·B, A in registers, B stored [k, n] (N-major) in shared memory.
/// stored: the same, A in shared memory, K-major.
/// registers_k_major: D (+)= A·Bᵀ, A in registers, B K-major in shared memory.
/// transposed: D (+)= AᵀB, A stored [k, m] and B stored [k, n] in shared memory.
/// transposed_k_major: D (+)= AᵀBᵀ, A stored [k, m], B K-major.
template <typename Element, int kN>
struct WgmmaShape;

#define OUT8(i)                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT24 OUT8(0), OUT8(8), OUT8(16)
#define OUT32 OUT24, OUT8(24)
#define OUT40 OUT32, OUT8(32)
#define OUT48 OUT40, OUT8(40)
#define OUT56 OUT48, OUT8(48)
#define OUT64 OUT56, OUT8(56)
#define OUT72 OUT64, OUT8(64)
#define OUT80 OUT72, OUT8(72)
#define OUT88 OUT80, OUT8(80)
#define OUT96 OUT88, OUT8(88)
#define OUT128 OUT96, OUT8(96), OUT8(104), OUT8(112), OUT8(120)

#define REG24                                                                          \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
  "%23"
#define REG32 REG24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REG40 REG32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REG48 REG40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REG56 REG48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define REG64 REG56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define REG72 REG64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define REG80 REG72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define REG88 REG80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define REG96 REG88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define REG128                                                                              \
  REG96                                                                                     \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113," \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// N, accumulators, operand numbers: the first five after the accumulators, then the sixth.
#define SHAPE(TYPE, PTX, N, ACC, O0, O1, O2, O3, O4, O5)                                       \
  template <>                                                                                  \
  struct WgmmaShape<TYPE, N> {                                                                 \
    __device__ static void shared(float (&d)[ACC], std::uint64_t a, std::uint64_t b,           \
                                  int accumulate) {                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, %" #O0 ", %" #O1 ", p, 1, 1, 0, 0;\n}"                                  \
                   : OUT##ACC                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                         \
    }                                                                                          \
    __device__ static void stored(float (&d)[ACC], std::uint64_t a, std::uint64_t b,           \
                                  int accumulate) {                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, %" #O0 ", %" #O1 ", p, 1, 1, 0, 1;\n}"                                  \
                   : OUT##ACC                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                         \
    }                                                                                          \
    __device__ static void transposed(float (&d)[ACC], std::uint64_t a, std::uint64_t b,       \
                                      int accumulate) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, %" #O0 ", %" #O1 ", p, 1, 1, 1, 1;\n}"                                  \
                   : OUT##ACC                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                         \
    }                                                                                          \
    __device__ static void transposed_k_major(float (&d)[ACC], std::uint64_t a,                \
                                              std::uint64_t b, int accumulate) {               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, %" #O0 ", %" #O1 ", p, 1, 1, 1, 0;\n}"                                  \
                   : OUT##ACC                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                         \
    }                                                                                          \
    __device__ static void registers(float (&d)[ACC], const std::uint32_t* a, std::uint64_t b, \
                                     int accumulate) {                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, {%" #O0 ",%" #O1 ",%" #O2 ",%" #O3 "}, %" #O4 ", p, 1, 1, 1;\n}"        \
                   : OUT##ACC                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));     \
    }                                                                                          \
    __device__ static void registers_k_major(float (&d)[ACC], const std::uint32_t* a,          \
                                             std::uint64_t b, int accumulate) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5                                    \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" REG##ACC \
                   "}, {%" #O0 ",%" #O1 ",%" #O2 ",%" #O3 "}, %" #O4 ", p, 1, 1, 0;\n}"        \
                   : OUT##ACC                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));     \
    }                                                                                          \
  };

#define SHAPES(TYPE, PTX)                             \
  SHAPE(TYPE, PTX, 48, 24, 24, 25, 26, 27, 28, 29)    \
  SHAPE(TYPE, PTX, 64, 32, 32, 33, 34, 35, 36, 37)    \
  SHAPE(TYPE, PTX, 80, 40, 40, 41, 42, 43, 44, 45)    \
  SHAPE(TYPE, PTX, 96, 48, 48, 49, 50, 51, 52, 53)    \
  SHAPE(TYPE, PTX, 112, 56, 56, 57, 58, 59, 60, 61)   \
  SHAPE(TYPE, PTX, 128, 64, 64, 65, 66, 67, 68, 69)   \
  SHAPE(TYPE, PTX, 144, 72, 72, 73, 74, 75, 76, 77)   \
  SHAPE(TYPE, PTX, 160, 80, 80, 81, 82, 83, 84, 85)   \
  SHAPE(TYPE, PTX, 176, 88, 88, 89, 90, 91, 92, 93)   \
  SHAPE(TYPE, PTX, 192, 96, 96, 97, 98, 99, 100, 101) \
  SHAPE(TYPE, PTX, 256, 128, 128, 129, 130, 131, 132, 133)

SHAPES(__nv_bfloat16, "bf16")
SHAPES(__half, "f16")

#undef SHAPES
#undef SHAPE
#undef REG128
#undef REG96
#undef REG88
#undef REG80
#undef REG72
#undef REG64
#undef REG56
#undef REG48
#undef REG40
#undef REG32
#undef REG24
#undef OUT128
#undef OUT96
#undef OUT88
#undef OUT80
#undef OUT72
#undef OUT64
#undef OUT56
#undef OUT48
#undef OUT40
#undef OUT32
#undef OUT24
#undef OUT8

}  // namespace annulus::kernels::sm90
