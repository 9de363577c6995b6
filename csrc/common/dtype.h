#pragma once

namespace mirasol {

enum class Dtype { float32, bfloat16, float16 };  // of tensors; everything inside a kernel is float

// What multiplies: floats; or bfloat16 as it is, two terms at a time (VDPBF16PS), or in tile registers (AMX).  On a
// chip that has neither these are slow, and right.
enum class Products { single, pairs, amx };

}  // namespace mirasol
