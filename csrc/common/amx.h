#pragma once
// The product of gemm.h for pairs of bfloat16, as AMX does it: 16 rows, 16 pairs of terms and 16 lanes in an instruction
// (TDPBF16PS).  B is read along its rows, so b_k is 1 here, and k comes in whole tiles, with zeros where there is
// nothing: what is beside a zero must be finite.  For vectors as wide as a tile register.
#include "common/gemm.h"

namespace mirasol::MIRASOL_ISA {

constexpr int SIDE = 16;  // of a tile register
static inline int64_t whole_tiles(int64_t n) { return (n + SIDE - 1) / SIDE * SIDE; }

#if defined(__AMX_BF16__)
#define AMX_ZERO(tile) _tile_zero(tile)
#define AMX_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define AMX_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define AMX_MULTIPLY(sum, b, a) _tile_dpbf16ps(sum, b, a)
// gcc's intrinsics do not say that they read memory.
static inline void amx_fence() { __asm__ volatile("" ::: "memory"); }

// Tile registers are there while one of these is: eight, all of them whole.
class Amx {
 public:
  explicit Amx(bool wanted) : on(wanted) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = SIDE;
    amx_fence();
    if (on) _tile_loadconfig(&config);
  }
  ~Amx() {
    if (on) _tile_release();
  }
  Amx(const Amx&) = delete;

 private:
  bool on;
};
#else  // what the instructions do, for tests on chips that lack them
struct TileRegister {
  uint32_t at[SIDE][SIDE];
};
static thread_local TileRegister tile_registers[8];
static inline void amx_move(void* to, const void* from, int64_t to_stride, int64_t from_stride) {
  for (int i = 0; i < SIDE; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_stride, static_cast<const char*>(from) + i * from_stride, 4 * SIDE);
}
static inline void amx_multiply(TileRegister& sum, const TileRegister& b, const TileRegister& a) {
  const auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int n = 0; n < SIDE; ++n)
    for (int m = 0; m < SIDE; ++m) {
      float firsts = 0, seconds = 0, c = number(sum.at[n][m]);
      for (int k = 0; k < SIDE; ++k) {
        const uint32_t x = b.at[n][k], y = a.at[k][m];
        firsts = __builtin_fmaf(number(x << 16), number(y << 16), firsts);
        seconds = __builtin_fmaf(number(x & 0xffff0000u), number(y & 0xffff0000u), seconds);
      }
      c += firsts + seconds;
      std::memcpy(&sum.at[n][m], &c, sizeof c);
    }
}
#define AMX_ZERO(tile) tile_registers[tile] = {}
#define AMX_LOAD(tile, from, stride) amx_move(tile_registers[tile].at, from, 4 * SIDE, stride)
#define AMX_STORE(tile, to, stride) amx_move(to, tile_registers[tile].at, stride, 4 * SIDE)
#define AMX_MULTIPLY(sum, b, a) amx_multiply(tile_registers[sum], tile_registers[b], tile_registers[a])
static inline void amx_fence() {}
struct Amx {
  explicit Amx(bool) {}
};
#endif

struct AmxProduct {
  int vectors, n, k;  // m is `vectors` whole vectors; k: of terms, SIDE pairs each
  const float* a;
  int64_t a_k, a_v;  // strides, in floats as all of them
  const Element* b;  // rows up to a multiple of SIDE are read, and ignored
  int64_t b_n;
  const Element* b_last;  // (n, SIDE): the last of the k, where it is not the one in b; or none
  float* c;
  int64_t c_n, c_v;
  bool add = false;
  const Bits* mask = nullptr;  // one per vector, or none: C of a lane that is off gets nothing, not even 0 * NaN
};

// C of up to N x V tile registers.
template <int N, int V>
static inline void amx_block(const AmxProduct& p, const float* a, const Element* b, const Element* b_last, float* c,
                             int64_t c_n, int64_t c_v, bool add) {
  float* const below = c + SIDE * c_n;
  const int64_t c_bytes = 4 * c_n, a_bytes = 4 * p.a_k;
  if (add) {
    AMX_LOAD(0, c, c_bytes);
    if constexpr (V > 1) AMX_LOAD(1, c + c_v, c_bytes);
    if constexpr (N > 1) AMX_LOAD(2, below, c_bytes);
    if constexpr (N > 1 && V > 1) AMX_LOAD(3, below + c_v, c_bytes);
  } else {
    AMX_ZERO(0);
    AMX_ZERO(1);
    AMX_ZERO(2);
    AMX_ZERO(3);
  }
  int64_t b_n = p.b_n;
  for (int i = 0; i < p.k; ++i, b += SIDE, a += SIDE * p.a_k) {
    if (b_last && i == p.k - 1) b = b_last, b_n = SIDE;
    AMX_LOAD(4, b, 4 * b_n);
    AMX_LOAD(6, a, a_bytes);
    AMX_MULTIPLY(0, 4, 6);
    if constexpr (V > 1) {
      AMX_LOAD(7, a + p.a_v, a_bytes);
      AMX_MULTIPLY(1, 4, 7);
    }
    if constexpr (N > 1) {
      AMX_LOAD(5, b + SIDE * b_n, 4 * b_n);
      AMX_MULTIPLY(2, 5, 6);
      if constexpr (V > 1) AMX_MULTIPLY(3, 5, 7);
    }
  }
  AMX_STORE(0, c, c_bytes);
  if constexpr (V > 1) AMX_STORE(1, c + c_v, c_bytes);
  if constexpr (N > 1) AMX_STORE(2, below, c_bytes);
  if constexpr (N > 1 && V > 1) AMX_STORE(3, below + c_v, c_bytes);
}

static inline void amx_gemm(const AmxProduct& p) {
  amx_fence();
  for (int v = 0; v < p.vectors; v += 2)
    for (int n = 0; n < p.n; n += 2 * SIDE) {
      const int rows = least(2 * SIDE, p.n - n), wide = least(2, p.vectors - v);
      const float* const a = p.a + v * p.a_v;
      const Element *const b = p.b + n * p.b_n, *const b_last = p.b_last ? p.b_last + n * SIDE : nullptr;
      const auto block = [&](float* c, int64_t c_n, int64_t c_v, bool add) {
        if (rows > SIDE) {
          if (wide > 1) amx_block<2, 2>(p, a, b, b_last, c, c_n, c_v, add);
          else amx_block<2, 1>(p, a, b, b_last, c, c_n, c_v, add);
        } else if (wide > 1) {
          amx_block<1, 2>(p, a, b, b_last, c, c_n, c_v, add);
        } else {
          amx_block<1, 1>(p, a, b, b_last, c, c_n, c_v, add);
        }
      };
      float* const c = p.c + n * p.c_n + v * p.c_v;
      if (!p.mask && rows % SIDE == 0) {
        block(c, p.c_n, p.c_v, p.add);
        continue;
      }
      alignas(64) float sums[2][2 * SIDE * SIDE];
      block(sums[0], SIDE, 2 * SIDE * SIDE, false);
      for (int i = 0; i < wide; ++i)
        for (int r = 0; r < rows; ++r) {
          const Vec x = load(sums[i] + r * SIDE);
          float* const to = c + r * p.c_n + i * p.c_v;
          const Vec sum = p.mask ? keep(p.mask[v + i], x) : x;
          store(to, p.add ? load(to) + sum : sum);
        }
    }
  amx_fence();
}

}  // namespace mirasol::MIRASOL_ISA
