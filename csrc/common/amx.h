#pragma once
// The product of gemm.h for pairs of bfloat16, as AMX does it: 16 rows, 16 pairs of terms and 16 lanes at a time
// (TDPBF16PS).  B is read along its rows, so b_k is 1 here, and k comes in whole tiles, with zeros where there is
// nothing: what is beside a zero must be finite.  For vectors as wide as a tile register.
#include "common/half.h"

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
    amx_fence();
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

// Memory that is on its way to a cache while something is computed, `step` bytes for each term of a block of C, or tile
// register of terms: at the pace of a product, where a loop of its own would have to wait for it.
struct Ahead {
  const char* next;
  int64_t step;
};

struct AmxProduct {
  int vectors, n, k;  // m is `vectors` whole vectors; k: of terms, SIDE pairs each
  const float* a;
  int64_t a_k, a_v;  // strides, in floats as all of them
  const Element* b;  // rows up to a multiple of SIDE are read, and ignored
  int64_t b_n;
  float* c;
  int64_t c_n, c_v;
  bool add = false;
  Ahead* ahead = nullptr;  // or none
};

// V tile registers of C, side by side.
template <int V>
static inline void amx_row(const AmxProduct& p, const float* a, const Element* b, float* c, int64_t c_n, int64_t c_v) {
  const int64_t c_bytes = 4 * c_n, a_bytes = 4 * p.a_k, b_bytes = 4 * p.b_n;
  if (p.add) {
    AMX_LOAD(0, c, c_bytes);
    if constexpr (V > 1) AMX_LOAD(1, c + c_v, c_bytes);
    if constexpr (V > 2) AMX_LOAD(2, c + 2 * c_v, c_bytes);
    if constexpr (V > 3) AMX_LOAD(3, c + 3 * c_v, c_bytes);
  } else {
    AMX_ZERO(0);
    if constexpr (V > 1) AMX_ZERO(1);
    if constexpr (V > 2) AMX_ZERO(2);
    if constexpr (V > 3) AMX_ZERO(3);
  }
  for (int i = 0; i < p.k; ++i, b += SIDE, a += SIDE * p.a_k) {
    if (p.ahead) {
      for (int64_t byte = 0; byte < p.ahead->step; byte += 64) __builtin_prefetch(p.ahead->next + byte);
      p.ahead->next += p.ahead->step;
    }
    AMX_LOAD(4, b, b_bytes);
    AMX_LOAD(5, a, a_bytes);
    AMX_MULTIPLY(0, 4, 5);
    if constexpr (V > 1) {
      AMX_LOAD(6, a + p.a_v, a_bytes);
      AMX_MULTIPLY(1, 4, 6);
    }
    if constexpr (V > 2) {
      AMX_LOAD(7, a + 2 * p.a_v, a_bytes);
      AMX_MULTIPLY(2, 4, 7);
    }
    if constexpr (V > 3) {
      AMX_LOAD(5, a + 3 * p.a_v, a_bytes);
      AMX_MULTIPLY(3, 4, 5);
    }
  }
  AMX_STORE(0, c, c_bytes);
  if constexpr (V > 1) AMX_STORE(1, c + c_v, c_bytes);
  if constexpr (V > 2) AMX_STORE(2, c + 2 * c_v, c_bytes);
  if constexpr (V > 3) AMX_STORE(3, c + 3 * c_v, c_bytes);
}

// How many steps an Ahead takes in a product.
static inline int64_t amx_steps(int64_t vectors, int64_t n, int64_t k) {
  return (vectors + 3) / 4 * (whole_tiles(n) / SIDE) * (whole_tiles(k) / SIDE);
}

// `V` vectors from v on.  A of them stays in a first-level cache where k is short; B is read once for all of them.
template <int V>
static inline void amx_columns_of(const AmxProduct& p, int v) {
  const float* const a = p.a + v * p.a_v;
  for (int n = 0; n < p.n; n += SIDE) {
    const Element* const b = p.b + n * p.b_n;
    float* const c = p.c + n * p.c_n + v * p.c_v;
    const int rows = least(SIDE, p.n - n);
    if (rows == SIDE) {
      amx_row<V>(p, a, b, c, p.c_n, p.c_v);
      continue;
    }
    alignas(64) float sums[V][SIDE * SIDE] = {};
    const auto each = [&](auto use) {
      for (int i = 0; i < V; ++i)
        for (int r = 0; r < rows; ++r) use(sums[i] + r * SIDE, c + r * p.c_n + i * p.c_v);
    };
    if (p.add) each([](float* sum, const float* to) { store(sum, load(to)); });
    amx_fence();
    amx_row<V>(p, a, b, sums[0], SIDE, SIDE * SIDE);
    each([](const float* sum, float* to) { store(to, load(sum)); });
  }
}

static inline void amx_gemm(const AmxProduct& p) {
  amx_fence();
  int v = 0;
  for (int blocks = (p.vectors + 3) / 4; blocks > 0; --blocks) {  // of nearly the same width: 5 is 3 + 2
    const int wide = (p.vectors - v + blocks - 1) / blocks;
    switch (wide) {
      case 4: amx_columns_of<4>(p, v); break;
      case 3: amx_columns_of<3>(p, v); break;
      case 2: amx_columns_of<2>(p, v); break;
      default: amx_columns_of<1>(p, v);
    }
    v += wide;
  }
  amx_fence();
}

}  // namespace mirasol::MIRASOL_ISA
