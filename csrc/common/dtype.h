#pragma once

namespace mirasol {

enum class Dtype { float32, bfloat16, float16 };  // of tensors; everything inside a kernel is float

}  // namespace mirasol
