// Element types as the kernels see them: 16 bits are bits until they are widened.
#pragma once

#include <cstdint>

namespace shifcon {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

enum class Element { float32, bfloat16, float16 };

// What one thread moves at once: 128 bits.
struct alignas(16) Words {
    std::uint32_t word[4];
};

struct alignas(16) Floats {
    float value[4];
};

struct alignas(8) WordPair {
    std::uint32_t word[2];
};

struct alignas(8) FloatPair {
    float first, second;
};

template <typename T>
constexpr bool is_float16 = false;
template <>
inline constexpr bool is_float16<Float16> = true;

}  // namespace shifcon
